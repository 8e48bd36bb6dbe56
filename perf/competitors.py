"""The table of competitors: who does which kinds of work, and how.

A way is a function that prepares a workload, making its arrays once, and returns what takes samples of it
(`clock.Runner`), or None where the competitor has no such thing. Those that are not installed are left out
and named, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module, metadata
from typing import NamedTuple

import numba

import numba_opt

from . import bare, jax_side, mxnet_side, numpy_side, ours, torch_side
from .clock import Runner
from .workloads import Workload

UPDATE, STEP = "numba_opt update", "numba_opt step"
TRAINER, FRESH = "numba_opt Trainer", "numba_opt Trainer, fresh gradients"
REDUCED, SMALL_STATES = "numba_opt Trainer, reduced", "numba_opt Trainer, bfloat16 states"
BY_CHANCE = "numba_opt Trainer, bfloat16 states by chance"
SPARSE, CSR, EXACT, ONCE = (
    "numba_opt RowSparse",
    "numba_opt CSR",
    "numba_opt RowSparse, exact",
    "numba_opt RowSparse, each row once",
)
FRONT = "numba_opt.torch"
TORCH_LOOP, TORCH_FOREACH, TORCH_FUSED = TORCH = ("torch for-loop", "torch foreach", "torch fused")
ADAGRAD, FBGEMM = "torch sparse Adagrad", "FBGEMM row-wise AdaGrad"
MXNET, JAX, NUMPY = "MXNet", "jax/optax", "NumPy"
SAFETENSORS, TORCH_PROCESS = "safetensors", "torch"
BARE_SERIAL, BARE_PARALLEL = BARE = ("bare, one thread", "bare, all threads")

Way = Callable[[Workload], "Runner | None"]


class Competitor(NamedTuple):
    name: str
    needs: str  # the module without which it cannot take part
    ways: dict[str, Way]  # by kind of workload
    least: int = 0  # elements from which on it is asked, and up to which
    most: int = 1 << 40


LARGE = 1 << 25  # elements that some are not asked to hold: memory is for those that matter there

COMPETITORS = [
    Competitor(
        TRAINER, "numba_opt", {"step": ours.trainer, "clip": partial(ours.trainer, clip_global_norm=1.0)}
    ),
    Competitor(FRESH, "numba_opt", {"step": ours.fresh}),
    Competitor(UPDATE, "numba_opt", {"step": partial(ours.update, fused=True)}, most=LARGE),
    Competitor(STEP, "numba_opt", {"step": partial(ours.update, fused=False)}, most=LARGE),
    Competitor(REDUCED, "numba_opt", {"step": ours.reduced}),
    Competitor(SMALL_STATES, "numba_opt", {"step": ours.small_states}),
    Competitor(BY_CHANCE, "numba_opt", {"step": partial(ours.small_states, chance=True)}),
    Competitor("numba_opt", "numba_opt", {"save": ours.save, "load": ours.load, "start": ours.start}),
    Competitor(SPARSE, "numba_opt", {"rows": ours.rows}),
    Competitor(CSR, "numba_opt", {"rows": partial(ours.rows, form="csr")}),
    Competitor(EXACT, "numba_opt", {"rows": partial(ours.rows, form="exact")}),
    Competitor(ONCE, "numba_opt", {"rows": partial(ours.rows, form="once")}),
    Competitor(FRONT, "numba_opt.torch", {"step": torch_side.ours, "rows": torch_side.ours}),
    *(
        Competitor(
            name,
            "torch",
            {"step": partial(torch_side.step, way=way), "clip": partial(torch_side.clip, way=way)},
        )
        for name, way in zip(TORCH, torch_side.WAYS, strict=True)
    ),
    Competitor(ADAGRAD, "torch", {"rows": torch_side.rows}),
    Competitor(TORCH_PROCESS, "torch", {"start": torch_side.start}),
    Competitor(FBGEMM, "fbgemm_gpu", {"rows": torch_side.fbgemm}),
    Competitor(
        JAX,
        "optax",
        {"step": jax_side.step, "clip": partial(jax_side.step, clipped=True), "start": jax_side.start},
        most=LARGE,
    ),
    Competitor(MXNET, "mxnet", dict.fromkeys(("step", "clip", "rows"), mxnet_side.prepare)),
    Competitor(
        NUMPY,
        "numpy",
        {
            "step": numpy_side.step,
            "clip": numpy_side.clip,
            "rows": numpy_side.rows,
            "save": partial(numpy_side.save, safetensors=False),
            "load": partial(numpy_side.load, safetensors=False),
        },
        most=LARGE,
    ),
    Competitor(
        SAFETENSORS,
        "safetensors",
        {way: partial(getattr(numpy_side, way), safetensors=True) for way in ("save", "load")},
    ),
    Competitor(
        BARE_SERIAL,
        "numba",
        {
            "step": partial(bare.step, parallel=False),
            "clip": partial(bare.step, parallel=False),
            "rows": partial(bare.rows, parallel=False),
            "save": bare.save,
            "load": bare.load,
            "start": bare.start,
        },
    ),
    Competitor(
        BARE_PARALLEL,
        "numba",
        {
            "step": partial(bare.step, parallel=True),
            "clip": partial(bare.step, parallel=True),
            "rows": partial(bare.rows, parallel=True),
        },
        least=1 << 15,  # below, its threads take longer to wake than to work
    ),
]


def installed() -> tuple[list[Competitor], dict[str, str], dict[str, str]]:
    """Those that can take part; those that cannot, with the reason; the versions of what they need."""
    found: dict[str, str] = {"numba_opt": numba_opt.__version__, "numba": numba.__version__}
    missing: dict[str, str] = {}
    for needs in dict.fromkeys(competitor.needs for competitor in COMPETITORS):
        try:
            if needs == "mxnet":
                found[needs] = mxnet_side.version()
            elif needs not in found:
                module = import_module(needs)
                if "." not in needs:
                    found[needs] = getattr(module, "__version__", None) or metadata.version(needs)
                if needs == "optax":
                    found["jax"] = metadata.version("jax")
        except (ImportError, OSError) as error:
            missing[needs] = str(error)
    took = [competitor for competitor in COMPETITORS if competitor.needs not in missing]
    skipped = {c.name: missing[c.needs] for c in COMPETITORS if c.needs in missing}
    return took, skipped, found


def set_threads(threads: int) -> None:
    """Have those that are set in this process work on so many threads."""
    import sys

    numba.set_num_threads(threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
