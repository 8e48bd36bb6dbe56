"""Steps on NVIDIA GPUs: what a CUDA array is, and what it takes to launch kernels on many of them.

Numba's CUDA compiler and the driver are looked for when the first CUDA array arrives, not before. Arrays are
looked at through NumPy arrays that stand for them, with the same address, dtype and shape, which nobody
reads: so the checks of `numba_opt.device` are the same, and so are its errors.

Everything a step needs is prepared when its arrays are first seen: tables in the device's memory, and
launches with their arguments. A step of arrays that it has seen before costs a look at each of them and two
or three launches. Hyper-parameters travel with a launch of their own, which is left out when they have not
changed.

Nothing waits for the device: kernels go to the caller's stream, which is PyTorch's or CuPy's current one if
the weights are theirs, else the default stream, or the one that `on` names.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from . import device, execution

__all__ = ["CudaUnavailableError", "on"]

_stream: ContextVar[int | None] = ContextVar("stream", default=None)

SKIP, NORM, SKIPPED, STRAY = range(4)  # what `Prepared.told` gives, as the kernels' module has it

RING = 3  # copies of a table that may be on their way at once

TORCH_DTYPES = {
    "float32": "f4",
    "float64": "f8",
    "float16": "f2",
    "bfloat16": "b2",
    "int32": "i4",
    "int64": "i8",
}
TYPES = {"f4": "<f4", "f8": "<f8", "f2": "<f2", "b2": "<V2", "i4": "<i4", "i8": "<i8"}


class CudaUnavailableError(RuntimeError):
    """A CUDA array came, and the packages or the driver that it needs are not there."""


@cache
def kernels() -> SimpleNamespace:
    """The modules that need Numba's CUDA compiler, imported when they are first needed."""
    try:
        from numba import cuda as target

        if getattr(target, "implementation", "") != "NVIDIA":
            raise ModuleNotFoundError("numba-cuda")
        from .kernels import cuda, cuda_driver
    except (ImportError, AttributeError) as error:
        raise CudaUnavailableError(
            f"CUDA arrays need the package numba-cuda, which is not there or not whole ({error}): "
            "pip install 'numba_opt[cuda]', or 'numba_opt[cuda12]' for drivers before 580"
        ) from error
    try:
        cuda_driver.start()
    except Exception as error:  # the bindings raise of their own if the library is not there
        raise CudaUnavailableError(
            f"CUDA arrays need NVIDIA's driver, which could not be started ({error}): "
            "install one from version 580 on for 'numba_opt[cuda]', from 525 on for 'numba_opt[cuda12]'"
        ) from error
    return SimpleNamespace(loops=cuda, driver=cuda_driver)


# ---------------------------------------------------------------- streams


@contextmanager
def on(stream: Any) -> Iterator[None]:
    """Let steps within this context go to a stream.

    Parameters
    ----------
    stream : int or object
        The stream's address, or PyTorch's, CuPy's or Numba's object for it.

    Raises
    ------
    TypeError
        `stream` is none of these.

    Examples
    --------
    >>> import numba_opt.cuda
    >>> with numba_opt.cuda.on(0):  # the default stream
    ...     pass
    """
    token = _stream.set(_address_of(stream))
    try:
        yield
    finally:
        _stream.reset(token)


def _address_of(stream: Any) -> int:
    for name in ("cuda_stream", "ptr", "handle"):
        stream = getattr(stream, name, stream)
    stream = getattr(stream, "value", stream)
    try:
        return int(stream or 0)
    except (TypeError, ValueError):
        raise TypeError(f"stream must be a CUDA stream or its address, got {stream!r}") from None


def _current_stream(weight: Any, number: int) -> int:
    """The stream that the caller's library is at, for a device."""
    given = _stream.get()
    if given is not None:
        return given
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    if torch is not None and isinstance(weight, torch.Tensor):
        return int(torch.cuda.current_stream(number).cuda_stream)
    if cupy is not None and isinstance(weight, cupy.ndarray):
        with cupy.cuda.Device(number):
            return int(cupy.cuda.get_current_stream().ptr)
    return 0


# ---------------------------------------------------------------- arrays


class View(NamedTuple):
    """What is known of a CUDA array."""

    shadow: np.ndarray  # stands for it; its memory is the device's and must not be read
    device: int
    stream: int | None  # where it is being made, if that is said


