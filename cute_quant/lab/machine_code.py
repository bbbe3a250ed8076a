"""Compile and disassemble kernels without a GPU, and compare the result with the limits of GPUs."""

from __future__ import annotations

import functools
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cute_quant.jit.lookup import build, kernel
from cute_quant.kernels import architectures
from cute_quant.kernels.architectures import (
    B200,
    H100,
    REGISTERS_AT_ONCE,
    REGISTERS_PER_SM,
    Architecture,
)
from cute_quant.kernels.config import LANES, Spec
from cute_quant.lab import binary_utilities

INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P(?:\d+|T)\s+)?([A-Z][\w.]*).*?;", re.MULTILINE
)
"""A line of SASS: address, predicate if any, mnemonic. PT and UPT are the constant predicates."""
ENCODING = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/\s*$", re.MULTILINE)
"""The upper half of an instruction's 128 bits, on a line of its own."""
RESOURCE = re.compile(r"(REG|STACK|SHARED|LOCAL):(\d+)")

EXAMINED = {a.name: a for a in architectures.ARCHITECTURES if a.gpu in (H100, B200)}
"""Architectures that layouts are drawn and counted for, one of each width of loads."""


class Control(NamedTuple):
    """How a warp goes on from an instruction, as the assembler has encoded it.

    Attributes:
        stall: cycles until the next instruction can issue.
        sets: scoreboard that is released when the result is there, None for an instruction of fixed
            latency, which the stalls account for.
        waits: scoreboards that have to be released before the instruction issues.
    """

    stall: int
    sets: int | None
    waits: tuple[int, ...]


@dataclass(frozen=True)
class MachineCode:
    """Disassembly of one kernel.

    Attributes:
        opcodes: mnemonics with modifiers, in order, padding left out.
        text: the listing.
        registers: registers of a thread.
        stack: bytes of a thread's stack, to which registers are spilled.
        shared: bytes of shared memory of a CTA.
        controls: one of each opcode.
    """

    opcodes: tuple[str, ...]
    text: str
    registers: int
    stack: int
    shared: int
    controls: tuple[Control, ...] = ()

    def count(self, *prefixes: str) -> int:
        """Return the number of instructions whose opcode is a prefix, or a prefix and modifiers."""
        return sum(
            op == prefix or op.startswith(prefix + ".")
            for op in self.opcodes
            for prefix in prefixes
        )

    def resident_warps(self, warps_per_cta: int, architecture: Architecture) -> int:
        """Return the warps of such CTAs that an SM has registers and places for."""
        registers = -(-self.registers // REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE
        warps = min(architecture.warps, REGISTERS_PER_SM // (registers * LANES))
        return min(warps // warps_per_cta, architecture.ctas) * warps_per_cta


@functools.cache
def machine_code(spec: Spec, arch: str) -> MachineCode:
    """Compile the kernel of `spec` for a target of `architectures`, and disassemble it."""
    return disassemble(kernel(spec), arch)


def disassemble(kernel: Any, arch: str) -> MachineCode:
    """Compile and disassemble a kernel as `lookup.build` takes it.

    Raises:
        FileNotFoundError: nvdisasm or cuobjdump is not installed.
    """
    with tempfile.TemporaryDirectory() as directory:
        compiled = build(kernel, arch, "--keep-cubin", f"--dump-dir {directory}")
        cubin = Path(directory) / "kernel.cubin"
        cubin.write_bytes(compiled.__cubin__)
        text = binary_utilities.run("nvdisasm", "-c", cubin)
        encoded = binary_utilities.run("nvdisasm", "-c", "-hex", cubin)
        usage = binary_utilities.run("cuobjdump", "--dump-resource-usage", cubin)
    resources = dict(RESOURCE.findall(usage))
    names = opcodes(text)
    return MachineCode(
        names,
        text,
        int(resources["REG"]),
        int(resources["STACK"]),
        int(resources["SHARED"]),
        controls(encoded)[: len(names)],
    )


def opcodes(text: str) -> tuple[str, ...]:
    """Return the mnemonics of a listing with their modifiers, without the padding at its end."""
    found = INSTRUCTION.findall(text)
    while found and found[-1] in ("NOP", "BRA"):  # the end is padded to a cache line
        found.pop()
    return tuple(found)


def controls(text: str) -> tuple[Control, ...]:
    """Return the control bits of a listing with encodings, also of the padding at its end.

    They are bits 105 to 121 of an instruction, on every architecture since Volta: four of the
    stall, one of a hint, three each of the scoreboards of its result and of its operands, and a
    mask of six scoreboards. Scoreboard 7 is none.
    """
    found = []
    for upper in ENCODING.findall(text):
        bits = int(upper, 16) >> 41
        scoreboard, mask = bits >> 5 & 7, bits >> 11 & 63
        waits = tuple(i for i in range(6) if mask >> i & 1)
        found.append(Control(bits & 15, None if scoreboard == 7 else scoreboard, waits))
    return tuple(found)
