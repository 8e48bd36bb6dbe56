"""Scripts that tests run in processes of their own, where the package and the tests can be imported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numba_opt

ROOT = Path(numba_opt.__file__).parents[1]
TESTS = Path(__file__).parents[1]

# Put before a script: `compiled` are the names of what Numba has compiled since.
COMPILED = """
from numba.core import event

class Listener(event.Listener):
    def on_start(self, event):
        compiled.append(event.data["dispatcher"].py_func.__name__)
    def on_end(self, event):
        pass

compiled = []
event.register("numba:compile", Listener())
"""

# What many scripts do: train on large and small arrays, and tell the results' digests.
TRAIN = """
import hashlib, json, os, random, signal, sys, threading, time, warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
import numpy as np
import numba_opt
from tests import table

warnings.simplefilter("ignore")  # Python 3.12 warns of forks beside threads

def digest(arrays):
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()

def train(name, steps=3, shapes=((500, 900), (30, 20), 7)):
    row = table.row(name)
    call = table.make(row, shapes)
    optimizer = table.build(row)
    for _ in range(steps):
        optimizer.update(*call)
    return digest(table.outputs(call))
"""


def environment(root=ROOT, **env):
    """The environment of such a process, with some variables set."""
    searched = os.pathsep.join(map(str, (root, TESTS)))
    return {**os.environ, "PYTHONPATH": searched, **{name: str(value) for name, value in env.items()}}


def printed(script, *args, python=sys.executable, options=(), timeout=600, cwd=None, root=ROOT, **env):
    """What a script prints: a text, or the path of a file that it is in. It must end well."""
    given = ["-c", script] if isinstance(script, str) else [str(script)]
    with subprocess.Popen(
        [python, *options, *given, *map(str, args)],
        env=environment(root, **env),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as running:
        try:
            out, err = running.communicate(timeout=timeout)
        except BaseException:
            end(running)
            raise
    assert running.returncode == 0, (running.returncode, out[-1500:], err[-3000:])
    return out


def end(process):
    """End a process that leads a session, and whatever it has started."""
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()


def result(script, *args, **settings):
    """The JSON that a script prints last; settings as for `printed`."""
    return json.loads(printed(script, *args, **settings).splitlines()[-1])


def awaited(happened, what, seconds=300):
    """Wait until something has happened, and return what it is; a busy machine may take long."""
    end = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < end, f"waited {seconds} seconds for {what}"
        time.sleep(0.02)
    return found
