"""The ways of torch, of numba_opt's optimizers for torch, and of FBGEMM. torch is imported when asked."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import numpy as np

from .clock import Runner, runner, settle, timed
from .workloads import Workload, arrays, touched

LOOP, FOREACH, FUSED = WAYS = ({"foreach": False}, {"foreach": True}, {"fused": True})

# Class and options of what comes nearest, and the ways of running it that exist on the CPU. Adagrad keeps
# a number for each element where GroupAdaGrad keeps one for each row, so it moves more.
OPTIMIZERS: dict[str, tuple[str, dict[str, Any], tuple[dict[str, bool], ...]]] = {
    "nag": ("SGD", {"lr": 0.01, "momentum": 0.9, "nesterov": True}, WAYS),
    "rmsprop": ("RMSprop", {"lr": 0.001, "alpha": 0.9}, WAYS[:2]),
    "rmsprop-centered": (
        "RMSprop",
        {"lr": 0.001, "alpha": 0.9, "momentum": 0.9, "centered": True},
        WAYS[:2],
    ),
    "adamax": ("Adamax", {"lr": 0.002}, WAYS[:2]),
    "groupadagrad": ("Adagrad", {"lr": 0.01}, WAYS),
}

# The classes of numba_opt.torch take torch's options.
OURS = {
    "nag": ("NAG", {"lr": 0.01, "momentum": 0.9}),
    "rmsprop": ("RMSProp", {"lr": 0.001, "alpha": 0.9}),
    "rmsprop-centered": ("RMSProp", {"lr": 0.001, "alpha": 0.9, "momentum": 0.9, "centered": True}),
    "adamax": ("Adamax", {"lr": 0.002}),
    "ftml": ("FTML", {"lr": 0.0025}),
    "groupadagrad": ("GroupAdaGrad", {"lr": 0.01}),
}


def _tensor(array: np.ndarray) -> Any:
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _parameters(workload: Workload) -> list[Any]:
    import torch

    parameters = []
    for weight, grad in zip(*arrays(workload), strict=True):
        parameters.append(torch.nn.Parameter(_tensor(weight)))
        parameters[-1].grad = _tensor(grad)
    return parameters


def _optimizer(workload: Workload, way: dict[str, bool]) -> Any:
    import torch

    name, options, ways = OPTIMIZERS.get(workload.rule, ("", {}, ()))
    if way not in ways or workload.masters:
        return None
    return getattr(torch.optim, name)(_parameters(workload), **options, **way)


def step(workload: Workload, way: dict[str, bool]) -> Runner | None:
    optimizer = _optimizer(workload, way)
    return optimizer and runner(optimizer.step)


def clip(workload: Workload, way: dict[str, bool]) -> Runner | None:
    import torch

    optimizer = _optimizer(workload, way)
    if optimizer is None:
        return None
    parameters = optimizer.param_groups[0]["params"]

    def run() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=way != LOOP)
        optimizer.step()

    return runner(run)


def _sparse(workload: Workload) -> Any:
    """A parameter with a sparse gradient, coalesced where that is no work."""
    import torch

    ((numbers, values),), (shape,) = touched(workload), workload.shapes
    assert workload.rows is not None
    weight = torch.nn.Parameter(torch.zeros(shape))
    weight.grad = torch.sparse_coo_tensor(
        torch.from_numpy(numbers)[None],
        torch.from_numpy(values),
        shape,
        is_coalesced=not workload.rows.occurrences,
    )
    return weight


def rows(workload: Workload) -> Runner | None:
    import torch

    if workload.rule != "groupadagrad":
        return None
    return runner(torch.optim.Adagrad([_sparse(workload)], lr=0.01).step)


def ours(workload: Workload) -> Runner | None:
    """numba_opt.torch, with gradients of either kind."""
    import numba_opt.torch

    if workload.masters or (workload.rows and workload.rule != "groupadagrad"):
        return None
    name, options = OURS[workload.rule]
    parameters = [_sparse(workload)] if workload.rows else _parameters(workload)
    return runner(getattr(numba_opt.torch, name)(parameters, **options).step)


def fbgemm(workload: Workload) -> Runner | None:
    """Row-wise AdaGrad as part of the backward pass, which alone is timed."""
    import torch
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    (shape,) = workload.shapes
    if workload.rule != "groupadagrad" or shape[1] % 4:  # it takes rows of whole vectors
        return None
    ((numbers, values),) = touched(workload)
    table = SplitTableBatchedEmbeddingBagsCodegen(
        [(*shape, EmbeddingLocation.HOST, ComputeDevice.CPU)], optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD
    )
    indices, offsets = torch.from_numpy(numbers), torch.arange(len(numbers) + 1)
    grad = torch.from_numpy(values)

    def run(repeats: int, warm: bool) -> float:
        seconds = 0.0
        for _ in range(repeats):
            out = table(indices, offsets)
            settle()
            start = time.perf_counter()
            out.backward(grad)
            seconds += time.perf_counter() - start
        return seconds / repeats

    return run


FIRST_STEP = """
import torch
weight = torch.nn.Parameter(torch.ones(256))
weight.grad = torch.ones(256)
torch.optim.RMSprop([weight]).step()
"""


def start(workload: Workload) -> Runner | None:
    """A process that makes one RMSprop step."""
    if workload.what != "warm":
        return None
    return timed(lambda: subprocess.run([sys.executable, "-c", FIRST_STEP], check=True))
