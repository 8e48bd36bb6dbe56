"""How a step is carried out once everything about it is settled: by kernels, or on whole arrays.

Arrays have been checked and hyper-parameters worked out; nothing here can fail but for a rule that does not
compile, and kernels are all compiled before the first one writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from . import device, rules
from .kernels import cpu, interrupts, ndarray, rounding, threads
from .kernels.elements import prepare
from .rules import Rule as Rule
from .sparse import Parts


class History:
    """The hyper-parameters of steps that some rows of a parameter have yet to take.

    A row's stamp says how many of the recorded steps it has taken. `recorded` steps count; the row after
    them is room for the step that is being made.
    """

    def __init__(self, length: int, real: np.dtype) -> None:
        self.recorded = 0
        self._rows = np.zeros((16, length), real)
        self._trim_at = 256

    @classmethod
    def of(cls, rows: np.ndarray) -> History:
        """A history with these steps in it."""
        history = cls(rows.shape[1], rows.dtype)
        for row in rows:
            history.with_current(row)
            history.recorded += 1
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

    def record(self, stamps: np.ndarray) -> None:
        """The step has been made; forget those that every row has taken, now and then."""
        self.recorded += 1
        if self.recorded >= self._trim_at:
            passed = int(stamps.min(initial=self.recorded))
            self._rows[: self.recorded - passed] = self._rows[passed : self.recorded].copy()
            stamps -= passed
            self.recorded -= passed
            self._trim_at = max(256, 2 * self.recorded)

    def clear(self, stamps: np.ndarray) -> None:
        """Every row has taken every step."""
        self.recorded = 0
        stamps[...] = 0


class Work(NamedTuple):
    """The arrays of one call."""

    bound: device.Bound
    parts: Mapping[int, Parts]  # of sparse gradients, by position
    stamps: Mapping[int, np.ndarray]  # and histories, by position, where rows catch up exactly
    histories: Mapping[int, History]

    def lagging(self) -> list[int]:
        """Positions of parameters with a dense gradient, some of whose rows have yet to catch up."""
        return [t for t, h in self.histories.items() if h.recorded and t not in self.parts]

    def settle(self) -> None:
        """Bring the histories to where the rows are."""
        for t in self.lagging():
            self.histories[t].clear(self.stamps[t])
        for t in self.parts:
            if t in self.histories:
                self.histories[t].record(self.stamps[t])


After = Sequence[partial[Any]]  # what counts a step, none of it written in Python


def carry_out(
    rule: Rule, work: Work, hyper: Any, which: Sequence[int], fused: bool, after: After = ()
) -> None:
    """Make a step, wholly or, if a signal comes first, not at all; `which` says each one's row of `hyper`."""
    if fused and not work.histories:
        threads.run(all_jobs(rule, work, hyper, which), [*work.bound.write_back(), *after])
        return
    with interrupts.held_back():
        jobs: list[threads.Job] = []
        if fused:
            jobs = all_jobs(rule, work, hyper, which)
        else:
            on_arrays(rule, work, hyper, which)
        threads.run(jobs, [*work.bound.write_back(), *after])
        work.settle()


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


def launches(rule: Rule, tables: Sequence[device.Table]) -> list[Launch]:
    """The kernels for some tables, compiled."""
    return [
        Launch(
            rules.kernel(cpu.dense, rule, table.layout),
            table.addresses,
            table.offsets,
            table.elements,
            cpu.compute_dtype(table.layout.split()[1]),
            rule.row_length(table.layout),
        )
        for table in tables
    ]


def dense_jobs(prepared: Sequence[Launch], hyper: Any) -> list[threads.Job]:
    """Kernel calls with these rows of hyper-parameters."""
    return [
        (kernel, (addresses, offsets, _as_rows(hyper, real, length)), elements)
        for kernel, addresses, offsets, elements, real, length in prepared
    ]


