"""The PyTorch front on more than one process: two of them on this machine, talking through gloo."""

from __future__ import annotations

import subprocess
import sys

import pytest

from .scripts import environment

torch = pytest.importorskip("torch")

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this torch has no torch.distributed with gloo", allow_module_level=True)


# Each process joins the group, trains a model on its half of each batch, and compares.
PRELUDE = """
import sys, warnings
import torch
import torch.distributed as dist
import numba_opt.torch as front

rank, meeting = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + meeting, rank=rank, world_size=2)

PAIRS = [
    (front.RMSProp, torch.optim.RMSprop, {}, {}),
    (front.Adamax, torch.optim.Adamax, {}, {}),
    (front.NAG, torch.optim.SGD, {"momentum": 0.9}, {"nesterov": True}),
]

def network(bias=True):
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 7, bias=bias), torch.nn.Tanh(), torch.nn.Linear(7, 3, bias=bias)
    )

def train(model, optimizer, own_part, steps=5):
    rng = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(8, 6, generator=rng)
        optimizer.zero_grad()
        model(x[rank::2] if own_part else x).square().sum(1).mean().backward()
        optimizer.step()

def alone(make, bias=True):
    model = network(bias)
    optimizer = make(model.parameters())
    train(model, optimizer, False)
    return model, optimizer

def near(found, expected):
    torch.testing.assert_close(list(found), list(expected), rtol=1e-5, atol=1e-6)
"""

DATA_PARALLEL = """
from torch.nn.parallel import DistributedDataParallel

for ours, theirs, options, more in PAIRS:
    model = DistributedDataParallel(network())
    train(model, ours(model.parameters(), lr=0.01, **options), True)
    expected, _ = alone(lambda ps: theirs(ps, lr=0.01, **options, **more))
    near(model.module.parameters(), expected.parameters())
"""

ZERO = """
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

for ours, theirs, options, more in PAIRS:
    model = DistributedDataParallel(network())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=ours, lr=0.01, **options)
    train(model, optimizer, True)
    expected, reference = alone(lambda ps: theirs(ps, lr=0.01, **options, **more))
    near(model.module.parameters(), expected.parameters())
    assert 0 < len(optimizer.optim.state) < 4, len(optimizer.optim.state)  # each process has its share
    optimizer.consolidate_state_dict(0)
    if rank == 0:  # the whole state, which torch's own optimizer goes on with
        whole = optimizer.state_dict()["state"]
        for k, state in reference.state_dict()["state"].items():
            assert whole[k].keys() == state.keys()
            near(whole[k].values(), state.values())
"""

FULLY_SHARDED = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

mesh = init_device_mesh("cpu", (2,))

def sharded(bias=True):
    model = network(bias)
    for part in (model[0], model[2], model):
        fully_shard(part, mesh=mesh)
    return model

own = [(front.FTML, None, {}, {}), (front.GroupAdaGrad, None, {}, {})]
for ours, theirs, options, more in PAIRS + own:
    bias = ours is not front.GroupAdaGrad
    model = sharded(bias)
    optimizer = ours(model.parameters(), lr=0.01, **options)
    train(model, optimizer, True)
    expected, _ = alone(lambda ps: (theirs or ours)(ps, lr=0.01, **options, **more), bias)
    near([p.full_tensor() for p in model.parameters()], expected.parameters())
    for p, state in optimizer.state.items():
        assert isinstance(p, DTensor)
        assert all(isinstance(x, DTensor) for name, x in state.items() if name != "step")
    plan = list(optimizer._bindings.values())
    train(model, optimizer, True, steps=2)
    assert list(optimizer._bindings.values()) == plan  # shards are bound once

# Row-wise sums need whole rows.
from torch.distributed.tensor import Shard, distribute_tensor
across = torch.nn.Parameter(distribute_tensor(torch.ones(4, 6), mesh, [Shard(1)]))
try:
    front.GroupAdaGrad([across])
    raise SystemExit("rows that are cut in two were taken")
except ValueError as error:
    assert "sharded across its rows" in str(error), error
elementwise = front.RMSProp([across])
across.grad = distribute_tensor(torch.ones(4, 6), mesh, [Shard(0)])
try:
    elementwise.step()
    raise SystemExit("a gradient that is placed otherwise was taken")
except ValueError as error:
    assert "expected the same placements" in str(error), error
"""


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(DATA_PARALLEL, id="DistributedDataParallel"),
        pytest.param(ZERO, id="ZeroRedundancyOptimizer"),
        pytest.param(FULLY_SHARDED, id="fully_shard"),
    ],
)
def test_two_processes(script, tmp_path):
    if script is FULLY_SHARDED:
        pytest.importorskip("torch.distributed.fsdp", reason="this torch has no FSDP")
        if not hasattr(torch.distributed.fsdp, "fully_shard"):
            pytest.skip("this torch has no fully_shard")
    text = PRELUDE + script + "\ndist.barrier()\ndist.destroy_process_group()\n"
    env = environment(GLOO_SOCKET_IFNAME="lo")
    if sys.platform != "linux":
        del env["GLOO_SOCKET_IFNAME"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", text, str(rank), str(tmp_path / "meeting")],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]
