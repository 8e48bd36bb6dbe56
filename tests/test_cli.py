"""The command line: info, warmup and bench. `demo` has its own tests."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys

import numba
import numpy as np
import pytest

import numba_opt
from numba_opt.compiler import cache
from numba_opt.cpu import threads
from numba_opt.tools import bench, cli, info

from .scripts import awaited, environment


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cache of a test's own, which holds more than kernels of this package."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    assert cache.folder() == tmp_path / "numba_opt"
    return tmp_path


def run(capsys, *arguments):
    """The exit status, and what was printed to stdout and stderr."""
    status = cli.main(list(map(str, arguments)))
    return status, *capsys.readouterr()


# ---------------------------------------------------------------- info


def test_info(capsys, folder):
    (folder / "numba_opt").mkdir()
    (folder / "numba_opt" / "nag-0.nbc").write_bytes(bytes(3 << 20))
    status, out, err = run(capsys, "info")
    assert (status, err) == (0, "")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert list(lines) == [
        "versions",
        "optional",
        "processor",
        "features",
        "threads",
        "layer",
        "cuda",
        "cache",
    ]
    assert f"numba_opt {numba_opt.__version__}, python 3." in lines["versions"]
    assert f"numba {numba.__version__}" in lines["versions"]
    assert "never entered" in lines["layer"]
    assert ("no devices: " in lines["cuda"]) != ("compute capability" in lines["cuda"])
    assert lines["cache"].endswith(f"{folder / 'numba_opt'}, 1 kernels, 3.0 MiB")


def test_info_as_json(capsys, folder):
    status, out, err = run(capsys, "info", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["versions"]["numpy"] == np.__version__
    assert set(found["versions"]) == {"numba_opt", "python", "numba", "llvmlite", "numpy", "scipy"}
    assert found["processor"]["cores"] >= 1
    assert found["processor"]["name"]
    assert found["threads"]["count"] == threads.count()
    assert found["cache"] == {
        "folder": str(folder / "numba_opt"),
        "entries": 0,
        "bytes": 0,
        "writable": True,
        "trusted": True,
        "why": "",
    }


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="asks for an x86")
def test_info_names_what_is_in_use():
    """As LLVM is told: a processor without the newest instructions."""
    env = environment(NUMBA_NUM_THREADS=3, NUMBA_CPU_NAME="x86-64-v2", NUMBA_CPU_FEATURES="+sse4.2,-avx2")
    command = [sys.executable, "-m", "numba_opt", "info", "--json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["processor"]["features"] == ["sse4.2"]
    assert found["processor"]["target"] == "x86-64-v2"
    assert found["threads"]["count"] == 3
    assert found["threads"]["why"] == "as NUMBA_NUM_THREADS=3 says"


def test_info_of_a_cache_that_cannot_be_written(capsys, folder, monkeypatch):
    (folder / "file").touch()
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(folder / "file"))
    _, out, _ = run(capsys, "info")
    assert "cannot be written: kernels are compiled in each process" in out


# ---------------------------------------------------------------- warmup


def test_warmup(capsys):
    status, out, err = run(capsys, "warmup", "nag", "--dense")
    assert (status, err) == (0, "")
    assert out.count("\n") == 1
    assert " kernels compiled, " in out
    status, out, err = run(capsys, "warmup", "NAG", "--dense", "--dtypes", "float32", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert set(found) == {"compiled", "loaded", "seconds", "folder", "kept"}
    assert (found["compiled"], found["loaded"]) == (0, 5)


def test_clear_removes_only_what_is_ours(capsys, folder):
    ours = folder / "numba_opt"
    ours.mkdir()
    others = [folder / "other.nbc", folder / "other" / "kernel.nbc", ours / "notes.txt"]
    for path in (*others, ours / "a.nbc", ours / "b.nbc", ours / "left.tmp"):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    status, out, err = run(capsys, "warmup", "--clear")
    assert (status, err, out) == (0, "", f"2 kernels removed from {ours}\n")
    assert sorted(p for p in folder.rglob("*") if p.is_file()) == sorted(others)
    status, out, err = run(capsys, "warmup", "--clear", "--json")
    assert json.loads(out) == {"removed": 0, "folder": str(ours)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["warmup", "nix"], "name must be one of "),
        (["warmup", "--dtypes", "int8"], "dtypes must be among float32, float64, float16, bfloat16"),
        (["warmup", "--device", "tpu"], "devices must be 'cpu', 'cuda', "),
        (["warmup", "nag", "--clear"], "--clear empties the whole cache"),
        (["bench", "--plot", "picture.doc"], "the name must end in one of "),
        (["bench", "--plot", "/no such folder/a.png"], "there is no folder"),
        (["bench", "--elements", str(10**15)], "needs more memory than there is"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message, capsys):
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"numba-opt {arguments[0]}: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["bench", "--elements", "0"], ["warmup", "--dtypes"], ["info", "x"]])
def test_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2
    assert "usage: numba-opt" in capsys.readouterr().err


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main([command, "--help"])
    assert error.value.code == 0
    assert f"examples:\n  numba-opt {command}" in capsys.readouterr().out


def test_somebody_who_reads_one_line():
    """Closing the pipe is no reason for a traceback."""
    env = environment()
    with subprocess.Popen(
        [sys.executable, "-m", "numba_opt", "info"],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        running.stdout.close()
        assert running.stderr.read() == ""
    assert running.returncode == 1


# ---------------------------------------------------------------- bench


@pytest.fixture
def quick(monkeypatch):
    for name, value in {"WARM_UP": 0, "ROUNDS": 2, "SECONDS": 0.0, "SHORTEST": 0.0}.items():
        monkeypatch.setattr(bench, name, value)


OPTIMIZERS = {
    "NAG",
    "NAG(momentum=0)",
    "RMSProp",
    "RMSProp(centered=True)",
    "Adamax",
    "FTML",
    "FTML(reduced=True)",
    "GroupAdaGrad",
}


@pytest.mark.usefixtures("quick")
def test_bench(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "bench.png"
    status, out, err = run(capsys, "bench", "--elements", 5000, "--plot", picture)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("one step on 4,992 float32 elements, ")
    assert lines[1].startswith("memory limit: ")
    assert {line[:26].strip() for line in lines[4:]} >= OPTIMIZERS
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("elements", [1, 300_000])
def test_bench_as_json(capsys, elements):
    status, out, err = run(capsys, "bench", "--elements", elements, "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["limit"] > 0
    assert found["threads"] == threads.count()
    assert found["rounds"] == 2
    assert set(found["results"]) >= OPTIMIZERS
    for row in found["results"].values():
        assert set(row) == {"ms", "gb_per_s", "fraction"}
        assert min(row.values()) > 0


def test_bytes_that_a_step_must_move():
    pool = [np.zeros((10, 64), np.float32)] * 5
    moved = {name: bench._runner(opt, pool).bytes // 4 for name, opt in bench._optimizers().items()}
    assert moved["NAG(momentum=0)"] == 3 * 640
    assert moved["NAG"] == moved["FTML(reduced=True)"] == 5 * 640
    assert moved["FTML"] == moved["RMSProp(centered=True)"] == 9 * 640
    assert moved["GroupAdaGrad"] == 3 * 640 + 2 * 10


def test_bench_runs_the_kernels():
    assert all(optimizer.use_fused_step for optimizer in (*bench._optimizers().values(), bench.Bare(2)))


def test_picture_without_matplotlib(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, out, err = run(capsys, "bench", "--plot", tmp_path / "a.png")
    assert (status, out) == (1, "")
    assert err == "numba-opt bench: matplotlib is missing: pip install numba_opt[demo]\n"


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_interrupt(tmp_path):
    env = environment(NUMBA_CACHE_DIR=tmp_path)
    command = [sys.executable, "-m", "numba_opt", "bench", "--elements", "100000"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        awaited(lambda: len(list(tmp_path.rglob("*.nbc"))) >= 3, "three kernels")
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=300)
    assert (running.returncode, out, err) == (130, b"", b"numba-opt bench: interrupted\n")
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".nbc"}


def test_clearing_a_cache_that_is_not_there(folder):
    assert info.clear_cache() == 0
