"""The quantizer's kernels under the emulator: compiled once, launched on CPU tensors."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from cute_quant import compile
from cute_quant.formats import Format, last_column_rows
from cute_quant.kernels.quantize import Quantize
from tests.emulator import machine, ptx
from tests.emulator.host import DeviceTensor, HostFunction
from tests.emulator.memory import Memory


class Kernel:
    """One kernel, compiled for one architecture.

    Attributes:
        text: its PTX.
        program: what runs; put another one here to plant an error.
    """

    def __init__(self, dtype: torch.dtype, fmt: Format, arch: str, directory: Path, *shape: int):
        """`directory` takes what the DSL dumps and must be this kernel's own; `shape` is as
        ``launch.shape`` gives it."""
        options = ("--keep-ptx", "--keep-cubin", f"--dump-dir {directory}")
        self.fmt = fmt
        self.rows_per_thread = shape[0] if shape else 1
        self.directory = directory
        self.compiled = compile.build(
            Quantize(compile.ELEMENT_TYPES[dtype], fmt, *shape), arch, *options
        )
        self.text = self.compiled.__ptx__
        self.program = load(self.text)

    @functools.cached_property
    def host(self) -> HostFunction:
        return HostFunction(self.compiled, self.directory)

    def __call__(
        self,
        x: torch.Tensor,
        q: torch.Tensor,
        sf: torch.Tensor,
        floor: int | float,
        **options: Any,
    ) -> None:
        """Quantize `x` into `q` and `sf`, through the host code.

        Args:
            floor: ``formats.scale_floor``.
            options: of ``machine.run``.
        """
        memory = Memory()
        tensors = {"x": x, "q": q, "sf": sf}
        addresses = {name: memory.add(name, t, name == "x") for name, t in tensors.items()}
        on_device = [DeviceTensor(t, addresses[name]) for name, t in tensors.items()]
        self.host(self.program, memory, *on_device, last_column_rows(sf), floor, **options)


def load(text: str) -> machine.Program:
    (kernel,) = ptx.parse(text).values()
    return machine.Program(kernel)
