"""The measurements of `numba-opt bench`: how close to the speed of memory each optimizer comes here.

The limit is measured too, by rules that move the same arrays and do nothing but add. All take turns, in an
order that changes each round, so that whatever else the machine is doing disturbs them alike.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..cpu import threads
from ..optimizer import Optimizer

__all__ = ["collect", "plot", "text"]

ELEMENTS = 10_000_000
WIDTH = 64  # of the rows, for optimizers that need a matrix
WARM_UP, ROUNDS, SECONDS, MOST = 2, 7, 3.0, 101  # rounds go on until both are spent, or there are the most
SHORTEST = 1e-3  # seconds of a sample; shorter steps are repeated


def bare(weight: Any, grad: Any, lr: Any) -> Any:
    return (weight + grad,)


def bare1(weight: Any, grad: Any, a: Any, lr: Any) -> Any:
    return weight + grad, a + grad


def bare2(weight: Any, grad: Any, a: Any, b: Any, lr: Any) -> Any:
    return weight + grad, a + grad, b + grad


def bare3(weight: Any, grad: Any, a: Any, b: Any, c: Any, lr: Any) -> Any:
    return weight + grad, a + grad, b + grad, c + grad


class Bare(Optimizer):
    """Moves what an optimizer with some number of states must move, and does no more."""

    def __init__(self, states: int) -> None:
        super().__init__(use_fused_step=True)
        self.rule = (bare, bare1, bare2, bare3)[states]
        self.state_names = ("a", "b", "c")[:states]

    def hyper(self, lr: float, t: int) -> tuple[float, ...]:
        return (lr,)


class Runner(NamedTuple):
    """One optimizer and what it works on."""

    optimizer: Optimizer
    arrays: tuple[Any, ...]
    bytes: int  # that a step must move: gradient read, weight and states read and written


def collect(elements: int = ELEMENTS, advance: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Time one step of each optimizer on a float32 matrix.

    Parameters
    ----------
    elements : int, default 10,000,000
        How many the matrix has, rounded to whole rows. Fewer may fit in the processor's caches.
    advance : callable, optional
        Called after each round.

    Returns
    -------
    dict
        ``limit``, the highest GB/s that plain additions reached, ``elements``, ``threads``, ``rounds``, and
        ``results``: for each optimizer ``ms`` for a step, ``gb_per_s`` and the ``fraction`` of the limit,
        that is of an addition which moves as many arrays, all medians over rounds.
    """
    shape = (max(1, elements // WIDTH), WIDTH) if elements >= WIDTH else (1, elements)
    rng = np.random.default_rng(0)
    pool = [rng.standard_normal(shape, np.float32) for _ in range(5)]
    optimizers = _optimizers()
    runners = [_runner(optimizer, pool) for optimizer in (*optimizers.values(), *map(Bare, range(4)))]
    samples = list(zip(runners, _measure(runners, pool, advance), strict=True))
    speeds = [[runner.bytes / 1e9 / seconds for seconds in row] for runner, row in samples]
    results = {}
    for name, (runner, seconds), speed in zip(optimizers, samples, speeds, strict=False):
        states = 0 if runner.optimizer.per_row else len(runner.optimizer.state_names)
        limit = speeds[len(optimizers) + min(states, 3)]
        results[name] = {
            "ms": statistics.median(seconds) * 1e3,
            "gb_per_s": statistics.median(speed),
            "fraction": statistics.median(a / b for a, b in zip(speed, limit, strict=True)),
        }
    return {
        "elements": shape[0] * shape[1],
        "threads": threads.count(),
        "rounds": len(speeds[0]),
        "limit": max(map(statistics.median, speeds[len(optimizers) :])),
        "results": results,
    }


def text(found: Mapping[str, Any]) -> str:
    """Return what `collect` found as a table."""
    lines = [
        f"one step on {found['elements']:,} float32 elements, {found['threads']} threads, medians of "
        f"{found['rounds']} rounds",
        f"memory limit: {found['limit']:.3g} GB/s, reached by plain additions",
        "",
        f"{'optimizer':<26}{'ms':>10}{'GB/s':>10}{'of the limit':>15}",
    ]
    for name, row in found["results"].items():
        lines.append(f"{name:<26}{row['ms']:10.3f}{row['gb_per_s']:10.3g}{row['fraction']:14.0%}")
    return "\n".join(lines)


def plot(found: Mapping[str, Any], path: str | Path) -> None:
    """Save the table as a picture, in any format that matplotlib knows by the file's name.

    Raises
    ------
    ModuleNotFoundError
        There is no matplotlib.
    """
    from matplotlib.figure import Figure

    from ..demo.curves import STYLES, TEXT

    names = list(found["results"])
    rows = list(found["results"].values())
    speeds = [row["gb_per_s"] for row in rows]
    figure = Figure(figsize=(7, 1.2 + 0.38 * len(names)), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh(names, speeds, height=0.62, color=STYLES[0]["color"])
    axes.bar_label(bars, [f"{row['fraction']:.0%}" for row in rows], padding=-38, color="white")
    axes.axvline(found["limit"], color=STYLES[1]["color"], linestyle=STYLES[1]["linestyle"], linewidth=1.8)
    axes.annotate(
        "memory limit",
        xy=(found["limit"], 1),
        xycoords=axes.get_xaxis_transform(),
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        va="bottom",
        color=STYLES[1]["color"],
    )
    axes.invert_yaxis()
    axes.set_xlim(0, max(found["limit"], *speeds) * 1.12)
    title = f"A step on {found['elements']:,} float32 elements, {found['threads']} threads"
    axes.set_title(title, loc="left", fontsize=11, color=TEXT, pad=18)
    axes.set_xlabel("GB/s, and how much that is of plain additions' speed", color=TEXT)
    axes.tick_params(color="#999999", labelcolor=TEXT)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    figure.savefig(path)


# ---------------------------------------------------------------- measuring


def _optimizers() -> dict[str, Optimizer]:
    """Every variant of everything that is registered and can be made without arguments."""
    found = {}
    for cls in Optimizer.opt_registry.values():
        for options in cls.variants:
            with contextlib.suppress(TypeError):
                given = ", ".join(f"{name}={value}" for name, value in options.items())
                found[f"{cls.__name__}({given})" if given else cls.__name__] = cls(**options)
    return {name: optimizer for name, optimizer in found.items() if optimizer.rule is not None}


def _runner(optimizer: Optimizer, pool: Sequence[np.ndarray]) -> Runner:
    """An optimizer on the first arrays of a pool that all share."""
    grad, weight, *rest = pool
    n = len(optimizer.state_names)
    column = (len(weight), 1)
    states = [np.zeros(column, np.float32) for _ in range(n)] if optimizer.per_row else rest[:n]
    state = tuple(states) if n > 1 else states[0] if n else None
    moved = grad.nbytes + 2 * weight.nbytes + 2 * sum(array.nbytes for array in states)
    return Runner(optimizer, ([0], [weight], [grad], [state]), moved)


def _measure(
    runners: Sequence[Runner], pool: Sequence[np.ndarray], advance: Callable[[], object]
) -> list[list[float]]:
    """Seconds for a step in each round, for each runner."""
    repeats = [_repeats(runner, pool) for runner in runners]
    samples: list[list[float]] = [[] for _ in runners]
    order, shuffle = list(range(len(runners))), random.Random(0).shuffle
    began = time.perf_counter()
    for done in range(WARM_UP + MOST):
        if done >= WARM_UP + ROUNDS and time.perf_counter() - began > SECONDS:
            break
        shuffle(order)
        for k in order:
            seconds = _sample(runners[k], pool, repeats[k])
            if done >= WARM_UP:
                samples[k].append(seconds / repeats[k])
        advance()
    return samples


def _repeats(runner: Runner, pool: Sequence[np.ndarray]) -> int:
    """Return how many steps make a sample that is long enough. What must be compiled is, at the first one."""
    _sample(runner, pool, 1)
    repeats = 1
    while _sample(runner, pool, repeats) < SHORTEST:
        repeats *= 2
    return repeats


def _sample(runner: Runner, pool: Sequence[np.ndarray], repeats: int) -> float:
    for array in pool[1:]:
        array.fill(0.5)
    began = time.perf_counter()
    for _ in range(repeats):
        runner.optimizer.update(*runner.arrays)
    return time.perf_counter() - began
