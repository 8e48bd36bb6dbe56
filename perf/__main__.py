"""``python -m perf``: run the benchmarks, print the tables, keep them under ``perf/results``."""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import os
import sys
from pathlib import Path

from . import harness, report
from .competitors import table
from .workloads import WORKLOADS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m perf", description=__doc__)
    parser.add_argument("--only", metavar="PATTERN", default="*", help="workloads, such as 'dense/*'")
    parser.add_argument("--quick", action="store_true", help="few rounds, for a first look")
    parser.add_argument(
        "--json", metavar="FILE", type=Path, help="where the results go, also of partial runs"
    )
    parser.add_argument("--mxnet", metavar="PYTHON", default=os.environ.get("NUMBA_OPT_MXNET"))
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    args = parser.parse_args()

    chosen = [workload for workload in WORKLOADS if fnmatch.fnmatch(workload.name, args.only)]
    if not chosen:
        parser.error(f"--only {args.only!r} fits none of {', '.join(w.name for w in WORKLOADS)}")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan
    competitors = table(args.mxnet, args.threads)
    results = {}
    for workload in chosen:
        print(f"{workload.name} ...", file=sys.stderr)
        effort = harness.QUICK if args.quick else harness.FULL
        results[workload.name] = harness.measure(workload, competitors.competitors, effort)
    found = report.report(results, competitors, args.threads, load)
    text = report.markdown(found)
    print(text)
    file = args.json
    if file is None and not args.quick and chosen == WORKLOADS:
        file = Path(__file__).parent / "results" / f"{report.file_name(found)}.json"
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=1) + "\n")
        file.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
