"""`numba_opt.torch` on a GPU: the CPU's results, with tensors that only say where they are."""

from __future__ import annotations

import copy
import gc
import io
import weakref

import ml_dtypes  # noqa: F401  bfloat16 needs it
import pytest
import torch

import numba_opt.cuda
import numba_opt.torch as front
from numba_opt.torch import tensors as torch_tensors

from .. import cuda_torch, table

SHAPES = [(5, 7), (8, 16), (1, 130), (0, 4)]
DTYPES = {"float32": 0.0, "float64": 0.0, "float16": 1e-2, "bfloat16": 1e-2}
EVERY = [front.NAG, front.RMSProp, front.Adamax, front.FTML, front.GroupAdaGrad]
each_class = pytest.mark.parametrize("cls", EVERY, ids=lambda cls: cls.__name__)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)

TORCH = [
    (front.NAG, {"weight_decay": 0.02}),
    (front.RMSProp, {}),
    (front.RMSProp, {"momentum": 0.9, "maximize": True}),
    (front.RMSProp, {"centered": True, "eps": 1e-3}),
    (front.RMSProp, {"centered": True, "eps": 1e-3, "momentum": 0.5}),
    (front.Adamax, {"weight_decay": 0.02}),
    (front.FTML, {"weight_decay": 0.02}),
    (front.GroupAdaGrad, {}),
]


@pytest.fixture(autouse=True)
def _stand_in(driver, monkeypatch):
    cuda_torch.stand_in(monkeypatch, driver)
    cuda_torch.waited.clear()
    yield
    assert not driver.reads, "the host has waited for the device"


def parameters(shapes=SHAPES, dtype="float32", seed=0):
    """The same random parameters on the CPU and on the GPU."""
    rng = torch.Generator().manual_seed(seed)
    cpu = [
        torch.nn.Parameter(torch.randn(shape, generator=rng).to(getattr(torch, dtype))) for shape in shapes
    ]
    return [cuda_torch.on_gpu(p) for p in cpu], cpu


def give(seed, gpu, cpu):
    """The same random gradients to both, as new tensors."""
    rng = torch.Generator().manual_seed(seed)
    for p, q in zip(gpu, cpu, strict=True):
        q.grad = torch.randn(q.shape, generator=rng).to(q.dtype)
        p.grad = cuda_torch.on_gpu(q.grad, p.number)


def content(optimizer):
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    tensors += [x for state in optimizer.state.values() for name, x in sorted(state.items())]
    return [cuda_torch.on_cpu(x).double().numpy() for x in tensors]


def agree(gpu, cpu, tolerance=0.0):
    """Parameters and states are alike, and each state is where its parameter is."""
    if tolerance:
        table.assert_near(content(gpu), content(cpu), tolerance)
    else:
        table.assert_bits(content(gpu), content(cpu))
    for p, state in gpu.state.items():
        for name, x in state.items():
            assert x.device == (torch.device("cpu") if name == "step" else p.device)
            assert name == "step" or x.dtype == p.dtype


def loose(cls, dtype):
    """Where rows are summed in another order, results differ by rounding."""
    return max(DTYPES[dtype], 1e-6 if cls is front.GroupAdaGrad else 0.0)


# ---------------------------------------------------------------- results


@table.each
@each_dtype
def test_mxnet_formula(row, dtype):
    gpu, cpu = parameters(dtype=dtype)
    cls = getattr(front, row.cls.__name__)
    options = {"formula": "mxnet", **row.kwargs, **table.common(row)}
    one, two = cls(gpu, **options), cls(cpu, **options)
    for k in range(2):
        give(k, gpu, cpu)
        one.step()
        two.step()
    agree(one, two, loose(cls, dtype))


@pytest.mark.parametrize(
    ("cls", "options"), TORCH, ids=lambda x: " ".join(x) if isinstance(x, dict) else x.__name__
)
@each_dtype
def test_torch_formula(cls, options, dtype):
    gpu, cpu = parameters(dtype=dtype)
    one, two = cls(gpu, lr=0.02, **options), cls(cpu, lr=0.02, **options)
    for k in range(2):
        give(k, gpu, cpu)
        one.step()
        two.step()
    agree(one, two, loose(cls, dtype))


