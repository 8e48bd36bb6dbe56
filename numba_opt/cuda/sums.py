"""Gradients that add up on GPUs before a step takes them: memory for the sums, and what adds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from .. import device
from ..core.rules import Rule
from ..cpu.sparse import RowSparse, check_shape
from . import arrays as cuda_arrays
from . import execution as cuda_execution
from . import sparse as cuda_sparse
from .arrays import View, current_stream, kernels, look, place
from .memory import Scratch, over, sorting

BLOCK = 64  # rows that a block has room for at least
KNOWN = 32  # sparse sums that are kept as objects, so that steps know them again


class CudaSums:
    """The sums of a trainer's gradients.

    Adding is a step whose weights are the sums, with a rule of its own for the first gradient. Sparse
    gradients are put one behind the other, in the weight's precision, and summed when they are used; together
    with dense ones they are added to a dense sum. Memory is kept from one sum to the next, so that whoever
    takes the sums finds them where they were.
    """

    def __init__(self, names: Sequence[str]) -> None:
        loops = kernels().loops
        self._names = names
        self._memory: dict[int, Any] = {}
        self._blocks: dict[int, Block] = {}  # of those sums that are sparse, and for sparse gradients
        self._first, self._next = (
            cuda_execution.Prepared(Rule(rule, 0, False)) for rule in (loops.begun, loops.plus)
        )
        self._known: dict[tuple[int, int], SparseSum] = {}  # by position and number of parts
        self._kept: list[Block] = []  # what graphs have the addresses of
        self._told: dict[int, Any] = {}  # a word of each device: whether something led outside

    def memory(self, t: int, weight: Any) -> Any:
        """Where the sum of a parameter's gradients is, if it is dense: an array like its weight."""
        if t not in self._memory:
            view = look(weight, "weight")
            self._memory[t] = cuda_arrays.zeros_like(weight, view.shadow.shape, view.shadow.dtype)
        return self._memory[t]

    def take(
        self, sums: Sequence[Any], grads: Mapping[int, Any], weights: Mapping[int, Any]
    ) -> tuple[list[Any], Callable[[], None]]:
        """Be ready to add gradients, by position, to sums, of which some may be None.

        Returns the sums, in memory that is not touched yet, and what adds.

        Raises
        ------
        TypeError, ValueError
            A gradient does not fit.
        """
        found, before = list(sums), list(sums)
        calls: list[Callable[[], None]] = []
        for t, grad in grads.items():
            if cuda_sparse.is_sparse(grad):
                found[t] = self._join(t, sums[t], grad, weights[t], calls)
            else:
                if t not in self._memory and _capturing(weights[t], look(weights[t], "weight").device):
                    raise RuntimeError(cuda_execution.UNPREPARED)
                found[t] = self.memory(t, weights[t])
                if isinstance(sums[t], SparseSum):
                    before[t] = found[t]
                    calls.append(self._spreading(sums[t], weights[t], found[t], True))
        dense = [t for t, grad in grads.items() if not cuda_sparse.is_sparse(grad)]
        parts = [
            (self._first, [t for t in dense if before[t] is None], (1.0, math.inf, 0.0, 0.0)),
            (self._next, [t for t in dense if before[t] is not None], (1.0, math.inf, 0.0)),
        ]
        parts = [part for part in parts if part[1]]
        for prepared, which, _ in parts:
            columns = [[grads[t] for t in which], [found[t] for t in which]]
            prepared.take(device.Request(columns, (), False, self._label(which)))

        def add() -> None:
            launches: list[Callable[[], None]] = [
                prepared.launching([row], [0] * len(which))[0] for prepared, which, row in parts
            ]
            for call in (*calls, *launches):
                call()

        return found, add

    def restored(self, weight: Any, saved: RowSparse, what: str) -> SparseSum:
        """A sparse sum, in memory of its own, with the content of one on the host."""
        view = look(weight, "weight")
        check_shape(saved, view.shadow, what)
        with np.errstate(all="ignore"):
            rows, values = saved.rows.astype(np.int64), saved.values.astype(view.shadow.dtype)
        block = self._block(view, saved.shape, len(rows))
        for memory, content in ((block.rows, rows), (block.values, values)):
            block.gpu.assign(memory.address, np.ascontiguousarray(content))
        self._told_of(view.device)
        return SparseSum(block, len(rows))

    def strayed(self) -> bool:
        """Whether a sparse gradient led outside, as far as that is known before a step takes the sums."""
        words = [np.frombuffer(memory.read(8), np.float64) for memory in self._told.values()]
        return bool(np.any(words))

    def _label(self, which: Sequence[int]) -> Callable[[int], str]:
        return lambda k: f"parameter {self._names[which[k]]!r}"

    # ---------------------------------------------------------------- sparse gradients

    def _join(self, t: int, total: Any, grad: Any, weight: Any, calls: list[Callable[[], None]]) -> Any:
        """A sum with one more gradient, which is sparse; what makes it comes to the calls."""
        view = look(weight, "weight")
        parts = cuda_sparse.parts_of(grad, view, f"gradient of parameter {self._names[t]!r}")
        before = total.count if isinstance(total, SparseSum) else 0
        count = parts.units if parts.columns is None else min(parts.units, parts.entries)
        capturing = _capturing(weight, view.device)
        old = total.block if before else self._blocks.get(t)
        block, launches = old, []
        if block is None or block.room < before + count:
            if capturing:
                raise RuntimeError(cuda_execution.UNPREPARED)
            block = self._block(view, grad.shape, max(before + count, 2 * block.room if block else BLOCK))
            launches = [block.moved_from(total.block, before)] if before else []
        launches += block.collecting(parts, before, count, self._told_of(view.device))
        calls.append(_launching(launches, weight, block.gpu, parts))
        calls.append(partial(self._blocks.__setitem__, t, block))
        if capturing:
            calls.append(partial(self._kept.append, block))
        if total is None or isinstance(total, SparseSum):
            return self._sum_of(t, block, before + count)
        calls.append(self._spreading(SparseSum(block, count), weight, total, False))
        return total

    def _sum_of(self, t: int, block: Block, count: int) -> SparseSum:
        """The first parts of a block: the same object as long as it is the same block."""
        found = self._known.get((t, count))
        if found is None or found.block is not block:
            if len(self._known) >= KNOWN:
                self._known.clear()
            found = self._known[t, count] = SparseSum(block, count)
        return found

    def _block(self, view: View, shape: Sequence[int], room: int) -> Block:
        return Block(kernels().driver.device(view.device), room, tuple(shape), view.shadow.dtype)

    def _told_of(self, number: int) -> int:
        """The address of a device's word."""
        if number not in self._told:
            self._told[number] = kernels().driver.device(number).memory(8)
        return int(self._told[number].address)

    def _spreading(self, parts: SparseSum, weight: Any, total: Any, every: bool) -> Callable[[], None]:
        """What adds parts to a dense sum or, with `every`, lets that begin with them."""
        block, place_of_sum = parts.block, place(look(total, "sum").shadow)
        if _capturing(weight, block.gpu.number):
            if not block.can_sort(parts.count):
                raise RuntimeError(cuda_execution.UNPREPARED)
            self._kept.append(block)
        launches = block.spreading(parts.count, place_of_sum, every, self._told_of(block.gpu.number))
        return _launching(launches, weight, block.gpu)


