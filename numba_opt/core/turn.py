"""One caller at a time, for objects that work on tables which a second caller would pull away."""

from __future__ import annotations

import os
import time
import weakref
from _thread import get_ident
from typing import Any

PAUSE = 0.0005  # seconds between two looks of a thread that waits


class Claim(list[Any]):  # of tuples there are no weak references
    """The right to use an object, for as long as somebody holds this: its thread and its process."""


class Turn:
    """The turns of an object's callers: one of them may use it, until its claim is gone.

    Another thread waits. The same thread, which can come again only from a signal's handler or from code that
    a call runs, gets a RuntimeError. So that nothing that a handler or a profiler raises can leave the object
    locked, there is no lock, and nothing to call at the end: a claim is given back when nobody holds it, at
    the latest by ``finally: del claim``, which nothing can come before.
    """

    def __init__(self) -> None:
        # The last claim of a line of them; each one has the next one behind it.
        self._last: dict[str, Any] = {"claim": _nobody}

    def claim(self, what: str, again: bool = False) -> Claim:
        """The right to use the object, which errors call `what`; `again` if its thread may have it already.

        Raises
        ------
        RuntimeError
            A call is under way in this thread.
        """
        mine = Claim((get_ident(), _process))
        owner: Any = None
        try:
            place = {"claim": weakref.ref(mine)}
            while True:
                last = self._last
                if "next" in last:
                    self._last = last["next"]
                    continue
                owner = last["claim"]()
                if owner is None or owner[1] is not _process:  # threads do not live on in a forked child
                    if last.setdefault("next", place) is place:  # the first to come has it
                        self._last = place
                        return mine
                    continue
                if owner[0] == mine[0]:
                    if again:
                        return owner
                    raise RuntimeError(f"{what} is in use already: a call of it is under way in this thread")
                owner = None
                time.sleep(PAUSE)
        except BaseException:
            del mine, owner  # which the traceback would hold, for as long as somebody keeps the error
            raise

    def __reduce__(self) -> tuple[Any, ...]:
        return Turn, ()


def _nobody() -> None:
    """Return None, the claim before the first one."""


_process = object()  # this one, which a forked child is not


def _forked() -> None:
    global _process
    _process = object()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
