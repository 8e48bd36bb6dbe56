"""`Trainer` on a GPU: norms, guards, graphs, checkpoints, and errors that come in time."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

import numba_opt
from numba_opt.cuda import arrays as cuda_arrays
from numba_opt.cuda import call as cuda_call

from .. import table
from ..ptx import arrays

SHAPES = [(5, 7), (8, 16), 33]


def twins(row, call, **options):
    """A trainer on the GPU and one on the CPU, with gradients for each of them."""
    gpu = numba_opt.Trainer(arrays.on_gpu(call.weights), table.build(row, **table.common(row)), **options)
    cpu = numba_opt.Trainer(call.weights, table.build(row, **table.common(row)), **options)
    return gpu, cpu, arrays.on_gpu(call.grads), call.grads


def content(trainer):
    arrays = [*trainer.params.values(), *table.leaves(list(trainer.states.values()))]
    return [getattr(array, "array", array) for array in arrays]


def agree(gpu, cpu, tolerance=0.0):
    if tolerance:
        table.assert_near(content(gpu), content(cpu), tolerance)
    else:
        table.assert_bits(content(gpu), content(cpu))
    assert gpu.optimizer.num_update == cpu.optimizer.num_update


@table.each
@pytest.mark.parametrize("limit", [0.5, 1e9])
def test_global_norm(row, limit):
    gpu, cpu, ours, theirs = twins(row, table.make(row, SHAPES), clip_global_norm=limit)
    for _ in range(2):
        gpu.step(ours, batch_size=2)
        cpu.step(theirs, batch_size=2)
    assert gpu.grad_norm == pytest.approx(cpu.grad_norm, rel=1e-12)
    agree(gpu, cpu, 1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_steps_that_are_skipped(bad):
    row = table.row("adamax")
    gpu, cpu, ours, theirs = twins(row, table.make(row, SHAPES), skip_nonfinite=True)
    gpu.step(ours)
    cpu.step(theirs)
    before = [array.copy() for array in content(gpu)]
    good = ours[1].array[0, 3]
    ours[1].array[0, 3] = bad
    gpu.step(ours)
    table.assert_bits(content(gpu), before)
    assert gpu.skipped_steps == 1
    assert not np.isfinite(gpu.grad_norm)
    assert gpu.optimizer.num_update == 2  # unlike on the CPU: the host does not know
    assert gpu.optimizer.num_update - gpu.skipped_steps == cpu.optimizer.num_update
    ours[1].array[0, 3] = good
    gpu.step(ours)
    assert gpu.skipped_steps == 1
    cpu.optimizer._update_count([0, 1, 2])
    cpu.step(theirs)
    agree(gpu, cpu)  # all but the counts is as it was


def test_the_norm_does_not_depend_on_who_adds(monkeypatch):
    row = table.row("nag-plain")
    call = table.make(row, [4096 * 2 + 100, 50])
    norms = set()
    for blocks in (1, 2, 3):
        monkeypatch.setattr(cuda_arrays.kernels().driver.device(0), "processors", blocks)
        gpu, _, ours, _ = twins(row, call.copy(), clip_global_norm=1.0)
        gpu.step(ours)
        norms.add(gpu.grad_norm)
    assert len(norms) == 1


def test_multipliers_freezing_and_gradients_that_are_missing():
    row = table.row("rmsprop")
    gpu, cpu, ours, theirs = twins(row, table.make(row, SHAPES), lr_mult={"1": 0.5})
    for trainer, grads in ((gpu, ours), (cpu, theirs)):
        trainer.step([grads[0], None, grads[2]])
        trainer.step(grads)
        trainer.freeze("0")
        trainer.step(grads)
        trainer.set_learning_rate(0.3)
        trainer.step(grads, batch_size=4)
    agree(gpu, cpu)


def test_more_groups_than_before():
    """Buffers that grow are where everybody looks from then on, whoever adds up the norm included."""
    row = table.row("nag")
    call = table.make(row, [3, 40, 5, 7, 9])
    gpu, cpu, ours, theirs = twins(row, call, clip_global_norm=0.5)
    for multipliers in ({}, {str(k): 1.0 + k for k in range(5)}, {"1": 0.5}):
        for trainer, grads in ((gpu, ours), (cpu, theirs)):
            trainer.set_lr_mult(multipliers)
            trainer.step(grads)
            trainer.step(grads)
        agree(gpu, cpu, 1e-6)


def test_many_groups_of_many_tensors():
    """More sums of squares, and more hyper-parameters, than a block has threads."""
    row = table.row("nag-plain")
    call = table.make(row, [1 + k % 3 for k in range(1100)])
    rates = {str(k): 1.0 + k / 1100 for k in range(1100)}
    gpu, cpu, ours, theirs = twins(row, call, clip_global_norm=0.5, lr_mult=rates)
    gpu.step(ours)
    cpu.step(theirs)
    assert gpu.grad_norm == pytest.approx(cpu.grad_norm, rel=1e-12)
    agree(gpu, cpu, 1e-6)


@pytest.mark.parametrize("options", [{}, {"clip_global_norm": 0.5}])
def test_a_trainer_takes_chance_over_from_a_file(options):
    """It had none before."""
    call = table.make(table.row("adamax"), SHAPES)
    kept = {"state_dtype": "bfloat16", "beta1": 0.5}
    chance = numba_opt.Trainer([w.copy() for w in call.weights], "adamax", stochastic_rounding=True, **kept)
    chance.step(call.grads)
    gpu = numba_opt.Trainer(arrays.on_gpu(call.weights), "adamax", **kept, **options)
    cpu = numba_opt.Trainer(call.weights, "adamax", **kept, **options)
    grads = arrays.on_gpu(call.grads)
    for trainer, given in ((gpu, grads), (cpu, call.grads)):
        trainer.step(given)
        trainer.load_state_dict(chance.state_dict())
        trainer.step(given)
        trainer.step(given)
    assert gpu.optimizer.stochastic_rounding
    if options:
        table.assert_near(content(gpu)[:3], content(cpu)[:3], 1e-5)
    else:
        agree(gpu, cpu)


def test_new_gradients_at_each_step():
    row = table.row("nag")
    gpu, cpu, _, theirs = twins(row, table.make(row, [3, 40]))
    for scale in (1, 2, 3):
        fresh = [np.float32(scale) * grad for grad in theirs]
        gpu.step(arrays.on_gpu(fresh))
        cpu.step(fresh)
    agree(gpu, cpu)


class Pointing(arrays.DeviceArray):
    """An array that says where it is as CuPy's do, too."""

    @property
    def data(self):
        return SimpleNamespace(ptr=self.address)


