"""States in a dtype of one's own choice: computed as ever, and rounded when they are stored."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import numba_opt
from numba_opt.io.checkpoint import CheckpointError
from numba_opt.tools.wanted import cpu_kernels, variants

from . import table

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {
    "float32": np.dtype("f4"),
    "float16": np.dtype("f2"),
    "bfloat16": BFLOAT16,
    "float64": np.dtype("f8"),
}
CHOICES = ("float32", "bfloat16", "float16")
SHAPES = [(7, 5), (40, 30), (3, 1), (0, 4)]

each_choice = pytest.mark.parametrize("choice", CHOICES)
each_half = pytest.mark.parametrize("choice", CHOICES[1:])
with_states = pytest.mark.parametrize(
    "row", [row for row in table.TABLE if row.states], ids=lambda row: row.id
)
quiet = pytest.mark.filterwarnings("ignore:(states|weights) in ")


def make(row, dtype="float32", choice="bfloat16", shapes=SHAPES, seed=0, **options):
    """An optimizer with weights, gradients and (not negative) states for it."""
    call = table.make(row, shapes, DTYPES[dtype], seed)
    optimizer = table.build(row, state_dtype=choice, **table.common(row) | options)
    states = [optimizer.create_state_multi_precision(t, w) for t, w in enumerate(call.weights)]
    rng = np.random.default_rng(seed)
    for state in states:
        for array in own(state, optimizer):
            array[...] = rng.random(array.shape)
    return optimizer, call._replace(states=states)


def own(state, optimizer):
    """A parameter's states, without the master copy of its weight."""
    return table.leaves(state)[-len(optimizer.state_names) :]


def wide(arrays):
    """Arrays that NumPy can compare: bfloat16 and float16 as float32, which holds them all."""
    return [a.astype("f4") if a.dtype.itemsize == 2 else a for a in table.leaves(arrays)]


def assert_same(found, expected):
    assert [a.dtype for a in table.leaves(found)] == [a.dtype for a in table.leaves(expected)]
    table.assert_bits(wide(found), wide(expected))


# ---------------------------------------------------------------- dtypes


@with_states
@each_choice
@quiet
@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_states_have_the_dtype(row, choice, dtype, masters):
    weight = np.ones((6, 4), DTYPES[dtype])
    optimizer = table.build(row, state_dtype=choice, multi_precision=masters)
    state = optimizer.create_state_multi_precision(0, weight)
    if masters and DTYPES[dtype].itemsize == 2:
        master, state = state
        assert master.dtype == np.float32
    arrays = table.leaves(state)
    assert len(arrays) == row.states
    assert {a.dtype for a in arrays} == {DTYPES[choice]}
    assert {a.shape for a in arrays} == {(6, 1) if row.cls.per_row else (6, 4)}


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (np.float16, "float16"),
        (np.dtype("f4"), "float32"),
        (BFLOAT16, "bfloat16"),
        ("torch.bfloat16", "bfloat16"),
    ],
)
def test_dtypes_may_be_objects(given, name):
    assert numba_opt.NAG(state_dtype=given).state_dtype == name


@pytest.mark.parametrize("given", ["float64", "int8", "half", np.float64, 3, "", ["float16"]])
def test_unknown_dtype(given):
    words = "state_dtype must be one of 'float32', 'bfloat16', 'float16', got "
    with pytest.raises(ValueError, match=words):
        numba_opt.NAG(state_dtype=given)


def test_shown():
    assert repr(numba_opt.NAG(state_dtype="float16")) == "NAG(learning_rate=0.1, state_dtype='float16')"


@quiet
@each_choice
@pytest.mark.parametrize("path", ["step", "fused_step", "update", "update_multi_precision"])
@pytest.mark.parametrize("given", DTYPES)
def test_state_of_another_dtype(choice, given, path):
    optimizer, call = make(table.row("ftml"), choice=choice, param_idx2name={1: "bias"})
    states = [tuple(a.astype(DTYPES[given]) for a in state) for state in call.states]
    states[0], states[2:] = call.states[0], call.states[2:]
    before = table.content(call.weights, states)
    if given == choice:
        getattr(optimizer, path)(*call[:3], states)
        assert table.content(call.weights, states) != before
        return
    words = rf"state 'd' of parameter 1 \('bias'\) is {given}; expected {choice}, as state_dtype says"
    with pytest.raises(TypeError, match=words):
        getattr(optimizer, path)(*call[:3], states)
    assert table.content(call.weights, states) == before
    assert optimizer.num_update == 0


