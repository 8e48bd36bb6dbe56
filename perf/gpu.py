"""On a GPU: every rule against the copy bandwidth, many tensors against PyTorch, host time, sparse rows.

Needs PyTorch with CUDA, which gives the arrays, the events that take the time, and the competitors. Buffers
rotate, so that together they are larger than the L2 cache; figures are medians.

It has not been run on a GPU yet: what is here was written where there was none.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import torch

import numba_opt

from .workloads import RULES

FRACTION = 0.92  # of the copy bandwidth
HOST = 30e-6  # seconds
L2 = 256 << 20  # bytes: larger than any GPU's second-level cache

Goals = list[dict[str, Any]]


def measure(quick: bool = False) -> dict[str, Any]:
    """Everything, as Markdown and as goals that have been judged."""
    if not torch.cuda.is_available():
        raise ImportError("perf.gpu needs a GPU that PyTorch can use")
    goals: Goals = []
    bandwidth = copy_bandwidth(quick)
    lines = [
        f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}. "
        f"Copying moves {bandwidth / 1e12:.2f} TB/s, reads and writes counted.",
        *dense(bandwidth, quick, goals),
        *many(quick, goals),
        *rows(bandwidth, quick, goals),
    ]
    return {"markdown": "\n".join(lines), "goals": goals}


def goal(text: str, wanted: float, measured: float, best: float, at_most: bool = False) -> dict[str, Any]:
    """A goal in the form of `perf.goals.judge`."""
    met = measured <= wanted if at_most else measured >= wanted
    known = {"issue": 6, "goal": text, "wanted": wanted, "at_most": at_most}
    return {**known, "measured": measured, "best": best, "met": met, "why": ""}


def timed(calls: Iterator[Callable[[], object]], rounds: int) -> tuple[float, float]:
    """Seconds that a call takes on the device: the median, and the best."""
    for _ in range(3):
        next(calls)()
    samples = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        call = next(calls)
        torch.cuda._sleep(1_000_000)  # the host gets ahead, so that its own time is not counted
        start.record()
        call()
        end.record()
        samples.append((start, end))
    torch.cuda.synchronize()
    seconds = [start.elapsed_time(end) / 1e3 for start, end in samples]
    return statistics.median(seconds), min(seconds)


def back_to_back(call: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Seconds from step to step, host and device together: the median of several stretches, and the best."""
    samples = []
    for _ in range(7):
        call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(rounds):
            call()
        torch.cuda.synchronize()
        samples.append((time.perf_counter() - start) / rounds)
    return statistics.median(samples), min(samples)


