"""What kernels are compiled for. Nothing here needs CuTe DSL.

A spec names a kernel and all of its compile-time choices; two specs that are equal give the same
code. `compile.function` makes a function of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from cute_quant.formats import LOAD_BYTES, STORE_BYTES, WHOLE_ROW, Format
from cute_quant.rows import DENSE, Indexed, Masked, PrefixSum

LANES = 32
"""Threads of a warp."""


@dataclass(frozen=True)
class Tile:
    """How the threads of a CTA lie over rows and columns.

    Attributes:
        values_per_thread: neighbours of a row that a thread holds.
        row_warps: warps below each other, each with rows of its own.
        rows_per_thread: rows whose loads are in flight at once, up to the lanes of a group; as
            many lanes write their scales at once. k has to be a multiple of what these hold.
    """

    values_per_thread: int = 16
    row_warps: int = 4
    rows_per_thread: int = 1

    @property
    def columns(self) -> int:
        """Columns of a warp."""
        return LANES * self.values_per_thread

    @property
    def rows(self) -> int:
        """Rows of a CTA."""
        return self.row_warps * self.rows_per_thread

    def lanes_per_group(self, group_size: int) -> int:
        """Neighbouring lanes that hold a group."""
        return LANES if group_size == WHOLE_ROW else group_size // self.values_per_thread

    def groups(self, group_size: int) -> int:
        """Groups of a warp."""
        return LANES // self.lanes_per_group(group_size)


DEFAULT_TILE = Tile()
ONE_ROW = Tile(row_warps=1)


@dataclass(frozen=True)
class Access:
    """What addresses allow.

    Attributes:
        load_bytes: at once, a power of two from the size of an element to 32: what every row of
            the input starts at a multiple of.
        store_bytes: the same for the output, up to 16, or 32 if its elements are x's.
        ragged: whether a row may end within a thread's values.
    """

    load_bytes: int = LOAD_BYTES
    store_bytes: int = STORE_BYTES
    ragged: bool = False


WIDEST = Access()


@dataclass(frozen=True)
class Domain:
    """Which rows there are.

    Attributes:
        kind: of the rows, as `cute_quant.rows` names it.
        gathered: whether an index names the rows of x.
        batched: whether there are matrices, or more rows than one dimension of a grid counts;
            the results of masked experts always are.
    """

    kind: str = DENSE
    gathered: bool = False
    batched: bool = False

    @property
    def masked(self) -> bool:
        return self.kind == Masked.kind

    @property
    def prefix_sum(self) -> bool:
        return self.kind == PrefixSum.kind

    @property
    def indexed(self) -> bool:
        return self.kind == Indexed.kind

    @property
    def counted(self) -> bool:
        """Whether there is something to read."""
        return self.kind != DENSE

    @property
    def selects(self) -> bool:
        """Whether the rows that exist are not just the first ones."""
        return self.gathered or self.prefix_sum or self.indexed


DENSE_ROWS = Domain()


@dataclass(frozen=True)
class QuantizeSpec:
    """Choices of `kernels.quantize.Quantize`.

    Attributes:
        dtype: of the elements of x.
        fmt: of the results.
        fake: whether the result is not values and scales but their products, in x's dtype.
        pdl: programmatic dependent launch: CTAs start while the kernel before still runs, wait for
            its end before they touch memory, and let those of the next start as early, which have
            to wait too.
    """

    dtype: torch.dtype
    fmt: Format
    tile: Tile = DEFAULT_TILE
    domain: Domain = DENSE_ROWS
    access: Access = WIDEST
    fake: bool = False
    pdl: bool = True

    kernel: ClassVar[str] = "quantize.Quantize"


@dataclass(frozen=True)
class SiluMulSpec:
    """Choices of `kernels.silu_mul.SiluMul`.

    Attributes:
        dtype, fmt, tile, domain, access, pdl: as of a `QuantizeSpec`, x being gates and ups.
        interleaved: whether gates and ups take turns, or all gates come first.
        unfused: whether each step is rounded to x's dtype.
        clamped: whether there are bounds.
        scaled: whether the gate has a factor in the sigmoid.
        shifted: whether something is added to the up.
        weighted: whether rows have a factor of their own.
    """

    dtype: torch.dtype
    fmt: Format
    tile: Tile = DEFAULT_TILE
    domain: Domain = DENSE_ROWS
    access: Access = WIDEST
    interleaved: bool = False
    unfused: bool = False
    clamped: bool = False
    scaled: bool = False
    shifted: bool = False
    weighted: bool = False
    pdl: bool = True

    kernel: ClassVar[str] = "silu_mul.SiluMul"


@dataclass(frozen=True)
class RmsNormSpec:
    """Choices of `kernels.rms_norm.RmsNorm`.

    Attributes:
        dtype, fmt, tile, domain, access, pdl: as of a `QuantizeSpec`.
        tiles_per_thread: of a row, in the registers of each thread.
        max_warps: that share a row.
        weight_dtype: of the weights.
        unfused: whether sum and product are rounded to x's dtype.
        residual: whether there is one to add.
        normalized: whether what is quantized is written too.
    """

    dtype: torch.dtype
    fmt: Format
    tile: Tile = ONE_ROW
    domain: Domain = DENSE_ROWS
    access: Access = WIDEST
    tiles_per_thread: int = 1
    max_warps: int = 16
    weight_dtype: torch.dtype = torch.bfloat16
    unfused: bool = False
    residual: bool = False
    normalized: bool = False
    pdl: bool = True

    kernel: ClassVar[str] = "rms_norm.RmsNorm"


@dataclass(frozen=True)
class DequantizeSpec:
    """Choices of `kernels.dequantize.Dequantize`: the format of values and scales, the dtype of
    the result, and what addresses allow."""

    fmt: Format
    dtype: torch.dtype
    access: Access = WIDEST

    kernel: ClassVar[str] = "dequantize.Dequantize"


Spec = QuantizeSpec | SiluMulSpec | RmsNormSpec | DequantizeSpec
