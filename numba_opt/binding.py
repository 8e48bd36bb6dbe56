"""`Binding`: a trainer's parameters as tables that are kept from step to step.

A step looks at each gradient's array object, which takes microseconds for hundreds of them, and makes
tables and rows of hyper-parameters anew only where something has changed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from . import device, execution
from .kernels import ndarray

if TYPE_CHECKING:
    from .trainer import Trainer


class Binding:
    """Those of a trainer's parameters that have gradients, as tables that are kept from step to step."""

    def __init__(self, trainer: Trainer, positions: list[int]) -> None:
        self.trainer = trainer
        self.positions = positions
        self.grads: Sequence[Any] = positions  # stands for gradients, until they come
        self.request, self.stamps = trainer._request(positions, positions)
        self.ids = ndarray.objects(self.request.columns)
        self.found = ndarray.blank(len(self.request.columns), len(positions))
        self.kept: execution.Work | None = None  # the tables of `found`, if they can be kept
        self.groups: list[Group] = []
        self.which = np.zeros(len(positions), np.uint64)  # each parameter's group
        self.mults: tuple[Any, ...] = ({}, {})  # the optimizer's, as of which the groups are made

    def step(self, rescale: float) -> bool:
        """Update the parameters; False if there was reason to skip that."""
        try:
            return self._step(rescale)
        finally:
            self.grads = self.positions  # the caller's arrays are the caller's again

    def _step(self, rescale: float) -> bool:
        optimizer = self.trainer.optimizer
        work = self.bind()
        scale = self.scale(work, rescale)
        if scale is None:
            return False
        self.regroup(work)
        num_update = max(optimizer.num_update, 1 + max(group.count for group in self.groups))
        lr = optimizer._rate(num_update)
        hyper = [
            optimizer._hyper_row(scale, lr * group.lr_mult, optimizer.wd * group.wd_mult, group.count + 1)
            for group in self.groups
        ]
        after: list[partial[Any]] = [partial(setattr, self.trainer, "_sums", None)]
        for group in self.groups:
            after += optimizer._counting(dict.fromkeys(group.positions, group.count + 1), num_update)
            after.append(partial(setattr, group, "count", group.count + 1))
        counted = () if optimizer.param_dict else (self, *self.mults, num_update)
        after.append(partial(setattr, self.trainer, "_counted", counted))
        rule = optimizer._rule()
        if work is self.kept:
            execution.launch(rule, work.bound, hyper, after)
        else:
            fused = optimizer.use_fused_step
            execution.carry_out(rule, work, np.array(hyper), self.which, fused, after)  # type: ignore[arg-type]
        return True

    def scale(self, work: execution.Work, rescale: float) -> float | None:
        """What the gradients are to be multiplied by; None if the step is to be skipped."""
        trainer = self.trainer
        if not trainer._wants_norm:
            return rescale
        trainer.grad_norm = norm = execution.gradient_norm(work, self.grads) * abs(rescale)
        if not math.isfinite(norm):
            return None if trainer.skip_nonfinite else rescale
        if trainer.clip_global_norm is not None and norm > trainer.clip_global_norm:
            return rescale * trainer.clip_global_norm / norm
        return rescale

    def bind(self) -> execution.Work:
        """The tables with the gradients in them; made anew only where an array has moved."""
        request, optimizer = self.request, self.trainer.optimizer
        if optimizer.use_fused_step and not self.stamps and ndarray.readable():
            answer = ndarray.survey(
                self.ids, ndarray.known(), ndarray.NONE, request.n_state, request.per_row, *self.found
            )
            if answer == ndarray.SAME and self.kept is not None:
                return self.kept
            self.kept = None
            if answer != ndarray.STRANGE and device.fit(self.found, request.n_state):
                tables = device.tables(self.found, request.n_state)
                self.kept = execution.Work(device.Bound(tables, self.found, request.columns, []), {}, {}, {})
                execution.number(tables, self.which)
                return self.kept
        request = request._replace(columns=[self.grads, *request.columns[1:]])
        return optimizer._assemble(*optimizer._take_sparse(request), self.stamps, self.positions)

    def regroup(self, work: execution.Work) -> None:
        """Sort the parameters by what their hyper-parameters depend on, unless that is done already."""
        optimizer = self.trainer.optimizer
        now = (self, optimizer.lr_mult, optimizer.wd_mult, optimizer.num_update)
        if self.trainer._counted == now and not optimizer.param_dict:
            return
        groups: dict[tuple[float, float, int], Group] = {}
        for k, t in enumerate(self.positions):
            count = optimizer._index_update_count.get(t, optimizer.begin_num_update)
            key = (optimizer._multiplier(t, "lr_mult"), optimizer._multiplier(t, "wd_mult"), count)
            group = groups.setdefault(key, Group(*key, number=len(groups), positions=[]))
            group.positions.append(t)
            self.which[k] = group.number
        self.groups = list(groups.values())
        self.mults = (dict(optimizer.lr_mult), dict(optimizer.wd_mult))
        execution.number(work.bound.tables, self.which)


@dataclass
class Group:
    """Parameters of a binding with the same hyper-parameters."""

    lr_mult: float
    wd_mult: float
    count: int
    number: int
    positions: list[int]
