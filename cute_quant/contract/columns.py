"""Groups along rows: which formats columns have, where their scales lie, and checks.

A group is ``fmt.group_size`` neighbours of a column of x (..., mn, k), as GEMMs of weight gradients
read it. The format is that of the rows of the transpose of x: values and scales are those of
``quantize(x.mT, fmt)``. Scales that are MN-major there are contiguous here, a row of k for each
group or for each word of four groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from cute_quant.contract.calls import ResultShape
from cute_quant.contract.checks import (
    check_format,
    check_number_of_scales,
    check_rng_state,
    check_row_domain,
    check_row_kind,
    check_scales_out,
    check_silu_mul,
    check_silu_mul_backward,
    check_values_out,
)
from cute_quant.contract.dtypes import BYTES_PER_WORD, INPUT_DTYPES, describe
from cute_quant.contract.format_choices import BLOCKED, MAX_COLUMNS, MN_MAJOR, MN_MAJOR_PACKED
from cute_quant.contract.formats import Format
from cute_quant.contract.prologues import GatedPrologue, SiluMul, SiluMulBackward
from cute_quant.contract.rows import KINDS, PrefixSum, PrefixSumWithGaps, Rows
from cute_quant.contract.tensors import (
    check_matrices,
    check_tensor,
    check_written,
)

Pair = tuple[torch.Tensor, torch.Tensor]
"""Values and scales."""

GROUP_SIZES = (32, 128)
"""Rows of a group, which weight gradients are read with."""
WORD_GROUP_SIZE = 32
"""Rows of a group whose scale is a byte of a word."""
LAYOUTS = (MN_MAJOR, MN_MAJOR_PACKED, BLOCKED)
"""Layouts of the scales of the transpose that weight gradients are read with."""


class Output(NamedTuple):
    """The result of one direction.

    Attributes:
        fmt: what it looks like.
        q, sf: the caller's memory for values and scales, None to allocate it.
    """

    fmt: Format
    q: torch.Tensor | None = None
    sf: torch.Tensor | None = None


class ColumnCall(NamedTuple):
    """A call of ``cute_quant.quantize_columns``, ``quantize_both``, or what ends in them.

    Attributes:
        x: (..., mn, k); (..., mn, 2 k) for SiLU.
        columns: the result of groups along rows.
        transposed: whether its values are (..., k, mn).
        rows: which rows exist; None for all of them.
        along_k: the result of groups along k, None without.
        prologue: the operation before the quantizer, with its tensors.
        rng_state: as of a ``Call``.
    """

    x: torch.Tensor
    columns: Output
    transposed: bool = False
    rows: Rows | None = None
    along_k: Output | None = None
    prologue: GatedPrologue | None = None
    rng_state: torch.Tensor | None = None

    @property
    def input_name(self) -> str:
        """Return the name of the argument that `x` was given as."""
        return "x" if self.prologue is None else self.prologue.input_name

    @property
    def tensors(self) -> dict[str, torch.Tensor | None]:
        """Return all tensors by the names of their arguments."""
        return self.reads | self.writes

    @property
    def reads(self) -> dict[str, torch.Tensor | None]:
        """Return the tensors that are read, by the names of their arguments."""
        reads: dict[str, torch.Tensor | None] = {self.input_name: self.x}
        if self.rows is not None:
            reads[f"rows.{self.rows.data_name}"] = self.rows.data
        if self.rng_state is not None:
            reads["rng_state"] = self.rng_state
        if self.prologue is not None:
            reads.update(self.prologue.reads)
        return reads

    @property
    def writes(self) -> dict[str, torch.Tensor | None]:
        """Return the caller's memory for results, by the names of the arguments."""
        which = self.which
        writes = {f"out {which}q": self.columns.q, f"out {which}sf": self.columns.sf}
        if self.along_k is not None:
            writes |= {"out q": self.along_k.q, "out sf": self.along_k.sf}
        return writes

    @property
    def outputs(self) -> list[Output]:
        """Return the results in the order of an operator's: along k first."""
        return [self.columns] if self.along_k is None else [self.along_k, self.columns]

    @property
    def which(self) -> str:
        """Return what tells the result of columns from that of rows, for messages."""
        return "" if self.along_k is None else "column "

    @property
    def shape(self) -> ResultShape:
        """Return the shape of the values of rows."""
        *batch_shape, mn, k = self.x.shape
        if self.prologue is not None:
            k = self.prologue.columns(k)
        return ResultShape(tuple(batch_shape), mn, k)


def check_column_format(fmt: object, name: str = "fmt") -> None:
    """Check that columns have a format.

    Raises:
        TypeError: it is no Format.
        ValueError: columns have no such values or scales.
    """
    check_group_format(fmt, name)
    assert isinstance(fmt, Format)
    if fmt.scale_layout not in LAYOUTS:
        raise ValueError(
            f"{name}: expected a scale_layout of {LAYOUTS} for groups along rows, got {fmt.text}"
        )
    if fmt.packed and fmt.group_size != WORD_GROUP_SIZE:
        raise ValueError(
            f"{name}: expected groups of {WORD_GROUP_SIZE} rows where scales are bytes of words, "
            f"got {fmt.text}"
        )


def check_group_format(fmt: object, name: str) -> None:
    """Check that a format has values and groups of which a tile holds whole ones.

    Raises:
        TypeError: it is no Format.
        ValueError: it has others.
    """
    check_format(fmt, name)
    assert isinstance(fmt, Format)
    if fmt.value_type.per_byte > 1:
        raise ValueError(f"{name}: expected 8-bit values, got {fmt.text}")
    if fmt.divides or fmt.truncates or fmt.in_bf16:
        raise ValueError(
            f"{name}: expected numerics that multiply values and round them to nearest, got "
            f"{fmt.text}"
        )
    if fmt.group_size not in GROUP_SIZES:
        raise ValueError(
            f"{name}: expected a group_size of {' or '.join(map(str, GROUP_SIZES))}, got {fmt.text}"
        )


