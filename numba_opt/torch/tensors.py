"""Torch tensors as kernels take them: address, dtype and strides, and whether a kernel may have them.

The same border as `numba_opt.cpu.reader`, for tensors instead of NumPy arrays. A tensor that fills its memory
without gaps is taken as it lies, whatever the order of its dimensions, as long as its gradient and its
states lie in the same order; anything else is worked on in a copy that is written back.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.call import Scan
from ..core.foreign import extents, lack_of_memory, loaded
from ..core.storage import ABSENT, CODES, EXPECTED, STORAGES, gradients_for, pack, size_of
from ..cpu import ndarray
from ..cpu.arrays import check_apart, check_writable
from ..cpu.csr import check_numbers
from ..cpu.touched import TouchedRows, by_row
from ..cuda import arrays as cuda_arrays
from . import dlpack

CODE_OF = {getattr(torch, storage.name): storage.code for storage in STORAGES}


# -------------------------------------------------------------------- which tensors are taken


def check_parameter(param: Any, what: str, per_row: bool) -> Tensor:
    """The part of a parameter that is in this process, which a kernel may be given.

    Raises
    ------
    TypeError
        It is of a dtype, layout or class that no kernel takes.
    ValueError
        It is not in the memory of the CPU or of an NVIDIA GPU, or not a matrix where that is needed.
    CudaUnavailableError
        It is on a GPU, and what that takes is not installed.
    """
    tensor = local(param)
    if param.dtype not in CODE_OF:
        raise TypeError(f"{what} is {param.dtype}; expected {EXPECTED}")
    if tensor.device.type == "meta":
        raise ValueError(f"{what} is a meta tensor, which has no memory; expected one on the CPU or a GPU")
    if tensor.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{what} is on {tensor.device}; expected one on the CPU or an NVIDIA GPU")
    _check_kind(tensor, what)
    if tensor.is_cuda:
        cuda_arrays.kernels()
    if per_row:
        if tensor.ndim != 2:
            raise ValueError(f"{what} has shape {tuple(param.shape)}; expected 2 dimensions")
        if tensor is not param and tensor.shape[1] != param.shape[1]:
            raise ValueError(f"{what} is sharded across its rows; expected whole rows in each process")
    return tensor


def check_gradient(grad: Any, param: Any, what: str) -> Tensor:
    """The part of a gradient that is in this process, if it goes with its parameter."""
    if placements(grad) != placements(param):
        raise ValueError(f"{what} is placed otherwise than its parameter; expected the same placements")
    tensor, weight = local(grad), local(param)
    _check_beside(tensor, weight, tuple(weight.shape), what)
    _check_kind(tensor, what, torch.sparse_coo)
    if CODE_OF.get(tensor.dtype) not in gradients_for(CODE_OF[param.dtype]):
        raise TypeError(f"{what} is {tensor.dtype}; expected {param.dtype}, as its parameter")
    return tensor


def check_state(state: Any, weight: Tensor, shape: tuple[int, ...], what: str) -> Tensor:
    """The part of a state that is in this process, which a kernel may be given."""
    if not isinstance(state, Tensor):
        raise TypeError(f"{what} is {type(state).__name__}; expected a tensor")
    tensor = local(state)
    _check_beside(tensor, weight, shape, what)
    _check_kind(tensor, what)
    if tensor.dtype != weight.dtype:
        raise TypeError(f"{what} is {tensor.dtype}; expected {weight.dtype}, as its parameter")
    return tensor


def _check_beside(tensor: Tensor, weight: Tensor, shape: tuple[int, ...], what: str) -> None:
    """Refuse a tensor of another shape or on another device than it should be."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{what} has shape {tuple(tensor.shape)}; expected {shape}")
    if tensor.device != weight.device:
        raise ValueError(f"{what} is on {tensor.device}; expected {weight.device}, as its parameter")


