"""What a torch tensor is: its address, dtype and strides, and whether a kernel may have it.

The same border as `numba_opt.device`, for tensors instead of NumPy arrays. A tensor that fills its memory
without gaps is taken as it lies, whatever the order of its dimensions, as long as its gradient and its
states lie in the same order; anything else is worked on in a copy that is written back.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter, is_
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import device, execution, nag, sparse
from .kernels import ndarray, threads

CODES = {torch.float32: "f4", torch.float64: "f8", torch.float16: "f2", torch.bfloat16: "b2"}

Label = Callable[[int], str]


def check_parameter(param: Any, what: str, per_row: bool) -> Tensor:
    """The part of a parameter that is in this process, which a kernel may be given.

    Raises
    ------
    TypeError
        It is of a dtype, layout or class that no kernel takes.
    ValueError
        It is not in this machine's memory, or not a matrix where that is needed.
    """
    tensor = local(param)
    if param.dtype not in CODES:
        raise TypeError(f"{what} is {param.dtype}; expected float32, float64, float16 or bfloat16")
    # Where a device is decided: kernels for others would be chosen here.
    if tensor.device.type == "meta":
        raise ValueError(f"{what} is a meta tensor, which has no memory; expected one on the CPU")
    if tensor.device.type != "cpu":
        raise ValueError(f"{what} is on {tensor.device}; this version updates parameters on the CPU")
    if tensor.layout != torch.strided:
        raise TypeError(f"{what} has layout {tensor.layout}; expected torch.strided")
    _check_class(tensor, what)
    if tensor.is_neg():
        raise TypeError(f"{what} is a view with its sign flipped; expected one that holds its numbers")
    if per_row:
        if tensor.ndim != 2:
            raise ValueError(f"{what} has shape {tuple(param.shape)}; expected 2 dimensions")
        if tensor is not param and tensor.shape[1] != param.shape[1]:
            raise ValueError(f"{what} is sharded across its rows; expected whole rows in each process")
    return tensor


def check_gradient(grad: Any, param: Any, what: str) -> None:
    """Refuse a gradient that does not go with its parameter."""
    if placements(grad) != placements(param):
        raise ValueError(f"{what} is placed otherwise than its parameter; expected the same placements")
    tensor, shape = local(grad), tuple(local(param).shape)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{what} has shape {tuple(tensor.shape)}; expected {shape}")
    if tensor.device.type != "cpu":
        raise ValueError(f"{what} is on {tensor.device}; expected the CPU, as its parameter")
    if tensor.layout not in (torch.strided, torch.sparse_coo):
        raise TypeError(f"{what} has layout {tensor.layout}; expected torch.strided or torch.sparse_coo")
    _check_class(tensor, what)
    if CODES.get(tensor.dtype) not in device.gradients_for(CODES[param.dtype]):
        raise TypeError(f"{what} is {tensor.dtype}; expected {param.dtype}, as its parameter")


def check_state(state: Any, weight: Tensor, shape: tuple[int, ...], what: str) -> Tensor:
    """The part of a state that is in this process, which a kernel may be given."""
    if not isinstance(state, Tensor):
        raise TypeError(f"{what} is {type(state).__name__}; expected a tensor")
    tensor = local(state)
    _check_class(tensor, what)
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.is_neg():
        raise ValueError(f"{what} is {tensor.layout} on {tensor.device}; expected torch.strided on the CPU")
    if tensor.dtype != weight.dtype:
        raise TypeError(f"{what} is {tensor.dtype}; expected {weight.dtype}, as its parameter")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{what} has shape {tuple(tensor.shape)}; expected {shape}")
    return tensor


def local(tensor: Any) -> Any:
    """The tensor itself, or the shard of a distributed one that this process holds."""
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and isinstance(tensor, distributed.DTensor):
        with torch.no_grad():
            return tensor.to_local()
    return tensor


def placements(tensor: Any) -> Any:
    """How a distributed tensor is spread over processes; None for any other."""
    return getattr(tensor, "placements", None)


def _check_class(tensor: Any, what: str) -> None:
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:  # it has no memory of its own
        raise TypeError(f"{what} is a {type(tensor).__name__}; expected an ordinary tensor")


class Reading(NamedTuple):
    """All that a kernel relies on, of the tensors in a column.

    Of a tensor that fills its memory, strides and the number of elements say the same as a shape, which
    takes longer to ask for.
    """

    addresses: list[int]
    types: list[type]
    dtypes: list[torch.dtype]
    sizes: list[int]
    strides: list[tuple[int, ...]]


DTYPE, IS_CPU = attrgetter("dtype"), attrgetter("is_cpu")


def read(tensors: Sequence[Tensor]) -> Reading:
    """Ask tensors where they lie and how: 0.4 us for each."""
    return Reading(
        list(map(Tensor.data_ptr, tensors)),
        list(map(type, tensors)),
        list(map(DTYPE, tensors)),
        list(map(Tensor.numel, tensors)),
        list(map(Tensor.stride, tensors)),
    )


class Batch:
    """Parameters that one rule updates, as tables that are kept from step to step.

    Parameters and gradients have passed `check_parameter` and `check_gradient`; states are checked here.
    It holds weights and states, and no gradients once a step has been made. Each step asks every tensor
    anew where it lies; only where that differs from last time in more than an address is there more to do.
    """

    def __init__(
        self,
        rule: execution.Rule,
        names: Sequence[str],
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[Sequence[Any]],
        label: Label,
    ) -> None:
        self.rule, self.label = rule, label
        self.params = params
        weights = list(map(local, params))
        columns = [weights]
        for name, column in zip(names, states, strict=True):
            columns.append([])
            for t, state in enumerate(column):
                shape = (weights[t].shape[0], 1) if rule.per_row else tuple(weights[t].shape)
                what = f"state {name!r} of {label(t)}"
                columns[-1].append(check_state(state, weights[t], shape, what))
        grads = list(map(local, grads))
        self.sparse = [t for t, grad in enumerate(grads) if grad.layout != torch.strided]
        self.dense = [t for t, grad in enumerate(grads) if grad.layout == torch.strided]
        self.weights = weights
        self.parts = self._parts(grads)
        _check_memory([grads, *columns], self.parts, names, label)
        self.arrays: Sequence[Any] = list(
            zip(*(self._as_they_lie(t, grads[t], columns) for t in range(len(grads))), strict=True)
        )
        self.replaced = [
            (column[t].detach(), work[t])
            for column, work in zip(columns, self.arrays[1:], strict=True)
            for t in range(len(grads))
            if work[t] is not column[t]
        ]
        self.wrapped = any(weight is not param for weight, param in zip(weights, params, strict=True))
        self.seen = [read(column) for column in columns]
        self.seen_grads = read([grads[t] for t in self.dense])
        self.kept = not self.replaced and all(self.arrays[0][t] is grads[t] for t in self.dense)
        self.found = self._survey()
        self.tables = device.tables(self.found, rule.n_state)

    def refresh(self, grads: Sequence[Any], states: Sequence[Sequence[Any]]) -> bool:
        """Bring the tables to where everything is now; False if any tensor needs a closer look."""
        if not self.kept:
            return False
        weights: Sequence[Any] = self.params
        if self.wrapped:
            if list(map(placements, grads)) != list(map(placements, self.params)):
                return False
            grads, weights, *states = [list(map(local, column)) for column in (grads, self.params, *states)]
        try:
            if [read(column) for column in (weights, *states)] != self.seen:
                return False
            dense = [grads[t] for t in self.dense] if self.sparse else grads
            now = read(dense)
            if now[1:] != self.seen_grads[1:]:
                return False
        except RuntimeError:  # a tensor without memory
            return False
        if not all(grads[t].layout == torch.sparse_coo for t in self.sparse):
            return False
        self.weights = weights  # type: ignore[assignment]
        self.parts = self._parts(grads)
        if now.addresses != self.seen_grads.addresses or self.sparse:
            if not all(map(IS_CPU, dense)) or any(map(Tensor.is_neg, dense)):
                return False
            self.found.addresses[self.dense, 0] = now.addresses
            if not self._sound():
                return False
            for table in self.tables if len(self.tables) > 1 or self.sparse else ():
                table.addresses[:, 0] = self.found.addresses[table.members, 0]
            self.seen_grads = now
        self.arrays = grads  # alive until the step has been made
        return True

    def jobs(self, hyper: Any, which: Any) -> list[threads.Job]:
        """The kernel calls of a step."""
        bound = device.Bound(self.tables, self.found, (), [])
        return execution.all_jobs(self.rule, execution.Work(bound, self.parts, {}, {}), hyper, which)

    def write_back(self) -> list[Any]:
        """What brings the tensors that were worked on in others' place to where they belong."""
        return device.Bound([], self.found, (), self.replaced).write_back()

    def let_go(self) -> None:
        """Forget the gradients."""
        self.arrays, self.parts, self.replaced = [], {}, []

    def _parts(self, grads: Sequence[Tensor]) -> dict[int, sparse.Parts]:
        return {t: parts_of(grads[t], self.weights[t], f"gradient of {self.label(t)}") for t in self.sparse}

    def _as_they_lie(self, t: int, grad: Tensor, columns: Sequence[Sequence[Tensor]]) -> list[Any]:
        """A tensor's gradient, weight and states as a kernel can take them, copied where it cannot."""
        weight = columns[0][t]
        by_row = self.rule.per_row or t in self.sparse
        strides = weight.stride() if fills(weight) and not by_row else None
        group = [None if t in self.sparse else grad, *(column[t] for column in columns)]
        return [None if tensor is None else laid_out(tensor, strides) for tensor in group]

    def _survey(self) -> ndarray.Survey:
        """Where all the tensors of the work are, as tables are made of it."""
        rows, held, codes = [], [], []
        for group in zip(*self.arrays, strict=True):
            weight = group[1]
            height = weight.shape[0] if weight.ndim else 1
            rows.append([0 if x is None else x.data_ptr() for x in group])
            rows[-1] += [weight.numel() // height if height else 1, 0]
            held.append([0 if x is None else x.numel() * x.element_size() for x in group])
            codes.append(
                device.pack(
                    [ndarray.ABSENT if x is None else ndarray.CODES.index(CODES[x.dtype]) for x in group]
                )
            )
        sizes = [weight.numel() for weight in self.arrays[1]]
        return ndarray.Survey(
            np.array(rows, np.uint64), np.array(held), np.array(sizes, np.int64), np.array(codes, np.int64)
        )

    def _sound(self) -> bool:
        """Whether gradients are where numbers can be, and no tensor that is written overlaps another."""
        found = self.found
        at, held = found.addresses[:, 0], found.bytes[:, 0]
        sizes = held // np.maximum(found.sizes, 1)
        if ((held > 0) & ((at == 0) | (at % np.maximum(sizes, 1).astype(np.uint64) != 0))).any():
            return False
        parts = [array for part in self.parts.values() for array in part.arrays()]
        return not ndarray.overlapping(found, parts)


ONE = torch.tensor(1.0, dtype=torch.float32, device="cpu")

COUNT = execution.Rule(nag.sgd, 0, False)  # weight - lr * grad


class Counters:
    """How many updates parameters have had: a float32 tensor for each, as torch's optimizers have it.

    They count in one more kernel call, as weights that take a step of -1 along a gradient of 1. (torch takes
    0.6 us for each tensor even in ``_foreach_add_``, and this a hundredth of it.)
    """

    def __init__(self, steps: Sequence[Tensor]) -> None:
        self.steps = steps
        self.addresses = list(map(Tensor.data_ptr, steps))
        self.counts: list[float] = []
        table = np.array([[ONE.data_ptr(), address, 1, 0] for address in self.addresses], np.uint64)
        offsets = np.arange(len(steps) + 1)
        members = np.arange(len(steps))
        self.launches = execution.launches(COUNT, [device.Table("f4 f4", members, table, offsets)])

    @staticmethod
    def fit(step: Any) -> bool:
        """Whether a tensor can be counted in."""
        plain = isinstance(step, Tensor) and type(step).__torch_dispatch__ is Tensor.__torch_dispatch__
        return plain and step.dtype == torch.float32 and step.is_cpu and step.numel() == 1

    def refresh(self, steps: Sequence[Any]) -> bool:
        """Read the counts; False if these are not the tensors that they were."""
        if not all(map(is_, steps, self.steps)):
            return False
        if list(map(Tensor.data_ptr, steps)) != self.addresses or set(map(DTYPE, steps)) != {torch.float32}:
            return False
        self.counts = list(map(Tensor.item, steps))
        return True

    def jobs(self) -> list[threads.Job]:
        """The kernel call that counts an update of each."""
        return execution.dense_jobs(self.launches, [(1.0, math.inf, 0.0, -1.0)])


def fills(tensor: Tensor) -> bool:
    """Whether a tensor's elements fill its memory without gaps or repetition, in whatever order."""
    expected = 1
    for stride, length in sorted(_strides(tensor, tensor.stride())):
        if stride != expected:
            return False
        expected *= length
    return True


def _strides(tensor: Tensor, strides: Sequence[int]) -> list[tuple[int, int]]:
    """Strides and lengths of the dimensions in which a tensor has more than one element."""
    if tensor.numel() == 0:
        return []
    return [(stride, n) for stride, n in zip(strides, tensor.shape, strict=True) if n > 1]


def laid_out(tensor: Tensor, strides: tuple[int, ...] | None) -> Tensor:
    """A tensor as it lies if it has these strides (None: rows after rows) and is aligned, else a copy."""
    if strides is None:
        strides = (*(math.prod(tensor.shape[d + 1 :]) for d in range(tensor.ndim)),)
    alike = _strides(tensor, tensor.stride()) == _strides(tensor, strides)
    if alike and tensor.data_ptr() % tensor.element_size() == 0 and not tensor.is_neg():
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype).copy_(tensor.detach())