class _Interface:
    """An object whose array interface is what it is told."""

    def __init__(self, interface: dict[str, Any]) -> None:
        self.__array_interface__ = interface


def look(value: Any, what: str) -> View:
    """What is known of a CUDA array.

    Raises
    ------
    TypeError
        It is on the host, or not an array, or of a dtype that is not known.
    ValueError
        It is not contiguous or aligned.
    """
    if not device.on_cuda(value):
        kind = "None" if value is None else f"a {type(value).__module__}.{type(value).__qualname__}"
        raise TypeError(f"{what} is {kind}, which is not on a GPU; expected a CUDA array, as the weight")
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return _look_at_tensor(value, what)
    if not hasattr(value, "__cuda_array_interface__"):
        value = _from_dlpack(value, what)
    told = value.__cuda_array_interface__
    if told.get("mask") is not None:
        raise TypeError(f"{what} has a mask; expected a CUDA array without one")
    name = getattr(getattr(value, "dtype", None), "name", "")
    typestr = "<V2" if name == "bfloat16" else told["typestr"]
    address, read_only = told["data"]
    shadow = _shadow(address or 0, tuple(told["shape"]), typestr, told.get("strides"), read_only, what)
    number = kernels().driver.device_of(address) if shadow.size else 0
    return View(shadow, number, told.get("stream"))


def _look_at_tensor(tensor: Any, what: str) -> View:
    code = TORCH_DTYPES.get(str(tensor.dtype).removeprefix("torch."))
    if code is None:
        raise TypeError(f"{what} is {tensor.dtype}; expected float32, float64, float16 or bfloat16")
    if str(tensor.layout) != "torch.strided":
        raise TypeError(f"{what} is a tensor of layout {tensor.layout}; expected torch.strided")
    size = tensor.element_size()
    strides = tuple(size * s for s in tensor.stride())
    shadow = _shadow(tensor.data_ptr(), tuple(tensor.shape), TYPES[code], strides, False, what)
    return View(shadow, tensor.device.index or 0, None)


def _from_dlpack(value: Any, what: str) -> Any:
    """Something with ``__cuda_array_interface__`` that shares an array's memory which only has DLPack."""
    for name in ("torch", "cupy"):
        if name in sys.modules:
            return sys.modules[name].from_dlpack(value)
    raise TypeError(f"{what} is a CUDA array with DLPack only; that needs PyTorch or CuPy to be imported")


def _shadow(
    address: int, shape: tuple[int, ...], typestr: str, strides: Any, read_only: bool, what: str
) -> np.ndarray:
    """A NumPy array that stands for a CUDA array."""
    half = typestr == "<V2"
    if half and "ml_dtypes" not in sys.modules:
        raise TypeError(f"{what} is bfloat16, which needs the package ml_dtypes to be imported")
    if 0 in shape:
        array = np.empty(shape, "<u2" if half else typestr)
        array.flags.writeable = not read_only
    else:
        interface = {
            "version": 3,
            "shape": shape,
            "typestr": "<u2" if half else typestr,
            "data": (address, bool(read_only)),
            "strides": None if strides is None else tuple(strides),
        }
        array = np.asarray(_Interface(interface))
    if half:
        array = array.view(sys.modules["ml_dtypes"].bfloat16)
    if not array.flags.c_contiguous:
        raise ValueError(f"{what} has strides {array.strides}; expected a contiguous CUDA array")
    if not array.flags.aligned:
        raise ValueError(f"{what} begins at address {address:#x}; expected a multiple of {array.itemsize}")
    return array


def look_at(value: Any, what: str) -> np.ndarray:
    """A NumPy array with a CUDA array's shape and dtype; what it holds must not be looked at."""
    return look(value, what).shadow


def zeros_like(weight: Any, shape: tuple[int, ...]) -> Any:
    """Zeros of a weight's dtype, of its library, and on its device."""
    view = look(weight, "weight")
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    if torch is not None and isinstance(weight, torch.Tensor):
        return torch.zeros(shape, dtype=weight.dtype, device=weight.device)
    if cupy is not None and isinstance(weight, cupy.ndarray):
        with cupy.cuda.Device(view.device):
            return cupy.zeros(shape, view.shadow.dtype)
    return kernels().driver.array(view.device, np.zeros(shape, view.shadow.dtype))


