"""Which kernels are built ahead of time: ranges of calls by use, for an architecture.

Calls have tensors as torch allocates them, whose rows start at multiples of 32 bytes where k is a
multiple of 16, on a GPU of any number of multiprocessors. Weights that are contiguous along n have
a multiple of 16 rows.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from cute_quant.contract.dtypes import INPUT_DTYPES, LOAD_BYTES, SOURCE_BLOCK, STORE_BYTES
from cute_quant.contract.format_choices import BLOCKED_8, ROW_MAJOR, ROW_MAJOR_PACKED, SCALE_LAYOUTS
from cute_quant.contract.formats import (
    DEEP_GEMM,
    DEEP_GEMM_32,
    DEEP_GEMM_SM90,
    GROUPWISE_FP8,
    MXFP4,
    MXFP8,
    NVFP4,
    Format,
    all_formats,
)
from cute_quant.contract.prologues import MAX_NORM_COLUMNS
from cute_quant.contract.rows import DENSE, Indexed, Masked, PrefixSum
from cute_quant.contract.upper_scales import ENCODE
from cute_quant.dispatch import reachable
from cute_quant.dispatch.call_range import (
    BOTH,
    CONVERT_SCALES,
    DEQUANTIZE,
    DEQUANTIZE_BLOCKS,
    FAKE_QUANTIZE,
    QUANTIZE,
    QUANTIZE_BLOCKS,
    REQUANTIZE_BLOCKS,
    RMS_NORM,
    SILU_MUL,
    SILU_MUL_BOTH,
    CallRange,
)
from cute_quant.dispatch.plan import Gpu
from cute_quant.kernels import architectures, heuristics
from cute_quant.kernels.config import (
    DEFAULT_TILE,
    BlocksSpec,
    ColumnsSpec,
    QuantizerSpec,
    RmsNormSpec,
    Spec,
)

DEEPGEMM_FORMATS = (DEEP_GEMM, DEEP_GEMM_32, DEEP_GEMM_SM90)
MOE_FORMATS = (*DEEPGEMM_FORMATS, NVFP4, MXFP4)
BLOCK_FORMATS = (*DEEPGEMM_FORMATS, MXFP8, MXFP4)
"""Formats of weights in square blocks."""
REQUANTIZED_FORMATS = (DEEP_GEMM, DEEP_GEMM_32, MXFP8, MXFP4, NVFP4)
"""Formats of the weights of FP8 checkpoints on Blackwell."""
CONVERSIONS = (
    (GROUPWISE_FP8, DEEP_GEMM_SM90),
    (GROUPWISE_FP8.replace(round_scale=True), DEEP_GEMM),
    (DEEP_GEMM_SM90.replace(round_scale=True), DEEP_GEMM),
    (MXFP8.replace(scale_layout=ROW_MAJOR), MXFP8),
    (MXFP8.replace(scale_layout=ROW_MAJOR), DEEP_GEMM_32),
    (NVFP4.replace(scale_layout=ROW_MAJOR), NVFP4.replace(scale_layout=BLOCKED_8)),
    (MXFP8, MXFP8.replace(scale_layout=ROW_MAJOR)),
)
"""Scales as checkpoints and other quantizers have them, to what GEMMs read, and back."""
BF16 = (torch.bfloat16,)

COLUMNS = tuple(
    DEFAULT_TILE.columns << i
    for i in range((MAX_NORM_COLUMNS // DEFAULT_TILE.columns).bit_length())
)
"""Numbers of columns of every choice that depends on them."""
FEW_COLUMNS = COLUMNS[:1]
"""Columns of operations whose kernels are the same for every number of them."""
FP4_COLUMNS = COLUMNS[:2]
"""Columns of FP4: only rows longer than one tile have two of them a thread."""
LONG_COLUMNS = 2 * COLUMNS[-1]
"""Columns of a row that is one group and that no CTA holds."""
SMS = 8
"""Multiprocessors of a GPU that has all size classes below ``MAX_ROWS``."""
FEW_ROWS, MANY_ROWS = 7, 203
"""Rows that are fewer, and more, than a GPU, or a part of one, has multiprocessors."""
MAX_ROWS = 2**17
"""Rows that are not too many for one dimension of a grid, in results as DeepGEMM reads them."""

GROUPED = (Masked.kind, PrefixSum.kind, Indexed.kind)
"""Rows of a mixture of experts."""

Kernels = dict[Spec, reachable.Variant]
"""Specs, each with calls that take it."""


def size_of_whole_rows(spec: QuantizerSpec) -> tuple[int, int]:
    """Return (mn, k) for which a kernel whose CTAs hold whole rows is chosen."""
    if isinstance(spec, RmsNormSpec):
        wanted = spec.tile, spec.tiles_per_thread, spec.max_warps, True
    else:
        wanted = spec.tile, spec.tile.tiles_per_thread, spec.max_warps, spec.held
    arches = [architecture.name for architecture in architectures.ARCHITECTURES]
    for rows, k, arch in itertools.product(
        (MANY_ROWS, FEW_ROWS), (LONG_COLUMNS, *reversed(COLUMNS)), arches
    ):
        size = 1, rows, k, spec.fmt, False, FEW_ROWS
        if isinstance(spec, RmsNormSpec):
            shape = heuristics.norm_shape(*size, least_tiles=heuristics.norm_tiles(arch))
        else:
            shape = heuristics.row_shape(*size, arch)
        if (shape.tile, shape.tiles_per_thread, shape.max_warps, shape.held) == wanted:
            return rows, k
    raise ValueError(f"spec: expected one that is chosen for some columns, got {spec}")


def _columns(fmt: Format) -> tuple[int, ...]:
    """Return columns of every choice for a format, if rows are not normalized."""
    if not fmt.by_row:
        return FEW_COLUMNS if fmt.value_type.per_byte == 1 else FP4_COLUMNS
    return (*COLUMNS, LONG_COLUMNS) if fmt.whole_row else COLUMNS


def _quantize(
    dtypes: Iterable[torch.dtype],
    formats: Iterable[Format],
    kinds: Iterable[str],
    gathered: Iterable[bool] = (False,),
) -> list[CallRange]:
    return [
        CallRange(QUANTIZE, fmt, dtype, _columns(fmt), MAX_ROWS, kind, index, kind == Masked.kind)
        for dtype, fmt, kind, index in itertools.product(dtypes, formats, kinds, gathered)
    ]


def _layer(fmt: Format) -> list[CallRange]:
    """Return what lies between the GEMMs of a mixture of experts, in bf16."""
    swiglus = [
        CallRange(SILU_MUL, fmt, *BF16, FEW_COLUMNS, MAX_ROWS, kind, batched=kind == Masked.kind)
        for kind in (DENSE, *GROUPED)
    ]
    return [
        *swiglus,
        # As in gpt-oss.
        *(
            calls._replace(interleaved=True, clamped=True, scaled=True, shifted=True)
            for calls in swiglus
        ),
        CallRange(RMS_NORM, fmt, *BF16, COLUMNS, MAX_ROWS),
    ]


def _there_and_back(dtypes: Iterable[torch.dtype], formats: Iterable[Format]) -> list[CallRange]:
    return [
        CallRange(operation, fmt, dtype, _columns(fmt), MAX_ROWS)
        for operation in (FAKE_QUANTIZE, DEQUANTIZE)
        for dtype, fmt in itertools.product(dtypes, formats)
    ]


def _of_deepgemm() -> list[CallRange]:
    dense = _quantize(BF16, DEEPGEMM_FORMATS, (DENSE, *GROUPED))
    batch = [calls._replace(batched=True) for calls in dense if calls.kind == DENSE]
    return [*dense, *batch]


def _of_moe() -> list[CallRange]:
    return [
        *_quantize(BF16, MOE_FORMATS, (DENSE, *GROUPED), (False, True)),
        *(
            calls._replace(scattered=True)
            for calls in _quantize(BF16, DEEPGEMM_FORMATS, (Masked.kind, PrefixSum.kind))
        ),
        *(calls for fmt in MOE_FORMATS for calls in _layer(fmt)),
    ]


def _of_blocks(dtypes: Iterable[torch.dtype]) -> list[CallRange]:
    return [
        CallRange(operation, fmt, dtype, FEW_COLUMNS, MAX_ROWS)
        for operation in (QUANTIZE_BLOCKS, DEQUANTIZE_BLOCKS)
        for dtype, fmt in itertools.product(dtypes, BLOCK_FORMATS)
    ]


def _of_weights() -> list[CallRange]:
    return [
        *_of_blocks(BF16),
        *(
            CallRange(
                REQUANTIZE_BLOCKS,
                fmt,
                *BF16,
                _columns(fmt),
                MAX_ROWS,
                source_blocks=(SOURCE_BLOCK,),
            )
            for fmt in REQUANTIZED_FORMATS
        ),
        *(
            CallRange(CONVERT_SCALES, fmt, *BF16, FEW_COLUMNS, MAX_ROWS, to=to)
            for fmt, to in CONVERSIONS
        ),
    ]


def _of_training() -> list[CallRange]:
    both = [
        CallRange(
            operation,
            recipe.fmt,
            *BF16,
            FEW_COLUMNS,
            MAX_ROWS,
            kind,
            column_fmt=recipe.column_fmt,
            transposed=recipe.transposed,
        )
        for operation, recipe, kind in itertools.product(
            BOTH, TRAINING_FORMATS, (DENSE, PrefixSum.kind)
        )
    ]
    gradients = [
        calls._replace(stochastic=True) for calls in both if calls.operation != SILU_MUL_BOTH
    ]
    rows = _quantize(BF16, DEEPGEMM_FORMATS, (DENSE, PrefixSum.kind))
    return [*both, *gradients, *rows, *_of_blocks(BF16)]


def _of_each_kind() -> list[CallRange]:
    return [*_of_deepgemm(), *_of_moe(), *_of_weights(), *_there_and_back(BF16, MOE_FORMATS)]


def _formats_of_all() -> list[Format]:
    """Return every 8-bit format, and of FP4 and the newer layouts one each, not every pair."""
    eight_bits = [
        fmt
        for fmt in all_formats()
        if fmt.value_type.per_byte == 1 and fmt.scale_layout not in (BLOCKED_8, ROW_MAJOR_PACKED)
    ]
    layouts = [
        fmt.replace(scale_layout=layout)
        for fmt in (MXFP8, MXFP4, NVFP4)
        for layout in SCALE_LAYOUTS[fmt.scale_dtype]
    ]
    return list(dict.fromkeys([*eight_bits, *layouts, NVFP4.replace(row_scale=True)]))


def _of_all() -> list[CallRange]:
    formats = _formats_of_all()
    return [
        *_of_each_kind(),
        *_of_training(),
        *_quantize(INPUT_DTYPES, formats, (DENSE,)),
        *_of_blocks(INPUT_DTYPES),
        *_there_and_back(INPUT_DTYPES, formats),
    ]


def _has_whole_vectors(spec: Spec) -> bool:
    """Return whether a kernel is for memory whose rows have whole vectors where they may not.

    Weights are a multiple of 16 long where they are contiguous, and rows of a transpose start at
    multiples of 16 bytes.
    """
    if isinstance(spec, ColumnsSpec):
        return not spec.transposed or spec.q_access.store_bytes == STORE_BYTES
    if not isinstance(spec, BlocksSpec):
        return True
    widest = min(LOAD_BYTES, spec.values_per_thread * spec.dtype.itemsize)
    return not spec.access.ragged and spec.access.load_bytes == widest


class _Recipe(NamedTuple):
    """Formats of what is quantized along both directions.

    Attributes:
        fmt: of rows.
        column_fmt, transposed: of columns.
    """

    fmt: Format
    column_fmt: Format
    transposed: bool


TRAINING_FORMATS = (
    _Recipe(DEEP_GEMM_SM90, DEEP_GEMM_SM90, True),
    _Recipe(DEEP_GEMM, DEEP_GEMM_32, False),
    _Recipe(DEEP_GEMM, DEEP_GEMM_32, True),
    _Recipe(MXFP8, MXFP8, True),
)


@functools.cache
def _kernels(ranges: Callable[[], list[CallRange]], arch: str) -> Kernels:
    found: Kernels = {}
    for calls in ranges():
        given = calls.with_upper_scale(ENCODE)
        for spec, variant in reachable.specs(given, Gpu(arch, SMS)).items():
            if _has_whole_vectors(spec):
                found.setdefault(spec, variant)
    return found


def deepgemm(arch: str) -> Kernels:
    """Return bf16 activations in front of the GEMMs of DeepGEMM: dense, batched and grouped."""
    return _kernels(_of_deepgemm, arch)


def moe(arch: str) -> Kernels:
    """Return a layer with a mixture of experts in bf16, for DeepGEMM, NVFP4 and MXFP4.

    It has the norm in front of the experts, tokens gathered for them or, for DeepGEMM, scattered to
    them, and SwiGLU between their GEMMs, plain or as in gpt-oss.
    """
    return _kernels(_of_moe, arch)


def weights(arch: str) -> Kernels:
    """Return what a loader of checkpoints calls: weights in square blocks, and their scales.

    bf16 weights, contiguous along k or n, and those of FP8 checkpoints, to the formats of
    DeepGEMM, cuBLAS and CUTLASS and back, and scales to the layouts that these read.
    """
    return _kernels(_of_weights, arch)


def training(arch: str) -> Kernels:
    """Return a training step of linear layers and experts in bf16, as DeepGEMM and cuBLAS read it.

    Activations, SwiGLU and gradients of both are quantized along both directions, gradients
    rounded to nearest or stochastically, and weights in square blocks.
    """
    return _kernels(_of_training, arch)


def of_each_kind(arch: str) -> Kernels:
    """Return every kernel in bf16 and the formats of DeepGEMM, NVFP4 and MXFP4."""
    return _kernels(_of_each_kind, arch)


def all_kernels(arch: str) -> Kernels:
    """Return dense rows of every dtype and 8-bit format, there and back, and the other presets.

    FP4 has one format of each layout. NVFP4 has its upper scale as an encode scale.
    """
    return _kernels(_of_all, arch)


PRESETS: dict[str, Callable[[str], Kernels]] = {
    "deepgemm": deepgemm,
    "moe": moe,
    "weights": weights,
    "training": training,
    "all": all_kernels,
}
"""Kernels for a target of `architectures`, by the name of what they are for."""
