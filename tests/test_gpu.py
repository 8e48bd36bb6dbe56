"""Steps on a real GPU, for every library that is there: ``pytest -m gpu``, and once under compute-sanitizer.

Everything here is skipped, with the reason, where there is no GPU.
"""

from __future__ import annotations

import copy
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import pytest

import numba_opt
from numba_opt import RowSparse
from numba_opt.cuda import arrays as cuda_arrays

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


@pytest.fixture
def front(torch):
    return import_module("numba_opt.torch")


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
@pytest.mark.parametrize("kept", ["bfloat16", "float16"])
def test_rounding_by_chance(torch, row, kept):
    """The CPU's bits, but where a row's squares, added in another order, lead to another neighbour."""
    pytest.importorskip("ml_dtypes")
    options = {"state_dtype": kept, "stochastic_rounding": True, "seed": 5}
    call = table.make(row, SHAPES)
    optimizer = table.build(row, **options)
    call = call._replace(states=[optimizer.create_state(t, w) for t, w in enumerate(call.weights)])
    table.assert_alike(row, *both(LIBRARIES[2], row, call, **options), tolerance=1e-2)


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
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_row(library, row, dtype):
    """``sparse_update="dense"``: rows without a gradient take a step with zero."""
    rng = np.random.default_rng(5)
    call = table.make(row, [(500, 33)], dtype)
    rows = rng.integers(0, 500, 300)
    values = rng.standard_normal((len(rows), 33)).astype(dtype)
    options = table.common(row) | {"sparse_update": "dense"}
    gpu, cpu = table.build(row, **options), table.build(row, **options)
    weights, states = library.put(call.weights), library.put(call.states)
    ours = RowSparse(library.put(rows), library.put(values), (500, 33))
    for _ in range(3):
        gpu.update([0], weights, [ours], states)
        cpu.update([0], call.weights, [RowSparse(rows, values, (500, 33))], call.states)
    tolerance = 1e-2 if dtype == "float16" else 1e-5
    table.assert_alike(row, library.get([weights, states]), table.outputs(call), tolerance)


@table.each
def test_rows_catch_up(library, row):
    """``sparse_update="exact"``: touched rows at each step, and all of them after a flush."""
    rng = np.random.default_rng(6)
    call = table.make(row, [(500, 33)])
    options = table.common(row) | {"sparse_update": "exact"}
    gpu, cpu = table.build(row, **options), table.build(row, **options)
    weights, theirs = library.put(call.weights), call.weights
    ours_state, state = gpu.create_state(0, weights[0]), cpu.create_state(0, theirs[0])
    for n in range(1100):  # more steps than the device keeps
        rows = rng.integers(0, 500 if n % 100 else 20, 7)
        values = rng.standard_normal((len(rows), 33)).astype("float32")
        dense = rng.standard_normal((500, 33)).astype("float32")
        if n % 250 == 60:
            gpu.update([0], weights, [library.put(dense)], [ours_state])
            cpu.update([0], theirs, [dense], [state])
        else:
            gpu.update(
                [0], weights, [RowSparse(library.put(rows), library.put(values), (500, 33))], [ours_state]
            )
            cpu.update([0], theirs, [RowSparse(rows, values, (500, 33))], [state])
        if n % 200 == 0:
            table.assert_near(library.get(weights[0])[rows], theirs[0][rows], 1e-5)
    gpu.flush([0], weights, [ours_state])
    cpu.flush([0], theirs, [state])
    found = library.get([*weights, *table.leaves(ours_state[0])])
    table.assert_alike(row, found, [*theirs, *table.leaves(state[0])], 1e-4)
    assert not library.get(ours_state[1]).any()


@pytest.mark.parametrize("count", [1, 1023, 1024, 1025, 2048, 100_000])
def test_keys_are_sorted(library, count):
    """Runs that blocks sort, and merges of these."""
    rng = np.random.default_rng(count)
    rows = rng.integers(0, 5000, count)
    values = rng.standard_normal((count, 3)).astype("float32")
    call = table.make(table.row("nag"), [(5000, 3)])
    weights, states = library.put(call.weights), library.put(call.states)
    ours = RowSparse(library.put(rows), library.put(values), (5000, 3))
    numba_opt.NAG().update([0], weights, [ours], states)
    numba_opt.NAG().update([0], call.weights, [RowSparse(rows, values, (5000, 3))], call.states)
    table.assert_bits(library.get([weights, states]), table.outputs(call))


@pytest.mark.parametrize("rising", [True, False])
def test_columns_in_any_order(rising):
    """Wide rows with many entries, some of which come twice."""
    cupy = pytest.importorskip("cupy")
    sparse = import_module("cupyx.scipy.sparse")
    import scipy.sparse

    rng = np.random.default_rng(3)
    columns = rng.integers(0, 3000, (60, 500)).astype("int32")
    columns = np.sort(columns, axis=1) if rising else columns
    data = rng.standard_normal(columns.size).astype("float32")
    parts = data, columns.ravel(), np.arange(0, columns.size + 1, 500, dtype="int32")
    call = table.make(table.row("nag"), [(60, 3000)])
    weights, states = map(LIBRARIES[1].put, (call.weights, call.states))
    ours = sparse.csr_matrix(tuple(map(cupy.asarray, parts)), shape=(60, 3000))
    numba_opt.NAG().update([0], weights, [ours], states)
    numba_opt.NAG().update([0], call.weights, [scipy.sparse.csr_array(parts, (60, 3000))], call.states)
    table.assert_bits(LIBRARIES[1].get([weights, states]), table.outputs(call))


