"""Checkpoints: resumed to the bit, whole or refused, and never half taken over."""

from __future__ import annotations

import ast
import contextlib
import os
import random
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import numba_opt
from numba_opt import Trainer, lr_scheduler
from numba_opt.io import checkpoint, description
from numba_opt.io.checkpoint import CheckpointError

from . import table
from .test_trainer import SHAPES, snapshot, unchanged

ROOT = Path(__file__).parents[1]

posix_only = pytest.mark.skipif(os.name != "posix", reason="needs fork and signals")


def python(function, *arguments, module=__name__):
    """Call a function of a test module in a new process."""
    name = module.rpartition(".")[2]
    code = f"import sys; from tests import {name} as here; here.{function}(*sys.argv[1:])"
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)


# ---------------------------------------------------------------- resumed to the bit

DTYPES = {
    "plain": ["f4", "f8", "f4", "f4"],
    "rich": ["f4", "f8", "f2", "f4"],
    "bfloat16": ["f4", "f2", ml_dtypes.bfloat16, ml_dtypes.bfloat16],
}
NAMES = ["block/0.weight", "block/0.bias", "a'b", "é ~ c"]
RUNS = [(row, kind) for row in table.TABLE for kind in ("plain", "rich")]
RUNS += [(table.row(name), "bfloat16") for name in ("nag", "groupadagrad")]


def trainer_of(row, kind, seed=0):
    """A trainer; all but the plain kind have a schedule, multipliers, master copies and all options."""
    rng = np.random.default_rng(seed)
    shapes = [table.fit(row, shape) for shape in SHAPES]
    arrays = [rng.standard_normal(s).astype(d) for s, d in zip(shapes, DTYPES[kind], strict=True)]
    params = dict(zip(NAMES, arrays, strict=True))
    if kind == "plain":
        return Trainer(params, table.build(row))
    options = table.common(row) | {"learning_rate": None, "multi_precision": True, "begin_num_update": 3}
    scheduler = lr_scheduler.PolyScheduler(30, 0.05, pwr=1, warmup_steps=7)
    optimizer = table.build(row, lr_scheduler=scheduler, **options)
    mult = {"lr_mult": {"a'*": 0.5}, "wd_mult": {"*.bias": 0}}
    return Trainer(params, optimizer, clip_global_norm=3.0, skip_nonfinite=True, **mult)


def train(trainer, first, last):
    """Steps number `first` to `last`, whose gradients depend on nothing else; some are accumulated."""
    for n in range(first, last):
        rng = np.random.default_rng(1000 + n)
        grads = {name: rng.standard_normal(w.shape).astype(w.dtype) for name, w in trainer.params.items()}
        for t, name in enumerate(NAMES):
            if (n + t) % 4 == 0:
                grads[name] = None
        if n % 5 == 2 and trainer.skip_nonfinite:
            grads[NAMES[1]] = np.full_like(trainer.params[NAMES[1]], np.nan)
        if n % 3 == 0:  # steps 9 and 10 are one, and the checkpoint comes in between
            trainer.accumulate(grads)
        else:
            trainer.step(grads, batch_size=2)


def resume(folder):
    """The second half of each run, in a process that knows nothing but the file."""
    for row, kind in RUNS:
        trainer = trainer_of(row, kind, seed=99)
        trainer.load(Path(folder) / f"{row.id}-{kind}")
        train(trainer, 10, 20)
        trainer.save(Path(folder) / f"{row.id}-{kind}")


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resumed")
    for row, kind in RUNS:
        trainer = trainer_of(row, kind)
        train(trainer, 0, 10)
        assert trainer.state_dict()["accumulated"]
        trainer.save(folder / f"{row.id}-{kind}")
    python("resume", folder)
    return folder


@pytest.mark.parametrize(("row", "kind"), RUNS, ids=lambda value: getattr(value, "id", value))
def test_resumed_in_a_new_process(row, kind, resumed):
    expected = trainer_of(row, kind)
    train(expected, 0, 20)
    found = trainer_of(row, kind, seed=77)
    found.load(resumed / f"{row.id}-{kind}")
    assert snapshot(found) == snapshot(expected)
    assert found.learning_rate == expected.learning_rate
    if kind != "plain":
        assert found.skipped_steps > 0
    train(found, 20, 23)
    train(expected, 20, 23)
    assert snapshot(found) == snapshot(expected)


