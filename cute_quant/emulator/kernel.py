"""A kernel compiled for one architecture, launched by its own host code on CPU tensors."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cute_quant.emulator import arguments as argument_checks
from cute_quant.emulator import machine, ptx
from cute_quant.emulator.errors import EmulatorError
from cute_quant.emulator.host import C_COMPILER, DeviceTensor, HostFunction
from cute_quant.emulator.memory import Memory
from cute_quant.jit import lookup


class EmulatedKernel:
    """A compiled kernel whose calls run in the emulator.

    Attributes:
        kernel: the kernel that was compiled.
        text: its PTX.
        program: the decoded PTX that a call runs. Assign another one to run changed code.
        names: names of the kernel's arguments, in their order, without the stream.
        host: the exported host function. ``host.launches`` lists grids, blocks and arguments.
    """

    def __init__(self, kernel: Any, arch: str, directory: Path):
        self.kernel = kernel
        options = ("--keep-ptx", "--keep-cubin", f"--dump-dir {directory}")
        compiled = lookup.build(kernel, arch, *options)
        self.text = compiled.__ptx__
        self.program = load(self.text)
        if self.program.kernel.target != arch:
            raise EmulatorError(f"compiled for {self.program.kernel.target}, expected {arch}")
        *self.names, _ = list(inspect.signature(type(kernel).__call__).parameters)[1:]
        self.host = HostFunction(compiled, directory)

    def __call__(
        self,
        *arguments: Any,
        outputs: Sequence[torch.Tensor] = (),
        only: Sequence[tuple[int, int, int]] | None = None,
        watch: tuple[tuple[int, int, int], tuple[int, int, int]] | None = None,
        stream: int = 0,
    ) -> None:
        """Launch the kernel and run its grid to the end.

        Args:
            *arguments: the kernel's arguments without the stream. CPU tensors of any shape and
                strides stand for tensors on the device; results are written into them.
            outputs: those of the tensors, or views of them, that hold nothing before the launch.
                A kernel that reads their memory before it has written there is in error.
            only: blocks to run; all of the grid by default.
            watch: a block and a thread whose instructions are printed with their results.
            stream: the handle that the host code finds as the current stream.

        Raises:
            MemoryFault: a thread accesses memory outside of every tensor, misaligned, undefined,
                or memory that another thread accesses without an order between them.
            UndefinedValue: a result depends on a register that nothing has defined.
            Deadlock: threads wait for others that never come.
            EmulatorError: the launch is not one that a GPU would run as it stands.
            ValueError, TypeError: an argument is none that a kernel can take, or the host code
                refuses it.
        """
        argument_checks.check_arguments(self.names, arguments)
        argument_checks.check_outputs(outputs, self.names, arguments)
        argument_checks.check_selection(only, watch)
        memory = Memory()
        unwritten = {t.untyped_storage().data_ptr() for t in outputs}
        on_device = []
        for name, argument in zip(self.names, arguments, strict=True):
            if isinstance(argument, torch.Tensor):
                storage = argument.untyped_storage().data_ptr()
                # torch gives a tensor without elements the null pointer.
                written = storage not in unwritten
                address = memory.add(name, argument, written) if argument.numel() else 0
                argument = DeviceTensor(argument, address)
            on_device.append(argument)
        self.host(self.program, memory, *on_device, stream=stream, only=only, watch=watch)


def load(text: str) -> machine.Program:
    """Decode PTX that holds one kernel.

    Raises:
        UnknownInstruction: the emulator has no semantics for an instruction.
        EmulatorError: `text` cannot be parsed, or holds no or several kernels.
    """
    kernels = list(ptx.parse(text).values())
    if len(kernels) != 1:
        labels = ", ".join(kernel.label for kernel in kernels)
        raise EmulatorError(f"expected one kernel, got {len(kernels)}: {labels or 'none'}")
    return machine.Program(kernels[0])


def compile(kernel: Any, arch: str = "sm_100a") -> EmulatedKernel:
    """Compile a kernel, and return it as a function of CPU tensors that the emulator runs.

    Neither a GPU nor its driver is needed. A C compiler is, for the kernel's host code, which
    checks the arguments and computes the grid as it does on a GPU.

    Args:
        kernel: as the compiler of `cute_quant` takes it: ``signature()`` returns stand-ins for the
            arguments, ``__call__`` is jitted and launches, and the stream comes last.
        arch: the target, such as "sm_90a" or "sm_100f". The compiler assembles the PTX for it, and
            so refuses an instruction that it lacks.

    Returns:
        The compiled kernel.

    Raises:
        RuntimeError: there is no C compiler.
        TypeError: `kernel` is no such object, a class for instance.
        ValueError: `arch` is no target of `cute_quant.kernels`.
        EmulatorError: ``__call__`` launches several kernels.
        UnknownInstruction: the emulator has no semantics for an instruction of the kernel.

    Example:
        >>> kernel = emulator.compile(RopeQuantize(), "sm_90a")
        >>> kernel(x, cos, sin, q, sf, missing_rows, outputs=(q, sf))
    """
    if C_COMPILER is None:
        raise RuntimeError(
            "emulator: expected a C compiler, to link the host code of the kernel, got none; "
            "install gcc or clang"
        )
    # What is loaded stays when its file is gone.
    with tempfile.TemporaryDirectory(prefix="cute_quant_") as directory:
        return EmulatedKernel(kernel, arch, Path(directory))
