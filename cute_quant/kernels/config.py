"""Compile-time choices of kernels: specs and tiles. Nothing here needs CuTe DSL.

A spec names a kernel and all of its compile-time choices. Two specs that are equal give the same
code. Specs are tuples; those of different kernels differ in the field `kernel`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from cute_quant.contract.dtypes import LOAD_BYTES, SOURCE_BLOCK, STORE_BYTES
from cute_quant.contract.format_choices import WHOLE_ROW
from cute_quant.contract.formats import Format
from cute_quant.contract.prologues import FUSED
from cute_quant.contract.rows import DENSE, PREFIX_SUMS, Indexed, Masked, PrefixSumWithGaps
from cute_quant.kernels import architectures

LANES = 32
"""Threads of a warp."""

MIN_VALUES = 4
"""Least values of a thread, whose 8-bit results fill a register."""

MAX_THREADS = 1024
"""Most threads of a CTA."""

MAX_GRID_Y = 65535
MAX_GRID_Z = 65535
"""Most CTAs in the second and third dimension of a grid."""

MAX_THREAD_BYTES = 512
"""Most bytes of x that a thread holds: half of its 255 registers."""

DOWN, ALONG = "down", "along"
ORDERS = (DOWN, ALONG)
"""Rasterization order of warps or CTAs: along M (down) or along N (along) first."""

LOAD_HINTS = ("no_allocate", "streaming", "prefetch_256")
"""Cache hints of a load: do not keep its data in the L1 cache, evict it first, or prefetch 256
bytes to the L2 cache."""


class Tile(NamedTuple):
    """How the threads of a CTA tile rows and columns.

    Attributes:
        values_per_thread: values of a row that a thread holds, contiguous along k.
        row_warps: warps along M, each with rows of its own.
        rows_per_thread: rows whose loads are in flight at once, up to the lanes of a group or a
            multiple of them. As many lanes store their scales at once; k is a multiple of what
            these lanes hold.
        column_warps: warps along N, each with columns of its own.
        tiles_per_thread: tiles of a warp along N, one after the other. Their loads are in flight at
            once like those of rows, and their addresses differ by constants.
        warp_order: rasterization order of the warps of a CTA, one of ``ORDERS``.
        cta_order: rasterization order of CTAs.
        low_latency: whether the CTAs of a launch are too few to fill an SM, so that the time of one
            is what counts. A thread may take registers that more warps would not have, and knows
            the addresses of its loads before it waits for the kernel before.
    """

    values_per_thread: int = 16
    row_warps: int = 4
    rows_per_thread: int = 1
    column_warps: int = 1
    tiles_per_thread: int = 1
    warp_order: str = DOWN
    cta_order: str = ALONG
    low_latency: bool = False

    @property
    def columns(self) -> int:
        """Return the columns of a warp."""
        return LANES * self.values_per_thread

    @property
    def rows(self) -> int:
        """Return the rows of a CTA."""
        return self.row_warps * self.rows_per_thread

    def lanes_per_group(self, group_size: int) -> int:
        """Return how many adjacent lanes hold a group of this size, or -1 for a whole row."""
        return LANES if group_size == WHOLE_ROW else group_size // self.values_per_thread

    def groups(self, group_size: int) -> int:
        """Return how many groups of this size a warp has."""
        return LANES // self.lanes_per_group(group_size)

    def check(self, fmt: Format, dtype: torch.dtype, access: Access | None = None) -> None:
        """Check that a kernel of this tile keeps the contract.

        Args:
            fmt: of the results.
            dtype: of x.
            access: to x and q, if their addresses are known.

        Raises:
            ValueError: it does not; the message names the rule.
        """
        values, rows = self.values_per_thread, self.rows_per_thread
        least = MIN_VALUES * fmt.value_type.per_byte
        _require(
            _power_of_two(values) and values >= least,
            f"values_per_thread: expected a power of two from {least} on, whose results fill "
            f"registers, got {values}",
        )
        for name in ("row_warps", "column_warps", "rows_per_thread", "tiles_per_thread"):
            count = getattr(self, name)
            _require(count >= 1, f"{name}: expected at least 1, got {count}")
        for name in ("warp_order", "cta_order"):
            order = getattr(self, name)
            _require(order in ORDERS, f"{name}: expected one of {ORDERS}, got {order!r}")
        threads = LANES * self.row_warps * self.column_warps
        _require(
            threads <= MAX_THREADS,
            f"row_warps, column_warps: expected at most {MAX_THREADS} threads in a CTA, got "
            f"{self.row_warps} * {self.column_warps} warps, {threads} threads",
        )
        self._check_groups(fmt.group_size)
        held = values * rows * self.tiles_per_thread * dtype.itemsize
        _require(
            held <= MAX_THREAD_BYTES,
            f"values_per_thread, rows_per_thread, tiles_per_thread: expected at most "
            f"{MAX_THREAD_BYTES} bytes of x in the registers of a thread, got {values} * {rows} * "
            f"{self.tiles_per_thread} values, {held} bytes",
        )
        if access is not None:
            _check_width("load_bytes", access.load_bytes, dtype.itemsize, values, "x")
            columns = values // fmt.value_type.per_byte
            _check_width("store_bytes", access.store_bytes, fmt.values.itemsize, columns, "q")
            _require(
                access.load_hint is None or access.load_hint in LOAD_HINTS,
                f"load_hint: expected None or one of {LOAD_HINTS}, got {access.load_hint!r}",
            )

    def _check_groups(self, size: int) -> None:
        """Check that a group of `size` lies in a warp, whose lanes store its scales."""
        values, rows = self.values_per_thread, self.rows_per_thread
        if size == WHOLE_ROW:
            _require(
                rows == self.column_warps == 1,
                f"rows_per_thread, column_warps: expected 1 and 1, a row being one group whose "
                f"warps a launch counts, got {rows} and {self.column_warps}",
            )
            return
        _require(
            size % values == 0,
            f"values_per_thread: expected a divisor of group_size {size}, a thread having one "
            f"scale, got {values}",
        )
        lanes = self.lanes_per_group(size)
        _require(
            lanes <= LANES,
            f"values_per_thread: expected at least {size // LANES} for group_size {size}, a "
            f"group lying in a warp of {LANES} lanes, got {values}, {lanes} lanes",
        )
        _require(
            rows <= lanes or rows % lanes == 0,
            f"rows_per_thread: expected at most {lanes} or a multiple, the lanes of a group, each "
            f"of which writes the scale of a row, got {rows}",
        )


DEFAULT_TILE = Tile()
ONE_ROW = Tile(row_warps=1, cta_order=DOWN)
"""Tile of a kernel whose CTAs have whole rows; a grid's first dimension counts most of them."""


