"""Everything that can be wrong between a producer of quantized values and a GEMM that reads them.

Each finding is a sentence. Rules that need the shape to be right are left out where it is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from cute_quant.contract import reference, scale_storage
from cute_quant.contract.calls import ResultShape
from cute_quant.contract.dtypes import (
    BYTES_PER_WORD,
    E4M3_NAN,
    SMALLEST_UE8M0,
    UE8M0_NAN,
    UPPER_MAX,
    ceil_div,
    dtype_name,
)
from cute_quant.contract.format_choices import ROW_MAJOR
from cute_quant.contract.formats import Format
from cute_quant.contract.readers import (
    DEEP_GEMM_SM90,
    DEEP_GEMM_SM90_K_GROUPED,
    DEEP_GEMM_SM100,
    Reader,
)
from cute_quant.contract.rows import Rows
from cute_quant.contract.scale_conversion import exponents, rows_that_exist
from cute_quant.contract.tensors import flat_batch, last_column_rows
from cute_quant.contract.upper_scales import UpperScale, decode_scale

TMA_BYTES = 16
"""Alignment of addresses and strides that TMA reads."""
K_GROUPS = 128
"""Most groups of DeepGEMM's k-grouped GEMM."""
LEAST_PRODUCT = UPPER_MAX / 2**8
"""Least of the largest products of a value and an e4m3 scale under an encode scale that fits."""
MOST_SATURATED = 0.5
"""Share of e4m3 scales at their largest, from which on the encode scale was too large."""
PLAUSIBLE_AMAX = 2.0**-16, 2.0**16
"""Bounds of the largest magnitude of activations and weights, half's range on both sides."""
AMAX_FACTOR = 2.0
"""By how much the dequantized amax may differ from that of x."""
ERROR = 0.25
"""Relative error from which on values and scales do not belong to x."""


class Finding(NamedTuple):
    """Something that is wrong.

    Attributes:
        rule: its name: one of ``RULES``.
        text: a sentence that names the argument, what was expected and what came.
    """

    rule: str
    text: str

    def __str__(self) -> str:
        return self.text


RULES = (
    "format",
    "dtype",
    "device",
    "shape",
    "strides",
    "alignment",
    "padding",
    "swizzle",
    "powers of two",
    "nan",
    "upper scale",
    "values",
)


class Quantized(NamedTuple):
    """What is checked.

    Attributes:
        q, sf: values and scales.
        fmt: that they are said to have.
        reader: that is to read them.
        kind: its name.
        rows: which rows exist; None for all.
        upper: the scale over e4m3 scales; None without.
        x: what was quantized, where the caller has it.
    """

    q: torch.Tensor
    sf: torch.Tensor
    fmt: Format
    reader: Reader
    kind: str
    rows: Rows | None
    upper: UpperScale | None
    x: torch.Tensor | None


def findings(given: Quantized) -> list[Finding]:
    """Return all that is wrong, first what is wrong before values are looked at."""
    if given.reader.k_grouped:
        return list(_k_grouped(given))
    found = [*_format(given), *_dtypes(given)]
    if found:
        return found
    found = [*_shapes(given), *_strides(given), *_alignment(given)]
    if any(finding.rule in ("shape", "strides") for finding in found) or not given.q.numel():
        return found
    return [*found, *_contents(given)]


def _format(given: Quantized) -> Iterator[Finding]:
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


def _dtypes(given: Quantized) -> Iterator[Finding]:
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
    return f": view({dtype})" if t.element_size() == dtype.itemsize and t.dtype != dtype else ""


def _shape_of(given: Quantized) -> ResultShape:
    *batch, mn, columns = given.q.shape
    return ResultShape(tuple(batch), mn, columns * given.fmt.value_type.per_byte)


def _shapes(given: Quantized) -> Iterator[Finding]:
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
    shape = _shape_of(given)
    nbytes = q.shape[-1] * q.element_size()
    if nbytes % reader.k_multiple:
        yield Finding(
            "shape",
            f"q: expected rows of a multiple of {reader.k_multiple} bytes, got {nbytes}",
        )
    expected_shape = fmt.scale_shape(*shape)
    if tuple(sf.shape) == expected_shape:
        return
    text = f"sf: expected shape {expected_shape} for q {tuple(q.shape)}, got {tuple(sf.shape)}"
    unpadded = shape.mn * fmt.groups(shape.k)
    if fmt.blocked and sf.numel() == expected_shape[-1] and sf.ndim == 2 == q.ndim:
        text += ": flatten() it"
    elif fmt.blocked and not shape.batch_shape and sf.numel() == unpadded:
        yield Finding(
            "swizzle",
            f"sf: expected blocks of {fmt.scale_layout}, got as many scales as there are groups, "
            "without padding: convert_scales from row_major makes blocks of them",
        )
    yield Finding("shape", text)


