"""Steps on NVIDIA GPUs: what it takes to launch kernels on many arrays.

Everything a step needs is prepared when its arrays are first seen: tables in the device's memory, and
launches with their arguments. A step of arrays that it has seen before costs a look at each of them and two
or three launches. Hyper-parameters are in a buffer in the device's memory. They travel there as arguments of
a launch of their own, which is left out when they have not changed; so a captured graph, which has only the
kernels that read the buffer, sees new ones when it is replayed.

Nothing waits for the device: kernels go to the caller's stream, which is PyTorch's or CuPy's current one if
the weights are theirs, else the default stream, or the one that `on` names.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from operator import attrgetter, methodcaller
from typing import Any, NamedTuple

import numpy as np

from .. import device
from ..compiler import interrupts
from ..core.rules import Rule
from ..cpu import ndarray, threads
from ..errors import CudaUnavailableError
from . import history as cuda_history
from . import sparse as cuda_sparse
from .arrays import View, address_of, current_stream, kernels, kind_of, look, on, place
from .buffer import NORM, SKIPPED, STRAY
from .memory import NO_HYPER, Hyper, Norm, Placed, Scratch, dense_table, late_tables, row_tables

__all__ = ["CudaUnavailableError", "on"]

UNPREPARED = "a step can be captured after one with the same arrays; make one before the capture"


class Part:
    """Those arrays of a call that are on one device: tables there, and launches."""

    def __init__(self, rule: Rule, gpu: Any, members: list[int]) -> None:
        self.rule, self.gpu, self.members = rule, gpu, members
        self.hyper = Hyper(gpu)
        self.placed: list[Placed] = []
        self.made_on: set[int] = set()
        self.weight: Callable[[], Any] = lambda: None
        self.found: Found | None = None
        self._which: Sequence[int] | None = None  # rows of hyper-parameters that it is ready for,
        self._at = 0  # and where those are
        self._last: int | None = None
        self._partial = Scratch(gpu)
        self._launches: list[Any] = []
        self._measuring: list[Any] = []  # the same with the norm of the gradients: what sums their squares,
        self._settling: list[Any] = []  # and what comes once all sums are there
        self._share: tuple[int, int] | None = None  # of the sums that these are made for, as `write` has it
        self._late: list[Placed] = []
        self._frozen = False  # whether a graph has the addresses of tables, which stay as they are then

    def hold(self, found: Found, weight: Any) -> None:
        """Take other arrays."""
        tables = [dense_table(self.rule, table) for table in found.bound.tables]
        tables += row_tables(self.rule, found)
        before, self.placed = [] if self._frozen else self.placed, []
        self._frozen = False
        for table in tables:
            placed = next((old for old in before if old.table.like(table)), None)
            self.placed.append(placed or Placed(self.gpu, self.hyper, table))
            self.placed[-1].take(table)
        self.made_on, self.weight = found.made_on, _weakly(weight)
        self.found, self._which = found, None

    def retake(self, places: np.ndarray) -> bool:
        """Take other gradients, which are like the last ones; False if they cannot be taken as they are."""
        found = self.found
        if found is None or found.parts:
            return False
        survey, held = found.bound.found, found.bound.found.bytes[:, 0]
        if (survey.addresses[held > 0, 0] == places[held > 0]).all():
            return True
        if self.gpu.capturing(self.stream()):
            return False
        sizes = np.maximum(held // np.maximum(survey.sizes, 1), 1).astype(np.uint64)
        survey.addresses[held > 0, 0] = places[held > 0]
        if (places % sizes)[held > 0].any() or ndarray.overlapping(survey):
            return False
        for table in found.bound.tables:
            table.addresses[:, 0] = survey.addresses[table.members, 0]
        self.hold(found, self.weight())
        return True

    def catch_up(self, found: Found, late: Sequence[int], stream: int) -> None:
        """Let all rows of some tensors take the steps that they have not."""
        if not late:
            return
        before, self._late = self._late, []
        for table in late_tables(self.rule, found, late):
            placed = next((old for old in before if old.table.like(table)), None)
            self._late.append(placed or Placed(self.gpu, NO_HYPER, table))
            self._late[-1].take(table)
            self._late[-1].place([0] * len(table.members), stream)
            for launch in (*self._late[-1].updates, self._late[-1].forget()):
                launch(stream)
        for t in late:
            found.histories[t].recorded = 0

    def record(self, found: Found, stream: int) -> None:
        """A step is about to be launched that records itself, if rows catch up."""
        parts, histories = found.parts, found.histories
        self.follow(found, stream)
        due = [t for t, h in histories.items() if h.recorded and (t not in parts or h.recorded == h.room)]
        self.catch_up(found, due, stream)
        for t in parts.keys() & histories.keys():
            histories[t].recorded += 1

    def flush(self, stream: int) -> None:
        """Bring all rows up to date."""
        if found := self.found:
            self.follow(found, stream)
            behind = [t for t, history in found.histories.items() if history.recorded]
            self.catch_up(found, behind, stream)

    def follow(self, found: Found, stream: int) -> None:
        """Let a stream wait for those that used the histories last."""
        for other in {history.stream for history in found.histories.values()} - {None, stream}:
            self.gpu.after(stream, other)
        for history in found.histories.values():
            history.stream = stream

    def freeze(self) -> Captured:
        """What a graph has just been given, all that it has addresses of included, which stays as it is."""
        self._frozen = True
        assert self.found is not None
        histories = [*self.found.histories.values()]
        kept = [*self.placed, self._partial.memory, self.hyper.memory, *histories]
        return Captured(self, self.found, self.hyper.address, kept)

    def stream(self) -> int:
        """The caller's stream."""
        return current_stream(self.weight(), self.gpu.number)

    @property
    def sums(self) -> int:
        """How many sums of squares of its gradients there are."""
        return sum(placed.sums for placed in self.placed)

    def come_to(self, stream: int) -> None:
        """Let a stream wait for the one that was used last."""
        if stream != self._last:
            if self._last is not None:
                self.gpu.after(stream, self._last)
            self._last = stream

    def written(
        self, rows: np.ndarray, which: Sequence[int], norm: Norm | None, stream: int, share: tuple[int, int]
    ) -> bool:
        """Whether `write` has nothing to do."""
        if stream != self._last or self.made_on - {stream} or not self.ready(which, norm):
            return False
        return (norm is None or share == self._share) and self.hyper.has(rows, norm)

    def write(
        self,
        rows: np.ndarray,
        which: Sequence[int],
        norm: Norm | None,
        stream: int,
        share: tuple[int, int] | None = None,
    ) -> None:
        """Have hyper-parameters and tables in place when the stream gets there.

        Of the sums of squares, those of other devices included, its own are a share: where they begin among
        all, and how many all are.
        """
        self.come_to(stream)
        if self.made_on:
            for other in self.made_on - {stream}:
                self.gpu.after(stream, other)
        self.hyper.fit(rows)
        if not self.ready(which, None):
            self._place(which, rows.shape[1], stream)
        self.hyper.write(rows, norm, stream)
        share = share or (0, self.sums)
        if norm is not None and self._share != share:
            self._prepare_norm(rows.shape[1], share)

    def _place(self, which: Sequence[int], length: int, stream: int) -> None:
        """Have tables in place, with tensors' rows of hyper-parameters, which have that length."""
        if self._frozen:
            tables, self.placed, self._frozen = [placed.table for placed in self.placed], [], False
            for table in tables:
                self.placed.append(Placed(self.gpu, self.hyper, table))
                self.placed[-1].take(table)
        for placed in self.placed:
            placed.place([length * which[self.members[k]] for k in placed.table.members], stream)
        self._launches, self._share = [*self._sorting(), *self._updates()], None
        self._which, self._at = which, self.hyper.address

    def _sorting(self) -> list[Any]:
        return [launch for placed in self.placed for launch in placed.sorting]

    def _updates(self) -> list[Any]:
        return [launch for placed in self.placed for launch in placed.updates]

    def ready(self, which: Sequence[int], norm: Norm | None) -> bool:
        """Whether all is in place, but for the values of hyper-parameters."""
        if self._at != self.hyper.address or self._which is None:
            return False
        return (which is self._which or which == self._which) and (norm is None or self._share is not None)

    def launch(self, norm: Norm | None, stream: int) -> None:
        """Launch the kernels of a step, up to the sums of squares if there is a norm; nothing else."""
        for launch in self._launches if norm is None else self._measuring:
            launch(stream)

    def settle(self, stream: int) -> None:
        """Launch what follows from the sums of squares, the updates included."""
        for launch in self._settling:
            launch(stream)

    def fetch(self, other: Part, stream: int, from_stream: int) -> None:
        """Have another device's sums of squares here, once they are there."""
        assert other._share is not None
        place = 8 * other._share[0]
        self.gpu.after(stream, from_stream, other.gpu)
        mine, theirs = self._partial.address + place, other._partial.address + place
        self.gpu.bring(mine, other.gpu, theirs, 8 * other.sums, stream)

    def _prepare_norm(self, length: int, share: tuple[int, int]) -> None:
        """Be ready to sum the squares of all gradients, and to settle what follows from that."""
        loops, launch_of = kernels().loops, kernels().driver.Launch
        before, count = share
        first, squares = self._partial.fit(max(count, 1)), []
        for placed in self.placed:
            squares.append(placed.squares(first + 8 * before))
            before += placed.sums
        arguments = (self.hyper.address, self.hyper.room, length, first, count)
        settled = launch_of(self.gpu, loops.clip_norm(), 1, loops.THREADS, arguments)
        self._measuring, self._settling = [*self._sorting(), *squares], [settled, *self._updates()]
        self._share = share


