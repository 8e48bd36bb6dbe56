"""`torch.optim` optimizers that run this package's kernels, in place, on torch's own tensors.

``from numba_opt.torch import RMSProp`` is a drop-in for ``torch.optim.RMSprop``: the same options,
schedulers, hooks and checkpoints. torch is an optional extra; nothing that this package imports by itself
needs it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, repeat
from operator import attrgetter, is_, itemgetter
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import adamax, arguments, contrib, execution, ftml, nag, optimizer, rmsprop
from .torch_binding import Batch, Binding, Formula, Kind, Member
from .torch_cuda import CudaBatch, stream_for
from .torch_tensors import check_gradient, check_parameter, is_counter

__all__ = ["FTML", "NAG", "Adamax", "GroupAdaGrad", "RMSProp"]

Options = Mapping[str, Any]

# How torch is to run its own optimizers. Ours have one way, which is all of these at once.
WAYS = ("foreach", "fused")

# What torch's optimizers can do and these cannot.
REFUSED = {
    "differentiable": "steps are not recorded for autograd",
    "capturable": "steps are not captured in CUDA graphs; those of numba_opt.Trainer are, with its `advance`",
}

KEPT = 8  # bindings, where gradients come and go

ADDED_LATER = ("momentum_buffer", "mom")  # states that a parameter may lack: momentum begins at 0


class Optimizer(torch.optim.Optimizer):
    """What the optimizers of this module share: their options, and one step for all parameter groups.

    `formula` is "torch" or "mxnet"; `given` holds options by name, where None means the default.
    """

    own: ClassVar[type[optimizer.Optimizer]]  # whose formula ``formula="mxnet"`` is
    torch_options: ClassVar[dict[str, Any]]  # names and defaults of the options of ``formula="torch"``
    counted: ClassVar[bool] = True  # whether updates are counted, as ``step`` in a parameter's state

    def __init__(self, params: Any, formula: str, given: Options) -> None:
        self._forget()
        defaults = self._defaults(arguments.choice("formula", formula, ("torch", "mxnet")))
        given = _renamed({name: value for name, value in given.items() if value is not None}, formula)
        for name in given:
            if name not in (*defaults, *WAYS, *REFUSED):
                raise TypeError(
                    f"{type(self).__name__}() with formula={formula!r} has no parameter {name!r}; "
                    f"it takes {', '.join(defaults)}"
                )
        super().__init__(params, {**defaults, **given, "formula": formula})

    def _forget(self) -> None:
        self._bindings: dict[bytes, Binding] = {}  # by which parameters have no gradient
        self._formulas: list[tuple[Any, Formula]] = []  # of each group, with the options they are made of

    # ---------------------------------------------------------------- options

    @classmethod
    @functools.cache
    def _defaults(cls, formula: str) -> dict[str, Any]:
        """The names and defaults of a formula's options."""
        if formula == "torch":
            return cls.torch_options
        known = arguments.parameters(cls.own)
        shared = {*arguments.parameters(optimizer.Optimizer)} - {"wd", "rescale_grad", "clip_gradient"}
        own = {name: value for name, value in known.items() if name not in shared}
        return {"lr": known["learning_rate"], **own, "maximize": False}

    @classmethod
    @functools.cache
    def _names(cls, formula: str) -> tuple[str, ...]:
        """The options that a formula is made of. The learning rate changes often, and comes in later."""
        return (*({*cls._defaults(formula)} - {"lr"}), "formula", *REFUSED)

    def _torch(self, group: Options) -> Formula:
        """torch's formula, or under torch's names this package's where torch has none."""
        raise NotImplementedError

    def _mxnet(self, group: Options) -> Formula:
        """This package's own formula."""
        names = [name for name in self._defaults("mxnet") if name not in ("lr", "maximize")]
        return self._as_own(group, **{name: group[name] for name in names})

    def _as_own(self, group: Options, **options: Any) -> Formula:
        """The formula of this package's optimizer with some options."""
        own = self.own(**options)
        rescale = -own.rescale_grad if group["maximize"] else own.rescale_grad

        def row(lr: float, t: int) -> tuple[float, ...]:
            return own._hyper_row(rescale, lr, own.wd, t)

        return Formula(Kind(own._rule(), own.state_names, self.counted), row)

    def _made_of(
        self,
        group: Options,
        rule: Callable[..., Any],
        states: tuple[str, ...],
        hyper: Callable[[float, int], tuple[float, ...]],
    ) -> Formula:
        """The formula of a rule of torch's: maximising is a matter of the gradient's sign."""
        first = (-1.0 if group["maximize"] else 1.0, math.inf, _number(group, "weight_decay"))

        def row(lr: float, t: int) -> tuple[float, ...]:
            return (*first, *hyper(lr, t))

        return Formula(Kind(execution.Rule(rule, len(states), False), states, self.counted), row)

    def _formula_of(self, group: Options, expected: str) -> Formula:
        """The formula that a group's options ask for; all of them are checked."""
        if group["formula"] != expected:
            raise ValueError(
                f"formula of a parameter group is {group['formula']!r}; expected {expected!r}, "
                "as the optimizer's"
            )
        for name in REFUSED:
            if group.get(name):
                raise ValueError(f"{name} must be False, got {group[name]!r}: {REFUSED[name]}")
        _rate(group)
        return self._mxnet(group) if group["formula"] == "mxnet" else self._torch(group)

    def _current(self) -> list[Formula]:
        """Each group's formula; options may have changed since the last step."""
        known = self._formulas if len(self._formulas) == len(self.param_groups) else repeat((None, None))
        chosen = self.defaults["formula"]
        names = self._names(chosen)
        current: list[Any] = []
        for group, (options, formula) in zip(self.param_groups, known, strict=False):
            now = list(map(group.get, names))
            current.append((now, formula if now == options else self._formula_of(group, chosen)))
        self._formulas = current
        return [formula for _, formula in current]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own. Arguments and errors as in `torch.optim.Optimizer`."""
        if isinstance(param_group, dict):
            param_group = _renamed(param_group, self.defaults["formula"])
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            formula = self._formula_of(group, self.defaults["formula"])
            for k, param in enumerate(group["params"]):
                check_parameter(param, self._label(len(self.param_groups) - 1, k), formula.kind.rule.per_row)
        except BaseException:
            self.param_groups.pop()
            raise

    def _label(self, number: int, k: int) -> str:
        """What a parameter is called in errors."""
        group = self.param_groups[number]
        if "param_names" in group:
            return f"parameter {group['param_names'][k]!r}"
        return f"parameter {k}" if len(self.param_groups) == 1 else f"parameter {k} of group {number}"

    # ---------------------------------------------------------------- as a value

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what was copied, pickled or loaded, perhaps from an optimizer of torch's."""
        defaults = state.get("defaults") or self.defaults  # what is loaded has none
        for group in state["param_groups"]:
            group.setdefault("formula", "torch")
            for name, default in self._defaults(defaults["formula"]).items():
                group.setdefault(name, default)
            self._formula_of(group, defaults["formula"])
        super().__setstate__(state)
        self._forget()

    # ---------------------------------------------------------------- a step

    @torch._disable_dynamo  # type: ignore[untyped-decorator]  # kernel calls are not for torch.compile
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient.

        Parameters
        ----------
        closure : callable, optional
            Evaluates the model anew and returns the loss, which is returned.

        Raises
        ------
        TypeError, ValueError
            A parameter, gradient, state or option does not fit; no parameter has been changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        formulas = self._current()
        rates = list(map(_rate, self.param_groups))
        params = list(chain.from_iterable(map(itemgetter("params"), self.param_groups)))
        grads = list(map(attrgetter("grad"), params))
        kinds = [formula.kind for formula in formulas]
        absent = bytes(map(is_, grads, repeat(None)))
        binding = self._bindings.pop(absent, None)  # until the step has been made
        if binding is None or not binding.refresh(params, grads, kinds, self.state):
            if binding is not None or len(self._bindings) >= KEPT:
                self._bindings.clear()
            with torch.no_grad():
                binding = self._bind(params, grads, kinds)
        binding.step(formulas, rates)
        self._bindings[absent] = binding
        return loss

    def _bind(self, params: Sequence[Tensor], grads: Sequence[Any], kinds: Sequence[Kind]) -> Binding:
        """Look at everything, make the states that are missing, and bind what belongs together."""
        places = [(g, k) for g, group in enumerate(self.param_groups) for k in range(len(group["params"]))]
        turns: dict[int, int] = {}  # how many times a parameter has come already
        devices = set()
        members: dict[Any, list[Member]] = {}
        for at, ((g, k), param, grad) in enumerate(zip(places, params, grads, strict=True)):
            if grad is not None:
                label = self._label(g, k)
                weight = check_parameter(param, label, kinds[g].rule.per_row)
                check_gradient(grad, param, f"gradient of {label}")
                if weight.is_cuda and weight.device not in devices:
                    stream_for(weight)  # before states are made
                devices.add(weight.device)
                turn = turns[id(param)] = turns.get(id(param), -1) + 1
                member = Member(at, g, label, param, grad, self.state[param])
                members.setdefault((kinds[g], turn, weight.device), []).append(member)
        for (kind, *_), alike in members.items():
            for member in alike:
                self._complete(member, kind)
        batches = [
            (CudaBatch if on.type == "cuda" else Batch)(kind, alike, turn)
            for (kind, turn, on), alike in members.items()
        ]
        return Binding(params, kinds, self.state, batches)

    def _complete(self, member: Member, kind: Kind) -> None:
        """Make what a parameter's state lacks."""
        state, param = member.state, member.param
        names = ("step", *kind.states) if kind.counted else kind.states
        lacking = [name for name in names if state.get(name) is None]
        if any(name in state for name in names):
            for name in lacking:
                if name not in ADDED_LATER:
                    held, expected = ", ".join(state), ", ".join(names)
                    raise ValueError(f"state of {member.label} holds {held}; expected {expected}")
        for name in lacking:
            if name == "step":
                state[name] = torch.tensor(0.0, dtype=torch.float32, device="cpu")
            else:
                like = param[:, :1] if kind.rule.per_row else param
                state[name] = torch.zeros_like(like, memory_format=torch.preserve_format)
        if kind.counted and not is_counter(state["step"]):  # as old checkpoints have it
            state["step"] = torch.tensor(float(state["step"]), dtype=torch.float32, device="cpu")