def _strides(given: Quantized) -> Iterator[Finding]:
    q, sf, fmt, reader = given.q, given.sf, given.fmt, given.reader
    if q.ndim < 2 or tuple(sf.shape) != fmt.scale_shape(*_shape_of(given)):
        return
    shape = _shape_of(given)
    if q.shape[-1] > 1 and q.stride(-1) != 1:
        text = f"q: expected rows contiguous along k, got strides {q.stride()}"
        yield Finding("strides", text)
    deep_gemm = given.kind in (DEEP_GEMM_SM90, DEEP_GEMM_SM100)
    if deep_gemm and q.ndim == 3 and q.stride(0) != q.shape[1] * q.shape[2]:
        yield Finding(
            "strides",
            f"q: expected matrices {q.shape[1] * q.shape[2]} elements apart, got strides "
            f"{q.stride()}",
        )
    if deep_gemm and not fmt.byte_scales:
        # These are brought into the layout that it reads, whatever their strides.
        try:
            flat_batch("sf", sf.shape, sf.stride(), fmt.scale_dims)
        except ValueError as error:
            yield Finding("strides", str(error))
        return
    expected = fmt.scale_strides(*shape)
    wrong = [
        size > 1 and actual != stride
        for size, actual, stride in zip(sf.shape, sf.stride(), expected, strict=True)
    ]
    # DeepGEMM looks at the strides of single columns and matrices too.
    exact = sf.stride()[-1:] + sf.stride()[:-2] == expected[-1:] + expected[:-2]
    if any(wrong) or (deep_gemm and sf.numel() and not exact):
        text = f"sf: expected strides {expected} for {reader.name}, got {sf.stride()}"
        yield Finding("strides", text)


def _alignment(given: Quantized) -> Iterator[Finding]:
    for name, t in (("q", given.q), ("sf", given.sf)):
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


def _contents(given: Quantized) -> Iterator[Finding]:
    """Look at values and scales, which synchronizes."""
    sf, fmt = given.sf, given.fmt
    shape = _shape_of(given)
    scales = scale_storage.read(sf, fmt, shape.mn, shape.k)
    live = torch.ones(scales.shape[:2], dtype=torch.bool, device=sf.device)
    if given.rows is not None:
        live = live & rows_that_exist(given.rows, shape.mn)
    yield from _padding(given, shape)
    if given.reader.powers_of_two and not fmt.byte_scales:
        # In every row: the device looks at those that nobody asks for too.
        yield from _powers_of_two(scales, given.reader)
    yield from _nan(scales, live, fmt)
    if fmt.upper_scale:
        yield from _upper_scale(given, scales, live)
    if given.x is not None:
        yield from _belongs_to(given, given.x, shape, live)


def _padding(given: Quantized, shape: ResultShape) -> Iterator[Finding]:
    sf, fmt = given.sf, given.fmt
    modes = scale_storage.view(sf, fmt, shape.mn, shape.k)
    stored = scale_storage.stored_matrix(modes, fmt, shape.mn, shape.k)
    groups = fmt.groups(shape.k)
    rows, columns = stored.shape[1:]
    real = torch.zeros(rows, columns, dtype=torch.bool, device=sf.device)
    real[: shape.mn, :groups] = True
    wrong = (stored != 0) & ~real
    if wrong.any():
        _, row, group = wrong.nonzero()[0].tolist()
        yield Finding(
            "padding",
            f"sf: expected 0 where there is no row or group, got {stored[wrong][0].item()} at row "
            f"{row}, group {group}, and {int(wrong.sum())} such places of {int((~real).sum())} in "
            "each matrix",
        )
        if fmt.blocked and not _in_order(sf)[:, shape.mn * groups :].any():
            yield Finding(
                "swizzle",
                f"sf: expected blocks of {fmt.scale_layout}, got scales up to place "
                f"{shape.mn * groups} and zeros after it, as row-major scales have them: "
                "convert_scales from row_major makes blocks of them",
            )
    if fmt.mn_major and fmt.scale_rows(shape.mn) > shape.mn:
        yield from _padding_rows(sf, fmt, shape.mn)


