"""Run kernels without a GPU: their PTX, launched by their host code, on CPU tensors.

    from cute_quant import emulator

    kernel = emulator.compile(MyKernel(), "sm_100a")
    kernel(x, q, sf, outputs=(q, sf))

Every instruction that the kernels of this package compile to has semantics here; one that is not
known is an error and not a guess. Memory is checked byte by byte: accesses outside of tensors,
misaligned ones, reads of what nothing wrote, and races between threads raise. Needs numpy, CuTe DSL
and a C compiler.
"""

from cute_quant.emulator.errors import (
    Deadlock,
    EmulatorError,
    MemoryFault,
    UndefinedValue,
    UnknownInstruction,
)
from cute_quant.emulator.kernel import EmulatedKernel, compile

__all__ = [
    "Deadlock",
    "EmulatedKernel",
    "EmulatorError",
    "MemoryFault",
    "UndefinedValue",
    "UnknownInstruction",
    "compile",
]
