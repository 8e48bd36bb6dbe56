"""The table of workloads: what is done to which tensors, and how many bytes that must move.

Also read by the MXNet worker, in an interpreter of its own: standard library and NumPy only.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from .shapes import MODELS, model

Shapes = tuple[tuple[int, ...], ...]


class Rule(NamedTuple):
    """An optimizer as all competitors are asked for it. Names and options are MXNet's."""

    optimizer: str
    options: dict[str, Any]
    states: int  # arrays of state beside each weight
    per_row: bool = False  # a state holds one number for each row


class Rows(NamedTuple):
    """What sparse gradients touch of a table."""

    count: int  # different rows
    occurrences: int = 0  # of them, by Zipf's law; 0: each once
    turns: int = 1  # gradients that take turns, with rows of their own


class Workload(NamedTuple):
    """One optimizer at work on one list of tensors."""

    section: str
    kind: str  # which of a competitor's ways is asked for
    rule: str
    what: str  # the tensors, in a few characters
    shapes: Shapes
    dtype: str = "float32"
    masters: bool = False  # half-precision weights with a float32 copy
    threads: int = 0  # 0: as many as the run has
    rows: Rows | None = None
    quick: bool = False  # also part of a quick look

    @property
    def name(self) -> str:
        kind = self.dtype + ("+master" if self.masters else "")
        return "/".join([self.section, self.rule, self.what, *([kind] if kind != "float32" else [])])

    @property
    def elements(self) -> int:
        return sum(map(math.prod, self.shapes))

    @property
    def bytes(self) -> int:
        """What must be moved: gradients read, weights and states read and written, files written or read."""
        if self.kind == "start":
            return 0
        rule, item = RULES[self.rule], SIZES[self.dtype]
        elements, grads, indices = self.elements, self.elements, 0
        held = sum(shape[0] for shape in self.shapes) if rule.per_row else elements
        if self.rows:
            width = math.prod(self.shapes[0][1:])
            indices = self.rows.occurrences or self.rows.count
            elements, grads = self.rows.count * width, indices * width
            held = self.rows.count if rule.per_row else elements
        if self.kind in ("save", "load"):
            return item * (elements + rule.states * held)
        kept = 4 if self.masters else item
        moved = item * grads + 2 * kept * (elements + rule.states * held) + 8 * indices
        moved += item * elements if self.masters else 0  # the half-precision weight is only written
        return moved + (item * grads if self.kind == "clip" else 0)


SIZES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}

RULES = {
    "nag": Rule("nag", {"learning_rate": 0.01, "momentum": 0.9}, 1),
    "rmsprop": Rule("rmsprop", {"learning_rate": 0.001}, 1),
    "rmsprop-centered": Rule("rmsprop", {"learning_rate": 0.001, "centered": True}, 3),
    "adamax": Rule("adamax", {"learning_rate": 0.002}, 2),
    "ftml": Rule("ftml", {"learning_rate": 0.0025}, 3),
    "groupadagrad": Rule("groupadagrad", {"learning_rate": 0.01}, 1, per_row=True),
}

SECTIONS = {
    "dense": "One tensor",
    "many": "Many tensors",
    "rows": "Sparse gradients of an embedding table",
    "clip": "A step with clipping by the global norm",
    "threads": "One tensor, by the number of threads",
    "checkpoint": "Checkpoints of ResNet-50",
    "startup": "Start-up",
}


def _transformer(width: int, layers: int, words: int, positions: int) -> Shapes:
    """The shapes of a decoder's parameters: embeddings, then attention, norms and two wide layers each."""
    layer = (
        *((width,),) * 4,  # two norms, scale and shift
        (3 * width, width),
        (3 * width,),
        (width, width),
        (width,),
        (4 * width, width),
        (4 * width,),
        (width, 4 * width),
        (width,),
    )
    return ((words, width), (positions, width), *layer * layers, (width,), (width,))


TEN_MILLION = 10_000_000
DENSE = {f"2^{k}": 2**k for k in (8, 12, 16, 18, 20, 22)} | {"10M": TEN_MILLION, "2^27": 2**27}
MANY: dict[str, Shapes] = {
    "200 x 256": ((4, 64),) * 200,
    "1000 x 10000": ((100, 100),) * 1000,
    "mix": _transformer(256, 8, 14_000, 512),  # of 10 million elements, too
    **{name: tuple(model(name)) for name in MODELS},
}
ELEMENTWISE = ("nag", "rmsprop", "adamax", "ftml")  # one variant each

# All rows are 64 wide and 31,250 of 312,500 but where the name says otherwise.
ROWS: dict[str, tuple[Rows, int, int]] = {
    "31250 of 312500 x 64": (Rows(31_250), 312_500, 64),
    "31250 of 3125000 x 64": (Rows(31_250), 3_125_000, 64),
    "1000000 of 2000000 x 1": (Rows(1_000_000), 2_000_000, 1),
    "1000000 of 2000000 x 8": (Rows(1_000_000), 2_000_000, 8),
    "31250 of 62500 x 256": (Rows(31_250), 62_500, 256),
    "7812 of 15624 x 1024": (Rows(7_812), 15_624, 1024),
    "1 of 312500 x 64": (Rows(1), 312_500, 64),
    "100 of 312500 x 64": (Rows(100), 312_500, 64),
    "50000 x 64, 200000 by Zipf": (Rows(50_000, occurrences=200_000), 50_000, 64),
}


