"""Rules: what the loops need to know of them, and what is refused of what users write.

A rule's arguments and results are positions. Compiled code would read past a row of coefficients that is too
short, and leave out a result too many, so everything is compared before a rule is used: when an optimizer
meets it first, and whenever it has another one.
"""

from __future__ import annotations

import builtins
import inspect
import keyword
import numbers
import re
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numba.core import errors
from numba.core import types as numba_types

from ..compiler import cache, fingerprint
from ..compiler.code_names import global_names

STARS = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS
LATER = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
FLOATS = {float}
OTHERS = (OSError, MemoryError, RuntimeError)  # errors that are not about rules

# Lines of Numba's messages that say where it was, not what is wrong.
WHERE = re.compile(
    r"Failed in |During: |File \"|There (is|are) \d+ candidate|- (Of which|Resolution)|Overload |Rejected |"
    r"raised from |This error |With argument|<source|\W*$"
)


class HasRule:
    """The part of an optimizer that says what its rule and its states are."""

    rule: Any
    state_names: Any
    per_row: Any


class WrongResultError(TypeError):
    """A rule's result is not what it should be."""


class Rule(NamedTuple):
    """An optimizer's rule as the loops take it: its function, and the states that go with it."""

    function: Callable[..., Any]
    n_state: int
    per_row: bool

    @property
    def n_coefficients(self) -> int:
        """Number of coefficients that the function takes."""
        return self.function.__code__.co_argcount - 2 - self.n_state - int(self.per_row)

    @property
    def key(self) -> tuple[Any, ...]:
        """Key that tells the rule from every other rule, in any process."""
        return fingerprint.fingerprint(self.function), self.n_state, self.per_row

    def row_length(self, stochastic: bool = False) -> int:
        """Return the number of entries of a row of coefficients.

        Three come before the function's own, and two after them where states are rounded stochastically.
        """
        return 3 + self.n_coefficients + 2 * stochastic

    def arguments(self) -> tuple[str, ...]:
        """The names of the function's arguments."""
        return self.function.__code__.co_varnames[: self.function.__code__.co_argcount]


class Checked:
    """An optimizer's rule that has been found to be in order, and what it was then."""

    def __init__(self, optimizer: HasRule) -> None:
        self.owner = type(optimizer).__name__
        self.states, self.per_row = optimizer.state_names, optimizer.per_row
        self.rule = check(self.owner, optimizer.rule, self.states, self.per_row)
        self.n_coefficients = self.rule.n_coefficients
        self.function: Any = self.rule.function
        self.code = self.function.__code__
        self.reached = fingerprint.look(self.function)

    def holds(self, optimizer: HasRule) -> bool:
        """Tell whether the optimizer's rule is still the one that was checked."""
        rule: Any = optimizer.rule
        return (
            getattr(rule, "__func__", rule) is self.function
            and self.function.__code__ is self.code
            and optimizer.state_names == self.states
            and optimizer.per_row is self.per_row
            and self.reached.unmoved()
        )

    def coefficients(self, given: Any) -> tuple[float, ...]:
        """Return the result of `hyper`, if it is what the rule takes.

        Raises
        ------
        TypeError
            It is no tuple, of another length, or there is something else than numbers in it.
        """
        n = self.n_coefficients
        if type(given) is tuple and len(given) == n and FLOATS.issuperset(map(type, given)):
            return given
        names = self.rule.arguments()
        takes = f"{name_of(self.function, self.owner)} takes {n} coefficient{'s' * (n != 1)}"
        takes += f" ({', '.join(names[len(names) - n :])})"
        if not isinstance(given, tuple):
            raise TypeError(f"{takes}; hyper must return a tuple of them, got {_shown(given)}")
        if len(given) != n:
            raise TypeError(f"{takes}; hyper returned {len(given)}: {_shown(given)}")
        for value in given:
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                kind = type(value).__name__
                raise TypeError(f"{takes}; hyper must return numbers, got {_shown(value)} of type {kind}")
        return tuple(map(float, given))  # an int may be too large for that, and says so


_owners: WeakKeyDictionary[Any, str] = WeakKeyDictionary()  # who has used a function as a rule last
_lengths: WeakKeyDictionary[Any, tuple[Any, int]] = WeakKeyDictionary()  # of results, with the code
_on_arrays: WeakKeyDictionary[Any, Rule] = WeakKeyDictionary()  # those that take arrays


