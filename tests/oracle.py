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

from cute_quant import Format, Indexed, Masked, PrefixSum, PrefixSumWithGaps
from cute_quant.contract.rows import Rows
from cute_quant.contract.upper_scales import UpperScale
from tests.exact import E2M1, E4M3, E5M2, LARGEST, MAGNITUDES, exact_min_scale, nan_byte

POWERS = 2.0 ** np.arange(-127, 128)
"""Scales by their UE8M0 byte; the last byte is NaN's."""
NAN_EXPONENT = 255
TABLES = {dtype: np.array([float(m) for m in table]) for dtype, table in MAGNITUDES.items()}
MANTISSA_BITS = {E4M3: 3, E5M2: 2, torch.int8: 7, E2M1: 1}
SIGNS = {dtype: 0x8 if dtype is E2M1 else 0x80 for dtype in MAGNITUDES}
FLOAT32_NAN = np.uint32(0x7FC00000)
E4M3_NAN = 0x7F
SIXTH = np.float64(np.float32(1 / 6))
UPPER_LIMIT = 2.0**117
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
ROWS_OF_LAYOUT = {"row_major": 1, "row_major_packed": 1, "8x4": 8, "128x4": 128}
"""Rows to whose multiple scales are padded, where it is not 4."""


class Scales(NamedTuple):
    """Scales of groups.

    Attributes:
        codes: bytes of UE8M0 or e4m3, exponents of float32 scales that are powers of two, or None.
        floats: float64, what a value is multiplied back with; NaN for groups that are not finite.
    """

    codes: np.ndarray | None
    floats: np.ndarray


class Forms(NamedTuple):
    """Both forms of an upper scale, float64 that float32 holds; NaN where it is out of range."""

    encode: np.ndarray
    decode: np.ndarray


def float32(a: np.ndarray) -> np.ndarray:
    """Round float64 to float32, and return float64."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(a, np.float64).astype(np.float32).astype(np.float64)


def forms_of_amax(amax: np.ndarray) -> Forms:
    """Return the upper scale that maps a largest magnitude to 2688, at most 2^117, 1 for 0."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        encode = np.minimum(float32(2688.0 / amax), UPPER_LIMIT)
        encode = np.where(amax == 0, 1.0, encode)
        encode = np.where((amax >= 0) & np.isfinite(amax), encode, np.nan)
        return Forms(encode, float32(1.0 / encode))


def forms_of(upper: UpperScale | None) -> Forms | None:
    """Return both forms of an upper scale, each (1 or matrices, 1, 1)."""
    if upper is None:
        return None
    given = to_array(upper.tensor).reshape(-1, 1, 1)
    if upper.kind == "amax":
        return forms_of_amax(given)
    with np.errstate(divide="ignore", invalid="ignore"):
        inside = (given >= 1 / UPPER_LIMIT) & (given <= UPPER_LIMIT)
        given = np.where(inside, given, np.nan)
        inverse = float32(1.0 / given)
    return Forms(given, inverse) if upper.kind == "encode_scale" else Forms(inverse, given)


def forms_of_call(values: np.ndarray, fmt: Format, upper: UpperScale | None) -> Forms | None:
    """Return the upper scales of rows (matrices, mn, k): those given, or of each row its own."""
    if not fmt.row_scale:
        return forms_of(upper)
    return forms_of_amax(np.abs(values).max(-1, keepdims=True))


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


