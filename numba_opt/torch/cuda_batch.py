"""Parameters on GPUs: batches of `numba_opt.torch.binding` with tables and launches of `numba_opt.cuda`.

What a step looks at is the same as on the CPU. Kernels go to torch's current stream, or to the one that
`numba_opt.cuda.on` names, and nothing waits for the device. (The exception are weights and states that
leave gaps in their memory: they are worked on in copies, and tables are made anew at each step, whose
memory the driver takes back once it is done with it.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import device
from ..cpu import threads
from ..cpu.sparse import RowSparse
from ..cuda import execution as cuda_execution
from ..cuda import sparse as cuda_sparse
from ..cuda.arrays import View, current_stream, kernels
from .binding import Batch, Formula, Kind, Member
from .tensors import checked_parts, laid_out, local, memory


def stream_for(weight: Tensor) -> int:
    """The stream that a step of a parameter goes to.

    Raises
    ------
    RuntimeError
        What goes there is captured in a graph, in which counts and learning rates would stay as they are.
    """
    number = weight.device.index
    stream = current_stream(weight, number)
    if kernels().driver.device(number).capturing(stream):
        raise RuntimeError(
            "steps of numba_opt.torch cannot be captured in a CUDA graph; those of numba_opt.Trainer can"
        )
    return stream


class CudaBatch(Batch):
    """Parameters on one GPU that one rule updates, each of them once: one launch for each dtype."""

    compiled = False

    def __init__(self, kind: Kind, members: Sequence[Member], turn: int) -> None:
        self.gpu = kernels().driver.device(local(members[0].param).device.index)
        self.part = cuda_execution.Part(kind.rule, self.gpu, list(range(len(members))))
        super().__init__(kind, members, turn)

    def _take_parts(self, grads: Sequence[Any]) -> None:
        self.parts = {}
        self.blocks = []  # alive until the step has been made
        for t in self.sparse:
            what = f"gradient of {self.labels[t]}"
            self.blocks.append(block_of(grads[t], what))
            weight = View(memory(local(self.params[t])), self.gpu.number, None)
            self.parts[t] = cuda_sparse.parts_of(self.blocks[-1], weight, what)

    def _apart(self) -> dict[int, list[np.ndarray]]:
        return {t: [view.shadow for view in part.views] for t, part in self.parts.items()}

    def _prepare(self) -> None:
        weights = list(map(local, self.params)) if self.wrapped else self.params
        bound = device.Bound(self.tables, self.found, ((), weights), [])
        found = cuda_execution.Found(self.gpu.number, self.part.members, bound, self.parts, set())
        self.part.hold(found, weights[0])

    def _move(self) -> bool:
        if not super()._move():
            return False
        self._prepare()
        return True

    def calls(
        self, formulas: Sequence[Formula], rates: Sequence[float]
    ) -> tuple[list[threads.Job], list[partial[Any]]]:
        hyper, which = self._hyper(formulas, rates)
        stream = stream_for(local(self.params[0]))
        return [], [partial(self._launch, np.array(hyper), which.tolist(), stream), *self._after()]

    def _launch(self, rows: np.ndarray, which: list[int], stream: int) -> None:
        """Launch the kernels, between what torch's current stream has been given and what it will be."""
        current = int(torch.cuda.current_stream(self.gpu.number).cuda_stream)
        if stream != current:
            self.gpu.after(stream, current)
        with self.gpu.current():
            self.part.write(rows, which, None, stream)
            self.part.launch(None, stream)
        if stream != current:
            self.gpu.after(current, stream)

    def let_go(self) -> None:
        super().let_go()
        self.blocks = []


def block_of(grad: Tensor, what: str) -> RowSparse:
    """The rows that a sparse gradient touches. The numbers in it stay unseen: the host would have to wait."""
    if grad.sparse_dim() != 1:
        raise ValueError(f"{what} has {grad.sparse_dim()} sparse dimensions; expected 1, as it is on a GPU")
    if grad.dtype == torch.bfloat16:
        with contextlib.suppress(ImportError):  # if it is missing, `RowSparse` says so
            import ml_dtypes  # noqa: F401
    indices, values = checked_parts(grad, what)
    rows, values = (laid_out(x, None) for x in (indices[0], values))
    return RowSparse(rows, values, tuple(grad.shape), distinct=grad.is_coalesced())
