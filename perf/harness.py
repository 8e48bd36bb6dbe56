"""How competitors are timed: side by side, within the same minute, and judged in pairs.

A workload is measured in rounds. Each round times every competitor once, in an order that is shuffled anew,
so that a machine that slows down slows down all of them, and nobody always follows the same neighbour.
Ratios are taken within a round and the median of them is what counts.
"""

from __future__ import annotations

import gc
import itertools
import random
import time
from collections.abc import Sequence
from statistics import median, quantiles
from typing import Any, NamedTuple

from .competitors import BARE, Competitor, Runner
from .workloads import Workload

SHORTEST = 500e-6  # seconds of one sample; quicker steps are repeated, all others once
WARM = 4_000_000  # bytes; a step that moves less is timed with its data in the caches
WARM_UP = 1  # rounds that do not count


class Effort(NamedTuple):
    """Rounds go on for so many and so long, whichever is more, but not past the limits."""

    rounds: int
    seconds: float
    most_rounds: int
    most_seconds: float

    def spent(self, rounds: int, seconds: float) -> bool:
        """Whether that was enough."""
        if rounds < FEWEST:
            return False
        if rounds >= self.most_rounds or seconds >= self.most_seconds:
            return True
        return rounds >= self.rounds and seconds >= self.seconds


FEWEST = 5
QUICK, FULL = Effort(5, 1.0, 51, 5.0), Effort(25, 8.0, 301, 30.0)


class Result(NamedTuple):
    """The samples of one workload: seconds a step, by competitor, one a round."""

    workload: Workload
    samples: dict[str, list[float]]
    repeats: dict[str, int]

    def fastest(self, names: Sequence[str]) -> str | None:
        """Whichever of the named ones that took part has the smallest median."""
        took_part = [name for name in names if name in self.samples]
        return min(took_part, key=lambda name: median(self.samples[name]), default=None)

    def ratio(self, name: str, other: str) -> float:
        """How many times as fast as another one a competitor is: the median over rounds."""
        pairs = zip(self.samples[name], self.samples[other], strict=True)
        return median(theirs / ours for ours, theirs in pairs)

    def best(self, name: str, other: str) -> float:
        """The same from each one's fastest sample, which other work on the machine disturbs the least."""
        return min(self.samples[other]) / min(self.samples[name])

    def summary(self) -> dict[str, Any]:
        """Plain values for a file."""
        bare = self.fastest(BARE)
        rows = []
        for name, seconds in self.samples.items():
            low, middle, high = quantiles(seconds, n=4, method="inclusive")
            rows.append(
                {
                    "competitor": name,
                    "median_s": middle,
                    "min_s": min(seconds),
                    "p25_s": low,
                    "p75_s": high,
                    "gb_per_s": self.workload.bytes / middle / 1e9,
                    "of_bare": self.ratio(name, bare) if bare else None,
                    "steps_per_sample": self.repeats[name],
                }
            )
        return {
            "workload": self.workload.name,
            "tensors": len(self.workload.shapes),
            "elements": self.workload.elements,
            "bytes": self.workload.bytes,
            "bare": bare,
            "rounds": len(seconds),
            "rows": rows,
        }


def measure(workload: Workload, competitors: Sequence[Competitor], effort: Effort) -> Result:
    """Time all competitors that can perform a workload."""
    runners: dict[str, Runner] = {}
    for competitor in competitors:
        runner = competitor.prepare(workload)
        if runner is not None:
            runners[competitor.name] = runner
    repeats = {name: _repeats(runner) for name, runner in runners.items()}
    samples: dict[str, list[float]] = {name: [] for name in runners}
    warm = workload.bytes < WARM
    order, shuffle = list(runners), random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        for done in itertools.count(-WARM_UP):
            if done <= 0:
                start = time.perf_counter()
            elif effort.spent(done, time.perf_counter() - start):
                break
            shuffle(order)
            for name in order:
                seconds = runners[name](repeats[name], warm) / repeats[name]
                if done >= 0:
                    samples[name].append(seconds)
    finally:
        gc.enable()
    return Result(workload, samples, repeats)


def _repeats(runner: Runner) -> int:
    """How many steps make a sample that is long enough. What is compiled at the first step is by then."""
    runner(1, False)
    repeats = 1
    while runner(repeats, False) < SHORTEST:
        repeats *= 2
    return repeats
