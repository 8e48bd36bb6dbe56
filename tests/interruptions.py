"""Exceptions between any two instructions of Python code, as signal handlers raise them."""

from __future__ import annotations

import random
import sys


class Interrupted(Exception):  # noqa: N818
    """What a signal handler might raise."""


def interrupted(call, at):
    """Call something, and raise when its code is about to run its instruction number `at`; None for never.

    How many instructions it has begun, and whether it was interrupted. What is written in C has none.
    """
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        frame.f_trace_opcodes = True
        if event == "opcode":
            count += 1
            if count == at:
                raise Interrupted
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except Interrupted:
        return count, True
    finally:
        sys.settrace(before)
    return count, False


def moments(call, last=100, others=50):
    """Numbers of instructions at which to interrupt: the last ones of a call, and some of the others."""
    total, _ = interrupted(call, None)
    early = range(1, max(total - last, 1))
    return [*random.Random(0).sample(early, min(others, len(early))), *range(max(total - last, 1), total + 1)]
