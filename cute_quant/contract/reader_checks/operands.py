"""Formats, dtypes and shapes, as every reader but those of k-grouped GEMMs has them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from cute_quant.contract import blocks
from cute_quant.contract.dtypes import dtype_name
from cute_quant.contract.format_choices import BLOCKED, BLOCKED_8, ROW_MAJOR
from cute_quant.contract.formats import Format
from cute_quant.contract.reader_checks.quantized import Finding, Quantized


def block_orders(fmt: Format) -> list[Format]:
    """Return formats whose scales readers of blocks are given by mistake."""
    layouts = (ROW_MAJOR, BLOCKED, BLOCKED_8)
    return [fmt.replace(scale_layout=name) for name in layouts if name != fmt.scale_layout]


def wrong_format(given: Quantized) -> Iterator[Finding]:
    """Yield what is wrong with the format."""
    reader, fmt = given.reader, given.fmt
    if not any(readable.has(fmt) for readable in reader.formats):
        expected = "; or ".join(map(str, reader.formats))
        yield Finding("format", f"fmt: expected {expected}, which {reader.name} reads, got {fmt}")
    elif reader.powers_of_two and not fmt.power_of_two:
        yield Finding(
            "format",
            f"fmt: expected scales that are powers of two, on others {reader.name} traps: "
            f"round_scale=True, got {fmt}",
        )


def wrong_dtypes(given: Quantized) -> Iterator[Finding]:
    """Yield what is wrong with dtypes and devices."""
    q, sf, fmt, reader = given.q, given.sf, given.fmt, given.reader
    values = (fmt.values,)
    if fmt.value_type.per_byte > 1:
        values = (reader.fp4_dtype,)
    if q.dtype not in values:
        yield Finding(
            "dtype",
            f"q: expected {dtype_name(values[0])}, as {reader.name} has it, got "
            f"{dtype_name(q.dtype)}{_view_hint(q, values[0])}",
        )
    if sf.dtype is not fmt.sf_dtype:
        yield Finding(
            "dtype",
            f"sf: expected {dtype_name(fmt.sf_dtype)}, got {dtype_name(sf.dtype)}"
            f"{_view_hint(sf, fmt.sf_dtype)}",
        )
    if q.device != sf.device:
        yield Finding("device", f"sf: expected the device of q, {q.device}, got {sf.device}")


def _view_hint(t: torch.Tensor, dtype: torch.dtype) -> str:
    """Return what makes the dtype right, for a message."""
    if {t.dtype, dtype} == {torch.int32, torch.float32}:
        return ": convert_scales makes packed words of float32 scales, and float32 of words"
    return f": view({dtype})" if t.element_size() == dtype.itemsize and t.dtype != dtype else ""


def wrong_shapes(given: Quantized) -> Iterator[Finding]:
    """Yield what is wrong with the shapes of values and scales."""
    q, sf, fmt, reader = given.q, given.sf, given.fmt, given.reader
    dimensions = (2, 3) if reader.batched else (2,)
    if given.rows is not None:
        dimensions = (1 + len(given.rows.dimensions),)
    if q.ndim not in dimensions:
        expected = " or ".join(f"{n}" for n in dimensions)
        text = f"q: expected {expected} dimensions for {reader.name}, got shape {tuple(q.shape)}"
        yield Finding("shape", text)
        if q.ndim < 2:
            return
    shape = given.shape
    nbytes = q.shape[-1] * q.element_size()
    if nbytes % reader.k_multiple:
        yield Finding(
            "shape",
            f"q: expected rows of a multiple of {reader.k_multiple} bytes, got {nbytes}",
        )
    expected_shape = fmt.scale_shape(*shape)
    if tuple(sf.shape) == expected_shape or given.of_blocks:
        return
    words = f"{expected_shape}"
    if given.takes_blocks:
        words += f", or {blocks.scale_shape(fmt, *shape)} of blocks of weights,"
    text = f"sf: expected shape {words} for q {tuple(q.shape)}, got {tuple(sf.shape)}"
    if fmt.blocked and sf.numel() == expected_shape[-1] and sf.ndim == 2 == q.ndim:
        text += ": flatten() it if it is swizzled, convert_scales from row_major if it is row-major"
    elif fmt.blocked:
        others = [o for o in block_orders(fmt) if math.prod(o.scale_shape(*shape)) == sf.numel()]
        if others:
            names = " or ".join(other.scale_layout for other in others)
            yield Finding(
                "swizzle",
                f"sf: expected blocks of {fmt.scale_layout}, got as many scales as {names} has: "
                f"convert_scales from {names} makes blocks of them",
            )
    yield Finding("shape", text)
