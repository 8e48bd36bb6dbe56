"""Streams' queues: who comes next is a matter of chance, except where one stream waits for another.

What streams are given is done when somebody waits for it, or before, by chance. So a wait that is missing
shows sooner or later, by a seed that makes it show again. There is no stream that waits for others of itself.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .faults import KernelError


class Operation:
    """Something that a stream has been given to do."""

    def __init__(self, act: Callable[[], None] | None, needs: Operation | None = None) -> None:
        self.act, self.needs, self.done = act, needs, False


class Event:
    """What marks a place in a stream's queue."""

    def __init__(self) -> None:
        self.mark: Operation | None = None


class Graph:
    """What a stream was given while it was captured."""

    def __init__(self, queues: Queues, number: int) -> None:
        self._queues, self._number = queues, number
        self.acts: list[Callable[[], None]] = []
        self.names: list[str] = []

    def launch(self, stream: int) -> None:
        """Give it all to a stream."""
        for act in self.acts:
            self._queues._give(self._number, stream, act)
        self._queues.launches += self.names


class Queues:
    """What all streams of some devices have been given and have yet to do."""

    def __init__(self, devices: int, seed: int) -> None:
        self.launches: list[str] = []  # names of kernels, and "copy", in the order of the host's calls
        self.random = np.random.default_rng(seed)
        self.failed: BaseException | None = None
        self._queues: dict[tuple[int, int], deque[Operation]] = {(n, 0): deque() for n in range(devices)}
        self._captures: dict[tuple[int, int], Graph] = {}
        self._later: list[Callable[[], object]] = []
        self._next_stream = 0x1000
        self._lock = threading.RLock()
        self._busy = False

    def stream(self, number: int = 0, handle: int | None = None) -> int:
        """A new stream of a device."""
        self._next_stream += 0x10
        handle = self._next_stream if handle is None else handle
        self._queues[number, handle] = deque()
        return handle

    def later(self, act: Callable[[], object]) -> None:
        """Have something done once nothing is left that devices are to do; this may be called at any time."""
        self._later.append(act)

    def finish(self, number: int | None = None, stream: int | None = None) -> None:
        """Do what a stream, a device's streams, or all of them have been given."""
        queues = [
            queue
            for (owner, handle), queue in self._queues.items()
            if number in (None, owner) and stream in (None, handle)
        ]
        self._until(lambda: not any(queues))
        self._release()

    def capture(self, stream: int, number: int = 0) -> contextlib.AbstractContextManager[Graph]:
        """While this lasts, what a stream is given goes into a graph."""

        @contextlib.contextmanager
        def capturing() -> Iterator[Graph]:
            graph = self._captures[number, stream] = Graph(self, number)
            try:
                yield graph
            finally:
                del self._captures[number, stream]

        return capturing()

    def forgive(self) -> None:
        """Forget what went wrong, and what was still to be done."""
        self.failed = None
        for queue in self._queues.values():
            queue.clear()

    def _give(self, number: int, stream: int, act: Any, needs: Operation | None = None) -> Operation:
        """Put something into a stream's queue. By chance, some of what waits is done at once."""
        if self.failed is not None:
            raise self.failed
        operation = Operation(act, needs)
        self._queues[number, stream].append(operation)
        if self.random.random() < 0.25:
            self._until(lambda: self.random.random() < 0.5)
        return operation

    def _until(self, enough: Callable[[], bool]) -> None:
        """Do what is to be done next, of any stream, until it is enough or nothing is left."""
        with self._lock:
            if self.failed is not None:
                raise self.failed
            if self._busy:  # somebody is freed while a kernel runs
                return
            self._busy = True
            try:
                while not enough():
                    heads = [queue for queue in self._queues.values() if queue and _may_begin(queue[0])]
                    if not heads:
                        if any(self._queues.values()):
                            raise KernelError("streams wait for what will not happen")
                        return
                    operation = heads[int(self.random.integers(len(heads)))].popleft()
                    operation.done = True
                    if operation.act is not None:
                        operation.act()
            except BaseException as error:
                self.failed = error
                raise
            finally:
                self._busy = False

    def _release(self) -> None:
        """Free what has been dropped, if nothing can use it any more."""
        with self._lock:
            if not (self._busy or any(self._queues.values())):
                acts, self._later = self._later, []
                for act in acts:
                    act()


def _may_begin(operation: Operation) -> bool:
    return operation.needs is None or operation.needs.done
