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
    """Accesses in units of bytes, as columns; those that few launches ask for are made by `complete`."""

    def __init__(self, entries: list[tuple[Any, ...]]) -> None:
        unit = min(entry[3] for entry in entries)
        self._entries = [(entry, entry[3] * entry[4] // unit) for entry in entries]
        self._lengths = [units * len(entry[2]) for entry, units in self._entries]
        steps = {units: np.arange(0, units * unit, unit) for _, units in self._entries}
        self.columns = {
            "place": np.concatenate([(e[1][:, None] + steps[units]).ravel() for e, units in self._entries]),
            "lane": np.concatenate([np.repeat(e[2], units) for e, units in self._entries]),
            "wrote": np.repeat([e[5] is not None for e, _ in self._entries], self._lengths),
            "value": np.concatenate([_written(*e[2:6], unit) for e, _ in self._entries]),
        }

    def complete(self) -> None:
        """Add which instruction an access is, and how often threads have met before it."""
        self.columns["key"] = np.repeat([e[0] for e, _ in self._entries], self._lengths)
        for number, name in enumerate(("block_met", "warp_met")):
            parts = [np.repeat(e[6][number], units) for e, units in self._entries]
            self.columns[name] = np.concatenate(parts)

    def __getattr__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def keep(self, which: np.ndarray) -> None:
        self.columns = {name: column[which] for name, column in self.columns.items()}


def _written(lanes: np.ndarray, size: int, count: int, values: Any, unit: int) -> np.ndarray:
    """What threads write, in units of bytes; zeros if they only read."""
    if values is None:
        return np.zeros(len(lanes) * size * count // unit, "u8")
    words = np.empty((len(lanes), count), f"u{size}")
    for k, value in enumerate(values):
        words[:, k] = value
    return words.view(f"u{unit}").ravel().astype("u8")


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
    if bad.any():
        found.complete()
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
