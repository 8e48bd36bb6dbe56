"""How competitors are timed: side by side, within the same seconds, and judged in pairs.

A workload is measured in rounds. Each round times every competitor once, in an order that is shuffled anew,
so that a machine that slows down slows down all of them, and nobody always follows the same neighbour.
Ratios are taken within a round and the median of them is what counts.
"""

from __future__ import annotations

import gc
import random
import sys
import time
from collections.abc import Mapping, Sequence
from statistics import median, quantiles
from typing import Any, NamedTuple

from .clock import Runner
from .competitors import BARE, Competitor, set_threads
from .workloads import Workload

SHORTEST = 500e-6  # seconds of one sample; quicker steps are repeated, all others once
WARM = 4_000_000  # bytes; a step that moves less is timed with its data in the caches
SLOW = 10  # times as long as the shortest one: such samples are taken in the fewest rounds alone
PATIENCE = 30.0  # seconds after which the fewest rounds need not be full


class Effort(NamedTuple):
    """Rounds go on for so many seconds, but for no fewer and no more than so many rounds."""

    seconds: float
    fewest: int
    most: int

    def spent(self, rounds: int, seconds: float) -> bool:
        """Whether that was enough."""
        if rounds < self.fewest:
            return bool(rounds) and seconds > PATIENCE
        return rounds >= self.most or seconds >= self.seconds


QUICK, FULL = Effort(0.5, 3, 15), Effort(4.0, 5, 25)


class Result(NamedTuple):
    """The samples of one workload: seconds a step, by competitor, one a round."""

    workload: Workload
    samples: dict[str, list[float]]
    failed: dict[str, str]  # those that could not, with the reason

    def fastest(self, names: Sequence[str]) -> str | None:
        """Whichever of the named ones that took part has the smallest median."""
        took_part = [name for name in names if name in self.samples]
        return min(took_part, key=lambda name: median(self.samples[name]), default=None)

    def ratio(self, name: str, other: str) -> float:
        """How many times as fast as another one a competitor is: the median over rounds."""
        pairs = zip(self.samples[name], self.samples[other], strict=False)  # the slow one has fewer rounds
        return median(theirs / ours for ours, theirs in pairs)

    def best(self, name: str, other: str) -> float:
        """The same from each one's fastest sample, which other work on the machine disturbs the least."""
        return min(self.samples[other]) / min(self.samples[name])

    def median(self, name: str) -> float:
        return median(self.samples[name])

    def quartiles(self, name: str) -> tuple[float, float]:
        """Between which half of the samples lie."""
        seconds = self.samples[name]
        low, _, high = quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
        return low, high

    def speed(self, name: str) -> float | None:
        """GB/s of the bytes that must be moved."""
        return self.workload.bytes / self.median(name) / 1e9 if self.workload.bytes else None

    def of_bare(self, name: str) -> float | None:
        """The speed as a fraction of the bare kernel's."""
        bare = self.fastest(BARE)
        return self.ratio(name, bare) if bare else None

    def plain(self) -> dict[str, Any]:
        """Plain values for a file, times in microseconds."""
        times = {name: [float(f"{s * 1e6:.4g}") for s in found] for name, found in self.samples.items()}
        workload, failed = self.workload, {"failed": self.failed} if self.failed else {}
        return {"threads": workload.threads, "bytes": workload.bytes, **failed, "us": times}

    @classmethod
    def of(cls, workload: Workload, plain: Mapping[str, Any]) -> Result:
        """What `plain` has made plain."""
        samples = {name: [us / 1e6 for us in found] for name, found in plain["us"].items()}
        return cls(workload._replace(threads=plain["threads"]), samples, plain.get("failed", {}))


def measure(workload: Workload, competitors: Sequence[Competitor], effort: Effort) -> Result:
    """Time all competitors that can do a workload, whose number of threads is settled."""
    set_threads(workload.threads)
    runners: dict[str, Runner] = {}
    repeats: dict[str, int] = {}
    failed: dict[str, str] = {}
    for name, _, ways, least, most in competitors:
        if workload.kind in ways and least <= workload.elements <= most:
            try:
                runner = ways[workload.kind](workload)
                if runner is not None:
                    repeats[name] = 1 if workload.kind == "start" else _repeats(runner)
                    runners[name] = runner
            except Exception as error:  # others can still be timed
                failed[name] = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
                print(f"  {name}: {failed[name]}", file=sys.stderr)
    samples: dict[str, list[float]] = {name: [] for name in runners}
    warm = workload.bytes < WARM
    order, shuffle = list(runners), random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        start, rounds = time.perf_counter(), 0
        while not effort.spent(rounds, time.perf_counter() - start):
            shuffle(order)
            for name in order:
                samples[name].append(runners[name](repeats[name], warm))
            rounds += 1
            if rounds == effort.fewest:
                cost = {name: median(samples[name]) * repeats[name] for name in order}
                order = [name for name in order if cost[name] < SLOW * min(cost.values())]
    finally:
        gc.enable()
    return Result(workload, samples, failed)


def _repeats(runner: Runner) -> int:
    """How many steps make a sample that is long enough. What is compiled at the first step is by then."""
    runner(1, False)
    repeats = 1
    while (seconds := runner(repeats, False) * repeats) < SHORTEST:
        repeats = max(2 * repeats, min(int(SHORTEST / seconds), 16 * repeats))
    return repeats


def expected(workload: Workload, effort: Effort) -> float:
    """About how many seconds a workload will take: preparations, rounds, and slow competitors."""
    known = {"cold": 30, "warm": 35, "warmup, empty cache": 45, "warmup, full cache": 50}
    if workload.kind == "start":
        return known[workload.what]
    rounds = min(effort.seconds, 0.1 * effort.most) if workload.bytes < WARM else effort.seconds
    tables = 3.0 if workload.rows else 0.0  # which are larger than what is moved
    return tables + rounds + 1.5 + 0.02 * len(workload.shapes) ** 0.9 + workload.bytes / 100e6
