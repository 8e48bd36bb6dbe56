"""Files that the real MXNet 2.0.0b1 wrote are read; anything else is refused, and nothing in it runs."""

from __future__ import annotations

import contextlib
import copyreg
import json
import os
import pickle
import random
import struct
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import numba_opt
from numba_opt.io import mxnet_states
from numba_opt.io.checkpoint import CheckpointError
from numba_opt.io.mxnet_states import load_mxnet_optimizer, load_mxnet_states, parse

GOLDEN = Path(__file__).parent / "golden"
SAVED = {case["file"]: case for case in json.loads((GOLDEN / "cases.json").read_text())["states"]}
V2, V3 = 0xF993FAC9, 0xF993FACA
DAMAGED = [f"states_{name}" for name in ("adamax_mp_optimizer.pkl", "ftml_optimizer.pkl", "none.pkl")]
DAMAGED += [
    f"states_{name}" for name in ("groupadagrad_rowsparse_optimizer.pkl", "nag_old.pkl", "trainer.states")
]


@pytest.fixture(scope="module")
def arrays():
    with np.load(GOLDEN / "golden.npz", allow_pickle=False) as file:
        return dict(file)


def leaves(state):
    if isinstance(state, tuple):
        return [leaf for part in state for leaf in leaves(part)]
    return [] if state is None else [state]


def check_state(state, form, arrays):
    if isinstance(form, list):
        assert type(state) is tuple
        for part, part_form in zip(state, form, strict=True):
            check_state(part, part_form, arrays)
    elif form is None:
        assert state is None
    else:
        assert state.dtype == arrays[form].dtype
        np.testing.assert_array_equal(state, arrays[form], strict=True)


def check_plausible(states):
    for index, state in states.items():
        assert type(index) in (int, str)
        for leaf in leaves(state):
            assert leaf.dtype.kind == "f"
            assert leaf.flags.writeable
            assert leaf.flags.c_contiguous


# ---------------------------------------------------------------- what MXNet wrote


@pytest.mark.parametrize("file", SAVED)
def test_golden_states(file, arrays):
    states = load_mxnet_states(GOLDEN / file)
    assert list(states) == [int(index) for index in SAVED[file]["states"]]
    for index, state in states.items():
        check_state(state, SAVED[file]["states"][str(index)], arrays)
    check_plausible(states)
    assert "mxnet" not in sys.modules


@pytest.mark.parametrize("file", SAVED)
def test_golden_optimizers(file):
    case, found = SAVED[file], load_mxnet_optimizer(str(GOLDEN / file))
    if not case["dump_optimizer"]:
        assert found is None
        return
    assert found["class"] == case["optimizer"]
    assert found["num_update"] == case["num_update"]
    assert found["_index_update_count"] == {int(k): v for k, v in case["index_update_count"].items()}
    kwargs = {"lr" if k == "learning_rate" else k: v for k, v in case["kwargs"].items()}
    assert {k: found[k] for k in kwargs} == kwargs
    if case["scheduler"] is None:
        assert found["lr_scheduler"] is None
    else:
        assert found["lr_scheduler"]["class"] == case["scheduler"]["name"]
        assert found["lr_scheduler"]["step"] == case["scheduler"]["kwargs"]["step"]
    json.dumps(found)  # plain values only


@pytest.mark.parametrize("file", SAVED)
@pytest.mark.filterwarnings("ignore:states in float16")
def test_states_have_the_forms_of_ours(file):
    case = SAVED[file]
    optimizer = numba_opt.create(case["optimizer"], **case["kwargs"])
    for index, state in load_mxnet_states(GOLDEN / file).items():
        half = case["kwargs"].get("multi_precision") or "half" in file
        shape = (leaves(state) or [np.zeros(1)])[0].shape
        shape = (shape[0], 5) if case["optimizer"] == "GroupAdaGrad" else shape
        ours = optimizer.create_state_multi_precision(index, np.zeros(shape, "f2" if half else "f4"))
        assert describe(ours) == describe(state)


