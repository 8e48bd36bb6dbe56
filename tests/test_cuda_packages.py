"""Without a GPU, a driver or numba-cuda: imports are silent, and a CUDA request says what is missing."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest

import numba_opt
from numba_opt.cuda import arrays as cuda_arrays
from numba_opt.tools import cli

from .scripts import printed

HERE = find_spec("numba_cuda") is not None

needs_package = pytest.mark.skipif(
    not HERE, reason="needs the package numba-cuda: pip install 'numba_opt[cuda]'"
)
needs_none = pytest.mark.skipif(HERE, reason="numba-cuda is installed, and this is about its absence")


def has_gpu():
    try:
        return bool(cuda_arrays.devices())
    except numba_opt.cuda.CudaUnavailableError:
        return False


class Fake:
    """Says that it is a CUDA array."""

    shape, dtype = (4,), "float32"
    __cuda_array_interface__ = {"version": 3, "shape": (4,), "typestr": "<f4", "data": (16, False)}


@pytest.fixture
def no_gpu():
    if HERE and has_gpu():
        pytest.skip("there is a GPU, and this is about its absence")


def test_import_is_silent_and_touches_no_driver():
    script = (
        "import sys, numba_opt\n"
        "driver = ('numba_cuda', 'cuda.', 'numba.cuda.cudadrv')\n"
        "assert not [name for name in sys.modules if name == 'cuda' or name.startswith(driver)]"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_package
def test_the_first_use_is_silent():
    """Also where warnings are errors, whatever the packages warn of among themselves."""
    script = "from numba_opt.cuda import arrays\narrays.loops()"
    assert printed(script, options=("-W", "error")) == ""


@needs_none
def test_no_package():
    with pytest.raises(
        numba_opt.cuda.CudaUnavailableError, match=r"numba-cuda.*pip install 'numba_opt\[cuda"
    ):
        numba_opt.NAG().create_state(0, Fake())


@needs_package
def test_no_driver(no_gpu):
    with pytest.raises(numba_opt.cuda.CudaUnavailableError, match=r"NVIDIA's driver.*from version 580"):
        numba_opt.Trainer([Fake()], "nag")


def test_the_torch_front(no_gpu):
    torch = pytest.importorskip("torch")
    from numba_opt.torch import NAG

    from . import cuda_torch

    parameter = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(numba_opt.cuda.CudaUnavailableError, match=r"CUDA needs .*numba_opt\[cuda"):
        NAG([cuda_torch.on_gpu(parameter)])
    optimizer = NAG([parameter])
    with pytest.raises(numba_opt.cuda.CudaUnavailableError, match=r"CUDA needs .*numba_opt\[cuda"):
        optimizer.add_param_group({"params": cuda_torch.on_gpu(parameter)})
    assert len(optimizer.param_groups) == 1


def test_warmup_for_devices_that_are_not_there(no_gpu, capsys):
    with pytest.raises(numba_opt.cuda.CudaUnavailableError, match="CUDA needs"):
        numba_opt.warmup("nag", devices=["cuda"])
    assert cli.main(["warmup", "nag", "--device", "cuda"]) == 1
    assert "CUDA needs" in capsys.readouterr().err


@needs_package
def test_warmup_for_a_compute_capability(tmp_path, monkeypatch):
    """With no GPU: for the image of a container. The second time, all is there."""
    import numba

    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    first = numba_opt.warmup(numba_opt.NAG(), devices=["sm_90"], sparse=False, progress=False)
    assert first.compiled + first.loaded == 6  # `dense`, two that accumulate, `squares`, and two more
    again = numba_opt.warmup(numba_opt.NAG(), devices=["sm_90"], sparse=False, progress=False)
    assert (again.compiled, again.loaded) == (0, 6)
    assert [path.name.startswith("cuda-") for path in (tmp_path / "numba_opt").glob("*.nbc")]
