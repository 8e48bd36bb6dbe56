"""FTML: follow the moving leader."""

from __future__ import annotations

from typing import Any

from . import arguments
from .kernels.scalar import sqrt, where
from .optimizer import Optimizer, register

__all__ = ["FTML"]


def ftml(weight, grad, d, v, z, gain, beta1, rest1, beta2, rest2, unbias2, epsilon):
    v = beta2 * v + rest2 * grad * grad
    d_next = gain * (sqrt(v * unbias2) + epsilon)
    z_next = beta1 * z + rest1 * grad - (d_next - beta1 * d) * weight
    moves = gain > 0  # not at learning rate 0
    return where(moves, -z_next / d_next, weight), where(moves, d_next, d), v, where(moves, z_next, z)


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

    where t counts the parameter's updates, from 1.

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
    **kwargs
        Those of `Optimizer`.

    Notes
    -----
    The state is ``(d, v, z)``, of the weight's shape and dtype. At learning rate 0 the weight, d and z
    stay as they are and v takes in the gradient; MXNet divides by zero there. MXNet's fused kernel takes
    ``1 - beta2`` in float32, which puts its v 1.3e-5 away from the formula; here such constants are
    computed in double precision.

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

    rule = staticmethod(ftml)
    state_names = ("d", "v", "z")

    def __init__(
        self,
        learning_rate: float | None = 0.0025,
        beta1: float = 0.6,
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
        gain = (1 - self.beta1**t) / lr if lr else 0.0
        beta1, beta2 = self.beta1, self.beta2
        return gain, beta1, 1 - beta1, beta2, 1 - beta2, 1 / (1 - beta2**t), self.epsilon
