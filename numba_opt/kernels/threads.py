"""The threads that share a kernel's chunks, and a step that no signal can cut in half.

Numba's own parallel backends are never entered. Its `workqueue` layer ends the process when two Python
threads enter it at once, and GNU OpenMP ends a forked child at its first parallel kernel. Here ordinary
Python threads call the same serial kernel, which lets go of the GIL and claims chunks until none is
left. The caller works too, and waits only for chunks that somebody has begun, so a busy machine delays
nothing. A helper is at work after 20-50 us, where Numba's own backends take 2; work is shared from a size
at which that no longer shows.
"""

from __future__ import annotations

import collections
import functools
import os
import queue
import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numba
import numpy as np
from numba import types
from numba.np.ufunc import parallel

from . import cache
from .elements import fetch_add

CHUNK = 16384  # elements: 64 KiB of each float32 array, so a chunk's arrays fit in a core's L2 cache

# Sharing pays from about 250,000 float32 elements (measured with NAG and FTML: 120,000 is a draw).
SHARED = 200_000

Job = tuple[Callable[..., Any], tuple[Any, ...], int]  # kernel, arguments but for progress, elements

_jobs: queue.SimpleQueue[partial[Any]] = queue.SimpleQueue()
_helpers = 0
_starting = threading.Lock()


def count() -> int:
    """How many threads may work on one kernel: Numba's number, `NUMBA_NUM_THREADS` included."""
    # get_num_threads starts Numba's threading layer, which must not happen because of us
    return numba.get_num_threads() if parallel._is_initialized else numba.config.NUMBA_NUM_THREADS


def run(jobs: Iterable[Job], afterwards: Iterable[partial[Any]] = ()) -> None:
    """Call each job's ``kernel(*args, progress)``, on other threads too if it pays; then what comes after.

    Python handles signals between bytecodes, and from the first kernel to the last call afterwards there
    are none here, as long as what is called is not written in Python. So Ctrl-C comes before or after.
    """
    steps: list[partial[Any]] = []
    for kernel, args, elements in jobs:
        progress = np.zeros(2, np.int64)  # chunks claimed, chunks done
        call = partial(kernel, *args, progress)
        if elements < SHARED:
            steps.append(call)
            continue
        chunks = -(-elements // CHUNK)
        helpers = _ready(min(count(), chunks) - 1)
        steps += [partial(_jobs.put, call)] * helpers
        steps += [call, partial(_compiled(), progress, chunks)]
    steps += afterwards
    collections.deque(map(partial.__call__, steps), maxlen=0)


def finished(progress, chunks):  # type: ignore[no-untyped-def]
    """Wait until helpers are through with the chunks that they have begun."""
    while fetch_add(progress, 1, 0) < chunks:
        pass


finished = cache.compiled(finished, cache.fingerprint(finished))


@functools.cache
def _compiled() -> Any:
    """`finished`, compiled: at its first call Numba would run Python, after kernels have written."""
    waiting: Any = finished
    waiting.compile((types.int64[::1], types.int64))
    return waiting


def _ready(wanted: int) -> int:
    """Have `wanted` helpers; they sleep until there is a job."""
    global _helpers
    if _helpers < wanted:
        with _starting:
            while _helpers < wanted:
                threading.Thread(target=_help, args=(_jobs,), name="numba_opt", daemon=True).start()
                _helpers += 1
    return max(wanted, 0)


def _help(jobs: queue.SimpleQueue[partial[Any]]) -> None:
    while True:
        jobs.get()()


def _forget() -> None:
    """In a forked child no helper is alive."""
    global _jobs, _helpers, _starting
    _jobs = queue.SimpleQueue()
    _helpers = 0
    _starting = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
