"""Everything that can be wrong between a producer of quantized values and a GEMM that reads them.

Each finding is a sentence. Rules that need the shape to be right are left out where it is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from cute_quant.contract import blocks, reference, scale_storage
from cute_quant.contract.block_reference import rows_of_blocks
from cute_quant.contract.calls import Call, ResultShape
from cute_quant.contract.checks import check_row_domain, check_upper_scale, upper_scale_shapes
from cute_quant.contract.dtypes import (
    BYTES_PER_WORD,
    E4M3_NAN,
    INPUT_DTYPES,
    SCALE_ROW_ALIGNMENT,
    SMALLEST_UE8M0,
    SOURCE_BLOCK,
    UE8M0_NAN,
    UPPER_MAX,
    ceil_div,
    dtype_name,
)
from cute_quant.contract.format_choices import MN_MAJOR, ROW_MAJOR
from cute_quant.contract.formats import Format
from cute_quant.contract.readers import (
    DEEP_GEMM_SM90,
    DEEP_GEMM_SM90_K_GROUPED,
    DEEP_GEMM_SM100,
    Reader,
)
from cute_quant.contract.rows import Masked, Rows
from cute_quant.contract.scale_conversion import exponents, rows_that_exist
from cute_quant.contract.tensors import (
    check_device,
    check_real,
    check_tensor,
    flat_batch,
    last_column_rows,
)
from cute_quant.contract.upper_scales import DECODE, UpperScale, decode_scale

TMA_BYTES = 16
"""Alignment of addresses and strides that TMA reads."""
LEAST_PRODUCT = UPPER_MAX / 2**8
"""Least of the largest products of a value and an e4m3 scale under an encode scale that fits."""
MOST_SATURATED, LEAST_SCALES = 0.5, 16
"""Share of e4m3 scales at their largest, from which on the encode scale was too large, and the
scales under it that tell."""
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
    """Values and scales to be checked.

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

    @property
    def shape(self) -> ResultShape:
        """Return the shape of the values, of 2 or more dimensions."""
        *batch, mn, columns = self.q.shape
        return ResultShape(tuple(batch), mn, columns * self.fmt.value_type.per_byte)

    @property
    def takes_blocks(self) -> bool:
        """Return whether the values may be weights with a scale for each square block."""
        return (
            self.kind in (DEEP_GEMM_SM90, DEEP_GEMM_SM100)
            and self.rows is None
            and blocks.stored_once(self.fmt)
            and self.fmt.group_size == SOURCE_BLOCK
        )

    @property
    def of_blocks(self) -> bool:
        """Return whether the scales are those of square blocks; of one row, those of groups."""
        sizes = tuple(self.sf.shape)
        return (
            self.takes_blocks
            and sizes != self.fmt.scale_shape(*self.shape)
            and sizes == blocks.scale_shape(self.fmt, *self.shape)
        )

    @property
    def upper_of_groups(self) -> bool:
        """Return whether each group of rows stacked along M has an upper scale of its own."""
        return Call(self.q, self.fmt, rows=self.rows, upper=self.upper).upper_of_groups


def check_arguments(given: Quantized) -> None:
    """Check what no finding is about: memory, the row domain, the upper scale and x.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is wrong.
    """
    q, sf, _, reader, _, rows, upper, x = given
    if reader.k_grouped:
        for name, argument in (("rows", rows), ("x", x)):
            if argument is not None:
                raise ValueError(
                    f"{name}: expected None for {reader.name}, whose groups lie along k, got one"
                )
    check_tensor("q", q, (q.dtype,))
    check_tensor("sf", sf, (sf.dtype,))
    tensors = {"q": q, "sf": sf, "x": x}
    if x is not None:
        check_tensor("x", x, INPUT_DTYPES)
        check_device("x", x, q, "q")
    if rows is not None:
        name = f"rows.{rows.data_name}"
        check_tensor(name, rows.data, (torch.int32,))
        tensors[name] = rows.data
        if q.ndim == 1 + len(rows.dimensions):
            check_row_domain(rows, q, "q", tuple(q.shape[:-1]), "q", q.shape[-1])
    if upper is not None:
        _check_upper_scale(given, upper)
        tensors[upper.kind] = upper.tensor
    check_real(tensors)