def _as_rows(hyper: Any, real: np.dtype, length: int) -> np.ndarray:
    """Rows of hyper-parameters as a kernel takes them, which has no other way to know their length."""
    rows = np.array(hyper, real)
    if rows.shape[1] != length:
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
        answer = ndarray.survey(ids, ndarray.known(), ndarray.NONE, n_state, request.per_row, *found)
        if self.launches and answer == ndarray.SAME:
            return True
        if self.launches and answer == ndarray.MOVED and not ndarray.overlapping(found):
            if len(self.tables) > 1:  # else its addresses are those of `found`
                for table in self.tables:
                    table.addresses[:, :-2] = found.addresses[table.members, :-2]
            return True
        self.launches = []
        if answer == ndarray.STRANGE or not device.fit(found, n_state, request.stored):
            return False
        self.tables = device.tables(found, n_state, request.stored)
        self.launches = launches(rule, self.tables)
        self.which = ()
        return True

    def jobs(self, hyper: Any, which: Sequence[int]) -> list[threads.Job]:
        """The kernel calls of a step."""
        if which is not self.which and which != self.which:
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
        real = cpu.compute_dtype(layout.split()[0])
        exact = own is not None
        entries, elements = [], [0]
        for t in members:
            parts, arrays = work.parts[t], work.bound.found.addresses[t]
            stamps = work.stamps[t].ctypes.data if exact else 0
            recorded = work.histories[t].recorded if exact else 0
            head = [_address(array) for array in (parts.data, parts.rows, parts.starts, parts.places)]
            size = 0 if parts.places is None else parts.places.itemsize
            row = 0 if exact else int(which[t])
            count = len(parts.rows)
            entries.append([*head, stamps, recorded, count, size, *_own(rule, layout, arrays), row])
            elements.append(elements[-1] + parts.lines * int(arrays[-2]))
        rows = _as_rows(hyper, real, rule.row_length(layout))
        if own is not None:
            rows = work.histories[own].with_current(rows[which[own]])
        kernel = rules.kernel(cpu.rows, rule, layout, form, exact)
        table = np.array(entries, np.uint64)
        jobs.append((kernel, (table, np.array(elements, np.int64), rows), elements[-1]))
    return jobs


def _catch_up(rule: Rule, work: Work, t: int) -> threads.Job:
    """The kernel call that brings all rows of a parameter up to date."""
    history, arrays, layout = work.histories[t], work.bound.found.addresses[t], _layout(rule, work, t)
    stamps = work.stamps[t].ctypes.data
    entry = [0, 0, 0, 0, stamps, history.recorded, 0, 0, *_own(rule, layout, arrays), 0]
    elements = int(work.bound.found.sizes[t])
    kernel = rules.kernel(cpu.rows, rule, layout, "none", True)
    table, offsets = np.array([entry], np.uint64), np.array([0, elements], np.int64)
    return kernel, (table, offsets, history.rows()), elements


def _layout(rule: Rule, work: Work, t: int) -> str:
    """How a parameter's own arrays are laid out: its weight, states and perhaps copy."""
    found, stored = work.bound.found, work.bound.stored
    return device.own_layout(int(found.codes[t]), found.bytes.shape[1], rule.n_state, stored)


def _own(rule: Rule, layout: str, addresses: np.ndarray) -> list[int]:
    """The addresses of a parameter's own arrays, the number that it has, and the length of its rows."""
    return [*addresses[1 : 1 + len(layout.split())].tolist(), *addresses[-3:-1].tolist()]


def _address(array: np.ndarray | None) -> int:
    return 0 if array is None else array.ctypes.data


def on_arrays(rule: Rule, work: Work, hyper: Any, which: Sequence[int]) -> None:
    """The same on whole arrays, one parameter after another: readable, not fast."""
    rules.check_on_arrays(rule)
    for t in range(len(which)):
        grad, weight, *rest = (column[t] for column in work.bound.arrays)
        row = hyper[which[t]]
        if t in work.histories and work.histories[t].recorded:
            _catch_up_arrays(rule, work, t, weight, rest)
        keep = _keeping(work, t)
        if t not in work.parts:
            _apply(rule, grad, weight, rest, row, keep)
            continue
        touched, values = work.parts[t].summed(weight)
        _apply_to_rows(rule, touched, values, weight, rest, row, keep)
        if t in work.stamps:
            work.stamps[t][touched] = work.histories[t].recorded + 1
            work.histories[t].with_current(row)


def _catch_up_arrays(rule: Rule, work: Work, t: int, weight: np.ndarray, rest: Sequence[Any]) -> None:
    """Let the rows that will be touched, or all of them, take the recorded steps that they have not."""
    stamps, history = work.stamps[t], work.histories[t]
    rows = work.parts[t].rows if t in work.parts else np.arange(len(stamps))
    for q, hyper in enumerate(history.rows()):
        late = rows[stamps[rows] <= q]
        _apply_to_rows(rule, late, np.zeros((len(late), 1)), weight, rest, hyper, _keeping(work, t))


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
    h = tuple(np.asarray(hyper)[: 3 + rule.n_hyper].astype(real))
    w, *state = (array.astype(real) for array in (weight, *rest[: rule.n_state]))
    with np.errstate(all="ignore"):
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
    with interrupts.held_back():
        if fused:
            threads.run([_catch_up(rule, work, t) for t in work.lagging()])
        else:
            rules.check_on_arrays(rule)
            for t in work.lagging():
                _, weight, *rest = (column[t] for column in work.bound.arrays)
                _catch_up_arrays(rule, work, t, weight, rest)
        threads.run([], work.bound.write_back())
        work.settle()


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
        threads.run([(cpu.squares(code), (addresses, offsets, partial), int(offsets[-1]))])
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
