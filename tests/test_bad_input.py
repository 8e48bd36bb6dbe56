"""Bad input raises an error that says what is wrong with which parameter, and changes nothing."""

from __future__ import annotations

import copy
import inspect
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest

import numba_opt
from numba_opt import lr_scheduler

from . import table

NAMES = {0: "first", 1: "second", 2: "third"}
PATHS = ["step", "fused_step", "update", "update_multi_precision"]


def prepared(name, **kwargs):
    """An optimizer that has made a step on the arrays of a call of three parameters."""
    row = table.row(name)
    call = table.make(row, [(3, 4), (3, 4), (3, 4)])
    optimizer = table.build(row, param_idx2name=NAMES, **kwargs)
    optimizer.update(*call)
    return optimizer, call


def snapshot(optimizer, *things):
    """All that a failing call could have changed."""
    kept = ("rule", "param_dict", "lr_scheduler", "_executors", "_checked")  # the last two are caches
    plain = {k: v for k, v in vars(optimizer).items() if k not in kept}
    return table.content(*things), copy.deepcopy(plain)


def expect(kind, words, optimizer, function, *args):
    """The call raises an error with all the words in its message and leaves everything as it was."""
    before = snapshot(optimizer, *args)
    with pytest.raises(kind) as info:
        function(*args)
    assert info.type is kind
    for word in words:
        assert word in str(info.value)
    assert snapshot(optimizer, *args) == before


# ---------------------------------------------------------------- arrays

LAST = ["parameter 2 ('third')"]


def read_only(array):
    array.flags.writeable = False
    return array


def put(column, value, k=2):
    """A change of a call: what stands in a column for the last parameter."""

    def change(call):
        getattr(call, column)[k] = value(call) if callable(value) else value
        return call

    return change


def spoil(column, function):
    """A change of the last parameter's weight, gradient or state."""
    return put(column, lambda call: function(getattr(call, column)[2]))


def each_state(function):
    return lambda state: tuple(map(function, state)) if isinstance(state, tuple) else function(state)


