"""Prologues of the kernels of groups along rows: x, gates times ups, or gradients of both.

They are those of the kernels of rows. Of gradients a CTA has a tile of gates and one of as many
ups, if their columns fill tiles: it computes both from one read.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, const_expr
from cutlass.cute.runtime import make_fake_tensor

from cute_quant.contract.prologues import FUSED
from cute_quant.kernels import copy, layouts
from cute_quant.kernels.block_tile import VECTOR_BYTES
from cute_quant.kernels.config import (
    ColumnsSpec,
    QuantizeSpec,
    SiluMulBackwardSpec,
    SiluMulSpec,
    Tile,
)
from cute_quant.kernels.copy import Segment
from cute_quant.kernels.encodings import ELEMENT_TYPES
from cute_quant.kernels.layouts import Matrix
from cute_quant.kernels.params import Params
from cute_quant.kernels.quantize import Input
from cute_quant.kernels.silu_mul import Activation, GatedInput
from cute_quant.kernels.silu_mul_backward import GatedGradient, GradientRow

VECTOR_VALUES = VECTOR_BYTES // 4
"""Values of float32 that a thread moves to or from shared memory at once."""
LOADED_BYTES = 192
"""Bytes of the inputs that a thread loads at once, in 96 registers."""


def prologue_spec(spec: ColumnsSpec) -> QuantizeSpec | SiluMulSpec | SiluMulBackwardSpec:
    """Return the choices of the kernel of rows whose prologue yields the values of columns."""
    tile = Tile(values_per_thread=spec.values_per_thread)
    if spec.gated is None:
        return QuantizeSpec(spec.dtype, spec.fmt, tile, access=spec.access)
    choices = spec.gated._asdict()
    kind = SiluMulBackwardSpec if choices["backward"] else SiluMulSpec
    choices = {name: choice for name, choice in choices.items() if name in kind._fields}
    return kind(spec.dtype, spec.fmt, tile, access=spec.access, **choices)


def value_dtype(spec: ColumnsSpec) -> type[cutlass.Numeric]:
    """Return the type of the values that a prologue yields."""
    computed = spec.gated is not None and (spec.gated.backward or spec.gated.rounding == FUSED)
    return Float32 if computed else ELEMENT_TYPES[spec.dtype]


def fake_inputs(
    spec: ColumnsSpec, shape: tuple
) -> tuple[cute.Tensor, cute.Tensor | None, cute.Tensor | None]:
    """Return stand-ins for x, factors of rows and a gradient, for values (batch, mn, k)."""
    dtype, nbytes = ELEMENT_TYPES[spec.dtype], spec.access.load_bytes
    x_shape, weight, grad = shape, None, None
    if spec.gated is not None and spec.gated.backward:
        grad = copy.fake_matrix(dtype, (*shape[:2], cute.sym_int32()), nbytes)
    elif spec.gated is not None:
        divisor = 2 if spec.access.ragged else 2 * spec.values_per_thread
        x_shape = *shape[:2], cute.sym_int32(divisibility=divisor)
        if spec.gated.weighted:
            weight = make_fake_tensor(Float32, shape[:2], stride=(cute.sym_int64(), 1))
    return copy.fake_matrix(dtype, x_shape, nbytes), weight, grad


def prologue(
    spec: ColumnsSpec,
    x: Matrix,
    mWeight: cute.Tensor | None,
    mGrad: cute.Tensor | None,
    activation: Activation,
) -> Params:
    """Return what yields the values that are quantized."""
    of_rows = prologue_spec(spec)
    if isinstance(of_rows, SiluMulBackwardSpec):
        return GatedGradient(x, Matrix(mGrad), activation, of_rows)
    if isinstance(of_rows, SiluMulSpec):
        return GatedInput(x, mWeight, activation, of_rows)
    return Input(x, of_rows)


class Pairs:
    """The gradients of gates and of as many ups, in a thread of a CTA that has a tile of each.

    Registers hold one of both. The other waits in shared memory, each value in its thread's.

    Attributes:
        values: of each of the thread's rows.
        rows: of the thread.
        rows_at_once: those that are loaded together.
    """

    def __init__(self, spec: ColumnsSpec):
        self.values = spec.values_per_thread
        self.rows = layouts.rows_of_block_thread(self.values)
        loaded = 3 * self.values * spec.dtype.itemsize
        self.rows_at_once = min(LOADED_BYTES // loaded, self.rows)

    def waiting_values(self) -> list[list[cute.Tensor]]:
        """Return shared memory for a thread's values, vectors of each of its rows."""
        lane, warp, _ = cute.arch.thread_idx()
        layout = layouts.vectors_of_threads(VECTOR_VALUES)
        memory = cute.arch.alloc_smem(Float32, cute.size(layout), alignment=VECTOR_BYTES)
        count = self.values // VECTOR_VALUES
        vectors = []
        for i in range(self.rows * count):
            place = cute.assume(layout(((0, i), lane, warp)), divby=VECTOR_VALUES)
            vectors.append(cute.make_tensor(memory + place, VECTOR_VALUES))
        return [vectors[i * count : (i + 1) * count] for i in range(self.rows)]

    def compute(
        self, inputs: list[GradientRow], segment: Segment, waiting: list[list[cute.Tensor]]
    ) -> list[cute.Tensor]:
        """Return the gradients of a thread's gates, (values,) of each row, and keep those of ups.

        Rows are loaded as many at once as registers hold.
        """
        tXrX = []
        for first in range(0, self.rows, self.rows_at_once):
            some = inputs[first : first + self.rows_at_once]
            loaded = [row.load_pair(segment) for row in some]
            for row, t in zip(some, loaded, strict=True):
                of_gates, of_ups = row.gradients(t)
                copy_vectors(of_ups, waiting[len(tXrX)])
                tXrX.append(of_gates)
        return tXrX


@cute.jit
def copy_vectors(source: cute.Tensor | list[cute.Tensor], target: cute.Tensor | list[cute.Tensor]):
    """Copy a thread's values, (values,), to or from vectors of shared memory."""
    to_shared = const_expr(isinstance(target, list))
    vectors, registers = (target, source) if to_shared else (source, target)
    for i in cutlass.range_constexpr(len(vectors)):
        size = cute.size(vectors[i])
        mine = cute.make_tensor(registers.iterator + i * size, size)
        if const_expr(to_shared):
            cute.autovec_copy(mine, vectors[i])
        else:
            cute.autovec_copy(vectors[i], mine)
