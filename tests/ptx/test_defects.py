"""Defects that are put into the package's own kernels on purpose: each of them is caught.

A defect is a change of the PTX that the compiler made. What catches it is either the interpreter, or that the
results are not the CPU's.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import pytest

import numba_opt

from .. import table

pytestmark = pytest.mark.skipif(
    find_spec("numba_cuda") is None, reason="needs the package numba-cuda: pip install 'numba_opt[cuda]'"
)

SHAPES = [(8, 16), (5, 7), 4096 + 300, 3]


@pytest.fixture
def driver():
    from .driver import Driver, installed

    with installed(Driver()) as made:
        yield made


# ---------------------------------------------------------------- what kernels are run with


def both(name, steps=2, shapes=SHAPES, **options):
    """Dense steps on a GPU and on the CPU, which must agree."""
    from . import arrays

    row = table.row(name)
    shapes = [(8, 16), (5, 7), (40, 70)] if row.cls.per_row else shapes
    call = table.make(row, shapes)
    options = table.common(row) | options
    gpu, cpu = table.build(row, **options), table.build(row, **options)
    if options.get("state_dtype"):
        states = [cpu.create_state(t, weight) for t, weight in enumerate(call.weights)]
        call = call._replace(states=states)
    weights, grads, states = map(arrays.on_gpu, call[1:])
    for _ in range(steps):
        gpu.update(call.indices, weights, grads, states)
        cpu.update(*call)
    table.assert_alike(row, arrays.on_cpu([weights, states]), table.outputs(call))


def nag():
    both("nag")


def adamax():
    both("adamax")


def grouped():
    both("groupadagrad")


def half():
    both("nag", state_dtype="float16", clip_gradient=None)


def by_chance():
    both("nag", state_dtype="bfloat16", stochastic_rounding=True, seed=3)


def norms():
    """Clipped by the norm of all gradients, with a learning rate that changes."""
    from . import arrays

    call = table.make(table.row("nag"), [4096 * 2 + 100, (5, 7)])
    options = {"clip_global_norm": 0.5, "skip_nonfinite": True}
    gpu = numba_opt.Trainer(arrays.on_gpu(call.weights), "nag", **options)
    cpu = numba_opt.Trainer(call.weights, "nag", **options)
    ours = arrays.on_gpu(call.grads)
    for rate in (0.1, 0.2):
        for trainer, grads in ((gpu, ours), (cpu, call.grads)):
            trainer.set_learning_rate(rate)
            trainer.step(grads)
    assert gpu.grad_norm == pytest.approx(cpu.grad_norm, rel=1e-12)
    table.assert_near(arrays.on_cpu([*gpu.params.values()]), [*cpu.params.values()], 1e-6)


def sparse(form, mode="lazy", steps=3):
    """Sparse gradients of a form, on a GPU and on the CPU."""
    from ..conformance.backends import Ptx
    from ..conformance.gradients import block, csr, some_csr
    from . import arrays

    shape = (300, 6)
    rng = np.random.default_rng(0)
    row = table.row("groupadagrad" if mode == "exact" else "nag")
    options = table.common(row) | {"sparse_update": mode}
    gpu, cpu = table.build(row, **options), table.build(row, **options)
    (weight,) = table.make(row, [shape]).weights
    (mine,) = arrays.on_gpu([weight])
    states = gpu.create_state(0, mine), cpu.create_state(0, weight)
    for n in range(steps):
        if form == "csr":  # columns in order and not
            columns = [[*range(6)], [5, 2, 2, 0], [], [1, 1, 4], [5, 4, 3, 2, 1, 0], [2, 5, 1]] * 50
            grad = csr(shape) if n % 2 else some_csr(columns, shape)
        else:
            rows = rng.permutation(300)[:40] if form == "distinct" else rng.integers(0, 300, 1500)
            grad = block(rows, shape, seed=n)
        theirs = grad
        ours = Ptx().sparse(grad, form == "distinct")
        if form == "distinct":  # the first two lead outside
            ours.rows.array[:2] = [-3, 10**6]
            theirs = numba_opt.RowSparse(grad.rows[2:], grad.values[2:], shape)
        gpu.update([0], [mine], [ours], [states[0]])
        cpu.update([0], [weight], [theirs], [states[1]])
    if mode == "exact":
        gpu.flush([0], [mine], [states[0]])
        cpu.flush([0], [weight], [states[1]])
    found = arrays.on_cpu(table.leaves([mine, states[0]]))
    table.assert_alike(row, found, table.leaves([weight, states[1]]))


def keys():
    sparse("keys", steps=1)


def distinct():
    sparse("distinct")


def csr():
    sparse("csr")


def exact():
    sparse("keys", "exact")


SCENARIOS = [nag, adamax, grouped, half, by_chance, norms, keys, distinct, csr, exact]


# ---------------------------------------------------------------- the table


class Defect(NamedTuple):
    """A change of a kernel's text that makes it wrong."""

    what: str
    kernel: str
    scenario: object
    old: str  # a regular expression
    new: object
    which: int = 0  # of those that it matches

    def __str__(self):
        return self.what


