"""The PyTorch front: torch.optim's trajectories, and everything that torch's users rely on."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import numba_opt

from . import table

torch = pytest.importorskip("torch")

import numba_opt.torch as front  # noqa: E402
from numba_opt.torch import tensors as torch_tensors  # noqa: E402
from numba_opt.torch.tensors import check_gradient  # noqa: E402

# Ours, torch's, and options that make them the same.
PAIRS = [
    pytest.param(front.RMSProp, torch.optim.RMSprop, {}, id="rmsprop"),
    pytest.param(front.Adamax, torch.optim.Adamax, {}, id="adamax"),
    pytest.param(front.NAG, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, id="nag"),
]
each_pair = pytest.mark.parametrize(("ours", "theirs", "options"), PAIRS)
EVERY = [front.NAG, front.RMSProp, front.Adamax, front.FTML, front.GroupAdaGrad]
each_class = pytest.mark.parametrize("cls", EVERY, ids=lambda cls: cls.__name__)
HALF = [torch.float16, torch.bfloat16]
SHAPES = [(5,), (7, 3), (), (2, 3, 4, 5), (0, 3), (33, 65)]


def parameters(shapes=SHAPES, dtype=torch.float32, seed=0, copies=2):
    """The same random parameters a few times."""
    rng = torch.Generator().manual_seed(seed)
    first = [torch.randn(shape, dtype=torch.float64, generator=rng).to(dtype) for shape in shapes]
    return [[torch.nn.Parameter(p.clone()) for p in first] for _ in range(copies)]


def give(seed, *lists):
    """The same random gradients to several lists of parameters."""
    rng = torch.Generator().manual_seed(seed)
    for same in zip(*lists, strict=True):
        grad = torch.randn(same[0].shape, dtype=torch.float64, generator=rng)
        for p in same:
            p.grad = grad.to(p.dtype)


def near(found, expected, **tolerance):
    torch.testing.assert_close(list(found), list(expected), **tolerance)


def same_states(ours, theirs, **tolerance):
    """States of two optimizers under the same names, of the same kinds, and near one another."""
    a, b = ours.state_dict()["state"], theirs.state_dict()["state"]
    assert a.keys() == b.keys()
    for k in a:
        assert a[k].keys() == b[k].keys()
        for name in a[k]:
            torch.testing.assert_close(a[k][name], b[k][name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)


def content(optimizer):
    """Parameters and states as bytes."""
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    tensors += [x for state in optimizer.state.values() for x in state.values()]
    return [(x.dtype, x.shape, x.stride(), x.detach().double().numpy().tobytes()) for x in tensors]


# ---------------------------------------------------------------- torch's formulas

number = st.floats(0, 0.2)


def check_trajectory(ours, theirs, options, torch_options=None, dtype=torch.float64, steps=6):
    a, b = parameters(dtype=dtype)
    groups = [[{"params": ps[:3]}, {"params": ps[3:], "lr": 0.07, "weight_decay": 0.02}] for ps in (a, b)]
    one, two = ours(groups[0], **options), theirs(groups[1], **options, **(torch_options or {}))
    tolerance = {"rtol": 1e-10, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 3e-6}
    for k in range(steps):
        give(k, a, b)
        if k == 2:
            for ps in (a, b):
                ps[1].grad = None  # its count falls behind the others'
        one.step()
        two.step()
    near(a, b, **tolerance)
    same_states(one, two, **tolerance)


@given(
    lr=number,
    alpha=st.floats(0, 0.999),
    eps=st.floats(1e-8, 1e-2),
    weight_decay=number,
    momentum=st.sampled_from([0, 0.5, 0.95]),
    centered=st.booleans(),
    maximize=st.booleans(),
)
def test_rmsprop_follows_torch(**options):
    if options["centered"]:  # where the variance is all rounding, so is what is divided by it
        options["alpha"] = max(options["alpha"], 0.5)
        options["eps"] = max(options["eps"], 1e-3)
    check_trajectory(front.RMSProp, torch.optim.RMSprop, options)


@given(
    lr=number,
    betas=st.tuples(st.floats(0, 0.99), st.floats(0, 0.9999)),
    eps=st.floats(1e-8, 1e-2),
    weight_decay=number,
    maximize=st.booleans(),
)
def test_adamax_follows_torch(**options):
    check_trajectory(front.Adamax, torch.optim.Adamax, options)


@given(lr=number, momentum=st.floats(0.01, 0.99), weight_decay=number, maximize=st.booleans())
def test_nag_follows_torch(**options):
    check_trajectory(front.NAG, torch.optim.SGD, options, {"nesterov": True})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"centered": True, "eps": 1e-4},
        {"momentum": 0.9, "centered": True, "eps": 1e-4, "maximize": True},
    ],
    ids=str,
)
def test_rmsprop_float32(options):
    check_trajectory(front.RMSProp, torch.optim.RMSprop, options, dtype=torch.float32)


def test_others_float32():
    check_trajectory(front.Adamax, torch.optim.Adamax, {}, dtype=torch.float32)
    check_trajectory(front.NAG, torch.optim.SGD, {"momentum": 0.9}, {"nesterov": True}, dtype=torch.float32)


@each_pair
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision(ours, theirs, options, dtype):
    """A step of half-precision weights and states is a float32 step, rounded once."""
    a, b = parameters(dtype=dtype)
    own = {k: v for k, v in options.items() if k != "nesterov"}
    one = ours(a, lr=0.1, **own)
    for k in range(2):
        give(k, a)
        one.step()
    for p, q in zip(a, b, strict=True):
        q.data = p.data.float()
    two = theirs(b, lr=0.1, **options)
    two.load_state_dict(copy.deepcopy(one.state_dict()))  # torch would share the counts
    give(7, a)
    for p, q in zip(a, b, strict=True):
        q.grad = p.grad.float()
    one.step()
    two.step()
    tolerance = {"rtol": torch.finfo(dtype).eps, "atol": torch.finfo(dtype).eps / 4}
    near(a, [q.detach().to(dtype).requires_grad_() for q in b], **tolerance)
    for state in one.state.values():
        assert {x.dtype for name, x in state.items() if name != "step"} == {dtype}


def test_a_negative_variance_counts_as_zero():
    """Rounding makes the variance of a constant gradient negative now and then, and torch's weight NaN."""
    (a,) = parameters([(1000,)], copies=1)
    optimizer = front.RMSProp(a, centered=True, eps=1.0, alpha=0.5)
    a[0].grad = torch.linspace(0.1, 3, 1000)
    for _ in range(60):
        optimizer.step()
    state = optimizer.state[a[0]]
    assert (state["square_avg"] - state["grad_avg"] ** 2).min() < 0
    assert a[0].isfinite().all()


