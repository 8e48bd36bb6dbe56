"""RMSProp, plain and centered."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from ..core import arguments
from ..core.torch_form import TorchForm, Variant, number
from ..optimizer import Optimizer, register
from ..scalar import clip, maximum, sqrt

__all__ = ["RMSProp"]


def rmsprop(weight, grad, var, lr, rho, one_minus_rho, epsilon, bound):
    var = rho * var + one_minus_rho * grad * grad
    return clip(weight - lr * grad / (sqrt(var) + epsilon), bound), var


def centered_rmsprop(weight, grad, mean, var, mom, lr, rho, one_minus_rho, epsilon, bound, momentum):
    mean = rho * mean + one_minus_rho * grad
    var = rho * var + one_minus_rho * grad * grad
    mom = momentum * mom - lr * grad / sqrt(maximum(var - mean * mean, 0) + epsilon)
    return clip(weight + mom, bound), mean, var, mom


# torch.optim.RMSprop's other variants; its plain one is `rmsprop`, without a bound.


def momentum_rmsprop(weight, grad, square_avg, momentum_buffer, lr, alpha, one_minus_alpha, eps, momentum):
    """Momentum gathers the steps, and the learning rate applies to all of it: torch's ``momentum``."""
    square_avg = alpha * square_avg + one_minus_alpha * grad * grad
    momentum_buffer = momentum * momentum_buffer + grad / (sqrt(square_avg) + eps)
    return weight - lr * momentum_buffer, square_avg, momentum_buffer


def deviation_rmsprop(weight, grad, square_avg, grad_avg, lr, alpha, one_minus_alpha, eps):
    """Gradients are divided by their standard deviation, `eps` outside the root: torch's ``centered``."""
    square_avg = alpha * square_avg + one_minus_alpha * grad * grad
    grad_avg = grad_avg + one_minus_alpha * (grad - grad_avg)
    deviation = sqrt(maximum(square_avg - grad_avg * grad_avg, 0))
    return weight - lr * grad / (deviation + eps), square_avg, grad_avg


def momentum_deviation_rmsprop(
    weight, grad, square_avg, momentum_buffer, grad_avg, lr, alpha, one_minus_alpha, eps, momentum
):
    """Both: torch's ``centered`` with ``momentum``."""
    square_avg = alpha * square_avg + one_minus_alpha * grad * grad
    grad_avg = grad_avg + one_minus_alpha * (grad - grad_avg)
    deviation = sqrt(maximum(square_avg - grad_avg * grad_avg, 0))
    momentum_buffer = momentum * momentum_buffer + grad / (deviation + eps)
    return weight - lr * momentum_buffer, square_avg, momentum_buffer, grad_avg


class TorchRMSProp(TorchForm):
    documentation = """RMSProp as `torch.optim.RMSprop` has it.

    ::

        grad = ±grad + weight_decay * weight
        square_avg = alpha * square_avg + (1 - alpha) * grad**2
        weight -= lr * grad / (sqrt(square_avg) + eps)

    With ``centered=True`` ``square_avg - grad_avg**2`` is under the root, where ::

        grad_avg = alpha * grad_avg + (1 - alpha) * grad

    and with momentum the weight changes by ``-lr * momentum_buffer``, where ::

        momentum_buffer = momentum * momentum_buffer + grad / (sqrt(...) + eps)

    Parameters
    ----------
    lr : float or Tensor, default 0.01
    alpha : float, default 0.99
        Decay of the running means.
    eps : float, default 1e-8
    weight_decay : float, default 0
    momentum : float, default 0
    centered : bool, default False
        Divide by the standard deviation instead of the root mean square.

    Notes
    -----
    A variance that rounding made negative counts as 0; torch gets NaN.

    References
    ----------
    T. Tieleman and G. Hinton, "Lecture 6.5 - RMSProp", 2012. Centered: A. Graves, "Generating sequences
    with recurrent neural networks", https://arxiv.org/abs/1308.0850.

    Examples
    --------
    >>> import torch
    >>> from numba_opt.torch import RMSProp
    >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> optimizer = RMSProp([weight], lr=0.01, alpha=0.75)
    >>> (weight**2).sum().backward()
    >>> optimizer.step()
    >>> weight.data
    tensor([0.9800, 1.9800])
    """

    options = {
        "lr": 1e-2,
        "alpha": 0.99,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "momentum": 0.0,
        "centered": False,
        "maximize": False,
    }
    variants: ClassVar[dict[tuple[bool, bool], tuple[Callable[..., Any], tuple[str, ...]]]] = {
        # (momentum, centered): the rule, its states
        (False, False): (rmsprop, ("square_avg",)),
        (True, False): (momentum_rmsprop, ("square_avg", "momentum_buffer")),
        (False, True): (deviation_rmsprop, ("square_avg", "grad_avg")),
        (True, True): (momentum_deviation_rmsprop, ("square_avg", "momentum_buffer", "grad_avg")),
    }

    rules = tuple((rule, len(states)) for rule, states in variants.values() if rule is not rmsprop)

    @classmethod
    def variant(cls, group: Mapping[str, Any]) -> Variant:
        alpha, eps, momentum = (number(group, name) for name in ("alpha", "eps", "momentum"))
        own: tuple[float, ...] = (alpha, 1 - alpha, eps)
        if momentum:
            own = (*own, momentum)
        elif not group["centered"]:
            own = (*own, math.inf)  # the bound of the weights in `numba_opt.RMSProp`
        return Variant(*cls.variants[momentum > 0, bool(group["centered"])], lambda lr, t: (lr, *own))


