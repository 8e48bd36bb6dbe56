"""One caller at a time: a lock that a second thread waits for and that refuses the same thread."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any


class Turn:
    """The right to use an object that works on tables which a second caller would pull away.

    ``with turn.taken("trainer"):`` lets another thread wait; the same thread, which can come again only from
    a signal's handler or from code that a step calls, gets a RuntimeError. Entering and leaving are C, so
    that no exception of a handler can come between.
    """

    def __init__(self) -> None:
        self._lock: Any = threading.RLock()
        _all.add(self)

    def taken(self, what: str, again: bool = False) -> Any:
        """The lock, to be entered by `with` at once; `again` if the same thread may have it twice."""
        if not again and self._lock._is_owned():
            raise RuntimeError(f"{what} is in use already: a call of it is under way in this thread")
        return self._lock

    def __reduce__(self) -> tuple[Any, ...]:
        return Turn, ()


_all: weakref.WeakSet[Turn] = weakref.WeakSet()


def _renew() -> None:
    """In a forked child the threads that held locks are gone."""
    for turn in list(_all):
        turn._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
