"""Everything that a program will need, compiled beforehand: for the start of a program, or of a container.

Numba compiles one kernel at a time in a process. Where several are missing, other processes join in: they
are told what to compile, keep it in the cache on disk, and this one loads it from there. Rules that are not
this package's own are left to this process, as their modules may not bear being imported once more.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import numba
import numpy as np
from numba.core import event

from .. import device
from ..compiler import cache, interrupts, private
from ..core import rules
from ..core.rules import Rule
from ..cpu import loops as cpu
from ..cpu import merge, ndarray, threads
from ..cuda import arrays as cuda_arrays
from ..optimizer import Optimizer, create

__all__ = ["Summary", "warmup"]

CODES = {"float32": "f4", "float64": "f8", "float16": "f2", "bfloat16": "b2"}
HALF = ("f2", "b2")

CREW = 8  # processes at most, this one included; each takes some 200 MB
PACKAGE = __name__.partition(".")[0]
SHARE = 4  # kernels that are worth another process, which needs a second to start


class Summary(NamedTuple):
    """What `warmup` did."""

    compiled: int
    loaded: int  # from the cache, or there already
    seconds: float
    folder: str
    kept: bool  # whether the cache can be written

    def __str__(self) -> str:
        done = f"{self.compiled} kernels compiled, {self.loaded} loaded in {self.seconds:.2f} s"
        return f"{done}; {'kept in' if self.kept else 'none can be kept in'} {self.folder}"


class Kernel(NamedTuple):
    """A call that compiles a kernel or loads it from the cache: a name among `MAKERS`, and its arguments."""

    maker: str
    args: tuple[Any, ...]

    def make(self) -> bool:
        """Have it; says whether it had to be compiled."""
        before = _compiled()
        with interrupts.deferred():  # an interrupted compiler and a half-written file are nobody's friends
            try:
                MAKERS[self.maker](*self.args)
            except Exception as error:
                if self.args and callable(self.args[0]):
                    rules.explain(error, self.args[0])
                raise
        return _compiled() > before

    def sent(self) -> str | None:
        """What another process is told; None if it cannot make this kernel."""
        rule, *rest = self.args if self.args else (None,)
        if callable(rule):
            module, name = rule.__module__, rule.__qualname__
            own = module.partition(".")[0] == PACKAGE
            if not own or getattr(sys.modules.get(module), name, None) is not rule:
                return None
            rule = [module, name]
        return json.dumps([self.maker, rule, *rest])

    @classmethod
    def received(cls, line: str) -> Kernel:
        """The kernel that another process tells of."""
        maker, rule, *rest = json.loads(line)
        if isinstance(rule, list):
            rule = getattr(import_module(rule[0]), rule[1])
        return cls(maker, (rule, *rest) if rule is not None else ())


def warmup(
    optimizers: Any = None,
    dtypes: Any = ("float32",),
    devices: Any = None,
    sparse: bool = True,
    progress: bool = True,
) -> Summary:
    """Compile, or load from the cache, all that a program will need.

    Parameters
    ----------
    optimizers : Optimizer, class or name, or a list of these, optional
        Classes and names mean all their variants, on GPUs those of `numba_opt.torch` too if torch is there;
        an instance means itself. Default: everything that is registered and can be made without arguments.
    dtypes : dtype or list of dtypes, default ("float32",)
        Of the parameters and their gradients: float32, float64, float16, bfloat16, by name or as objects.
        Half precision means with and without float32 copies of the weights; for an instance, as its
        `multi_precision` says.
    devices : str or list of str, default "cpu"
        Whose kernels: "cpu"; "cuda" for all GPUs that are there, or "cuda:1" for one of them; or a compute
        capability such as "sm_90", for which neither a GPU nor a driver is needed.
    sparse : bool, default True
        Whether there will be sparse gradients: row-sparse, and CSR with 32-bit or 64-bit indices.
    progress : bool, default True
        Show a progress bar, if stderr is a terminal and tqdm is installed.

    Returns
    -------
    Summary
        How many kernels were ``compiled`` and how many ``loaded``, the ``seconds``, the cache's ``folder``,
        and whether it can be written. Its text is one line.

    Raises
    ------
    TypeError, ValueError
        An optimizer, dtype or device is unknown.
    CudaUnavailableError
        A GPU is asked for, and there is none, or no numba-cuda.

    Examples
    --------
    >>> import numba_opt
    >>> summary = numba_opt.warmup("nag", "float64", sparse=False)
    >>> numba_opt.warmup("nag", "float64", sparse=False).compiled  # all there
    0
    """
    began = time.perf_counter()
    variants, codes = _instances(optimizers), _codes(dtypes)
    wanted: list[Kernel] = []
    for target in _targets(devices):
        if target == "cpu":
            wanted += _kernels(variants, codes, bool(sparse))
        else:
            made = cuda_kernels(variants, codes, bool(sparse))
            wanted += [Kernel(f"cuda {name}", (*args, target)) for name, *args in made]
    kernels = list(dict.fromkeys(wanted))
    kept = _writable()
    with _bar(len(kernels), progress) as advance:
        compiled = _Work(kernels, advance, helped=kept).run()
    seconds = time.perf_counter() - began
    return Summary(compiled, len(kernels) - compiled, seconds, str(cache.folder()), kept)


# ---------------------------------------------------------------- what is needed


class Variant(NamedTuple):
    """A way that an optimizer may be used."""

    optimizer: Optimizer
    masters: tuple[bool, ...]  # whether half-precision weights have float32 copies: either, or both
    torch: tuple[Rule, ...] = ()  # what `numba_opt.torch` has for it beside its own rule


def _instances(optimizers: Any) -> list[Variant]:
    if optimizers is None:
        found = []
        for cls in Optimizer.opt_registry.values():
            with contextlib.suppress(TypeError):  # it needs arguments: only its user can make one
                found += _variants(cls)
        return found
    if isinstance(optimizers, (str, Optimizer, type)):
        optimizers = [optimizers]
    return [variant for given in optimizers for variant in _given(given)]


def _given(given: Any) -> list[Variant]:
    if isinstance(given, Optimizer):
        return [Variant(given, (given.multi_precision,))]
    if isinstance(given, str):
        given = type(create(given))
    if not (isinstance(given, type) and issubclass(given, Optimizer)):
        raise TypeError(f"optimizers must be optimizers, their classes or names, got {given!r}")
    return _variants(given)


def _variants(cls: type[Optimizer]) -> list[Variant]:
    made = [Variant(cls(**options), (False, True)) for options in cls.variants]
    form = cls.torch_form if find_spec("torch") is not None else None
    torch = () if form is None else tuple(Rule(rule, n, False) for rule, n in form.rules)
    return [made[0]._replace(torch=torch), *made[1:]]


def _codes(dtypes: Any) -> list[str]:
    """The codes of dtypes in layouts, each once."""
    several = isinstance(dtypes, Iterable) and not isinstance(dtypes, (str, np.dtype, type))
    codes = []
    for dtype in dtypes if several else [dtypes]:
        name = device.name_of(dtype)
        if name not in CODES:
            raise ValueError(f"dtypes must be among {', '.join(CODES)}, got {dtype!r}")
        codes.append(CODES[name])
    return list(dict.fromkeys(codes))


def _targets(devices: Any) -> list[str]:
    """What to compile for: "cpu", and compute capabilities such as "9.0"."""
    found = []
    for given in [devices] if devices is None or not isinstance(devices, (list, tuple)) else devices:
        kind, _, number = str("cpu" if given is None else given).partition(":")
        capability = re.fullmatch(r"sm_(\d+)(\d)", kind)
        if kind in ("cuda", "gpu"):
            there = cuda_arrays.devices()
            chosen = there[slice(int(number), int(number) + 1)] if number.isdigit() else there
            if not chosen:
                raise ValueError(f"devices has {given!r}, but there are {len(there)} CUDA devices")
            found += ["{}.{}".format(*gpu.capability) for gpu in chosen]
        elif capability:
            cuda_arrays.loops()
            found.append(f"{capability[1]}.{capability[2]}")
        elif kind == "cpu":
            found.append("cpu")
        else:
            raise ValueError(
                "devices must be 'cpu', 'cuda', 'cuda:0' or a compute capability such as 'sm_90', "
                f"got {given!r}"
            )
    return list(dict.fromkeys(found))


def _kernels(variants: Sequence[Variant], codes: Sequence[str], sparse: bool) -> Iterator[Kernel]:
    """The calls that make all kernels, the small ones that everything needs first."""
    yield from (Kernel(name, ()) for name in HELPERS)
    if sparse:
        yield Kernel("merge rows", ())
        for size in (4, 8):
            yield Kernel("merge csr", (size,))
            yield Kernel("columns", (f"i{size}",))
    yield from (Kernel("squares", (code,)) for code in codes)
    if sparse and set(codes) & set(HALF):  # sums of half-precision parts are float32
        yield Kernel("squares", ("f4",))
    for optimizer, masters, _ in variants:
        if optimizer.rule is not None:
            for code in codes:
                for copied in masters if code in HALF else (False,):
                    yield from _of_rule(optimizer, code, copied, sparse)


def _of_rule(optimizer: Optimizer, code: str, copied: bool, sparse: bool) -> Iterator[Kernel]:
    """The kernels of an optimizer for weights of some dtype, perhaps with float32 copies."""
    rule = optimizer._rule()
    own, grads = _stored(optimizer, code, copied)
    for grad in grads:
        yield Kernel("dense", (*rule, f"{grad} {own}"))
    if sparse and optimizer.sparse_update != "dense":
        exact = optimizer.sparse_update == "exact"
        for form in (f"block {code}", f"csr {code}", *(["none"] if exact else [])):
            yield Kernel("rows", (*rule, own, form, exact))


def _stored(optimizer: Optimizer, code: str, copied: bool) -> tuple[str, Sequence[str]]:
    """How a weight of some dtype is stored with its states and perhaps a copy, and its possible gradients."""
    copy, weight = ([code], "f4") if copied else ([], code)
    own = " ".join([weight, *[optimizer._stored or weight] * optimizer._rule().n_state, *copy])
    return own, device.gradients_for("f4", *copy) if copied else [code]


def cuda_kernels(
    variants: Sequence[Variant], codes: Sequence[str], sparse: bool
) -> Iterator[tuple[Any, ...]]:
    """The kernels of GPUs, by name and arguments."""
    yield from (("set_hyper",), ("clip_norm",), *(("squares", code) for code in codes))
    loops = cuda_arrays.loops()
    sums = [
        f"{code} {total}"
        for code in codes
        for total in dict.fromkeys([code, "f4"] if code in HALF else [code])
    ]
    yield from (("dense", rule, 0, False, layout) for layout in sums for rule in (loops.begun, loops.plus))
    if sparse:
        yield from (("keys", "i4"), ("keys", "i8"), ("merge",), ("vacate",))
        for layout in sums:
            code, total = layout.split()
            yield from (("spread", total, every) for every in (False, True))
            for form in ("rows i8", "rows i4", "csr i4", "csr i8"):
                yield ("collect", total, f"{form} {code}")
            yield ("collect", total, f"rows i8 {total}")
        for code in codes:
            yield from (("row_squares", "f8" if code == "f8" else "f4", form) for form in _forms(code))
    for optimizer, masters, torch in variants:
        for rule in torch:
            for code in codes:
                own = " ".join([code] * (1 + rule.n_state))
                yield ("dense", *rule, f"{code} {own}")
                if sparse:
                    yield from (("rows", *rule, own, form) for form in _forms(code))
        if optimizer.rule is None:
            continue
        rule = optimizer._rule()
        for code in codes:
            for copied in masters if code in HALF else (False,):
                own, grads = _stored(optimizer, code, copied)
                yield from (("dense", *rule, f"{grad} {own}") for grad in grads)
                if sparse:
                    forms = _forms(code, optimizer.sparse_update)
                    yield from (("rows", *rule, own, form) for form in forms)
                    if optimizer.sparse_update == "exact":
                        weight = own.split()[0]
                        yield from (("late", *rule, own, form) for form in (*forms, f"none {weight}"))
                        length = 3 + rule.n_hyper + 2 * ("s" in own)
                        yield from (("record", length, weight), ("forget",))


def _forms(code: str, mode: str = "lazy") -> list[str]:
    """Sparse gradients of a dtype, as GPUs have them: distinct rows, any rows, CSR."""
    if mode == "dense":
        return [f"every-keys {code}", f"every-csr i4 {code}", f"every-csr i8 {code}"]
    return [f"rows i4 {code}", f"rows i8 {code}", f"keys {code}", f"csr i4 {code}", f"csr i8 {code}"]


# ---------------------------------------------------------------- making it


def _read_arrays() -> None:
    weight = np.zeros((2, 2), np.float32)
    ndarray.readable()
    found = ndarray.read([[weight + 1], [weight], [None]], 0, False)
    if found is not None:
        ndarray.overlapping(found)


def _share_work() -> None:
    threads.compiled_finished()


def _merge_rows() -> None:
    rows = np.zeros(2, np.int64)
    merge.look(rows, 1)
    merge.group(rows, 1)
    merge.group(rows, 100)


def _merge_csr(size: int) -> None:
    merge.rows_of_csr(np.array([0, 1], f"i{size}"), 1, 1)


def _cuda(name: str, *args: Any) -> None:
    """A kernel for the compute capability that comes last."""
    from ..cuda import code as cuda_code

    *made, capability = args
    major, minor = map(int, capability.split("."))
    cuda_code.compiled(getattr(cuda_arrays.loops(), name)(*made), (major, minor))


CUDA = (
    *("set_hyper", "clip_norm", "squares", "keys", "merge", "row_squares", "dense", "rows"),
    *("late", "record", "forget"),
)

HELPERS = ("read arrays", "share work")

MAKERS: dict[str, Callable[..., Any]] = {
    "read arrays": _read_arrays,
    "share work": _share_work,
    "merge rows": _merge_rows,
    "merge csr": _merge_csr,
    "columns": cpu.columns,
    "squares": cpu.squares,
    "dense": cpu.dense,
    "rows": cpu.rows,
    **{f"cuda {name}": partial(_cuda, name) for name in CUDA},
}


class _Misses(event.Listener):
    """Counts this package's kernels that this thread had to compile."""

    def __init__(self) -> None:
        self._local = threading.local()

    @property
    def total(self) -> int:
        return getattr(self._local, "total", 0)

    def on_start(self, compilation: Any) -> None:
        if isinstance(getattr(compilation.data["dispatcher"], "_cache", None), cache.KernelCache):
            self._local.total = self.total + 1

    def on_end(self, compilation: Any) -> None:
        pass


