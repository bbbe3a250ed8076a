"""What every byte of a call is, computed on numpy arrays by other methods than the package's.

Codes come from a search in the table of all magnitudes, exponents from a search in the table of all
powers of two, and every byte goes to an offset of its own. Products and quotients are those of
float64, rounded once to float32: float64 has more than twice its bits, so that this is what one
rounding of the exact result gives. `test_oracle` holds it to `exact`, which works in fractions.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from cute_quant import Format, Indexed, Masked, PrefixSum
from cute_quant.contract.rows import Rows
from tests.exact import LARGEST, MAGNITUDES, exact_min_scale, nan_byte

POWERS = 2.0 ** np.arange(-127, 128)
"""Scales by their UE8M0 byte; the last byte is NaN's."""
NAN_EXPONENT = 255
TABLES = {dtype: np.array([float(m) for m in table]) for dtype, table in MAGNITUDES.items()}
FLOAT32_NAN = np.uint32(0x7FC00000)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
ROWS_OF_LAYOUT = {"row_major": 1, "128x4": 128}
"""Rows to whose multiple scales are padded, where it is not 4."""


class Scales(NamedTuple):
    """Scales of groups.

    Attributes:
        exponents: UE8M0 bytes, or None where scales are no powers of two.
        floats: float64; NaN for groups that are not finite.
    """

    exponents: np.ndarray | None
    floats: np.ndarray


def to_array(t: torch.Tensor) -> np.ndarray:
    """Return the values of a floating-point tensor as float64."""
    return t.detach().cpu().double().numpy()


