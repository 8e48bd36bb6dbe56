"""Tensors that have lost their memory or never had any. What may end the process runs in one of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from .scripts import environment, result

torch = pytest.importorskip("torch")

import numba_opt.torch as front  # noqa: E402

# Scripts that write by name into `said` what calls end with. They all run in one process.
SCRIPTS = {
    "zeros": """
for cls in (front.NAG, front.RMSProp, front.GroupAdaGrad):
    for expanded in (False, True):
        ends = []
        for make in (torch.zeros, torch._efficientzerotensor):
            weight, optimizer = stepped(cls=cls)
            fresh = torch.nn.Parameter(torch.ones(3, 2))
            optimizer.add_param_group({"params": [fresh]})
            for _ in range(3):
                zeros = make((1, 2)).expand(3, 2) if expanded else make((3, 2))
                weight.grad = fresh.grad = zeros
                optimizer.step()
            weight.grad = fresh.grad = torch.ones(3, 2)
            optimizer.step()
            ends.append([weight.tolist(), fresh.tolist()])
        said[f"{cls.__name__} {expanded}"] = ends[0] == ends[1] or ends
weight, optimizer = stepped()
weight.grad = torch.sparse_coo_tensor([[1, 2]], torch._efficientzerotensor((2, 2)), (3, 2))
ask("sparse", optimizer.step)
said["sparse"] = said["sparse"] == "accepted"
""",
    "foreign": """
from torch._subclasses import FakeTensorMode

def within(transform):
    name = transform.__name__
    weight, optimizer = stepped()
    ordinary, grad = torch.ones(3, 2), weight.grad
    def see(x):
        ask(f"{name} parameter", lambda: front.RMSProp([x]))
        try:
            weight.grad = x
        except (RuntimeError, TypeError):
            weight.grad = grad  # torch does not let it in
        ask(f"{name} gradient", optimizer.step)
        weight.grad = grad
        optimizer.state[weight]["square_avg"] = x
        ask(f"{name} state", optimizer.step)
        optimizer.state[weight].update(square_avg=ordinary, step=x.sum())
        ask(f"{name} step", optimizer.step)
        return x.sum()
    return see

torch.func.grad(within(torch.func.grad))(torch.ones(3, 2))
torch.func.vmap(within(torch.func.vmap))(torch.ones(1, 3, 2))
torch.func.functionalize(within(torch.func.functionalize))(torch.ones(3, 2))
with FakeTensorMode():
    fake = torch.ones(3, 2)
zeros = torch._efficientzerotensor((3, 2))
nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
for name, tensor in {"fake": fake, "zeros": zeros, "nested": nested}.items():
    def construct_and_step():
        optimizer = front.RMSProp([tensor])
        tensor.grad = torch.ones(3, 2)
        optimizer.step()
    ask(f"{name} parameter", construct_and_step)
    weight, optimizer = stepped()
    optimizer.state[weight]["square_avg"] = tensor
    ask(f"{name} state", optimizer.step)
    said[f"{name} untouched"] = weight.tolist() == stepped()[0].tolist()
weight, optimizer = stepped()
weight.grad = fake
ask("fake gradient", optimizer.step)
optimizer.state[weight]["step"] = torch._efficientzerotensor(())
weight.grad = torch.ones(3, 2)
ask("zeros counter", optimizer.step)
said["zeros counter"] = [said["zeros counter"], float(optimizer.state[weight]["step"])]
""",
    "shrunk": """