# name: (optimizers, what is done to a good call, error, words of its message)
ANY = ["nag-plain", "nag", "ftml", "groupadagrad"]
WITH_STATE = ["nag", "ftml", "groupadagrad"]
ARRAYS = {
    "gradient shape": (ANY, spoil("grads", lambda g: g[:2]), ValueError, ["gradient", "(2, 4)", "(3, 4)"]),
    "gradient transposed": (ANY, spoil("grads", np.transpose), ValueError, ["gradient", "(4, 3)", "(3, 4)"]),
    "gradient scalar": (ANY, spoil("grads", np.sum), TypeError, ["gradient", "float32", "array"]),
    "gradient 0-d": (ANY, spoil("grads", lambda g: np.array(g[0, 0])), ValueError, ["gradient", "()"]),
    "gradient flat": (ANY, spoil("grads", np.ravel), ValueError, ["gradient", "(12,)", "(3, 4)"]),
    "gradient list": (ANY, spoil("grads", np.ndarray.tolist), TypeError, ["gradient", "list", "array"]),
    "gradient None": (ANY, put("grads", None), TypeError, ["gradient", "None", "array"]),
    "weight shape": (ANY, spoil("weights", lambda w: w[:2].copy()), ValueError, ["(3, 4)", "(2, 4)"]),
    "weight list": (ANY, spoil("weights", np.ndarray.tolist), TypeError, ["weight", "list", "array"]),
    "weight None": (ANY, put("weights", None), TypeError, ["weight", "None", "array"]),
    "weight number": (ANY, put("weights", 1.5), TypeError, ["weight", "float", "array"]),
    "weight text": (ANY, put("weights", "w"), TypeError, ["weight", "str", "array"]),
    "weight read-only": (ANY, spoil("weights", read_only), ValueError, ["weight", "read-only"]),
    "weight broadcast": (
        ANY,
        spoil("weights", lambda w: np.lib.stride_tricks.as_strided(w, w.shape, (0, 4), writeable=True)),
        ValueError,
        ["weight", "share memory"],
    ),
    "weight windows": (
        ANY,
        spoil("weights", lambda w: np.lib.stride_tricks.as_strided(w, w.shape, (8, 4), writeable=True)),
        ValueError,
        ["weight", "share memory"],
    ),
    "weight masked": (ANY, spoil("weights", np.ma.masked_array), TypeError, ["weight", "masked"]),
    "gradient masked": (ANY, spoil("grads", np.ma.masked_array), TypeError, ["gradient", "masked"]),
    "state shape": (WITH_STATE, spoil("states", each_state(lambda s: s[:2].copy())), ValueError, ["(2, "]),
    "state number": (WITH_STATE, put("states", 0.0), TypeError, ["state", "float"]),
    "state None": (WITH_STATE, put("states", None), TypeError, ["state", "None"]),
    "state without need": (
        ["nag-plain"],
        put("states", np.zeros(1)),
        TypeError,
        ["state", "ndarray", "None"],
    ),
    "state too short": (["ftml"], spoil("states", lambda s: s[:2]), TypeError, ["tuple of 3", "d, v, z"]),
    "state too long": (["nag"], spoil("states", lambda s: (s, s)), TypeError, ["state 'mom'", "tuple"]),
    "state part None": (
        ["ftml"],
        spoil("states", lambda s: (*s[:2], None)),
        TypeError,
        ["state 'z'", "None"],
    ),
    "state read-only": (WITH_STATE, spoil("states", each_state(read_only)), ValueError, ["read-only"]),
    "state part read-only": (
        ["ftml"],
        spoil("states", lambda s: (s[0], read_only(s[1]), s[2])),
        ValueError,
        ["state 'v'", "read-only"],
    ),
    "weight 1-d": (
        ["groupadagrad"],
        lambda call: spoil("grads", np.ravel)(spoil("weights", np.ravel)(call)),
        ValueError,
        ["weight", "(12,)", "2 dimensions"],
    ),
    "weight 3-d": (
        ["groupadagrad"],
        lambda call: spoil("grads", lambda g: g[None])(spoil("weights", lambda w: w[None])(call)),
        ValueError,
        ["weight", "(1, 3, 4)", "2 dimensions"],
    ),
    "state not for rows": (
        ["groupadagrad"],
        put("states", np.zeros((3, 4), np.float32)),
        ValueError,
        ["state 'history'", "(3, 4)", "(3, 1)"],
    ),
}
for dtype in ("int32", "uint8", "bool", "complex64", "object", "U4", "M8[s]", ">f4", "longdouble"):
    seen = str(np.dtype(dtype))
    for column, name in (("weights", "weight"), ("grads", "gradient"), ("states", "state")):
        ARRAYS[f"{name} {dtype}"] = (
            WITH_STATE,
            spoil(column, each_state(lambda a, dtype=dtype: np.zeros(a.shape, dtype))),
            TypeError,
            [name, seen, "expected"],
        )
for column, name in (("weights", "weight"), ("grads", "gradient"), ("states", "state")):
    ARRAYS[f"{name} of double precision"] = (
        WITH_STATE,
        spoil(column, each_state(lambda a: a.astype("f8"))),
        TypeError,
        ["float64", "float32"],
    )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for case, (names, *_) in ARRAYS.items() for name in names]
)
def test_arrays(name, case, path):
    _, change, kind, words = ARRAYS[case]
    optimizer, call = prepared(name, use_fused_step=path != "step")
    expect(kind, words + LAST, optimizer, getattr(optimizer, path), *change(call))


SHARED = {
    "weight is its gradient": put("weights", lambda call: call.grads[2]),
    "weight is another's gradient": put("weights", lambda call: call.grads[0]),
    "gradient is another weight": put("grads", lambda call: call.weights[1]),
    "the same weight twice": put("weights", lambda call: call.weights[0]),
    "a view of a weight": put("weights", lambda call: call.weights[0][:]),
    "a reversed weight": put("weights", lambda call: call.weights[0][::-1]),
}
SHARED_STATE = {
    "weight is its state": put("weights", lambda call: table.leaves(call.states[2])[0]),
    "a state is a weight": put("states", lambda call: first_state(call, call.weights[1])),
    "a state is the gradient": put("states", lambda call: first_state(call, call.grads[2])),
    "the same state twice": put("states", lambda call: call.states[0]),
}


def first_state(call, array):
    state = call.states[2]
    return (array, *state[1:]) if isinstance(state, tuple) else array


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("name", "case"),
    [(name, case) for case in SHARED for name in ANY]
    + [(name, case) for case in SHARED_STATE for name in ("nag", "ftml")]
    + [("groupadagrad", "the same state twice")],
)
def test_shared_memory(name, case, path):
    optimizer, call = prepared(name, use_fused_step=path != "step")
    call = (SHARED | SHARED_STATE)[case](call)
    expect(ValueError, ["shares memory", *LAST], optimizer, getattr(optimizer, path), *call)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shift", [-11, -1, 1, 7, 11])
