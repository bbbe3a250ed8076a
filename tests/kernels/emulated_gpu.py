"""The package on an emulated GPU: its own calls choose, compile and launch kernels on CPU tensors.

`dispatch.launch` runs as it is. It is told of an architecture, and that a tensor is on a GPU; what
it gets for a compiled function launches the kernel in the emulator.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from cute_quant.contract.calls import Call
from cute_quant.contract.columns import ColumnCall
from cute_quant.contract.formats import Format
from cute_quant.contract.prologues import Prologue
from cute_quant.contract.rows import Rows
from cute_quant.contract.upper_scales import UpperScale
from cute_quant.dispatch import blocks, columns, launch, plan
from cute_quant.distributed import arrival, combination
from cute_quant.distributed.records import Record
from cute_quant.emulator import EmulatedKernel
from cute_quant.jit import lookup
from cute_quant.kernels import arrival as arrival_kernels
from cute_quant.kernels import combine, grids, heuristics, scheduler
from cute_quant.kernels.config import DEFAULT_TILE, Spec

H100_SMS = 132


class Kernels:
    """All that were compiled, each once."""

    def __init__(self, new_directory: Callable[[], Path]):
        self._new_directory = new_directory
        self._kernels: dict[Hashable, EmulatedKernel] = {}

    def get(self, spec: Spec, arch: str) -> EmulatedKernel:
        # The limit is a constant of the code.
        key = (spec, arch, heuristics.MAX_GRID_Y)
        if key not in self._kernels:
            kernel = EmulatedKernel(lookup.kernel(spec), arch, self._new_directory())
            self._kernels[key] = kernel
        return self._kernels[key]


class OnGpu(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = True
    __torch_function__ = torch._C._disabled_torch_function_impl


class Gpu:
    """What calls are told of the GPU, and what they did.

    Attributes:
        rows_per_thread: of launches where there is a choice.
        sms: its multiprocessors.
        max_grid: blocks that a dimension of a grid counts, but for the first.
        shape: fields of the launch shape that replace what the heuristics choose.
        launched: the kernels, in order.
    """

    def __init__(
        self,
        kernels: Kernels,
        arch: str,
        rows_per_thread: int = 1,
        sms: int = H100_SMS,
        max_grid: int = heuristics.MAX_GRID_Y,
        **shape: Any,
    ):
        self.kernels = kernels
        self.arch = arch
        self.rows_per_thread = rows_per_thread
        self.sms = sms
        self.max_grid = max_grid
        self.shape = shape
        self.launched: list[EmulatedKernel] = []

    def quantize(
        self,
        x: torch.Tensor,
        q: torch.Tensor | None,
        sf: torch.Tensor | None,
        fmt: Format,
        rows: Rows | None = None,
        index: torch.Tensor | None = None,
        prologue: Prologue | None = None,
        upper: UpperScale | None = None,
        row_scales: torch.Tensor | None = None,
        rng_state: torch.Tensor | None = None,
        scatter: torch.Tensor | None = None,
        num_rows: int | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, ...]:
        """``cute_quant.quantize``, or what ends in it; `options` are those of ``machine.run``."""
        call = Call(x.as_subclass(OnGpu), fmt, q, sf, rows, index, prologue, upper, row_scales)
        call = call._replace(rng_state=rng_state, scatter=scatter, num_rows=num_rows)
        reads = [x, index, rng_state, scatter, *(() if rows is None else [rows.data])]
        reads += [] if upper is None else [upper.tensor]
        reads += [] if prologue is None else prologue.reads.values()
        if prologue is not None and getattr(prologue, "in_place", False):
            reads.append(prologue.residual)
        with self.present(reads, options):
            return launch.quantize(call)

    def fake_quantize(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        fmt: Format,
        upper: UpperScale | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """``cute_quant.fake_quantize`` into `out`."""
        with self.present([x, *([] if upper is None else [upper.tensor])], options):
            return launch.fake_quantize(Call(x.as_subclass(OnGpu), fmt, upper=upper), out)

    def dequantize(
        self,
        q: torch.Tensor,
        sf: torch.Tensor,
        fmt: Format,
        dtype: torch.dtype,
        upper: UpperScale | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """``cute_quant.dequantize``."""
        with self.present([q, sf, *([] if upper is None else [upper.tensor])], options):
            return launch.dequantize(q.as_subclass(OnGpu), sf, fmt, dtype, upper)

    def quantize_blocks(
        self,
        w: torch.Tensor,
        q: torch.Tensor | None,
        sf: torch.Tensor | None,
        fmt: Format,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``cute_quant.quantize_blocks``."""
        with self.present([w], options):
            return blocks.quantize(w.as_subclass(OnGpu), fmt, q, sf)

    def requantize_blocks(
        self,
        w8: torch.Tensor,
        w_sf: torch.Tensor,
        q: torch.Tensor | None,
        sf: torch.Tensor | None,
        fmt: Format,
        upper: UpperScale | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``cute_quant.requantize_blocks``."""
        with self.present([w8, w_sf, *([] if upper is None else [upper.tensor])], options):
            return blocks.requantize(w8.as_subclass(OnGpu), w_sf, fmt, upper, q, sf)

    def dequantize_blocks(
        self,
        q: torch.Tensor,
        sf: torch.Tensor,
        fmt: Format,
        dtype: torch.dtype,
        **options: Any,
    ) -> torch.Tensor:
        """``cute_quant.dequantize_blocks``."""
        with self.present([q, sf], options):
            return blocks.dequantize(q.as_subclass(OnGpu), sf, fmt, dtype)

    def quantize_columns(self, call: ColumnCall, **options: Any) -> columns.Results:
        """``cute_quant.quantize_columns``, or ``quantize_both``."""
        with self.present(list(call.reads.values()), options):
            return columns.run(call._replace(x=call.x.as_subclass(OnGpu)))

    def lay_out(
        self, received: torch.Tensor, routed: Any, record: Record, fmt: Format, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``arrival.lay_out`` of ``cute_quant.distributed``."""
        with self.present([received, routed.sources, routed.rows.data], {}):
            return arrival.lay_out(received.as_subclass(OnGpu), routed, record, fmt, k)

    def add_up(
        self, rows: torch.Tensor, places: torch.Tensor, factors: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``combination.add_up`` of ``cute_quant.distributed``."""
        with self.present([rows, places, factors], {}):
            return combination.add_up(rows.as_subclass(OnGpu), places, factors)

    @contextlib.contextmanager
    def present(self, reads: list[torch.Tensor | None], options: dict[str, Any]) -> Iterator[None]:
        """Put the emulated GPU in place; only the memory of `reads` holds values."""
        storages = {t.untyped_storage().data_ptr() for t in reads if t is not None}
        choose_shape = plan._launch_shape

        def function(spec: Spec, arch: str) -> Callable[..., None]:
            def run(*operands: Any) -> None:
                self.launched.append(kernel)
                tensors = [t for t in operands if isinstance(t, torch.Tensor)]
                outputs = [t for t in tensors if t.untyped_storage().data_ptr() not in storages]
                kernel(*operands, outputs=outputs, **options)

            kernel = self.kernels.get(spec, arch)
            return run

        limits = {"MAX_GRID_Y": self.max_grid, "MAX_GRID_Z": self.max_grid}
        tiles = {"QUANTIZE_TILES": heuristics.TWO_ROWS, "FP4_TILES": heuristics.TWO_TILES}
        if self.rows_per_thread == 1:
            tiles = dict.fromkeys(tiles, DEFAULT_TILE)
        tables = {
            name: dict.fromkeys((16, 32), (heuristics.Range(math.inf, tile),))
            for name, tile in tiles.items()
        }
        with (
            mock.patch.multiple(
                lookup,
                architecture=lambda device: self.arch,
                find_architecture=lambda device: self.arch,
                multiprocessors=lambda device: self.sms,
                function=function,
            ),
            mock.patch.multiple(heuristics, MAX_GRID_Y=self.max_grid, **tables),
            mock.patch.multiple(scheduler, **limits),
            mock.patch.multiple(grids, **limits),
            mock.patch.object(combine, "MAX_GRID_Y", self.max_grid),
            mock.patch.object(arrival_kernels, "MAX_GRID_Y", self.max_grid),
            mock.patch.object(
                plan,
                "_launch_shape",
                lambda *size, **options: choose_shape(*size, **options)._replace(**self.shape),
            ),
            mock.patch.object(launch, "_plans", {}),
        ):
            yield
