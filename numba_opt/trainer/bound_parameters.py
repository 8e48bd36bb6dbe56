"""`BoundParameters`: parameters whose tables and groups are kept from step to step.

A step looks at each gradient's array object, which takes microseconds for hundreds of them, and makes tables
and rows of coefficients anew only where something has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .. import device
from ..core.call import Arrays
from ..core.executor import After
from ..core.rates import Group, Plan
from ..core.step_rows import NormLimit, Outcome
from ..cpu import ndarray
from ..optimizer import Optimizer


class BoundParameters:
    """The parameters of a trainer that have gradients.

    It does not refer to its trainer, so that a trainer's arrays are freed as soon as it is dropped.
    """

    def __init__(self, optimizer: Optimizer, arrays: Arrays, positions: list[int]) -> None:
        self.positions, self._arrays = positions, arrays  # with the positions in place of gradients
        self.executor = device.executor_for(arrays.weights, arrays.rule)
        self._ids = ndarray.objects(arrays.columns)
        self._groups: list[Group] = []
        self._group_of: list[int] = []
        self._mults: tuple[Any, ...] = ()  # the optimizer's, as of which the groups are made

    def step(
        self,
        optimizer: Optimizer,
        grads: Sequence[Any],
        ids: Any,
        rescale: float,
        limit: NormLimit | None,
        before: Callable[[], None] | None,
        after: After,
    ) -> Outcome:
        """Update the parameters by gradients, whose objects have these ids, and count that.

        Arguments as for `numba_opt.core.executor.Executor.run`; gradients are multiplied by `rescale`.
        """
        # Schedulers and `hyper` are the user's code, which might change arrays: it runs before they are read.
        plan = self.plan(optimizer, rescale)
        arrays = self._now(optimizer)
        if arrays.last_steps:
            arrays = optimizer.with_deferred(arrays, self.positions)
        self._ids[0] = ids
        try:
            self.executor.refresh(arrays, grads, self._ids)
            if after:
                plan.counting.extend(after)
            return self.executor.run(plan.rows, limit, before=before, after=plan.counting)
        finally:
            self.executor.release()  # the caller's arrays are the caller's again

    def replay(self, optimizer: Optimizer, rescale: float, limit: NormLimit | None) -> None:
        """Count a step that a graph is about to make, and have its coefficients ready for it."""
        plan = self.plan(optimizer, rescale)
        self.executor.replay(plan.rows, limit, optimizer.deferred_of(self.positions), plan.counting)

    def plan(self, optimizer: Optimizer, rescale: float) -> Plan:
        """Return the next step's coefficients and the calls that count it."""
        mults = (optimizer.lr_mult, optimizer.wd_mult)
        if not optimizer.counted_last(self._groups) or mults != self._mults or optimizer.param_dict:
            self._groups, self._group_of = optimizer.rate_groups(self.positions)
            self._mults = (dict(optimizer.lr_mult), dict(optimizer.wd_mult))
        return optimizer.plan_group_step(self._groups, self._group_of, rescale)

    def _now(self, optimizer: Optimizer) -> Arrays:
        """Return the arrays with what is wanted of them now; a checkpoint, perhaps, has changed that."""
        rule, arrays = optimizer.checked_rule(), self._arrays
        if rule.n_state != arrays.n_state:
            names = ", ".join(optimizer.state_names) or "none"
            raise TypeError(
                f"optimizer has {rule.n_state} states now ({names}); expected {arrays.n_state}, "
                "as when the trainer was made"
            )
        wanted = (rule, optimizer.state_storage, optimizer.sparse_update, optimizer.use_fused_step)
        if wanted != (arrays.rule, arrays.state_storage, arrays.sparse_update, arrays.fused):
            self._arrays = arrays = arrays._replace(
                rule=rule,
                state_storage=optimizer.state_storage,
                tensor_ids=optimizer.tensor_ids(self.positions),
                sparse_update=optimizer.sparse_update,
                fused=optimizer.use_fused_step,
            )
            if rule != self.executor.rule:
                self.executor = device.executor_for(arrays.weights, rule)
        return arrays
