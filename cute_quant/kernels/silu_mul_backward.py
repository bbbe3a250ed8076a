"""Gradients of gates and ups, quantized in the same registers: load three, derive, quantize, store.

The story is that of `quantize`. A row of the result (2 k,) has the columns of gates and ups in
their places. A thread of interleaved columns has gates, ups and half as many columns of the
gradient. Where the halves of a row are gates and ups, a thread has either: it loads the columns of
the gradient, the gates and the ups that its own depend on, so these come from memory once and from
the L2 cache once more.
"""

from __future__ import annotations

from dataclasses import dataclass

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, const_expr
from cutlass.cute.runtime import make_fake_stream

from cute_quant.kernels import arithmetic, copy, encodings, layouts
from cute_quant.kernels.config import LANES, SiluMulBackwardSpec
from cute_quant.kernels.copy import Segment
from cute_quant.kernels.encodings import ELEMENT_TYPES
from cute_quant.kernels.layouts import Matrix
from cute_quant.kernels.params import Params
from cute_quant.kernels.problem import Operands
from cute_quant.kernels.quantize import quantizer
from cute_quant.kernels.row_domains import Row
from cute_quant.kernels.silu_mul import Activation, gates_and_ups
from cute_quant.kernels.stage import Stage

LARGEST_ARGUMENT = 88.0
"""Bound of the sigmoid's argument as a factor: beyond it sigmoid or its complement is 0."""


@dataclass(eq=False)
class GatedGradient(Params):
    """The prologue of gradients of gates and ups.

    Attributes:
        x: gates and ups, (mn, 2 k) or (batch, mn, 2 k).
        grad: of the products, (mn, k) or (batch, mn, k).
    """

    static = ("spec",)

    x: Matrix
    grad: Matrix
    activation: Activation
    spec: SiluMulBackwardSpec

    def slice_batch(self, batch: Int32, gathered: bool) -> GatedGradient:
        """Return the prologue of one matrix of a batch."""
        return self.replace(x=self.x[batch], grad=self.grad[batch])

    @cute.jit
    def row(self, row: Row, columns: Int32) -> GradientRow:
        """Return the gradient, the gates and the ups of a row of the result."""
        k, activation = columns // 2, self.activation
        if const_expr(self.spec.shifted):
            # Else a negative beta would make -0.0 of a row that does not exist.
            beta = activation.beta if row.exists else Float32(0.0)
            activation = activation.replace(beta=beta)
        if const_expr(self.spec.interleaved):
            parts = (self.x.row(row.source, columns),)
        else:
            parts = self.x.row(row.source, k), self.x.row(row.source, k, k)
        gG = self.grad.row(row.source, k)
        return GradientRow(gG, parts, activation, row.exists, self.spec)