def test_bfloat16_without_ml_dtypes(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ml_dtypes", None)
    with pytest.raises(
        ImportError, match=r"bfloat16 states need ml_dtypes: pip install numba_opt\[bfloat16\]"
    ):
        numba_opt.NAG(state_dtype="bfloat16").create_state(0, np.ones(3))


# ---------------------------------------------------------------- numbers


NUMBERS = [(row.id, choice, "float32", False) for row in table.TABLE if row.states for choice in CHOICES[1:]]
NUMBERS += [
    ("adamax", "float32", "float64", False),
    ("rmsprop-centered", "bfloat16", "float64", False),
    ("ftml", "float16", "float64", False),
    ("groupadagrad", "float32", "bfloat16", False),
    ("nag", "bfloat16", "float16", False),
    ("rmsprop", "float16", "float16", True),
    ("groupadagrad", "bfloat16", "bfloat16", True),
]


@quiet
@pytest.mark.parametrize(("name", "choice", "dtype", "masters"), NUMBERS)
def test_is_the_usual_step_with_rounded_states(name, choice, dtype, masters):
    """Weights and states in float32 (float64 for such weights) take the step; what is stored is rounded."""
    row = table.row(name)
    given = {"dtype": dtype, "choice": choice, "multi_precision": masters}
    runs = {path: make(row, use_fused_step=path == "fused", **given) for path in ("fused", "step")}
    optimizer, call = make(row, **given)
    real = np.float64 if dtype == "float64" else np.float32
    plain = table.build(row, **table.common(row))
    for _ in range(3):
        for found, arrays in runs.values():
            found.update_multi_precision(*arrays)
        weights, states = [], []
        for weight, state in zip(call.weights, call.states, strict=True):
            arrays = table.leaves(state)
            weights.append((arrays[0] if masters else weight).astype(real))
            parts = [a.astype(real) for a in own(state, optimizer)]
            states.append(tuple(parts) if len(parts) > 1 else parts[0])
        plain.step(call.indices, weights, [g.astype(real) for g in call.grads], states)
        for weight, state, w, new in zip(call.weights, call.states, weights, states, strict=True):
            weight[...] = w.astype("f4") if weight.dtype.itemsize == 2 else w
            if masters:
                table.leaves(state)[0][...] = w
            for array, rounded in zip(own(state, optimizer), table.leaves(new), strict=True):
                array[...] = rounded.astype("f4")
        assert_same(table.outputs(runs["step"][1]), table.outputs(call))
        if row.cls.per_row:  # the sum's order shows in float32's last bits
            for a, b in zip(table.outputs(runs["fused"][1]), table.outputs(call), strict=True):
                np.testing.assert_allclose(*wide([a, b]), rtol=2**-7 if a.dtype.itemsize == 2 else 1e-5)
        else:
            assert_same(table.outputs(runs["fused"][1]), table.outputs(call))


@with_states
@each_half
def test_many_tensors_and_one(row, choice):
    optimizer, call = make(row, choice=choice)
    alone = call.copy()
    for _ in range(3):
        optimizer.update(*call)
    single = table.build(row, state_dtype=choice, **table.common(row))
    for _ in range(3):
        for t in call.indices:
            single.update(*([column[t]] for column in alone))
    assert_same(table.outputs(call), table.outputs(alone))


few = pytest.mark.parametrize(
    ("name", "choice"), [("rmsprop-centered", "bfloat16"), ("groupadagrad", "float16"), ("ftml", "bfloat16")]
)


@few
@pytest.mark.parametrize("fused", [True, False])
def test_sparse_rows(name, choice, fused):
    """Touched rows take the step that they would take alone."""
    row = table.row(name)
    optimizer, call = make(row, choice=choice, shapes=[(50, 6)], use_fused_step=fused)
    rows, values = np.array([3, 4, 17, 49]), np.random.default_rng(1).standard_normal((4, 6)).astype("f4")
    parts = [a[rows] for a in table.outputs(call)]
    optimizer.update([0], call.weights, [numba_opt.RowSparse(rows, values, (50, 6))], call.states)
    other = table.build(row, state_dtype=choice, use_fused_step=fused, **table.common(row))
    state = tuple(parts[1:]) if row.states > 1 else parts[1]
    other.update([0], [parts[0]], [values], [state])
    assert_same([a[rows] for a in table.outputs(call)], parts)


@few
@pytest.mark.parametrize("fused", [True, False])
def test_exact_rows_catch_up_as_dense_ones_go(name, choice, fused):
    row = table.row(name)
    runs = [
        make(row, choice=choice, shapes=[(20, 6)], use_fused_step=fused, sparse_update=mode)
        for mode in ("dense", "exact")
    ]
    runs[1][1].states[0] = (runs[0][1].copy().states[0], runs[1][1].states[0][1])
    rng = np.random.default_rng(2)
    for _ in range(7):
        rows = np.sort(rng.permutation(20)[:3])
        grad = numba_opt.RowSparse(rows, rng.standard_normal((3, 6)).astype("f4"), (20, 6))
        for optimizer, call in runs:
            optimizer.update([0], call.weights, [grad], call.states)
    optimizer, call = runs[1]
    optimizer.flush([0], call.weights, call.states)
    assert_same([call.weights, call.states[0][0]], table.outputs(runs[0][1]))


# ---------------------------------------------------------------- who else has states


@few
@quiet
@pytest.mark.parametrize("fused", [True, False])
def test_trainer(name, choice, fused):
    row = table.row(name)
    given = {"use_fused_step": fused, "multi_precision": True}
    optimizer, call = make(row, choice=choice, **given)
    half = make(row, "float16", choice, **given)[1]
    weights = [*call.weights, *half.weights]
    options = table.common(row) | given | row.kwargs
    trainer = numba_opt.Trainer([w.copy() for w in weights], row.cls.__name__, state_dtype=choice, **options)
    states = [optimizer.create_state_multi_precision(t, w) for t, w in enumerate(weights)]
    grads = [*call.grads, *half.grads]
    for _ in range(3):
        optimizer.update_multi_precision(list(range(len(weights))), weights, grads, states)
        trainer.step(grads)
    assert_same([*trainer.params.values()], weights)
    assert_same([*trainer.states.values()], states)


@with_states
@each_half
def test_checkpoint(row, choice, tmp_path):
    """Dtypes are kept, and the run goes on to the bit."""
    call = make(row, choice=choice)[1]
    trainers = [
        numba_opt.Trainer(call.copy().weights, table.build(row, state_dtype=choice)) for _ in range(2)
    ]
    for _ in range(2):
        trainers[0].step(call.grads)
    trainers[0].save(tmp_path / "state")
    trainers[1].load(tmp_path / "state")
    for trainer in trainers:
        trainer.step(call.grads)
    first, second = ([*t.params.values(), *t.states.values()] for t in trainers)
    assert {a.dtype for a in table.leaves(second[len(call.weights) :])} == {DTYPES[choice]}
    assert_same(second, first)
    other = numba_opt.Trainer(call.copy().weights, table.build(row))
    before = table.content([*other.params.values()], [*other.states.values()])
    with pytest.raises(
        CheckpointError,
        match=rf"states of float32 weights are \(.*\) in {choice}; this optimizer's are \(.*\) in float32$",
    ):
        other.load(tmp_path / "state")
    assert table.content([*other.params.values()], [*other.states.values()]) == before


@each_half
def test_updater(choice):
    row = table.row("adamax")
    weights = [np.ones((4, 3), np.float32), np.ones(2, np.float32)]
    updaters = [numba_opt.get_updater(table.build(row, state_dtype=choice)) for _ in range(2)]
    copies = [[w.copy() for w in weights] for _ in updaters]
    updaters[0]([0, 1], [w / 3 for w in weights], copies[0])
    updaters[1].set_states(updaters[0].get_states(dump_optimizer=True))
    copies[1] = [w.copy() for w in copies[0]]
    for updater, mine in zip(updaters, copies, strict=True):
        updater([0, 1], [w / 7 for w in weights], mine)
    assert_same(list(updaters[1].states.values()), list(updaters[0].states.values()))
    assert {a.dtype for a in table.leaves(list(updaters[1].states.values()))} == {DTYPES[choice]}
    assert_same(copies[1], copies[0])


def test_a_changed_optimizer_is_noticed():
    """A trainer whose optimizer has another state_dtype than its states refuses to step."""
    trainer = numba_opt.Trainer([np.ones(3, np.float32)], "nag", state_dtype="bfloat16")
    trainer.step([np.ones(3, np.float32)])
    trainer.optimizer.state_dtype = None
    with pytest.raises(TypeError, match=r"state 'mom' of parameter 0 .* is bfloat16; expected float32"):
        trainer.step([np.ones(3, np.float32)])


@quiet
def test_warning_speaks_of_what_is_half():
    weight = np.ones(3, np.float16)
    with pytest.warns(UserWarning, match="^weights in float16 can make"):
        numba_opt.NAG(state_dtype="float32").create_state_multi_precision(0, weight)


def test_warmup_compiles_them():
    kernels = cpu_kernels(variants(numba_opt.Adamax(state_dtype="bfloat16")), ["f32"], True)
    layouts = [layout.text for name, *(_, layout, *_) in (k for k in kernels if k[0] in ("dense", "rows"))]
    assert layouts == ["f32 f32 bf16 bf16", "f32 bf16 bf16", "f32 bf16 bf16"]
