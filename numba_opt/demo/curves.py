"""A picture of loss curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

# Okabe and Ito's colours, for all kinds of colour vision; the dashes also serve on a grey printer.
STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#0072B2", "linestyle": "-"},
    {"color": "#D55E00", "linestyle": (0, (6, 1.5))},
    {"color": "#000000", "linestyle": (0, (1, 1))},
    {"color": "#009E73", "linestyle": (0, (6, 1.5, 1, 1.5))},
    {"color": "#AA4499", "linestyle": (0, (2.5, 1))},
)
TEXT = "#333333"


def plot(losses: Mapping[str, Sequence[float]], path: Path) -> None:
    """Save loss curves as a PNG, each labelled at its end.

    Parameters
    ----------
    losses : mapping of str to sequence of float
        The losses after 0, 1, ... epochs, by the optimizers' names; as many as there are `STYLES`.
    path : Path
        The file.
    """
    figure = Figure(figsize=(7, 4.2), dpi=160, layout="constrained")  # not pyplot's: needs no display
    axes = figure.add_subplot(yscale="log")
    styles = dict(zip(losses, STYLES, strict=True))
    for name, curve in losses.items():
        axes.plot(curve, linewidth=1.8, **styles[name])
    heights = spread({name: curve[-1] for name, curve in losses.items()}, *axes.get_ylim())
    for name, height in heights.items():
        axes.annotate(
            name,
            xy=(1, losses[name][-1]),
            xycoords=axes.get_yaxis_transform(),
            xytext=(1.06, height),
            textcoords=axes.transAxes,
            va="center",
            color=styles[name]["color"],
            arrowprops={"arrowstyle": "-", "relpos": (0, 0.5), "shrinkA": 2, "shrinkB": 0, **styles[name]},
        )
    axes.margins(x=0)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_title("Handwritten digits: loss on the training images", loc="left", fontsize=11, color=TEXT)
    axes.set_xlabel("epoch", color=TEXT)
    axes.set_ylabel("cross-entropy", color=TEXT)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axes.tick_params(which="both", color="#999999", labelcolor=TEXT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    figure.savefig(path)


def spread(ends: Mapping[str, float], bottom: float, top: float, gap: float = 0.055) -> dict[str, float]:
    """Heights of labels, as fractions of a logarithmic axis: near their lines' ends, and apart."""
    heights: dict[str, float] = {}
    below = -math.inf
    for name, end in sorted(ends.items(), key=lambda item: item[1]):
        below = heights[name] = max(math.log(end / bottom) / math.log(top / bottom), below + gap)
    return heights
