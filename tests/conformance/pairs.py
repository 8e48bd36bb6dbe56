"""The same parameters twice: on a backend, and where what is expected of it is computed."""

from __future__ import annotations

from typing import Any

import numpy as np

import numba_opt

from .. import table
from .gradients import SHAPE, widened


class Pair:
    """Parameters of both kinds with an optimizer each."""

    def __init__(self, backend, row, shapes=(SHAPE,), dtype="float32", call=None, **options):
        self.backend, self.row = backend, row
        options = table.common(row) | options
        self.ours = table.build(row, **options)
        self.theirs = table.build(row, **backend.reference, **options)
        call = call or table.make(row, shapes, dtype)
        backend.needs(*{array.dtype for array in [*call.weights, *call.grads]}, options.get("state_dtype"))
        self.indices, self.expected = call.indices, call.weights
        self.weights = backend.put(call.weights)
        self.states = [
            [optimizer.create_state_multi_precision(t, w) for t, w in enumerate(weights)]
            for optimizer, weights in ((self.ours, self.weights), (self.theirs, self.expected))
        ]
        for t, numbers in enumerate(call.states):
            own, other = (self.rule_states(states[t]) for states in self.states)
            for array, there, content in zip(own, other, table.leaves(numbers), strict=True):
                there[...] = content
                backend.write(array, there)

    def rule_states(self, state: Any) -> list[Any]:
        """The arrays of a parameter's state that its rule has: no copy of the weight, and no last_step."""
        arrays = table.leaves(state)
        return arrays[len(arrays) - self.row.states - self.stamped : len(arrays) - self.stamped]

    @property
    def stamped(self) -> bool:
        """Whether a state ends with what rows have taken."""
        return self.ours.sparse_update == "exact"

    def each(self, act: Any) -> None:
        """Do something to both optimizers."""
        act(self.ours)
        act(self.theirs)

    def given(self, grads: Any, distinct: bool = False, strays: bool = True) -> list[Any]:
        """Gradients on the backend."""
        mode = self.ours.sparse_update if strays else ""
        dense = lambda grad: isinstance(grad, np.ndarray)  # noqa: E731
        put, sparse = self.backend.put, self.backend.sparse
        return [put(grad) if dense(grad) else sparse(grad, distinct, mode) for grad in grads]

    def step(self, *grads: Any, times: int = 1, distinct: bool = False, strays: bool = True) -> None:
        """Steps of the first parameters, so many of them as there are gradients."""
        ours, some = self.given(grads, distinct, strays), slice(len(grads))
        for _ in range(times):
            for optimizer, weights, states, own in (
                (self.ours, self.weights, self.states[0], ours),
                (self.theirs, self.expected, self.states[1], [*grads]),
            ):
                optimizer.update_multi_precision(self.indices[some], weights[some], own, states[some])

    def flush(self) -> None:
        self.ours.flush(self.indices, self.weights, self.states[0])
        self.theirs.flush(self.indices, self.expected, self.states[1])

    def both(self) -> tuple[list[Any], list[Any]]:
        """Weights and states, on the host: what there is, and what there should be."""
        found = self.backend.get(table.leaves([self.weights, self.states[0]]))
        return found, table.leaves([self.expected, self.states[1]])

    def check(self, tolerance: float = 1e-6) -> None:
        self.backend.compare(self.row, *self.both(), tolerance)


def conform(
    backend, row, grads, shapes=None, dtype="float32", steps=2, distinct=False, times=2, alone=False,
    tolerance=1e-6, **options,
):  # fmt: skip
    """Some steps with these gradients, of so many parameters each, are those of the reference.

    Unless they are to be `alone`, another one with wider rows has a gradient like the first one's, and there
    are rows that lead outside.
    """
    shapes = [*(shapes or [SHAPE] * len(grads))]
    if not alone:
        shapes.append((9, 300))
        grads = [*grads, widened(grads[0], shapes[-1])]
    pair = Pair(backend, row, shapes * times, dtype, **options)
    pair.step(*grads * times, times=steps, distinct=distinct, strays=not alone)
    if not alone:  # kernels go another way where there is one tensor
        pair.step(grads[0], distinct=distinct)
    pair.check(tolerance)