@pytest.mark.parametrize("other", ["gradient", "weight", "state"])
def test_partial_overlap(path, shift, other):
    """Two arrays in one buffer, one element in common or more."""
    optimizer, call = prepared("nag")
    buffer = np.zeros(60, np.float32)
    mine, its = (buffer[k : k + 12].reshape(3, 4) for k in (20, 20 + shift))
    call.weights[2] = mine
    {"gradient": call.grads, "weight": call.weights, "state": call.states}[other][1] = its
    expect(ValueError, ["shares memory", *LAST], optimizer, getattr(optimizer, path), *call)


@pytest.mark.parametrize("path", PATHS)
def test_neighbours_in_one_buffer_are_fine(path):
    optimizer, call = prepared("nag")
    buffer = np.zeros(36, np.float32)
    call.weights[2], call.grads[1], call.states[0] = (buffer[k : k + 12].reshape(3, 4) for k in (0, 12, 24))
    getattr(optimizer, path)(*call)
    assert buffer[:12].any()
    assert optimizer.num_update == 2


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scalar", [np.float32(1), np.float64(1)])
def test_a_numpy_scalar_is_no_weight(scalar, path):
    """It looks like an array of no dimensions, but the update would go to a copy and be lost."""
    optimizer = numba_opt.NAG(param_idx2name=NAMES, momentum=0)
    grad = np.ones((), scalar.dtype)
    function = getattr(optimizer, path)
    expect(
        TypeError,
        ["weight", *LAST, type(scalar).__name__],
        optimizer,
        function,
        [2],
        [scalar],
        [grad],
        [None],
    )


def test_a_state_of_its_own_twice():
    optimizer, call = prepared("ftml")
    call.states[2] = (call.states[2][0],) * 3
    expect(ValueError, ["state 'v'", "state 'd'", *LAST], optimizer, optimizer.update, *call)


# ---------------------------------------------------------------- lists and indices

