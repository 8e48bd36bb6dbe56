"""The form that torch has of an optimizer: names and defaults of options, states, and the mathematics.

`numba_opt.torch` makes classes of these; nothing here needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

from .. import arguments


class Variant(NamedTuple):
    """What a group's options ask for of a rule of torch's own."""

    rule: Callable[..., Any]
    states: tuple[str, ...]  # what they are called in torch's state
    hyper: Callable[[float, int], tuple[float, ...]]  # hyper-parameters, from learning rate and update


class TorchForm:
    """A class that `numba_opt.torch` offers under an optimizer's name.

    Attributes
    ----------
    documentation : str
        The class's docstring.
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
    def variant(cls, group: Mapping[str, Any]) -> Variant | None:
        """torch's formula for a group's options, all checked; None where torch has none."""
        return None

    @classmethod
    def own_options(cls, group: Mapping[str, Any]) -> dict[str, Any]:
        """Where torch has none: arguments of this package's optimizer that a group's options stand for."""
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