def _capturing(weight: Any, number: int) -> bool:
    stream = current_stream(weight, number)
    return bool(kernels().driver.device(number).capturing(stream))


def _launching(
    launches: Sequence[Any], weight: Any, gpu: Any, parts: cuda_sparse.Parts | None = None
) -> Callable[[], None]:
    """What launches kernels on a weight's stream, after the streams on which gradients are made."""
    stream = current_stream(weight, gpu.number)
    others = {view.stream for view in parts.views if view.stream} - {stream} if parts else set()

    def launch() -> None:
        with gpu.current():
            for other in others:
                gpu.after(stream, other)
            for each in launches:
                each(stream)

    return launch


class Block:
    """Memory for the parts of a sparse sum: rows with their numbers, behind which there may be room."""

    def __init__(self, gpu: Any, room: int, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.gpu, self.room, self.shape, self.dtype = gpu, room, shape, dtype
        self.width, self._code = math.prod(shape[1:]), device.code_of(dtype)
        self.rows, self.values = gpu.memory(8 * room), gpu.memory(dtype.itemsize * room * self.width)
        self._keys = Scratch(gpu)

    def moved_from(self, other: Block, count: int) -> Any:
        """The launch that takes over the first parts of another one."""
        given = (other.values.address, other.rows.address, 0, count, count)
        return self._collect(f"rows i8 {self._code}", given, 0, 0)

    def collecting(self, parts: cuda_sparse.Parts, at: int, count: int, told: int) -> list[Any]:
        """The launches that put a gradient behind the parts that are there, to have so many places."""
        values, numbers, columns, _, _, entries, *_ = parts.head(self.shape[0], 0, (0, 0))
        if parts.columns is None:
            form = f"rows {parts.integers} {parts.form.split()[-1]}"
            return [self._collect(form, (values, numbers, 0, count, count), at, told)]
        vacate = over(self.gpu, kernels().loops.vacate(), count, (self.rows.address + 8 * at, count), None)
        return [
            vacate,
            self._collect(parts.form, (values, numbers, columns, self.shape[0], entries), at, told),
        ]

    def _collect(self, form: str, given: tuple[int, ...], at: int, told: int) -> Any:
        by_warps = True if form.startswith("csr") else None
        units = given[3] if by_warps else given[3] * max(self.width, 1)
        first = self.rows.address + 8 * at, self.values.address + self.dtype.itemsize * at * self.width
        kernel = kernels().loops.collect(self._code, form)
        return over(self.gpu, kernel, units, (*given, self.width, *first, told), by_warps)

    def can_sort(self, count: int) -> bool:
        """Whether there is memory to sort so many keys."""
        return self._keys.has(2 * count)

    def spreading(self, count: int, total: int, every: bool, told: int) -> list[Any]:
        """The launches that add its first parts to a dense sum at some address."""
        height, place_of_keys = self.shape[0], self._keys.fit(2 * count)
        launches, keys = sorting(self.gpu, "i8", self.rows.address, count, height, place_of_keys)
        given = (keys, self.values.address, count, height, self.width, total, told)
        units = height + 1 if every else count
        return [*launches, over(self.gpu, kernels().loops.spread(self._code, every), units, given, True)]


class SparseSum(RowSparse):
    """The first parts of a block, as a gradient."""

    def __init__(self, block: Block, count: int) -> None:
        self.block, self.count = block, count
        rows = Held(block.rows, (count,), np.dtype(np.int64))
        super().__init__(rows, Held(block.values, (count, *block.shape[1:]), block.dtype), block.shape)

    def to_host(self) -> RowSparse:
        """The parts that are some row's, with NumPy arrays; waits for the device."""
        rows, values = cuda_arrays.to_host(self.rows, "rows"), cuda_arrays.to_host(self.values, "values")
        inside = (rows >= 0) & (rows < self.shape[0])
        return RowSparse(rows[inside], values[inside], self.shape)


class Held:
    """Memory of the package's own as a CUDA array."""

    def __init__(self, memory: Any, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.memory, self.dtype = memory, dtype
        data = (memory.address, False)
        self.__cuda_array_interface__ = {"version": 3, "shape": shape, "typestr": dtype.str, "data": data}