LISTS = {
    "indices short": (lambda c: ([0, 1], *c[1:]), ValueError, ["weights has length 3", "2"]),
    "weights short": (lambda c: (c[0], c[1][:2], *c[2:]), ValueError, ["weights has length 2", "3"]),
    "grads long": (lambda c: (*c[:2], c[2] * 2, c[3]), ValueError, ["grads has length 6", "3"]),
    "states short": (lambda c: (*c[:3], []), ValueError, ["states has length 0", "3"]),
    "indices number": (lambda c: (0, *c[1:]), TypeError, ["indices", "list", "int"]),
    "weights array": (lambda c: (c[0], np.stack(c[1]), *c[2:]), TypeError, ["weights", "list", "ndarray"]),
    "grads None": (lambda c: (*c[:2], None, c[3]), TypeError, ["grads", "list", "None"]),
    "states dict": (lambda c: (*c[:3], dict(enumerate(c[3]))), TypeError, ["states", "list", "dict"]),
    "index twice": (lambda c: ([0, 1, 0], *c[1:]), ValueError, ["indices", "different", "0"]),
    "index unhashable": (lambda c: ([0, 1, [2]], *c[1:]), TypeError, ["[2]"]),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", LISTS)
def test_lists(case, path):
    change, kind, words = LISTS[case]
    optimizer, call = prepared("nag", multi_precision=True)
    expect(kind, words, optimizer, getattr(optimizer, path), *change(call))


# ---------------------------------------------------------------- half precision


def half_call(half=np.float16):
    row = table.row("nag")
    optimizer = table.build(row, multi_precision=True, param_idx2name=NAMES)
    call = table.make(row, [(3, 4), (3, 4), (3, 4)], half)
    states = [optimizer.create_state_multi_precision(t, w) for t, w in enumerate(call.weights)]
    return optimizer, table.Call(*call[:3], states)


def master(array):
    return lambda call: (array(call), call.states[2][1])


MASTERS = {
    "no master": (put("states", lambda c: c.states[2][1]), TypeError, ["(float32 weight, state)"]),
    "no state": (put("states", None), TypeError, ["(float32 weight, state)"]),
    "master shape": (put("states", master(lambda c: c.states[2][0][:2])), ValueError, ["(2, 4)", "(3, 4)"]),
    "master double": (put("states", master(lambda c: c.states[2][0].astype("f8"))), TypeError, ["float64"]),
    "master half": (put("states", master(lambda c: c.states[2][0].astype("f2"))), TypeError, ["float16"]),
    "master of another": (put("states", master(lambda c: c.states[0][0])), ValueError, ["shares memory"]),
    "master read-only": (
        put("states", master(lambda c: read_only(c.states[2][0]))),
        ValueError,
        ["read-only"],
    ),
    "weight twice": (put("weights", lambda c: c.weights[0]), ValueError, ["shares memory"]),
    "weight is its gradient": (put("weights", lambda c: c.grads[2]), ValueError, ["shares memory"]),
    "weight read-only": (spoil("weights", read_only), ValueError, ["weight", "read-only"]),
    "gradient shape": (spoil("grads", lambda g: g[:2]), ValueError, ["gradient", "(2, 4)", "(3, 4)"]),
    "gradient integer": (spoil("grads", lambda g: g.astype(int)), TypeError, ["gradient", "int64"]),
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("case", MASTERS)
def test_master_copies(case, fused):
    change, kind, words = MASTERS[case]
    optimizer, call = half_call()
    optimizer.use_fused_step = fused
    expect(kind, words + LAST, optimizer, optimizer.update_multi_precision, *change(call))


# ---------------------------------------------------------------- hyper-parameters

NOT_FINITE = [math.nan, math.inf, -math.inf, 10**400]
NOT_NUMBERS = ["0.1", [0.1], 1j, True, np.ones(1)]
RANGES = {  # of the parameters of all classes: bad values beside those that are bad everywhere
    "learning_rate": [-0.1, -1e-300],
    "momentum": [-0.5],
    "rho": [-0.1, 1.0, 1.5],
    "beta1": [-0.1, 1.0, 1.5],
    "beta2": [-0.1, 1.0, 1.5],
    "epsilon": [-1e-8],
    "wd": [-0.1],
    "clip_gradient": [-1.0],
    "clip_weights": [-1.0],
    "rescale_grad": [],
}
OPTIONAL = {"learning_rate", "clip_gradient", "clip_weights"}
COMMON = ["wd", "clip_gradient", "rescale_grad"]


def hyper_parameters():
    for cls in {row.cls for row in table.TABLE}:
        for name in [*inspect.signature(cls).parameters, *COMMON]:
            if name in RANGES:
                yield cls, name


def test_every_number_is_tried():
    """A new optimizer's hyper-parameter must come into RANGES."""
    flags = {"use_fused_step", "multi_precision", "centered", "reduced", "kwargs"}
    names = {name for row in table.TABLE for name in inspect.signature(row.cls).parameters}
    assert names - flags <= set(RANGES)


@pytest.mark.parametrize(
    ("cls", "name"), sorted(hyper_parameters(), key=str), ids=lambda v: getattr(v, "__name__", v)
)
def test_hyper_parameters(cls, name):
    for value in RANGES[name] + NOT_FINITE:
        with pytest.raises(ValueError, match=rf"^{name} must be .*, got {re.escape(repr(value))}"):
            cls(**{name: value})
    for value in NOT_NUMBERS + ([] if name in OPTIONAL else [None]):
        with pytest.raises(TypeError, match=rf"^{name} must be .*of type {type(value).__name__}"):
            cls(**{name: value})


@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(0.5), 0, np.int64(0)])
def test_numbers_of_numpy_are_numbers(value):
    assert numba_opt.Adamax(learning_rate=value, beta1=value).beta1 == value


CONSTRUCTOR = [
    ({"begin_num_update": -1}, ValueError, "begin_num_update must be an integer >= 0, got -1"),
    ({"begin_num_update": 1.5}, TypeError, "begin_num_update must be an integer >= 0, got 1.5"),
    ({"aggregate_num": 0}, ValueError, "aggregate_num must be an integer >= 1, got 0"),
    ({"aggregate_num": 2.5}, TypeError, "aggregate_num must be an integer >= 1, got 2.5"),
    ({"aggregate_num": math.nan}, TypeError, "aggregate_num must be an integer >= 1, got nan"),
    ({"aggregate_num": "4"}, TypeError, "aggregate_num must be an integer >= 1, got '4'"),
    ({"lr_scheduler": 0.1}, TypeError, "lr_scheduler must be callable"),
    ({"param_idx2name": ["a"]}, TypeError, "param_idx2name must be a dict"),
    ({"param_dict": [1]}, TypeError, "param_dict must be a dict"),
]


