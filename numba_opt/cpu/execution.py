"""How a step is carried out once everything about it is settled: by kernels, or on whole arrays.

Arrays have been checked and hyper-parameters worked out; nothing here can fail but for a rule that does not
compile, and kernels are all compiled before the first one writes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from .. import device
from ..compiler import rounding
from ..compiler.elements import prepare
from ..core import rules
from ..core.rules import Rule
from . import loops as cpu
from . import ndarray, threads
from .sparse import Parts


class History:
    """The hyper-parameters of steps that some rows of a parameter have yet to take.

    A row's stamp says how many of the recorded steps it has taken. `recorded` steps count; the row after
    them is room for the step that is being made. What changes a history is returned as calls, none of them
    written in Python, which belong to the step that they record.
    """

    TRIM = 256  # steps; from then on those that every row has taken are forgotten, now and then
    LIMIT = 65_536  # steps; beyond it some of the rows that nobody touches catch up at each step

    def __init__(self, length: int, real: np.dtype) -> None:
        self.recorded = 0
        self._rows = np.zeros((16, length), real)
        self._trim_at = self.TRIM
        self._next = 0  # the row with which the next ones that nobody has touched begin

    @classmethod
    def of(cls, rows: np.ndarray) -> History:
        """A history with these steps in it."""
        history = cls(rows.shape[1], rows.dtype)
        history._rows = np.concatenate([rows, np.zeros_like(history._rows)])
        history.recorded = len(rows)
        return history

    def with_current(self, row: Sequence[float]) -> np.ndarray:
        """The recorded steps' hyper-parameters and those of the step that is being made."""
        if self.recorded == len(self._rows):
            self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
        self._rows[self.recorded] = row
        return self._rows[: self.recorded + 1]

    @property
    def length(self) -> int:
        """How many hyper-parameters a step has."""
        return int(self._rows.shape[1])

    def rows(self) -> np.ndarray:
        """The recorded steps' hyper-parameters."""
        return self._rows[: self.recorded]

    def trim(self, stamps: np.ndarray) -> list[partial[Any]]:
        """Forget the steps that every row has taken, now and then."""
        if self.recorded < self._trim_at:
            return []
        passed = max(int(stamps.min(initial=self.recorded)), 0)  # negative stamps count as 0
        left = self.recorded - passed
        room = np.zeros((left + 16, self._rows.shape[1]), self._rows.dtype)
        room[:left] = self._rows[passed : self.recorded]
        return [
            partial(np.subtract, stamps, passed, stamps),
            partial(setattr, self, "_rows", room),
            partial(setattr, self, "recorded", left),
            partial(setattr, self, "_trim_at", max(self.TRIM, min(2 * left, left + self.LIMIT // 2))),
        ]

    def overdue(self, height: int) -> np.ndarray:
        """Rows that are to catch up though nobody touches them, so that the history does not grow for ever.

        They are as many as it takes to come by each row once in half of LIMIT steps.
        """
        if self.recorded < self.LIMIT or not height:
            return np.zeros(0, np.int64)
        first = self._next % height
        return np.arange(first, min(height, first - (-height // (self.LIMIT // 2))))

    def record(self, height: int) -> list[partial[Any]]:
        """The step has been made."""
        return [
            partial(setattr, self, "_next", self._next + len(self.overdue(height))),
            partial(setattr, self, "recorded", self.recorded + 1),
        ]

    def clear(self, stamps: np.ndarray) -> list[partial[Any]]:
        """Every row has taken every step."""
        return [partial(setattr, self, "recorded", 0), partial(operator.setitem, stamps, ..., 0)]


class Work(NamedTuple):
    """The arrays of one call."""

    bound: device.Bound
    parts: Mapping[int, Parts]  # of sparse gradients, by position
    stamps: Mapping[int, np.ndarray]  # and histories, by position, where rows catch up exactly
    histories: Mapping[int, History]

    def lagging(self) -> list[int]:
        """Positions of parameters with a dense gradient, some of whose rows have yet to catch up."""
        return [t for t, h in self.histories.items() if h.recorded and t not in self.parts]

    def trim(self) -> None:
        """Forget steps that all rows have taken."""
        calls = [call for t, history in self.histories.items() for call in history.trim(self.stamps[t])]
        if calls:
            threads.run([], calls)

    def settled(self) -> list[partial[Any]]:
        """What brings the histories to where the rows will be."""
        caught_up = [self.histories[t].clear(self.stamps[t]) for t in self.lagging()]
        touched = [t for t in self.parts if t in self.histories]
        recorded = [self.histories[t].record(len(self.stamps[t])) for t in touched]
        return [call for calls in (*caught_up, *recorded) for call in calls]


After = Sequence[partial[Any]]  # what counts a step, none of it written in Python


def carry_out(
    rule: Rule, work: Work, hyper: Any, which: Sequence[int], fused: bool, after: After = ()
) -> None:
    """Make a step wholly or, if anything comes first, not at all; `which` says each one's row of `hyper`.

    From the first write to the last one, the count of the step included, no Python runs: whatever a signal's
    handler or a profiler raises comes before or after.
    """
    work.trim()
    jobs, written = (
        (all_jobs(rule, work, hyper, which), []) if fused else ([], on_arrays(rule, work, hyper, which))
    )
    threads.run(jobs, [*written, *work.bound.write_back(), *work.settled(), *after])


def all_jobs(rule: Rule, work: Work, hyper: Any, which: Any) -> list[threads.Job]:
    """The kernel calls of a step, all compiled: rows that are late, sparse gradients, dense ones."""
    number(work.bound.tables, which)
    late = [_catch_up(rule, work, t) for t in work.lagging()]
    dense = dense_jobs(launches(rule, work.bound.tables), hyper)
    return [*late, *_row_jobs(rule, work, hyper, which), *dense]


def number(tables: Sequence[device.Table], which: Any) -> None:
    """Tell each tensor in some tables its row of hyper-parameters."""
    which = np.asarray(which)
    for table in tables:
        table.addresses[:, -1] = which[table.members]


class Launch(NamedTuple):
    """A table's kernel and all that it gets but for hyper-parameters."""

    kernel: Any
    addresses: np.ndarray
    offsets: np.ndarray
    elements: int
    real: np.dtype
    length: int  # of a row of hyper-parameters
    longest: int
    scratch: int


def launches(rule: Rule, tables: Sequence[device.Table]) -> list[Launch]:
    """The kernels for some tables, compiled."""
    return [_launch(rule, table) for table in tables]


def _launch(rule: Rule, table: device.Table) -> Launch:
    weight = table.layout.split()[1]
    widest = int(table.addresses[:, -2].max())
    return Launch(
        rules.kernel(cpu.dense, rule, table.layout),
        table.addresses,
        table.offsets,
        table.elements,
        cpu.compute_dtype(weight),
        rule.row_length(table.layout),
        widest if rule.per_row else 1,
        cpu.scratch_bytes(weight, rule.per_row, widest),
    )


def dense_jobs(prepared: Sequence[Launch], hyper: Any) -> list[threads.Job]:
    """Kernel calls with these rows of hyper-parameters."""
    return [
        threads.Job(kernel, (addresses, offsets, _as_rows(hyper, real, length)), elements, longest, scratch)
        for kernel, addresses, offsets, elements, real, length, longest, scratch in prepared
    ]


def _as_rows(hyper: Any, real: np.dtype, length: int) -> np.ndarray:
    """Rows of hyper-parameters as a kernel takes them, which has no other way to know their length.

    They may have more: what stands for the step's chance, where there is no state to round.
    """
    rows = np.array(hyper, real)
    if rows.shape[1] < length:
        raise RuntimeError(f"rule was changed within a step: it takes {length} numbers, not {rows.shape[1]}")
    return rows


class Prepared:
    """Tables of plain arrays with their kernels, kept from one call to the next.

    It holds addresses and no arrays: every call reads them anew from the array objects that it is given.
    """

    def __init__(self, request: device.Request) -> None:
        self.found = ndarray.blank(len(request.columns), len(request.columns[0]))
        if request.numbers:
            self.found.addresses[:, -3] = request.numbers
        self.tables: list[device.Table] = []
        self.launches: list[Launch] = []  # empty while the tables are not of use
        self.rule: Rule | None = None  # that the launches are made of
        self.which: Any = ()

    def take(self, ids: np.ndarray, request: device.Request, rule: Rule) -> bool:
        """Bring the tables to where these arrays are; False if any of them needs a closer look."""
        found, n_state = self.found, request.n_state
        if rule != self.rule:
            self.launches, self.rule = [], rule
        before, self.launches = self.launches, []  # nothing is of use if an exception comes in between
        answer = ndarray.survey(ids, ndarray.known(), ndarray.NONE, n_state, request.per_row, *found)
        if before and answer == ndarray.SAME:
            self.launches = before
            return True
        if before and answer == ndarray.MOVED and not ndarray.overlapping(found):
            if len(self.tables) > 1:  # else its addresses are those of `found`
                for table in self.tables:
                    table.addresses[:, :-2] = found.addresses[table.members, :-2]
            self.launches = before
            return True
        if answer == ndarray.STRANGE or not device.fit(found, n_state, request.stored):
            return False
        self.which = ()
        self.tables = device.tables(found, n_state, request.stored)
        self.launches = launches(rule, self.tables)
        return True

    def jobs(self, hyper: Any, which: Sequence[int]) -> list[threads.Job]:
        """The kernel calls of a step."""
        if which is not self.which and which != self.which:
            self.which = ()
            number(self.tables, which)
            self.which = which
        return dense_jobs(self.launches, hyper)


def _row_jobs(rule: Rule, work: Work, hyper: Any, which: Any) -> list[threads.Job]:
    """The kernel calls for sparse gradients: one for all that are alike, one each where rows catch up."""
    groups: dict[Any, list[int]] = {}
    for t, parts in work.parts.items():
        own = t if t in work.histories else None
        groups.setdefault((parts.form, _layout(rule, work, t), own), []).append(t)
    jobs = []
    for (form, layout, own), members in groups.items():
        weight = layout.split()[0]
        real = cpu.compute_dtype(weight)
        exact = own is not None
        entries, elements, widest, summed = [], [0], 1, False
        for t in members:
            parts, arrays = work.parts[t], work.bound.found.addresses[t]
            stamps = work.stamps[t].ctypes.data if exact else 0
            recorded = work.histories[t].recorded if exact else 0
            head = [_address(array) for array in (parts.data, parts.rows, parts.starts, parts.places)]
            size = 0 if parts.places is None else parts.places.itemsize
            row = 0 if exact else int(which[t])
            count, width = len(parts.rows), int(arrays[-2])
            height = int(work.bound.found.sizes[t]) // max(width, 1)
            entries.append([*head, stamps, recorded, count, size, height, *_own(rule, layout, arrays), row])
            elements.append(elements[-1] + parts.lines * width)
            widest = max(widest, width)
            summed |= parts.starts is not None or form != f"block f{real.itemsize}"
        rows = _as_rows(hyper, real, rule.row_length(layout))
        if own is not None:
            rows = work.histories[own].with_current(rows[which[own]])
        kernel = rules.kernel(cpu.rows, rule, layout, form, exact)
        args = (np.array(entries, np.uint64), np.array(elements, np.int64), rows)
        scratch = cpu.scratch_bytes(weight, rule.per_row, widest, summed)
        if own is not None and len(overdue := work.histories[own].overdue(len(work.stamps[own]))):
            jobs.append(_catch_up(rule, work, own, overdue))
        jobs.append(threads.Job(kernel, args, elements[-1], widest, scratch))
    return jobs


def _catch_up(rule: Rule, work: Work, t: int, some: np.ndarray | None = None) -> threads.Job:
    """The kernel call that brings all rows of a parameter, or some of them, up to date."""
    history, arrays, layout = work.histories[t], work.bound.found.addresses[t], _layout(rule, work, t)
    stamps = work.stamps[t].ctypes.data
    elements, width = int(work.bound.found.sizes[t]), int(arrays[-2])
    height = elements // max(width, 1)
    elements = elements if some is None else len(some) * width
    entry = [0, _address(some), 0, 0, stamps, history.recorded, 0, 0, height, *_own(rule, layout, arrays), 0]
    kernel = rules.kernel(cpu.rows, rule, layout, "none", True)
    table, offsets = np.array([entry], np.uint64), np.array([0, elements], np.int64)
    scratch = cpu.scratch_bytes(layout.split()[0], rule.per_row, width)
    return threads.Job(kernel, (table, offsets, history.rows()), elements, max(width, 1), scratch, some)


def _layout(rule: Rule, work: Work, t: int) -> str:
    """How a parameter's own arrays are laid out: its weight, states and perhaps copy."""
    found, stored = work.bound.found, work.bound.stored
    return device.own_layout(int(found.codes[t]), found.bytes.shape[1], rule.n_state, stored)


def _own(rule: Rule, layout: str, addresses: np.ndarray) -> list[int]:
    """The addresses of a parameter's own arrays, the number that it has, and the length of its rows."""
    return [*addresses[1 : 1 + len(layout.split())].tolist(), *addresses[-3:-1].tolist()]


def _address(array: np.ndarray | None) -> int:
    return 0 if array is None else array.ctypes.data


def on_arrays(rule: Rule, work: Work, hyper: Any, which: Sequence[int]) -> list[partial[Any]]:
    """The same on whole arrays, one parameter after another: readable, not fast.

    Everything is worked out in copies. What is returned puts them into their places.
    """
    rules.check_on_arrays(rule)
    written = []
    for t in range(len(which)):
        grad, *arrays = (column[t] for column in work.bound.arrays)
        fresh: list[Any] = [None if array is None else array.copy() for array in arrays]
        weight, *rest = fresh
        row = hyper[which[t]]
        stamps = work.stamps[t].copy() if t in work.stamps else None
        if stamps is not None and work.histories[t].recorded:
            _catch_up_arrays(rule, work, t, weight, rest, stamps)
        keep = _keeping(work, t)
        if t not in work.parts:
            _apply(rule, grad, weight, rest, row, keep)
        else:
            touched, values = work.parts[t].summed(weight)
            _apply_to_rows(rule, touched, values, weight, rest, row, keep)
            if stamps is not None:
                stamps[touched] = work.histories[t].recorded + 1
                work.histories[t].with_current(row)
        written += _putting(arrays, fresh)
        if stamps is not None:
            written.append(partial(operator.setitem, work.stamps[t], ..., stamps))
    return written


def _putting(arrays: Sequence[Any], fresh: Sequence[Any]) -> list[partial[Any]]:
    """What puts other contents into some arrays."""
    pairs = zip(arrays, fresh, strict=True)
    return [partial(operator.setitem, array, ..., new) for array, new in pairs if array is not None]


def _catch_up_arrays(
    rule: Rule, work: Work, t: int, weight: np.ndarray, rest: Sequence[Any], stamps: np.ndarray
) -> None:
    """Let the rows that will be touched or are overdue, or all of them, take the steps that they have not."""
    history = work.histories[t]
    rows = np.arange(len(stamps))
    if t in work.parts:
        rows = np.union1d(work.parts[t].rows, history.overdue(len(stamps)))
    for q, hyper in enumerate(history.rows()):
        late = rows[stamps[rows] <= q]
        _apply_to_rows(rule, late, np.zeros((len(late), 1)), weight, rest, hyper, _keeping(work, t))
    stamps[rows] = history.recorded


# What stores a state on arrays: (state's number, array, values, rows that the array's are, hyper-parameters).
Keep = Callable[[int, np.ndarray, np.ndarray, "np.ndarray | None", Any], None]


def _keeping(work: Work, t: int) -> Keep:
    """How the states of a parameter are stored."""

    def plainly(k: int, array: np.ndarray, values: np.ndarray, rows: np.ndarray | None, hyper: Any) -> None:
        array[...] = _as_stored(array, values)

    def by_chance(k: int, array: np.ndarray, values: np.ndarray, rows: np.ndarray | None, hyper: Any) -> None:
        elements = np.arange(array.size).reshape(array.shape)
        if rows is not None:
            elements = rows[:, None] * array.shape[1] + np.arange(array.shape[1])
        key = rounding.key_of(*np.asarray(hyper)[-2:], work.bound.found.addresses[t, -3])
        array[...] = rounding.rounded(values, array.dtype, elements, key, k)

    return by_chance if work.bound.stored.startswith("s") else plainly


def _as_stored(array: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values from which an array rounds as the kernels do: half precision is made from float32."""
    return values if array.dtype == np.float64 else values.astype(np.float32)


def _apply_to_rows(
    rule: Rule,
    rows: np.ndarray,
    values: np.ndarray,
    weight: np.ndarray,
    rest: Sequence[Any],
    hyper: Any,
    keep: Keep,
) -> None:
    """Apply a rule to some rows of a parameter, each of which is a row of `values` for its gradient."""
    whole = [None if array is None else _as_matrix(array) for array in (weight, *rest)]
    parts = [None if array is None else array[rows] for array in whole]
    grad = np.broadcast_to(values, parts[0].shape)  # type: ignore[union-attr]
    _apply(rule, grad, parts[0], parts[1:], hyper, keep, rows)
    for array, part in zip(whole, parts, strict=True):
        if array is not None:
            array[rows] = part


def _as_matrix(array: np.ndarray) -> np.ndarray:
    return array.reshape(array.shape[0], math.prod(array.shape[1:]))


def _apply(
    rule: Rule,
    grad: Any,
    weight: Any,
    rest: Sequence[Any],
    hyper: Any,
    keep: Keep,
    rows: np.ndarray | None = None,
) -> None:
    """Apply a rule to arrays: the weight, its states and perhaps its copy change in place.

    They may be some `rows` of the parameter's.
    """
    real = np.float64 if weight.dtype == np.float64 else np.float32
    with np.errstate(all="ignore"):
        h = tuple(np.asarray(hyper)[: 3 + rule.n_hyper].astype(real))
        w, *state = (array.astype(real) for array in (weight, *rest[: rule.n_state]))
        g = prepare(grad.astype(real), w, *h[:3])
        width = max(1, g.shape[-1]) if rule.per_row else 1
        reduced = (np.sum(np.square(g), axis=1, keepdims=True) / real(width),) if rule.per_row else ()
        new, *states = rule.function(w, g, *state, *reduced, *h[3:])
        for array in (weight, *rest[rule.n_state :]):
            if array is not None:
                array[...] = _as_stored(array, new)
        for k, (array, values) in enumerate(zip(rest, states, strict=False)):
            keep(k, array, values, rows, hyper)


def flush(rule: Rule, work: Work, fused: bool) -> None:
    """Bring all rows of all parameters up to date."""
    jobs, written = [], []
    for t in work.lagging():
        if fused:
            jobs.append(_catch_up(rule, work, t))
        else:
            rules.check_on_arrays(rule)
            arrays = [column[t] for column in work.bound.arrays[1:]]
            fresh: list[Any] = [None if array is None else array.copy() for array in arrays]
            weight, *rest = fresh
            _catch_up_arrays(rule, work, t, weight, rest, work.stamps[t].copy())
            written += _putting(arrays, fresh)
    threads.run(jobs, [*written, *work.bound.write_back(), *work.settled()])


def gradient_norm(tables: Sequence[device.Table], work: Work | None, grads: Sequence[Any]) -> float:
    """The root of the sum of the squares of all gradients, in double precision.

    Each chunk's sum is taken by whichever thread comes by and all of them are added in order, so that the
    norm is the same to the bit for any number of threads.
    """
    parts = work.parts if work is not None else {}
    blocks = [
        part.data if part.starts is None else part.summed(work.bound.arrays[1][t])[1]  # type: ignore[union-attr]
        for t, part in parts.items()
    ]
    jobs = [(t.layout.split()[0], t.addresses, t.offsets) for t in tables]
    for block in blocks:
        address = np.array([[block.ctypes.data, 0, 0]], np.uint64)
        jobs.append((device.code_of(block.dtype), address, np.array([0, block.size], np.int64)))
    total = 0.0
    for code, addresses, offsets in jobs:
        partial = np.zeros((-(-int(offsets[-1]) // threads.CHUNK), 1))
        threads.run([threads.Job(cpu.squares(code), (addresses, offsets, partial), int(offsets[-1]))])
        total += float(partial.sum())
    if 1e-290 < total < math.inf:  # else squares may have left the range of double precision
        return math.sqrt(total)
    given = grads if work is None else work.bound.arrays[0]
    dense = [device.as_array(grad, "gradient") for grad in given if grad is not None]
    return _careful_norm([array.astype(np.float64) for array in (*dense, *blocks)])


def _careful_norm(arrays: Sequence[np.ndarray]) -> float:
    """The norm where squares leave the range of double precision, though the norm may not."""
    largest = float(np.max([np.max(np.abs(array), initial=0) for array in arrays], initial=0))
    if not 0 < largest < math.inf:
        return largest
    return largest * math.sqrt(math.fsum(float(np.sum(np.square(array / largest))) for array in arrays))
