"""`numba_opt.torch` on a real GPU: the CPU's results, torch's own, and its streams."""

from __future__ import annotations

import copy
from importlib import import_module
from typing import Any, NamedTuple

import pytest

from .. import table
from .backends import Torch, on_gpu

pytestmark = pytest.mark.gpu

SHAPES = [(5, 7), (8, 16), 3, 0, (1, 130), (300, 64), 100_003]


@pytest.fixture(autouse=True)
def torch():
    """torch itself, where there is a GPU for it."""
    return on_gpu(Torch).module


@pytest.fixture
def front(torch):
    return import_module("numba_opt.torch")


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
