"""Which kernels are built ahead of time: what calls ask for by use, on tensors as torch allocates
them, whose rows start at multiples of 32 bytes where k is a multiple of 16."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch

from cute_quant.formats import (
    BLOCKED_GROUP_SIZE,
    FLOAT32,
    GROUP_SIZES,
    INPUT_DTYPES,
    SCALE_FORMATS,
    UE8M0_BLOCKED,
    UE8M0_PACKED,
    VALUE_TYPES,
    WHOLE_ROW,
    Format,
    make_format,
)
from cute_quant.launch import TWO_ROWS, store_bytes
from cute_quant.rows import DENSE, Indexed, Masked, PrefixSum
from cute_quant.specs import (
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
)

DEEPGEMM_FORMATS = (
    make_format(128, UE8M0_PACKED, False),
    make_format(32, UE8M0_PACKED, False),
    make_format(128, FLOAT32, False),
)
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

TILES_OF_NORMS = (1, 2, 4)
"""`RmsNormSpec.tiles_per_thread`, the more the wider rows are."""


def _tiles(fmt: Format, domain: Domain) -> tuple[Tile, ...]:
    """What `launch.shape` picks for small inputs and for large ones."""
    shared = DEFAULT_TILE.lanes_per_group(fmt.group_size) > 1 and fmt.group_size != WHOLE_ROW
    return (DEFAULT_TILE, TWO_ROWS) if shared and not domain.masked else (DEFAULT_TILE,)


def _quantize(
    dtypes: Iterable[torch.dtype], formats: Iterable[Format], domains: Iterable[Domain]
) -> list[Spec]:
    return [
        QuantizeSpec(dtype, fmt, tile, domain)
        for dtype, fmt, domain in itertools.product(dtypes, formats, domains)
        for tile in _tiles(fmt, domain)
    ]


def deepgemm() -> list[Spec]:
    """bf16 activations in front of the GEMMs of DeepGEMM: dense, batched and grouped."""
    grouped = (domain for domain in EXPERTS if not domain.gathered)
    return _quantize((torch.bfloat16,), DEEPGEMM_FORMATS, (DENSE_ROWS, BATCH, *grouped))


def moe() -> list[Spec]:
    """A layer with a mixture of experts in bf16: the norm in front of it, tokens gathered for
    experts, and SwiGLU between their GEMMs."""
    bf16, formats = torch.bfloat16, DEEPGEMM_FORMATS
    experts = (DENSE_ROWS, *(domain for domain in EXPERTS if not domain.gathered))
    activations = [
        SiluMulSpec(bf16, fmt, tile, domain, weighted=weighted)
        for fmt, domain, weighted in itertools.product(formats, experts, (False, True))
        for tile in _tiles(fmt, domain)
    ]
    norms = [
        RmsNormSpec(bf16, fmt, tiles_per_thread=tiles, residual=residual)
        for fmt, tiles, residual in itertools.product(formats, TILES_OF_NORMS, (False, True))
    ]
    return [*_quantize((bf16,), formats, (DENSE_ROWS, *EXPERTS)), *activations, *norms]


def _there_and_back(dtypes: Iterable[torch.dtype], formats: Iterable[Format]) -> list[Spec]:
    """`fake_quantize` and `dequantize`."""
    fakes = [
        QuantizeSpec(
            dtype, fmt, tile, access=Access(store_bytes=store_bytes(DEFAULT_TILE, dtype)), fake=True
        )
        for dtype, fmt in itertools.product(dtypes, formats)
        for tile in _tiles(fmt, DENSE_ROWS)
    ]
    inverses = [
        DequantizeSpec(
            fmt, dtype, Access(load_bytes=16, store_bytes=store_bytes(DEFAULT_TILE, dtype))
        )
        for dtype, fmt in itertools.product(dtypes, formats)
    ]
    return [*fakes, *inverses]


def of_each_kind() -> list[Spec]:
    """Every kernel in bf16 and the formats of DeepGEMM."""
    others = _there_and_back((torch.bfloat16,), DEEPGEMM_FORMATS)
    return list(dict.fromkeys([*deepgemm(), *moe(), *others]))


def all_kernels() -> list[Spec]:
    """Every dtype and format of dense rows, there and back, and what the other presets have."""
    formats = [
        make_format(group_size, scale_format, round_scale, dtype)
        for dtype, group_size, scale_format, round_scale in itertools.product(
            VALUE_TYPES, (*GROUP_SIZES, WHOLE_ROW), SCALE_FORMATS, (False, True)
        )
        if (scale_format != UE8M0_BLOCKED or group_size == BLOCKED_GROUP_SIZE)
        and (scale_format.startswith(FLOAT32) or not round_scale)
    ]
    dense = _quantize(INPUT_DTYPES, formats, (DENSE_ROWS,))
    return list(dict.fromkeys([*of_each_kind(), *dense, *_there_and_back(INPUT_DTYPES, formats)]))


PRESETS = {"deepgemm": deepgemm, "moe": moe, "all": all_kernels}
"""Specs by the name of what they are for."""