V4 = r"\{(%\w+), (%\w+), (%\w+), (%\w+)\}"
LAST = r"(\tret;)(?![\s\S]*\tret;)"


def skipped(body):
    """Some threads jump over what comes next, to the end of the kernel."""
    return f"mov.u32 %z1, %tid.x;\n\tsetp.eq.u32 %q1, %z1, 5;\n\t@%q1 bra $L__done;\n\t{body}"


BARRIER, WARP_BARRIER = r"bar\.sync\s+0;", r"bar\.warp\.sync[^;]*;"
WIDE_LOAD, WIDE_STORE = r"(ld\.global\.v4\.\w+\s+[^[]*\[%\w+)\]", r"(st\.global\.v4\.\w+\s+\[)(%\w+)"
MORE = {"ge": "gt", "gt": "ge", "lt": "le", "le": "lt"}
OPPOSITE = {"ge": "lt", "lt": "ge", "gt": "le", "le": "gt"}

DEFECTS = [
    Defect("a block's barrier is missing", "squares", norms, BARRIER, ""),
    Defect("a block's barrier is missing in a sort", "keys", keys, BARRIER, ""),
    Defect("no warp's barrier before a row's state is written", "dense", grouped, WARP_BARRIER, ""),
    Defect("a warp's barrier is missing between two steps", "catch_up", exact, WARP_BARRIER, ""),
    Defect("a thread passes a barrier by", "squares", norms, BARRIER, lambda m: skipped(m[0])),
    Defect("a thread leaves its warp", "dense", grouped, r"shfl\.sync", lambda m: skipped(m[0])),
    Defect("a shuffle's mask", "dense", grouped, r"(shfl\.sync\.bfly\.b32\s+%\w+, %\w+, )\d+", r"\g<1>16"),
    Defect(
        "a sum over a warp without its last shuffle",
        "squares",
        norms,
        r"shfl\.sync\.bfly\.b32\s+(%\w+), (%\w+), 16, 31, -1;",
        r"mov.b32 \1, \2;",
    ),
    Defect(
        "a vote that is not counted",
        "rows",
        csr,
        r"vote\.sync\.all\.pred\s+(%\w+), %\w+, -1;",
        r"mov.pred \1, -1;",
    ),
    Defect("a wide load 16 bytes further on", "dense", nag, WIDE_LOAD, r"\1+16]"),
    Defect("a wide load where none may be", "dense", nag, WIDE_LOAD, r"\1+4]"),
    Defect(
        "lanes of a wide load are swapped",
        "dense",
        nag,
        rf"(ld\.global\.v4\.\w+\s+){V4}",
        r"\1{\3, \2, \4, \5}",
    ),
    Defect(
        "a wide store has one number twice",
        "dense",
        nag,
        rf"(st\.global\.v4\.\w+\s+[^{{]*){V4}",
        r"\1{\2, \2, \4, \5}",
    ),
    Defect("a store is missing", "dense", nag, r"st\.global\.v4[^;]*;", ""),
    Defect("a single store is missing", "dense", nag, r"st\.global\.(f|b)32[^;]*;", ""),
    Defect(
        "a state is written where the weight is",
        "dense",
        adamax,
        rf"{WIDE_STORE}(\][^;]*;[\s\S]*?){WIDE_STORE}",
        r"\g<1>\2\g<3>\g<4>\2",
    ),
    Defect(
        "one element too many",
        "dense",
        nag,
        r"setp\.(ge|lt)\.u32(\s+%\w+, %\w+, %\w+;)",
        lambda m: f"setp.{MORE[m[1]]}.u32{m[2]}",
        1,
    ),
    Defect(
        "one unit too many",
        "dense",
        nag,
        r"setp\.(le|ge|lt|gt)\.s64(\s+%\w+, %\w+, %\w+;)",
        lambda m: f"setp.{MORE[m[1]]}.s64{m[2]}",
        1,
    ),
    Defect("the other way at a branch", "dense", nag, r"@(%p\d+) bra", r"@!\1 bra"),
    Defect(
        "a loop that does not end",
        "dense",
        nag,
        r"(\$L__BB\d+_\d+):([\s\S]*?)@!?%p\d+ bra(\.uni)?\s+\1;",
        r"\1:\2bra.uni \1;",
    ),
    Defect("a quotient that is rounded otherwise", "dense", adamax, r"div\.rn\.f32", "div.rz.f32"),
    Defect(
        "a product and a sum in one rounding",
        "dense",
        nag,
        r"mul\.rn\.f32(\s+%\w+, %\w+, %\w+);",
        r"fma.rn.f32\1, %f1;",
    ),
    Defect("a half that is rounded otherwise", "dense", half, r"cvt\.rn\.f16(\w*)\.f32", r"cvt.rz.f16\1.f32"),
    Defect(
        "a difference the other way round",
        "dense",
        nag,
        r"sub\.rn\.f32(\s+%\w+), (%\w+), (%\w+);",
        r"sub.rn.f32\1, \3, \2;",
    ),
    Defect("an absolute value that has its sign", "dense", adamax, r"abs\.f32(\s+)", r"mov.b32\1"),
    Defect(
        "the smaller for the greater",
        "dense",
        adamax,
        r"selp\.[fb]32(\s+%\w+), (%\w+), (%\w+),",
        r"selp.f32\1, \3, \2,",
    ),
    Defect(
        "a bit of the noise",
        "dense",
        by_chance,
        r"(mul\.lo\.s32\s+%\w+, %\w+, -?)(\d{6,});",
        lambda m: f"{m[1]}{int(m[2]) ^ 64};",
    ),
    Defect("other arguments", "dense", nag, r"(ld\.param\.\w+\s+%\w+, \[\w+_param_)3\]", r"\g<1>2]"),
    Defect("shared memory that nobody has written", "squares", norms, r"st\.shared[^;]*;", ""),
    Defect("another place of shared memory", "squares", norms, r"(st\.shared\.\w+\s+\[%\w+)\]", r"\1+8]"),
    Defect(
        "a negative row is taken for a large one",
        "rows",
        distinct,
        r"setp\.(lt|gt)\.s64(\s+%\w+, %\w+, (?:0|-1);)",
        lambda m: f"setp.{m[1]}.u64{m[2]}",
    ),
    Defect(
        "a bound of row numbers",
        "rows",
        distinct,
        r"setp\.(ge|lt|gt|le)\.s64(\s+%\w+, %\w+, %\w+;)",
        lambda m: f"setp.{OPPOSITE[m[1]]}.s64{m[2]}",
        2,
    ),
    Defect("a key's row", "keys", keys, r"(shl\.b64\s+%\w+, %\w+, )32;", r"\g<1>31;"),
    Defect("a key's place among the others", "merge", keys, r"setp\.lt\.s64", "setp.gt.s64", -1),
    Defect("a count of steps", "record", exact, r"(add\.s64\s+%\w+, %\w+, )1;", r"\g<1>2;"),
    Defect(
        "hyper-parameters of another tensor",
        "set_coefficients",
        norms,
        r"(st\.global\.\w+\s+\[%\w+\+)8\]",
        r"\g<1>16]",
    ),
    Defect("a norm without its root", "clip_norm", norms, r"sqrt\.rn\.f64(\s+)", r"abs.f64\1"),
]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_nothing_is_wrong(driver, scenario):
    scenario()