def scales_of(x: np.ndarray, fmt: Format, forms: Forms | None = None) -> Scales:
    """Return the scales of the groups of x (..., k), k > 0, under upper scales (..., 1)."""
    groups = in_groups(x, fmt)
    finite = np.isfinite(groups).all(-1)
    amax = np.abs(np.where(finite[..., None], groups, 0.0)).max(-1)
    largest = LARGEST[fmt.values]
    floor = float32(exact_min_scale(fmt.min_scale, fmt.values, fmt.scale_dtype))
    if forms is not None:
        wanted = np.minimum(float32(amax * float32(forms.encode * SIXTH)), 448.0)
        finite = finite & np.isfinite(forms.encode)
        codes = np.maximum(nearest(wanted, TABLES[E4M3]), nearest(floor, TABLES[E4M3]))
        codes = np.where(finite, codes, E4M3_NAN).astype(np.uint8)
        return Scales(codes, float32(floats_of(codes, E4M3) * forms.decode))
    if fmt.scale_dtype is torch.float32 and not fmt.round_scale:
        if fmt.numerics == "deepgemm":
            quotients = amax * np.float64(np.float32(1 / largest))
        else:
            quotients = amax / largest
        return Scales(None, np.where(finite, np.maximum(float32(quotients), floor), np.nan))
    # The first power of which M times is no less than amax, and which is no less than the floor.
    exponents = np.maximum(
        np.searchsorted(largest * POWERS, amax), np.searchsorted(POWERS, floor)
    ).astype(np.uint8)
    exponents = np.where(finite, exponents, NAN_EXPONENT).astype(np.uint8)
    return Scales(exponents, floats_of(exponents))


def floats_of(codes: np.ndarray, scale_dtype: torch.dtype = torch.float8_e8m0fnu) -> np.ndarray:
    """Return the scales of bytes of UE8M0 or e4m3 as float64."""
    if scale_dtype is E4M3:
        return values_of(codes, E4M3)
    return np.append(POWERS, np.nan)[codes]


