"""Adamax: Adam with the infinity norm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core import arguments
from ..core.torch_form import TorchForm, Variant, betas, number
from ..optimizer import Optimizer, register
from ..scalar import absolute, maximum

__all__ = ["Adamax"]


def adamax(weight, grad, mean, var, lr, beta1, one_minus_beta1, beta2, epsilon):
    mean = beta1 * mean + one_minus_beta1 * grad
    var = maximum(beta2 * var, absolute(grad))
    return weight - lr * mean / (var + epsilon), mean, var


def torch_adamax(weight, grad, exp_avg, exp_inf, lr, one_minus_beta1, beta2, eps):
    """torch.optim.Adamax: `eps` is part of the largest magnitude instead of being added to it."""
    exp_avg = exp_avg + one_minus_beta1 * (grad - exp_avg)
    exp_inf = maximum(beta2 * exp_inf, absolute(grad) + eps)
    return weight - lr * exp_avg / exp_inf, exp_avg, exp_inf


class TorchAdamax(TorchForm):
    documentation = """Adamax as `torch.optim.Adamax` has it.

    ::

        grad = ±grad + weight_decay * weight
        exp_avg = beta1 * exp_avg + (1 - beta1) * grad
        exp_inf = maximum(beta2 * exp_inf, abs(grad) + eps)
        weight -= lr / (1 - beta1**step) * exp_avg / exp_inf

    Parameters
    ----------
    lr : float or Tensor, default 0.002
    betas : tuple of two floats, default (0.9, 0.999)
        Decays of the mean and of the largest magnitude, in [0, 1).
    eps : float, default 1e-8
    weight_decay : float, default 0

    Examples
    --------
    >>> import torch
    >>> from numba_opt.torch import Adamax
    >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> optimizer = Adamax([weight], lr=0.1)
    >>> (weight**2).sum().backward()
    >>> optimizer.step()
    >>> weight.data
    tensor([0.9000, 1.9000])
    """

    options = {
        "lr": 2e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "maximize": False,
    }

    rules = ((torch_adamax, 2),)

    @classmethod
    def variant(cls, group: Mapping[str, Any]) -> Variant:
        beta1, beta2 = betas(group)
        eps = number(group, "eps")

        def hyper(lr: float, t: int) -> tuple[float, ...]:
            return lr / (1 - beta1**t), 1 - beta1, beta2, eps

        return Variant(torch_adamax, ("exp_avg", "exp_inf"), hyper)


@register
class Adamax(Optimizer):
    """Adamax: Adam with the infinity norm in place of the second moment.

    ::

        grad = clip(rescale_grad * grad, clip_gradient) + wd * weight
        mean = beta1 * mean + (1 - beta1) * grad
        var = maximum(beta2 * var, abs(grad))
        weight -= lr / (1 - beta1**t) * mean / (var + epsilon)

    where t counts the parameter's updates, from 1.

    Parameters
    ----------
    learning_rate : float, default 0.002
    beta1 : float, default 0.9
        Decay of the mean of gradients, in [0, 1).
    beta2 : float, default 0.999
        Decay of the largest magnitude, in [0, 1).
    epsilon : float, default 1e-8
        At least 0. Keeps the division finite.
    use_fused_step : bool, default True
        Whether `update` runs the compiled pass. (MXNet's default is False, for want of a kernel.)
    **kwargs
        Those of `Optimizer`.

    Notes
    -----
    The state is ``(mean, var)``, of the weight's shape and dtype.

    References
    ----------
    D. P. Kingma and J. Ba, "Adam: a method for stochastic optimization",
    https://arxiv.org/abs/1412.6980, section 7.1.

    Examples
    --------
    >>> import numpy as np, numba_opt
    >>> weight, grad = np.array([1.0, 2.0]), np.array([0.5, -0.5])
    >>> optimizer = numba_opt.Adamax(learning_rate=0.1)
    >>> state = optimizer.create_state(0, weight)
    >>> optimizer.update([0], [weight], [grad], [state])
    >>> weight.round(4)
    array([0.9, 2.1])
    """

    torch_form = TorchAdamax

    rule = staticmethod(adamax)
    state_names = ("mean", "var")

    def __init__(
        self,
        learning_rate: float | None = 0.002,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        use_fused_step: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate=learning_rate, use_fused_step=use_fused_step, **kwargs)
        self.beta1 = arguments.number("beta1", beta1, below=1)
        self.beta2 = arguments.number("beta2", beta2, below=1)
        self.epsilon = arguments.number("epsilon", epsilon)

    def hyper(self, lr: float, t: int) -> tuple[float, ...]:
        return lr / (1 - self.beta1**t), self.beta1, 1 - self.beta1, self.beta2, self.epsilon
