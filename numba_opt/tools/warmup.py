"""Everything that a program will need, compiled beforehand: for the start of a program, or of a container."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, NamedTuple

from ..compiler import cache, private
from . import wanted
from .crew import KernelRequest, Work

__all__ = ["Summary", "warmup"]


class Summary(NamedTuple):
    """The result of `warmup`."""

    compiled: int
    loaded: int  # from the cache, or there already
    seconds: float
    folder: str
    kept: bool  # whether the cache can be written

    def __str__(self) -> str:
        done = f"{self.compiled} kernels compiled, {self.loaded} loaded in {self.seconds:.2f} s"
        return f"{done}; {'kept in' if self.kept else 'none can be kept in'} {self.folder}"


def warmup(
    optimizers: Any = None,
    dtypes: Any = ("float32",),
    devices: Any = None,
    sparse: bool = True,
    progress: bool = True,
) -> Summary:
    """Compile, or load from the cache, all that a program will need.

    Parameters
    ----------
    optimizers : Optimizer, class or name, or a list of these, optional
        Classes and names mean all their variants, on GPUs those of `numba_opt.torch` too if torch is there;
        an instance means itself. Default: everything that is registered and can be made without arguments.
    dtypes : dtype or list of dtypes, default ("float32",)
        Of the parameters and their gradients: float32, float64, float16, bfloat16, by name or as objects.
        Half precision means with and without float32 copies of the weights; for an instance, as its
        `multi_precision` says.
    devices : str or list of str, default "cpu"
        Whose kernels: "cpu"; "cuda" for all GPUs that are there, or "cuda:1" for one of them; or a compute
        capability such as "sm_90", for which neither a GPU nor a driver is needed.
    sparse : bool, default True
        Whether there will be sparse gradients: row-sparse, and CSR with 32-bit or 64-bit indices.
    progress : bool, default True
        Show a progress bar, if stderr is a terminal and tqdm is installed.

    Returns
    -------
    Summary
        How many kernels were ``compiled`` and how many ``loaded``, the ``seconds``, the cache's ``folder``,
        and whether it can be written. Its text is one line.

    Raises
    ------
    TypeError, ValueError
        An optimizer, dtype or device is unknown.
    CudaUnavailableError
        A GPU is asked for, and there is none, or no numba-cuda.

    Examples
    --------
    >>> import numba_opt
    >>> summary = numba_opt.warmup("nag", "float64", sparse=False)
    >>> numba_opt.warmup("nag", "float64", sparse=False).compiled  # all there
    0
    """
    began = time.perf_counter()
    variants, codes = wanted.variants(optimizers), wanted.codes(dtypes)
    requests: list[KernelRequest] = []
    for target in wanted.targets(devices):
        if target == "cpu":
            made = wanted.cpu_kernels(variants, codes, bool(sparse))
            requests += [KernelRequest(name, tuple(args)) for name, *args in made]
        else:
            made = wanted.cuda_kernels(variants, codes, bool(sparse))
            requests += [KernelRequest("cuda", (target, *request)) for request in made]
    kernels = list(dict.fromkeys(requests))
    kept = _writable()
    with _bar(len(kernels), progress) as advance:
        compiled = Work(kernels, advance, helped=kept).run()
    seconds = time.perf_counter() - began
    return Summary(compiled, len(kernels) - compiled, seconds, str(cache.folder()), kept)


def _writable() -> bool:
    """Tell whether kernels can be kept; if not, it is of no use that another process compiles them."""
    try:
        private.make(cache.folder())
        if private.distrusted(cache.folder()):
            return False
        with tempfile.TemporaryFile(dir=cache.folder()) as file:
            file.write(bytes(1 << 17))  # as much as the largest kernel
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _bar(total: int, wanted: bool) -> Iterator[Callable[[], object]]:
    """Give what to call after each kernel, within a progress bar if there is somebody to look at it."""
    tqdm: Any = None
    if wanted and sys.stderr is not None and sys.stderr.isatty():
        with contextlib.suppress(ModuleNotFoundError):
            tqdm = import_module("tqdm").tqdm
    if tqdm is None:
        yield lambda: None
        return
    with tqdm(total=total, desc="kernels", leave=False) as bar:
        yield bar.update
