"""The threads that share a kernel's chunks.

Numba's own parallel backends are never entered. Its `workqueue` layer ends the process when two Python
threads enter it at once, and GNU OpenMP ends a forked child at its first parallel kernel. Here ordinary
Python threads call the same serial kernel, which lets go of the GIL and claims chunks until none is
left. The caller works too, and waits for nobody who has not begun, so a busy machine delays nothing. A
helper is at work after 20-50 us, where Numba's own backends take 2; work is shared from a size at which
that no longer shows.
"""

from __future__ import annotations

import collections
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba.np.ufunc import parallel

CHUNK = 16384  # elements: 64 KiB of each float32 array, so a chunk's arrays fit in a core's L2 cache

# Sharing pays from about 250,000 float32 elements (measured with NAG and FTML: 120,000 is a draw).
SHARED = 200_000

_idle: collections.deque[_Helper] = collections.deque()  # append and pop are atomic
_started = 0
_starting = threading.Lock()


class _Helper(threading.Thread):
    """A thread that sleeps until it is handed a job."""

    def __init__(self) -> None:
        super().__init__(name="numba_opt", daemon=True)
        self.job: Callable[[], Any] | None = None
        self.wake = threading.Lock()
        self.wake.acquire()
        self.start()

    def run(self) -> None:
        while True:
            self.wake.acquire()
            if self.job is not None:
                self.job()
            self.job = None  # it holds the arrays behind the addresses
            _idle.append(self)


def count() -> int:
    """How many threads may work on one kernel: Numba's number, `NUMBA_NUM_THREADS` included."""
    # get_num_threads starts Numba's threading layer, which must not happen because of us
    return numba.get_num_threads() if parallel._is_initialized else numba.config.NUMBA_NUM_THREADS


def run(kernel: Callable[..., Any], args: tuple[Any, ...], elements: int) -> None:
    """Call ``kernel(*args, progress)`` until all elements are done, on other threads too if it pays."""
    progress = np.zeros(2, np.int64)  # chunks claimed, chunks done
    chunks = -(-elements // CHUNK)
    if elements >= SHARED:
        for helper in _helpers(min(count(), chunks) - 1):
            helper.job = lambda: kernel(*args, progress)
            helper.wake.release()
    kernel(*args, progress)
    while progress[1] < chunks:  # a helper is still inside its last chunk
        time.sleep(0)


def _helpers(wanted: int) -> list[_Helper]:
    """Up to `wanted` idle helpers; new ones are started while there are fewer than that in all."""
    global _started
    found: list[_Helper] = []
    while len(found) < wanted:
        try:
            found.append(_idle.pop())
        except IndexError:
            with _starting:
                if _started >= wanted:
                    break
                _started += 1
            found.append(_Helper())
    return found


def _forget() -> None:
    """In a forked child no helper is alive."""
    global _started, _starting
    _idle.clear()
    _started = 0
    _starting = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