def _check_upper_scale(given: Quantized, upper: UpperScale) -> None:
    """Check an upper scale that is given."""
    q, fmt = given.q, given.fmt
    shapes = upper_scale_shapes(
        fmt, tuple(q.shape[:-2]), Call(q, fmt, rows=given.rows, upper=upper)
    )
    if fmt.row_scale:
        if upper.kind != DECODE:
            raise ValueError(
                f"{upper.kind}: expected {DECODE} for {fmt}, the scales of rows that quantize "
                "returned, got a tensor"
            )
        shapes = [tuple(q.shape[:-1])]
    check_upper_scale(upper, fmt, shapes, q, "q")


def findings(given: Quantized) -> list[Finding]:
    """Return all that is wrong, first what is wrong before values are looked at."""
    if given.reader.k_grouped:
        return list(_k_grouped(given))
    found = [*_format(given), *_dtypes(given)]
    if found:
        return found
    found = list(_shapes(given))
    if not given.q.numel():
        return found
    found += [*_strides(given), *_alignment(given)]
    if any(finding.rule in ("shape", "strides") for finding in found):
        return found
    if given.x is not None and tuple(given.x.shape) != (expected := _sizes(given.shape)):
        text = f"x: expected the shape of the values {expected}, got {tuple(given.x.shape)}"
        found.append(Finding("shape", text))
        given = given._replace(x=None)
    return [*found, *(_contents_of_blocks if given.of_blocks else _contents)(given)]


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


def _sizes(shape: ResultShape) -> tuple[int, ...]:
    return (*shape.batch_shape, shape.mn, shape.k)


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
    unpadded = shape.mn * fmt.groups(shape.k)
    if fmt.blocked and sf.numel() == expected_shape[-1] and sf.ndim == 2 == q.ndim:
        text += ": flatten() it if it is swizzled, convert_scales from row_major if it is row-major"
    elif fmt.blocked and not shape.batch_shape and sf.numel() == unpadded:
        yield Finding(
            "swizzle",
            f"sf: expected blocks of {fmt.scale_layout}, got as many scales as there are groups, "
            "without padding: convert_scales from row_major makes blocks of them",
        )
    yield Finding("shape", text)


def _strides(given: Quantized) -> Iterator[Finding]:
    q, sf, fmt, reader = given.q, given.sf, given.fmt, given.reader
    if q.ndim < 2 or (tuple(sf.shape) != fmt.scale_shape(*given.shape) and not given.of_blocks):
        return
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
    if given.of_blocks and given.kind == DEEP_GEMM_SM90:
        yield from _strides_of_blocks(sf)
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
    if not _has_strides(sf, expected) or (deep_gemm and not exact):
        text = f"sf: expected strides {expected} for {reader.name}, got {sf.stride()}"
        yield Finding("strides", text)


def _has_strides(t: torch.Tensor, expected: tuple[int, ...]) -> bool:
    """Return whether a tensor has strides where they matter."""
    return all(
        size <= 1 or actual == stride
        for size, actual, stride in zip(t.shape, t.stride(), expected, strict=True)
    )


def _strides_of_blocks(sf: torch.Tensor) -> Iterator[Finding]:
    rows, columns = sf.shape[-2:]
    matrices = rows * columns
    together = sf.ndim == 2 or sf.stride(0) == matrices
    if not together or sf.stride()[-2:] not in ((columns, 1), (1, rows)):
        yield Finding(
            "strides",
            f"sf: expected scales of blocks contiguous along k or n, matrices {matrices} elements "
            f"apart, got strides {sf.stride()}",
        )


