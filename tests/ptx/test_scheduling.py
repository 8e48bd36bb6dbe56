"""Threads meet, take turns, and are told when what they do is not in order."""

from __future__ import annotations

import numpy as np
import pytest

from . import kernels
from .faults import KernelError, OrderError

# %rd6 is the thread's own place in shared memory.
OWN = "mul.wide.u32 %rd4, %r1, 4;\nmov.u64 %rd5, held;\nadd.s64 %rd6, %rd5, %rd4;\n"

# Each thread leaves its number in shared memory and takes that of the thread opposite it in its block.
EXCHANGE = (
    OWN
    + """
    st.shared.u32 [%rd6], %r1;
    bar.sync 0;
    xor.b32 %r4, %r1, 32;
    mul.wide.u32 %rd7, %r4, 4;
    add.s64 %rd8, %rd5, %rd7;
    ld.shared.u32 %r5, [%rd8];
    st.global.u32 [%rd3], %r5;
"""
)

LOOP = """
    mov.b32 %r4, 0;
    mov.b32 %r5, 0;
$L_again:
    add.s32 %r5, %r5, %r4;
    add.s32 %r4, %r4, 1;
    setp.le.u32 %p1, %r4, %r1;
    @%p1 bra $L_again;
    st.global.u32 [%rd3], %r5;
"""


SEEDS = [None, *range(5)]  # the first block first, or any


def chance(seed):
    return None if seed is None else np.random.default_rng(seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_loop_that_threads_leave_one_by_one(seed):
    found = kernels.run(kernels.program(LOOP), np.zeros(64, "u8"), 64, random=chance(seed))
    assert found.tolist() == [t * (t + 1) // 2 for t in range(64)]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_barrier(seed):
    found = kernels.run(kernels.program(EXCHANGE, 256), np.zeros(64, "u8"), 64, random=chance(seed))
    assert found.tolist() == [t ^ 32 for t in range(64)]


def test_a_barrier_that_is_not_there():
    body = EXCHANGE.replace("bar.sync 0;", "")
    with pytest.raises(OrderError, match="nothing orders what warps of a block do at 0x0 of shared memory"):
        kernels.run(kernels.program(body, 256), np.zeros(64, "u8"), 64)
    kernels.run(kernels.program(body, 256), np.zeros(64, "u8"), 64, ordered=False)
    outcomes = set()
    for seed in SEEDS:  # by chance it shows without being looked for
        try:
            kernels.run(
                kernels.program(body, 256), np.zeros(64, "u8"), 64, random=chance(seed), ordered=False
            )
        except KernelError as error:
            outcomes.add(str(error).split(": ")[2])
    assert outcomes == {"nobody has written that"}


SHUFFLE = "shfl.sync.bfly.b32 %r6, %r1, 1, 31, -1;"
ORDERING = {"bar.warp.sync -1;": True, "bar.sync 0;": True, SHUFFLE: False, "": False}


@pytest.mark.parametrize("between", ORDERING)
def test_what_orders_the_memory_of_a_warp(between):
    """Threads that exchange registers wait for each other, and no more."""
    body = f"""
        xor.b32 %r4, %r1, 1;
        mul.wide.u32 %rd7, %r4, 8;
        add.s64 %rd8, %rd1, %rd7;
        ld.global.u32 %r5, [%rd8];
        {between}
        st.global.u32 [%rd3], %r5;
    """
    content = np.arange(32, dtype="u8")
    if ORDERING[between]:
        assert kernels.run(kernels.program(body), content).tolist() == [t ^ 1 for t in range(32)]
    else:
        with pytest.raises(OrderError, match="threads of a warp"):
            kernels.run(kernels.program(body), content)


def test_blocks_are_never_in_order():
    body = "bar.sync 0;\nld.global.u32 %r4, [%rd3];\nbar.sync 0;\nst.global.u32 [%rd3], %r2;"
    kernels.run(kernels.program(body), np.zeros(32, "u8"))
    with pytest.raises(OrderError, match="what blocks do"):
        kernels.run(kernels.program(body), np.zeros(32, "u8"), blocks=2)


def test_what_is_harmless():
    """The same value from several, and a thread's own accesses."""
    same = "st.global.u32 [%rd1], 7;\nld.global.u32 %r4, [%rd3+4];\nst.global.u32 [%rd3+4], %r4;"
    assert kernels.run(kernels.program(same), np.zeros(32, "u8"))[0] == 7
    with pytest.raises(OrderError):
        kernels.run(kernels.program("st.global.u32 [%rd1], %r1;"), np.zeros(32, "u8"))


def test_overlapping_accesses_of_different_sizes():
    body = "setp.eq.u32 %p1, %r1, 0;\n@%p1 bra $L_first;\nst.global.u32 [%rd1+4], 1;\nret;\n$L_first:\n"
    with pytest.raises(OrderError):
        kernels.run(kernels.program(body + "ld.global.u64 %rd4, [%rd1];"), np.zeros(2, "u8"), 2)
    kernels.run(kernels.program(body + "ld.global.u32 %r4, [%rd1];"), np.zeros(2, "u8"), 2)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("meeting", ["bar.sync 0;", "bar.warp.sync -1;"])
def test_threads_that_do_not_come(meeting, seed):
    body = f"setp.eq.u32 %p1, %r1, 5;\n@%p1 bra $L_end;\n{meeting}\n$L_end:"
    with pytest.raises(KernelError, match=r"threads wait for others that do not come: line \d+: bar"):
        kernels.run(kernels.program(body), np.zeros(64, "u8"), 64, random=chance(seed))


def test_a_launch_that_does_not_end():
    with pytest.raises(KernelError, match="no end after 500 basic blocks"):
        kernels.run(kernels.program("$L_on:\nbra.uni $L_on;"), np.zeros(32, "u8"), limit=500)


def test_a_register_that_nobody_wrote():
    with pytest.raises(KernelError, match="register %r9 is read before it is written"):
        kernels.run(kernels.program("st.global.u32 [%rd3], %r9;"), np.zeros(32, "u8"))


def test_arguments_that_are_missing():
    with pytest.raises(KernelError, match="2 arguments are expected, not 1"):
        kernels.run(kernels.program("", params=2), np.zeros(32, "u8"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ld.global.u32 %r4, [%rd3+-4];", "outside of all arrays: .*, by thread 0 of block 0 and 0 others"),
        ("ld.global.u32 %r4, [%rd3+8];", "outside of all arrays: .*, by thread 31 of block 0"),
        ("st.global.u64 [%rd3+4], %rd3;", "not at a multiple of 8"),
        ("st.global.v4.u32 [%rd3], {%r1, %r1, %r1, %r1};", "not at a multiple of 16"),
        ("ld.global.u32 %r4, [%rd2];", "outside of all arrays: 0x0"),
        ("ld.shared.u32 %r4, [%rd6];", "nobody has written that"),
        ("st.shared.u32 [%rd6+8], %r1;", "outside of shared memory"),
        ("st.shared.u16 [%rd6], %rs9;", "read before it is written"),
        ("st.shared.u64 [%rd6], %rd3;", "not at a multiple of 8"),
    ],
)
def test_accesses_that_must_not_be(line, message):
    with pytest.raises(KernelError, match=message):
        kernels.run(kernels.program(OWN + line, 128), np.zeros(32, "u8"))
