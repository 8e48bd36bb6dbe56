"""Write the golden data of these tests with the real MXNet 2.0.0b1.

The script drives MXNet's own optimizers and schedulers through a table of small cases and
writes down what they did: `cases.json` says how to rebuild every case, `golden.npz` holds
the arrays, `states_*` are files of saved states as MXNet writes them. README.md beside this
script describes the layout. MXNet needs a virtual environment of its own:

    python3.11 -m venv mx
    mx/bin/pip install numpy==1.23.5 mxnet==2.0.0b1
    mx/bin/python tests/golden/make_golden.py

Nothing here depends on the clock or on a random seed of the process: on one machine, two
runs write the same bytes.
"""

import json
import tempfile
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace

import mxnet as mx
import numpy as np

HERE = Path(__file__).resolve().parent
STEPS = 6
SMALL = [(4, 5)]
SEVERAL = [(3, 4), (5,), (2, 3, 2), (1,)]

arrays = {}  # everything that goes into golden.npz


# ---------------------------------------------------------------- inputs


def random_state(name):
    """A generator that depends on nothing but the case's name."""
    return np.random.RandomState(zlib.crc32(name.encode()))


def make_weight(rng, shape):
    return (np.round(rng.standard_normal(shape) * 64) / 64).astype("float32")


