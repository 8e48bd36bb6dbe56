"""FTML: follow the moving leader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core import arguments
from ..core.torch_form import TorchForm, betas, number
from ..optimizer import Optimizer, register
from ..scalar import sqrt, where

__all__ = ["FTML"]


def ftml(
    weight, grad, d, v, z, inverse_lr, beta1, one_minus_beta1, beta2, one_minus_beta2, correction2, epsilon
):
    v = beta2 * v + one_minus_beta2 * grad * grad
    d_next = inverse_lr * (sqrt(v * correction2) + epsilon)
    z_next = beta1 * z + one_minus_beta1 * grad - (d_next - beta1 * d) * weight
    learns = inverse_lr > 0  # it is 0 at learning rate 0
    return where(learns, -z_next / d_next, weight), where(learns, d_next, d), v, where(learns, z_next, z)


def reduced_ftml(weight, grad, v, step_size, beta2, one_minus_beta2, correction2, epsilon):
    v = beta2 * v + one_minus_beta2 * grad * grad
    moved = weight - step_size * grad / (sqrt(v * correction2) + epsilon)
    return where(step_size > 0, moved, weight), v


class TorchFTML(TorchForm):
    documentation = """FTML, "follow the moving leader", which torch has not: the formula of `numba_opt.FTML`.

    Parameters
    ----------
    lr : float or Tensor, default 0.0025
    betas : tuple of two floats, default (0.6, 0.999)
        In [0, 1).
    eps : float, default 1e-8
    weight_decay : float, default 0

    Examples
    --------
    >>> import torch
    >>> from numba_opt.torch import FTML
    >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> optimizer = FTML([weight], lr=0.1)
    >>> (weight**2).sum().backward()
    >>> optimizer.step()
    >>> weight.data
    tensor([0.9000, 1.9000])
    """

    options = {
        "lr": 0.0025,
        "betas": (0.6, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "maximize": False,
    }

    @classmethod
    def own_options(cls, group: Mapping[str, Any]) -> dict[str, float]:
        beta1, beta2 = betas(group)
        wd = number(group, "weight_decay")
        return {"beta1": beta1, "beta2": beta2, "epsilon": number(group, "eps"), "wd": wd}


@register
class FTML(Optimizer):
    """FTML, "follow the moving leader".

    ::

        grad = clip(rescale_grad * grad, clip_gradient) + wd * weight
        v = beta2 * v + (1 - beta2) * grad**2
        d_next = (1 - beta1**t) / lr * (sqrt(v / (1 - beta2**t)) + epsilon)
        z = beta1 * z + (1 - beta1) * grad - (d_next - beta1 * d) * weight
        weight = -z / d_next
        d = d_next

    where t counts the parameter's updates, from 1; and with ``reduced=True`` ::

        v = beta2 * v + (1 - beta2) * grad**2
        d = (1 - beta1**t) / lr * (sqrt(v / (1 - beta2**t)) + epsilon)
        weight -= (1 - beta1) * grad / d

    Parameters
    ----------
    learning_rate : float, default 0.0025
    beta1 : float, default 0.6
        In [0, 1), generally close to 0.5.
    beta2 : float, default 0.999
        In [0, 1), generally close to 1.
    epsilon : float, default 1e-8
        At least 0. Keeps the division finite.
    use_fused_step : bool, default True
        Whether `update` runs the compiled pass.
    reduced : bool, default False
        Keep v alone: a third of the memory, and 20 bytes moved for each float32 element in place of 36.
    **kwargs
        Those of `Optimizer`.

    Notes
    -----
    The state is ``(d, v, z)``, of the weight's shape and dtype. At learning rate 0 the weight, d and z
    stay as they are and v takes in the gradient; MXNet divides by zero there. MXNet's fused kernel takes
    ``1 - beta2`` in float32, which puts its v 1.3e-5 away from the formula; here such constants are
    computed in double precision.

    Reduced, the state is ``v``. The last line of the formula leaves ``z = -d * weight`` behind each step, and
    it holds before the first one, where d and z are 0. Put into the next step's z, ::

        z = -beta1 * d * weight + (1 - beta1) * grad - (d_next - beta1 * d) * weight
          = (1 - beta1) * grad - d_next * weight

    and divided by ``-d_next``, that is ``weight - (1 - beta1) * grad / d_next``: neither d nor z is needed,
    whatever the learning rate has been. The two forms differ by roundings, and where a weight is changed
    between steps by anybody else: by hand, by a clip, or by being rounded to float16 or bfloat16 without a
    float32 copy. Then the usual form goes back towards where it had left the weight, a share beta1 of the
    way if d stays the same, and the reduced one goes on from where the weight is.

    References
    ----------
    S. Zheng and J. T. Kwok, "Follow the moving leader in deep learning", ICML 2017,
    https://proceedings.mlr.press/v70/zheng17a.html.

    Examples
    --------
    >>> import numpy as np, numba_opt
    >>> weight, grad = np.array([1.0, 2.0]), np.array([0.5, -0.5])
    >>> optimizer = numba_opt.FTML(learning_rate=0.1)
    >>> state = optimizer.create_state(0, weight)
    >>> optimizer.update([0], [weight], [grad], [state])
    >>> weight.round(4)
    array([0.9, 2.1])
    """

    torch_form = TorchFTML
    variants = ({}, {"reduced": True})

    def __init__(
        self,
        learning_rate: float | None = 0.0025,
        beta1: float = 0.6,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        use_fused_step: bool = True,
        reduced: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate=learning_rate, use_fused_step=use_fused_step, **kwargs)
        self.beta1 = arguments.number("beta1", beta1, below=1)
        self.beta2 = arguments.number("beta2", beta2, below=1)
        self.epsilon = arguments.number("epsilon", epsilon)
        self.reduced = bool(reduced)
        self.rule, self.state_names = (reduced_ftml, ("v",)) if self.reduced else (ftml, ("d", "v", "z"))

    def hyper(self, lr: float, t: int) -> tuple[float, ...]:
        beta1, beta2 = self.beta1, self.beta2
        second_moment = beta2, 1 - beta2, 1 / (1 - beta2**t), self.epsilon
        if self.reduced:
            return (1 - beta1) * lr / (1 - beta1**t), *second_moment
        return (1 - beta1**t) / lr if lr else 0.0, beta1, 1 - beta1, *second_moment
