"""Steps on a real GPU, for every library that is there: ``pytest -m gpu``, and once under compute-sanitizer.

Everything here is skipped, with the reason, where there is no GPU.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import pytest

import numba_opt
from numba_opt import RowSparse, cuda_arrays

from . import table

pytestmark = pytest.mark.gpu

SHAPES = [(5, 7), (8, 16), 3, 0, (1, 130), (300, 64), 100_003]


@pytest.fixture(autouse=True)
def _gpu():
    try:
        devices = cuda_arrays.devices()
    except numba_opt.cuda.CudaUnavailableError as error:
        pytest.skip(str(error))
    if not devices:
        pytest.skip("the driver knows of no GPU")


class Library(NamedTuple):
    """How arrays get to a GPU and back."""

    name: str
    dtypes: tuple[str, ...]

    def put(self, thing: Any) -> Any:
        """A nest of NumPy arrays on the GPU."""
        if isinstance(thing, (list, tuple)):
            return type(thing)(map(self.put, thing))
        if thing is None:
            return None
        if self.name == "numba":
            return import_module("numba.cuda").to_device(thing)
        if self.name == "cupy":
            return import_module("cupy").asarray(thing)
        torch = import_module("torch")
        if thing.dtype.name == "bfloat16":
            return torch.from_numpy(thing.view(np.int16)).cuda().view(torch.bfloat16)
        return torch.from_numpy(thing.copy()).cuda()

    def get(self, thing: Any) -> Any:
        """The same on the host again."""
        if isinstance(thing, (list, tuple)):
            return type(thing)(map(self.get, thing))
        return None if thing is None else cuda_arrays.to_host(thing, "array")


LIBRARIES = [
    Library("numba", ("float32", "float64", "float16")),
    Library("cupy", ("float32", "float64", "float16")),
    Library("torch", ("float32", "float64", "float16", "bfloat16")),
]


@pytest.fixture(params=LIBRARIES, ids=lambda library: library.name)
def library(request):
    if find_spec(request.param.name) is None:
        pytest.skip(f"needs the package {request.param.name}")
    return request.param


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def both(library, row, call, steps=3, **options):
    """Weights and states after some steps: on the GPU, and on the CPU."""
    options = table.common(row) | options
    gpu, cpu = table.build(row, **options), table.build(row, **options)
    if options.get("multi_precision"):
        states = [cpu.create_state_multi_precision(t, w) for t, w in enumerate(call.weights)]
        call = call._replace(states=states)
    weights, grads, states = map(library.put, call[1:])
    for _ in range(steps):
        cpu.update_multi_precision(*call)
        gpu.update_multi_precision(call.indices, weights, grads, states)
    return library.get([weights, states]), table.outputs(call)


@table.each
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_parity(library, row, dtype):
    pytest.importorskip("ml_dtypes")
    if dtype not in library.dtypes:
        pytest.skip(f"{library.name} has no {dtype}")
    half = dtype in ("float16", "bfloat16")
    table.assert_alike(
        row, *both(library, row, table.make(row, SHAPES, dtype)), tolerance=1e-2 if half else 1e-6
    )


@table.each
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_master_weights(torch, row, dtype):
    pytest.importorskip("ml_dtypes")
    table.assert_alike(row, *both(LIBRARIES[2], row, table.make(row, SHAPES, dtype), multi_precision=True))


@table.each
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_arrays_that_begin_anywhere(torch, row, offset):
    """Views that no 16-byte access may begin at."""
    call = table.make(row, [(40, 25)])
    gpu, cpu = table.build(row), table.build(row)

    def shifted(array):
        memory = torch.zeros(array.size + offset, device="cuda")
        memory[offset:] = torch.from_numpy(array).cuda().ravel()
        return memory[offset:].view(array.shape)

    weights = [shifted(array) for array in call.weights]
    grads = LIBRARIES[2].put(call.grads)
    states = LIBRARIES[2].put(call.states)
    gpu.update(call.indices, weights, grads, states)
    cpu.update(*call)
    table.assert_alike(row, LIBRARIES[2].get([weights, states]), table.outputs(call))


def test_a_thousand_random_lists(library):
    rng = np.random.default_rng(0)
    row = table.row("adamax")
    gpu, cpu = table.build(row), table.build(row)
    for seed in range(1000):
        shapes = rng.choice([0, 1, 3, 4, 31, 128, 4095, 4096, 4097, 20_000], rng.integers(1, 9)).tolist()
        call = table.make(row, shapes, seed=seed)
        weights, grads, states = map(library.put, call[1:])
        gpu.update(call.indices, weights, grads, states)
        cpu.update(*call)
        table.assert_bits(library.get([weights, states]), table.outputs(call))


# ---------------------------------------------------------------- sparse gradients


@table.each
@pytest.mark.parametrize("distinct", [False, True])
def test_blocks(library, row, distinct):
    rng = np.random.default_rng(1)
    call = table.make(row, [(500, 33)])
    rows = rng.permutation(500)[:200] if distinct else rng.integers(0, 500, 3000)
    values = rng.standard_normal((len(rows), 33)).astype("float32")
    gpu, cpu = table.build(row), table.build(row)
    weights, states = library.put(call.weights), library.put(call.states)
    ours = RowSparse(library.put(rows), library.put(values), (500, 33), distinct)
    for _ in range(3):
        gpu.update([0], weights, [ours], states)
        cpu.update([0], call.weights, [RowSparse(rows, values, (500, 33))], call.states)
    table.assert_alike(row, library.get([weights, states]), table.outputs(call), 1e-5)


@table.each
def test_csr(row):
    cupy = pytest.importorskip("cupy")
    sparse = import_module("cupyx.scipy.sparse")
    import scipy.sparse

    matrix = scipy.sparse.random(400, 50, 0.05, "csr", "float32", rng=np.random.default_rng(2))
    call = table.make(row, [(400, 50)])
    gpu, cpu = table.build(row), table.build(row)
    weights, states = map(LIBRARIES[1].put, (call.weights, call.states))
    for _ in range(3):
        gpu.update([0], weights, [sparse.csr_matrix(matrix)], states)
        cpu.update([0], call.weights, [matrix], call.states)
    cupy.cuda.Device().synchronize()
    table.assert_alike(row, LIBRARIES[1].get([weights, states]), table.outputs(call), 1e-5)


def test_rows_that_lead_outside(torch):
    weight = torch.ones(10, 4, device="cuda")
    rows = torch.tensor([3, 10, -1, 2**40], device="cuda")
    trainer = numba_opt.Trainer([weight], "nag", learning_rate=1, momentum=0)
    trainer.step([RowSparse(rows, torch.ones(4, 4, device="cuda"), (10, 4))])
    assert trainer.stray_rows
    assert weight.sum(1).tolist() == [4] * 3 + [0] + [4] * 6


# ---------------------------------------------------------------- trainers, streams and graphs


@pytest.mark.parametrize("options", [{}, {"clip_global_norm": 0.5, "skip_nonfinite": True}])
def test_trainer(library, options):
    row = table.row("ftml")
    call = table.make(row, SHAPES)
    gpu = numba_opt.Trainer(library.put(call.weights), table.build(row), **options)
    cpu = numba_opt.Trainer(call.weights, table.build(row), **options)
    for lr in (0.1, 0.1, 0.02):
        for trainer, grads in ((gpu, library.put(call.grads)), (cpu, call.grads)):
            trainer.set_learning_rate(lr)
            trainer.step(grads, batch_size=2)
    if options:
        assert gpu.grad_norm == pytest.approx(cpu.grad_norm, rel=1e-12)
    table.assert_near(library.get(list(gpu.params.values())), call.weights, 1e-6)


def test_steps_that_are_skipped(torch):
    weight, grad = torch.ones(1000, device="cuda"), torch.ones(1000, device="cuda")
    trainer = numba_opt.Trainer([weight], "adamax", skip_nonfinite=True)
    trainer.step([grad])
    before = weight.clone()
    grad[123] = torch.nan
    trainer.step([grad])
    assert torch.equal(weight, before)
    assert trainer.skipped_steps == 1


def test_the_current_stream(torch):
    """A step goes behind what the caller's stream has been given, and what comes after waits for it."""
    weight = torch.ones(1_000_000, device="cuda")
    trainer = numba_opt.Trainer([weight], "nag", learning_rate=1, momentum=0)
    trainer.step([torch.zeros_like(weight)])
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        grad = torch.zeros_like(weight)
        torch.cuda._sleep(100_000_000)  # some 50 ms
        grad += 1
        trainer.step([grad])
        assert not stream.query()  # nobody has waited
        found = weight + 0
    stream.synchronize()
    assert found.unique().tolist() == [0]