def test_half_gradients_of_single_weights():
    gpu, cpu = parameters([(4, 16)])
    one, two = front.NAG(gpu), front.NAG(cpu)
    give(0, gpu, cpu)
    cpu[0].grad.data = cpu[0].grad.half()
    gpu[0].grad.data = cuda_torch.on_gpu(cpu[0].grad)
    one.step()
    two.step()
    agree(one, two)


def test_groups_closures_and_schedulers():
    gpu, cpu = parameters([(4,), (3, 2), (5,), (6,)])
    pairs = []
    for params in (gpu, cpu):
        groups = [{"params": params[:1]}, {"params": params[1:3], "lr": 0.5, "weight_decay": 0.1}]
        optimizer = front.Adamax(groups)
        pairs.append((optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)))
    for k in range(4):

        def closure(k=k):
            give(k, gpu, cpu)
            if k == 1:
                gpu[1].grad = cpu[1].grad = None  # its count falls behind the others'
            return k

        for optimizer, scheduler in pairs:
            assert optimizer.step(closure) == k
            scheduler.step()
        if k == 2:
            for (optimizer, _), params in zip(pairs, (gpu, cpu), strict=True):
                optimizer.add_param_group({"params": params[3], "betas": (0.5, 0.9)})
    agree(pairs[0][0], pairs[1][0])
    assert pairs[0][0].state[gpu[1]]["step"] == 3


def test_duplicates_take_a_step_for_each_time(driver):
    gpu, cpu = parameters([(4,), (3,)])
    with pytest.warns(UserWarning, match="duplicate parameters"):
        one, two = front.Adamax([*gpu, gpu[0]]), front.Adamax([*cpu, cpu[0]])
    for k in range(2):
        give(k, gpu, cpu)
        one.step()
        two.step()
    driver.reads = 0  # the second time, a buffer had to grow
    agree(one, two)


@each_class
def test_checkpoints_go_between_devices(cls):
    """From the GPU to the CPU and back, through a file: states are where the parameters are."""
    gpu, cpu = parameters([(6, 4), (3, 5)])
    one, two = cls(gpu, lr=0.05), cls(cpu, lr=1.0)
    give(0, gpu, cpu)
    one.step()
    for p, q in zip(gpu, cpu, strict=True):
        q.data = cuda_torch.on_cpu(p)
    two.load_state_dict(copy.deepcopy(one.state_dict()))  # torch would share the counts
    agree(one, two)
    for x in (x for state in two.state.values() for x in state.values()):
        assert x.device.type == "cpu"
    give(1, gpu, cpu)
    one.step()
    two.step()
    file = io.BytesIO()
    torch.save(two.state_dict(), file)
    file.seek(0)
    three = cls([cuda_torch.on_gpu(q) for q in cpu], lr=1.0)
    three.load_state_dict(torch.load(file, weights_only=True))
    give(2, gpu, cpu)
    for p, q in zip(three.param_groups[0]["params"], gpu, strict=True):
        p.grad = cuda_torch.on_gpu(q.grad)
    for optimizer in (one, two, three):
        optimizer.step()
    agree(one, two, loose(cls, "float32"))
    agree(three, two, loose(cls, "float32"))


@each_class
def test_copies_go_on_alike(cls):
    gpu, cpu = parameters([(6, 4)])
    one = cls(gpu, lr=0.05)
    give(0, gpu, cpu)
    one.step()
    other = copy.deepcopy(one)
    (copied,) = other.param_groups[0]["params"]
    assert copied is not gpu[0]
    give(1, gpu, cpu)
    copied.grad = copy.deepcopy(gpu[0].grad)
    for optimizer in (one, other):
        optimizer.step()
    table.assert_bits(content(other), content(one))


