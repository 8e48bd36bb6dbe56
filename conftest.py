"""What every run of pytest shares: a place for compiled kernels, and how many processes work."""

from __future__ import annotations

import ast
import atexit
import hashlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent
PACKAGE = ROOT / "numba_opt"
KEPT = 3  # states of the kernels' sources whose compiled kernels are kept
MOST = 8  # processes of `-n auto`: each takes up to 1 GB

# Modules in which no examples are looked for: they have none, or what they import is not here.
NEEDED = {"numba_opt/torch/*": ["torch"], "numba_opt/demo/*": ["matplotlib", "sklearn", "tqdm"]}
NEED_CUDA = ("buffer", "code", "collect", "driver", "elements", "kernels", "loops", "rows")
collect_ignore_glob = [f"numba_opt/cuda/{name}.py" for name in NEED_CUDA]
collect_ignore_glob += [modules for modules, names in NEEDED.items() if None in map(find_spec, names)]


def own_folder() -> Path:
    """Where the suite keeps what the next run finds again; for somebody else's checkout a temporary one."""
    folder = ROOT / ".pytest_cache"
    try:
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="numba_opt-tests-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return folder


def kernels_sources() -> Iterator[Path]:
    """The files that kernels are made of, as a module says that must not be imported yet."""
    tree = ast.parse((PACKAGE / "compiler" / "sources.py").read_text())
    (patterns,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "OWN"
    )
    return (path for pattern in patterns for path in sorted(PACKAGE.glob(pattern)))


def kernels_folder(parent: Path) -> Path:
    """Where all processes of a run keep their kernels.

    Each state of the kernels' sources has a folder of its own, for an edit compiles all of them anew; those
    that were not used for the longest time go.
    """
    digest = hashlib.blake2b(digest_size=8)
    for path in kernels_sources():
        digest.update(path.read_bytes())
    folder = parent / "kernels" / digest.hexdigest()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.utime(folder)
    used = sorted(folder.parent.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in used[KEPT:]:
        shutil.rmtree(path, ignore_errors=True)
    return folder


# Before Numba and Matplotlib are imported; processes that are started find it in their environment.
if "NUMBA_CACHE_DIR" not in os.environ:
    own = own_folder()
    os.environ["NUMBA_CACHE_DIR"] = str(kernels_folder(own))
    os.environ.setdefault("MPLCONFIGDIR", str(own / "matplotlib"))

# Shells start programs in the background with SIGINT ignored, and these hand that on to theirs.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def registered(request):
    """Optimizers that an example registers are forgotten after it, as are the names that they use."""
    if not isinstance(request.node, pytest.DoctestItem):
        yield
        return
    from numba_opt import Optimizer

    known = Optimizer.opt_registry
    before = dict(known)
    yield
    for name in known.keys() - before.keys():
        del known[name]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """A process for each processor that this one may use; none but this one if that is one."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, MOST) if usable > 1 else 0