def test_a_stream_by_its_address(torch):
    stream = torch.cuda.Stream()
    weight = LIBRARIES[0].put(np.ones(1000, "f4"))
    optimizer = numba_opt.NAG(learning_rate=1, momentum=0)
    with numba_opt.cuda.on(stream):
        optimizer.update([0], [weight], [LIBRARIES[0].put(np.ones(1000, "f4"))], [None])
    stream.synchronize()
    assert (LIBRARIES[0].get(weight) == 0).all()


@pytest.mark.parametrize("options", [{}, {"clip_global_norm": 0.5}])
def test_graph_with_a_changing_learning_rate(torch, options):
    row = table.row("rmsprop")
    call = table.make(row, [(300, 64), 1000, 7])
    put = LIBRARIES[2].put
    weights, grads = put(call.weights), put(call.grads)
    gpu = numba_opt.Trainer(weights, table.build(row), **options)
    cpu = numba_opt.Trainer(call.weights, table.build(row), **options)
    gpu.step(grads)
    cpu.step(call.grads)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gpu.step(grads)
    for lr in (0.1, 0.1, 0.03, 0.001):
        for trainer in (gpu, cpu):
            trainer.set_learning_rate(lr)
        gpu.advance()
        graph.replay()
        cpu.step(call.grads)
    table.assert_near(LIBRARIES[2].get(weights), call.weights, 1e-6)
    assert gpu.optimizer.num_update == cpu.optimizer.num_update == 5