def describe(state):
    if isinstance(state, tuple):
        return tuple(map(describe, state))
    return None if state is None else (state.shape, state.dtype)


# MXNet 2.0.0b1 with pickle's protocol 3, the default before Python 3.8.
PROTOCOL_3 = (
    b"\x80\x03}q\x00K\x00cmxnet.ndarray.ndarray\nNDArray\nq\x01N\x85q\x02Rq\x03}q\x04X\x06\x00\x00\x00handleq"
    b"\x05cbuiltins\nbytearray\nq\x06C0\xc9\xfa\x93\xf9\x00\x00\x00\x00\x01\x00\x00\x00\x02\x00\x00\x00\x00\x00"
    b"\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\xa0\x99\x99\xb9\xbf\x00\x00\x00\xa0"
    b"\x99\x99\xb9\xbfq\x07\x85q\x08Rq\tsbs."
)
# MXNet 2.0.0b1's bytes of a row_sparse array (5, 2) with the rows 1 and 3.
TWO_ROWS = bytes.fromhex(
    "c9fa93f90100000002000000020000000000000002000000000000000200000005000000000000000200000000000000010000000000"
    "000000000000060000000100000002000000000000000000803f00000040000040400000804001000000000000000300000000000000"
)


def test_protocol_3_and_float64():
    states, optimizer = parse(PROTOCOL_3)
    assert optimizer is None
    np.testing.assert_array_equal(states[0], np.full(2, np.float64(np.float32(-0.1))), strict=True)


def test_missing_rows_are_zero():
    expected = np.array([[0, 0], [1, 2], [0, 0], [3, 4], [0, 0]], np.float32)
    np.testing.assert_array_equal(parse(saved(TWO_ROWS))[0][0], expected, strict=True)


# ---------------------------------------------------------------- damaged files


@pytest.mark.parametrize("file", DAMAGED)
def test_truncated(file):
    content = (GOLDEN / file).read_bytes()
    for length in range(len(content)):
        with pytest.raises(CheckpointError):
            parse(content[:length])


@pytest.mark.parametrize("file", DAMAGED)
def test_one_byte_changed(file):
    content = bytearray((GOLDEN / file).read_bytes())
    for at, byte in enumerate(bytes(content)):
        content[at] = (byte + 1 + at * 37 % 255) % 256  # never the same byte
        try:
            states, _ = parse(bytes(content))
        except CheckpointError:
            pass
        else:
            check_plausible(states)
        content[at] = byte


@given(st.binary(max_size=60), st.sampled_from(sorted(SAVED)), st.floats(0, 1))
def test_bytes_put_in(extra, file, where):
    content = (GOLDEN / file).read_bytes()
    at = int(where * len(content))
    with contextlib.suppress(CheckpointError):
        check_plausible(parse(content[:at] + extra + content[at:])[0])


INSTRUCTIONS = b"(.0]})tuse\x85\x86\x87\x94\x8c\x8e\x95\x93RbBCTVXqrhjKJMcNG\x8a\x8bp"


