"""Quantize e4m3 weights with scales of square blocks in groups of rows, in one pass.

It is `quantize` of the float32 products of values and scales, which stay in registers.
"""

from __future__ import annotations

from dataclasses import dataclass

import cuda.bindings.driver as cuda
import cutlass.cute as cute
from cutlass import Boolean, Float8E4M3FN, Float32, Int32
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from cute_quant.kernels import copy, encodings, layouts
from cute_quant.kernels.config import RequantizeSpec
from cute_quant.kernels.copy import Segment
from cute_quant.kernels.layouts import Matrix
from cute_quant.kernels.params import Params
from cute_quant.kernels.problem import Operands
from cute_quant.kernels.quantize import GroupQuantizer
from cute_quant.kernels.row_domains import Row
from cute_quant.kernels.stage import Stage


@dataclass(eq=False)
class Products(Params):
    """The prologue of values that are multiplied by the scales of their blocks.

    Attributes:
        x: (n, k) or (batch, n, k), e4m3.
        scales: (n, blocks of k) or (batch, n, blocks of k), each for the rows of its block.
    """

    static = ("spec",)

    x: Matrix
    scales: cute.Tensor
    spec: RequantizeSpec

    def slice_batch(self, batch: Int32, gathered: bool) -> Products:
        """Return the prologue of one matrix of a batch."""
        return self.replace(x=self.x[batch], scales=self.scales[batch, None, None])

    def row(self, row: Row, k: Int32) -> ProductsRow:
        """Return the row of products, (k,), that is a row of the result."""
        gX = self.x.row(row.source, k)
        return ProductsRow(gX, self.scales, Int32(row.source), row.exists, self.spec)


@dataclass(eq=False)
class ProductsRow(Params):
    """A row of products, (k,)."""

    static = ("spec",)

    gX: cute.Tensor
    scales: cute.Tensor
    index: Int32
    predicate: Boolean
    spec: RequantizeSpec

    def load(self, segment: Segment) -> tuple[cute.Tensor, Float32]:
        """Load a thread's segment, (values,), and its scale; zeros where there is nothing."""
        scale = self.load_scale(segment)
        tXrX = encodings.zeros(self.spec.tile.values_per_thread, self.gX.element_type)
        copy.load(self.gX, segment, self.predicate, tXrX, self.spec.access)
        return tXrX, scale

    @cute.jit
    def load_scale(self, segment: Segment) -> Float32:
        """Load the scale of the block that a thread's segment lies in, 0 where there is none."""
        k, scale = cute.size(self.gX), Float32(0.0)
        tXcX = copy.column_coordinates(k, segment, self.spec.tile.values_per_thread)
        tile, size = self.spec.tile, self.spec.source_block
        _, block = layouts.lanes(tile.lanes_per_group(size))(segment.lane)
        blocks = layouts.groups_by_tile(self.scales.layout, tile.groups(size))
        if self.predicate and tXcX[0] < k:
            scale = self.scales[self.index, blocks((block, segment.tile))]
        return scale

    def values(self, loaded: tuple[cute.Tensor, Float32]) -> cute.Tensor:
        """Return the values to be quantized, (values,), float32."""
        tXrX, scale = loaded
        return encodings.multiply(tXrX, scale)


class Requantize:
    """Entry point: values and scales of blocks to values and scales of groups."""

    def __init__(self, spec: RequantizeSpec):
        self.spec = spec
        self.stage = Stage(Float32, spec.fmt, spec.tile)
        self.quantizer = GroupQuantizer(spec, self.stage)

    def signature(self) -> tuple:
        """Return stand-ins for the arguments, with the sizes that vary and the alignment."""
        spec, scheduler = self.spec, self.quantizer.scheduler
        sizes = scheduler.symbolic_sizes()
        shape = (*sizes.batch, sizes.mn, sizes.k)
        scales = (*sizes.batch, cute.sym_int32(), cute.sym_int32())
        strides = tuple(cute.sym_int64() for _ in scales)
        return (
            copy.fake_matrix(Float8E4M3FN, shape, spec.access.load_bytes),
            make_fake_tensor(Float32, scales, stride=strides),
            *scheduler.fake_operands(sizes, encodings.value_type_of(spec.fmt)),
            make_fake_stream(use_tvm_ffi_env_stream=True),
        )

    @cute.jit
    def __call__(
        self,
        mX: cute.Tensor,  # (n, k) or (batch, n, k)
        mXS: cute.Tensor,  # (blocks of n, blocks of k), or a batch of them
        mQ: cute.Tensor,
        mS: cute.Tensor,
        mUpper: cute.Tensor | None,
        mCounts: cute.Tensor | None,
        mIndex: cute.Tensor | None,
        mRng: cute.Tensor | None,
        missing_rows: Int32,
        alignment: Int32,
        row_ctas: Int32,
        floor: Int32 | Float32,
        stream: cuda.CUstream,
    ):
        """Launch. `Operands` describes what comes after the scales of x."""
        operands = Operands(
            mQ, mS, mUpper, mCounts, mIndex, mRng, missing_rows, alignment, row_ctas, floor
        )
        layout = layouts.rows_of_square_blocks(mXS.layout, self.spec.source_block)
        scales = cute.make_tensor(mXS.iterator, layout)
        self.quantizer.launch(Products(Matrix(mX), scales, self.spec), operands, stream)