def _in_order(sf: torch.Tensor) -> torch.Tensor:
    """Return the bytes of scales in blocks, (batch, bytes), in the order of memory."""
    return sf.view(torch.uint8).reshape(-1, sf.shape[-1])


def _padding_rows(sf: torch.Tensor, fmt: Format, mn: int) -> Iterator[Finding]:
    """Look at the rows past mn of MN-major scales that have storage."""
    aligned = fmt.scale_rows(mn)
    if sf.stride(-2) != 1 or sf.stride(-1) != aligned:
        return
    columns = sf.numel() // mn
    last = sf.as_strided((last_column_rows(sf) - mn,), (1,), _offset(sf, columns - 1, aligned, mn))
    inner = sf.as_strided((columns - 1, aligned - mn), (aligned, 1), sf.storage_offset() + mn)
    count = int(inner.count_nonzero() + last.count_nonzero())
    if count:
        yield Finding(
            "padding", f"sf: expected 0 in rows {mn} to {aligned - 1}, got {count} other elements"
        )


def _offset(sf: torch.Tensor, column: int, aligned: int, mn: int) -> int:
    return int(sf.storage_offset()) + column * aligned + mn


def _powers_of_two(scales: torch.Tensor, reader: Reader) -> Iterator[Finding]:
    # +Inf has the bits of a power of two, NaN has not.
    bits = scales.view(torch.int32)
    wrong = ((exponents(scales) == UE8M0_NAN) & ~scales.isposinf()) | (bits == SMALLEST_UE8M0)
    if wrong.any():
        batch, row, group = wrong.nonzero()[0].tolist()
        yield Finding(
            "powers of two",
            f"sf: expected powers of two in every row, on others {reader.name} traps, got "
            f"{scales[batch, row, group].item()} at ({batch}, {row}, {group}), and "
            f"{int(wrong.sum())} of {wrong.numel()} such scales",
        )


def _nan(scales: torch.Tensor, live: torch.Tensor, fmt: Format) -> Iterator[Finding]:
    if not fmt.byte_scales:
        nan = ~scales.isfinite()
    elif fmt.ue8m0:
        nan = scales == UE8M0_NAN
    else:
        nan = (scales & E4M3_NAN) == E4M3_NAN
    nan &= live.unsqueeze(2)
    if nan.any():
        batch, row, group = nan.nonzero()[0].tolist()
        yield Finding(
            "nan",
            f"sf: expected numbers, got NaN at ({batch}, {row}, {group}) and in {int(nan.sum())} "
            f"of {nan.numel()} groups: x held NaN or Inf there, or this is no scale",
        )


def _upper_scale(given: Quantized, scales: torch.Tensor, live: torch.Tensor) -> Iterator[Finding]:
    """Look whether encode and decode scale were mixed up, by producer or reader."""
    fmt, upper = given.fmt, given.upper
    if upper is None:
        text = f"decode_scale: expected the scale over the e4m3 scales of {fmt}, got none"
        yield Finding("upper scale", text)
        return
    shape = _shape_of(given)
    decoded = scales.view(fmt.scale_dtype).float().where(live.unsqueeze(2), 0.0)
    q = given.q.view(torch.uint8).reshape(*live.shape, -1)
    products = reference.multiply_back(q, decoded.nan_to_num(0.0), fmt, torch.float32).abs()
    largest = products.amax()
    if largest == 0 and given.x is None:
        return
    saturated = (decoded == torch.finfo(fmt.scale_dtype).max)[live].float().mean()
    if not fmt.row_scale and largest < LEAST_PRODUCT:
        yield Finding(
            "upper scale",
            f"sf: expected a largest product of value and scale near {UPPER_MAX:.0f}, got "
            f"{largest:.3g}: was a decode scale taken for the encode scale?",
        )
    elif not fmt.row_scale and saturated > MOST_SATURATED:
        yield Finding(
            "upper scale",
            f"sf: expected few scales of {torch.finfo(fmt.scale_dtype).max:.0f}, the largest, got "
            f"{saturated:.0%}: was a decode scale taken for the encode scale?",
        )
    factor = decode_scale(upper).reshape(-1, shape.mn if fmt.row_scale else 1, 1)
    amax = (products * factor).amax()
    if given.x is not None:
        expected = given.x.abs().amax().float()
        low, high = expected / AMAX_FACTOR, expected * AMAX_FACTOR
        words = f"the amax of x, {expected:.3g}"
    else:
        low, high = (largest.new_tensor(bound) for bound in PLAUSIBLE_AMAX)
        words = f"from {low:.3g} to {high:.3g}"
    if not (low <= amax) & (amax <= high):
        yield Finding(
            "upper scale",
            f"{upper.kind}: expected a dequantized amax of {words}, got {amax:.3g}: were encode "
            "and decode scale mixed up?",
        )


