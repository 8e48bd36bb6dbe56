"""Measure, compare with the goals, and write it all down.

Sections: dense, many, rows, clip, threads, checkpoint, startup, cuda; all of them if none is named. Results
are merged into one file for each machine, after each workload, so a run can be interrupted and continued
with --missing.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
import time
import warnings
from pathlib import Path

from . import harness, pictures, report
from .competitors import installed
from .workloads import SECTIONS, WORKLOADS

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m perf", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help="what to measure")
    parser.add_argument("--only", metavar="PATTERN", default="*", help="workloads, such as 'dense/nag/*'")
    parser.add_argument("--quick", action="store_true", help="fewer workloads and rounds, for a first look")
    parser.add_argument("--missing", action="store_true", help="only what the file does not have yet")
    parser.add_argument("--report", action="store_true", help="measure nothing, write the reports anew")
    parser.add_argument("--readme", action="store_true", help="show the results in README.md, too")
    parser.add_argument(
        "--out", metavar="FILE", type=Path, help="the file, perf/results/MACHINE.json by default"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    known = [*SECTIONS, "cuda"]
    if unknown := set(args.sections) - set(known):
        parser.error(f"no section is called {min(unknown)!r}; there are {', '.join(known)}")
    name = report.machine_name() + ("-quick" if args.quick else "")
    path = args.out or RESULTS / f"{name}.json"
    if not args.report:
        _measure(args, args.sections or known, path)
    found = report.read(path)
    text = report.markdown(found)
    path.with_suffix(".md").write_text(text)
    shown = pictures.draw(found, path.with_suffix(""))
    print(report.goals_table(found).partition("### Not measured")[0])
    print(f"all tables: {path.with_suffix('.md')}", file=sys.stderr)
    if args.readme:
        report.into_readme(README, found, path, shown)


def _measure(args: argparse.Namespace, sections: list[str], path: Path) -> None:
    """Measure what is asked for, into a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = report.read(path)
    chosen = [
        workload._replace(threads=workload.threads or args.threads)
        for workload in WORKLOADS
        if workload.section in sections
        and fnmatch.fnmatch(workload.name, args.only)
        and (workload.quick or not args.quick)
        and not (args.missing and workload.name in found["results"])
        and workload.threads <= args.threads
    ]
    effort = harness.QUICK if args.quick else harness.FULL
    competitors, skipped, versions = installed()
    for name, why in skipped.items():
        print(f"left out: {name} ({why})", file=sys.stderr)
    warnings.simplefilter("ignore")
    report.describe(found, sections, args.threads, versions, skipped)
    left = sum(harness.expected(workload, effort) for workload in chosen)
    print(f"{len(chosen)} workloads, about {left / 60:.1f} minutes", file=sys.stderr)
    for k, workload in enumerate(chosen, 1):
        start = time.perf_counter()
        result = harness.measure(workload, competitors, effort)
        found["results"][workload.name] = result.plain()
        report.write(path, found)
        left -= harness.expected(workload, effort)
        seconds = time.perf_counter() - start
        progress = f"[{k}/{len(chosen)}] {workload.name}: {len(result.samples)} competitors, {seconds:.1f} s"
        print(f"{progress}; about {left / 60:.1f} minutes left", file=sys.stderr)
    if "cuda" in sections:
        _cuda(found, path, args.quick)


def _cuda(found: dict, path: Path, quick: bool) -> None:
    """The slot for `perf.gpu`, where that is and there is a GPU: its tables come as Markdown."""
    try:
        from . import gpu

        found["cuda"] = gpu.measure(quick)
    except ImportError as error:
        print(f"left out: cuda ({error})", file=sys.stderr)
        return
    report.write(path, found)


if __name__ == "__main__":
    main()
