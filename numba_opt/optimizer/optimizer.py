"""`Optimizer`: hyper-parameters, update counts, multipliers and the registry; what all optimizers share.

An optimizer is a rule and a class. The rule is a plain function of scalars; the class names its states
and says which numbers it gets at each step. Everything else is here and in the loops.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from .. import device
from ..core import arguments
from ..core.call import Arrays
from ..core.executor import Executor
from ..core.rates import Index
from ..core.storage import STATE_DTYPES, name_of
from ..core.torch_form import TorchForm
from .states import HasStates, check_lengths

__all__ = ["Optimizer", "create", "register"]

Class = TypeVar("Class", bound="type[Optimizer]")

KEPT = 32  # kinds of calls whose executors are kept


class Optimizer(HasStates):
    """Base class of all optimizers, with the interface of MXNet 2.0's.

    Each step takes the gradients as ::

        grad = clip(rescale_grad * grad, clip_gradient) + wd * weight

    and hands them to the optimizer's own formula. Weights and states are changed in place, gradients
    never. All arguments of a call are checked before the first weight is written, so a call that raises
    leaves weights, states and counts as they were.

    Parameters
    ----------
    rescale_grad : float, default 1.0
        Gradients are multiplied by it first; often ``1 / batch_size``. May be changed at any time.
    param_idx2name : dict of index to str, optional
        Names of the parameters, for `set_lr_mult`, `set_wd_mult` and error messages.
    wd : float, default 0.0
        Weight decay (L2 regularisation) coefficient.
    clip_gradient : float, optional
        Rescaled gradients are brought into ``[-clip_gradient, clip_gradient]``. 0 makes them 0.
    learning_rate : float, optional
        None means the scheduler's, or 0.01 without one. Given together with a scheduler it replaces the
        scheduler's ``base_lr``, with a warning if that differs.
    lr_scheduler : LRScheduler, optional
        The learning rate as a function of `num_update`.
    begin_num_update : int, default 0
        Where the counts of updates begin.
    multi_precision : bool, default False
        Keep a float32 copy of half-precision weights in the state, and update that.
    param_dict : dict of index to object, optional
        Objects with attributes ``lr_mult`` and ``wd_mult``, which come before all other multipliers.
    aggregate_num : int, default 1
        How many parameters `Updater` hands over in one call; ``numpy.inf`` for all.
    use_fused_step : bool, optional
        Whether `update` runs `fused_step` (one compiled pass) or `step` (readable, on whole arrays).
        Default: fused, for every optimizer that has a rule.
    lazy_update : bool, default True
        What a sparse gradient means: True, that only the rows it touches take a step; False, that the
        others take one with gradient 0.
    sparse_update : {"lazy", "dense", "exact"}, default "lazy"
        The same with one more choice. "exact" gives what "dense" gives at the cost of "lazy": an untouched
        row takes its steps later, when it is touched again or at `flush`. States are then
        ``(state, last_step)``, with one number for each row.

    state_dtype : {"float32", "bfloat16", "float16"}, optional
        The dtype of the states, as a name, a NumPy dtype or a torch dtype. Arithmetic is in the weight's
        precision, at least float32; what is stored is rounded to nearest, ties to even. Default: the weight's
        dtype, or float32 beside a float32 copy.
    stochastic_rounding : bool, default False
        Round states up or down by chance, each with the probability that makes it right on average, so that
        changes too small for bfloat16 or float16 are not lost. `state_dtype` must be one of these.
    seed : int, default 0
        What the chance is drawn from, together with the parameter's index, the number of its updates and the
        element's place: the same for any number of threads, and after a resume.

    Attributes
    ----------
    rule : callable
        ``rule(weight, grad, *states, *coefficients) -> (weight, *states)``, on scalars or on whole arrays,
        with the functions of `numba_opt.scalar`. Where `per_row` is set it gets the mean square of the
        gradient's row after the states. A plain function, without stars or defaults. Globals, closures and
        helpers that it uses are compiled in: numbers that change belong into `hyper`, and to rebind one of
        the others after the first use is an error.
    state_names : tuple of str
        The rule's states, in the order of its arguments. They begin at zero.
    per_row : bool
        Weights are matrices and states hold one number for each row.
    variants : tuple of dict
        Options with which the class has each of its rules: what there is to warm up.
    torch_form : type, optional
        A `numba_opt.core.torch_form.TorchForm`: the class of this optimizer in `numba_opt.torch`.
    num_update : int
        The largest number of updates that any parameter has had.

    Raises
    ------
    TypeError, ValueError
        A parameter is unknown, of the wrong type or out of range.

    Examples
    --------
    An optimizer of one's own, compiled and parallel:

    >>> import numpy as np, numba_opt
    >>> from numba_opt.scalar import sign
    >>> @numba_opt.register
    ... class SignSGD(numba_opt.Optimizer):
    ...     def rule(weight, grad, lr):
    ...         return (weight - lr * sign(grad),)
    ...     def hyper(self, lr, t):
    ...         return (lr,)
    >>> weight = np.array([1.0, 2.0, 3.0])
    >>> numba_opt.create("signsgd", learning_rate=0.5).update([0], [weight], [weight - 2], [None])
    >>> weight
    array([1.5, 2. , 2.5])
    """

    opt_registry: ClassVar[dict[str, type[Optimizer]]] = {}

    rule: Callable[..., Any] | None = None
    state_names: tuple[str, ...] = ()
    per_row: bool = False
    torch_form: ClassVar[type[TorchForm] | None] = None
    variants: ClassVar[tuple[dict[str, Any], ...]] = ({},)

    def __init__(
        self,
        rescale_grad: float = 1.0,
        param_idx2name: Mapping[Index, str] | None = None,
        wd: float = 0.0,
        clip_gradient: float | None = None,
        learning_rate: float | None = None,
        lr_scheduler: Callable[[int], float] | None = None,
        begin_num_update: int = 0,
        multi_precision: bool = False,
        param_dict: Mapping[Index, Any] | None = None,
        aggregate_num: float | None = 1,
        use_fused_step: bool | None = None,
        lazy_update: bool = True,
        sparse_update: str = "lazy",
        state_dtype: Any = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        if kwargs:
            raise arguments.unknown(type(self), kwargs)
        self.rescale_grad = arguments.number("rescale_grad", rescale_grad, minimum=-math.inf)
        self.wd = arguments.number("wd", wd)
        self.check_decay(self.wd)
        self.clip_gradient = arguments.optional("clip_gradient", clip_gradient)
        self.lr = arguments.optional("learning_rate", learning_rate)
        self.lr_scheduler = lr_scheduler
        self._join(lr_scheduler)
        self.begin_num_update = arguments.count("begin_num_update", begin_num_update, 0)
        self.num_update = self.begin_num_update
        self._counts = {}
        self._counted_groups = ()
        self.multi_precision = bool(multi_precision)
        if aggregate_num is not None and aggregate_num != math.inf:
            arguments.count("aggregate_num", aggregate_num, 1)  # type: ignore[arg-type]
        self.aggregate_num = 1 if aggregate_num is None else aggregate_num
        for name, value in (("param_idx2name", param_idx2name), ("param_dict", param_dict)):
            if value is not None and not isinstance(value, Mapping):
                raise TypeError(f"{name} must be a dict, got {value!r}")
        self.idx2name = dict(param_idx2name or {})
        self.param_dict = param_dict or {}
        self._use_fused_step = None if use_fused_step is None else bool(use_fused_step)
        self.lazy_update = bool(lazy_update)
        self.sparse_update = arguments.choice("sparse_update", sparse_update, ("lazy", "dense", "exact"))
        if not lazy_update and sparse_update == "lazy":
            self.sparse_update = "dense"
        if state_dtype is not None and name_of(state_dtype) not in STATE_DTYPES:
            names = ", ".join(map(repr, STATE_DTYPES))
            raise ValueError(f"state_dtype must be one of {names}, got {state_dtype!r}")
        self.state_dtype = None if state_dtype is None else name_of(state_dtype)
        self.stochastic_rounding = bool(stochastic_rounding)
        if self.stochastic_rounding and self.state_dtype not in ("bfloat16", "float16"):
            expected = "stochastic_rounding needs state_dtype='bfloat16' or 'float16'"
            raise ValueError(f"{expected}, got state_dtype={state_dtype!r}")
        self.seed = arguments.count("seed", seed, 0)
        self.lr_mult, self.wd_mult = {}, {}
        self._deferred = {}
        self._executors: dict[Any, list[Executor]] = {}  # that no call has taken, by what they serve
        self._owner: Callable[[], Any] = _nobody  # the Trainer that it belongs to

    @property
    def owner(self) -> Any:
        """The Trainer that this optimizer belongs to, if it belongs to one."""
        return self._owner()

    def give_to(self, trainer: Any) -> None:
        """Belong to a Trainer, from now on and as long as that is there."""
        self._owner = weakref.ref(trainer)

    # ---------------------------------------------------------------- the registry

    @staticmethod
    def register(klass: Class) -> Class:
        """Make a class known to `create` by its name, in any case. Serves as a decorator."""
        if not (isinstance(klass, type) and issubclass(klass, Optimizer)):
            raise TypeError(f"klass must be a subclass of Optimizer, got {klass!r}")
        name = klass.__name__.lower()
        before = Optimizer.opt_registry.get(name)
        if before is not None and (before.__module__, before.__qualname__) != (
            klass.__module__,
            klass.__qualname__,
        ):
            warnings.warn(
                f"{klass.__module__}.{klass.__name__} replaces {before.__module__}.{before.__name__} "
                "in the registry of optimizers",
                stacklevel=2,
            )
        Optimizer.opt_registry[name] = klass
        return klass

    @staticmethod
    def create_optimizer(name: str, **kwargs: Any) -> Optimizer:
        """Make an optimizer by its registered name, in any case, with its constructor's arguments.

        Examples
        --------
        >>> import numba_opt
        >>> numba_opt.create("nag", momentum=0.8).momentum
        0.8
        """
        if not isinstance(name, str):
            raise TypeError(f"name must be a str, got {name!r}")
        known = Optimizer.opt_registry
        if name.lower() not in known:
            names = ", ".join(sorted(klass.__name__ for klass in known.values()))
            raise ValueError(f"name must be one of {names}, got {name!r}")
        return known[name.lower()](**kwargs)

    # ---------------------------------------------------------------- steps

    @property
    def use_fused_step(self) -> bool:
        """True if `update` runs `fused_step`; by default, if there is a rule."""
        return self.rule is not None if self._use_fused_step is None else self._use_fused_step

    @use_fused_step.setter
    def use_fused_step(self, value: bool) -> None:
        self._use_fused_step = bool(value)

    def step(
        self, indices: Sequence[Index], weights: Sequence[Any], grads: Sequence[Any], states: Sequence[Any]
    ) -> None:
        """Update the weights by the rule applied to whole arrays: readable, not fast.

        On a GPU there are no arrays that NumPy could work on, and this is `fused_step`.

        Parameters
        ----------
        indices : list of int
            The parameters' indices, all different.
        weights, grads : list of array
            The parameters and their gradients, of the same shapes and dtypes.
        states : list
            What `create_state` gave for each of them.

        Raises
        ------
        TypeError, ValueError
            An argument does not fit; nothing has been changed.
        """
        self._step(indices, weights, grads, states, masters=False, fused=False)

    def fused_step(
        self, indices: Sequence[Index], weights: Sequence[Any], grads: Sequence[Any], states: Sequence[Any]
    ) -> None:
        """Update the weights in one compiled pass over all of them. Arguments and errors as in `step`."""
        self._step(indices, weights, grads, states, masters=False, fused=True)

    def update(
        self, indices: Sequence[Index], weights: Sequence[Any], grads: Sequence[Any], states: Sequence[Any]
    ) -> None:
        """Call `fused_step` or `step`, as `use_fused_step` says. Arguments and errors as in `step`."""
        (self.fused_step if self.use_fused_step else self.step)(indices, weights, grads, states)

    def update_multi_precision(
        self, indices: Sequence[Index], weights: Sequence[Any], grads: Sequence[Any], states: Sequence[Any]
    ) -> None:
        """Call `update` with the states of `create_state_multi_precision`.

        The gradient of a half-precision weight with a float32 copy may be of either precision.
        """
        if not self.multi_precision:
            return self.update(indices, weights, grads, states)
        return self._step(indices, weights, grads, states, masters=True, fused=self.use_fused_step)

    def flush(self, indices: Sequence[Index], weights: Sequence[Any], states: Sequence[Any]) -> None:
        """Bring all rows up to date, before weights that had sparse gradients are looked at.

        Only with ``sparse_update="exact"`` is there anything to do.
        """
        check_lengths(indices, weights, weights, states)
        nothing = [None] * len(indices)
        masters, fused = self.multi_precision, self.use_fused_step
        arrays = self.call_arrays(indices, weights, nothing, states, masters, fused).without_grads()
        if arrays.last_steps:
            executor, kept = self._take_executor(arrays, indices)
            try:
                executor.refresh(self.with_deferred(arrays, indices))
                executor.flush()
            finally:
                executor.release()
                kept.append(executor)

    def _step(
        self,
        indices: Sequence[Index],
        weights: Sequence[Any],
        grads: Sequence[Any],
        states: Sequence[Any],
        masters: bool,
        fused: bool,
    ) -> None:
        """Check everything, work out the coefficients, make the step and count it."""
        check_lengths(indices, weights, grads, states)
        plan = self.plan_step(indices)  # schedulers and `hyper` are the user's code: they run first
        arrays = self.call_arrays(indices, weights, grads, states, masters, fused)
        if not indices:
            return
        executor, kept = self._take_executor(arrays, indices)
        try:
            executor.refresh(self.with_deferred(arrays, indices))
            executor.run(plan.rows, after=plan.counting)
        finally:
            executor.release()
            kept.append(executor)

    def _take_executor(self, arrays: Arrays, indices: Sequence[Index]) -> tuple[Executor, list[Executor]]:
        """Return an executor for some arrays, and where to put it for the next call like this one.

        Whoever takes it has it alone, as other threads may use this optimizer.
        """
        on_cuda = any(map(device.on_cuda, arrays.weights))
        # On GPUs tables are kept for the very same parameters.
        served = (arrays.rule, *(indices if on_cuda else (len(arrays.columns), len(indices))))
        if not on_cuda and len(self._executors) > KEPT:  # calls of ever other sizes
            self._executors.clear()
        kept = self._executors.setdefault((on_cuda, served), [])
        try:
            return kept.pop(), kept
        except IndexError:
            return device.executor_for(arrays.weights, arrays.rule, graphs=False), kept

    def check_call(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        """Refuse what `update_multi_precision` would refuse; nothing is changed."""
        check_lengths(indices, weights, grads, states)
        self.plan_step(indices)
        arrays = self.call_arrays(indices, weights, grads, states, self.multi_precision)
        device.check(self.with_deferred(arrays, indices))

    # ---------------------------------------------------------------- as a value

    def __repr__(self) -> str:
        shown = {"learning_rate": self.learning_rate}
        for name, default in arguments.parameters(type(self)).items():
            value = getattr(self, name, default)
            if value != default and (value or default) and name != "learning_rate":
                shown[name] = value
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in shown.items())})"

    def __getstate__(self) -> dict[str, Any]:
        # objects of the program, and addresses of this process
        gone = ("param_dict", "_executors", "_owner", "_counted_groups", "_checked")
        counts = dict(self._index_update_count)
        return {k: v for k, v in vars(self).items() if k not in gone} | {"_counts": counts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, param_dict={}, _executors={}, _owner=_nobody, _counted_groups=())


def _nobody() -> None:
    """Return None, the Trainer of an optimizer that belongs to none."""


register = Optimizer.register
create = Optimizer.create_optimizer
