"""The base of the optimizers of `numba_opt.torch`: `torch.optim.Optimizer` with this package's steps.

Options are checked and made into formulas when they have changed; parameters, gradients and states are looked
at when they are first seen, and bound (`numba_opt.torch.batch`).
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from itertools import chain, repeat
from operator import attrgetter, is_
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import optimizer
from ..core import arguments
from ..core.rules import Rule
from ..core.step_rows import Row
from ..core.torch_form import TorchForm, number
from ..core.turn import Turn
from .batch import Batch, BatchKey, BoundBatches, Formula, Member
from .cuda_batch import CudaBatch, stream_for
from .tensors import check_gradient, check_parameter, is_counter

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
    """Base class of the optimizers: their options, and one step for all parameter groups.

    `formula` is "torch" or "mxnet"; options that are None have their default.
    """

    own: ClassVar[type[optimizer.Optimizer]]  # whose formula ``formula="mxnet"`` is
    form: ClassVar[type[TorchForm]]  # what ``formula="torch"`` is
    signature: ClassVar[inspect.Signature]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = self.signature.bind(*args, **kwargs).arguments
        params, formula = given.pop("params"), given.pop("formula", "torch")
        given.update(given.pop("options", {}))
        self._turn = Turn()
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
        self._bindings: dict[bytes, BoundBatches] = {}  # by which parameters have no gradient
        self._formulas: list[tuple[Any, Formula]] = []  # of each group, with the options they are made of

    # ---------------------------------------------------------------- options

    @classmethod
    @functools.cache
    def _defaults(cls, formula: str) -> dict[str, Any]:
        """The names and defaults of a formula's options."""
        if formula == "torch":
            return cls.form.options
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
        variant = self.form.variant(group)
        if variant is None:
            return self._as_own(group, **self.form.own_options(group))
        # maximising is a matter of the gradient's sign
        first = (-1.0 if group["maximize"] else 1.0, math.inf, number(group, "weight_decay"))

        def row(lr: float, t: int) -> Row:
            return (*first, *variant.hyper(lr, t))

        rule = Rule(variant.rule, len(variant.states), False)
        return Formula(BatchKey(rule, variant.states, self.form.counted), row)

    def _mxnet(self, group: Options) -> Formula:
        """This package's own formula."""
        names = [name for name in self._defaults("mxnet") if name not in ("lr", "maximize")]
        return self._as_own(group, **{name: group[name] for name in names})

    def _as_own(self, group: Options, **options: Any) -> Formula:
        """The formula of this package's optimizer with some options."""
        own = self.own(**options)
        rescale = -own.rescale_grad if group["maximize"] else own.rescale_grad

        def row(lr: float, t: int) -> Row:
            return own.coefficient_row(rescale, lr, own.wd, t)

        return Formula(BatchKey(own.checked_rule(), own.state_names, self.form.counted), row)

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

    def _current(self, groups: Sequence[Any]) -> list[Formula]:
        """Each group's formula; options may have changed since the last step."""
        known = self._formulas if len(self._formulas) == len(groups) else repeat((None, None))
        chosen = self.defaults["formula"]
        names = self._names(chosen)
        current: list[Any] = []
        for group, (options, formula) in zip(groups, known, strict=False):
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
                check_parameter(param, self._label(len(self.param_groups) - 1, k), formula.key.rule.per_row)
        except BaseException:
            self.param_groups.pop()
            raise

    def _label(self, number: int, k: int) -> str:
        """Return the name of a parameter, for errors."""
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
        self.__dict__.setdefault("_turn", Turn())
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
        RuntimeError
            The step is captured in a CUDA graph; nothing has been launched.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        claim = self._turn.claim(f"this {type(self).__name__}")
        try:
            self._step(list(self.param_groups))
        finally:
            del claim
        return loss

    def _step(self, groups: Sequence[Any]) -> None:
        """Update the parameters of these groups.

        What is bound is put away only once it is whole, so that nothing is left of a step that an exception
        cuts off. (`torch.no_grad` is written in Python: cut off, it would stay. Nothing here needs it.)
        """
        formulas = self._current(groups)
        rates = list(map(_rate, groups))
        members = [list(group["params"]) for group in groups]
        params = list(chain.from_iterable(members))
        grads = list(map(attrgetter("grad"), params))
        keys = [formula.key for formula in formulas]
        absent = bytes(map(is_, grads, repeat(None)))
        bindings = self._bindings
        binding = bindings.pop(absent, None)  # until the step has been made
        if binding is None or not binding.refresh(params, grads, keys, self.state):
            if binding is not None or len(bindings) >= KEPT:
                bindings.clear()
            places = [(g, k) for g, alike in enumerate(members) for k in range(len(alike))]
            binding = self._bind(places, params, grads, keys)
        binding.step(formulas, rates)
        bindings[absent] = binding

    def _bind(
        self,
        places: Sequence[tuple[int, int]],
        params: Sequence[Tensor],
        grads: Sequence[Any],
        keys: Sequence[BatchKey],
    ) -> BoundBatches:
        """Look at everything, make the states that are missing, and bind what belongs together."""
        turns: dict[int, int] = {}  # how many times a parameter has come already
        devices = set()
        members: dict[Any, list[Member]] = {}
        for at, ((g, k), param, grad) in enumerate(zip(places, params, grads, strict=True)):
            if grad is not None:
                label = self._label(g, k)
                weight = check_parameter(param, label, keys[g].rule.per_row)
                check_gradient(grad, param, f"gradient of {label}")
                if weight.is_cuda and weight.device not in devices:
                    stream_for(weight)  # before states are made
                devices.add(weight.device)
                turn = turns[id(param)] = turns.get(id(param), -1) + 1
                member = Member(at, g, label, param, grad, self.state[param])
                members.setdefault((keys[g], turn, weight.device), []).append(member)
        for (key, *_), alike in members.items():
            for member in alike:
                self._complete(member, key)
        batches = [
            (CudaBatch if on.type == "cuda" else Batch)(key, alike, turn)
            for (key, turn, on), alike in members.items()
        ]
        return BoundBatches(params, keys, self.state, batches)

    def _complete(self, member: Member, key: BatchKey) -> None:
        """Make what a parameter's state lacks."""
        state, param = member.state, member.param
        if not isinstance(state, MutableMapping):
            raise TypeError(f"state of {member.label} is {type(state).__name__}; expected a dict")
        names = ("step", *key.states) if key.counted else key.states
        lacking = [name for name in names if state.get(name) is None]
        if any(name in state for name in names):
            for name in lacking:
                if name not in ADDED_LATER:
                    held, expected = ", ".join(state), ", ".join(names)
                    raise ValueError(f"state of {member.label} holds {held}; expected {expected}")
        made: dict[str, Any] = {}
        for name in lacking:
            if name == "step":
                made[name] = torch.tensor(0.0, dtype=torch.float32, device="cpu")
            else:
                like = param.detach()[:, :1] if key.rule.per_row else param.detach()
                made[name] = torch.zeros_like(like, memory_format=torch.preserve_format)
        if key.counted and "step" not in made and not is_counter(state["step"]):
            made["step"] = _counter(state["step"], member.label)
        state.update(made)  # all at once: half a state would be refused from then on