@table.each
def test_state_dict_round_trip(row):
    trainer = trainer_of(row, "rich")
    train(trainer, 0, 10)
    state = trainer.state_dict()
    before = snapshot(state)
    train(trainer, 10, 20)
    expected = snapshot(trainer)
    assert snapshot(state) == before, "state_dict must be a copy"
    for other in (trainer, trainer_of(row, "rich", seed=5)):
        arrays = [id(w) for w in other.params.values()]
        other.load_state_dict(state)
        assert snapshot(other) == before
        train(other, 10, 20)
        assert snapshot(other) == expected
        assert [id(w) for w in other.params.values()] == arrays
        assert snapshot(state) == before, "load_state_dict must copy"


def test_what_is_in_a_state_dict():
    params = {"w": np.ones((2, 3)), "b": np.zeros(3)}
    trainer = Trainer(params, "rmsprop", centered=True, learning_rate=0.125)
    trainer.step({"w": np.ones((2, 3))})
    trainer.accumulate({"b": np.ones(3)})
    state = trainer.state_dict()
    assert list(state) == ["optimizer", "parameters", "accumulated", "skipped_steps"]
    assert state["optimizer"]["name"] == "RMSProp"
    assert state["optimizer"]["hyper"]["learning_rate"] == 0.125
    assert state["optimizer"]["hyper"]["centered"] is True
    assert {name: entry["count"] for name, entry in state["parameters"].items()} == {"w": 1, "b": 0}
    assert [part.shape for part in state["parameters"]["w"]["state"]] == [(2, 3)] * 3
    assert state["parameters"]["w"]["weight"] is not params["w"]
    assert state["accumulated"]["b"].tolist() == [1, 1, 1]
    assert state["skipped_steps"] == 0


@pytest.mark.parametrize("how", ["dict", "file"])
def test_without_parameters(how, tmp_path):
    row = table.row("ftml")
    trainer = trainer_of(row, "rich")
    train(trainer, 0, 10)
    other = trainer_of(row, "rich", seed=5)
    weights = snapshot(other.params)
    if how == "dict":
        assert "weight" not in trainer.state_dict(params=False)["parameters"]["a'b"]
        other.load_state_dict(trainer.state_dict(params=False))
    else:
        trainer.save(tmp_path / "it", params=False)
        other.load(tmp_path / "it")
    assert snapshot(other.params) == weights
    assert snapshot(other.states) == snapshot(trainer.states)
    for mine, theirs in zip(other.params.values(), trainer.params.values(), strict=True):
        mine[...] = theirs
    assert snapshot(other) == snapshot(trainer)


def test_values_set_on_the_way_come_back(tmp_path):
    make = lambda: Trainer([np.ones(3), np.ones(2)], "nag", learning_rate=0.5)  # noqa: E731
    trainer = make()
    trainer.set_learning_rate(0.25)
    trainer.set_lr_mult({"1": 3})
    trainer.optimizer.rescale_grad = 0.125
    trainer.optimizer.clip_gradient = 0.75
    trainer.optimizer.momentum = 0.5
    trainer.optimizer.aggregate_num = np.inf
    trainer.step([np.ones(3), np.ones(2)])
    trainer.save(tmp_path / "it")
    found = make()
    found.load(tmp_path / "it")
    for t in (trainer, found):
        t.step([np.ones(3), np.ones(2)])
    assert snapshot(found) == snapshot(trainer)
    assert found.learning_rate == 0.25


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rescale_grad", np.float32(0.25)),
        ("wd", np.float32(0.5)),
        ("clip_gradient", np.float64(0.25)),
        ("momentum", 0.0),
    ],
    ids=["float32-rescale", "float32-wd", "float64-clip", "no-momentum"],
)
def test_attributes_of_every_kind_come_back(name, value, tmp_path):
    """Attributes may be set to whatever a step takes: a NumPy number, a momentum of 0."""
    trainer = Trainer([np.ones(3)], "nag")
    trainer.step([np.ones(3)])
    setattr(trainer.optimizer, name, value)
    trainer.save(tmp_path / "it")
    found = Trainer([np.zeros(3)], "nag")
    found.load(tmp_path / "it")
    for t in (trainer, found):
        t.step([np.ones(3)])
    assert snapshot(found.params) == snapshot(trainer.params)


