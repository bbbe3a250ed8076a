"""The package on an emulated GPU: its own calls choose, compile and launch kernels on CPU tensors.

`dispatch.launch` runs as it is. It is told of an architecture, and that a tensor is on a GPU; what
it gets for a compiled function launches the kernel in the emulator.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from cute_quant.contract.calls import Call
from cute_quant.contract.dtypes import LOAD_BYTES
from cute_quant.contract.formats import Format
from cute_quant.contract.rows import DENSE, Masked, Rows
from cute_quant.contract.tensors import last_column_rows
from cute_quant.dispatch import launch
from cute_quant.jit import lookup
from cute_quant.kernels import dequantize, heuristics, scheduler
from cute_quant.kernels.config import WIDEST, Access, Domain, RmsNormSpec, SiluMulSpec, Spec, Tile
from tests.emulator import machine, ptx
from tests.emulator.errors import EmulatorError
from tests.emulator.host import DeviceTensor, HostFunction
from tests.emulator.memory import Memory

H100_SMS = 132
ONE_ROW = Tile(row_warps=1)


class Kernel:
    """One kernel, compiled for one architecture.

    Attributes:
        kernel: what is compiled.
        text: its PTX.
        program: what runs; put another one here to plant an error.
        names: of its tensors, as the kernel has them.
    """

    def __init__(self, kernel: Any, arch: str, directory: Path):
        """`kernel` is as ``compile.build`` takes it; `directory` takes what the DSL dumps and must
        be this kernel's own."""
        options = ("--keep-ptx", "--keep-cubin", f"--dump-dir {directory}")
        compiled = lookup.build(kernel, arch, *options)
        self.kernel = kernel
        self.text = compiled.__ptx__
        self.program = load(self.text)
        self.names = list(inspect.signature(type(kernel).__call__).parameters)[1:]
        self.host = HostFunction(compiled, directory)

    def __call__(
        self, *operands: Any, inputs: tuple[torch.Tensor | None, ...], **options: Any
    ) -> None:
        """Launch through the host code.

        Args:
            operands: of the compiled function.
            inputs: what holds values, under any view; other memory does not.
            options: of ``machine.run``.
        """
        memory = Memory()
        written = {t.untyped_storage().data_ptr() for t in inputs if t is not None}
        on_device = []
        for name, operand in zip(self.names, operands, strict=False):  # the stream comes by itself
            if isinstance(operand, torch.Tensor):
                storage = operand.untyped_storage().data_ptr()
                address = memory.add(name, operand, storage in written)
                if (address - operand.data_ptr()) % LOAD_BYTES:
                    raise EmulatorError(f"{name}: aligned otherwise than on the host")
                operand = DeviceTensor(operand, address)
            on_device.append(operand)
        self.host(self.program, memory, *on_device, **options)


def load(text: str) -> machine.Program:
    (kernel,) = ptx.parse(text).values()
    return machine.Program(kernel)


class Kernels:
    """All that were compiled, each once."""

    def __init__(self, new_directory: Callable[[], Path]):
        self._new_directory = new_directory
        self._kernels: dict[Hashable, Kernel] = {}

    def get(self, spec: Spec, arch: str) -> Kernel:
        # The limit is a constant of the code.
        key = (spec, arch, heuristics.MAX_GRID_Y)
        if key not in self._kernels:
            self._kernels[key] = Kernel(lookup.kernel(spec), arch, self._new_directory())
        return self._kernels[key]