def host_time(call: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Seconds that a call keeps the host: the median, and the best. The device never gets far behind."""
    samples = []
    for k in range(rounds):
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
        if k % 16 == 0:
            torch.cuda.synchronize()
    return statistics.median(samples), min(samples)


def copy_bandwidth(quick: bool) -> float:
    """Bytes per second that a copy of 100 million float32 reads and writes."""
    source = torch.zeros(10_000_000 if quick else 100_000_000, device="cuda")
    target = torch.zeros_like(source)
    _, best = timed(cycle([lambda: target.copy_(source)]), 30)
    return 8 * source.numel() / best


def step_of(name: str, options: dict[str, Any], shapes: list[tuple[int, ...]]) -> tuple[Any, int]:
    """A trainer's step over random tensors, and the bytes that it has to move."""
    params = [torch.randn(shape, device="cuda") for shape in shapes]
    grads = [torch.randn(shape, device="cuda") for shape in shapes]
    trainer = numba_opt.Trainer(params, name, **options)
    states = sum(_bytes(state) for state in trainer.states.values())
    moved = sum(12 * param.numel() for param in params) + 2 * states
    return (lambda: trainer.step(grads)), moved


def _bytes(state: Any) -> int:
    if isinstance(state, tuple):
        return sum(map(_bytes, state))
    return 0 if state is None else state.numel() * state.element_size()


def dense(bandwidth: float, quick: bool, goals: Goals) -> list[str]:
    """Every rule over one long tensor."""
    elements = 10_000_000 if quick else 100_000_000
    lines = [
        "",
        f"### One tensor of {elements:,} float32 elements",
        "",
        "| rule | ms | of the copy's bandwidth |",
    ]
    lines.append("|---|---|---|")
    lines.append(f"| (copy) | {8e3 * elements / bandwidth:.3f} | 1.000 |")
    for name, rule in RULES.items():
        shape = (elements // 64, 64)
        count = 1 + L2 // (12 * elements)
        made = [step_of(*rule[:2], [shape]) for _ in range(count)]
        median, best = timed(cycle([step for step, _ in made]), 30)
        fraction = [made[0][1] / seconds / bandwidth for seconds in (median, best)]
        lines.append(f"| {name} | {median * 1e3:.3f} | {fraction[0]:.3f} |")
        if not quick:
            text = f"CUDA, {name}, 100 million float32: fraction of the copy's bandwidth"
            goals.append(goal(text, FRACTION, *fraction))
    for _, theirs, options, _ in PAIRS:
        # As many bytes as ours: weight and gradient, and one state that is read and written, or two.
        moved = (28 if theirs.startswith("Adam") else 20) * elements
        count = 1 + L2 // (12 * elements)
        steps = [torch_step(theirs, options, [(elements // 64, 64)]) for _ in range(count)]
        median, _ = timed(cycle(steps), 30)
        name = f"PyTorch's {kind_of(options)} {theirs}"
        lines.append(f"| {name} | {median * 1e3:.3f} | {moved / median / bandwidth:.3f} |")
    return lines


def torch_step(name: str, options: dict[str, Any], shapes: list[tuple[int, ...]]) -> Callable[[], object]:
    """The step of an optimizer of PyTorch's over random tensors."""
    params = [torch.randn(shape, device="cuda", requires_grad=True) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    return getattr(torch.optim, name)(params, **options).step


def kind_of(options: dict[str, Any]) -> str:
    return "fused" if options.get("fused") else "foreach"


# Ours, PyTorch's, its options, and how many times as fast ours is to be.
PAIRS = (
    ("nag", "SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "fused": True}, 1),
    ("adamax", "AdamW", {"fused": True}, 1),
    ("rmsprop", "RMSprop", {"foreach": True}, 3),
    ("adamax", "Adamax", {"foreach": True}, 3),
)


def many(quick: bool, goals: Goals) -> list[str]:
    """1,000 tensors of 1,000 elements in one step."""
    shapes: list[tuple[int, ...]] = [(1000,)] * 1000
    rounds = 20 if quick else 200
    lines = ["", "### 1,000 tensors of 1,000 float32 elements", "", "| ours | us | PyTorch | us | times |"]
    lines.append("|---|---|---|---|---|")
    for name, theirs, options, factor in PAIRS:
        ours, _ = step_of(*RULES[name][:2], shapes)
        other, kind = torch_step(theirs, options, shapes), kind_of(options)
        a, b = back_to_back(ours, rounds), back_to_back(other, rounds)
        cells = (name, f"{a[0] * 1e6:.1f}", f"{theirs} {kind}", f"{b[0] * 1e6:.1f}", f"{b[0] / a[0]:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
        text = f"CUDA, 1,000 tensors of 1,000: {name} against PyTorch's {kind} {theirs}"
        goals.append(goal(text, factor, b[0] / a[0], b[1] / a[1]))
    lines += ["", "| tensors | host time of `trainer.step`, us |", "|---|---|"]
    for count in (1, 100, 1000):
        step, _ = step_of("nag", {}, shapes[:count])
        for _ in range(5):
            step()
        median, best = host_time(step, 200)
        lines.append(f"| {count:,} | {median * 1e6:.1f} |")
        if count == 1000:
            text = "CUDA, host time of `trainer.step`, 1,000 tensors, seconds"
            goals.append(goal(text, HOST, median, best, at_most=True))
    return lines


def rows(bandwidth: float, quick: bool, goals: Goals) -> list[str]:
    """31,250 of 312,500 rows x 64, against a kernel that gathers and scatters the same memory."""
    height, width = 312_500, 64
    count = height // 10
    bare = gather_scatter()
    lines = [
        "",
        f"### {count:,} of {height:,} rows x {width}, NAG",
        "",
        "| gradient | us | of the bare kernel |",
    ]
    lines.append("|---|---|---|")
    weight, state = torch.randn(height, width, device="cuda"), torch.zeros(height, width, device="cuda")
    values = torch.randn(count, width, device="cuda")
    chosen = [torch.randperm(height, device="cuda")[:count] for _ in range(8)]
    floor = timed(cycle([lambda rows=rows: bare(rows, values, weight, state) for rows in chosen]), 40)
    lines.append(f"| (bare) | {floor[0] * 1e6:.1f} | 1 |")
    for distinct in (True, False):
        trainers = [numba_opt.Trainer([weight], "nag") for _ in chosen]
        calls = []
        for trainer, rows in zip(trainers, chosen, strict=True):
            grad = numba_opt.RowSparse(rows, values, (height, width), distinct)
            calls.append(lambda trainer=trainer, grad=grad: trainer.step([grad]))
        for call in calls:
            call()
        found = timed(cycle(calls), 40)
        what = "distinct rows" if distinct else "any rows, sorted first"
        lines.append(f"| {what} | {found[0] * 1e6:.1f} | {floor[0] / found[0]:.2f} |")
        if distinct and not quick:
            text = "CUDA, sparse rows: fraction of a bare gather-scatter kernel's speed"
            goals.append(goal(text, FRACTION, floor[0] / found[0], floor[1] / found[1]))
    return lines


def gather_scatter() -> Callable[..., None]:
    """A kernel of Numba's ordinary means that reads and writes what NAG's does."""
    from numba import cuda

    @cuda.jit
    def kernel(rows: Any, values: Any, weight: Any, state: Any) -> None:
        row = cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y
        if row < rows.shape[0]:
            at, column = rows[row], cuda.threadIdx.x
            while column < values.shape[1]:
                state[at, column] += values[row, column]
                weight[at, column] += values[row, column]
                column += cuda.blockDim.x

    def launch(rows: Any, values: Any, weight: Any, state: Any) -> None:
        stream = cuda.external_stream(torch.cuda.current_stream().cuda_stream)
        kernel[-(-rows.shape[0] // 4), (32, 4), stream](rows, values, weight, state)

    return launch
