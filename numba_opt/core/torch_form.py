"""The form that torch has of an optimizer: names and defaults of options, states, and the mathematics.

`numba_opt.torch` makes classes of these; nothing here needs torch.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

from . import arguments


class Variant(NamedTuple):
    """A rule of torch's own, as a group's options ask for it, with its states and hyper-parameters."""

    rule: Callable[..., Any]
    states: tuple[str, ...]  # what they are called in torch's state
    hyper: Callable[[float, int], tuple[float, ...]]  # hyper-parameters, from learning rate and update


# What all classes' docstrings have in common.
PARAMS = """params : iterable of Tensor, of (str, Tensor) or of dict
    Parameters, named ones, or groups with options of their own.
"""
OPTIONS = """maximize : bool, default False
formula : {{"torch", "mxnet"}}, default "torch"
    "mxnet" is the formula of `numba_opt.{name}`, with that class's options and states.
**options
    Those of ``formula="mxnet"``; ``lr`` may be called ``learning_rate``. torch's ``foreach`` and
    ``fused`` are accepted and change nothing.

Raises
------
TypeError, ValueError
    An option is unknown or out of range; a parameter is of another dtype than float32, float64, float16
    or bfloat16, or neither on the CPU nor on an NVIDIA GPU.
CudaUnavailableError
    A parameter is on a GPU, and what that takes is not installed: extra ``cuda`` or ``cuda12``.

"""


EXAMPLES = "Examples\n--------\n"


class TorchForm:
    """A class that `numba_opt.torch` offers under an optimizer's name.

    Attributes
    ----------
    documentation : str
        The class's docstring, but for what all of them have in common: parameters that are no options of its
        formula, and errors.
    options : dict
        Names and defaults of the constructor's options, in their order.
    keywords : tuple of str
        Those that can be given by name only.
    counted : bool
        Whether updates are counted, as ``step`` in a parameter's state.
    rules : tuple of (callable, int)
        Rules that the optimizer itself has not, with the number of their states: what there is to warm up.
    """

    documentation: ClassVar[str]
    options: ClassVar[dict[str, Any]]
    keywords: ClassVar[tuple[str, ...]] = ("maximize",)
    counted: ClassVar[bool] = True
    rules: ClassVar[tuple[tuple[Callable[..., Any], int], ...]] = ()

    @classmethod
    def docstring(cls, optimizer: type) -> str:
        """The docstring of the torch class of an optimizer, whose references are the optimizer's."""
        start, heading, rest = inspect.cleandoc(cls.documentation).partition("Parameters\n----------\n")
        own, _, end = rest.partition("\n\n")
        _, title, references = inspect.cleandoc(optimizer.__doc__ or "").partition("References\n----------\n")
        if title and title not in end:
            end = f"{title}{references.partition(EXAMPLES)[0]}{end}"
        return f"{start}{heading}{PARAMS}{own}\n{OPTIONS.format(name=optimizer.__name__)}{end}"

    @classmethod
    def variant(cls, group: Mapping[str, Any]) -> Variant | None:
        """torch's formula for a group's options, all checked; None where torch has none."""
        return None

    @classmethod
    def own_options(cls, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return this package's options that stand for a group's, where torch has no formula for them."""
        return {}


def number(group: Mapping[str, Any], name: str, below: float = math.inf) -> float:
    """An option as a number of at least 0."""
    return arguments.number(name, group[name], below=below)


def betas(group: Mapping[str, Any]) -> tuple[float, float]:
    """The option `betas` as two numbers in [0, 1)."""
    try:
        beta1, beta2 = group["betas"]
    except (TypeError, ValueError):
        raise ValueError(f"betas must be two numbers in [0, 1), got {group['betas']!r}") from None
    each = {"betas[0]": beta1, "betas[1]": beta2}
    return number(each, "betas[0]", below=1), number(each, "betas[1]", below=1)
