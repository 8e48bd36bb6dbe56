"""Checkpoints that are whole, with the right digest, and hold anything at all: refused, or taken over."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import sys
from functools import partial

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import numba_opt
from numba_opt import lr_scheduler
from numba_opt.io import checkpoint, description, tensor_file
from numba_opt.io.checkpoint import CheckpointError

from .interruptions import interrupted, moments
from .test_trainer import snapshot

fuzz = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))

WORDS = [
    "\0array",
    "\0tuple",
    "dtype",
    "float32",
    "bfloat16",
    "/0/1/0",
    "histories/0/1",
    "rows",
    "shape",
    "w",
]
WORDS += ["momentum", "lr_scheduler", "sparse_update", "exact", "multi_precision", "state_dtype", "step"]
numbers = [0, 1, -1, 2**31, 2**63, -(2**70), 10**400, 0.5, 1e308, float("inf"), float("nan")]
plain = (
    st.none()
    | st.booleans()
    | st.sampled_from(numbers)
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(WORDS)
)
values = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=8,
)


def places(value, path=()):
    """The paths of all parts of a structure."""
    yield path
    if isinstance(value, (dict, list, tuple)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(part, (*path, key))


def replaced(value, path, change):
    """A structure with the part at a path changed; `change` gives the new one, or nothing to drop it."""
    if not path:
        return (change(value) or [None])[0]
    found = dict(value) if isinstance(value, dict) else dict(enumerate(value))
    new = change(found[path[0]]) if len(path) == 1 else [replaced(found[path[0]], path[1:], change)]
    if new:
        found[path[0]] = new[0]
    else:
        del found[path[0]]
    return found if isinstance(value, dict) else type(value)(found.values())


def changed(draw, how, other, anything, part):
    """What takes a part's place, in a list, which is empty if nothing does."""
    match how:
        case "lose":
            return []
        case "replace":
            return [draw(anything)]
        case "double":
            return [part * 2 if isinstance(part, (list, str)) else [part, part]]
        case "nest":
            return [draw(st.sampled_from([[part], {"w": part}, {"\0tuple": [part]}]))]
    return [other]


@st.composite
def altered(draw, value, anything=values):
    """A structure with one or two parts lost, replaced, doubled, nested, or swapped for another part."""
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(list(places(value))))
        how = draw(st.sampled_from(["lose", "replace", "replace", "double", "nest", "swap"]))
        other = value
        for key in draw(st.sampled_from(list(places(value)))):
            other = other[key]
        value = replaced(value, path, partial(changed, draw, how, other, anything))
    return value


# ---------------------------------------------------------------- Updater


def updater_of(seed=0):
    """An updater with everything: float32 copies, rows that are behind, a schedule, indices of all kinds."""
    scheduler = lr_scheduler.MultiFactorScheduler([3, 5], base_lr=0.5)
    optimizer = numba_opt.NAG(None, lr_scheduler=scheduler, sparse_update="exact", multi_precision=True)
    return numba_opt.get_updater(optimizer), {
        index: np.full((4, 2), seed, dtype) for index, dtype in zip([0, ("a", 3)], ("f4", "f2"), strict=True)
    }


def grads_of(weights, rows):
    return [numba_opt.RowSparse(rows, np.ones((len(rows), 2), w.dtype), (4, 2)) for w in weights.values()]


def step(updater, weights):
    for rows in ([0], [1, 2]):
        updater(list(weights), grads_of(weights, rows), list(weights.values()))
    updater.optimizer.flush(list(weights), list(weights.values()), [updater.states[i] for i in weights])


def saved_updater():
    updater, weights = updater_of()
    for _ in range(2):
        updater(list(weights), grads_of(weights, [1]), list(weights.values()))
    return checkpoint.from_bytes(updater.get_states(dump_optimizer=True))


@pytest.fixture(scope="module")
def updater_content():
    return saved_updater()


def described(updater):
    late = {i: history.rows() for i, history in updater.optimizer._deferred.items()}
    return snapshot(
        [list(updater.states.items()), description.describe(updater.optimizer), list(late.items())]
    )


@fuzz
@given(data=st.data())
def test_updater_with_anything(data, updater_content):
    """Whatever is taken over can be stepped with and flushed, or is refused there in words."""
    arrays, whole = updater_content
    content = checkpoint.to_bytes(arrays, data.draw(altered(whole)))
    updater, weights = updater_of()
    step(updater, weights)
    before = described(updater)
    try:
        updater.set_states(content)
    except CheckpointError:
        assert described(updater) == before
        return
    assert checkpoint.from_bytes(updater.get_states(dump_optimizer=True))
    if updater.states.keys() >= weights.keys():
        with contextlib.suppress(TypeError, ValueError):  # the state is another weight's
            step(updater, weights)


@fuzz
@given(values, st.data())
def test_bytes_with_anything(anything, data):
    """Values that are no checkpoint's at all, and texts that are not even JSON."""
    text = data.draw(
        st.sampled_from(["", "{", "[" * 100_000, '{"format": 1, "values": {}, "format": 1}', "1" * 9999])
    )
    for content in (checkpoint.to_bytes({}, anything), sealed({}, text), sealed({}, json.dumps(anything))):
        with pytest.raises(CheckpointError):
            updater_of()[0].set_states(content)


