"""Row-wise AdaGrad, which MXNet keeps in `mxnet.optimizer.contrib`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core import arguments
from ..core.torch_form import TorchForm, number
from ..optimizer import Optimizer, register
from ..scalar import sqrt

__all__ = ["GroupAdaGrad"]


def group_adagrad(weight, grad, history, mean_square, lr, epsilon):
    history = history + mean_square
    return weight - lr * grad / (sqrt(history) + epsilon), history


class TorchGroupAdaGrad(TorchForm):
    documentation = """AdaGrad with one learning rate for each row of a matrix: `numba_opt.GroupAdaGrad`.

    ::

        history += mean(grad**2, dim=1, keepdim=True)
        weight -= lr * grad / (sqrt(history) + eps)

    Parameters
    ----------
    lr : float or Tensor, default 0.01
    eps : float, default 1e-6

    Notes
    -----
    Parameters that are no matrices are refused.

    Examples
    --------
    >>> import torch
    >>> from numba_opt.torch import GroupAdaGrad
    >>> table = torch.nn.Embedding(4, 2, sparse=True, _weight=torch.ones(4, 2))
    >>> optimizer = GroupAdaGrad(table.parameters(), lr=0.1)
    >>> table(torch.tensor([2, 0])).sum().backward()
    >>> optimizer.step()
    >>> table.weight.data
    tensor([[0.9000, 0.9000],
            [1.0000, 1.0000],
            [0.9000, 0.9000],
            [1.0000, 1.0000]])
    """

    options = {"lr": 0.01, "eps": 1e-6, "maximize": False}
    counted = False

    @classmethod
    def own_options(cls, group: Mapping[str, Any]) -> dict[str, float]:
        return {"epsilon": number(group, "eps")}


@register
class GroupAdaGrad(Optimizer):
    """AdaGrad with one learning rate for each row of a matrix.

    ::

        grad = clip(rescale_grad * grad, clip_gradient)
        history += mean(grad**2, axis=1, keepdims=True)
        weight -= lr * grad / (sqrt(history) + epsilon)

    Parameters
    ----------
    learning_rate : float, default 0.01
    epsilon : float, default 1e-6
        At least 0. Keeps the division finite.
    use_fused_step : bool, default True
        Whether `update` runs the compiled pass.
    **kwargs
        Those of `Optimizer`. Weight decay is not supported.

    Raises
    ------
    ValueError
        `wd` is not 0, or a weight is not a matrix.

    Notes
    -----
    The state is ``history``, of shape ``(rows, 1)`` and the weight's dtype.

    References
    ----------
    J. Duchi, E. Hazan and Y. Singer, "Adaptive subgradient methods for online learning and stochastic
    optimization", JMLR 12, 2011, https://jmlr.org/papers/v12/duchi11a.html.

    Examples
    --------
    >>> import numpy as np, numba_opt
    >>> weight, grad = np.ones((2, 2)), np.array([[0.5, -0.5], [0.0, 0.0]])
    >>> optimizer = numba_opt.GroupAdaGrad(learning_rate=0.1)
    >>> state = optimizer.create_state(0, weight)
    >>> optimizer.update([0], [weight], [grad], [state])
    >>> weight.round(4)
    array([[0.9, 1.1],
           [1. , 1. ]])
    """

    torch_form = TorchGroupAdaGrad

    rule = staticmethod(group_adagrad)
    state_names = ("history",)
    per_row = True
    decay = None

    def __init__(
        self,
        learning_rate: float | None = 0.01,
        epsilon: float = 1e-6,
        use_fused_step: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate=learning_rate, use_fused_step=use_fused_step, **kwargs)
        self.epsilon = arguments.number("epsilon", epsilon)

    def hyper(self, lr: float, t: int) -> tuple[float, ...]:
        return lr, self.epsilon
