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
from .faults import KernelError, UnknownFormError
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
            raise KernelError(f"{len(program.params)} arguments are expected, not {len(arguments)}")
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

    def get(self, name: str, who: Any) -> np.ndarray:
        found = self._registers.get(name)
        if found is None:
            raise KernelError(f"register {name} is read before it is written; {self.program.name[:80]}")
        return found if who is None else found[who]

    def put(self, name: str, who: Any, value: np.ndarray) -> None:
        if who is None:
            self._registers[name] = value
            return
        found = self._registers.get(name)
        if found is None:
            found = self._registers[name] = np.zeros(self.lanes, self.program.registers[name])
        found[who] = value

    def special(self, name: str, who: Any) -> np.ndarray:
        return self._specials[name] if who is None else self._specials[name][who]

    def param(self, number: int, n: int) -> np.ndarray:
        return np.full(n, self._arguments[number])

    def load_global(self, key: int, places: Any, who: Any, size: int, count: int) -> list[Any]:
        self._check_global(key, places, who, size * count)
        self._note(key, places, who, size, count, None)
        return self.memory.load(places, size, count)

    def store_global(self, key: int, places: Any, who: Any, size: int, values: list[Any]) -> None:
        self._check_global(key, places, who, size * len(values))
        self._note(key, places, who, size, len(values), values)
        self.memory.store(places, size, values)

    def load_shared(self, key: int, places: Any, who: Any, size: int, count: int) -> list[Any]:
        full = self._shared_places(key, places, who, size * count)
        self._note(key, full + ordering.SHARED, who, size, count, None)
        self._refuse(key, places, who, self._shared.unwritten(full, size * count), "nobody has written that")
        return self._shared.load(full, size, count)

    def store_shared(self, key: int, places: Any, who: Any, size: int, values: list[Any]) -> None:
        full = self._shared_places(key, places, who, size * len(values))
        self._note(key, full + ordering.SHARED, who, size, len(values), values)
        self._shared.store(full, size, values)

    def _check_global(self, key: int, places: Any, who: Any, size: int) -> None:
        self._check_aligned(key, places, who, size)
        self._refuse(key, places, who, self.memory.outside(places, size), "outside of all arrays")

    def _shared_places(self, key: int, places: Any, who: Any, size: int) -> Any:
        self._check_aligned(key, places, who, size)
        outside = (places < 0) | (places + size > self._shared.size)
        if outside.any():
            self._refuse(key, places, who, np.flatnonzero(outside), "outside of shared memory")
        return places + self._shared.size * (self.block if who is None else self.block[who])

    def _check_aligned(self, key: int, places: Any, who: Any, size: int) -> None:
        odd = places & (size - 1)
        if odd.any():
            self._refuse(key, places, who, np.flatnonzero(odd), f"not at a multiple of {size}")

    def _refuse(self, key: int, places: Any, who: Any, bad: Any, what: str) -> None:
        if bad is not None:
            one = self.program.instructions[key]
            lane = int(bad[0] if who is None else who[bad[0]])
            where = f"thread {lane % self.threads} of block {lane // self.threads}"
            raise KernelError(
                f"line {one.line}: {one.text}: {what}: {int(places[bad[0]]):#x}, by {where} "
                f"and {len(bad) - 1} others; {self.program.name[:80]}"
            )

    def _note(self, key: int, places: Any, who: Any, size: int, count: int, values: Any) -> None:
        if self.log is not None:
            self.log.note(key, places, who, size, count, values)

    # ------------------------------------------------------------ who comes next

    def _run(self) -> None:
        at = np.zeros(self.lanes, "i8")  # the block that each thread comes to next
        waiting = np.zeros(self.lanes, bool)
        together: int | None = 0 if self.random is None else None  # where all are
        for step in itertools.count():
            if step == self._limit:
                raise KernelError(f"no end after {self._limit} basic blocks; {self.program.name[:80]}")
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
            who = np.flatnonzero(ready == block)
            if self.random is not None:
                who = self._some(who)
            if self.program.meets_at(block):
                waiting[who] = True
                who = self._complete(block, at, waiting)
                if not len(who):
                    continue
                waiting[who] = False
            at[who] = self._step(block, who, len(who))
            if self.random is None and not waiting.any() and (at == at[0]).all():
                together = int(at[0])

    def _step(self, block: int, who: Any, n: int) -> Any:
        """Let threads go through a block, in which they are together; says where they come to."""
        self.visited.add(block)
        if not self.program.meets_at(block):
            return self.program.function(block)(self, who, n)
        self._meet(self.program.blocks[block][0], who, n)
        return block + 1

    def _chosen(self, ready: np.ndarray) -> int:
        if self.random is None:
            return int(ready.min())
        places = np.unique(ready)
        places = places[places != END]
        return int(self.random.choice(places)) if len(places) else END

    def _some(self, who: np.ndarray) -> np.ndarray:
        """Those of some warps."""
        warps = np.unique(self.warp[who])
        chosen = self.random.random(len(warps)) < 0.5
        return who[np.isin(self.warp[who], warps[chosen])] if chosen.any() else who

    def _complete(self, block: int, at: np.ndarray, waiting: np.ndarray) -> np.ndarray:
        """The threads at a meeting of which all are there that are to meet."""
        group = self.block if _of_block(self.program.blocks[block][0]) else self.warp
        here = waiting & (at == block)
        whole = np.bincount(group[here], minlength=group[-1] + 1) == np.bincount(group)
        return np.flatnonzero(whole[group] & here)

    def _stuck(self, at: np.ndarray, waiting: np.ndarray) -> KernelError:
        lines = []
        for block in np.unique(at[waiting]):
            one, lanes = self.program.blocks[int(block)][0], np.flatnonzero(waiting & (at == block))
            lines.append(f"line {one.line}: {one.text}: {len(lanes)} threads from number {lanes[0]} on")
        told = "; ".join(lines)
        return KernelError(f"threads wait for others that do not come: {told}; {self.program.name[:80]}")

    # ------------------------------------------------------------ meetings

    def _meet(self, one: Instruction, who: Any, n: int) -> None:
        """What threads do at an instruction that all of their warp, or block, have come to."""
        if not _of_block(one) and (self.threads % WARP or one.args[-1] not in EVERYONE):
            raise UnknownFormError(f"{one.text} in a block of {self.threads} threads")
        if one.form == "bar.sync" and one.args == ("0",):
            self._in_order("block", who)
        elif one.form == "bar.warp.sync":
            self._in_order("warp", who)
        elif one.form == "shfl.sync.bfly.b32":  # makes threads wait, and orders nothing
            target, source, mask, clamp, _ = one.args
            if clamp != "31":
                raise UnknownFormError(one.text)
            values = self.get(source, who).reshape(-1, WARP)
            mask = self._mask(mask, who).reshape(-1, WARP) if mask in self.program.registers else int(mask, 0)
            found = np.take_along_axis(values, np.arange(WARP) ^ (mask & 31) + np.zeros_like(values, "i8"), 1)
            self.put(target, who, found.ravel().view(self.program.registers[target]))
        elif one.form == "vote.sync.all.pred":
            target, source, _ = one.args
            flags = self.get(source, who).reshape(-1, WARP)
            self.put(target, who, np.repeat(flags.all(1), WARP))
        else:
            raise UnknownFormError(one.text)

    def _mask(self, name: str, who: Any) -> np.ndarray:
        return self.get(name, who).view("u4").astype("i8")

    def _in_order(self, what: str, who: Any) -> None:
        if self.log is not None:
            self.log.met(what, who)


def _of_block(one: Instruction) -> bool:
    return one.form == "bar.sync"
