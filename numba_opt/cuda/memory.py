"""What steps need in a GPU's memory: hyper-parameters, and tables with the launches that take them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .. import device
from ..core.rules import Rule
from . import sparse as cuda_sparse
from .arrays import kernels
from .buffer import HEAD, OUT, ROOM, SKIPPED

if TYPE_CHECKING:
    from .execution import Found

RING = 3  # copies of a table that may be on their way at once


class Norm(NamedTuple):
    """What is asked for of the norm of all gradients: a limit (infinity for none), and a guard."""

    limit: float
    guard: bool


class Scratch:
    """Some of a device's memory, which is only replaced by more."""

    def __init__(self, gpu: Any) -> None:
        self._gpu = gpu
        self.memory: Any = None

    def has(self, words: int) -> bool:
        """Whether so many words fit."""
        return self.memory is not None and bool(self.memory.size >= 8 * words)

    def fit(self, words: int) -> int:
        """The address of so many words."""
        if not self.has(words):
            self.memory = self._gpu.memory(8 * words + words)  # some more, so that it happens rarely
        return self.address

    @property
    def address(self) -> int:
        """Where it is."""
        return int(self.memory.address)


class Mirror:
    """Numbers in the device's memory, and what they are written from."""

    def __init__(self, driver_device: Any, words: int) -> None:
        self.memory = driver_device.memory(8 * words)
        self._device, self._words = driver_device, words
        self._ring: list[Any] = []

    def write(self, words: np.ndarray, stream: int) -> None:
        """Have the numbers copied when the stream gets there; what is copied may change at once."""
        if len(self._ring) < RING:
            self._ring.append(self._device.pinned(8 * self._words))
        else:
            self._ring.append(self._ring.pop(0))
            self._ring[-1].settle()
        self._ring[-1].words[:] = words
        self.memory.fill(self._ring[-1], stream)


