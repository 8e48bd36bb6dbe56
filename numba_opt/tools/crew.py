"""Kernels made by this process and by others, which are told what to compile and keep it in the cache on
disk.

Numba compiles one kernel at a time in a process. Rules that are not this package's own are left to this
process, as their modules may not bear being imported once more.
"""

from __future__ import annotations

import base64
import collections
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
from numba.core import event

from ..compiler import cache, interrupts
from ..core import rules
from ..core.foreign import loaded
from ..core.rules import Rule
from ..cpu import loops, measures, merge, ndarray, row_loops, threads
from ..cuda import arrays as cuda_arrays

CREW = 8  # processes at most, this one included; each takes some 200 MB
PACKAGE = __name__.partition(".")[0]
SHARE = 4  # kernels that are worth another process, which needs a second to start


class KernelRequest(NamedTuple):
    """A call that compiles a kernel or loads it from the cache: a name among `MAKERS`, and its arguments."""

    maker: str
    args: tuple[Any, ...]

    @property
    def rule(self) -> Rule | None:
        """The rule that it is a kernel of, if there is one."""
        return next((part for part in self.args if isinstance(part, Rule)), None)

    def make(self) -> bool:
        """Make the kernel; tell whether it had to be compiled."""
        before = _compiled()
        with (
            interrupts.defer_signals()
        ):  # an interrupted compiler and a half-written file are nobody's friends
            try:
                MAKERS[self.maker](*self.args)
            except Exception as error:
                if self.rule is not None:
                    rules.explain(error, self.rule.function)
                raise
        return _compiled() > before

    def sent(self) -> str | None:
        """Return the text that tells another process of it; None if that cannot make this kernel."""
        if self.rule is not None:
            function: Any = self.rule.function
            own = function.__module__.partition(".")[0] == PACKAGE
            if (
                not own
                or getattr(sys.modules.get(function.__module__), function.__qualname__, None) is not function
            ):
                return None
        return base64.b64encode(pickle.dumps(self)).decode()

    @classmethod
    def received(cls, line: str) -> KernelRequest:
        """Return the kernel that another process tells of."""
        request: KernelRequest = pickle.loads(base64.b64decode(line))
        return request


def _read_arrays() -> None:
    weight = np.zeros((2, 2), np.float32)
    ndarray.readable()
    found = ndarray.read([[weight + 1], [weight], [None]], 0, False)
    if found is not None:
        ndarray.overlapping(found)


def _share_work() -> None:
    threads.compiled_finished()


def _merge_rows() -> None:
    rows = np.zeros(2, np.int64)
    merge.look(rows, 1)
    merge.group(rows, 1)
    merge.group(rows, 100)


def _merge_csr(size: int) -> None:
    merge.rows_of_csr(np.array([0, 1], f"i{size}"), 1, 1)


def _cuda(capability: str, name: str, *args: Any) -> None:
    """A kernel of a GPU, for a compute capability."""
    from ..cuda import code as cuda_code

    major, minor = map(int, capability.split("."))
    cuda_code.compiled(getattr(cuda_arrays.loops(), name)(*args), (major, minor))


MAKERS: dict[str, Callable[..., Any]] = {
    "read arrays": _read_arrays,
    "share work": _share_work,
    "merge rows": _merge_rows,
    "merge csr": _merge_csr,
    "columns": measures.columns,
    "squares": measures.squares,
    "dense": loops.dense,
    "rows": row_loops.rows,
    "cuda": _cuda,
}


class _Misses(event.Listener):
    """Counts this package's kernels that this thread had to compile."""

    def __init__(self) -> None:
        self._local = threading.local()

    @property
    def total(self) -> int:
        return getattr(self._local, "total", 0)

    def on_start(self, compilation: Any) -> None:
        if isinstance(getattr(compilation.data["dispatcher"], "_cache", None), cache.KernelCache):
            self._local.total = self.total + 1

    def on_end(self, compilation: Any) -> None:
        pass


_misses = _Misses()


def _compiled() -> int:
    """Return how many kernels this thread had to compile so far."""
    how_many = loaded("numba_opt.cuda.code", "how_many")
    return _misses.total + (how_many() if how_many else 0)


class Work:
    """Kernels to be made by this thread and, from the first one that is missing, by other processes too."""

    def __init__(self, kernels: Sequence[KernelRequest], advance: Callable[[], object], helped: bool) -> None:
        self.own = collections.deque(kernel for kernel in kernels if kernel.sent() is None)
        self.shared = collections.deque(kernel for kernel in kernels if kernel.sent() is not None)
        self.elsewhere: collections.deque[tuple[KernelRequest, bool]] = collections.deque()
        self.advance = advance
        self.crew: list[threading.Thread] | None = None if helped else []

    def run(self) -> int:
        """Make all kernels; return how many had to be compiled."""
        event.register("numba:compile", _misses)
        try:
            compiled = self._make_all()
            self._await_crew()
            compiled += self._make_all()  # what others could not do after all
        except BaseException:
            self.shared.clear()
            self._await_crew()  # nobody is cut off in the middle of a kernel
            raise
        finally:
            event.unregister("numba:compile", _misses)
        return compiled + sum(kernel.make() or was_missing for kernel, was_missing in self.elsewhere)

    def _make_all(self) -> int:
        compiled = 0
        while self.own or self.shared:
            try:
                kernel = (self.own or self.shared).popleft()
            except IndexError:  # somebody else was quicker
                break
            missing = kernel.make()
            compiled += missing
            if missing and self.crew is None:
                self._hire()
            self.advance()
        return compiled

    def _hire(self) -> None:
        """Start as many processes as are worth their start."""
        size = min(cores(), CREW, 1 + len(self.shared) // SHARE) - 1
        if getattr(sys, "frozen", False) or not sys.executable:  # that would be the program, not Python
            size = 0
        self.crew = [threading.Thread(target=self._delegate, daemon=True) for _ in range(size)]
        for thread in self.crew:
            thread.start()

    def _await_crew(self) -> None:
        for thread in self.crew or ():
            thread.join()

    def _delegate(self) -> None:
        """Have another process make kernels, one after the other, as long as there are some."""
        script = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve()"
        kernel = None
        try:
            with subprocess.Popen(
                [sys.executable, "-c", script],
                env={**os.environ, "NUMBA_CACHE_DIR": numba.config.CACHE_DIR},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,  # Ctrl-C is for us; it ends when we close its input
            ) as process:
                assert process.stdin
                assert process.stdout
                while self.shared:
                    kernel = self.shared.pop()
                    print(kernel.sent(), file=process.stdin, flush=True)
                    self.elsewhere.append((kernel, json.loads(process.stdout.readline())))
                    kernel = None
                    self.advance()
        except (OSError, ValueError, IndexError):  # it died, or there was none left
            if kernel is not None:
                self.own.append(kernel)


def serve() -> None:
    """Make, as the other process, the kernels it is told of; answer whether each one was missing."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    event.register("numba:compile", _misses)
    for line in sys.stdin:
        print(json.dumps(KernelRequest.received(line).make()), file=answers, flush=True)


def cores() -> int:
    """Return the number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
