"""Arrays of other libraries, none of which is imported here: where they are, whether they have memory."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

DLPACK_CUDA = 2  # kDLCUDA


def loaded(module: str, name: str) -> Any:
    """Return a module's attribute, None unless it has been imported that far, perhaps by another thread."""
    return getattr(sys.modules.get(module), name, None)


def type_name(value: Any) -> str:
    """Return the name of an object's type, for errors."""
    return "None" if value is None else f"a {type(value).__module__}.{type(value).__qualname__}"


def on_cuda(value: Any) -> bool:
    """Tell whether an array is on a GPU."""
    if isinstance(value, np.ndarray):
        return False
    tensor = loaded("torch", "Tensor")
    if tensor is not None and isinstance(value, tensor):
        return bool(value.is_cuda)
    if hasattr(value, "__cuda_array_interface__"):
        return True
    return hasattr(value, "__dlpack_device__") and int(value.__dlpack_device__()[0]) == DLPACK_CUDA


def lack_of_memory(tensor: Any) -> str:
    """Return why the memory of torch's strided tensor cannot be read; an empty text if it can."""
    if tensor.numel() == 0 or str(tensor.layout) != "torch.strided":
        return ""
    reach = 1 + sum((n - 1) * stride for stride, n in extents(tensor, tensor.stride()))
    size = tensor.element_size()
    there = tensor.untyped_storage().nbytes() - tensor.storage_offset() * size
    if reach * size > there:
        return f"needs {reach * size} bytes of its storage, which has {max(there, 0)} for it"
    return "" if tensor.data_ptr() else "has no memory"


def extents(tensor: Any, strides: Sequence[int]) -> list[tuple[int, int]]:
    """Strides and lengths of the dimensions in which torch's tensor has more than one element."""
    if tensor.numel() == 0:
        return []
    return [(stride, n) for stride, n in zip(strides, tensor.shape, strict=True) if n > 1]
