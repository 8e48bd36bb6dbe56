"""What the driver is asked for, seen by a driver that is not one: tests/fake_driver.c."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from .scripts import printed

TESTS = Path(__file__).parent
COMPILER = shutil.which("cc")

pytestmark = [
    pytest.mark.skipif(
        find_spec("numba_cuda") is None, reason="needs the package numba-cuda: pip install 'numba_opt[cuda]'"
    ),
    pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs Linux and a C compiler"),
]

SCRIPT = """
import json

import numpy as np
import numba_opt
from numba_opt.cuda import arrays as cuda_arrays


class Array:
    def __init__(self, array):
        self.array = array
        self.__cuda_array_interface__ = {**array.__array_interface__, "version": 3}


def zeros(*shape):
    return Array(np.zeros(shape, np.float32))


cuda_arrays.kernels().driver.array = lambda number, content: Array(content.copy())
found = [gpu.describe() for gpu in cuda_arrays.devices()]
trainer = numba_opt.Trainer([zeros(10_000), zeros(7)], "nag", clip_global_norm=1.0, learning_rate=0.5)
grads = [zeros(10_000), zeros(7)]
for lr in (0.5, 0.5, 0.25):
    print("step")
    trainer.set_learning_rate(lr)
    with numba_opt.cuda.on(0x70):
        trainer.step(grads)
print("step")
rows = numba_opt.RowSparse(Array(np.array([3, 1, 3] * 1000)), zeros(3000, 4), (9, 4))
table = numba_opt.Trainer([zeros(9, 4)], "groupadagrad")
table.step([rows])
print(json.dumps([found, trainer.grad_norm, trainer.skipped_steps, table.stray_rows]))
"""

FRONT = """
import pytest
import torch
import numba_opt.torch
from tests import cuda_torch

cuda_torch.stand_in(pytest.MonkeyPatch())


def zeros(*shapes):
    return [cuda_torch.on_gpu(torch.nn.Parameter(torch.zeros(shape))) for shape in shapes]


params = zeros(10_000, 7)
optimizer = numba_opt.torch.Adamax(params, lr=0.5, betas=(0.5, 0.5))
kept = []
for fresh in (True, False, True):
    print("step")
    if fresh:
        kept.append(zeros(10_000, 7))
        for param, grad in zip(params, kept[-1]):
            param.grad = grad.detach()
    optimizer.step()
print("step")
with numba_opt.cuda.on(0x70):
    optimizer.step()
print("step")
(table,) = zeros((9, 4))
rows = torch.sparse_coo_tensor([[3, 1, 3]], torch.zeros(3, 4), (9, 4), check_invariants=True)
table.grad = torch.Tensor._make_subclass(cuda_torch.CudaTensor, rows)
numba_opt.torch.GroupAdaGrad([table]).step()
print(int(optimizer.state[params[0]]["step"]))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The folder of the driver, compiled."""
    folder = tmp_path_factory.mktemp("driver")
    library = folder / "libcuda.so.1"
    command = [COMPILER, "-shared", "-fPIC", "-o", str(library), str(TESTS / "fake_driver.c"), "-ldl"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return folder


def run(script, library):
    """What a process printed: its last line as JSON, and the calls of each step as lists of words."""
    *lines, last = printed(script, options=("-u",), LD_LIBRARY_PATH=library).splitlines()
    steps = [step.splitlines() for step in "\n".join(lines).split("step\n")[1:]]
    return json.loads(last), [[line.split() for line in step] for step in steps]


@pytest.fixture(scope="module")
def seen(library):
    return run(SCRIPT, library)


def kernels(step):
    """The kernels and copies of a step, by name."""
    words = r"copy|wait|set_coefficients|_element_kernel|squares|clip_norm|keys|merge|rows"
    return [re.search(words, line[0].replace("cuda4rows", ""))[0] for line in step]  # the file's name


def test_devices(seen):
    assert seen[0][0] == [{"name": "Fake", "capability": "9.0", "bytes": 1 << 36}]


def test_what_a_step_launches(seen):
    """Tables and hyper-parameters go to the device when they change, and only then."""
    first, second, third, sparse = map(kernels, seen[1])
    assert first == ["copy", "set_coefficients", "squares", "clip_norm", "_element_kernel"]
    assert second == ["squares", "clip_norm", "_element_kernel"]
    assert third == ["set_coefficients", "squares", "clip_norm", "_element_kernel"]
    assert sparse == [
        "copy",
        "set_coefficients",
        "keys",
        "merge",
        "merge",
        "rows",
    ]  # of 3,000 keys, 1,024 a block


def test_grids_streams_and_arguments(seen):
    """Four chunks, a block each; the stream is the one that was named; learning rates are in the buffer."""
    _, set_coefficients, squares, clip_norm, dense = seen[1][0]
    assert [line[1:4] for line in (set_coefficients, squares, clip_norm, dense)] == [
        ["1", "1", "0x70"],
        ["4", "256", "0x70"],
        ["1", "256", "0x70"],
        ["4", "256", "0x70"],
    ]
    assert dense[4] == squares[4]  # the table
    assert set_coefficients[4] == clip_norm[4]  # the buffer
    assert [float(step[k][5]) for step, k in ((seen[1][0], 1), (seen[1][2], 0))] == [0.5, 0.25]
    assert {line[3] for line in seen[1][3][1:]} == {"(nil)"}  # the default stream


def test_what_is_read_back(seen):
    assert seen[0][1:] == [0.0, 0, False]


def test_the_torch_front(library):
    """Gradients that lie elsewhere cost a copy of the table; all goes to torch's stream, or beside it."""
    pytest.importorskip("torch")
    counted, steps = run(FRONT, library)
    first, second, third, named, sparse = map(kernels, steps)
    assert first == ["copy", "set_coefficients", "_element_kernel"]
    assert second == ["set_coefficients", "_element_kernel"]  # the learning rate is of the update's number
    assert third == first
    assert named == ["wait", "wait", *second, "wait"]
    assert sparse == ["copy", "set_coefficients", "keys", "rows"]
    assert {line[2 if line[0] == "copy" else 3] for step in steps[:3] for line in step} == {"0x51"}
    assert [line[-1] if line[0] == "wait" else line[3] for line in steps[3]] == [
        *["0x70"] * 4,
        "0x51",
    ]
    assert [float(step[-2][5]) for step in steps[:3]] == pytest.approx(
        [0.5 / (1 - 0.5**t) for t in (1, 2, 3)]
    )
    assert counted == 4