def conform_dense(backend, row, call, steps=2, tolerance=1e-6, **options):
    """Some dense steps are those of the reference."""
    pair = Pair(backend, row, call=call, **options)
    pair.step(*call.grads, times=steps)
    pair.check(tolerance)


class Twins:
    """Parameters of both kinds with a trainer each."""

    def __init__(self, backend, row, shapes=(SHAPE,), dtype="float32", where=None, trainer=None, **options):
        self.backend, self.row = backend, row
        options = table.common(row) | options
        call = table.make(row, shapes, dtype)
        backend.needs(*{array.dtype for array in call.weights}, options.get("state_dtype"))
        self.where, self.grads = where or [0] * len(call.weights), call.grads
        weights = [backend.put(w, n) for w, n in zip(call.weights, self.where, strict=True)]
        self.ours = numba_opt.Trainer(weights, table.build(row, **options), **trainer or {})
        other = table.build(row, **backend.reference, **options)
        self.theirs = numba_opt.Trainer(call.weights, other, **trainer or {})

    def each(self, act: Any) -> None:
        """Do something to both trainers."""
        act(self.ours)
        act(self.theirs)

    def given(self, grads: Any, distinct: bool = False) -> list[Any]:
        """Gradients on the backend, each one where its parameter is."""
        return [
            None
            if grad is None
            else self.backend.put(grad, n)
            if isinstance(grad, np.ndarray)
            else self.backend.sparse(grad, distinct, number=n)
            for grad, n in zip(grads, self.where, strict=True)
        ]

    def step(self, *grads: Any, **settings: Any) -> None:
        """A step with a gradient for each parameter, or with what has been accumulated."""
        self.ours.step(*[self.given(grads)] if grads else [], **settings)
        self.theirs.step(*[[*grads]] if grads else [], **settings)

    def accumulate(self, *grads: Any, distinct: bool = False) -> None:
        self.ours.accumulate(self.given(grads, distinct))
        self.theirs.accumulate([*grads])

    def sums(self) -> list[dict[str, Any]]:
        """What both have accumulated."""
        return [trainer.state_dict(params=False)["accumulated"] for trainer in (self.ours, self.theirs)]

    def agree_on_sums(self) -> None:
        """To the bit, on every backend: gradients are added in the same order."""
        found, expected = self.sums()
        assert found.keys() == expected.keys()
        for name, total in expected.items():
            assert isinstance(found[name], dict) == isinstance(total, dict)
            parts = lambda held: [*held.values()] if isinstance(held, dict) else [held]  # noqa: E731
            kept, wanted = (
                [p for p in parts(held) if isinstance(p, np.ndarray)] for held in (found[name], total)
            )
            table.assert_bits(kept, wanted)

    def agree_on_norms(self) -> None:
        found, expected = self.ours.grad_norm, self.theirs.grad_norm
        np.testing.assert_allclose(found, expected, rtol=1e-12)

    def agree(self, tolerance: float = 0.0) -> None:
        """Parameters, states and counts are alike: to the bit, where nothing else is said."""
        found, expected = self.content(self.ours), self.content(self.theirs)
        if tolerance and self.backend.on_device:
            table.assert_near(self.backend.get(found), expected, tolerance)
        else:
            self.backend.compare(self.row, self.backend.get(found), expected)
        assert self.ours.optimizer.num_update == self.theirs.optimizer.num_update
        assert self.ours.stray_rows == self.theirs.stray_rows

    @staticmethod
    def content(trainer: Any) -> list[Any]:
        return [*trainer.params.values(), *table.leaves(list(trainer.states.values()))]
