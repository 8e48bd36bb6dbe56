"""CUDA kernels compiled with no GPU: what is in their PTX and, with an assembler, their machine code."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from numba_opt.core.rules import Rule
from perf import ptx

from . import table

pytestmark = pytest.mark.skipif(
    find_spec("numba_cuda") is None, reason="needs the package numba-cuda: pip install 'numba_opt[cuda]'"
)

# For each rule: arrays in the table's float32 layout, and a limit of registers, which is what the largest of
# the four capabilities needs, and some. 128 would halve the threads that a multiprocessor can hold.
LIMITS = {
    "nag": 52,
    "nag-plain": 48,
    "rmsprop": 56,
    "rmsprop-centered": 72,
    "rmsprop-clipweights": 64,
    "adamax": 64,
    "ftml": 72,
    "ftml-reduced": 64,
    "groupadagrad": 64,
}

# Of two copies of this rule's loop the compiler lets some stores be one, so it is counted less strictly.
MERGED = ("ftml-reduced",)


@pytest.fixture(scope="module")
def made():
    """A function that compiles a kernel and counts, or finds both where they are kept."""
    from numba_opt.cuda import kernels as cuda

    from .ptx import library

    def make(name, *args, capability=(9, 0)):
        return library.counts(getattr(cuda, name)(*args), capability)

    return make


def own(rule, state, grad="-"):
    """How float32 weights with states of some storage are laid out."""
    return table.layout(" ".join([grad, "f32", *[state] * rule.n_state]), rule.n_state)


def single(rule):
    """The layout in which everything is float32."""
    return own(rule, "f32", "f32")


def check(found):
    """What no kernel may have."""
    assert found.contracted == found.calls == found.local == found.generic == 0
    assert found.spilled <= 0


def check_once(found, loads, stores):
    """So many wide accesses for each group; the compiler may have made copies of the loop."""
    copies = found.stores // stores
    assert copies >= 1
    assert (found.loads, found.stores) == (copies * loads, copies * stores)


@pytest.mark.parametrize("capability", ptx.CAPABILITIES, ids=lambda cc: f"{cc[0]}.{cc[1]}")
@pytest.mark.parametrize("name", LIMITS)
def test_dense_kernels_in_single_precision(made, name, capability):
    row = table.row(name)
    rule = table.build(row).checked_rule()
    found = made("dense", rule, single(rule), capability=capability)
    check(found)
    assert found.double == 0
    if rule.per_row:
        assert found.loads >= 4  # the mean square first
        assert found.stores >= 1
    elif name in MERGED:
        assert found.loads % (2 + rule.n_state) == 0
        assert 1 + rule.n_state <= found.stores <= found.loads
    else:
        check_once(found, 2 + rule.n_state, 1 + rule.n_state)
    assert found.registers <= LIMITS[name]


@pytest.mark.parametrize(
    ("layout", "loads", "stores"),
    [
        ("f64 f64 f64", 3, 2),  # 2 elements a group
        ("f16 f16 f16", 3, 2),  # 8 of them
        ("bf16 bf16 bf16", 3, 2),
        ("f16 f32 f32 f16", 5, 5),  # 8, and two accesses for each array of float32
        ("bf16 f32 f32 bf16", 5, 5),
        ("f32 f32 f32 f16", 6, 5),
        ("f16 f32 f32", 5, 4),
        ("f32 f32 bf16:sr", 5, 3),  # rounded stochastically
        ("f32 f32 f16:sr", 5, 3),
        ("bf16 f32 bf16:sr bf16", 4, 4),
    ],
)
def test_dense_kernels_of_other_layouts(made, layout, loads, stores):
    rule = table.build(table.row("nag")).checked_rule()
    found = made("dense", rule, table.layout(layout, rule.n_state))
    check(found)
    assert (found.double == 0) == ("f64" not in layout)
    check_once(found, loads, stores)
    assert found.registers <= 96


@pytest.mark.parametrize("name", ["begun", "plus"])
@pytest.mark.parametrize("layout", ["f32 f32", "f64 f64", "f16 f32", "bf16 f32", "f16 f16"])
def test_accumulation(made, name, layout):
    from numba_opt.cuda import kernels as cuda

    found = made("dense", Rule(getattr(cuda, name), 0, False), table.layout(layout, 0))
    check(found)
    assert (found.double == 0) == ("f64" not in layout)
    wide = 2 if layout in ("f16 f32", "bf16 f32") else 1  # accesses of a group of 8 sums
    check_once(found, 1 + wide * (name == "plus"), wide)  # the first gradient does not ask what the sum was
    assert found.registers <= 40


@pytest.mark.parametrize(
    "form", ["rows i64 f32", "keys f32", "csr i32 f32", "every-keys f32", "every-csr i32 f32"]
)
@pytest.mark.parametrize("name", ["adamax", "groupadagrad"])
@pytest.mark.parametrize("state", ["f32", "bf16:sr"])
def test_rows(made, name, form, state):
    rule = table.build(table.row(name)).checked_rule()
    found = made("rows", rule, own(rule, state), table.form(form))
    check(found)
    assert found.double == 0
    assert found.registers <= (80 if state == "f32" else 96)


@pytest.mark.parametrize("name", [name for name in LIMITS if name != "nag-plain"])
@pytest.mark.parametrize("state", ["bf16:sr", "f16:sr"])
def test_states_rounded_stochastically(made, name, state):
    rule = table.build(table.row(name)).checked_rule()
    found = made("dense", rule, own(rule, state, "f32"))
    check(found)
    assert found.double == 0
    assert found.registers <= LIMITS[name] + 24  # groups are of 8, as states are half as long


@pytest.mark.parametrize("form", ["keys f32", "csr i32 f32", "none f32"])
@pytest.mark.parametrize("name", ["nag", "rmsprop-centered", "groupadagrad"])
def test_rows_that_catch_up(made, name, form):
    rule = table.build(table.row(name)).checked_rule()
    found = made("catch_up", rule, own(rule, "f32"), table.form(form))
    check(found)
    assert found.double == 0
    assert found.registers <= 72


@pytest.mark.parametrize("form", ["rows i64 f32", "keys f32", "csr i32 f32"])
def test_squares_of_rows(made, form):
    found = made("row_squares", "f32", table.form(form))
    check(found)
    assert found.registers <= 64


@pytest.mark.parametrize("code", ["f32", "f64", "f16", "bf16"])
def test_squares(made, code):
    found = made("squares", code)
    check(found)
    assert found.loads >= 1
    assert found.registers <= 64


def test_what_warps_and_blocks_wait_for():
    """A row's state is written before the next of its steps reads it; a block sorts in its own memory."""
    from numba_opt.cuda import code as cuda_code
    from numba_opt.cuda import kernels as cuda

    rule = table.build(table.row("groupadagrad")).checked_rule()
    catching_up = cuda.catch_up(rule, table.layout("- f32 f32", 1), table.form("csr i32 f32"))
    late = cuda_code.ptx(catching_up, (9, 0))
    assert late.count("bar.warp.sync") >= 2
    assert "vote.sync.all" in late
    keys = cuda_code.ptx(cuda.keys("i64"), (9, 0))
    assert "bar.sync" in keys
    assert "ld.shared" in keys
    assert "st.shared" in keys


