"""`Binding`: a trainer's parameters as tables that are kept from step to step.

A step looks at each gradient's array object, which takes microseconds for hundreds of them, and makes
tables and rows of hyper-parameters anew only where something has changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from .cpu import execution, ndarray, threads
from .cuda import execution as cuda_execution
from .cuda.memory import Norm
from .optimizer import Optimizer

if TYPE_CHECKING:
    from .trainer import Trainer


class Binding:
    """Those of a trainer's parameters that have gradients, as tables that are kept from step to step.

    It does not refer to its trainer, so that a trainer's arrays are freed as soon as it is dropped.
    """

    def __init__(self, trainer: Trainer, positions: list[int]) -> None:
        self.positions = positions
        self.grads: Sequence[Any] = positions  # stands for gradients, until they come
        self.request, self.stamps = trainer._request(positions, positions)
        self.rule = trainer.optimizer._rule()
        self.ids = ndarray.objects(self.request.columns)
        self.prepared: Any = self.prepare(trainer.optimizer)
        self.groups: list[Group] = []
        self.which = [0] * len(positions)  # each parameter's group
        self.mults: tuple[Any, ...] = ({}, {})  # the optimizer's, as of which the groups are made

    def prepare(self, optimizer: Optimizer) -> Any:
        """What holds the tables."""
        return execution.Prepared(self.request)

    def step(self, trainer: Trainer, rescale: float, before: Callable[[], None] | None = None) -> bool:
        """Update the parameters; False if there was reason to skip that.

        Together with the step comes what is to happen `before` it on GPUs.
        """
        try:
            return self._step(trainer, rescale, before)
        finally:
            self.grads = self.positions  # the caller's arrays are the caller's again

    def _step(self, trainer: Trainer, rescale: float, before: Callable[[], None] | None) -> bool:
        # Schedulers and `hyper` are the user's code, which might change arrays: it runs before they are read.
        hyper, after = self.plan(trainer, rescale)
        work = self.bind(trainer.optimizer)
        scale = self.scale(trainer, work, rescale)
        if scale is None:
            return False
        if scale != rescale:
            hyper = [(scale, *row[1:]) for row in hyper]
        self.carry_out(trainer, work, hyper, after, before)
        return True

    def plan(self, trainer: Trainer, scale: float) -> tuple[list[Any], list[partial[Any]]]:
        """The rows of hyper-parameters of the next step, and what counts it."""
        optimizer = trainer.optimizer
        as_counted = (self, optimizer.lr_mult, optimizer.wd_mult, optimizer.num_update)
        if trainer._counted != as_counted or optimizer.param_dict:
            self.regroup(optimizer)
        num_update = max(optimizer.num_update, 1 + max(group.count for group in self.groups))
        lr = optimizer._rate(num_update)
        hyper = [
            optimizer._hyper_row(scale, lr * group.lr_mult, optimizer.wd * group.wd_mult, group.count + 1)
            for group in self.groups
        ]
        counted = () if optimizer.param_dict else (self, *self.mults, num_update)
        after = [
            *[partial(setattr, group, "count", group.count + 1) for group in self.groups],
            partial(setattr, optimizer, "_ahead", self.groups),
            partial(setattr, optimizer, "num_update", num_update),
            partial(setattr, trainer, "_counted", counted),
            partial(setattr, trainer, "_sums", None),
        ]
        return hyper, after

    def carry_out(
        self, trainer: Trainer, work: execution.Work | None, hyper: Any, after: Any, before: Any
    ) -> None:
        """Make the step, and count it."""
        assert before is None  # what is accumulated on the CPU has been added in copies
        if work is None:
            threads.run(self.prepared.jobs(hyper, self.which), after)
        else:
            fused = trainer.optimizer.use_fused_step
            execution.carry_out(self.rule, work, np.array(hyper), self.which, fused, after)

    def scale(self, trainer: Trainer, work: execution.Work | None, rescale: float) -> float | None:
        """What the gradients are to be multiplied by; None if the step is to be skipped."""
        if not trainer._wants_norm:
            return rescale
        tables = self.prepared.tables if work is None else work.bound.tables
        norm = execution.gradient_norm(tables, work, self.grads) * abs(rescale)
        trainer._grad_norm = norm
        if not math.isfinite(norm):
            return None if trainer.skip_nonfinite else rescale
        if trainer.clip_global_norm is not None and norm > trainer.clip_global_norm:
            return rescale * trainer.clip_global_norm / norm
        return rescale

    def bind(self, optimizer: Optimizer) -> execution.Work | None:
        """Get hold of the arrays: None if all are plain and `prepared` has them, else all about them."""
        if self.catch_up(optimizer):
            self.prepared = self.prepare(optimizer)
        request = self.request
        plain = optimizer.use_fused_step and not self.stamps and ndarray.readable()
        if plain and self.prepared.take(self.ids, request, self.rule):
            return None
        request = request._replace(columns=[self.grads, *request.columns[1:]])
        return optimizer._assemble(*optimizer._take_sparse(request), self.stamps, self.positions)

    def catch_up(self, optimizer: Optimizer) -> bool:
        """Ask for what is wanted now; whether that has been changed, by a checkpoint perhaps."""
        stored, sparse = optimizer._stored, optimizer.sparse_update
        rule = optimizer._rule()
        if rule.n_state != self.request.n_state:
            names = ", ".join(optimizer.state_names) or "none"
            raise TypeError(
                f"optimizer has {rule.n_state} states now ({names}); expected {self.request.n_state}, "
                "as when the trainer was made"
            )
        changed: bool = (stored, sparse, rule) != (self.request.stored, self.request.sparse, self.rule)
        self.rule = rule
        if changed:
            numbers = optimizer._numbers(self.positions)
            self.request = self.request._replace(stored=stored, numbers=numbers, sparse=sparse)
        return changed

    def regroup(self, optimizer: Optimizer) -> None:
        """Sort the parameters by what their hyper-parameters depend on."""
        groups: dict[tuple[float, float, int], Group] = {}
        counts = optimizer._index_update_count
        which = []
        for t in self.positions:
            count = counts.get(t, optimizer.begin_num_update)
            key = (optimizer._multiplier(t, "lr_mult"), optimizer._multiplier(t, "wd_mult"), count)
            group = groups.setdefault(key, Group(*key, number=len(groups), positions=[]))
            group.positions.append(t)
            which.append(group.number)
        self.groups, self.which = list(groups.values()), which
        self.mults = (dict(optimizer.lr_mult), dict(optimizer.wd_mult))


class CudaBinding(Binding):
    """The same on GPUs, where the norm of gradients is not known to the host."""

    def prepare(self, optimizer: Optimizer) -> Any:
        return cuda_execution.Prepared(optimizer._rule())

    def bind(self, optimizer: Optimizer) -> None:
        self.catch_up(optimizer)
        request = self.request
        if self.stamps:
            request = optimizer._with_histories(request, self.stamps, self.positions)
        self.prepared.take(request, self.grads)

    def scale(self, trainer: Trainer, work: execution.Work | None, rescale: float) -> float:
        return rescale  # the device does the rest

    def carry_out(
        self, trainer: Trainer, work: execution.Work | None, hyper: Any, after: Any, before: Any
    ) -> None:
        norm = self.norm(trainer)
        after = [*after, self.telling(trainer, norm)]
        if not self.prepared.run(hyper, self.which, norm, before=before, after=after):
            trainer._captured = self

    def telling(self, trainer: Trainer, norm: Norm | None) -> partial[Any]:
        """What lets the trainer find the norm of the step."""
        return partial(setattr, trainer, "_grad_norm", self.prepared.norm if norm is not None else None)

    def norm(self, trainer: Trainer) -> Norm | None:
        """What the trainer asks for of the norm of all gradients."""
        if not trainer._wants_norm:
            return None
        limit = math.inf if trainer.clip_global_norm is None else trainer.clip_global_norm
        return Norm(limit, trainer.skip_nonfinite)

    def advance(self, trainer: Trainer, rescale: float) -> None:
        """Count a step that a graph is about to make, and have its hyper-parameters ready for it."""
        hyper, after = self.plan(trainer, rescale)
        histories = list(map(trainer.optimizer._history.get, self.positions))
        norm = self.norm(trainer)
        after = [*after, self.telling(trainer, norm)]
        self.prepared.refresh(hyper, self.which, norm, histories, after)

    def skipped(self) -> int:
        """How many steps the device has left out; waits for it."""
        skipped: int = self.prepared.skipped()
        return skipped

    def strayed(self) -> bool:
        """Whether rows led outside; waits for the device."""
        strayed: bool = self.prepared.strayed()
        return strayed


@dataclass
class Group:
    """Parameters of a binding with the same hyper-parameters."""

    lr_mult: float
    wd_mult: float
    count: int
    number: int
    positions: list[int]
