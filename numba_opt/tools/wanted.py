"""Which kernels a program will need, for optimizers, dtypes, devices, and perhaps sparse gradients."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from ..core.rules import Rule
from ..core.storage import HALVES, OF_NAME, Layout, TouchedForm, gradients_for, name_of
from ..cuda import arrays as cuda_arrays
from ..optimizer import Optimizer, create

Request = tuple[Any, ...]  # the name of a kernel, among `makers`, and its arguments


class Variant(NamedTuple):
    """A way that an optimizer may be used."""

    optimizer: Optimizer
    masters: tuple[bool, ...]  # whether half-precision weights have float32 copies: either, or both
    torch: tuple[Rule, ...] = ()  # what `numba_opt.torch` has for it beside its own rule


def variants(optimizers: Any) -> list[Variant]:
    if optimizers is None:
        found: list[Variant] = []
        for cls in Optimizer.opt_registry.values():
            with contextlib.suppress(TypeError):  # it needs arguments: only its user can make one
                found += _variants_of(cls)
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
    return _variants_of(given)


def _variants_of(cls: type[Optimizer]) -> list[Variant]:
    made = [Variant(cls(**options), (False, True)) for options in cls.variants]
    form = cls.torch_form if find_spec("torch") is not None else None
    torch = () if form is None else tuple(Rule(rule, n, False) for rule, n in form.rules)
    return [made[0]._replace(torch=torch), *made[1:]]


def codes(dtypes: Any) -> list[str]:
    """The codes of dtypes, each once."""
    several = isinstance(dtypes, Iterable) and not isinstance(dtypes, (str, np.dtype, type))
    found = []
    for dtype in dtypes if several else [dtypes]:
        name = name_of(dtype)
        if name not in OF_NAME:
            raise ValueError(f"dtypes must be among {', '.join(OF_NAME)}, got {dtype!r}")
        found.append(OF_NAME[name])
    return list(dict.fromkeys(found))


def targets(devices: Any) -> list[str]:
    """Return the targets to compile for: "cpu", and compute capabilities such as "9.0"."""
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


def cpu_kernels(variants: Sequence[Variant], codes: Sequence[str], sparse: bool) -> Iterator[Request]:
    """The kernels of the CPU, the small ones that everything needs first."""
    yield from (("read arrays",), ("share work",))
    if sparse:
        yield ("merge rows",)
        for size in (4, 8):
            yield ("merge csr", size)
            yield ("columns", f"i{8 * size}")
    yield from (("squares", code) for code in codes)
    if sparse and set(codes) & set(HALVES):  # sums of half-precision parts are float32
        yield ("squares", "f32")
    for rule, own, grads, optimizer in _uses(variants, codes):
        yield from (("dense", rule, Layout(grad, *own[1:])) for grad in grads)
        if sparse and optimizer is not None and optimizer.sparse_update != "dense":
            exact = optimizer.sparse_update == "exact"
            forms = [TouchedForm("block", grads[0]), TouchedForm("csr", grads[0])]
            yield from (("rows", rule, own, form, exact) for form in forms)
            if exact:
                yield ("rows", rule, own, TouchedForm("none"), True)


def _uses(
    variants: Sequence[Variant], codes: Sequence[str], torch: bool = False
) -> Iterator[tuple[Rule, Layout, Sequence[str], Optimizer | None]]:
    """Rules, with how weights of some dtypes and their states are stored, and the gradients that go with
    them.

    The dtype that was asked for is the first one's. Those that torch has beside an optimizer's own have none.
    """
    for optimizer, masters, others in variants:
        for rule in others if torch else ():
            for code in codes:
                yield rule, Layout("", code, (code,) * rule.n_state, ""), [code], None
        for code in codes if optimizer.rule is not None else ():
            rule = optimizer.checked_rule()
            for master in masters if code in HALVES else (False,):
                model_weight, weight = (code, "f32") if master else ("", code)
                states = (optimizer.state_storage or weight,) * rule.n_state
                own = Layout("", weight, states, model_weight)
                yield rule, own, gradients_for("f32", code) if master else [code], optimizer


def cuda_kernels(variants: Sequence[Variant], codes: Sequence[str], sparse: bool) -> Iterator[Request]:
    """The kernels of GPUs."""
    yield from (("set_coefficients",), ("clip_norm",), *(("squares", code) for code in codes))
    yield from _sum_kernels(codes, sparse)
    if sparse:
        for code in codes:
            compute = "f64" if code == "f64" else "f32"
            yield from (("row_squares", compute, form) for form in _forms(code))
    for rule, own, grads, optimizer in _uses(variants, codes, torch=True):
        yield from (("dense", rule, Layout(grad, *own[1:])) for grad in grads)
        if sparse:
            mode = "lazy" if optimizer is None else optimizer.sparse_update
            forms = _forms(own.model_weight or own.weight, mode)
            yield from (("rows", rule, own, form) for form in forms)
            if mode == "exact":
                none = TouchedForm("none", own.weight)
                yield from (("catch_up", rule, own, form) for form in (*forms, none))
                yield from (("record", rule.row_length(own.stochastic), own.compute), ("forget",))


def _sum_kernels(codes: Sequence[str], sparse: bool) -> Iterator[Request]:
    """The kernels by which gradients add up on a GPU."""
    loops = cuda_arrays.loops()
    sums = [(code, total) for code in codes for total in dict.fromkeys([code, *["f32"] * (code in HALVES)])]
    for code, total in sums:
        for rule in (loops.begun, loops.plus):
            yield ("dense", Rule(rule, 0, False), Layout(code, total, (), ""))
    if not sparse:
        return
    yield from (("keys", "i32"), ("keys", "i64"), ("merge",), ("vacate",))
    for code, total in sums:
        yield from (("spread", total, every) for every in (False, True))
        for kind in ("rows", "csr"):
            for indices in ("i32", "i64"):
                yield ("collect", total, TouchedForm(kind, code, indices))
        yield ("collect", total, TouchedForm("rows", total, "i64"))


def _forms(code: str, mode: str = "lazy") -> list[TouchedForm]:
    """Sparse gradients of a dtype, as GPUs have them: distinct rows, any rows, CSR."""
    csr = [TouchedForm("csr", code, indices) for indices in ("i32", "i64")]
    if mode == "dense":
        return [TouchedForm(f"every-{form.kind}", *form[1:]) for form in (TouchedForm("keys", code), *csr)]
    rows = [TouchedForm("rows", code, indices) for indices in ("i32", "i64")]
    return [*rows, TouchedForm("keys", code), *csr]
