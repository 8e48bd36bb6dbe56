"""The executor of the CPU: calls become jobs of kernels, which threads share.

Arrays have been checked and coefficients worked out; nothing here can fail but for a rule that does not
compile, and kernels are all compiled before the first one writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ..core import rules
from ..core.call import Arrays, Call, Table, moved
from ..core.columns import GRAD, ROW, WIDTH
from ..core.executor import After, Before, Executor, Limit
from ..core.rules import Rule
from ..core.step_rows import Outcome, StepRows
from ..core.storage import TouchedForm
from . import loops, ndarray, reference, row_loops, threads
from .norm import gradient_norm
from .reader import PlainReader, read


class PreparedKernel(NamedTuple):
    """A table's kernel and all that it gets but for coefficients."""

    kernel: Any
    table: np.ndarray
    offsets: np.ndarray
    real: np.dtype
    row_length: int
    longest: int
    scratch: int

    @classmethod
    def of(cls, rule: Rule, table: Table) -> PreparedKernel:
        """The kernel of a table of dense gradients, compiled."""
        layout, widest = table.layout, int(table.addresses[:, WIDTH].max())
        return cls(
            rules.kernel(loops.dense, rule, layout),
            table.addresses,
            table.offsets,
            layout.real,
            rule.row_length(layout.stochastic),
            widest if rule.per_row else 1,
            loops.scratch_bytes(rule, layout, widest),
        )

    def job(self, rows: StepRows) -> threads.Job:
        """The kernel call with some coefficients."""
        args = self.table, self.offsets, as_matrix(rows, self.real, self.row_length)
        return threads.Job(self.kernel, args, int(self.offsets[-1]), self.longest, self.scratch)


class CpuExecutor(Executor):
    """Makes steps on arrays in the CPU's memory.

    Tables of plain arrays are kept from one call to the next, with their kernels; whatever else there is
    makes a new call each time.
    """

    def __init__(self, rule: Rule) -> None:
        super().__init__(rule)
        self._reader = PlainReader()
        self._grads: Sequence[Any] = ()  # of the step that is being made
        self._fused = True  # whether it is compiled
        self._call: Call | None = None
        self._plain = False  # whether the reader made the call
        self._kernels: list[PreparedKernel] = []
        self._row_of: Sequence[int] = ()  # by which the tables' tensors are numbered

    def refresh(
        self, arrays: Arrays, grads: Sequence[Any] | None = None, ids: np.ndarray | None = None
    ) -> None:
        plain, self._plain = self._plain, False  # nothing is of use if an exception comes in between
        self._grads, self._fused = arrays.columns[GRAD] if grads is None else grads, arrays.fused
        answer = self._reader.look(arrays, self._grads, ids)
        if answer == ndarray.UNSUPPORTED:
            self.hold([read(arrays if grads is None else arrays.with_grads(grads))])
            return
        if not plain or answer == ndarray.CHANGED:
            self.hold([self._reader.call(arrays)])
        elif answer == ndarray.MOVED:
            self.move()
        self._plain = True

    def hold(self, calls: Sequence[Call]) -> None:
        (call,) = calls
        self._call, self._row_of = None, ()
        if self._fused:
            self._kernels = [PreparedKernel.of(self.rule, table) for table in call.tables]
        self._call = call

    def move(self) -> None:
        assert self._call is not None
        moved(self._call)

    def release(self) -> None:
        self._grads = ()
        if not self._plain:
            self._call = None

    def run(self, rows: StepRows, limit: Limit = None, before: Before = None, after: After = ()) -> Outcome:
        assert before is None  # what is accumulated on the CPU has been added in copies
        call = self._call
        assert call is not None
        norm = None
        if limit is not None:
            norm = gradient_norm(call, self._grads) * abs(rows.rescale)
            rescale = limit.rescale(norm, rows.rescale)
            if rescale is None:
                return Outcome(norm, skipped=True)
            if rescale != rows.rescale:
                rows = rows.rescaled(rescale)
        if self._plain:
            threads.run(self.jobs(rows), after)
            return Outcome(norm)
        self._forget_steps(call)
        jobs, written = (self.jobs(rows), []) if self._fused else ([], reference.step(call, rows))
        threads.run(jobs, [*written, *call.write_back(), *_settled(call), *after])
        return Outcome(norm)

    def flush(self) -> None:
        call = self._call
        assert call is not None
        pending, jobs, written = call.pending(), [], []
        if self._fused:
            jobs = [_catch_up(call, t) for t in pending]
        else:
            written = [one for t in pending for one in reference.catch_up(call, t)]
        threads.run(jobs, [*written, *call.write_back(), *_settled(call)])

    def jobs(self, rows: StepRows) -> list[threads.Job]:
        """The kernel calls of a step, all compiled: rows that are pending, sparse gradients, dense ones."""
        call = self._call
        assert call is not None
        if rows.row_of is not self._row_of and rows.row_of != self._row_of:
            self._row_of = ()
            number(call.tables, rows.row_of)
            self._row_of = rows.row_of
        jobs = [kernel.job(rows) for kernel in self._kernels]
        if call.touched or call.deferred:
            jobs = [*(_catch_up(call, t) for t in call.pending()), *_row_jobs(call, rows), *jobs]
        return jobs

    @staticmethod
    def _forget_steps(call: Call) -> None:
        """Forget deferred steps that all rows have taken."""
        if call.deferred:
            calls = [one for t, steps in call.deferred.items() for one in steps.trim(call.last_steps[t])]
            threads.run([], calls)


