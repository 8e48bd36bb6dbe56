"""The table is complete, and says what the optimizers have. What they compute is in `tests.conformance`."""

from __future__ import annotations

import sys

import numpy as np

import numba_opt

from . import table


def shipped() -> set[type]:
    """The registered classes that the package defines (its doctests register others)."""
    registry = numba_opt.Optimizer.opt_registry.values()
    return {
        cls
        for cls in registry
        if cls.__module__.split(".")[0] == "numba_opt"
        and getattr(sys.modules[cls.__module__], cls.__name__, None) is cls
    }


def test_every_registered_optimizer_is_in_the_table():
    assert shipped() == {row.cls for row in table.TABLE}


def test_ids_are_different():
    assert len({row.id for row in table.TABLE}) == len(table.TABLE)


@table.each
def test_declared_states(row):
    optimizer = table.build(row)
    weight = np.zeros(table.fit(row, (6, 4)), np.float32)
    state = optimizer.create_state(0, weight)
    assert len(optimizer.state_names) == len(table.leaves(state)) == row.states
    assert state is None if row.states == 0 else isinstance(state, np.ndarray if row.states == 1 else tuple)
    for array in table.leaves(state):
        assert array.shape == ((6, 1) if row.cls.per_row else (6, 4))
        assert array.dtype == weight.dtype
        assert not array.any()


@table.each
@table.each_path
def test_begin_num_update_counts(row, path):
    """The bias corrections of a resumed run are those of its own number of updates."""
    call = table.make(row, [(4, 6)], "float64", seed=5)
    expected = table.reference(row, call.weights[0], [call.grads[0]] * 2, call.states[0], t=10)
    optimizer = table.build(row, begin_num_update=10)
    for _ in range(2):
        getattr(optimizer, path)(*call)
    table.assert_near([call.weights[0], call.states[0]], expected, 1e-14)
    assert optimizer.num_update == 12


@table.each
def test_learning_rate_default(row):
    assert table.build(row).learning_rate == row.learning_rate