def nearest(magnitudes: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Return the codes of the nearest of a table's magnitudes, ties to the even code, saturated."""
    middles = (table[:-1] + table[1:]) / 2
    codes = np.searchsorted(middles, magnitudes)  # a tie is below the middle
    tied = middles[np.minimum(codes, len(middles) - 1)] == magnitudes
    return codes + (tied & (codes % 2 == 1))


def philox(counter: tuple, key: tuple) -> list[np.ndarray]:
    """Return the four words of Philox 4x32-10, all of them uint64 below 2^32."""
    word = np.uint64(0xFFFFFFFF)
    counter = [np.asarray(c, np.uint64) & word for c in counter]
    key = [int(k) & 0xFFFFFFFF for k in key]
    for _ in range(10):
        products = counter[0] * np.uint64(0xD2511F53), counter[2] * np.uint64(0xCD9E8D57)
        high, low = ([p >> np.uint64(32) for p in products], [p & word for p in products])
        counter = [
            high[1] ^ counter[1] ^ np.uint64(key[0]),
            low[1],
            high[0] ^ counter[3] ^ np.uint64(key[1]),
            low[0],
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


def random_of(
    rng_state: torch.Tensor, matrices: int, mn: int, k: int, first_row: int = 0
) -> np.ndarray:
    """Return the random word of each element, (matrices, mn, k), element by element."""
    seed, offset = (number % 2**64 for number in rng_state.tolist())
    matrix, row, column = np.indices((matrices, mn, k), np.uint64)
    first = (column // np.uint64(8) + np.uint64((offset >> 32) * 2**17 % 2**32)) % np.uint64(2**32)
    row = row + np.uint64(first_row)
    words = np.stack(philox((first, row, matrix, offset), (seed, seed >> 32)))
    chosen = np.take_along_axis(words, (column % np.uint64(8) // np.uint64(2))[None], 0)[0]
    swapped = (chosen << np.uint64(16) | chosen >> np.uint64(16)) & np.uint64(0xFFFFFFFF)
    return np.where(column % np.uint64(2), chosen, swapped)


def drawn(magnitudes: np.ndarray, random: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Return the code of one of the two neighbours of each magnitude, by its random word."""
    table, bits = TABLES[dtype], 23 - MANTISSA_BITS[dtype]
    magnitudes = np.minimum(np.where(np.isnan(magnitudes), 0.0, magnitudes), table[-1])
    below = np.searchsorted(table, magnitudes, side="right") - 1
    above = np.minimum(below + 1, len(table) - 1)
    distance = np.where(above > below, table[above] - table[below], 1.0)
    fraction = np.rint((magnitudes - table[below]) / distance * 2.0**bits)
    up = fraction + (random >> np.uint64(32 - bits)) >= 2.0**bits
    return np.where(up, above, below)


def codes_of(
    x: np.ndarray, scales: np.ndarray, fmt: Format, random: np.ndarray | None = None
) -> np.ndarray:
    """Return the codes of the values of x (..., k) under scales (..., groups), each in a byte.

    Args:
        random: (..., k), a word for each value that is rounded by it; None to round to nearest.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        multipliers = np.where(scales == 0, 0.0, float32(1.0 / scales))
        products = (in_groups(x, fmt) * multipliers[..., None]).astype(np.float32)
    magnitudes = np.abs(products.astype(np.float64))
    if random is None:
        codes = nearest(magnitudes, TABLES[fmt.values])
    else:
        words = in_groups(random, fmt).astype(np.uint64)
        codes = drawn(magnitudes, words, fmt.values)
    negative = np.signbit(products)
    if fmt.values is torch.int8:
        codes = np.where(negative, -codes, codes)
    else:
        codes = np.where(negative, codes | SIGNS[fmt.values], codes)
    if fmt.values is E2M1 and fmt.numerics == "deepgemm":
        codes = np.where(codes == SIGNS[E2M1], 0, codes)  # zeros have no sign
    codes = np.where(np.isnan(scales)[..., None], nan_byte(fmt.values), codes)
    return codes.astype(np.uint8).reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]


def packed(codes: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Return the bytes that hold codes (..., k): one each, or two with the earlier one below."""
    return codes[..., 0::2] | codes[..., 1::2] << 4 if dtype is E2M1 else codes


def unpacked(content: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Invert :func:`packed`."""
    if dtype is not E2M1:
        return content
    return np.stack([content & 0xF, content >> 4], -1).reshape(*content.shape[:-1], -1)


def tokens_of_scatter(scatter: torch.Tensor, matrices: int, mn: int) -> np.ndarray:
    """Return the row of the input, (matrices, mn), that is scattered to each row, -1 of none."""
    sources = np.full(matrices * mn, -1)
    for token, places in enumerate(scatter.tolist()):
        for place in places:
            if 0 <= place < len(sources):
                sources[place] = token
    return sources.reshape(matrices, mn)


def live_rows(
    rows: Rows | None,
    index: torch.Tensor | None,
    matrices: int,
    mn: int,
    tokens: int,
    scatter: torch.Tensor | None = None,
) -> np.ndarray:
    """Return the row of the input, all leading dimensions flattened, for each row of the result.

    Args:
        tokens: rows of the input.

    Returns:
        (matrices, mn), -1 where the row does not exist.
    """
    if scatter is not None:
        sources = tokens_of_scatter(scatter, matrices, mn)
    elif index is None:
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
    if scale_layout == "row_major_packed":
        return (batch * mn + row) * stored_groups + group
    size = ROWS_OF_LAYOUT[scale_layout]
    stored_rows = (mn + size - 1) // size * size
    block = (row // size) * (stored_groups // 4) + group // 4
    inside = row % 8 * 4 if size == 8 else (row % 32) * 16 + (row % 128) // 32 * 4
    return batch * stored_rows * stored_groups + block * size * 4 + inside + group % 4


def quantize_into(
    x: torch.Tensor,
    q: torch.Tensor,
    sf: torch.Tensor,
    fmt: Format,
    rows: Rows | None = None,
    index: torch.Tensor | None = None,
    upper: UpperScale | None = None,
    row_scales: torch.Tensor | None = None,
    scaled_as: torch.Tensor | None = None,
    rng_state: torch.Tensor | None = None,
    scatter: torch.Tensor | None = None,
) -> None:
    """Write what ``quantize`` writes to `q`, to the storage of `sf`, and to `row_scales`.

    Args:
        x: (..., mn, k), or (tokens, k) with an index; of any floating-point dtype.
        q: (..., q_rows, k), q_rows >= mn, of any strides; or bytes of two values. On the CPU.
        sf: of the shape of the format, its elements where the format has them. On the CPU.
        upper: the scale over e4m3 scales, on any device.
        row_scales: (..., mn), on the CPU, for the decode scales of rows.
        scaled_as: of x's shape, whose rows have the scales of rows; x by default.
        rng_state: (2,), seed and offset of the random words that values are rounded by: those of
            their place in q, with a scatter of that in x.
        scatter: rows of q for each row of x. Rows that exist and are not named stay.
    """
    k = x.shape[-1]
    leading = (x if index is None else index).shape[: -1 if index is not None else -2]
    mn = x.shape[-2] if index is None else index.shape[-1]
    if scatter is not None:
        leading, mn = q.shape[:-2], q.shape[-2]
    matrices, q_rows = math.prod(leading), q.shape[-2]
    if not k or not matrices:
        return
    flat = to_array(x).reshape(-1, k)
    sources = live_rows(rows, index, matrices, mn, len(flat), scatter)
    exists = sources >= 0
    stays = np.zeros_like(exists)
    if scatter is not None:
        stays = live_rows(rows, None, matrices, mn, matrices * mn) >= 0
        stays &= ~exists
    if isinstance(rows, PrefixSumWithGaps):
        stays = ~exists
    values = np.zeros((matrices, mn, k))
    values[exists] = flat[sources[exists]]

    others = values
    if scaled_as is not None:
        others = np.zeros_like(values)
        others[exists] = to_array(scaled_as).reshape(-1, k)[sources[exists]]
    forms = forms_of_call(others, fmt, upper) if mn else None
    scales = scales_of(values, fmt, forms) if mn else Scales(None, np.zeros((matrices, 0, 1)))
    codes = np.zeros((matrices, q_rows, k), np.uint8)
    if mn:
        random = None
        if rng_state is not None and scatter is None:
            random = random_of(rng_state, matrices, mn, k)
        elif rng_state is not None:
            random = random_of(rng_state, 1, len(flat), k)[0][sources]
        codes[:, :mn] = codes_of(values, scales.floats, fmt, random)
        codes[:, :mn][~exists] = 0
    counts = np.full(matrices, q_rows)
    if isinstance(rows, Masked):
        counts = rows.masked_m.cpu().numpy().clip(0, mn)
    written = np.arange(q_rows) < counts[:, None]
    written[:, :mn] &= ~stays
    target = q.view(torch.uint8)
    new = torch.from_numpy(packed(codes, fmt.values)).view(q.shape)
    target.copy_(new.where(torch.from_numpy(written).view(*q.shape[:-1], 1), target))
    if not mn:
        return
    _store_scales(scales, exists, counts if isinstance(rows, Masked) else None, sf, fmt, stays)
    if row_scales is not None:
        decode = np.where(exists, forms.decode[..., 0], 0.0).astype(np.float32)
        stored = torch.from_numpy(decode).view(row_scales.shape)
        below = torch.from_numpy(written[:, :mn]).view(row_scales.shape)
        row_scales.copy_(stored.where(below, row_scales))


def _store_scales(
    scales: Scales,
    exists: np.ndarray,
    counts: np.ndarray | None,
    sf: torch.Tensor,
    fmt: Format,
    stays: np.ndarray | None = None,
) -> None:
    """Write all scales of rows that exist and 0 to all padding, as far as the storage goes.

    Args:
        counts: rows of each masked matrix; scales past the next multiple of 4 stay.
        stays: (matrices, mn), rows whose scales stay too.
    """
    matrices, mn = exists.shape
    groups = scales.floats.shape[-1]
    stored_groups = groups
    if fmt.scale_layout not in ("mn_major", "row_major"):
        stored_groups = (groups + 3) // 4 * 4
    unit = ROWS_OF_LAYOUT.get(fmt.scale_layout, 4)
    stored_rows = (mn + unit - 1) // unit * unit
    if fmt.scale_dtype is torch.float32:
        stored = scales.floats.astype(np.float32).view(np.uint32)
        stored = np.where(np.isnan(scales.floats), FLOAT32_NAN, stored)
    else:
        stored = scales.codes
    padded = np.zeros((matrices, stored_rows, stored_groups), stored.dtype)
    padded[:, :mn, :groups] = np.where(exists[..., None], stored, 0)
    limits = np.full(matrices, stored_rows)
    if counts is not None:
        limits = np.minimum((counts + 3) // 4 * 4, stored_rows)
    written = np.arange(stored_rows) < limits[:, None]
    if stays is not None:
        written[:, :mn] &= ~stays
    batch, row, group = np.nonzero(np.broadcast_to(written[..., None], padded.shape))
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
    return floats_of(content[..., 0], fmt.scale_dtype)


def values_of(codes: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Return the values of bytes as float64."""
    if dtype is torch.int8:
        return codes.view(np.int8).astype(np.float64)
    table = TABLES[dtype]
    if dtype is E2M1:
        return np.append(table, -table)[codes]
    magnitudes = np.full(128, np.nan)
    magnitudes[: len(table)] = table
    if dtype is torch.float8_e5m2:
        magnitudes[0x7C] = np.inf
    return np.where(codes & 0x80, -1.0, 1.0) * magnitudes[codes & 0x7F]


def products(codes: np.ndarray, scales: np.ndarray, fmt: Format, dtype: torch.dtype):
    """Return values times scales, rounded to float32 and then to `dtype`, as a tensor.

    Args:
        codes: (..., k), each in a byte.
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


def dequantize(
    q: torch.Tensor,
    sf: torch.Tensor,
    fmt: Format,
    dtype: torch.dtype,
    upper: UpperScale | None = None,
) -> torch.Tensor:
    """Return what ``dequantize`` does, of scales with any strides; each NaN is the same one."""
    *batch_shape, mn, columns = q.shape
    k = columns * (2 if fmt.values is E2M1 else 1)
    shape = (*batch_shape, mn, k)
    if q.numel() == 0:
        return torch.empty(shape, dtype=dtype)
    content = q.view(torch.uint8).contiguous().numpy().reshape(-1, mn, columns)
    codes = unpacked(content, fmt.values)
    # Scales in a storage of their own, as the format has them.
    own = torch.zeros(len(codes) * fmt.scale_rows(mn) * fmt.columns(k) + 1, dtype=fmt.sf_dtype)
    size = fmt.scale_shape(tuple(batch_shape), mn, k), fmt.scale_strides(tuple(batch_shape), mn, k)
    own = own.as_strided(*size)
    integer = INTEGERS[own.element_size()]
    own.view(integer).copy_(sf.view(integer))
    scales = stored_scales(own, fmt, len(codes), mn, k)
    if upper is not None:
        # A decode scale may be any number.
        given = to_array(upper.tensor).reshape(-1, mn if fmt.row_scale else 1, 1)
        decode = given if upper.kind == "decode_scale" else forms_of(upper).decode
        with np.errstate(invalid="ignore"):
            scales = float32(scales * decode)
    return products(codes, scales, fmt, dtype).view(shape)


def fake_quantize(x: torch.Tensor, fmt: Format, upper: UpperScale | None = None) -> torch.Tensor:
    """Return what ``fake_quantize`` does; each NaN is the same one."""
    if x.numel() == 0:
        return x.clone()
    values = to_array(x).reshape(-1, *x.shape[-2:])
    scales = scales_of(values, fmt, forms_of_call(values, fmt, upper)).floats
    return products(codes_of(values, scales, fmt), scales, fmt, x.dtype).view(x.shape)


def block_scales(values: np.ndarray, fmt: Format) -> Scales:
    """Return the scales (matrices, blocks of n, blocks of k) of square blocks of (..., n, k)."""
    size = fmt.group_size
    matrices, n, k = values.shape
    # A group of which one element is the block's largest.
    groups = np.zeros((matrices, -(-n // size), -(-k // size) * size))
    for i, j in np.ndindex(groups.shape[1], groups.shape[2] // size):
        block = values[:, i * size : (i + 1) * size, j * size : (j + 1) * size]
        groups[:, i, j * size] = np.abs(block).reshape(matrices, -1).max(-1)
    return scales_of(groups, fmt)


def quantize_blocks_into(w: torch.Tensor, q: torch.Tensor, sf: torch.Tensor, fmt: Format) -> None:
    """Write what ``quantize_blocks`` writes to `q` and to the storage of `sf`, on the CPU."""
    if w.numel() == 0:
        return
    n, k = w.shape[-2:]
    values = to_array(w).reshape(-1, n, k)
    of_blocks = block_scales(values, fmt)
    block = np.arange(n) // fmt.group_size
    codes = codes_of(values, of_blocks.floats[:, block], fmt)
    new = torch.from_numpy(packed(codes, fmt.values))
    q.view(torch.uint8).copy_(new.view(q.shape))
    if fmt.scale_dtype is torch.float32:
        stored = torch.from_numpy(of_blocks.floats.astype(np.float32)).view(sf.shape)
        sf.copy_(stored.where(stored == stored, torch.nan))
        return
    rows = Scales(of_blocks.codes[:, block], of_blocks.floats[:, block])
    _store_scales(rows, np.ones(values.shape[:2], bool), None, sf, fmt)


def quantize_columns_into(
    x: torch.Tensor,
    q: torch.Tensor,
    sf: torch.Tensor,
    fmt: Format,
    rows: PrefixSum | None = None,
    transposed: bool = False,
    rng_state: torch.Tensor | None = None,
) -> None:
    """Write what ``quantize_columns`` writes to `q` and to the storage of `sf`, on the CPU."""
    if x.numel() == 0:
        return
    *leading, mn, k = x.shape
    matrices, size = math.prod(leading), fmt.group_size
    exists = live_rows(rows, None, matrices, mn, matrices * mn) >= 0
    values = np.where(exists[..., None], to_array(x).reshape(matrices, mn, k), 0.0)
    columns = np.ascontiguousarray(values.swapaxes(1, 2))
    scales = scales_of(columns, fmt)
    random = None
    if rng_state is not None:
        random = random_of(rng_state, matrices, mn, k, 2**31).swapaxes(1, 2)
    codes = codes_of(columns, scales.floats, fmt, random)
    codes = np.where(exists[:, None], codes, 0).astype(np.uint8)
    codes = codes if transposed else np.ascontiguousarray(codes.swapaxes(1, 2))
    q.view(torch.uint8).copy_(torch.from_numpy(codes).view(q.shape))

    groups = scales.floats.shape[-1]
    for matrix, group in np.ndindex(matrices, groups):
        if not exists[matrix, group * size : (group + 1) * size].any():
            scales.floats[matrix, :, group] = 0.0
            if scales.codes is not None:
                scales.codes[matrix, :, group] = 0
    if fmt.scale_layout == "128x4":
        _store_scales(scales, np.ones((matrices, k), bool), None, sf, fmt)
        return
    matrix, column, group = np.indices(scales.floats.shape)
    storage = torch.empty(0, dtype=torch.uint8).set_(sf.untyped_storage()).numpy()
    storage = storage[sf.storage_offset() * sf.element_size() :]
    if fmt.scale_layout == "mn_major_packed":
        words = -(-groups // 4)
        storage[: 4 * matrices * words * k] = 0
        storage[4 * ((matrix * words + group // 4) * k + column) + group % 4] = scales.codes
        return
    floats = scales.floats.astype(np.float32).view(np.uint32)
    floats = np.where(np.isnan(scales.floats), FLOAT32_NAN, floats)
    of_floats = storage[: 4 * matrices * groups * k].view(np.uint32)
    of_floats[(matrix * groups + group) * k + column] = floats


def products_of_blocks(
    q: torch.Tensor, sf: torch.Tensor, fmt: Format, dtype: torch.dtype, size: int
) -> torch.Tensor:
    """Return values (..., n, k) times the float32 scales of blocks of `size` rows and columns."""
    content = q.view(torch.uint8).contiguous().numpy()
    codes = unpacked(content, fmt.values)
    n, k = codes.shape[-2:]
    scales = to_array(sf)[..., np.arange(n) // size, :][..., np.arange(k) // size]
    with np.errstate(invalid="ignore", over="ignore"):
        exact = values_of(codes, fmt.values) * scales
        return _rounded(exact.astype(np.float32), dtype)