def damaged(content, rng):
    """A file with some bits flipped, bytes lost, put in or doubled, lengths and instructions written over."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        at, other = rng.randrange(len(content)), rng.randrange(len(content))
        match rng.randrange(6):
            case 0:
                content[at] ^= 1 << rng.randrange(8)
            case 1:
                del content[at : at + rng.randrange(9)]
            case 2:
                content[at:at] = rng.randbytes(rng.randrange(9))
            case 3:
                content[at:at] = content[other : other + rng.randrange(200)]
            case 4:
                content[at : at + 8] = rng.choice([b"\xff" * 8, bytes(8), b"\xff\xff\xff\x7f" + bytes(4)])
            case 5:
                content[at] = rng.choice(INSTRUCTIONS)
    return bytes(content)


def test_files_that_are_badly_damaged(monkeypatch):
    """They are refused, or something plausible is in them; it never takes much memory to find out."""
    monkeypatch.setattr(mxnet_states, "LIMIT", 2**20)
    rng, refused = random.Random(0), 0
    contents = [(GOLDEN / file).read_bytes() for file in sorted(SAVED)]
    tracemalloc.start()
    try:
        for _ in range(1000):
            content = damaged(rng.choice(contents), rng)
            try:
                states, optimizer = parse(content)
            except CheckpointError:
                refused += 1
            else:
                check_plausible(states)
                assert optimizer is None or optimizer["class"].lower() in numba_opt.Optimizer.opt_registry
        assert tracemalloc.get_traced_memory()[1] < 2**20 + 100 * max(map(len, contents))
    finally:
        tracemalloc.stop()
    assert 500 < refused < 1000


def test_somebody_else_s_errors_are_not_the_file_s(monkeypatch):
    """A signal handler's, and a lack of memory."""
    content = (GOLDEN / sorted(SAVED)[0]).read_bytes()

    class TimeIsUpError(Exception):
        pass

    for error in (TimeIsUpError, MemoryError, TimeoutError):

        def fail(*args, error=error):
            raise error

        monkeypatch.setattr(mxnet_states, "_array", fail)
        with pytest.raises(error):
            parse(content)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match=r"it is a FIFO; expected a regular file: '.*fifo'"):
        load_mxnet_states(tmp_path / "fifo")


def test_path_is_named(tmp_path):
    path = tmp_path / "a.states"
    path.write_bytes(b"")
    for load in (load_mxnet_states, load_mxnet_optimizer):
        with pytest.raises(CheckpointError, match=r"a\.states: not a whole file"):
            load(path)
    with pytest.raises(FileNotFoundError):
        load_mxnet_states(tmp_path / "none")


# ---------------------------------------------------------------- files that are made up


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def handle(data):
    return b"cbuiltins\nbytearray\nB" + struct.pack("<I", len(data)) + data + b"\x85R"


def an_array(data, name="mxnet.ndarray.ndarray\nNDArray"):
    return b"c" + name.encode() + b"\nN\x85R}" + text("handle") + handle(data) + b"sb"


def saved(data, **kwargs):
    """A file whose state 0 is an array of these bytes."""
    return whole(an_array(data, **kwargs))


def whole(state):
    return b"\x80\x04}(K\x00" + state + b"K\x01Nu."


def dense(shape=(2,), magic=V3, storage=0, device=1, flag=0, data=b"\0" * 8, ndim=None):
    ndim = len(shape) if ndim is None else ndim
    head = struct.pack(f"<IiI{len(shape)}q", magic, storage, ndim, *shape)
    return head + struct.pack("<iii", device, 0, flag) + data


def row_sparse(stored=(1, 1), shape=(4, 1), flag=6, count=1, values=b"\0" * 4, rows=(2,), magic=V2):
    head = struct.pack("<IiIqq", magic, 1, 2, *stored) + struct.pack("<Iqq", 2, *shape)
    head += struct.pack("<iiiiIq", 1, 0, 0, flag, 1, count)
    return head + values + struct.pack(f"<{len(rows)}q", *rows)


ALL = b"\x85\x85\x85"


