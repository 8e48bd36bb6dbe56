"""Compiled kernels, kept from test to test and from run to run, by several processes at once.

Compiling one takes some half a second. They are in a folder of the suite's own (that of pytest's cache),
under the same keys as the package's own cache has, and taken apart already.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import secrets
import shutil
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from .translating import Program

FOLDER = Path(__file__).parents[2] / ".pytest_cache" / "d" / "ptx"
KEPT = 4  # states of the sources whose kernels are kept
THIS_PROCESS = secrets.token_hex(8)  # alone uses kernels whose rules reach what no fingerprint tells


def program(kernel: Any, capability: tuple[int, int] = (9, 0)) -> Program:
    """A kernel of `numba_opt.kernels.cuda` that can be run."""
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
    return " ".join(getattr(part, "__name__", None) or str(part) for part in kernel.key)


def text(kernel: Any, capability: tuple[int, int] = (9, 0)) -> str:
    """A kernel's PTX."""
    from numba_opt.kernels import cuda_code

    path = _path(kernel, capability)
    if not path.exists():
        with _alone(path):
            if not path.exists():
                _write(path, cuda_code.ptx(kernel, capability).encode())
    return path.read_text()


def _from_disk(kernel: Any, capability: tuple[int, int]) -> Program:
    path = _path(kernel, capability).with_suffix(f".{_own_sources()}.pickle")
    with contextlib.suppress(OSError, EOFError, pickle.UnpicklingError):
        return pickle.loads(path.read_bytes())
    found = Program(text(kernel, capability))
    _write(path, pickle.dumps(found))
    return found


def _path(kernel: Any, capability: tuple[int, int]) -> Path:
    from numba_opt.kernels.fingerprint import UNTOLD, fingerprint

    key = repr(([fingerprint(part) if callable(part) else part for part in kernel.key], capability))
    name = _digest((key + THIS_PROCESS * (UNTOLD in key)).encode())
    return _folder() / f"{kernel.key[0]}-{capability[0]}{capability[1]}-{name}.ptx"


@cache
def _folder() -> Path:
    """Where kernels of the package's sources as they are go; those of the oldest states are thrown away."""
    from numba_opt.kernels import cuda_code
    from numba_opt.kernels.fingerprint import SOURCES

    folder = FOLDER / _digest(SOURCES + repr((cuda_code._versions(), sys.version)).encode())
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