def _counter(step: Any, label: str) -> Tensor:
    """A number of updates that is not held as torch's optimizers do now, as old checkpoints have it."""
    try:
        return torch.tensor(float(step), dtype=torch.float32, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(
            f"state 'step' of {label} is {type(step).__name__}; expected a tensor with one number"
        ) from None


def _renamed(options: Options, formula: str) -> dict[str, Any]:
    """Options in which the learning rate is called what torch's schedulers call it."""
    options = dict(options)
    if formula == "mxnet" and "learning_rate" in options:
        options["lr"] = options.pop("learning_rate")
    return options


def _rate(group: Options) -> float:
    """The learning rate; it may be a tensor that holds it."""
    lr = group["lr"]
    if not isinstance(lr, Tensor):
        return arguments.number("lr", lr)
    if lr.numel() != 1:
        raise ValueError(f"lr must hold one number, got a tensor of shape {tuple(lr.shape)}")
    return arguments.number("lr", lr.item())


@functools.cache
def class_of(own: type[optimizer.Optimizer]) -> type[Optimizer]:
    """The torch class of an optimizer: made of its torch form."""
    form = own.torch_form
    if form is None:
        raise TypeError(f"{own.__name__} has no torch_form")
    kinds = inspect.Parameter
    options = [
        kinds(
            name,
            kinds.KEYWORD_ONLY if name in form.keywords else kinds.POSITIONAL_OR_KEYWORD,
            default=default,
        )
        for name, default in sorted(form.options.items(), key=lambda option: option[0] in form.keywords)
    ]
    signature = inspect.Signature(
        [
            kinds("params", kinds.POSITIONAL_OR_KEYWORD),
            *options,
            kinds("formula", kinds.KEYWORD_ONLY, default="torch"),
            kinds("options", kinds.VAR_KEYWORD),
        ]
    )
    content = {
        "__doc__": form.docstring(own),
        "__module__": __package__,
        "__signature__": signature,
        "own": own,
        "form": form,
        "signature": signature,
    }
    return type(own.__name__, (Optimizer,), content)
