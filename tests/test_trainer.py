"""`Trainer`: its steps are the optimizer's updates to the bit, whatever the gradients look like.

A case names a row of the table and what gradients are: dense, or sparse of some form and meaning.
"""

from __future__ import annotations

import copy
import gc
import math
import re
import threading
import tracemalloc
import types
import weakref
from collections.abc import Mapping
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
import scipy.sparse

import numba_opt
from numba_opt import RowSparse, Trainer, lr_scheduler
from numba_opt.cpu import threads

from . import table

NAMES = ["encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"]
SHAPES = [(6, 5), (8,), (4, 7), (3,)]
MIXED = ["f4", "f8", "f2", "f4"]  # the weights' dtypes

each_form = pytest.mark.parametrize("form", [dict, list])
each_fused = pytest.mark.parametrize("fused", [True, False], ids=["fused", "arrays"])
each_mode = pytest.mark.parametrize("mode", ["lazy", "dense", "exact"])

FORMS = ["rows", "duplicates", "csr", "csr with duplicates", "half"]
SPARSE = [(form, mode) for form in FORMS for mode in ("lazy", "dense", "exact")]
CASES = [*((row, "dense", "lazy") for row in table.TABLE), *((table.row("nag"), *case) for case in SPARSE)]
each_case = pytest.mark.parametrize(
    ("row", "gradient", "mode"), CASES, ids=[f"{row.id}-{form}-{mode}" for row, form, mode in CASES]
)


def snapshot(value):
    """A trainer, or a part of its `state_dict`, as plain values that can be compared to the bit."""
    if isinstance(value, Trainer):
        return snapshot(value.state_dict())
    if isinstance(value, Mapping):
        parts = {key: snapshot(part) for key, part in value.items()}
        parts.pop("counts", None)  # the optimizer's, in the order of their first updates; they come twice
        return parts
    if isinstance(value, (tuple, list)):
        return [snapshot(part) for part in value]
    if isinstance(value, RowSparse):
        return snapshot([value.rows, value.values])
    if scipy.sparse.issparse(value):
        return snapshot([value.data, value.indices, value.indptr])
    return (value.dtype.str, value.shape, value.tobytes()) if isinstance(value, np.ndarray) else value


def random(rng, shape, dtype="f4"):
    return np.asarray(rng.standard_normal(shape)).astype(dtype)


