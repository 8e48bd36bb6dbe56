"""The way to MXNet: `mxnet_worker` in an interpreter of its own, which times itself and says seconds."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from .clock import Runner
from .workloads import Workload


class Worker:
    """MXNet's process, with a number of threads."""

    def __init__(self, interpreter: str, threads: int) -> None:
        self.process = subprocess.Popen(
            [interpreter, "-W", "ignore", "-m", f"{__package__}.mxnet_worker"],
            cwd=Path(__file__).parents[1],
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, **command: Any) -> Any:
        try:
            print(json.dumps(command), file=self.process.stdin, flush=True)
            assert self.process.stdout is not None
            answer = json.loads(self.process.stdout.readline() or "null")
        except BrokenPipeError:
            answer = None
        if answer is None:
            worker.cache_clear()  # the next workload gets another one
            raise RuntimeError(f"the worker ended with code {self.process.wait()}")
        if isinstance(answer, dict):
            raise RuntimeError(answer["error"])
        return answer


@functools.lru_cache(1)
def worker(threads: int) -> Worker:
    """The worker of the moment; the one before ends with its input."""
    return Worker(os.environ["NUMBA_OPT_MXNET"], threads)


def version() -> str:
    """MXNet's version.

    Raises
    ------
    ImportError
        There is no interpreter that has it.
    """
    if "NUMBA_OPT_MXNET" not in os.environ:
        raise ImportError("NUMBA_OPT_MXNET does not name an interpreter that has it")
    try:
        return str(worker(1).ask(do="version"))
    except (OSError, RuntimeError) as error:
        raise ImportError(str(error)) from error


def prepare(workload: Workload) -> Runner | None:
    """Any kind of workload that MXNet knows."""
    if workload.dtype == "bfloat16" or (workload.masters and workload.dtype != "float16"):
        return None
    if workload.rows and (workload.rule != "groupadagrad" or workload.rows.occurrences):
        return None  # it wants each row once
    process = worker(workload.threads)
    process.ask(do="prepare", workload=workload.name)
    return lambda repeats, warm: float(process.ask(do="run", repeats=repeats, warm=warm))


def finish() -> None:
    """Let the worker end, and free its memory."""
    worker.cache_clear()
