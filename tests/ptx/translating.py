"""Basic blocks as Python functions, each of which does an instruction's work for all threads at once.

A function gets the run, the threads that are in the block (None for all) and how many these are, and returns
the number of the block that comes next: one for all, or one for each thread. What later blocks need of
registers is put down at a block's end; within it, registers are Python's local variables.
"""

from __future__ import annotations

import marshal
import re
from typing import Any

import numpy as np

from .arithmetic import FORMS, joined
from .faults import UnknownFormError
from .parsing import MEETINGS, TYPES, Instruction, Kernel

END = 1 << 30  # the number of the block that comes after a kernel

SPECIAL = {f"%{name}.x": name for name in ("tid", "ctaid", "ntid", "nctaid")} | {"%laneid": "laneid"}
_PLACE = re.compile(r"\[([%\w]+)((?:[+-]\d+)?)\]")


class Program(Kernel):
    """A kernel that can be run. Pickled, it has its functions' code with it."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.kept = self._kept()
        self._constants: dict[str, Any] = {}
        self._forms: dict[str, str] = {}  # the functions of which forms go by which names
        lines = []
        for number, block in enumerate(self.blocks):
            for one in block:
                if one.operation != "bra" and one.guard:
                    raise UnknownFormError(one.text)
            if not self.meets_at(number):
                made = Translation(self, number)
                lines += made.lines
                self._constants |= made.constants
                self._forms |= made.forms
        self._code = marshal.dumps(compile("\n".join(lines), f"<{self.name[:60]}>", "exec"))
        self._functions: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_functions": {}}

    def meets_at(self, block: int) -> bool:
        """Whether threads wait for each other in a block, which is then that instruction and no more."""
        return self.blocks[block][0].operation in MEETINGS

    def function(self, block: int) -> Any:
        """The function of a block."""
        if not self._functions:
            forms = {name: FORMS[form].function for name, form in self._forms.items()}
            self._functions = {"choose": choose, "np": np, "joined": joined, **self._constants, **forms}
            exec(marshal.loads(self._code), self._functions)
        return self._functions[f"block_{block}"]

    def _kept(self) -> set[str]:
        """The registers that some block finds as an earlier one has left them."""
        blocks_of: dict[str, set[int]] = {}
        early: set[str] = set()
        for number, block in enumerate(self.blocks):
            written: set[str] = set()
            for one in block:
                read, wrote = self.uses(one)
                early.update(name for name in read if name not in written)
                written.update(wrote)
                for name in (*read, *wrote):
                    blocks_of.setdefault(name, set()).add(number)
        return early | {name for name, where in blocks_of.items() if len(where) > 1}

    def uses(self, one: Instruction) -> tuple[list[str], list[str]]:
        """Which registers an instruction reads and writes."""
        groups = [self.names_in(arg) for arg in one.args]
        writes = one.operation not in ("st", "bra", "ret", "bar")
        if writes and not one.args:
            raise UnknownFormError(one.text)
        wrote, groups = (groups[0], groups[1:]) if writes else ([], groups)
        read = [name for group in groups for name in group]
        return [*read, *([one.guard[0]] if one.guard else [])], wrote


class Translation:
    """The function of one block, as lines of Python."""

    def __init__(self, program: Program, number: int) -> None:
        self.program = program
        self.constants: dict[str, Any] = {}
        self.forms: dict[str, str] = {}
        self.lines = [f"def block_{number}(run, who, n):"]
        self._types: dict[str, np.dtype] = {}  # of the local variables
        self._changed: set[str] = set()
        following = number + 1 if number + 1 < len(program.blocks) else END
        after = str(following)
        for k, self._one in enumerate(program.blocks[number], program.starts[number]):
            self._key = k
            if self._one.operation == "ret":
                after = str(END)
            elif self._one.operation == "bra":
                after = self._branch(following)
            else:
                self._statement()
        for name in sorted(self._changed & program.kept):
            self._emit(f"run.put({name!r}, who, {self._cast(name, program.registers[name])})")
        self._emit(f"return {after}")

    def _emit(self, line: str) -> None:
        self.lines.append(f"    {line}")

    def _branch(self, following: int) -> str:
        one = self._one
        if one.form not in ("bra", "bra.uni") or one.args[0] not in self.program.labels:
            raise UnknownFormError(one.text)
        target = self.program.labels[one.args[0]]
        if one.guard is None:
            return str(target)
        name, negated = one.guard
        yes, no = (following, target) if negated else (target, following)
        return f"choose({self._operand(name, 'pred')}, {yes}, {no})"

    # ------------------------------------------------------------ operands and results

    def _operand(self, arg: str, kind: str, loose: bool = False) -> str:
        """An argument as an expression of a type; with `loose` its register may be a wider one."""
        wanted = TYPES[kind]
        if arg in self.program.registers:
            if arg not in self._types:
                self._types[arg] = self.program.registers[arg]
                self._emit(f"{local(arg)} = run.get({arg!r}, who)")
            return self._cast(arg, wanted, loose)
        if arg in SPECIAL:
            if wanted != np.dtype("u4"):
                raise UnknownFormError(self._one.text)
            return f"run.special({SPECIAL[arg]!r}, who)"
        return self._constant(arg, wanted)

    def _constant(self, arg: str, wanted: np.dtype) -> str:
        program = self.program
        if arg in program.shared:
            bits = program.shared[arg]
        elif re.fullmatch("0f[0-9A-Fa-f]{8}|0d[0-9A-Fa-f]{16}", arg):
            bits = int(arg[2:], 16)
            if 2 * wanted.itemsize != len(arg) - 2:
                raise UnknownFormError(self._one.text)
        elif re.fullmatch(r"-?\d+|0x[0-9A-Fa-f]+", arg.rstrip("U")):
            bits = int(arg.rstrip("U"), 0)
        else:
            raise UnknownFormError(self._one.text)
        if wanted.kind == "b":
            value = np.bool_(bits)
        else:
            size = wanted.itemsize
            value = np.array(bits % (1 << 8 * size), f"u{size}").view(wanted)[()]
        name = f"c_{wanted.kind}{wanted.itemsize}_{value.tobytes().hex()}"
        self.constants[name] = value
        return name

    def _cast(self, name: str, wanted: np.dtype, loose: bool = False) -> str:
        """A local variable's bits, or as many of the lowest ones as there are, as another type."""
        own, text = self._types[name], local(name)
        if own == wanted:
            return text
        fits = own.itemsize >= wanted.itemsize if loose else own.itemsize == wanted.itemsize
        if "b" in (own.kind, wanted.kind) or not fits:
            raise UnknownFormError(self._one.text)
        if own.itemsize > wanted.itemsize:
            text, own = f"{self._as(text, own, f'u{own.itemsize}')}.astype('u{wanted.itemsize}')", None
        return self._as(text, own, wanted.str[1:])

    @staticmethod
    def _as(text: str, own: np.dtype | None, code: str) -> str:
        return text if own is not None and own.str[1:] == code else f"{text}.view('{code}')"

    def _assign(self, name: str, text: str, kind: str, widen: bool = False) -> None:
        """A value of a type goes to a register; with `widen` that may be wider."""
        given, own = TYPES[kind], self.program.registers[name]
        if given.itemsize < own.itemsize and widen and given.kind != "b":
            sign = "i" if given.kind == "i" else "u"
            if given.kind == "f":
                text = f"{text}.view('u{given.itemsize}')"
            given = np.dtype(f"{sign}{own.itemsize}")
            text = f"{text}.astype('{given.str[1:]}')"
        if given.itemsize != own.itemsize or (given.kind == "b") != (own.kind == "b"):
            raise UnknownFormError(self._one.text)
        self._emit(f"{local(name)} = {text}")
        self._types[name] = given
        self._changed.add(name)

    # ------------------------------------------------------------ instructions

    def _statement(self) -> None:
        one = self._one
        if one.operation in ("ld", "st"):
            self._access()
        elif one.operation == "mov" and "{" in "".join(one.args):
            self._pack()
        elif one.form in FORMS:
            form = FORMS[one.form]
            if len(one.args) != 1 + len(form.operands) or one.args[0] not in self.program.registers:
                raise UnknownFormError(one.text)
            function = "f_" + one.form.replace(".", "_")
            self.forms[function] = one.form
            loose = one.operation == "cvt"
            pairs = zip(one.args[1:], form.operands, strict=True)
            operands = [self._operand(arg, kind, loose) for arg, kind in pairs]
            text = f"{function}({', '.join(operands)})"
            if not any(a in self.program.registers or a in SPECIAL for a in one.args[1:]):
                text = f"np.full(n, {text})"
            self._assign(one.args[0], text, form.result, loose)
        else:
            raise UnknownFormError(one.text)

    def _pack(self) -> None:
        """Two halves become one register, or one becomes two, either of which may be nobody's."""
        (target, source), one = self._one.args, self._one
        kind = one.form.split(".", 1)[1]
        if kind not in ("b32", "b64"):
            raise UnknownFormError(one.text)
        bits = int(kind[1:]) // 2
        if source[0] == "{":
            halves = (self._operand(name.strip(), f"b{bits}") for name in source[1:-1].split(","))
            self._assign(target, f"joined({', '.join(halves)})", kind)
            return
        whole = self._operand(source, kind)
        self._emit(f"whole = {whole}")
        for k, name in enumerate(target[1:-1].split(",")):
            if name.strip() != "_":
                self._assign(name.strip(), f"(whole >> {bits * k}).astype('u{bits // 8}')", f"b{bits}")

    def _access(self) -> None:
        one, program = self._one, self.program
        found = re.fullmatch(r"(ld|st)\.(global|shared|param)(\.v[24])?\.([bufs]\d+)", one.form)
        if found is None or found[4] == "f16":
            raise UnknownFormError(one.text)
        what, space, _, kind = found.groups()
        place, names = one.args if what == "st" else one.args[::-1]
        names = [name.strip() for name in names.strip("{}").split(",")]
        if len(names) != int((found[3] or ".v1")[2:]):
            raise UnknownFormError(one.text)
        base, offset = _PLACE.fullmatch(place.replace("+-", "-")).groups()
        if space == "param":
            self._parameter(base, offset, names, what)
            return
        if base in program.registers:
            where = self._operand(base, "s64") + (f" + {int(offset)}" if offset else "")
        else:
            where = f"np.full(n, {program.shared[base] + int(offset or 0)}, 'i8')"
        size = TYPES[kind].itemsize
        if what == "st":
            values = [self._operand(name, f"b{8 * size}", True) for name in names]
            self._emit(f"run.store_{space}({self._key}, {where}, who, {size}, [{', '.join(values)}])")
            return
        self._emit(f"got = run.load_{space}({self._key}, {where}, who, {size}, {len(names)})")
        for k, name in enumerate(names):
            self._assign(name, self._as(f"got[{k}]", np.dtype(f"u{size}"), TYPES[kind].str[1:]), kind, True)

    def _parameter(self, base: str, offset: str, names: list[str], what: str) -> None:
        numbers = [k for k, (_, name) in enumerate(self.program.params) if name == base]
        if what == "st" or offset or len(names) != 1 or not numbers:
            raise UnknownFormError(self._one.text)
        self._assign(names[0], f"run.param({numbers[0]}, n)", self.program.params[numbers[0]][0])


def local(name: str) -> str:
    """A register's name as Python's."""
    return name.replace("%", "r_")


def choose(flag: Any, yes: int, no: int) -> Any:
    """Where threads go: a number if all go to one place."""
    if flag.all():
        return yes
    return np.where(flag, yes, no) if flag.any() else no
