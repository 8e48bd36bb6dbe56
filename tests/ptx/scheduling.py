"""A launch: which threads come next, until all have come to the end.

All threads that are in the same basic block are taken together, those in the first one of all blocks before
the others, so that threads that went different ways meet again by themselves. Threads at an instruction that
is for a whole warp or block wait until all of that are there. With a generator of random numbers, any block
and any of the warps there may come next.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import ordering
from .faults import Fault, UnknownForm
from .memory import DeviceMemory, SharedMemory
from .parsing import TYPES, Instruction
from .translating import END, Program

WARP = 32
LIMIT = 1_000_000  # basic blocks, of a launch that ends
EVERYONE = ("-1", "0xffffffff")  # of a warp, as a mask


class Run:
    """One launch of a program: ``Run(program, blocks, threads, arguments, memory).run()``.

    Arguments are integers and real numbers. With `ordered`, accesses that nothing puts in order are looked
    for. Afterwards, `visited` are the numbers of the basic blocks that some thread was in.
    """

    def __init__(
        self,
        program: Program,
        blocks: int,
        threads: int,
        arguments: Sequence[Any],
        memory: DeviceMemory,
        random: np.random.Generator | None = None,
        ordered: bool = True,
        limit: int = LIMIT,
    ) -> None:
        self.program, self.threads, self.memory, self.random = program, threads, memory, random
        self._limit = limit
        self.lanes = blocks * threads
        thread = np.arange(self.lanes)
        self.block = thread // threads
        self.warp = self.block * -(-threads // WARP) + thread % threads // WARP
        self._specials = {
            "tid": (thread % threads).astype("u4"),
            "ctaid": self.block.astype("u4"),
            "ntid": np.full(self.lanes, threads, "u4"),
            "nctaid": np.full(self.lanes, blocks, "u4"),
            "laneid": (thread % threads % WARP).astype("u4"),
        }
        if len(arguments) != len(program.params):
            raise Fault(f"{len(program.params)} arguments are expected, not {len(arguments)}")
        self._arguments = [
            np.array(value, TYPES[kind]) if kind[0] == "f" else np.array(int(value), "i8").view(TYPES[kind])
            for value, (kind, _) in zip(arguments, program.params, strict=True)
        ]
        self._registers: dict[str, np.ndarray] = {}
        self._shared = SharedMemory(program.shared_size, blocks)
        self.log = ordering.Log(self.lanes) if ordered else None
        self.visited: set[int] = set()

    def run(self) -> Run:
        with np.errstate(all="ignore"):
            self._run()
            if self.log is not None:
                ordering.check(self)
        return self

    # ------------------------------------------------------------ what the blocks' functions ask for

    def get(self, name: str, I: Any) -> np.ndarray:  # noqa: E741
        found = self._registers.get(name)
        if found is None:
            raise Fault(f"register {name} is read before it is written; {self.program.name[:80]}")
        return found if I is None else found[I]

    def put(self, name: str, I: Any, value: np.ndarray) -> None:  # noqa: E741
        if I is None:
            self._registers[name] = value
            return
        found = self._registers.get(name)
        if found is None:
            found = self._registers[name] = np.zeros(self.lanes, self.program.registers[name])
        found[I] = value

    def special(self, name: str, I: Any) -> np.ndarray:  # noqa: E741
        return self._specials[name] if I is None else self._specials[name][I]

    def param(self, number: int, n: int) -> np.ndarray:
        return np.full(n, self._arguments[number])

    def load_global(self, key: int, places: Any, I: Any, size: int, count: int) -> list[Any]:  # noqa: E741
        self._check_global(key, places, I, size * count)
        self._note(key, places, I, size, count, None)
        return self.memory.load(places, size, count)

    def store_global(self, key: int, places: Any, I: Any, size: int, values: list[Any]) -> None:  # noqa: E741
        self._check_global(key, places, I, size * len(values))
        self._note(key, places, I, size, len(values), values)
        self.memory.store(places, size, values)

    def load_shared(self, key: int, places: Any, I: Any, size: int, count: int) -> list[Any]:  # noqa: E741
        full = self._shared_places(key, places, I, size * count)
        self._note(key, full + ordering.SHARED, I, size, count, None)
        self._refuse(key, places, I, self._shared.unwritten(full, size * count), "nobody has written that")
        return self._shared.load(full, size, count)

    def store_shared(self, key: int, places: Any, I: Any, size: int, values: list[Any]) -> None:  # noqa: E741
        full = self._shared_places(key, places, I, size * len(values))
        self._note(key, full + ordering.SHARED, I, size, len(values), values)
        self._shared.store(full, size, values)

    def _check_global(self, key: int, places: Any, I: Any, size: int) -> None:  # noqa: E741
        self._check_aligned(key, places, I, size)
        self._refuse(key, places, I, self.memory.outside(places, size), "outside of all arrays")

    def _shared_places(self, key: int, places: Any, I: Any, size: int) -> Any:  # noqa: E741
        self._check_aligned(key, places, I, size)
        outside = (places < 0) | (places + size > self._shared.size)
        if outside.any():
            self._refuse(key, places, I, np.flatnonzero(outside), "outside of shared memory")
        return places + self._shared.size * (self.block if I is None else self.block[I])

    def _check_aligned(self, key: int, places: Any, I: Any, size: int) -> None:  # noqa: E741
        odd = places & (size - 1)
        if odd.any():
            self._refuse(key, places, I, np.flatnonzero(odd), f"not at a multiple of {size}")

    def _refuse(self, key: int, places: Any, I: Any, bad: Any, what: str) -> None:  # noqa: E741
        if bad is not None:
            one = self.program.instructions[key]
            lane = int(bad[0] if I is None else I[bad[0]])
            raise Fault(
                f"line {one.line}: {one.text}: {what}: {int(places[bad[0]]):#x}, as thread {lane % self.threads} "
                f"of block {lane // self.threads} has it, and {len(bad) - 1} others; {self.program.name[:80]}"
            )

    def _note(self, key: int, places: Any, I: Any, size: int, count: int, values: Any) -> None:  # noqa: E741
        if self.log is not None:
            self.log.note(key, places, I, size, count, values)

    # ------------------------------------------------------------ who comes next

    def _run(self) -> None:
        at = np.zeros(self.lanes, "i8")  # the block that each thread comes to next
        waiting = np.zeros(self.lanes, bool)
        together: int | None = 0 if self.random is None else None  # where all are
        for step in itertools.count():
            if step == self._limit:
                raise Fault(f"no end after {self._limit} basic blocks; {self.program.name[:80]}")
            if together is not None:
                if together == END:
                    return
                found = self._step(together, None, self.lanes)
                if isinstance(found, int):
                    together = found
                    continue
                at, together = np.asarray(found, "i8"), None
            ready = np.where(waiting, END, at)
            block = self._chosen(ready)
            if block == END:
                if waiting.any():
                    raise self._stuck(at, waiting)
                return
            I = np.flatnonzero(ready == block)  # noqa: E741
            if self.random is not None:
                I = self._some(I)  # noqa: E741
            if self.program.meets_at(block):
                waiting[I] = True
                I = self._complete(block, at, waiting)  # noqa: E741
                if not len(I):
                    continue
                waiting[I] = False
            at[I] = self._step(block, I, len(I))
            if self.random is None and not waiting.any() and (at == at[0]).all():
                together = int(at[0])

    def _step(self, block: int, I: Any, n: int) -> Any:  # noqa: E741
        """Let threads go through a block, in which they are together; says where they come to."""
        self.visited.add(block)
        if not self.program.meets_at(block):
            return self.program.function(block)(self, I, n)
        self._meet(self.program.blocks[block][0], I, n)
        return block + 1

    def _chosen(self, ready: np.ndarray) -> int:
        if self.random is None:
            return int(ready.min())
        places = np.unique(ready)
        places = places[places != END]
        return int(self.random.choice(places)) if len(places) else END

    def _some(self, I: np.ndarray) -> np.ndarray:  # noqa: E741
        """Those of some warps."""
        warps = np.unique(self.warp[I])
        chosen = self.random.random(len(warps)) < 0.5
        return I[np.isin(self.warp[I], warps[chosen])] if chosen.any() else I

    def _complete(self, block: int, at: np.ndarray, waiting: np.ndarray) -> np.ndarray:
        """The threads at a meeting of which all are there that are to meet."""
        group = self.block if _of_block(self.program.blocks[block][0]) else self.warp
        here = waiting & (at == block)
        whole = np.bincount(group[here], minlength=group[-1] + 1) == np.bincount(group)
        return np.flatnonzero(whole[group] & here)

    def _stuck(self, at: np.ndarray, waiting: np.ndarray) -> Fault:
        lines = []
        for block in np.unique(at[waiting]):
            one, lanes = self.program.blocks[int(block)][0], np.flatnonzero(waiting & (at == block))
            lines.append(f"line {one.line}: {one.text}: {len(lanes)} threads from number {lanes[0]} on")
        told = "; ".join(lines)
        return Fault(f"threads wait for others that do not come: {told}; {self.program.name[:80]}")

    # ------------------------------------------------------------ meetings

    def _meet(self, one: Instruction, I: Any, n: int) -> None:  # noqa: E741
        """What threads do at an instruction that all of their warp, or block, have come to."""
        if not _of_block(one) and (self.threads % WARP or one.args[-1] not in EVERYONE):
            raise UnknownForm(f"{one.text} in a block of {self.threads} threads")
        if one.form == "bar.sync" and one.args == ("0",):
            self._in_order("block", I)
        elif one.form == "bar.warp.sync":
            self._in_order("warp", I)
        elif one.form == "shfl.sync.bfly.b32":  # makes threads wait, and orders nothing
            target, source, mask, clamp, _ = one.args
            if clamp != "31":
                raise UnknownForm(one.text)
            values = self.get(source, I).reshape(-1, WARP)
            mask = self._mask(mask, I).reshape(-1, WARP) if mask in self.program.registers else int(mask, 0)
            found = np.take_along_axis(values, np.arange(WARP) ^ (mask & 31) + np.zeros_like(values, "i8"), 1)
            self.put(target, I, found.ravel().view(self.program.registers[target]))
        elif one.form == "vote.sync.all.pred":
            target, source, _ = one.args
            flags = self.get(source, I).reshape(-1, WARP)
            self.put(target, I, np.repeat(flags.all(1), WARP))
        else:
            raise UnknownForm(one.text)

    def _mask(self, name: str, I: Any) -> np.ndarray:  # noqa: E741
        return self.get(name, I).view("u4").astype("i8")

    def _in_order(self, what: str, I: Any) -> None:  # noqa: E741
        if self.log is not None:
            self.log.met(what, I)


def _of_block(one: Instruction) -> bool:
    return one.form == "bar.sync"
