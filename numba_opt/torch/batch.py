"""Batches: parameters of a torch optimizer whose tables are kept from step to step.

A step asks every tensor anew where it lies and how, which takes a tenth of a microsecond for each. Where no
more than addresses have changed, as those of gradients do, the tables are brought up to date; whatever else
has changed, they are made anew, and everything is checked as at the first step.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import is_, itemgetter
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..compiler import interrupts
from ..core.call import Call, tables
from ..core.executor import Executor
from ..core.rules import Rule
from ..core.step_rows import Row, StepRows
from ..cpu import ndarray, threads
from ..cpu.executor import CpuExecutor
from . import counters, dlpack
from .tensors import (
    check_gradient,
    check_memory,
    check_state,
    check_storage,
    in_order,
    laid_out,
    local,
    look,
    nbytes,
    placements,
    scan_of,
    touched_rows,
    unseen,
    write_back,
)

COUNTER = 4  # bytes of a number of updates


class BatchKey(NamedTuple):
    """The rule and the states that parameters must have in common to be updated together."""

    rule: Rule
    states: tuple[str, ...]  # what they are called in the optimizer's state
    counted: bool  # whether updates are counted there, too, as ``step``


class Formula(NamedTuple):
    """A parameter group's rule and its coefficients, as the options ask for them."""

    key: BatchKey
    row: Callable[[float, int], Row]  # coefficients, from learning rate and update


class Member(NamedTuple):
    """A parameter with its gradient, both checked, and with a state that has all it needs."""

    position: int  # among all parameters
    group: int
    label: str
    param: Tensor
    grad: Tensor
    state: dict[str, Any]


