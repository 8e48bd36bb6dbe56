"""``python -m tests.ptx.coverage``: which basic blocks of the kernels no test has run, since the last reset.

Each test process notes what it ran in a file of its own, under pytest's cache. Kernels that the tests ran are
counted, each of them for the capabilities that it ran for. ``--reset`` forgets what there is.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from typing import Any

from .library import FOLDER

NOTES = FOLDER.parent / "ptx-coverage"

_ran: dict[str, dict[str, Any]] = {}


def note(covered: dict[Any, set[int]]) -> None:
    """Remember which blocks of programs were run."""
    for program, visited in covered.items():
        name = f"{program.title} for {program.capability[0]}.{program.capability[1]}"
        found = _ran.setdefault(name, {"program": program, "visited": set()})
        found["visited"] |= visited


def save() -> None:
    """Write down what this process has run."""
    if _ran:
        NOTES.mkdir(parents=True, exist_ok=True)
        told = {
            name: {
                "visited": sorted(found["visited"]),
                "blocks": dict(enumerate(map(_shown, found["program"].blocks))),
            }
            for name, found in _ran.items()
        }
        (NOTES / f"{os.getpid()}.json").write_text(json.dumps(told))


def _shown(block: Any) -> str:
    return f"line {block[0].line}, {len(block)} instructions from {block[0].text} on"


def merged() -> dict[str, tuple[set[int], dict[int, str]]]:
    """What all processes have run of each kernel, and what its blocks are."""
    found: dict[str, tuple[set[int], dict[int, str]]] = {}
    for path in sorted(NOTES.glob("*.json")):
        for name, told in json.loads(path.read_text()).items():
            blocks = {int(number): shown for number, shown in told["blocks"].items()}
            visited, _ = found.setdefault(name, (set(), blocks))
            visited |= set(told["visited"])
    return found


def report(found: dict[str, tuple[set[int], dict[int, str]]]) -> str:
    """How much of each kernel was run, and what was not."""
    lines, ran, there = [], 0, 0
    for name, (visited, blocks) in sorted(found.items()):
        ran, there = ran + len(visited), there + len(blocks)
        missing = blocks.keys() - visited
        if missing:
            lines.append(f"{name}: {len(visited)} of {len(blocks)}")
            lines += [f"    {blocks[number]}" for number in sorted(missing)]
    share = 100 * ran / there if there else 0.0
    return "\n".join([*lines, f"{len(found)} kernels: {ran} of {there} basic blocks, {share:.1f}%"])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.ptx.coverage", description=__doc__)
    parser.add_argument("--reset", action="store_true")
    if parser.parse_args().reset:
        shutil.rmtree(NOTES, ignore_errors=True)
    else:
        print(report(merged()))


if __name__ == "__main__":
    main()