def _belongs_to(
    given: Quantized, x: torch.Tensor, shape: ResultShape, live: torch.Tensor
) -> Iterator[Finding]:
    """Compare dequantized values with what was quantized."""
    if tuple(x.shape) != (*shape.batch_shape, shape.mn, shape.k):
        text = f"x: expected the shape of the values {tuple(shape)}, got {tuple(x.shape)}"
        yield Finding("shape", text)
        return
    error = _error(given, given.sf, given.fmt, shape, live)
    if error <= ERROR:
        return
    if given.fmt.blocked:
        count = shape.mn * given.fmt.groups(shape.k)
        row_major = given.fmt.replace(scale_layout=ROW_MAJOR)
        unswizzled = _in_order(given.sf)[:, :count].reshape(row_major.scale_shape(*shape))
        unswizzled = unswizzled.view(given.fmt.scale_dtype)
        if _error(given, unswizzled, row_major, shape, live) <= ERROR:
            yield Finding(
                "swizzle",
                f"sf: expected blocks of {given.fmt.scale_layout}, got scales in row-major order: "
                "convert_scales from row_major makes blocks of them",
            )
            return
    yield Finding(
        "values",
        f"q, sf: expected the values of x, got a relative error of {error:.3g}: the scales belong "
        "to other groups, or to another x",
    )


def _error(
    given: Quantized, sf: torch.Tensor, fmt: Format, shape: ResultShape, live: torch.Tensor
) -> float:
    """Return the relative error of the rows that exist, of the finite values of x."""
    assert given.x is not None
    q = given.q.view(fmt.values)
    y = reference.dequantize(q, sf, fmt, torch.float32, given.upper).view(*live.shape, shape.k)
    x = given.x.float().view(y.shape)
    used = (live.unsqueeze(2) & x.isfinite() & y.isfinite()).expand_as(x)
    difference = (y - x).where(used, 0.0).double().norm()
    return float(difference / x.where(used, 0.0).double().norm().clamp(min=1e-300))


def _k_grouped(given: Quantized) -> Iterator[Finding]:
    """Check operands of a GEMM whose groups lie along rows: k rows, mn columns."""
    q, sf, fmt, reader = given.q, given.sf, given.fmt, given.reader
    yield from _format(given)
    if q.dtype != fmt.values:
        text = f"q: expected {dtype_name(fmt.values)}, got {dtype_name(q.dtype)}"
        yield Finding("dtype", text)
    expected_dtype = torch.int32 if fmt.byte_scales else torch.float32
    if sf.dtype is not expected_dtype:
        text = f"sf: expected {dtype_name(expected_dtype)}, got {dtype_name(sf.dtype)}"
        yield Finding("dtype", text)
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
            yield Finding("strides", text)
    yield from _alignment(given._replace(q=q.view(-1)))
    size = fmt.group_size
    mn = sf.shape[0] if sm90 else sf.shape[1]
    sum_k = q.numel() // max(mn, 1) if sm90 else q.shape[0]
    groups = sf.shape[1] if sm90 else sf.shape[0]
    if not sm90 and q.shape[1] != mn:
        text = f"sf: expected {q.shape[1]} columns, those of q, got shape {tuple(sf.shape)}"
        yield Finding("shape", text)
    if not sm90 and mn % BYTES_PER_WORD:
        yield Finding("shape", f"sf: expected a multiple of {BYTES_PER_WORD} columns, got {mn}")
    per_row = size * BYTES_PER_WORD if fmt.byte_scales else size
    least = ceil_div(sum_k, per_row)
    if groups < least or (sm90 and groups * size != sum_k):
        yield Finding(
            "shape",
            f"sf: expected {least} or more rows of scales for {sum_k} rows of values in groups of "
            f"{size}, got {groups}",
        )
    if not fmt.byte_scales and sf.numel():
        scales = sf.reshape(1, *sf.shape)
        if reader.powers_of_two:
            yield from _powers_of_two(scales, reader)
        yield from _nan(scales, torch.ones_like(scales[..., 0], dtype=torch.bool), fmt)
    elif sf.numel():
        bytes_ = sf.view(torch.uint8).view(1, groups, -1)
        yield from _nan(bytes_, torch.ones_like(bytes_[..., 0], dtype=torch.bool), fmt)
