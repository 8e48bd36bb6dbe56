"""PTX, taken apart: a kernel's parameters, registers, shared memory and basic blocks."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

from .faults import UnknownFormError

TYPES = {
    **{f"{kind}{bits}": np.dtype(f"u{bits // 8}") for kind in "ub" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"f{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
    "pred": np.dtype("?"),
}

# At these, threads wait for others of their warp or block.
MEETINGS = ("bar", "shfl", "vote")

_DIRECTIVES = re.compile(r"\.(version|target|address_size|common|visible|extern|pragma|shared)\b")
_GUARDED = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.]*)\s*(.*)")
_ARGUMENT = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")
_REGISTERS = re.compile(r"\.reg \.(\w+)\s+(%\w+?)<(\d+)>")
_SHARED = re.compile(r"\.shared \.align (\d+) \.(\w+) (\w+)\[(\d+)\]")


class Instruction(NamedTuple):
    """One instruction."""

    form: str  # as "ld.global.v4.f32"
    operation: str  # as "ld"
    args: tuple[str, ...]
    guard: tuple[str, bool] | None  # a predicate's register, and whether that must be false
    line: int  # of the text
    text: str


class Kernel:
    """A kernel's text, taken apart.

    Raises
    ------
    UnknownFormError
        There is something in it that is neither an instruction nor known to mean nothing.
    """

    def __init__(self, text: str) -> None:
        before, body = text.split(".visible .entry", 1)
        head, body = body.split("{", 1)
        for line in before.splitlines():
            if line.strip() and not line.strip().startswith("//") and not _DIRECTIVES.match(line.strip()):
                raise UnknownFormError(line)
        self.name = head[: head.index("(")].strip()
        self.params = re.findall(r"\.param \.(\w+) (\w+)", head)
        self.shared, self.shared_size = _shared(text)
        self.registers: dict[str, np.dtype] = {}
        self.instructions: list[Instruction] = []
        self._labels: dict[str, int] = {}
        for number, line in enumerate(body.splitlines(), before.count("\n") + head.count("\n") + 1):
            for part in re.findall(r"[$\w]+:|[^;]+;|[{}]$", line.split("//")[0].strip()):
                self._take(part.strip().rstrip(";").strip(), number)
        self._cut()

    def _take(self, part: str, number: int) -> None:
        if part == "}" or part.startswith(".pragma"):
            return
        if part.endswith(":"):
            self._labels[part[:-1]] = len(self.instructions)
        elif found := _REGISTERS.fullmatch(part):
            for k in range(int(found[3])):
                self.registers[f"{found[2]}{k}"] = TYPES[found[1]]
        elif found := _GUARDED.fullmatch(part):
            guard = (found[2], bool(found[1])) if found[2] else None
            args = tuple(arg.strip() for arg in _ARGUMENT.findall(found[4]))
            self.instructions.append(Instruction(found[3], found[3].split(".")[0], args, guard, number, part))
        else:
            raise UnknownFormError(part)

    def _cut(self) -> None:
        """Blocks begin at labels, after branches, and around what threads wait at."""
        starts = {0, *self._labels.values()}
        for k, instruction in enumerate(self.instructions):
            if instruction.operation in ("bra", "ret"):
                starts.add(k + 1)
            elif instruction.operation in MEETINGS:
                starts |= {k, k + 1}
        self.starts = sorted(start for start in starts if start < len(self.instructions))
        ends = [*self.starts[1:], len(self.instructions)]
        self.blocks = [self.instructions[a:b] for a, b in zip(self.starts, ends, strict=True)]
        block_at = {start: block for block, start in enumerate(self.starts)}
        self.labels = {name: block_at[k] for name, k in self._labels.items() if k in block_at}

    def names_in(self, arg: str) -> list[str]:
        """The registers that an argument mentions."""
        return [name for name in re.findall(r"%\w+", arg) if name in self.registers]


def _shared(text: str) -> tuple[dict[str, int], int]:
    """Where in a block's shared memory each of its arrays begins, and how much there is."""
    places, size = {}, 0
    for align, kind, name, count in _SHARED.findall(text):
        size += -size % max(int(align), 16)
        places[name] = size
        size += int(count) * TYPES[kind].itemsize
    return places, size + -size % 16