def _check_kind(tensor: Any, what: str, *layouts: torch.layout) -> None:
    """Refuse a tensor of another layout than strided or these, or one that has no memory of its own."""
    expected = (torch.strided, *layouts)
    if tensor.layout not in expected:
        raise TypeError(f"{what} has layout {tensor.layout}; expected {' or '.join(map(str, expected))}")
    if not _is_ordinary(tensor):
        raise TypeError(f"{what} is {_name_of(tensor)}; expected an ordinary tensor")


def _is_ordinary(tensor: Tensor) -> bool:
    """Tell whether a tensor stands for itself, and not for others or for what is done to it."""
    return (
        type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
        and not tensor.is_nested
        and (tensor.layout != torch.strided or torch._C._has_storage(tensor))
    )


def _name_of(tensor: Tensor) -> str:
    """Return the name of a tensor that is not an ordinary one, for errors."""
    if tensor.is_nested:
        return "a nested tensor"
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"a {type(tensor).__name__}"
    return f"a {type(tensor).__name__} within torch.func, which has no memory"


def is_counter(step: Any) -> bool:
    """Tell whether updates can be counted in a tensor, as torch's optimizers do."""
    return (
        isinstance(step, Tensor)
        and _is_ordinary(step)
        and (step.dtype, step.layout) == (torch.float32, torch.strided)
        and step.is_cpu
        and step.numel() == 1
        and not (step.is_neg() or step._is_zerotensor())
    )


def local(tensor: Any) -> Any:
    """The tensor itself, or the shard of a distributed one that this process holds."""
    distributed = loaded("torch.distributed.tensor", "DTensor")
    if distributed is not None and isinstance(tensor, distributed):
        with torch.no_grad():
            return tensor.to_local()
    return tensor


def placements(tensor: Any) -> Any:
    """Return the placements of a distributed tensor over processes; None for any other."""
    return getattr(tensor, "placements", None)


# -------------------------------------------------------------------- how they lie


def _fills(tensor: Tensor) -> bool:
    """Tell whether a tensor's elements fill its memory without gaps or repetition, in whatever order."""
    expected = 1
    for stride, length in sorted(extents(tensor, tensor.stride())):
        if stride != expected:
            return False
        expected *= length
    return True


def in_order(weight: Tensor, by_row: bool) -> tuple[int, ...] | None:
    """The strides that a parameter's tensors must have: the weight's if it fills its memory, else None."""
    return weight.stride() if _fills(weight) and not by_row else None


def laid_out(tensor: Any, order: tuple[int, ...] | None) -> Any:
    """A tensor as it lies if it has these strides (None: rows after rows) and is aligned, else a copy."""
    if tensor is None:
        return None
    if order is None:
        order = (*(math.prod(tensor.shape[d + 1 :]) for d in range(tensor.ndim)),)
    alike = extents(tensor, tensor.stride()) == extents(tensor, order)
    as_it_lies = not (tensor.is_neg() or tensor._is_zerotensor())
    if alike and as_it_lies and tensor.data_ptr() % tensor.element_size() == 0:
        return tensor
    return tensor.new_empty_strided(tensor.shape, order).copy_(tensor.detach())