def _line(elements: int) -> Shapes:
    return ((elements // 64, 64),)


def _dense() -> list[Workload]:
    found = []
    for rule in RULES:
        for what, n in DENSE.items():
            if what == "2^27" and rule not in ("nag", "rmsprop", "ftml"):  # they take half a minute each
                continue
            quick = what in ("2^8", "10M")
            found.append(Workload("dense", "step", rule, what, _line(n), quick=quick))
            if what in ("2^8", "2^16", "10M"):
                found += [Workload("dense", "step", rule, what, _line(n), t) for t in ("float64", "bfloat16")]
        n = DENSE["10M"]
        found.append(Workload("dense", "step", rule, "10M", _line(n), "float16"))
        for dtype in ("float16", "bfloat16"):
            found.append(Workload("dense", "step", rule, "10M", _line(n), dtype, masters=True))
    return found


def _many() -> list[Workload]:
    return [
        Workload("many", "step", rule, what, shapes, quick=what == "200 x 256" and rule in ELEMENTWISE)
        for what, shapes in MANY.items()
        for rule in (ELEMENTWISE[:3] if what in MODELS else RULES)
        if not RULES[rule].per_row or all(len(shape) == 2 for shape in shapes)  # rows need matrices
    ]


def _rows() -> list[Workload]:
    found = [
        Workload("rows", "rows", "groupadagrad", what, ((height, width),), rows=rows, quick=not k)
        for k, (what, (rows, height, width)) in enumerate(ROWS.items())
    ]
    turns = Rows(31_250, turns=10)  # every row comes back after ten steps
    return found + [
        Workload("rows", "rows", rule, "a tenth of 312500 x 64 in turn", ((312_500, 64),), rows=turns)
        for rule in ("nag", "adamax", "ftml")
    ]


WORKLOADS = [
    *_dense(),
    *_many(),
    *_rows(),
    *(
        Workload("clip", "clip", rule, what, shapes, quick=what == "10M")
        for what, shapes in (
            ("200 x 256", MANY["200 x 256"]),
            ("10M", _line(TEN_MILLION)),
            ("mix", MANY["mix"]),
        )
        for rule in ("nag", "rmsprop")
    ),
    *(
        Workload("threads", "step", rule, f"10M, {n or 'all'}", _line(TEN_MILLION), threads=n)
        for rule in ("nag", "adamax", "ftml")
        for n in (1, 0)
    ),
    *(
        Workload("checkpoint", kind, "nag", kind, MANY["ResNet-50"], quick=kind == "save")
        for kind in ("save", "load")
    ),
    Workload("startup", "start", "ftml", "warm", ((256,),), quick=True),
    Workload("startup", "start", "ftml", "cold", ((256,),)),
    Workload("startup", "start", "ftml", "warmup, full cache", ((256,),)),
    Workload("startup", "start", "ftml", "warmup, empty cache", ((256,),)),
]

BLOCK = 1 << 20  # elements that are drawn; larger arrays repeat them


def random(shape: tuple[int, ...], dtype: str = "float32", seed: int = 0) -> np.ndarray:
    """Numbers from a normal distribution, the same for everybody who asks."""
    if dtype == "bfloat16":
        import ml_dtypes

        kind = np.dtype(ml_dtypes.bfloat16)
    else:
        kind = np.dtype(dtype)
    size = math.prod(shape)
    drawn = np.random.default_rng(seed).standard_normal(min(size, BLOCK), np.float32).astype(kind)
    return np.resize(drawn, shape)


def arrays(workload: Workload) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """New weights and gradients."""
    weights = [random(shape, workload.dtype, 2 * t) for t, shape in enumerate(workload.shapes)]
    grads = [random(shape, workload.dtype, 2 * t + 1) for t, shape in enumerate(workload.shapes)]
    return weights, grads


def touched(workload: Workload) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each turn's row numbers and their values. They are in order where each comes once."""
    rows, ((height, width),) = workload.rows, workload.shapes
    assert rows is not None
    rng = np.random.default_rng(0)
    if rows.occurrences:
        chances = 1 / np.arange(1, rows.count + 1)
        often = rng.choice(rows.count, rows.occurrences - rows.count, p=chances / chances.sum())
        numbers = [rng.permutation(np.concatenate([np.arange(rows.count), often]))]
    else:
        picked = rng.permutation(height)[: rows.count * rows.turns]
        numbers = [np.sort(part) for part in np.split(picked, rows.turns)]
    return [(part, random((len(part), width), seed=t)) for t, part in enumerate(numbers)]
