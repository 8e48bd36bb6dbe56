"""CUDA kernels in Numba's simulator, with no GPU: `tests/simulated` in processes that have it switched on."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

pytestmark = pytest.mark.skipif(
    find_spec("numba_cuda") is None, reason="needs the package numba-cuda: pip install 'numba_opt[cuda]'"
)


@pytest.mark.parametrize("name", sorted(path.stem for path in (TESTS / "simulated").glob("[!_]*.py")))
def test_simulated(name, tmp_path):
    if name.startswith("torch"):
        pytest.importorskip("torch")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "tests.cuda_host", "-p", "no:cacheprovider"),
            *("-W", "ignore::RuntimeWarning", str(TESTS / "simulated" / f"{name}.py")),
        ],
        cwd=TESTS.parent,
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
