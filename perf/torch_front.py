"""``python -m perf.torch_front``: whole steps of `numba_opt.torch` and of torch.optim, side by side.

One tensor of 10 million float32, the parameter lists of ResNet-50 and GPT-2 small, 200 small tensors, and the
sparse rows of an embedding. Each optimizer meets torch's own as it runs by default and with each of the other
implementations that it offers. All competitors of a table take turns; medians, and ratios within a round.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import numba
import torch

import numba_opt.torch as front

from .report import cpu, file_name
from .rows import COUNT, HEIGHT, WIDTH, Timed, ratio, take_turns, timed
from .shapes import Shape, model

Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]

NESTEROV = {"momentum": 0.9, "nesterov": True}

# Ours, and torch's in each of the ways that it can run; the first of those is its default.
OPTIMIZERS: dict[str, tuple[Make, dict[str, Make]]] = {
    "RMSProp": (
        front.RMSProp,
        {
            "torch RMSprop": torch.optim.RMSprop,
            "torch RMSprop, foreach": partial(torch.optim.RMSprop, foreach=True),
        },
    ),
    "Adamax": (
        front.Adamax,
        {
            "torch Adamax": torch.optim.Adamax,
            "torch Adamax, foreach": partial(torch.optim.Adamax, foreach=True),
        },
    ),
    "NAG": (
        front.NAG,
        {
            "torch SGD": partial(torch.optim.SGD, **NESTEROV),
            "torch SGD, fused": partial(torch.optim.SGD, fused=True, **NESTEROV),
        },
    ),
}

# What is expected: how many times as fast as whom, at least.
GOALS = [
    ("10,000,000 in one tensor: RMSProp", "torch RMSprop", 5.0),
    ("10,000,000 in one tensor: Adamax", "torch Adamax", 4.0),
    ("10,000,000 in one tensor: NAG", "torch SGD, fused", 1.0),
    ("ResNet-50: RMSProp", "torch RMSprop", 4.0),
    ("ResNet-50: Adamax", "torch Adamax", 4.0),
    ("GPT-2 small: RMSProp", "torch RMSprop", 4.0),
    ("GPT-2 small: Adamax", "torch Adamax", 4.0),
    (f"{COUNT:,} of {HEIGHT:,} sparse rows x {WIDTH}", "torch Adagrad, sparse", 10.0),
]


def step_of(make: Make, values: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> Timed:
    """Steps of an optimizer with parameters of its own; gradients are only read, and shared."""
    params = [torch.nn.Parameter(value.clone()) for value in values]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return timed(make(params).step)


def dense(shapes: Sequence[Shape], name: str) -> dict[str, Timed]:
    """One optimizer on a list of parameters."""
    rng = torch.Generator().manual_seed(0)
    values, grads = ([torch.randn(shape, generator=rng) for shape in shapes] for _ in range(2))
    ours, theirs = OPTIMIZERS[name]
    makers = {f"numba_opt {name}": ours, **theirs}
    return {who: step_of(make, values, grads) for who, make in makers.items()}


def sparse() -> dict[str, Timed]:
    """Touched rows of an embedding table."""
    rng = torch.Generator().manual_seed(0)
    rows = torch.randperm(HEIGHT, generator=rng)[:COUNT].sort().values
    block, value = torch.randn(COUNT, WIDTH, generator=rng), torch.zeros(HEIGHT, WIDTH)
    grad = torch.sparse_coo_tensor(rows[None], block, value.shape, is_coalesced=True)
    twice = torch.cat([rows, rows])[torch.randperm(2 * COUNT, generator=rng)]
    double = torch.sparse_coo_tensor(
        twice[None], torch.cat([block, block]), value.shape, check_invariants=True
    )
    makers: dict[str, Make] = {
        "numba_opt GroupAdaGrad": front.GroupAdaGrad,
        "numba_opt RMSProp": front.RMSProp,
        "numba_opt NAG": front.NAG,
        "torch Adagrad, sparse": torch.optim.Adagrad,
        "torch SparseAdam": torch.optim.SparseAdam,
    }
    found = {who: step_of(make, [value], [grad]) for who, make in makers.items()}
    for who in ("numba_opt GroupAdaGrad", "torch Adagrad, sparse"):
        found[f"{who}, each row twice"] = step_of(makers[who], [value], [double])
    return found


def tables() -> dict[str, Callable[[], dict[str, Timed]]]:
    """What is measured; each table's arrays are made when its turn comes."""
    lists = {
        "10,000,000 in one tensor": [(10_000_000,)],
        "200 tensors of 256": [(256,)] * 200,
        "ResNet-50": model("ResNet-50"),
        "GPT-2 small": model("GPT-2 small"),
    }
    found: dict[str, Callable[[], dict[str, Timed]]] = {
        f"{title}: {name}": partial(dense, shapes, name)
        for title, shapes in lists.items()
        for name in OPTIMIZERS
    }
    return {**found, f"{COUNT:,} of {HEIGHT:,} sparse rows x {WIDTH}": sparse}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m perf.torch_front", description=__doc__)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--only", default="", help="measure only tables whose titles contain this")
    args = parser.parse_args()
    numba.set_num_threads(args.threads)
    torch.set_num_threads(args.threads)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan
    results: dict[str, dict[str, list[float]]] = {}
    for title, make in tables().items():
        if args.only in title:
            print(title, "...", file=sys.stderr)
            results[title] = take_turns(make())
            gc.collect()
    text = report(results, args.threads, load)
    print(text)
    if args.only:
        return
    machine = file_name({"machine": cpu(), "cores": os.cpu_count()})
    path = Path(__file__).parent / "results" / f"torch-{machine}.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")


def report(results: dict[str, dict[str, list[float]]], threads: int, load: float) -> str:
    """Goals first, then all tables."""
    lines = [f"torch {torch.__version__}, {threads} threads; load before the run {load:.1f}.", ""]
    lines += ["| | times as fast as | expected | measured |", "|---|---|---:|---:|"]
    for title, whom, expected in GOALS:
        if title in results:
            samples = results[title]
            found = ratio(samples, next(iter(samples)), whom)
            lines.append(f"| {title} | {whom} | {expected:g} | {found:.2f} |")
    for title, samples in results.items():
        first = next(iter(samples))
        lines += ["", f"## {title}", "", f"| | median, ms | times the time of {first} |", "|---|---:|---:|"]
        for name, seconds in samples.items():
            lines.append(f"| {name} | {median(seconds) * 1e3:.3f} | {ratio(samples, first, name):.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