@pytest.mark.parametrize("kind", [arrays.DeviceArray, Pointing])
def test_arrays_that_move(kind):
    """An array's object may be the same and its memory another: that of a gradient, or of a weight."""
    call = table.make(table.row("nag"), [3, 40])
    weights, grads = ([kind(a) for a in part] for part in (call.weights, call.grads))
    gpu, cpu = numba_opt.Trainer(weights, "nag"), numba_opt.Trainer(call.weights, "nag")
    for moved in ([], [grads[0]], [weights[1], grads[1]], [weights[0]]):
        for array in moved:
            array.move()
        for trainer, given in ((gpu, grads), (cpu, call.grads)):
            trainer.step(given)
            trainer.step(given)
        agree(gpu, cpu)


def test_a_step_holds_no_gradient():
    import weakref

    row = table.row("nag")
    gpu, _, ours, _ = twins(row, table.make(row, [3, 40]))
    gpu.step(ours)
    gone = weakref.ref(ours[0])
    del ours
    assert gone() is None


@pytest.mark.parametrize("options", [{}, {"clip_global_norm": 0.5, "skip_nonfinite": True}])
def test_a_captured_step(driver, options):
    """What goes into a graph is kernels and nothing else; replayed, they see new hyper-parameters."""
    row = table.row("ftml")
    gpu, cpu, ours, theirs = twins(row, table.make(row, [3, 40]), **options)
    gpu.step(ours)
    cpu.step(theirs)
    driver.launches.clear()
    with driver.capture(0) as graph:
        gpu.step(ours)
    assert not driver.launches
    agree(gpu, cpu, 1e-6)
    assert gpu.optimizer.num_update == 1
    assert graph.names[-1] == "dense"
    assert not {"set_coefficients", "copy"} & {*graph.names}
    for lr in (0.1, 0.1, 0.03):
        for trainer in (gpu, cpu):
            trainer.set_learning_rate(lr)
        gpu.advance(batch_size=2)
        graph.launch(0)
        cpu.step(theirs, batch_size=2)
        agree(gpu, cpu, 1e-6)


