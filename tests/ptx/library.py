"""Compiled kernels, kept from test to test and from run to run, by several processes at once.

Compiling one takes some half a second. They are in a folder of the suite's own (that of pytest's cache),
and taken apart already; a kernel's key is what a GPU's kernels are made of, and what its rule reaches.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import secrets
import shutil
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from numba_opt.core.rules import Rule
from perf import ptx

from .translating import Program

FOLDER = Path(__file__).parents[2] / ".pytest_cache" / "d" / "ptx"
KEPT = 4  # states of the sources whose kernels are kept
# What is compiled for a GPU has nothing of these; an edit of them compiles none of it anew.
HOST = (
    *("arrays", "call", "deferred", "device_steps", "driver"),
    *("executor", "memory", "sums", "tables", "touched"),
)
FOR_THE_HOST = {
    *("cpu", "torch"),
    *(f"compiler/{name}.py" for name in ("cache", "fingerprint", "interrupts", "private", "sources")),
    *(f"cuda/{name}.py" for name in HOST),
}
THIS_PROCESS = secrets.token_hex(8)  # alone uses kernels whose rules reach what no fingerprint tells


def program(kernel: Any, capability: tuple[int, int] = (9, 0)) -> Program:
    """A kernel of `numba_opt.cuda.kernels` that can be run."""
    return _program(kernel.key, capability, kernel)


_programs: dict[Any, Program] = {}


def _program(key: Any, capability: tuple[int, int], kernel: Any) -> Program:
    found = _programs.get((key, capability))
    if found is None:
        found = _programs[key, capability] = _from_disk(kernel, capability)
        found.title, found.key, found.capability = title(kernel), key, capability
    return found


def title(kernel: Any) -> str:
    """A kernel's name and what it is made for, in words."""
    return " ".join(part.function.__name__ if isinstance(part, Rule) else str(part) for part in kernel.key)


def text(kernel: Any, capability: tuple[int, int] = (9, 0)) -> str:
    """A kernel's PTX."""
    from numba_opt.cuda import code as cuda_code

    path = _path(kernel, capability)
    if not path.exists():
        with _alone(path):
            if not path.exists():
                _write(path, cuda_code.ptx(kernel, capability).encode())
    return path.read_text()


def counts(kernel: Any, capability: tuple[int, int] = (9, 0)) -> ptx.Counts:
    """What there is in a kernel's PTX, and what the assembler says of it."""
    path = _path(kernel, capability).with_suffix(f".{_assembler()}.json")
    with contextlib.suppress(OSError, ValueError):
        return ptx.Counts(*json.loads(path.read_text()))
    found = ptx.count(text(kernel, capability), f"sm_{capability[0]}{capability[1]}")
    _write(path, json.dumps(found).encode())
    return found


@cache
def _assembler() -> str:
    """What counts depend on beside a kernel's text."""
    tools = [Path(tool) for tool in map(ptx.tool, ("ptxas", "nvdisasm")) if tool]
    told = [(str(tool), tool.stat().st_size, tool.stat().st_mtime_ns) for tool in tools]
    return _digest(Path(ptx.__file__).read_bytes() + repr(told).encode())[:8]


def _from_disk(kernel: Any, capability: tuple[int, int]) -> Program:
    path = _path(kernel, capability).with_suffix(f".{_own_sources()}.pickle")
    with contextlib.suppress(OSError, EOFError, pickle.UnpicklingError):
        return pickle.loads(path.read_bytes())
    found = Program(text(kernel, capability))
    _write(path, pickle.dumps(found))
    return found


def _path(kernel: Any, capability: tuple[int, int]) -> Path:
    from numba_opt.compiler.fingerprint import look

    rules = [look(part.function) for part in kernel.key if isinstance(part, Rule)]
    others = [part[1:] if isinstance(part, Rule) else part for part in kernel.key]
    alone = "" if all(rule.complete for rule in rules) else THIS_PROCESS
    name = _digest(repr((others, [rule.digest for rule in rules], capability, alone)).encode())
    return _folder() / f"{kernel.key[0]}-{capability[0]}{capability[1]}-{name}.ptx"


@cache
def _folder() -> Path:
    """Where kernels of the package's sources as they are go; those of the oldest states are thrown away."""
    from numba_opt.compiler.sources import OWN_FILES, PACKAGE
    from numba_opt.cuda import code as cuda_code

    names = {path.relative_to(PACKAGE): path for path in OWN_FILES}
    paths = [path for name, path in names.items() if not {name.parts[0], name.as_posix()} & FOR_THE_HOST]
    sources = b"".join(path.read_bytes() for path in paths)
    folder = FOLDER / _digest(sources + repr((cuda_code._versions(), sys.version)).encode())
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):  # another process may do the same
        os.utime(folder)
        states = sorted(FOLDER.iterdir(), key=lambda path: path.stat().st_mtime)
        for old in states[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    return folder


@cache
def _own_sources() -> str:
    """What a kernel that was taken apart depends on beside its text."""
    files = (Path(__file__).parent / name for name in ("parsing.py", "translating.py"))
    return _digest(b"".join(path.read_bytes() for path in files))[:8]


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=12).hexdigest()


def _write(path: Path, content: bytes) -> None:
    """Keep something, which appears whole or not at all."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """While no other process makes the same."""
    try:
        import fcntl
    except ImportError:  # they may then make it twice
        yield
        return
    with open(path.with_suffix(".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