@table.each
@pytest.mark.parametrize("mode", ["lazy", "dense"])
def test_csr(row, mode):
    cupy = pytest.importorskip("cupy")
    sparse = import_module("cupyx.scipy.sparse")
    import scipy.sparse

    matrix = scipy.sparse.random(400, 50, 0.05, "csr", "float32", rng=np.random.default_rng(2))
    call = table.make(row, [(400, 50)])
    gpu, cpu = table.build(row, sparse_update=mode), table.build(row, sparse_update=mode)
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


@table.each
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_accumulate(library, row, dtype):
    """Micro-batches add up on the GPU, in float32 for half precision with master weights."""
    call = table.make(row, SHAPES, dtype)
    gpu, cpu = (
        numba_opt.Trainer(weights, table.build(row, multi_precision=True), clip_global_norm=1.0)
        for weights in (library.put(call.weights), call.weights)
    )
    for step in range(3):
        for part in range(4):
            grads = table.make(row, SHAPES, dtype, seed=4 * step + part).grads
            last = part == 3 and step == 1
            for trainer, own in ((gpu, library.put(grads)), (cpu, grads)):
                trainer.step(own, batch_size=4) if last else trainer.accumulate(own)
        if step != 1:
            table.assert_bits(library.get(gpu._totals), cpu._totals)
            for trainer in (gpu, cpu):
                trainer.step(batch_size=4)
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


# ---------------------------------------------------------------- torch's optimizers

OPTIONS = {
    "nag": ("NAG", {"weight_decay": 0.02}),
    "rmsprop": ("RMSProp", {}),
    "rmsprop-momentum": ("RMSProp", {"momentum": 0.9, "maximize": True}),
    "rmsprop-centered": ("RMSProp", {"momentum": 0.5, "centered": True, "eps": 1e-3}),
    "adamax": ("Adamax", {"weight_decay": 0.02}),
    "ftml": ("FTML", {"weight_decay": 0.02}),
    "groupadagrad": ("GroupAdaGrad", {}),
}
each_front = pytest.mark.parametrize("name", OPTIONS)


class Twins(NamedTuple):
    """The same parameters on the GPU and on the CPU, with an optimizer each."""

    gpu: Any
    cpu: Any

    @classmethod
    def of(cls, params: Any, name: str, **options: Any) -> Twins:
        kind, own = OPTIONS[name]
        optimizer = getattr(import_module("numba_opt.torch"), kind)
        there = [import_module("torch").nn.Parameter(p.detach().cuda()) for p in params]
        return cls(optimizer(there, **own, **options), optimizer(params, **own, **options))

    def params(self) -> list[Any]:
        return [group["params"] for group in (self.gpu.param_groups[0], self.cpu.param_groups[0])]

    def step(self, grads: Any) -> None:
        for p, q, grad in zip(*self.params(), grads, strict=True):
            p.grad, q.grad = grad.cuda(), grad
        self.gpu.step()
        self.cpu.step()

    def assert_near(self, tolerance: float) -> None:
        gpu, cpu = self.params()
        here, there = cpu[:], gpu[:]
        for p, q in zip(gpu, cpu, strict=True):
            for name in self.cpu.state[q]:
                here.append(self.cpu.state[q][name])
                there.append(self.gpu.state[p][name])
                assert there[-1].device == (p.device if name != "step" else q.device)
        found, expected = ([x.detach().cpu().double().numpy() for x in tensors] for tensors in (there, here))
        table.assert_near(found, expected, tolerance)


def random(torch, shapes, dtype="float32", seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=rng).to(getattr(torch, dtype)) for shape in shapes]


@each_front
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_torch_front(torch, name, dtype):
    """What torch's backward pass gives are new tensors at each step."""
    shapes = [(5, 7), (8, 16), (1, 130), (300, 64), (0, 4), (1001, 33)]
    twins = Twins.of(list(map(torch.nn.Parameter, random(torch, shapes, dtype))), name, lr=0.02)
    for seed in range(4):
        twins.step(random(torch, shapes, dtype, seed))
    twins.assert_near(1e-2 if "16" in dtype else 1e-5)


@table.each
def test_torch_front_with_mxnets_formulas(torch, front, row):
    call = table.make(row, SHAPES)
    cls = getattr(front, row.cls.__name__)
    both_of = []
    for put in (torch.Tensor.cuda, torch.Tensor.clone):
        params = [torch.nn.Parameter(put(torch.from_numpy(weight))) for weight in call.weights]
        optimizer = cls(params, formula="mxnet", **table.common(row), **row.kwargs)
        for _ in range(3):
            for p, grad in zip(params, call.grads, strict=True):
                p.grad = put(torch.from_numpy(grad))
            optimizer.step()
        both_of.append([p.detach().cpu().numpy() for p in params])
    table.assert_near(*both_of, 1e-5)