@dataclass(eq=False)
class GradientRow(Params):
    """A row of the gradient, and of gates and ups.

    Attributes:
        gG: (k,).
        parts: gates (k,) and ups (k,), or (2 k,) where they are interleaved.
    """

    static = ("spec",)

    gG: cute.Tensor
    parts: tuple[cute.Tensor, ...]
    activation: Activation
    predicate: Boolean
    spec: SiluMulBackwardSpec

    def load(self, segment: Segment) -> tuple[list[cute.Tensor], list[Boolean | bool]]:
        """Load a thread's segments, zeros where there is nothing.

        Returns:
            Registers of the gradient, and of gates and ups as they lie; and whether each of the
            thread's values belongs to an up.
        """
        spec, values = self.spec, self.spec.tile.values_per_thread
        sources = self.gG, *self.parts
        if spec.interleaved:
            tXrX = [encodings.zeros(n, self.gG.element_type) for n in (values // 2, values)]
            for gX, registers in zip(sources, tXrX, strict=True):
                copy.load(gX, segment, self.predicate, registers, spec.access)
            return tXrX, [i % 2 == 1 for i in range(values)]
        tXrX = [encodings.zeros(values, self.gG.element_type) for _ in sources]
        k = cute.size(self.gG)
        if spec.access.ragged:
            columns = copy.column_coordinates(2 * k, segment, values)
            for gX, registers in zip(sources, tXrX, strict=True):
                self.load_each(gX, columns, registers)
            return tXrX, [columns[i] >= k for i in range(values)]
        vector, vectors = segment.tile * LANES + segment.lane, k // values
        is_up = vector >= vectors
        vector = vector - cutlass.select_(is_up, vectors, Int32(0))
        lane, tile = layouts.vectors_of_row()(vector)
        for gX, registers in zip(sources, tXrX, strict=True):
            copy.load(gX, Segment(tile, lane), self.predicate, registers, spec.access)
        return tXrX, [is_up] * values

    def addresses(self, segment: Segment) -> list[Int64]:
        """Return none: what is loaded depends on where the ups begin."""
        return []

    @cute.jit
    def load_each(self, gX: cute.Tensor, columns: cute.Tensor, registers: cute.Tensor):
        """Load what each of a thread's columns depends on, where an up may follow a gate."""
        k = cute.size(gX)
        for i in cutlass.range_constexpr(cute.size(registers)):
            column = columns[i]
            column = column - k if column >= k else column
            if self.predicate and columns[i] < 2 * k:
                registers[i] = gX[column]

    def load_pair(self, segment: Segment) -> list[cute.Tensor]:
        """Load a segment of the gradient, of gates and of ups, zeros where there is nothing."""
        values, sources = self.spec.tile.values_per_thread, (self.gG, *self.parts)
        tXrX = [encodings.zeros(values, self.gG.element_type) for _ in sources]
        for gX, registers in zip(sources, tXrX, strict=True):
            copy.load(gX, segment, self.predicate, registers, self.spec.access)
        return tXrX

    def values(self, loaded: tuple[list[cute.Tensor], list[Boolean | bool]]) -> cute.Tensor:
        """Return the gradients of gates and ups, (values,), float32."""
        tXrX, are_ups = loaded
        return choose(*self.gradients(tXrX), are_ups)

    def gradients(self, loaded: list[cute.Tensor]) -> tuple[cute.Tensor, cute.Tensor]:
        """Return the gradients of gates, and those of ups, float32."""
        tXrG, *tXrX = loaded
        spec, activation = self.spec, self.activation
        grad = encodings.widen(tXrG).load()
        gate, up = gates_and_ups(tXrX, spec.interleaved)
        bounded_gate, bounded_up = gate, up
        if spec.clamped:
            bounded_gate = arithmetic.minimum(gate, activation.bound)
            bounded_up = arithmetic.minimum(up, activation.bound)
            bounded_up = arithmetic.maximum(bounded_up, -activation.bound)
        argument = bounded_gate * activation.alpha if spec.scaled else bounded_gate
        argument = arithmetic.minimum(argument, Float32(LARGEST_ARGUMENT))
        argument = arithmetic.maximum(argument, Float32(-LARGEST_ARGUMENT))
        sigmoid = arithmetic.sigmoid(bounded_gate, activation.factor if spec.scaled else None)
        slope = sigmoid * (argument * (1.0 - sigmoid) + 1.0)
        if spec.shifted:
            bounded_up = bounded_up + activation.beta
        of_gates = encodings.registers(grad * (bounded_up * slope))
        of_ups = encodings.registers(grad * (bounded_gate * sigmoid))
        if spec.clamped:
            rG, rU = encodings.registers(gate), encodings.registers(up)
            clear_beyond(of_gates, rG, activation.bound, both_sides=False)
            clear_beyond(of_ups, rU, activation.bound, both_sides=True)
        return of_gates, of_ups


@cute.jit
def clear_beyond(
    gradients: cute.Tensor,
    inputs: cute.Tensor,
    bound: Float32,
    both_sides: cutlass.Constexpr[bool],
):
    """Make gradients 0 whose inputs lie above a bound, or below its negative."""
    for i in cutlass.range_constexpr(cute.size(inputs)):
        beyond = inputs[i] > bound
        if const_expr(both_sides):
            beyond = beyond or inputs[i] < -bound
        gradients[i] = Float32(0.0) if beyond else gradients[i]


def choose(
    of_gates: cute.Tensor, of_ups: cute.Tensor, are_ups: list[Boolean | bool]
) -> cute.Tensor:
    """Return the gradients, (values,), of ups where they are asked for; those of pairs in turns."""
    result = cute.make_rmem_tensor(len(are_ups), Float32)
    shared = len(are_ups) // cute.size(of_gates)
    for i, is_up in enumerate(are_ups):
        of_gate, of_up = of_gates[i // shared], of_ups[i // shared]
        if isinstance(is_up, bool):
            result[i] = of_up if is_up else of_gate
        else:
            result[i] = cutlass.select_(is_up, of_up, of_gate)
    return result


class SiluMulBackward:
    """Entry point: a gradient, gates and ups to values and scales of the gradients of both."""

    def __init__(self, spec: SiluMulBackwardSpec):
        self.spec = spec
        self.dtype = ELEMENT_TYPES[spec.dtype]
        stage = Stage(Float32, spec.fmt, spec.tile, spec.domain.keeps_gaps)
        self.quantizer = quantizer(spec, stage)

    def signature(self) -> tuple:
        """Return stand-ins for the arguments, with the sizes that vary and the alignment."""
        spec, scheduler = self.spec, self.quantizer.scheduler
        sizes = scheduler.symbolic_sizes()
        shape = *sizes.batch, sizes.mn, sizes.k
        mX = copy.fake_matrix(self.dtype, shape, spec.access.load_bytes)
        grad_shape = *sizes.batch, sizes.mn, cute.sym_int32()
        mG = copy.fake_matrix(self.dtype, grad_shape, spec.access.load_bytes)
        operands = scheduler.fake_operands(sizes, encodings.value_type_of(spec.fmt))
        parameters = Float32(0), Float32(0), Float32(0)
        return mX, *operands, *parameters, mG, make_fake_stream(use_tvm_ffi_env_stream=True)

    @cute.jit
    def __call__(
        self,
        mX: cute.Tensor,  # (mn, 2 k) or (batch, mn, 2 k)
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
        mG: cute.Tensor,  # (mn, k) or (batch, mn, k)
        stream: cuda.CUstream,
    ):
        """Launch. `Operands` and `Activation` describe what comes after x."""
        operands = Operands(
            mQ, mS, mUpper, mCounts, mIndex, mRng, missing_rows, alignment, row_ctas, floor
        )
        activation = Activation(bound, alpha, beta)
        prologue = GatedGradient(Matrix(mX), Matrix(mG), activation, self.spec)
        self.quantizer.launch(prologue, operands, stream)