@table.each
@pytest.mark.parametrize(("kwargs", "kind", "message"), CONSTRUCTOR, ids=lambda v: str(v)[:40])
def test_constructor(row, kwargs, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        table.build(row, **kwargs)


@table.each
def test_unknown_keyword_lists_the_valid_ones(row):
    with pytest.raises(TypeError) as info:
        table.build(row, learning_rates=0.1)
    message = str(info.value)
    assert f"{row.cls.__name__}() has no parameter 'learning_rates'" in message
    own = set(inspect.signature(row.cls).parameters) - {"kwargs"}
    shared = set(inspect.signature(numba_opt.Optimizer).parameters) - {"kwargs"}
    assert set(message.split("it takes ")[1].split(", ")) == own | shared


@pytest.mark.parametrize("name", ["adam", "", "NAGG"])
def test_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ValueError, match=re.escape(repr(name))) as info:
        numba_opt.create(name)
    assert all(row.cls.__name__ in str(info.value) for row in table.TABLE)


@pytest.mark.parametrize("name", [None, 3, numba_opt.NAG, b"nag"])
def test_names_are_text(name):
    with pytest.raises(TypeError, match="name must be a str"):
        numba_opt.create(name)


@pytest.mark.parametrize("klass", [dict, numba_opt.create, "NAG", None])
def test_only_optimizers_are_registered(klass):
    before = dict(numba_opt.Optimizer.opt_registry)
    with pytest.raises(TypeError, match="klass must be a subclass of Optimizer"):
        numba_opt.register(klass)
    assert numba_opt.Optimizer.opt_registry == before


# ---------------------------------------------------------------- hyper-parameters that are set later


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("attribute", "value", "words"),
    [
        ("rescale_grad", math.nan, ["rescale_grad", "nan"]),
        ("rescale_grad", math.inf, ["rescale_grad", "inf"]),
        ("lr", math.nan, ["learning_rate", "nan"]),
        ("lr", -1.0, ["learning_rate", "-1.0"]),
        ("wd", math.nan, ["wd", "nan"]),
        ("clip_gradient", math.nan, ["clip_gradient", "nan"]),
    ],
)
def test_attributes(attribute, value, words, path):
    optimizer, call = prepared("adamax")
    setattr(optimizer, attribute, value)
    before = table.content(call)
    with pytest.raises(ValueError, match=".*".join(words)):
        getattr(optimizer, path)(*call)
    assert table.content(call) == before
    assert optimizer.num_update == 1
    assert optimizer._index_update_count == dict.fromkeys(range(3), 1)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("lr", [math.nan, math.inf, -0.5, None, "0.1"])
def test_a_scheduler_that_gives_no_rate(lr, path):
    good = {"rate": 0.1}
    optimizer, call = prepared("nag", lr_scheduler=lambda _: good["rate"], learning_rate=None)
    good["rate"] = lr
    kind = ValueError if isinstance(lr, float) else TypeError
    expect(kind, ["lr_scheduler", repr(lr)], optimizer, getattr(optimizer, path), *call)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("value", [math.nan, -1.0, None])
@pytest.mark.parametrize("mult", ["lr_mult", "wd_mult"])
def test_multipliers_of_parameters(mult, value, path):
    params = {k: SimpleNamespace(lr_mult=1.0, wd_mult=1.0) for k in range(3)}
    optimizer, call = prepared("nag", param_dict=params)
    setattr(params[2], mult, value)
    kind = ValueError if isinstance(value, float) else TypeError
    expect(kind, [f"param_dict[2].{mult}", repr(value)], optimizer, getattr(optimizer, path), *call)


@pytest.mark.parametrize("mult", ["lr_mult", "wd_mult"])
def test_set_multipliers(mult):
    optimizer, _ = prepared("nag")
    optimizer.set_lr_mult({0: 0.5})
    optimizer.set_wd_mult({0: 0.5})
    function = getattr(optimizer, f"set_{mult}")
    expect(TypeError, [f"args_{mult}", "dict"], optimizer, function, [1.0])
    expect(TypeError, [f"args_{mult}['a']", "'x'"], optimizer, function, {0: 1.0, "a": "x"})
    expect(ValueError, [f"args_{mult}[3]", "nan"], optimizer, function, {3: math.nan})
    expect(ValueError, [f"args_{mult}[3]", "-1"], optimizer, function, {3: -1})


