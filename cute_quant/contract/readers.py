"""Requirements of GEMMs on quantized values and scales, as their own checks and kernels say.

Sources: DeepGEMM ``csrc/utils/layout.hpp`` (`major_check`, `check_sf_layout`) and ``csrc/apis``
(``gemm.hpp``, ``layout.hpp``); torch ``aten/src/ATen/native/cuda/ScaledBlas.cpp``; FlashInfer
``gemm/gemm_base.py``. TMA wants addresses and strides at multiples of 16 bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from cute_quant.contract.format_choices import (
    BLOCKED,
    BLOCKED_8,
    MN_MAJOR,
    MN_MAJOR_PACKED,
    ROW_MAJOR,
    ROW_MAJOR_PACKED,
    WHOLE_ROW,
)

if TYPE_CHECKING:
    # A format says who reads it.
    from cute_quant.contract.formats import Format

E2M1, E4M3, E5M2 = torch.float4_e2m1fn_x2, torch.float8_e4m3fn, torch.float8_e5m2
E8M0, FLOAT32 = torch.float8_e8m0fnu, torch.float32


class Readable(NamedTuple):
    """Formats that a reader takes: every combination of these.

    Attributes:
        values, group_sizes, layouts: of the formats.
        scale_dtype: of the formats.
    """

    values: tuple[torch.dtype, ...]
    group_sizes: tuple[int, ...]
    scale_dtype: torch.dtype
    layouts: tuple[str, ...]

    def has(self, fmt: Format) -> bool:
        """Return whether a format is among them."""
        return (
            fmt.values in self.values
            and fmt.group_size in self.group_sizes
            and fmt.scale_dtype is self.scale_dtype
            and fmt.scale_layout in self.layouts
        )

    def __str__(self) -> str:
        values = " or ".join(str(dtype).removeprefix("torch.") for dtype in self.values)
        sizes = " or ".join(map(str, self.group_sizes)).replace(str(WHOLE_ROW), "a whole row")
        scales = str(self.scale_dtype).removeprefix("torch.")
        return f"{values} in groups of {sizes} under {scales} scales, {' or '.join(self.layouts)}"


class Reader(NamedTuple):
    """A GEMM.

    Attributes:
        name: for people.
        formats: that it takes.
        fp4_dtype: dtype of tensors of FP4 values.
        powers_of_two: whether float32 scales must be these, in every row of the tensor: the device
            traps on others.
        batched: whether it takes a batch (E, mn, k) besides a matrix (mn, k).
        k_multiple: columns of values come in multiples of this many.
        k_grouped: whether groups lie along rows, for weight gradients.
    """

    name: str
    formats: tuple[Readable, ...]
    fp4_dtype: torch.dtype = E2M1
    powers_of_two: bool = False
    batched: bool = True
    k_multiple: int = 1
    k_grouped: bool = False


_TRANSFORMED = (MN_MAJOR, ROW_MAJOR)
"""Layouts of float32 scales that DeepGEMM itself brings into its own."""

DEEP_GEMM_SM90 = "deep_gemm_sm90"
DEEP_GEMM_SM100 = "deep_gemm_sm100"
DEEP_GEMM_SM90_K_GROUPED = "deep_gemm_sm90_k_grouped"
DEEP_GEMM_SM100_K_GROUPED = "deep_gemm_sm100_k_grouped"
SCALED_MM = "scaled_mm"
CUTLASS = "cutlass"
TRTLLM_8X4 = "trtllm_8x4"

READERS: dict[str, Reader] = {
    DEEP_GEMM_SM90: Reader(
        "DeepGEMM on SM90", (Readable((E4M3,), (128,), FLOAT32, _TRANSFORMED),), k_multiple=16
    ),
    DEEP_GEMM_SM100: Reader(
        "DeepGEMM on SM100",
        (
            Readable((E4M3, E2M1), (32, 128), E8M0, (MN_MAJOR_PACKED,)),
            Readable((E4M3, E2M1), (32, 128), FLOAT32, _TRANSFORMED),
        ),
        fp4_dtype=torch.int8,
        powers_of_two=True,
        k_multiple=16,
    ),
    DEEP_GEMM_SM90_K_GROUPED: Reader(
        "DeepGEMM's k-grouped GEMM on SM90",
        (Readable((E4M3,), (128,), FLOAT32, _TRANSFORMED),),
        k_grouped=True,
    ),
    DEEP_GEMM_SM100_K_GROUPED: Reader(
        "DeepGEMM's k-grouped GEMM on SM100",
        (
            Readable((E4M3,), (32, 128), E8M0, (MN_MAJOR_PACKED,)),
            Readable((E4M3,), (32, 128), FLOAT32, _TRANSFORMED),
        ),
        powers_of_two=True,
        k_grouped=True,
    ),
    SCALED_MM: Reader(
        "cuBLAS (torch's scaled_mm)",
        (
            Readable((E4M3, E5M2), (WHOLE_ROW,), FLOAT32, (ROW_MAJOR,)),
            Readable((E4M3, E5M2, E2M1), (32,), E8M0, (BLOCKED,)),
            Readable((E2M1,), (16,), torch.float8_e4m3fn, (BLOCKED,)),
        ),
        batched=False,
        k_multiple=16,
    ),
    CUTLASS: Reader(
        "CUTLASS",
        (
            Readable((E4M3, E5M2, E2M1), (32,), E8M0, (BLOCKED,)),
            Readable((E2M1,), (16,), torch.float8_e4m3fn, (BLOCKED,)),
        ),
        k_multiple=16,
    ),
    TRTLLM_8X4: Reader(
        "TensorRT-LLM's kernels for few rows",
        (
            Readable((E4M3, E2M1), (32,), E8M0, (BLOCKED_8,)),
            Readable((E2M1,), (16,), torch.float8_e4m3fn, (BLOCKED_8,)),
        ),
        k_multiple=16,
    ),
}
"""Readers by the names that ``cute_quant.check_scales`` takes."""

UNCHECKED = (
    Reader(
        "Triton's block-scaled GEMMs in vLLM and SGLang",
        (Readable((E4M3, torch.int8), (128,), FLOAT32, (ROW_MAJOR,)),),
    ),
    Reader(
        "int8 GEMMs with per-token scales",
        (Readable((torch.int8,), (WHOLE_ROW,), FLOAT32, (ROW_MAJOR,)),),
    ),
    Reader(
        "DeepGEMM's mega-MoE on SM100",
        (Readable((E4M3,), (32,), E8M0, (ROW_MAJOR_PACKED,)),),
    ),
    Reader(
        "mega-MoE kernels on SM100",
        (Readable((E2M1,), (16,), torch.float8_e4m3fn, (ROW_MAJOR_PACKED,)),),
    ),
)
"""Readers whose requirements ``cute_quant.check_scales`` does not know."""


def takes(reader: Reader, fmt: Format) -> bool:
    """Return whether a GEMM reads a format."""
    powers = fmt.power_of_two or not reader.powers_of_two
    return powers and any(readable.has(fmt) for readable in reader.formats)


def readers_of(fmt: Format) -> list[str]:
    """Return the names of ``cute_quant.check_scales`` for the GEMMs that read a format.

    K-grouped GEMMs are not among them: their groups lie along rows.
    """
    return [name for name, reader in READERS.items() if not reader.k_grouped and takes(reader, fmt)]


def describe_readers(fmt: Format) -> str:
    """Return the GEMMs that read a format, as text for people."""
    readers = [READERS[name] for name in readers_of(fmt)]
    readers += [reader for reader in UNCHECKED if takes(reader, fmt)]
    return ", ".join(reader.name for reader in readers) or "kernels of your own"
