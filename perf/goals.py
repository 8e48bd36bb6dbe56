"""The table of speed goals, in numbers as the issues set them, and whether a run met them.

A goal that has been missed says what bounds it (bytes, instructions, launches, Python) and what was tried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, NamedTuple

from .competitors import (
    ADAGRAD,
    BARE,
    CSR,
    EXACT,
    FBGEMM,
    FRESH,
    FRONT,
    MXNET,
    ONCE,
    REDUCED,
    SPARSE,
    TORCH,
    TORCH_FUSED,
    TORCH_LOOP,
    TRAINER,
    UPDATE,
)
from .harness import Result
from .workloads import RULES

Results = Mapping[str, Result]
Measured = tuple[float, float]  # as medians say, and at best: by the fastest samples


class Goal(NamedTuple):
    """A number that must be reached, or not be passed."""

    issue: int
    text: str
    wanted: float
    measure: Callable[[Results], Measured | None]  # None if the run does not tell
    at_most: bool = False
    why: str = ""  # it may be missed

    def met(self, measured: float) -> bool:
        return measured <= self.wanted if self.at_most else measured >= self.wanted


def faster(
    issue: int, workload: str, ours: str, theirs: tuple[str, ...], factor: float, why: str = ""
) -> Goal:
    """Be at least so many times as fast as the fastest of some competitors."""

    def measure(results: Results) -> Measured | None:
        result = results.get(workload)
        other = result.fastest(theirs) if result else None
        if result is None or other is None or ours not in result.samples:
            return None
        return result.ratio(ours, other), result.best(ours, other)

    whom = "the bare kernel" if theirs == BARE else " or ".join(theirs)
    return Goal(issue, f"{workload}: {ours} {factor:.3g} times as fast as {whom}", factor, measure, why=why)


def alike(issue: int, rule: str, workloads: tuple[str, ...], within: float, why: str = "") -> Goal:
    """Be at the same speed, beside the bare kernel's in the same rounds: the slowest over the fastest.

    (Seconds alone would compare the machine's minutes: its memory is up to three times slower in some.)
    """

    def measure(results: Results) -> Measured | None:
        found = [results.get(name) for name in workloads]
        same = [result for result in found if result and TRAINER in result.samples and result.fastest(BARE)]
        if len(same) < len(workloads):
            return None
        typical = [result.ratio(TRAINER, str(result.fastest(BARE))) for result in same]
        best = [result.best(TRAINER, str(result.fastest(BARE))) for result in same]
        return min(typical) / max(typical), min(best) / max(best)

    names = ", ".join(name.split("/")[2] for name in workloads)
    return Goal(issue, f"{rule}: {TRAINER} as fast in {names}", 1 / within, measure, why=why)


def holds(issue: int, workload: str, reference: str, ours: str, share: float, why: str = "") -> Goal:
    """Keep that share of the fraction of the bare kernel's speed that another workload shows."""

    def measure(results: Results) -> Measured | None:
        found = [results.get(name) for name in (workload, reference)]
        both = [result for result in found if result and ours in result.samples and result.fastest(BARE)]
        if len(both) < 2:
            return None
        typical = [result.ratio(ours, str(result.fastest(BARE))) for result in both]
        best = [result.best(ours, str(result.fastest(BARE))) for result in both]
        return typical[0] / typical[1], best[0] / best[1]

    text = f"{workload}: {ours} {share:g} of what it reaches, beside the bare kernel, in {reference}"
    return Goal(issue, text, share, measure, why=why)


def seconds(issue: int, workload: str, beyond: bool, limit: float, why: str = "") -> Goal:
    """Take no longer, or no longer than that beyond the bare process."""

    def measure(results: Results) -> Measured | None:
        result = results.get(workload)
        bare = result.fastest(BARE) if result else None
        if result is None or "numba_opt" not in result.samples or (beyond and bare is None):
            return None
        ours = result.samples["numba_opt"]
        base = result.samples[str(bare)] if beyond else [0.0] * len(ours)
        return median(a - b for a, b in zip(ours, base, strict=False)), min(ours) - min(base)

    text = f"{workload}: at most {limit:g} s" + (" beyond the imports" if beyond else "")
    return Goal(issue, text, limit, measure, at_most=True, why=why)


PER_CALL = (
    "Python: the step's time is that of its bytecodes and calls into NumPy, which tests/test_guard.py "
    "counts; the kernel itself takes a fraction of it. Bindings, kernels and tables are kept from step to "
    "step; gradients are read from their array objects by one compiled call."
)
STREAMING = (
    "Bytes: the same arrays as the bare kernel's, in chunks of 16,384 elements that threads claim one by "
    "one, where the bare kernel gives each thread one long part; a helper begins 20 to 50 us late. Tried: "
    "prange in place of claimed chunks (level); fetching long lines ahead by hand (on one thread RMSProp "
    "from 0.87 to 0.94, GroupAdaGrad from 0.76 to 0.94; kept); looking at the row of hyper-parameters once "
    "for a chunk and not for each row, where two atomic operations waited for all that had been written "
    "(GroupAdaGrad on two threads from 0.75 to 0.90; kept)."
)
MANY_TENSORS = (
    "Instructions: every chunk looks up its tensors, and the vectors at a tensor's end are not full. Bytes "
    "are as for one tensor, and so is what was tried there."
)
CLIPPING = "Bytes: the gradients are read twice, once for their norm; no cache holds them in between."
HALVES = (
    "Instructions: half as many bytes for each element, and the same arithmetic, with conversions on top. "
    "(With float32 masters, where each element moves more, the same conversions keep up with memory.) "
    "float16 uses F16C; bfloat16 is shifted, and rounded in integers. All of it is vectorised: for 16 "
    "elements of NAG's loop 19 instructions in float16 and 36 in bfloat16, which takes 9 to round and "
    "pack each number that is stored. With its data in a cache, FTML takes as long for 10 million "
    "elements in bfloat16 as memory does to move them; GroupAdaGrad divides every element, which takes 13 ns "
    "of a row's 29 in float16. Tried: gradients kept in float32 between a row's two passes (from 35 ns to "
    "29; kept), no comparing of addresses before each block (NAG in float16 from 0.84 to 0.88, FTML in "
    "bfloat16 from 0.51 to 0.59; kept), fetching 2 KB ahead and not 1 (NAG in float16 by a tenth, in "
    "bfloat16 by 8%; kept), longer and shorter blocks (level or slower), pairs of bfloat16 in one word "
    "(level, 0.51 ns an element of NAG in the cache for 0.52: the compiler joins them to vectors of 512 "
    "bits, of which the processor takes fewer at a time). Not tried: rows in blocks, so that the sums of "
    "some overlap with the divisions of others."
)
RANDOM_ACCESS = (
    "Bytes, in cache lines, and Python: touched rows lie anywhere in the table. The kernel alone reaches "
    "0.7; some 0.4 ms go to checking all row numbers and arrays before anything is written, by code that a "
    "step has driven out of the caches. Tried: fetching rows eight ahead by hand, one look at all array "
    "objects, fewer calls into NumPy (all kept)."
)
READ_FIRST = (
    "Bytes: before anything is written, the columns (8 MB) and the rows' starts are read and checked, which "
    "is half of what the step moves then. Tried: columns checked by all threads, in vectors, fetched ahead "
    "(from 1.07 to 0.88 ms), rows' starts read once and not twice (from 0.60 to 0.39 ms); all kept."
)
BESIDE_PEERS = (
    "Bytes: the bare kernel is no more than twice as fast as this, so the rest is the peer's own speed; see "
    "the tables below."
)
MERGING = (
    "Bytes: 200,000 occurrences of 256 bytes are read in the order of their rows, so that no number of "
    "threads changes a sum; a bare loop over them in that order takes 13 ms on one thread. Tried: grouping "
    "by counting in place of sorting (1 ms; kept), fetching parts ahead (kept)."
)
CATCHING_UP = (
    "Instructions: each touched row takes ten steps, not one, while it is in the cache. For 64 elements NAG "
    "takes some 58 cycles a step, and the goal leaves 22; square roots and divisions alone, in Adamax and "
    "FTML, take more than that."
)
COMPILER = "Compilation: one rule's kernels, by LLVM, at its own pace; they are kept for the next process."
PEERS = "Bytes: the step stands beside the bare kernel in the tables below; the rest is the peer's own speed."

ALIKE = ("dense/{}/10M", "many/{}/1000 x 10000", "many/{}/mix")
ROWS = "rows/groupadagrad/31250 of 312500 x 64"
TALL = "rows/groupadagrad/31250 of 3125000 x 64"
ZIPF = "rows/groupadagrad/50000 x 64, 200000 by Zipf"

GOALS = [
    *(faster(2, f"dense/{rule}/10M", UPDATE, BARE, 0.9, STREAMING) for rule in RULES),
    *(
        faster(2, f"dense/{rule}/10M", UPDATE, (MXNET,), factor, PEERS)
        for rule, factor in (("ftml", 8), ("adamax", 8), ("rmsprop", 4), ("nag", 1.2))
    ),
    *(
        faster(2, f"many/{rule}/200 x 256", UPDATE, TORCH, 2, PER_CALL)
        for rule in ("nag", "rmsprop", "rmsprop-centered", "adamax")
    ),
    faster(2, "dense/nag/2^8", UPDATE, (TORCH_FUSED,), 1, PER_CALL),
    faster(3, "many/nag/200 x 256", TRAINER, (TORCH_FUSED,), 10, PER_CALL),
    faster(3, "many/rmsprop/200 x 256", TRAINER, (TORCH_LOOP,), 30, PER_CALL),  # torch's default on a CPU
    faster(3, "many/adamax/200 x 256", TRAINER, (TORCH_LOOP,), 30, PER_CALL),
    faster(3, "many/nag/200 x 256", FRESH, (TORCH_FUSED,), 2, PER_CALL),
    faster(3, "dense/nag/2^8", TRAINER, (TORCH_FUSED,), 3, PER_CALL),
    *(
        faster(3, place.format(rule), TRAINER, BARE, 0.95, STREAMING if "dense" in place else MANY_TENSORS)
        for place in ALIKE
        for rule in RULES
        if not (RULES[rule].per_row and "mix" in place)
    ),
    *(
        alike(3, rule, tuple(place.format(rule) for place in ALIKE), 1.05, MANY_TENSORS)
        for rule in RULES
        if not RULES[rule].per_row
    ),
    alike(3, "groupadagrad", tuple(place.format("groupadagrad") for place in ALIKE[:2]), 1.05, MANY_TENSORS),
    faster(3, "clip/nag/10M", TRAINER, BARE, 1 / 1.25, CLIPPING),
    faster(3, "clip/nag/mix", TRAINER, BARE, 1 / 1.25, CLIPPING),
    faster(4, ROWS, SPARSE, BARE, 0.6, RANDOM_ACCESS),
    faster(4, ROWS, CSR, BARE, 0.4, READ_FIRST),
    faster(4, ROWS, SPARSE, (FBGEMM,), 20, BESIDE_PEERS),
    faster(4, ROWS, SPARSE, (ADAGRAD,), 10, BESIDE_PEERS),
    faster(4, ROWS, SPARSE, (MXNET,), 5, BESIDE_PEERS),
    holds(4, TALL, ROWS, SPARSE, 0.9, RANDOM_ACCESS),
    faster(4, ZIPF, SPARSE, (ONCE,), 1 / 3, MERGING),
    *(
        faster(4, f"rows/{rule}/a tenth of 312500 x 64 in turn", EXACT, (SPARSE,), 1 / 1.5, CATCHING_UP)
        for rule in ("nag", "adamax", "ftml")
    ),
    seconds(5, "startup/ftml/warm", True, 0.4, "Imports, and loading kernels from the cache."),
    seconds(5, "startup/ftml/cold", True, 6, COMPILER),
    seconds(5, "startup/ftml/warmup, full cache", False, 0.5, "Loading kernels from the cache."),
    seconds(5, "startup/ftml/warmup, empty cache", False, 40, COMPILER),
    faster(7, "dense/rmsprop/10M", FRONT, TORCH, 5, PEERS),
    faster(7, "dense/adamax/10M", FRONT, TORCH, 4, PEERS),
    faster(7, "dense/nag/10M", FRONT, (TORCH_FUSED,), 1, PEERS),
    *(
        faster(7, f"many/{rule}/{model}", FRONT, (TORCH_LOOP,), 4, PEERS)
        for model in ("ResNet-50", "GPT-2 small")
        for rule in ("rmsprop", "adamax")
    ),
    faster(7, ROWS, FRONT, (ADAGRAD,), 10, BESIDE_PEERS),
    *(
        faster(8, f"dense/{rule}/10M/{dtype}{master}", TRAINER, BARE, 0.85, HALVES)
        for dtype in ("float16", "bfloat16")
        for master in ("", "+master")
        for rule in RULES
    ),
    *(faster(8, f"dense/{rule}/10M/float16+master", TRAINER, (MXNET,), 5, PEERS) for rule in RULES),
    faster(8, "dense/ftml/10M", REDUCED, (TRAINER,), 1.5, PEERS),
]


def judge(results: Results, others: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """Every goal: the missed ones first, then those met, then those that the run cannot speak of.

    `others` have been judged elsewhere, on a GPU, in the same form.
    """
    rows = list(others or [])
    for goal in GOALS:
        measured = goal.measure(results)
        typical, best = measured or (None, None)
        rows.append(
            {
                "issue": goal.issue,
                "goal": goal.text,
                "wanted": goal.wanted,
                "at_most": goal.at_most,
                "measured": typical,
                "best": best,
                "met": None if typical is None else goal.met(typical),
                "why": goal.why,
            }
        )
    return sorted(rows, key=lambda row: (False, True, None).index(row["met"]))
