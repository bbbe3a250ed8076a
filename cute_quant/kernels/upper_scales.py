"""The scale over e4m3 scales, where a kernel runs: read, checked, in all of its forms."""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32

from cute_quant.contract.dtypes import MAX_UPPER_SCALE, UPPER_MAX
from cute_quant.contract.upper_scales import AMAX, DECODE
from cute_quant.kernels import arithmetic
from cute_quant.kernels.arithmetic import FLOAT32_INFINITY, FLOAT32_NAN
from cute_quant.kernels.params import Params

LEAST_BITS = 0x05000000
"""2^-117 as the bits of a float32."""
SPAN_BITS = 2 * 117 << 23
"""The bits of 2^117, less those of 2^-117."""
HEADROOM = 2.0**-11
"""Takes every amax to where its reciprocal is a normal number."""


class Factors(NamedTuple):
    """Forms of an upper scale, NaN where it is out of range.

    Attributes:
        encode: maps magnitudes to the range of values and scales together.
        decode: its reciprocal.
        floor: the smallest e4m3 scale.
    """

    encode: Float32
    decode: Float32
    floor: Float32


class UpperScale(Params):
    """An upper scale that a call gives, as an argument of a kernel.

    Attributes:
        tensor: one number, (1,), or one for each matrix of a batch or each group of rows.
        floor: the smallest e4m3 scale.
        kind: as of `cute_quant.contract.upper_scales`.
        batch: the matrix, None for all of them.
    """

    static = ("kind",)

    def __init__(self, tensor: cute.Tensor, floor: Float32, kind: str):
        self.tensor = tensor
        self.floor = floor
        self.kind = kind
        self.batch = None

    def slice_batch(self, batch: Int32) -> UpperScale:
        """Return that of one matrix of a batch."""
        return self.replace(batch=batch)

    def load(self) -> Factors:
        """Read the scale."""
        return self.factors(self.read())

    @cute.jit
    def load_of_group(self, group: Int32) -> Factors:
        """Read the scale of a group of rows; NaN where there is none."""
        given = Uint32(FLOAT32_NAN).bitcast(Float32)
        if group >= 0 and group < self.tensor.shape[0]:
            given = self.tensor[group]
        return self.factors(given)

    def factors(self, given: Float32) -> Factors:
        """Return all forms of a scale that is given in one."""
        if self.kind == AMAX:
            return factors_of_amax(given, self.floor)
        given = number_in_range(given)
        reciprocal = arithmetic.reciprocal(given)
        if self.kind == DECODE:
            return Factors(reciprocal, given, self.floor)
        return Factors(given, reciprocal, self.floor)

    def read(self) -> Float32:
        """Return the scale as it is given."""
        return self.tensor[0 if self.batch is None else self.batch]

    def load_decode_scale(self) -> Float32:
        """Read what quantized values are multiplied with; a decode scale as it is given."""
        return self.read() if self.kind == DECODE else self.load().decode


@cute.jit
def factors_of_amax(amax: Float32, floor: Float32) -> Factors:
    """Return the forms of ``2688 / amax``, at most 2^117, and of 1 where amax is 0."""
    bounded = cute.arch.fmax(amax, Float32(UPPER_MAX / MAX_UPPER_SCALE), nan=True)
    encode = arithmetic.divide(Float32(UPPER_MAX * HEADROOM), bounded * Float32(HEADROOM))
    # An amax that is Inf or below 0 has no scale.
    bits = amax.bitcast(Uint32)
    encode = encode if bits < Uint32(FLOAT32_INFINITY) else Uint32(FLOAT32_NAN).bitcast(Float32)
    encode = Float32(1.0) if bits << 1 == Uint32(0) else encode
    return Factors(encode, arithmetic.reciprocal(encode), floor)


@cute.jit
def number_in_range(scale: Float32) -> Float32:
    """Return a scale from 2^-117 to 2^117, NaN for any other."""
    bits = scale.bitcast(Uint32)
    in_range = bits - Uint32(LEAST_BITS) <= Uint32(SPAN_BITS)
    return scale if in_range else Uint32(FLOAT32_NAN).bitcast(Float32)
