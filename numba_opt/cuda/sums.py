"""Gradients that add up on GPUs before a step takes them: memory for the sums, and what adds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from ..compiler import interrupts
from ..core.call import Arrays
from ..core.rules import Rule
from ..core.step_rows import StepRows
from ..core.storage import TouchedForm, code_of
from ..core.sums import Add, Sums, Totals
from ..cpu import threads
from ..cpu.row_sparse import RowSparse, check_shape
from .arrays import View, current_stream, kernels, look, place, to_host, zeros_like
from .executor import UNPREPARED, CudaExecutor
from .memory import Scratch
from .tables import launch_over, sorting
from .touched import DeviceTouchedRows, is_sparse, touched_rows

BLOCK = 64  # rows that a block has room for at least
KNOWN = 32  # sparse sums that are kept as objects, so that steps know them again


class CudaSums(Sums):
    """The sums of the gradients of parameters on GPUs.

    Adding is a step whose weights are the sums, with a rule of its own for the first gradient. Sparse
    gradients are in the weight's precision. Memory is kept from one sum to the next, so that whoever takes
    the sums finds them where they were.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names)
        loops = kernels().loops
        self._memory: dict[int, Any] = {}
        self._blocks: dict[int, Block] = {}  # of those sums that are sparse, and for sparse gradients
        self._first, self._next = (CudaExecutor(Rule(rule, 0, False)) for rule in (loops.begun, loops.plus))
        self._known: dict[tuple[int, int], SparseSum] = {}  # by position and number of parts
        self._kept: list[Block] = []  # what graphs have the addresses of
        self._flags: dict[int, Any] = {}  # a word of each device: whether something led outside

    def dense(self, t: int, weight: Any) -> Any:
        if t not in self._memory:
            view = look(weight, "weight")
            self._memory[t] = zeros_like(weight, view.shadow.shape, view.shadow.dtype)
        return self._memory[t]

    def plus(
        self, totals: Totals, grads: Mapping[int, Any], weights: Mapping[int, Any]
    ) -> tuple[Totals, Add]:
        found, launch = self._adding(totals, grads, weights)

        def add(after: Sequence[partial[Any]] = ()) -> None:
            with interrupts.defer_signals():
                launch()
                threads.run([], after)

        return found, add

    def for_step(
        self, totals: Totals, grads: Mapping[int, Any], weights: Mapping[int, Any]
    ) -> tuple[Totals, Callable[[], None] | None]:
        return self._adding(totals, grads, weights)

    def _adding(
        self, totals: Totals, grads: Mapping[int, Any], weights: Mapping[int, Any]
    ) -> tuple[Totals, Callable[[], None]]:
        """Return the totals, in memory that is not touched yet, and the call that adds."""
        found, before = list(totals), list(totals)
        calls: list[Callable[[], None]] = []
        for t, grad in grads.items():
            if is_sparse(grad):
                found[t] = self._join(t, totals[t], grad, weights[t], calls)
            else:
                if t not in self._memory and _capturing(weights[t], look(weights[t], "weight").device):
                    raise RuntimeError(UNPREPARED)
                found[t] = self.dense(t, weights[t])
                if isinstance(totals[t], SparseSum):
                    before[t] = found[t]
                    calls.append(self._spreading(totals[t], weights[t], found[t], True))
        dense = [t for t, grad in grads.items() if not is_sparse(grad)]
        additions = [
            (self._first, [t for t in dense if before[t] is None], (1.0, math.inf, 0.0, 0.0)),
            (self._next, [t for t in dense if before[t] is not None], (1.0, math.inf, 0.0)),
        ]
        additions = [addition for addition in additions if addition[1]]
        for executor, members, _ in additions:
            columns = [[grads[t] for t in members], [found[t] for t in members]]
            executor.refresh(Arrays(columns, executor.rule, (), self._label(members)))

        def launch() -> None:
            launches: list[Callable[[], None]] = [
                executor.launching(StepRows.alike(row, len(members)))[0]
                for executor, members, row in additions
            ]
            for call in (*calls, *launches):
                call()

        return found, launch

    def sparse(self, weight: Any, saved: RowSparse, what: str) -> SparseSum:
        view = look(weight, "weight")
        check_shape(saved, view.shadow, what)
        with np.errstate(all="ignore"):
            rows, values = saved.rows.astype(np.int64), saved.values.astype(view.shadow.dtype)
        block = self._block(view, saved.shape, len(rows))
        for memory, content in ((block.rows, rows), (block.values, values)):
            block.gpu.assign(memory.address, np.ascontiguousarray(content))
        self._flag(view.device)
        return SparseSum(block, len(rows))

    def out_of_range_rows(self) -> bool:
        words = [np.frombuffer(memory.read(8), np.float64) for memory in self._flags.values()]
        return bool(np.any(words))

    def _label(self, members: Sequence[int]) -> Callable[[int], str]:
        return lambda k: f"parameter {self.names[members[k]]!r}"

    # ---------------------------------------------------------------- sparse gradients

    def _join(self, t: int, total: Any, grad: Any, weight: Any, calls: list[Callable[[], None]]) -> Any:
        """Return a sum with one more gradient, which is sparse; append what makes it to `calls`."""
        view = look(weight, "weight")
        given = touched_rows(grad, view, f"gradient of parameter {self.names[t]!r}")
        before = total.count if isinstance(total, SparseSum) else 0
        count = given.units if given.columns is None else min(given.units, given.entries)
        capturing = _capturing(weight, view.device)
        old = total.block if before else self._blocks.get(t)
        block, launches = old, []
        if block is None or block.room < before + count:
            if capturing:
                raise RuntimeError(UNPREPARED)
            block = self._block(view, grad.shape, max(before + count, 2 * block.room if block else BLOCK))
            launches = [block.moved_from(total.block, before)] if before else []
        launches += block.collecting(given, before, count, self._flag(view.device))
        calls.append(_launching(launches, weight, block.gpu, given))
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

    def _flag(self, number: int) -> int:
        """The address of a device's word."""
        if number not in self._flags:
            self._flags[number] = kernels().driver.device(number).memory(8)
        return int(self._flags[number].address)

    def _spreading(self, parts: SparseSum, weight: Any, total: Any, every: bool) -> Callable[[], None]:
        """Make the call that adds parts to a dense sum or, with `every`, lets that begin with them."""
        block, place_of_sum = parts.block, place(look(total, "sum").shadow)
        if _capturing(weight, block.gpu.number):
            if not block.can_sort(parts.count):
                raise RuntimeError(UNPREPARED)
            self._kept.append(block)
        launches = block.spreading(parts.count, place_of_sum, every, self._flag(block.gpu.number))
        return _launching(launches, weight, block.gpu)


