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
import contextlib
import ctypes
import functools
import os
import queue
import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import types
from numba.np.ufunc import parallel

from ..compiler import cache
from ..compiler.elements import fetch_add

CHUNK = 16384  # elements: 64 KiB of each float32 array, so a chunk's arrays fit in a core's L2 cache

# Sharing pays from about 250,000 float32 elements (measured with NAG and FTML: 120,000 is a draw).
SHARED = 200_000


NO_SCRATCH = np.empty((1 << 30, 0), np.uint8)  # for any number of threads


class Job(NamedTuple):
    """A call of a kernel over a long line of elements.

    The kernel is a compiled function with an `entry_point`, what Numba's dispatcher would find out at each
    call and call itself. The dispatcher also calls functions that profile or trace, which are Python and may
    raise between two kernels.
    """

    kernel: Any
    args: tuple[Any, ...]  # but for scratch and progress
    elements: int
    longest: int = 1  # elements that one thread takes as a whole, such as a row
    scratch: int = 0  # bytes that each thread needs for itself
    kept: Any = None  # what the kernel has an address of and nobody else holds


_jobs: queue.SimpleQueue[list[partial[Any]]] = queue.SimpleQueue()
_helpers: list[threading.Thread] = []
# A signal's handler, which may make a step, may come while this is held.
_starting = threading.RLock()


def count() -> int:
    """Return the number of threads that may work on one kernel: Numba's, `NUMBA_NUM_THREADS` included."""
    # get_num_threads starts Numba's threading layer, which must not happen because of us
    return numba.get_num_threads() if parallel._is_initialized else numba.config.NUMBA_NUM_THREADS


def run(jobs: Iterable[Job], afterwards: Iterable[partial[Any]] = ()) -> None:
    """Call each job's ``kernel(*args, scratch, progress)``, on other threads too if it pays; then the rest.

    Python handles signals between bytecodes, and from the first kernel to the last call afterwards there
    are none here, as long as what is called is not written in Python. So Ctrl-C comes before or after.
    All memory that is needed has been had before, and lives until the end.
    """
    steps: list[partial[Any]] = []
    for kernel, args, elements, longest, size, _ in jobs:
        if not elements:
            continue
        helpers = 0
        if elements >= SHARED:
            chunks = -(-elements // CHUNK)
            helpers = _ready(min(count(), chunks, -(-elements // longest)) - 1)
        if helpers:
            _keep_off_this_processor()
        own = scratch(1 + helpers, size) if size else NO_SCRATCH
        progress = np.zeros(3, np.int64)  # threads that joined, chunks claimed, chunks done
        call = partial(kernel.entry_point, *args, own, progress)
        if helpers:
            offer = [call]  # empty once the work is done: helpers that come later keep no memory alive
            steps += [partial(_jobs.put, offer)] * helpers
            steps += [call, partial(compiled_finished(), progress, chunks), partial(offer.clear)]
        else:
            steps.append(call)
    steps += afterwards
    collections.deque(map(partial.__call__, steps), maxlen=0)


def scratch(places: int, size: int) -> np.ndarray:
    """Return so many bytes, not set to anything, for each of the threads that may join in."""
    return np.empty((places, size), np.uint8)


def finished(progress, chunks):
    """Wait until helpers are through with the chunks that they have begun."""
    while fetch_add(progress, 2, 0) < chunks:
        pass


finished = cache.compiled(finished, cache.fingerprint(finished))


@functools.cache
def compiled_finished() -> Any:
    """`finished`, compiled: at its first call Numba would run Python, after kernels have written."""
    waiting: Any = finished
    return waiting.compile((types.int64[::1], types.int64))


def _ready(wanted: int) -> int:
    """Have `wanted` helpers, or as many as can be had; they sleep until there is a job.

    One that has died, of an exception that somebody raised in it, is replaced. Where the system gives no
    more threads, there are fewer helpers, or none.
    """
    if len(_helpers) < wanted or not all(map(threading.Thread.is_alive, _helpers)):
        with _starting:
            _helpers[:] = filter(threading.Thread.is_alive, _helpers)
            try:
                while len(_helpers) < wanted:
                    helper = threading.Thread(target=_help, args=(_jobs,), name="numba_opt", daemon=True)
                    helper.start()
                    _helpers.append(helper)
            except (RuntimeError, MemoryError):
                pass  # "can't start new thread"
    return max(min(wanted, len(_helpers)), 0)


def _keep_off_this_processor() -> None:
    """Let helpers run on the other processors that the calling thread may use, if there are any.

    The system wakes a helper where its waker is, and often leaves it there: the two of them take turns then.
    (Seen on two processors: 10 million elements in 4.4 ms alone, and in 5 to 8 ms with a helper that used the
    caller's processor; kept off it, always less than alone.)
    """
    global _kept_off
    if _current_processor is None:
        return
    here = _current_processor(), os.sched_getaffinity(0), len(_helpers)
    if here == _kept_off:
        return
    processor, allowed, _ = here
    if others := allowed - {processor}:
        for helper in filter(None, [helper.native_id for helper in _helpers]):
            with contextlib.suppress(OSError):  # it has just died, or a container says no
                os.sched_setaffinity(helper, others)
    _kept_off = here


def _processor_teller() -> Callable[[], int] | None:
    """Return the C library's function that tells the caller's processor; None if there is none."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    try:
        return ctypes.CDLL(None).sched_getcpu
    except (OSError, AttributeError):
        return None


_current_processor = _processor_teller()
# The caller's processor, those it may use, and the number of helpers, as of the last time.
_kept_off: tuple[int, set[int], int] | None = None


def _help(jobs: queue.SimpleQueue[list[partial[Any]]]) -> None:
    while True:
        collections.deque(map(partial.__call__, jobs.get()), maxlen=0)  # in no variable, while it waits


def _forget() -> None:
    """Forget all helpers: in a forked child none is alive."""
    global _jobs, _helpers, _starting, _kept_off
    _jobs = queue.SimpleQueue()
    _helpers = []
    _starting = threading.RLock()
    _kept_off = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
