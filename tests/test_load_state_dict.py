"""`Trainer.load_state_dict` and `load`: whole or not at all, whatever a checkpoint holds."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import numba_opt
from numba_opt import Trainer, lr_scheduler
from numba_opt.io import checkpoint
from numba_opt.io.checkpoint import CheckpointError

from .interruptions import interrupted, moments
from .test_checkpoint_fuzz import altered, fuzz, values
from .test_trainer import snapshot


def trainer_of(seed=0):
    """A trainer with everything, sums of gradients and skipped steps included."""
    rng = np.random.default_rng(seed)
    dtypes = {"a": "f4", "\0b": "f2", "c'": "f8"}
    params = {name: rng.standard_normal((4, 2)).astype(dtype) for name, dtype in dtypes.items()}
    scheduler = lr_scheduler.MultiFactorScheduler([3, 5], base_lr=0.5)
    options = {"learning_rate": None, "lr_scheduler": scheduler, "multi_precision": True}
    return Trainer(params, "rmsprop", centered=True, skip_nonfinite=True, **options)


def train(trainer):
    grads = {name: np.ones_like(weight) for name, weight in trainer.params.items()}
    trainer.step(grads)
    trainer.accumulate({"a": grads["a"], "\0b": numba_opt.RowSparse([1], np.ones((1, 2), "f2"), (4, 2))})
    trainer.step({"c'": grads["c'"] * np.nan})
    trainer.accumulate({"a": grads["a"], "\0b": numba_opt.RowSparse([1], np.ones((1, 2), "f2"), (4, 2))})
    return trainer


@pytest.fixture(scope="module")
def state_dict():
    return train(trainer_of()).state_dict()


odd_arrays = st.sampled_from(
    [
        np.ones((4, 2), "f4"),
        np.ones((2, 4)).T,
        np.ones(3, "i4"),
        np.array(5.0),
        np.array([None, "x"]),
        np.ones((4, 2), ">f4"),
        np.ma.masked_array(np.ones((4, 2), "f4"), mask=True),
        np.float32(3),
        np.array([(1, 2)], "i4,f8"),
        np.zeros((0, 3)),
        {1, 2},
        b"bytes",
        object(),
        Ellipsis,
        (),
        (None, None),
    ]
)


@fuzz
@given(data=st.data(), how=st.sampled_from(["dict", "file"]))
def test_trainer_with_anything(data, how, state_dict, tmp_path_factory):
    """Whatever is taken over can be stepped with."""
    trainer = trainer_of(seed=1)
    before = snapshot(trainer)
    if how == "dict":
        found = data.draw(altered(state_dict, values | odd_arrays))
        call = partial(trainer.load_state_dict, found)
    else:
        arrays = {}
        form = checkpoint.take_apart(state_dict, arrays)
        path = tmp_path_factory.mktemp("fuzz") / "it"
        checkpoint.write(path, arrays, {"trainer": data.draw(altered(form))})
        call = partial(trainer.load, path)
    try:
        call()
    except CheckpointError:
        assert snapshot(trainer) == before
        return
    train(trainer)


def test_trainer_interrupted_anywhere(state_dict):
    new = snapshot(state_dict)
    with np.errstate(all="raise"):
        for at in moments(lambda: trainer_of(seed=1).load_state_dict(state_dict)):
            trainer = trainer_of(seed=1)
            old = snapshot(trainer)
            interrupted(lambda t=trainer: t.load_state_dict(state_dict), at)
            assert snapshot(trainer) in (old, new), at


def test_a_trainer_s_own_arrays_in_other_places():
    """Each is copied as it was before the first one was written."""
    trainer = Trainer({"a": np.zeros(3), "b": np.ones(3)}, "nag", momentum=0)
    state = trainer.state_dict()
    state["parameters"]["a"]["weight"] = trainer.params["b"]
    state["parameters"]["b"]["weight"] = trainer.params["a"]
    trainer.load_state_dict(state)
    assert snapshot(trainer.params) == snapshot({"a": np.ones(3), "b": np.zeros(3)})


def test_a_parameter_that_became_read_only():
    trainer = Trainer({"a": np.zeros(3), "b": np.zeros(3)}, "nag")
    trainer.step({"a": np.ones(3), "b": np.ones(3)})
    state = trainer.state_dict()
    trainer.step({"a": np.ones(3), "b": np.ones(3)})
    before = snapshot(trainer)
    trainer.params["b"].flags.writeable = False
    with pytest.raises(ValueError, match="weight of parameter 'b' is read-only"):
        trainer.load_state_dict(state)
    assert snapshot(trainer) == before


def test_lists_of_a_state_dict_stay_the_caller_s(state_dict):
    trainer = trainer_of()
    state = copy.deepcopy(state_dict)
    trainer.load_state_dict(state)
    state["optimizer"]["scheduler"][1]["step"].append("x")
    assert trainer.optimizer.lr_scheduler.step == [3, 5]


@pytest.mark.parametrize(
    ("option", "value", "here"),
    [
        ("multi_precision", False, r"\(float32 weight, \(mean, var, mom\) in float32\)"),
        ("sparse_update", "exact", r"\(mean, var, mom\) in float32"),
        ("state_dtype", "float16", r"\(mean, var, mom\) in float32"),
    ],
)
def test_options_that_contradict_the_states(option, value, here, state_dict):
    """They are of one optimizer, the arrays beside them of another."""
    trainer, state = trainer_of(), copy.deepcopy(state_dict)
    state["optimizer"]["hyper"][option] = value
    before = snapshot(trainer)
    with pytest.raises(CheckpointError, match=rf"states of \w+ weights are .*; this optimizer's are {here}"):
        trainer.load_state_dict(state)
    assert snapshot(trainer) == before


@pytest.mark.parametrize("half", [True, False])
def test_last_step_of_steps_that_are_not_there(half):
    """A trainer flushes before it saves; with others rows would take steps that nobody recorded."""
    params = {"a": np.ones((4, 2), "f2" if half else "f4")}
    trainer = Trainer(params, "nag", sparse_update="exact", multi_precision=half)
    state = trainer.state_dict()
    parts = state["parameters"]["a"]["state"]
    last_step = parts[1][1] if half else parts[1]
    last_step[2] = 7
    before = snapshot(trainer)
    with pytest.raises(CheckpointError, match=r"state of parameter 'a' has 1 rows .* that lag behind"):
        trainer.load_state_dict(state)
    assert snapshot(trainer) == before
