"""How one sample is taken, in this process or in a worker's. Standard library only.

OpenMP keeps its threads spinning for a while after a parallel region, 200 ms in some builds. On a machine
with few cores they would be counted against whoever is timed next, so every sample waits for them first.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

PATIENCE, AWAKE = 1.0, 0.002  # seconds

Runner = Callable[[int, bool], float]  # (number of steps, warm) -> seconds a step


def settle() -> None:
    """Wait until no thread of this process is running."""
    end = time.perf_counter() + PATIENCE
    while time.perf_counter() < end:
        wall, used = time.perf_counter(), time.process_time()
        time.sleep(0.002)
        if time.process_time() - used < 0.1 * (time.perf_counter() - wall):
            return


def sample(call: Callable[[], object], kept: Any, repeats: int, warm: bool) -> float:
    """Seconds that a call takes, the mean of several in a row. `kept` is kept for as long as it may be made.

    Warm: the call is made for a moment before the clock starts, so that it finds its code and its data in
    the caches. Cold: the core is woken and nothing else, so that large arrays are found in memory, where
    the rest of a training loop would have pushed them.
    """
    settle()
    wake = time.perf_counter() + AWAKE
    while time.perf_counter() < wake:
        if warm:
            call()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    seconds = time.perf_counter() - start
    settle()  # nobody else shall wait for our threads
    return seconds / repeats


def runner(call: Callable[[], object], kept: Any = None) -> Runner:
    """What takes samples of a call."""
    return functools.partial(sample, call, kept)


def timed(call: Callable[[], object]) -> Runner:
    """What takes samples of a call that is made once: a process of its own, which may say how long it took.

    The call returns seconds, or something else if it does not know better than the clock.
    """

    def run(repeats: int, warm: bool) -> float:
        start = time.perf_counter()
        known = call()
        return known if isinstance(known, float) else time.perf_counter() - start

    return run