def _renamed(options: Options, formula: str) -> dict[str, Any]:
    """Options in which the learning rate is called what torch's schedulers call it."""
    options = dict(options)
    if formula == "mxnet" and "learning_rate" in options:
        options["lr"] = options.pop("learning_rate")
    return options


def _number(group: Options, name: str, below: float = math.inf) -> float:
    """An option as a number of at least 0."""
    return arguments.number(name, group[name], below=below)


def _rate(group: Options) -> float:
    """The learning rate; it may be a tensor that holds it."""
    lr = group["lr"]
    if not isinstance(lr, Tensor):
        return arguments.number("lr", lr)
    if lr.numel() != 1:
        raise ValueError(f"lr must hold one number, got a tensor of shape {tuple(lr.shape)}")
    return arguments.number("lr", lr.item())


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
        return _number(betas, "betas[0]", below=1), _number(betas, "betas[1]", below=1)


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
        or bfloat16, or not in the CPU's memory.

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
        momentum, dampening = _number(group, "momentum"), _number(group, "dampening")
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
        alpha, eps, momentum = (_number(group, name) for name in ("alpha", "eps", "momentum"))
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
        eps = _number(group, "eps")

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
        eps, wd = _number(group, "eps"), _number(group, "weight_decay")
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
        return self._as_own(group, epsilon=_number(group, "eps"))
