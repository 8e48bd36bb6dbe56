"""How kernels are compiled, where compiled ones are kept, and what makes a kept one still the right one.

Numba's own disk cache keys a kernel by pickling what it captured, which neither sees edits in other
files nor stays the same from one process to the next once a captured function mentions an intrinsic.
Here the key is made of sources: the rule with all it calls, the loops' files, the options, and the
versions and processor that turned them into machine code. A kernel has one signature, so an entry is one
file, written whole or not at all; a bad one counts as absent, and so does one that somebody else may have
written. A cache that fails costs time, never more.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import pickle
import platform
from collections.abc import Callable
from os.path import expanduser, isabs
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy
from numba import njit
from numba.core import bytecode, caching, serialize
from numba.core.runtime import rtsys
from numba.misc.appdirs import AppDirs

from . import interrupts, private, require_compiler
from .fingerprint import INCOMPLETE
from .fingerprint import fingerprint as fingerprint

# No fastmath anywhere: it breaks NaN. The "numpy" error model lets loops with divisions vectorise
# (0.13 ms against 1.92 ms for the same loop with Python's), and nogil lets threads share the work.
OPTIONS: dict[str, Any] = {"error_model": "numpy", "nogil": True}

# What changes the machine code of the same source: Numba's settings.
SETTINGS = ("OPT", "BOUNDSCHECK", "LOOP_VECTORIZE", "SLP_VECTORIZE", "DEBUGINFO_DEFAULT")


def compiled(function: Callable[..., Any], *key: Any, name: str = "", **options: Any) -> Any:
    """`function` as a Numba kernel that is looked up on disk before it is compiled.

    `key` must tell apart all that the function may have captured; see `fingerprint` for rules. `name` is for
    people who look into the cache's folder.
    """
    require_compiler(RuntimeError)
    options = OPTIONS | options
    dispatcher = njit(**options)(function)
    dispatcher._cache = KernelCache(name or function.__name__, (key, sorted(options.items())))
    plain = dispatcher.compile

    def compile(sig: Any) -> Any:
        require_compiler(RuntimeError)  # it may have been switched off since
        with interrupts.defer_signals():
            return plain(sig)

    dispatcher.compile = compile
    return dispatcher


def folder() -> Path:
    """Return the folder of compiled kernels: in `NUMBA_CACHE_DIR` if set, or the user's cache directory."""
    if numba.config.CACHE_DIR:
        return Path(numba.config.CACHE_DIR) / "numba_opt"
    # XDG_CACHE_HOME may be empty or relative, and is to be ignored then; there may be no home at all
    for place in (AppDirs("numba_opt", appauthor=False).user_cache_dir, expanduser("~/.cache/numba_opt")):
        if isabs(place):
            return Path(place)
    return Path(os.devnull, "numba_opt")  # nothing can be kept there


class KernelCache(caching.NullCache):
    """One kernel's place on disk, in the form that Numba's dispatcher asks for."""

    def __init__(self, name: str, key: Any) -> None:
        self.name = "".join(c for c in name if c.isalnum() or c in "-_")  # that of a lambda is no file's
        self.key = key

    @property
    def cache_path(self) -> str:
        return str(folder())

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled kernel, or None if there is none that is whole."""
        try:
            path = self._path(sig, target_context.codegen())
            self._count_from(path)
            content = read(path)
            if content is None:
                return None
            externals, payload = pickle.loads(content)
            rtsys.initialize(target_context)
            if not all(map(llvmlite.binding.address_of_symbol, externals)):
                target_context.refresh()  # 0.3 s, of which most kernels need nothing
            return caching.CompileResultCacheImpl.rebuild(None, target_context, payload)
        except Exception:  # whatever is wrong with an entry, compiling again is the cure
            return None

    @staticmethod
    def _count_from(path: Path) -> None:
        """Let Numba number the functions that it is about to compile from a place of this kernel's own.

        It names a function by its qualified name, a number, and its arguments' types. The numbers count from
        1 in each process, so kernels compiled in different ones, which are alike in all else, would have the
        same names and, once loaded together, each other's code. (Seen: wrong results, and a crash.)
        """
        start = int.from_bytes(_digest(path.name.encode())[:6], "little") << 20
        bytecode.FunctionIdentity._unique_ids = itertools.count(start)

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep a compiled kernel, if there is a place for it."""
        try:
            path = self._path(sig, data.codegen)
            payload = caching.CompileResultCacheImpl.reduce(None, data)
            write(path, serialize.dumps((_externals(data.library), payload)))
        except Exception:  # a full disk, a read-only home
            return

    def _path(self, sig: Any, codegen: Any) -> Path:
        machine = (str(sig), codegen.magic_tuple(), platform.python_version(), platform.machine())
        versions = (numba.__version__, llvmlite.__version__, numpy.__version__)
        settings = [str(getattr(numba.config, name, None)) for name in SETTINGS]
        return place(self.name, (self.key, machine, versions, settings))


def place(name: str, key: Any) -> Path:
    """Return the path of something compiled; its key, written out, must tell it from everything else."""
    text = repr(key)
    home = Path(os.devnull) if INCOMPLETE in text else folder()  # no key, no place
    return home / f"{name}-{_digest(text.encode()).hex()}.nbc"


def read(path: Path) -> bytes | None:
    """Read what was kept at a path; None if there is nothing, not all of it, or perhaps somebody else's."""
    try:
        content = private.read(path)
    except OSError:
        return None
    return content[32:] if content[:32] == _digest(content[32:]) else None


def write(path: Path, content: bytes) -> None:
    """Keep something, which appears whole or not at all."""
    private.write(path, _digest(content) + content)


def _externals(library: Any) -> list[str]:
    """Return the names that a kernel's machine code looks up elsewhere in the process."""
    module = library._final_module
    names = [value.name for value in (*module.functions, *module.global_variables) if value.is_declaration]
    return [name for name in names if not name.startswith("llvm.")]


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=32).digest()
