"""A new optimizer is one file: everything that the package does, it does with that one too.

The file is written by the tests, and nothing else is touched.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

import numba_opt

from .. import table
from ..scripts import environment
from .gradients import SHAPE, block, csr, dense
from .pairs import Twins, conform

SOURCE = '''
"""Yogi: Adam whose second moment changes by no more than a gradient's square."""

import numba_opt
from numba_opt.core.torch_form import TorchForm, betas, number
from numba_opt.scalar import sign, sqrt


def yogi(weight, grad, mean, var, lr, beta1, one_minus_beta1, one_minus_beta2, epsilon):
    mean = beta1 * mean + one_minus_beta1 * grad
    var = var - one_minus_beta2 * sign(var - grad * grad) * grad * grad
    return weight - lr * mean / (sqrt(var) + epsilon), mean, var


class TorchYogi(TorchForm):
    documentation = "Yogi, with torch's names of options."
    options = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-3, "weight_decay": 0.0, "maximize": False}

    @classmethod
    def own_options(cls, group):
        beta1, beta2 = betas(group)
        wd = number(group, "weight_decay")
        return {"beta1": beta1, "beta2": beta2, "epsilon": number(group, "eps"), "wd": wd}


@numba_opt.register
class Yogi(numba_opt.Optimizer):
    rule = staticmethod(yogi)
    state_names = ("mean", "var")
    torch_form = TorchYogi

    def __init__(self, learning_rate=0.01, beta1=0.9, beta2=0.999, epsilon=1e-3, **kwargs):
        super().__init__(learning_rate=learning_rate, **kwargs)
        self.beta1, self.beta2, self.epsilon = beta1, beta2, epsilon

    def hyper(self, lr, t):
        return lr, self.beta1, 1 - self.beta1, 1 - self.beta2, self.epsilon
'''


def formula(w, g, lr, t, mean, var, *, beta1=0.9, beta2=0.999, epsilon=1e-3):
    mean = beta1 * mean + (1 - beta1) * g
    var = var - (1 - beta2) * np.sign(var - g**2) * g**2
    return w - lr * mean / (np.sqrt(var) + epsilon), mean, var


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("mine") / "my_yogi.py"
    path.write_text(SOURCE)
    return path


@pytest.fixture(scope="module")
def yogi(path):
    """The optimizer as a row of the table; it is forgotten afterwards."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield table.Row("yogi", module.Yogi, {}, 2, 0.01, formula)
    del sys.modules[path.stem]
    del numba_opt.Optimizer.opt_registry["yogi"]


def test_by_name(yogi):
    optimizer = numba_opt.create("yogi", beta1=0.5)
    assert type(optimizer) is yogi.cls
    assert (optimizer.beta1, optimizer.learning_rate) == (0.5, yogi.learning_rate)
    assert isinstance(numba_opt.Trainer([np.zeros(2)], "yogi").optimizer, yogi.cls)


def test_formula(backend, yogi):
    """Compiled from the one rule for whatever there is."""
    weight, *grads = (dense(seed=seed) for seed in range(4))
    expected = table.reference(yogi, weight, grads, **table.common(yogi))
    optimizer, weight = table.build(yogi, **table.common(yogi)), backend.put(weight)
    state = optimizer.create_state(0, weight)
    for grad in grads:
        optimizer.update([0], [weight], [backend.put(grad)], [state])
    table.assert_near(backend.get([weight, state]), expected, 2e-6)


def test_trainer(backend, yogi, tmp_path):
    twins = Twins(backend, yogi, [(5, 7), 33], trainer={"clip_global_norm": 1.0})
    twins.step(*twins.grads)
    twins.ours.save(tmp_path / "yogi.safetensors")
    twins.ours.load(tmp_path / "yogi.safetensors")
    twins.step(*twins.grads)
    twins.agree(1e-6)


def test_rows(backend, yogi):
    conform(backend, yogi, [block()], [SHAPE])


@pytest.mark.parametrize("mode", ["lazy", "dense", "exact"])
def test_what_sparse_gradients_mean(yogi, mode):
    """The formula of touched rows, or of all of them; zeros are added for those that are not."""
    grads = [block([1, 4, 4], seed=1), csr(seed=2), block([8], seed=3), block([0, 4], seed=4)]
    (weight,) = table.make(yogi, [SHAPE]).weights
    start = weight.copy()
    trainer = numba_opt.Trainer([weight], table.build(yogi, wd=0.1, sparse_update=mode))
    for grad in grads:
        trainer.step([grad])
    trainer.flush()
    every = [grad.to_dense() if isinstance(grad, numba_opt.RowSparse) else grad.toarray() for grad in grads]
    for r in range(SHAPE[0]):
        taken = [g[r] for g in every if mode != "lazy" or g[r].any()]
        expected = table.reference(yogi, start[r], taken, wd=0.1)
        table.assert_near([weight[r]], expected[:1], 1e-5)


@pytest.mark.filterwarnings("ignore:states in float16", "ignore:states in bfloat16")
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("masters", [False, True], ids=["", "masters"])
def test_half_precision(yogi, dtype, masters):
    weight, *grads = (dense(seed=seed).astype(dtype) for seed in range(4))
    expected = table.reference(yogi, weight, grads)
    trainer = numba_opt.Trainer([weight], table.build(yogi, multi_precision=masters))
    for grad in grads:
        trainer.step([grad])
    table.assert_near([weight], expected[:1], 1e-2 if dtype == np.float16 else 3e-2)
    assert {a.dtype for a in table.leaves(trainer.states["0"])} == {np.dtype("f4" if masters else dtype)}


def test_torch(yogi):
    torch = pytest.importorskip("torch")
    import numba_opt.torch as front

    assert issubclass(front.Yogi, torch.optim.Optimizer)
    weight, *grads = (dense(seed=seed) for seed in range(4))
    parameter = torch.nn.Parameter(torch.from_numpy(weight.copy()))
    optimizer = front.Yogi([parameter], lr=0.02, betas=(0.8, 0.99), weight_decay=0.1)
    for grad in grads:
        parameter.grad = torch.from_numpy(grad)
        optimizer.step()
    options = {"learning_rate": 0.02, "wd": 0.1, "beta1": 0.8, "beta2": 0.99}
    found = [
        parameter.detach().numpy(),
        *(optimizer.state[parameter][name].numpy() for name in ("mean", "var")),
    ]
    table.assert_near(found, table.reference(yogi, weight, grads, **options), 2e-6)


def test_warmup(yogi):
    """After it nothing is left to compile."""
    numba_opt.warmup("yogi", sparse=False, progress=False)
    again = numba_opt.warmup(yogi.cls, sparse=False, progress=False)
    assert again.compiled == 0
    assert again.loaded
    optimizer = numba_opt.create("yogi")
    assert numba_opt.warmup(optimizer, sparse=False, progress=False).compiled == 0


def command(*arguments):
    """The command line, in a process that knows of nothing."""
    return subprocess.run(
        [sys.executable, "-m", "numba_opt", *map(str, arguments)],
        env=environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_command_line(path):
    done = command("warmup", "yogi", "--import", path, "--dense", "--quiet", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["compiled"] + found["loaded"] > 0


def test_command_line_without_the_file():
    """It is told that there is no such optimizer, in one line."""
    done = command("warmup", "yogi", "--dense", "--quiet")
    assert done.returncode == 2
    assert "yogi" in done.stderr
    assert "Traceback" not in done.stderr
