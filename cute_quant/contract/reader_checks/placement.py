"""Strides and alignment of values and scales."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from cute_quant.contract.reader_checks.deep_gemm import (
    read_by_tma,
    wrong_batch_strides,
    wrong_block_strides,
)
from cute_quant.contract.reader_checks.quantized import Finding, Quantized
from cute_quant.contract.readers import DEEP_GEMM_SM90, DEEP_GEMM_SM100
from cute_quant.contract.tensors import flat_batch

TMA_BYTES = 16
"""Alignment of addresses and strides that TMA reads."""


def wrong_strides(given: Quantized) -> Iterator[Finding]:
    """Yield what is wrong with strides."""
    q, sf, fmt, reader = given.q, given.sf, given.fmt, given.reader
    if q.ndim < 2 or (tuple(sf.shape) != fmt.scale_shape(*given.shape) and not given.of_blocks):
        return
    if q.shape[-1] > 1 and q.stride(-1) != 1:
        text = f"q: expected rows contiguous along k, got strides {q.stride()}"
        yield Finding("strides", text)
    deep_gemm = given.kind in (DEEP_GEMM_SM90, DEEP_GEMM_SM100)
    if deep_gemm:
        yield from wrong_batch_strides(given)
    if given.of_blocks and given.kind == DEEP_GEMM_SM90:
        yield from wrong_block_strides(sf)
        return
    if deep_gemm and not fmt.byte_scales:
        # These are brought into the layout that it reads, whatever their strides.
        try:
            flat_batch("sf", sf.shape, sf.stride(), fmt.scale_dims)
        except ValueError as error:
            yield Finding("strides", str(error))
        return
    expected = fmt.scale_strides(*given.shape)
    # DeepGEMM looks at the strides of single columns and matrices too.
    exact = sf.stride()[-1:] + sf.stride()[:-2] == expected[-1:] + expected[:-2]
    if not has_strides(sf, expected) or (deep_gemm and not exact):
        text = f"sf: expected strides {expected} for {reader.name}, got {sf.stride()}"
        yield Finding("strides", text)


def has_strides(t: torch.Tensor, expected: tuple[int, ...]) -> bool:
    """Return whether a tensor has strides where they matter."""
    return all(
        size <= 1 or actual == stride
        for size, actual, stride in zip(t.shape, t.stride(), expected, strict=True)
    )


def wrong_alignment(given: Quantized) -> Iterator[Finding]:
    """Yield what TMA cannot read where it lies."""
    if given.q.ndim < 2 and not given.reader.k_grouped:
        return
    read = {"q": given.q}
    if read_by_tma(given):
        read["sf"] = given.sf
    for name, t in read.items():
        if t.numel() and t.data_ptr() % TMA_BYTES:
            yield Finding(
                "alignment",
                f"{name}: expected an address at a multiple of {TMA_BYTES} bytes, got "
                f"{t.data_ptr() % TMA_BYTES} past one",
            )
    q = given.q
    if q.ndim >= 2 and q.shape[-2] > 1 and q.stride(-2) * q.element_size() % TMA_BYTES:
        yield Finding(
            "alignment",
            f"q: expected rows at multiples of {TMA_BYTES} bytes, got a stride of "
            f"{q.stride(-2) * q.element_size()}",
        )