def check_rows_of_groups(rows: Rows | None) -> None:
    """Check the type of a row domain, and of its alignment.

    Raises:
        TypeError: it is none.
        ValueError: it is another one than groups along rows have.
    """
    prefix_sum = isinstance(rows, PrefixSum) and not isinstance(rows, PrefixSumWithGaps)
    if rows is not None and not prefix_sum:
        error = ValueError if isinstance(rows, tuple(KINDS.values())) else TypeError
        expected = "None or a PrefixSum for groups along rows"
        raise error(f"rows: expected {expected}, got {describe(rows)}")
    check_row_kind(rows)


def check_transposed(transposed: object) -> None:
    """Check the type of an option."""
    if transposed is not False and transposed is not True:
        raise TypeError(f"transposed: expected a bool, got {describe(transposed)}")


def values_shape(shape: ResultShape, transposed: bool) -> ResultShape:
    """Return the shape of the values of the columns of x, which has `shape`."""
    batch_shape, mn, k = shape
    return ResultShape(batch_shape, k, mn) if transposed else shape


def scale_shape(fmt: Format, shape: ResultShape) -> tuple[int, ...]:
    """Return the shape of the scales of the columns of x, which has `shape`."""
    batch_shape, mn, k = shape
    if fmt.blocked:
        return Format.scale_shape(fmt, batch_shape, k, mn)
    return (*batch_shape, Format.columns(fmt, mn), k)


def scale_strides(fmt: Format, shape: ResultShape) -> tuple[int, ...]:
    """Return the strides of the scales of the columns of x, in elements: contiguous ones."""
    strides = [1]
    for size in reversed(scale_shape(fmt, shape)[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))


def rows_of_unit(fmt: Format) -> int:
    """Return the rows whose scales are stored together: those of a group, or of a word."""
    return fmt.group_size * fmt.groups_per_unit


def check_columns(call: ColumnCall) -> ResultShape:
    """Check everything that the tensors of a call say of themselves, real or fake.

    Returns:
        The shape of the values that are quantized.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """
    x, columns, along_k, name = call.x, call.columns, call.along_k, call.input_name
    check_formats(call)
    check_transposed(call.transposed)
    check_tensor(name, x, INPUT_DTYPES)
    check_matrices(name, x, MAX_COLUMNS if call.prologue is None else call.prologue.max_columns)
    _check_rows(call)
    shape = call.shape
    batch_shape, mn, k = shape
    match call.prologue:
        case SiluMul():
            check_silu_mul(call.prologue, x, (*batch_shape, mn))
        case SiluMulBackward():
            check_silu_mul_backward(call.prologue, x)
    for output in call.outputs:
        check_rng_state(call.rng_state, output.fmt, x, name)
    if columns.fmt.blocked:
        check_number_of_scales(name, columns.fmt, ResultShape(batch_shape, k, mn))
    of_values = values_shape(shape, call.transposed)
    _check_output(
        call,
        call.which,
        columns,
        of_values,
        scale_shape(columns.fmt, shape),
        scale_strides(columns.fmt, shape),
    )
    if along_k is not None:
        check_number_of_scales(name, along_k.fmt, shape)
        fmt = along_k.fmt
        _check_output(call, "", along_k, shape, fmt.scale_shape(*shape), fmt.scale_strides(*shape))
    return shape


def check_formats(call: ColumnCall) -> None:
    """Check the formats of a call."""
    if call.along_k is None:
        check_column_format(call.columns.fmt)
    else:
        check_group_format(call.along_k.fmt, "fmt")
        check_column_format(call.columns.fmt, "column_fmt")


def _check_rows(call: ColumnCall) -> None:
    x, rows = call.x, call.rows
    name = call.input_name
    check_rows_of_groups(rows)
    check_row_domain(rows, x, name, tuple(x.shape[:-1]), name, x.shape[-1])
    if rows is None:
        return
    unit = rows_of_unit(call.columns.fmt)
    if rows.alignment % unit:
        raise ValueError(
            f"rows.alignment: expected a multiple of {unit}, the rows that share a scale or a word "
            f"of scales in {call.columns.fmt.text}, got {rows.alignment}"
        )


def _check_output(
    call: ColumnCall,
    which: str,
    output: Output,
    shape: ResultShape,
    sf_shape: tuple[int, ...],
    sf_strides: tuple[int, ...],
) -> None:
    """Check the caller's memory for one result."""
    fmt, q, sf = output
    if q is not None:
        check_written(f"out {which}q", q, fmt.values, call.x, call.input_name)
        check_values_out(q, fmt, shape, exact=True, name=f"out {which}q")
    if sf is not None:
        check_written(f"out {which}sf", sf, fmt.sf_dtype, call.x, call.input_name)
        check_scales_out(f"out {which}sf", sf, sf_shape, sf_strides)


def check_word_alignment(call: ColumnCall) -> None:
    """Check that scales in blocks, four of which are stored at once, lie where a word can."""
    sf = call.columns.sf
    if sf is not None and sf.numel() and sf.data_ptr() % BYTES_PER_WORD:
        raise ValueError(
            f"out {call.which}sf: expected memory at a multiple of {BYTES_PER_WORD} bytes, got an "
            f"address {sf.data_ptr() % BYTES_PER_WORD} bytes past one"
        )
