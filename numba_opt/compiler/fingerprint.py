"""Fingerprints that tell a function, with all that it reaches, from any other that is compiled differently.

Compiled code has the values of globals, closures and helpers built in, so that whoever looks for a kept
kernel must know them all: a fingerprint follows the names that code mentions, through functions, modules and
jitted helpers, and takes in every piece with its kind and its length. What it cannot tell, such as an object
of a class that it does not know, makes a kernel that is not kept on disk. So does a helper that was compiled
before anybody looked at it, if it has globals: nobody knows what they were then.

In one process a function is what it was at the first look: Numba keeps what helpers were compiled with, and
half of the kernels could have the old values and half of them the new ones. So a change is an error.
"""

from __future__ import annotations

import builtins
import enum
import hashlib
import itertools
import struct
import types
import warnings
from collections.abc import Callable, Iterable, Sequence
from operator import is_
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numba.core import types as numba_types
from numba.core.caching import NullCache
from numba.core.typing.templates import builtin_registry
from numba.np.ufunc.dufunc import DUFunc

from .code_names import attribute_names, global_names
from .sources import OWN_FILES, PACKAGE, VERSIONED, is_of, is_own, known_name

# Part of the fingerprint of a function that reaches what cannot be told. It differs in each process.
INCOMPLETE = "untold"

LIMIT = 20_000  # values that are looked at; no rule reaches as many
DEPTH = 60  # of calls within calls, and tuples within tuples

# What `register_jitable` and `overload` say of a function of which nothing in particular is asked.
USUAL = {"no_cpython_wrapper": True, "nopython": True}

# Constants, each type by its exact value: 1, 1.0 and True differ, as do 0.0 and -0.0.
PLAIN: dict[type, Callable[[Any], bytes]] = {
    type(None): lambda value: b"",
    type(...): lambda value: b"",
    bool: lambda value: b"1" if value else b"0",
    int: lambda value: hex(value).encode(),
    float: lambda value: struct.pack("<d", value),
    complex: lambda value: struct.pack("<2d", value.real, value.imag),
    str: lambda value: value.encode("utf-8", "surrogatepass"),
    bytes: lambda value: value,
}

# Numba's types that are told by their names.
TYPES = (numba_types.Number, numba_types.Boolean, numba_types.Array, numba_types.containers.BaseTuple)


class Reached(NamedTuple):
    """A function, as it is at some time."""

    digest: str
    complete: bool  # whether the digest tells everything
    names: Sequence[tuple[Callable[[str], Any], list[str], list[Any]]]  # who knows what it mentions, as what
    cells: Sequence[tuple[Any, Any]]

    def unmoved(self) -> bool:
        """Tell whether every name still means the same object."""
        for known, names, values in self.names:
            if not all(map(is_, map(known, names), values)):  # in C, as each step asks
                return False
        for cell, value in self.cells:  # noqa: SIM110  (a generator would take longer than the loop)
            if _content(cell) is not value:
                return False
        return True


class ChangedError(RuntimeError):
    """A function reaches something else than at the first look."""

    def __init__(self) -> None:
        super().__init__(
            "a global, a closure or a helper that it uses is not the one of its first use in this process, "
            "and compiled code keeps these: pass numbers that change through hyper, or define the rule anew"
        )


_numbers = itertools.count()  # kernels that are not kept are all different
_first: WeakKeyDictionary[Any, Reached] = WeakKeyDictionary()
_fresh: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def fingerprint(function: Callable[..., Any]) -> str:
    """A text that changes with a function and with whatever it reaches; what is in this package included.

    Raises
    ------
    ChangedError
        The function reaches something else than at the first look in this process.
    """
    found = look(function)
    mark = "" if found.complete else f" {INCOMPLETE} {next(_numbers)}"
    return hashlib.blake2b(SOURCES + found.digest.encode(), digest_size=16).hexdigest() + mark


def look(function: Callable[..., Any]) -> Reached:
    """Return what a function reaches; raise `ChangedError` if that is not what it has reached before."""
    now = _survey(function)
    first = _first.setdefault(function, now)
    if first.digest != now.digest:
        raise ChangedError
    if first is not now:
        now = _first[function] = first._replace(names=now.names, cells=now.cells)
    return now


def _survey(function: Callable[..., Any]) -> Reached:
    walk = _Walk()
    walk.start(function)
    fresh = [_is_fresh(*helper) for helper in walk.helpers]  # all of them are to be looked at in time
    return Reached(walk.hash.hexdigest(), walk.complete and all(fresh), _by_holder(walk.names), walk.cells)


def _by_holder(
    found: Iterable[tuple[dict[str, Any], str, Any]],
) -> list[tuple[Callable[[str], Any], list[str], list[Any]]]:
    """Names and what they mean, for each dict that knows them."""
    groups: dict[int, tuple[Callable[[str], Any], list[str], list[Any]]] = {}
    for holder, name, value in found:
        _, names, values = groups.setdefault(id(holder), (holder.get, [], []))
        names.append(name)
        values.append(value)
    return list(groups.values())