def test_a_schedule_of_the_same_class_is_taken_over(tmp_path):
    make = lambda base, step: Trainer(  # noqa: E731
        [np.ones(2)],
        "nag",
        learning_rate=None,
        lr_scheduler=lr_scheduler.MultiFactorScheduler(step, base_lr=base),
    )
    trainer = make(0.5, [2, 4])
    for _ in range(3):
        trainer.step([np.ones(2)])
    trainer.save(tmp_path / "it")
    other = make(0.25, [9])
    other.load(tmp_path / "it")
    assert vars(other.optimizer.lr_scheduler) == vars(trainer.optimizer.lr_scheduler)
    assert other.learning_rate == trainer.learning_rate == 0.5


ODD_NAMES = ["", "/", "a/b", "a", "a'", "/weight", "0", "__metadata__", "é漢", "\n", '"', "x" * 500]


@pytest.mark.parametrize(
    "names", [ODD_NAMES, ["\0array", "a"], ["\0array"], ["\0tuple"]], ids=["odd", "array", "one", "tuple"]
)
def test_names_of_every_kind(names, tmp_path):
    make = lambda: Trainer({name: np.full(2, k / 4) for k, name in enumerate(names)}, "nag")  # noqa: E731
    trainer = make()
    trainer.step({name: np.ones(2) for name in names})
    trainer.save(tmp_path / "it")
    found = make()
    found.load(tmp_path / "it")
    assert snapshot(found) == snapshot(trainer)


def test_arrays_of_every_shape_and_layout(tmp_path):
    def make():
        arrays = [np.float32(2).reshape(()), np.ones(0), np.ones((0, 3)), np.ones((2, 1, 3), "f4")]
        arrays += [
            np.asfortranarray(np.arange(6.0).reshape(2, 3)),
            np.arange(9.0)[::2],
            np.ones(70_000, "f4"),
        ]
        return Trainer([a if a.flags.writeable else a.copy() for a in map(np.asarray, arrays)], "adamax")

    trainer = make()
    trainer.step([np.full(w.shape, 0.5, w.dtype) for w in trainer.params.values()])
    trainer.save(tmp_path / "it")
    found = make()
    found.load(tmp_path / "it")
    assert snapshot(found) == snapshot(trainer)


def test_an_optimizer_of_one_s_own(tmp_path):
    class Mine(numba_opt.Optimizer):
        state_names = ("total",)

        def __init__(self, decay=0.5, **kwargs):
            super().__init__(**kwargs)
            self.decay = decay

        def rule(weight, grad, total, lr, decay):  # noqa: N805
            total = decay * total + grad
            return weight - lr * total, total

        def hyper(self, lr, t):
            return lr, self.decay

    trainer = Trainer([np.ones(3)], Mine(decay=0.25))
    trainer.step([np.ones(3)])
    trainer.save(tmp_path / "it")
    found = Trainer([np.zeros(3)], Mine())
    found.load(tmp_path / "it")
    assert found.optimizer.decay == 0.25
    assert snapshot(found) == snapshot(trainer)


# ---------------------------------------------------------------- refused, with nothing changed


def small():
    """A trainer in the middle of its training."""
    params = {"w": np.arange(2.0), "b": np.arange(3, dtype="f4")}
    trainer = Trainer(params, "nag", learning_rate=0.1)
    trainer.step({"w": np.ones(2), "b": np.ones(3, "f4")})
    trainer.accumulate({"w": np.ones(2)})
    return trainer


@pytest.fixture
def trainer():
    return small()


W, B = np.ones(2), np.ones(3, "f4")
STEPS = lr_scheduler.FactorScheduler(2)


