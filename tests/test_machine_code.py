"""What the compiler makes of the loops, for the processor that is here and for others: packed instructions.

Kernels are compiled and read, never run, so they may be made for processors that are not here. How a loop is
built shows in LLVM's own language, which is the same for all of them; which instructions there are for it,
in the assembler's.
"""

from __future__ import annotations

import functools
import os
import platform
import re

import pytest

from . import table
from .scripts import result

X86 = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="reads x86-64 instructions"
)

# Each layout's conversions, as operations that must be done for several elements at once.
HALF, BFLOAT = "fpext fptrunc", "shl lshr add"
LAYOUTS = {
    "adamax f16 f16 f16 f16": HALF,
    "adamax bf16 bf16 bf16 bf16": BFLOAT,
    "nag f16 f32 f32 f16": HALF,  # with a float32 copy
    "nag bf16 f32 f32 bf16": BFLOAT,
    "ftml f32 f32 bf16 bf16 bf16": f"{BFLOAT} fdiv sqrt",  # state_dtype
    "ftml f32 f32 f16 f16 f16": f"{HALF} fdiv sqrt",
    "rmsprop f32 f32 bf16:sr": "shl lshr mul fdiv sqrt",  # stochastic_rounding
    "rmsprop f32 f32 f16:sr": "fpext lshr mul fptosi fdiv sqrt",
}

# Names that LLVM knows, and what such a processor has; "here" is whatever Numba finds.
AVX2 = "+avx2,+fma,+f16c"
AVX512 = f"{AVX2},+avx512f,+avx512vl,+avx512bw,+avx512dq,+avx512cd"
PROCESSORS = {
    "here": None,
    "x86-64-v2": "",
    "haswell": AVX2,
    "skylake-avx512": AVX512,
    "sapphirerapids": f"{AVX512},+avx512fp16",
}


def single(row):
    """The kernel of a row of the table in float32, as a line of text."""
    return " ".join([row.id, "f32", "f32", *["f32"] * row.states])


SCALAR = "fadd|fsub|fmul|fdiv|fneg|fpext|fptrunc|fptosi|sitofp|bitcast"  # with one element

ROWS = {single(row): row for row in table.TABLE}
FEW = [
    single(table.row("ftml")),
    "adamax f16 f16 f16 f16",
    "adamax bf16 bf16 bf16 bf16",
    "rmsprop f32 f32 f16:sr",
]
OLD = [*FEW[:1], FEW[2], "rmsprop f32 f32 bf16:sr"]  # without F16C, float16 is converted one by one

COMPILE = """
import json, sys
from numba.core.registry import cpu_target
from numba_opt.compiler import cache, half
from numba_opt.cpu import loops as cpu
from tests import table

cache.KernelCache.load_overload = lambda *args: None  # the code of a kept kernel cannot be read
code = {}
for line in sys.argv[1:]:
    name, layout = line.split(" ", 1)
    rule = table.build(table.row(name)).checked_rule()
    kernel = cpu.dense(rule, table.layout(layout, rule.n_state))
    code[line] = ["".join(text.values()) for text in (kernel.inspect_asm(), kernel.inspect_llvm())]
print(json.dumps({"f16c": bool(half.converts_half(cpu_target.target_context)), "code": code}))
"""


@functools.cache
def compiled(processor):
    """Kernels for a processor: whether it has F16C, and for each line the assembler's text and LLVM's."""
    if processor == "here":  # kept for the other tests
        return result(COMPILE, *ROWS, *LAYOUTS)
    features = PROCESSORS[processor]
    env = {"NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": os.devnull}
    return result(COMPILE, *(FEW if features else OLD), **env)


def code(processor, line):
    found = compiled(processor)
    if "f16" in line and not found["f16c"]:
        pytest.skip("this processor has no F16C")
    return found["code"][line]


def loops(llvm):
    """The vectorised loops of a kernel."""
    blocks = re.split(r"\n(?=[\w.$\"-]+:)", llvm)
    return [block for block in blocks if re.match(r"(vec\.epilog\.)?vector\.body\d*:", block)]


def assert_vectorised(asm, llvm, operations=""):
    """Loops of packed arithmetic in single precision alone, and nothing in double precision anywhere."""
    found = loops(llvm)
    assert found
    for operation in ("load", "fmul", *operations.split()):
        packed = r"@llvm\.sqrt\.v\d+f32" if operation == "sqrt" else rf"= {operation} .*<\d+ x \w+>"
        assert any(re.search(packed, loop) for loop in found), f"no packed {operation}"
    for loop in found:
        assert not re.findall(rf"= (?:{SCALAR})(?: \w+)* (?:float|half|i16|i32) ", loop)
        assert not re.findall(r"\.f(?:16|32|64)\(|double|<\d+ x i64>", loop)
    assert not re.findall(r"\tv?cvt(?:ss2sd|ps2pd|sd2ss|pd2ps)\b.*", asm)
    assert not re.findall(r"\tv?(?:add|mul|div|sqrt)[sp]d\t.*", asm)


# ---------------------------------------------------------------- for this machine's processor


@pytest.mark.parametrize("line", ROWS)
def test_float32_kernels_are_vectorised_and_stay_in_float32(line):
    row = ROWS[line]
    if row.cls.per_row and not compiled("here")["f16c"]:
        pytest.skip("without AVX, which has come with F16C, LLVM leaves loops over rows as they are")
    assert_vectorised(*code("here", line), row.instructions)


@pytest.mark.parametrize("line", LAYOUTS)
def test_conversions_are_vectorised(line):
    check_conversions("here", line)


# ---------------------------------------------------------------- for all


def check_conversions(processor, line):
    asm, llvm = code(processor, line)
    assert_vectorised(asm, llvm, LAYOUTS.get(line, ""))
    assert not re.findall(r"\tcall\w*\t.*(?:half|bfloat|__gnu|__extend|__trunc)", asm)
    if "fpext" in LAYOUTS.get(line, "") and PROCESSORS[processor]:
        assert re.findall(r"\tvcvtph2psx?\t.*[xyz]mm", asm)  # instructions, whatever they are called


@X86
@pytest.mark.elsewhere
@pytest.mark.parametrize(
    ("processor", "line"),
    [(name, line) for name, has in PROCESSORS.items() if has is not None for line in (FEW if has else OLD)],
)
def test_other_processors(processor, line):
    check_conversions(processor, line)
    packed = re.findall(r"\tv?mulps\t.*%([xyz])mm", code(processor, line)[0])
    assert set(packed) & set("yz" if PROCESSORS[processor] else "x")  # as wide as the processor


@pytest.mark.parametrize(
    "processor",
    ["here", *(pytest.param(name, marks=[pytest.mark.elsewhere, X86]) for name in list(PROCESSORS)[1:])],
)
def test_addresses_are_not_compared_before_each_block(processor):
    """A tensor's arrays share no memory, and the compiler knows."""
    _, llvm = code(processor, single(table.row("ftml")))
    assert loops(llvm)
    assert "vector.memcheck" not in llvm  # what LLVM calls such comparisons