def _is_fresh(helper: Any, function: Callable[..., Any], compiled: bool) -> bool:
    """Tell whether what Numba keeps of a helper, if anything, was compiled as the helper is now."""
    walk = _Walk()
    walk.start(function)
    if walk.alone:
        return True
    digest = walk.hash.hexdigest()
    return _fresh.setdefault(helper, "" if compiled else digest) == digest


class _TooMuch(Exception):  # noqa: N818
    """More than anybody would compile."""


class _Walk:
    """Hashes what values mean to compiled code."""

    def __init__(self) -> None:
        self.hash = hashlib.blake2b(digest_size=16)
        self.complete = True
        self.alone = True  # whether it reaches nothing that could change without the code
        self.helpers: list[tuple[Any, Any, bool]] = []  # those that Numba may have compiled before
        self.names: list[tuple[dict[str, Any], str, Any]] = []
        self.cells: list[tuple[Any, Any]] = []
        self._seen: dict[Any, tuple[int, Any]] = {}
        self._left, self._depth = LIMIT, 0

    def start(self, value: Any) -> None:
        """Hash a value, unless there is no end of it."""
        try:
            self.value(value)
        except _TooMuch:
            self.complete = self.alone = False
            self.hash = hashlib.blake2b(str(id(value)).encode(), digest_size=16)

    def feed(self, kind: str, *pieces: bytes) -> None:
        """Hash some pieces, none of which can be taken for part of another."""
        self.hash.update(struct.pack("<q", len(pieces)))
        for piece in (kind.encode(), *pieces):
            self.hash.update(struct.pack("<q", len(piece)) + piece)

    def value(self, value: Any) -> None:
        """Hash any value."""
        self._left -= 1
        if self._left < 0 or self._depth > DEPTH:
            raise _TooMuch
        self._depth += 1
        self._value(value)
        self._depth -= 1

    def _value(self, value: Any) -> None:
        plain = PLAIN.get(type(value))
        if plain is not None:
            self.feed(type(value).__name__, plain(value))
        elif isinstance(value, types.CodeType):
            self._code(value)
        elif known_name(value):
            self.feed("known", known_name(value).encode())
            self._overloads(value)
        elif isinstance(value, (tuple, frozenset, set, list, dict)):
            self._collection(value)
        elif isinstance(value, (np.generic, np.ndarray, np.dtype)):
            self._numbers(value)
        elif isinstance(value, numba_types.Type) and isinstance(value, TYPES):
            self.feed("type", type(value).__name__.encode(), str(value).encode())
        elif isinstance(value, enum.Enum):
            self.feed("enum", type(value).__qualname__.encode(), value.name.encode())
            self.value(value.value)
        elif isinstance(value, types.ModuleType):
            self._module(value, ())
        elif not self._again(value):
            self._reached(value)

    def _reached(self, value: Any) -> None:
        """Hash what is made of other things."""
        if isinstance(value, types.FunctionType):
            self._function(value)
        elif hasattr(value, "py_func") and hasattr(value, "targetoptions"):
            self._jitted(value)
        elif isinstance(value, DUFunc):
            self.feed("ufunc")
            self.value(value._dispatcher)
        elif isinstance(getattr(value, "_defn", None), types.FunctionType):  # an intrinsic
            self.feed("intrinsic")
            self.value(value._defn)
        else:
            self.complete = self.alone = False
            self.feed("untold", str(id(value)).encode())

    def _again(self, value: Any, *how: Any) -> bool:
        """Tell whether a value was met before; if so, hash when that was."""
        key = (id(value), *how)
        if key in self._seen:
            self.feed("again", str(self._seen[key][0]).encode())
            return True
        self._seen[key] = (len(self._seen), value)  # which keeps it alive, and its id its own
        return False

    def _collection(self, value: Any) -> None:
        name = type(value).__name__
        if type(value) not in (tuple, frozenset, set, list, dict):
            fields = getattr(value, "_fields", None)
            if not (isinstance(value, tuple) and isinstance(fields, tuple)):
                self._reached(value)
                return
            name = " ".join(["namedtuple", name, *fields])
        if isinstance(value, (list, dict, set)):
            self.alone = False
            if self._again(value):
                return
        self.feed(name, str(len(value)).encode())
        if isinstance(value, (tuple, list)):
            for item in value:
                self.value(item)
            return
        self.feed("unordered", *sorted(map(self._apart, value.items() if isinstance(value, dict) else value)))

    def _apart(self, value: Any) -> bytes:
        """The hash of a value by itself."""
        whole, self.hash = self.hash, hashlib.blake2b(digest_size=16)
        try:
            self.value(value)
            return self.hash.digest()
        finally:
            self.hash = whole

    def _numbers(self, value: Any) -> None:
        dtype = value if isinstance(value, np.dtype) else value.dtype
        self.feed("dtype", repr(dtype).encode(), str(dtype.alignment).encode())
        if isinstance(value, np.dtype):
            return
        if dtype.hasobject or type(value).__module__ != "numpy":
            self._reached(value)
            return
        if isinstance(value, np.ndarray):
            self.alone = False
            order = f"{value.flags.c_contiguous} {value.flags.f_contiguous} {value.flags.aligned}"
            self.feed("array", repr(value.shape).encode(), order.encode(), value.tobytes())
        else:
            self.feed("scalar", value.tobytes())

    def _code(self, code: types.CodeType) -> None:
        counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
        self.feed("code", code.co_code, repr(counts).encode(), getattr(code, "co_exceptiontable", b""))
        for names in (code.co_names, code.co_varnames, code.co_cellvars, code.co_freevars):
            self.value(names)
        self.value(code.co_consts)

    def _function(self, function: Any) -> None:
        self.feed("function")
        self._code(function.__code__)
        self.value(function.__defaults__)
        self.value(function.__kwdefaults__)
        attributes = attribute_names(function.__code__)
        for name in global_names(function.__code__):
            self.feed("global", name.encode())
            if name in function.__globals__:
                self._find(function.__globals__, name, function.__globals__[name], attributes)
            else:
                self.names.append((function.__globals__, name, None))
                self.value(getattr(builtins, name, None))
        for cell in function.__closure__ or ():
            content = _content(cell)
            self.cells.append((cell, content))
            self.alone = False
            if cell is content:
                self.feed("empty cell")
            elif isinstance(content, types.ModuleType):
                self._module(content, attributes)
            else:
                self.value(content)
        compiled = self._overloads(function)
        self.helpers.append((function, function, compiled))

    def _find(self, names: dict[str, Any], name: str, value: Any, attributes: tuple[str, ...]) -> None:
        """Hash what a name stands for."""
        if name in names:
            self.names.append((names, name, value))
        if isinstance(value, types.ModuleType):
            self._module(value, attributes)
            return
        self.alone = self.alone and bool(known_name(value))
        self.value(value)

    def _module(self, module: types.ModuleType, attributes: tuple[str, ...]) -> None:
        """Hash those of a module's attributes that the code which mentions it may ask for."""
        self.feed("module", module.__name__.encode())
        if self._again(module, attributes):
            return
        for name in attributes:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    value = getattr(module, name)  # some are imported when they are asked for
            except Exception:
                continue
            self.feed("attribute", name.encode())
            self._find(vars(module), name, value, attributes)

    def _jitted(self, helper: Any) -> None:
        """Hash a compiled function: its source, and how it is compiled."""
        self.feed("jitted", type(helper).__name__.encode())
        self.value(tuple(sorted(helper.targetoptions.items())))
        self.value(tuple(sorted(getattr(helper, "locals", {}).items())))
        self.value(getattr(getattr(helper, "_compiler", None), "pipeline_class", None))
        self.value(helper.py_func)
        kept = not isinstance(getattr(helper, "_cache", None), NullCache)  # by Numba, which misses edits
        self.helpers.append((helper, helper.py_func, kept or bool(getattr(helper, "overloads", True))))

    def _overloads(self, function: Any) -> bool:
        """Hash what Numba was told to compile for a function; whether it has compiled any of that."""
        compiled = False
        for template in _templates(function):
            source = getattr(template, "_overload_func", None)
            if source is None or known_name(source) or is_own(source):
                continue
            compiled = compiled or bool(getattr(template, "_impl_cache", False))
            options = {k: v for k, v in template._jit_options.items() if USUAL.get(k) != v}
            inline = getattr(template._inline, "value", None)
            if options or inline != "never":
                self.value(options)
                self.value(inline)
            if not is_of(source, VERSIONED):  # else `register_jitable` has made it, of the function itself
                self.value(source)
                self.helpers.append((source, source, compiled))
        return compiled


def _own_sources() -> bytes:
    walk = _Walk()
    for path in OWN_FILES:
        walk.feed("file", path.relative_to(PACKAGE).as_posix().encode(), path.read_bytes())
    return walk.hash.digest()


# The files that every kernel is made of, as they are when this one is imported.
SOURCES = _own_sources()


def _content(cell: Any) -> Any:
    """Return the content of a closure's cell, or the cell itself if it is empty."""
    try:
        return cell.cell_contents
    except ValueError:
        return cell


_indexed: dict[int, list[Any]] = {}
_positions = [0]


def _templates(function: Any) -> list[Any]:
    """Return the templates by which Numba was told to compile a function."""
    registered = builtin_registry.globals
    for known, kind in registered[_positions[0] :]:
        _indexed.setdefault(id(known), []).extend(getattr(kind, "templates", ()))
    _positions[0] = len(registered)
    return _indexed.get(id(function), [])
