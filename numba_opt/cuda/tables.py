"""Tables in a GPU's memory, with the launches that take them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..core.call import Call, Table, line_starts
from ..core.columns import CUDA_HEIGHT, CUDA_INDICES, CUDA_KEYS, ROW, WIDTH
from ..core.rules import Rule
from ..core.storage import Layout, TouchedForm
from .arrays import kernels
from .memory import CoefficientBuffer, Mirror, NoBuffer, Scratch
from .touched import DeviceTouchedRows


class DeviceTable(NamedTuple):
    """A table that is to be in a device's memory, and the kernels that take it."""

    kind: tuple[Any, ...]  # how the arrays are stored, and the form of sparse gradients
    members: list[int]
    entries: np.ndarray
    lines: (
        np.ndarray
    )  # of elements, of units, of units whose squares are summed (as `line_starts` gives them)
    kernel: Any
    squares: Any
    by_warps: tuple[bool, bool]  # whether warps take the units of these, and not blocks
    sparse: Sequence[DeviceTouchedRows] = ()  # the tensors' gradients, if they are sparse
    catch_up: Any = None  # the kernel that comes before, if rows catch up
    record: Any = None  # and the one that comes after

    def like(self, other: DeviceTable) -> bool:
        """Tell whether it can be where another one was."""
        mine, theirs = ((table.kind, table.members, len(table.sparse)) for table in (self, other))
        return mine == theirs


