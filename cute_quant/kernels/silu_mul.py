"""SiLU of gates times ups, quantized in the same registers: load both, activate, quantize, store.

The story is that of `quantize`; the prologue loads two segments a thread instead of one. Of a row
(2 k,) these are the columns of its values among the gates, and as many among the ups, or, where
gates and ups are interleaved, twice as many columns. The product stays in float32 until it is
rounded to 8 bits, or is rounded where torch's operations in the dtype of the input round.
"""

from __future__ import annotations

from dataclasses import dataclass

import cuda.bindings.driver as cuda
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, Numeric, const_expr
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from cute_quant.contract.prologues import (
    UNFUSED,
    VLLM_BF16,
    VLLM_CUDA,
    rounds_activation,
    rounds_product,
    rounds_shifted,
)
from cute_quant.kernels import arithmetic, copy, encodings
from cute_quant.kernels.config import SiluMulSpec
from cute_quant.kernels.copy import Segment
from cute_quant.kernels.encodings import ELEMENT_TYPES
from cute_quant.kernels.layouts import Matrix
from cute_quant.kernels.params import Params
from cute_quant.kernels.problem import Operands
from cute_quant.kernels.quantize import quantizer
from cute_quant.kernels.row_domains import Row
from cute_quant.kernels.stage import Stage


class Activation(Params):
    """The parameters of ``(up + beta) * gate * sigmoid(alpha * gate)``.

    Attributes:
        bound: of the gate from above, of the up from both sides.
        alpha: the gate's factor.
        factor: the same, as `arithmetic.sigmoid` takes it.
        beta: added to the up.
    """

    def __init__(self, bound: Float32, alpha: Float32, beta: Float32):
        self.bound = bound
        self.alpha = alpha
        self.factor = arithmetic.SigmoidFactor(alpha)
        self.beta = beta


@dataclass(eq=False)
class GatedInput(Params):
    """The prologue of products of a gate's SiLU and an up.

    Attributes:
        x: (mn, 2 k) or (batch, mn, 2 k), or (tokens, 2 k) with an index.
        weight: factors of rows, (mn,) or (batch, mn), or None.
    """

    static = ("spec",)

    x: Matrix
    weight: cute.Tensor | None
    activation: Activation
    spec: SiluMulSpec

    def slice_batch(self, batch: Int32, gathered: bool) -> GatedInput:
        """Return the prologue of one matrix of a batch; gathered rows come from one x."""
        x = self.x if gathered else self.x[batch]
        weight = self.weight[batch, None] if const_expr(self.weight is not None) else None
        return self.replace(x=x, weight=weight)

    @cute.jit
    def row(self, row: Row, k: Int32) -> GatedRow:
        """Return the gates and ups of a row of the result, and its weight."""
        weight, activation = Float32(0.0), self.activation
        if const_expr(self.spec.weighted):
            weight = load_weight(self.weight, row)
        if const_expr(self.spec.shifted):
            # Else a negative beta would make -0.0 of a row that does not exist.
            beta = activation.beta if row.exists else Float32(0.0)
            activation = activation.replace(beta=beta)
        if const_expr(self.spec.interleaved):
            parts = (self.x.row(row.source, 2 * k),)
        else:
            parts = self.x.row(row.source, k), self.x.row(row.source, k, k)
        return GatedRow(parts, weight, activation, row.exists, self.spec)


