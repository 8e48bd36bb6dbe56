"""MXNet's side of the benchmarks, run by MXNet's own interpreter: ``python -m perf.mxnet_worker``.

One JSON object a line comes in, one JSON value a line goes out, an object if there was an error. The worker
ends with its input.
"""

from __future__ import annotations

import json
import os
import sys

import mxnet

from .clock import runner
from .workloads import RULES, WORKLOADS, arrays, touched


def stepper(workload):
    """A call that performs one step of a workload, to its end."""
    rule = RULES[workload.rule]
    optimizer = mxnet.optimizer.create(rule.optimizer, **rule.options, multi_precision=workload.masters)
    if workload.rows:
        ((numbers, values),), (shape,) = touched(workload), workload.shapes
        weights = [mxnet.nd.zeros(shape)]
        grads = [mxnet.nd.sparse.row_sparse_array((values, numbers), shape=shape)]
    else:
        columns = arrays(workload)
        weights, grads = ([mxnet.nd.array(a, dtype=workload.dtype) for a in column] for column in columns)
    indices = list(range(len(weights)))
    states = [optimizer.create_state_multi_precision(i, weight) for i, weight in enumerate(weights)]
    mxnet.nd.waitall()

    def step():
        if workload.kind == "clip":
            mxnet.gluon.utils.clip_global_norm(grads, 1.0, check_isfinite=False)
        optimizer.update_multi_precision(indices, weights, grads, states)
        mxnet.nd.waitall()

    return step


def serve() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever MXNet prints
    known = {workload.name: workload for workload in WORKLOADS}
    run = None
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if command["do"] == "version":
                answer = mxnet.__version__
            elif command["do"] == "prepare":
                run = None  # its arrays go first
                run = runner(stepper(known[command["workload"]]))
                answer = True
            else:
                answer = run(command["repeats"], command["warm"])
        except Exception as error:  # the next workload may well work
            answer = {"error": f"{type(error).__name__}: {error}"[:200]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