class Hyper:
    """A device's buffer of hyper-parameters."""

    def __init__(self, gpu: Any) -> None:
        found = kernels()
        self.loops, self._launch_of = found.loops, found.driver.Launch
        self._gpu = gpu
        self._written: Any = None
        self._numbers = np.zeros(0)  # that launches take there
        self._launches: list[Any] = []
        self._earlier: Any = 0  # counts of buffers that were too small
        self.memory: Any = None
        self.address = self.room = 0

    def fit(self, rows: np.ndarray) -> None:
        """Have room for such rows. Whoever has the address must ask again."""
        if not self.holds(rows):
            loops = self.loops
            self._earlier = self.told()[SKIPPED:]
            self.room = -(-(HEAD + rows.size) // ROOM) * ROOM
            self.memory = self._gpu.memory(8 * (OUT + 3 * self.room))
            self.address = int(self.memory.address)
            self._written, self._numbers = None, np.zeros(self.room)
            self._launches = [
                self._launch_of(
                    *(self._gpu, loops.set_hyper(), 1, 1, (self.address, self.room, first)),
                    self._numbers[first : first + ROOM],
                )
                for first in range(0, self.room, ROOM)
            ]

    def holds(self, rows: np.ndarray) -> bool:
        """Whether there is room for such rows."""
        return HEAD + rows.size <= self.room

    def has(self, rows: np.ndarray, norm: Norm | None) -> bool:
        """Whether these are there, or will be once streams get there."""
        return (norm, rows.tobytes()) == self._written

    def write(self, rows: np.ndarray, norm: Norm | None, stream: int) -> None:
        """Have rows written when the stream gets there, if they are not there already."""
        if self.has(rows, norm):
            return
        numbers = self._numbers
        limit, guard = norm or (0.0, False)
        numbers[:HEAD] = limit, rows[0, 0], guard, 0.0
        numbers[HEAD : HEAD + rows.size] = rows.ravel()
        for launch in self._launches:
            launch(stream)
        self._written = norm, rows.tobytes()

    def told(self) -> np.ndarray:
        """What kernels have said; waits for everything on the device."""
        if self.memory is None:
            return np.zeros(OUT)
        out = np.frombuffer(self.memory.read(8 * OUT), np.float64).copy()
        out[SKIPPED:] += self._earlier
        return out


class NoHyper(NamedTuple):
    """What stands for a buffer where kernels need none."""

    address: int = 0
    room: int = 0


NO_HYPER = NoHyper()


# ---------------------------------------------------------------- tables


class Table(NamedTuple):
    """A table that is to be in a device's memory, and the kernels that take it."""

    layout: str  # how the arrays are stored, and the form of sparse gradients
    members: list[int]
    entries: np.ndarray
    lines: np.ndarray  # of elements, of units, of units whose squares are summed (`device.line`)
    kernel: Any
    squares: Any
    by_warps: tuple[bool, bool]  # whether warps take the units of these, and not blocks
    sparse: Sequence[cuda_sparse.Parts] = ()  # the tensors' gradients, if they are sparse
    late: Any = None  # the kernel that comes before, if rows catch up
    record: Any = None  # and the one that comes after

    def like(self, other: Table) -> bool:
        """Whether it can be where another one was."""
        mine, theirs = (
            (self.layout, self.members, len(self.sparse)),
            (other.layout, other.members, len(other.sparse)),
        )
        return mine == theirs


def dense_table(rule: Rule, table: device.Table) -> Table:
    """The table of dense gradients."""
    loops = kernels().loops
    sizes = np.diff(table.offsets)
    chunks = -(-sizes // loops.CHUNK)
    rows = sizes // np.maximum(table.addresses[:, -2].astype(np.int64), 1)
    lines = np.stack([table.offsets, device.line(rows if rule.per_row else chunks), device.line(chunks)])
    kernel, squares = loops.dense(*rule, table.layout), loops.squares(table.layout.split()[0])
    by_warps = (rule.per_row, False)
    return Table(table.layout, table.members.tolist(), table.addresses, lines, kernel, squares, by_warps)


def row_tables(rule: Rule, found: Found) -> Iterator[Table]:
    """The tables of sparse gradients, one for all that are alike."""
    loops, bound, parts = kernels().loops, found.bound, found.parts
    groups: dict[tuple[str, str], list[int]] = {}
    for t, part in parts.items():
        groups.setdefault((part.updating[0], found.layout(t, rule)), []).append(t)
    for (form, layout), members in groups.items():
        entries, units, sums = [], [], []
        for t in members:
            arrays = bound.found.addresses[t]
            own, (number, width) = arrays[1 : 1 + len(layout.split())].tolist(), arrays[-3:-1].tolist()
            head = parts[t].head(bound.arrays[1][t].shape[0], 0, found.late(t))
            entries.append([*head, *own, number, width, 0])
            units.append(parts[t].updating[1] if width else 0)
            sums.append(parts[t].units if width else 0)
        line = device.line(np.array(units))
        lines = np.stack([line, line, device.line(np.array(sums))])
        kernel = loops.rows(*rule, layout, form)
        squares = loops.row_squares(layout.split()[0], parts[members[0]].form)
        words = np.array(entries, np.uint64)
        table = Table(f"{form}: {layout}", members, words, lines, kernel, squares, (True, True))
        if found.histories:
            record = loops.record(3 + rule.n_hyper + 2 * ("s" in layout), layout.split()[0])
            table = table._replace(late=loops.late(*rule, layout, form), record=record)
        yield table._replace(sparse=[parts[t] for t in members])


def late_tables(rule: Rule, found: Found, late: Sequence[int]) -> Iterator[Table]:
    """The tables of tensors whose rows are all to catch up."""
    loops = kernels().loops
    groups: dict[str, list[int]] = {}
    for t in late:
        groups.setdefault(found.layout(t, rule), []).append(t)
    for layout, members in groups.items():
        entries, units = [], []
        for t in members:
            arrays = found.bound.found.addresses[t]
            own, (number, width) = arrays[1 : 1 + len(layout.split())].tolist(), arrays[-3:-1].tolist()
            height = int(found.bound.found.sizes[t]) // max(width, 1)
            entries.append([0, 0, 0, 0, height, 0, *found.late(t), *own, number, width, 0])
            units.append(height)
        kernel = loops.late(*rule, layout, f"none {layout.split()[0]}")
        lines, words = np.stack([device.line(np.array(units))] * 3), np.array(entries, np.uint64)
        yield Table(f"late: {layout}", members, words, lines, kernel, None, (True, True))


def over(gpu: Any, kernel: Any, units: int, arguments: tuple[int, ...], by_warps: bool | None) -> Any:
    """A launch over so many units: of warps, of blocks, or (None) of threads."""
    loops = kernels().loops
    threads = loops.WARP * loops.WARPS if by_warps else loops.THREADS
    share = loops.WARPS if by_warps else loops.THREADS if by_warps is None else 1
    blocks = min(-(-units // share), gpu.processors * 8)
    return kernels().driver.Launch(gpu, kernel, blocks, threads, arguments)


def sorting(gpu: Any, integers: str, rows: int, count: int, height: int, place: int) -> tuple[list[Any], int]:
    """What sorts the keys of row numbers, in memory for twice as many, and where they are then."""
    loops = kernels().loops
    source, target, run = place, place + 8 * count, loops.RUN
    launches = [over(gpu, loops.keys(integers), -(-count // run), (rows, count, height, source), False)]
    while run < count:
        launches.append(over(gpu, loops.merge(), count, (source, count, run, target), None))
        source, target, run = target, source, 2 * run
    return launches, source


class Placed:
    """A table in the device's memory, with the launches that take it."""

    def __init__(self, gpu: Any, hyper: Hyper | NoHyper, table: Table) -> None:
        self._gpu, self._hyper = gpu, hyper
        self._mirror = Mirror(gpu, table.entries.size + table.lines.size)
        self._keys = Scratch(gpu)
        self._which: list[int] = []
        self.table = table
        self.sorting: list[Any] = []  # launches, before those that sum squares
        self.updates: list[Any] = []  # the launches that change weights, in order

    def take(self, table: Table) -> None:
        """Have another one like it."""
        self.table, self._which, self.sorting = table, [], []
        sorted_ones = [(k, parts) for k, parts in enumerate(table.sparse) if parts.form.startswith("keys")]
        place = self._keys.fit(sum(2 * parts.units for _, parts in sorted_ones)) if sorted_ones else 0
        for k, parts in sorted_ones:
            table.entries[k, 3] = self._sort(table.entries[k], parts, place)
            place += 16 * parts.units

    def _sort(self, entry: np.ndarray, parts: cuda_sparse.Parts, place: int) -> int:
        """Have a gradient's keys sorted, in memory for twice as many; says where they are then."""
        rows, height = int(entry[1]), int(entry[4])
        launches, sorted_keys = sorting(self._gpu, parts.integers, rows, parts.units, height, place)
        self.sorting += launches
        return sorted_keys

    def _over(self, kernel: Any, units: int, arguments: tuple[int, ...], by_warps: bool | None = None) -> Any:
        return over(self._gpu, kernel, units, arguments, by_warps)

    def place(self, which: list[int], stream: int) -> None:
        """Have the table as it should be when the stream gets there, its tensors' rows beginning there."""
        if self._which != which:
            self.table.entries[:, -1] = which
            words = [self.table.entries.view(np.int64).ravel(), self.table.lines.ravel()]
            self._mirror.write(np.concatenate(words), stream)
            self._which = which
        units, table = int(self.table.lines[1, -1]), self.table
        buffer = (self._hyper.address, self._hyper.room)
        arguments = (*self._arguments(1), *buffer)
        chosen = [table.late, table.kernel] if table.late else [table.kernel]
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
        """How many sums of squares of the gradients there are."""
        return int(self.table.lines[2, -1])

    def forget(self) -> Any:
        """The launch after which the tensors' histories begin anew."""
        first, columns, *_, tensors = self._arguments(1)
        return self._over(kernels().loops.forget(), tensors, (first, columns, tensors))

    def squares(self, partial: int) -> Any:
        """The launch that sums the squares of the gradients, for each unit."""
        arguments = (*self._arguments(2), partial)
        return self._over(self.table.squares, self.sums, arguments, self.table.by_warps[1])
