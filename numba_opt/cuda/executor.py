"""The executor of NVIDIA GPUs: calls become launches of kernels, of which none waits for the device.

Everything a step needs is prepared when its arrays are first seen: tables in the device's memory, and
launches with their arguments. A step of arrays that it has seen before costs a look at each of them and two
or three launches. Coefficients are in a buffer in the device's memory. They travel there as arguments of a
launch of their own, which is left out when they have not changed; so a captured graph, which has only the
kernels that read the buffer, sees new ones when it is replayed.

Kernels go to the caller's stream, which is PyTorch's or CuPy's current one if the weights are theirs, else
the default stream, or the one that `numba_opt.cuda.on` names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from ..compiler import interrupts
from ..core.call import Arrays, moved
from ..core.columns import GRAD
from ..core.executor import After, Before, Executor, Limit
from ..core.rules import Rule
from ..core.step_rows import NormLimit, Outcome, StepRows
from ..cpu import threads
from .arrays import address_of, current_stream, kernels, kind_of
from .buffer import NORM, OUT, OUT_OF_RANGE_ROWS, SKIPPED
from .call import DeviceCall, SeenColumn, read
from .device_steps import Captured, DeviceSteps

UNPREPARED = "a step can be captured after one with the same arrays; make one before the capture"


class CudaExecutor(Executor):
    """Makes steps on arrays that are on GPUs.

    It keeps no array alive. Arrays that it has seen are known by their objects and addresses.
    """

    def __init__(self, rule: Rule, graphs: bool = True) -> None:
        super().__init__(rule)
        self.graphs = graphs  # whether steps may be captured
        self.steps: list[DeviceSteps] = []
        self._of_device: dict[int, DeviceSteps] = {}
        self._seen: list[SeenColumn] = []  # the columns that it is ready for
        self._asked: Any = None  # of their states and of sparse gradients, and where deferred steps are
        self._kinds: list[Any] = []  # of the gradients
        self._captured: list[Captured] = []  # by the last graph
        self._captured_row_of: list[int] = []
        self._kept: list[list[Captured]] = []  # by any, as long as this is there
        self._exact = False  # whether rows catch up

    # ---------------------------------------------------------------- arrays

    def refresh(
        self, arrays: Arrays, grads: Sequence[Any] | None = None, ids: np.ndarray | None = None
    ) -> None:
        grads, rest = arrays.columns[GRAD] if grads is None else grads, [*arrays.columns[1:]]
        if arrays.last_steps:
            rest.append([*arrays.last_steps.values()])
        deferred = [steps.address for steps in arrays.deferred.values()]
        seen, self._seen = self._seen, []
        asked = (arrays.state_storage, arrays.tensor_ids, arrays.sparse_update, deferred, [*arrays.touched])
        before, self._asked = self._asked, asked
        self._exact = bool(deferred)
        same = bool(seen) and asked == before and all(map(SeenColumn.same, seen[1:], rest))
        if same and seen[0].same(grads):
            self._seen = seen
            return
        if not (same and self._refresh_grads(grads)):
            self._refresh_all(arrays.with_grads(grads))
        try:
            self._seen = [SeenColumn(grads), *(seen[1:] if same else map(SeenColumn, rest))]
        except (TypeError, AttributeError):  # no telling whether an object is still the same
            return

    def _refresh_all(self, arrays: Arrays) -> None:
        self._place(read(arrays), arrays.weights)
        self._kinds = list(map(kind_of, arrays.columns[GRAD]))

    def _refresh_grads(self, grads: Sequence[Any]) -> bool:
        """Be ready for new gradients like the last ones; False if that takes a closer look."""
        if None in self._kinds or list(map(kind_of, grads)) != self._kinds:
            return False
        places = np.array(list(map(address_of, grads)), np.uint64)
        return all(steps.refresh_grads(places[steps.members]) for steps in self.steps)

    def hold(self, calls: Sequence[Any]) -> None:
        self._place(calls, None)

    def _place(self, calls: Sequence[DeviceCall], weights: Sequence[Any] | None) -> None:
        """Be ready for calls; streams are those of the weights, or of what the calls hold for them."""
        self.steps = []
        for held in calls:
            gpu = kernels().driver.device(held.device)
            weight = held.call.arrays[1][0] if weights is None else weights[held.members[0]]
            if weights is not None and gpu.capturing(current_stream(weight, held.device)):
                raise RuntimeError(UNPREPARED)
            steps = self._of_device.get(held.device)
            if steps is None or steps.members != held.members:
                steps = self._of_device[held.device] = DeviceSteps(self.rule, gpu, held.members)
            steps.hold(held, weight)
            self.steps.append(steps)

    def move(self) -> None:
        for steps in self.steps:
            if steps.held is not None:
                moved(steps.held.call)
                steps.hold(steps.held, steps.weight())

    # ---------------------------------------------------------------- steps

    def run(self, rows: StepRows, limit: Limit = None, before: Before = None, after: After = ()) -> Outcome:
        with interrupts.defer_signals():
            launch, captured = self.launching(rows, limit)
            if before is not None:
                before()
            launch()
            if not captured:
                threads.run([], after)
        return Outcome(None if limit is None else self.norm, captured=captured)

    def launching(self, rows: StepRows, limit: NormLimit | None = None) -> tuple[Callable[[], None], bool]:
        """Return the call that launches a step, all else being in place, and whether it goes into a graph."""
        streams = [steps.stream() for steps in self.steps]
        captured = [steps.gpu.capturing(at) for steps, at in zip(self.steps, streams, strict=True)]
        if any(captured):
            self._check_capture(rows, limit, all(captured))
        else:
            matrix = rows.matrix()
            shares = [(0, 0)] * len(streams) if limit is None else self._shares()
            for steps, stream, share in zip(self.steps, streams, shares, strict=True):
                if not steps.written(rows, matrix, limit, stream, share):
                    with steps.gpu.current():
                        steps.write(rows, matrix, limit, stream, share)
        return partial(self._launch, limit, streams, list(rows.row_of) if any(captured) else None), any(
            captured
        )

    def _shares(self) -> list[tuple[int, int]]:
        """Each device's share of the sums of squares, as `DeviceSteps.write` has it."""
        own = [steps.sums for steps in self.steps]
        return [(sum(own[:k]), sum(own)) for k in range(len(own))]

    def _check_capture(self, rows: StepRows, limit: NormLimit | None, everywhere: bool) -> None:
        """Refuse a step that cannot go into a graph."""
        if not self.graphs:
            raise RuntimeError("only a step of a Trainer can be captured in a CUDA graph")
        if limit is not None and len(self.steps) > 1:
            raise RuntimeError(
                "a norm over several devices cannot be captured in CUDA graphs: one device's graph "
                "cannot wait for another's"
            )
        if not everywhere or not all(steps.ready(rows.row_of, limit) for steps in self.steps):
            raise RuntimeError(UNPREPARED)

    def _launch(self, limit: NormLimit | None, streams: Sequence[int], captured: list[int] | None) -> None:
        """Launch a step on these streams; if it is captured, with tensors' rows of coefficients."""
        pairs = list(zip(self.steps, streams, strict=True))
        for steps, stream in pairs:
            with steps.gpu.current():
                if self._exact and captured is None and steps.held is not None:
                    steps.record(steps.held, stream)  # `replay` does that before a graph is replayed
                steps.launch(limit, stream)
        if limit is not None:
            self._exchange(pairs)
            for steps, stream in pairs:
                with steps.gpu.current():
                    steps.settle(stream)
        if captured is not None:  # which has the tables for itself: others are made where they would change
            self._captured, self._captured_row_of = [steps.freeze() for steps in self.steps], captured
            self._kept.append(self._captured)

    @staticmethod
    def _exchange(pairs: Sequence[tuple[DeviceSteps, int]]) -> None:
        """Have all sums of squares on all devices, which add them in the same order."""
        for steps, stream in pairs:
            for other, from_stream in pairs:
                if other is not steps and other.sums:
                    steps.fetch(other, stream, from_stream)
        for steps, stream in pairs:  # whose own sums stay as they are until all others have them
            for other, from_stream in pairs:
                if other is not steps and steps.sums:
                    steps.gpu.after(stream, from_stream, other.gpu)

    def flush(self) -> None:
        with interrupts.defer_signals():
            for steps in self.steps:
                with steps.gpu.current():
                    steps.flush(steps.stream())

    def replay(self, rows: StepRows, limit: NormLimit | None, deferred: Sequence[Any], after: After) -> None:
        """Have all in place for the step that was captured last, and count it by what comes `after`.

        The deferred steps are those that the tensors have now.
        """
        matrix = rows.matrix()
        same = all(kept.steps.buffer.address == kept.buffer for kept in self._captured)
        fits = all(kept.steps.buffer.holds(matrix) for kept in self._captured)
        if not (same and fits) or list(rows.row_of) != self._captured_row_of:
            raise ValueError("other groups of coefficients are in use since the step was captured")
        for kept in self._captured:
            held = kept.call.call.deferred
            if any(deferred[kept.steps.members[t]] is not steps for t, steps in held.items()):
                raise ValueError("the steps that rows have yet to take are others since one was captured")
        with interrupts.defer_signals():
            for kept in self._captured:
                with kept.steps.gpu.current():
                    stream = kept.steps.stream()
                    kept.steps.come_to(stream)
                    kept.steps.buffer.write(matrix, limit, stream)
                    kept.steps.record(kept.call, stream)
            threads.run([], after)

    # ---------------------------------------------------------------- what kernels have said

    def norm(self) -> float:
        """The norm of the last step's gradients; waits for the device."""
        return float(self.steps[0].buffer.outputs()[NORM])  # all devices have the same

    def skipped(self) -> int:
        return int(self._outputs()[SKIPPED])

    def out_of_range_rows(self) -> bool:
        return bool(self._outputs()[OUT_OF_RANGE_ROWS])

    def _outputs(self) -> np.ndarray:
        """Return the outputs of the kernels of all devices: a step that is skipped is so on all of them."""
        outputs = [steps.buffer.outputs() for steps in self._of_device.values()]
        return np.max([np.zeros(OUT), *outputs], axis=0)