def make_grads(rng, steps, shape):
    """Gradients with values large enough to be clipped, scattered zeros and zero rows.

    They are multiples of 1/64, which compress well and are exact in float16 too.
    """
    grads = rng.standard_normal((steps, *shape))
    grads *= np.where(rng.uniform(size=grads.shape) < 0.2, 8.0, 1.0)
    grads[rng.uniform(size=grads.shape) < 0.15] = 0.0
    if steps > 2 and grads.size:
        grads[2].flat[: max(1, grads[2].size // 4)] = 0.0
    if grads.size > steps:
        grads.reshape(steps, -1)[:, -1] = 0.0  # one element never sees a gradient
    return (np.round(np.clip(grads, -20, 20) * 64) / 64).astype("float32")


def build_scheduler(description):
    if description is None:
        return None
    return getattr(mx.lr_scheduler, description["name"])(**description["kwargs"])


def build_optimizer(case):
    kwargs = dict(case["kwargs"], use_fused_step=case["path"] == "fused")
    if case["scheduler"]:
        kwargs["lr_scheduler"] = build_scheduler(case["scheduler"])
    if case["idx2name"]:
        kwargs["param_idx2name"] = {int(i): n for i, n in case["idx2name"].items()}
    if case["param_dict"]:
        kwargs["param_dict"] = {
            int(i): SimpleNamespace(lr_mult=mults[0], wd_mult=mults[1])
            for i, mults in case["param_dict"].items()
        }
    optimizer = mx.optimizer.create(case["optimizer"], **kwargs)
    optimizer.set_lr_mult(integer_keys(case["lr_mult"]))
    optimizer.set_wd_mult(integer_keys(case["wd_mult"]))
    return optimizer


def integer_keys(mults):
    """JSON has only string keys: "3" stands for index 3, anything else is a name."""
    return {int(k) if k.isdigit() else k: v for k, v in mults.items()}


def leaves(state):
    """The arrays of a state in order, tuples flattened."""
    if state is None:
        return []
    if isinstance(state, (tuple, list)):
        return [leaf for part in state for leaf in leaves(part)]
    return [state]


def structure(state):
    """The shape of a state's nest: null, "array" or a list of those."""
    if state is None:
        return None
    if isinstance(state, (tuple, list)):
        return [structure(part) for part in state]
    return "array"


# ---------------------------------------------------------------- trajectories


def trajectory(
    name,
    optimizer,
    path,
    kwargs,
    *,
    shapes=SMALL,
    steps=STEPS,
    indices=None,
    dtype="float32",
    scheduler=None,
    lr_mult=None,
    wd_mult=None,
    idx2name=None,
    param_dict=None,
    calls=None,
    set_learning_rate=None,
    grads=None,
    quirk=None,
):
    """Run one case through one of MXNet's paths; return its description."""
    shapes = [tuple(shape) for shape in shapes]
    case = {
        "id": f"{name}/{path}",
        "inputs": name,
        "optimizer": optimizer,
        "path": path,
        "kwargs": kwargs,
        "scheduler": scheduler,
        "lr_mult": lr_mult or {},
        "wd_mult": wd_mult or {},
        "idx2name": idx2name or {},
        "param_dict": param_dict or {},
        "indices": indices or list(range(len(shapes))),
        "shapes": shapes,
        "dtype": dtype,
        "calls": calls or [list(range(len(shapes)))] * steps,
        "set_learning_rate": set_learning_rate or {},
        "quirk": quirk,
    }
    rng = random_state(name)
    start = [make_weight(rng, shape).astype(dtype) for shape in shapes]
    made = [make_grads(rng, steps, shape) for shape in shapes]
    grads = [g.astype(dtype) for g in (made if grads is None else grads)]
    for i in range(len(shapes)):
        arrays[f"{name}/weight{i}"] = start[i]
        arrays[f"{name}/grad{i}"] = grads[i]

    optim = build_optimizer(case)
    weights = [mx.nd.array(w, dtype=dtype) for w in start]
    states = [
        optim.create_state_multi_precision(index, w)
        for index, w in zip(case["indices"], weights, strict=True)
    ]
    case["state"] = structure(states[0])
    record = {f"{case['id']}/weight{i}": [] for i in range(len(shapes))}
    for i, state in enumerate(states):
        record.update({f"{case['id']}/state{i}.{j}": [] for j in range(len(leaves(state)))})
    case["learning_rate"], case["param_lr"] = [], []

    for step, call in enumerate(case["calls"]):
        if str(step) in case["set_learning_rate"]:
            optim.set_learning_rate(case["set_learning_rate"][str(step)])
        optim.update_multi_precision(
            [case["indices"][i] for i in call],
            [weights[i] for i in call],
            [mx.nd.array(grads[i][step], dtype=dtype) for i in call],  # fresh: MXNet's step changes it
            [states[i] for i in call],
        )
        for i, (weight, state) in enumerate(zip(weights, states, strict=True)):
            record[f"{case['id']}/weight{i}"].append(weight.asnumpy())
            for j, leaf in enumerate(leaves(state)):
                record[f"{case['id']}/state{i}.{j}"].append(leaf.asnumpy())
        case["learning_rate"].append(optim.learning_rate)
        case["param_lr"].append([optim._get_lr(index) for index in case["indices"]])
    case["param_wd"] = [optim._get_wd(index) for index in case["indices"]]
    case["num_update"] = optim.num_update
    arrays.update({key: np.stack(values) for key, values in record.items()})
    return case


PATHS = {
    "NAG": ("fused", "step"),
    "RMSProp": ("fused", "step"),
    "FTML": ("fused", "step"),
    "Adamax": ("step",),
    "GroupAdaGrad": ("step",),
}  # MXNet has no other


def both(name, optimizer, kwargs, **more):
    return [trajectory(name, optimizer, path, kwargs, **more) for path in PATHS[optimizer]]


GRADIENT = {
    "plain": {},
    "wd": {"wd": 0.05},
    "clip": {"clip_gradient": 0.5},
    "rescale": {"rescale_grad": 0.125},
    "all": {"wd": 0.05, "clip_gradient": 0.5, "rescale_grad": 0.125},
}
VARIANTS = {
    "nag": ("NAG", {"learning_rate": 0.1, "momentum": 0.9}),
    "nag-nomom": ("NAG", {"learning_rate": 0.1, "momentum": 0.0}),
    "rmsprop": ("RMSProp", {"learning_rate": 0.01, "rho": 0.9}),
    "rmsprop-centered": ("RMSProp", {"learning_rate": 0.01, "rho": 0.9, "momentum": 0.8, "centered": True}),
    "adamax": ("Adamax", {"learning_rate": 0.01}),
    "ftml": ("FTML", {"learning_rate": 0.01}),
    "groupadagrad": ("GroupAdaGrad", {"learning_rate": 0.1}),
}


def gradient_cases():
    """Every optimizer with its defaults, and with each way of preparing the gradient."""
    cases = []
    for label, (optimizer, kwargs) in VARIANTS.items():
        cases += both(
            f"{label}-defaults",
            optimizer,
            {k: v for k, v in kwargs.items() if k in ("centered",) or v == 0.0},
        )
        for kind, extra in GRADIENT.items():
            if optimizer == "GroupAdaGrad":  # has no weight decay
                extra = {k: v for k, v in extra.items() if k != "wd"}
                if kind == "wd":
                    continue
            cases += both(f"{label}-{kind}", optimizer, {**kwargs, **extra})
        if "epsilon" in mx.optimizer.create(optimizer).__dict__:
            cases += both(f"{label}-epsilon", optimizer, {**kwargs, "epsilon": 0.1})
        if optimizer == "RMSProp":
            cases += both(
                f"{label}-clipweights", optimizer, {**kwargs, "learning_rate": 0.1, "clip_weights": 0.5}
            )
    cases += both("adamax-betas", "Adamax", {"learning_rate": 0.02, "beta1": 0.7, "beta2": 0.8})
    cases += both("ftml-betas", "FTML", {"learning_rate": 0.02, "beta1": 0.3, "beta2": 0.8})
    return cases


def multiplier_cases():
    """Several parameters a call, multipliers by index, name and parameter, update counts."""
    names = {"0": "dense0_weight", "1": "dense0_bias", "2": "conv0_weight", "3": "scale"}
    by_index = {"lr_mult": {"0": 0.5, "2": 2.0}, "wd_mult": {"1": 0.0, "3": 3.0}}
    by_name = {
        "idx2name": names,
        "lr_mult": {"dense0_weight": 0.5, "conv0_weight": 2.0},
        "wd_mult": {"dense0_bias": 0.0, "scale": 3.0},
    }
    by_parameter = {"param_dict": {"0": [0.5, 1.0], "2": [2.0, 0.0], "3": [1.0, 3.0]}}
    # param_dict beats the index, the index beats the name
    mixed = {
        "idx2name": names,
        "param_dict": {"0": [0.5, 2.0]},
        "lr_mult": {"0": 7.0, "dense0_weight": 9.0, "1": 0.25, "dense0_bias": 9.0, "scale": 4.0},
        "wd_mult": {"0": 7.0, "dense0_weight": 9.0, "1": 0.5, "dense0_bias": 9.0, "scale": 4.0},
    }
    ways = {"several": {}, "byindex": by_index, "byname": by_name, "byparam": by_parameter, "mixed": mixed}
    cases = []
    for label in ("nag", "rmsprop-centered", "adamax", "ftml"):
        optimizer, kwargs = VARIANTS[label]
        for way, more in ways.items():
            cases += both(f"{label}-{way}", optimizer, {**kwargs, "wd": 0.05}, shapes=SEVERAL, **more)
        cases += both(f"{label}-begin", optimizer, {**kwargs, "begin_num_update": 5})
        cases += both(
            f"{label}-uneven",
            optimizer,
            {**kwargs, "wd": 0.05},
            shapes=[(3, 4), (5,)],
            indices=[7, 3],
            calls=[[0, 1], [0], [0, 1], [1, 0], [0], [1]],
        )
        cases += both(f"{label}-empty", optimizer, kwargs, shapes=[(0, 3), (2, 2), (0,)])
        cases += both(f"{label}-setlr", optimizer, kwargs, set_learning_rate={"2": 0.05, "4": 0.005})
    cases += both(
        "groupadagrad-several",
        "GroupAdaGrad",
        {"learning_rate": 0.1, "wd": 0.0},
        shapes=[(3, 4), (1, 5), (6, 1)],
        lr_mult={"0": 0.5, "2": 2.0},
    )
    cases += both("groupadagrad-setlr", "GroupAdaGrad", {"learning_rate": 0.1}, set_learning_rate={"2": 0.05})
    return cases


SCHEDULERS = {
    "factor": ("FactorScheduler", {"step": 2, "factor": 0.5, "base_lr": 0.2}),
    "multifactor": ("MultiFactorScheduler", {"step": [2, 5], "factor": 0.3, "base_lr": 0.2}),
    "poly": ("PolyScheduler", {"max_update": 7, "base_lr": 0.2, "final_lr": 0.01}),
    "cosine": ("CosineScheduler", {"max_update": 7, "base_lr": 0.2, "final_lr": 0.01}),
}


def schedule(label, **more):
    name, kwargs = SCHEDULERS[label]
    return {"name": name, "kwargs": {**kwargs, **more}}


def scheduler_cases():
    """Schedulers inside an optimizer; learning_rate=None leaves the scheduler its base_lr."""
    cases = []
    steps = {"steps": 9}
    for label in SCHEDULERS:
        none = {"learning_rate": None, "momentum": 0.9}
        linear = {"warmup_steps": 3, "warmup_begin_lr": 0.02}
        cases += both(f"nag-{label}", "NAG", none, scheduler=schedule(label), **steps)
        cases += both(f"nag-{label}-linear", "NAG", none, scheduler=schedule(label, **linear), **steps)
        cases += both(
            f"nag-{label}-constant",
            "NAG",
            none,
            scheduler=schedule(label, warmup_mode="constant", **linear),
            **steps,
        )
        quirk = None
        if label in ("poly", "cosine"):
            quirk = "learning_rate does not override base_lr: the scheduler keeps its own copy"
        cases += both(
            f"nag-{label}-override",
            "NAG",
            {"learning_rate": 0.5},
            scheduler=schedule(label),
            quirk=quirk,
            **steps,
        )
    cases += both(
        "nag-factor-default",
        "NAG",
        {},
        scheduler=schedule("factor"),
        **steps,
        quirk="learning_rate not given: NAG's default 0.1 overrides base_lr all the same",
    )
    cases += both(
        "nag-factor-override-linear",
        "NAG",
        {"learning_rate": 0.5},
        **steps,
        scheduler=schedule("factor", warmup_steps=3, warmup_begin_lr=0.02),
        quirk="the warm-up still climbs to the scheduler's own base_lr, not to learning_rate",
    )
    for label in ("adamax", "ftml", "rmsprop"):
        optimizer, _ = VARIANTS[label]
        cases += both(
            f"{label}-cosine-begin",
            optimizer,
            {"learning_rate": None, "begin_num_update": 2},
            scheduler=schedule("cosine"),
            lr_mult={"1": 0.5},
            shapes=[(3, 4), (5,)],
        )
    cases += both(
        "groupadagrad-multifactor",
        "GroupAdaGrad",
        {"learning_rate": None},
        scheduler=schedule("multifactor"),
        **steps,
    )
    return cases


def quirk_cases():
    """Where MXNet's own answers are odd; numba_opt may answer otherwise, on purpose."""
    cases = []
    for label in ("nag", "rmsprop", "rmsprop-centered", "ftml"):
        optimizer, kwargs = VARIANTS[label]
        cases += both(
            f"{label}-clipzero",
            optimizer,
            {**kwargs, "wd": 0.05, "clip_gradient": 0.0},
            quirk="fused takes clip_gradient=0 for None, step clips every gradient to 0",
        )
    cases += both("adamax-clipzero", "Adamax", {"learning_rate": 0.01, "wd": 0.05, "clip_gradient": 0.0})
    cases += both(
        "rmsprop-clipweightszero",
        "RMSProp",
        {"learning_rate": 0.01, "clip_weights": 0.0},
        quirk="both paths take clip_weights=0 for None",
    )
    cases += both(
        "nag-negativemomentum",
        "NAG",
        {"learning_rate": 0.1, "momentum": -0.5},
        quirk="fused takes a negative momentum for 0, step uses it",
    )
    for label in ("nag", "rmsprop", "rmsprop-centered", "adamax"):
        optimizer, kwargs = VARIANTS[label]
        cases += both(f"{label}-lrzero", optimizer, {**kwargs, "learning_rate": 0.0, "wd": 0.05})
    zero = "learning rate 0: fused makes NaN; step raises ZeroDivisionError, so there is no step case"
    cases.append(trajectory("ftml-lrzero", "FTML", "fused", {"learning_rate": 0.0}, quirk=zero))
    cases.append(
        trajectory(
            "ftml-lrmultzero",
            "FTML",
            "fused",
            {"learning_rate": 0.01},
            shapes=[(3, 4), (5,)],
            lr_mult={"1": 0.0},
            quirk=zero + " (here for the second parameter)",
        )
    )
    constant = np.tile(np.round(np.linspace(0.3, 19.7, 16), 2), (40, 1))
    cases += both(
        "rmsprop-centered-constant",
        "RMSProp",
        {"learning_rate": 0.001, "rho": 0.5, "momentum": 0.5, "centered": True},
        shapes=[(16,)],
        steps=40,
        grads=[constant],
        quirk="constant gradients: var - mean**2 is rounding error, at times negative: NaN",
    )
    return cases


def half_cases():
    """float16 weights with float32 master copies."""
    cases = []
    for label in ("nag", "nag-nomom", "rmsprop", "rmsprop-centered", "adamax", "ftml"):
        optimizer, kwargs = VARIANTS[label]
        for kind in ("plain", "all"):
            more = {**kwargs, **GRADIENT[kind], "multi_precision": True}
            cases += both(f"{label}-half-{kind}", optimizer, more, dtype="float16", shapes=[(4, 5), (7,)])
    return cases


# ---------------------------------------------------------------- sparse gradients


def sparse_case(name, kwargs, storage):
    """GroupAdaGrad's lazy kernel: only the rows that the gradient holds are touched."""
    shape = (8, 3)
    touched = [[1, 4, 6], [4], [0, 1, 7], [], [1, 2, 4, 6, 7], list(range(8))]
    rng = random_state(name)
    start = make_weight(rng, shape)
    identity = f"{name}/{storage}"
    case = {
        "id": identity,
        "inputs": name,
        "optimizer": "GroupAdaGrad",
        "path": "fused",
        "kwargs": kwargs,
        "weight_storage": storage,
        "shape": shape,
        "steps": len(touched),
    }
    arrays[f"{name}/weight"] = start

    optim = mx.optimizer.create("GroupAdaGrad", use_fused_step=True, **kwargs)
    weight = mx.nd.array(start).tostype(storage)
    history = optim.create_state(0, weight)
    weights, histories = [], []
    for step, rows in enumerate(touched):
        rows = np.array(rows, dtype="int64")
        values = make_grads(rng, 1, (len(rows), shape[1]))[0]
        arrays[f"{name}/rows{step}"], arrays[f"{name}/values{step}"] = rows, values
        if len(rows):
            grad = mx.nd.sparse.row_sparse_array((values, rows), shape=shape)
        else:
            grad = mx.nd.sparse.zeros("row_sparse", shape)
        optim.update([0], [weight], [grad], [history])
        weights.append(weight.asnumpy())
        histories.append(history.asnumpy())
    arrays[f"{identity}/weight"] = np.stack(weights)
    arrays[f"{identity}/history"] = np.stack(histories)
    case["num_update"] = optim.num_update
    return case


def sparse_cases():
    kinds = {
        "plain": {},
        "clip": {"clip_gradient": 0.5},
        "rescale": {"rescale_grad": 0.125},
        "all": {"clip_gradient": 0.5, "rescale_grad": 0.125, "epsilon": 0.1},
    }
    return [
        sparse_case(f"sparse-{kind}", {"learning_rate": 0.1, **extra}, storage)
        for kind, extra in kinds.items()
        for storage in ("default", "row_sparse")
    ]


# ---------------------------------------------------------------- learning rate curves


def curve(name, kwargs, num_updates=None, base_lr_override=None, quirk=None):
    """The rates that a fresh scheduler gives when asked for num_updates in order."""
    num_updates = list(range(41)) if num_updates is None else num_updates
    scheduler = build_scheduler({"name": name, "kwargs": kwargs})
    if base_lr_override is not None:
        scheduler.base_lr = base_lr_override
    return {
        "scheduler": name,
        "kwargs": kwargs,
        "base_lr_override": base_lr_override,
        "num_updates": num_updates,
        "lr": [scheduler(n) for n in num_updates],
        "quirk": quirk,
    }


def curves():
    linear = {"warmup_steps": 8, "warmup_begin_lr": 0.02}
    constant = {"warmup_steps": 8, "warmup_begin_lr": 0.02, "warmup_mode": "constant"}
    jumps = [0, 3, 3, 17, 40]
    factor, multi = "FactorScheduler", "MultiFactorScheduler"
    poly, cosine = "PolyScheduler", "CosineScheduler"
    out = [
        curve(factor, {"step": 5}),
        curve(factor, {"step": 5, "factor": 0.5}),
        curve(factor, {"step": 1, "factor": 0.9, "base_lr": 1.0}),
        curve(factor, {"step": 4, "factor": 0.1, "base_lr": 0.5, "stop_factor_lr": 1e-3}),
        curve(factor, {"step": 5, "factor": 0.5, "base_lr": 0.3, **linear}),
        curve(factor, {"step": 3, "factor": 0.5, "base_lr": 0.3, **constant}),
        curve(factor, {"step": 5, "factor": 0.5}, num_updates=jumps),
        curve(factor, {"step": 5, "factor": 0.5, "base_lr": 0.3}, base_lr_override=0.7),
        curve(multi, {"step": [5, 12, 30]}),
        curve(multi, {"step": [5, 12, 30], "factor": 0.1}),
        curve(multi, {"step": [10], "factor": 0.5, "base_lr": 2.0}),
        curve(multi, {"step": [5, 12, 30], "factor": 0.4, "base_lr": 0.3, **linear}),
        curve(multi, {"step": [5, 12, 30], "factor": 0.4, "base_lr": 0.3, **constant}),
        curve(multi, {"step": [5, 12, 30], "factor": 0.4}, num_updates=jumps),
        curve(multi, {"step": [5, 12, 30], "factor": 0.4, "base_lr": 0.3}, base_lr_override=0.7),
    ]
    for name in (poly, cosine):
        out += [
            curve(name, {"max_update": 30}),
            curve(name, {"max_update": 1, "base_lr": 0.5, "final_lr": 0.1}),
            curve(name, {"max_update": 60, "base_lr": 0.5, "final_lr": 0.1}),
            curve(name, {"max_update": 30, "base_lr": 0.3, "final_lr": 0.01, **linear}),
            curve(name, {"max_update": 30, "base_lr": 0.3, **constant}),
            curve(name, {"max_update": 30, "base_lr": 0.3}, num_updates=[5, 20, 10]),
            curve(
                name,
                {"max_update": 30, "base_lr": 0.3, "final_lr": 0.01},
                num_updates=[5, 50, 51],
                quirk="a jump past max_update returns the last rate asked for, not final_lr",
            ),
            curve(
                name,
                {"max_update": 30, "base_lr": 0.3},
                base_lr_override=0.7,
                quirk="an override of base_lr has no effect",
            ),
        ]
    out += [curve(poly, {"max_update": 30, "base_lr": 0.3, "pwr": pwr}) for pwr in (1, 0.5, 3)]
    return out


# ---------------------------------------------------------------- saved states


def tree(prefix, state):
    """Store a state's arrays; return its nest with the keys of golden.npz for leaves."""
    if state is None:
        return None
    if isinstance(state, (tuple, list)):
        return [tree(f"{prefix}.{i}", part) for i, part in enumerate(state)]
    arrays[prefix] = state.asnumpy()
    return prefix


def describe_states(stem, suffix, dump_optimizer, optimizer, kwargs, updater, scheduler=None):
    optim = updater.optimizer
    return {
        "file": stem + suffix,
        "dump_optimizer": dump_optimizer,
        "optimizer": optimizer,
        "kwargs": kwargs,
        "scheduler": scheduler,
        "num_update": optim.num_update,
        "index_update_count": {str(k): v for k, v in optim._index_update_count.items()},
        "learning_rate": optim.learning_rate,
        "states": {str(i): tree(f"{stem}/{i}", s) for i, s in updater.states.items()},
    }


SAVED = {
    "none": ("NAG", {"learning_rate": 0.1, "momentum": 0.0}, "float32"),
    "nag": ("NAG", {"learning_rate": 0.1, "wd": 0.01}, "float32"),
    "nag_old": ("NAG", {"learning_rate": 0.1, "wd": 0.01}, "float32"),
    "rmsprop": ("RMSProp", {"centered": True}, "float32"),
    "adamax": ("Adamax", {"learning_rate": 0.01}, "float32"),
    "ftml": ("FTML", {"learning_rate": 0.01}, "float32"),
    "nag_mp": ("NAG", {"learning_rate": 0.1, "multi_precision": True}, "float16"),
    "nag_none_mp": ("NAG", {"learning_rate": 0.1, "momentum": 0.0, "multi_precision": True}, "float16"),
    "adamax_mp": ("Adamax", {"learning_rate": 0.01, "multi_precision": True}, "float16"),
    "nag_half": ("NAG", {"learning_rate": 0.1}, "float16"),
    "groupadagrad": ("GroupAdaGrad", {"learning_rate": 0.1}, "float32"),
    "groupadagrad_rowsparse": ("GroupAdaGrad", {"learning_rate": 0.1}, "row_sparse"),
}


def saved_states():
    """Updater.get_states(), with and without the optimizer."""
    out = []
    for label, (optimizer, kwargs, kind) in SAVED.items():
        stem = f"states_{label}"
        rng = random_state(stem)
        scheduler = schedule("factor") if label == "ftml" else None
        more = {"lr_scheduler": build_scheduler(scheduler)} if scheduler else {}
        updater = mx.optimizer.get_updater(mx.optimizer.create(optimizer, **kwargs, **more))
        shapes = [(2, 3), (3, 2)] if optimizer == "GroupAdaGrad" else [(2, 3), (4,)]
        dtype = "float32" if kind == "row_sparse" else kind
        weights = [mx.nd.array(make_weight(rng, s), dtype=dtype) for s in shapes]
        if kind == "row_sparse":
            weights = [w.tostype("row_sparse") for w in weights]
        for _ in range(3):
            for index, (shape, weight) in enumerate(zip(shapes, weights, strict=True)):
                grad = mx.nd.array(make_grads(rng, 1, shape)[0], dtype=dtype)
                updater(index, grad.tostype("row_sparse") if kind == "row_sparse" else grad, weight)
        # MXNet writes arrays in an older format without NumPy's shape semantics, and only so sparse ones
        numpy_shapes = kind != "row_sparse" and label != "nag_old"
        for dump, suffix in ((False, ".pkl"), (True, "_optimizer.pkl")):
            with mx.util.np_array(numpy_shapes), mx.util.np_shape(numpy_shapes):
                (HERE / (stem + suffix)).write_bytes(updater.get_states(dump_optimizer=dump))
            out.append(describe_states(stem, suffix, dump, optimizer, kwargs, updater, scheduler))
    return out


def trainer_states():
    """What gluon's Trainer.save_states writes."""
    stem = "states_trainer"
    rng = random_state(stem)
    kwargs = {"learning_rate": 0.1, "momentum": 0.9, "wd": 0.01}
    params = {}
    for name, shape in {"weight": (2, 3), "bias": (2,)}.items():
        param = params[name] = mx.gluon.Parameter(name, shape=shape)
        param.initialize(init="zeros")
        param.set_data(mx.np.array(make_weight(rng, shape)))
    params["bias"].wd_mult = 0.0
    trainer = mx.gluon.Trainer(params, "nag", kwargs, kvstore=None)
    for _ in range(3):
        with mx.autograd.record():  # a loss whose gradients are what we want
            loss = sum(
                (param.data() * mx.np.array(make_grads(rng, 1, param.shape)[0])).sum()
                for param in params.values()
            )
        loss.backward()
        trainer.step(2)
    # save_states puts no clock, path or process id into the file
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder, "trainer.states")
        trainer.save_states(str(written))
        (HERE / f"{stem}.states").write_bytes(written.read_bytes())
    description = describe_states(stem, ".states", True, "NAG", kwargs, trainer._updaters[0])
    description["parameters"] = list(params)
    return description


# ---------------------------------------------------------------- all together


def rows_of_json(value, indent=0):
    """JSON with one case a line, so that a change shows as a short diff."""
    if isinstance(value, dict):
        lines = [f'"{key}": {rows_of_json(part)}' for key, part in value.items()]
        return "{\n" + ",\n".join(lines) + "\n}\n"
    if isinstance(value, list):
        return "[\n" + ",\n".join(json.dumps(part) for part in value) + "\n]"
    return json.dumps(value)


def main():
    warnings.simplefilter("ignore", UserWarning)
    cases = gradient_cases() + multiplier_cases() + scheduler_cases() + quirk_cases() + half_cases()
    everything = {
        "made_with": f"mxnet {mx.__version__}, numpy {np.__version__}",
        "cases": cases,
        "sparse": sparse_cases(),
        "curves": curves(),
        "states": [*saved_states(), trainer_states()],
    }
    ids = [case["id"] for case in everything["cases"] + everything["sparse"]]
    assert len(ids) == len(set(ids)), "two cases of one name"
    (HERE / "cases.json").write_text(rows_of_json(everything))
    np.savez_compressed(HERE / "golden.npz", **arrays)
    print(
        f"{len(ids)} cases, {len(everything['curves'])} curves, "
        f"{len(everything['states'])} files of states, {len(arrays)} arrays"
    )


if __name__ == "__main__":
    main()
