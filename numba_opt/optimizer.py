"""`Optimizer`: hyper-parameters, update counts, multipliers and the registry; what all optimizers share.

An optimizer is a rule and a class. The rule is a plain function of scalars; the class names its states
and says which numbers it gets at each step. Everything else is here and in the loops.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np

from . import arguments, device
from .compiler import rounding
from .core import rules
from .core.rules import Rule
from .core.torch_form import TorchForm
from .cpu import execution, ndarray, sparse, threads
from .cuda import arrays as cuda_arrays
from .cuda import execution as cuda_execution
from .cuda import history as cuda_history
from .lr_scheduler import LRScheduler

__all__ = ["Optimizer", "create", "register"]

Index = Hashable  # MXNet's are ints; names serve as well
Class = TypeVar("Class", bound="type[Optimizer]")

RATES = ("_get_lr", "_get_wd")  # what MXNet's subclasses override to have rates of their own


class Plan(NamedTuple):
    """What a step will use and leave behind, worked out before anything changes."""

    counts: dict[Index, int]
    num_update: int
    hyper: np.ndarray  # float64, the rows that differ: rescale, clip, wd, then the rule's own
    which: list[int]  # each tensor's row


class Optimizer(rules.HasRule):
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
        ``(state, stamps)``, with one stamp for each row.

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
        ``rule(weight, grad, *states, *hyper) -> (weight, *states)``, on scalars or on whole arrays, with
        the functions of `numba_opt.scalar`. Where `per_row` is set it gets the mean square of the
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

    _checked: rules.Checked | None = None

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
        self.clip_gradient = arguments.optional("clip_gradient", clip_gradient)
        self.lr = arguments.optional("learning_rate", learning_rate)
        self.lr_scheduler = lr_scheduler
        self._join(lr_scheduler)
        self.begin_num_update = arguments.count("begin_num_update", begin_num_update, 0)
        self.num_update = self.begin_num_update
        self._counts: dict[Index, int] = {}
        self._ahead: Sequence[Any] = ()  # groups of parameters that have a newer count together
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
        if state_dtype is not None and device.name_of(state_dtype) not in device.STATE_DTYPES:
            names = ", ".join(map(repr, device.STATE_DTYPES))
            raise ValueError(f"state_dtype must be one of {names}, got {state_dtype!r}")
        self.state_dtype = None if state_dtype is None else device.name_of(state_dtype)
        self.stochastic_rounding = bool(stochastic_rounding)
        if self.stochastic_rounding and self.state_dtype not in ("bfloat16", "float16"):
            expected = "stochastic_rounding needs state_dtype='bfloat16' or 'float16'"
            raise ValueError(f"{expected}, got state_dtype={state_dtype!r}")
        self.seed = arguments.count("seed", seed, 0)
        self.lr_mult: dict[Index, float] = {}
        self.wd_mult: dict[Index, float] = {}
        self._history: dict[Index, execution.History | cuda_history.History] = {}
        self._prepared: list[Any] = []
        self._prepared_on_cuda: dict[Any, cuda_execution.Prepared] = {}
        self._owner: Callable[[], Any] = _nobody

    def _join(self, scheduler: Any) -> None:
        """Let the learning rate and a scheduler agree about the base."""
        if scheduler is None:
            self.lr = 0.01 if self.lr is None else self.lr
        elif not callable(scheduler):
            raise TypeError(f"lr_scheduler must be callable with num_update, got {scheduler!r}")
        elif self.lr is not None and isinstance(scheduler, LRScheduler) and scheduler.base_lr != self.lr:
            warnings.warn(
                f"learning_rate={self.lr} replaces the scheduler's base_lr={scheduler.base_lr}; "
                "pass learning_rate=None to keep the scheduler's",
                stacklevel=4,
            )
            scheduler.base_lr = self.lr

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
        """An optimizer by its registered name, in any case, with its constructor's arguments.

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

    # ---------------------------------------------------------------- learning rates and multipliers

    @property
    def use_fused_step(self) -> bool:
        """Whether `update` runs `fused_step`; by default, if there is a rule."""
        return self.rule is not None if self._use_fused_step is None else self._use_fused_step

    @use_fused_step.setter
    def use_fused_step(self, value: bool) -> None:
        self._use_fused_step = bool(value)

    @property
    def learning_rate(self) -> float:
        """The learning rate as of `num_update` updates, before multipliers."""
        return self._rate(self.num_update)

    def _rate(self, num_update: int) -> float:
        if self.lr_scheduler is None:
            return arguments.number("learning_rate", self.lr)
        return arguments.number("lr_scheduler(num_update)", self.lr_scheduler(num_update))

    def set_learning_rate(self, lr: float) -> None:
        """Set the learning rate. With a scheduler that is an error, as in MXNet: a `UserWarning`, raised."""
        if self.lr_scheduler is not None:
            raise UserWarning("set_learning_rate has no effect on an optimizer with an lr_scheduler")
        self.lr = arguments.number("lr", lr)

    def set_lr_mult(self, args_lr_mult: Mapping[Any, float]) -> None:
        """Set multipliers of the learning rate, by index or by name; all earlier ones are dropped."""
        self.lr_mult = _multipliers("args_lr_mult", args_lr_mult)

    def set_wd_mult(self, args_wd_mult: Mapping[Any, float]) -> None:
        """Set multipliers of the weight decay, by index or by name; all earlier ones are dropped."""
        self.wd_mult = _multipliers("args_wd_mult", args_wd_mult)

    def _multiplier(self, index: Index, kind: str) -> float:
        if index in self.param_dict:
            found = getattr(self.param_dict[index], kind)
            return arguments.number(f"param_dict[{index!r}].{kind}", found)
        multipliers: dict[Index, float] = getattr(self, kind)
        if index in multipliers:
            return multipliers[index]
        return multipliers.get(self.idx2name[index], 1.0) if index in self.idx2name else 1.0

    @property
    def _index_update_count(self) -> dict[Index, int]:
        """The number of updates of each parameter."""
        for group in self._ahead:
            self._counts.update(dict.fromkeys(group.positions, group.count))
        self._ahead = ()
        return self._counts

    @_index_update_count.setter
    def _index_update_count(self, counts: dict[Index, int]) -> None:
        self._counts, self._ahead = counts, ()

    def _get_lr(self, index: Index) -> float:
        """The learning rate of one parameter, as MXNet's subclasses ask for it in their own `step`."""
        return self.learning_rate * self._multiplier(index, "lr_mult")

    def _get_wd(self, index: Index) -> float:
        """The weight decay of one parameter."""
        return self.wd * self._multiplier(index, "wd_mult")

    def _rates_asked(self, index: Index, num_update: int) -> tuple[float, float]:
        """What a subclass's own `_get_lr` and `_get_wd` say of a parameter, as after that many updates."""
        before = self.num_update
        try:
            self.num_update = num_update
            lr, wd = self._get_lr(index), self._get_wd(index)
        finally:
            self.num_update = before
        return arguments.number("_get_lr(index)", lr), arguments.number("_get_wd(index)", wd)

    @classmethod
    def overridden(cls, names: Sequence[str]) -> list[str]:
        """Those of some methods that are a subclass's own."""
        return [name for name in names if getattr(cls, name) is not getattr(Optimizer, name)]

    def _update_count(self, index: Index | Sequence[Index]) -> None:
        """Count an update of one parameter or of several."""
        for i in index if isinstance(index, (list, tuple)) else [index]:
            count = self._index_update_count.get(i, self.begin_num_update) + 1
            self._index_update_count[i] = count
            self.num_update = max(self.num_update, count)

    # ---------------------------------------------------------------- states

    @property
    def _stored(self) -> str:
        """How states are stored, as a code in layouts; empty: as their weight."""
        if self.state_dtype is None:
            return ""
        code = device.STATE_DTYPES[self.state_dtype]
        return f"s{code}" if self.stochastic_rounding and code != "f4" else code

    def _numbers(self, indices: Sequence[Index]) -> tuple[int, ...]:
        """What tells parameters apart where states are rounded by chance; nothing where they are not."""
        if not self.stochastic_rounding:
            return ()
        plain = [int(i) if isinstance(i, (int, np.integer)) else repr(i) for i in indices]
        return tuple(map(rounding.tensor_number, plain))

    def create_state(self, index: Index, weight: Any) -> Any:
        """The states of one parameter, all zero: None, an array, or a tuple of arrays.

        Parameters
        ----------
        index : int
            The parameter's index.
        weight : array
            The parameter. States have its shape, or ``(rows, 1)`` where `per_row` is set, and its dtype, or
            `state_dtype` if that is given.
        """
        what = f"weight of {self._label(index)}"
        if self.rule is not None:
            self._rule()  # whose states they are
        if device.on_cuda(weight):
            array, zeros_like = cuda_arrays.look_at(weight, what), cuda_arrays.zeros_like
        else:
            array = weight = device.as_array(weight, what)
            zeros_like = device.zeros_like
        shape = array.shape
        if self.per_row:
            if len(shape) != 2:
                raise ValueError(f"{what} has shape {shape}; expected 2 dimensions")
            shape = (shape[0], 1)
        dtype = device.state_dtype(self._stored, array.dtype)
        zeros = tuple(zeros_like(weight, shape, dtype) for _ in self.state_names)
        state = zeros if len(zeros) > 1 else zeros[0] if zeros else None
        if self.sparse_update == "exact":
            self._history.pop(index, None)  # a new state owes no steps
            return state, zeros_like(weight, array.shape[:1] or (1,), np.dtype(np.int64))
        return state

    def create_state_multi_precision(self, index: Index, weight: Any) -> Any:
        """`create_state`, or ``(float32 weight, its states)`` for half precision with `multi_precision`."""
        what = f"weight of {self._label(index)}"
        dtype = self._dtype_of(weight, what)
        if device.is_half(dtype):
            if self.multi_precision:
                on_cuda = device.on_cuda(weight)
                master = cuda_arrays.as_single(weight, what) if on_cuda else device.as_single(weight, what)
                return master, self.create_state(index, master)
            what = "states" if self.state_dtype is None else "weights"
            warnings.warn(
                f"{what} in {dtype} can make training inaccurate or slow to converge; "
                "multi_precision=True keeps float32 copies",
                stacklevel=2,
            )
        return self.create_state(index, weight)

    @staticmethod
    def _dtype_of(weight: Any, what: str) -> np.dtype:
        """The dtype of a weight, wherever it is."""
        if device.on_cuda(weight):
            return cuda_arrays.look_at(weight, what).dtype
        return device.as_array(weight, what).dtype

    # ---------------------------------------------------------------- steps

    def hyper(self, lr: float, t: int) -> tuple[float, ...]:
        """The rule's hyper-parameters for the `t`-th update (from 1) at learning rate `lr`.

        Computed in double precision once a step, then cast to the weights' precision: constants such as
        ``1 - beta2`` belong here, not in the rule.
        """
        name = type(self).__name__
        if self.rule is not None:
            what = rules.name_of(self.rule, name)
            raise TypeError(f"{what} has no coefficients: define hyper(self, lr, t)")
        raise TypeError(f"{name} has no rule: define rule and hyper, or override step")

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
        """`fused_step` or `step`, as `use_fused_step` says. Arguments and errors as in `step`."""
        (self.fused_step if self.use_fused_step else self.step)(indices, weights, grads, states)

    def update_multi_precision(
        self, indices: Sequence[Index], weights: Sequence[Any], grads: Sequence[Any], states: Sequence[Any]
    ) -> None:
        """`update` with the states of `create_state_multi_precision`.

        The gradient of a half-precision weight with a float32 copy may be of either precision.
        """
        if not self.multi_precision:
            return self.update(indices, weights, grads, states)
        return self._step(indices, weights, grads, states, masters=True, fused=self.use_fused_step)

    def flush(self, indices: Sequence[Index], weights: Sequence[Any], states: Sequence[Any]) -> None:
        """Bring all rows up to date, before weights that had sparse gradients are looked at.

        Only with ``sparse_update="exact"`` is there anything to do.
        """
        self._check_lengths(indices, weights, weights, states)
        nothing = [None] * len(indices)
        request, stamps = self._request(indices, weights, nothing, states, self.multi_precision)
        if stamps:
            request = request._replace(apart=dict.fromkeys(range(len(indices)), ()))
            if any(map(device.on_cuda, weights)):
                self._prepare_on_cuda(request, stamps, indices).flush()
                return
            work = self._assemble(request, {}, stamps, indices)
            execution.flush(self._rule(), work, self.use_fused_step)

    def _step(
        self,
        indices: Sequence[Index],
        weights: Sequence[Any],
        grads: Sequence[Any],
        states: Sequence[Any],
        masters: bool,
        fused: bool,
    ) -> None:
        """Check everything, work out the numbers, make the step and count it."""
        self._check_lengths(indices, weights, grads, states)
        request, stamps = self._request(indices, weights, grads, states, masters)
        plan = self._plan(indices)  # a scheduler is the user's code: it runs before arrays are read
        if any(map(device.on_cuda, weights)):
            self._step_on_cuda(request, stamps, indices, plan)
            return
        if fused and not stamps and self._quick_step(request, indices, plan):
            return
        work = self._assemble(*self._take_sparse(request), stamps, indices)
        execution.carry_out(self._rule(), work, plan.hyper, plan.which, fused, self._counting(plan))

    def _quick_step(self, request: device.Request, indices: Sequence[Index], plan: Plan) -> bool:
        """The step if all arrays are plain; False, and nothing done, if any needs a closer look."""
        if not indices or not ndarray.readable():
            return False
        rule, size = self._rule(), (len(request.columns), len(indices), request.stored, request.numbers)
        try:  # whoever takes it has it alone: other threads may use this optimizer
            kept, prepared = self._prepared.pop()
        except IndexError:
            kept = None
        if kept != (rule, size):
            prepared = execution.Prepared(request)
        try:
            if not prepared.take(ndarray.objects(request.columns), request, rule):
                return False
            threads.run(prepared.jobs(plan.hyper, plan.which), self._counting(plan))
            return True
        finally:
            self._prepared.append(((rule, size), prepared))

    def _step_on_cuda(
        self, request: device.Request, stamps: dict[int, Any], indices: Sequence[Index], plan: Plan
    ) -> None:
        """The step of weights that are on GPUs."""
        prepared = self._prepare_on_cuda(request, stamps, indices)
        prepared.run(plan.hyper, plan.which, graphs=False, after=self._counting(plan))

    def _prepare_on_cuda(
        self, request: device.Request, stamps: dict[int, Any], indices: Sequence[Index]
    ) -> cuda_execution.Prepared:
        """A call's arrays, checked and ready."""
        key = (tuple(indices), self._rule())
        prepared = self._prepared_on_cuda.setdefault(key, cuda_execution.Prepared(self._rule()))
        prepared.take(self._with_histories(request, stamps, indices))
        return prepared

    def _with_histories(
        self, request: device.Request, stamps: dict[int, Any], indices: Sequence[Index]
    ) -> device.Request:
        """A request for weights on GPUs with the steps that their rows have yet to take."""
        histories = {}
        for t in stamps:
            what = request.label(t)
            view = cuda_arrays.look(request.columns[1][t], f"weight of {what}")
            kind = cuda_history.Kind(view.device, *self._recorded_as(view.shadow.dtype))
            histories[t] = cuda_history.on_device(self._history.get(indices[t]), kind, what)
        self._history.update({indices[t]: history for t, history in histories.items()})
        return request._replace(stamps=stamps, histories=histories)

    def _check(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        """What `update_multi_precision` would refuse, refused; nothing is changed."""
        self._check_lengths(indices, weights, grads, states)
        self._plan(indices)
        request, stamps = self._request(indices, weights, grads, states, self.multi_precision)
        if any(map(device.on_cuda, weights)):
            cuda_execution.bind(request._replace(stamps=stamps))
        else:
            self._assemble(*self._take_sparse(request), stamps, indices)

    def _counting(self, plan: Plan) -> list[partial[Any]]:
        """What counts a step."""
        return [
            partial(self._index_update_count.update, plan.counts),
            partial(setattr, self, "num_update", plan.num_update),
        ]

    def _assemble(
        self,
        request: device.Request,
        parts: dict[int, sparse.Parts],
        stamps: dict[int, Any],
        indices: Sequence[Index],
    ) -> execution.Work:
        """A request's arrays, checked, with the histories of those that have stamps."""
        bound = device.bind(request._replace(stamps=stamps))
        histories = {t: self._history_of(indices[t], bound.arrays[1][t].dtype) for t in stamps}
        for t, history in histories.items():
            touched = stamps[t][parts[t].rows] if t in parts else stamps[t]
            if touched.size and not 0 <= touched.min() <= touched.max() <= history.recorded:
                raise ValueError(
                    f"stamps of {request.label(t)} go from {touched.min()} to {touched.max()}; "
                    f"expected 0 to {history.recorded}, the steps recorded"
                )
        return execution.Work(bound, parts, stamps, histories)

    def _history_of(self, index: Index, dtype: np.dtype) -> execution.History:
        """The steps that some rows of a parameter have yet to take."""
        found = self._history.get(index)
        if isinstance(found, cuda_history.History):  # the arrays have come from a GPU
            found = self._history[index] = execution.History.of(found.rows())
        length, real = self._recorded_as(dtype)
        if found is None or not found.recorded:
            found = self._history[index] = execution.History(length, real)
        if found.length != length:
            raise ValueError(
                f"{self._label(index)} has recorded steps of {found.length} hyper-parameters; "
                f"expected {length}: flush it before its rule changes"
            )
        return found

    def _recorded_as(self, dtype: np.dtype) -> tuple[int, np.dtype]:
        """The length and the dtype of a recorded row of hyper-parameters, for weights of a dtype."""
        real = np.dtype(np.float64 if dtype == np.float64 else np.float32)
        return 3 + self._rule().n_hyper + 2 * self.stochastic_rounding, real

    def _take_sparse(self, request: device.Request) -> tuple[device.Request, dict[int, sparse.Parts]]:
        """A request without its sparse gradients, and those."""
        parts: dict[int, sparse.Parts] = {}
        if set(map(type, request.columns[0])) <= {np.ndarray}:  # most calls have nothing else
            return request, parts
        grads = list(request.columns[0])
        for t, grad in enumerate(grads):
            if sparse.is_sparse(grad):
                what = f"gradient of {request.label(t)}"
                weight = device.as_array(request.columns[1][t], f"weight of {request.label(t)}")
                parts[t] = sparse.parts_of(grad, weight, what)
                grads[t] = None
                if self.sparse_update == "dense":
                    touched, values = parts.pop(t).summed(weight)
                    dense = np.zeros((weight.shape[0], values.shape[1]), weight.dtype)
                    dense[touched] = values
                    grads[t] = dense.reshape(weight.shape)
        apart = {t: part.arrays() for t, part in parts.items()}
        return request._replace(columns=[grads, *request.columns[1:]], apart=apart), parts

    def _request(
        self,
        indices: Sequence[Index],
        weights: Sequence[Any],
        grads: Sequence[Any],
        states: Sequence[Any],
        masters: bool,
    ) -> tuple[device.Request, dict[int, Any]]:
        """The arrays of a call in the order that kernels take them, and the rows' stamps by position."""
        self._rule()  # is in order, or states could not be told from what they should be
        copies: list[list[Any]] = []
        stamps: dict[int, Any] = {}
        if masters:
            weights, states, copy = self._masters(indices, weights, states)
            copies.append(copy)
        if self.sparse_update == "exact":
            for index, state in zip(indices, states, strict=True):
                if not (isinstance(state, (tuple, list)) and len(state) == 2):
                    given = type(state).__name__
                    raise TypeError(f"state of {self._label(index)} is {given}; expected (state, stamps)")
            stamps = {t: state[1] for t, state in enumerate(states)}
            states = [state[0] for state in states]
        columns = [*map(tuple, (grads, weights, *self._state_columns(indices, states), *copies))]  # now ours

        def label(t: int) -> str:
            return self._label(indices[t])

        request = device.Request(columns, self.state_names, self.per_row, label, stored=self._stored)
        return request._replace(numbers=self._numbers(indices), sparse=self.sparse_update), stamps

    def _masters(
        self, indices: Sequence[Index], weights: Sequence[Any], states: Sequence[Any]
    ) -> tuple[list[Any], list[Any], list[Any]]:
        """What to update instead of half-precision weights, its states, and the weights as copies."""
        work: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
        for index, weight, state in zip(indices, weights, states, strict=True):
            label = self._label(index)
            copy = None
            if device.is_half(self._dtype_of(weight, f"weight of {label}")):
                if not (isinstance(state, (tuple, list)) and len(state) == 2):
                    raise TypeError(
                        f"state of {label} is {type(state).__name__}; expected (float32 weight, state)"
                    )
                copy, (weight, state) = weight, state
            for column, value in zip(work, (weight, state, copy), strict=True):
                column.append(value)
        return work

    def _check_lengths(self, indices: Any, *lists: Any) -> None:
        for name, values in zip(("indices", "weights", "grads", "states"), (indices, *lists), strict=True):
            if not isinstance(values, (list, tuple)):
                raise TypeError(f"{name} must be a list, got {type(values).__name__}")
            if len(values) != len(indices):
                raise ValueError(f"{name} has length {len(values)}; expected {len(indices)}, as indices")
        try:
            different = len(set(indices))
        except TypeError as error:
            raise TypeError(f"indices must be hashable, got {indices!r}") from error
        if different != len(indices):
            twice = next(index for index in indices if indices.count(index) > 1)
            raise ValueError(f"indices must be all different, got {twice!r} more than once")

    def _state_columns(self, indices: Sequence[Index], states: Sequence[Any]) -> tuple[Sequence[Any], ...]:
        """The parameters' states as one column for each of the optimizer's states."""
        n = len(self.state_names)
        if n == 1:
            return (states,)
        for index, state in zip(indices, states, strict=True):
            if n == 0 and state is not None:
                raise TypeError(f"state of {self._label(index)} is {type(state).__name__}; expected None")
            if n > 1 and not (isinstance(state, (tuple, list)) and len(state) == n):
                raise TypeError(
                    f"state of {self._label(index)} is {type(state).__name__}; "
                    f"expected a tuple of {n} arrays: {', '.join(self.state_names)}"
                )
        return tuple(zip(*states, strict=True)) if n and states else ((),) * n

    def _plan(self, indices: Sequence[Index]) -> Plan:
        """The counts and hyper-parameters of the next update of some parameters; changes nothing."""
        known = self._index_update_count
        asked = self.overridden(RATES)
        alike = not (self.param_dict or self.lr_mult or self.wd_mult or asked)
        if alike and len(before := set(map(known.get, indices))) == 1:  # the usual case, and quick
            t = (before.pop() or self.begin_num_update) + 1
            num_update = max(self.num_update, t)
            hyper = np.array([self._hyper_row(self.rescale_grad, self._rate(num_update), self.wd, t)])
            return Plan(dict.fromkeys(indices, t), num_update, hyper, [0] * len(indices))
        counts: dict[Index, int] = {}
        num_update = self.num_update
        lr = None
        rows: dict[tuple[float, float, int], int] = {}  # different ones are few
        which = []
        for index in indices:
            t = counts[index] = known.get(index, self.begin_num_update) + 1
            if lr is None or t > num_update:  # as in MXNet, a parameter's count includes those before it
                num_update = max(num_update, t)
                lr = self._rate(num_update)
            rates = (
                self._rates_asked(index, num_update)
                if asked
                else (lr * self._multiplier(index, "lr_mult"), self.wd * self._multiplier(index, "wd_mult"))
            )
            which.append(rows.setdefault((*rates, t), len(rows)))
        hyper = np.array([self._hyper_row(self.rescale_grad, lr, wd, t) for lr, wd, t in rows], np.float64)
        return Plan(counts, num_update, hyper, which)

    def _hyper_row(self, rescale: float, lr: float, wd: float, t: int) -> tuple[float, ...]:
        """What a kernel gets for a parameter's `t`-th update."""
        clip = math.inf if self.clip_gradient is None else self.clip_gradient
        own = self.hyper(lr, t)
        self._rule()
        assert self._checked is not None
        row = (rescale, clip, wd, *self._checked.coefficients(own))
        if self.stochastic_rounding:
            row += rounding.step_numbers(self.seed, t)
        if not math.isfinite(rescale) or any(map(math.isnan, row)):
            given = {"rescale_grad": rescale, "wd": wd, "clip_gradient": clip} | vars(self)
            bad = [f"{k}={v!r}" for k, v in given.items() if isinstance(v, float) and not math.isfinite(v)]
            raise ValueError(f"hyper-parameters must be finite, got {', '.join(bad) or row}")
        return row

    def _rule(self) -> Rule:
        """The rule, checked as it is now."""
        checked = self._checked
        if checked is None or not checked.holds(self):
            if self.rule is None:
                Optimizer.hyper(self, 0.0, 1)  # raises, in words
            checked = self._checked = rules.Checked(self)
        return checked.rule

    def _label(self, index: Index) -> str:
        name = self.idx2name.get(index)
        return f"parameter {index!r}" if name is None else f"parameter {index!r} ({name!r})"

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
        gone = ("param_dict", "_prepared", "_prepared_on_cuda", "_owner", "_ahead", "_checked")
        counts = dict(self._index_update_count)
        return {k: v for k, v in vars(self).items() if k not in gone} | {"_counts": counts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, param_dict={}, _prepared=[], _prepared_on_cuda={}, _owner=_nobody, _ahead=())


def _nobody() -> None:
    """The Trainer that an optimizer belongs to, if it belongs to none."""


def _multipliers(name: str, given: Mapping[Any, float]) -> dict[Index, float]:
    if not isinstance(given, Mapping):
        raise TypeError(f"{name} must be a dict of index or name to number, got {given!r}")
    return {key: arguments.number(f"{name}[{key!r}]", value) for key, value in given.items()}


register = Optimizer.register
create = Optimizer.create_optimizer
