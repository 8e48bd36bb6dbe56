"""`torch.optim` optimizers that run this package's kernels, in place, on torch's own tensors.

``from numba_opt.torch import RMSProp`` is a drop-in for ``torch.optim.RMSprop``: the same options,
schedulers, hooks and checkpoints. torch is an optional extra; nothing that this package imports by itself
needs it.

Parameters may be on the CPU, on an NVIDIA GPU or several, or some here and some there; gradients and states
are where their parameter is. On a GPU a step is one launch for each dtype, on torch's current stream, and
the host does not wait. (This has been proven without a GPU only.) Two things are different from the CPU:
rows of a sparse gradient that its parameter has not are left out, as the host does not look at them; and a
step cannot be captured in a CUDA graph, as one of `numba_opt.Trainer` can.
"""

from __future__ import annotations

from typing import Any

from .. import optimizers
from ..optimizer import Optimizer as OwnOptimizer
from .optimizer import Optimizer, class_of

__all__ = ["FTML", "NAG", "Adamax", "GroupAdaGrad", "RMSProp"]

FTML: type[Optimizer] = class_of(optimizers.FTML)
NAG: type[Optimizer] = class_of(optimizers.NAG)
Adamax: type[Optimizer] = class_of(optimizers.Adamax)
GroupAdaGrad: type[Optimizer] = class_of(optimizers.GroupAdaGrad)
RMSProp: type[Optimizer] = class_of(optimizers.RMSProp)


def __getattr__(name: str) -> Any:
    """The class of an optimizer that was registered elsewhere and has a torch form."""
    known = OwnOptimizer.opt_registry.get(name.lower())
    if known is None or known.__name__ != name or known.torch_form is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return class_of(known)  # type: ignore[arg-type]
