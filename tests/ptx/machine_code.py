"""What barriers keep apart in PTX, and in the machine code that NVIDIA's assembler makes of it.

PTX is given line numbers, which the assembler hands on, and which change nothing in the machine code. So
each access and each barrier there is known to be that of a line of PTX; where code was copied, copies have
that line too.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from .library import ptx
from .parsing import Kernel

BARRIER = "barrier"
# What becomes of an instruction; a barrier is NOP where the assembler knows that a warp is together.
NAMES = {BARRIER: ("WARPSYNC", "BAR", "NOP"), "ld": ("LD", "LDG", "LDS"), "st": ("ST", "STG", "STS")}

_CODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?(\S+)\s*(.*?)\s*;")
_LABEL = re.compile(r"(\.L_x_\d+):")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")


class Step(NamedTuple):
    """An instruction: what it does to memory, if anything, its line of PTX, and which ones may come next."""

    kind: str  # as "ld.global"
    line: int
    following: tuple[int, ...]
    guarded: bool = False


def of_text(text: str) -> list[Step]:
    """The instructions of some PTX."""
    kernel, steps = Kernel(text), []
    for k, one in enumerate(kernel.instructions):
        following: tuple[int, ...] = (k + 1,)
        if one.operation == "ret":
            following = ()
        elif one.operation == "bra":
            following = (kernel.starts[kernel.labels[one.args[0]]], *((k + 1,) if one.guard else ()))
        access = re.match(r"(ld|st)\.(global|shared)\b", one.form)
        kind = access[0] if access else BARRIER if one.form in ("bar.sync", "bar.warp.sync") else ""
        steps.append(Step(kind, one.line, following))
    return steps


def of_machine_code(text: str, capability: tuple[int, int], folder: Path) -> list[Step]:
    """The instructions that the assembler makes of some PTX."""
    source, binary = folder / "kernel.ptx", folder / "kernel.cubin"
    source.write_text(_numbered(text))
    arch = f"-arch=sm_{capability[0]}{capability[1]}"
    ptx.run(ptx.tool("ptxas"), "-lineinfo", arch, str(source), "-o", str(binary))
    kinds = {step.line: step.kind for step in of_text(text)}
    return _parsed(ptx.run(ptx.tool("nvdisasm"), "-g", "-c", str(binary)), kinds)


def _numbered(text: str) -> str:
    """PTX in which each instruction says in which line it is."""
    lines = text.splitlines()
    for one in Kernel(text).instructions:
        at = one.line - 1
        if ".loc" not in lines[at]:
            lines[at] = f".loc 1 {one.line} 0\n{lines[at]}"
    return "\n".join([*lines, '.file 1 "kernel"', ""])


def _parsed(listing: str, kinds: dict[int, str]) -> list[Step]:
    """A disassembler's listing. `kinds` says what the lines of the PTX do to memory."""
    labels: dict[str, int] = {}
    found: list[tuple[int, Any]] = []
    line = 0
    for row in map(str.strip, listing.splitlines()):
        if mark := re.search(r'File "kernel", line (\d+)', row):
            line = int(mark[1])
        elif mark := _LABEL.match(row):
            labels[mark[1]] = len(found)
        elif mark := _CODE.match(row):
            found.append((line, mark))
    steps = []
    for k, (line, (guard, operation, rest)) in enumerate((line, mark.groups()) for line, mark in found):
        name, kind = operation.split(".")[0], kinds.get(line, "")
        if name not in NAMES.get(kind[:2], NAMES[BARRIER]):
            kind = ""
        following: Any = [k + 1] if k + 1 < len(found) else []
        if name in ("BRA", "JMP"):
            target = _TARGET.search(rest)
            assert target, rest
            sometimes = guard or not rest.startswith("`")  # a second condition comes before the target
            following = [labels[target[1]], *(following if sometimes else [])]
        elif name in ("EXIT", "RET"):
            following = following if guard else []
        assert name not in ("BRX", "JMX", "BRXU", "JMXU"), operation  # to where, nobody knows
        steps.append(Step(kind, line, tuple(following), bool(guard)))
    return steps


def kept_apart(text: str, steps: list[Step]) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """Which accesses a barrier keeps apart in PTX, as pairs of lines, and which of them not in machine code.

    A barrier keeps two accesses apart if it is on every way from the first to the second. Loads alone need
    no order. What machine code does under a condition may exclude other such things, and is not compared with
    them.
    """
    written = of_text(text)
    kinds = {step.line: step.kind for step in written}
    there = {step.line for step in steps if step.kind}
    apart = {
        (a, b)
        for a, b in _pairs(written, False) - _pairs(written, True)
        if {a, b} <= there and kinds[a][2:] == kinds[b][2:] and "st" in (kinds[a][:2], kinds[b][:2])
    }
    return apart, apart & _pairs(steps, True)


def _pairs(steps: list[Step], stopped: bool) -> set[tuple[int, int]]:
    """Accesses that lead to each other: on ways without barriers if these stop them, on any way else."""
    ahead: list[set[tuple[int, bool]]] = [set() for _ in steps]
    before: list[list[int]] = [[] for _ in steps]
    for k, step in enumerate(steps):
        for after in step.following:
            before[after].append(k)
    todo = [*range(len(steps))]
    while todo:
        k = todo.pop()
        kind, line, _, guarded = steps[k]
        here = ahead[k]
        if kind == BARRIER:
            here = set() if stopped else here
        elif kind:
            here = here | {(line, guarded)}
        for earlier in before[k]:
            if not here <= ahead[earlier]:
                ahead[earlier] |= here
                todo.append(earlier)
    return {
        (step.line, line)
        for step, later in zip(steps, ahead, strict=True)
        if step.kind not in ("", BARRIER)
        for line, guarded in later
        if not (guarded and step.guarded)
    }