def _read_by_tma(given: Quantized) -> bool:
    """Return whether TMA reads the scales as they lie: others are loaded or transformed first."""
    sf, fmt = given.sf, given.fmt
    if fmt.byte_scales:
        return True
    if given.kind not in (DEEP_GEMM_SM90, DEEP_GEMM_SM90_K_GROUPED) or sf.ndim < 2:
        return False
    # DeepGEMM looks at strides alone, of scales of rows: whatever the format says of them.
    *batch, mn, _ = sf.shape
    own = fmt.replace(scale_layout=MN_MAJOR).scale_strides(batch, mn, sf.shape[-1] * fmt.group_size)
    of_blocks = not given.reader.k_grouped and given.of_blocks
    return sf.stride() == own and not of_blocks


def _alignment(given: Quantized) -> Iterator[Finding]:
    if given.q.ndim < 2 and not given.reader.k_grouped:
        return
    read = {"q": given.q}
    if _read_by_tma(given):
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


def _contents(given: Quantized) -> Iterator[Finding]:
    """Look at values and scales, which synchronizes."""
    sf, fmt, shape = given.sf, given.fmt, given.shape
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
    yield from _belongs_to(given, shape, live)


def _contents_of_blocks(given: Quantized) -> Iterator[Finding]:
    """Look at values and at float32 scales of square blocks, which synchronizes."""
    fmt, shape = given.fmt, given.shape
    scales = given.sf.reshape(-1, *given.sf.shape[-2:])
    if given.reader.powers_of_two:
        yield from _powers_of_two(scales, given.reader)
    yield from _nan(scales, torch.ones_like(scales[..., 0], dtype=torch.bool), fmt)
    by_row = rows_of_blocks(given.sf, fmt.group_size, shape.mn).contiguous()
    given = given._replace(sf=by_row, fmt=fmt.replace(scale_layout=ROW_MAJOR))
    live = torch.ones(len(scales), shape.mn, dtype=torch.bool, device=scales.device)
    yield from _belongs_to(given, shape, live)


def _written(given: Quantized, rows: int) -> torch.Tensor:
    """Return which of the stored rows of scales are defined, (batch or 1, rows)."""
    if isinstance(given.rows, Masked):
        mn = given.shape.mn
        return reference.below_count(given.rows, mn, rows, SCALE_ROW_ALIGNMENT)
    return torch.ones(1, rows, dtype=torch.bool, device=given.sf.device)


def _padding(given: Quantized, shape: ResultShape) -> Iterator[Finding]:
    sf, fmt = given.sf, given.fmt
    modes = scale_storage.view(sf, fmt, shape.mn, shape.k)
    stored = scale_storage.stored_matrix(modes, fmt, shape.mn, shape.k)
    groups = fmt.groups(shape.k)
    padding = torch.ones_like(stored, dtype=torch.bool)
    padding[:, : shape.mn, :groups] = False
    padding &= _written(given, stored.shape[1]).unsqueeze(2)
    wrong = (stored != 0) & padding
    if wrong.any():
        batch, row, group = wrong.nonzero()[0].tolist()
        yield Finding(
            "padding",
            f"sf: expected 0 where there is no row or group, got {stored[wrong][0].item()} at "
            f"({batch}, {row}, {group}), and {int(wrong.sum())} such places of "
            f"{int(padding.sum())}",
        )
        if fmt.blocked and not _in_order(sf)[:, shape.mn * groups :].any():
            yield Finding(
                "swizzle",
                f"sf: expected blocks of {fmt.scale_layout}, got scales up to place "
                f"{shape.mn * groups} and zeros after it, as row-major scales have them: "
                "convert_scales from row_major makes blocks of them",
            )
    if fmt.mn_major and fmt.scale_rows(shape.mn) > shape.mn:
        yield from _padding_rows(given, shape)


def _in_order(sf: torch.Tensor) -> torch.Tensor:
    """Return the bytes of scales in blocks, (batch, bytes), in the order of memory."""
    return sf.view(torch.uint8).reshape(-1, sf.shape[-1])