@pytest.mark.parametrize("defect", DEFECTS, ids=str)
def test_a_defect_is_caught(driver, monkeypatch, defect):
    from . import library
    from .faults import UnknownFormError
    from .translating import Program

    plain, changed = library.program, []

    def program(kernel, capability=(9, 0)):
        if kernel.key[0] != defect.kernel:
            return plain(kernel, capability)
        text = library.text(kernel, capability)
        places = [*re.finditer(defect.old, text)]
        if not places:
            return plain(kernel, capability)
        place = places[min(defect.which, len(places) - 1)]
        text = text[: place.start()] + re.sub(defect.old, defect.new, place[0], count=1) + text[place.end() :]
        text = re.sub(r"\n\t\.reg", "\n\t.reg .pred %q<2>;\n\t.reg .b32 %z<2>;\n\t.reg", text, count=1)
        text = re.sub(LAST, r"$L__done:\n\1", text)
        changed.append(kernel)
        found = Program(text)
        found.title, found.key, found.capability = library.title(kernel), kernel.key, capability
        return found

    monkeypatch.setattr(library, "program", program)
    try:
        with pytest.raises((AssertionError, UnknownFormError)):
            defect.scenario()
    except pytest.fail.Exception:
        if not changed:
            pytest.skip("this compiler's kernels have nothing like it")
        raise
    finally:
        driver.forgive()
