"""The arrays of one step: as a caller has them, as a reader finds them, and as tables that kernels take.

Readers make a `Scan` of `Arrays`; a scan that is in order becomes a `Call`; an executor runs calls.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from .columns import COMMON, GRAD, STATES, WEIGHT, WIDTH
from .rules import Rule
from .storage import ABSENT, Layout, layout_of, own_layout

Columns = Sequence[Sequence[Any]]


class Arrays(NamedTuple):
    """The arrays of one call as its caller has them, and what is asked of them.

    Every column has the same length: the gradients, the weights and each state, and perhaps the half-
    precision weights beside float32 ones, None for a weight that has none.
    """

    columns: Columns
    rule: Rule
    states: Sequence[str]  # their names
    label: Callable[[int], str]  # what the parameter at a position is called, in errors
    state_storage: str = ""  # the code of the states; empty: as the weight
    tensor_ids: tuple[int, ...] = ()  # where states are rounded stochastically, one for each weight
    sparse_update: str = "lazy"  # what sparse gradients mean, as `numba_opt.Optimizer` says
    last_steps: Mapping[int, Any] = {}  # by position, where rows catch up exactly: written, too
    deferred: Mapping[int, Any] = {}  # the steps that rows of these have yet to take
    touched: Mapping[int, Any] = {}  # what sparse gradients touch; None: there is no gradient at all
    fused: bool = True  # whether the step is compiled

    @property
    def n_state(self) -> int:
        """Number of states of a weight."""
        return len(self.states)

    @property
    def weights(self) -> Sequence[Any]:
        """The weights, which are updated."""
        return self.columns[WEIGHT]

    def names(self) -> list[str]:
        """Return the name of each column, for errors."""
        states = [f"state {name!r}" for name in self.states]
        return ["gradient", "weight", *states, "half-precision weight"][: len(self.columns)]

    def may_lack(self, column: int, t: int) -> bool:
        """Tell whether a tensor may be without an array of a column."""
        return column == STATES + self.n_state or (column == GRAD and t in self.touched)

    def of_row(self, column: int) -> bool:
        """Tell whether a column has one number for each row of the weight."""
        return self.rule.per_row and STATES <= column < STATES + self.n_state

    def with_grads(self, grads: Sequence[Any]) -> Arrays:
        """Return these arrays with other gradients."""
        return self._replace(columns=[grads, *self.columns[1:]])

    def without_grads(self) -> Arrays:
        """Return these arrays with no gradients at all."""
        n = len(self.weights)
        return self.with_grads([None] * n)._replace(touched=dict.fromkeys(range(n)))


class Scan(NamedTuple):
    """The arrays of a call as a reader has found them, one row for each tensor."""

    addresses: np.ndarray  # of its arrays, then what `numba_opt.core.columns` says
    bytes: np.ndarray  # how many lie at each address
    sizes: np.ndarray  # elements of the weight
    storages: np.ndarray  # of its arrays, packed (`numba_opt.core.storage`)

    @property
    def n_array(self) -> int:
        """Number of arrays that a tensor may have."""
        return int(self.bytes.shape[1])


def blank(columns: int, tensors: int) -> Scan:
    """Make a scan that nothing has been read into."""
    return Scan(
        addresses=np.zeros((tensors, columns + COMMON), np.uint64),
        bytes=np.zeros((tensors, columns), np.int64),
        sizes=np.zeros(tensors, np.int64),
        storages=np.zeros(tensors, np.int64),
    )


class Table(NamedTuple):
    """The tensors of a call that are stored alike, as a kernel takes them (`numba_opt.cpu.loops`)."""

    layout: Layout
    members: np.ndarray  # their positions in the call
    addresses: np.ndarray
    offsets: np.ndarray  # each tensor's first element on the kernel's long line, then the line's length


class Call(NamedTuple):
    """The arrays of one step, checked. It keeps alive those that it has."""

    rule: Rule
    scan: Scan
    tables: list[Table]  # of dense gradients, one for each way to store them
    state_storage: str = ""
    arrays: Columns = ()  # as kernels work on them
    replaced: Sequence[tuple[np.ndarray, np.ndarray]] = ()  # (the caller's array, what is worked on instead)
    touched: Mapping[int, Any] = {}  # rows, by position, where the gradient is sparse
    last_steps: Mapping[int, np.ndarray] = {}  # and deferred steps, where rows catch up exactly
    deferred: Mapping[int, Any] = {}

    def layout(self, t: int) -> Layout:
        """Return the layout of a tensor's own arrays."""
        scan = self.scan
        found = own_layout(int(scan.storages[t]), scan.n_array, self.rule.n_state, self.state_storage)
        assert found is not None
        return found

    def own(self, t: int) -> tuple[list[int], int, int]:
        """The addresses of a tensor's own arrays, its number for random bits, and the length of its rows."""
        entry = self.scan.addresses[t]
        tensor_id, width = entry[-COMMON:-1].tolist()
        return entry[WEIGHT : WEIGHT + len(self.layout(t).codes)].tolist(), tensor_id, width

    def height(self, t: int) -> int:
        """Return the number of rows of a tensor."""
        return int(self.scan.sizes[t]) // max(int(self.scan.addresses[t, WIDTH]), 1)

    def pending(self) -> list[int]:
        """Positions of parameters with a dense gradient, some of whose rows have yet to take steps."""
        return [t for t, steps in self.deferred.items() if steps.recorded and t not in self.touched]

    def write_back(self) -> list[partial[Any]]:
        """Return the calls that copy arrays back into those in whose place they were worked on."""
        return [partial(operator.setitem, array, ..., work) for array, work in self.replaced]


def line_starts(counts: np.ndarray) -> np.ndarray:
    """Return where each one's part of a kernel's long line begins, and where the line ends."""
    starts = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    return starts


def tables(scan: Scan, n_state: int, state_storage: str = "") -> list[Table]:
    """Make a table for each layout among the arrays; a gradient that is absent comes another way."""
    result = []
    kinds = sorted(set(scan.storages.tolist()))
    for packed in kinds:
        layout = layout_of(packed, scan.n_array, n_state, state_storage)
        if layout is not None:
            members = np.flatnonzero(scan.storages == packed)
            addresses = scan.addresses if len(kinds) == 1 else scan.addresses[members]
            result.append(Table(layout, members, addresses, line_starts(scan.sizes[members])))
    return result


def moved(call: Call) -> None:
    """Bring the tables of a call to where its scan says that arrays are."""
    if len(call.tables) > 1 or call.touched:  # else its addresses are those of the scan
        for table in call.tables:
            table.addresses[:, :-COMMON] = call.scan.addresses[table.members, :-COMMON]


def go_together(scan: Scan, n_state: int, state_storage: str, touched: Mapping[int, Any]) -> bool:
    """Tell whether kernels take the storages of each tensor's arrays together."""
    if not touched:
        kinds = set(scan.storages.tolist())
        return None not in {layout_of(packed, scan.n_array, n_state, state_storage) for packed in kinds}
    for t, packed in enumerate(scan.storages.tolist()):
        if (packed & ABSENT == ABSENT) != (t in touched):
            return False
        if own_layout(packed, scan.n_array, n_state, state_storage) is None:
            return False
    return True
