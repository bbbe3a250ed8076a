"""Weights in square blocks: inputs, memory full of poison, and what every byte has to be."""

from __future__ import annotations

import math

import torch

from cute_quant import (
    DEEP_GEMM,
    DEEP_GEMM_32,
    DEEP_GEMM_SM90,
    GROUPWISE_FP8,
    MXFP4,
    MXFP8,
    NVFP4,
    Format,
)
from cute_quant.contract.upper_scales import UpperScale
from tests import oracle
from tests.helpers import poisoned, poisoned_scales, poisoned_values, random_bits
from tests.oracle import INTEGERS

E5M2, E2M1 = torch.float8_e5m2, torch.float4_e2m1fn_x2
FORMATS = (
    DEEP_GEMM,
    DEEP_GEMM_SM90,
    DEEP_GEMM_SM90.replace(round_scale=True, min_scale="deepgemm"),
    DEEP_GEMM_32,
    MXFP8,
    MXFP4,
    DEEP_GEMM.replace(scale_layout="row_major", values=E5M2),
    DEEP_GEMM.replace(scale_layout="row_major_packed"),
    GROUPWISE_FP8.replace(values=torch.int8, group_size=32),
    DEEP_GEMM_SM90.replace(numerics="deepgemm", min_scale="deepgemm"),
    MXFP8.replace(scale_layout="8x4", min_scale="ocp"),
    DEEP_GEMM.replace(values=E2M1),
    GROUPWISE_FP8.replace(values=E2M1, group_size=32, round_scale=True),
)
GROUPS = (MXFP4, NVFP4, NVFP4.replace(scale_layout="8x4"))
"""Formats that weights are requantized to in groups of rows."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def special_weights(
    shape: tuple[int, ...], dtype: torch.dtype, size: int, seed: int
) -> torch.Tensor:
    """Random bits, whose blocks take turns at everything that needs care."""
    *leading, n, k = shape
    flat = random_bits((math.prod(leading), n, k), dtype, seed)
    integers = flat.view(INTEGERS[dtype.itemsize])
    generator = torch.Generator().manual_seed(seed)
    infinity = torch.tensor(math.inf, dtype=dtype).view(integers.dtype).item()
    finite = integers.where((integers & infinity) != infinity, integers ^ infinity).view(dtype)
    normal = torch.randn(flat.shape, generator=generator)
    kinds = (
        lambda part: normal,
        lambda part: finite,
        lambda part: normal * 1e-7,
        lambda part: torch.zeros(()),
        lambda part: torch.full((), -0.0),
        lambda part: flat,
        lambda part: normal * 100,
    )
    weights = finite.clone()
    blocks = [(i, j) for i in range(0, n, size) for j in range(0, k, size)]
    for matrix in range(len(flat)):
        for number, (i, j) in enumerate(blocks):
            here = (matrix, slice(i, i + size), slice(j, j + size))
            kind = (number + matrix + seed) % (len(kinds) + 3)
            if kind < len(kinds):
                source = kinds[kind](None)
                part = source[here] if source.ndim else source
                weights[here] = part.to(dtype)
                continue
            # One value that is not finite, or the only one that counts, anywhere in its block.
            block = weights[here]
            block.copy_(normal[here].to(dtype))
            place = torch.randint(block.numel(), (1,), generator=generator).item()
            value = (math.nan, -math.inf, -300.0)[kind - len(kinds)]
            block[place // block.shape[1], place % block.shape[1]] = value
    return weights.view(shape)


def views(w: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the same weights (..., n, k) with strides of every kind."""
    *leading, n, k = w.shape

    def laid_out(rows: int, columns: int, pad: int, offset: int) -> torch.Tensor:
        stride = columns + pad
        strides = [stride * rows + pad]
        for size in reversed(leading[1:]):
            strides.insert(0, strides[0] * size)
        memory = torch.zeros(offset + math.prod(leading) * (stride * rows + pad), dtype=w.dtype)
        return memory.as_strided(
            (*leading, rows, columns), (*strides[: len(leading)], stride, 1), offset
        )

    found = {}
    for name, pad, offset in (("whole", 0, 0), ("apart", 16, 0), ("unaligned", 3, 1)):
        found[name] = laid_out(n, k, pad, offset).copy_(w)
        found[f"{name} along n"] = laid_out(k, n, pad, offset).copy_(w.mT).mT
    return found


def poisoned_results(
    fmt: Format, shape: tuple[int, ...], device: str = "cpu", last_padding: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return memory for q and sf of weights (..., n, k) in blocks."""
    *leading, n, k = shape
    q = poisoned_values(n, k, device, fmt.values, tuple(leading))
    if fmt.scale_dtype is not torch.float32:
        return q, poisoned_scales(fmt, n, k, device, last_padding, tuple(leading))
    blocks = (*leading, -(-n // fmt.group_size), -(-k // fmt.group_size))
    return q, poisoned(4 * math.prod(blocks), device).view(torch.float32).view(blocks)


def expect_requantized(
    results: tuple[torch.Tensor, torch.Tensor],
    w8: torch.Tensor,
    w_sf: torch.Tensor,
    fmt: Format,
    upper: UpperScale | None = None,
) -> None:
    """Write the oracle's results of ``requantize_blocks`` to memory of poison."""
    q, sf = results
    of_most = w_sf.shape[-2:] == (-(-w8.shape[-2] // 128), -(-w8.shape[-1] // 128))
    size = 128 if of_most else 32
    w = oracle.products_of_blocks(w8, w_sf, DEEP_GEMM_SM90, torch.float32, size)
    if fmt.values is E2M1:
        oracle.quantize_into(w, q, sf, fmt, upper=upper)
    else:
        oracle.quantize_blocks_into(w, q, sf, fmt)


def checkpoint(
    shape: tuple[int, ...], seed: int, size: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return e4m3 of any bits but few NaN, and scales of blocks of which some are special."""
    *leading, n, k = shape
    generator = torch.Generator().manual_seed(seed)
    w8 = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    rare = torch.rand(shape, generator=generator) < 1e-5
    w8 = w8.where((w8 & 0x7F != 0x7F) | rare, 0x31).view(torch.float8_e4m3fn)
    blocks = (*leading, -(-n // size), -(-k // size))
    w_sf = torch.rand(blocks, generator=generator) * 1e-3
    special = torch.tensor([0.0, 1e-30, 1e30, math.nan, math.inf, -2e-4])
    flat = w_sf.view(-1)
    flat[2::7] = special.repeat(len(flat))[: len(flat[2::7])]
    return w8, w_sf