def in_groups(x: np.ndarray, fmt: Format) -> np.ndarray:
    """Return (..., k) as (..., groups, group_size), short groups filled up with zeros."""
    k = x.shape[-1]
    size = k if fmt.group_size == -1 else fmt.group_size
    padded = np.zeros((*x.shape[:-1], -(-k // size) * size))
    padded[..., :k] = x
    return padded.reshape(*x.shape[:-1], -1, size)


def scales_of(x: np.ndarray, fmt: Format) -> Scales:
    """Return the scales of the groups of x (..., k), k > 0."""
    groups = in_groups(x, fmt)
    finite = np.isfinite(groups).all(-1)
    amax = np.abs(np.where(finite[..., None], groups, 0.0)).max(-1)
    largest = LARGEST[fmt.values]
    floor = np.float64(np.float32(exact_min_scale(fmt.min_scale, fmt.values)))
    if fmt.scale_dtype is torch.float32 and not fmt.round_scale:
        if fmt.numerics == "deepgemm":
            quotients = amax * np.float64(np.float32(1 / largest))
        else:
            quotients = amax / largest
        floats = np.maximum(quotients.astype(np.float32).astype(np.float64), floor)
        return Scales(None, np.where(finite, floats, np.nan))
    # The first power of which M times is no less than amax, and which is no less than the floor.
    exponents = np.maximum(
        np.searchsorted(largest * POWERS, amax), np.searchsorted(POWERS, floor)
    ).astype(np.uint8)
    exponents = np.where(finite, exponents, NAN_EXPONENT).astype(np.uint8)
    return Scales(exponents, floats_of(exponents))


def floats_of(exponents: np.ndarray) -> np.ndarray:
    """Return the scales of UE8M0 bytes as float64."""
    return np.append(POWERS, np.nan)[exponents]


def codes_of(x: np.ndarray, scales: np.ndarray, fmt: Format) -> np.ndarray:
    """Return the bytes of the values of x (..., k) under scales (..., groups)."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        multipliers = (1.0 / scales).astype(np.float32).astype(np.float64)
        products = (in_groups(x, fmt) * multipliers[..., None]).astype(np.float32)
    magnitudes = np.abs(products.astype(np.float64))
    table = TABLES[fmt.values]
    middles = (table[:-1] + table[1:]) / 2
    codes = np.searchsorted(middles, magnitudes)  # a tie is below the middle
    tied = middles[np.minimum(codes, len(middles) - 1)] == magnitudes
    codes += tied & (codes % 2 == 1)
    negative = np.signbit(products)
    if fmt.values is torch.int8:
        codes = np.where(negative, -codes, codes)
    else:
        codes = np.where(negative, codes | 0x80, codes)
    codes = np.where(np.isnan(scales)[..., None], nan_byte(fmt.values), codes)
    return codes.astype(np.uint8).reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]


def live_rows(
    rows: Rows | None, index: torch.Tensor | None, matrices: int, mn: int, tokens: int
) -> np.ndarray:
    """Return the row of the input, all leading dimensions flattened, for each row of the result.

    Args:
        tokens: rows of the input.

    Returns:
        (matrices, mn), -1 where the row does not exist.
    """
    if index is None:
        sources = np.arange(matrices * mn)
    else:
        sources = index.cpu().numpy().astype(np.int64).flatten()
        sources[(sources < 0) | (sources >= tokens)] = -1
    sources = sources.reshape(matrices, mn)
    match rows:
        case Masked():
            for expert, count in enumerate(rows.masked_m.tolist()):
                sources[expert, max(count, 0) :] = -1
        case PrefixSum():
            live, start = np.zeros(mn, bool), 0
            for end in rows.ends.tolist():
                end = min(max(end, 0), mn)
                live[start:end] = True
                start = -(-end // rows.alignment) * rows.alignment
            sources[:, ~live] = -1
        case Indexed():
            for row, group in enumerate(rows.m_indices.tolist()):
                if group < 0:
                    sources[:, row] = -1
    return sources


def scale_offset(
    scale_layout: str, nbytes: int, batch: int, row: int, group: int, mn: int, groups: int
) -> int:
    """Return the offset in bytes of a group's scale, which has `nbytes`."""
    aligned = (mn + 3) // 4 * 4
    if scale_layout == "mn_major_packed":
        words = (groups + 3) // 4
        return 4 * ((batch * words + group // 4) * aligned + row) + group % 4
    if scale_layout == "mn_major":
        return nbytes * ((batch * groups + group) * aligned + row)
    if scale_layout == "row_major":
        return nbytes * ((batch * mn + row) * groups + group)
    stored_groups = (groups + 3) // 4 * 4
    stored_rows = (mn + 127) // 128 * 128
    block = (row // 128) * (stored_groups // 4) + group // 4
    inside = (row % 32) * 16 + (row % 128) // 32 * 4 + group % 4
    return batch * stored_rows * stored_groups + block * 512 + inside


def quantize_into(
    x: torch.Tensor,
    q: torch.Tensor,
    sf: torch.Tensor,
    fmt: Format,
    rows: Rows | None = None,
    index: torch.Tensor | None = None,
) -> None:
    """Write what ``quantize`` writes to `q` and to the storage of `sf`, both on the CPU.

    Args:
        x: (..., mn, k), or (tokens, k) with an index; of any floating-point dtype.
        q: (..., q_rows, k), q_rows >= mn, of any strides.
        sf: of the shape of the format, its elements where the format has them.
    """
    k = x.shape[-1]
    leading = (x if index is None else index).shape[: -1 if index is not None else -2]
    matrices, q_rows = math.prod(leading), q.shape[-2]
    mn = x.shape[-2] if index is None else index.shape[-1]
    if not k or not matrices:
        return
    flat = to_array(x).reshape(-1, k)
    sources = live_rows(rows, index, matrices, mn, len(flat))
    exists = sources >= 0
    values = np.zeros((matrices, mn, k))
    values[exists] = flat[sources[exists]]

    scales = scales_of(values, fmt) if mn else Scales(None, np.zeros((matrices, 0, 1)))
    codes = np.zeros((matrices, q_rows, k), np.uint8)
    if mn:
        codes[:, :mn] = codes_of(values, scales.floats, fmt)
        codes[:, :mn][~exists] = 0
    counts = np.full(matrices, q_rows)
    if isinstance(rows, Masked):
        counts = rows.masked_m.cpu().numpy().clip(0, mn)
    written = np.arange(q_rows) < counts[:, None]
    target = q.view(torch.uint8)
    new = torch.from_numpy(codes).view(q.shape)
    target.copy_(new.where(torch.from_numpy(written).view(*q.shape[:-1], 1), target))
    if mn:
        _store_scales(scales, exists, counts if isinstance(rows, Masked) else None, sf, fmt)


def _store_scales(
    scales: Scales, exists: np.ndarray, counts: np.ndarray | None, sf: torch.Tensor, fmt: Format
) -> None:
    """Write all scales of rows that exist and 0 to all padding, as far as the storage goes.

    Args:
        counts: rows of each masked matrix; scales past the next multiple of 4 stay.
    """
    matrices, mn = exists.shape
    groups = scales.floats.shape[-1]
    stored_groups = groups
    if fmt.scale_layout in ("mn_major_packed", "128x4"):
        stored_groups = (groups + 3) // 4 * 4
    unit = ROWS_OF_LAYOUT.get(fmt.scale_layout, 4)
    stored_rows = (mn + unit - 1) // unit * unit
    if fmt.scale_dtype is torch.float32:
        stored = scales.floats.astype(np.float32).view(np.uint32)
        stored = np.where(np.isnan(scales.floats), FLOAT32_NAN, stored)
    else:
        stored = scales.exponents
    padded = np.zeros((matrices, stored_rows, stored_groups), stored.dtype)
    padded[:, :mn, :groups] = np.where(exists[..., None], stored, 0)
    limits = np.full(matrices, stored_rows)
    if counts is not None:
        limits = np.minimum((counts + 3) // 4 * 4, stored_rows)
    batch, row, group = np.nonzero(
        np.broadcast_to(np.arange(stored_rows)[None, :, None] < limits[:, None, None], padded.shape)
    )
    nbytes = padded.itemsize
    offsets = scale_offset(fmt.scale_layout, nbytes, batch, row, group, mn, groups)
    offsets += sf.storage_offset() * sf.element_size()
    storage = torch.empty(0, dtype=torch.uint8).set_(sf.untyped_storage()).numpy()
    inside = offsets < len(storage)
    places = offsets[inside, None] + np.arange(nbytes)
    storage[places] = padded[batch, row, group][inside, None].view(np.uint8).reshape(-1, nbytes)


def stored_scales(sf: torch.Tensor, fmt: Format, matrices: int, mn: int, k: int) -> np.ndarray:
    """Return the scales (matrices, mn, groups) that lie in the storage of `sf`, as float64."""
    size = k if fmt.group_size == -1 else fmt.group_size
    shape = matrices, mn, -(-k // max(size, 1))
    batch, row, group = np.indices(shape)
    nbytes = fmt.scale_dtype.itemsize
    offsets = scale_offset(fmt.scale_layout, nbytes, batch, row, group, mn, shape[2])
    offsets += sf.storage_offset() * sf.element_size()
    storage = torch.empty(0, dtype=torch.uint8, device=sf.device).set_(sf.untyped_storage())
    content = storage.cpu().numpy()[offsets[..., None] + np.arange(nbytes)]
    if fmt.scale_dtype is torch.float32:
        with np.errstate(invalid="ignore"):  # signaling NaN
            return content.copy().view(np.float32)[..., 0].astype(np.float64)
    return floats_of(content[..., 0])


def values_of(codes: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Return the values of bytes as float64."""
    if dtype is torch.int8:
        return codes.view(np.int8).astype(np.float64)
    table = TABLES[dtype]
    magnitudes = np.full(128, np.nan)
    magnitudes[: len(table)] = table
    if dtype is torch.float8_e5m2:
        magnitudes[0x7C] = np.inf
    return np.where(codes & 0x80, -1.0, 1.0) * magnitudes[codes & 0x7F]


def products(codes: np.ndarray, scales: np.ndarray, fmt: Format, dtype: torch.dtype):
    """Return values times scales, rounded to float32 and then to `dtype`, as a tensor.

    Args:
        codes: (..., k), bytes.
        scales: (..., groups), float64.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        exact = in_groups(values_of(codes, fmt.values), fmt) * scales[..., None]
        rounded = exact.astype(np.float32).reshape(*codes.shape[:-1], -1)[..., : codes.shape[-1]]
    return _rounded(np.ascontiguousarray(rounded), dtype)


def _rounded(x: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Round float32 to `dtype`, to nearest even; each NaN becomes the same one."""
    if dtype is torch.float16:
        with np.errstate(over="ignore"):
            return torch.from_numpy(np.where(np.isnan(x), np.nan, x).astype(np.float16))
    if dtype is torch.float32:
        return torch.from_numpy(np.where(np.isnan(x), np.float32(np.nan), x))
    bits = x.view(np.uint32).astype(np.uint64)
    bits += 0x7FFF + (bits >> 16 & 1)
    halves = np.where(np.isnan(x), 0x7FC0, bits >> 16).astype(np.uint16)
    return torch.from_numpy(halves.view(np.int16)).view(torch.bfloat16)


def dequantize(q: torch.Tensor, sf: torch.Tensor, fmt: Format, dtype: torch.dtype) -> torch.Tensor:
    """Return what ``dequantize`` does, of scales with any strides; each NaN is the same one."""
    *batch_shape, mn, k = q.shape
    if q.numel() == 0:
        return torch.empty(q.shape, dtype=dtype)
    codes = q.contiguous().view(torch.uint8).numpy().reshape(-1, mn, k)
    # Scales in a storage of their own, as the format has them.
    own = torch.zeros(len(codes) * fmt.scale_rows(mn) * fmt.columns(k) + 1, dtype=fmt.sf_dtype)
    size = fmt.scale_shape(tuple(batch_shape), mn, k), fmt.scale_strides(tuple(batch_shape), mn, k)
    own = own.as_strided(*size)
    integer = INTEGERS[own.element_size()]
    own.view(integer).copy_(sf.view(integer))
    scales = stored_scales(own, fmt, len(codes), mn, k)
    return products(codes, scales, fmt, dtype).view(q.shape)


def fake_quantize(x: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Return what ``fake_quantize`` does; each NaN is the same one."""
    if x.numel() == 0:
        return x.clone()
    values = to_array(x)
    scales = scales_of(values, fmt).floats
    return products(codes_of(values, scales, fmt), scales, fmt, x.dtype)
