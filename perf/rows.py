"""``python -m perf.rows``: sparse gradients of an embedding table, side by side.

The first table has the setting that the goals speak of, 31,250 of 312,500 rows of 64 float32, and everybody
who can update them; the others vary height, width, count and duplication, against a bare gather-scatter
kernel. All competitors of a table take turns; medians, and ratios within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numba
import numpy as np
import scipy.sparse
from numba import prange

import numba_opt

from .clock import settle
from .report import cpu, file_name

HEIGHT, WIDTH, COUNT = 312_500, 64, 31_250
ROUNDS, LEAST = 15, 2e-3  # of a table; seconds of a sample

Timed = Callable[[], float]  # makes a step, returns its seconds


@numba.njit(parallel=True)
def gather_scatter(weight, history, rows, values):
    """What must be moved: touched rows read and written, one number for each, the gradient read."""
    for k in prange(rows.size):
        r = rows[k]
        history[r] += values[k, 0]
        for j in range(values.shape[1]):
            weight[r, j] += values[k, j]


def timed(step: Callable[[], object]) -> Timed:
    """A step that is made often enough to be timed."""
    step()
    start = time.perf_counter()
    step()
    repeats = max(1, int(LEAST / (time.perf_counter() - start)))

    def run() -> float:
        settle()
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        return (time.perf_counter() - start) / repeats

    return run


def picked(rng: np.random.Generator, height: int, count: int) -> np.ndarray:
    """Rows, all different, in order."""
    return np.sort(rng.choice(height, count, replace=False))


def block(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    return rng.standard_normal((count, width), np.float32)


def ours(grads: list[Any], shape: tuple[int, int], optimizer: str = "groupadagrad", **options: Any) -> Timed:
    """A Trainer that takes some gradients in turn."""
    trainer = numba_opt.Trainer([np.zeros(shape, np.float32)], optimizer, **options)
    turn = iter(range(10**9))
    return timed(lambda: trainer.step([grads[next(turn) % len(grads)]]))


def as_csr(rows: np.ndarray, values: np.ndarray, shape: tuple[int, int]) -> Any:
    """Full rows as a CSR matrix."""
    counts = np.zeros(shape[0] + 1, np.int32)
    counts[rows + 1] = shape[1]
    columns = np.tile(np.arange(shape[1], dtype=np.int32), len(rows))
    return scipy.sparse.csr_array((values.ravel(), columns, np.cumsum(counts, dtype=np.int32)), shape=shape)


def bare(rows: np.ndarray, values: np.ndarray, shape: tuple[int, int]) -> Timed:
    weight, history = np.zeros(shape, np.float32), np.zeros(shape[0], np.float32)
    return timed(lambda: gather_scatter(weight, history, rows, values))


def torch_adagrad(rows: np.ndarray, values: np.ndarray, shape: tuple[int, int]) -> Timed:
    import torch

    weight = torch.nn.Parameter(torch.zeros(shape))
    weight.grad = torch.sparse_coo_tensor(
        torch.from_numpy(rows)[None], torch.from_numpy(values), shape, is_coalesced=True
    )
    return timed(torch.optim.Adagrad([weight], lr=0.01).step)


def fbgemm(rows: np.ndarray, values: np.ndarray, shape: tuple[int, int]) -> Timed:
    """Row-wise AdaGrad as part of the backward pass, which alone is timed."""
    import torch
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    table = SplitTableBatchedEmbeddingBagsCodegen(
        [(*shape, EmbeddingLocation.HOST, ComputeDevice.CPU)], optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD
    )
    indices, offsets = torch.from_numpy(rows), torch.arange(len(rows) + 1)
    grad = torch.from_numpy(values)

    def run() -> float:
        out = table(indices, offsets)
        settle()
        start = time.perf_counter()
        out.backward(grad)
        return time.perf_counter() - start

    run()
    return run


MXNET = """
import json, sys, time, numpy as np, mxnet as mx
height, width, count = map(int, sys.argv[1:])
rows = np.sort(np.random.default_rng(0).choice(height, count, replace=False))
values = np.random.default_rng(0).standard_normal((count, width)).astype('f4')
grad = mx.nd.sparse.row_sparse_array((values, rows), shape=(height, width))
weight = mx.nd.zeros((height, width))
optimizer = mx.optimizer.contrib.GroupAdaGrad()
state = optimizer.create_state(0, weight)
for line in sys.stdin:
    mx.nd.waitall()
    start = time.perf_counter()
    optimizer.update([0], [weight], [grad], [state])
    mx.nd.waitall()
    sys.stderr.write(json.dumps(time.perf_counter() - start) + chr(10))
    sys.stderr.flush()
"""


def mxnet(interpreter: str, shape: tuple[int, int], count: int) -> Timed:
    """MXNet's fused kernel, in an interpreter of its own, which times itself."""
    process = subprocess.Popen(
        [interpreter, "-W", "ignore", "-c", MXNET, *map(str, (*shape, count))],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )

    def run() -> float:
        assert process.stdin and process.stderr  # noqa: PT018
        settle()
        print(file=process.stdin, flush=True)
        while True:  # MXNet writes there, too
            line = process.stderr.readline()
            if not line:
                raise RuntimeError("MXNet has ended")
            try:
                return float(json.loads(line))
            except ValueError:
                continue

    run()
    return run


def take_turns(competitors: dict[str, Timed]) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in competitors}
    order = list(competitors)
    for _ in range(ROUNDS):
        random.Random(len(samples[order[0]])).shuffle(order)
        for name in order:
            samples[name].append(competitors[name]())
    return samples


