"""`torch.optim` optimizers that run this package's kernels, in place, on torch's own tensors.

``from numba_opt.torch import RMSProp`` is a drop-in for ``torch.optim.RMSprop``: the same options,
schedulers, hooks and checkpoints. torch is an optional extra; nothing that this package imports by itself
needs it.

Parameters may be on the CPU, on an NVIDIA GPU or several, or some here and some there; gradients and states
are where their parameter is. On a GPU a step is one launch for each dtype, on torch's current stream, and
the host does not wait. (This has been proven without a GPU only.) Two things are different from the CPU:
rows of a sparse gradient that its parameter has not are left out, as the host does not look at them; and a
step cannot be captured in a CUDA graph, as one of `numba_opt.Trainer` can.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from . import adamax, contrib, ftml, nag, rmsprop
from .torch_binding import Formula
from .torch_optimizer import Optimizer, Options, number_of

__all__ = ["FTML", "NAG", "Adamax", "GroupAdaGrad", "RMSProp"]


class _WithBetas(Optimizer):
    """What the optimizers share that have torch's options `betas` and `eps`."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor | None = None,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        weight_decay: float | None = None,
        *,
        maximize: bool | None = None,
        formula: str = "torch",
        **options: Any,
    ) -> None:
        given = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, formula, {**given, **options})

    @staticmethod
    def _betas(group: Options) -> tuple[float, float]:
        try:
            beta1, beta2 = group["betas"]
        except (TypeError, ValueError):
            raise ValueError(f"betas must be two numbers in [0, 1), got {group['betas']!r}") from None
        betas = {"betas[0]": beta1, "betas[1]": beta2}
        return number_of(betas, "betas[0]", below=1), number_of(betas, "betas[1]", below=1)