for size, what in itertools.product((40, 400_000), ("weight", "gradient", "square_avg", "step")):
    weight, optimizer = stepped((size,))
    kept = [torch.ones(size) for _ in range(4)]  # other's memory, which must not be touched
    tensor = {"weight": weight, "gradient": weight.grad, **optimizer.state[weight]}[what]
    storage = tensor.untyped_storage()
    optimizer.step()
    before = {name: x.clone() for name, x in optimizer.state[weight].items()}
    for part in (storage.nbytes() // 2, storage.nbytes() - 1, storage.nbytes() - 2):
        shrink(storage, part)
        ask(f"{what} of {size}: {part}", optimizer.step)
    said[f"{what} of {size}: untouched"] = all(bool((x == 1).all()) for x in kept)
    if what != "weight":
        optimizer.zero_grad()
        storage.resize_(4 * size)
        tensor.fill_(1)
        weight.grad = torch.ones(size)
        ask(f"{what} of {size}: anew", optimizer.step)
""",
    "moved": """
weight, optimizer = stepped((8,))
state = optimizer.state[weight]["square_avg"]
memory = torch.arange(32.0)
with torch.no_grad():
    weight.set_(memory.untyped_storage(), 24, (8,), (1,))
weight.grad = torch.ones(8)
optimizer.step()
apart = torch.arange(32.0)
said["moved"] = bool((memory[:24] == apart[:24]).all() and (memory[24:] < apart[24:]).all())
state.set_(memory.untyped_storage(), 20, (8,), (1,))
before = memory.clone()
ask("overlaps", optimizer.step)
said["untouched"] = bool((memory == before).all())
state.set_(memory.untyped_storage(), 8, (8,), (1,))
ask("apart", optimizer.step)
with torch.no_grad():
    weight.set_(memory.untyped_storage(), 16, (2, 4), (4, 1))
ask("other shape", optimizer.step)
base = torch.ones(4, 8)
weight, optimizer = stepped((8,))
weight.data = base[3]
del base
optimizer.step()
said["view of a base that is gone"] = weight.tolist()[0] < 1
weight, optimizer = stepped((8,))
weight.data = torch.ones(1).expand(8)
ask("expanded", optimizer.step)
weight.data = torch.ones(8, dtype=torch.float64)
ask("dtype", optimizer.step)
weight.data = torch.ones(8)
weight.grad = torch.ones(8)
ask("as it was", optimizer.step)
weight.requires_grad_(False)
ask("without grad", optimizer.step)
weight.__class__ = torch.Tensor
ask("of another class", optimizer.step)
""",
    "parts": """
@torch.inference_mode()  # in which its parts are not handed out as views
def grad(rows=((1, 2, 1),), values=torch.ones(3, 2), change=lambda g: None):
    made = torch.sparse_coo_tensor(rows, values.clone(), (3, 2))
    change(made)
    return made

changes = {
    "values freed": lambda g: g._values().untyped_storage().resize_(0),
    "values shrunk": lambda g: g._values().untyped_storage().resize_(8),
    "indices freed": lambda g: g._indices().untyped_storage().resize_(0),
    "indices shrunk": lambda g: g._indices().untyped_storage().resize_(8),
    "values of another shape": lambda g: g._values().set_(torch.ones(1, 2)),
    "values of fewer columns": lambda g: g._values().set_(torch.ones(3, 1)),
    "values without dimensions": lambda g: g._values().set_(torch.ones(())),
    "more indices": lambda g: g._indices().set_(torch.zeros(1, 300_000, dtype=torch.int64)),
    "indices in a line": lambda g: g._indices().set_(torch.zeros(3, dtype=torch.int64)),
    "indices that lead outside": lambda g: g._indices().fill_(1 << 40),
}
for name, change in changes.items():
    for cls in (front.RMSProp, front.GroupAdaGrad):
        weight, optimizer = stepped(cls=cls)
        weight.grad = grad(change=change)
        ask(f"{name}, first", optimizer.step)
        weight.grad = grad()
        optimizer.step()
        weight.grad = grad(change=change)
        ask(f"{name}, {cls.__name__}", optimizer.step)
weight, optimizer = stepped((3, 2))
for change in ("values freed", "indices freed"):
    weight.grad = grad([[1, 2], [0, 0]], torch.ones(2), changes[change])
    ask(f"{change}, single numbers", optimizer.step)
""",
    "liars": """
class Liar(torch.Tensor):
    shape = torch.Size((300,))
    def stride(self): return (1,)
    def numel(self): return 300
    def untyped_storage(self): return torch.ones(300).untyped_storage()

class LiarOfAddresses(torch.Tensor):
    def data_ptr(self): return 64

for cls in (Liar, LiarOfAddresses):
    for what in ("gradient", "square_avg", "step", "weight"):
        weight, optimizer = stepped((300,))
        lying = torch.ones(() if what == "step" else 3 if cls is Liar else 300)
        if what == "weight":
            weight = torch.nn.Parameter(lying)
            weight.grad = torch.ones(lying.shape)
            optimizer = front.RMSProp([weight])
            weight.__class__ = cls
        else:
            lying.__class__ = cls
        if what == "gradient":
            weight.grad.data = torch.ones(3 if cls is Liar else 300)
            weight.grad.__class__ = cls
        elif what != "weight":
            optimizer.state[weight][what] = lying
        ask(f"{cls.__name__} {what}", optimizer.step)

class LiarOfParts(torch.Tensor):
    def sparse_dim(self): return 1
    def _values(self): return torch.ones(1, 2)
    def _indices(self): return torch.zeros(1, 300_000, dtype=torch.int64)

weight, optimizer = stepped()
weight.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 2), (3, 2))
weight.grad.__class__ = LiarOfParts
optimizer.step()
said["parts"] = weight[0].tolist() == stepped()[0][0].tolist() != weight[1].tolist()
""",
    "counters": """
