"""`Trainer`: parameters bound once, stepped many times.

What a step costs beyond the update itself is one look at each gradient's array object; tables, kernels and
hyper-parameters' rows are made once and kept for as long as they hold.
"""

from __future__ import annotations

import fnmatch
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from . import arguments, device
from .binding import Binding, CudaBinding
from .compiler import interrupts
from .core.turn import Claim, Turn
from .cpu import ndarray, sparse, threads
from .cuda import arrays as cuda_arrays
from .cuda import execution as cuda_execution
from .cuda.sums import CudaSums
from .io import checkpoint
from .optimizer import RATES, Optimizer, create

__all__ = ["Trainer"]

Params = Mapping[str, Any] | Sequence[Any]


class Trainer:
    """Updates a fixed set of parameters, in place, as fast as an optimizer can.

    Parameters
    ----------
    params : dict of str to array, or list of array
        The parameters. In a list they are named ``"0"``, ``"1"`` and so on.
    optimizer : Optimizer or str
        An optimizer, or the name of one. It belongs to this trainer from then on.
    clip_global_norm : float, optional
        Gradients are scaled down together when their norm exceeds this: the root of the sum of all their
        squares, after `rescale_grad` and `batch_size`, before everything else.
    skip_nonfinite : bool, default False
        A step whose gradients hold a NaN or an infinity changes nothing and is counted in `skipped_steps`. On
        a GPU it counts as an update too, as below.
    lr_mult, wd_mult : dict of str to float, optional
        Multipliers of learning rate and weight decay by name or pattern, such as ``{"*.bias": 0}``; the last
        one that fits counts. They come before those that the optimizer has by name.
    freeze : str or list of str, optional
        Names or patterns of parameters that stay as they are.
    **optimizer_kwargs
        Arguments for the optimizer, if it is given by name.

    Attributes
    ----------
    optimizer : Optimizer
    params : mapping of str to array
    states : mapping of str to state
        What `Optimizer.create_state_multi_precision` made. To change parameters or states, write into their
        arrays; which arrays they are is settled when the trainer is made.
    grad_norm : float or None
        The norm of the last step's gradients, before clipping; None if neither `clip_global_norm` nor
        `skip_nonfinite` asks for it.
    skipped_steps : int

    Raises
    ------
    TypeError, ValueError
        Something is not an array, cannot be written, shares memory with another parameter, or a pattern
        fits no parameter; the optimizer belongs to another trainer, or its class has a `step` or a `_get_lr`
        of its own, which a trainer does not call.
    RuntimeError
        A method is called while another call of the trainer is under way in the same thread, as by a signal's
        handler or a scheduler; nothing has been changed by it. Other threads wait for their turn.

    Notes
    -----
    A step is made wholly or not at all, whatever comes: an error, an interrupt, a handler that raises.
    `copy.deepcopy` and `pickle` give a trainer of its own that goes on exactly.

    All parameters of a step have the learning rate of the largest count of updates among them; MXNet, and
    `Optimizer.update` with it, has those before it in the list a step behind if counts differ.

    On a GPU, whether gradients are finite is known there and not to the host, which would have to wait for it
    at each step. So a step that `skip_nonfinite` leaves out has been counted by then: schedules of learning
    rates, the bias corrections of Adamax and FTML, and the chance of `stochastic_rounding` go on as after any
    other step, while on the CPU they stay where they were. States and parameters stay as they are on both,
    and ``optimizer.num_update - trainer.skipped_steps`` is how many steps have changed them.

    Examples
    --------
    >>> import numpy as np, numba_opt
    >>> params = {"weight": np.ones((2, 2)), "bias": np.zeros(2)}
    >>> trainer = numba_opt.Trainer(params, "nag", learning_rate=0.5, momentum=0)
    >>> trainer.step({"weight": np.ones((2, 2)), "bias": np.ones(2)}, batch_size=2)
    >>> params["bias"]
    array([-0.25, -0.25])
    >>> trainer
    Trainer of 2 parameters: 6 elements, 0 B of state, on the CPU
      NAG(learning_rate=0.5, momentum=0.0)
    """

    def __init__(
        self,
        params: Params,
        optimizer: Optimizer | str,
        *,
        clip_global_norm: float | None = None,
        skip_nonfinite: bool = False,
        lr_mult: Mapping[str, float] | None = None,
        wd_mult: Mapping[str, float] | None = None,
        freeze: str | Iterable[str] = (),
        **optimizer_kwargs: Any,
    ) -> None:
        self._params = _named(params)
        self._names = list(self._params)
        on_cuda = set(map(device.on_cuda, self._params.values()))
        self._on_cuda = True in on_cuda
        if len(on_cuda) > 1:
            raise ValueError("params are on the CPU and on GPUs; expected all of them on either")
        self._by_name = isinstance(params, Mapping)
        if isinstance(optimizer, str):
            optimizer = create(optimizer, **optimizer_kwargs)
        elif optimizer_kwargs:
            raise TypeError(
                f"arguments {sorted(optimizer_kwargs)} need an optimizer's name, got {optimizer!r}"
            )
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be an Optimizer or a name, got {optimizer!r}")
        if optimizer.rule is None:
            raise TypeError(f"optimizer must have a rule, got {optimizer!r}")
        if own := optimizer.overridden(UNASKED):
            raise TypeError(
                f"{type(optimizer).__name__} has a {own[0]} of its own, which Trainer does not call; "
                "expected a rule and hyper only, or use an Updater"
            )
        if optimizer._owner() is not None:
            raise ValueError(
                "optimizer belongs to another Trainer, whose updates it counts; "
                "expected one for each Trainer, such as copy.deepcopy(optimizer)"
            )
        self._turn = Turn()
        self._optimizer = optimizer
        optimizer.idx2name = dict(enumerate(self._names))
        optimizer.set_lr_mult({**optimizer.lr_mult, **self._matched("lr_mult", lr_mult or {})})
        optimizer.set_wd_mult({**optimizer.wd_mult, **self._matched("wd_mult", wd_mult or {})})
        self.clip_global_norm = arguments.optional("clip_global_norm", clip_global_norm)
        self.skip_nonfinite = bool(skip_nonfinite)
        self._grad_norm: Callable[[], float] | float | None = None
        self._skipped_steps = 0
        self._frozen: set[str] = set()
        self._states = {
            name: optimizer.create_state_multi_precision(i, array)
            for i, (name, array) in enumerate(self._params.items())
        }
        self._sums: list[Any] | None = None  # of accumulated gradients; None where there was none
        self._cuda_sums: CudaSums | None = None  # their memory, if it is on GPUs
        self._bindings: dict[bytes, Binding] = {}
        self._captured: CudaBinding | None = None  # the last one of which a graph was captured
        self._counted: tuple[Any, ...] = ()  # by which binding the last step was counted, and as of what
        everything = list(range(len(self._names)))
        if self._on_cuda:
            cuda_execution.check(self._request(everything, [None] * len(everything))[0])
        else:
            device.bind(self._request(everything, [_like(w) for w in self._weights(everything)])[0])
        self.freeze(freeze)
        optimizer._owner = weakref.ref(self)

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer, which counts this trainer's updates."""
        return self._optimizer

    @property
    def params(self) -> Mapping[str, Any]:
        """The parameters by name."""
        return MappingProxyType(self._params)

    @property
    def states(self) -> Mapping[str, Any]:
        """The parameters' states by name."""
        return MappingProxyType(self._states)

    # ---------------------------------------------------------------- steps

    def step(self, grads: Params | None = None, batch_size: float = 1) -> None:
        """Update the parameters by their gradients.

        Parameters
        ----------
        grads : dict or list, like the parameters
            Arrays of the parameters' shapes and dtypes. A parameter whose gradient is None, or missing from
            a dict, stays as it is, with its state and count. May be left out after `accumulate`.
        batch_size : float, default 1
            Gradients are divided by it.

        Raises
        ------
        TypeError, ValueError
            A gradient does not fit; nothing has been changed.
        """
        claim = self._turn.claim("the trainer")
        try:
            self._step(grads, batch_size)
        finally:
            del claim

    def _step(self, grads: Params | None, batch_size: float) -> None:
        batch = self._batch(batch_size)
        if grads is None and self._sums is None:
            raise ValueError("grads must be given, as nothing has been accumulated")
        found = self._unfrozen(self._in_order(grads)) if grads is not None else self._sums or []
        add = None
        if grads is not None and self._sums is not None:
            if self._on_cuda:  # nothing is added before all is known to be well
                found, add = self._plus_on_cuda(self._sums, found)
            else:
                found, adding = self._plus([sparse.copied(total) for total in self._sums], found)
                _run(adding)
        binding = self._binding(self._unfrozen(found))
        if binding is None:
            self._grad_norm = 0.0 if self._wants_norm else None
        elif not binding.step(self, self.optimizer.rescale_grad / batch, add):
            self._skipped_steps += 1
        self._sums = None

    def advance(self, batch_size: float = 1) -> None:
        """Count a step that a captured CUDA graph is about to make, and set its hyper-parameters.

        Nothing that changes from step to step is in the graph: kernels read it from the device's memory, and
        this writes it there, on the current stream, if it has changed. With ``sparse_update="exact"`` it also
        lets all rows catch up when there is no more room to record steps. So call it before each replay, on
        the same stream. The step that is captured is not made and not counted; the arrays must be those of
        an earlier step, and this trainer must live as long as the graph. A norm over several devices cannot
        be captured, as one device's graph cannot wait for another's.

        Parameters
        ----------
        batch_size : float, default 1
            Gradients are divided by it.

        Raises
        ------
        ValueError
            No step has been captured, or what it used has been replaced since, as by a checkpoint.

        Examples
        --------
        With PyTorch, gradients being in the same tensors at each step::

            trainer.step(grads)                  # compiles, and makes tables
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                trainer.step(grads)
            for lr in (0.1, 0.05):
                trainer.set_learning_rate(lr)
                trainer.advance()
                graph.replay()
        """
        claim = self._turn.claim("the trainer")
        try:
            if self._captured is None:
                raise ValueError("advance needs a step that has been captured in a CUDA graph")
            self._captured.advance(self, self.optimizer.rescale_grad / self._batch(batch_size))
        finally:
            del claim

    @property
    def grad_norm(self) -> float | None:
        """The norm of the last step's gradients, before clipping. On a GPU, asking waits for it."""
        return self._grad_norm() if callable(self._grad_norm) else self._grad_norm

    @property
    def skipped_steps(self) -> int:
        """How many steps were left out. On a GPU, asking waits for the last one."""
        return self._skipped_steps + sum(binding.skipped() for binding in self._cuda_bindings())

    @skipped_steps.setter
    def skipped_steps(self, value: int) -> None:
        self._skipped_steps += value - self.skipped_steps

    @property
    def stray_rows(self) -> bool:
        """Whether a sparse gradient on a GPU had rows that its parameter has not, which were left out.

        Asking waits for the last step. On the CPU such a gradient is an error.
        """
        added = self._cuda_sums is not None and self._cuda_sums.strayed()
        return added or any(binding.strayed() for binding in self._cuda_bindings())

    def _cuda_bindings(self) -> list[CudaBinding]:
        return [b for b in self._bindings.values() if isinstance(b, CudaBinding)]

    @staticmethod
    def _batch(batch_size: float) -> float:
        batch = 1.0 if batch_size == 1 else arguments.number("batch_size", batch_size)
        if not batch:
            raise ValueError(f"batch_size must be greater than 0, got {batch_size!r}")
        return batch

    @property
    def _wants_norm(self) -> bool:
        return self.clip_global_norm is not None or self.skip_nonfinite

    def flush(self) -> None:
        """Bring all rows up to date, before parameters that had sparse gradients are looked at.

        Only an optimizer with ``sparse_update="exact"`` leaves rows behind. `save` and `state_dict` do this
        by themselves.
        """
        claim = self._turn.claim("the trainer")
        try:
            self._flush()
        finally:
            del claim

    def _flush(self) -> None:
        positions = list(range(len(self._names)))
        self._optimizer.flush(positions, list(self._params.values()), list(self._states.values()))

    def accumulate(self, grads: Params) -> None:
        """Add gradients, in place, to those of earlier calls; the next `step` takes the sum.

        Half-precision gradients of float32 weights, or of weights with a float32 copy, add up in float32.
        Sparse gradients stay so until a dense one is added. On a GPU the sums are there too, in memory that
        is kept for the next ones, and nobody waits for them but where that grows; the step must be on the
        same stream. They are added in the CPU's order, and equal its sums to the bit, but for float64 values
        that are added up in float16 or bfloat16.

        In a CUDA graph together with the step that takes them, calls of this are made again with each replay.
        Make the same calls with the same arrays before the capture. In a graph of its own a call adds to the
        sum, or begins it, as it would have when it was captured: capture and replay graphs in one order.

        Raises
        ------
        TypeError, ValueError
            A gradient does not fit; nothing has been added.
        """
        claim = self._turn.claim("the trainer")
        try:
            found = self._unfrozen(self._in_order(grads))
            sums = list(self._sums or [None] * len(found))
            if self._on_cuda:
                sums, add = self._plus_on_cuda(sums, found)
                with interrupts.deferred():
                    add()
                    self._sums = sums
            else:
                sums, adding = self._plus(sums, found)
                _run([*adding, partial(setattr, self, "_sums", sums)])
        finally:
            del claim

    def _plus_on_cuda(self, sums: list[Any], grads: list[Any]) -> tuple[list[Any], Callable[[], None]]:
        """The same on GPUs: the sums as they will be, all being checked, and what adds the gradients."""
        present = [t for t, grad in enumerate(grads) if grad is not None]
        weights = dict(zip(present, self._weights(present), strict=True))
        self._cuda_sums = self._cuda_sums or CudaSums(self._names)
        return self._cuda_sums.take(sums, {t: grads[t] for t in present}, weights)

    def _plus(self, sums: list[Any], grads: list[Any]) -> tuple[list[Any], list[partial[Any]]]:
        """Sums of gradients, all being checked, and what adds one more to those of them that are arrays."""
        present = [t for t, grad in enumerate(grads) if grad is not None]
        weights = dict(zip(present, self._weights(present), strict=True))
        for t in present:
            if sparse.is_sparse(grads[t]):
                what = f"gradient of parameter {self._names[t]!r}"
                sums[t] = sparse.joined(sums[t], grads[t], weights[t], what)
        dense = [t for t in present if not sparse.is_sparse(grads[t])]
        for t in dense:
            sums[t] = _like(weights[t]) if sums[t] is None else sparse.as_dense(sums[t])

        def label(k: int) -> str:
            return f"parameter {self._names[dense[k]]!r}"

        columns = [[grads[t] for t in dense], [sums[t] for t in dense]]
        if dense:
            device.bind(device.Request(columns, (), False, label))
        return sums, [partial(np.add, sums[t], device.as_array(grads[t], "gradient"), sums[t]) for t in dense]

    def _in_order(self, grads: Params) -> list[Any]:
        """Gradients as a list beside the parameters, None where there is none or it is not wanted."""
        if self._by_name:
            if not isinstance(grads, Mapping):
                raise TypeError(f"grads must be a dict, as the parameters are, got {type(grads).__name__}")
            try:
                found = [grads[name] for name in self._names]
                complete = len(grads) == len(found)
            except KeyError:
                found = [grads.get(name) for name in self._names]
                complete = False
            unknown = set() if complete else grads.keys() - self._params.keys()
            if unknown:
                raise ValueError(f"grads has {min(unknown, key=repr)!r}, which is not a parameter")
        else:
            if not isinstance(grads, (list, tuple)):
                raise TypeError(f"grads must be a list, as the parameters are, got {type(grads).__name__}")
            found = list(grads)
            if len(found) != len(self._names):
                raise ValueError(f"grads has length {len(found)}; expected {len(self._names)}, as params")
        return found

    def _unfrozen(self, grads: list[Any]) -> list[Any]:
        """Gradients without those of frozen parameters."""
        if not self._frozen:
            return grads
        return [None if name in self._frozen else g for name, g in zip(self._names, grads, strict=True)]

    def _binding(self, grads: list[Any]) -> Binding | None:
        """The parameters that have a gradient, with their gradients."""
        ids = np.fromiter(map(id, grads), np.uint64, len(grads))
        present = ids != ndarray.NONE
        binding = self._bindings.get(present.tobytes())
        if binding is None:
            positions = np.flatnonzero(present).tolist()
            if not positions:
                return None
            if len(self._bindings) >= 8:  # gradients that come and go at random: keep the newest few
                oldest = self._bindings.pop(next(iter(self._bindings)))
                self._skipped_steps += oldest.skipped() if isinstance(oldest, CudaBinding) else 0
            kind = CudaBinding if self._on_cuda else Binding
            binding = self._bindings[present.tobytes()] = kind(self, positions)
        if len(binding.positions) < len(grads):
            ids, grads = ids[present], [grads[t] for t in binding.positions]
        binding.ids[0] = ids
        binding.grads = grads
        return binding

    def _weights(self, positions: Sequence[int]) -> list[Any]:
        """What the kernels update: the weights, or the float32 copies of half-precision ones."""
        return list(self._request(positions, positions)[0].columns[1])

    def _request(
        self, positions: Sequence[int], grads: Sequence[Any]
    ) -> tuple[device.Request, dict[int, Any]]:
        names = [self._names[t] for t in positions]
        weights = [self._params[name] for name in names]
        states = [self._states[name] for name in names]
        masters = self._optimizer.multi_precision
        return self._optimizer._request(positions, weights, grads, states, masters)

    # ---------------------------------------------------------------- learning rates and names

    @property
    def learning_rate(self) -> float:
        """The optimizer's learning rate, before multipliers."""
        return self.optimizer.learning_rate

    def set_learning_rate(self, lr: float) -> None:
        """Set the optimizer's learning rate, from the next step on."""
        self.optimizer.set_learning_rate(lr)

    def set_lr_mult(self, lr_mult: Mapping[str, float]) -> None:
        """Set multipliers of the learning rate by name or pattern; all earlier ones are dropped."""
        self.optimizer.set_lr_mult(self._matched("lr_mult", lr_mult))

    def set_wd_mult(self, wd_mult: Mapping[str, float]) -> None:
        """Set multipliers of the weight decay by name or pattern; all earlier ones are dropped."""
        self.optimizer.set_wd_mult(self._matched("wd_mult", wd_mult))

    def freeze(self, patterns: str | Iterable[str]) -> None:
        """Let parameters stay as they are, by name or pattern; their gradients are not looked at."""
        self._frozen |= set(self._fitting("freeze", patterns))

    def unfreeze(self, patterns: str | Iterable[str] = "*") -> None:
        """Let parameters move again, by name or pattern."""
        self._frozen -= set(self._fitting("unfreeze", patterns))

    def _matched(self, what: str, given: Mapping[str, float]) -> dict[str, float]:
        if not isinstance(given, Mapping):
            raise TypeError(f"{what} must be a dict of name or pattern to number, got {given!r}")
        return {name: value for pattern, value in given.items() for name in self._fitting(what, str(pattern))}

    def _fitting(self, what: str, patterns: str | Iterable[str]) -> list[str]:
        """The parameters' names that some patterns fit, each of which must fit one."""
        found = []
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            names = [pattern] if pattern in self._params else fnmatch.filter(self._names, pattern)
            if not names and pattern != "*":
                raise ValueError(f"{what}: no parameter is called {pattern!r}; there are {_few(self._names)}")
            found += names
        return found

    # ---------------------------------------------------------------- checkpoints

    def state_dict(self, params: bool = True) -> dict[str, Any]:
        """Everything that goes on changing, as plain values and copies of arrays.

        Parameters
        ----------
        params : bool, default True
            Whether the parameters are to be in it too.

        Returns
        -------
        dict
            ``optimizer``: its name, hyper-parameters, counts and scheduler; ``parameters``: by name, the
            ``state``, the number of updates ``count``, and the ``weight``; ``accumulated``: gradients that
            wait for a step, by name; ``skipped_steps``.
        """
        claim = self._claim_to_read()
        try:
            return checkpoint.copied(self._state(params))
        finally:
            del claim

    def _claim_to_read(self) -> Claim:
        """The turn, which a signal's handler may have as well, between a step's check and its first write.

        Steps are whole then. Bringing rows up to date, though, would change what the step has looked at.
        """
        late = any(history.recorded for history in list(self._optimizer._history.values()))
        return self._turn.claim("the trainer", again=not late)

    def _state(self, params: bool) -> dict[str, Any]:
        self._flush()
        counts = self.optimizer._index_update_count
        parameters = {
            name: {"state": self._states[name], "count": counts.get(i, self.optimizer.begin_num_update)}
            | ({"weight": self._params[name]} if params else {})
            for i, name in enumerate(self._names)
        }
        sums = zip(self._names, self._sums or (), strict=False)
        return {
            "optimizer": checkpoint.describe(self.optimizer),
            "parameters": parameters,
            "accumulated": {name: sparse.as_plain(total) for name, total in sums if total is not None},
            "skipped_steps": self.skipped_steps,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave: the arrays' contents are copied into this trainer's arrays.

        Raises
        ------
        CheckpointError
            It is of another optimizer, or of parameters with other names, shapes or dtypes; nothing has been
            changed.
        """
        claim = self._turn.claim("the trainer")
        try:
            calls = self._taking_over(state_dict)
            with interrupts.deferred() if self._on_cuda else nullcontext():
                threads.run([], calls)
        finally:
            del claim

    def _taking_over(self, state_dict: Mapping[str, Any]) -> checkpoint.Calls:
        """What takes over a state dict that fits: whole or not at all, as none of it is written in Python."""
        saved = checkpoint.saved(state_dict, self._names)
        restoration = checkpoint.restoration(self.optimizer, saved.optimizer)
        checkpoint.check_forms(self.optimizer, restoration.optimizer, self._params.values())
        pairs = []
        for name, entry in saved.parameters.items():
            what = f"state of parameter {name!r}"
            pairs += checkpoint.pairs(self._states[name], entry["state"], what)
            if restoration.optimizer.sparse_update == "exact":
                checkpoint.check_flushed(entry["state"], what)
            if "weight" in entry:
                pairs += checkpoint.pairs(
                    self._params[name], entry["weight"], f"weight of parameter {name!r}"
                )
        sums: list[Any] = [None] * len(self._names)
        weights = self._weights(range(len(self._names)))
        for name, total in saved.accumulated.items():
            t, what = self._names.index(name), f"accumulated gradient of parameter {name!r}"
            if not isinstance(total, Mapping):
                if self._on_cuda:
                    self._cuda_sums = self._cuda_sums or CudaSums(self._names)
                    sums[t] = self._cuda_sums.memory(t, weights[t])
                else:
                    sums[t] = _like(weights[t])
                pairs += checkpoint.pairs(sums[t], total, what)
            else:
                with checkpoint.refusing(what):
                    rows = sparse.RowSparse(**total)
                    if self._on_cuda:
                        self._cuda_sums = self._cuda_sums or CudaSums(self._names)
                        sums[t] = self._cuda_sums.restored(weights[t], rows, what)
                    else:
                        sums[t] = sparse.joined(None, rows, weights[t], what)
        own = {
            "_skipped_steps": self._skipped_steps + saved.skipped_steps - self.skipped_steps,
            "_sums": sums if any(total is not None for total in sums) else None,
            "_counted": (),
        }
        return [
            *restoration.calls,
            *checkpoint.assignments(pairs),
            partial(setattr, self.optimizer, "_counts", saved.counts),
            partial(self.optimizer._history.clear),
            partial(vars(self).update, own),
        ]

    def save(self, path: str | Path, params: bool = True) -> None:
        """Write `state_dict` to a safetensors file, which appears whole or not at all."""
        arrays: checkpoint.Arrays = {}
        claim = self._claim_to_read()
        try:
            values = checkpoint.take_apart(self._state(params), arrays)
            checkpoint.write(path, arrays, {"trainer": values})
        finally:
            del claim

    def load(self, path: str | Path) -> None:
        """Take over what `save` wrote. Errors as in `load_state_dict`, and for a damaged file."""
        arrays, values = checkpoint.read(path)
        if "trainer" not in values:
            raise checkpoint.CheckpointError(f"{path} is a checkpoint of numba_opt, but not of a Trainer")
        self.load_state_dict(checkpoint.put_together(values["trainer"], arrays))

    # ---------------------------------------------------------------- copies

    def __getstate__(self) -> dict[str, Any]:
        """Everything but tables, which hold addresses of this one's arrays."""
        claim = self._claim_to_read()
        try:
            if self._on_cuda and self._sums is not None:
                raise TypeError("a trainer on a GPU can be copied once a step has taken what was accumulated")
            made: dict[str, Any] = {"_bindings": {}, "_captured": None, "_counted": (), "_cuda_sums": None}
            told = {"_grad_norm": self.grad_norm, "_skipped_steps": self.skipped_steps}
            objects = {"param_dict": self._optimizer.param_dict}  # which optimizers alone leave behind
            return vars(self) | made | told | objects
        finally:
            del claim

    def __setstate__(self, state: dict[str, Any]) -> None:
        param_dict = state.pop("param_dict")
        vars(self).update(state)
        self._optimizer.param_dict = param_dict
        self._optimizer._owner = weakref.ref(self)

    def __copy__(self) -> Trainer:
        raise TypeError("a trainer's copy would count updates of the same arrays; use copy.deepcopy")

    # ---------------------------------------------------------------- for people

    def __repr__(self) -> str:
        look = cuda_arrays.look_at if self._on_cuda else device.as_array
        elements = sum(look(w, "weight").size for w in self._params.values())
        states = [array for state in self._states.values() for array in checkpoint.leaves(state)]
        held = sum(look(array, "state").nbytes for array in states)
        frozen = f" ({len(self._frozen)} frozen)" if self._frozen else ""
        return (
            f"Trainer of {len(self._names):,} parameters{frozen}: {elements:,} elements, "
            f"{_amount(held)} of state, on {'CUDA' if self._on_cuda else 'the CPU'}\n  {self.optimizer!r}"
        )


# What a trainer does by itself, for all parameters at once.
UNASKED = ("step", "fused_step", "update", "update_multi_precision", *RATES)


def _run(calls: Sequence[partial[Any]]) -> None:
    """Make calls on arrays, in which no floating-point number is an error, all of them or none."""
    with np.errstate(all="ignore"):
        threads.run([], calls)


def _named(params: Params) -> dict[str, Any]:
    """Parameters by name."""
    if isinstance(params, Mapping):
        for name in params:
            if not isinstance(name, str):
                raise TypeError(f"params must have names that are str, got {name!r}")
        named = dict(params)
    elif isinstance(params, (list, tuple)):
        named = {str(i): array for i, array in enumerate(params)}
    else:
        raise TypeError(f"params must be a dict or a list of arrays, got {type(params).__name__}")
    if not named:
        raise ValueError("params must hold at least one array, got none")
    return named


def _like(weight: Any) -> np.ndarray:
    """Zeros of a weight's shape and dtype."""
    array = device.as_array(weight, "weight")
    return np.zeros(array.shape, array.dtype)


def _few(names: Sequence[str]) -> str:
    """Some names, for a message."""
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _amount(size: float) -> str:
    """A number of bytes, for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"
