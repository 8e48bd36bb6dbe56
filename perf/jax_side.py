"""The ways of optax: one jitted step, parameters and states donated. jax is imported when asked.

XLA's threads are as many as the machine has cores and cannot be changed later, so workloads with another
number are left to others.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from typing import Any

from .clock import Runner, runner, timed
from .workloads import Workload, arrays

OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "nag": ("sgd", {"learning_rate": 0.01, "momentum": 0.9, "nesterov": True}),
    "rmsprop": ("rmsprop", {"learning_rate": 0.001, "decay": 0.9}),
    "rmsprop-centered": (
        "rmsprop",
        {"learning_rate": 0.001, "decay": 0.9, "momentum": 0.9, "centered": True},
    ),
    "adamax": ("adamax", {"learning_rate": 0.002}),
    "groupadagrad": ("adagrad", {"learning_rate": 0.01}),  # a number for each element
}


def step(workload: Workload, clipped: bool = False) -> Runner | None:
    import jax
    import optax

    name, options = OPTIMIZERS.get(workload.rule, ("", {}))
    if not name or workload.masters or workload.threads != os.cpu_count():
        return None
    jax.config.update("jax_enable_x64", True)
    optimizer = getattr(optax, name)(**options)
    if clipped:
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optimizer)
    weights, grads = (jax.tree.map(jax.numpy.array, column) for column in arrays(workload))

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    held = [weights, jax.jit(optimizer.init)(weights)]

    def run() -> None:
        held[:] = update(*held, grads)
        jax.block_until_ready(held)

    return runner(run)


FIRST_STEP = """
import jax, optax
weight = grad = jax.numpy.ones(256)
optimizer = optax.rmsprop(0.001)
update = jax.jit(optimizer.update)
jax.block_until_ready(update(grad, optimizer.init(weight), weight))
"""


def start(workload: Workload) -> Runner | None:
    """A process that makes one RMSprop step. Nothing is kept for the next one by default."""
    if workload.what != "warm":
        return None
    return timed(lambda: subprocess.run([sys.executable, "-c", FIRST_STEP], check=True))
