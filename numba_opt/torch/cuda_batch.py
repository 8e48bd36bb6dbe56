"""Parameters on GPUs: batches of `numba_opt.torch.batch` with tables and launches of `numba_opt.cuda`.

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

import torch
from torch import Tensor

from ..core.executor import Executor
from ..core.step_rows import StepRows
from ..cpu import threads
from ..cpu.row_sparse import RowSparse
from ..cuda.arrays import View, current_stream, kernels
from ..cuda.call import DeviceCall
from ..cuda.executor import CudaExecutor
from ..cuda.touched import touched_rows
from .batch import Batch, Formula
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

    def _executor(self) -> Executor:
        self.gpu = kernels().driver.device(local(self.params[0]).device.index)
        return CudaExecutor(self.key.rule)

    def _read_touched(self, grads: Sequence[Any]) -> None:
        self.touched = {}
        self.blocks = []  # alive until the step has been made
        for t in self.sparse:
            what = f"gradient of {self.labels[t]}"
            self.blocks.append(block_of(grads[t], what))
            weight = View(memory(local(self.params[t])), self.gpu.number, None)
            self.touched[t] = touched_rows(self.blocks[-1], weight, what)

    def _call(self) -> DeviceCall:
        weights = list(map(local, self.params)) if self.wrapped else self.params
        call = super()._call()._replace(arrays=((), weights))
        return DeviceCall(self.gpu.number, list(range(len(weights))), call)

    def calls(
        self, formulas: Sequence[Formula], rates: Sequence[float]
    ) -> tuple[list[threads.Job], list[partial[Any]]]:
        rows, stream = self._rows(formulas, rates), stream_for(local(self.params[0]))
        return [], [partial(self._launch, rows, stream), *self._after()]

    def _launch(self, rows: StepRows, stream: int) -> None:
        """Launch the kernels, between what torch's current stream has been given and what it will be."""
        assert isinstance(self.executor, CudaExecutor)
        current = int(torch.cuda.current_stream(self.gpu.number).cuda_stream)
        if stream != current:
            self.gpu.after(stream, current)
        launch, _ = self.executor.launching(rows)
        launch()
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