def test_what_cannot_be_captured(driver):
    row = table.row("nag")
    gpu, _, ours, _ = twins(row, table.make(row, [3]))
    with pytest.raises(ValueError, match="advance needs a step that has been captured"):
        gpu.advance()
    driver.launches.clear()
    with driver.capture(0), pytest.raises(RuntimeError, match="make one before the capture"):
        gpu.step(ours)
    assert not driver.launches
    assert gpu.optimizer.num_update == 0


@pytest.mark.parametrize("name", ["nag", "ftml", "groupadagrad"])
def test_checkpoints(name, tmp_path):
    row = table.row(name)
    call = table.make(row, [(5, 7), (4, 8)])
    gpu, cpu, ours, theirs = twins(row, call, skip_nonfinite=True)
    gpu.step(ours)
    gpu.save(tmp_path / "a.safetensors")
    cpu.load(tmp_path / "a.safetensors")
    agree(gpu, cpu)
    assert all(isinstance(array, np.ndarray) for array in content(cpu))
    cpu.step(theirs)
    gpu.load_state_dict(cpu.state_dict())
    agree(gpu, cpu)
    assert "on CUDA" in repr(gpu)


# ---------------------------------------------------------------- accumulation


@table.each
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_accumulate(row, dtype):
    """With the last gradients handed to the step, and without; the CPU's results, sums included."""
    gpu, cpu, _, _ = twins(row, table.make(row, SHAPES, dtype))
    for n in range(3):
        for part in range(3):
            theirs = table.make(row, SHAPES, dtype, seed=9 * n + part).grads
            ours = arrays.on_gpu(theirs)
            last = part == 2 and n % 2
            for trainer, grads in ((gpu, ours), (cpu, theirs)):
                trainer.step(grads, batch_size=3) if last else trainer.accumulate(grads)
            table.assert_bits(arrays.on_cpu(ours), theirs)
            if not last:
                table.assert_bits(arrays.on_cpu(gpu._totals), cpu._totals)
        if not n % 2:
            for trainer in (gpu, cpu):
                trainer.step(batch_size=3)
        assert gpu._totals is cpu._totals is None
        assert gpu.optimizer.num_update == cpu.optimizer.num_update == n + 1
        if row.cls.per_row:
            agree(gpu, cpu, 1e-6)
        else:
            agree(gpu, cpu)


@pytest.mark.filterwarnings("ignore:states in float16")
@pytest.mark.parametrize("masters", [False, True])
def test_half_precision_adds_up(masters):
    row = table.row("adamax")
    call = table.make(row, [(5, 7), 33], "float16")
    gpu, cpu = (
        numba_opt.Trainer(weights, table.build(row, multi_precision=masters), clip_global_norm=1e9)
        for weights in (arrays.on_gpu(call.weights), call.weights)
    )
    for n in range(2):
        for part in range(3):
            theirs = table.make(row, [(5, 7), 33], "float16", seed=3 * n + part).grads
            theirs[1] = theirs[1].astype("float32") if masters and part == 1 else theirs[1]
            gpu.accumulate(arrays.on_gpu(theirs))
            cpu.accumulate(theirs)
            assert {total.dtype for total in cpu._totals} == {np.dtype("f4" if masters else "f2")}
            table.assert_bits(arrays.on_cpu(gpu._totals), cpu._totals)
        gpu.step()
        cpu.step()
        assert gpu.grad_norm == pytest.approx(cpu.grad_norm, rel=1e-12)
        agree(gpu, cpu)