def _padding_rows(given: Quantized, shape: ResultShape) -> Iterator[Finding]:
    """Look at the rows past mn of MN-major scales that have storage."""
    sf, fmt, mn = given.sf, given.fmt, shape.mn
    aligned = fmt.scale_rows(mn)
    own = _has_strides(sf, fmt.scale_strides(*shape))
    if not own or sf.stride()[-2:] != (1, aligned):
        return
    columns = sf.numel() // mn
    start = sf.storage_offset() + mn
    inner = sf.as_strided((columns - 1, aligned - mn), (aligned, 1), start)
    last = sf.as_strided((last_column_rows(sf) - mn,), (1,), start + (columns - 1) * aligned)
    written = _written(given, aligned)[:, mn:].expand(columns // sf.shape[-1], -1)
    written = written.repeat_interleave(sf.shape[-1], 0)
    wrong = int(((inner != 0) & written[:-1]).sum())
    wrong += int(((last != 0) & written[-1, : len(last)]).sum())
    if wrong:
        yield Finding(
            "padding", f"sf: expected 0 in rows {mn} to {aligned - 1}, got {wrong} other elements"
        )


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
        got = "NaN" if fmt.byte_scales else scales[batch, row, group].item()
        yield Finding(
            "nan",
            f"sf: expected finite scales, got {got} at ({batch}, {row}, {group}) and such in "
            f"{int(nan.sum())} of {nan.numel()} places: x held NaN or Inf there, or this is no "
            "scale",
        )


class _Units(NamedTuple):
    """Which upper scale each row is under.

    Attributes:
        word: for what has an upper scale of its own.
        number: of upper scales.
        of_rows: (batch, mn), int64: the upper scale of each row, `number` where it has none.
    """

    word: str
    number: int
    of_rows: torch.Tensor

    def sum(self, t: torch.Tensor) -> torch.Tensor:
        """Return sums of t (batch, mn) for each upper scale."""
        sums = t.new_zeros(self.number + 1, dtype=torch.float32)
        return sums.index_add(0, self.of_rows.flatten(), t.float().flatten())[: self.number]

    def amax(self, t: torch.Tensor) -> torch.Tensor:
        """Return the largest of non-negative t (batch, mn) for each upper scale."""
        largest = t.new_zeros(self.number + 1)
        index = self.of_rows.flatten()
        return largest.scatter_reduce(0, index, t.flatten(), "amax")[: self.number]

    def where(self, wrong: torch.Tensor) -> str:
        """Return words for where something is wrong, none where there is one upper scale."""
        if self.number == 1:
            return ""
        first, total = int(wrong.nonzero()[0]), int(wrong.sum())
        return f" in {self.word} {first}, and such in {total} of {self.number}"


def _units(given: Quantized, live: torch.Tensor) -> _Units:
    """Return which upper scale each row is under."""
    assert given.upper is not None
    count = given.upper.tensor.numel()
    if given.upper_of_groups:
        assert given.rows is not None
        group = reference.groups_of_rows(given.rows, live.shape[1])
        of_rows = group.where((group >= 0) & (group < count), count)
        return _Units("group", count, of_rows.expand(live.shape))
    if given.fmt.row_scale or count == 1:
        return _Units("tensor", 1, torch.zeros_like(live, dtype=torch.int64))
    matrix = torch.arange(count, device=live.device)
    return _Units("matrix", count, matrix.unsqueeze(1).expand(live.shape))


def _factors(given: Quantized, live: torch.Tensor) -> torch.Tensor:
    """Return what each row is multiplied back with above its scales, (batch or 1, mn or 1, 1)."""
    assert given.upper is not None
    decode = decode_scale(given.upper)
    if given.upper_of_groups:
        units = _units(given, live)
        return pad(decode, (0, 1), value=torch.nan)[units.of_rows].unsqueeze(2)
    return decode.reshape(-1, live.shape[1] if given.fmt.row_scale else 1, 1)


def _upper_scale(given: Quantized, scales: torch.Tensor, live: torch.Tensor) -> Iterator[Finding]:
    """Look whether encode and decode scale were mixed up, by producer or reader."""
    fmt, upper = given.fmt, given.upper
    if upper is None:
        text = f"decode_scale: expected the scale over the e4m3 scales of {fmt}, got none"
        yield Finding("upper scale", text)
        return
    units = _units(given, live)
    decoded = scales.view(fmt.scale_dtype).float()
    finite = decoded.isfinite() & live.unsqueeze(2)
    decoded = decoded.where(finite, 0.0)
    q = given.q.view(torch.uint8).reshape(*live.shape, -1)
    by_row = reference.multiply_back(q, decoded, fmt, torch.float32).abs().amax(2)
    largest = units.amax(by_row)
    dequantized = by_row * _factors(given, live).squeeze(2)
    amax = units.amax(dequantized.where(by_row > 0, 0.0))
    expected = None if given.x is None else units.amax(_row_amax(given.x, finite, fmt))
    # Nothing tells where all is 0.
    tells = largest > 0 if expected is None else (largest > 0) | (expected > 0)
    top = torch.finfo(fmt.scale_dtype).max
    saturated = units.sum((decoded == top).sum(2)) / units.sum(finite.sum(2)).clamp(min=1)
    enough = units.sum(finite.sum(2)) >= LEAST_SCALES
    small = tells & (largest < LEAST_PRODUCT) & (not fmt.row_scale)
    many = tells & enough & (saturated > MOST_SATURATED) & (not fmt.row_scale)
    if small.any():
        yield Finding(
            "upper scale",
            f"sf: expected a largest product of value and scale near {UPPER_MAX:.0f}, got "
            f"{largest[small][0]:.3g}{units.where(small)}: was a decode scale taken for the encode "
            "scale?",
        )
    elif many.any():
        yield Finding(
            "upper scale",
            f"sf: expected few scales of {top:.0f}, the largest, got "
            f"{saturated[many][0]:.0%}{units.where(many)}: was a decode scale taken for the encode "
            "scale?",
        )
    if expected is None:
        low, high = (torch.full_like(amax, bound) for bound in PLAUSIBLE_AMAX)
    else:
        low, high = expected / AMAX_FACTOR, expected * AMAX_FACTOR
    wrong = tells & ~((low <= amax) & (amax <= high))
    if wrong.any():
        words = f"from {low[wrong][0]:.3g} to {high[wrong][0]:.3g}"
        if expected is not None:
            words = f"the amax of x, {expected[wrong][0]:.3g}"
        yield Finding(
            "upper scale",
            f"{upper.kind}: expected a dequantized amax of {words}, got {amax[wrong][0]:.3g}"
            f"{units.where(wrong)}: were encode and decode scale mixed up?",
        )


def _row_amax(x: torch.Tensor, finite: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Return the amax of each row of x, (batch, mn), where its groups have a finite scale."""
    x = x.float().reshape(*finite.shape[:2], -1).abs()
    used = finite.repeat_interleave(fmt.group_size, 2)[..., : x.shape[2]]
    return x.where(used & x.isfinite(), 0.0).amax(2)


def _belongs_to(given: Quantized, shape: ResultShape, live: torch.Tensor) -> Iterator[Finding]:
    """Compare dequantized values with what was quantized, where it is at hand."""
    if given.x is None:
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
    y = reference.dequantize(q, sf, fmt, torch.float32).view(*live.shape, shape.k)
    if given.upper is not None:
        y = y * _factors(given, live)
    x = given.x.float().reshape(y.shape)
    used = (live.unsqueeze(2) & x.isfinite() & y.isfinite()).expand_as(x)
    difference = (y - x).where(used, 0.0).double().norm()
    return float(difference / x.where(used, 0.0).double().norm().clamp(min=1e-300))


def _k_grouped(given: Quantized) -> Iterator[Finding]:
    """Check operands of a GEMM whose groups lie along rows: k rows, mn columns."""
    q, sf, fmt, reader = given.q, given.sf, given.fmt, given.reader
    found = [*_format(given), *_k_grouped_dtypes(given)]
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
    yield from _alignment(given._replace(q=q.view(-1)))
    yield from _k_grouped_shapes_sm90(given) if sm90 else _k_grouped_shapes(given)
    if not sf.numel():
        return
    scales = sf.reshape(1, *sf.shape)
    if fmt.byte_scales:
        scales = scales.view(torch.uint8)
    elif reader.powers_of_two:
        yield from _powers_of_two(scales, reader)
    yield from _nan(scales, torch.ones_like(scales[..., 0], dtype=torch.bool), fmt)


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