@pytest.mark.parametrize("shape", [(2,), (1, 2), (), (0, 3), (2, 0, 2**40)])
def test_made_up_arrays_that_are_fine(shape):
    data = b"\0" * 4 * int(np.prod(shape, dtype=object))
    assert parse(saved(dense(shape, data=data)))[0][0].shape == shape
    assert parse(saved(dense(shape, data=data), name="mxnet.numpy\nndarray"))[0][1] is None
    assert parse(saved(row_sparse()))[0][0].shape == (4, 1)
    assert parse(saved(row_sparse(stored=(0, 1), count=0, values=b"", rows=())))[0][0].shape == (4, 1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "larger than its data"),
        (dense(shape=(3,)), "larger than its data"),
        (dense(shape=(1,)), "smaller than its data"),
        (dense(shape=(2**62,)), "beyond the file"),
        (dense(shape=(-2,)), "beyond the file"),
        (dense(shape=(-1, -2)), "beyond the file"),
        (dense(ndim=0xFFFFFFFF), "-1 dimensions"),
        (dense(ndim=33, shape=(1,) * 33), "33 dimensions"),
        (dense(magic=0xF993FAC8), "format 0xf993fac8"),
        (dense(magic=1), "format 0x1 "),
        (dense(storage=2), "storage 2"),
        (row_sparse(magic=V3), "storage 1"),
        (dense(device=9), "device of type 9"),
        *((dense(flag=flag), f"type {flag} ") for flag in (-1, 3, 4, 5, 6, 7, 12)),
        (row_sparse(shape=(2**40, 1)), "beyond the file"),
        (row_sparse(shape=(-4, 1)), "beyond the file"),
        (row_sparse(rows=(4,)), "fit together"),
        (row_sparse(rows=(-1,)), "fit together"),
        (row_sparse(flag=4), "fit together"),
        (row_sparse(stored=(1, 2), values=b"\0" * 8), "fit together"),
        (row_sparse(stored=(2, 1), values=b"\0" * 8, count=2, rows=(2, 2)), "fit together"),
        (row_sparse(stored=(2, 1), values=b"\0" * 8, count=2, rows=(2, 1)), "fit together"),
        (row_sparse(count=-1), "larger than its data"),
        (row_sparse(count=2**60), "larger than its data"),
    ],
)
def test_odd_arrays(data, message):
    with pytest.raises(CheckpointError, match=message):
        parse(saved(data))