def test_what_accumulating_launches(driver):
    """Two kernels that differ in one addition; tables are written once, as the memory stays where it is."""
    row = table.row("nag")
    gpu, _, ours, _ = twins(row, table.make(row, SHAPES))
    seen = []
    for _ in range(3):
        driver.launches.clear()
        for _ in range(3):
            gpu.accumulate(ours)
        gpu.step()
        seen.append([*driver.launches])
    # the first gradients, the others, and the step
    assert seen[0] == [
        *["copy", "set_coefficients", "dense"] * 2,
        "dense",
        "copy",
        "set_coefficients",
        "dense",
    ]
    assert seen[1] == seen[2] == ["dense"] * 4


def test_gradients_that_are_missing_add_up():
    row = table.row("rmsprop")
    call = table.make(row, SHAPES)
    gpu, cpu, ours, theirs = twins(row, call, freeze="2")
    for pattern in ([1, 0, 1], [1, 1, 0], [0, 0, 0]):
        for trainer, grads in ((gpu, ours), (cpu, theirs)):
            trainer.accumulate([g if there else None for g, there in zip(grads, pattern, strict=True)])
    for trainer in (gpu, cpu):
        trainer.unfreeze()
        trainer.step()
    assert gpu.optimizer._index_update_count == cpu.optimizer._index_update_count == {0: 1, 1: 1}
    agree(gpu, cpu)


@pytest.mark.parametrize("first", [np.inf, -np.inf, 3e38, -0.0])
def test_sums_that_overflow(first):
    """An infinite sum stays one, and the memory of one does no harm to the next."""
    weight = np.zeros(2, "f4")
    gpu, cpu = numba_opt.Trainer([arrays.on_gpu(weight)], "nag"), numba_opt.Trainer([weight], "nag")
    for numbers in ([first, first, 1], [-0.0, 2, 3]):
        for number in numbers:
            grad = np.array([number, 1], "f4")
            gpu.accumulate([arrays.on_gpu(grad)])
            cpu.accumulate([grad])
            table.assert_bits(arrays.on_cpu(gpu._totals), cpu._totals)
        gpu.step()
        cpu.step()
    agree(gpu, cpu)


def test_accumulated_gradients_are_saved(tmp_path):
    row = table.row("ftml")
    gpu, cpu, ours, theirs = twins(row, table.make(row, SHAPES))
    other, _, _, _ = twins(row, table.make(row, SHAPES, seed=1))
    for _ in range(2):
        gpu.accumulate([ours[0], None, ours[2]])
        cpu.accumulate([theirs[0], None, theirs[2]])
    gpu.save(tmp_path / "a.safetensors")
    other.load(tmp_path / "a.safetensors")
    for trainer in (gpu, other):
        trainer.step(ours)
    cpu.step(theirs)
    agree(gpu, cpu)
    agree(other, cpu)


def test_a_refused_step_keeps_what_was_accumulated():
    rates = {1: -1.0}
    weight = arrays.on_gpu(np.zeros(3, "f4"))
    options = {"learning_rate": None, "lr_scheduler": lambda n: rates.get(n, 1.0)}
    trainer = numba_opt.Trainer([weight], "nag", momentum=0, **options)
    grad = arrays.on_gpu(np.ones(3, "f4"))
    trainer.accumulate([grad])
    for batch_size in (-1, 1):
        with pytest.raises(ValueError, match="finite number"):
            trainer.step([grad], batch_size=batch_size)
        assert trainer._totals[0].array.tolist() == [1, 1, 1]
    rates.clear()
    trainer.step([grad])
    assert weight.array.tolist() == [-2, -2, -2]


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "gradient of parameter '1' is a numpy.ndarray.*expected a CUDA array", lambda g: g.array),
        (ValueError, r"gradient of parameter '1' has shape \(2,\); expected \(8, 16\)",
         lambda g: arrays.on_gpu(np.ones(2, "f4"))),
        (TypeError, "gradient of parameter '1' is float64; expected float32",
         lambda g: arrays.on_gpu(g.array.astype("f8"))),
        (ValueError, "gradient of parameter '1' is on CUDA device 1; expected device 0",
         lambda g: elsewhere(g)),
        (ValueError, r"gradient of parameter '1' has shape \(8, 15\); expected \(8, 16\)",
         lambda g: numba_opt.RowSparse(arrays.on_gpu(np.zeros(1, "i8")),
                                       arrays.on_gpu(np.zeros((1, 15), "f4")), (8, 15))),
    ],
)  # fmt: skip
def test_gradients_that_cannot_be_added(driver, error, message, change):
    row = table.row("nag")
    gpu, _, ours, _ = twins(row, table.make(row, SHAPES))
    bad = [ours[0], change(ours[1]), ours[2]]
    for _ in range(2):  # without anything accumulated, and with
        before = [total.array.copy() for total in gpu._totals or ()]
        driver.launches.clear()
        for call in (gpu.accumulate, gpu.step):
            if call == gpu.accumulate or before:
                with pytest.raises(error, match=message):
                    call(bad)
        assert not driver.launches
        assert len(gpu._totals or ()) == len(before)
        table.assert_bits(arrays.on_cpu(gpu._totals or []), before)
        gpu.accumulate(ours)


