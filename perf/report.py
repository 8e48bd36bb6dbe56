"""How a run is written down: plain values in a file, and Markdown made from that file alone."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .competitors import COMPETITORS
from .goals import judge
from .harness import Result
from .workloads import RULES, SECTIONS, WORKLOADS, Workload

BEGIN, END = "<!-- perf: begin -->", "<!-- perf: end -->"


# -------------------------------------------------------------------- the file


def read(path: Path) -> dict[str, Any]:
    """What has been measured so far."""
    return json.loads(path.read_text()) if path.exists() else {"runs": {}, "results": {}}


def write(path: Path, found: Mapping[str, Any]) -> None:
    """Replace the file, so that an interruption leaves the old one or the new one."""
    text = re.sub(r"\[[^][{}]*\]", lambda numbers: " ".join(numbers[0].split()), json.dumps(found, indent=1))
    part = path.with_suffix(".part")
    part.write_text(text + "\n")
    part.replace(path)


def describe(
    found: dict[str, Any],
    sections: Sequence[str],
    threads: int,
    versions: Mapping[str, str],
    skipped: Mapping[str, str],
) -> None:
    """Note what is about to be measured, where and with what."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes")
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    found |= {
        "machine": cpu(),
        "cores": os.cpu_count(),
        "threads": threads,
        "versions": {"Python": platform.python_version(), "NumPy": np.__version__, **versions},
        "skipped": dict(skipped),
    }
    found["versions"].pop("numpy", None)
    found["runs"] |= {section: {"date": now, "load": load} for section in sections}


def machine_name() -> str:
    """A file name that says which machine it is."""
    return re.sub(r"[^a-z0-9]+", "-", f"{cpu()} {os.cpu_count()} cores".lower()).strip("-")


def cpu() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def results(found: Mapping[str, Any]) -> dict[str, Result]:
    """The results in a file, in the order of the table of workloads."""
    plain = found["results"]
    return {w.name: Result.of(w, plain[w.name]) for w in WORKLOADS if w.name in plain}


# -------------------------------------------------------------------- tables


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """A Markdown table; columns after the first ones are numbers."""
    rule = ["---" if k < left else "---:" for k in range(len(head))]
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)]


def time(seconds: float) -> str:
    """A duration in three digits and a unit."""
    for unit, scale in (("us", 1e6), ("ms", 1e3), ("s", 1.0)):
        if seconds * scale < 1000 or unit == "s":
            break
    return f"{_three(seconds * scale)} {unit}"


def _three(value: float) -> str:
    """Three digits, and never an exponent."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def _number(value: float | None) -> str:
    return "" if value is None else _three(value)


def setting(found: Mapping[str, Any]) -> list[str]:
    """Where, when and with what it was measured."""
    dates = sorted(run["date"][:10] for run in found["runs"].values())
    days = " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else ""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = [f"{found['machine']}, {found['cores']} cores, {found['threads']} threads, {days}: {versions}."]
    if found["skipped"]:
        missing = ", ".join(f"{name} ({why})" for name, why in found["skipped"].items())
        lines += ["", f"Left out: {missing}."]
    return lines


def markdown(found: Mapping[str, Any]) -> str:
    """The whole report."""
    lines = ["# Measurements", "", *setting(found), ""]
    loads = ", ".join(f"{section} {run['load']}" for section, run in found["runs"].items())
    lines += [
        "Competitors take turns, in an order that is shuffled for each round; times are medians over rounds "
        "and, in brackets, between which half of them lie. GB/s counts the bytes that the algorithm must "
        "move. *Of bare* is the speed beside a kernel that moves them and does nothing but one addition, the "
        "median of ratios within a round. A workload that moves less than 4 MB is timed with its data in the "
        f"caches. The machine's load before each section: {loads}.",
        "",
        "## Goals",
        "",
        goals_table(found),
    ]
    known = results(found)
    for section, title in SECTIONS.items():
        own = [result for result in known.values() if result.workload.section == section]
        if own:
            lines += ["", f"## {title}", "", *_details(own)]
    if "cuda" in found:
        lines += ["", "## CUDA", "", found["cuda"]["markdown"]]
    return "\n".join(lines) + "\n"


def goals_table(found: Mapping[str, Any]) -> str:
    """All goals of all issues, the missed ones first and explained."""
    rows = judge(results(found), found.get("cuda", {}).get("goals"))
    missed, met, open_ = ([row for row in rows if row["met"] is met] for met in (False, True, None))
    lines = [
        f"{len(met)} of {len(met) + len(missed)} measured goals are met; {len(open_)} could not be measured. "
        "*At best* compares the fastest samples, which other work on the machine disturbs the least."
    ]
    head = ["issue", "goal", "wanted", "median", "at best"]
    reasons = list(dict.fromkeys(row["why"] for row in missed))
    for title, some in (("Missed", missed), ("Met", met), ("Not measured", open_)):
        if some:
            explained = title == "Missed"
            cells = [_goal(row) + ([str(1 + reasons.index(row["why"]))] if explained else []) for row in some]
            shown = head + (["reason"] if explained else [])
            lines += ["", f"### {title}", "", *table(shown, cells, left=2)]
            if explained:
                lines += ["", "What bounds them, and what was tried:", ""]
                lines += [f"{k}. {reason}" for k, reason in enumerate(reasons, 1)]
    return "\n".join(lines)


def _goal(row: Mapping[str, Any]) -> list[str]:
    sign = "at most" if row["at_most"] else "at least"
    numbers = [_number(row["measured"]), _number(row["best"])]
    return [str(row["issue"]), row["goal"], f"{sign} {row['wanted']:.3g}", *numbers]


def _details(some: Sequence[Result]) -> list[str]:
    """Every competitor of every workload."""
    rows = []
    for result in some:
        title = f"**{label(result.workload)}**"
        for name in result.samples:
            low, high = (time(seconds) for seconds in result.quartiles(name))
            speeds = [_number(result.speed(name)), _number(result.of_bare(name))]
            rows.append([title, name, time(result.median(name)), f"({low} to {high})", *speeds])
            title = ""
        for name, why in result.failed.items():
            rows.append([title, name, f"failed: {why}".replace("|", "/"), "", "", ""])
    return table(["", "", "time", "", "GB/s", "of bare"], rows, left=2)


def label(workload: Workload) -> str:
    """A workload's name without its section."""
    return workload.name.partition("/")[2].replace("/", ", ")


