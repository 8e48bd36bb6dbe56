"""The state of a trainer, and how that is saved, loaded and copied."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .. import device
from ..compiler import interrupts
from ..core.call import Arrays
from ..core.sums import Sums
from ..core.turn import Claim, Turn
from ..cpu import threads
from ..cpu.row_sparse import RowSparse
from ..cpu.sums import as_plain
from ..io import checkpoint, description
from ..optimizer import Optimizer
from .bound_parameters import BoundParameters


class TrainerState:
    """The part of a trainer that has parameters, states and counts, whose steps are elsewhere."""

    _optimizer: Optimizer
    _params: dict[str, Any]
    _names: list[str]
    _states: dict[str, Any]
    _turn: Turn
    _on_cuda: bool
    _grad_norm: Callable[[], float] | float | None
    _skipped_steps: int
    _totals: list[Any] | None  # of accumulated gradients; None where there was none
    _sums_made: Sums | None  # what adds them
    _bound: dict[bytes, BoundParameters]  # by which parameters have gradients

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

    @property
    def grad_norm(self) -> float | None:
        """The norm of the last step's gradients, before clipping. On a GPU, asking waits for it."""
        return self._grad_norm() if callable(self._grad_norm) else self._grad_norm

    @property
    def skipped_steps(self) -> int:
        """Number of steps that were left out. On a GPU, asking waits for the last one."""
        return self._skipped_steps + sum(bound.executor.skipped() for bound in self._bound.values())

    @skipped_steps.setter
    def skipped_steps(self, value: int) -> None:
        self._skipped_steps += value - self.skipped_steps

    @property
    def stray_rows(self) -> bool:
        """True if a sparse gradient on a GPU had rows that its parameter has not, which were left out.

        Asking waits for the last step. On the CPU such a gradient is an error.
        """
        added = self._sums_made is not None and self._sums_made.out_of_range_rows()
        return added or any(bound.executor.out_of_range_rows() for bound in self._bound.values())

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

    @property
    def _sums(self) -> Sums:
        """The sums to which gradients are added."""
        if self._sums_made is None:
            self._sums_made = device.sums_for(self._params.values(), self._names)
        return self._sums_made

    def _arrays(self, positions: Sequence[int]) -> Arrays:
        """The arrays of some parameters, with their positions in place of gradients."""
        names = [self._names[t] for t in positions]
        weights = [self._params[name] for name in names]
        states = [self._states[name] for name in names]
        masters = self._optimizer.multi_precision
        return self._optimizer.call_arrays(positions, weights, positions, states, masters)

    # ---------------------------------------------------------------- checkpoints

    def state_dict(self, params: bool = True) -> dict[str, Any]:
        """Return everything that goes on changing, as plain values and copies of arrays.

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
        return self._turn.claim("the trainer", again=not self._optimizer.has_deferred())

    def _state(self, params: bool) -> dict[str, Any]:
        self._flush()
        counts = self.optimizer._index_update_count
        parameters = {
            name: {"state": self._states[name], "count": counts.get(i, self.optimizer.begin_num_update)}
            | ({"weight": self._params[name]} if params else {})
            for i, name in enumerate(self._names)
        }
        totals = zip(self._names, self._totals or (), strict=False)
        return {
            "optimizer": description.describe(self.optimizer),
            "parameters": parameters,
            "accumulated": {name: as_plain(total) for name, total in totals if total is not None},
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
            with interrupts.defer_signals() if self._on_cuda else nullcontext():
                threads.run([], calls)
        finally:
            del claim

    def _taking_over(self, state_dict: Mapping[str, Any]) -> checkpoint.Calls:
        """Return calls that take over a state dict that fits: whole or not at all, as none is in Python."""
        saved = description.saved(state_dict, self._names)
        restoration = description.restoration(self.optimizer, saved.optimizer)
        description.check_forms(self.optimizer, restoration.optimizer, self._params.values())
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
        totals: list[Any] = [None] * len(self._names)
        weights = self._arrays(range(len(self._names))).weights
        for name, total in saved.accumulated.items():
            t, what = self._names.index(name), f"accumulated gradient of parameter {name!r}"
            if isinstance(total, Mapping):
                with checkpoint.refusing(what):
                    totals[t] = self._sums.sparse(weights[t], RowSparse(**total), what)
            else:
                totals[t] = self._sums.dense(t, weights[t])
                pairs += checkpoint.pairs(totals[t], total, what)
        own = {
            "_skipped_steps": self._skipped_steps + saved.skipped_steps - self.skipped_steps,
            "_totals": totals if any(total is not None for total in totals) else None,
        }
        return [
            *restoration.calls,
            *checkpoint.assignments(pairs),
            *self.optimizer.counting_from(saved.counts),
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
        """Return all attributes but tables, which hold addresses of this one's arrays."""
        claim = self._claim_to_read()
        try:
            if self._on_cuda and self._totals is not None:
                raise TypeError("a trainer on a GPU can be copied once a step has taken what was accumulated")
            made: dict[str, Any] = {"_bound": {}, "_captured": None, "_sums_made": None}
            counts = {"_grad_norm": self.grad_norm, "_skipped_steps": self.skipped_steps}
            objects = {"param_dict": self._optimizer.param_dict}  # which optimizers alone leave behind
            return vars(self) | made | counts | objects
        finally:
            del claim

    def __setstate__(self, state: dict[str, Any]) -> None:
        param_dict = state.pop("param_dict")
        vars(self).update(state)
        self._optimizer.param_dict = param_dict
        self._optimizer.give_to(self)

    def __copy__(self) -> TrainerState:
        raise TypeError("a trainer's copy would count updates of the same arrays; use copy.deepcopy")