class Captured(NamedTuple):
    """What a graph does on a device."""

    part: Part
    found: Found
    hyper: int  # where the buffer of hyper-parameters was
    kept: list[Any]  # what it has the addresses of


def _weakly(value: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(value)
    except TypeError:
        return lambda: value


class Prepared:
    """The arrays of a call, checked, with all that it takes to launch kernels on them.

    It keeps no array alive. Arrays that it has seen are known by their objects and addresses.
    """

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.parts: list[Part] = []
        self._parts: dict[int, Part] = {}  # of devices
        self._known: list[Known] = []  # the columns that it is ready for
        self._asked: Any = None  # of their states and of sparse gradients, and where histories are
        self._kinds: list[Any] = []  # of the gradients
        self._captured: list[Captured] = []  # by the last graph
        self._captured_which: list[int] = []
        self._kept: list[list[Captured]] = []  # by any, as long as this is there
        self._exact = False  # whether rows catch up

    def take(self, request: device.Request, grads: Sequence[Any] | None = None) -> None:
        """Be ready for a request's arrays, or other gradients; nothing is launched. Errors as in `bind`."""
        grads = request.columns[0] if grads is None else grads
        rest = [*request.columns[1:]]
        if request.stamps:
            rest.append([*request.stamps.values()])
        histories = [history.address for history in request.histories.values()]
        known, self._known = self._known, []
        before, self._asked = self._asked, (request.stored, request.numbers, request.sparse, histories)
        self._exact = bool(histories)
        same = bool(known) and self._asked == before and all(map(Known.same, known[1:], rest))
        if same and known[0].same(grads):
            self._known = known
            return
        if not (same and self._take_gradients(grads)):
            self._take_all(request._replace(columns=[grads, *request.columns[1:]]))
        try:
            self._known = [Known(grads), *(known[1:] if same else map(Known, rest))]
        except (TypeError, AttributeError):  # no telling whether an object is still the same
            return

    def _take_all(self, request: device.Request) -> None:
        columns = request.columns
        self.parts = []
        for found in bind(request):
            gpu = kernels().driver.device(found.device)
            if gpu.capturing(current_stream(columns[1][found.members[0]], found.device)):
                raise RuntimeError(UNPREPARED)
            part = self._parts.get(found.device)
            if part is None or part.members != found.members:
                part = Part(self.rule, gpu, found.members)
                self._parts[found.device] = part
            part.hold(found, columns[1][found.members[0]])
            self.parts.append(part)
        self._kinds = list(map(kind_of, columns[0]))

    def _take_gradients(self, grads: Sequence[Any]) -> bool:
        """Be ready for new gradients like the last ones; False if that takes a closer look."""
        if None in self._kinds or list(map(kind_of, grads)) != self._kinds:
            return False
        places = np.array(list(map(address_of, grads)), np.uint64)
        return all(part.retake(places[part.members]) for part in self.parts)

    def run(
        self,
        hyper: Any,
        which: Sequence[int],
        norm: Norm | None = None,
        *,
        graphs: bool = True,
        before: Callable[[], None] | None = None,
        after: Sequence[partial[Any]] = (),
    ) -> bool:
        """Launch a step, and count it by what comes `after`; False if it went into a graph, uncounted.

        Once nothing can go wrong any more comes what is to happen `before`. Signals wait meanwhile.
        """
        with interrupts.deferred():
            launch, captured = self.launching(hyper, which, norm, graphs=graphs)
            if before is not None:
                before()
            launch()
            if not captured:
                threads.run([], after)
        return not captured

    def launching(
        self, hyper: Any, which: Sequence[int], norm: Norm | None = None, *, graphs: bool = True
    ) -> tuple[Callable[[], None], bool]:
        """What launches a step, for which all else is in place, and whether it goes into a graph."""
        streams = [part.stream() for part in self.parts]
        captured = [part.gpu.capturing(at) for part, at in zip(self.parts, streams, strict=True)]
        if any(captured):
            self._check_capture(which, norm, graphs, all(captured))
        else:
            rows = np.asarray(hyper, np.float64)
            shares = [(0, 0)] * len(streams) if norm is None else self._shares()
            for part, stream, share in zip(self.parts, streams, shares, strict=True):
                if not part.written(rows, which, norm, stream, share):
                    with part.gpu.current():
                        part.write(rows, which, norm, stream, share)
        return partial(self._launch, norm, streams, list(which) if any(captured) else None), any(captured)

    def _shares(self) -> list[tuple[int, int]]:
        """Each device's share of the sums of squares, as `Part.write` has it."""
        own = [part.sums for part in self.parts]
        return [(sum(own[:k]), sum(own)) for k in range(len(own))]

    def _check_capture(self, which: Sequence[int], norm: Norm | None, graphs: bool, everywhere: bool) -> None:
        """Refuse a step that cannot go into a graph."""
        if not graphs:
            raise RuntimeError("only a step of a Trainer can be captured in a CUDA graph")
        if norm is not None and len(self.parts) > 1:
            raise RuntimeError(
                "a norm over several devices cannot be captured in CUDA graphs: one device's graph "
                "cannot wait for another's"
            )
        if not everywhere or not all(part.ready(which, norm) for part in self.parts):
            raise RuntimeError(UNPREPARED)

    def _launch(self, norm: Norm | None, streams: Sequence[int], captured: list[int] | None) -> None:
        """Launch a step on these streams; if it is captured, with tensors' rows of hyper-parameters."""
        parts = list(zip(self.parts, streams, strict=True))
        for part, stream in parts:
            with part.gpu.current():
                if self._exact and captured is None and part.found is not None:
                    part.record(part.found, stream)  # `refresh` does that before a graph is replayed
                part.launch(norm, stream)
        if norm is not None:
            self._exchange(parts)
            for part, stream in parts:
                with part.gpu.current():
                    part.settle(stream)
        if captured is not None:  # which has the tables for itself: others are made where they would change
            self._captured, self._captured_which = [part.freeze() for part in self.parts], captured
            self._kept.append(self._captured)

    @staticmethod
    def _exchange(parts: Sequence[tuple[Part, int]]) -> None:
        """Have all sums of squares on all devices, which add them in the same order."""
        for part, stream in parts:
            for other, from_stream in parts:
                if other is not part and other.sums:
                    part.fetch(other, stream, from_stream)
        for part, stream in parts:  # whose own sums stay as they are until all others have them
            for other, from_stream in parts:
                if other is not part and part.sums:
                    part.gpu.after(stream, from_stream, other.gpu)

    def flush(self) -> None:
        """Bring all rows up to date."""
        with interrupts.deferred():
            for part in self.parts:
                with part.gpu.current():
                    part.flush(part.stream())

    def refresh(
        self,
        hyper: Any,
        which: Sequence[int],
        norm: Norm | None,
        histories: Sequence[Any],
        after: Sequence[partial[Any]],
    ) -> None:
        """Have all in place for the step that was captured last, and count it by what comes `after`.

        The histories are those that the tensors have now.
        """
        rows = np.asarray(hyper, np.float64)
        same = all(part.hyper.address == at and part.hyper.holds(rows) for part, _, at, _ in self._captured)
        if not same or list(which) != self._captured_which:
            raise ValueError("other groups of hyper-parameters are in use since the step was captured")
        for part, found, *_ in self._captured:
            if any(histories[part.members[t]] is not held for t, held in found.histories.items()):
                raise ValueError("the steps that rows have yet to take are others since one was captured")
        with interrupts.deferred():
            for part, found, *_ in self._captured:
                with part.gpu.current():
                    stream = part.stream()
                    part.come_to(stream)
                    part.hyper.write(rows, norm, stream)
                    part.record(found, stream)
            threads.run([], after)

    def norm(self) -> float:
        """The norm of the last step's gradients; waits for the device."""
        return float(self.parts[0].hyper.told()[NORM])  # all devices have the same

    def skipped(self) -> int:
        """How many steps the devices have left out; waits for them."""
        return int(self._told()[SKIPPED])

    def strayed(self) -> bool:
        """Whether rows led outside; waits for the devices."""
        return bool(self._told()[STRAY])

    def _told(self) -> np.ndarray:
        """What the kernels of all devices have said: a step that is skipped is so on all of them."""
        return np.max([part.hyper.told() for part in self._parts.values()], axis=0)


class Known:
    """The arrays of a column, by their objects and addresses; none is kept alive by it."""

    def __init__(self, column: Sequence[Any]) -> None:
        self._gone: list[Any] = []
        self._read = _reader(column)
        self._ids, self._places = list(map(id, column)), list(map(self._read, column))
        whole = column if self._read in READERS else _parts(column)
        self._refs = [weakref.ref(value, self._gone.append) for value in whole]

    def same(self, column: Sequence[Any]) -> bool:
        """Whether these are the same arrays, where they were."""
        if self._gone or list(map(id, column)) != self._ids:
            return False
        return list(map(self._read, column)) == self._places


def _reader(column: Sequence[Any]) -> Callable[[Any], Any]:
    """What says most quickly where each of these arrays is."""
    for read in READERS:
        with suppress(AttributeError):  # one of them is not of that library
            list(map(read, column))
            return read
    return _place_of


def _told(array: Any) -> int:
    return array.__cuda_array_interface__["data"][0]


READERS = methodcaller("data_ptr"), attrgetter("data.ptr"), _told  # of PyTorch, of CuPy, of others


def _parts(column: Sequence[Any]) -> Iterator[Any]:
    """All arrays of a column, and sparse gradients with theirs."""
    for value in column:
        if value is not None:
            yield value
            if cuda_sparse.is_sparse(value):
                yield from cuda_sparse.arrays_of(value)


def _place_of(value: Any) -> Any:
    """Where an array is, or the arrays that a sparse gradient is made of."""
    if value is None:
        return 0
    if cuda_sparse.is_sparse(value):
        return [(id(array), address_of(array)) for array in cuda_sparse.arrays_of(value)]
    return address_of(value)


class Found(NamedTuple):
    """The arrays of a call that are on one device, checked."""

    device: int
    members: list[int]  # positions of what is there
    bound: device.Bound
    parts: dict[int, cuda_sparse.Parts]  # of sparse gradients, by position among those
    made_on: set[int]  # streams on which arrays are said to be in the making
    stamps: Mapping[int, View] = {}  # and histories, by position, where rows catch up exactly
    histories: Mapping[int, cuda_history.History] = {}

    def late(self, t: int) -> tuple[int, int]:
        """Where a tensor's stamps and history are, if it has any."""
        return (place(self.stamps[t].shadow), self.histories[t].address) if t in self.histories else (0, 0)

    def layout(self, t: int, rule: Rule) -> str:
        """How a tensor's own arrays are laid out."""
        survey = self.bound.found
        return device.own_layout(int(survey.codes[t]), survey.bytes.shape[1], rule.n_state, self.bound.stored)


def bind(request: device.Request) -> list[Found]:
    """The arrays of a call, all of it checked, by device.

    Raises
    ------
    TypeError, ValueError
        As `numba_opt.device.bind`; or an array is on the host, or on another device than its weight.
    """
    request, given = _take_sparse(request)
    views = _views(request)
    parts = {}
    for t, grad in given.items():
        weight = views[1][t]
        assert weight is not None
        parts[t] = cuda_sparse.parts_of(grad, weight, f"gradient of {request.label(t)}", request.sparse)
    apart = {t: [view.shadow for view in part.views] for t, part in parts.items()}
    request = request._replace(apart={**request.apart, **apart})
    stamps = {t: look(marks, f"stamps of {request.label(t)}") for t, marks in request.stamps.items()}
    for t, view in stamps.items():
        _check_device(view, views[1][t], f"stamps of {request.label(t)}")
    where = [view.device for view in views[1] if view is not None]
    found = []
    for number in sorted(set(where)):
        members = [t for t, place in enumerate(where) if place == number]
        own = [[column[t] for t in members] for column in views]
        held = [view for column in own for view in column if view is not None]
        here = {k: parts[t] for k, t in enumerate(members) if t in parts}
        marks = {k: stamps[t] for k, t in enumerate(members) if t in stamps}
        histories = {k: request.histories[t] for k, t in enumerate(members) if t in request.histories}
        held += [view for part in here.values() for view in part.views]
        held += marks.values()
        own_request = _shadows(request, own, members)
        bound = device.bind(own_request._replace(stamps={k: view.shadow for k, view in marks.items()}))
        made_on = {view.stream for view in held if view.stream}
        found.append(Found(number, members, bound, here, made_on, marks, histories))
    return found


def _take_sparse(request: device.Request) -> tuple[device.Request, dict[int, Any]]:
    """A request without its sparse gradients, and those."""
    grads = request.columns[0]
    sparse = {t: grad for t, grad in enumerate(grads) if cuda_sparse.is_sparse(grad)}
    rest = [None if t in sparse else grad for t, grad in enumerate(grads)]
    apart = {**request.apart, **dict.fromkeys(sparse, ())}
    return request._replace(columns=[rest, *request.columns[1:]], apart=apart), sparse


def check(request: device.Request) -> None:
    """What `bind` would refuse, but for gradients, refused."""
    bind(request._replace(apart=dict.fromkeys(range(len(request.columns[1])), ())))


def _views(request: device.Request) -> list[list[View | None]]:
    """What is known of all arrays of a request, each one where its weight is."""

    def may_lack(c: int, t: int) -> bool:
        return c == 2 + request.n_state or (c == 0 and t in request.apart)

    names = request.names()
    views = [
        [
            None if value is None and may_lack(c, t) else look(value, f"{name} of {request.label(t)}")
            for t, value in enumerate(column)
        ]
        for c, (name, column) in enumerate(zip(names, request.columns, strict=True))
    ]
    for name, column in zip(names, views, strict=True):
        for t, (view, weight) in enumerate(zip(column, views[1], strict=True)):
            if view is not None:
                _check_device(view, weight, f"{name} of {request.label(t)}")
    return views


def _check_device(view: View, weight: View | None, what: str) -> None:
    """Refuse an array that is not where its weight is."""
    if weight is not None and view.device != weight.device and view.shadow.size:
        raise ValueError(
            f"{what} is on CUDA device {view.device}; expected device {weight.device}, as the weight"
        )


def _shadows(request: device.Request, views: list[list[View | None]], members: list[int]) -> device.Request:
    """The part of a request for some positions, with what stands for its arrays."""
    return request._replace(
        columns=[[None if view is None else view.shadow for view in column] for column in views],
        label=lambda k: request.label(members[k]),
        apart={k: request.apart[t] for k, t in enumerate(members) if t in request.apart},
    )
