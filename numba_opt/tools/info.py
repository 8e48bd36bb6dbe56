"""The information of `numba-opt info`: versions, processor, threads, devices and the cache."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy
from llvmlite import binding
from numba.core.registry import cpu_target

from .. import __version__
from ..compiler import cache, private
from ..cpu import threads
from ..cuda import arrays as cuda_arrays
from ..errors import CudaUnavailableError
from .crew import cores

__all__ = ["cache_usage", "clear_cache", "collect", "text"]

# Those that make a difference to the kernels, as LLVM calls them.
FEATURES = ("sse4.2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "neon", "sve", "sve2")

OPTIONAL = ("torch", "numba-cuda", "ml_dtypes", "tqdm", "matplotlib", "scikit-learn")


def collect() -> dict[str, Any]:
    """Collect plain values. Compiles nothing and imports no optional package but numba-cuda."""
    return {
        "versions": {
            "numba_opt": __version__,
            "python": platform.python_version(),
            "numba": numba.__version__,
            "llvmlite": llvmlite.__version__,
            "numpy": numpy.__version__,
            "scipy": _version("scipy"),
        },
        "optional": {name: _version(name) for name in OPTIONAL},
        "processor": _processor(),
        "threads": _threads(),
        "cuda": _cuda(),
        "cache": cache_usage(),
    }


def text(found: Mapping[str, Any]) -> str:
    """Return what `collect` found as a text for people."""
    processor, work, kept = found["processor"], found["threads"], found["cache"]
    versions = [f"{name} {version}" for name, version in found["versions"].items() if version]
    optional = [f"{name} {version}" for name, version in found["optional"].items() if version]
    fault = "" if kept["trusted"] else f", not trusted, as {kept['why']}"
    fault = fault or ("" if kept["writable"] else ", cannot be written")
    fault += ": kernels are compiled in each process" if fault else ""
    lines = {
        "versions": ", ".join(versions),
        "optional": ", ".join(optional) or "none installed",
        "processor": f"{processor['name']}, {processor['cores']} cores for this process",
        "features": f"{' '.join(processor['features']) or 'none'} (code is made for {processor['target']})",
        "threads": f"{work['count']}, {work['why']}",
        "layer": work["layer"],
        "cuda": ", ".join(map(_gpu, found["cuda"]["devices"])) or f"no devices: {found['cuda']['why']}",
        "cache": f"{kept['folder']}, {kept['entries']} kernels, {kept['bytes'] / 2**20:.1f} MiB{fault}",
    }
    return "\n".join(f"{name:<10} {line}" for name, line in lines.items())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cuda() -> dict[str, Any]:
    try:
        devices = [device.describe() for device in cuda_arrays.devices()]
    except CudaUnavailableError as error:
        return {"devices": [], "why": str(error)}
    return {"devices": devices, "why": "" if devices else "the driver knows of none"}


def _gpu(found: Mapping[str, Any]) -> str:
    return f"{found['name']} (compute capability {found['capability']}, {found['bytes'] / 2**30:.0f} GiB)"


def _processor() -> dict[str, Any]:
    _, target, features = cpu_target.target_context.codegen().magic_tuple()
    enabled = set(features.split(","))
    return {
        "name": _processor_name(),
        "architecture": platform.machine(),
        "cores": cores(),
        "target": target or binding.get_host_cpu_name(),
        "features": [name for name in FEATURES if f"+{name}" in enabled],
    }


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _threads() -> dict[str, Any]:
    given = os.environ.get("NUMBA_NUM_THREADS")
    why = f"as NUMBA_NUM_THREADS={given} says" if given else "one for each core"
    return {
        "count": threads.count(),
        "why": why,
        "layer": "ordinary threads of Python; Numba's threading layer is never entered",
        "shared_from": threads.SHARED,
    }


# ---------------------------------------------------------------- the cache


def _entries(*suffixes: str) -> list[Path]:
    folder = cache.folder()
    return [path for suffix in suffixes for path in folder.glob(f"*{suffix}")]


def cache_usage() -> dict[str, Any]:
    """Return the folder of compiled kernels, their number and bytes, and whether there can be more.

    What others may have written is not trusted: it says why.
    """
    entries = _entries(".nbc")
    folder = cache.folder()
    why = private.distrusted(folder)
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return {
        "folder": str(folder),
        "entries": len(entries),
        "bytes": sum(_size(path) for path in entries),
        "writable": nearest.is_dir() and os.access(nearest, os.W_OK),
        "trusted": not why,
        "why": why,
    }


def clear_cache() -> int:
    """Remove this package's compiled kernels, and what broken-off processes left; return how many kernels."""
    removed = 0
    for path in _entries(".nbc", ".tmp"):
        path.unlink(missing_ok=True)
        removed += path.suffix == ".nbc"
    return removed


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # somebody has just cleared the cache
        return 0