@dataclass(eq=False)
class GatedRow(Params):
    """A row of x.

    Attributes:
        parts: gates (k,) and ups (k,), or (2 k,) where they are interleaved.
        weight: the factor of the row.
    """

    static = ("spec",)

    parts: tuple[cute.Tensor, ...]
    weight: Float32
    activation: Activation
    predicate: Boolean
    spec: SiluMulSpec

    def load(self, segment: Segment) -> list[cute.Tensor]:
        """Load a thread's segments of gates and ups, zeros where there is nothing."""
        values = 2 * self.spec.tile.values_per_thread // len(self.parts)
        tXrX = [encodings.zeros(values, gX.element_type) for gX in self.parts]
        for gX, registers in zip(self.parts, tXrX, strict=True):
            copy.load(gX, segment, self.predicate, registers, self.spec.access)
        return tXrX

    def addresses(self, segment: Segment) -> list[Int64]:
        """Return where a thread's segments of gates and ups lie."""
        values = 2 * self.spec.tile.values_per_thread // len(self.parts)
        return [copy.address(gX, segment, values, self.spec.access) for gX in self.parts]

    def values(self, tXrX: list[cute.Tensor]) -> cute.Tensor:
        """Return (up + beta) * gate * sigmoid(alpha * gate), times the row's weight, (values,)."""
        spec, activation = self.spec, self.activation
        gate, up = gates_and_ups(tXrX, spec.interleaved)
        if spec.clamped:
            gate = arithmetic.minimum(gate, activation.bound)
            up = arithmetic.minimum(up, activation.bound)
            up = arithmetic.maximum(up, -activation.bound)
        if spec.shifted:
            up = self.round(up + activation.beta, rounds_shifted(spec.rounding))
        activated = self.round(gate * self.sigmoid(gate), rounds_activation(spec.rounding))
        product = self.round(activated * up, rounds_product(spec.rounding))
        if spec.weighted:
            product = self.round(product * self.weight, rounds_product(spec.rounding))
        return encodings.registers(product.to(product_type(spec)))

    def sigmoid(self, gate: cute.TensorSSA) -> cute.TensorSSA:
        """Return the sigmoid of alpha * gate, rounded where torch's operations round."""
        if self.spec.rounding in (VLLM_CUDA, VLLM_BF16):
            argument = gate * self.activation.alpha if self.spec.scaled else gate
            return arithmetic.cuda_sigmoid(argument, self.spec.rounding == VLLM_CUDA)
        if self.spec.rounding == UNFUSED and self.spec.scaled:
            argument = self.round(gate * self.activation.alpha, True)
            return self.round(arithmetic.sigmoid(argument), True)
        return arithmetic.sigmoid(gate, self.activation.factor if self.spec.scaled else None)

    def round(self, values: cute.TensorSSA, rounds: bool) -> cute.TensorSSA:
        """Return float32 rounded to x's dtype, or as it is."""
        return encodings.round_to(values, ELEMENT_TYPES[self.spec.dtype]) if rounds else values


def product_type(spec: SiluMulSpec) -> type[Numeric]:
    """Return the type in which products are held until they are quantized."""
    return ELEMENT_TYPES[spec.dtype] if rounds_product(spec.rounding) else Float32


def gates_and_ups(
    tXrX: list[cute.Tensor], interleaved: bool
) -> tuple[cute.TensorSSA, cute.TensorSSA]:
    """Return a thread's gates and ups as float32, from registers of each or of both in turns."""
    wide = [encodings.widen(t) for t in tXrX]
    if interleaved:
        every_other = cute.make_layout(cute.size(wide[0]) // 2, stride=2)
        wide = [cute.make_tensor(wide[0].iterator + i, every_other) for i in range(2)]
    gate, up = (t.load() for t in wide)
    return gate, up


@cute.jit
def load_weight(mWeight: cute.Tensor, row: Row) -> Float32:
    """Return the factor of a row, 0 of one that does not exist."""
    weight = Float32(0.0)
    if row.exists:
        weight = mWeight[Int32(row.index)]
    return weight


class SiluMul:
    """Entry point: gates and ups to values and scales of their products."""

    def __init__(self, spec: SiluMulSpec):
        self.spec = spec
        self.dtype = ELEMENT_TYPES[spec.dtype]
        stage = Stage(product_type(spec), spec.fmt, spec.tile, spec.domain.keeps_gaps)
        self.quantizer = quantizer(spec, stage)

    def signature(self) -> tuple:
        """Return stand-ins for the arguments, with the sizes that vary and the alignment."""
        spec, scheduler = self.spec, self.quantizer.scheduler
        sizes = scheduler.symbolic_sizes()
        columns = cute.sym_int32(divisibility=2 * sizes.divisibility)
        shape = (*sizes.x_batch, sizes.tokens, columns)
        mX = copy.fake_matrix(self.dtype, shape, spec.access.load_bytes)
        mWeight = None
        if spec.weighted:
            batch, rows = sizes.batch, sizes.mn
            if spec.domain.scattered:
                batch, rows = (), sizes.tokens
            strides = *(cute.sym_int64() for _ in batch), 1
            mWeight = make_fake_tensor(Float32, (*batch, rows), stride=strides)
        operands = scheduler.fake_operands(sizes, encodings.value_type_of(spec.fmt))
        parameters = Float32(0), Float32(0), Float32(0)
        stream = make_fake_stream(use_tvm_ffi_env_stream=True)
        return mX, *operands, *parameters, mWeight, stream

    @cute.jit
    def __call__(
        self,
        mX: cute.Tensor,  # (mn, 2 k), (batch, mn, 2 k), or (tokens, 2 k) with an index
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
        bound: Float32,
        alpha: Float32,
        beta: Float32,
        mWeight: cute.Tensor | None,  # (mn,) or (batch, mn), the factors of rows
        stream: cuda.CUstream,
    ):
        """Launch. `Operands` and `Activation` describe what comes after x."""
        operands = Operands(
            mQ, mS, mUpper, mCounts, mIndex, mRng, missing_rows, alignment, row_ctas, floor
        )
        activation = Activation(bound, alpha, beta)
        prologue = GatedInput(Matrix(mX), mWeight, activation, self.spec)
        self.quantizer.launch(prologue, operands, stream)