def formed(form, rng, shape, dtype="f4"):
    """A random gradient; a sparse one has small multiples of 1/8, which add up exactly in every precision."""
    if form == "dense":
        return random(rng, shape, dtype)
    rows = rng.permutation(shape[0])[: -(-shape[0] // 2)]
    values = (rng.integers(1, 24, (len(rows), *shape[1:])) / 8).astype("f2" if form == "half" else dtype)
    if form == "duplicates" or (form.endswith("duplicates") and len(shape) != 2):
        rows, values = np.tile(rows, 2), np.concatenate([values, values / 2])
    if not form.startswith("csr") or len(shape) != 2 or dtype == "f2":
        return RowSparse(rows, values, shape)
    times = 2 if form.endswith("duplicates") else 1
    matrix = scipy.sparse.csr_array(RowSparse(rows, values, shape).to_dense())
    ends = matrix.indptr * times
    order = np.concatenate([np.tile(np.arange(a, b), times) for a, b in pairwise(matrix.indptr)])
    matrix.data, matrix.indices, matrix.indptr = matrix.data[order], matrix.indices[order], ends
    # what lies behind the last entry is none
    matrix.data = np.append(matrix.data, np.full(5, 1e6, dtype))
    matrix.indices = np.append(matrix.indices, np.zeros(5, matrix.indices.dtype))
    return matrix


def numbers(grad):
    """The array of a gradient's values."""
    if isinstance(grad, np.ndarray):
        return grad
    return grad.values if isinstance(grad, RowSparse) else grad.data


def whole(grad):
    """A gradient as an array."""
    if isinstance(grad, np.ndarray):
        return grad
    if isinstance(grad, RowSparse):
        return grad.to_dense()
    parts = grad.data[: grad.indptr[-1]], grad.indices[: grad.indptr[-1]], grad.indptr
    return scipy.sparse.csr_array(parts, grad.shape).toarray()


def norm_of(grads):
    """The norm of some gradients, in double precision and with one rounding for the sum."""
    squares = (np.square(whole(grad).astype("f8")) for grad in grads)
    return math.sqrt(math.fsum(x for some in squares for x in some.ravel().tolist()))


def clipped(rescale, trainer):
    """What a trainer that clips multiplied its last gradients by."""
    limit, norm = trainer.clip_global_norm, trainer.grad_norm
    return rescale * limit / norm if norm > limit else rescale


class Pair:
    """A trainer, and copies of its parameters that `Optimizer.update_multi_precision` updates."""

    def __init__(
        self,
        row,
        form=dict,
        dtypes=("f4",) * 4,
        shapes=SHAPES,
        trainer=None,
        seed=0,
        gradient="dense",
        **options,
    ):
        rng, self.gradient = np.random.default_rng(seed), gradient
        shapes = [table.fit(row, shape) for shape in shapes]
        dtypes = [np.dtype(d) for d in dtypes]
        self.params = [random(rng, s, d) for s, d in zip(shapes, dtypes, strict=True)]
        self.weights = [weight.copy() for weight in self.params]
        self.names = NAMES if len(shapes) == 4 and form is dict else [str(t) for t in range(len(shapes))]
        self.form = form
        given = dict(zip(self.names, self.params, strict=True)) if form is dict else self.params
        self.trainer = Trainer(given, table.build(row, **options), **(trainer or {}))
        self.optimizer = table.build(row, **options)
        self.states = [self.optimizer.create_state_multi_precision(t, w) for t, w in enumerate(self.weights)]

    def gradients(self, rng):
        """Fresh ones of the weights' dtypes."""
        return [formed(self.gradient, rng, weight.shape, weight.dtype) for weight in self.weights]

    def give(self, grads):
        """Gradients in the trainer's form."""
        if self.form is list:
            return grads
        named = dict(zip(self.names, grads, strict=True))
        return {k: g for i, (k, g) in enumerate(named.items()) if g is not None or i % 2}

    def step(self, grads, rescale=None, **kwargs):
        before = snapshot(grads)
        self.trainer.step(self.give(grads), **kwargs)
        assert snapshot(grads) == before, "a gradient was changed"
        self.update(grads, self.trainer.optimizer.rescale_grad if rescale is None else rescale)

    def update(self, grads, rescale=1.0):
        """Update the copies; they must be as the trainer's."""
        self.optimizer.rescale_grad = rescale
        present = [t for t, grad in enumerate(grads) if grad is not None]
        columns = ([column[t] for t in present] for column in (self.weights, grads, self.states))
        self.optimizer.update_multi_precision(present, *columns)
        self.check()

    def flush(self):
        """Rows that are behind take their steps."""
        self.trainer.flush()
        self.optimizer.flush(list(range(len(self.weights))), self.weights, self.states)

    def check(self):
        assert snapshot(self.params) == snapshot(self.weights)
        assert snapshot(list(self.trainer.states.values())) == snapshot(self.states)
        if self.optimizer.sparse_update == "exact":  # a `state_dict` would bring all rows up to date
            return
        found = self.trainer.state_dict()
        for t, name in enumerate(self.names):
            entry = found["parameters"][name]
            assert snapshot(entry["weight"]) == snapshot(self.weights[t])
            assert snapshot(entry["state"]) == snapshot(self.states[t])
            assert entry["count"] == self.optimizer._index_update_count.get(t, 0)
        assert self.trainer.optimizer.num_update == self.optimizer.num_update


def unchanged(trainer, call, error, match):
    """A call is refused and leaves everything as it was."""
    before = snapshot(trainer)
    with pytest.raises(error, match=match):
        call()
    assert snapshot(trainer) == before


# ---------------------------------------------------------------- a step is an update


class Tagged(np.ndarray):
    pass


def fortran(array):
    return np.asfortranarray(array)


def strided(array):
    base = np.full((*array.shape, 2), 7, array.dtype)
    base[..., 0] = array
    return base[..., 0]


def misaligned(array):
    return np.ndarray(array.shape, array.dtype, bytearray(b"x" + array.tobytes()), offset=1)


def read_only(array):
    array.flags.writeable = False
    return array


def tagged(array):
    return array.view(Tagged)


LAYOUTS = [np.copy, np.copy, fortran, strided, misaligned, read_only, tagged]
GRADIENTS = {"f4": ["f4", "f2"], "f8": ["f8"], "f2": ["f2", "f4"]}  # by the weight


@table.each
@each_form
@each_fused
def test_steps_are_updates(row, form, fused):
    """Persistent buffers, fresh arrays, odd layouts and none at all, changing from step to step."""
    pair = Pair(row, form, MIXED, multi_precision=True, use_fused_step=fused, **table.common(row))
    rng = np.random.default_rng(1)
    buffers = pair.gradients(rng)
    for n in range(24):
        if n % 6 < 3:  # changed in place, several times in a row
            for buffer in buffers:
                buffer[...] = random(rng, buffer.shape)
            pair.step(buffers)
        elif n % 6 == 3:
            pair.step(pair.gradients(rng))
        else:
            grads = []
            for weight, buffer, code in zip(pair.weights, buffers, MIXED, strict=True):
                dtype = GRADIENTS[code][rng.integers(len(GRADIENTS[code]))]
                layout = LAYOUTS[rng.integers(len(LAYOUTS))]
                odd = layout(random(rng, weight.shape, dtype))
                grads.append([None, buffer, odd, odd][rng.integers(4)])
            pair.step(grads)


@each_mode
@each_form
@each_fused
def test_steps_with_sparse_gradients_are_updates(mode, form, fused):
    """Of any form, dense, and none at all, changing from step to step."""
    dtypes = ["f4", "f8", "f4", "f4"]
    pair = Pair(table.row("nag"), form, dtypes, sparse_update=mode, use_fused_step=fused, wd=0.1)
    rng = np.random.default_rng(35)
    kinds = ["rows", "dense", None, "duplicates", "csr"]
    for k in range(16):
        chosen = [kinds[(k + k // 4 + t) % 5] for t in range(4)]
        weights = zip(chosen, pair.weights, strict=True)
        pair.step([kind and formed(kind, rng, weight.shape, weight.dtype) for kind, weight in weights])
    pair.flush()
    pair.check()


@table.each
def test_patterns_of_missing_gradients(row):
    """All sixteen of them, some of them repeatedly, in persistent buffers and in fresh arrays."""
    pair = Pair(row)
    rng = np.random.default_rng(2)
    buffers = pair.gradients(rng)
    for n in [*range(16), *range(16), 15, 15, 5, 5, 0, 5, 15]:
        grads = buffers if n % 3 else pair.gradients(rng)
        pair.step([grad if n >> t & 1 else None for t, grad in enumerate(grads)])
    assert len({entry["count"] for entry in pair.trainer.state_dict()["parameters"].values()}) > 1


@pytest.mark.parametrize("row", [table.row("nag"), table.row("groupadagrad")], ids=lambda row: row.id)
@pytest.mark.parametrize("half", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("copies", [True, False], ids=["copies", "plain"])
@pytest.mark.filterwarnings("ignore:states in")
def test_half_precision(row, half, copies):
    pair = Pair(row, dtypes=[half, half, "f4", "f8"], multi_precision=copies)
    rng = np.random.default_rng(3)
    for n in range(4):
        grads = pair.gradients(rng)
        grads[2] = grads[2].astype(half if n % 2 else "f4")
        pair.step(grads)


@table.each
def test_weights_of_every_layout(row):
    pair = Pair(row, list, learning_rate=0.1)
    rng = np.random.default_rng(4)
    layouts = [strided, fortran, misaligned, tagged]
    params = [lay(w.copy()) for lay, w in zip(layouts, pair.params, strict=True)]
    trainer = Trainer(params, table.build(row, learning_rate=0.1))
    for _ in range(3):
        grads = pair.gradients(rng)
        pair.step(grads)
        trainer.step(grads)
    assert snapshot(params) == snapshot(pair.weights)


@table.each
@each_fused
def test_batch_size(row, fused):
    pair = Pair(row, rescale_grad=0.75, use_fused_step=fused)
    rng = np.random.default_rng(5)
    for batch_size in (1, 32, 7, np.int64(3), 0.5, np.float32(2)):
        pair.step(pair.gradients(rng), rescale=0.75 / float(batch_size), batch_size=batch_size)
    pair.trainer.optimizer.rescale_grad = 3.0  # may be changed at any time
    pair.step(pair.gradients(rng), rescale=3.0 / 4, batch_size=4)


@pytest.mark.parametrize(
    ("value", "error"),
    [(0, ValueError), (-1, ValueError), (math.nan, ValueError), (math.inf, ValueError), ("8", TypeError)],
)
def test_batch_size_refused(value, error):
    pair = Pair(table.row("nag"))
    grads = pair.give(pair.gradients(np.random.default_rng(0)))
    unchanged(pair.trainer, lambda: pair.trainer.step(grads, batch_size=value), error, "batch_size")


def test_shapes_of_every_kind():
    shapes = [(), (0,), (1,), (0, 5), (2, 3, 4), (1,) * 9]
    pair = Pair(table.row("ftml"), shapes=shapes, dtypes=["f4"] * 6)
    rng = np.random.default_rng(6)
    for _ in range(3):
        pair.step(pair.gradients(rng))


def test_a_step_without_any_gradient():
    pair = Pair(table.row("adamax"))
    pair.step([None] * 4)
    pair.step(pair.gradients(np.random.default_rng(0)))
    pair.step([None] * 4)
    assert pair.trainer.optimizer.num_update == 1


def test_many_parameters():
    row = table.row("adamax")
    shapes = [(t % 13,) for t in range(5000)]
    pair = Pair(row, shapes=shapes, dtypes=["f4", "f8"] * 2500)
    rng = np.random.default_rng(7)
    buffers = pair.gradients(rng)
    pair.step(buffers)
    pair.step([None if t % 7 == 0 else grad for t, grad in enumerate(buffers)])
    pair.step(pair.gradients(rng))
    assert "5,000 parameters" in repr(pair.trainer)


# ---------------------------------------------------------------- gradients that move


@each_fused
def test_new_array_object_at_the_same_address(fused):
    """The address says nothing about shape and dtype, so both are looked at again."""
    pair = Pair(table.row("nag"), list, ["f4"], [(6, 5)], use_fused_step=fused)
    memory = np.zeros(60, "f4")
    rng = np.random.default_rng(8)
    for n in range(6):
        memory[...] = random(rng, 60)
        pair.step([memory[:30].reshape(6, 5)])
        halves = memory.view("f2")[:30].reshape(6, 5)
        halves[...] = n
        pair.step([halves])
        for wrong in (memory[:30].reshape(5, 6), memory[:30], memory.view("i4")[:30].reshape(6, 5)):
            unchanged(
                pair.trainer, lambda g=wrong: pair.trainer.step([g]), (ValueError, TypeError), "gradient"
            )


def test_short_lived_gradients():
    """Array objects whose ids and memory are used again and again."""
    pair = Pair(table.row("adamax"))
    rng = np.random.default_rng(9)
    for n in range(50):
        pair.step(pair.gradients(rng))
        spoilt = [np.full(weight.shape, n) for weight in pair.weights]
        del spoilt


def move(array):
    """Let an array's data be somewhere else, with the same content."""
    before, shape, blockers = array.ctypes.data, array.shape, []
    for _ in range(20):  # the old place may be given out again
        array.resize((1 << 20,), refcheck=False)
        blockers += [np.ones(array.size), *(np.ones(shape, array.dtype) for _ in range(100))]
        array.resize(shape, refcheck=False)
        if array.ctypes.data != before:
            return blockers
    raise AssertionError("the data are still where they were")


@each_fused
@pytest.mark.parametrize("what", ["gradients", "weights", "states"])
def test_same_array_object_whose_data_moved(what, fused):
    pair = Pair(table.row("nag"), use_fused_step=fused)
    rng = np.random.default_rng(10)
    grads = pair.gradients(rng)
    moving = {"gradients": grads, "weights": pair.params, "states": list(pair.trainer.states.values())}[what]
    for n in range(4):
        pair.step(grads)
        pair.step(grads)
        kept = move(moving[n])
        for grad in grads:
            grad += 1
        pair.step(grads)
        del kept


# ---------------------------------------------------------------- multipliers, freezing, schedules


@table.each
def test_multipliers_by_name_and_pattern(row):
    lr_mult = {"*.bias": 0.5, "decoder.*": 2, "encoder.weight": 3.0}  # the last one that fits counts
    options = {"trainer": {"lr_mult": lr_mult, "wd_mult": {"*.bias": 0}}, **table.common(row)}
    pair = Pair(row, **options)
    pair.optimizer.set_lr_mult({0: 3.0, 1: 0.5, 2: 2.0, 3: 2.0})
    pair.optimizer.set_wd_mult({1: 0, 3: 0})
    rng = np.random.default_rng(11)
    for _ in range(3):
        pair.step(pair.gradients(rng))
    pair.trainer.set_lr_mult({"decoder.bias": 0})  # all earlier ones are dropped
    pair.trainer.set_wd_mult({"encoder*": 4})
    pair.optimizer.set_lr_mult({3: 0})
    pair.optimizer.set_wd_mult({0: 4, 1: 4})
    for _ in range(3):
        pair.step(pair.gradients(rng))
    pair.trainer.set_lr_mult({})
    pair.optimizer.set_lr_mult({})
    pair.step(pair.gradients(rng))


def test_multipliers_of_the_optimizer_stay_behind_the_trainer_s():
    optimizer = numba_opt.NAG(learning_rate=1, momentum=0)
    optimizer.set_lr_mult({"a": 0.5, "b": 0.25})
    params = {name: np.zeros(1) for name in "abc"}
    trainer = Trainer(params, optimizer, lr_mult={"b": 3})
    trainer.step({name: np.ones(1) for name in "abc"})
    assert [float(-w[0]) for w in params.values()] == [0.5, 3, 1]
    optimizer.lr_mult["c"] = 0.0  # in place
    trainer.step({name: np.ones(1) for name in "abc"})
    assert [float(-w[0]) for w in params.values()] == [1, 6, 1]


def test_names_with_the_characters_of_patterns():
    params = {name: np.zeros(1) for name in ("w[0]", "w0", "w*", "w?")}
    trainer = Trainer(params, "nag", learning_rate=1, momentum=0, lr_mult={"w[0]": 2, "w*": 3, "w[*]": 0})
    trainer.step(dict.fromkeys(params, np.ones(1)))
    assert [float(-w[0]) for w in params.values()] == [2, 1, 0, 1]  # "w[*]" is a pattern, for "w*" only


@pytest.mark.parametrize("method", ["set_lr_mult", "set_wd_mult", "freeze", "unfreeze"])
def test_unknown_patterns_are_refused(method):
    trainer = Pair(table.row("nag"), trainer={"freeze": ["encoder.bias"]}).trainer
    given = ["encoder.weight", "nobody.*"]
    given = dict.fromkeys(given, 1.0) if "mult" in method else given
    before = repr(trainer)
    unchanged(trainer, lambda: getattr(trainer, method)(given), ValueError, r"'nobody\.\*'.*'encoder.weight'")
    assert repr(trainer) == before


@pytest.mark.parametrize("what", ["lr_mult", "wd_mult", "freeze"])
def test_unknown_patterns_are_refused_at_once(what):
    with pytest.raises(ValueError, match="'nobody'"):
        Trainer([np.ones(3)], "nag", **{what: {"nobody": 1.0}})


@pytest.mark.parametrize("method", ["set_lr_mult", "set_wd_mult"])
@pytest.mark.parametrize("value", [-1, math.nan, "fast", None])
def test_bad_multipliers_are_refused(method, value):
    trainer = Pair(table.row("nag")).trainer
    call = getattr(trainer, method)
    unchanged(trainer, lambda: call({"*.bias": value}), (ValueError, TypeError), "encoder.bias")
    unchanged(trainer, lambda: call([0.5]), TypeError, "dict")


@each_case
def test_freezing(row, gradient, mode):
    pair = Pair(row, trainer={"freeze": "encoder.*"}, gradient=gradient, sparse_update=mode)
    rng = np.random.default_rng(12)

    def step(frozen):
        grads = pair.gradients(rng)
        pair.trainer.step(pair.give(grads))
        pair.update([None if t in frozen else grad for t, grad in enumerate(grads)])

    step({0, 1})
    step({0, 1})
    assert "2 frozen" in repr(pair.trainer)
    pair.trainer.freeze(["decoder.bias", "encoder.weight"])
    step({0, 1, 3})
    pair.trainer.unfreeze("encoder.bias")
    step({0, 3})
    pair.trainer.unfreeze()
    step(set())
    pair.trainer.freeze("*")
    step({0, 1, 2, 3})
    assert pair.trainer.optimizer.num_update == 5


def test_gradients_of_frozen_parameters_are_not_looked_at():
    params = {"a": np.ones(3), "b": np.ones(3)}
    trainer = Trainer(params, "nag", freeze="a", skip_nonfinite=True)
    trainer.step({"a": "anything", "b": np.ones(3)})
    trainer.step({"a": np.full(3, np.nan), "b": np.ones(3)})
    trainer.accumulate({"a": np.ones(7), "b": np.ones(3)})
    trainer.step()
    assert trainer.skipped_steps == 0
    assert params["a"].tolist() == [1, 1, 1]
    assert trainer.state_dict()["parameters"]["b"]["count"] == 3


def multipliers(lr_mult=1.0, wd_mult=1.0):
    return types.SimpleNamespace(lr_mult=lr_mult, wd_mult=wd_mult)


def test_param_dict():
    """Its multipliers are read at every step, from objects that the program goes on changing."""
    pair = Pair(table.row("nag"), wd=0.05)
    rng = np.random.default_rng(13)
    objects = {0: multipliers(0.5), 2: multipliers(wd_mult=0)}
    pair.trainer.optimizer.param_dict = pair.optimizer.param_dict = objects
    for n in range(5):
        pair.step(pair.gradients(rng))
        objects[0].lr_mult += 0.25
        objects[2].wd_mult = n
    objects[3] = multipliers(0.0)
    pair.step(pair.gradients(rng))
    objects[0].lr_mult = -1
    grads = pair.gradients(rng)
    unchanged(pair.trainer, lambda: pair.trainer.step(pair.give(grads)), ValueError, "lr_mult")
    objects[0].lr_mult = 1
    pair.step(grads)


@pytest.mark.parametrize("how", ["emptied", "replaced"])
def test_param_dict_that_goes_away(how):
    pair = Pair(table.row("nag"))
    rng = np.random.default_rng(14)
    objects = {0: multipliers(0.0)}
    pair.trainer.optimizer.param_dict = pair.optimizer.param_dict = objects
    pair.step(pair.gradients(rng))
    if how == "emptied":
        objects.clear()
    else:
        pair.trainer.optimizer.param_dict = pair.optimizer.param_dict = {}
    pair.step(pair.gradients(rng))


def test_param_dict_that_goes_away_after_a_refusal():
    pair = Pair(table.row("nag"))
    rng = np.random.default_rng(15)
    pair.step(pair.gradients(rng))
    objects = {1: multipliers(0.0), 3: multipliers(-1.0)}
    pair.trainer.optimizer.param_dict = objects
    grads = pair.gradients(rng)
    unchanged(pair.trainer, lambda: pair.trainer.step(pair.give(grads)), ValueError, "lr_mult")
    objects.clear()
    pair.step(grads)


@table.each
def test_hyper_parameters_may_change_between_steps(row):
    pair = Pair(row)
    rng = np.random.default_rng(16)
    changes = [("learning_rate", 0.05), ("clip_gradient", 0.3), ("clip_gradient", None), ("wd", 0.1)]
    for name, value in changes:
        pair.step(pair.gradients(rng))
        for optimizer in (pair.trainer.optimizer, pair.optimizer):
            if name == "learning_rate":
                optimizer.set_learning_rate(value)
            elif name != "wd" or not row.cls.per_row:
                setattr(optimizer, name, value)
    pair.step(pair.gradients(rng))
    pair.trainer.set_learning_rate(0.01)
    pair.optimizer.set_learning_rate(0.01)
    pair.step(pair.gradients(rng))
    assert pair.trainer.learning_rate == 0.01


@table.each
def test_use_fused_step_may_change_between_steps(row):
    pair = Pair(row)
    rng = np.random.default_rng(17)
    grads = pair.gradients(rng)
    for fused in (True, False, False, True, True):
        pair.trainer.optimizer.use_fused_step = pair.optimizer.use_fused_step = fused
        pair.step(grads)


@table.each
@pytest.mark.parametrize(
    "make",
    [
        lambda: lr_scheduler.FactorScheduler(2, 0.5, base_lr=0.3),
        lambda: lr_scheduler.PolyScheduler(8, 0.3, warmup_steps=3),
        lambda: lambda n: 0.2 / n if n else 0.2,
    ],
    ids=["factor", "poly", "function"],
)
def test_schedulers(row, make):
    pair = Pair(row, learning_rate=None, lr_scheduler=make())
    rng = np.random.default_rng(18)
    schedule = make()
    for n in range(1, 10):
        pair.step(pair.gradients(rng))
        assert pair.trainer.learning_rate == pair.optimizer.learning_rate == schedule(n)
    with pytest.raises(UserWarning, match="lr_scheduler"):
        pair.trainer.set_learning_rate(0.1)


def test_all_parameters_of_a_step_have_the_rate_of_the_largest_count():
    params = {name: np.zeros(1) for name in "ab"}
    trainer = Trainer(params, "nag", momentum=0, learning_rate=None, lr_scheduler=lambda n: float(n))
    for _ in range(3):
        trainer.step({"b": np.ones(1)})
    trainer.step({"a": np.ones(1), "b": np.ones(1)})
    assert [float(w[0]) for w in params.values()] == [-4, -10]
    trainer.step({"a": np.ones(1)})  # its second, but the run's number of updates stays
    assert params["a"][0] == -8
    assert trainer.optimizer.num_update == 4


def test_a_schedule_that_fails_changes_nothing():
    rates = [0.1, 0.1, -1.0, 0.1]
    params = {"a": np.ones(3)}
    trainer = Trainer(params, "nag", learning_rate=None, lr_scheduler=lambda n: rates[n])
    trainer.step({"a": np.ones(3)})
    before = params["a"].copy()
    for _ in range(2):
        with pytest.raises(ValueError, match="lr_scheduler"):
            trainer.step({"a": np.ones(3)})
    assert params["a"].tolist() == before.tolist()
    assert trainer.optimizer.num_update == 1


# ---------------------------------------------------------------- the norm of all gradients


@each_case
@each_fused
def test_clip_global_norm(row, gradient, mode, fused):
    """The norm is that of the summed gradients."""
    options = {"use_fused_step": fused, "multi_precision": True, "rescale_grad": 0.5}
    options |= {"gradient": gradient, "sparse_update": mode}
    pair = Pair(row, dtypes=MIXED, trainer={"clip_global_norm": 0.75}, **options)
    rng = np.random.default_rng(19)
    for n in range(6):
        grads = pair.gradients(rng)
        grads[0] = strided(grads[0]) if n == 3 and gradient == "dense" else grads[0]
        grads[1] = None if n == 4 else grads[1]
        for grad in grads if n == 5 else []:
            numbers(grad)[...] *= numbers(grad).dtype.type(1 / 64)
        norm = 0.125 * norm_of([grad for grad in grads if grad is not None])
        pair.trainer.step(pair.give(grads), batch_size=4)
        assert pair.trainer.grad_norm == pytest.approx(norm, rel=1e-14)
        assert (norm > 0.75) == (n < 5)
        pair.update(grads, clipped(0.125, pair.trainer))


def test_clipping_comes_before_clip_gradient_and_weight_decay():
    weight = np.array([2.0, 4.0])
    trainer = Trainer(
        [weight], "nag", clip_global_norm=1, momentum=0, learning_rate=1, clip_gradient=0.7, wd=0.25
    )
    trainer.step([np.array([30.0, -40.0])])
    assert trainer.grad_norm == 50
    np.testing.assert_allclose(weight, [2 - 0.6 - 0.5, 4 + 0.7 - 1])


def test_clipping_to_nothing():
    weight = np.ones(3)
    trainer = Trainer([weight], "nag", clip_global_norm=0)
    trainer.step([np.ones(3)])
    trainer.step([np.zeros(3)])
    assert weight.tolist() == [1, 1, 1]
    assert trainer.optimizer.num_update == 2


def test_norm_is_exact_and_does_not_depend_on_threads(monkeypatch):
    row = table.row("nag")
    shapes = [(700_001,), (cpu_chunk := threads.CHUNK,), (3,), (5 * cpu_chunk + 1,), (cpu_chunk - 1,)]
    rng = np.random.default_rng(20)
    grads = [random(rng, s, d) for s, d in zip(shapes, ["f4", "f8", "f4", "f2", "f4"], strict=True)]
    grads[0] *= np.float32(1e3)
    grads[4] = grads[4].astype(ml_dtypes.bfloat16)
    found = set()
    monkeypatch.setattr(threads, "SHARED", 0)
    for count in (1, 2, 5):
        monkeypatch.setattr(threads, "count", lambda count=count: count)
        pair = Pair(row, list, ["f4", "f8", "f4", "f4", "f4"], shapes, {"clip_global_norm": 1.0})
        pair.trainer.step(grads)
        found.add((pair.trainer.grad_norm, pair.params[3].tobytes()))
    assert len(found) == 1
    assert pair.trainer.grad_norm == pytest.approx(norm_of(grads), rel=1e-12)


@pytest.mark.parametrize("huge", [1e155, 1e200, 1e307])
@each_fused
@pytest.mark.parametrize("mode", [None, "lazy", "dense", "exact"], ids=["", "lazy", "dense", "exact"])
def test_norm_of_huge_gradients(huge, mode, fused):
    """Squares overflow where norms do not."""
    weight = np.zeros(3)
    options = {"momentum": 0, "learning_rate": 1, "use_fused_step": fused, "sparse_update": mode or "lazy"}
    trainer = Trainer(
        [weight, np.zeros(2)], numba_opt.NAG(**options), clip_global_norm=6.0, skip_nonfinite=True
    )
    grad = np.array([huge, -2 * huge, 2 * huge])
    if mode:
        grad = RowSparse([0, 1, 2, 1], [huge, -huge, 2 * huge, -huge], (3,))
    trainer.step([grad, np.zeros(2)])
    trainer.flush()
    assert trainer.grad_norm == pytest.approx(3 * huge, rel=1e-14)
    assert trainer.skipped_steps == 0
    np.testing.assert_allclose(weight, [-2, 4, -4], rtol=1e-14)


def test_norm_of_large_half_and_single_gradients():
    """Their squares overflow their own precision."""
    weights = [np.zeros(2, "f4"), np.zeros(2, "f4")]
    trainer = Trainer(weights, "nag", clip_global_norm=1.0)
    trainer.step([np.full(2, 6e4, "f2"), np.full(2, 3e38, "f4")])
    expected = norm_of([np.full(2, 6e4, "f2"), np.full(2, 3e38, "f4")])
    assert trainer.grad_norm == pytest.approx(expected, rel=1e-14)
    assert all(np.isfinite(w).all() for w in weights)


def test_grad_norm_is_kept_where_asked_for():
    grads = [np.array([3.0, 4.0])]
    for kwargs, expected in [({}, None), ({"skip_nonfinite": True}, 5.0), ({"clip_global_norm": 9}, 5.0)]:
        trainer = Trainer([np.ones(2)], "nag", **kwargs)
        assert trainer.grad_norm is None
        trainer.step(grads)
        assert trainer.grad_norm == expected


def test_norm_of_a_step_without_gradients():
    trainer = Trainer([np.ones(2)], "nag", clip_global_norm=1)
    trainer.step([np.ones(2)])
    trainer.step([None])
    assert trainer.grad_norm == 0


def test_nonfinite_gradients_without_skipping():
    weights = [np.ones(2), np.ones(2)]
    trainer = Trainer(weights, "nag", clip_global_norm=1, momentum=0, learning_rate=1)
    trainer.step([np.array([np.nan, 1.0]), np.array([np.inf, 1.0])])
    assert not math.isfinite(trainer.grad_norm)
    assert not np.isfinite(weights[0][0])
    assert not np.isfinite(weights[1][0])
    assert trainer.skipped_steps == 0
    assert trainer.optimizer.num_update == 1


# ---------------------------------------------------------------- steps that are skipped


@each_case
@each_fused
def test_skip_nonfinite(row, gradient, mode, fused):
    options = {"trainer": {"skip_nonfinite": True}, "multi_precision": True, "use_fused_step": fused}
    pair = Pair(row, dtypes=MIXED, gradient=gradient, sparse_update=mode, **options)
    rng = np.random.default_rng(21)
    skipped = 0
    for bad in (np.nan, np.inf, -np.inf):
        for t in range(4):
            good = pair.gradients(rng)
            pair.step(good)
            grads = copy.deepcopy(good)
            numbers(grads[t]).flat[[0, -1, 1, 1][t]] = bad
            pair.flush()
            before = snapshot(pair.trainer)
            pair.trainer.step(pair.give(grads))
            skipped += 1
            assert pair.trainer.skipped_steps == skipped
            assert not math.isfinite(pair.trainer.grad_norm)
            assert snapshot(pair.trainer) == before | {"skipped_steps": skipped}
            pair.check()
    pair.step(pair.gradients(rng))
    assert pair.trainer.optimizer.num_update == 13


@pytest.mark.parametrize("dtype", ["f4", "f8", "f2", ml_dtypes.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_skip_nonfinite_wherever_it_hides(dtype, bad):
    """Ends of chunks and of tensors."""
    sizes = [threads.CHUNK - 1, 2 * threads.CHUNK + 1, 5]
    weights = [np.ones(size, "f8" if dtype == "f8" else "f4") for size in sizes]
    trainer = Trainer(weights, "nag", skip_nonfinite=True)
    grads = [np.ones(size, dtype) for size in sizes]
    places = [(0, 0), (0, -1), (1, 0), (1, 1), (1, threads.CHUNK), (1, -1), (2, 0), (2, -1)]
    for n, (t, k) in enumerate(places, 1):
        grads[t][k] = bad
        trainer.step(grads)
        grads[t][k] = 1
        assert trainer.skipped_steps == n
    assert all((w == 1).all() for w in weights)
    trainer.step(grads)
    assert all((w < 1).all() for w in weights)
    assert trainer.optimizer.num_update == 1


@pytest.mark.parametrize("bad", [[np.nan, 1e200], [np.nan, np.inf], [1e200, np.inf], [-np.inf, np.nan]])
@pytest.mark.parametrize("place", [0, 1])
def test_skip_nonfinite_beside_huge_numbers(bad, place):
    weights = [np.ones(2), np.ones(2)]
    trainer = Trainer(weights, "nag", skip_nonfinite=True)
    grads = [np.ones(2), np.ones(2)]
    grads[place] = np.array(bad)
    trainer.step(grads)
    assert trainer.skipped_steps == 1
    assert not math.isfinite(trainer.grad_norm)


def test_huge_gradients_are_not_skipped():
    weight = np.zeros(3)
    trainer = Trainer([weight], "nag", skip_nonfinite=True, clip_gradient=1)
    trainer.step([np.full(3, 1e300)])
    assert trainer.skipped_steps == 0
    assert weight.all()


def test_skipped_steps_drop_what_was_accumulated():
    trainer = Trainer([np.ones(2)], "nag", skip_nonfinite=True)
    trainer.accumulate([np.array([np.nan, 1])])
    trainer.step([np.ones(2)])
    assert trainer.skipped_steps == 1
    with pytest.raises(ValueError, match="accumulated"):
        trainer.step()
    trainer.step([np.ones(2)])
    assert trainer.optimizer.num_update == 1


# ---------------------------------------------------------------- accumulation


@table.each
@each_form
def test_accumulate(row, form):
    """Equal to one step with the sum, which has float32 for half-precision gradients."""
    options = {"trainer": {"clip_global_norm": 3.0}, "multi_precision": True}
    pair = Pair(row, form, MIXED, **options)
    rng = np.random.default_rng(22)
    for n in range(4):
        sums = [np.zeros(w.shape, "f8" if w.dtype == "f8" else "f4") for w in pair.weights]
        for part in range(3):
            grads = []
            for weight, code, total in zip(pair.weights, MIXED, sums, strict=True):
                dtypes = GRADIENTS[code]
                grads.append(LAYOUTS[part + n](random(rng, weight.shape, dtypes[part % len(dtypes)])))
                total += grads[-1].astype(total.dtype)
            before = snapshot(grads)
            if part < 2:
                pair.trainer.accumulate(pair.give(grads))
                pair.check()
            elif n % 2:
                pair.trainer.step(pair.give(grads), batch_size=3)
            else:
                pair.trainer.accumulate(pair.give(grads))
                pair.trainer.step(batch_size=3)
            assert snapshot(grads) == before
        pair.update(sums, clipped(1 / 3, pair.trainer))
        assert pair.trainer.state_dict()["accumulated"] == {}


ORDERS = [
    ["rows", "rows"], ["rows", "dense"], ["dense", "rows"], ["csr", "rows", "csr"], ["dense", "csr"],
    ["duplicates", "dense", "csr with duplicates"],
]  # fmt: skip


@each_mode
@each_fused
@pytest.mark.parametrize("forms", ORDERS, ids=", ".join)
def test_accumulate_sparse(forms, mode, fused):
    """Sparse gradients and dense ones, in any order: the sum is dense if one of them is."""
    pair = Pair(table.row("nag"), list, ["f4"], SHAPES[:1], sparse_update=mode, use_fused_step=fused, wd=0.1)
    rng, shape = np.random.default_rng(38), SHAPES[0]
    for _ in range(2):
        total, touched = np.zeros(shape, "f4"), set()
        for form in forms:
            grad = formed(form, rng, shape)
            if form == "dense":
                grad = np.round(8 * grad) / 8
            before = snapshot(grad)
            pair.trainer.accumulate([grad])
            assert snapshot(grad) == before
            total += whole(grad)
            touched |= {r for r in range(shape[0]) if form == "dense" or whole(grad)[r].any()}
        pair.trainer.step()
        rows = sorted(touched)
        pair.update([total if "dense" in forms else RowSparse(rows, total[rows], shape)])
    pair.flush()
    pair.check()


def test_accumulate_with_missing_gradients():
    pair = Pair(table.row("adamax"))
    rng = np.random.default_rng(23)
    patterns = [[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    sums = [None] * 4
    for pattern in patterns:
        grads = [g if there else None for g, there in zip(pair.gradients(rng), pattern, strict=True)]
        pair.trainer.accumulate(pair.give(grads))
        for t, grad in enumerate(grads):
            if grad is not None:
                sums[t] = grad if sums[t] is None else sums[t] + grad
    pair.trainer.step()
    pair.update(sums)
    assert pair.optimizer._index_update_count == {0: 1, 1: 1, 2: 1}
    pair.step(pair.gradients(rng))


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_accumulated_gradients_are_copies(sparse):
    """The caller may fill the same arrays anew."""
    weight = np.zeros(3)
    grad = RowSparse(np.arange(3), np.ones(3), (3,)) if sparse else np.ones(3)
    trainer = Trainer([weight], "nag", momentum=0, learning_rate=1)
    trainer.accumulate([grad])
    numbers(grad)[...] = 100
    if sparse:
        grad.rows[...] = 2
    trainer.accumulate([np.ones(3)])
    trainer.step()
    assert weight.tolist() == [-2, -2, -2]


@pytest.mark.parametrize("first", [np.inf, -np.inf, 3e38])
def test_accumulated_sums_overflow_as_sums_do(first):
    trainer = Trainer([np.zeros(2, "f4")], "nag")
    grads = [np.array(pair, "f4") for pair in ([first, 1], [math.copysign(3e38, first), 1], [1, 1])]
    with np.errstate(over="ignore"):
        expected = grads[0] + grads[1] + grads[2]
    for grad in grads:
        trainer.accumulate([grad])
    assert snapshot(trainer.state_dict()["accumulated"]["0"]) == snapshot(expected)


def test_accumulate_then_freeze():
    params = {"a": np.zeros(2), "b": np.zeros(2)}
    trainer = Trainer(params, "nag", momentum=0, learning_rate=1)
    trainer.accumulate(dict.fromkeys(params, np.ones(2)))
    trainer.freeze("a")
    trainer.step()
    assert params["a"].tolist() == [0, 0]
    assert params["b"].tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("grads", "error", "match"),
    [
        ([np.ones((6, 5), "f4"), np.ones(9, "f4"), None, None], ValueError, "encoder.bias"),
        ([np.ones((6, 5), "f4"), np.ones(8, "f8"), None, None], TypeError, "encoder.bias"),
        ([np.ones((6, 5), "f4"), [1.0] * 8, None, None], TypeError, "encoder.bias"),
        ([RowSparse([1], np.ones((1, 5)), (6, 5)), np.ones(3, "f4"), None, None], ValueError, "encoder.bias"),
        ([RowSparse([1], np.ones((1, 5)), (6, 5)), RowSparse([1], np.ones(1), (3,)), None, None],
         ValueError, "encoder.bias"),
    ],
    ids=["shape", "dtype", "list", "sparse, shape", "sparse, sparse"],
)  # fmt: skip
def test_accumulate_refused(grads, error, match):
    pair = Pair(table.row("nag"))
    trainer = pair.trainer
    good = pair.give(pair.gradients(np.random.default_rng(0)))
    bad = pair.give(grads)
    for _ in range(2):  # without anything accumulated, and with
        unchanged(trainer, lambda: trainer.accumulate(bad), error, match)
        unchanged(trainer, lambda: trainer.step(bad), error, match)
        unchanged(trainer, lambda: trainer.accumulate([]), TypeError, "dict")
        unchanged(trainer, lambda: trainer.accumulate({"nobody": None}), ValueError, "'nobody'")
        trainer.accumulate(good)


@pytest.mark.parametrize("why", ["batch_size", "scheduler"])
def test_a_refused_step_keeps_what_was_accumulated(why):
    """Whoever repeats the step must not have added the gradients twice."""
    rates = {1: -1.0} if why == "scheduler" else {}
    trainer = Trainer([np.zeros(3)], "nag", learning_rate=None, lr_scheduler=lambda n: rates.get(n, 1.0))
    trainer.accumulate([np.ones(3)])
    before = snapshot(trainer._totals)
    with pytest.raises(ValueError, match="finite number"):
        trainer.step([np.ones(3)], batch_size=-1 if why == "batch_size" else 1)
    assert snapshot(trainer._totals) == before


def test_step_needs_gradients():
    trainer = Trainer([np.ones(3)], "nag")
    for call in (trainer.step, lambda: trainer.step(None), lambda: trainer.step(batch_size=3)):
        unchanged(trainer, call, ValueError, "accumulated")


# ---------------------------------------------------------------- what is refused


def read_only_zeros(shape):
    return read_only(np.zeros(shape))


MEMORY = np.zeros(100)


@pytest.mark.parametrize(
    ("params", "error", "match"),
    [
        ({"a": MEMORY, "b": MEMORY}, ValueError, "'b'.*shares memory.*'a'"),
        ({"a": MEMORY[:50], "b": np.zeros(3), "c": MEMORY[49:]}, ValueError, "'c'.*shares memory.*'a'"),
        ({"a": MEMORY, "b": MEMORY.reshape(10, 10).T}, ValueError, "'b'.*shares memory.*'a'"),
        ([MEMORY[::2], np.zeros(3), MEMORY[::4]], ValueError, "'2'.*shares memory.*'0'"),
        ({"a": np.zeros(3), "b": read_only_zeros(3)}, ValueError, "'b'.*read-only"),
        ({"a": np.zeros(3), "b": np.zeros(3, "i8")}, TypeError, "'b'.*int64"),
        ({"a": np.zeros(3), "b": [1.0, 2.0]}, TypeError, "'b'.*list"),
        ({"a": np.zeros(3), "b": None}, TypeError, "'b'.*None"),
        (
            {"a": np.ndarray((3, 3), "f8", MEMORY, strides=(8, 8))},
            ValueError,
            "'a'.*share memory",
        ),
        ({1: np.zeros(3)}, TypeError, "names"),
        ({}, ValueError, "at least one"),
        ([], ValueError, "at least one"),
        (np.zeros((3, 3)), TypeError, "dict or a list"),
        (iter([np.zeros(3)]), TypeError, "dict or a list"),
    ],
)
def test_parameters_refused(params, error, match):
    with pytest.raises(error, match=match):
        Trainer(params, "nag")


@pytest.mark.parametrize(
    ("optimizer", "kwargs", "error", "match"),
    [
        ("sgdx", {}, ValueError, "sgdx"),
        ("nag", {"momentun": 0.9}, TypeError, "momentun"),
        (numba_opt.NAG(), {"momentum": 0.9}, TypeError, "momentum"),
        (numba_opt.NAG, {}, TypeError, "optimizer"),
        (numba_opt.Optimizer(), {}, TypeError, "rule"),
        ("nag", {"clip_global_norm": -1}, ValueError, "clip_global_norm"),
        ("nag", {"clip_global_norm": "1"}, TypeError, "clip_global_norm"),
        ("groupadagrad", {}, ValueError, "2 dimensions"),
    ],
)
def test_optimizers_refused(optimizer, kwargs, error, match):
    with pytest.raises(error, match=match):
        Trainer([np.zeros(3)], optimizer, **kwargs)


A, B = np.ones(3), np.ones((2, 2))


@pytest.mark.parametrize(
    ("form", "grads", "error", "match"),
    [
        (dict, {"a": A, "b": B.ravel()}, ValueError, r"'b'.*\(4,\).*\(2, 2\)"),
        (dict, {"b": A}, ValueError, r"'b'.*\(3,\)"),
        (dict, {"a": A.astype("f4")}, TypeError, "'a'.*float32.*float64"),
        (dict, {"a": A.astype("f2"), "b": B}, TypeError, "'a'.*float16"),
        (dict, {"a": A.astype(">f8"), "b": B}, TypeError, "'a'"),
        (dict, {"a": A.astype(complex), "b": B}, TypeError, "'a'.*complex"),
        (dict, {"a": np.ma.masked_array(A), "b": B}, TypeError, "'a'.*masked"),
        (dict, {"a": A.tolist(), "b": B}, TypeError, "'a'.*list"),
        (dict, {"a": 0.0, "b": B}, TypeError, "'a'.*float"),
        (dict, {"a": A, "b": B, "c": A}, ValueError, "'c'"),
        (dict, {"a": A, "c": A}, ValueError, "'c'"),
        (dict, {"a": A, "c": None}, ValueError, "'c'"),
        (dict, {"c": A}, ValueError, "'c'"),
        (dict, {0: A, 1: B}, ValueError, "0"),
        (dict, [A, B], TypeError, "dict"),
        (list, {"0": A, "1": B}, TypeError, "list"),
        (list, [A], ValueError, "length 1; expected 2"),
        (list, [A, B, A], ValueError, "length 3; expected 2"),
        (list, [B, A], ValueError, r"'0'.*\(2, 2\).*\(3,\)"),
        (list, B, TypeError, "list"),
        (list, iter([A, B]), TypeError, "list"),
    ],
)
@each_fused
def test_gradients_refused(form, grads, error, match, fused):
    params = {"a": np.ones(3), "b": np.ones((2, 2))}
    trainer = Trainer(params if form is dict else list(params.values()), "nag", use_fused_step=fused)
    for _ in range(2):  # before the first step, and after it
        unchanged(trainer, lambda: trainer.step(grads), error, match)
        trainer.step({"a": A, "b": B} if form is dict else [A, B])
    assert trainer.optimizer.num_update == 2


@each_fused
@pytest.mark.parametrize("after", [0, 1, 3])
def test_gradients_that_overlap_what_is_written(fused, after):
    memory = np.zeros(60, "f4")
    params = {"a": memory[:20], "b": np.ones(20, "f4"), "half": np.ones(20, "f2")}
    trainer = Trainer(params, "nag", multi_precision=True, use_fused_step=fused)
    good = {"a": np.ones(20, "f4"), "b": np.ones(20, "f4"), "half": np.ones(20, "f2")}
    for _ in range(after):
        trainer.step(good)
    master, state = trainer.states["half"]
    for name, bad, owner in [
        ("a", memory[:20], "weight of .*'a'"),
        ("b", memory[:20], "weight of .*'a'"),
        ("b", memory[19:39], "weight of .*'a'"),
        ("a", trainer.states["b"], "state 'mom' of .*'b'"),
        ("half", params["half"], "half-precision weight of .*'half'"),
        ("b", master, "weight of .*'half'"),
        ("a", state, "state 'mom' of .*'half'"),
        ("half", memory[:10].view("f2"), "weight of .*'a'"),
    ]:
        match = f"(gradient of .*{re.escape(name)!r}.*{owner}|{owner}.*gradient of .*{re.escape(name)!r})"
        unchanged(trainer, lambda n=name, g=bad: trainer.step(good | {n: g}), ValueError, match)
        trainer.step(good)
    trainer.step(good | {"b": memory[20:40]})  # beside it is fine
    trainer.step(good | {"a": good["b"]})  # and so are gradients that share memory
    assert trainer.optimizer.num_update == after + 10


def test_gradients_may_share_memory_with_each_other():
    pair = Pair(table.row("ftml"), list, ["f4"] * 2, [(4, 3), (4, 3)])
    shared = random(np.random.default_rng(24), (5, 3))
    for _ in range(3):
        pair.step([shared[:-1], shared[1:]])
        pair.step([shared[1:], shared[1:]])


# ---------------------------------------------------------------- threads and memory


def test_trainers_in_two_threads(monkeypatch):
    monkeypatch.setattr(threads, "SHARED", 0)
    monkeypatch.setattr(threads, "count", lambda: 3)
    rows = [table.row("adamax"), table.row("ftml")]

    def train(row, found, start=None):
        pair = Pair(row, shapes=[(50_000,), (7,), (300, 40), (1,)], trainer={"clip_global_norm": 1.0})
        rng = np.random.default_rng(25)
        buffers = pair.gradients(rng)
        if start is not None:
            start.wait()
        for n in range(40):
            pair.trainer.step(pair.give([b if (n + t) % 5 else None for t, b in enumerate(buffers)]))
            pair.trainer.accumulate(pair.give(buffers))
        found[row.id] = snapshot(pair.trainer)

    expected, found = {}, {}
    for row in rows:
        train(row, expected)
    start = threading.Barrier(2)
    workers = [threading.Thread(target=train, args=(row, found, start)) for row in rows]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == expected


@pytest.mark.parametrize(("kind", "number"), [("persistent", 10_000), ("fresh", 2000), ("accumulated", 2000)])
def test_memory_stays_as_it_is(kind, number):
    pair = Pair(table.row("adamax"), trainer={"clip_global_norm": 1.0, "skip_nonfinite": True})
    buffers = pair.gradients(np.random.default_rng(26))

    def steps(n):
        for k in range(n):
            pattern = k // (20 if kind == "persistent" else 1) % 10 + 1  # more than tables are kept for
            grads = buffers if kind == "persistent" else [b.copy() for b in buffers]
            grads = [g if pattern >> t & 1 else None for t, g in enumerate(grads)]
            if kind == "accumulated":
                pair.trainer.accumulate(pair.give(grads))
            pair.trainer.step(pair.give(grads))

    tracemalloc.start()
    try:
        steps(500)
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        steps(number)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 40_000  # one small object a step would be more; caches of Python and NumPy are less


def test_gradients_are_let_go_of():
    """A trainer that rests holds no gradients."""
    deaths = []

    class Watched(np.ndarray):
        def __del__(self):
            deaths.append(1)

    trainer = Trainer([np.ones(3), np.ones(2)], "nag", skip_nonfinite=True)
    for value in (1.0, np.nan):
        grads = [np.full(3, value).view(Watched), np.full(2, value).view(Watched)]
        deaths.clear()
        trainer.step(grads)
        grads.clear()
        gc.collect()
        assert len(deaths) >= 2, value


def test_a_dropped_trainer_is_freed_at_once():
    """No reference leads in a circle, which would keep the arrays until Python looks for such things."""

    def used():
        trainer = Trainer([np.ones((4, 3)), np.ones(2)], "ftml", clip_global_norm=1.0, skip_nonfinite=True)
        trainer.step([np.ones((4, 3)), None])
        trainer.accumulate([np.ones((4, 3)), np.ones(2)])
        trainer.step()
        trainer.step([numba_opt.RowSparse([1], np.ones((1, 3)), (4, 3)), np.ones(2)])
        return weakref.ref(trainer), weakref.ref(trainer.optimizer)

    used()  # the compiler, in its turn, leaves such circles
    gc.collect()
    gc.disable()
    try:
        assert [dropped() for dropped in used()] == [None, None]
    finally:
        gc.enable()


# ---------------------------------------------------------------- for people


def test_attributes():
    weight, bias = np.ones((2, 2)), np.zeros(2, "f2")
    optimizer = numba_opt.Adamax(multi_precision=True)
    trainer = Trainer({"weight": weight, "bias": bias}, optimizer)
    assert trainer.optimizer is optimizer
    assert list(trainer.params) == ["weight", "bias"]
    assert trainer.params["weight"] is weight
    assert [array.dtype for array in table.leaves(trainer.states["bias"])] == ["f4"] * 3
    assert trainer.skipped_steps == 0
    assert list(Trainer([weight, bias], copy.deepcopy(optimizer)).params) == ["0", "1"]


def test_a_dict_of_parameters_may_change_afterwards():
    params = {"a": np.zeros(2), "b": np.zeros(2)}
    trainer = Trainer(params, "nag", momentum=0, learning_rate=1)
    weight = params.pop("a")
    trainer.step({"a": np.ones(2), "b": np.ones(2)})
    assert weight.tolist() == [-1, -1]


def test_repr():
    trainer = Trainer({"weight": np.zeros((300, 400), "f4"), "bias": np.zeros(400, "f4")}, "adamax")
    assert repr(trainer) == (
        f"Trainer of 2 parameters: 120,400 elements, 941 KiB of state, on the CPU\n  {trainer.optimizer!r}"
    )
    trainer.freeze("bias")
    assert "2 parameters (1 frozen): 120,400 elements" in repr(trainer)
    assert "3.05 MiB of state" in repr(Trainer([np.zeros(400_000)], "nag"))