@each_front
def test_torch_fronts_checkpoints(torch, name):
    """From the GPU to the CPU and back, they go on alike."""
    shapes = [(5, 7), (8, 16)]
    twins = Twins.of(list(map(torch.nn.Parameter, random(torch, shapes))), name, lr=0.02)
    twins.step(random(torch, shapes, seed=1))
    saved = copy.deepcopy(twins.gpu.state_dict()), copy.deepcopy(twins.cpu.state_dict())
    twins.cpu.load_state_dict(saved[0])
    twins.gpu.load_state_dict(saved[1])
    twins.step(random(torch, shapes, seed=2))
    twins.assert_near(1e-5)


@pytest.mark.parametrize("cls", [("RMSProp", "RMSprop"), ("Adamax", "Adamax")], ids="-".join)
def test_torch_front_trains_as_torch_does(torch, front, cls):
    torch.manual_seed(0)
    first = torch.nn.Sequential(torch.nn.Linear(20, 300), torch.nn.ReLU(), torch.nn.Linear(300, 2)).cuda()
    second = copy.deepcopy(first)
    ours = getattr(front, cls[0])(first.parameters(), lr=1e-3)
    theirs = getattr(torch.optim, cls[1])(second.parameters(), lr=1e-3)
    x = torch.randn(256, 20, device="cuda")
    y = (x[:, :3].sum(1) > 0).long()
    for model, optimizer in ((first, ours), (second, theirs)):

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        losses = [optimizer.step(closure).item() for _ in range(30)]
        assert losses[-1] < 0.7 * losses[0]
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_torch_front_goes_to_the_current_stream(torch, front):
    """Behind what the stream has been given, and nobody waits, also where the gradients are new."""
    weight = torch.nn.Parameter(torch.ones(1_000_000, device="cuda"))
    optimizer = front.NAG([weight], lr=1.0, momentum=1e-30)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        weight.grad = torch.zeros_like(weight)
        torch.cuda._sleep(100_000_000)  # some 50 ms
        weight.grad += 1
        optimizer.step()
        assert not stream.query()
        found = weight.detach() + 0
    stream.synchronize()
    assert found.unique().tolist() == [0]


def test_torch_front_without_waiting(torch):
    """torch says so where it waits for the device; a step that is bound makes it wait nowhere."""
    shapes = [(300, 64), (5, 7)]
    twins = Twins.of(list(map(torch.nn.Parameter, random(torch, shapes))), "adamax")
    twins.step(random(torch, shapes))
    grads = [torch.zeros_like(p) for p in twins.params()[0]]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for p, grad in zip(twins.params()[0], grads, strict=True):
            p.grad = grad
        twins.gpu.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("coalesced", [False, True])
@each_front
def test_torch_fronts_sparse_gradients(torch, name, coalesced):
    twins = Twins.of([torch.nn.Parameter(*random(torch, [(500, 33)]))], name, lr=0.02)
    for seed in range(3):
        rows = torch.randint(500, (1, 3000), generator=torch.Generator().manual_seed(seed))
        (values,) = random(torch, [(3000, 33)], seed=seed)
        grad = torch.sparse_coo_tensor(rows, values, (500, 33), check_invariants=True)
        twins.step([grad.coalesce() if coalesced else grad])
    twins.assert_near(1e-4)


def test_torch_front_with_layouts_of_its_own(torch, front):
    """Channels last; a transposed matrix, which fills its memory; and every other column, which does not."""
    plain = random(torch, [(4, 3, 5, 2), (6, 8), (6, 16)])
    results = []
    for device in ("cuda", "cpu"):
        first, second, third = (x.to(device) for x in plain)
        params = [first.to(memory_format=torch.channels_last), second.t(), third[:, ::2]]
        params = list(map(torch.nn.Parameter, params))
        optimizer = front.RMSProp(params, lr=0.1)
        for k in range(1, 4):
            for p in params:
                p.grad = torch.full(p.shape, float(k), device=device)
            optimizer.step()
        results.append([p.detach().cpu().contiguous().numpy() for p in params])
    table.assert_near(*results, 1e-6)


def test_torch_front_on_several_devices(torch, front):
    devices = ["cpu", *[f"cuda:{k}" for k in range(torch.cuda.device_count())]] * 2
    params = [torch.nn.Parameter(torch.ones(1000, device=device)) for device in devices]
    optimizer = front.Adamax(params, lr=0.5)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    for p in params:
        assert p.tolist() == pytest.approx([0.0] * 1000, abs=1e-5)
        assert optimizer.state[p]["exp_inf"].device == p.device


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_torch_front_is_not_captured(torch, front):
    weight = torch.nn.Parameter(torch.ones(100, device="cuda"))
    weight.grad = torch.ones_like(weight)
    optimizer = front.RMSProp([weight])
    optimizer.step()
    before = weight.detach().clone()
    with (
        pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()
    assert torch.equal(weight, before)