def scan_of(columns: Sequence[Sequence[Any]]) -> Scan:
    """Make the scan of gradients (or None), weights and states of which tables are made."""
    sizes = [math.prod(weight.shape) for weight in columns[1]]
    heights = [weight.shape[0] if weight.ndim else 1 for weight in columns[1]]
    widths = [size // height if height else 1 for size, height in zip(sizes, heights, strict=True)]
    nothing = [0] * len(sizes)
    at = [[0 if x is None else x.data_ptr() for x in column] for column in columns]
    numbers = [[ABSENT if x is None else CODES.index(CODE_OF[x.dtype]) for x in column] for column in columns]
    return Scan(
        addresses=np.array([*at, nothing, widths, nothing], np.uint64).T.copy(),
        bytes=np.array([[0 if x is None else _bytes(x) for x in column] for column in columns]).T.copy(),
        sizes=np.array(sizes, np.int64),
        storages=np.array([pack(own) for own in zip(*numbers, strict=True)], np.int64),
    )


def _bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor, by its shape and dtype."""
    return math.prod(tensor.shape) * size_of(CODE_OF[tensor.dtype])


def nbytes(tensor: Any) -> int:
    """Return the bytes of a tensor, whatever its class makes of its shape and dtype; 0 for None."""
    return 0 if tensor is None else int(_own(tensor).nbytes)


def _own(tensor: Tensor) -> Tensor:
    """The tensor that an object of some class is, in which nothing of the class is left."""
    with torch._C.DisableTorchFunctionSubclass():
        return Tensor.detach(tensor)


def check_memory(
    columns: Sequence[Sequence[Tensor | None]],
    names: Sequence[str],
    labels: Sequence[str],
    read: Sequence[tuple[int, np.ndarray]],
) -> None:
    """Refuse tensors that share memory, with another one, an array that is `read`, or within themselves."""
    arrays: list[list[Any]] = [
        [None if x is None else memory(x.resolve_neg()) for x in column] for column in columns
    ]
    for name, column in zip(names[1:], arrays[1:], strict=True):
        for t, array in enumerate(column):
            check_writable(array, f"{name} of {labels[t]}")
    check_apart(arrays, names, labels.__getitem__, read)


def check_storage(tensor: Tensor, what: str) -> None:
    """Refuse a tensor that has no memory, or whose storage has been shrunk or freed."""
    if lack := lack_of_memory(tensor):
        raise ValueError(f"{what} {lack}")


def memory(tensor: Tensor) -> np.ndarray:
    """A tensor's memory as a NumPy array, bfloat16 as integers; a GPU's must not be looked into."""
    tensor = tensor.detach()
    if tensor.is_cuda:
        size = tensor.element_size()
        kind = f"<i{size}" if tensor.dtype in (torch.bfloat16, torch.int64) else f"<f{size}"
        strides = [size * stride for stride in tensor.stride()]
        return cuda_arrays.stand_in(tensor.data_ptr(), tuple(tensor.shape), kind, strides)
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def write_back(tensor: Tensor, copy: Tensor) -> partial[Any]:
    """Return the call that brings a copy back to its tensor: on the CPU without any code in Python.

    (torch's own assignment asks modes and subclasses, which are written in Python.)
    """
    tensor = tensor.detach()
    if tensor.is_cuda or tensor.is_neg():
        return partial(operator.setitem, tensor, ..., copy)
    return partial(operator.setitem, memory(tensor), ..., memory(copy))


def touched_rows(grad: Tensor, what: str) -> TouchedRows:
    """Return the rows that a sparse gradient touches; every number in it is checked."""
    grad = _own(grad)
    indices, values = checked_parts(grad, what)
    rows = indices[0]
    if grad.sparse_dim() > 1:  # rows are made of single numbers, or of parts of rows
        for d, numbers in enumerate(indices.numpy()):
            check_numbers(numbers, f"indices of {what} in dimension {d}", grad.shape[d])
        rows, places = torch.unique(rows, return_inverse=True)
        real = torch.float64 if values.dtype == torch.float64 else torch.float32
        sums = torch.zeros((len(rows), *grad.shape[1:]), dtype=real, device="cpu")
        values = sums.index_put_((places, *indices[1:]), values.to(real), accumulate=True)
    block = memory(laid_out(values, None))
    numbers = np.array(rows.numpy())  # their own memory: what is checked is what the kernel gets
    return by_row(block, CODE_OF[values.dtype], numbers, grad.shape[0], what)


def checked_parts(grad: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """The indices and values of a sparse gradient, which can be changed apart from it."""
    if grad.sparse_dim() == 0:
        raise ValueError(f"{what} has no sparse dimension; expected at least one")
    indices, values = grad._indices().detach(), grad._values().detach()
    count = indices.shape[-1] if indices.ndim else 0
    expected = {
        "indices": (indices, (grad.sparse_dim(), count), torch.int64),
        "values": (values, (count, *grad.shape[grad.sparse_dim() :]), grad.dtype),
    }
    for name, (tensor, shape, dtype) in expected.items():
        _check_beside(tensor, grad, shape, f"{name} of {what}")
        _check_kind(tensor, f"{name} of {what}")
        if tensor.dtype != dtype:
            raise TypeError(f"{name} of {what} are {tensor.dtype}; expected {dtype}")
        if not tensor._is_zerotensor():
            check_storage(tensor, f"{name} of {what}")
    return indices, values


# -------------------------------------------------------------------- whether anything has changed


def look(columns: Sequence[Sequence[Any]], ids: np.ndarray, seen: np.ndarray) -> int:
    """Tell how tensors differ from what has been seen of them, as `numba_opt.torch.dlpack.look` does.

    `ids` are those of the tensors; a gradient that comes another way is None. `unseen` makes `seen`.
    """
    functions = _functions()
    if functions is not None:
        return _ask(ids, functions, seen)
    before = seen.copy()
    try:
        for c, column in enumerate(columns):
            for t, tensor in enumerate(column):
                if tensor is not None:
                    seen[c, t] = _describe(tensor, (seen.shape[2] - dlpack.HEAD) // 2)
    except (RuntimeError, ValueError):  # no memory; no room
        return ndarray.UNSUPPORTED
    if (before[..., 2:] != seen[..., 2:]).any():
        return ndarray.CHANGED
    return ndarray.MOVED if (before != seen).any() else ndarray.SAME


def unseen(ids: np.ndarray, ndim: int) -> np.ndarray:
    """Make room for what `look` sees of tensors with up to so many dimensions."""
    return np.zeros((*ids.shape, dlpack.HEAD + 2 * ndim), np.int64)


def _ask(ids: np.ndarray, functions: np.ndarray, seen: np.ndarray) -> int:
    return int(dlpack.look(ids, functions, ndarray.NONE, seen, np.empty(len(dlpack.WORDS), np.int64)))


def _describe(tensor: Tensor, ndim: int) -> list[int]:
    """Describe a tensor as kernels rely on it, by its own word: torch before 2.10 has no other way."""
    tensor = _own(tensor)
    rest = (0,) * (ndim - tensor.ndim)
    kind = id(tensor.dtype) * 64 + tensor.ndim
    room = tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size()
    head = [tensor.data_ptr(), room, hash(tensor.device), kind, tensor.is_neg()]
    return [*head, *tensor.shape, *rest, *tensor.stride(), *rest]


@functools.cache
def _functions() -> np.ndarray | None:
    """Return the addresses that `dlpack.look` needs, if it says what some tensors say themselves."""
    blank = partial(torch.zeros, device="cpu")
    some = [blank(5, 3, dtype=dtype)[1:].t() for dtype in CODE_OF]
    some += [torch._neg_view(blank(5, 3)).t(), blank(40)[3:18].view(3, 5)]
    library = dlpack.library(torch._C.__file__)
    found = [dlpack.exchange_function(Tensor)]
    found += [dlpack.address_of(library, f"aoti_torch_get_storage_{what}") for what in ("size", "offset")]
    if not all(found) or not all(x._cdata == dlpack.words(id(x) + ndarray.HEADER, 1)[0] for x in some):
        return None
    keys = [torch._C._dispatch_keys(x).raw_repr() for x in some]
    places = (8 * k for k in range(32))  # the keys are the last thing in the object: nothing beyond is read
    place = next((at for at in places if [dlpack.words(x._cdata + at, 1)[0] for x in some] == keys), None)
    if place is None:
        return None
    functions = np.array([*found, place], np.uint64)
    ids = ndarray.objects([some])
    seen = unseen(ids, 3)
    if _ask(ids, functions, seen) != ndarray.CHANGED:
        return None
    said = [_describe(x, 3) for x in some]
    told_apart = len(set(seen[0, : len(CODE_OF), 3].tolist())) == len(CODE_OF)
    alike = seen[0][:, [0, 1, *range(5, 11)]].tolist() == [[*row[:2], *row[5:]] for row in said]
    return functions if told_apart and alike else None