def _capturing(weight: Any, number: int) -> bool:
    stream = current_stream(weight, number)
    return bool(kernels().driver.device(number).capturing(stream))


def _launching(
    launches: Sequence[Any], weight: Any, gpu: Any, given: DeviceTouchedRows | None = None
) -> Callable[[], None]:
    """Make the call that launches kernels on a weight's stream, after the streams that make gradients."""
    stream = current_stream(weight, gpu.number)
    others = {view.stream for view in given.views if view.stream} - {stream} if given else set()

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
        self.width, self._code = math.prod(shape[1:]), code_of(dtype)
        self.rows, self.values = gpu.memory(8 * room), gpu.memory(dtype.itemsize * room * self.width)
        self._keys = Scratch(gpu)

    def moved_from(self, other: Block, count: int) -> Any:
        """The launch that takes over the first parts of another one."""
        given = (other.values.address, other.rows.address, 0, count, count)
        return self._collect(TouchedForm("rows", self._code, "i64"), given, 0, 0)

    def collecting(self, given: DeviceTouchedRows, at: int, count: int, flag: int) -> list[Any]:
        """The launches that put a gradient behind the parts that are there, to have so many places."""
        values, indices, columns, _, _, entries, *_ = given.head(self.shape[0], 0, 0, 0)
        if given.columns is None:
            form = TouchedForm("rows", given.form.grad, f"i{8 * given.indices.shadow.itemsize}")
            return [self._collect(form, (values, indices, 0, count, count), at, flag)]
        vacate = launch_over(
            self.gpu, kernels().loops.vacate(), count, (self.rows.address + 8 * at, count), None
        )
        csr = values, indices, columns, self.shape[0], entries
        return [vacate, self._collect(given.form, csr, at, flag)]

    def _collect(self, form: TouchedForm, given: tuple[int, ...], at: int, flag: int) -> Any:
        by_warps = True if form.kind == "csr" else None
        units = given[3] if by_warps else given[3] * max(self.width, 1)
        first = self.rows.address + 8 * at, self.values.address + self.dtype.itemsize * at * self.width
        kernel = kernels().loops.collect(self._code, form)
        return launch_over(self.gpu, kernel, units, (*given, self.width, *first, flag), by_warps)

    def can_sort(self, count: int) -> bool:
        """Tell whether there is memory to sort so many keys."""
        return self._keys.has(2 * count)

    def spreading(self, count: int, total: int, every: bool, flag: int) -> list[Any]:
        """The launches that add its first parts to a dense sum at some address."""
        height, place_of_keys = self.shape[0], self._keys.resize(2 * count)
        launches, keys = sorting(self.gpu, "i64", self.rows.address, count, height, place_of_keys)
        given = (keys, self.values.address, count, height, self.width, total, flag)
        units = height + 1 if every else count
        return [
            *launches,
            launch_over(self.gpu, kernels().loops.spread(self._code, every), units, given, True),
        ]


class SparseSum(RowSparse):
    """The first parts of a block, as a gradient."""

    def __init__(self, block: Block, count: int) -> None:
        self.block, self.count = block, count
        rows = Held(block.rows, (count,), np.dtype(np.int64))
        super().__init__(rows, Held(block.values, (count, *block.shape[1:]), block.dtype), block.shape)

    def to_host(self) -> RowSparse:
        """The parts that are some row's, with NumPy arrays; waits for the device."""
        rows, values = to_host(self.rows, "rows"), to_host(self.values, "values")
        inside = (rows >= 0) & (rows < self.shape[0])
        return RowSparse(rows[inside], values[inside], self.shape)


class Held:
    """Memory of the package's own as a CUDA array."""

    def __init__(self, memory: Any, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.memory, self.dtype = memory, dtype
        data = (memory.address, False)
        self.__cuda_array_interface__ = {"version": 3, "shape": shape, "typestr": dtype.str, "data": data}
