"""Signals whose handlers wait while something must not be cut in half."""

from __future__ import annotations

import signal
import threading
from _thread import get_ident
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

# Python's own functions, without the enumerations that `signal` wraps around them: 0.05 us in place of 1 us.
try:
    from _signal import getsignal  # type: ignore[import-not-found]
    from _signal import signal as set_handler
except ImportError:
    from signal import getsignal
    from signal import signal as set_handler

NUMBERS = tuple(map(int, signal.valid_signals()))


@contextmanager
def defer_signals() -> Iterator[None]:
    """Let signals that Python handles wait until the end of this context.

    Steps need no such thing, as no Python runs between their first write and their last one
    (`numba_opt.cpu.threads.run`). The compiler does, which would lose an exception that a handler raises
    while LLVM calls Python, and so does what launches several kernels on a GPU.
    """
    if get_ident() != threading.main_thread().ident:
        yield  # signals are handled in the main thread
        return
    came: list[int] = []
    handlers = [(number, handler) for number in NUMBERS if callable(handler := getsignal(number))]
    try:
        for number, _ in handlers:
            set_handler(number, lambda number, frame: came.append(number))
        yield
    finally:
        _every([partial(set_handler, *pair) for pair in handlers])
        if came:
            _every([partial(signal.raise_signal, number) for number in dict.fromkeys(came)])


def _every(calls: Sequence[partial[Any]]) -> None:
    """Make all of some calls, even if a handler comes meanwhile and raises."""
    if calls:
        try:
            calls[0]()
        finally:
            _every(calls[1:])