def check(owner: str, given: Any, states: Any, per_row: Any) -> Rule:
    """Check and return the rule of a class of optimizers.

    Parameters
    ----------
    owner : str
        The name of the class.
    given : object
        What it has for a rule; a function in a class's body may come bound.
    states : object
        Its `state_names`.
    per_row : object
        Its `per_row`.

    Raises
    ------
    TypeError
        The rule cannot be used with these states, or by itself.
    RuntimeError
        It reaches something else than when it was first used.
    """
    what = f"rule of class {owner} ({_place_of(given)})"
    function = _plain_function(given, what)
    _owners[function] = owner
    _check_states(states, per_row, what)
    rule = Rule(function, len(states), per_row)
    _check_arguments(rule, states, what)
    try:
        fingerprint.look(function)
    except fingerprint.ChangedError as error:
        raise RuntimeError(f"{what} has changed: {error}") from None
    results = _results(rule, what)
    expected = 1 + rule.n_state
    if results != expected:
        names = ", ".join(("weight", *states)) + "," * (not states)
        raise TypeError(f"{what} returns {results} results; expected {expected}: ({names})")
    return rule


def kernel(make: Callable[..., Any], rule: Rule, *how: Any) -> Any:
    """Make a kernel of a rule by ``make(rule, *how)``; errors are those of `explain`."""
    try:
        return make(rule, *how)
    except Exception as error:
        explain(error, rule.function)
        raise


def explain(error: Exception, function: Any) -> None:
    """Raise an error that says in a line or two what is wrong with a rule; return if that is not the matter.

    Raises
    ------
    TypeError
        Numba cannot compile the rule; it says why.
    RuntimeError
        The rule has changed since it was first used.
    """
    if isinstance(error, fingerprint.ChangedError):
        raise RuntimeError(f"{name_of(function)} has changed: {error}") from None
    if isinstance(error, OTHERS) and not isinstance(error, NotImplementedError):
        return
    try:
        _compiled_results(function)
    except WrongResultError as wrong:
        reason = str(wrong)
    except Exception as alone:  # says nothing of the loops around it
        reason = f"does not compile: {_reason(alone)}"
    else:
        if not isinstance(error, errors.NumbaError):
            return
        reason = f"does not compile: {_reason(error)}"
    raise TypeError(f"{name_of(function)} {reason}") from error


def check_on_arrays(rule: Rule) -> None:
    """Refuse a rule that cannot be applied to whole arrays.

    Raises
    ------
    TypeError
        It has branches, perhaps, or calls what only takes single numbers.
    """
    if _on_arrays.get(rule.function) == rule:
        return
    shapes = [(2, 3), (2, 3), *[(2, 1 if rule.per_row else 3)] * rule.n_state, *[(2, 1)] * rule.per_row]
    arrays = [np.full(shape, 0.5) for shape in shapes]
    try:
        with np.errstate(all="ignore"):
            found = rule.function(*arrays, *[np.float64(0.5)] * rule.n_coefficients)
        for value, shape in zip(found, [shapes[0], *shapes[2:]], strict=False):
            np.broadcast_to(value, shape)
            np.zeros(shape)[...] = np.asarray(value, np.float64)
    except Exception as error:
        raise TypeError(
            f"{name_of(rule.function)} cannot be applied to whole arrays, as step does: {_line(error)}"
        ) from error
    _on_arrays[rule.function] = rule


# ---------------------------------------------------------------- what a rule is


def name_of(function: Any, owner: str = "") -> str:
    """Return the name of a rule, for errors."""
    owner = owner or _owners.get(function, "")
    return f"rule {'of class ' * bool(owner)}{owner or function.__qualname__} ({_place_of(function)})"


def _place_of(given: Any) -> str:
    """The file and the line of something that serves as a rule, or should."""
    within = ("__func__", "py_func", "func", "__call__")
    for part in (given, *(getattr(given, name, None) for name in within)):
        code = getattr(part, "__code__", None)
        if isinstance(code, types.CodeType):
            return f"{code.co_filename}:{code.co_firstlineno}"
    return f"a {type(given).__name__}"


def _plain_function(given: Any, what: str) -> Any:
    """The function itself."""
    function = given
    if isinstance(given, types.MethodType):
        function = given.__func__
        if not isinstance(given.__self__, HasRule):
            owner = getattr(given.__self__, "__name__", type(given.__self__).__name__)
            raise TypeError(f"{what} must be a plain function, got a method of {owner}")
    if not isinstance(function, types.FunctionType):
        hint = ": give the function that it was made of" if hasattr(function, "py_func") else ""
        raise TypeError(f"{what} must be a plain function, got a {type(function).__name__}{hint}")
    return function