def dense_table(rule: Rule, table: Table) -> DeviceTable:
    """The table of dense gradients."""
    loops = kernels().loops
    sizes = np.diff(table.offsets)
    chunks = -(-sizes // loops.CHUNK)
    rows = sizes // np.maximum(table.addresses[:, WIDTH].astype(np.int64), 1)
    lines = np.stack([table.offsets, line_starts(rows if rule.per_row else chunks), line_starts(chunks)])
    kernel, squares = loops.dense(rule, table.layout), loops.squares(table.layout.grad)
    by_warps = (rule.per_row, False)
    kind, members = (table.layout,), table.members.tolist()
    return DeviceTable(kind, members, table.addresses, lines, kernel, squares, by_warps)


def row_tables(call: Call) -> Iterator[DeviceTable]:
    """The tables of sparse gradients, one for all that are alike."""
    loops, rule, touched = kernels().loops, call.rule, call.touched
    groups: dict[tuple[TouchedForm, Layout], list[int]] = {}
    for t, rows in touched.items():
        groups.setdefault((rows.updating[0], call.layout(t)), []).append(t)
    for (form, layout), members in groups.items():
        entries, units, sums = [], [], []
        for t in members:
            own, tensor_id, width = call.own(t)
            head = touched[t].head(call.arrays[1][t].shape[0], 0, *_pending(call, t))
            entries.append([*head, *own, tensor_id, width, 0])
            units.append(touched[t].updating[1] if width else 0)
            sums.append(touched[t].units if width else 0)
        starts = line_starts(np.array(units))
        lines = np.stack([starts, starts, line_starts(np.array(sums))])
        kernel = loops.rows(rule, layout, form)
        squares = loops.row_squares(layout.compute, touched[members[0]].form)
        words = np.array(entries, np.uint64)
        table = DeviceTable((form, layout), members, words, lines, kernel, squares, (True, True))
        if call.deferred:
            record = loops.record(rule.row_length(layout.stochastic), layout.compute)
            table = table._replace(catch_up=loops.catch_up(rule, layout, form), record=record)
        yield table._replace(sparse=[touched[t] for t in members])


def pending_tables(call: Call, pending: Sequence[int]) -> Iterator[DeviceTable]:
    """The tables of tensors whose rows are all to catch up."""
    loops = kernels().loops
    groups: dict[Layout, list[int]] = {}
    for t in pending:
        groups.setdefault(call.layout(t), []).append(t)
    for layout, members in groups.items():
        entries = []
        for t in members:
            own, tensor_id, width = call.own(t)
            entries.append([0, 0, 0, 0, call.height(t), 0, *_pending(call, t), *own, tensor_id, width, 0])
        kernel = loops.catch_up(call.rule, layout, TouchedForm("none", layout.weight))
        lines = np.stack([line_starts(np.array([call.height(t) for t in members]))] * 3)
        words = np.array(entries, np.uint64)
        yield DeviceTable(("pending", layout), members, words, lines, kernel, None, (True, True))


def _pending(call: Call, t: int) -> tuple[int, int]:
    """Return the addresses of a tensor's last steps and of its deferred steps, 0 if it has none."""
    return (call.last_steps[t].ctypes.data, call.deferred[t].address) if t in call.deferred else (0, 0)


def launch_over(gpu: Any, kernel: Any, units: int, arguments: tuple[int, ...], by_warps: bool | None) -> Any:
    """A launch over so many units: of warps, of blocks, or (None) of threads."""
    loops = kernels().loops
    threads = loops.WARP * loops.WARPS if by_warps else loops.THREADS
    share = loops.WARPS if by_warps else loops.THREADS if by_warps is None else 1
    blocks = min(-(-units // share), gpu.processors * 8)
    return kernels().driver.Launch(gpu, kernel, blocks, threads, arguments)


def sorting(gpu: Any, indices: str, rows: int, count: int, height: int, place: int) -> tuple[list[Any], int]:
    """Return launches that sort keys of row numbers, in memory for twice as many, and their place then."""
    loops = kernels().loops
    source, target, run = place, place + 8 * count, loops.RUN
    launches = [launch_over(gpu, loops.keys(indices), -(-count // run), (rows, count, height, source), False)]
    while run < count:
        launches.append(launch_over(gpu, loops.merge(), count, (source, count, run, target), None))
        source, target, run = target, source, 2 * run
    return launches, source


class PlacedTable:
    """A table in the device's memory, with the launches that take it."""

    def __init__(self, gpu: Any, buffer: CoefficientBuffer | NoBuffer, table: DeviceTable) -> None:
        self._gpu, self._buffer = gpu, buffer
        self._mirror = Mirror(gpu, table.entries.size + table.lines.size)
        self._keys = Scratch(gpu)
        self._row_of: list[int] = []
        self.table = table
        self.sorting: list[Any] = []  # launches, before those that sum squares
        self.updates: list[Any] = []  # the launches that change weights, in order

    def replace(self, table: DeviceTable) -> None:
        """Have another one like it."""
        self.table, self._row_of, self.sorting = table, [], []
        sorted_ones = [(k, rows) for k, rows in enumerate(table.sparse) if rows.form.kind == "keys"]
        place = self._keys.resize(sum(2 * rows.units for _, rows in sorted_ones)) if sorted_ones else 0
        for k, rows in sorted_ones:
            table.entries[k, CUDA_KEYS] = self._sort(table.entries[k], rows, place)
            place += 16 * rows.units

    def _sort(self, entry: np.ndarray, rows: DeviceTouchedRows, place: int) -> int:
        """Have a gradient's keys sorted, in memory for twice as many; return where they are then."""
        numbers, height = int(entry[CUDA_INDICES]), int(entry[CUDA_HEIGHT])
        indices = f"i{8 * rows.indices.shadow.itemsize}"
        launches, sorted_keys = sorting(self._gpu, indices, numbers, rows.units, height, place)
        self.sorting += launches
        return sorted_keys

    def _over(self, kernel: Any, units: int, arguments: tuple[int, ...], by_warps: bool | None = None) -> Any:
        return launch_over(self._gpu, kernel, units, arguments, by_warps)

    def place(self, row_of: list[int], stream: int) -> None:
        """Have the table as it should be when the stream gets there, its tensors' rows beginning there."""
        if self._row_of != row_of:
            self.table.entries[:, ROW] = row_of
            words = [self.table.entries.view(np.int64).ravel(), self.table.lines.ravel()]
            self._mirror.write(np.concatenate(words), stream)
            self._row_of = row_of
        units, table = int(self.table.lines[1, -1]), self.table
        buffer = (self._buffer.address, self._buffer.room)
        arguments = (*self._arguments(1), *buffer)
        chosen = [table.catch_up, table.kernel] if table.catch_up else [table.kernel]
        self.updates = [self._over(kernel, units, arguments, table.by_warps[0]) for kernel in chosen]
        if table.record:
            first, columns, *_, tensors = arguments[:5]
            self.updates.append(self._over(table.record, tensors, (first, columns, tensors, *buffer)))

    def _arguments(self, line: int) -> tuple[int, ...]:
        """The table, its columns, the lines, and how many tensors there are."""
        table = self._mirror.memory.address
        tensors, columns = self.table.entries.shape
        offsets = table + 8 * self.table.entries.size
        return table, columns, offsets, offsets + 8 * line * (tensors + 1), tensors

    @property
    def sums(self) -> int:
        """Number of sums of squares of the gradients."""
        return int(self.table.lines[2, -1])

    def forget(self) -> Any:
        """The launch after which the tensors' deferred steps begin anew."""
        first, columns, *_, tensors = self._arguments(1)
        return self._over(kernels().loops.forget(), tensors, (first, columns, tensors))

    def squares(self, partial: int) -> Any:
        """The launch that sums the squares of the gradients, for each unit."""
        arguments = (*self._arguments(2), partial)
        return self._over(self.table.squares, self.sums, arguments, self.table.by_warps[1])
