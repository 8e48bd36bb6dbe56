"""Torch optimizers' steps as wholes: by several threads, in signal handlers, cut off, and copied between."""

from __future__ import annotations

import copy
import pickle
import signal
import sys
import threading
import time

import pytest

torch = pytest.importorskip("torch")

import numba_opt.torch as front  # noqa: E402


def parameter(*shape, value=1.0):
    weight = torch.nn.Parameter(torch.full(shape, value))
    weight.grad = torch.ones(shape)
    return weight


def content(weight, optimizer):
    """A parameter and its state as bytes, by name."""
    held = {"weight": weight, **optimizer.state[weight]}
    return {name: x.detach().numpy().tobytes() for name, x in held.items()}


def test_two_threads():
    """No step is lost, and each is a whole one."""
    ends = []
    for threads in (1, 2):
        weights = [parameter(300), parameter(40, 3), parameter(20_000)]
        optimizer = front.RMSProp(weights, lr=1e-3)
        errors = []

        def work(steps, optimizer=optimizer, errors=errors):
            try:
                for _ in range(steps):
                    optimizer.step()
            except Exception as error:
                errors.append(error)

        workers = [threading.Thread(target=work, args=(60 // threads,)) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not errors
        ends.append([content(weight, optimizer) for weight in weights])
    assert ends[0] == ends[1]
    assert optimizer.state[weights[0]]["step"].item() == 60


def test_a_step_within_a_step():
    """The inner one is refused; the outer one goes on as if it had not been asked for."""
    weight, other = parameter(5), parameter(5)
    optimizer, expected = front.RMSProp([weight]), front.RMSProp([other])
    messages = []

    class Rate(float):
        def __float__(self):  # what a step asks, among other code that is not its own
            with pytest.raises(RuntimeError) as caught:
                optimizer.step()
            messages.append(str(caught.value))
            return 0.25

    for _ in range(2):
        optimizer.param_groups[0]["lr"], expected.param_groups[0]["lr"] = Rate(0.25), 0.25
        optimizer.step()
        expected.step()
        assert content(weight, optimizer) == content(other, expected)
    assert messages
    assert all(message.startswith("this RMSProp is in use already") for message in messages)


def test_closures_that_step():
    """A closure comes before the step, as with torch's optimizers."""
    ends = []
    for cls in (front.RMSProp, torch.optim.RMSprop):
        weight = parameter(5)
        optimizer = cls([weight], lr=0.125)

        def closure(optimizer=optimizer, weight=weight):
            optimizer.step()
            if len(optimizer.param_groups) == 1:
                optimizer.add_param_group({"params": [parameter(3)]})
            weight.data = weight.detach().clone()
            return 1.5

        for _ in range(2):
            assert optimizer.step(closure) == 1.5
        with pytest.raises(ZeroDivisionError):
            optimizer.step(lambda: 1 / 0)
        optimizer.step()
        ends.append([p.detach() for group in optimizer.param_groups for p in group["params"]])
    torch.testing.assert_close(*ends)


class TimeOutError(Exception):
    pass


class Raising:
    """For `sys.setprofile`: raises where a signal's handler could, at one of those places."""

    def __init__(self, number):
        self.left = number

    def __call__(self, frame, event, arg):
        # Signals are handled once a C function has returned, not before it is called; and Numba lets its
        # compiled functions have frames, too, in which nothing runs.
        if event != "c_call" and frame is sys._getframe(1):
            self.left -= 1
            if self.left < 0:
                sys.setprofile(None)
                raise TimeOutError


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("kind", ["first", "kept", "sparse", "copies"])
def test_a_step_is_made_wholly_or_not_at_all(kind):
    """Whatever is raised at whatever moment; and the optimizer goes on."""

    def prepared():
        weights = [parameter(4, 3), parameter(5)]
        optimizer = front.RMSProp(weights, lr=0.125, momentum=0.5)
        if kind != "first":
            optimizer.step()
        if kind == "sparse":
            weights[0].grad = torch.sparse_coo_tensor([[1, 2]], torch.ones(2, 3), (4, 3))
        if kind == "copies":
            weights[0].data = torch.ones(4, 6)[:, ::2]
        return weights, optimizer

    def described(weights, optimizer):
        states = [optimizer.state.get(weight, {}) for weight in weights]
        counts = [state.get("step", torch.zeros(())).item() for state in states]
        if not any(counts):  # states may have been made, of zeros
            assert not any(tensor.count_nonzero() for state in states for tensor in state.values())
            return [weight.tolist() for weight in weights]
        return [content(weight, optimizer) for weight in weights]

    weights, optimizer = prepared()
    steps = [described(weights, optimizer)]
    for _ in range(2):
        optimizer.step()
        steps.append(described(weights, optimizer))
    weights, optimizer = prepared()
    counting = Raising(1_000_000)
    sys.setprofile(counting)
    optimizer.step()
    sys.setprofile(None)
    moments = 1_000_000 - counting.left
    assert moments > 50
    ends = set()
    for number in sorted({*range(0, moments, 7), *range(max(moments - 100, 0), moments)}):
        weights, optimizer = prepared()
        raising = Raising(number)
        try:
            sys.setprofile(raising)
            optimizer.step()
        except TimeOutError:
            ends.add(described(weights, optimizer) == steps[1])
        finally:
            sys.setprofile(None)
        found = described(weights, optimizer)
        assert found in steps[:2], number
        optimizer.step()
        assert described(weights, optimizer) == steps[steps.index(found) + 1], number
    assert ends == {False, True}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # some come in GC callbacks
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no such timers here")
def test_signals_at_any_moment():
    """Handlers that raise, and handlers that step."""
    weight, other = parameter(30_000), parameter(30_000)
    optimizer, expected = front.RMSProp([weight], lr=1e-3), front.RMSProp([other], lr=1e-3)
    for one in (optimizer, expected):
        one.step()
    refused, made = [], []

    def handler(number, frame):
        try:
            optimizer.step()
            made.append(1)
        except RuntimeError as error:
            refused.append(error)
        raise TimeOutError

    before = signal.signal(signal.SIGALRM, handler)
    try:
        end = time.monotonic() + 1.5
        k = came = 0
        while time.monotonic() < end:
            k += 1
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-6 + 1e-5 * (k % 40))
                until = time.monotonic() + 0.05  # an exception in a destructor or a GC callback is not heard
                while time.monotonic() < until:
                    optimizer.step()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except TimeOutError:
                came += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert came
    steps = int(optimizer.state[weight]["step"].item())
    for _ in range(steps - 1):
        expected.step()
    assert content(weight, optimizer) == content(other, expected)
    assert all("in use already" in str(error) for error in refused)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("cls", [front.NAG, front.RMSProp, front.Adamax, front.FTML, front.GroupAdaGrad])
def test_copies_go_on_by_themselves(cls, how):
    weight = parameter(4, 3)
    optimizer = cls([weight], lr=0.125)
    optimizer.step()
    other = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    twin = other.param_groups[0]["params"][0]
    before = content(weight, optimizer)
    assert content(twin, other) == before
    for k in range(2):
        twin.grad = torch.full((4, 3), k + 0.5)
        other.step()
    assert content(weight, optimizer) == before
    for k in range(2):
        weight.grad = torch.full((4, 3), k + 0.5)
        optimizer.step()
    assert content(weight, optimizer) == content(twin, other)
