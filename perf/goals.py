"""The table of speed goals, in numbers as the issues set them, and whether a run met them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from .competitors import BARE, CLIPPED, FRESH, MXNET, TORCH, TORCH_FUSED, TORCH_LOOP, TRAINER, UPDATE
from .harness import Result
from .workloads import RULES


class Goal(NamedTuple):
    """Be at least so many times as fast as the fastest of some competitors."""

    issue: int
    workload: str
    ours: str
    theirs: tuple[str, ...]
    at_least: float


ALIKE = ("dense", "many", "mix")
ALIKE_WITHIN = 1.05

GOALS = [
    *(Goal(2, f"dense/{rule}", UPDATE, BARE, 0.9) for rule in RULES),
    *(Goal(2, f"dense/{rule}", UPDATE, (MXNET,), x) for rule, x in (("ftml", 8), ("adamax", 8))),
    *(Goal(2, f"dense/{rule}", UPDATE, (MXNET,), x) for rule, x in (("rmsprop", 4), ("nag", 1.2))),
    *(
        Goal(2, f"small/{rule}", UPDATE, TORCH, 2)
        for rule in ("nag", "rmsprop", "rmsprop-centered", "adamax")
    ),
    Goal(2, "single/nag", UPDATE, (TORCH_FUSED,), 1),
    Goal(3, "small/nag", TRAINER, (TORCH_FUSED,), 10),
    Goal(3, "small/rmsprop", TRAINER, (TORCH_LOOP,), 30),  # torch's default on a CPU
    Goal(3, "small/adamax", TRAINER, (TORCH_LOOP,), 30),
    Goal(3, "small/nag", FRESH, (TORCH_FUSED,), 2),
    Goal(3, "single/nag", TRAINER, (TORCH_FUSED,), 3),
    *(Goal(3, f"{group}/{rule}", TRAINER, BARE, 0.95) for group in ALIKE for rule in RULES),
    Goal(3, "dense/nag", CLIPPED, BARE, 1 / 1.25),
]


def judge(results: Mapping[str, Result]) -> list[dict[str, Any]]:
    """Every goal that the run can speak of, the missed ones first."""
    rows = []
    for goal in GOALS:
        result = results.get(goal.workload)
        theirs = result.fastest(goal.theirs) if result else None
        if result is None or theirs is None or goal.ours not in result.samples:
            continue
        text = f"{goal.workload}: {goal.ours} at least {goal.at_least:g} times as fast as {theirs}"
        ratio, best = result.ratio(goal.ours, theirs), result.best(goal.ours, theirs)
        rows.append(_row(goal.issue, text, ratio, best, goal.at_least))
    rows += _alike(results)
    return sorted(rows, key=lambda row: row["met"])


def _alike(results: Mapping[str, Result]) -> list[dict[str, Any]]:
    """The same bytes in one tensor, in many or in a mix shall take the same time."""
    rows = []
    for rule in RULES:
        found = [results.get(f"{group}/{rule}") for group in ALIKE]
        same = [result for result in found if result and TRAINER in result.samples]
        if len(same) > 1:
            text = f"{rule}: {TRAINER} as fast in {', '.join(ALIKE)}, slowest over fastest"
            rows.append(_row(3, text, _spread(same, median), _spread(same, min), 1 / ALIKE_WITHIN))
    return rows


def _spread(results: Sequence[Result], typical: Callable[[list[float]], float]) -> float:
    """The slowest of some workloads' speeds over the fastest."""
    speeds = [result.workload.bytes / typical(result.samples[TRAINER]) for result in results]
    return min(speeds) / max(speeds)


def _row(issue: int, text: str, measured: float, best: float, wanted: float) -> dict[str, Any]:
    return {
        "issue": issue,
        "goal": text,
        "measured": measured,
        "best": best,
        "wanted": wanted,
        "met": measured >= wanted,
    }