def test_defaults_are_torchs():
    p = [torch.nn.Parameter(torch.zeros(2))]
    for ours, theirs in ((front.RMSProp, torch.optim.RMSprop), (front.Adamax, torch.optim.Adamax)):
        own = {k: v for k, v in ours(p).defaults.items() if k != "formula"}
        assert own.items() <= theirs(p).defaults.items()
    own = {k: v for k, v in front.NAG(p).defaults.items() if k not in ("formula", "momentum", "nesterov")}
    assert own.items() <= torch.optim.SGD(p).defaults.items()


# ---------------------------------------------------------------- this package's formulas


@table.each
def test_mxnet_formula(row):
    """``formula="mxnet"`` is the package's own optimizer to the bit, options and states under its names."""
    call = table.make(row, [(30, 20), (7, 5)])
    options = table.common(row) | row.kwargs
    optimizer = row.cls(**options)
    params = [torch.nn.Parameter(torch.from_numpy(weight.copy())) for weight in call.weights]
    ours = getattr(front, row.cls.__name__)(params, formula="mxnet", **options)
    states = [optimizer.create_state(t, weight) for t, weight in enumerate(call.weights)]
    for k in range(3):
        for p, grad in zip(params, call.grads, strict=True):
            p.grad = torch.from_numpy(grad * (k + 1))
        optimizer.update(call.indices, call.weights, [grad * (k + 1) for grad in call.grads], states)
        ours.step()
    table.assert_bits([p.detach().numpy() for p in params], call.weights)
    for p, state in zip(params, states, strict=True):
        found = [ours.state[p][name].numpy() for name in optimizer.state_names]
        table.assert_bits(found, table.leaves(state))


@pytest.mark.parametrize("cls", [front.FTML, front.GroupAdaGrad], ids=lambda cls: cls.__name__)
def test_torch_names_of_own_formulas(cls):
    a, b = parameters([(6, 4)])
    decay = cls is front.FTML
    one = cls(
        a, lr=0.1, eps=1e-5, maximize=True, **({"betas": (0.5, 0.9), "weight_decay": 0.1} if decay else {})
    )
    own = {"beta1": 0.5, "beta2": 0.9, "wd": 0.1} if decay else {}
    two = cls(b, formula="mxnet", learning_rate=0.1, epsilon=1e-5, rescale_grad=-1, **own)
    for k in range(3):
        give(k, a, b)
        one.step()
        two.step()
    near(a, b, rtol=0, atol=0)


# ---------------------------------------------------------------- as torch's optimizers


@each_pair
def test_takes_over_from_torch_and_back(ours, theirs, options, tmp_path):
    """Half of a training each, through files, is the whole training of either."""
    a, b = parameters()
    own = {k: v for k, v in options.items() if k != "nesterov"}
    one, two = theirs(a, lr=0.02, **options), theirs(b, lr=0.02, **options)
    for turn in (0, 1, 2):
        for k in range(3):
            give(3 * turn + k, a, b)
            one.step()
            two.step()
        torch.save(one.state_dict(), tmp_path / "state.pt")
        one = theirs(a, lr=5, **options) if turn == 1 else ours(a, lr=5, **own)
        one.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert one.param_groups[0]["lr"] == 0.02
    near(a, b, rtol=2e-5, atol=3e-6)
    same_states(one, two, rtol=2e-5, atol=3e-6)


@each_class
def test_resumes_to_the_bit(cls):
    """Copied, pickled or saved in mid-course, an optimizer goes on as if nothing had been."""
    a, b = parameters([(6, 4), (3, 5)])
    one = cls(a, lr=0.05)
    for k in range(2):
        give(k, a)
        one.step()
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    saved = cls(b, lr=1.0)
    saved.load_state_dict(torch.load(file, weights_only=True))
    for p, q in zip(a, b, strict=True):
        q.data = p.data.clone()
    others = [copy.deepcopy(one), pickle.loads(pickle.dumps(one)), saved]
    for optimizer in (one, *others):
        params = optimizer.param_groups[0]["params"]
        for k in range(2, 4):
            give(k, params)
            optimizer.step()
    for optimizer in others:
        assert content(optimizer) == content(one)


SCHEDULERS = {
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [1, 4]},
    "ExponentialLR": {"gamma": 0.8},
    "CosineAnnealingLR": {"T_max": 5},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "LinearLR": {"total_iters": 4},
    "PolynomialLR": {"total_iters": 6},
    "LambdaLR": {"lr_lambda": lambda t: 1 / (1 + t)},
    "ConstantLR": {"total_iters": 3},
    "MultiplicativeLR": {"lr_lambda": lambda t: 0.9},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 10},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 2},
}


