"""Compile and disassemble kernels without a GPU, and compare the result with the limits of GPUs."""

from __future__ import annotations

import functools
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cute_quant.jit.lookup import build, kernel
from cute_quant.kernels.config import LANES, Spec
from cute_quant.lab import binary_utilities

INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P(?:\d+|T)\s+)?([A-Z][\w.]*).*?;", re.MULTILINE
)
"""A line of SASS: address, predicate if any, mnemonic. PT and UPT are the constant predicates."""
RESOURCE = re.compile(r"(REG|STACK|SHARED|LOCAL):(\d+)")

SCHEDULERS_PER_SM = 4
WARPS_PER_SM = 64
CTAS_PER_SM = 32
REGISTERS_PER_SM = 65536
REGISTERS_AT_ONCE = 8
"""Registers of a thread are allocated in multiples of this number."""


@dataclass(frozen=True)
class Gpu:
    """Limits of a GPU of an architecture, from its data sheet.

    Attributes:
        clock: cycles a second under load.
        bandwidth: bytes a second from and to memory.
        widest_load: bytes that an instruction loads for a thread.
    """

    name: str
    sms: int
    clock: float
    bandwidth: float
    widest_load: int

    def issue_budget(self, bytes_per_warp: float) -> int:
        """Return the instructions that a warp may issue while memory moves its bytes."""
        warps = self.bandwidth / bytes_per_warp
        return round(self.sms * SCHEDULERS_PER_SM * self.clock / warps)


GPUS = {
    "sm_90a": Gpu("H100", sms=132, clock=1.98e9, bandwidth=3.35e12, widest_load=16),
    "sm_100a": Gpu("B200", sms=148, clock=1.9e9, bandwidth=7.67e12, widest_load=32),
}


@dataclass(frozen=True)
class MachineCode:
    """Disassembly of one kernel.

    Attributes:
        opcodes: mnemonics with modifiers, in order, padding left out.
        text: the listing.
        registers: registers of a thread.
        stack: bytes of a thread's stack, to which registers are spilled.
        shared: bytes of shared memory of a CTA.
    """

    opcodes: tuple[str, ...]
    text: str
    registers: int
    stack: int
    shared: int

    def count(self, *prefixes: str) -> int:
        """Return the number of instructions whose opcode is a prefix, or a prefix and modifiers."""
        return sum(
            op == prefix or op.startswith(prefix + ".")
            for op in self.opcodes
            for prefix in prefixes
        )

    def resident_warps(self, warps_per_cta: int) -> int:
        """Return the resident warps of an SM, for CTAs of this many."""
        registers = -(-self.registers // REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE
        warps = min(WARPS_PER_SM, REGISTERS_PER_SM // (registers * LANES))
        return min(warps // warps_per_cta, CTAS_PER_SM) * warps_per_cta


@functools.cache
def machine_code(spec: Spec, arch: str) -> MachineCode:
    """Compile the kernel of `spec` for `arch`, a value of ``ARCHITECTURES``, and disassemble it."""
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
        usage = binary_utilities.run("cuobjdump", "--dump-resource-usage", cubin)
    resources = dict(RESOURCE.findall(usage))
    return MachineCode(
        opcodes(text),
        text,
        int(resources["REG"]),
        int(resources["STACK"]),
        int(resources["SHARED"]),
    )


def opcodes(text: str) -> tuple[str, ...]:
    """Return the mnemonics of a listing with their modifiers, without the padding at its end."""
    found = INSTRUCTION.findall(text)
    while found and found[-1] in ("NOP", "BRA"):  # the end is padded to a cache line
        found.pop()
    return tuple(found)