class Access(NamedTuple):
    """Widths of loads and stores that the addresses allow.

    Attributes:
        load_bytes: bytes of a load, a power of two from the size of an element to 32. Every row of
            the input starts at a multiple of it.
        store_bytes: the same for the output, up to 16, or 32 if its elements are x's.
        ragged: whether a row may end within a thread's values.
        load_hint: None or one of ``LOAD_HINTS``.
        dense_scales: whether columns of MN-major scales have no padding rows.
        strided_scales: whether rows of row-major scales are as far apart as their tensor says,
            rather than contiguous.
    """

    load_bytes: int = LOAD_BYTES
    store_bytes: int = STORE_BYTES
    ragged: bool = False
    load_hint: str | None = None
    dense_scales: bool = False
    strided_scales: bool = False


WIDEST = Access()


def _check_width(name: str, nbytes: int, itemsize: int, values: int, operand: str) -> None:
    most = min(values * itemsize, LOAD_BYTES)
    _require(
        _power_of_two(nbytes) and itemsize <= nbytes <= most,
        f"{name}: expected a power of two from {itemsize} to {most}, of the {values * itemsize} "
        f"bytes of {operand} that a thread has in a row and the {LOAD_BYTES} that an instruction "
        f"moves, got {nbytes}",
    )


def _require(holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(rule)


def _power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


class Domain(NamedTuple):
    """Which rows exist.

    Attributes:
        kind: of the rows, as `cute_quant.contract.rows` names it.
        gathered: whether an index names the rows of x.
        batched: whether there are several matrices, or more rows than one dimension of a grid
            counts; the results of masked experts always are.
        grouped: whether each group of a prefix sum or an index has an upper scale of its own.
        scattered: whether each row of x names rows of the result.
    """

    kind: str = DENSE
    gathered: bool = False
    batched: bool = False
    grouped: bool = False
    scattered: bool = False

    @property
    def masked(self) -> bool:
        """Return whether the first rows of each expert exist."""
        return self.kind == Masked.kind

    @property
    def prefix_sum(self) -> bool:
        """Return whether groups of rows are stacked along M, each up to an end."""
        return self.kind in PREFIX_SUMS

    @property
    def keeps_gaps(self) -> bool:
        """Return whether rows between such groups are not written."""
        return self.kind == PrefixSumWithGaps.kind

    @property
    def indexed(self) -> bool:
        """Return whether each row carries the index of its group."""
        return self.kind == Indexed.kind

    @property
    def counted(self) -> bool:
        """Return whether the kernel reads counts."""
        return self.kind != DENSE

    @property
    def repeats(self) -> bool:
        """Return whether a CTA may take several tiles of rows."""
        return self.batched or self.scattered

    @property
    def selects(self) -> bool:
        """Return whether the rows that exist are not just the first ones."""
        return self.gathered or self.prefix_sum or self.indexed


DENSE_ROWS = Domain()


class QuantizeSpec(NamedTuple):
    """Choices of `kernels.quantize.Quantize`.

    Attributes:
        dtype: of the elements of x.
        fmt: of the results.
        fake: whether the result is the products of values and scales, in x's dtype.
        stochastic: whether values are rounded by random numbers.
        max_warps: most warps that share a row, where each row has a scale of its own or is one
            group.
        held: whether a row that is one group lies in the registers of its CTA; a longer one is read
            twice.
        upper: the argument that the scale over e4m3 scales is given as, as of
            `cute_quant.contract.upper_scales`; None where the format has none, or one for each row.
        pdl: programmatic dependent launch. CTAs start while the kernel before still runs, and wait
            for its end before they touch memory. The next kernel may do the same.
    """

    dtype: torch.dtype
    fmt: Format
    tile: Tile = DEFAULT_TILE
    domain: Domain = DENSE_ROWS
    access: Access = WIDEST
    fake: bool = False
    stochastic: bool = False
    max_warps: int = 16
    held: bool = True
    upper: str | None = None
    pdl: bool = True
    kernel: str = "quantize.Quantize"


class SiluMulSpec(NamedTuple):
    """Choices of `kernels.silu_mul.SiluMul`.

    Attributes:
        dtype, fmt, tile, domain, access, upper, pdl: as of a `QuantizeSpec`, x being gates and ups.
        interleaved: whether gates and ups alternate; if not, all gates come first.
        rounding: of the prologue.
        clamped: whether there are bounds.
        scaled: whether the gate has a factor in the sigmoid.
        shifted: whether something is added to the up.
        weighted: whether rows have a factor of their own.
        max_warps, held: as of a `QuantizeSpec`.
    """

    dtype: torch.dtype
    fmt: Format
    tile: Tile = DEFAULT_TILE
    domain: Domain = DENSE_ROWS
    access: Access = WIDEST
    interleaved: bool = False
    rounding: str = FUSED
    clamped: bool = False
    scaled: bool = False
    shifted: bool = False
    weighted: bool = False
    max_warps: int = 16
    held: bool = True
    upper: str | None = None
    pdl: bool = True
    kernel: str = "silu_mul.SiluMul"


class SiluMulBackwardSpec(NamedTuple):
    """Choices of `kernels.silu_mul_backward.SiluMulBackward`.

    Attributes:
        dtype, fmt, tile, domain, access, stochastic, upper, pdl: as of a `QuantizeSpec`, x being
            gates and ups. Rows are ragged too where a thread may have gates and ups.
        interleaved, clamped, scaled, shifted: as of a `SiluMulSpec`.
        max_warps, held: as of a `QuantizeSpec`.
    """

    dtype: torch.dtype
    fmt: Format
    tile: Tile = DEFAULT_TILE
    domain: Domain = DENSE_ROWS
    access: Access = WIDEST
    interleaved: bool = False
    clamped: bool = False
    scaled: bool = False
    shifted: bool = False
    stochastic: bool = False
    max_warps: int = 16
    held: bool = True
    upper: str | None = None
    pdl: bool = True
    kernel: str = "silu_mul_backward.SiluMulBackward"


class RmsNormSpec(NamedTuple):
    """Choices of `kernels.rms_norm.RmsNorm`.

    Attributes:
        dtype, fmt, tile, domain, access, upper, pdl: as of a `QuantizeSpec`.
        tiles_per_thread: tiles of a row in the registers of each thread.
        max_warps: most warps that share a row.
        weight_dtype: of the weights.
        rounding: of the prologue.
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
    rounding: str = FUSED
    residual: bool = False
    normalized: bool = False
    upper: str | None = None
    pdl: bool = True
    kernel: str = "rms_norm.RmsNorm"


class DequantizeSpec(NamedTuple):
    """Choices of `kernels.dequantize.Dequantize`.

    Attributes:
        fmt: of values and scales.
        dtype: of the result.
        tile: of a CTA's threads, which have one row each.
        access: to the values and the result.
        upper, pdl: as of a `QuantizeSpec`.
        square: whether a scale is that of a square block.
    """

    fmt: Format
    dtype: torch.dtype
    tile: Tile = DEFAULT_TILE
    access: Access = WIDEST
    upper: str | None = None
    square: bool = False
    pdl: bool = True
    kernel: str = "dequantize.Dequantize"


class AmaxSpec(NamedTuple):
    """Choices of `kernels.amax.Amax`.

    Attributes:
        dtype: of the elements of x.
        load_bytes: as of an `Access`.
        pdl: as of a `QuantizeSpec`.
    """

    dtype: torch.dtype
    load_bytes: int = LOAD_BYTES
    pdl: bool = True
    kernel: str = "amax.Amax"

    @property
    def tiles(self) -> int:
        """Return the tiles of a warp whose loads are in flight at once."""
        return AMAX_BYTES // (DEFAULT_TILE.values_per_thread * self.dtype.itemsize)


AMAX_BYTES = 128
"""Bytes that each thread of `kernels.amax.Amax` has in flight."""
AMAX_WARPS = 8
"""Most warps of its CTAs."""


class BlocksSpec(NamedTuple):
    """Choices of `kernels.blocks.Blocks`.

    Attributes:
        dtype: of the weights; e4m3 where they have scales of blocks, which they are multiplied with
            first.
        fmt: of the results.
        values_per_thread: of a row or column of the weights, contiguous, that a thread holds.
        access: to the weights.
        q_access: to the quantized values.
        transposed: whether the weights are contiguous along n.
        source_block: size of the blocks whose scales the weights have.
        pdl: as of a `QuantizeSpec`.
    """

    dtype: torch.dtype
    fmt: Format
    values_per_thread: int
    access: Access
    q_access: Access
    transposed: bool = False
    source_block: int = SOURCE_BLOCK
    pdl: bool = True
    kernel: str = "blocks.Blocks"


class RequantizeSpec(NamedTuple):
    """Choices of `kernels.requantize.Requantize`.

    Attributes:
        dtype: of the values that come in, e4m3.
        fmt, tile, domain, access, upper, pdl: as of a `QuantizeSpec`.
        source_block: as of a `BlocksSpec`.
    """

    dtype: torch.dtype
    fmt: Format
    tile: Tile = DEFAULT_TILE
    domain: Domain = DENSE_ROWS
    access: Access = WIDEST
    upper: str | None = None
    source_block: int = SOURCE_BLOCK
    pdl: bool = True
    kernel: str = "requantize.Requantize"


class Gated(NamedTuple):
    """Choices of a gated activation, or of its gradients, whose columns are quantized.

    Attributes:
        interleaved, rounding, clamped, scaled, shifted, weighted: as of a `SiluMulSpec`.
        backward: whether gradients of gates and ups are computed.
        paired: whether a CTA has the gradients of gates and those of as many ups, one tile of each.
    """

    interleaved: bool = False
    rounding: str = FUSED
    clamped: bool = False
    scaled: bool = False
    shifted: bool = False
    weighted: bool = False
    backward: bool = False
    paired: bool = False


class ColumnsSpec(NamedTuple):
    """Choices of `kernels.columns.Columns`.

    Attributes:
        dtype: of x, or of gates and ups.
        fmt: of the results of groups along rows.
        values_per_thread: of a row of x, contiguous, that a thread holds.
        access: to x, and to the values of groups along k.
        q_access: to the values of groups along rows.
        transposed: whether these are the transpose.
        row_fmt: of the results of groups along k, None without.
        kind: of the rows, as `cute_quant.contract.rows` names it: dense or a prefix sum.
        gated: the operation before the quantizer, None without.
        stochastic, pdl: as of a `QuantizeSpec`.
    """

    dtype: torch.dtype
    fmt: Format
    values_per_thread: int
    access: Access
    q_access: Access
    transposed: bool = False
    row_fmt: Format | None = None
    kind: str = DENSE
    gated: Gated | None = None
    stochastic: bool = False
    pdl: bool = True
    kernel: str = "columns.Columns"


BLOCK_TILE = 128
"""Rows, and columns, that a CTA of `kernels.blocks.Blocks` and `kernels.columns.Columns` has."""
BLOCK_WARPS = 8
"""Its warps."""


class ConvertSpec(NamedTuple):
    """Choices of `kernels.convert_scales.ConvertScales`.

    Attributes:
        source, result: formats that stand for all with the same layout and scales of as many bytes.
        kind: of the rows, as `cute_quant.contract.rows` names it.
        load_bytes: bytes of a load of a row's scales: those of four groups, or of one.
        store_bytes: bytes of a store: 16, or those of a word, or of a scale.
        pdl: as of a `QuantizeSpec`.
    """

    source: Format
    result: Format
    kind: str = DENSE
    load_bytes: int = 4
    store_bytes: int = 16
    pdl: bool = True
    kernel: str = "convert_scales.ConvertScales"


CONVERT_WARPS = 4
"""Warps of its CTAs."""
CONVERT_ROWS = 4
"""Rows of a thread whose words are contiguous in the result."""


class ArrivalSpec(NamedTuple):
    """Choices of `kernels.arrival.Arrival`.

    Attributes:
        fmt: that stands for all with the same layout of scales, of as many bytes.
        masked: whether rows are those of masked experts, of which the others are left alone.
        pdl: as of a `QuantizeSpec`.
    """

    fmt: Format
    masked: bool = False
    pdl: bool = True
    kernel: str = "arrival.Arrival"


ARRIVAL_WARPS = 4
"""Warps of its CTAs, which have a row for each lane."""


class BarrierSpec(NamedTuple):
    """Choices of `kernels.barrier.Barrier`.

    Attributes:
        pdl: as of a `QuantizeSpec`.
    """

    pdl: bool = True
    kernel: str = "barrier.Barrier"


class CombineSpec(NamedTuple):
    """Choices of `kernels.combine.Combine`.

    Attributes:
        dtype: of the rows and of their sums.
        in_flight: rows whose loads are in flight at once.
        values_per_thread: columns of a thread, contiguous along n.
        access: to the rows and to the sums.
        weighted: whether rows have factors.
        pdl: as of a `QuantizeSpec`.
    """

    dtype: torch.dtype
    in_flight: int
    values_per_thread: int
    access: Access
    weighted: bool = False
    pdl: bool = True
    kernel: str = "combine.Combine"


COMBINE_WARPS = 4
"""Warps of its CTAs, along the columns of one record."""
COMBINE_CTAS = 6
"""CTAs that an SM holds: as many registers are left for a thread as its loads need."""
COMBINE_ROWS = 4
"""Most rows whose loads are in flight at once."""


QuantizerSpec = QuantizeSpec | SiluMulSpec | SiluMulBackwardSpec | RmsNormSpec
Spec = (
    QuantizerSpec
    | DequantizeSpec
    | AmaxSpec
    | BlocksSpec
    | RequantizeSpec
    | ColumnsSpec
    | ConvertSpec
    | ArrivalSpec
    | BarrierSpec
    | CombineSpec
)


def launched_on(spec: Spec, arch: str) -> Spec:
    """Return a spec as a call on an architecture has it: a programmatic dependent, if it can be."""
    return spec._replace(pdl=architectures.named(arch).pdl)