_misses = _Misses()


def _compiled() -> int:
    """How many kernels this thread had to compile so far."""
    how_many = device.loaded("numba_opt.cuda.code", "how_many")
    return _misses.total + (how_many() if how_many else 0)


class _Work:
    """Kernels to be made by this thread and, from the first one that is missing, by other processes too."""

    def __init__(self, kernels: Sequence[Kernel], advance: Callable[[], object], helped: bool) -> None:
        self.own = collections.deque(kernel for kernel in kernels if kernel.sent() is None)
        self.shared = collections.deque(kernel for kernel in kernels if kernel.sent() is not None)
        self.elsewhere: collections.deque[tuple[Kernel, bool]] = collections.deque()
        self.advance = advance
        self.crew: list[threading.Thread] | None = None if helped else []

    def run(self) -> int:
        """Make all kernels; says how many had to be compiled."""
        event.register("numba:compile", _misses)
        try:
            compiled = self._make_all()
            self._await_crew()
            compiled += self._make_all()  # what others could not do after all
        except BaseException:
            self.shared.clear()
            self._await_crew()  # nobody is cut off in the middle of a kernel
            raise
        finally:
            event.unregister("numba:compile", _misses)
        return compiled + sum(kernel.make() or was_missing for kernel, was_missing in self.elsewhere)

    def _make_all(self) -> int:
        compiled = 0
        while self.own or self.shared:
            try:
                kernel = (self.own or self.shared).popleft()
            except IndexError:  # somebody else was quicker
                break
            missing = kernel.make()
            compiled += missing
            if missing and self.crew is None:
                self._hire()
            self.advance()
        return compiled

    def _hire(self) -> None:
        """Start as many processes as are worth their start."""
        size = min(cores(), CREW, 1 + len(self.shared) // SHARE) - 1
        if getattr(sys, "frozen", False) or not sys.executable:  # that would be the program, not Python
            size = 0
        self.crew = [threading.Thread(target=self._delegate, daemon=True) for _ in range(size)]
        for thread in self.crew:
            thread.start()

    def _await_crew(self) -> None:
        for thread in self.crew or ():
            thread.join()

    def _delegate(self) -> None:
        """Have another process make kernels, one after the other, as long as there are some."""
        script = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve()"
        kernel = None
        try:
            with subprocess.Popen(
                [sys.executable, "-c", script],
                env={**os.environ, "NUMBA_CACHE_DIR": numba.config.CACHE_DIR},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,  # Ctrl-C is for us; it ends when we close its input
            ) as process:
                assert process.stdin
                assert process.stdout
                while self.shared:
                    kernel = self.shared.pop()
                    print(kernel.sent(), file=process.stdin, flush=True)
                    self.elsewhere.append((kernel, json.loads(process.stdout.readline())))
                    kernel = None
                    self.advance()
        except (OSError, ValueError, IndexError):  # it died, or there was none left
            if kernel is not None:
                self.own.append(kernel)


def serve() -> None:
    """The other process: makes the kernels it is told of, and answers whether each one was missing."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    event.register("numba:compile", _misses)
    for line in sys.stdin:
        print(json.dumps(Kernel.received(line).make()), file=answers, flush=True)


def cores() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _writable() -> bool:
    """Whether kernels can be kept; if not, it is of no use that another process compiles them."""
    try:
        private.make(cache.folder())
        if private.distrusted(cache.folder()):
            return False
        with tempfile.TemporaryFile(dir=cache.folder()) as file:
            file.write(bytes(1 << 17))  # as much as the largest kernel
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _bar(total: int, wanted: bool) -> Iterator[Callable[[], object]]:
    """What to call after each kernel, within a progress bar if there is somebody to look at it."""
    tqdm: Any = None
    if wanted and sys.stderr is not None and sys.stderr.isatty():
        with contextlib.suppress(ModuleNotFoundError):
            tqdm = import_module("tqdm").tqdm
    if tqdm is None:
        yield lambda: None
        return
    with tqdm(total=total, desc="kernels", leave=False) as bar:
        yield bar.update