def test_sparse_steps_in_a_graph(torch):
    """Row numbers may change from replay to replay, as may the values."""
    weight = torch.ones(50, 8, device="cuda")
    rows, values = torch.tensor([1, 4, 4], device="cuda"), torch.ones(3, 8, device="cuda")
    grad = RowSparse(rows, values, (50, 8))
    trainer = numba_opt.Trainer([weight], "nag", learning_rate=1, momentum=0)
    trainer.step([grad])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        trainer.step([grad])
    rows.copy_(torch.tensor([9, 9, 9]))
    trainer.advance()
    graph.replay()
    assert weight[:, 0].tolist() == [{1: 0, 4: -1, 9: -2}.get(k, 1) for k in range(50)]


def test_several_devices(torch):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    weights = [torch.ones(1000, device=f"cuda:{k % 2}") for k in range(4)]
    trainer = numba_opt.Trainer(weights, "nag", learning_rate=1, momentum=0)
    trainer.step([torch.ones_like(weight) for weight in weights])
    assert all((weight == 0).all() for weight in weights)
    with pytest.raises(ValueError, match="is on CUDA device 1; expected device 0"):
        trainer.step([weights[1], *weights[1:]])


def test_checkpoints(library, tmp_path):
    row = table.row("ftml")
    call = table.make(row, [(5, 7), 12])
    gpu = numba_opt.Trainer(library.put(call.weights), table.build(row))
    gpu.step(library.put(call.grads))
    gpu.save(tmp_path / "a.safetensors")
    cpu = numba_opt.Trainer(call.weights, table.build(row))
    cpu.load(tmp_path / "a.safetensors")
    table.assert_bits(library.get(list(gpu.params.values())), call.weights)


def test_a_gradient_on_the_host(library):
    weight = library.put(np.ones(5, "f4"))
    with pytest.raises(TypeError, match="not on a GPU; expected a CUDA array, as the weight"):
        numba_opt.NAG(momentum=0).update([0], [weight], [np.ones(5, "f4")], [None])
    with pytest.raises(TypeError, match="expected an array on the CPU, as the weight"):
        numba_opt.NAG(momentum=0).update([0], [np.ones(5, "f4")], [weight], [None])