def sealed(arrays, text):
    """A checkpoint with this text, and the digest that belongs to it."""
    file = io.BytesIO()
    tensor_file.write(file, arrays, {checkpoint.KEY: text}, ("digest", checkpoint._hash(text)))
    return file.getvalue()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"format": 1}', "lacks 'values'"),
        ('{"values": {}}', "lacks 'format'"),
        ('{"format": "1", "values": {}}', "'format' of the checkpoint is '1'; expected a whole number"),
        ('{"format": true, "values": {}}', "is True; expected a whole number"),
        ('{"format": 2, "values": {}}', "format 2 of checkpoints; this version reads 1"),
        ('{"format": 1, "values": [1]}', "is a list of 1; expected a dict"),
        ("[]", "is a list of 0; expected a dict"),
        ('{"format": 1, "values": {"a": 1, "a": 2}}', "a name comes twice"),
        ("[" * 10_000 + "]" * 10_000, "recursion"),
    ],
)
def test_odd_texts(text, match):
    with pytest.raises(CheckpointError, match=match):
        checkpoint.from_bytes(sealed({}, text))


def test_deep_nests():
    nest = []
    for _ in range(200):
        nest = [nest]
    for form in (nest, {"\0tuple": nest}, {"w": nest}):
        with pytest.raises(CheckpointError, match="nested more than"):
            checkpoint.put_together(form, {})


def test_bfloat16_without_ml_dtypes(monkeypatch):
    updater = numba_opt.get_updater(numba_opt.NAG(state_dtype="bfloat16"))
    updater(0, np.ones(3, "f4"), np.ones(3, "f4"))
    content = updater.get_states()
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(CheckpointError, match=r"'/0/1' cannot be read: .*numba_opt\[bfloat16\]"):
        updater.set_states(content)


# ---------------------------------------------------------------- headers


@fuzz
@given(data=st.data())
def test_headers(data):
    """What is read of a file is what the safetensors library reads, or it is refused."""
    arrays = {
        "a": np.arange(3, dtype="f4"),
        "b": np.zeros((0, 2)),
        "c": np.array(5, "i8"),
        "d": np.ones(2, "f2"),
    }
    content = safetensors.numpy.save(arrays, {"x": "y"})
    length = int.from_bytes(content[:8], "little")
    header = data.draw(altered(json.loads(content[8 : 8 + length])))
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + content[8 + length :]
    try:
        found, texts = tensor_file.parse(content)
    except CheckpointError:
        return
    expected = safetensors.numpy.load(content)
    assert snapshot(dict(sorted(found.items()))) == snapshot(dict(sorted(expected.items())))
    assert texts == (header.get("__metadata__") or {})


@pytest.mark.parametrize("dtype", sorted(set(tensor_file.DTYPES.values())))
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (2, 3), (1,) * 20])
def test_arrays_of_every_kind(dtype, shape, tmp_path):
    """As the library writes them, and as it reads them."""
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    arrays = {
        "first": array,
        "other": array[::-1].T if shape else array,
        "swapped": array.astype(array.dtype.newbyteorder(">")),
    }
    expected = {name: tensor_file.plain(a) for name, a in arrays.items()}
    content = checkpoint.to_bytes(arrays, {})
    for found in (safetensors.numpy.load(content), checkpoint.from_bytes(content)[0]):
        assert snapshot(dict(sorted(found.items()))) == snapshot(expected)
    written = safetensors.numpy.save(expected)
    assert snapshot(dict(sorted(tensor_file.parse(written)[0].items()))) == snapshot(expected)


def test_arrays_are_aligned(tmp_path):
    arrays = {f"{k}": np.zeros(3, dtype) for k, dtype in enumerate(["i1", "f8", "f2", "c8", "f4", "i8"])}
    checkpoint.write(tmp_path / "it", arrays, {})
    found, _ = checkpoint.read(tmp_path / "it")
    assert all(array.flags.aligned for array in found.values())


def test_arrays_that_a_file_cannot_hold():
    with pytest.raises(TypeError, match="it is complex128, which checkpoints cannot hold"):
        checkpoint.to_bytes({"it": np.zeros(2, "c16")}, {})


# ---------------------------------------------------------------- whole or not at all


def test_updater_interrupted_anywhere(updater_content):
    arrays, whole = updater_content
    content = checkpoint.to_bytes(arrays, whole)
    fresh, weights = updater_of()
    step(fresh, weights)
    old = described(fresh)
    updater = copy.deepcopy(fresh)
    updater.set_states(content)
    new = described(updater)
    assert new != old
    with np.errstate(all="raise"):
        for at in moments(lambda: copy.deepcopy(fresh).set_states(content)):
            updater = copy.deepcopy(fresh)
            interrupted(lambda u=updater: u.set_states(content), at)
            assert described(updater) in (old, new), at
