"""MXNet's side of the benchmarks, run by MXNet's own interpreter: ``python -m perf.mxnet_worker``.

One JSON object a line comes in, one JSON value a line goes out. The worker ends with its input.
"""

from __future__ import annotations

import json
import os
import sys

import mxnet

from .clock import sample
from .workloads import RULES, WORKLOADS, Workload, arrays


def stepper(workload: Workload):
    """A call that performs one step of a workload, to its end."""
    rule = RULES[workload.rule]
    optimizer = mxnet.optimizer.create(rule.optimizer, **rule.options)
    weights, grads = ([mxnet.nd.array(a) for a in column] for column in arrays(workload.shapes))
    indices = list(range(len(weights)))
    states = [optimizer.create_state(i, weight) for i, weight in enumerate(weights)]
    mxnet.nd.waitall()

    def step():
        optimizer.update(indices, weights, grads, states)
        mxnet.nd.waitall()

    return step


def serve() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever MXNet prints
    known = {workload.name: workload for workload in WORKLOADS}
    step = None
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "version":
            answer = mxnet.__version__
        elif command["do"] == "prepare":
            step = None  # its arrays go first
            step = stepper(known[command["workload"]])
            answer = True
        else:
            answer = sample(step, command["repeats"], command["warm"])
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
