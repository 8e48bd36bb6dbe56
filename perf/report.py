"""How a run is written down: plain values for JSON, and the same as Markdown tables."""

from __future__ import annotations

import datetime
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .competitors import Table
from .goals import judge
from .harness import Result
from .workloads import GROUPS


def report(results: Mapping[str, Result], table: Table, threads: int, load: float) -> dict[str, Any]:
    """Everything that is known of a run. `load` is the machine's when it began."""
    return {
        "machine": cpu(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_before": load,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "numpy": np.__version__, **table.versions},
        "skipped": table.skipped,
        "goals": judge(results),
        "results": [result.summary() for result in results.values()],
    }


def file_name(found: Mapping[str, Any]) -> str:
    """A file name that says which machine it was."""
    return re.sub(r"[^a-z0-9]+", "-", f"{found['machine']} {found['cores']} cores".lower()).strip("-")


def cpu() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def markdown(found: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = [
        f"{found['machine']}, {found['cores']} cores, {found['threads']} threads, {found['date']}, "
        f"load before the run {found['load_before']:.1f}.",
        f"{versions}.",
        "",
        "Medians over rounds in which every competitor took a turn. GB/s counts the bytes that the algorithm"
        " must move; *of bare* compares with a kernel that does nothing but move them (1 is its speed).",
        *("" for _ in range(bool(found["skipped"]))),
        *(f"Left out: {name} ({reason})." for name, reason in found["skipped"].items()),
    ]
    lines += _goals(found["goals"])
    for group, (words, _) in GROUPS.items():
        rows = [one for one in found["results"] if one["workload"].split("/")[0] == group]
        if rows:
            lines += _group(f"{words} (`{group}`)", rows)
    return "\n".join(lines) + "\n"


def _goals(goals: list[dict[str, Any]]) -> list[str]:
    lines = ["", "## Goals", "", "*At best* compares the fastest samples, for when the machine was busy.", ""]
    lines += ["| issue | goal | median ratio | at best | |", "|---|---|---:|---:|---|"]
    for goal in goals:
        verdict = "met" if goal["met"] else "**missed**"
        numbers = f"{goal['measured']:.2f} | {goal['best']:.2f}"
        lines.append(f"| {goal['issue']} | {goal['goal']} | {numbers} | {verdict} |")
    return lines if goals else []


def _group(title: str, results: list[dict[str, Any]]) -> list[str]:
    lines = ["", f"## {title}", ""]
    lines += ["| | | median | min | p25 to p75 | GB/s | of bare |", "|---|---|---:|---:|---:|---:|---:|"]
    for result in results:
        title = result["workload"].split("/")[1]
        for row in result["rows"]:
            scale, unit = (1e3, "ms") if row["median_s"] >= 1e-3 else (1e6, "us")
            median, least, low, high = (row[key] * scale for key in ("median_s", "min_s", "p25_s", "p75_s"))
            lines.append(
                f"| {title} | {row['competitor']} | {median:.2f} {unit} | {least:.2f} |"
                f" {low:.2f} to {high:.2f} |"
                f" {row['gb_per_s']:.2f} | {row['of_bare']:.2f} |"
            )
            title = ""
    return lines
