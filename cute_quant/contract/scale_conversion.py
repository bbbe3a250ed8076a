"""Scales from one layout to another that holds the same numbers: what is allowed, and the CPU path.

Bytes stay as they are. A float32 that is a power of two from 2^-127 to 2^127 becomes its UE8M0
byte, 0 becomes the byte 0, Inf and NaN the byte 255, and so does every float32 that is no power of
two. A byte becomes the float32 of that power, and 255 NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from cute_quant.contract import scale_storage
from cute_quant.contract.calls import ResultShape
from cute_quant.contract.checks import (
    check_format,
    check_number_of_scales,
    check_row_domain,
    check_scales_out,
    check_scales_read,
    check_whole_bytes,
)
from cute_quant.contract.dtypes import (
    FLOAT32_MANTISSA_BITS,
    NOT_A_POWER_OF_TWO,
    SMALLEST_UE8M0,
    UE8M0_NAN,
    dtype_name,
)
from cute_quant.contract.formats import Format
from cute_quant.contract.reference.rows import below_count, rows_of_groups
from cute_quant.contract.reference.values import ue8m0_to_float32
from cute_quant.contract.rows import Indexed, Masked, PrefixSum, PrefixSumWithGaps, Rows
from cute_quant.contract.tensors import (
    check_count,
    check_tensor,
    check_written,
)


class Conversion(NamedTuple):
    """A call of ``cute_quant.convert_scales``.

    Attributes:
        sf: the scales.
        fmt: their format.
        to: the format of the result.
        shape: of the quantized values.
        rows: which of them exist; None for all.
        out: the caller's memory for the result, None to allocate it.
    """

    sf: torch.Tensor
    fmt: Format
    to: Format
    shape: ResultShape
    rows: Rows | None = None
    out: torch.Tensor | None = None

    @property
    def tensors(self) -> dict[str, torch.Tensor | None]:
        """Return the tensors by the names of their arguments."""
        named = {"sf": self.sf, "out": self.out}
        if self.rows is not None:
            named[f"rows.{self.rows.data_name}"] = self.rows.data
        return named

    @property
    def zero(self) -> int:
        """Return the bits of the float32 that the byte 0 becomes.

        It is 2^-127, or 0 where the smallest scale is larger: a row that does not exist has it.
        """
        return 0 if self.fmt.floor > 0 else SMALLEST_UE8M0


def check(call: Conversion) -> None:
    """Check everything that the arguments say of themselves, real or fake tensors.

    Raises:
        TypeError, ValueError: one of them is wrong.
    """
    sf, fmt, to, shape, rows, out = call
    check_format(fmt)
    check_formats(fmt, to)
    check_whole_bytes("shape", to, shape.k)
    check_tensor("sf", sf, (fmt.sf_dtype,))
    check_scales_read(sf, fmt, shape)
    check_count("sf", shape.batch_shape, 1)
    for one in (fmt, to):
        check_number_of_scales("shape", one, shape)
    if isinstance(rows, PrefixSumWithGaps):
        raise ValueError(f"rows: expected PrefixSum, got {type(rows).__name__}")
    check_row_domain(rows, sf, "sf", (*shape.batch_shape, shape.mn), "shape", shape.k)
    if out is not None:
        check_written("out", out, to.sf_dtype, sf, "sf")
        check_scales_out("out", out, to.scale_shape(*shape), to.scale_strides(*shape))


def check_formats(fmt: Format, to: object) -> None:
    """Check that one format can hold the scales of another.

    Raises:
        TypeError, ValueError: it cannot.
    """
    check_format(to, "to")
    assert isinstance(to, Format)
    for name in ("values", "group_size"):
        expected, got = getattr(fmt, name), getattr(to, name)
        if expected != got:
            expected, got = (
                dtype_name(choice) if name == "values" else choice for choice in (expected, got)
            )
            raise ValueError(
                f"to: expected {name} {expected}, that of fmt, whose scales are converted and "
                f"whose values stay as they are, got {got}"
            )
    if fmt.scale_dtype is not to.scale_dtype and (fmt.upper_scale or to.upper_scale):
        raise ValueError(
            f"to: expected {dtype_name(fmt.scale_dtype)} scales, those of fmt, got "
            f"{dtype_name(to.scale_dtype)}: e4m3 scales lie under one more, and convert to no "
            "others"
        )
    if to.power_of_two and not fmt.power_of_two:
        kind = "UE8M0 scales" if to.ue8m0 else "scales rounded to powers of two"
        raise ValueError(
            f"to: expected float32 scales of any value, those of fmt, got {kind}, which would lose "
            "them: if they are powers of two, say so with fmt.replace(round_scale=True)"
        )


def check_powers_of_two(call: Conversion) -> None:
    """Read the scales, which synchronizes, and check that a conversion to UE8M0 loses none.

    NaN and Inf are those of groups that are not finite, and convert to the NaN of UE8M0.

    Raises:
        ValueError: a float32 scale is no power of two from 2^-127 to 2^127, nor 0.
    """
    sf, fmt, to, shape, rows, _ = call
    if fmt.byte_scales or not to.power_of_two or not sf.numel():
        return
    scales = scale_storage.read(sf, fmt, shape.mn, shape.k)
    lost = (exponents(scales) == UE8M0_NAN) & scales.isfinite()
    if rows is not None:
        lost &= rows_that_exist(rows, shape.mn).unsqueeze(2)
    if lost.any():
        batch, row, group = lost.nonzero()[0].tolist()
        place = (*torch.unravel_index(torch.tensor(batch), shape.batch_shape), row, group)
        at = tuple(int(index) for index in place)
        raise ValueError(
            f"sf: expected powers of two, got {scales[batch, row, group].item()} at {at}, in "
            f"{int(lost.sum())} of {lost.numel()} places"
        )


def exponents(scales: torch.Tensor) -> torch.Tensor:
    """Return the UE8M0 bytes of float32 scales, 255 of those that are no powers of two."""
    bits = scales.view(torch.int32)
    # The mask as an int32, whose sign it has.
    powers = (bits & (NOT_A_POWER_OF_TWO - 2**32)) == 0
    bytes_ = (bits >> FLOAT32_MANTISSA_BITS).where(powers, UE8M0_NAN)
    return bytes_.where(bits != SMALLEST_UE8M0, 0).to(torch.uint8)


def rows_that_exist(rows: Rows, mn: int) -> torch.Tensor:
    """Return which rows of a row domain exist, (batch, mn)."""
    match rows:
        case Masked():
            return below_count(rows, mn, mn)
        case PrefixSum():
            return rows_of_groups(rows, mn).any(0, keepdim=True)
        case Indexed():
            return (rows.m_indices >= 0).unsqueeze(0)


def convert_into(call: Conversion, result: torch.Tensor) -> None:
    """Write the scales of a call that was checked to `result`, and 0 to its padding."""
    sf, fmt, to, shape, rows, _ = call
    if not result.numel():
        return
    scales = scale_storage.read(sf, fmt, shape.mn, shape.k)
    if to.byte_scales and not fmt.byte_scales:
        scales = exponents(scales)
    elif fmt.byte_scales and not to.byte_scales:
        zero = torch.tensor(call.zero, dtype=torch.int32, device=sf.device).view(torch.float32)
        scales = ue8m0_to_float32(scales).where(scales != 0, zero)
    if rows is not None:
        scales = scales.where(rows_that_exist(rows, shape.mn).unsqueeze(2), 0)
    written = torch.ones(1, to.scale_rows(shape.mn), dtype=torch.bool, device=sf.device)
    scale_storage.write(scales, written.expand(len(scales), -1), result, to, shape.k)