# ---------------------------------------------------------------- errors


def refused(driver, row, call, error, message, change):
    """A step with something wrong in it raises, and launches and changes nothing."""
    weights, grads, states = (arrays.on_gpu(part) for part in call[1:])
    weights, grads, states = change(weights, grads, states)
    driver.launches.clear()
    optimizer = table.build(row)
    with pytest.raises(error, match=message):
        optimizer.fused_step(call.indices, weights, grads, states)
    assert not driver.launches
    assert optimizer.num_update == 0


def elsewhere(array, number=1):
    return arrays.DeviceArray(array.array, number)


def part_of(array):
    return arrays.DeviceArray.part(arrays.DeviceArray(np.zeros((5, 14), np.float32)), np.s_[:, ::2])


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "gradient of parameter 0 is a numpy.ndarray.*expected a CUDA array",
         lambda w, g, s: (w, [g[0].array, g[1]], s)),
        (TypeError, "state 'var' of parameter 1 is a numpy.ndarray.*expected a CUDA array",
         lambda w, g, s: (w, g, [s[0], (s[1][0], s[1][1].array)])),
        (ValueError, "gradient of parameter 1 is on CUDA device 1; expected device 0, as the weight",
         lambda w, g, s: (w, [g[0], elsewhere(g[1])], s)),
        (ValueError, r"gradient of parameter 0 has shape \(8, 16\); expected \(5, 7\)",
         lambda w, g, s: (w, [g[1], g[1]], s)),
        (TypeError, "gradient of parameter 0 is float64; expected float32",
         lambda w, g, s: (w, [arrays.on_gpu(g[0].array.astype("f8")), g[1]], s)),
        (TypeError, "gradient of parameter 0 is int32",
         lambda w, g, s: (w, [arrays.on_gpu(g[0].array.astype("i4")), g[1]], s)),
        (ValueError, "gradient of parameter 0 has strides .*; expected a contiguous CUDA array",
         lambda w, g, s: (w, [part_of(g[0]), g[1]], s)),
        (ValueError, "weight of parameter 0 is read-only",
         lambda w, g, s: ([arrays.DeviceArray(w[0].array, read_only=True), w[1]], g, s)),
        (ValueError, "weight of parameter 0 shares memory with gradient of parameter 0",
         lambda w, g, s: (w, [w[0], g[1]], s)),
        (ValueError, "state 'mean' of parameter 1 shares memory with state 'mean' of parameter 0|has shape",
         lambda w, g, s: (w, g, [s[0], (s[0][0], s[1][1])])),
        (TypeError, "weight of parameter 1 is a numpy.ndarray",
         lambda w, g, s: ([w[0], w[1].array], g, s)),
    ],
)  # fmt: skip
def test_bad_arrays(driver, error, message, change):
    row = table.row("adamax")
    refused(driver, row, table.make(row, [(5, 7), (8, 16)]), error, message, change)


def test_other_refusals():
    row = table.row("nag")
    call = table.make(row, [(4, 3)])
    weights, grads = arrays.on_gpu(call.weights), arrays.on_gpu(call.grads)
    with pytest.raises(TypeError, match="gradient of parameter 0 is on a GPU"):
        table.build(row).fused_step([0], call.weights, grads, call.states)
    with pytest.raises(ValueError, match="params are on the CPU and on GPUs"):
        numba_opt.Trainer([weights[0], call.weights[0]], "nag")