class NAG(Optimizer):
    """Nesterov accelerated gradient: `torch.optim.SGD` with ``nesterov=True``.

    ::

        grad = ±grad + weight_decay * weight
        momentum_buffer = momentum * momentum_buffer + grad
        weight -= lr * (grad + momentum * momentum_buffer)

    Parameters
    ----------
    params : iterable of Tensor, of (str, Tensor) or of dict
        Parameters, named ones, or groups with options of their own.
    lr : float or Tensor, default 0.001
    momentum : float, default 0.9
        Above 0. (SGD's default of 0 is refused there, too, with ``nesterov=True``.)
    dampening : float, default 0
        Must be 0, as in SGD with ``nesterov=True``.
    weight_decay : float, default 0
    maximize : bool, default False
    formula : {"torch", "mxnet"}, default "torch"
        "mxnet" is the formula of `numba_opt.NAG`, with that class's options and state.
    **options
        Those of ``formula="mxnet"``; ``lr`` may be called ``learning_rate``. torch's ``foreach`` and
        ``fused`` are accepted and change nothing.

    Raises
    ------
    TypeError, ValueError
        An option is unknown or out of range; a parameter is of another dtype than float32, float64, float16
        or bfloat16, or neither on the CPU nor on an NVIDIA GPU.
    CudaUnavailableError
        A parameter is on a GPU, and what that takes is not installed: extra ``cuda`` or ``cuda12``.

    References
    ----------
    I. Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013.

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

    own = nag.NAG
    counted = False
    torch_options = {
        "lr": 1e-3,
        "momentum": 0.9,
        "dampening": 0.0,
        "weight_decay": 0.0,
        "nesterov": True,  # so that torch.optim.SGD goes on with this state as it should
        "maximize": False,
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor | None = None,
        momentum: float | None = None,
        dampening: float | None = None,
        weight_decay: float | None = None,
        *,
        maximize: bool | None = None,
        formula: str = "torch",
        **options: Any,
    ) -> None:
        given = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        super().__init__(params, formula, {**given, "maximize": maximize, **options})

    def _torch(self, group: Options) -> Formula:
        momentum, dampening = number_of(group, "momentum"), number_of(group, "dampening")
        if not momentum or dampening:
            raise ValueError(
                "Nesterov momentum needs a momentum > 0 and no dampening, "
                f"got momentum={momentum} and dampening={dampening}"
            )
        if not group["nesterov"]:
            raise ValueError("nesterov must be True, got a state of SGD without it")
        return self._made_of(group, nag.torch_nag, ("momentum_buffer",), lambda lr, t: (lr, momentum))


class RMSProp(Optimizer):
    """RMSProp as `torch.optim.RMSprop` has it.

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
    params : iterable of Tensor, of (str, Tensor) or of dict
        Parameters, named ones, or groups with options of their own.
    lr : float or Tensor, default 0.01
    alpha : float, default 0.99
        Decay of the running means.
    eps : float, default 1e-8
    weight_decay : float, default 0
    momentum : float, default 0
    centered : bool, default False
        Divide by the standard deviation instead of the root mean square.
    maximize : bool, default False
    formula : {"torch", "mxnet"}, default "torch"
        "mxnet" is the formula of `numba_opt.RMSProp`, with that class's options and states.
    **options
        Those of ``formula="mxnet"``; ``lr`` may be called ``learning_rate``. torch's ``foreach`` and
        ``fused`` are accepted and change nothing.

    Raises
    ------
    TypeError, ValueError
        As for `NAG`.

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

    own = rmsprop.RMSProp
    torch_options = {
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
        (False, False): (rmsprop.rmsprop, ("square_avg",)),
        (True, False): (rmsprop.momentum_rmsprop, ("square_avg", "momentum_buffer")),
        (False, True): (rmsprop.deviation_rmsprop, ("square_avg", "grad_avg")),
        (True, True): (
            rmsprop.momentum_deviation_rmsprop,
            ("square_avg", "momentum_buffer", "grad_avg"),
        ),
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor | None = None,
        alpha: float | None = None,
        eps: float | None = None,
        weight_decay: float | None = None,
        momentum: float | None = None,
        centered: bool | None = None,
        *,
        maximize: bool | None = None,
        formula: str = "torch",
        **options: Any,
    ) -> None:
        given = {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(params, formula, {**given, "centered": centered, "maximize": maximize, **options})

    def _torch(self, group: Options) -> Formula:
        alpha, eps, momentum = (number_of(group, name) for name in ("alpha", "eps", "momentum"))
        rule, states = self.variants[momentum > 0, bool(group["centered"])]
        own: tuple[float, ...] = (alpha, 1 - alpha, eps)
        if momentum:
            own = (*own, momentum)
        elif not group["centered"]:
            own = (*own, math.inf)  # the bound of the weights in `numba_opt.RMSProp`
        return self._made_of(group, rule, states, lambda lr, t: (lr, *own))


class Adamax(_WithBetas):
    """Adamax as `torch.optim.Adamax` has it.

    ::

        grad = ±grad + weight_decay * weight
        exp_avg = beta1 * exp_avg + (1 - beta1) * grad
        exp_inf = maximum(beta2 * exp_inf, abs(grad) + eps)
        weight -= lr / (1 - beta1**step) * exp_avg / exp_inf

    Parameters
    ----------
    params : iterable of Tensor, of (str, Tensor) or of dict
        Parameters, named ones, or groups with options of their own.
    lr : float or Tensor, default 0.002
    betas : tuple of two floats, default (0.9, 0.999)
        Decays of the mean and of the largest magnitude, in [0, 1).
    eps : float, default 1e-8
    weight_decay : float, default 0
    maximize : bool, default False
    formula : {"torch", "mxnet"}, default "torch"
        "mxnet" is the formula of `numba_opt.Adamax`, with that class's options and states.
    **options
        Those of ``formula="mxnet"``; ``lr`` may be called ``learning_rate``. torch's ``foreach`` and
        ``fused`` are accepted and change nothing.

    Raises
    ------
    TypeError, ValueError
        As for `NAG`.

    References
    ----------
    D. P. Kingma and J. Ba, "Adam: a method for stochastic optimization",
    https://arxiv.org/abs/1412.6980, section 7.1.

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

    own = adamax.Adamax
    torch_options = {
        "lr": 2e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "maximize": False,
    }

    def _torch(self, group: Options) -> Formula:
        beta1, beta2 = self._betas(group)
        eps = number_of(group, "eps")

        def hyper(lr: float, t: int) -> tuple[float, ...]:
            return lr / (1 - beta1**t), 1 - beta1, beta2, eps

        return self._made_of(group, adamax.torch_adamax, ("exp_avg", "exp_inf"), hyper)


class FTML(_WithBetas):
    """FTML, "follow the moving leader", which torch has not: the formula of `numba_opt.FTML`.

    Parameters
    ----------
    params : iterable of Tensor, of (str, Tensor) or of dict
        Parameters, named ones, or groups with options of their own.
    lr : float or Tensor, default 0.0025
    betas : tuple of two floats, default (0.6, 0.999)
        In [0, 1).
    eps : float, default 1e-8
    weight_decay : float, default 0
    maximize : bool, default False
    formula : {"torch", "mxnet"}, default "torch"
        Whether options have torch's names or those of `numba_opt.FTML`. The formula is the same.
    **options
        Those of ``formula="mxnet"``; ``lr`` may be called ``learning_rate``. torch's ``foreach`` and
        ``fused`` are accepted and change nothing.

    Raises
    ------
    TypeError, ValueError
        As for `NAG`.

    References
    ----------
    S. Zheng and J. T. Kwok, "Follow the moving leader in deep learning", ICML 2017,
    https://proceedings.mlr.press/v70/zheng17a.html.

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

    own = ftml.FTML
    torch_options = {
        "lr": 0.0025,
        "betas": (0.6, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "maximize": False,
    }

    def _torch(self, group: Options) -> Formula:
        beta1, beta2 = self._betas(group)
        eps, wd = number_of(group, "eps"), number_of(group, "weight_decay")
        return self._as_own(group, beta1=beta1, beta2=beta2, epsilon=eps, wd=wd)


class GroupAdaGrad(Optimizer):
    """AdaGrad with one learning rate for each row of a matrix: the formula of `numba_opt.GroupAdaGrad`.

    ::

        history += mean(grad**2, dim=1, keepdim=True)
        weight -= lr * grad / (sqrt(history) + eps)

    Parameters
    ----------
    params : iterable of Tensor, of (str, Tensor) or of dict
        Matrices, named ones, or groups with options of their own.
    lr : float or Tensor, default 0.01
    eps : float, default 1e-6
    maximize : bool, default False
    formula : {"torch", "mxnet"}, default "torch"
        Whether options have torch's names or those of `numba_opt.GroupAdaGrad`. The formula is the same.
    **options
        Those of ``formula="mxnet"``; ``lr`` may be called ``learning_rate``. torch's ``foreach`` and
        ``fused`` are accepted and change nothing.

    Raises
    ------
    TypeError, ValueError
        As for `NAG`, or a parameter is not a matrix.

    References
    ----------
    J. Duchi, E. Hazan and Y. Singer, "Adaptive subgradient methods for online learning and stochastic
    optimization", JMLR 12, 2011, https://jmlr.org/papers/v12/duchi11a.html.

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

    own = contrib.GroupAdaGrad
    counted = False
    torch_options = {"lr": 0.01, "eps": 1e-6, "maximize": False}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor | None = None,
        eps: float | None = None,
        *,
        maximize: bool | None = None,
        formula: str = "torch",
        **options: Any,
    ) -> None:
        super().__init__(params, formula, {"lr": lr, "eps": eps, "maximize": maximize, **options})

    def _torch(self, group: Options) -> Formula:
        return self._as_own(group, epsilon=number_of(group, "eps"))