for k, step in enumerate(("x", [1], np.ones(2), torch.ones(2), torch.ones(0), torch.ones((), device="meta"))):
    weight, optimizer = stepped()
    optimizer.state[weight]["step"] = step
    ask(f"step {k}", optimizer.step)
for state in (None, [], 5):
    weight, optimizer = stepped()
    optimizer.state[weight] = state
    ask(f"state {state!r}", optimizer.step)
""",
    "odd": """
weight, optimizer = stepped()
wide = torch.ones(3, 4)
weight.grad = wide[:, ::2]
optimizer.step()
wide.untyped_storage().resize_(0)
ask("freed", optimizer.step)
weight.grad = torch.ones(2, 3).t()
ask("transposed", optimizer.step)
weight.grad.data = torch.ones(2, 5).t()
ask("of another shape", optimizer.step)
""",
    "others": """
def shrunk(nbytes, shape=(40, 3), dtype=torch.float32):
    tensor = torch.ones(shape, dtype=dtype)
    tensor.untyped_storage().resize_(nbytes)
    return tensor

for nbytes in (0, 64):
    weight = np.ones((40, 3), np.float32)
    trainer = numba_opt.Trainer([weight], "nag")
    ask(f"gradient {nbytes}", lambda: trainer.step([shrunk(nbytes)]))
    ask(f"accumulated {nbytes}", lambda: trainer.accumulate([shrunk(nbytes)]))
    said[f"untouched {nbytes}"] = bool((weight == 1).all())
    ask(f"parameter {nbytes}", lambda: numba_opt.Trainer([shrunk(nbytes)], "nag"))
    held = torch.ones(40, 3)
    trainer = numba_opt.Trainer([held], "nag")
    held.data = shrunk(nbytes)
    ask(f"parameter later {nbytes}", lambda: trainer.step([torch.ones(40, 3)]))
    optimizer = numba_opt.NAG()
    state = optimizer.create_state(0, weight)
    ask(f"update {nbytes}", lambda: optimizer.update(0, weight, shrunk(nbytes), state))
    rows = torch.zeros(40, dtype=torch.int64)
    ask(f"values {nbytes}", lambda: numba_opt.RowSparse(rows, shrunk(nbytes), (40, 3)))
    rows = shrunk(nbytes, 40, torch.int64)
    ask(f"rows {nbytes}", lambda: numba_opt.RowSparse(rows, torch.ones(40, 3), (40, 3)))