@pytest.mark.parametrize("lr", [math.nan, -0.1, math.inf])
def test_set_learning_rate(lr):
    optimizer, _ = prepared("nag")
    expect(ValueError, ["lr", repr(lr)], optimizer, optimizer.set_learning_rate, lr)
    expect(TypeError, ["lr", "'1'"], optimizer, optimizer.set_learning_rate, "1")
    scheduled, _ = prepared("nag", learning_rate=None, lr_scheduler=lr_scheduler.FactorScheduler(5))
    expect(UserWarning, ["lr_scheduler"], scheduled, scheduled.set_learning_rate, 0.1)


# ---------------------------------------------------------------- weight decay by rows


def test_groupadagrad_has_no_weight_decay():
    with pytest.raises(ValueError, match=r"wd must be 0 for GroupAdaGrad.*0\.1"):
        numba_opt.GroupAdaGrad(wd=0.1)
    numba_opt.GroupAdaGrad(wd=0)


@pytest.mark.parametrize("path", PATHS)
def test_groupadagrad_has_no_weight_decay_later_either(path):
    optimizer, call = prepared("groupadagrad")
    optimizer.wd = 0.1
    expect(ValueError, ["wd must be 0", "0.1"], optimizer, getattr(optimizer, path), *call)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_groupadagrad_makes_states_of_matrices_only(shape):
    optimizer = numba_opt.GroupAdaGrad(param_idx2name=NAMES)
    for function in (optimizer.create_state, optimizer.create_state_multi_precision):
        expect(
            ValueError,
            ["weight", "'second'", str(shape), "2 dimensions"],
            optimizer,
            function,
            1,
            np.zeros(shape),
        )


@pytest.mark.parametrize("weight", [None, [1.0], 1.0, "w"])
def test_create_state_takes_arrays(weight):
    optimizer = numba_opt.NAG(param_idx2name=NAMES)
    for function in (optimizer.create_state, optimizer.create_state_multi_precision):
        expect(TypeError, ["weight", "'second'", "array"], optimizer, function, 1, weight)


# ---------------------------------------------------------------- Updater


@pytest.mark.parametrize("aggregate", [1, 2, np.inf])
@pytest.mark.parametrize("case", ["gradient shape", "gradient int32", "weight read-only", "weight None"])
def test_updater_with_one_bad_parameter(case, aggregate):
    _, change, kind, words = ARRAYS[case]
    optimizer, call = prepared("ftml", aggregate_num=aggregate)
    updater = numba_opt.Updater(optimizer)
    call = change(table.Call([0, 1, 2], *(list(column) for column in call[1:])))
    expect(kind, words + LAST, optimizer, updater, 2, call.grads[2], call.weights[2])
    assert updater.states == {}


@pytest.mark.parametrize("case", ["gradient shape", "gradient int32", "weight read-only", "weight None"])
def test_updater_checks_a_whole_call_first(case):
    """All that goes into one call of the optimizer; the parameters that it had not seen stay unseen."""
    _, change, kind, words = ARRAYS[case]
    optimizer, call = prepared("ftml", aggregate_num=np.inf)
    updater = numba_opt.Updater(optimizer)
    updater([0, 1], call.grads[:2], call.weights[:2])
    states = table.content(list(updater.states.values()))
    call = change(call)
    expect(kind, words + LAST, optimizer, updater, [0, 1, 2], call.grads, call.weights)
    assert list(updater.states) == [0, 1]
    assert table.content(list(updater.states.values())) == states


@pytest.mark.parametrize("aggregate", [1, 2, np.inf])
@pytest.mark.parametrize("missing", ["grads", "weights"])
def test_updater_with_lists_of_different_lengths(missing, aggregate):
    optimizer, call = prepared("nag", aggregate_num=aggregate)
    updater = numba_opt.Updater(optimizer)
    getattr(call, missing).pop()
    expect(ValueError, ["length"], optimizer, updater, [0, 1, 2], call.grads, call.weights)
    assert updater.states == {}


@pytest.mark.parametrize("optimizer", [None, "nag", numba_opt.NAG])
def test_updater_takes_an_optimizer(optimizer):
    with pytest.raises(TypeError, match="optimizer must be an Optimizer"):
        numba_opt.get_updater(optimizer)