GOOD = an_array(dense())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x04N.", "no dictionary"),
        (b"\x80\x04}}\x86.", "optimizer or scheduler"),
        (b"\x80\x04}cmxnet.optimizer.nag\nNAG\n)\x81\x86.", "optimizer or scheduler"),
        (b"\x80\x04}cmxnet.lr_scheduler\nPolyScheduler\n)\x81}" + text("a") + b"Nsb\x86.", "or scheduler"),
        (b"\x80\x04}cmxnet.optimizer.nag\nNAG\n)\x81}" + text("a") + GOOD + b"sb\x86.", "attribute 'a'"),
        (b"\x80\x04}cmxnet.optimizer.nag\nNAG\n)\x81}" + text("class") + b"Nsb\x86.", "called 'class'"),
        (b"\x80\x04}cmxnet.optimizer.adam\nAdam\n)\x81\x86.", "'mxnet.optimizer.adam.Adam'"),
        (b"\x80\x04}cmxnet.optimizer.nag\nNAG\nN\x85R\x86.", "made"),
        (b"\x80\x04}NN.", "not a whole"),
        (whole(b"N") + b"\0", "more than one"),
        (b"\x80\x04(}.", "more than one"),
        (b"\x80\x04}(K\x00NK\x00Nu.", "twice"),
        (b"\x80\x04}(K\x00NKu.", "not a whole"),
        (b"\x80\x04}(K\x00NK\x01u.", "not a whole"),
        (b"\x80\x04}(\x88Nu.", "by index or name"),
        (b"\x80\x04](K\x00Nu.", "by index or name"),
        (b"\x80\x04}Na.", "than a list"),
        (b"\x80\x04\x85.", "less on the stack"),
        (b"\x80\x04h\x07.", "not a whole"),
        (b"\x80\x04B\xff\xff\xff\x7f.", "not a whole"),
        (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.", "not a whole"),
        (b"\x80\x04\x8b\xff\xff\xff\x7f.", "not a whole"),
        (whole(b"K\x05"), "neither None nor an array"),
        (whole(b")"), "neither None nor an array"),
        (whole(b"]"), "neither None nor an array"),
        (whole(b"N" + ALL), "neither None nor an array"),
        (whole(b"cmxnet.ndarray.ndarray\nNDArray\n"), "neither None nor an array"),
        (whole(b"cmxnet.ndarray.ndarray\nNDArray\nN\x85R"), "neither None nor an array"),
        (whole(GOOD + b"\x94h\x00\x86"), "share"),
        (whole(b"N\x85\x94h\x00\x86"), "share"),
        (whole(GOOD + b"}b"), "has a state"),
        (whole(b"cmxnet.ndarray.ndarray\nNDArray\nN\x85R}b"), "has a state"),
        (whole(b"cmxnet.ndarray.ndarray\nNDArray\n}b"), "has a state"),
        (whole(b"cmxnet.ndarray.ndarray\nNDArray\n)R"), "made"),
        (whole(b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R"), "made"),  # bytearray(2**31 - 1)
    ],
)
def test_odd_files(content, message):
    with pytest.raises(CheckpointError, match=message):
        parse(content)


def test_many_arrays_from_few_bytes(monkeypatch):
    monkeypatch.setattr(mxnet_states, "LIMIT", 2**20)
    data = row_sparse(shape=(2**16, 1))  # one row there, 256 KiB said
    each = b"cmxnet.ndarray.sparse\nRowSparseNDArray\nN\x85R}" + text("handle") + b"h\x00sb"
    for count, message in ((4, "no dictionary"), (5, "beyond the file")):
        states = b"".join(b"K" + bytes([index]) + each for index in range(count))
        with pytest.raises(CheckpointError, match=message):
            parse(b"\x80\x04" + handle(data) + b"\x94}(" + states + b"u\x86.")


@pytest.mark.parametrize("content", [b"K\x00N" + b"\x85" * 200_000 + b"s", b"N" + b"\x85" * 200_000 + b"Ns"])
def test_deep_nests(content):  # hashing the second as a key overflows the C stack of pickle.loads
    with pytest.raises(CheckpointError):
        parse(b"\x80\x04}" + content + b".")


def test_doubling_nests():
    def twice(k):
        return b"h" + bytes([k]) + b"h" + bytes([k])

    tuples = b"".join(b"K" + bytes([k + 1]) + twice(k) + b"\x86\x94" for k in range(60))
    with pytest.raises(CheckpointError, match="share"):
        parse(b"\x80\x04}(K\x00N\x85\x94" + tuples + b"u.")
    lists = b"".join(text(f"a{k}") + b"]\x94(" + twice(k) + b"e" for k in range(60))
    itself = b"]\x94h\x00a"
    for attributes in (text("a") + b"]\x94" + lists, text("a0") + itself):
        content = b"\x80\x04}cmxnet.optimizer.nag\nNAG\n)\x81}(" + attributes + b"ub\x86."
        with pytest.raises(CheckpointError, match="attribute 'a0'"):
            parse(content)


# ---------------------------------------------------------------- files that attack


def attacks(command):
    """Instructions that leave one object, and run the command if pickle follows them."""
    system, eval_ = b"cos\nsystem\n", b"cbuiltins\neval\n"
    code = text(f"__import__('os').system({command!r})")
    command = text(command)
    nd = b"cmxnet.ndarray.ndarray\nNDArray\n"
    return {
        "reduce": system + command + b"\x85R",
        "stack global": text("os") + text("system") + b"\x93" + command + b"\x85R",
        "eval": eval_ + code + b"\x85R",
        "exec": b"cbuiltins\nexec\n" + code + b"\x85R",
        "inst": b"(" + command + b"ios\nsystem\n",
        "obj": b"(" + system + command + b"o",
        "popen": b"csubprocess\ngetoutput\n" + command + b"\x85R",
        "getattr": b"cbuiltins\ngetattr\ncos\n_Environ\n" + text("get") + b"\x86R0" + eval_ + code + b"\x85R",
        "partial": b"cfunctools\npartial\n" + system + command + b"\x86R)R",
        "map": b"cbuiltins\nlist\ncbuiltins\nmap\n" + system + command + b"\x85\x86R\x85R",
        "in an array": nd + system + command + b"\x85R\x85R",
        "in a handle": nd + b"N\x85R}" + text("handle") + system + command + b"\x85Rsb",
        "beside an array": GOOD + eval_ + code + b"\x85R\x86",
        "of bytearray": b"cbuiltins\nbytearray\n" + system + command + b"\x85R\x85R",
        "__setstate__": b"ctypes\nSimpleNamespace\n)\x81}"
        + text("__setstate__")
        + system
        + b"sb"
        + command
        + b"b",
        "a slot's state": b"ctypes\nSimpleNamespace\n)\x81N}" + text("f") + system + command + b"\x85Rs\x86b",
        "append": b"ctypes\nSimpleNamespace\n)\x81}" + text("append") + system + b"sb(" + command + b"e",
        "new with keywords": b"csubprocess\nPopen\n)}\x92" + eval_ + code + b"\x85R\x86",
    }


NAMES = attacks("")
NEEDS_MXNET = {"in an array", "in a handle", "beside an array"}


@pytest.mark.parametrize("name", NAMES)
def test_attacks(name, tmp_path):
    canary = tmp_path / "canary"
    state = attacks(f"echo > '{canary}'")[name]
    for content in (b"\x80\x04" + state + b".", whole(state), b"\x80\x04}" + state + b"\x86."):
        with pytest.raises(CheckpointError):
            parse(content)
    assert not canary.exists()
    assert "mxnet" not in sys.modules
    if name not in NEEDS_MXNET:  # the attack is a real one
        with contextlib.suppress(TypeError, AttributeError, pickle.UnpicklingError):  # after it ran
            pickle.loads(whole(state))
        assert canary.exists()


@pytest.mark.parametrize(
    "state",
    [
        *(
            f"c{name}\n".encode()
            for name in ("numpy\nndarray", "ctypes\nCDLL", "functools\npartial", "os\nsystem")
        ),
        *(
            f"c{name}\n".encode()
            for name in ("copyreg\n_reconstructor", "numpy._core.multiarray\n_reconstruct")
        ),
        *(f"cmxnet.ndarray.ndarray\n{name}\n".encode() for name in ("NDArray.__init__", "ctypes.CDLL", "")),
        b"cbuiltins\nbytearray.fromhex\n",
        text("mxnet.ndarray.ndarray") + b"K\x00\x93",
        text("\ud800".encode("utf-8", "surrogatepass").decode("latin-1")) + text("a" * 10**6) + b"\x93",
        b"Pname\n",
        b"Nq\x00Q",
        b"\x82\x01",
        b"\x83\x01\x00",
        b"\x84\x01\x00\x00\x00",
        b"\x97",
        b"N0N",
        b"N2\x86",
        b"I1\n",
        b"S'a'\n",
        b"\x8f",
    ],
)
def test_names_and_instructions_that_do_not_belong(state):
    for content in (whole(state), whole(GOOD + state + b"\x86")):
        with pytest.raises(CheckpointError, match=r"not known here|no name|does not save"):
            parse(content)


def test_cached_extensions_are_not_handed_out():
    copyreg.add_extension("os", "system", 240)
    try:
        assert pickle.loads(b"\x82\xf0.").__name__ == "system"  # from now on in pickle's cache
        with pytest.raises(CheckpointError, match="EXT1"):
            parse(whole(b"\x82\xf0"))
    finally:
        copyreg.remove_extension("os", "system", 240)


def test_no_unpickler():
    assert "pickle" not in vars(mxnet_states)
