"""Accesses that nothing puts in order: two threads, the same bytes, one of them writes.

A block's barrier orders what its threads do, a warp's barrier what the warp's do, and a launch comes after
another one. Nothing else orders memory: that threads exchange registers makes them wait, and no more. Several
threads may write the same value, and one thread's own accesses are in its program's order.
"""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING, Any

import numpy as np

from .faults import OrderError

if TYPE_CHECKING:
    from .scheduling import Run

SHARED = 1 << 60  # where shared memory is, among places


class Log:
    """A launch's accesses, and how often threads have met before each."""

    def __init__(self, lanes: int) -> None:
        self.entries: list[tuple[Any, ...]] = []
        self.writes = False
        self.everyone = np.arange(lanes)
        self._met = {"block": np.zeros(lanes, "i4"), "warp": np.zeros(lanes, "i4")}

    def note(self, key: int, places: Any, who: Any, size: int, count: int, values: Any) -> None:
        met = [one if who is None else one[who] for one in self._met.values()]
        self.entries.append((key, places, self.everyone if who is None else who, size, count, values, met))
        self.writes |= values is not None

    def met(self, what: str, who: Any) -> None:
        counts = self._met[what] = self._met[what].copy()  # entries have the earlier ones
        counts[slice(None) if who is None else who] += 1


class Accesses:
    """Accesses in units of bytes, as columns."""

    NAMES = ("place", "lane", "wrote", "value", "key", "block_met", "warp_met")

    def __init__(self, entries: list[tuple[Any, ...]]) -> None:
        unit = min(entry[3] for entry in entries)
        parts: list[list[Any]] = [[] for _ in self.NAMES]
        for key, places, lanes, size, count, values, met in entries:
            n = len(lanes)
            for k in range(count):
                for at in range(0, size, unit):
                    value = np.zeros(n, "u8") if values is None else _part(values[k], at, unit, n)
                    row = (places + (k * size + at), lanes, np.full(n, values is not None), value)
                    for part, column in zip(parts, (*row, np.full(n, key), *met), strict=True):
                        part.append(column)
        self.columns = dict(zip(self.NAMES, map(np.concatenate, parts), strict=True))

    def __getattr__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def keep(self, which: np.ndarray) -> None:
        self.columns = {name: column[which] for name, column in self.columns.items()}


def _part(value: Any, at: int, unit: int, n: int) -> np.ndarray:
    """So many bytes of the words that threads write."""
    words = np.broadcast_to(value, n).astype("u8") >> np.uint64(8 * at)
    return words & np.uint64((1 << 8 * unit) - 1)


class Groups:
    """Accesses that agree in some numbers, group by group."""

    def __init__(self, *numbers: np.ndarray) -> None:
        self.order = np.lexsort(numbers)
        ordered = [one[self.order] for one in numbers]
        new = np.ones(len(self.order), bool)
        if len(new):
            new[1:] = np.any([one[1:] != one[:-1] for one in ordered], axis=0)
        self.starts = np.flatnonzero(new)
        self.of = np.cumsum(new) - 1

    def differ(self, column: np.ndarray) -> np.ndarray:
        """Whether a group's members are not all the same."""
        ordered = column[self.order]
        return np.minimum.reduceat(ordered, self.starts) != np.maximum.reduceat(ordered, self.starts)

    def any(self, flags: np.ndarray) -> np.ndarray:
        return np.logical_or.reduceat(flags[self.order], self.starts)


def check(run: Run) -> None:
    """Raise if a launch has accesses that nothing puts in order."""
    log = run.log
    if log is None or not log.writes:
        return
    found = Accesses(_near_writes(log.entries))
    _leave_out_harmless(found)
    if not len(found.place):
        return
    block, warp = run.block[found.lane], run.warp[found.lane]
    for what, by, together in (
        ("blocks", block, [found.place]),
        ("warps of a block", warp, [found.place, block, found.block_met]),
        ("threads of a warp", found.lane, [found.place, warp, found.block_met, found.warp_met]),
    ):
        groups = Groups(*together)
        bad = _conflicts(groups, by, found)
        if bad.any():
            raise OrderError(_told(run, found, groups, bad, what))


def _near_writes(entries: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """The accesses that lie where something is written, more or less."""
    spans = [
        (int(places.min()), int(places.max()) + size * count) for _, places, _, size, count, *_ in entries
    ]
    written = sorted(span for span, entry in zip(spans, entries, strict=True) if entry[5] is not None)
    starts, ends, end = [start for start, _ in written], [], 0
    for _, own in written:
        ends.append(end := max(end, own))

    def near(first: int, last: int) -> bool:
        k = bisect.bisect_left(starts, last) - 1
        return k >= 0 and ends[k] > first

    return [entry for entry, span in zip(entries, spans, strict=True) if near(*span)]


def _leave_out_harmless(found: Accesses) -> None:
    """Bytes that one thread alone uses, that nobody writes, or that only ever get one value."""
    groups = Groups(found.place)
    bad = _conflicts(groups, found.lane, found)
    keep = np.zeros(len(found.place), bool)
    keep[groups.order] = bad[groups.of]
    found.keep(keep)


def _conflicts(groups: Groups, who: np.ndarray, found: Accesses) -> np.ndarray:
    """Which groups are of several, one of whom writes what another one reads, or writes otherwise."""
    reads, writes = groups.any(~found.wrote), groups.any(found.wrote)
    return groups.differ(who) & writes & (reads | groups.differ(found.value))


def _told(run: Run, found: Accesses, groups: Groups, bad: np.ndarray, what: str) -> str:
    first = groups.order[groups.of == np.flatnonzero(bad)[0]]
    lanes: dict[int, list[int]] = {}
    for k in first:
        lanes.setdefault(int(found.key[k]), []).append(int(found.lane[k]))
    lines = [
        f"line {run.program.instructions[k].line}: {run.program.instructions[k].text} by threads {some[:4]}"
        for k, some in lanes.items()
    ]
    place = int(found.place[first[0]])
    where = f"{place - SHARED:#x} of shared memory" if place >= SHARED else f"{place:#x}"
    return (
        f"nothing orders what {what} do at {where} ({int(bad.sum())} places): "
        f"{'; '.join(lines)}; {run.program.name[:80]}"
    )
