"""Small kernels for the interpreter's own tests: their PTX, and what they are run with."""

from __future__ import annotations

from typing import Any

import numpy as np

from .memory import DeviceMemory
from .scheduling import Run
from .translating import Program

HEAD = """.version 9.0
.target sm_90
.address_size 64
{shared}
.visible .entry small(
	.param .u64 small_0{more}
)
{{
	.reg .pred %p<20>;
	.reg .b16 %rs<20>;
	.reg .b32 %r<20>;
	.reg .b64 %rd<20>;
	.reg .f32 %f<20>;
	.reg .f64 %fd<20>;
	ld.param.u64 %rd1, [small_0];
	mov.u32 %r1, %tid.x;
	mov.u32 %r2, %ctaid.x;
	mul.wide.u32 %rd2, %r1, 8;
	add.s64 %rd3, %rd1, %rd2;
"""  # %rd3 is where the thread's own 8 bytes are


def program(body: str, shared: int = 0, params: int = 1) -> Program:
    """A kernel of these lines, which gets an address and perhaps more numbers."""
    declared = f".visible .shared .align 8 .b8 held[{shared}];" if shared else ""
    more = "".join(f",\n\t.param .u64 small_{k}" for k in range(1, params))
    lines = "".join(f"\t{line.strip()}\n" for line in body.strip().splitlines())
    return Program(HEAD.format(shared=declared, more=more) + lines + "\tret;\n}\n")


def run(found: Program, content: Any, threads: int = 32, blocks: int = 1, **options: Any) -> np.ndarray:
    """What memory holds after a launch that gets its address."""
    content = np.asarray(content)
    memory = DeviceMemory(0, 1 << 20)
    address = memory.allocate(content.nbytes)
    memory.view(address, content.nbytes)[:] = content.view(np.uint8).ravel()
    given = [address, *options.pop("more", [])]
    Run(found, blocks, threads, given, memory, **options).run()
    return memory.view(address, content.nbytes).copy().view(content.dtype).reshape(content.shape)
