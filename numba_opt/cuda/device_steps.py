"""The steps of one device: tables in its memory, and launches of kernels that take them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..core.call import moved
from ..core.columns import GRAD
from ..core.rules import Rule
from ..core.step_rows import NormLimit, StepRows
from ..cpu import ndarray
from .arrays import current_stream, kernels
from .call import DeviceCall
from .memory import NO_BUFFER, CoefficientBuffer, Scratch
from .tables import PlacedTable, dense_table, pending_tables, row_tables


class Captured(NamedTuple):
    """The step that a graph makes on a device, and what it has the addresses of."""

    steps: DeviceSteps
    call: DeviceCall
    buffer: int  # where the buffer of coefficients was
    kept: list[Any]  # what it has the addresses of


class DeviceSteps:
    """The arrays of a call that are on one device: tables there, and launches."""

    def __init__(self, rule: Rule, gpu: Any, members: list[int]) -> None:
        self.rule, self.gpu, self.members = rule, gpu, members
        self.buffer = CoefficientBuffer(gpu)
        self.placed: list[PlacedTable] = []
        self.made_on: set[int] = set()
        self.weight: Callable[[], Any] = lambda: None
        self.held: DeviceCall | None = None
        self._row_of: Sequence[int] | None = None  # rows of coefficients that it is ready for,
        self._at = 0  # and where those are
        self._last_stream: int | None = None
        self._partial = Scratch(gpu)
        self._launches: list[Any] = []
        self._measuring: list[Any] = []  # the same with the norm of the gradients: what sums their squares,
        self._settling: list[Any] = []  # and what comes once all sums are there
        self._share: tuple[int, int] | None = None  # of the sums that these are made for, as `write` has it
        self._catching_up: list[PlacedTable] = []
        self._frozen = False  # whether a graph has the addresses of tables, which stay as they are then

    def hold(self, held: DeviceCall, weight: Any) -> None:
        """Take other arrays."""
        tables = [dense_table(self.rule, table) for table in held.call.tables]
        tables += row_tables(held.call)
        before, self.placed = [] if self._frozen else self.placed, []
        self._frozen = False
        for table in tables:
            placed = next((old for old in before if old.table.like(table)), None)
            self.placed.append(placed or PlacedTable(self.gpu, self.buffer, table))
            self.placed[-1].replace(table)
        self.made_on, self.weight = held.made_on, _weakly(weight)
        self.held, self._row_of = held, None

    def refresh_grads(self, places: np.ndarray) -> bool:
        """Take other gradients, which are like the last ones; False if they cannot be taken as they are."""
        held = self.held
        if held is None or held.call.touched:
            return False
        scan, sizes = held.call.scan, held.call.scan.bytes[:, GRAD]
        full = sizes > 0
        if (scan.addresses[full, GRAD] == places[full]).all():
            return True
        if self.gpu.capturing(self.stream()):
            return False
        widths = np.maximum(sizes // np.maximum(scan.sizes, 1), 1).astype(np.uint64)
        scan.addresses[full, GRAD] = places[full]
        if (places % widths)[full].any() or ndarray.overlapping(scan):
            return False
        moved(held.call)
        self.hold(held, self.weight())
        return True

    # ---------------------------------------------------------------- rows that catch up

    def catch_up(self, held: DeviceCall, pending: Sequence[int], stream: int) -> None:
        """Let all rows of some tensors take the steps that they have yet to take."""
        if not pending:
            return
        before, self._catching_up = self._catching_up, []
        for table in pending_tables(held.call, pending):
            placed = next((old for old in before if old.table.like(table)), None)
            placed = placed or PlacedTable(self.gpu, NO_BUFFER, table)
            self._catching_up.append(placed)
            placed.replace(table)
            placed.place([0] * len(table.members), stream)
            for launch in (*placed.updates, placed.forget()):
                launch(stream)
        for t in pending:
            held.call.deferred[t].recorded = 0

    def record(self, held: DeviceCall, stream: int) -> None:
        """Prepare and count a step that is about to be launched and records itself, if rows catch up."""
        touched, deferred = held.call.touched, held.call.deferred
        self.follow(held, stream)
        full = [t for t in touched.keys() & deferred.keys() if deferred[t].recorded == deferred[t].room]
        self.catch_up(held, sorted({*held.call.pending(), *full}), stream)
        for t in touched.keys() & deferred.keys():
            deferred[t].recorded += 1

    def flush(self, stream: int) -> None:
        """Bring all rows up to date."""
        if held := self.held:
            self.follow(held, stream)
            pending = [t for t, steps in held.call.deferred.items() if steps.recorded]
            self.catch_up(held, pending, stream)

    def follow(self, held: DeviceCall, stream: int) -> None:
        """Let a stream wait for those that used the deferred steps last."""
        deferred = held.call.deferred.values()
        for other in {steps.stream for steps in deferred} - {None, stream}:
            self.gpu.after(stream, other)
        for steps in deferred:
            steps.stream = stream

    # ---------------------------------------------------------------- steps

    def freeze(self) -> Captured:
        """Keep as it is what a graph has just been given, with all that it has addresses of; return that."""
        self._frozen = True
        assert self.held is not None
        deferred = [*self.held.call.deferred.values()]
        kept = [*self.placed, self._partial.memory, self.buffer.memory, *deferred]
        return Captured(self, self.held, self.buffer.address, kept)

    def stream(self) -> int:
        """The caller's stream."""
        return current_stream(self.weight(), self.gpu.number)

    @property
    def sums(self) -> int:
        """Number of sums of squares of its gradients."""
        return sum(placed.sums for placed in self.placed)

    def come_to(self, stream: int) -> None:
        """Let a stream wait for the one that was used last."""
        if stream != self._last_stream:
            if self._last_stream is not None:
                self.gpu.after(stream, self._last_stream)
            self._last_stream = stream

    def written(
        self, rows: StepRows, matrix: np.ndarray, limit: NormLimit | None, stream: int, share: tuple[int, int]
    ) -> bool:
        """Tell whether `write` has nothing to do."""
        if stream != self._last_stream or self.made_on - {stream} or not self.ready(rows.row_of, limit):
            return False
        return (limit is None or share == self._share) and self.buffer.has(matrix, limit)

    def write(
        self, rows: StepRows, matrix: np.ndarray, limit: NormLimit | None, stream: int, share: tuple[int, int]
    ) -> None:
        """Have coefficients, of which there is a matrix, and tables in place when the stream gets there.

        Of the sums of squares, those of other devices included, its own are a share: where they begin among
        all, and how many all are.
        """
        self.come_to(stream)
        for other in self.made_on - {stream}:
            self.gpu.after(stream, other)
        self.buffer.resize(matrix)
        if not self.ready(rows.row_of, None):
            self._place(rows.row_of, matrix.shape[1], stream)
        self.buffer.write(matrix, limit, stream)
        if limit is not None and self._share != share:
            self._prepare_norm(matrix.shape[1], share)

    def _place(self, row_of: Sequence[int], length: int, stream: int) -> None:
        """Have tables in place, with tensors' rows of coefficients, which have that length."""
        if self._frozen:
            tables, self.placed, self._frozen = [placed.table for placed in self.placed], [], False
            for table in tables:
                self.placed.append(PlacedTable(self.gpu, self.buffer, table))
                self.placed[-1].replace(table)
        for placed in self.placed:
            placed.place([length * int(row_of[self.members[k]]) for k in placed.table.members], stream)
        self._launches, self._share = [*self._sorting(), *self._updates()], None
        self._row_of, self._at = row_of, self.buffer.address

    def _sorting(self) -> list[Any]:
        return [launch for placed in self.placed for launch in placed.sorting]

    def _updates(self) -> list[Any]:
        return [launch for placed in self.placed for launch in placed.updates]

    def ready(self, row_of: Sequence[int], limit: NormLimit | None) -> bool:
        """Tell whether all is in place, but for the values of coefficients."""
        if self._at != self.buffer.address or self._row_of is None:
            return False
        return (row_of is self._row_of or row_of == self._row_of) and (
            limit is None or self._share is not None
        )

    def launch(self, limit: NormLimit | None, stream: int) -> None:
        """Launch the kernels of a step, up to the sums of squares if there is a norm; nothing else."""
        for launch in self._launches if limit is None else self._measuring:
            launch(stream)

    def settle(self, stream: int) -> None:
        """Launch what follows from the sums of squares, the updates included."""
        for launch in self._settling:
            launch(stream)

    def fetch(self, other: DeviceSteps, stream: int, from_stream: int) -> None:
        """Have another device's sums of squares here, once they are there."""
        assert other._share is not None
        place = 8 * other._share[0]
        self.gpu.after(stream, from_stream, other.gpu)
        mine, theirs = self._partial.address + place, other._partial.address + place
        self.gpu.bring(mine, other.gpu, theirs, 8 * other.sums, stream)

    def _prepare_norm(self, length: int, share: tuple[int, int]) -> None:
        """Be ready to sum the squares of all gradients, and to settle what follows from that."""
        loops, launch_of = kernels().loops, kernels().driver.Launch
        before, count = share
        first, squares = self._partial.resize(max(count, 1)), []
        for placed in self.placed:
            squares.append(placed.squares(first + 8 * before))
            before += placed.sums
        arguments = (self.buffer.address, self.buffer.room, length, first, count)
        settled = launch_of(self.gpu, loops.clip_norm(), 1, loops.THREADS, arguments)
        self._measuring, self._settling = [*self._sorting(), *squares], [settled, *self._updates()]
        self._share = share


def _weakly(value: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(value)
    except TypeError:
        return lambda: value