def _check_states(states: Any, per_row: Any, what: str) -> None:
    if not isinstance(states, tuple):
        hint = f"; did you mean ({states!r},)?" if isinstance(states, str) else ""
        raise TypeError(f"{what}: state_names must be a tuple of str, got {_shown(states)}{hint}")
    for name in states:
        if not (isinstance(name, str) and name.isidentifier()) or keyword.iskeyword(name):
            raise TypeError(f"{what}: state_names must be names, got {_shown(name)} in {_shown(states)}")
    if len(set(states)) < len(states):
        raise TypeError(f"{what}: state_names must be all different, got {_shown(states)}")
    if not isinstance(per_row, bool):
        raise TypeError(f"{what}: per_row must be True or False, got {_shown(per_row)}")


def _check_arguments(rule: Rule, states: Sequence[str], what: str) -> None:
    """Refuse a function whose arguments are not a weight, a gradient, these states and coefficients."""
    function: Any = rule.function
    code, names = function.__code__, rule.arguments()
    expected = ("weight", "grad", *states, *["mean_square"] * rule.per_row)
    takes = f"{what} takes ({', '.join(names)}); expected ({', '.join(expected)}, then its coefficients)"
    if names[:1] in (("self",), ("cls",)):
        raise TypeError(f"{takes}: rules get no {names[0]}")
    if code.co_flags & STARS or code.co_kwonlyargcount:
        raise TypeError(f"{takes}: no stars, and nothing that is given by keyword only")
    if function.__defaults__:
        raise TypeError(f"{takes}: no defaults, all numbers come from hyper")
    if code.co_flags & LATER:
        raise TypeError(f"{what} must be a plain function, not a generator or a coroutine")
    if len(names) < len(expected):
        raise TypeError(takes)
    given = names[2 : 2 + len(states)]
    if sorted(given) == sorted(states) and given != states:
        raise TypeError(f"{takes}: its states are in another order")
    for name in global_names(code):
        if name not in function.__globals__ and not hasattr(builtins, name):
            raise TypeError(f"{what} uses {name!r}, which is not defined")


# ---------------------------------------------------------------- what a rule returns


def _results(rule: Rule, what: str) -> int:
    """Return the number of results of a rule, run on numbers, or where Python cannot do that, compiled."""
    function: Any = rule.function
    code, n = _lengths.get(function, (None, 0))
    if code is function.__code__:
        return n
    try:
        with np.errstate(all="ignore"):
            found = function(*[np.float64(0.5)] * len(rule.arguments()))
    except NameError as error:
        raise TypeError(f"{what} fails: {_line(error)}") from error
    except Exception as error:
        n = _results_by_numba(function, error, what)
    else:
        if not isinstance(found, tuple):
            hint = "; did you mean (weight,)?" if isinstance(found, numbers.Number) else ""
            raise TypeError(f"{what} must return a tuple, got a {type(found).__name__}{hint}")
        for k, value in enumerate(found):
            single = np.asarray(value)
            if single.ndim or single.dtype.kind not in "biuf":
                raise TypeError(f"{what} must return numbers; result {k} is a {type(value).__name__}")
        n = len(found)
    _lengths[function] = function.__code__, n
    return n


def _results_by_numba(function: Any, failed: Exception, what: str) -> int:
    """Return the number of results of a rule that Python fails to run."""
    try:
        return _compiled_results(function)
    except WrongResultError as error:
        raise TypeError(f"{what} {error}") from error
    except Exception as error:
        raise TypeError(f"{what} does not compile; in Python it fails: {_line(failed)}") from error


def _compiled_results(function: Any) -> int:
    """Return the number of results of a rule, as Numba finds it."""
    count = function.__code__.co_argcount
    made = cache.compiled(function, fingerprint.fingerprint(function), name=f"rule-{function.__name__}")
    made.compile((numba_types.float64,) * count)
    found = made.nopython_signatures[0].return_type
    if not isinstance(found, numba_types.containers.BaseTuple):
        raise WrongResultError(f"must return a tuple, got {found}")
    for k, kind in enumerate(found):
        if not isinstance(kind, (numba_types.Integer, numba_types.Float, numba_types.Boolean)):
            raise WrongResultError(f"must return numbers; result {k} is {kind}")
    return len(found)


def _shown(value: Any) -> str:
    """A value in one line."""
    return " ".join(repr(value).split())[:200]


def _line(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _reason(error: Exception) -> str:
    """The first line of an error of Numba's that says what is wrong."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[\d;]*m", "", str(error)).splitlines()]
    helpful = [line for line in lines if not WHERE.match(line)] or [type(error).__name__]
    end = 2 if helpful[0].endswith(":") else 1  # what is announced comes next
    return " ".join(helpful[:end])[:300]