@pytest.mark.parametrize(
    ("params", "optimizer", "match"),
    [
        ({"w": W, "b": B}, numba_opt.RMSProp(), "of RMSProp.*NAG"),  # as many states as NAG
        ({"w": W, "b": B}, numba_opt.Adamax(), "of Adamax.*NAG"),  # and more
        ({"w": W, "b": B}, numba_opt.NAG(momentum=0), "state"),
        ({"w": np.ones(4), "b": B}, numba_opt.NAG(), r"'w'.*\(4,\).*\(2,\)"),
        ({"w": W, "b": np.ones((3, 1), "f4")}, numba_opt.NAG(), r"'b'.*\(3, 1\).*\(3,\)"),
        ({"w": W.astype("f4"), "b": B}, numba_opt.NAG(), "'w'.*float32.*float64"),
        ({"w": W, "b": B.astype("f2")}, numba_opt.NAG(multi_precision=True), "'b'.*(tuple of 2|float16)"),
        ({"w": W, "bias": B}, numba_opt.NAG(), "'b', 'bias'"),
        ({"w": W}, numba_opt.NAG(), "'b'"),
        ({"w": W, "b": B, "c": W + 1}, numba_opt.NAG(), "'c'"),
        ([W, B], numba_opt.NAG(), "'0'"),
        (
            {"w": W, "b": B},
            numba_opt.NAG(learning_rate=None, lr_scheduler=STEPS),
            "lr_scheduler is FactorScheduler.*None",
        ),
    ],
)
@pytest.mark.parametrize("how", ["dict", "file"])
def test_checkpoint_of_something_else(params, optimizer, match, how, trainer, tmp_path):
    copies = (
        {k: v.copy() for k, v in params.items()} if isinstance(params, dict) else [p.copy() for p in params]
    )
    source = Trainer(copies, optimizer)
    source.save(tmp_path / "it")
    state = source.state_dict()
    call = {"dict": lambda: trainer.load_state_dict(state), "file": lambda: trainer.load(tmp_path / "it")}[
        how
    ]
    unchanged(trainer, call, CheckpointError, match)
    trainer.step()  # and goes on


@pytest.mark.parametrize(
    ("mine", "theirs", "match"),
    [
        (STEPS, None, "lr_scheduler is None.*FactorScheduler"),
        (STEPS, lr_scheduler.PolyScheduler(5), "lr_scheduler is PolyScheduler.*FactorScheduler"),
        (None, lr_scheduler.PolyScheduler(5), "lr_scheduler is PolyScheduler.*None"),
    ],
)
def test_checkpoint_with_another_schedule(mine, theirs, match):
    make = lambda s: Trainer([np.ones(2)], "nag", learning_rate=None, lr_scheduler=s)  # noqa: E731
    state = make(theirs).state_dict()
    target = make(mine)
    unchanged(target, lambda: target.load_state_dict(state), CheckpointError, match)


def test_checkpoint_whose_accumulated_gradients_do_not_fit(trainer):
    state = trainer.state_dict()
    state["accumulated"]["w"] = np.ones(5)
    unchanged(trainer, lambda: trainer.load_state_dict(state), CheckpointError, r"accumulated.*'w'.*\(5,\)")


PARTS = ["optimizer", "parameters", "accumulated", "skipped_steps"]
PARTS += [
    f"optimizer/{k}" for k in ("name", "hyper", "num_update", "counts", "lr_mult", "wd_mult", "scheduler")
]
PARTS += ["parameters/b", "parameters/b/state", "parameters/b/count", "optimizer/hyper/momentum"]


@pytest.mark.parametrize("missing", PARTS)
def test_state_dict_with_a_part_missing(missing, trainer):
    """Either it is refused with nothing changed, or the part was not needed."""
    state = trainer.state_dict()
    trainer.step()
    *path, last = missing.split("/")
    part = state
    for key in path:
        part = part[key]
    del part[last]
    if missing == "optimizer/hyper/momentum":
        return trainer.load_state_dict(state)
    return unchanged(trainer, lambda: trainer.load_state_dict(state), (CheckpointError, KeyError), None)


def test_hyper_parameters_out_of_range(trainer):
    for key, value in [("momentum", -1), ("wd", "much"), ("nonsense", 1), ("learning_rate", float("inf"))]:
        state = trainer.state_dict()
        state["optimizer"]["hyper"][key] = value
        unchanged(trainer, lambda s=state: trainer.load_state_dict(s), CheckpointError, f"NAG.*{key}")


