"""`Binding`: a trainer's parameters as tables that are kept from step to step.

A step looks at each gradient's array object, which takes microseconds for hundreds of them, and makes
tables and rows of hyper-parameters anew only where something has changed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from . import device
from .kernels import cpu, ndarray, threads

if TYPE_CHECKING:
    from .trainer import Trainer


class Binding:
    """Those of a trainer's parameters that have gradients, as tables that are kept from step to step."""

    def __init__(self, trainer: Trainer, positions: list[int]) -> None:
        self.trainer = trainer
        self.positions = positions
        self.grads: Sequence[Any] = positions  # stands for gradients, until they come
        self.request = trainer._request(positions, positions)
        self.ids = ndarray.objects(self.request.columns)
        self.found = ndarray.blank(len(self.request.columns), len(positions))
        self.kept: device.Bound | None = None  # the tables of `found`, if it can be kept
        self.groups: list[Group] = []
        self.which = np.zeros(len(positions), np.uint64)  # each parameter's group
        self.mults: tuple[Any, ...] = ({}, {})  # the optimizer's, as of which the groups are made

    def step(self, rescale: float) -> bool:
        """Update the parameters; False if there was reason to skip that."""
        optimizer = self.trainer.optimizer
        bound = self.bind()
        scale = self.scale(bound, rescale)
        if scale is None:
            return False
        self.regroup(bound)
        num_update = max(optimizer.num_update, 1 + max(group.count for group in self.groups))
        lr = optimizer._rate(num_update)
        hyper = [
            optimizer._hyper_row(scale, lr * group.lr_mult, optimizer.wd * group.wd_mult, group.count + 1)
            for group in self.groups
        ]
        if optimizer.use_fused_step:
            optimizer._launch(bound.tables, hyper)
        else:
            optimizer._apply_rule(bound.arrays, np.array(hyper), self.which)
        bound.write_back()
        self.grads = self.positions
        for group in self.groups:
            group.count += 1
            optimizer._index_update_count.update(dict.fromkeys(group.positions, group.count))
        optimizer.num_update = num_update
        self.trainer._counted = (self, *self.mults, num_update)
        return True

    def scale(self, bound: device.Bound, rescale: float) -> float | None:
        """What the gradients are to be multiplied by; None if the step is to be skipped."""
        trainer = self.trainer
        if trainer.clip_global_norm is None and not trainer.skip_nonfinite:
            return rescale
        total = 0.0
        for table in bound.tables:
            partial = np.zeros(-(-table.elements // threads.CHUNK))
            kernel = cpu.squares(table.layout.split()[0])
            threads.run(kernel, (table.addresses, table.offsets, partial), table.elements)
            total += float(partial.sum())
        norm = math.sqrt(total) if math.isfinite(total) else _careful_norm(self.grads)
        trainer.grad_norm = norm = norm * abs(rescale)
        if not math.isfinite(norm):
            return None if trainer.skip_nonfinite else rescale
        if trainer.clip_global_norm is not None and norm > trainer.clip_global_norm:
            return rescale * trainer.clip_global_norm / norm
        return rescale

    def bind(self) -> device.Bound:
        """The tables with the gradients in them; made anew only where an array has moved."""
        request = self.request
        fused = self.trainer.optimizer.use_fused_step
        if fused and ndarray.readable():
            answer = ndarray.survey(
                self.ids, ndarray.known(), ndarray.NONE, request.n_state, request.per_row, *self.found
            )
            if answer == ndarray.SAME and self.kept is not None:
                return self.kept
            self.kept = None
            if answer != ndarray.STRANGE and device.fit(self.found, request.n_state):
                tables = device.tables(self.found, request.n_state)
                self.kept = device.Bound(tables, request.columns, [])
                self.number(self.kept)
                return self.kept
        bound = device.bind(request._replace(columns=[self.grads, *request.columns[1:]]))
        self.number(bound)
        return bound

    def number(self, bound: device.Bound) -> None:
        """Tell each tensor in the tables its row of hyper-parameters."""
        for table in bound.tables:
            table.addresses[:, -1] = self.which[table.members]

    def regroup(self, bound: device.Bound) -> None:
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
        self.number(bound)


@dataclass
class Group:
    """Parameters of a binding with the same hyper-parameters."""

    lr_mult: float
    wd_mult: float
    count: int
    number: int
    positions: list[int]


def _careful_norm(grads: Sequence[Any]) -> float:
    """The root of the sum of squares where that sum is not finite, though the root may be."""
    arrays = [device.as_array(grad, "gradient").astype(np.float64) for grad in grads]
    largest = max(float(np.max(np.abs(array), initial=0)) for array in arrays)
    if not math.isfinite(largest):
        return largest
    return largest * math.sqrt(math.fsum(float(np.sum(np.square(array / largest))) for array in arrays))
