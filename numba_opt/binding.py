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

from . import execution
from .kernels import ndarray, threads

if TYPE_CHECKING:
    from .optimizer import Optimizer
    from .trainer import Trainer


class Binding:
    """Those of a trainer's parameters that have gradients, as tables that are kept from step to step.

    It does not refer to its trainer, so that a trainer's arrays are freed as soon as it is dropped.
    """

    def __init__(self, trainer: Trainer, positions: list[int]) -> None:
        self.positions = positions
        self.grads: Sequence[Any] = positions  # stands for gradients, until they come
        self.request, self.stamps = trainer._request(positions, positions)
        self.ids = ndarray.objects(self.request.columns)
        self.prepared = execution.Prepared(self.request)
        self.groups: list[Group] = []
        self.which = [0] * len(positions)  # each parameter's group
        self.mults: tuple[Any, ...] = ({}, {})  # the optimizer's, as of which the groups are made

    def step(self, trainer: Trainer, rescale: float) -> bool:
        """Update the parameters; False if there was reason to skip that."""
        try:
            return self._step(trainer, rescale)
        finally:
            self.grads = self.positions  # the caller's arrays are the caller's again

    def _step(self, trainer: Trainer, rescale: float) -> bool:
        optimizer = trainer.optimizer
        work = self.bind(optimizer)
        scale = self.scale(trainer, work, rescale)
        if scale is None:
            return False
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
        if work is None:
            threads.run(self.prepared.jobs(hyper, self.which), after)
        else:
            rule, fused = optimizer._rule(), optimizer.use_fused_step
            execution.carry_out(rule, work, np.array(hyper), self.which, fused, after)
        return True

    def scale(self, trainer: Trainer, work: execution.Work | None, rescale: float) -> float | None:
        """What the gradients are to be multiplied by; None if the step is to be skipped."""
        if not trainer._wants_norm:
            return rescale
        tables = self.prepared.tables if work is None else work.bound.tables
        norm = execution.gradient_norm(tables, work, self.grads) * abs(rescale)
        trainer.grad_norm = norm
        if not math.isfinite(norm):
            return None if trainer.skip_nonfinite else rescale
        if trainer.clip_global_norm is not None and norm > trainer.clip_global_norm:
            return rescale * trainer.clip_global_norm / norm
        return rescale

    def bind(self, optimizer: Optimizer) -> execution.Work | None:
        """Get hold of the arrays: None if all are plain and `prepared` has them, else all about them."""
        request = self.request
        if optimizer._stored != request.stored:  # it has been changed, by a checkpoint perhaps
            request = self.request = request._replace(
                stored=optimizer._stored, numbers=optimizer._numbers(self.positions)
            )
            self.prepared = execution.Prepared(request)
        plain = optimizer.use_fused_step and not self.stamps and ndarray.readable()
        if plain and self.prepared.take(self.ids, request, optimizer._rule()):
            return None
        request = request._replace(columns=[self.grads, *request.columns[1:]])
        return optimizer._assemble(*optimizer._take_sparse(request), self.stamps, self.positions)

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


@dataclass
class Group:
    """Parameters of a binding with the same hyper-parameters."""

    lr_mult: float
    wd_mult: float
    count: int
    number: int
    positions: list[int]