def compared(some: Sequence[Result], titles: Sequence[str]) -> list[str]:
    """Competitors below each other: for each workload, the time and the share of the bare kernel's speed."""
    lines = []
    for competitor in COMPETITORS:
        name = competitor.name
        if any(name in result.samples for result in some):
            lines.append([name, *(_beside_bare(result, name) for result in some)])
    return table(["", *titles], lines)


def _beside_bare(result: Result, name: str) -> str:
    if name not in result.samples:
        return ""
    share = result.of_bare(name)
    part = "" if share is None else f" ({share:.2f})" if share >= 0.01 else " (<0.01)"
    return time(result.median(name)) + part


def into_readme(
    readme: Path, found: Mapping[str, Any], path: Path, pictures: Sequence[tuple[str, Path]]
) -> None:
    """Show the results between two marks of the README."""
    known = results(found)
    lines = [*setting(found), ""]
    lines += [
        "Medians of competitors that take turns; in brackets the speed beside a bare kernel that moves the "
        "same bytes and does nothing else.",
    ]
    groups = {
        "One tensor of 10 million float32": [f"dense/{rule}/10M" for rule in RULES],
        "200 tensors of 256 float32": [f"many/{rule}/200 x 256" for rule in RULES],
        "An embedding table's rows: 31,250 of 312,500 x 64 float32": [
            "rows/groupadagrad/31250 of 312500 x 64"
        ],
        "From an interpreter's start to its end": ["startup/ftml/warm", "startup/ftml/cold"],
    }
    for title, names in groups.items():
        some = [known[name] for name in names if name in known]
        if some:
            titles = [r.workload.what if r.workload.kind == "start" else r.workload.rule for r in some]
            lines += ["", f"{title}:", "", *compared(some, titles)]
    home = readme.parent.resolve()
    for words, picture in pictures:
        lines += ["", f"![{words}]({picture.resolve().relative_to(home).as_posix()})"]
    judged = judge(known, found.get("cuda", {}).get("goals"))
    met, missed = (sum(row["met"] is met for row in judged) for met in (True, False))
    full = path.with_suffix(".md").resolve().relative_to(home).as_posix()
    lines += [
        "",
        f"[All measurements]({full}), with the goals that were set: {met} met, {missed} missed, and why.",
    ]
    text = readme.read_text()
    before, mark, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (mark and end):
        raise ValueError(f"{readme} must have the marks {BEGIN} and {END}")
    readme.write_text("\n".join([before + mark, *lines, end + after]))
