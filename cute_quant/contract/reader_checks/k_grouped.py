"""Operands of DeepGEMM's k-grouped GEMMs, whose groups lie along rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from cute_quant.contract.dtypes import BYTES_PER_WORD, ceil_div, dtype_name
from cute_quant.contract.reader_checks.operands import wrong_format
from cute_quant.contract.reader_checks.placement import wrong_alignment
from cute_quant.contract.reader_checks.quantized import Finding, Quantized
from cute_quant.contract.reader_checks.scales import wrong_nan, wrong_powers_of_two
from cute_quant.contract.readers import DEEP_GEMM_SM90_K_GROUPED


def wrong_k_grouped(given: Quantized) -> Iterator[Finding]:
    """Yield what is wrong for a GEMM whose groups lie along rows: k rows, mn columns."""
    q, sf, fmt, reader = given.q, given.sf, given.fmt, given.reader
    found = [*wrong_format(given), *_k_grouped_dtypes(given)]
    yield from found
    if found:
        return
    sm90 = given.kind == DEEP_GEMM_SM90_K_GROUPED
    if q.ndim != (1 if sm90 else 2) or sf.ndim != 2:
        shapes = (
            "q (sum_k * mn,) and sf (mn, sum_k / g)" if sm90 else "q (sum_k, mn) and sf (.., mn)"
        )
        text = f"q, sf: expected {shapes}, got {tuple(q.shape)} and {tuple(sf.shape)}"
        yield Finding("shape", text)
        return
    for name, t in (("q", q), ("sf", sf)):
        if not t.is_contiguous() and not (sm90 and name == "sf"):
            text = f"{name}: expected a contiguous tensor, got strides {t.stride()}"
            found.append(Finding("strides", text))
    yield from found
    if found:
        return
    yield from wrong_alignment(given._replace(q=q.view(-1)))
    yield from _k_grouped_shapes_sm90(given) if sm90 else _k_grouped_shapes(given)
    if not sf.numel():
        return
    scales = sf.reshape(1, *sf.shape)
    if fmt.byte_scales:
        scales = scales.contiguous().view(torch.uint8)
    elif reader.powers_of_two:
        yield from wrong_powers_of_two(scales, reader)
    yield from wrong_nan(scales, torch.ones_like(scales[..., 0], dtype=torch.bool), fmt)


def _k_grouped_dtypes(given: Quantized) -> Iterator[Finding]:
    q, sf, fmt = given.q, given.sf, given.fmt
    if q.dtype != fmt.values:
        text = f"q: expected {dtype_name(fmt.values)}, got {dtype_name(q.dtype)}"
        yield Finding("dtype", text)
    if sf.dtype is not fmt.sf_dtype:
        text = f"sf: expected {dtype_name(fmt.sf_dtype)}, got {dtype_name(sf.dtype)}"
        yield Finding("dtype", text)
    if q.device != sf.device:
        yield Finding("device", f"sf: expected the device of q, {q.device}, got {sf.device}")


def _k_grouped_shapes_sm90(given: Quantized) -> Iterator[Finding]:
    (mn, columns), size = given.sf.shape, given.fmt.group_size
    if given.q.numel() != mn * columns * size:
        yield Finding(
            "shape",
            f"sf: expected exactly sum_k / {size} columns of scales for the {given.q.numel()} "
            f"elements of q, sum_k * {mn}, got {columns}, which are those of "
            f"{mn * columns * size}",
        )


def _k_grouped_shapes(given: Quantized) -> Iterator[Finding]:
    (sum_k, mn), (groups, columns) = given.q.shape, given.sf.shape
    fmt = given.fmt
    if columns != mn:
        text = f"sf: expected {mn} columns, those of q, got shape {tuple(given.sf.shape)}"
        yield Finding("shape", text)
    if columns % BYTES_PER_WORD:
        text = f"sf: expected a multiple of {BYTES_PER_WORD} columns, got {columns}"
        yield Finding("shape", text)
    least = ceil_div(sum_k, fmt.group_size * fmt.groups_per_column)
    if groups < least:
        yield Finding(
            "shape",
            f"sf: expected {least} or more rows of scales for {sum_k} rows of values in groups of "
            f"{fmt.group_size}, got {groups}",
        )