def test_another_format_version(trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
    trainer.save(tmp_path / "it")
    monkeypatch.undo()
    match = f"it: format {checkpoint.FORMAT + 1} .* reads {checkpoint.FORMAT}"
    unchanged(trainer, lambda: trainer.load(tmp_path / "it"), CheckpointError, match)


def test_files_of_others(trainer, tmp_path):
    arrays = {"w": np.ones(2), "b": np.ones(3, "f4")}
    safetensors.numpy.save_file(arrays, tmp_path / "plain", {"format": "pt"})
    safetensors.numpy.save_file(arrays, tmp_path / "bare")
    updater = numba_opt.get_updater(numba_opt.NAG())
    updater(0, np.ones(2), np.ones(2))
    (tmp_path / "updater").write_bytes(updater.get_states(dump_optimizer=True))
    (tmp_path / "text").write_text("weights\n" * 100)
    (tmp_path / "empty").touch()
    np.save(tmp_path / "array.npy", np.ones(5))
    for name, match in [
        ("plain", "not a checkpoint of numba_opt"),
        ("bare", "not a checkpoint of numba_opt"),
        ("updater", "not of a Trainer"),
        ("text", "not a whole safetensors file"),
        ("empty", "not a whole safetensors file"),
        ("array.npy", "not a whole safetensors file"),
    ]:
        path = tmp_path / name
        unchanged(trainer, lambda p=path: trainer.load(p), CheckpointError, f"{name}.*{match}")
    unchanged(trainer, lambda: trainer.load(tmp_path / "nowhere"), FileNotFoundError, "nowhere")
    unchanged(trainer, lambda: trainer.load(tmp_path), OSError, None)


# ---------------------------------------------------------------- damaged files


class Fuzz:
    """A file that is damaged again and again, and a trainer that must not take any of it over."""

    def __init__(self, trainer, path):
        self.trainer, self.path = trainer, path
        trainer.save(path)
        self.content = path.read_bytes()
        self.whole = [snapshot(trainer)]  # what may come out of it
        trainer.step()
        self.before = snapshot(trainer)
        self.refused = self.taken = 0

    def try_(self, content, what):
        self.path.write_bytes(content)
        try:
            self.trainer.load(self.path)
        except CheckpointError:
            self.refused += 1
            assert snapshot(self.trainer) == self.before, what
        else:
            self.taken += 1
            self.before = snapshot(self.trainer)
            assert self.before in self.whole, what


@pytest.fixture
def fuzz(trainer, tmp_path):
    return Fuzz(trainer, tmp_path / "it")


@pytest.mark.parametrize("flip", [0x01, 0x20, 0xFF], ids=hex)
def test_every_byte_flipped(fuzz, flip):
    for k, byte in enumerate(fuzz.content):
        changed = bytearray(fuzz.content)
        changed[k] = byte ^ flip
        fuzz.try_(bytes(changed), f"byte {k}")
    assert fuzz.refused + fuzz.taken == len(fuzz.content)
    assert fuzz.taken < 20  # padding


def test_every_truncation(fuzz):
    for length in range(len(fuzz.content)):
        fuzz.try_(fuzz.content[:length], f"length {length}")
    assert fuzz.taken == 0
    fuzz.try_(fuzz.content + b"\0", "one byte more")
    assert fuzz.taken == 0
    fuzz.try_(fuzz.content, "whole")
    assert fuzz.taken == 1


def test_random_ranges_overwritten(fuzz):
    rng = random.Random(0)
    size = len(fuzz.content)
    for k in range(1500):
        start = rng.randrange(size)
        stop = min(size, start + rng.choice([1, 2, 8, 64, size]))
        filler = [rng.randbytes(stop - start), bytes(stop - start), b" " * (stop - start)][k % 3]
        shifted = rng.choice([0, 0, 0, 1, -1])  # bytes lost or doubled
        fuzz.try_(fuzz.content[:start] + filler + fuzz.content[stop + shifted :], f"{start} to {stop}, {k}")
    assert fuzz.refused > 1000


def test_parts_of_two_checkpoints(fuzz, trainer, tmp_path):
    """As after a write that reached only some of a file's blocks."""
    trainer.step({"w": np.ones(2), "b": np.ones(3, "f4")})
    trainer.accumulate({"w": np.ones(2)})
    trainer.save(tmp_path / "newer")
    old, new = fuzz.content, (tmp_path / "newer").read_bytes()
    fuzz.whole.append(snapshot(trainer))
    fuzz.before = fuzz.whole[1]
    for k in range(0, len(old), 4):
        fuzz.try_(old[:k] + new[k:], f"old before {k}")
        fuzz.try_(new[:k] + old[k:], f"new before {k}")
    assert fuzz.refused > 100


# ---------------------------------------------------------------- safetensors, and nothing else


def test_safetensors_itself_is_not_needed(trainer, tmp_path, monkeypatch):
    for module in ("safetensors", "safetensors.numpy"):
        monkeypatch.setitem(sys.modules, module, None)
    trainer.save(tmp_path / "it")
    before = snapshot(trainer)
    trainer.step()
    trainer.load(tmp_path / "it")
    assert snapshot(trainer) == before
    updater = numba_opt.get_updater(numba_opt.NAG())
    updater.set_states(updater.get_states())


@pytest.mark.parametrize("name", ["trainer_1", "updater_1"])
def test_files_of_earlier_versions(name):
    """Written when the format was new, by the safetensors library."""
    path = ROOT / "tests" / "checkpoints" / f"{name}.safetensors"
    arrays = safetensors.numpy.load_file(path)
    if name == "updater_1":
        updater = numba_opt.get_updater(numba_opt.NAG(sparse_update="exact", multi_precision=True))
        updater.set_states(path.read_bytes())
        master, (mom, last_step) = updater.states["a", 3]
        assert snapshot([master, mom, last_step]) == snapshot(
            [arrays[f"/0/1/{place}"] for place in ("0", "1/0", "1/1")]
        )
        assert snapshot(updater.optimizer._deferred["a", 3].rows()) == snapshot(arrays["histories/0/1"])
        updater.optimizer.flush([("a", 3)], [np.ones((4, 2), "f2")], [updater.states["a", 3]])
        return
    shapes = {"block/0.weight": ((3, 2), "f2"), "é'": (3, "f8"), "b": ((2, 2), ml_dtypes.bfloat16)}
    params = {n: np.zeros(*shape) for n, shape in (shapes | {"\0e": ((4, 2), "f4")}).items()}
    scheduler = lr_scheduler.PolyScheduler(30, 0.01)
    trainer = Trainer(params, "adamax", learning_rate=None, lr_scheduler=scheduler, multi_precision=True)
    trainer.load(path)
    assert trainer.optimizer.num_update == 3
    assert trainer.learning_rate == lr_scheduler.PolyScheduler(30, 0.05, pwr=1, warmup_steps=2)(3)
    for name, array in params.items():
        assert array.tobytes() == arrays[f"/parameters/{name}/weight"].tobytes()
        assert array.any()
    trainer.step()
    assert (trainer.optimizer._index_update_count) == {0: 3, 1: 4, 2: 3, 3: 4}


def test_anybody_can_read_the_arrays(trainer, tmp_path):
    """The file is a plain safetensors file, with the arrays under their paths."""
    trainer.save(tmp_path / "it")
    arrays = safetensors.numpy.load_file(tmp_path / "it")
    assert sorted(arrays) == [
        "/accumulated/w",
        "/parameters/b/state",
        "/parameters/b/weight",
        "/parameters/w/state",
        "/parameters/w/weight",
    ]
    assert snapshot(arrays["/parameters/w/weight"]) == snapshot(trainer.params["w"])


@pytest.mark.parametrize(
    "module",
    [
        "io/checkpoint",
        "io/tensor_file",
        "trainer/trainer",
        "trainer/state",
        "updater",
        "trainer/bound_parameters",
    ],
)
def test_no_pickle(module):
    tree = ast.parse((ROOT / "numba_opt" / f"{module}.py").read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {str(node.module).split(".")[0], *(alias.name for alias in node.names)}
    assert imported & {"numpy", "np", "annotations"}, "nothing was found"
    assert not imported & {
        "pickle",
        "cPickle",
        "_pickle",
        "marshal",
        "shelve",
        "joblib",
        "cloudpickle",
        "dill",
    }
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not names & {"eval", "exec", "__import__"}


# ---------------------------------------------------------------- Updater


@table.each
@pytest.mark.parametrize("dump_optimizer", [True, False])
def test_updater_round_trip(row, dump_optimizer):
    def make(seed):
        call = table.make(row, [(4, 3), (2, 5), (3, 3)], "f2", seed)
        scheduler = lr_scheduler.PolyScheduler(9, 0.1)
        optimizer = table.build(row, multi_precision=True, learning_rate=None, lr_scheduler=scheduler)
        return numba_opt.get_updater(optimizer), call.weights

    def steps(updater, weights, first, last):
        for n in range(first, last):
            rng = np.random.default_rng(n)
            present = [t for t in range(3) if n % 3 != t]
            grads = [rng.standard_normal(weights[t].shape).astype("f2") for t in present]
            updater(present, grads, [weights[t] for t in present])

    updater, weights = make(0)
    steps(updater, weights, 0, 4)
    content = updater.get_states(dump_optimizer)
    fresh, _ = make(1)
    if not dump_optimizer:  # then the counts are the caller's
        fresh.optimizer.num_update = updater.optimizer.num_update
        fresh.optimizer._index_update_count = dict(updater.optimizer._index_update_count)
    fresh.set_states(content)
    assert snapshot(list(fresh.states.items())) == snapshot(list(updater.states.items()))
    copies = [weight.copy() for weight in weights]
    steps(updater, weights, 4, 9)
    steps(fresh, copies, 4, 9)
    assert snapshot(copies) == snapshot(weights)
    assert snapshot(list(fresh.states.items())) == snapshot(list(updater.states.items()))
    assert fresh.optimizer.num_update == updater.optimizer.num_update


@pytest.mark.parametrize("dump_optimizer", [True, False])
@pytest.mark.parametrize("index", [7, "encoder.weight", ("block", 3), np.int64(7), 2**70], ids=repr)
def test_updater_with_indices_of_every_kind(index, dump_optimizer):
    updater = numba_opt.get_updater(numba_opt.NAG())
    updater([index], [np.ones(3)], [np.ones(3)])
    found = numba_opt.get_updater(numba_opt.NAG())
    found.set_states(updater.get_states(dump_optimizer))
    assert list(found.states) == [index]
    assert snapshot(found.states[index]) == snapshot(updater.states[index])
    if dump_optimizer:
        assert found.optimizer._index_update_count == {index: 1}


def test_updater_refuses_what_is_not_its_own(trainer, tmp_path):
    trainer.save(tmp_path / "it")
    updater = numba_opt.get_updater(numba_opt.NAG())
    updater(0, np.ones(3), np.ones(3))
    adamax = numba_opt.get_updater(numba_opt.Adamax())
    adamax(0, np.ones(3), np.ones(3))
    before = snapshot(updater.states[0]), description.describe(updater.optimizer)
    for content, error, match in [
        ((tmp_path / "it").read_bytes(), CheckpointError, "not of an Updater"),
        (adamax.get_states(dump_optimizer=True), CheckpointError, "of Adamax.*NAG"),
        (updater.get_states()[:-1], CheckpointError, "whole"),
        (b"", CheckpointError, "whole"),
        ("text", TypeError, "bytes"),
        (None, TypeError, "bytes"),
    ]:
        with pytest.raises(error, match=match):
            updater.set_states(content)
        assert (snapshot(updater.states[0]), description.describe(updater.optimizer)) == before


def test_updater_is_left_alone_by_damaged_bytes():
    updater = numba_opt.get_updater(numba_opt.NAG())
    updater([0, 1], [np.ones(3), np.ones(2)], [np.ones(3), np.ones(2)])
    content = updater.get_states(dump_optimizer=True)
    before = snapshot(list(updater.states.items()))
    for k, byte in enumerate(content):
        damaged = content[:k] + bytes([byte ^ 0x11]) + content[k + 1 :]
        with contextlib.suppress(CheckpointError):
            updater.set_states(damaged)
        assert snapshot(list(updater.states.items())) == before, k
