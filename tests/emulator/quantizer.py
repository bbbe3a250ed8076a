"""The quantizer's kernels under the emulator: compiled once, launched on CPU tensors."""

from __future__ import annotations

import functools
import struct
from pathlib import Path
from typing import Any

import torch

from cute_quant import compile
from cute_quant.formats import SCALE_ROW_ALIGNMENT, Format, align, ceil_div, last_column_rows
from cute_quant.kernels import layouts
from cute_quant.kernels.quantize import MAX_GRID_Y, Quantize
from tests.emulator import machine, ptx
from tests.emulator.host import C_COMPILER, DeviceTensor, HostFunction
from tests.emulator.memory import Memory


class Kernel:
    """One kernel, compiled for one architecture.

    Attributes:
        text: its PTX.
        program: what runs; put another one here to plant an error.
    """

    def __init__(self, dtype: torch.dtype, fmt: Format, arch: str, directory: Path):
        """`directory` takes what the DSL dumps and must be this kernel's own."""
        options = ("--keep-ptx", "--keep-cubin", f"--dump-dir {directory}")
        self.fmt = fmt
        self.directory = directory
        self.compiled = compile.build(Quantize(compile.ELEMENT_TYPES[dtype], fmt), arch, *options)
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
        *,
        direct: bool = C_COMPILER is None,
        **options: Any,
    ) -> None:
        """Quantize `x` into `q` and `sf`, through the host code or with `direct` without it.

        Args:
            floor: ``formats.scale_floor``.
            options: of ``machine.run``.
        """
        memory = Memory()
        tensors = {"x": x, "q": q, "sf": sf}
        addresses = {name: memory.add(name, t, name == "x") for name, t in tensors.items()}
        if direct:
            grid, block, arguments = pack(x, q, sf, self.fmt, floor, addresses)
            machine.run(self.program, grid, block, arguments, memory, **options)
        else:
            on_device = [DeviceTensor(t, addresses[name]) for name, t in tensors.items()]
            arguments = (*on_device, last_column_rows(sf), floor)
            self.host(self.program, memory, *arguments, **options)


def load(text: str) -> machine.Program:
    (kernel,) = ptx.parse(text).values()
    return machine.Program(kernel)


def pack(
    x: torch.Tensor,
    q: torch.Tensor,
    sf: torch.Tensor,
    fmt: Format,
    floor: int | float,
    addresses: dict[str, int],
) -> tuple[tuple[int, int, int], tuple[int, int, int], tuple[bytes, ...]]:
    """Grid, block and parameters, as the kernel's host code computes them.

    For where it cannot be had: it comes as an object file, which takes a compiler to link.
    """
    mn, k = x.shape
    rows = align(mn, SCALE_ROW_ALIGNMENT)
    column_stride = rows * sf.itemsize if fmt.packed else rows  # in bytes of packed scales
    last_rows = last_column_rows(sf)
    full_columns = sf.shape[1] - (last_rows < rows)
    matrix = struct.Struct("<Qiii4x")  # address, two sizes, one stride, padding
    arguments = (
        struct.pack("<i", full_columns),
        struct.pack("<i", last_rows),
        struct.pack("<I", 254 - floor << 23) if fmt.power_of_two else struct.pack("<f", floor),
        matrix.pack(addresses["x"], mn, k, x.stride(0)),
        matrix.pack(addresses["q"], q.shape[0], k, q.stride(0)),
        struct.pack("<Qiiq", addresses["sf"], rows, sf.shape[1], column_stride),
    )
    row_tiles = ceil_div(max(rows, q.shape[0]), layouts.ROWS_PER_CTA)
    grid = (
        ceil_div(k, layouts.COLUMNS_PER_CTA),
        min(row_tiles, MAX_GRID_Y),
        ceil_div(row_tiles, MAX_GRID_Y),
    )
    return grid, (layouts.THREADS_PER_CTA, 1, 1), arguments
