"""The table of workloads: which optimizer updates which tensors, and how many bytes that must move.

Also read by the MXNet worker, in an interpreter of its own: standard library and NumPy only.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

Shapes = tuple[tuple[int, ...], ...]

ITEM = 4  # bytes of a float32
DENSE = ((156_250, 64),)  # 10,000,000 elements


class Rule(NamedTuple):
    """An optimizer as all competitors are asked for it. Names and options are MXNet's."""

    optimizer: str
    options: dict[str, Any]
    states: int  # arrays of state beside each weight
    per_row: bool = False  # a state holds one number for each row


class Workload(NamedTuple):
    """One optimizer at work on one list of tensors."""

    group: str
    rule: str
    shapes: Shapes

    @property
    def name(self) -> str:
        return f"{self.group}/{self.rule}"

    @property
    def elements(self) -> int:
        return sum(map(math.prod, self.shapes))

    @property
    def bytes(self) -> int:
        """What a step must move: gradients read, weights and states read and written."""
        rule = RULES[self.rule]
        held = sum(shape[0] for shape in self.shapes) if rule.per_row else self.elements
        return ITEM * (3 * self.elements + 2 * rule.states * held)


RULES = {
    "nag": Rule("nag", {"learning_rate": 0.01, "momentum": 0.9}, 1),
    "rmsprop": Rule("rmsprop", {"learning_rate": 0.001}, 1),
    "rmsprop-centered": Rule("rmsprop", {"learning_rate": 0.001, "centered": True}, 3),
    "adamax": Rule("adamax", {"learning_rate": 0.002}, 2),
    "ftml": Rule("ftml", {"learning_rate": 0.0025}, 3),
    "groupadagrad": Rule("groupadagrad", {"learning_rate": 0.01}, 1, per_row=True),
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


# What a group's tensors are, in words for the reports.
GROUPS: dict[str, tuple[str, Shapes]] = {
    "dense": ("One tensor of 10,000,000 elements", DENSE),
    "many": ("1,000 tensors of 10,000 elements", ((100, 100),) * 1000),
    "mix": ("The parameters of a small transformer", _transformer(256, 8, 14_000, 512)),
    "small": ("200 tensors of 256 elements", ((4, 64),) * 200),
    "single": ("One tensor of 256 elements", ((4, 64),)),
}

WORKLOADS = [
    Workload(group, rule, shapes)
    for group, (_, shapes) in GROUPS.items()
    for rule in RULES
    if not RULES[rule].per_row or all(len(shape) == 2 for shape in shapes)  # rows need matrices
]


def arrays(shapes: Shapes, seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """New weights and gradients, the same for everybody who asks."""
    rng = np.random.default_rng(seed)
    weights = [rng.standard_normal(shape, np.float32) for shape in shapes]
    grads = [rng.standard_normal(shape, np.float32) for shape in shapes]
    return weights, grads
