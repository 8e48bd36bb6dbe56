"""The rates behind a step's coefficients: learning rates, weight decay, multipliers, counts of updates."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

from ..compiler import rounding
from ..lr_scheduler import LRScheduler
from . import arguments, rules
from .rules import Rule
from .step_rows import Row, StepRows

Index = Hashable  # MXNet's are ints; names serve as well

RATES = ("_get_lr", "_get_wd")  # what MXNet's subclasses override to have rates of their own


@dataclass
class Group:
    """Parameters that have the same multipliers and have been updated equally often."""

    lr_mult: float
    wd_mult: float
    count: int
    positions: list[Any]


class Plan(NamedTuple):
    """The next step's coefficients and what will count it, worked out before anything changes."""

    rows: StepRows
    counting: list[partial[Any]]  # what counts the step, none of it written in Python


class HasRates(rules.HasRule):
    """The part of an optimizer that says which coefficients its rule gets."""

    decay: ClassVar[str | None] = "l2"

    rescale_grad: float
    wd: float
    clip_gradient: float | None
    lr: float | None
    lr_scheduler: Callable[[int], float] | None
    begin_num_update: int
    num_update: int
    lr_mult: dict[Index, float]
    wd_mult: dict[Index, float]
    param_dict: Mapping[Index, Any]
    idx2name: dict[Index, str]
    stochastic_rounding: bool
    seed: int

    _counts: dict[Index, int]
    _counted_groups: Sequence[Group]  # of parameters that have a newer count together
    _checked: rules.Checked | None = None

    def _join(self, scheduler: Any) -> None:
        """Let the learning rate and a scheduler agree about the base."""
        if scheduler is None:
            self.lr = 0.01 if self.lr is None else self.lr
        elif not callable(scheduler):
            raise TypeError(f"lr_scheduler must be callable with num_update, got {scheduler!r}")
        elif self.lr is not None and isinstance(scheduler, LRScheduler) and scheduler.base_lr != self.lr:
            warnings.warn(
                f"learning_rate={self.lr} replaces the scheduler's base_lr={scheduler.base_lr}; "
                "pass learning_rate=None to keep the scheduler's",
                stacklevel=4,
            )
            scheduler.base_lr = self.lr

    # ---------------------------------------------------------------- learning rates and multipliers

    @property
    def learning_rate(self) -> float:
        """The learning rate as of `num_update` updates, before multipliers."""
        return self._rate(self.num_update)

    def _rate(self, num_update: int) -> float:
        if self.lr_scheduler is None:
            return arguments.number("learning_rate", self.lr)
        return arguments.number("lr_scheduler(num_update)", self.lr_scheduler(num_update))

    def set_learning_rate(self, lr: float) -> None:
        """Set the learning rate. With a scheduler that is an error, as in MXNet: a `UserWarning`, raised."""
        if self.lr_scheduler is not None:
            raise UserWarning("set_learning_rate has no effect on an optimizer with an lr_scheduler")
        self.lr = arguments.number("lr", lr)

    def set_lr_mult(self, args_lr_mult: Mapping[Any, float]) -> None:
        """Set multipliers of the learning rate, by index or by name; all earlier ones are dropped."""
        self.lr_mult = _multipliers("args_lr_mult", args_lr_mult)

    def set_wd_mult(self, args_wd_mult: Mapping[Any, float]) -> None:
        """Set multipliers of the weight decay, by index or by name; all earlier ones are dropped."""
        self.wd_mult = _multipliers("args_wd_mult", args_wd_mult)

    def _multiplier(self, index: Index, kind: str) -> float:
        if index in self.param_dict:
            found = getattr(self.param_dict[index], kind)
            return arguments.number(f"param_dict[{index!r}].{kind}", found)
        multipliers: dict[Index, float] = getattr(self, kind)
        if index in multipliers:
            return multipliers[index]
        return multipliers.get(self.idx2name[index], 1.0) if index in self.idx2name else 1.0

    def _get_lr(self, index: Index) -> float:
        """Return the learning rate of one parameter, as MXNet's subclasses ask for it in their own `step`."""
        return self.learning_rate * self._multiplier(index, "lr_mult")

    def _get_wd(self, index: Index) -> float:
        """Return the weight decay of one parameter."""
        return self.wd * self._multiplier(index, "wd_mult")

    def _own_rates(self, index: Index, num_update: int) -> tuple[float, float]:
        """Return a parameter's rates by a subclass's own `_get_lr` and `_get_wd`, after that many updates."""
        before = self.num_update
        try:
            self.num_update = num_update
            lr, wd = self._get_lr(index), self._get_wd(index)
        finally:
            self.num_update = before
        return arguments.number("_get_lr(index)", lr), arguments.number("_get_wd(index)", wd)

    # ---------------------------------------------------------------- counts

    @property
    def _index_update_count(self) -> dict[Index, int]:
        """The number of updates of each parameter."""
        for group in self._counted_groups:
            self._counts.update(dict.fromkeys(group.positions, group.count))
        self._counted_groups = ()
        return self._counts

    @_index_update_count.setter
    def _index_update_count(self, counts: dict[Index, int]) -> None:
        self._counts, self._counted_groups = counts, ()

    def _update_count(self, index: Index | Sequence[Index]) -> None:
        """Count an update of one parameter or of several."""
        for i in index if isinstance(index, (list, tuple)) else [index]:
            count = self._index_update_count.get(i, self.begin_num_update) + 1
            self._index_update_count[i] = count
            self.num_update = max(self.num_update, count)

    def counted_last(self, groups: Sequence[Group]) -> bool:
        """Tell whether the last step was one of these groups, whose counts are still the parameters'."""
        return bool(groups) and self._counted_groups is groups

    def rate_groups(self, indices: Sequence[Index]) -> tuple[list[Group], list[int]]:
        """Parameters sorted by what their coefficients depend on, and each one's group."""
        groups: dict[tuple[float, float, int], Group] = {}
        counts = self._index_update_count
        group_of = []
        for index in indices:
            count = counts.get(index, self.begin_num_update)
            key = (self._multiplier(index, "lr_mult"), self._multiplier(index, "wd_mult"), count)
            groups.setdefault(key, Group(*key, positions=[])).positions.append(index)
            group_of.append(key)
        places = {key: k for k, key in enumerate(groups)}
        return list(groups.values()), [places[key] for key in group_of]

    # ---------------------------------------------------------------- rows of coefficients

    def hyper(self, lr: float, t: int) -> tuple[float, ...]:
        """Return the rule's coefficients for the `t`-th update (from 1) at learning rate `lr`.

        Computed in double precision once a step, then cast to the weights' precision: constants such as
        ``1 - beta2`` belong here, not in the rule.
        """
        name = type(self).__name__
        if self.rule is not None:
            what = rules.name_of(self.rule, name)
            raise TypeError(f"{what} has no coefficients: define hyper(self, lr, t)")
        raise TypeError(f"{name} has no rule: define rule and hyper, or override step")

    def plan_step(self, indices: Sequence[Index]) -> Plan:
        """Plan the next update of some parameters; changes nothing."""
        known = self._index_update_count
        own = overridden(type(self), HasRates, RATES)
        alike = not (self.param_dict or self.lr_mult or self.wd_mult or own)
        if alike and len(before := set(map(known.get, indices))) == 1:  # the usual case, and quick
            t = (before.pop() or self.begin_num_update) + 1
            num_update = max(self.num_update, t)
            row = self.coefficient_row(self.rescale_grad, self._rate(num_update), self.wd, t)
            rows = StepRows.alike(row, len(indices))
            return Plan(rows, self._counting(dict.fromkeys(indices, t), num_update))
        counts: dict[Index, int] = {}
        num_update, lr, keys = self.num_update, None, []
        for index in indices:
            t = counts[index] = known.get(index, self.begin_num_update) + 1
            if lr is None or t > num_update:  # as in MXNet, a parameter's count includes those before it
                num_update = max(num_update, t)
                lr = self._rate(num_update)
            rates = (
                self._own_rates(index, num_update)
                if own
                else (lr * self._multiplier(index, "lr_mult"), self.wd * self._multiplier(index, "wd_mult"))
            )
            keys.append((self.rescale_grad, *rates, t))
        return Plan(StepRows.of(keys, self.coefficient_row), self._counting(counts, num_update))

    def plan_group_step(self, groups: Sequence[Group], group_of: Sequence[int], rescale: float) -> Plan:
        """Plan the next update of parameters in groups, all with the largest count's learning rate."""
        num_update = max(self.num_update, 1 + max(group.count for group in groups))
        lr = self._rate(num_update)
        rows = [
            self.coefficient_row(rescale, lr * group.lr_mult, self.wd * group.wd_mult, group.count + 1)
            for group in groups
        ]
        counting = [
            *[partial(setattr, group, "count", group.count + 1) for group in groups],
            partial(setattr, self, "_counted_groups", groups),
            partial(setattr, self, "num_update", num_update),
        ]
        return Plan(StepRows(rows, group_of), counting)

    def _counting(self, counts: dict[Index, int], num_update: int) -> list[partial[Any]]:
        """Return the calls that count a step."""
        return [
            partial(self._index_update_count.update, counts),
            partial(setattr, self, "num_update", num_update),
        ]

    def coefficient_row(self, rescale: float, lr: float, wd: float, t: int) -> Row:
        """The row of coefficients of a parameter's `t`-th update."""
        if wd:
            self.check_decay(wd)
        bound = math.inf if self.clip_gradient is None else self.clip_gradient
        own = self.hyper(lr, t)
        self.checked_rule()
        assert self._checked is not None
        row = (rescale, bound, wd, *self._checked.coefficients(own))
        if self.stochastic_rounding:
            row += rounding.step_numbers(self.seed, t)
        if not math.isfinite(rescale) or any(map(math.isnan, row)):
            given = {"rescale_grad": rescale, "wd": wd, "clip_gradient": bound} | vars(self)
            bad = [f"{k}={v!r}" for k, v in given.items() if isinstance(v, float) and not math.isfinite(v)]
            raise ValueError(f"hyper-parameters must be finite, got {', '.join(bad) or row}")
        return row

    def coefficient_row_length(self) -> int:
        """Return the length of a row of coefficients."""
        return self.checked_rule().row_length(self.stochastic_rounding)

    def check_decay(self, wd: float) -> None:
        """Refuse weight decay where there is none."""
        if wd and self.decay is None:
            name = type(self).__name__
            raise ValueError(f"wd must be 0 for {name}, which has no weight decay; got {wd!r}")

    def checked_rule(self) -> Rule:
        """The rule, checked as it is now."""
        checked = self._checked
        if checked is None or not checked.holds(self):
            if self.rule is None:
                HasRates.hyper(self, 0.0, 1)  # raises, in words
            checked = self._checked = rules.Checked(self)
        return checked.rule

    def parameter_label(self, index: Index) -> str:
        """Return the name of a parameter, for errors."""
        name = self.idx2name.get(index)
        return f"parameter {index!r}" if name is None else f"parameter {index!r} ({name!r})"


def overridden(cls: type, base: type, names: Sequence[str]) -> list[str]:
    """Return the names of those methods that a class does not have from the base class."""
    return [name for name in names if getattr(cls, name) is not getattr(base, name)]


def _multipliers(name: str, given: Mapping[Any, float]) -> dict[Index, float]:
    if not isinstance(given, Mapping):
        raise TypeError(f"{name} must be a dict of index or name to number, got {given!r}")
    return {key: arguments.number(f"{name}[{key!r}]", value) for key, value in given.items()}