class BoundBatches:
    """The parameters of an optimizer that have gradients, as batches.

    It holds every tensor whose address it holds, except gradients between steps.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        keys: Sequence[BatchKey],
        state: Mapping[Any, Any],
        batches: Sequence[Batch],
    ) -> None:
        self.params, self.keys, self.batches = params, keys, batches
        self.owners, self.states = list(state), list(state.values())

    def refresh(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Any],
        keys: Sequence[BatchKey],
        state: Mapping[Any, Any],
    ) -> bool:
        """Bring all tables to where everything is now; False if anything needs a closer look.

        Gradients are there for the same parameters as before.
        """
        return (
            _same(params, self.params)
            and keys == self.keys
            and _same(state, self.owners)
            and _same(state.values(), self.states)
            and all(batch.refresh(grads) for batch in self.batches)
        )

    def step(self, formulas: Sequence[Formula], rates: Sequence[float]) -> None:
        """Update the parameters, and let go of the gradients."""
        try:
            jobs: list[threads.Job] = []
            after: list[partial[Any]] = []
            for batch in self.batches:
                calls, following = batch.calls(formulas, rates)
                jobs += calls
                after += following
            for batch in self.batches:
                torch.autograd.graph.increment_version(batch.params)
            compiled = all(batch.compiled for batch in self.batches)
            with contextlib.nullcontext() if compiled else interrupts.defer_signals():
                threads.run(jobs, after)
        finally:
            for batch in self.batches:
                batch.let_go()


class Batch:
    """Parameters on one device that one rule updates, each of them once.

    `turn` is how many times they have come before, in a list of parameters with duplicates.
    """

    compiled: ClassVar[bool] = True  # whether nothing of a step's calls is written in Python

    def __init__(self, key: BatchKey, members: Sequence[Member], turn: int) -> None:
        self.key, self.turn = key, turn
        self.params = [member.param for member in members]
        self.labels = [member.label for member in members]
        self.positions = [member.position for member in members]
        self.groups = [member.group for member in members]
        self.different = list(dict.fromkeys(self.groups))
        self.row_of = [self.different.index(group) for group in self.groups]
        self.dicts = [member.state for member in members]
        self.names = (*key.states, "step") if key.counted else key.states
        self.states = [[state[name] for state in self.dicts] for name in self.names]
        self.executor = self._executor()
        self._bind([member.grad for member in members])

    def _executor(self) -> Executor:
        """Make the executor of the steps."""
        return CpuExecutor(self.key.rule)

    # ---------------------------------------------------------------- what the tables are made of

    def _columns(self, grads: Sequence[Any]) -> list[Sequence[Any]]:
        """Gradients, weights, states and counters: those parts of them that are in this process."""
        columns = [grads, self.params, *self.states]
        return [list(map(local, column)) for column in columns] if self.wrapped else columns

    def _bind(self, grads: Sequence[Any]) -> None:
        """Check states, memory and sparse gradients, and make the tables."""
        rule, n_column = self.key.rule, 2 + len(self.key.states)
        self.wrapped = any(local(param) is not param for param in self.params)
        columns = self._columns(grads)
        grads, weights = columns[:2]
        self.types = list(map(type, grads))
        self.sparse = [t for t, grad in enumerate(grads) if grad.layout != torch.strided]
        self._check(columns)
        self._read_touched(grads)
        self.orders = [
            in_order(weight, by_row=rule.per_row or t in self.touched) for t, weight in enumerate(weights)
        ]
        self.copied: list[int] = []  # positions of gradients that lie otherwise than their weights
        columns[0] = self._dense(grads)
        work = [list(map(laid_out, column, self.orders)) for column in columns[:n_column]]
        self.copied = [t for t, grad in enumerate(columns[0]) if work[0][t] is not grad]
        columns[0] = work[0]
        self.replaced = [  # as what writes the copies back
            write_back(given, array)
            for column, arrays in zip(columns[1:n_column], work[1:], strict=True)
            for given, array in zip(column, arrays, strict=True)
            if array is not given
        ]
        self.scan = scan_of(work)
        if self.replaced or self._overlapping():
            check_memory(columns[:n_column], self._what()[:n_column], self.labels, self._touched_arrays())
        self.executor.hold([self._call()])
        sizes = [[1 if x is None else x.element_size() for x in column] for column in work]
        self.item_sizes = np.array(sizes, np.uint64).T
        self.counters = np.array([x.data_ptr() for c in columns[n_column:] for x in c], np.uint64)
        self.held: Any = (work, columns)  # alive until the step has been made
        shown = [*work, *columns[n_column:]]  # the columns, but for what is worked on in copies
        self.ids = ndarray.objects(shown)
        self.seen = unseen(self.ids, max(weight.ndim for weight in weights))
        if look(shown, self.ids, self.seen) == ndarray.UNSUPPORTED or not self._as_seen(work):
            raise TypeError(
                f"tensors of {', '.join(self.labels[:5])} do not lie where their classes say; "
                "expected ordinary tensors"
            )

    def _as_seen(self, work: Sequence[Sequence[Any]]) -> bool:
        """Tell whether the tables say what has been seen of the tensors, and no more."""
        scan, n_column = self.scan, self.scan.n_array
        at, room = self.seen[..., dlpack.ADDRESS].T.astype(np.uint64), self.seen[..., dlpack.ROOM].T
        wrong = (at[:, :n_column] != scan.addresses[:, :n_column]) | (room[:, :n_column] < scan.bytes)
        sized = [list(map(nbytes, column)) for column in work] == scan.bytes.T.tolist()
        counted = at[:, n_column:].T.ravel().tolist() == self.counters.tolist()
        full = scan.bytes > 0
        return sized and counted and not (wrong & full).any() and bool((room[:, n_column:] >= COUNTER).all())

    def _what(self) -> list[str]:
        """Return the name of each column, for errors."""
        return ["gradient", "weight", *(f"state {name!r}" for name in self.names)]

    def _check(self, columns: Sequence[Sequence[Any]]) -> None:
        """Refuse states that do not fit, and whatever lies outside its storage."""
        weights, states = columns[1], range(2, 2 + len(self.key.states))
        for c, (name, column) in enumerate(zip(self._what(), columns, strict=True)):
            for label, weight, tensor in zip(self.labels, weights, column, strict=True):
                what = f"{name} of {label}"
                if c in states:
                    shape = (weight.shape[0], 1) if self.key.rule.per_row else tuple(weight.shape)
                    check_state(tensor, weight, shape, what)
                if c > 0 or not tensor._is_zerotensor():  # a gradient of zeros may be without memory
                    check_storage(tensor, what)

    def _dense(self, grads: Sequence[Any]) -> list[Any]:
        """Gradients as kernels can take them, None for those that are sparse."""
        found = list(grads)
        for t in self.sparse:
            found[t] = None
        for t in self.copied:
            found[t] = laid_out(found[t], self.orders[t])
        return found

    def _read_touched(self, grads: Sequence[Any]) -> None:
        """Look at the sparse gradients."""
        self.touched: dict[int, Any] = {
            t: touched_rows(grads[t], f"gradient of {self.labels[t]}") for t in self.sparse
        }

    def _touched_arrays(self) -> list[tuple[int, np.ndarray]]:
        """The arrays of sparse gradients, with their positions."""
        return [(t, array) for t, rows in self.touched.items() for array in rows.arrays()]

    def _overlapping(self) -> bool:
        """Tell whether a tensor that is written shares memory with another one."""
        return ndarray.overlapping(self.scan, [array for _, array in self._touched_arrays()])

    def _call(self) -> Any:
        """The tensors as a call."""
        rule = self.key.rule
        return Call(rule, self.scan, tables(self.scan, rule.n_state), touched=self.touched)

    # ---------------------------------------------------------------- from step to step

    def refresh(self, grads: Sequence[Any]) -> bool:
        """Bring the tables to where everything is now; False if anything needs a closer look."""
        grads = [grads[at] for at in self.positions]
        if self.replaced or not self._has_states():
            return False
        if self.wrapped and list(map(placements, grads)) != list(map(placements, self.params)):
            return False
        columns = self._columns(grads)
        grads = columns[0]
        if list(map(type, grads)) != self.types:
            return False
        for t in self.sparse:
            if grads[t].layout != torch.sparse_coo:
                return False
            check_gradient(grads[t], columns[1][t], f"gradient of {self.labels[t]}")
        for t in self.copied:  # they are copied
            grad = check_gradient(grads[t], columns[1][t], f"gradient of {self.labels[t]}")
            if grad.layout != torch.strided:
                return False
            if not grad._is_zerotensor():
                check_storage(grad, f"gradient of {self.labels[t]}")
        columns[0] = self._dense(grads)
        if self.wrapped:
            self.ids = ndarray.objects(columns)
        self.ids[0] = np.fromiter(map(id, columns[0]), np.uint64, len(grads))
        answer = look(columns, self.ids, self.seen)
        self.held = columns
        if self.sparse:
            self._read_touched(grads)
        if answer == ndarray.SAME and not self.sparse:
            return True
        return answer <= ndarray.MOVED and self._move()

    def _has_states(self) -> bool:
        """Tell whether the optimizer's state still has the objects that the tables were made of."""
        try:
            return all(
                _same(list(map(itemgetter(name), self.dicts)), column)
                for name, column in zip(self.names, self.states, strict=True)
            )
        except KeyError:
            return False

    def _move(self) -> bool:
        """Bring the tables to where the tensors have moved; False if they may not lie there."""
        scan, n_column = self.scan, self.scan.n_array
        now, room = self.seen[..., dlpack.ADDRESS].T.astype(np.uint64), self.seen[..., dlpack.ROOM].T
        now, counters = now[:, :n_column], now[:, n_column:]
        if not counters.all() or (room[:, n_column:] < COUNTER).any():
            return False
        full = scan.bytes > 0
        lost = (now == 0) | (now % self.item_sizes != 0) | (room[:, :n_column] < scan.bytes)
        if (full & lost).any():
            return False
        self.counters = counters.T.ravel()
        scan.addresses[:, :n_column] = now
        if self._overlapping():
            return False
        if self.sparse:
            self.executor.hold([self._call()])
        else:
            self.executor.move()
        return True

    def calls(
        self, formulas: Sequence[Formula], rates: Sequence[float]
    ) -> tuple[list[threads.Job], list[partial[Any]]]:
        """Return the kernel calls of a step, and the calls that come after them."""
        assert isinstance(self.executor, CpuExecutor)
        return self.executor.jobs(self._rows(formulas, rates)), self._after()

    def _after(self) -> list[partial[Any]]:
        """Return the calls that write copies back and count the update."""
        counted = [partial(counters.compiled_count_up(), self.counters)] if self.key.counted else []
        return [*self.replaced, *counted]

    def let_go(self) -> None:
        """Forget the gradients."""
        self.held, self.touched = (), {}

    def _rows(self, formulas: Sequence[Formula], rates: Sequence[float]) -> StepRows:
        """The coefficients of a step."""
        counts = np.zeros(len(self.params))
        alike = not self.key.counted or counters.read(self.counters, counts)
        for t in range(1 if alike else len(counts)):
            if not 0 <= counts[t] < math.inf:
                raise ValueError(
                    f"state 'step' of {self.labels[t]} must be a finite number >= 0, got {counts[t]:g}"
                )
        if alike:  # the usual case, and quick
            t = int(counts[0]) + 1 + self.turn
            return StepRows([formulas[g].row(rates[g], t) for g in self.different], self.row_of)

        def row(group: int, count: float) -> Row:
            return formulas[group].row(rates[group], int(count) + 1 + self.turn)

        return StepRows.of(zip(self.groups, counts.tolist(), strict=True), row)


def _same(some: Any, others: Any) -> bool:
    """Tell whether two collections hold the same objects in the same order."""
    return len(some) == len(others) and all(map(is_, some, others))
