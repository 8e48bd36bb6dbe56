"""``python -m perf.ptx``: what the CUDA kernels are made of, with no GPU, as a table under ``perf/results``.

Kernels are compiled to PTX for some compute capabilities and, where NVIDIA's assembler is at hand (packages
nvidia-cuda-nvcc and nvidia-cuda-nvdisasm), to machine code.
"""

from __future__ import annotations

import argparse
import datetime
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

CAPABILITIES = ((7, 5), (8, 0), (9, 0), (10, 0))


class Counts(NamedTuple):
    """What a kernel's PTX has, and what the assembler says of it (-1 where there is none)."""

    double: int  # mentions of float64
    contracted: int  # products and sums in one rounding
    calls: int
    local: int  # mentions of memory that registers do not suffice for
    generic: int  # accesses that find out at run time what memory they are in
    loads: int  # of 16 bytes
    stores: int
    single_loads: int  # of one element
    single_stores: int
    registers: int = -1
    spilled: int = -1
    instructions: int = -1


def count(text: str, arch: str) -> Counts:
    """What there is in the PTX of a kernel, and in its machine code."""
    body = text[text.index(".entry") :]
    found = Counts(
        double=len(re.findall(r"\.f64", body)),
        contracted=len(re.findall(r"\bfma\.", body)),
        calls=len(re.findall(r"\bcall\b", body)),
        local=len(re.findall(r"\.local\b", body)),
        generic=len(re.findall(r"\b(?:ld|st)\.(?:v\d\.)?[a-z]\d+\s", body)),
        loads=_wide(body, "ld"),
        stores=_wide(body, "st"),
        single_loads=len(re.findall(r"\bld\.global\.[fbu](?:16|32|64)\s", body)),
        single_stores=len(re.findall(r"\bst\.global\.[fbu](?:16|32|64)\s", body)),
    )
    return assembled(text, arch, found) if tool("ptxas") else found


def _wide(body: str, what: str) -> int:
    """How many accesses of 16 bytes."""
    found = re.findall(rf"\b{what}\.global\.v(\d)\.[a-z](\d+)", body)
    return sum(int(numbers) * int(bits) == 128 for numbers, bits in found)


def assembled(text: str, arch: str, found: Counts) -> Counts:
    """The same with what the assembler says."""
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(text)
        told = run(tool("ptxas"), "-v", f"-arch={arch}", str(source), "-o", str(binary))
        spilled = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", told)
        registers = re.search(r"Used (\d+) registers", told)
        assert spilled
        assert registers
        found = found._replace(
            registers=int(registers[1]), spilled=sum(int(number) for number in spilled.groups())
        )
        if tool("nvdisasm"):
            code = run(tool("nvdisasm"), "-c", str(binary))
            found = found._replace(instructions=len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/", code, re.M)))
    return found


def run(*command: str | None) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout + done.stderr


@cache
def tool(name: str) -> str | None:
    """Where a tool of the CUDA toolkit is: among the installed packages, or on the path."""
    for folder in sys.path:
        for place in ("cu13/bin", "cuda_nvcc/bin"):
            path = Path(folder, "nvidia", place, name)
            if path.is_file():
                return str(path)
    return shutil.which(name)


def shown_as(argument: Any) -> str:
    """What a kernel is made for, in a word or a few."""
    if hasattr(argument, "function"):  # a rule
        return str(argument.function.__name__)
    return str(getattr(argument, "text", argument))


def kernels() -> Iterator[tuple[str, Any, Any]]:
    """What there is to tell: a name, a kernel, and compute capabilities.

    All kernels of float32 for 9.0, the dense ones for the others too, and the dense ones of other dtypes; of
    three optimizers also those for sparse gradients that mean all rows.
    """
    import numba_opt
    from numba_opt.cuda import kernels as loops
    from numba_opt.tools.wanted import cuda_kernels, variants

    every = variants(None)
    single = [*cuda_kernels(every, ["f32"], sparse=True)]
    others = [*cuda_kernels(every, ["f64", "f16", "bf16"], sparse=False)]
    modes = [
        kernel
        for cls in (numba_opt.NAG, numba_opt.FTML, numba_opt.GroupAdaGrad)
        for mode in ("dense", "exact")
        for kernel in cuda_kernels(variants(cls(sparse_update=mode)), ["f32"], sparse=True)
    ]
    for name, *args in dict.fromkeys([*single, *others, *modes]):
        shown = " ".join((name, *map(shown_as, args)))
        wide = name == "dense" and (name, *args) in single
        yield shown, getattr(loops, name)(*args), CAPABILITIES if wide else [(9, 0)]


def table(chosen: Any = None) -> str:
    """The report, in Markdown."""
    from importlib.metadata import version

    from numba_opt.cuda import code as cuda_code

    lines = [
        f"numba-cuda {version('numba-cuda')}, {datetime.date.today().isoformat()}. "
        "Compiled with no GPU; not a measurement. Wide accesses are those of 16 bytes.",
        "",
        "| kernel | cc | float64 | calls | local | wide loads | wide stores | registers | spilled | SASS |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, kernel, capabilities in kernels():
        for capability in chosen or capabilities:
            major, minor = capability
            found = count(cuda_code.ptx(kernel, capability), f"sm_{major}{minor}")
            numbers = (found.double, found.calls, found.local, found.loads, found.stores)
            told = (found.registers, found.spilled, found.instructions)
            cells = [name, f"{major}.{minor}", *numbers, *("" if n < 0 else n for n in told)]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
            print(lines[-1], file=sys.stderr)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m perf.ptx", description=__doc__)
    parser.add_argument("--capability", metavar="X.Y", action="append", help="by default, see `kernels`")
    args = parser.parse_args()
    text = table([tuple(map(int, c.split("."))) for c in args.capability or ()])
    print(text)
    if not args.capability:
        path = Path(__file__).parent / "results" / "ptx.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