class OnGpu(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = True
    __torch_function__ = torch._C._disabled_torch_function_impl


class Gpu:
    """What calls are told of the GPU, and what they did.

    Attributes:
        sms: its multiprocessors.
        rows_per_thread: of launches where there is a choice.
        max_grid: blocks that a dimension of a grid counts, but for the first.
        launched: the kernels, in order.
    """

    def __init__(
        self,
        kernels: Kernels,
        arch: str,
        rows_per_thread: int = 1,
        sms: int = H100_SMS,
        max_grid: int = heuristics.MAX_GRID_Y,
    ):
        self.kernels = kernels
        self.arch = arch
        self.rows_per_thread = rows_per_thread
        self.sms = sms
        self.max_grid = max_grid
        self.launched: list[Kernel] = []

    def quantize(
        self,
        x: torch.Tensor,
        q: torch.Tensor | None,
        sf: torch.Tensor | None,
        fmt: Format,
        rows: Rows | None = None,
        index: torch.Tensor | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``cute_quant.quantize`` into `q` and `sf`; `options` are those of ``machine.run``."""
        counts = None if rows is None else rows.data
        with self._present((x, counts, index), options):
            return launch.quantize(Call(x.as_subclass(OnGpu), fmt, q, sf, rows, index))

    def fake_quantize(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        fmt: Format,
        **options: Any,
    ) -> torch.Tensor:
        """``cute_quant.fake_quantize`` into `out`."""
        with self._present((x,), options):
            return launch.fake_quantize(x.as_subclass(OnGpu), fmt, out)

    def dequantize(
        self, q: torch.Tensor, sf: torch.Tensor, fmt: Format, dtype: torch.dtype, **options: Any
    ) -> torch.Tensor:
        """``cute_quant.dequantize``."""
        with self._present((q, sf), options):
            return launch.dequantize(q.as_subclass(OnGpu), sf, fmt, dtype)

    def silu_mul_quantize(
        self,
        x: torch.Tensor,
        q: torch.Tensor,
        sf: torch.Tensor,
        fmt: Format,
        *,
        clamp: float | None = None,
        alpha: float = 1.0,
        beta: float = 0.0,
        weight: torch.Tensor | None = None,
        interleaved: bool = False,
        unfused: bool = False,
        **options: Any,
    ) -> None:
        """``(up + beta) * gate * sigmoid(alpha * gate)`` of x (..., mn, 2 k), quantized."""
        spec = SiluMulSpec(
            x.dtype,
            fmt.kernel_format,
            domain=Domain(batched=x.ndim > 2),
            access=_access(q.shape[-1], x.dtype),
            interleaved=interleaved,
            unfused=unfused,
            clamped=clamp is not None,
            scaled=alpha != 1.0,
            shifted=beta != 0.0,
            weighted=weight is not None,
        )
        numbers = {"bound": clamp or 0.0, "alpha": alpha, "beta": beta}
        operands = _operands(x, q, sf, fmt) | numbers | {"mWeight": weight}
        self._run(spec, operands, (x, weight), options)

    def rms_norm_quantize(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        q: torch.Tensor,
        sf: torch.Tensor,
        fmt: Format,
        *,
        eps: float = 1e-6,
        offset: float = 0.0,
        residual: torch.Tensor | None = None,
        total: torch.Tensor | None = None,
        normalized: torch.Tensor | None = None,
        unfused: bool = False,
        tile: Tile = ONE_ROW,
        tiles_per_thread: int = 1,
        max_warps: int = 16,
        rows: Masked | None = None,
        index: torch.Tensor | None = None,
        row_ctas: int = 1,
        **options: Any,
    ) -> None:
        """RMSNorm of x (..., mn, k), quantized.

        Args:
            rows, index: which rows there are, x being (tokens, k) with an index.
            row_ctas: blocks that share the rows of all experts.
            total: takes x + residual; may be the residual.
            normalized: takes what is quantized.
            tile, tiles_per_thread, max_warps: as of an `RmsNormSpec`.
        """
        spec = RmsNormSpec(
            x.dtype,
            fmt.kernel_format,
            tile,
            Domain(DENSE if rows is None else rows.kind, index is not None, q.ndim > 2),
            _access(q.shape[-1], x.dtype),
            tiles_per_thread,
            max_warps,
            weight.dtype,
            unfused,
            residual is not None,
            normalized is not None,
        )
        counts = None if rows is None else rows.data
        operands = _operands(x, q, sf, fmt) | {
            "mCounts": counts,
            "mIndex": index,
            "row_ctas": row_ctas,
            "mWeight": weight,
            "mResidual": residual,
            "mSum": total,
            "mNormalized": normalized,
            "eps": eps,
            "offset": offset,
        }
        self._run(spec, operands, (x, weight, residual, counts, index), options)

    def _run(
        self, spec: Spec, operands: dict[str, Any], inputs: tuple, options: dict[str, Any]
    ) -> None:
        """Launch the kernel of a spec with operands by name."""
        with self._present(inputs, options):
            *names, _ = self.kernels.get(spec, self.arch).names  # the stream comes by itself
            lookup.function(spec, self.arch)(*(operands[name] for name in names))

    @contextlib.contextmanager
    def _present(self, inputs: tuple, options: dict[str, Any]) -> Iterator[None]:
        def function(spec: Spec, arch: str) -> Callable[..., None]:
            def run(*operands: Any) -> None:
                self.launched.append(kernel)
                kernel(*operands, inputs=inputs, **options)

            kernel = self.kernels.get(spec, arch)
            return run

        limits = {"MAX_GRID_Y": self.max_grid, "MAX_GRID_Z": self.max_grid}
        two_rows_from = 0 if self.rows_per_thread == 2 else torch.inf
        with (
            mock.patch.multiple(
                lookup,
                architecture=lambda device: self.arch,
                multiprocessors=lambda device: self.sms,
                function=function,
            ),
            mock.patch.multiple(heuristics, TWO_ROWS_FROM=two_rows_from, MAX_GRID_Y=self.max_grid),
            mock.patch.multiple(scheduler, **limits),
            mock.patch.multiple(dequantize, **limits),
            mock.patch.object(launch, "_plans", {}),
        ):
            yield


def _access(k: int, dtype: torch.dtype) -> Access:
    """Of contiguous rows of k."""
    whole = k % ONE_ROW.values_per_thread == 0
    return WIDEST if whole else Access(dtype.itemsize, 1, True)


def _operands(x: torch.Tensor, q: torch.Tensor, sf: torch.Tensor, fmt: Format) -> dict[str, Any]:
    """Those that all kernels have which quantize dense rows."""
    mn = q.shape[-2] if fmt.blocked else sf.shape[-2]
    return {
        "mX": x,
        "mQ": q,
        "mS": sf,
        "mCounts": None,
        "mIndex": None,
        "missing_rows": fmt.scale_rows(mn) - last_column_rows(sf) if fmt.mn_major else 0,
        "alignment": 1,
        "row_ctas": 1,
        "floor": fmt.floor,
    }
