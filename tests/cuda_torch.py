"""torch tensors that say they are on a GPU and lie in the host's memory, where torch knows of no GPU.

What torch does with them happens on the CPU, and gives tensors of the same kind, on the same device.
"""

from __future__ import annotations

import weakref
from collections import Counter
from types import SimpleNamespace

import torch

CURRENT = 0x51  # the stream that torch is at

_driver = None  # of `tests.ptx`, if the GPU is played by that
WAITS = ("item", "tolist", "__bool__", "__float__", "__int__", "unique", "nonzero", "cpu")
waited = []  # what made the host wait for a GPU
_held = Counter()  # how many tensors have some memory


class CudaTensor(torch.Tensor):
    """A tensor on the GPU `number`, as far as anybody can tell."""

    number = 0

    @property
    def device(self):
        return torch.device("cuda", self.number)

    @property
    def is_cuda(self):
        return True

    @property
    def is_cpu(self):
        return False

    def numpy(self):
        raise TypeError(f"can't convert {self.device} device type tensor to numpy")

    def __deepcopy__(self, memo):
        return memo.setdefault(id(self), on_gpu(self, self.number))

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ in WAITS:
            waited.append(func.__name__)
        if _driver is not None and func.__name__ != "__get__":  # what torch does comes next on its stream
            for number in range(len(_driver.memories)):
                _driver.finish(number, CURRENT)
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs or {})
        if any(found is given for given in args):  # a host's tensor stays one, whatever is written to it
            return found
        if func not in torch.overrides.get_default_nowrap_functions():
            found = torch._tensor._convert(found, cls)
        if isinstance(found, cls) and found.number == 0:
            numbers = [x.number for x in args if isinstance(x, cls)]
            found.number = max(numbers, default=0)
            _know(found)
        return found


def _know(tensor):
    """Tell where a tensor's memory is, for as long as it lives."""
    with torch._C.DisableTorchFunctionSubclass():
        if tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        start, size = storage.data_ptr(), storage.nbytes()
    if _driver is not None:
        memory = _driver.memories[tensor.number]
        _held[start] += 1
        memory.manage(start, size)
        weakref.finalize(tensor, _let_go, _driver, memory, storage, start)


def _let_go(driver, memory, storage, start):
    """Memory is a GPU's while there are tensors in it, or something is yet to be done with it."""

    def done(storage=storage):
        if not _held[start]:
            memory.manage(start, 0)

    _held[start] -= 1
    if not _held[start]:
        driver.later(done)


def on_gpu(tensor, number=0):
    """A copy of a tensor on a GPU; a parameter stays one."""
    with torch.no_grad():
        copy = tensor.detach().as_subclass(torch.Tensor).clone().as_subclass(CudaTensor)
    copy.number = number
    _know(copy)
    return torch.nn.Parameter(copy) if isinstance(tensor, torch.nn.Parameter) else copy


def on_cpu(tensor):
    """A copy of a tensor on the host."""
    return tensor.detach().as_subclass(torch.Tensor).clone()


def stand_in(patch, driver=None):
    """Let torch move tensors to GPUs that are none, and have a current stream there."""
    if driver is not None:
        patch.setitem(globals(), "_driver", driver)
        for number in range(len(driver.memories)):
            driver.stream(number, CURRENT)
    move = torch.Tensor.to

    def to(self, *args, **kwargs):
        device = kwargs.pop("device", None)
        for given in args:
            if isinstance(given, (str, torch.device)):
                device = given
        args = [given for given in args if not isinstance(given, (str, torch.device))]
        moved = move(self, *args, **kwargs) if args or kwargs else self
        if device is None or torch.device(device) == self.device:
            return moved
        return (
            on_cpu(moved)
            if torch.device(device).type == "cpu"
            else on_gpu(moved, torch.device(device).index or 0)
        )

    patch.setattr(torch.Tensor, "to", to)
    patch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=CURRENT))