def as_single(weight: Any, what: str) -> Any:
    """A float32 copy of a weight, of its library, and on its device."""
    view = look(weight, what)
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    if torch is not None and isinstance(weight, torch.Tensor):
        return weight.detach().to(torch.float32, copy=True)
    if cupy is not None and isinstance(weight, cupy.ndarray):
        with cupy.cuda.Device(view.device):
            return weight.astype(np.float32)
    return kernels().driver.array(view.device, to_host(weight, what).astype(np.float32))


def to_host(array: Any, what: str) -> np.ndarray:
    """A copy of a CUDA array in the host's memory; waits for everything on its device."""
    view = look(array, what)
    shadow = view.shadow
    content = kernels().driver.device(view.device).read(_place(shadow), shadow.nbytes)
    return np.frombuffer(bytearray(content), shadow.dtype).reshape(shadow.shape)


def writable(array: Any, what: str) -> Any:
    """Something that takes ``[...] = array`` for a CUDA array, and has its shape and dtype."""
    return Writable(look(array, what))


class Writable:
    """A CUDA array to which content of the host's memory can be assigned."""

    def __init__(self, view: View) -> None:
        self._view = view
        self.shape, self.dtype = view.shadow.shape, view.shadow.dtype

    def __setitem__(self, everything: Any, content: np.ndarray) -> None:
        shadow = self._view.shadow
        content = np.ascontiguousarray(content, shadow.dtype)
        kernels().driver.device(self._view.device).assign(_place(shadow), content)


def _place(shadow: np.ndarray) -> int:
    return int(shadow.ctypes.data)


# ---------------------------------------------------------------- what steps are prepared from


class Norm(NamedTuple):
    """What is asked for of the norm of all gradients: a limit (infinity for none), and a guard."""

    limit: float
    guard: bool


class Mirror:
    """Numbers in the device's memory, and what they are written from."""

    def __init__(self, driver_device: Any, words: int) -> None:
        self.memory = driver_device.memory(8 * words)
        self._device, self._words = driver_device, words
        self._ring: list[Any] = []

    def write(self, words: np.ndarray, stream: int) -> None:
        """Have the numbers copied when the stream gets there; what is copied may change at once."""
        if len(self._ring) < RING:
            self._ring.append(self._device.pinned(8 * self._words))
        else:
            self._ring.append(self._ring.pop(0))
            self._ring[-1].settle()
        self._ring[-1].words[:] = words
        self.memory.fill(self._ring[-1], stream)