@pytest.mark.parametrize("name", SCHEDULERS)
@each_pair
def test_schedulers(ours, theirs, options, name):
    a, b = parameters([(5, 3)])
    own = {k: v for k, v in options.items() if k != "nesterov"}
    if theirs is torch.optim.RMSprop:
        own = options = {"momentum": 0.5}  # which OneCycleLR and CyclicLR change, too
    one, two = ours(a, lr=0.05, **own), theirs(b, lr=0.05, **options)
    kwargs = SCHEDULERS[name]
    if name == "CyclicLR" and theirs is torch.optim.Adamax:
        kwargs = kwargs | {"cycle_momentum": False}
    schedulers = [getattr(torch.optim.lr_scheduler, name)(o, **kwargs) for o in (one, two)]
    plans = []
    for k in range(8):
        give(k, a, b)
        one.step()
        two.step()
        for scheduler in schedulers:
            scheduler.step()
        plans.append(list(one._bindings.values()))
    assert plans[1:] == [plans[1]] * 7  # nothing is bound anew because an option changes
    near(a, b, rtol=2e-5, atol=3e-6)


def test_reduce_on_plateau_and_a_learning_rate_in_a_tensor():
    a, b = parameters([(5, 3)])
    one, two = (cls(p, lr=torch.tensor(0.05)) for cls, p in ((front.Adamax, a), (torch.optim.Adamax, b)))
    schedulers = [torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=1) for o in (one, two)]
    for k in range(8):
        give(k, a, b)
        one.step()
        two.step()
        for scheduler in schedulers:
            scheduler.step(1.0)
    assert one.param_groups[0]["lr"] == two.param_groups[0]["lr"] != torch.tensor(0.05)
    near(a, b, rtol=2e-5, atol=3e-6)


def test_closure_hooks_and_zero_grad():
    (a,) = parameters([(4,)], copies=1)
    optimizer = front.RMSProp(a)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure():
        calls.append("closure")
        optimizer.zero_grad()
        loss = a[0].square().sum()
        loss.backward()
        return loss

    before = a[0].detach().clone()
    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == ["before", "closure", "after"]
    assert torch.equal(loss.detach(), before.square().sum())
    assert not torch.equal(a[0], before)
    optimizer.zero_grad()
    assert a[0].grad is None
    assert optimizer.step() is None  # nothing to do is no error


def test_the_step_is_known_to_the_profiler():
    (a,) = parameters([(4,)], copies=1)
    optimizer = front.RMSProp(a)
    give(0, a)
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert any("RMSProp.step" in event.key for event in profile.key_averages())


def test_grad_scaler():
    a, b = parameters([(4, 3)])
    one, two = front.RMSProp(a), torch.optim.RMSprop(b)
    scalers = [torch.amp.GradScaler("cpu", init_scale=8.0) for _ in range(2)]
    for k in range(4):
        give(k, a, b)
        for p in (a[0], b[0]):
            p.grad *= 8.0 if k != 2 else float("inf")  # a step that is skipped
        for scaler, optimizer in zip(scalers, (one, two), strict=True):
            loss = torch.zeros(())
            scaler.scale(loss)
            scaler.step(optimizer)
            scaler.update(8.0)
    assert one.state[a[0]]["step"] == 3
    near(a, b, rtol=2e-5, atol=3e-6)


def test_groups_come_and_parameters_rest():
    """Added groups, frozen parameters and those without a gradient, each with its own count."""
    a, b = parameters([(4,), (3, 2), (5,)])
    one, two = front.Adamax(a[:2], lr=0.1), torch.optim.Adamax(b[:2], lr=0.1)
    for k in range(6):
        give(k, a, b)
        for ps in (a, b):
            if k % 2:
                ps[0].grad = None
            ps[1].requires_grad_(k != 3)
            if k == 3:
                ps[1].grad = None
        if k == 2:
            one.add_param_group({"params": a[2], "lr": 0.01, "betas": (0.5, 0.9)})
            two.add_param_group({"params": b[2], "lr": 0.01, "betas": (0.5, 0.9)})
        one.step()
        two.step()
    near(a, b, rtol=2e-5, atol=3e-6)
    same_states(one, two, rtol=2e-5, atol=3e-6)


def test_groups_with_other_rules():
    a, b = parameters([(4,), (3, 2), (5,), (6,)])
    options = [{}, {"momentum": 0.9}, {"centered": True, "eps": 1e-3}, {"lr": 0.5}]
    one = front.RMSProp([{"params": p, **o} for p, o in zip(a, options, strict=True)])
    two = torch.optim.RMSprop([{"params": p, **o} for p, o in zip(b, options, strict=True)])
    for k in range(4):
        give(k, a, b)
        one.step()
        two.step()
    near(a, b, rtol=2e-5, atol=3e-6)
    same_states(one, two, rtol=2e-5, atol=3e-6)


def test_duplicates_take_a_step_for_each_time():
    a, b = parameters([(4,), (3,)])
    with pytest.warns(UserWarning, match="duplicate parameters"):
        one = front.Adamax([a[0], a[1], a[0]])
    with pytest.warns(UserWarning, match="duplicate parameters"):
        two = torch.optim.Adamax([b[0], b[1], b[0]])
    for k in range(3):
        give(k, a, b)
        one.step()
        two.step()
    assert one.state[a[0]]["step"] == 6
    near(a, b, rtol=2e-5, atol=3e-6)


