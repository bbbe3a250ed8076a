"""PTX text to instructions (PTX ISA 4 "Syntax", 5.4 "Variables", 6 "Instruction Operands").

Parsing knows the shape of PTX and nothing of what an instruction does. Registers are named and
sized, operands are typed by their syntax, labels are resolved to indices of instructions.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from cute_quant.emulator.errors import EmulatorError

PREDICATE = 1
"""Width of a predicate register; others have 8, 16, 32 or 64 bits."""

LABEL_LENGTH = 40
"""Most characters of a kernel's name in a message."""

_WIDTHS = {"pred": PREDICATE} | {
    f"{kind}{bits}": bits for kind in "busf" for bits in (8, 16, 32, 64)
}
_SPECIAL = re.compile(r"%(?:tid|ntid|ctaid|nctaid)\.[xyz]|%laneid|%warpid")


@dataclass(frozen=True)
class Register:
    """A register of a thread, of `width` bits; a predicate may be negated, as in ``!%p``."""

    name: str
    width: int
    negated: bool = False


@dataclass(frozen=True)
class Special:
    """A special register, PTX ISA 10."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """An integer, or the bits of a float of `float_width` bits, which is 0 for integers."""

    value: int
    float_width: int = 0


@dataclass(frozen=True)
class Symbol:
    """The name of a label, of a parameter or of a variable."""

    name: str


@dataclass(frozen=True)
class Sink:
    """The operand ``_``: a result that is dropped."""


@dataclass(frozen=True)
class Vector:
    """Operands in braces, which one instruction packs, unpacks, loads or stores."""

    elements: tuple[object, ...]


@dataclass(frozen=True)
class Pair:
    """The operand ``a|b``: a result, and a predicate that is a second one."""

    first: object
    second: object


@dataclass(frozen=True)
class Address:
    """An operand in brackets: a register or a symbol, and bytes added to it."""

    base: object
    offset: int


@dataclass(frozen=True)
class Instruction:
    """An instruction, with its opcode whole and its line in the module.

    Attributes:
        opcode: with all modifiers.
        operands: in the order of the text, the result first.
        guard: the predicate that it depends on.
        line: of the module, from 1 on.
        text: as messages show it.
    """

    opcode: str
    operands: tuple[Any, ...]
    guard: Register | None
    line: int
    text: str


@dataclass(frozen=True)
class Parameter:
    """A parameter of a kernel, its size and alignment in bytes."""

    name: str
    size: int
    alignment: int


@dataclass(frozen=True)
class Variable:
    """A variable of shared or local memory, its size and alignment in bytes."""

    name: str
    size: int
    alignment: int


@dataclass
class Kernel:
    """An entry of a module.

    Attributes:
        name: of the entry.
        target: architecture, such as sm_90a.
        parameters: in their order.
        block: the threads that a block must have (.reqntid), None for any.
        max_threads: the most threads of a block (.maxntid), None for any.
        instructions: in the order of the text.
        labels: to the index of the instruction that follows.
        local: from a variable of a thread to its offset.
        local_size: bytes of a thread's variables.
        shared: variables of a block.
    """

    name: str
    target: str
    parameters: list[Parameter]
    block: tuple[int, int, int] | None
    max_threads: int | None
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    local: dict[str, int] = field(default_factory=dict)
    local_size: int = 0
    shared: list[Variable] = field(default_factory=list)

    @property
    def label(self) -> str:
        """Return a short name for messages: CuTe DSL puts the types of all arguments into names."""
        mangled = re.fullmatch(r"(?:kernel_cutlass_)?(\w+?)_object_at_\w*?(_\d+)?", self.name)
        return (mangled[1] + (mangled[2] or "") if mangled else self.name)[-LABEL_LENGTH:]


def parse(text: str) -> dict[str, Kernel]:
    """Return the kernels of a PTX module, by name.

    Raises:
        EmulatorError: `text` is no PTX, or has a construct that is not known.
    """
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.DOTALL)
    text = re.sub(r"//[^\n]*", "", text)
    target = re.search(r"\.target\s+(\w+)", text)
    if target is None:
        raise EmulatorError("no .target directive: not a PTX module")
    kernels = {}
    header = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{")
    position = 0
    while match := header.search(text, position):
        parameters = [_parameter(p) for p in match[2].split(",") if p.strip()]
        limit = _extents("maxntid", match[3])
        kernel = Kernel(
            match[1],
            target[1],
            parameters,
            _extents("reqntid", match[3]),
            limit and math.prod(limit),  # 11.4.2: of the extents, the product alone counts
        )
        position = _Body(text, match.end(), kernel).parse()
        kernels[kernel.name] = kernel
    return kernels


def _extents(directive: str, text: str) -> tuple[int, int, int] | None:
    """Return what a directive of PTX ISA 11.4 says of blocks, None where it is missing."""
    match = re.search(rf"\.{directive}\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", text)
    if match is None:
        return None
    x, y, z = (int(n or 1) for n in match.groups())
    return x, y, z


def _parameter(text: str) -> Parameter:
    match = re.fullmatch(
        r"\s*\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\S*\s+.*?)?([\w$]+)(?:\[(\d+)\])?\s*",
        text,
    )
    if match is None or match[2] not in _WIDTHS:
        raise EmulatorError(f"parameter not understood: {text.strip()!r}")
    size = _WIDTHS[match[2]] // 8
    return Parameter(match[3], size * int(match[4] or 1), int(match[1] or size))


class _Body:
    """Parses the statements between a kernel's braces."""

    def __init__(self, text: str, position: int, kernel: Kernel):
        self.text = text
        self.position = position
        self.kernel = kernel
        self.scopes: list[dict[str, Register]] = [{}]
        self.scope_count = 0

    def parse(self) -> int:
        """Fill the kernel, and return the position after its closing brace."""
        while True:
            if self._match(r"\s+") or self._match(r"\.loc\b[^\n]*"):
                continue
            if self._match(r"\}"):
                self.scopes.pop()
                if not self.scopes:
                    return self.position
            elif self._match(r"\{"):
                self.scope_count += 1
                self.scopes.append({})
            elif label := self._match(r"([$%\w]+)\s*:(?!:)"):
                self.kernel.labels[label[1]] = len(self.kernel.instructions)
            else:
                line = self.text.count("\n", 0, self.position) + 1
                statement = self._match(r"[^;]*;")
                if statement is None:
                    raise EmulatorError(f"line {line} of {self.kernel.label}: no end of statement")
                self._statement(" ".join(statement[0][:-1].split()), line)

    def _match(self, pattern: str) -> re.Match[str] | None:
        match = re.compile(pattern).match(self.text, self.position)
        if match:
            self.position = match.end()
        return match

    def _statement(self, text: str, line: int) -> None:
        if text.startswith(".reg "):
            self._declare(text)
        elif text.startswith(".local "):
            self._declare_local(self._variable(text))
        elif text.startswith(".shared "):
            self.kernel.shared.append(self._variable(text))
        elif text.startswith(".pragma "):
            pass  # PTX ISA 11.4: pragmas are hints and leave semantics alone
        else:
            match = re.fullmatch(r"(?:@(!?)([%\w$]+) )?([a-z][\w.:]*)(?: (.*))?", text)
            if match is None:
                raise EmulatorError(f"line {line} of {self.kernel.label}: not understood: {text!r}")
            guard = self._register(match[2], bool(match[1]), line) if match[2] else None
            operands = tuple(self._operand(o, line) for o in _split(match[4] or ""))
            # The DSL's names of parameters begin with that of the kernel, which is long.
            shown = text.replace(f"{self.kernel.name}_param", "param")
            instruction = Instruction(match[3], operands, guard, line, shown)
            self.kernel.instructions.append(instruction)

    def _variable(self, text: str) -> Variable:
        """Return a scalar or an array of one dimension, without initial values (PTX ISA 5.4)."""
        match = re.fullmatch(r"\.\w+ (?:\.align (\d+) )?\.(\w+) ([\w$]+)(?:\[(\d+)\])?", text)
        if match is None or match[2] not in _WIDTHS:
            raise EmulatorError(f"{self.kernel.label}: declaration not understood: {text!r}")
        size = _WIDTHS[match[2]] // 8
        return Variable(match[3], size * int(match[4] or 1), int(match[1] or size))

    def _declare_local(self, variable: Variable) -> None:
        offset = -(-self.kernel.local_size // variable.alignment) * variable.alignment
        self.kernel.local[variable.name] = offset
        self.kernel.local_size = offset + variable.size

    def _declare(self, text: str) -> None:
        match = re.fullmatch(r"\.reg \.(\w+) (.*)", text)
        if match is None or match[1] not in _WIDTHS:
            raise EmulatorError(f"{self.kernel.label}: declaration not understood: {text!r}")
        for name in match[2].split(","):
            ranged = re.fullmatch(r"\s*([%\w$]+)<(\d+)>\s*", name)
            names = [f"{ranged[1]}{i}" for i in range(int(ranged[2]))] if ranged else [name.strip()]
            # A nested scope may reuse a name of an outer one for another register.
            suffix = f"@{self.scope_count}" if len(self.scopes) > 1 else ""
            for n in names:
                self.scopes[-1][n] = Register(n + suffix, _WIDTHS[match[1]])

    def _register(self, name: str, negated: bool, line: int) -> Register:
        for scope in reversed(self.scopes):
            if name in scope:
                register = scope[name]
                return Register(register.name, register.width, negated)
        raise EmulatorError(f"line {line} of {self.kernel.label}: register {name} is not declared")

    def _operand(self, text: str, line: int) -> object:
        if text == "_":
            return Sink()
        if text.startswith("{"):
            return Vector(tuple(self._operand(o, line) for o in _split(text[1:-1])))
        if text.startswith("["):
            match = re.fullmatch(r"\[ ?([%\w$]+) ?(?:\+ ?(-?\w+) ?)?\]", text)
            if match is None:
                raise EmulatorError(f"line {line} of {self.kernel.label}: not understood: {text!r}")
            return Address(self._operand(match[1], line), int(match[2] or "0", 0))
        if "|" in text:
            return Pair(*(self._operand(o.strip(), line) for o in text.split("|")))
        if immediate := _immediate(text):
            return immediate
        if _SPECIAL.fullmatch(text):
            return Special(text)
        if text.startswith(("%", "!")) or any(text in scope for scope in self.scopes):
            return self._register(text.lstrip("!"), text.startswith("!"), line)
        return Symbol(text)


def _split(text: str) -> list[str]:
    """Split at the commas outside of braces and brackets."""
    parts = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text)
    return [part.strip() for part in parts if part.strip()]


def _immediate(text: str) -> Immediate | None:
    """Return the constant that `text` is, None if it is none (PTX ISA 4.5)."""
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
        return Immediate(int(match[1], 16), 32)
    if match := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
        return Immediate(int(match[1], 16), 64)
    if re.fullmatch(r"-?(?:0[xX][0-9a-fA-F]+|0[bB][01]+|[1-9]\d*|0)U?", text):
        return Immediate(int(text.rstrip("U"), 0))
    return None