def test_steps_counted_on_the_device_are_counted_on_the_host():
    """As torch's fused optimizers count them; the host reads that once."""
    gpu, cpu = parameters([(4,)])
    one, two = front.Adamax(gpu), front.Adamax(cpu)
    for k in range(3):
        give(k, gpu, cpu)
        if k == 1:
            one.state[gpu[0]]["step"] = cuda_torch.on_gpu(one.state[gpu[0]]["step"])
        one.step()
        two.step()
    assert cuda_torch.waited == ["__float__"]
    agree(one, two)


# ---------------------------------------------------------------- launches


def test_one_launch_for_each_dtype_and_device(driver):
    cpu = [torch.nn.Parameter(torch.ones(4, dtype=dtype)) for dtype in [torch.float32, torch.float64] * 8]
    gpu = [cuda_torch.on_gpu(p, k // 8) for k, p in enumerate(cpu)]
    one, two = front.RMSProp(gpu), front.RMSProp(cpu)
    give(0, gpu, cpu)
    launches = []
    for lr in (0.1, 0.1, 0.05):
        for optimizer in (one, two):
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
        launches.append(sorted(driver.launches))
        driver.launches.clear()
    assert launches == [
        ["copy"] * 4 + ["dense"] * 4 + ["set_coefficients"] * 2,
        ["dense"] * 4,
        ["dense"] * 4 + ["set_coefficients"] * 2,
    ]
    agree(one, two)


def test_parameters_on_the_cpu_and_on_two_gpus():
    cpu = [torch.nn.Parameter(torch.randn(3, 5)) for _ in range(6)]
    mixed = [cuda_torch.on_gpu(p, k // 2 - 1) if k > 1 else copy.deepcopy(p) for k, p in enumerate(cpu)]
    one, two = front.FTML(mixed), front.FTML(cpu)
    for k in range(3):
        rng = torch.Generator().manual_seed(k)
        for p, q in zip(mixed, cpu, strict=True):
            q.grad = torch.randn(q.shape, generator=rng)
            p.grad = cuda_torch.on_gpu(q.grad, p.number) if p.is_cuda else q.grad.clone()
        one.step()
        two.step()
    agree(one, two)
    assert {str(x["z"].device) for x in one.state.values()} == {"cpu", "cuda:0", "cuda:1"}


def test_new_gradients_at_each_step(driver):
    """They go into the tables that are there, and none is held."""
    gpu, cpu = parameters()
    one, two = front.NAG(gpu), front.NAG(cpu)
    bindings, kept = set(), []
    for k in range(4):
        give(k, gpu, cpu)
        kept.append([p.grad for p in gpu])  # so that the next ones lie elsewhere
        before = [cuda_torch.on_cpu(p.grad) for p in gpu]
        driver.launches.clear()
        one.step()
        two.step()
        bindings.add(*map(id, one._bindings.values()))
        assert all(torch.equal(cuda_torch.on_cpu(p.grad), x) for p, x in zip(gpu, before, strict=True))
    assert driver.launches == ["copy", "dense"]
    assert not cuda_torch.waited
    assert len(bindings) == 1
    agree(one, two)
    gone = weakref.ref(gpu[0].grad)
    kept.clear()
    one.zero_grad()
    gc.collect()
    assert gone() is None


def test_tensors_without_dlpacks_c_functions(driver, monkeypatch):
    """torch before 2.10: tensors are asked one by one."""
    monkeypatch.setattr(torch_tensors, "_functions", lambda: None)
    test_new_gradients_at_each_step(driver)
    test_parameters_on_the_cpu_and_on_two_gpus()
    test_arrays_that_are_elsewhere()


def test_parameters_that_move():
    """To a GPU and back, as modules move them, with their states left where they were, or taken along."""
    cpu = [torch.nn.Parameter(torch.ones(4))]
    optimizer = front.RMSProp(cpu)
    cpu[0].grad = torch.ones(4)
    optimizer.step()
    moved = cuda_torch.on_gpu(cpu[0])
    optimizer.param_groups[0]["params"][0] = moved
    state = optimizer.state[moved] = optimizer.state.pop(cpu[0])
    moved.grad = cuda_torch.on_gpu(torch.ones(4))
    before = cuda_torch.on_cpu(moved)
    with pytest.raises(ValueError, match="state 'square_avg' of parameter 0 is on cpu; expected cuda:0"):
        optimizer.step()
    assert torch.equal(cuda_torch.on_cpu(moved), before)
    state["square_avg"] = cuda_torch.on_gpu(state["square_avg"])
    optimizer.step()
    assert (cuda_torch.on_cpu(moved) < before).all()
    assert state["step"] == 2


def test_streams(driver):
    """To torch's current stream, or to one that is named, between what torch's has and what it will get."""
    stream, current = driver.stream(), cuda_torch.CURRENT
    gpu, cpu = parameters([(3,)])
    one = front.NAG(gpu)
    give(0, gpu, cpu)
    one.step()
    assert {*driver.streams_used} == {current}
    assert not driver.waits
    driver.streams_used.clear()
    with numba_opt.cuda.on(stream):
        one.step()
    assert {*driver.streams_used} == {stream}
    assert driver.waits[0] == (stream, current)
    assert driver.waits[-1] == (current, stream)
    driver.waits.clear()
    with numba_opt.cuda.on(stream):
        front.NAG(gpu).step()
    assert driver.waits[0] == (stream, current)  # where the states are made


def test_what_cannot_be_captured(driver):
    gpu, cpu = parameters([(3,)])
    give(0, gpu, cpu)
    with pytest.raises(ValueError, match=r"capturable must be False, got True: .* numba_opt.Trainer"):
        front.RMSProp(gpu, capturable=True)
    fresh, used = front.Adamax(gpu), front.Adamax(gpu)
    used.step()
    before = content(used)
    driver.launches.clear()
    refusal = r"cannot be captured in a CUDA graph; those of numba_opt.Train"
    for optimizer in (fresh, used):
        with driver.capture(cuda_torch.CURRENT), pytest.raises(RuntimeError, match=refusal):
            optimizer.step()
    assert not driver.launches
    assert not fresh.state[gpu[0]]
    table.assert_bits(content(used), before)


def test_what_is_warmed_up(driver):
    """Whatever the front launches is among what `warmup` compiles for the optimizer that it belongs to."""
    from numba_opt.cuda import kernels as loops
    from numba_opt.tools.wanted import cuda_kernels, variants

    classes = [*TORCH, (front.GroupAdaGrad, {"formula": "mxnet"}), (front.FTML, {"formula": "mxnet"})]
    ready = {
        getattr(loops, kernel)(*args).key
        for kernel, *args in cuda_kernels(variants([cls.own for cls, _ in classes]), ["f32"], sparse=True)
    }
    for cls, options in classes:
        gpu, cpu = parameters([(9, 6), (4, 3)])
        give(0, gpu, cpu)
        gpu[0].grad = sparse_on_gpu(coo([7, 2, 7]))
        optimizer = cls(gpu, **options)
        optimizer.step()
        gpu[0].grad = sparse_on_gpu(coo([7, 2], coalesced=True))
        optimizer.step()
        gpu[0].grad, gpu[1].grad = (sparse_on_gpu(coo([3, 2, 3], tuple(p.shape))) for p in gpu)
        optimizer.step()
    driver.finish()
    assert {program.key for program in driver.covered} <= ready


# ---------------------------------------------------------------- memory

LAYOUTS = {
    "transposed": ((6, 8), lambda p: p.t().contiguous().t()),
    "channels last": ((4, 3, 5, 2), lambda p: p.to(memory_format=torch.channels_last)),
    "every other column": ((6, 8), lambda p: torch.stack([p, p], 2).flatten(1)[:, ::2]),
    "in the middle": ((7,), lambda p: torch.cat([p, p, p])[7:14]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cls", [front.RMSProp, front.GroupAdaGrad], ids=lambda cls: cls.__name__)
def test_layouts(cls, layout):
    """As on the CPU, and memory between that is nobody's."""
    shape, make = LAYOUTS[layout]
    if cls is front.GroupAdaGrad and len(shape) != 2:
        pytest.skip("needs a matrix")
    plain = torch.randn(shape)
    wide = make(plain)
    gpu, cpu = [torch.nn.Parameter(make(cuda_torch.on_gpu(plain)))], [torch.nn.Parameter(make(plain))]
    assert gpu[0].stride() == cpu[0].stride() == wide.stride()
    one, two = cls(gpu, lr=0.1), cls(cpu, lr=0.1)
    for k in range(4):
        give(k, gpu, cpu)
        if k % 2:
            for ps in (gpu, cpu):
                ps[0].grad = torch.empty_like(ps[0]).copy_(ps[0].grad).detach()
        one.step()
        two.step()
    agree(one, two, loose(cls, "float32"))


def test_gradients_that_lie_oddly():
    for make in (
        lambda x: x[:1, :1].expand(5, 4),
        lambda x: x.reshape(4, 5).t(),
        lambda x: torch.cat([x, x], 1)[:, ::2],
        torch._neg_view,
    ):
        plain = torch.randn(5, 4)
        gpu, cpu = parameters([(5, 4)])
        one, two = front.NAG(gpu), front.NAG(cpu)
        for _ in range(2):
            gpu[0].grad, cpu[0].grad = make(cuda_torch.on_gpu(plain)), make(plain)
            one.step()
            two.step()
        agree(one, two)


def test_memory_that_is_shared(driver):
    base = cuda_torch.on_gpu(torch.randn(10))
    pair = [torch.nn.Parameter(base[:6]), torch.nn.Parameter(base[4:])]
    own_grad = torch.nn.Parameter(cuda_torch.on_gpu(torch.randn(3)))
    own_grad.grad = own_grad.detach()
    expanded = torch.nn.Parameter(cuda_torch.on_gpu(torch.randn(1, 4)).expand(3, 4))
    for params, message in (
        (pair, "weight of parameter 1 shares memory with weight of parameter 0"),
        ([own_grad], "weight of parameter 0 shares memory with gradient of parameter 0"),
        ([expanded], "weight of parameter 0 has elements that share memory"),
    ):
        for p in params:
            if p.grad is None:
                p.grad = cuda_torch.on_gpu(torch.ones(p.shape))
        before = [cuda_torch.on_cpu(p) for p in params]
        with pytest.raises(ValueError, match=message):
            front.RMSProp(params).step()
        assert all(torch.equal(cuda_torch.on_cpu(p), q) for p, q in zip(params, before, strict=True))
    assert not driver.launches


def test_what_begins_to_overlap_or_to_end_is_refused():
    gpu, cpu = parameters([(40, 3), (40, 3)])
    optimizer = front.RMSProp(gpu)
    give(0, gpu, cpu)
    optimizer.step()
    give(1, gpu, cpu)
    gpu[1].grad = optimizer.state[gpu[0]]["square_avg"]
    with pytest.raises(ValueError, match="gradient of parameter 1 shares memory with state 'square_avg'"):
        optimizer.step()
    give(2, gpu, cpu)
    optimizer.step()
    gpu[0].grad.untyped_storage().resize_(100)
    with pytest.raises(ValueError, match="gradient of parameter 0 needs 480 bytes of its storage"):
        optimizer.step()


# ---------------------------------------------------------------- sparse gradients


def coo(rows, shape=(9, 6), dtype="float32", coalesced=False, seed=1):
    rng = torch.Generator().manual_seed(seed)
    values = torch.randn((len(rows), *shape[1:]), generator=rng).to(getattr(torch, dtype))
    grad = torch.sparse_coo_tensor([rows], values, shape, check_invariants=True)
    return grad.coalesce() if coalesced else grad


def sparse_on_gpu(grad):
    return torch.Tensor._make_subclass(cuda_torch.CudaTensor, grad.clone())


@each_class
@pytest.mark.parametrize("coalesced", [False, True])
def test_sparse_gradients(cls, coalesced):
    """In one step with dense ones; rows differ from step to step."""
    gpu, cpu = parameters([(9, 6), (4, 3), (9, 6)])
    one, two = cls(gpu, lr=0.1), cls(cpu, lr=0.1)
    for k, rows in enumerate(([7, 2, 7, 0], [3], [], [8, 8, 8, 1, 0])):
        give(k, gpu, cpu)
        cpu[0].grad = coo(rows, coalesced=coalesced, seed=k)
        cpu[2].grad = coo([*rows, 5, 5, 5, 5], seed=k) if not coalesced else cpu[0].grad
        for p, q in zip(gpu[::2], cpu[::2], strict=True):
            p.grad = sparse_on_gpu(q.grad)
        one.step()
        two.step()
    cpu[0].grad = coo([7, 2] if coalesced else [7, 2, 7, 0], coalesced=coalesced)
    gpu[0].grad = sparse_on_gpu(cpu[0].grad)
    for params in (gpu, cpu):  # kernels go another way where there is one tensor
        params[1].grad = params[2].grad = None
    one.step()
    two.step()
    assert not cuda_torch.waited
    agree(one, two, loose(cls, "float32"))


@each_dtype
@pytest.mark.parametrize("shapes", [[(9, 6)], [(9, 6), (4, 3)]], ids=["alone", "two"])
def test_sparse_dtypes(dtype, shapes):
    gpu, cpu = parameters(shapes, dtype)
    one, two = front.RMSProp(gpu), front.RMSProp(cpu)
    for p, q in zip(gpu, cpu, strict=True):
        q.grad = coo([3, 2, 3, 0], tuple(q.shape), dtype=dtype)
        p.grad = sparse_on_gpu(q.grad)
    one.step()
    two.step()
    agree(one, two, DTYPES[dtype])


def test_other_sparse_forms(driver):
    gpu, _ = parameters([(9, 6)])
    optimizer = front.NAG(gpu)
    gpu[0].grad = sparse_on_gpu(torch.ones(9, 6).to_sparse(2))
    with pytest.raises(
        ValueError, match="gradient of parameter 0 has 2 sparse dimensions; expected 1, as it is on"
    ):
        optimizer.step()
    assert not driver.launches


# ---------------------------------------------------------------- errors


def test_arrays_that_are_elsewhere():
    gpu, cpu = parameters([(4, 3)])
    optimizer = front.RMSProp(gpu)
    grads = torch.ones(4, 3), cuda_torch.on_gpu(torch.ones(4, 3), 1)
    for grad, place in zip(grads, ("cpu", "cuda:1"), strict=True):
        gpu[0].grad = grad
        with pytest.raises(
            ValueError, match=f"gradient of parameter 0 is on {place}; expected cuda:0, as its parameter"
        ):
            optimizer.step()
    assert not optimizer.state[gpu[0]]
    gpu[0].grad = cuda_torch.on_gpu(torch.ones(4, 3))
    optimizer.step()
    optimizer.state[gpu[0]]["square_avg"] = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="state 'square_avg' of parameter 0 is on cpu; expected cuda:0"):
        optimizer.step()
    cpu[0].grad = cuda_torch.on_gpu(torch.ones(4, 3))
    with pytest.raises(ValueError, match="gradient of parameter 0 is on cuda:0; expected cpu, as its param"):
        front.NAG(cpu).step()


def test_dtypes_and_shapes():
    gpu, cpu = parameters([(4, 3)])
    optimizer = front.RMSProp(gpu)
    give(0, gpu, cpu)
    optimizer.step()
    before = content(optimizer)
    for data, error, message in (
        (torch.zeros(3, 4), ValueError, r"gradient of parameter 0 has shape \(3, 4\); expected \(4, 3\)"),
        (torch.zeros(4, 3).double(), TypeError, "is torch.float64; expected torch.float32"),
    ):
        give(1, gpu, cpu)
        gpu[0].grad.data = cuda_torch.on_gpu(data)
        with pytest.raises(error, match=message):
            optimizer.step()
        table.assert_bits(content(optimizer), before)
    with pytest.raises(TypeError, match=r"parameter 0 is torch.int64"):
        front.NAG([cuda_torch.on_gpu(torch.zeros(3, dtype=torch.int64))])