for name, grad in {
    "zeros": torch._efficientzerotensor((40, 3)),
    "negative": torch._neg_view(torch.ones(40, 3)),
    "sparse": torch.ones(40, 3).to_sparse(),
    "meta": torch.ones(40, 3, device="meta"),
    "nested": torch.nested.nested_tensor([torch.ones(3)] * 40),
    "quantized": torch.quantize_per_tensor(torch.ones(40, 3), 0.1, 0, torch.qint8),
}.items():
    trainer = numba_opt.Trainer([np.ones((40, 3), np.float32)], "nag")
    ask(f"gradient {name}", lambda: trainer.step([grad]))
torch.func.vmap(lambda x: (ask("gradient vmap", lambda: trainer.step([x])), x)[1])(torch.ones(1, 40, 3))

rows, values = torch.zeros(2, dtype=torch.int64), torch.ones(2, 3)
grad = numba_opt.RowSparse(rows, values, (40, 3))
values.set_(torch.ones(1)), rows.set_(torch.ones(1, dtype=torch.int64))
weight = np.ones((40, 3), np.float32)
numba_opt.Trainer([weight], "nag", learning_rate=0.5, momentum=0).step([grad])
said["untouched by set_"] = weight[:2].tolist() == [[0, 0, 0], [1, 1, 1]]
""",
}

RUN = """
import faulthandler, itertools, json, sys, warnings
import numpy as np
import torch
import numba_opt
import numba_opt.torch as front

warnings.simplefilter("ignore")
faulthandler.enable()

def ask(name, call):
    try:
        call()
        said[name] = "accepted"
    except (TypeError, ValueError, RuntimeError) as error:
        said[name] = f"{type(error).__name__}: {error}"

def stepped(shape=(3, 2), cls=front.RMSProp):
    weight = torch.nn.Parameter(torch.ones(shape))
    optimizer = cls([weight], lr=0.125)
    weight.grad = torch.ones(shape)
    optimizer.step()
    return weight, optimizer

def shrink(storage, nbytes):
    place, others = storage.data_ptr(), []
    storage.resize_(0)
    for _ in range(100):
        other = torch.UntypedStorage(nbytes)
        if other.data_ptr() == place:
            break
        others.append(other)
    del other
    storage.resize_(nbytes)

for name, script in json.loads(sys.stdin.read()).items():
    said = {}
    print(name, flush=True)
    exec(compile(script, name, "exec"), globals())
    print(json.dumps(said), flush=True)