@pytest.mark.parametrize(
    "args",
    [
        *(("keys", "i32"), ("keys", "i64"), ("merge",), ("set_coefficients",), ("clip_norm",)),
        *(("record", 5, "f32"), ("record", 5, "f64"), ("forget",), ("vacate",)),
        *(
            ("collect", "f32", "rows i64 f16"),
            ("collect", "f16", "csr i32 f32"),
            ("collect", "f64", "csr i64 f64"),
        ),
        *(("spread", "f16", False), ("spread", "f32", True)),
    ],
)
def test_other_kernels(made, args):
    check(made(*(table.form(arg) if " " in str(arg) else arg for arg in args)))


def test_kernels_are_kept(tmp_path, monkeypatch):
    """A kernel is compiled once, and found on disk by whoever asks next."""
    import numba

    from numba_opt.cuda import code as cuda_code
    from numba_opt.cuda import kernels as cuda

    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    cuda_code.compiled.cache_clear()
    before = cuda_code.how_many()
    first = cuda_code.compiled(cuda.set_coefficients(), (8, 0))
    cuda_code.compiled.cache_clear()
    again = cuda_code.compiled(cuda.set_coefficients(), (8, 0))
    assert cuda_code.how_many() == before + 1
    assert (first.name, first.cubin) == (again.name, again.cubin)
    for path in (tmp_path / "numba_opt").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    cuda_code.compiled.cache_clear()
    assert cuda_code.compiled(cuda.set_coefficients(), (8, 0)).cubin
    assert cuda_code.how_many() == before + 2