@register
class RMSProp(Optimizer):
    """RMSProp: gradients divided by the root of their running mean square.

    ::

        grad = clip(rescale_grad * grad, clip_gradient) + wd * weight
        var = rho * var + (1 - rho) * grad**2
        weight -= lr * grad / (sqrt(var) + epsilon)

    and with ``centered=True`` ::

        mean = rho * mean + (1 - rho) * grad
        var = rho * var + (1 - rho) * grad**2
        mom = momentum * mom - lr * grad / sqrt(max(var - mean**2, 0) + epsilon)
        weight += mom

    after which the weight is brought into ``[-clip_weights, clip_weights]``.

    Parameters
    ----------
    learning_rate : float, default 0.001
    rho : float, default 0.9
        Decay of the running means, in [0, 1).
    momentum : float, default 0.9
        At least 0; only used if `centered`.
    epsilon : float, default 1e-8
        At least 0. Keeps the division finite.
    centered : bool, default False
        Divide by the standard deviation instead of the root mean square.
    clip_weights : float, optional
        Limit of the weights; None or 0, as in MXNet, for none.
    use_fused_step : bool, default True
        Whether `update` runs the compiled pass.
    **kwargs
        Those of `Optimizer`.

    Notes
    -----
    The state is ``var``, or ``(mean, var, mom)`` if centered, of the weight's shape and dtype. MXNet's
    states are float32 whatever the weight is. Rounding can make ``var - mean**2`` slightly negative when
    gradients hardly change; MXNet then gets NaN, while here the variance counts as 0.

    References
    ----------
    T. Tieleman and G. Hinton, "Lecture 6.5 - RMSProp", 2012. Centered: A. Graves, "Generating sequences
    with recurrent neural networks", https://arxiv.org/abs/1308.0850, equations 38 to 45.

    Examples
    --------
    >>> import numpy as np, numba_opt
    >>> weight, grad = np.array([1.0, 2.0]), np.array([0.5, -0.5])
    >>> optimizer = numba_opt.RMSProp(learning_rate=0.1, rho=0.75)
    >>> state = optimizer.create_state(0, weight)
    >>> optimizer.update([0], [weight], [grad], [state])
    >>> weight.round(4)
    array([0.8, 2.2])
    """

    torch_form = TorchRMSProp
    variants = ({}, {"centered": True})

    def __init__(
        self,
        learning_rate: float | None = 0.001,
        rho: float = 0.9,
        momentum: float = 0.9,
        epsilon: float = 1e-8,
        centered: bool = False,
        clip_weights: float | None = None,
        use_fused_step: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate=learning_rate, use_fused_step=use_fused_step, **kwargs)
        self.rho = arguments.number("rho", rho, below=1)
        self.momentum = arguments.number("momentum", momentum)
        self.epsilon = arguments.number("epsilon", epsilon)
        self.centered = bool(centered)
        self.clip_weights = arguments.optional("clip_weights", clip_weights)
        self.rule, self.state_names = (
            (centered_rmsprop, ("mean", "var", "mom")) if self.centered else (rmsprop, ("var",))
        )

    def hyper(self, lr: float, t: int) -> tuple[float, ...]:
        plain = (lr, self.rho, 1 - self.rho, self.epsilon, self.clip_weights or math.inf)
        return (*plain, self.momentum) if self.centered else plain
