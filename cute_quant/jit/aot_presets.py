"""Which kernels are built ahead of time: what calls ask for by use, on an architecture and tensors
as torch allocates them, whose rows start at multiples of 32 bytes where k is a multiple of 16."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import TypedDict

import torch

from cute_quant.contract.dtypes import INPUT_DTYPES
from cute_quant.contract.formats import DEEP_GEMM, DEEP_GEMM_32, DEEP_GEMM_SM90, Format, all_formats
from cute_quant.contract.prologues import MAX_NORM_COLUMNS
from cute_quant.contract.rows import DENSE, Indexed, Masked, PrefixSum
from cute_quant.kernels import heuristics
from cute_quant.kernels.config import (
    DEFAULT_TILE,
    DENSE_ROWS,
    Access,
    DequantizeSpec,
    Domain,
    QuantizeSpec,
    RmsNormSpec,
    SiluMulSpec,
    Spec,
    Tile,
    launched_on,
)

DEEPGEMM_FORMATS = (DEEP_GEMM, DEEP_GEMM_32, DEEP_GEMM_SM90)
ROW_UNIT = 16
"""Divisor of k."""

BATCH = Domain(batched=True)
EXPERTS = (
    Domain(Masked.kind, batched=True),
    Domain(Masked.kind, gathered=True, batched=True),
    *(
        Domain(kind, gathered)
        for kind in (PrefixSum.kind, Indexed.kind)
        for gathered in (False, True)
    ),
    Domain(DENSE, gathered=True),
)
"""Rows of a mixture of experts, gathered from the tokens or not."""


class Activation(TypedDict, total=False):
    """Choices of a `SiluMulSpec`, other than for weighted rows."""

    interleaved: bool
    clamped: bool
    scaled: bool
    shifted: bool


SWIGLU: Activation = {}
GPT_OSS: Activation = {"interleaved": True, "clamped": True, "scaled": True, "shifted": True}
ACTIVATIONS = (SWIGLU, GPT_OSS)


def _tiles(fmt: Format, domain: Domain) -> list[Tile]:
    """Return the tiles that `heuristics.shape` picks for small inputs and for large ones."""
    shapes = (
        heuristics.shape(1, rows, DEFAULT_TILE.columns, fmt, domain.masked, 1)
        for rows in (1, heuristics.TWO_ROWS_FROM)
    )
    return list(dict.fromkeys(shape.tile for shape in shapes))


@functools.cache
def norm_columns(fmt: Format) -> dict[tuple[Tile, int, int], int]:
    """Return the most columns for each choice of `heuristics.norm_shape`, a tile with
    tiles_per_thread and max_warps."""
    columns: dict[tuple[Tile, int, int], int] = {}
    for k in range(ROW_UNIT, MAX_NORM_COLUMNS + 1, ROW_UNIT):
        shape = heuristics.norm_shape(1, 1, k, fmt, False, 1)
        columns[shape.tile, shape.tiles_per_thread, shape.max_warps] = k
    return columns


def _written(tile: Tile, dtype: torch.dtype) -> Access:
    return Access(store_bytes=heuristics.store_bytes(tile, dtype))


def _quantize(
    dtypes: Iterable[torch.dtype], formats: Iterable[Format], domains: Iterable[Domain]
) -> list[Spec]:
    return [
        QuantizeSpec(dtype, fmt, tile, domain, _written(tile, fmt.values))
        for dtype, fmt, domain in itertools.product(dtypes, formats, domains)
        for tile in _tiles(fmt, domain)
    ]


def _silu_mul(arch: str, fmt: Format, domain: Domain) -> list[Spec]:
    tile = heuristics.silu_shape(1, 1, DEFAULT_TILE.columns, fmt, domain.masked, 1, arch).tile
    access = _written(tile, fmt.values)
    return [
        SiluMulSpec(torch.bfloat16, fmt, tile, domain, access, **choices, weighted=weighted)
        for choices, weighted in itertools.product(ACTIVATIONS, (False, True))
    ]


def _rms_norm(fmt: Format) -> list[Spec]:
    return [
        RmsNormSpec(
            torch.bfloat16,
            fmt,
            tile,
            access=_written(tile, fmt.values),
            tiles_per_thread=tiles_per_thread,
            max_warps=max_warps,
            weight_dtype=torch.bfloat16,
            residual=residual,
            normalized=normalized,
        )
        for tile, tiles_per_thread, max_warps in norm_columns(fmt)
        for residual, normalized in itertools.product((False, True), repeat=2)
    ]


def _launched_on(arch: str, specs: Iterable[Spec]) -> list[Spec]:
    """Return the specs as calls on an architecture have them, each once."""
    return list(dict.fromkeys(launched_on(spec, arch) for spec in specs))


def deepgemm(arch: str) -> list[Spec]:
    """bf16 activations in front of the GEMMs of DeepGEMM: dense, batched and grouped."""
    grouped = (domain for domain in EXPERTS if not domain.gathered)
    dense = _quantize((torch.bfloat16,), DEEPGEMM_FORMATS, (DENSE_ROWS, BATCH, *grouped))
    return _launched_on(arch, dense)


def moe(arch: str) -> list[Spec]:
    """A layer with a mixture of experts in bf16: the norm in front of it, tokens gathered for
    experts, and SwiGLU between their GEMMs, plain or as in gpt-oss."""
    formats = DEEPGEMM_FORMATS
    experts = (DENSE_ROWS, *(domain for domain in EXPERTS if not domain.gathered))
    specs = [
        *_quantize((torch.bfloat16,), formats, (DENSE_ROWS, *EXPERTS)),
        *(s for fmt in formats for domain in experts for s in _silu_mul(arch, fmt, domain)),
        *(spec for fmt in formats for spec in _rms_norm(fmt)),
    ]
    return _launched_on(arch, specs)


def _there_and_back(dtypes: Iterable[torch.dtype], formats: Iterable[Format]) -> list[Spec]:
    """`fake_quantize` and `dequantize`."""
    fakes = [
        QuantizeSpec(dtype, fmt, tile, access=_written(tile, dtype), fake=True)
        for dtype, fmt in itertools.product(dtypes, formats)
        for tile in _tiles(fmt, DENSE_ROWS)
    ]
    inverses = [
        DequantizeSpec(
            fmt,
            dtype,
            Access(
                load_bytes=DEFAULT_TILE.values_per_thread,
                store_bytes=heuristics.store_bytes(DEFAULT_TILE, dtype),
            ),
        )
        for dtype, fmt in itertools.product(dtypes, formats)
    ]
    return [*fakes, *inverses]


def of_each_kind(arch: str) -> list[Spec]:
    """Every kernel in bf16 and the formats of DeepGEMM."""
    others = _there_and_back((torch.bfloat16,), DEEPGEMM_FORMATS)
    return _launched_on(arch, [*deepgemm(arch), *moe(arch), *others])


def all_kernels(arch: str) -> list[Spec]:
    """Every dtype and format of dense rows, there and back, and what the other presets have."""
    formats = all_formats()
    dense = _quantize(INPUT_DTYPES, formats, (DENSE_ROWS,))
    others = _there_and_back(INPUT_DTYPES, formats)
    return _launched_on(arch, [*of_each_kind(arch), *dense, *others])


PRESETS: dict[str, Callable[[str], list[Spec]]] = {
    "deepgemm": deepgemm,
    "moe": moe,
    "all": all_kernels,
}
"""Specs for a target of `architectures`, by the name of what they are for."""
