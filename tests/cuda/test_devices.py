"""The same results on other devices: of other capabilities, larger ones, and with threads in any order."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .. import table
from ..conformance.backends import Ptx
from ..conformance.gradients import block, csr
from ..conformance.pairs import Twins, conform, conform_dense
from ..ptx.driver import Driver, installed

PTX = Ptx()
CAPABILITIES = [(7, 5), (8, 0), (10, 0)]


each_capability = pytest.mark.parametrize(
    "capability",
    [pytest.param(cc, marks=pytest.mark.device(capability=cc), id=f"{cc[0]}.{cc[1]}") for cc in CAPABILITIES],
)


@each_capability
@pytest.mark.parametrize("name", ["nag", "ftml", "groupadagrad"])
def test_dense_steps_on_other_devices(capability, name):
    row = table.row(name)
    conform_dense(PTX, row, table.make(row, [(5, 7), (8, 16), (40, 130)]))


@each_capability
@pytest.mark.parametrize("kept", ["float16", "bfloat16"])
def test_half_precision_on_other_devices(capability, kept):
    row = table.row("adamax")
    options = {"state_dtype": kept, "stochastic_rounding": True, "seed": 3}
    conform_dense(PTX, row, table.make(row, [(5, 7), 300]), **options)


@each_capability
def test_rows_on_other_devices(capability):
    conform(PTX, table.row("nag"), [block(), csr()])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["nag", "groupadagrad"])
def test_threads_that_take_any_turn(name, seed):
    """Several multiprocessors, on which any thread may come next."""
    row = table.row(name)
    with installed(Driver(seed=seed, processors=1 + seed, any_thread_next=True)):
        call = table.make(row, [(5, 7), (8, 16), (50, 130)])
        conform_dense(PTX, row, call, steps=1)
        conform(PTX, row, [block(), csr()], steps=1)


# ---------------------------------------------------------------- random cases

# Kernels that other tests have, so that few are compiled for these alone.
NAMES = st.sampled_from(["nag", "adamax", "ftml", "groupadagrad"])
FINITE = st.floats(-4, 4, width=32)
SPECIAL = st.sampled_from([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-42, 3e38])


@st.composite
def cases(draw):
    """An optimizer, shapes, gradients that may be anything, and a device."""
    row = table.row(draw(NAMES))
    shapes = draw(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 150)), min_size=1, max_size=4))
    call = table.make(row, shapes, seed=draw(st.integers(0, 1000)))
    for grad in call.grads:
        for _ in range(draw(st.integers(0, 3)) if grad.size else 0):
            grad.flat[draw(st.integers(0, grad.size - 1))] = draw(SPECIAL if not row.cls.per_row else FINITE)
    device = {
        "seed": draw(st.integers(0, 1000)),
        "processors": draw(st.integers(1, 4)),
        "any_thread_next": draw(st.booleans()),
    }
    return row, call, device


@st.composite
def sparse_cases(draw):
    """Sparse gradients: any rows of a matrix of any height, in any of the three meanings."""
    row = table.row(draw(st.sampled_from(["nag", "groupadagrad"])))
    height, width = draw(st.integers(1, 60)), draw(st.integers(1, 40))
    mode = draw(st.sampled_from(["lazy", "dense"]))
    grads = []
    for _ in range(draw(st.integers(1, 3))):
        rows = draw(st.lists(st.integers(0, height - 1), max_size=50))
        grads.append(block(rows, (height, width), seed=draw(st.integers(0, 1000))))
    return row, grads, (height, width), mode, draw(st.integers(0, 1000))


def check_dense(case):
    row, call, device = case
    with installed(Driver(**device)), np.errstate(all="ignore"):
        conform_dense(PTX, row, call)


def check_sparse(case):
    row, grads, shape, mode, seed = case
    with installed(Driver(seed=seed)):
        conform(PTX, row, grads, [shape] * len(grads), sparse_update=mode)


@given(cases())
def test_random_dense_steps(case):
    check_dense(case)


@given(sparse_cases())
def test_random_sparse_steps(case):
    check_sparse(case)


@pytest.mark.slow
def test_random_steps_for_a_while():
    """For as long as NUMBA_OPT_SOAK says, with other cases each time."""
    end = time.monotonic() + float(os.environ.get("NUMBA_OPT_SOAK", "5"))
    more = settings(derandomize=False, max_examples=20, deadline=None, database=None)
    while time.monotonic() < end:
        more(given(cases())(check_dense))()
        more(given(sparse_cases())(check_sparse))()


def test_random_bits_of_parameters_on_several_devices():
    """Each parameter has those of its own index, wherever it is."""
    with installed(Driver(devices=2)):
        options = {"state_dtype": "bfloat16", "stochastic_rounding": True, "seed": 3}
        twins = Twins(PTX, table.row("adamax"), [(5, 7), 33, (8, 16)], where=[0, 1, 0], **options)
        for _ in range(2):
            twins.step(*twins.grads)
        twins.agree()
