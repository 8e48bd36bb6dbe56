"""Nesterov accelerated gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core import arguments
from ..core.torch_form import TorchForm, Variant, number
from ..optimizer import Optimizer, register

__all__ = ["NAG"]


def nag(weight, grad, mom, lr, momentum):
    mom = momentum * mom - lr * grad
    return weight + momentum * mom - lr * grad, mom


def sgd(weight, grad, lr):
    return (weight - lr * grad,)


def torch_nag(weight, grad, momentum_buffer, lr, momentum):
    """torch.optim.SGD with ``nesterov=True``: the learning rate is no part of the momentum."""
    momentum_buffer = momentum * momentum_buffer + grad
    return weight - lr * (grad + momentum * momentum_buffer), momentum_buffer


class TorchNAG(TorchForm):
    documentation = """Nesterov accelerated gradient: `torch.optim.SGD` with ``nesterov=True``.

    ::

        grad = ±grad + weight_decay * weight
        momentum_buffer = momentum * momentum_buffer + grad
        weight -= lr * (grad + momentum * momentum_buffer)

    Parameters
    ----------
    lr : float or Tensor, default 0.001
    momentum : float, default 0.9
        Above 0. (SGD's default of 0 is refused there, too, with ``nesterov=True``.)
    dampening : float, default 0
        Must be 0, as in SGD with ``nesterov=True``.
    weight_decay : float, default 0

    Examples
    --------
    >>> import torch
    >>> from numba_opt.torch import NAG
    >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> optimizer = NAG([weight], lr=0.1, momentum=0.9)
    >>> (weight**2).sum().backward()
    >>> optimizer.step()
    >>> weight.data
    tensor([0.6200, 1.2400])
    """

    options = {
        "lr": 1e-3,
        "momentum": 0.9,
        "dampening": 0.0,
        "weight_decay": 0.0,
        "maximize": False,
        "nesterov": True,  # so that torch.optim.SGD goes on with this state as it should
    }
    keywords = ("maximize", "nesterov")
    counted = False
    rules = ((torch_nag, 1),)

    @classmethod
    def variant(cls, group: Mapping[str, Any]) -> Variant:
        momentum, dampening = number(group, "momentum"), number(group, "dampening")
        if not momentum or dampening:
            raise ValueError(
                "Nesterov momentum needs a momentum > 0 and no dampening, "
                f"got momentum={momentum} and dampening={dampening}"
            )
        if not group["nesterov"]:
            raise ValueError("nesterov must be True, got a state of SGD without it")
        return Variant(torch_nag, ("momentum_buffer",), lambda lr, t: (lr, momentum))


@register
class NAG(Optimizer):
    """Nesterov accelerated gradient.

    ::

        grad = clip(rescale_grad * grad, clip_gradient) + wd * weight
        mom = momentum * mom - lr * grad
        weight += momentum * mom - lr * grad

    Without momentum it is plain gradient descent, ``weight -= lr * grad``, and has no state.

    Parameters
    ----------
    learning_rate : float, default 0.1
    momentum : float, default 0.9
        At least 0. Whether it is 0 when the optimizer is made decides whether there is a state.
    multi_precision : bool, default False
        Keep a float32 copy of half-precision weights in the state, and update that.
    use_fused_step : bool, default True
        Whether `update` runs the compiled pass.
    **kwargs
        Those of `Optimizer`.

    Notes
    -----
    The state is an array of the weight's shape and dtype, or None without momentum. It is MXNet's, whose
    documentation prints the formula with the opposite sign of it.

    References
    ----------
    Y. Nesterov, "A method for solving the convex programming problem with convergence rate O(1/k^2)",
    1983. The form is that of I. Sutskever et al., "On the importance of initialization and momentum in
    deep learning", ICML 2013.

    Examples
    --------
    >>> import numpy as np, numba_opt
    >>> weight, grad = np.array([1.0, 2.0]), np.array([0.5, -0.5])
    >>> optimizer = numba_opt.NAG(learning_rate=0.1)
    >>> state = optimizer.create_state(0, weight)
    >>> optimizer.update([0], [weight], [grad], [state])
    >>> weight
    array([0.905, 2.095])
    """

    torch_form = TorchNAG
    variants = ({}, {"momentum": 0})

    def __init__(
        self,
        learning_rate: float | None = 0.1,
        momentum: float = 0.9,
        multi_precision: bool = False,
        use_fused_step: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            learning_rate=learning_rate,
            multi_precision=multi_precision,
            use_fused_step=use_fused_step,
            **kwargs,
        )
        self.momentum = arguments.number("momentum", momentum)
        self.rule, self.state_names = (nag, ("mom",)) if self.momentum else (sgd, ())

    def hyper(self, lr: float, t: int) -> tuple[float, ...]:
        return (lr, self.momentum) if self.state_names else (lr,)