"""


@pytest.fixture(scope="module")
def said():
    """What each script has to say."""
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps(SCRIPTS),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, (done.returncode, lines[-1:], done.stderr[-3000:])
    return dict(zip(lines[::2], map(json.loads, lines[1::2]), strict=True))


def parameter(*shape, value=1.0):
    weight = torch.nn.Parameter(torch.full(shape, value))
    weight.grad = torch.ones(shape)
    return weight


# ---------------------------------------------------------------- tensors without memory


def test_gradients_of_zeros_without_memory(said):
    """They are what automatic differentiation makes of nothing."""
    found = said["zeros"]
    assert set(found.values()) == {True}, found


def test_tensors_that_are_not_their_own(said):
    found = said["foreign"]
    for name in ("grad", "vmap", "functionalize", "fake", "zeros", "nested"):
        for what in ("parameter", "state"):
            answer = found.pop(f"{name} {what}")
            assert "Error: " in answer or (name, what) == ("functionalize", "parameter"), (name, what)
        assert found.pop(f"{name} untouched", True)
    assert "FakeTensor" in found.pop("fake gradient")
    assert found.pop("zeros counter") == ["accepted", 1.0]
    assert all(isinstance(what, str) for what in found.values())  # all others have come back


def test_storages_shrunk_where_they_lie(said):
    """Freed and taken anew with less, at the very address that it had before, if the allocator likes."""
    found = said["shrunk"]
    for name, what in found.items():
        last = name.split()[-1]
        expected = {"untouched": lambda x: x is True, "anew": lambda x: x == "accepted"}
        fits = expected.get(last, lambda x: "of parameter 0 needs" in x and "of its storage, which has" in x)
        assert fits(what), (name, what)


def test_storages_shared_and_moved(said):
    """A tensor that is set to another part of a storage, or to another one, is followed or refused."""
    found = said["moved"]
    assert "shares memory" in found.pop("overlaps")
    assert "has shape" in found.pop("other shape")
    assert "elements that share memory" in found.pop("expanded")
    assert "is torch.float32; expected torch.float64" in found.pop("dtype")
    assert set(map(str, found.values())) == {"True", "accepted"}, found


def test_parts_of_sparse_gradients(said):
    found = said["parts"]
    for name, what in found.items():
        assert "gradient of parameter 0" in what or "indices" in name, (name, what)
        assert "Error: " in what, (name, what)


def test_gradients_that_lie_oddly_are_looked_at_before_they_are_copied(said):
    found = said["odd"]
    assert "gradient of parameter 0 needs" in found["freed"]
    assert found["transposed"] == "accepted"
    assert "gradient of parameter 0 has shape (5, 2)" in found["of another shape"]


@pytest.mark.parametrize("turned", ["weight", "square_avg"])
def test_negative_views_between_steps(turned):
    """The same object at the same address, whose numbers have become their negatives."""
    expected, found = [], []
    for cls, ends in ((torch.optim.RMSprop, expected), (front.RMSProp, found)):
        weight = parameter(4, value=-0.5)
        optimizer = cls([weight], lr=0.125)
        for k in range(4):
            optimizer.step()
            tensor = weight if turned == "weight" else optimizer.state[weight][turned]
            if k == 1:
                place = tensor.data_ptr()
                tensor.data = torch._neg_view(tensor.detach().neg_())
                assert tensor.is_neg()
                assert tensor.data_ptr() == place
        ends += [weight.detach().resolve_neg(), optimizer.state[weight]["square_avg"].resolve_neg()]
    torch.testing.assert_close(found, expected)


def test_classes_that_lie(said):
    """What a class says of its tensors is not what kernels rely on."""
    found = said["liars"]
    assert found.pop("parts") is True
    assert found.pop("Liar step") == "accepted"  # the number in it is taken over
    assert all("Error: " in what for what in found.values()), found


def test_states_of_other_kinds(said):
    for what in said["counters"].values():
        assert what.startswith("TypeError: state")
        assert "of parameter 0 is" in what
        assert "expected" in what


def test_other_ways_to_give_tensors(said):
    """`Trainer` and what else takes anybody's arrays."""
    found = said["others"]
    for name, what in found.items():
        if name.startswith("untouched"):
            assert what is True, name
        else:
            assert "Error: " in what, (name, what)
    assert "needs 480 bytes of its storage, which has 64 for it" in found["gradient 64"]


def test_packages_that_another_thread_is_importing():
    """Then they are among the modules, and have nothing in them yet."""
    found = result("""
import json, sys, types
import numpy as np
import numba_opt

class Array:
    def __init__(self, array):
        self.__array_interface__ = array.__array_interface__
        self.array = array

weight = np.ones((3, 2), np.float32)
trainer = numba_opt.Trainer([Array(weight)], "nag", momentum=0, learning_rate=0.25)
for module in ("torch", "scipy.sparse", "cupy"):
    kept = sys.modules.get(module)
    sys.modules[module] = types.ModuleType(module)
    trainer.step([Array(np.ones((3, 2), np.float32))])
    trainer.step([numba_opt.RowSparse([1], np.ones((1, 2)), (3, 2))])
    del sys.modules[module]
    if kept is not None:
        sys.modules[module] = kept
import torch
import numba_opt.torch as front
tensor = torch.ones(2, requires_grad=True)
optimizer = front.NAG([tensor], lr=0.5)
sys.modules["torch.distributed.tensor"] = types.ModuleType("torch.distributed.tensor")
tensor.grad = torch.ones(2)
optimizer.step()
print(json.dumps([*weight.tolist(), tensor.tolist()]))
""")
    assert found == [[0.25, 0.25], [-0.5, -0.5], [0.25, 0.25], [pytest.approx(0.05)] * 2]