def test_two_devices():
    row = table.row("nag")
    call = table.make(row, [3, 40, 5])
    cpu = numba_opt.Trainer(call.weights, table.build(row))
    own = [arrays.DeviceArray(w, k % 2) for k, w in enumerate(call.weights)]
    gpu = numba_opt.Trainer(own, table.build(row))
    grads = [arrays.DeviceArray(g, k % 2) for k, g in enumerate(call.grads)]
    for _ in range(2):
        gpu.step(grads)
        cpu.step(call.grads)
    agree(gpu, cpu)


def test_streams(driver):
    import numba_opt.cuda

    row = table.row("nag")
    gpu, _, ours, _ = twins(row, table.make(row, [3]))
    stream = driver.stream()
    driver.launches.clear()
    driver.streams_used.clear()
    with numba_opt.cuda.on(stream):
        gpu.step(ours)
    gpu.step(ours)
    assert driver.launches == ["copy", "set_coefficients", "dense", "dense"]
    assert driver.streams_used == [stream] * 3 + [0]
    assert driver.waits == [(0, stream)]
    with (
        pytest.raises(TypeError, match="stream must be a CUDA stream or its address"),
        numba_opt.cuda.on("a"),
    ):
        pass


def test_fresh_tensors_of_torch(driver, monkeypatch):
    """New gradients like the last ones go into the table that is there, once their memory is checked."""
    import sys
    from types import ModuleType

    class Tensor(arrays.DeviceArray):
        """What is asked of a PyTorch tensor on a GPU."""

        layout, is_cuda, device = "torch.strided", True, type("device", (), {"index": 0})

        def __init__(self, array):
            super().__init__(array)
            self.dtype = f"torch.{array.dtype}"

        def data_ptr(self):
            return self.address

        def is_neg(self):
            return False

        def numel(self):
            return self.size

        def storage_offset(self):
            return 0

        def untyped_storage(self):
            return SimpleNamespace(nbytes=lambda: self.array.nbytes)

        def stride(self):
            return tuple(stride // self.array.itemsize for stride in self.array.strides)

        def element_size(self):
            return self.array.itemsize

    class Stream:
        cuda_stream = 0

    torch = ModuleType("torch")
    torch.Tensor, torch.strided = Tensor, Tensor.layout
    torch.cuda = type("cuda", (), {"current_stream": staticmethod(lambda number: Stream)})
    torch.zeros = lambda shape, dtype, device: Tensor(np.zeros(shape, str(dtype)[6:]))
    monkeypatch.setitem(sys.modules, "torch", torch)
    row = table.row("nag")
    call = table.make(row, [3, 40])
    looks = []
    look = cuda_call.look
    monkeypatch.setattr(cuda_call, "look", lambda *args: looks.append(1) or look(*args))
    gpu = numba_opt.Trainer([Tensor(w) for w in call.weights], table.build(row))
    cpu = numba_opt.Trainer(call.weights, table.build(row))
    kept = []  # so that each one is elsewhere
    for scale in (1, 2, 3):
        fresh = [np.float32(scale) * grad for grad in call.grads]
        kept.append([Tensor(grad) for grad in fresh])
        looks.clear()
        driver.launches.clear()
        gpu.step(kept[-1])
        cpu.step(fresh)
        assert bool(looks) == (scale == 1)
        assert driver.launches[-2:] == ["copy", "dense"] or scale == 1
    agree(gpu, cpu)
    with pytest.raises(ValueError, match="shares memory with gradient"):
        gpu.step([gpu.params["0"], kept[0][1]])
    agree(gpu, cpu)
    gpu.step(kept[1])
    cpu.step([np.float32(2) * grad for grad in call.grads])
    agree(gpu, cpu)
    driver.launches.clear()
    gpu.step([Tensor.part(tensor, np.s_[:]) for tensor in kept[1]])  # other tensors in the same memory
    cpu.step([np.float32(2) * grad for grad in call.grads])
    agree(gpu, cpu)
    assert driver.launches == ["dense"]
