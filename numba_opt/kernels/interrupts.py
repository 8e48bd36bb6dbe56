"""Ctrl-C held back while something must not be cut in half."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def held_back() -> Iterator[None]:
    """Within this context an interrupt waits until the end.

    It costs some 7 us, so plain steps have a cheaper way (`numba_opt.kernels.threads.run`); what runs Python
    code between the first write and the last one uses this, and the compiler, which would lose an interrupt
    that comes while LLVM calls Python.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield  # signals are not handled here, or not by Python
        return
    came: list[Any] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(*came[0])
