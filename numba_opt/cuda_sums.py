"""Gradients that add up on GPUs before a step takes them: memory for the sums, and what adds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import cuda, cuda_arrays, device, sparse
from .execution import Rule


class CudaSums:
    """The sums of a trainer's gradients.

    Adding is a step whose weights are the sums, with a rule of its own for the first gradient. Memory is kept
    from one sum to the next, so that whoever takes the sums finds them where they were.
    """

    def __init__(self, names: Sequence[str]) -> None:
        loops = cuda_arrays.kernels().loops
        self._names = names
        self._memory: dict[int, Any] = {}
        self._first, self._next = (cuda.Prepared(Rule(rule, 0, False)) for rule in (loops.begun, loops.plus))

    def memory(self, t: int, weight: Any) -> Any:
        """Where the sum of a parameter's gradients is: an array like its weight."""
        if t not in self._memory:
            view = cuda_arrays.look(weight, "weight")
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
            A gradient does not fit, or is sparse.
        """
        for t, grad in grads.items():
            if sparse.is_sparse(grad) or hasattr(grad, "tocsr"):
                what = f"gradient of parameter {self._names[t]!r}"
                raise TypeError(f"{what} is sparse; on a GPU, accumulate takes dense ones")
        found = [self.memory(t, weights[t]) if t in grads else total for t, total in enumerate(sums)]
        parts = [
            (self._first, [t for t in grads if sums[t] is None], (1.0, math.inf, 0.0, 0.0)),
            (self._next, [t for t in grads if sums[t] is not None], (1.0, math.inf, 0.0)),
        ]
        parts = [part for part in parts if part[1]]
        for prepared, which, _ in parts:
            columns = [[grads[t] for t in which], [found[t] for t in which]]
            prepared.take(device.Request(columns, (), False, self._label(which)))

        def add() -> None:
            for prepared, which, row in parts:
                prepared.run([row], [0] * len(which), graphs=False)

        return found, add

    def _label(self, which: Sequence[int]) -> Callable[[int], str]:
        return lambda k: f"parameter {self._names[which[k]]!r}"
