"""What must hold whatever the arrays are: paths agree, tensors and threads do not matter, in place."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from numba_opt.cpu import loops as cpu
from numba_opt.cpu import ndarray, threads

from . import table

HALVES = ["float16", "bfloat16"]
each_half = pytest.mark.parametrize("half", [np.float16, ml_dtypes.bfloat16], ids=HALVES)


def run(row, call, path="fused_step", times=1, **kwargs):
    """A copy of a call after some updates."""
    call = call.copy()
    optimizer = table.build(row, **kwargs)
    for _ in range(times):
        getattr(optimizer, path)(*call)
    return call


def assert_same(row, found, expected):
    """To the bit; for rules with a sum over a row, which has no one order, within a few last bits."""
    found, expected = table.outputs(found), table.outputs(expected)
    if not row.cls.per_row:
        return table.assert_bits(found, expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=8 * np.finfo(a.dtype).eps, atol=np.finfo(a.dtype).tiny)
    return None


# ---------------------------------------------------------------- fused equals step


@st.composite
def numbers(draw, dtype):
    """Ordinary numbers and all kinds of strange ones."""
    info = np.finfo(dtype)
    strange = [
        np.nan,
        np.inf,
        -np.inf,
        0.0,
        -0.0,
        info.smallest_subnormal,
        -info.tiny / 2,
        info.max,
        info.min,
    ]
    strange += [float(np.sqrt(info.max)), -float(np.sqrt(info.tiny)), 1.0, -1.0, float(info.eps)]
    ordinary = st.floats(-4, 4, width=32)
    wild = st.floats(width=np.dtype(dtype).itemsize * 8)
    one = st.one_of(ordinary, ordinary, wild, st.sampled_from(strange))
    return np.array(draw(st.lists(one, min_size=1, max_size=40)), dtype)


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "clip_gradient": st.sampled_from([0.0, 0.5, 1e30]),
        "rescale_grad": st.sampled_from([0.0, 0.125, -3.0]),
        "wd": st.sampled_from([0.01, 2.0]),
        "learning_rate": st.sampled_from([0.0, 0.3, 1e4]),
    },
)


@table.each
@table.each_dtype
@given(data=st.data())
def test_fused_equals_step(row, dtype, data):
    grad = data.draw(numbers(dtype))
    call = table.make(row, [grad.size], dtype, seed=grad.size)
    call.grads[0][...] = grad.reshape(call.grads[0].shape)
    if data.draw(st.booleans()):
        weight = data.draw(numbers(dtype))
        call.weights[0][...] = np.resize(weight, call.weights[0].shape)
    options = data.draw(OPTIONS)
    if row.cls.per_row:
        options.pop("wd", None)
    assert_same(row, run(row, call, times=2, **options), run(row, call, "step", times=2, **options))


@table.each
@table.each_dtype
def test_fused_equals_step_on_large_arrays(row, dtype):
    call = table.make(row, [300_001, (1000, 3), (3, 100_000)], dtype)
    options = table.common(row)
    found = [table.outputs(run(row, call, path, times=2, **options)) for path in ("fused_step", "step")]
    if row.cls.per_row:
        table.assert_near(*found, 50 * np.finfo(dtype).eps)  # a row of 100,000 squares, summed twice
    else:
        table.assert_bits(*found)


# ---------------------------------------------------------------- how tensors and threads come together

SIZES = st.lists(
    st.one_of(
        st.integers(0, 70),
        st.sampled_from([cpu.CHUNK - 1, cpu.CHUNK, cpu.CHUNK + 1, 3 * cpu.CHUNK + 5]),
        st.tuples(st.integers(0, 40), st.integers(1, 40)),
    ),
    min_size=1,
    max_size=12,
)


@table.each
@given(sizes=SIZES, seed=st.integers(0, 99))
def test_many_at_once_equals_one_at_a_time(row, sizes, seed):
    call = table.make(row, sizes, seed=seed)
    many = run(row, call, times=2, **table.common(row))
    single = call.copy()
    optimizer = table.build(row, **table.common(row))
    for _ in range(2):
        for one in zip(*single, strict=True):
            optimizer.fused_step(*([part] for part in one))
    table.assert_bits(table.outputs(many), table.outputs(single))


@table.each
@given(sizes=SIZES, seed=st.integers(0, 99))
def test_any_number_of_threads_gives_the_same_bits(row, sizes, seed):
    call = table.make(row, sizes, seed=seed)
    found = []
    for count in (1, 2, 5):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(threads, "SHARED", 0)
            patch.setattr(threads, "count", lambda count=count: count)
            found.append(table.outputs(run(row, call, **table.common(row))))
    table.assert_bits(found[1], found[0])
    table.assert_bits(found[2], found[0])


@table.each
def test_threads_share_large_work(row, monkeypatch):
    call = table.make(row, [2_000_000, 5, (700, 900)])
    shared = run(row, call)
    monkeypatch.setattr(threads, "count", lambda: 1)
    table.assert_bits(table.outputs(run(row, call)), table.outputs(shared))


def test_several_hundred_tensors():
    row = table.row("adamax")
    call = table.make(row, [(t * 37) % 300 for t in range(500)])
    table.assert_bits(table.outputs(run(row, call)), table.outputs(run(row, call, "step")))


@table.each
@table.each_path
def test_two_precisions_in_one_call(row, path):
    single, double = table.make(row, [(5, 6), (7, 2)]), table.make(row, [(4, 4), (3, 9)], "float64")
    order = [0, 2, 1, 3]
    mixed = table.Call(
        [0, 1, 2, 3], *([(a + b)[t] for t in order] for a, b in zip(single[1:], double[1:], strict=True))
    )
    found = run(row, mixed, path)
    parts = [run(row, single, path), run(row, double, path)]
    for a, b in zip(found[1:], zip(*(part[1:] for part in parts), strict=True), strict=True):
        table.assert_bits(a, [(b[0] + b[1])[t] for t in order])


# ---------------------------------------------------------------- what is touched


@table.each
@table.each_path
def test_updates_in_place_and_nowhere_else(row, path):
    call, bystander = table.make(row, [(6, 4), (3, 5)]), table.make(row, [(6, 4)], seed=1)
    before = table.content(call.grads, bystander)
    ids = [id(array) for array in table.outputs(call)]
    optimizer = table.build(row, **table.common(row))
    fresh = call.copy()
    lists = [list(part) for part in call]
    assert getattr(optimizer, path)(*call) is None
    assert table.content(call.grads, bystander) == before
    assert [id(array) for array in table.outputs(call)] == ids
    for before, after in zip(lists, call, strict=True):
        assert len(before) == len(after)
        assert all(a is b or a == b for a, b in zip(before, after, strict=True))
    for old, new in zip(table.outputs(fresh), table.outputs(call), strict=True):
        assert not np.array_equal(old, new)


# ---------------------------------------------------------------- arrays of every kind


SHAPES = [(0,), (0, 5), (5, 0), (0, 0), (), (1,), (1, 1), (2, 3, 4), (1,) * 12]


@pytest.mark.parametrize(
    ("row", "shape"),
    [(row, shape) for row in table.TABLE for shape in SHAPES if len(shape) == 2 or not row.cls.per_row],
    ids=lambda value: getattr(value, "id", None),
)
@table.each_path
@table.each_dtype
def test_shapes(row, path, dtype, shape):
    call = table.make(row, [shape, (3, 4), shape], dtype)
    found = run(row, call, path)
    for t in range(3):
        states = call.states[t]
        if call.weights[t].size:
            expected = table.reference(row, call.weights[t], [call.grads[t]], states)
            table.assert_near([found.weights[t], found.states[t]], expected, 1e-5)
        else:
            table.assert_bits([found.weights[t], found.states[t]], [call.weights[t], states])


def strided(array):
    base = np.full((*array.shape[:-1], 3 * array.shape[-1] + 1), 7, array.dtype)
    return base[..., 1::3], base


def reverse(array):
    base = np.empty_like(array)
    return base[::-1, ::-1], base


def transposed(array):
    base = np.empty(array.shape[::-1], array.dtype)
    return base.T, base


def fortran(array):
    base = np.asfortranarray(np.empty_like(array))
    return base, base


def inner(array):
    base = np.full((array.shape[0] + 2, array.shape[1] + 3), 7, array.dtype)
    return base[1:-1, 2:-1], base


def misaligned(array):
    base = bytearray(array.nbytes + 3)
    return np.frombuffer(base, array.dtype, array.size, offset=1).reshape(array.shape), base


VIEWS = [strided, reverse, transposed, fortran, inner, misaligned]
each_view = pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)


def as_views(call, view, which):
    """A copy of a call with some columns replaced by views with the same content, and their bases."""
    bases = []

    def put(state):
        if isinstance(state, tuple):
            return tuple(put(part) for part in state)
        if state is None:
            return None
        found, base = view(state)
        found[...] = state
        bases.append(base)
        return found

    columns = [list(map(put, c)) if k in which else list(c) for k, c in enumerate(call.copy())]
    return table.Call(*columns), bases


@table.each
@table.each_path
@each_view
@pytest.mark.parametrize("which", ["weights", "grads", "states", "all"])
def test_views(row, path, view, which):
    call = table.make(row, [(6, 5), (4, 9)])
    columns = {"weights": [1], "grads": [2], "states": [3], "all": [1, 2, 3]}[which]
    viewed, bases = as_views(call, view, columns)
    expected = run(row, call, path)
    table.build(row).__getattribute__(path)(*viewed)
    table.assert_bits(table.outputs(viewed), table.outputs(expected))
    table.assert_bits(viewed.grads, call.grads)
    if view in (strided, inner):
        arrays = [a for k in columns for a in table.leaves(viewed[k])]
        for base, array in zip(bases, arrays, strict=True):
            assert np.count_nonzero(base == 7) >= base.size - array.size  # the gaps are as they were


@table.each
@table.each_path
def test_interleaved_weights(row, path):
    """Two weights that take turns in memory overlap in range but share no element."""
    call = table.make(row, [(6, 5), (6, 5)])
    expected = run(row, call, path)
    base = np.stack(call.weights, axis=-1)
    weights = [base[..., 0], base[..., 1]]
    getattr(table.build(row), path)(call.indices, weights, call.grads, call.states)
    table.assert_bits([weights, call.states], [expected.weights, expected.states])


@table.each
@table.each_path
def test_gradients_may_share_memory_and_be_read_only(row, path):
    call = table.make(row, [(6, 5), (6, 5)])
    call.grads[1] = call.grads[0]
    expected = run(row, call, path)
    shared = call.grads[0]
    shared.flags.writeable = False
    found = run(row, table.Call(*call[:2], [shared, shared[::-1][::-1]], call.states), path)
    table.assert_bits(table.outputs(found), table.outputs(expected))


@table.each
@table.each_path
def test_broadcast_gradient(row, path):
    call = table.make(row, [(6, 5)])
    grad = np.broadcast_to(np.float32(0.25), (6, 5))
    found = run(row, table.Call([0], call.weights, [np.array(grad)], call.states), path)
    getattr(table.build(row), path)([0], call.weights, [grad], call.states)
    table.assert_bits(table.outputs(call), table.outputs(found))


class Tagged(np.ndarray):
    pass


@table.each
@table.each_path
def test_subclasses_and_memory_maps(row, path, tmp_path):
    call = table.make(row, [(6, 5), (6, 5)])
    expected = run(row, call, path)
    mapped = np.memmap(tmp_path / "weight", np.float32, "w+", shape=(6, 5))
    mapped[...] = call.weights[0]
    weights = [mapped, call.weights[1].view(Tagged)]
    grads = [call.grads[0].view(Tagged), call.grads[1]]
    getattr(table.build(row), path)(call.indices, weights, grads, call.states)
    table.assert_bits([weights, call.states], [expected.weights, expected.states])
    table.assert_bits(np.fromfile(tmp_path / "weight", np.float32).reshape(6, 5), expected.weights[0])
    assert type(weights[1]) is Tagged


def test_matrix_subclass():
    """numpy.matrix gives `*` another meaning; the rule must not meet it."""
    call = table.make(table.row("adamax"), [(4, 4)])
    expected = run(table.row("adamax"), call)
    for path in ("step", "fused_step"):
        found = call.copy()
        with pytest.warns(PendingDeprecationWarning):
            weight = np.asmatrix(found.weights[0])
        getattr(table.build(table.row("adamax")), path)([0], [weight], found.grads, found.states)
        table.assert_bits(table.outputs(found), table.outputs(expected))


@table.each_path
@pytest.mark.parametrize("index", [2**31, 2**63, 2**200, -5, "encoder.weight", ("block", 3), np.int64(7)])
def test_indices_of_every_kind(index, path):
    row = table.row("ftml")
    call = table.make(row, [(3, 4), (2, 2)])
    expected = run(row, call, path, times=2)
    optimizer = table.build(row)
    for _ in range(2):
        getattr(optimizer, path)([index, 0], *call[1:])
    table.assert_bits(table.outputs(call), table.outputs(expected))
    assert optimizer._index_update_count == {index: 2, 0: 2}


@table.each_path
def test_lists_may_be_tuples_and_states_lists(path):
    row = table.row("ftml")
    call = table.make(row, [(3, 4), (2, 2)])
    expected = run(row, call, path)
    found = call.copy()
    states = tuple(list(state) for state in found.states)
    getattr(table.build(row), path)(*map(tuple, found[:3]), states)
    table.assert_bits(table.outputs(found), table.outputs(expected))


@table.each
@table.each_path
def test_nothing_to_update(row, path):
    optimizer = table.build(row)
    getattr(optimizer, path)([], [], [], [])
    assert optimizer.num_update == 0


# ---------------------------------------------------------------- the slow way of looking at arrays


def test_array_objects_can_be_read_here():
    assert ndarray.readable()


@table.each
def test_results_do_not_depend_on_how_arrays_are_read(row, monkeypatch):
    call = table.make(row, [(6, 5), (4, 9), 0, (300, 200)])
    double = table.make(row, [(6, 5)], "float64")
    mixed = table.Call([0, 1, 2, 3, 4], *(a + b for a, b in zip(call[1:], double[1:], strict=True)))
    expected = run(row, mixed, times=2, **table.common(row))
    monkeypatch.setattr(ndarray, "readable", lambda: False)
    monkeypatch.setattr(ndarray, "read", None)  # calling it would raise
    found = run(row, mixed, times=2, **table.common(row))
    table.assert_bits(table.outputs(found), table.outputs(expected))


# ---------------------------------------------------------------- half precision


@table.each
@each_half
@given(seed=st.integers(0, 99), sizes=st.lists(st.integers(0, 60), min_size=1, max_size=4))
def test_half_precision_is_rounded_float32(row, half, seed, sizes):
    """Without multi_precision: computed in float32 from the half-precision arrays, then rounded once."""
    call = table.make(row, sizes, half, seed)
    single = table.Call(call.indices, *([_as(part, np.float32) for part in column] for column in call[1:]))
    options = table.common(row)
    expected = [a.astype(half) for a in table.outputs(run(row, single, **options))]
    found = [table.outputs(run(row, call, path, **options)) for path in ("step", "fused_step")]
    assert {array.dtype for array in found[0]} == {np.dtype(half)}
    for outputs in found[: 1 + (not row.cls.per_row)]:
        for a, b in zip(outputs, expected, strict=True):
            if row.cls.per_row:  # the sum's order shows in float32's last bits, rarely in the half's
                np.testing.assert_allclose(a.astype("f4"), b.astype("f4"), rtol=2**-7)
            else:
                table.assert_bits(a.astype("f4"), b.astype("f4"))


def _as(state, dtype):
    if isinstance(state, tuple):
        return tuple(_as(part, dtype) for part in state)
    return None if state is None else state.astype(dtype)


@table.each
@each_half
@table.each_path
def test_master_copies(row, half, path):
    """With multi_precision: the float32 copy takes the steps, the weight is that copy rounded."""
    options = table.common(row) | {"use_fused_step": path == "fused_step"}
    call = table.make(row, [(6, 5), (40, 30), (0, 4)], half)
    optimizer = table.build(row, multi_precision=True, **options)
    states = list(map(optimizer.create_state_multi_precision, call.indices, call.weights))
    plain = table.build(row, **options)
    masters = [weight.astype(np.float32) for weight in call.weights]
    expected = list(map(plain.create_state, call.indices, masters))
    for master, state, other in zip(masters, states, expected, strict=True):
        table.assert_bits(state, (master, other))
    grads = table.content(call.grads)
    for _ in range(3):
        optimizer.update_multi_precision(call.indices, call.weights, call.grads, states)
        plain.update(call.indices, masters, [g.astype(np.float32) for g in call.grads], expected)
    for weight, master, state, other in zip(call.weights, masters, states, expected, strict=True):
        table.assert_bits(state, (master, other))
        assert weight.dtype == half
        table.assert_bits(weight.astype("f4"), master.astype(half).astype("f4"))
    assert table.content(call.grads) == grads
    assert optimizer.num_update == 3


@table.each_path
@each_half
def test_multi_precision_takes_all_kinds_of_weights_together(half, path):
    """float32, float64, half precision and a strided half-precision view in one call."""
    row = table.row("ftml")
    optimizer = table.build(row, multi_precision=True, use_fused_step=path == "fused_step")
    parts = [table.make(row, [(4, 6)], dtype, seed=3) for dtype in ("f4", "f8", half, half)]
    weights, grads = [p.weights[0] for p in parts], [p.grads[0] for p in parts]
    base = np.zeros((4, 12), half)
    base[:, ::2] = weights[3]
    weights[3] = base[:, ::2]
    states = [optimizer.create_state_multi_precision(t, w) for t, w in enumerate(weights)]
    single = table.build(row, multi_precision=True, use_fused_step=path == "fused_step")
    alone = [weight.copy() for weight in weights]
    state = [single.create_state_multi_precision(t, w) for t, w in enumerate(alone)]
    for _ in range(2):
        optimizer.update_multi_precision([0, 1, 2, 3], weights, grads, states)
        for t in range(4):
            single.update_multi_precision([t], [alone[t]], [grads[t]], [state[t]])
    table.assert_bits([_as(w, "f8") for w in weights], [_as(w, "f8") for w in alone])
    table.assert_bits(states, state)
    assert not base[:, 1::2].any()


@each_half
def test_half_precision_without_master_copies_warns(half):
    optimizer = table.build(table.row("nag"))
    weight = np.ones(3, half)
    with pytest.warns(UserWarning, match="multi_precision=True"):
        state = optimizer.create_state_multi_precision(0, weight)
    assert state.dtype == half
    optimizer.update_multi_precision([0], [weight], [weight.copy()], [state])
    assert weight[0] < 1


@each_half
@table.each_path
@given(data=st.data())
def test_half_precision_rounds_as_numpy_does(half, path, data):
    """Every weight, through a step that leaves it where it is, and to the nearest after one that does not."""
    row = table.row("nag-plain")
    bits = np.array(data.draw(st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=64)), np.uint16)
    weight = bits.view(half)
    weight[np.isinf(weight.astype("f4"))] = (
        0  # weight decay is 0 times the weight: NaN for infinity, as in MXNet
    )
    kept = weight.astype("f4")
    call = table.Call([0], [weight], [np.zeros_like(weight)], [None])
    getattr(table.build(row), path)(*call)
    table.assert_bits(weight.astype("f4"), kept)
    grad = np.full_like(weight, 1 / 3)
    getattr(table.build(row, learning_rate=0.7), path)([0], [weight], [grad], [None])
    with np.errstate(all="ignore"):
        expected = (kept - np.float32(0.7) * grad.astype("f4")).astype(half)
    table.assert_bits(weight.astype("f4"), expected.astype("f4"))
