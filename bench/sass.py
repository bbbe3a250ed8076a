"""Machine code of the kernels, read without a GPU.

    python -m bench.sass

Prints, for each kernel and architecture, the instructions of its one function by kind.
"""

from __future__ import annotations

import collections
import functools
import re
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

import cutlass

from cute_quant.compile import ARCHITECTURES, build
from cute_quant.formats import make_format
from cute_quant.kernels.quantize import Quantize

INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][\w.]*)(.*?);", re.M)
RESOURCE = re.compile(r"(REG|STACK|SHARED|LOCAL):(\d+)")


@dataclass(frozen=True)
class MachineCode:
    """Disassembly of one kernel.

    Attributes:
        opcodes: mnemonics with modifiers, in order, padding left out.
        text: the listing.
        registers: a thread.
        stack: bytes a thread; spilled registers live there.
        shared: bytes a CTA.
    """

    opcodes: tuple[str, ...]
    text: str
    registers: int
    stack: int
    shared: int

    def count(self, *prefixes: str) -> int:
        """Instructions whose mnemonic is a prefix or goes on after it with a dot."""
        return sum(
            op == prefix or op.startswith(prefix + ".")
            for op in self.opcodes
            for prefix in prefixes
        )


@functools.cache
def machine_code(kernel_class: type, arch: str, *choices: object) -> MachineCode:
    """Compile ``kernel_class(*choices)`` for `arch` and disassemble it."""
    with tempfile.TemporaryDirectory() as directory:
        compiled = build(kernel_class(*choices), arch, "--keep-cubin", f"--dump-dir {directory}")
        cubin = Path(directory) / "kernel.cubin"
        cubin.write_bytes(compiled.__cubin__)
        text = _run("nvdisasm", "-c", str(cubin))
        usage = dict(RESOURCE.findall(_run("cuobjdump", "--dump-resource-usage", str(cubin))))
    opcodes = [op for op, _ in INSTRUCTION.findall(text)]
    while opcodes[-1] == "NOP" or opcodes[-1] == "BRA":  # what pads the end to a cache line
        opcodes.pop()
    return MachineCode(
        tuple(opcodes), text, int(usage["REG"]), int(usage["STACK"]), int(usage["SHARED"])
    )


def _run(tool: str, *arguments: str) -> str:
    """Output of one of NVIDIA's binary utilities, as their PyPI packages install them."""
    path = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin" / tool
    return subprocess.run(
        [path if path.exists() else tool, *arguments], check=True, capture_output=True, text=True
    ).stdout


def main() -> None:
    for scale_format, round_scale in (("ue8m0", False), ("float32", False), ("float32", True)):
        for dtype in (cutlass.BFloat16, cutlass.Float16):
            for arch in ARCHITECTURES.values():
                fmt = make_format(128, scale_format, round_scale)
                code = machine_code(Quantize, arch, dtype, fmt)
                kinds = collections.Counter(op.split(".")[0] for op in code.opcodes)
                rounded = " rounded" if round_scale else ""
                print(
                    f"{dtype.__name__} -> {scale_format}{rounded}, {arch}: "
                    f"{len(code.opcodes)} instructions, {code.registers} registers, "
                    f"{code.stack} bytes of stack, {code.shared} of shared memory"
                )
                memory = [op for op in code.opcodes if op.startswith(("LDG", "STG"))]
                print("   ", " ".join(memory))
                print("   ", ", ".join(f"{n} {kind}" for kind, n in kinds.most_common()))
                sys.stdout.flush()


if __name__ == "__main__":
    main()