class Hyper:
    """A device's buffer of hyper-parameters."""

    def __init__(self, gpu: Any, length: int) -> None:
        found = kernels()
        self.loops, self._launch_of = found.loops, found.driver.Launch
        self._gpu, self._length, self._rows = gpu, length, 0
        self._written: np.ndarray = np.zeros(0)
        self._launch: Any = None
        self._memory: Any = None
        self.room = 0

    @property
    def address(self) -> int:
        """Where it is."""
        return self._memory.address

    def fit(self, rows: int) -> None:
        """Have room for so many rows. Whoever has the address must ask again."""
        if rows > self._rows:
            loops = self.loops
            self._rows = rows
            self.room = -(-(loops.HEAD + rows * self._length) // loops.ROOM) * loops.ROOM
            self._memory = self._gpu.memory(8 * (loops.OUT + 3 * self.room))
            self._written = np.zeros(0)
            arguments = (self.address, self.room, 0), [0.0] * loops.ROOM
            self._launch = self._launch_of(self._gpu, loops.set_hyper(), 1, 1, *arguments)

    def holds(self, rows: int) -> bool:
        """Whether there is room for so many rows."""
        return rows <= self._rows

    def write(self, rows: np.ndarray, rescale: float, norm: Norm | None, stream: int) -> None:
        """Have rows written when the stream gets there, if they are not there already."""
        loops = self.loops
        head = [norm.limit if norm else 0.0, rescale, float(bool(norm and norm.guard)), 0.0]
        numbers = np.zeros(self.room)
        numbers[: loops.HEAD] = head
        numbers[loops.HEAD : loops.HEAD + rows.size] = rows.ravel()
        if not np.array_equal(numbers, self._written):
            for first in range(0, self.room, loops.ROOM):
                self._launch.set(
                    (self.address, self.room, first), numbers[first : first + loops.ROOM].tolist()
                )
                self._launch(stream)
            self._written = numbers

    def told(self) -> np.ndarray:
        """What kernels have said; waits for everything on the device."""
        if self._memory is None:
            return np.zeros(self.loops.OUT)
        return np.frombuffer(self._memory.read(8 * self.loops.OUT), np.float64)


class Placed:
    """A table in the device's memory, with the launches that take it."""

    def __init__(self, gpu: Any, hyper: Hyper, rule: execution.Rule, table: device.Table) -> None:
        found = kernels()
        self.loops, self._launch_of = found.loops, found.driver.Launch
        self.gpu, self.hyper, self.members = gpu, hyper, table.members
        self._addresses, self._offsets, self._code = table.addresses, table.offsets, table.layout.split()[0]
        sizes = np.diff(table.offsets)
        chunks = -(-sizes // self.loops.CHUNK)
        rows = sizes // np.maximum(table.addresses[:, -2].astype(np.int64), 1)
        self._starts = [_line(rows if rule.per_row else chunks), _line(chunks)]
        self._kernel = self.loops.dense(*rule, table.layout)
        self._blocks = gpu.processors * 8
        self._threads = self.loops.THREADS
        self.chunks = int(chunks.sum())
        units = int(self._starts[0][-1])
        if rule.per_row:
            self._threads, warps = self.loops.WARP * self.loops.WARPS, self.loops.WARPS
            units = -(-units // warps)
        self._blocks = min(units, self._blocks)
        self._which: list[int] = []
        self._at: tuple[int, int] = (0, 0)
        self._mirror = Mirror(gpu, self._words([0] * len(sizes)).size)
        self.launch: Any = None

    def _words(self, which: Sequence[int]) -> np.ndarray:
        self._addresses[:, -1] = which
        return np.concatenate([self._addresses.view(np.int64).ravel(), self._offsets, *self._starts])

    def ready(self, which: Sequence[int]) -> bool:
        """Whether the table is as it should be, with these rows of hyper-parameters for its tensors."""
        return self._which == which and self._at == (self.hyper.address, self.hyper.room)

    def place(self, which: list[int], stream: int) -> None:
        """Have the table as it should be when the stream gets there."""
        if self.ready(which):
            return
        if self._which != which:
            self._mirror.write(self._words(which), stream)
            self._which = which
        self._at = self.hyper.address, self.hyper.room
        arguments = (*self._arguments(0), *self._at)
        self.launch = self._launch_of(self.gpu, self._kernel, self._blocks, self._threads, arguments)

    def _arguments(self, starts: int) -> tuple[int, ...]:
        """The table, its columns, the lines, and how many tensors there are."""
        table = self._mirror.memory.address
        tensors, columns = self._addresses.shape
        offsets = table + 8 * self._addresses.size
        lines = [offsets + 8 * self._offsets.size]
        lines.append(lines[0] + 8 * self._starts[0].size)
        return table, columns, offsets, lines[starts], tensors

    def squares(self, partial: int) -> Any:
        """The launch that sums the squares of the gradients, for each chunk."""
        kernel = self.loops.squares(self._code)
        blocks = min(self.chunks, self.gpu.processors * 8)
        return self._launch_of(self.gpu, kernel, blocks, self.loops.THREADS, (*self._arguments(1), partial))


def _line(counts: np.ndarray) -> np.ndarray:
    """Where each one's part of a long line begins, and where the line ends."""
    line = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=line[1:])
    return line


class Part:
    """Those arrays of a call that are on one device: tables there, and launches."""

    def __init__(self, rule: execution.Rule, hyper: Hyper, gpu: Any, members: list[int]) -> None:
        self.rule, self.hyper, self.gpu, self.members = rule, hyper, gpu, members
        self.placed: list[Placed] = []
        self.made_on: set[int] = set()
        self.weight: Callable[[], Any] = lambda: None
        self._last: int | None = None
        self._partial: Any = None
        self._norm: list[Any] = []

    def hold(self, bound: device.Bound, weight: Any, made_on: set[int]) -> None:
        """Take other arrays."""
        self.placed = [Placed(self.gpu, self.hyper, self.rule, table) for table in bound.tables]
        self.made_on, self.weight, self._norm = made_on, _weakly(weight), []

    def stream(self) -> int:
        """The caller's stream."""
        return _current_stream(self.weight(), self.gpu.number)

    def write(self, rows: np.ndarray, which: Sequence[int], norm: Norm | None) -> None:
        """Have hyper-parameters and tables in place when the stream gets there."""
        stream = self.stream()
        with self.gpu.current():
            if self._last is not None and stream != self._last:
                self.gpu.after(stream, self._last)
            for other in self.made_on - {stream}:
                self.gpu.after(stream, other)
            self._last = stream
            self.hyper.fit(len(rows))
            for placed in self.placed:
                placed.place([which[self.members[k]] for k in placed.members], stream)
            self.hyper.write(rows, float(rows[0, 0]), norm, stream)
            if norm is not None and not self._norm:
                self._norm = self._norm_launches()

    def ready(self, which: Sequence[int], norm: Norm | None) -> bool:
        """Whether all is in place, but for the values of hyper-parameters."""
        return (norm is None or bool(self._norm)) and all(
            placed.ready([which[self.members[k]] for k in placed.members]) for placed in self.placed
        )

    def launch(self, norm: Norm | None) -> None:
        """Launch the kernels of a step, on the caller's stream: nothing else happens to it."""
        stream = self.stream()
        with self.gpu.current():
            if norm is not None:
                for launch in self._norm:
                    launch(stream)
            for placed in self.placed:
                placed.launch(stream)

    @property
    def norm_memory(self) -> Any:
        """What the norm's launches have the addresses of."""
        return self._partial

    def _norm_launches(self) -> list[Any]:
        """What sums the squares of all gradients, and what settles what follows from that."""
        loops, launch_of = kernels().loops, kernels().driver.Launch
        count = sum(placed.chunks for placed in self.placed)
        self._partial = self.gpu.memory(8 * max(count, 1))
        launches, before = [], 0
        for placed in self.placed:
            launches.append(placed.squares(self._partial.address + 8 * before))
            before += placed.chunks
        length = 3 + self.rule.n_hyper
        arguments = (self.hyper.address, self.hyper.room, length, self._partial.address, count)
        return [*launches, launch_of(self.gpu, loops.clip_norm(), 1, loops.THREADS, arguments)]


def _weakly(value: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(value)
    except TypeError:
        return lambda: value


class Prepared:
    """The arrays of a call, checked, with all that it takes to launch kernels on them.

    It keeps no array alive. Arrays that it has seen are known by their objects and addresses.
    """

    def __init__(self, rule: execution.Rule) -> None:
        self.rule = rule
        self.parts: list[Part] = []
        self._known_parts: dict[int, Part] = {}
        self._seen: list[tuple[Callable[[], Any], int]] = []
        self._captured: list[tuple[Hyper, int, Part]] = []
        self._captured_which: list[int] = []
        self._kept: list[Any] = []  # what graphs have the addresses of

    def take(self, request: device.Request) -> None:
        """Be ready for the arrays of a request; nothing is launched. Errors as in `bind`."""
        columns = request.columns
        if self._knows(columns):
            return
        self._seen = []
        found = bind(request)
        self.parts = []
        for number, members, bound, made_on in found:
            part = self._known_parts.get(number)
            if part is None or part.members != members:
                gpu = kernels().driver.device(number)
                part = Part(self.rule, Hyper(gpu, 3 + self.rule.n_hyper), gpu, members)
                self._known_parts[number] = part
            part.hold(bound, columns[1][members[0]], made_on)
            self.parts.append(part)
        self._remember(columns)

    def _knows(self, columns: Sequence[Sequence[Any]]) -> bool:
        """Whether these are the arrays that it is ready for."""
        if not self._seen or len(self._seen) != sum(map(len, columns)):
            return False
        values = (value for column in columns for value in column)
        return all(
            ref() is value and (value is None or _address(value) == at)
            for (ref, at), value in zip(self._seen, values, strict=True)
        )

    def _remember(self, columns: Sequence[Sequence[Any]]) -> None:
        values = [value for column in columns for value in column]
        try:
            self._seen = [
                (_nothing, 0) if value is None else (weakref.ref(value), _address(value)) for value in values
            ]
        except (TypeError, AttributeError):  # no telling whether an object is still the same
            self._seen = []

    def run(self, hyper: Any, which: Sequence[int], norm: Norm | None = None, graphs: bool = True) -> bool:
        """Launch a step. False if it went into a graph: then nothing else did, and nothing else happened."""
        if norm is not None and len(self.parts) > 1:
            numbers = ", ".join(str(part.gpu.number) for part in self.parts)
            raise ValueError(
                "clip_global_norm and skip_nonfinite need all parameters on one device, "
                f"but they are on CUDA devices {numbers}"
            )
        captured = [part.gpu.capturing(part.stream()) for part in self.parts]
        if any(captured):
            if not graphs:
                raise RuntimeError("only a step of a Trainer can be captured in a CUDA graph")
            if not all(captured) or not all(part.ready(which, norm) for part in self.parts):
                raise RuntimeError(
                    "a step can be captured after one with the same arrays; make one before the capture"
                )
            self._captured = [(part.hyper, part.hyper.address, part) for part in self.parts]
            self._kept.append([(list(part.placed), part.norm_memory) for part in self.parts])
            self._captured_which = list(which)
        else:
            rows = np.asarray(hyper, np.float64)
            for part in self.parts:
                part.write(rows, which, norm)
        for part in self.parts:
            part.launch(norm)
        return not any(captured)

    def refresh(self, hyper: Any, which: Sequence[int], norm: Norm | None) -> None:
        """Have hyper-parameters in place for the step that was captured last."""
        rows = np.asarray(hyper, np.float64)
        same = all(buffer.address == at and buffer.holds(len(rows)) for buffer, at, _ in self._captured)
        if not same or list(which) != self._captured_which:
            raise ValueError("other groups of hyper-parameters are in use since the step was captured")
        for buffer, _, part in self._captured:
            with part.gpu.current():
                buffer.write(rows, float(rows[0, 0]), norm, part.stream())

    def norm(self) -> float:
        """The norm of the last step's gradients; waits for the device."""
        return float(self.parts[0].hyper.told()[NORM])

    def told(self) -> np.ndarray:
        """What the kernels of all devices have said, added up; waits for the devices."""
        return np.sum([part.hyper.told() for part in self._known_parts.values()], axis=0)


def _nothing() -> None:
    return None


def bind(request: device.Request) -> list[tuple[int, list[int], device.Bound, set[int]]]:
    """The arrays of a call, all of it checked, for each device: its number, the positions of what is there,
    the tables, and the streams on which arrays are said to be in the making.

    Raises
    ------
    TypeError, ValueError
        As `numba_opt.device.bind`; or an array is on the host, or on another device than its weight.
    """
    views = _views(request)
    where = [view.device for view in views[1] if view is not None]
    found = []
    for number in sorted(set(where)):
        members = [t for t, place in enumerate(where) if place == number]
        own = [[column[t] for t in members] for column in views]
        made_on = {view.stream for column in own for view in column if view and view.stream}
        found.append((number, members, device.bind(_shadows(request, own, members)), made_on))
    return found


def check(request: device.Request) -> None:
    """What `bind` would refuse, but for gradients, refused."""
    bind(request._replace(apart=dict.fromkeys(range(len(request.columns[1])), ())))


def _views(request: device.Request) -> list[list[View | None]]:
    """What is known of all arrays of a request, each one where its weight is."""

    def may_lack(c: int, t: int) -> bool:
        return c == 2 + request.n_state or (c == 0 and t in request.apart)

    names = request.names()
    views = [
        [
            None if value is None and may_lack(c, t) else look(value, f"{name} of {request.label(t)}")
            for t, value in enumerate(column)
        ]
        for c, (name, column) in enumerate(zip(names, request.columns, strict=True))
    ]
    for name, column in zip(names, views, strict=True):
        for t, (view, weight) in enumerate(zip(column, views[1], strict=True)):
            if view is not None and weight is not None and view.device != weight.device and view.shadow.size:
                raise ValueError(
                    f"{name} of {request.label(t)} is on CUDA device {view.device}; "
                    f"expected device {weight.device}, as the weight"
                )
    return views


def _shadows(request: device.Request, views: list[list[View | None]], members: list[int]) -> device.Request:
    """The part of a request for some positions, with what stands for its arrays."""
    return request._replace(
        columns=[[None if view is None else view.shadow for view in column] for column in views],
        label=lambda k: request.label(members[k]),
        apart={k: request.apart[t] for k, t in enumerate(members) if t in request.apart},
    )


def _address(value: Any) -> int:
    """Where an array is, found quickly."""
    if hasattr(value, "data_ptr"):
        return value.data_ptr()
    pointer = getattr(getattr(value, "data", None), "ptr", None)
    return value.__cuda_array_interface__["data"][0] if pointer is None else pointer