def parts_of(grad: Tensor, weight: Tensor, what: str) -> sparse.Parts:
    """What a sparse gradient touches; every number in it is checked."""
    indices, values = grad._indices().detach(), grad._values().detach()
    if tuple(grad.shape) != tuple(weight.shape):
        raise ValueError(f"{what} has shape {tuple(grad.shape)}; expected {tuple(weight.shape)}")
    if grad.sparse_dim() == 0:
        raise ValueError(f"{what} has no sparse dimension; expected at least one")
    rows = indices[0]
    if grad.sparse_dim() > 1:
        for d, numbers in enumerate(indices.numpy()):
            sparse.check_numbers(numbers, f"indices of {what} in dimension {d}", grad.shape[d])
        rows, places = torch.unique(rows, return_inverse=True)
        real = torch.float64 if values.dtype == torch.float64 else torch.float32
        sums = torch.zeros((len(rows), *grad.shape[1:]), dtype=real)
        values = sums.index_put_((places, *indices[1:]), values.to(real), accumulate=True)
    if values.dtype not in CODES:
        raise TypeError(f"{what} is {values.dtype}; expected {weight.dtype}, as its parameter")
    block = memory(laid_out(values, None))
    return sparse.by_row(block, CODES[values.dtype], rows.numpy(), grad.shape[0], what)


def memory(tensor: Tensor) -> np.ndarray:
    """A tensor's memory as a NumPy array, bfloat16 as integers."""
    tensor = tensor.detach()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _check_memory(
    columns: Sequence[Sequence[Tensor]],
    parts: Mapping[int, sparse.Parts],
    states: Sequence[str],
    label: Label,
) -> None:
    """Refuse tensors that share memory, with another one or within themselves."""
    names = ["gradient", "weight", *(f"state {name!r}" for name in states)]
    arrays: list[list[Any]] = [
        [None if c == 0 and t in parts else memory(x.resolve_neg()) for t, x in enumerate(column)]
        for c, column in enumerate(columns)
    ]
    for name, column in zip(names[1:], arrays[1:], strict=True):
        for t, array in enumerate(column):
            device.check_writable(array, f"{name} of {label(t)}")
    device.check_apart(arrays, names, label, {t: part.arrays() for t, part in parts.items()})
