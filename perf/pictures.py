"""The pictures of a run: one look for all, readable in print and with any kind of colour vision."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from numba_opt.demo.curves import TEXT

from .competitors import (
    ADAGRAD,
    BARE_PARALLEL,
    BARE_SERIAL,
    CSR,
    FBGEMM,
    FRONT,
    JAX,
    MXNET,
    NUMPY,
    SPARSE,
    STEP,
    TORCH_FOREACH,
    TORCH_FUSED,
    TORCH_LOOP,
    TRAINER,
)
from .harness import Result
from .report import results
from .workloads import ELEMENTWISE, MANY, ROWS, RULES

# Okabe and Ito's colours; each competitor has a marker of its own, too.
STYLES: dict[str, dict[str, Any]] = {
    BARE_PARALLEL: {"color": "#999999", "marker": "|", "linestyle": "-"},
    BARE_SERIAL: {"color": "#999999", "marker": "", "linestyle": (0, (1, 1))},
    TRAINER: {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    SPARSE: {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    CSR: {"color": "#0072B2", "marker": "p", "linestyle": (0, (6, 1.5))},
    FRONT: {"color": "#56B4E9", "marker": "P", "linestyle": "-"},
    STEP: {"color": "#56B4E9", "marker": "x", "linestyle": (0, (2.5, 1))},
    TORCH_FUSED: {"color": "#D55E00", "marker": "s", "linestyle": "-"},
    TORCH_FOREACH: {"color": "#D55E00", "marker": "D", "linestyle": (0, (6, 1.5))},
    TORCH_LOOP: {"color": "#D55E00", "marker": "^", "linestyle": (0, (2.5, 1))},
    ADAGRAD: {"color": "#D55E00", "marker": "^", "linestyle": (0, (2.5, 1))},
    FBGEMM: {"color": "#CC79A7", "marker": "h", "linestyle": (0, (6, 1.5, 1, 1.5))},
    JAX: {"color": "#009E73", "marker": "v", "linestyle": (0, (6, 1.5, 1, 1.5))},
    MXNET: {"color": "#E69F00", "marker": "<", "linestyle": (0, (6, 1.5))},
    NUMPY: {"color": "#000000", "marker": "*", "linestyle": (0, (1, 1))},
}


def draw(found: Mapping[str, Any], stem: Path) -> list[tuple[str, Path]]:
    """Draw what has been measured, beside the file; what each picture shows, and where it is."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return []
    known = results(found)
    drawn = []
    for name, words, function in (
        ("dense", "Speed of one tensor's update, by its size", _dense),
        ("many", "Time of a step on many tensors, beside the bare kernel's", _many),
        ("rows", "Time of a sparse step, beside the bare kernel's", _rows),
    ):
        figure = function(known, words)
        if figure is not None:
            path = stem.with_name(f"{stem.name}-{name}.svg")
            figure.savefig(path, metadata={"Date": None})
            drawn.append((words, path))
    return drawn


def _panels(count: int, columns: int, size: tuple[float, float], title: str) -> tuple[Any, list[Any]]:
    """A figure of panels that share their axes."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "numba_opt"
    lines = -(-count // columns)
    width, height = size[0] * min(count, columns) + 0.6, size[1] * lines + 1.2
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(lines, min(count, columns), sharex=True, sharey=True, squeeze=False).ravel()
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=TEXT)
    for axes in panels:
        axes.grid(which="major", color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(which="both", color="#999999", labelcolor=TEXT, labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#999999")
    return figure, list(panels)


def _legend(figure: Any, panels: Sequence[Any], below: str) -> None:
    """One for all panels, below what their horizontal axes say."""
    for axes in panels:
        if axes.get_subplotspec().is_last_row():
            axes.set_xlabel(below, fontsize=9, color=TEXT)
    handles: dict[str, Any] = {}
    for axes in panels:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=int(figure.get_figwidth() / 1.8),
        frameon=False,
        fontsize=8,
        labelcolor=TEXT,
    )


def _dense(known: Mapping[str, Result], title: str) -> Any:
    """GB/s over elements, float32: a panel for each rule, a line for each competitor."""
    found = {
        rule: [
            result
            for result in known.values()
            if result.workload.section == "dense"
            and result.workload.rule == rule
            and result.workload.dtype == "float32"
        ]
        for rule in RULES
    }
    found = {rule: some for rule, some in found.items() if some}
    if not found:
        return None
    figure, panels = _panels(len(found), 3, (3.1, 2.4), title)
    for axes, (rule, some) in zip(panels, found.items(), strict=False):
        axes.set(xscale="log", yscale="log")
        axes.set_title(rule, loc="left", fontsize=10, color=TEXT)
        for name, style in STYLES.items():
            points = [(r.workload.elements, r.speed(name)) for r in some if name in r.samples]
            if points:
                axes.plot(*zip(*points, strict=True), label=name, linewidth=1.4, markersize=5, **style)
    figure.supylabel("GB/s of the bytes that must be moved", fontsize=9, color=TEXT)
    _legend(figure, panels, "elements")
    return figure


def _many(known: Mapping[str, Result], title: str) -> Any:
    named: dict[str, Callable[[str], str]] = {
        rule: lambda what, rule=rule: f"many/{rule}/{what}" for rule in ELEMENTWISE
    }
    return _dots(known, title, list(MANY), named)


def _rows(known: Mapping[str, Result], title: str) -> Any:
    return _dots(known, title, list(ROWS), {"groupadagrad": lambda what: f"rows/groupadagrad/{what}"})


def _dots(
    known: Mapping[str, Result], title: str, whats: Sequence[str], named: Mapping[str, Callable[[str], str]]
) -> Any:
    """Times over the bare kernel's: a panel for each rule, a line of dots for each workload."""
    shown = [what for what in whats if any(name(what) in known for name in named.values())]
    if not shown:
        return None
    figure, panels = _panels(len(named), 2, (4.6 if len(named) > 1 else 8.0, 0.6 + 0.3 * len(shown)), title)
    for axes, (rule, name) in zip(panels, named.items(), strict=True):
        axes.set(xscale="log")
        axes.set_title(rule, loc="left", fontsize=10, color=TEXT)
        axes.axvline(1, color="#999999", linewidth=1.2)
        for competitor, style in STYLES.items():
            if competitor in (BARE_SERIAL, BARE_PARALLEL):
                continue
            points = []
            for height, what in enumerate(shown):
                result = known.get(name(what))
                share = result.of_bare(competitor) if result and competitor in result.samples else None
                if share:
                    points.append((1 / share, height))
            if points:
                look = {key: style[key] for key in ("color", "marker")}
                axes.plot(*zip(*points, strict=True), label=competitor, linestyle="", markersize=6, **look)
        axes.set_yticks(range(len(shown)), shown)
        axes.set_ylim(len(shown) - 0.5, -0.5)
    _legend(figure, panels, "times as long as the bare kernel")
    return figure
