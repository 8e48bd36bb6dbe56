"""What barriers put in order in PTX stays in order in machine code, where the assembler is at hand."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from . import table
from .ptx.library import ptx

pytestmark = [
    pytest.mark.skipif(find_spec("numba_cuda") is None, reason="needs numba-cuda: numba_opt[cuda]"),
    pytest.mark.skipif(
        not (ptx.tool("ptxas") and ptx.tool("nvdisasm")), reason="needs NVIDIA's assembler: numba_opt[test]"
    ),
]


def kernel(name):
    from numba_opt.cuda import kernels as cuda

    rule = table.build(table.row("groupadagrad")).checked_rule()
    return {
        "dense": lambda: cuda.dense(rule, table.layout("f32 f32 f32", 1)),
        "rows": lambda: cuda.rows(rule, table.layout("- f32 f32", 1), table.form("keys f32")),
        "catch_up": lambda: cuda.catch_up(rule, table.layout("- f32 f32", 1), table.form("csr i32 f32")),
        "keys": lambda: cuda.keys("i64"),
        "squares": lambda: cuda.squares("f32"),
    }[name]()


@pytest.mark.parametrize("capability", [(9, 0), (7, 5)], ids=["9.0", "7.5"])
@pytest.mark.parametrize("name", ["dense", "rows", "catch_up", "keys", "squares"])
def test_accesses_stay_on_their_side_of_barriers(name, capability, tmp_path):
    """A row's state is loaded before the warp's barrier and stored after it; shared memory is written before
    the block's barrier and read after it."""
    from .ptx import library, machine_code

    text = library.text(kernel(name), capability)
    apart, lost = machine_code.kept_apart(text, machine_code.of_machine_code(text, capability, tmp_path))
    assert apart
    assert not lost, [[text.splitlines()[line - 1] for line in pair] for pair in lost]


@pytest.mark.parametrize("what", ["ld", "st"])
def test_an_access_on_the_other_side_is_noticed(what, tmp_path):
    """A row's state that is loaded after the barrier, or stored before it."""
    from .ptx import library, machine_code

    text = library.text(kernel("dense"))
    steps = machine_code.of_machine_code(text, (9, 0), tmp_path)
    (barrier,) = (k for k, step in enumerate(steps) if step.kind == machine_code.BARRIER)
    pair = min(machine_code.kept_apart(text, steps)[0])
    access = next(k for k, step in enumerate(steps) if step.line in pair and step.kind.startswith(what))
    a, b = steps[access], steps[barrier]
    steps[access] = a._replace(kind=b.kind, line=b.line)
    steps[barrier] = b._replace(kind=a.kind, line=a.line)
    assert pair in machine_code.kept_apart(text, steps)[1]