def test_named_and_tied_parameters():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].weight = model[0].weight
    optimizer = front.RMSProp(model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.bias", "1.bias"]
    model(torch.ones(2, 4)).sum().backward()
    model[1].bias.grad.data = torch.ones(4, dtype=torch.float64)
    before = content(optimizer)
    with pytest.raises(TypeError, match=r"gradient of parameter '1.bias' is torch.float64; expected torch.f"):
        optimizer.step()
    assert content(optimizer) == before


@each_pair
def test_whatever_is_moved_or_replaced_is_found(ours, theirs, options):
    """Parameters, gradients and states may lie elsewhere at each step, and states may be other objects."""
    a, b = parameters([(40, 3), (7,)])
    own = {k: v for k, v in options.items() if k != "nesterov"}
    one, two = ours(a, **own), theirs(b, **options)
    for k in range(12):
        give(k, a, b)
        state = one.state[a[0]]
        name = next((name for name in state if name != "step"), None)
        if k == 2:
            a[0].data = a[0].data.clone()
        elif k == 3:
            state[name] = state[name].clone()
        elif k == 4:
            one.state[a[0]] = dict(state)
        elif k == 5:
            state[name].data = state[name].data.clone()
        elif k == 6 and "step" in state:
            state["step"] = state["step"].clone()
        elif k == 7 and "step" in state:
            state["step"].fill_(20)
            two.state[b[0]]["step"].fill_(20)
        elif k == 8 and "step" in state:
            state["step"] = 3  # as old checkpoints have it
            two.state[b[0]]["step"].fill_(3)
        elif k == 9:
            one.load_state_dict(copy.deepcopy(one.state_dict()))
        elif k == 10:
            for ps in (a, b):
                ps[0].data = ps[0].data.t().contiguous().t()
        elif k == 11:
            one.state.clear()
            two.state.clear()
        one.step()
        two.step()
        near(a, b, rtol=2e-5, atol=3e-6)


def test_dtype_changes_on_the_way():
    (a,) = parameters([(6, 5)], copies=1)
    optimizer = front.RMSProp(a)
    give(0, a)
    optimizer.step()
    a[0].grad, a[0].data = None, a[0].data.double()
    give(1, a)
    before = content(optimizer)
    with pytest.raises(
        TypeError, match=r"state 'square_avg' of parameter 0 is torch.float32; expected torch.float64"
    ):
        optimizer.step()
    assert content(optimizer) == before


def test_gradients_that_come_and_go_are_bound_once():
    a, b = parameters([(4,), (3, 2), (5,)])
    one, two = front.RMSProp(a), torch.optim.RMSprop(b)
    kept = []
    for k in range(12):
        give(k, a, b)
        for ps in (a, b):
            if k % 3:
                ps[k % 3].grad = None
        one.step()
        two.step()
        kept.append(set(map(id, one._bindings.values())))
    near(a, b, rtol=2e-5, atol=3e-6)
    assert len(kept[-1]) == 3
    assert kept[6:] == [kept[6]] * 6


def test_few_bindings_are_kept():
    a, b = parameters([(2,)] * 12)
    one, two = front.NAG(a), front.NAG(b)
    for k in range(24):
        give(k, a, b)
        a[k % 12].grad = b[k % 12].grad = None
        one.step()
        two._forget()
        two.step()
    assert len(one._bindings) <= 8
    near(a, b, rtol=0, atol=0)


def test_tensors_without_dlpacks_c_functions(monkeypatch):
    """torch before 2.10: tensors are asked one by one."""
    monkeypatch.setattr(torch_tensors, "_functions", lambda: None)
    test_whatever_is_moved_or_replaced_is_found(front.RMSProp, torch.optim.RMSprop, {})
    test_sparse_gradients(front.Adamax, "Embedding", False)
    test_storages_that_were_freed_or_shrunk()
    test_gradients_that_turn_negative_where_they_lie()
    test_gradients_are_let_go()


@pytest.mark.skipif(
    not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="this torch has no such functions"
)
def test_tensors_with_them():
    assert torch_tensors._functions() is not None


def test_parameters_that_are_swapped():
    """As `torch.utils.swap_tensors` and ``load_state_dict(assign=True)`` do, and gradients between them."""
    a, b = parameters([(4, 3), (4, 3)])
    one, two = front.RMSProp(a), torch.optim.RMSprop(b)
    others = [torch.nn.Parameter(torch.full((4, 3), 2.0)) for _ in range(2)]
    for k in range(4):
        give(k, a, b, others and [others[0], others[0]])
        for ps, other in zip((a, b), others, strict=True):
            if k == 1:
                ps[0].grad, ps[1].grad = ps[1].grad, ps[0].grad
            elif k == 2:
                other.grad = ps[0].grad.clone()
                torch.utils.swap_tensors(ps[0], other)
            elif k == 3:
                ps[0].requires_grad_(False)
        one.step()
        two.step()
    near(a, [q.requires_grad_(p.requires_grad) for p, q in zip(a, b, strict=True)], rtol=2e-5, atol=3e-6)


def test_gradients_are_let_go():
    """Between steps an optimizer keeps no gradient alive, and changes none."""
    (a,) = parameters([(40, 3)], copies=1)
    optimizer = front.RMSProp(a)
    for k in range(3):
        give(k, a)
        before = a[0].grad.clone()
        optimizer.step()
        assert torch.equal(a[0].grad, before)
        gone = weakref.ref(a[0].grad)
        optimizer.zero_grad()
        gc.collect()
        assert gone() is None


def test_autograd_notices_that_parameters_changed():
    (a,) = parameters([(4,)], copies=1)
    optimizer = front.NAG(a)
    loss = a[0].square().sum()
    give(0, a)
    for _ in range(2):  # bound first, then kept
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward(retain_graph=True)
        loss = a[0].square().sum()


def test_compiled_training_steps():
    """`torch.compile` leaves steps alone."""
    pytest.importorskip("torch._dynamo")
    models = [torch.nn.Linear(3, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [front.RMSProp(models[0].parameters()), torch.optim.RMSprop(models[1].parameters())]

    def train(model, optimizer):
        model(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compiled = torch.compile(train, backend="eager")
        except RuntimeError as error:
            pytest.skip(str(error))
        for _ in range(3):
            compiled(models[0], optimizers[0])
            train(models[1], optimizers[1])
    near(models[0].parameters(), models[1].parameters(), rtol=2e-5, atol=3e-6)


# ---------------------------------------------------------------- memory


def channels_last(p):
    return p.to(memory_format=torch.channels_last)


LAYOUTS = {
    "channels last": ((4, 3, 5, 2), channels_last),
    "transposed": ((6, 8), lambda p: p.t().contiguous().t()),
    "permuted": ((3, 4, 5), lambda p: p.permute(2, 0, 1).contiguous().permute(1, 2, 0)),
    "one channel": ((4, 1, 5, 1), channels_last),
    "every other column": ((6, 8), lambda p: torch.stack([p, p], 2).flatten(1)[:, ::2]),
    "every other element": ((7,), lambda p: torch.stack([p, p], 1).flatten()[::2]),
    "in the middle": ((7,), lambda p: torch.cat([p, p, p])[7:14]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@each_pair
def test_layouts(ours, theirs, options, layout):
    """Parameters, gradients and states that lie in all sorts of ways, and memory between that is nobody's."""
    shape, make = LAYOUTS[layout]
    ((p,),) = parameters([shape], copies=1)
    a = [torch.nn.Parameter(make(p.detach().clone()))]
    b = [torch.nn.Parameter(p.detach().clone())]
    own = {k: v for k, v in options.items() if k != "nesterov"}
    one, two = ours(a, **own), theirs(b, **options)
    size = a[0].untyped_storage().nbytes() // 4
    whole = torch.empty(0).set_(a[0].untyped_storage(), 0, (size,), (1,))
    inside = torch.zeros(size, dtype=torch.bool)
    inside.as_strided(a[0].shape, a[0].stride(), a[0].storage_offset()).fill_(True)
    before = whole.clone()
    for k in range(6):
        give(k, a, b)
        if k % 2:
            a[0].grad = torch.empty_like(a[0]).copy_(a[0].grad)
        one.step()
        two.step()
    near(a, b, rtol=2e-5, atol=3e-6)
    assert torch.equal(whole[~inside], before[~inside])
    for name, state in two.state[b[0]].items():
        torch.testing.assert_close(one.state[a[0]][name], state, rtol=2e-5, atol=3e-6)


def test_gradients_that_lie_oddly():
    for grad in (
        torch.ones(1, 1).expand(5, 4),
        torch.arange(20.0).reshape(4, 5).t(),
        torch.arange(40.0).reshape(5, 8)[:, ::2],
        torch.view_as_complex(torch.ones(5, 4, 2)).conj().imag,
        torch._neg_view(torch.ones(5, 4)),
    ):
        a, b = parameters([(5, 4)])
        one, two = front.NAG(a), front.NAG(b)
        for _ in range(2):
            a[0].grad, b[0].grad = grad, (grad * 1.0).contiguous()
            one.step()
            two.step()
        near(a, b, rtol=0, atol=0)


def test_misaligned_memory():
    memory = np.zeros(4 * 6 + 1, np.uint8)
    odd = torch.from_numpy(memory[1:].view(np.float32)) if memory.ctypes.data % 4 == 0 else None
    if odd is None:
        pytest.skip("memory is not aligned as expected")
    assert odd.data_ptr() % 4
    p, q = torch.nn.Parameter(odd), torch.nn.Parameter(torch.zeros(6))
    one, two = front.NAG([p]), front.NAG([q])
    for _ in range(3):
        p.grad, q.grad = torch.arange(6.0), torch.arange(6.0)
        one.step()
        two.step()
    near([p], [q], rtol=0, atol=0)


def test_shared_memory_is_refused():
    base = torch.randn(10)
    expanded = torch.nn.Parameter(torch.randn(1, 4).expand(3, 4))
    pair = [torch.nn.Parameter(base[:6]), torch.nn.Parameter(base[4:])]
    own_grad = torch.nn.Parameter(torch.randn(3))
    for params, message in (
        ([expanded], "weight of parameter 0 has elements that share memory"),
        (pair, "weight of parameter 1 shares memory with weight of parameter 0"),
        ([own_grad], "weight of parameter 0 shares memory with gradient of parameter 0"),
    ):
        optimizer = front.RMSProp(params)
        give(0, params)
        if params[0] is own_grad:
            own_grad.grad = own_grad.detach()
        before = [p.detach().clone() for p in params]
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        near([p.detach() for p in params], before, rtol=0, atol=0)


def test_storages_that_were_freed_or_shrunk():
    """As FSDP frees them between steps; the tensors are the same objects, with the same shapes."""
    for of in (
        lambda p, state: p,
        lambda p, state: p.grad,
        lambda p, state: state["square_avg"],
        lambda p, state: state["step"],
    ):
        a, _ = parameters([(40, 3), (7,)])
        optimizer = front.RMSProp(a)
        give(0, a)
        optimizer.step()
        storage = of(a[0], optimizer.state[a[0]]).untyped_storage()
        size = storage.nbytes()
        before = content(optimizer)
        kept = torch.tensor(list(storage), dtype=torch.uint8)
        for less in (0, size // 2):
            storage.resize_(less)
            with pytest.raises(ValueError, match=rf"of parameter 0 needs {size} bytes of its storage"):
                optimizer.step()
        storage.resize_(size)
        torch.empty(0, dtype=torch.uint8).set_(storage, 0, (size,), (1,)).copy_(kept)
        assert content(optimizer) == before
        optimizer.step()
        assert content(optimizer) != before


def test_gradients_that_turn_negative_where_they_lie():
    a, b = parameters([(5, 4)])
    one, two = front.NAG(a), front.NAG(b)
    give(0, a, b)
    for turned in (False, True, False):
        grad = b[0].grad.clone()
        a[0].grad = torch._neg_view(a[0].grad.clone()) if turned else a[0].grad.resolve_neg()
        b[0].grad = -grad if turned else grad
        one.step()
        a[0].grad = b[0].grad.clone()
        two.step()
    grad = a[0].grad
    a[0].grad, b[0].grad = torch._neg_view(grad), -grad  # at the very address of the last step's
    one.step()
    two.step()
    near(a, b, rtol=0, atol=0)


def test_what_begins_to_overlap_is_refused():
    """Also where everything had been in order before."""
    a, _ = parameters([(6,), (6,)])
    optimizer = front.RMSProp(a)
    for k in range(2):
        give(k, a)
        optimizer.step()
    give(2, a)
    a[1].grad = optimizer.state[a[0]]["square_avg"]
    before = content(optimizer)
    with pytest.raises(ValueError, match="gradient of parameter 1 shares memory with state 'square_avg'"):
        optimizer.step()
    assert content(optimizer) == before
    give(2, a)
    optimizer.step()


# ---------------------------------------------------------------- sparse gradients


def embeddings(kind, dtype):
    """A table with sparse gradients, and a function that looks some of its rows up."""
    if kind == "Embedding":
        module = torch.nn.Embedding(12, 4, sparse=True, dtype=dtype)
        return module, lambda rows: module(rows)
    module = torch.nn.EmbeddingBag(12, 4, sparse=True, mode="sum", dtype=dtype)
    return module, lambda rows: module(rows, torch.tensor([0, 2]))


@each_class
@pytest.mark.parametrize("coalesced", [False, True])
@pytest.mark.parametrize("kind", ["Embedding", "EmbeddingBag"])
def test_sparse_gradients(cls, kind, coalesced):
    """Touched rows take the step that they would take with all rows touched; others stay as they are."""
    module, look_up = embeddings(kind, torch.float32)
    dense = [torch.nn.Parameter(module.weight.detach().clone())]
    other, other_dense = (torch.nn.Parameter(torch.ones(3, 2)) for _ in range(2))
    one, two = cls([other, module.weight]), cls([other_dense, *dense])
    rows = torch.tensor([7, 1, 3, 3, 7])
    touched = sorted(set(rows.tolist()))
    untouched = [row for row in range(12) if row not in touched]
    first = module.weight.detach().clone()
    for k in range(3):
        one.zero_grad()
        (look_up(rows) * torch.arange(1.0 + k, 5.0 + k)).sum().backward()
        assert module.weight.grad.is_sparse
        if coalesced:
            module.weight.grad = module.weight.grad.coalesce()
        dense[0].grad = module.weight.grad.to_dense()
        give(k, [other], [other_dense])
        one.step()
        two.step()
    near([module.weight[touched]], [dense[0][touched]], rtol=1e-5, atol=1e-6)
    assert torch.equal(module.weight[untouched], first[untouched])
    assert torch.equal(other, other_dense)
    for name, state in one.state[module.weight].items():
        if name != "step":
            assert not state[untouched].any()
            near([state[touched]], [two.state[dense[0]][name][touched]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, *HALF], ids=str)
def test_sparse_dtypes(dtype):
    module, look_up = embeddings("Embedding", dtype)
    dense = [torch.nn.Parameter(module.weight.detach().clone())]
    one, two = front.RMSProp(module.parameters()), front.RMSProp(dense)
    for _ in range(2):
        one.zero_grad()
        look_up(torch.tensor([2, 5])).sum().backward()
        dense[0].grad = module.weight.grad.to_dense()
        one.step()
        two.step()
    near([module.weight[[2, 5]]], [dense[0][[2, 5]]], rtol=0, atol=0)


def test_other_sparse_forms():
    """Two sparse dimensions, one-dimensional and three-dimensional parameters, tables that lie oddly."""
    for shape, sparse_dim in (((6, 4), 2), ((6,), 1), ((6, 2, 3), 1), ((6, 2, 3), 2), ((6, 4), 0)):
        p, q = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
        one, two = front.RMSProp([p]), front.RMSProp([q])
        grad = torch.zeros(shape)
        grad[2], grad[4] = 1.0, torch.arange(1.0, 1 + grad[4].numel()).view(grad[4].shape)
        for _ in range(2):
            p.grad = grad.to_sparse(sparse_dim) if sparse_dim else grad.t().to_sparse(2).t()
            q.grad = grad
            one.step()
            two.step()
        near([p], [q], rtol=1e-6, atol=1e-7)
    table_ = torch.nn.Parameter(torch.ones(4, 6).t())
    one = front.GroupAdaGrad([table_], lr=0.5)
    table_.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 4), (6, 4), check_invariants=True)
    one.step()
    assert table_[1].tolist() == pytest.approx([0.5] * 4)
    assert (table_[[0, 2, 3, 4, 5]] == 1).all()


def test_dense_and_sparse_in_turn():
    (a,) = parameters([(6, 4)], copies=1)
    b = [torch.nn.Parameter(a[0].detach().clone())]
    one, two = front.NAG(a), front.NAG(b)
    for k in range(6):
        give(k, a, b)
        if k % 3 == 0:
            a[0].grad = a[0].grad.to_sparse(1)  # all rows
        one.step()
        two.step()
    near(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("row", [-1, 6, 2**40])
def test_rows_that_do_not_exist(row):
    p = torch.nn.Parameter(torch.ones(6, 4))
    optimizer = front.RMSProp([p])
    for _ in range(2):  # unbound, then kept
        p.grad = torch.sparse_coo_tensor([[1, row]], torch.ones(2, 4), (6, 4), check_invariants=False)
        before = content(optimizer)
        with pytest.raises(ValueError, match=rf"rows of gradient of parameter 0 hold {row} at position 1"):
            optimizer.step()
        assert content(optimizer)[:1] == before[:1]
        p.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 4), (6, 4), check_invariants=True)
        optimizer.step()


# ---------------------------------------------------------------- bad input


class Wrapper(torch.Tensor):
    """A tensor without memory of its own."""

    @staticmethod
    def __new__(cls, elem):
        return torch.Tensor._make_wrapper_subclass(cls, elem.shape, dtype=elem.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


def quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(3, 2), 0.1, 0, torch.qint8)


@each_class
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: torch.zeros(3, 2, dtype=torch.complex64), TypeError, "parameter 0 is torch.complex64"),
        (lambda: torch.zeros(3, 2, dtype=torch.int64), TypeError, "parameter 0 is torch.int64"),
        (lambda: torch.zeros(3, 2, device="meta"), ValueError, "parameter 0 is a meta tensor"),
        (quantized, TypeError, "parameter 0 is torch.qint8"),
        (lambda: torch.zeros(3, 2).to_sparse(), TypeError, "parameter 0 has layout torch.sparse_coo"),
        (lambda: Wrapper(torch.zeros(3, 2)), TypeError, "parameter 0 is a Wrapper"),
        (lambda: np.zeros((3, 2)), TypeError, "can only optimize Tensors"),
    ],
)
def test_bad_parameters(cls, make, error, message):
    with pytest.raises(error, match=message):
        cls([make()])
    optimizer = cls([torch.zeros(2, 2)])
    with pytest.raises(error, match=message.replace("parameter 0", "parameter 0 of group 1")):
        optimizer.add_param_group({"params": [make()]})
    assert len(optimizer.param_groups) == 1


def test_bad_options():
    p = [torch.nn.Parameter(torch.zeros(3, 2))]
    for cls, options, error, message in (
        (front.RMSProp, {"lr": -1}, ValueError, "lr must be a finite number >= 0, got -1"),
        (front.RMSProp, {"lr": float("nan")}, ValueError, "lr must be"),
        (front.RMSProp, {"lr": "fast"}, TypeError, "lr must be"),
        (front.RMSProp, {"lr": torch.ones(2)}, ValueError, "lr must hold one number"),
        (front.RMSProp, {"alpha": -0.1}, ValueError, "alpha must be"),
        (front.RMSProp, {"alpha": torch.tensor(0.9)}, TypeError, "alpha must be"),
        (front.RMSProp, {"eps": -1}, ValueError, "eps must be"),
        (front.RMSProp, {"momentum": -1}, ValueError, "momentum must be"),
        (front.RMSProp, {"weight_decay": -1}, ValueError, "weight_decay must be"),
        (
            front.RMSProp,
            {"rho": 0.9},
            TypeError,
            "formula='torch' has no parameter 'rho'; it takes lr, alpha",
        ),
        (
            front.RMSProp,
            {"alpha": 0.9, "formula": "mxnet"},
            TypeError,
            "has no parameter 'alpha'; it takes lr, rho",
        ),
        (front.RMSProp, {"rho": 1, "formula": "mxnet"}, ValueError, "rho must be"),
        (front.RMSProp, {"formula": "keras"}, ValueError, "formula must be one of"),
        (front.Adamax, {"betas": 0.9}, ValueError, "betas must be two numbers"),
        (front.Adamax, {"betas": (1, 0.9)}, ValueError, r"betas\[0\] must be"),
        (front.Adamax, {"betas": (0.9, -1)}, ValueError, r"betas\[1\] must be"),
        (front.NAG, {"momentum": 0}, ValueError, "Nesterov momentum needs a momentum > 0"),
        (front.NAG, {"dampening": 0.5}, ValueError, "no dampening"),
        (front.FTML, {"betas": (0.5, 1.0)}, ValueError, r"betas\[1\] must be"),
        (front.GroupAdaGrad, {"weight_decay": 0.1}, TypeError, "has no parameter 'weight_decay'"),
    ):
        with pytest.raises(error, match=message):
            cls(p, **options)
    with pytest.raises(ValueError, match="empty parameter list"):
        front.NAG([])
    with pytest.raises(ValueError, match=r"parameter 0 has shape \(3,\); expected 2 dimensions"):
        front.GroupAdaGrad([torch.zeros(3)])


@each_class
def test_how_torch_runs_its_own(cls):
    """Arguments of torch's optimizers that only say how they are run."""
    a, b = parameters([(3, 2)])
    give(0, a, b)
    cls(a, foreach=True, fused=None, capturable=False, differentiable=False).step()
    cls([{"params": b, "foreach": False}], fused=True).step()
    near(a, b, rtol=0, atol=0)
    for name in ("capturable", "differentiable"):
        with pytest.raises(ValueError, match=f"{name} must be False, got True"):
            cls(a, **{name: True})


def test_hooks_of_checkpoints():
    """What a hook makes of a state that is loaded is what counts."""
    a, b = parameters([(3, 2)])
    one, two = front.RMSProp(a), front.RMSProp(b, alpha=0.5)
    give(0, a)
    one.step()
    state = one.state_dict()
    state["param_groups"][0]["alpha"] = "0.9"
    with pytest.raises(TypeError, match="alpha must be"):
        two.load_state_dict(state)
    assert two.param_groups[0]["alpha"] == 0.5
    assert not two.state
    calls = []

    def repaired(optimizer, given):
        return given | {"param_groups": [group | {"alpha": 0.9} for group in given["param_groups"]]}

    two.register_load_state_dict_pre_hook(repaired)
    two.register_load_state_dict_post_hook(lambda optimizer: calls.append("loaded"))
    two.register_state_dict_post_hook(lambda optimizer, given: calls.append("saved"))
    two.load_state_dict(state)
    two.state_dict()
    assert calls == ["loaded", "saved"]
    assert two.param_groups[0]["alpha"] == 0.9
    assert torch.equal(two.state[b[0]]["square_avg"], one.state[a[0]]["square_avg"])


def test_bad_options_later():
    """What schedulers and users write into groups is checked before anything changes."""
    a, _ = parameters([(4,), (3,)])
    optimizer = front.RMSProp([{"params": a[:1]}, {"params": a[1:]}])
    give(0, a)
    optimizer.step()
    for name, value in (("lr", float("nan")), ("alpha", -1), ("differentiable", True), ("formula", "mxnet")):
        group = optimizer.param_groups[1]
        kept = dict(group)
        group[name] = value
        before = content(optimizer)
        with pytest.raises(ValueError, match=name):
            optimizer.step()
        assert content(optimizer) == before
        group.clear()
        group.update(kept)
    optimizer.step()


def test_bad_states():
    (a,) = parameters([(4, 3)], copies=1)
    optimizer = front.RMSProp(a)
    give(0, a)
    optimizer.step()
    good = dict(optimizer.state[a[0]])
    for change, error, message in (
        ({"square_avg": torch.zeros(4)}, ValueError, r"state 'square_avg' of parameter 0 has shape \(4,\)"),
        ({"square_avg": torch.zeros(4, 3).double()}, TypeError, "is torch.float64; expected torch.float32"),
        ({"square_avg": torch.zeros(4, 3, device="meta")}, ValueError, "is on meta; expected cpu, as its"),
        ({"square_avg": np.zeros((4, 3))}, TypeError, "is ndarray; expected a tensor"),
        ({"square_avg": torch.zeros(1, 3).expand(4, 3)}, ValueError, "has elements that share memory"),
        ({"square_avg": a[0].detach()}, ValueError, "shares memory with"),
        ({"square_avg": None}, ValueError, "state of parameter 0 holds step, square_avg; expected step"),
        (
            {"step": torch.tensor(-1.0)},
            ValueError,
            "state 'step' of parameter 0 must be a finite number >= 0",
        ),
    ):
        optimizer.state[a[0]].update(change)
        before = a[0].detach().clone()
        with pytest.raises(error, match=message):
            optimizer.step()
        assert torch.equal(a[0], before)
        optimizer.state[a[0]].update(good)
    optimizer.state[a[0]]["square_avg"].resize_(2, 3)  # the very same object, at the same address
    with pytest.raises(ValueError, match=r"has shape \(2, 3\); expected \(4, 3\)"):
        optimizer.step()


def test_bad_gradients():
    (a,) = parameters([(4, 3), (2,)], copies=1)
    optimizer = front.RMSProp(a)
    give(0, a)
    optimizer.step()
    for data, error, message in (
        (torch.zeros(3, 4), ValueError, r"gradient of parameter 0 has shape \(3, 4\); expected \(4, 3\)"),
        (torch.zeros(4, 3).double(), TypeError, "is torch.float64; expected torch.float32"),
        (torch.zeros(4, 3).half(), None, ""),  # kernels take half-precision gradients of float32 weights
    ):
        give(1, a)
        a[0].grad.data = data  # torch looks at gradients when they are assigned, not when they change
        before = content(optimizer)
        if error is None:
            optimizer.step()
            assert content(optimizer) != before
            continue
        with pytest.raises(error, match=message):
            optimizer.step()
        assert content(optimizer) == before


def test_gradients_that_torch_does_not_let_in():
    weight = torch.nn.Parameter(torch.zeros(4, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are in beta
        compressed = torch.ones(4, 3).to_sparse_csr()
    for grad, error, message in (
        (torch.zeros(4, 3, device="meta"), ValueError, "gradient is on meta; expected cpu, as its parameter"),
        (
            compressed,
            TypeError,
            "gradient has layout torch.sparse_csr; expected torch.strided or torch.sparse",
        ),
        (Wrapper(torch.zeros(4, 3)), TypeError, "gradient is a Wrapper"),
    ):
        with pytest.raises(error, match=message):
            check_gradient(grad, weight, "gradient")


def test_states_of_other_formulas_are_refused():
    a, b = parameters([(4,)])
    give(0, a)
    give(0, b)
    mxnet, sgd = front.RMSProp(a, formula="mxnet"), torch.optim.SGD(b, momentum=0.9)
    mxnet.step()
    sgd.step()
    with pytest.raises(ValueError, match="formula of a parameter group is 'mxnet'; expected 'torch'"):
        front.RMSProp(b).load_state_dict(mxnet.state_dict())
    with pytest.raises(ValueError, match="nesterov must be True"):
        front.NAG(a).load_state_dict(sgd.state_dict())
    optimizer = front.Adamax(b)
    optimizer.load_state_dict(torch.optim.Adamax(b).state_dict())
    optimizer.state[b[0]] = {"step": torch.tensor(1.0), "square_avg": torch.zeros(4)}
    with pytest.raises(ValueError, match="holds step, square_avg; expected step, exp_avg, exp_inf"):
        optimizer.step()


# ---------------------------------------------------------------- a real model


@pytest.mark.parametrize("workers", [0, 1])
def test_a_model_learns_as_with_torch(workers):
    """The same loss curve as with torch's RMSprop, beside torch's threads and a DataLoader's processes."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(256, 10, generator=rng)
    y = (x[:, :3].sum(1) > 0).long()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        curves = []
        for make in (lambda ps: front.RMSProp(ps, lr=1e-3), lambda ps: torch.optim.RMSprop(ps, lr=1e-3)):
            torch.manual_seed(0)
            model = torch.nn.Sequential(
                torch.nn.Linear(10, 600), torch.nn.ReLU(), torch.nn.Linear(600, 400), torch.nn.Linear(400, 2)
            )
            optimizer = make(model.parameters())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python 3.12 warns of forks beside threads
                loader = torch.utils.data.DataLoader(
                    torch.utils.data.TensorDataset(x, y), batch_size=64, num_workers=workers
                )
                losses = []
                for _ in range(3):
                    for inputs, targets in loader:
                        optimizer.zero_grad()
                        loss = torch.nn.functional.cross_entropy(model(inputs), targets)
                        loss.backward()
                        optimizer.step()
                        losses.append(loss.item())
            curves.append(losses)
    finally:
        torch.set_num_threads(threads)
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)
    assert curves[0][-1] < 0.5 * curves[0][0]


def test_nothing_else_imports_torch():
    assert not any(value is torch for value in vars(numba_opt).values())
