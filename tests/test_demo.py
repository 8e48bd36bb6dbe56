"""`numba-opt demo`, cut short, and the command around it."""

import re
import subprocess
import sys

import numpy as np
import pytest

import numba_opt
from numba_opt.tools import cli

pytest.importorskip("tqdm")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from threadpoolctl import threadpool_limits

from numba_opt.demo import curves, digits, words

OPTIMIZERS = ("NAG", "RMSProp", "Adamax", "FTML", "GroupAdaGrad")


@pytest.fixture(autouse=True)
def _one_blas_thread():
    """As `demo.run` has it, for the tests that go past it."""
    with threadpool_limits(1, "blas"):
        yield


def test_digits(tmp_path, capsys):
    assert (
        cli.main(["demo", "--part", "digits", "--epochs", "3", "--out", str(tmp_path / "new"), "--quiet"])
        == 0
    )
    out, err = capsys.readouterr()
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith(OPTIMIZERS)}
    assert tuple(rows) == OPTIMIZERS
    for loss, accuracy, microseconds in rows.values():
        assert 0 < float(loss) < 1
        assert 0.8 < float(accuracy) <= 1
        assert float(microseconds) > 0
    assert (tmp_path / "new" / "digits.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert err == ""


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns(name):
    found = digits.train(name, digits.RATES[name], *digits.load(), epochs=8, quiet=True)
    assert found.losses[-1] < 0.15 * found.losses[0]
    assert found.accuracy >= 0.95


@pytest.mark.parametrize("chance", [False, True], ids=["nearest", "chance"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bfloat16_states_learn_as_well(name, chance):
    """To half a percentage point of 360 images: one image less."""
    data = digits.load()
    options = {"state_dtype": "bfloat16", "stochastic_rounding": chance}
    usual, found = (
        digits.train(name, digits.RATES[name], *data, epochs=12, quiet=True, **given).accuracy
        for given in ({}, options)
    )
    assert found >= usual - 0.005


def test_gradients_of_the_network():
    rng = np.random.default_rng(1)
    data = digits.Data(rng.random((5, 64)), np.arange(5))
    weights = [weight.astype(float) for weight in digits.network(hidden=6)]
    gradients = digits.backward(weights, *data)
    assert_slopes(weights, gradients, lambda: digits.loss(weights, data))


def test_gradients_of_skip_gram():
    rng = np.random.default_rng(1)
    tables = [rng.normal(size=(9, 4)), rng.normal(size=(9, 4))]
    batch = np.array([1, 5, 1]), np.array([0, 2, 2]), np.array([7, 2])
    found = words.skip_gram(tables, *batch)[1]
    assert [gradient.rows.tolist() for gradient in found] == [[1, 5, 1], [0, 2, 2, 7, 2]]
    gradients = [gradient.to_dense() for gradient in found]
    assert_slopes(tables, gradients, lambda: words.skip_gram(tables, *batch)[0] * 3)  # a sum of 3 pairs


def assert_slopes(arrays, gradients, loss, h=1e-6):
    """Gradients are the slopes of a loss along some of the arrays' elements."""
    rng = np.random.default_rng(2)
    for array, gradient in zip(arrays, gradients, strict=True):
        for place in zip(*(rng.integers(n, size=40) for n in array.shape), strict=True):
            array[place] += h
            above = loss()
            array[place] -= 2 * h
            below = loss()
            array[place] += h
            assert (above - below) / (2 * h) == pytest.approx(gradient[place], rel=1e-4, abs=1e-6)


def test_words(tmp_path, capsys, monkeypatch):
    rng = np.random.default_rng(0)
    topics = ("threadPool_lock daemon", "HTTPServer socket port")
    for name in ("b.py", "a.py", "test/skipped.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(" ".join(topics[i] for i in rng.integers(2, size=20).repeat(25)))
    monkeypatch.setattr(words, "FREQUENT", 1.0)
    found = words.run(epochs=40, quiet=True, root=tmp_path)
    assert set(found) == {"thread", "socket"}
    assert set(found["thread"][:3]) == {"pool", "lock", "daemon"}
    assert set(found["socket"][:3]) == {"http", "server", "port"}
    out, err = capsys.readouterr()
    first, last = map(float, re.search(r"from (\d+\.\d+) to (\d+\.\d+)", out).groups())
    assert last < first
    assert "   thread: " in out
    assert err == ""


def test_words_of_a_source(tmp_path):
    (tmp_path / "a.py").write_bytes(b"HTTPServer.get_fileName2(x, '\xff') # XMLParser")
    assert list(words.read(tmp_path)) == ["http", "server", "get", "file", "name", "xml", "parser"]


def test_no_source_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match="no Python source"):
        words.run(root=tmp_path)


def test_labels_stand_apart():
    heights = curves.spread({"a": 0.011, "b": 0.01, "c": 1.0}, 0.001, 10)
    assert list(heights) == ["b", "a", "c"]
    assert heights["b"] == pytest.approx(0.25)
    assert heights["a"] - heights["b"] >= 0.05
    assert heights["c"] == pytest.approx(0.75)


@pytest.mark.parametrize("module", ["tqdm", "threadpoolctl", "sklearn.datasets", "matplotlib.figure"])
def test_missing_extra(module, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    for name in ("digits", "words", "curves"):
        monkeypatch.delitem(sys.modules, f"numba_opt.demo.{name}")
    assert cli.main(["demo", "--out", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"numba-opt demo: {module.partition('.')[0]} is missing: pip install numba_opt[demo]\n"


def test_another_missing_module_is_a_bug(monkeypatch):
    monkeypatch.setattr(words, "run", lambda *_: __import__("no_such_module"))
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        cli.main(["demo", "--part", "words"])


def test_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["demo", "--part", "digits", "--out", str(tmp_path / "file")]) == 1
    assert re.fullmatch(r"numba-opt demo: .*file'\n", capsys.readouterr().err)


def test_interrupt(monkeypatch, capsys):
    def press(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(words, "train", press)
    assert cli.main(["demo", "--part", "words"]) == 130
    assert capsys.readouterr().err == "numba-opt demo: interrupted\n"


@pytest.mark.parametrize("arguments", [[], ["dance"], ["demo", "--epochs", "0"], ["demo", "--part", "x"]])
def test_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2
    assert "usage: numba-opt" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"]])
def test_help_has_examples(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 0
    assert "examples:\n  numba-opt demo" in capsys.readouterr().out


def test_version_as_a_module():
    found = subprocess.run(
        [sys.executable, "-m", "numba_opt", "--version"], capture_output=True, text=True, check=True
    )
    assert found.stdout == f"numba_opt {numba_opt.__version__}\n"


def test_arguments_of_run():
    from numba_opt import demo

    with pytest.raises(ValueError, match="part must be one of digits, words or all, got 'x'"):
        demo.run("x")
    with pytest.raises(ValueError, match="epochs must be an integer >= 1, got 0"):
        demo.run(epochs=0)
