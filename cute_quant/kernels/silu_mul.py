"""SiLU of gates times ups, quantized in the same registers: load both, activate, quantize, store.

The layout is that of `quantize`, with two segments a lane instead of one: of a row (2 k,), the
columns of its values among the gates, and as many among the ups; where these take turns, twice as
many neighbours. The product stays in float32 until it is rounded to 8 bits, or takes the rounding
points of torch's operations in the dtype of the input.
"""

from __future__ import annotations

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Uint32, const_expr
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from cute_quant.kernels import copy, numerics
from cute_quant.kernels.config import SiluMulSpec
from cute_quant.kernels.layouts import Matrix
from cute_quant.kernels.params import Params
from cute_quant.kernels.quantize import ColumnTiles
from cute_quant.kernels.stage import Stage
from cute_quant.kernels.types import ELEMENT_TYPES


class Activation(Params):
    """The numbers of ``(up + beta) * gate * sigmoid(alpha * gate)``, as an argument of a kernel.

    Attributes:
        bound: of the gate from above, of the up from both sides.
        alpha: the gate's factor.
        factor: the same, as `numerics.sigmoid` takes it.
        beta: what is added to the up.
    """

    def __init__(self, bound: Float32, alpha: Float32, beta: Float32):
        self.bound = bound
        self.alpha = alpha
        self.factor = numerics.Exponent(alpha)
        self.beta = beta


class SiluMul(ColumnTiles):
    """What is quantized is the product of a gate's SiLU and an up."""

    def __init__(self, spec: SiluMulSpec):
        dtype = ELEMENT_TYPES[spec.dtype]
        super().__init__(spec, Stage(dtype if spec.unfused else Float32, spec.fmt, spec.tile))

    def signature(self) -> tuple:
        """Stand-ins for the arguments: which sizes vary, and what alignment may be relied on."""
        spec = self.spec
        batch, mn, q_rows = self.batch(), cute.sym_int32(), cute.sym_int32()
        tokens = cute.sym_int32() if spec.domain.gathered else mn
        leading = () if spec.domain.gathered else batch
        columns = cute.sym_int32(divisibility=2 * self.divisibility)
        k = cute.sym_int32(divisibility=self.divisibility)
        mX = copy.fake_matrix(self.dtype, (*leading, tokens, columns), spec.access.load_bytes)
        dtype = ELEMENT_TYPES[spec.fmt.dtype]
        mQ = copy.fake_matrix(dtype, (*batch, q_rows, k), spec.access.store_bytes)
        mWeight = None
        if spec.weighted:
            strides = *(cute.sym_int64() for _ in batch), 1
            mWeight = make_fake_tensor(Float32, (*batch, mn), stride=strides)
        numbers = Float32(0), Float32(0), Float32(0)
        stream = make_fake_stream(use_tvm_ffi_env_stream=True)
        return mX, mQ, *self.stand_ins(batch, mn), *numbers, mWeight, stream

    @cute.jit
    def __call__(
        self,
        mX: cute.Tensor,  # (mn, 2 k), (batch, mn, 2 k), or (tokens, 2 k) with an index
        mQ: cute.Tensor,
        mS: cute.Tensor,
        mCounts: cute.Tensor | None,
        mIndex: cute.Tensor | None,
        missing_rows: Int32,
        alignment: Int32,
        row_ctas: Int32,
        floor: Int32 | Float32,
        bound: Float32,
        alpha: Float32,
        beta: Float32,
        mWeight: cute.Tensor | None,  # (mn,) or (batch, mn), the factors of rows
        stream: cuda.CUstream,
    ):
        """See `RowKernel.launch` for what comes after x, and `Activation` for the numbers."""
        inputs = Matrix(mX), mWeight, Activation(bound, alpha, beta)
        numbers = missing_rows, alignment, row_ctas, floor
        self.launch(inputs, mQ, mS, mCounts, mIndex, *numbers, stream)

    def of_batch(self, inputs: tuple, batch: Int32) -> tuple:
        x, weight, activation = inputs
        x = x if const_expr(self.spec.domain.gathered) else x[batch]
        weight = weight[batch, None] if const_expr(weight is not None) else None
        return x, weight, activation

    @cute.jit
    def source(self, inputs: tuple, row: Uint32, number: Uint32, live: Boolean, k: Int32) -> tuple:
        """Gates and ups of a row of x; factor and beta of row `number` of the result."""
        x, weight, activation = inputs
        factor, beta = Float32(0.0), activation.beta
        if const_expr(self.spec.weighted):
            factor = self.factor(weight, number, live)
        if const_expr(self.spec.shifted):
            # Else a negative beta would make -0.0 of what does not exist.
            beta = beta if live else Float32(0.0)
        if const_expr(self.spec.interleaved):
            return (x.row(row, 2 * k),), factor, beta
        return (x.row(row, k), x.row(row, k, k)), factor, beta

    @cute.jit
    def factor(self, weight: cute.Tensor, number: Uint32, live: Boolean) -> Float32:
        factor = Float32(0.0)
        if live:
            factor = weight[Int32(number)]
        return factor

    @cute.jit
    def load(self, source: tuple, tile: Int32, lane: Int32, live: Boolean) -> list:
        """Gates and ups, zeros where there is nothing."""
        values = self.stage.tile.values_per_thread
        rows, _, _ = source
        raw = [copy.zeros(2 * values // len(rows), self.dtype) for _ in rows]
        for i in cutlass.range_constexpr(len(rows)):
            copy.load(rows[i], tile, lane, live, raw[i], self.spec.access)
        return raw

    @cute.jit
    def values(self, inputs: tuple, source: tuple, raw: list) -> cute.Tensor:
        """(up + beta) * gate * sigmoid(alpha * gate), times the factor of the row."""
        spec = self.spec
        _, _, activation = inputs
        _, factor, beta = source
        wide = [numerics.widen(t) for t in raw]
        if const_expr(spec.interleaved):
            turns = cute.make_layout(self.stage.tile.values_per_thread, stride=2)
            wide = [cute.make_tensor(wide[0].iterator + i, turns) for i in range(2)]
        gate, up = (t.load() for t in wide)
        if const_expr(spec.clamped):
            gate = numerics.minimum(gate, activation.bound)
            up = numerics.minimum(up, activation.bound)
            up = numerics.maximum(up, -activation.bound)
        if const_expr(spec.shifted):
            up = self.rounded(up + beta)
        if const_expr(spec.unfused and spec.scaled):
            sigmoid = self.rounded(numerics.sigmoid(self.rounded(gate * activation.alpha)))
        elif const_expr(spec.scaled):
            sigmoid = numerics.sigmoid(gate, activation.factor)
        else:
            sigmoid = numerics.sigmoid(gate)
        product = self.rounded(self.rounded(gate * sigmoid) * up)
        if const_expr(spec.weighted):
            product = self.rounded(product * factor)
        return numerics.registers(product.to(self.stage.dtype))

    def rounded(self, values: cute.TensorSSA) -> cute.TensorSSA:
        """float32 rounded to x's dtype, if that is what is asked for."""
        return numerics.rounded(values, self.dtype) if self.spec.unfused else values