def ratio(samples: dict[str, list[float]], name: str, other: str) -> float:
    """How many times as fast as another one, the median over rounds."""
    return median(b / a for a, b in zip(samples[name], samples[other], strict=True))


def everybody(interpreter: str | None, skipped: dict[str, str]) -> dict[str, list[float]]:
    """The setting of the goals."""
    rng, shape = np.random.default_rng(0), (HEIGHT, WIDTH)
    rows, values = picked(rng, HEIGHT, COUNT), block(rng, COUNT, WIDTH)
    grad = numba_opt.RowSparse(rows, values, shape)
    competitors = {
        "bare gather-scatter": bare(rows, values, shape),
        "RowSparse": ours([grad], shape),
        "CSR, full rows": ours([as_csr(rows, values, shape)], shape),
    }
    others: dict[str, Callable[[], Timed]] = {
        "torch sparse Adagrad": partial(torch_adagrad, rows, values, shape),
        "FBGEMM row-wise AdaGrad": partial(fbgemm, rows, values, shape),
    }
    if interpreter:
        others["MXNet GroupAdaGrad"] = partial(mxnet, interpreter, shape, COUNT)
    else:
        skipped["MXNet"] = "no interpreter given (--mxnet or NUMBA_OPT_MXNET)"
    for name, make in others.items():
        try:
            competitors[name] = make()
        except (ImportError, OSError, RuntimeError) as error:
            skipped[name] = str(error)
    return take_turns(competitors)


def tables() -> dict[str, dict[str, Timed]]:
    """The other tables, each with what it compares."""
    rng = np.random.default_rng(1)
    found: dict[str, dict[str, Timed]] = {}
    for height in (HEIGHT, 10 * HEIGHT):
        shape, rows, values = (height, WIDTH), picked(rng, height, COUNT), block(rng, COUNT, WIDTH)
        found[f"{COUNT:,} of {height:,} rows x {WIDTH}"] = {
            "bare gather-scatter": bare(rows, values, shape),
            "RowSparse": ours([numba_opt.RowSparse(rows, values, shape)], shape),
            "CSR, full rows": ours([as_csr(rows, values, shape)], shape),
        }
    for width in (1, 8, 256, 1024):
        count = min(1_000_000, 8_000_000 // width)
        shape = (2 * count, width)
        rows, values = picked(rng, 2 * count, count), block(rng, count, width)
        found[f"{count:,} of {2 * count:,} rows x {width}"] = {
            "bare gather-scatter": bare(rows, values, shape),
            "RowSparse": ours([numba_opt.RowSparse(rows, values, shape)], shape),
        }
    for count in (1, 100, 1_000_000):
        height = max(HEIGHT, 2 * count)
        shape, rows = (height, 8), picked(rng, height, count)
        values = block(rng, count, 8)
        found[f"{count:,} of {height:,} rows x 8"] = {
            "bare gather-scatter": bare(rows, values, shape),
            "RowSparse": ours([numba_opt.RowSparse(rows, values, shape)], shape),
        }
    shape = (50_000, WIDTH)
    often = np.minimum(rng.zipf(1.1, 400_000) - 1, 49_999)
    often = np.concatenate([np.arange(50_000), often[:150_000]])
    often = rng.permutation(often)
    found["200,000 occurrences of 50,000 rows x 64 (Zipf)"] = {
        "50,000 rows, once each": ours(
            [numba_opt.RowSparse(np.arange(50_000), block(rng, 50_000, WIDTH), shape)], shape
        ),
        "200,000, merged": ours([numba_opt.RowSparse(often, block(rng, 200_000, WIDTH), shape)], shape),
    }
    shape = (HEIGHT, WIDTH)
    for name in ("nag", "adamax", "ftml"):
        shares = np.array_split(rng.permutation(HEIGHT), 10)  # every row comes back after ten steps
        grads = [numba_opt.RowSparse(np.sort(r), block(rng, len(r), WIDTH), shape) for r in shares]
        found[f"{name}: a tenth of {HEIGHT:,} rows in turn"] = {
            "lazy": ours(grads, shape, name),
            "exact": ours(grads, shape, name, sparse_update="exact"),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m perf.rows", description=__doc__)
    parser.add_argument("--mxnet", metavar="PYTHON", default=os.environ.get("NUMBA_OPT_MXNET"))
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    args = parser.parse_args()
    numba.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    skipped: dict[str, str] = {}
    results = {f"{COUNT:,} of {HEIGHT:,} rows x {WIDTH}, everybody": everybody(args.mxnet, skipped)}
    for title, competitors in tables().items():
        print(title, "...", file=sys.stderr)
        results[title] = take_turns(competitors)
    lines = [f"Load before the run {load:.1f}; {args.threads} threads.", ""]
    lines += [f"Left out: {name} ({why})." for name, why in skipped.items()]
    for title, samples in results.items():
        first = next(iter(samples))
        lines += ["", f"## {title}", "", f"| | median, ms | speed, of {first} |", "|---|---:|---:|"]
        for name, seconds in samples.items():
            lines.append(f"| {name} | {median(seconds) * 1e3:.3f} | {ratio(samples, name, first):.3f} |")
    text = "\n".join(lines) + "\n"
    print(text)

    machine = file_name({"machine": cpu(), "cores": os.cpu_count()})
    path = Path(__file__).parent / "results" / f"rows-{machine}.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