def number(tables: Sequence[Table], row_of: Sequence[int]) -> None:
    """Tell each tensor in some tables its row of coefficients."""
    numbers = np.asarray(row_of)
    for table in tables:
        table.addresses[:, ROW] = numbers[table.members]


def as_matrix(rows: StepRows, real: np.dtype, length: int) -> np.ndarray:
    """Rows of coefficients as a kernel takes them, which has no other way to know their length.

    They may have more: what random bits are made of, where there is no state to round.
    """
    matrix = np.array(rows.rows, real)
    if matrix.shape[1] < length:
        raise RuntimeError(
            f"rule was changed within a step: it takes {length} numbers, not {matrix.shape[1]}"
        )
    return matrix


def _settled(call: Call) -> list[partial[Any]]:
    """Return the calls that bring deferred steps to where the rows will be."""
    caught_up = [call.deferred[t].clear(call.last_steps[t]) for t in call.pending()]
    touched = [t for t in call.touched if t in call.deferred]
    recorded = [call.deferred[t].record(len(call.last_steps[t])) for t in touched]
    return [one for calls in (*caught_up, *recorded) for one in calls]


# ---------------------------------------------------------------- rows


def _row_jobs(call: Call, rows: StepRows) -> list[threads.Job]:
    """The kernel calls for sparse gradients: one for all that are alike, one each where rows catch up."""
    groups: dict[Any, list[int]] = {}
    for t, touched in call.touched.items():
        alone = t if t in call.deferred else None
        groups.setdefault((touched.form, call.layout(t), alone), []).append(t)
    jobs = []
    for (form, layout, alone), members in groups.items():
        rule, real = call.rule, layout.real
        entries, elements, widest, summed = [], [0], 1, False
        for t in members:
            entry, width = _entry(call, t, 0 if alone is not None else int(rows.row_of[t]))
            entries.append(entry)
            elements.append(elements[-1] + call.touched[t].lines * width)
            widest = max(widest, width)
            summed |= call.touched[t].starts is not None or form != TouchedForm("block", layout.compute)
        matrix = as_matrix(rows, real, rule.row_length(layout.stochastic))
        if alone is not None:
            steps = call.deferred[alone]
            matrix = steps.with_current(matrix[rows.row_of[alone]])
            if len(overdue := steps.overdue(len(call.last_steps[alone]))):
                jobs.append(_catch_up(call, alone, overdue))
        kernel = rules.kernel(row_loops.rows, rule, layout, form, alone is not None)
        args = (np.array(entries, np.uint64), np.array(elements, np.int64), matrix)
        scratch = loops.scratch_bytes(rule, layout, widest, summed)
        jobs.append(threads.Job(kernel, args, elements[-1], widest, scratch))
    return jobs


def _entry(call: Call, t: int, row: int) -> tuple[list[int], int]:
    """A sparse gradient's row of a table (`numba_opt.core.columns`), and the length of the weight's rows."""
    touched, (own, tensor_id, width) = call.touched[t], call.own(t)
    last_step, recorded = 0, 0
    if t in call.deferred:
        last_step, recorded = call.last_steps[t].ctypes.data, call.deferred[t].recorded
    place_size = 0 if touched.places is None else touched.places.itemsize
    arrays = map(_address, (touched.data, touched.rows, touched.starts, touched.places))
    head = [*arrays, last_step, recorded, len(touched.rows), place_size, call.height(t)]
    return [*head, *own, tensor_id, width, row], width


def _catch_up(call: Call, t: int, some: np.ndarray | None = None) -> threads.Job:
    """The kernel call that lets all rows of a parameter, or some, take the steps they have yet to take."""
    steps, layout, (own, tensor_id, width) = call.deferred[t], call.layout(t), call.own(t)
    height = call.height(t)
    elements = int(call.scan.sizes[t]) if some is None else len(some) * width
    last_step = call.last_steps[t].ctypes.data
    entry = [0, _address(some), 0, 0, last_step, steps.recorded, 0, 0, height, *own, tensor_id, width, 0]
    kernel = rules.kernel(row_loops.rows, call.rule, layout, TouchedForm("none"), True)
    table, offsets = np.array([entry], np.uint64), np.array([0, elements], np.int64)
    scratch = loops.scratch_bytes(call.rule, layout, width)
    return threads.Job(kernel, (table, offsets, steps.rows()), elements, max(width, 1), scratch, some)


def _address(array: np.ndarray | None) -> int:
    return 0 if array is None else array.ctypes.data
