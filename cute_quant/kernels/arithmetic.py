"""float32 arithmetic of the kernels: quotients, sums, sigmoid, and bounds."""

import math
from collections.abc import Callable

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Uint32

from cute_quant.contract.dtypes import FLOAT32_MANTISSA_BITS, to_float32
from cute_quant.kernels import ptx
from cute_quant.kernels.config import LANES
from cute_quant.kernels.encodings import registers
from cute_quant.kernels.params import Params

FLOAT32_INFINITY = 0x7F800000
FLOAT32_NAN = 0x7FC00000
"""As the bits of a float32."""
LOG2_E, LN_2 = math.log2(math.e), math.log(2.0)
LOG2_E_REST = 1.925963033500011e-08
"""What a float32 of log2(e) lacks, as CUDA's ``expf`` has it."""
EXP_STEP = 0.005724980030208826
"""log2(e) / 252 as it has it."""
LARGEST_EXPONENT = 127.99
"""Largest exponent of 2 in `sigmoid`, whose power is finite."""


def quotient(a: Float32, b: float) -> Float32:
    """Return a / b with IEEE rounding, by Markstein's theorem.

    `b` is normal and its mantissa not all ones. Subnormal results are not exact.
    """
    reciprocal = Float32(1.0 / b)
    estimate = a * reciprocal
    remainder = cute.math.fma(Float32(-b), estimate, a)
    return cute.math.fma(remainder, reciprocal, estimate)


def reciprocal(a: Float32) -> Float32:
    """Return 1 / a with IEEE rounding, for normal results: one step of Newton's method."""
    estimate = cute.arch.rcp_approx(a)
    error = cute.math.fma(-a, estimate, Float32(1.0))
    return cute.math.fma(error, estimate, estimate)


def divide(a: Float32, b: Float32) -> Float32:
    """Return a / b with IEEE rounding, by Markstein's theorem.

    b, its reciprocal and the quotient are normal numbers.
    """
    inverse = reciprocal(b)
    estimate = a * inverse
    remainder = cute.math.fma(-b, estimate, a)
    return cute.math.fma(remainder, inverse, estimate)


def rsqrt(x: Float32) -> Float32:
    """Return 1 / sqrt(x), with a relative error of 2^-22.4 at most."""
    return cute.math.rsqrt(x, approx=True, ftz=True)


class SigmoidFactor(Params):
    """A factor of the argument of `sigmoid`, as an argument of a kernel.

    Attributes:
        high, low: float32 whose sum is ``-factor * log2(e)``.
        bound: on the magnitude of the argument.
    """

    def __init__(self, factor: Float32):
        self.high = Float32(-LOG2_E) * factor
        error = cute.math.fma(Float32(-LOG2_E), factor, Float32(0.0) - self.high)
        self.low = cute.math.fma(Float32(to_float32(LOG2_E) - LOG2_E), factor, error)
        magnitude = cutlass.max(self.high, Float32(0.0) - self.high)
        self.bound = Float32(LARGEST_EXPONENT) / magnitude


def sigmoid(x: cute.TensorSSA, factor: SigmoidFactor | None = None) -> cute.TensorSSA:
    """Return ``1 / (1 + e^-(factor * x))`` of float32, at most 1, also of a NaN.

    The exponent of 2 has more bits than a float32: what its rounding leaves is made up for by
    ``2^rest = 1 + rest * ln(2)``. So the relative error is that of two approximations and three
    roundings, 2^-22 + 2^-23 + 3 * 2^-24 at most, however large x; below 2^-126 it may be 0.
    """
    high, low = Float32(-LOG2_E), Float32(to_float32(LOG2_E) - LOG2_E)
    bound = Float32(LARGEST_EXPONENT / LOG2_E)
    if factor is not None:
        high, low, bound = factor.high, factor.low, factor.bound
    x = elementwise(lambda value: cute.arch.fmin(value, bound, abs=True), x)
    high, low = (cute.full_like(x, part) for part in (high, low))
    power = x * high
    rest = cute.math.fma(x, low, cute.math.fma(x, high, -power))
    exponential = cute.math.exp2(power, fastmath=True)
    exponential = cute.math.fma(exponential, rest * LN_2, exponential)
    return elementwise(cute.arch.rcp_approx, exponential + 1.0)


def cuda_sigmoid(x: cute.TensorSSA, divides: bool) -> cute.TensorSSA:
    """Return ``1 / (1 + expf(-x))`` of float32 with the bits of CUDA C++.

    These are the operations that nvcc makes of ``expf``: 2^n is shifted into place from the low
    bits of a sum with 1.5 * 2^23, and 2^f approximated.

    Args:
        x: float32.
        divides: whether the quotient has IEEE rounding, down to the smallest normal number, below
            which it is 0; else it is approximate, as in ``__fdividef``.
    """

    def sigmoid(value: Float32) -> Float32:
        fraction = ptx.fma_saturated(value, Float32(-EXP_STEP), Float32(0.5))
        shifted = ptx.fma_down(fraction, Float32(252.0), Float32(12582913.0))
        n = shifted + Float32(-12583039.0)
        f = cute.math.fma(value, Float32(-to_float32(LOG2_E)), Float32(0.0) - n)
        f = cute.math.fma(value, Float32(-LOG2_E_REST), f)
        power = Uint32(shifted.bitcast(Uint32) << FLOAT32_MANTISSA_BITS).bitcast(Float32)
        divisor = cute.math.fma(cute.math.exp2(f, fastmath=True), power, Float32(1.0))
        if divides:
            return reciprocal(cute.arch.fmin(divisor, Float32(2.0**127), nan=True))
        return cute.arch.rcp_approx(divisor)

    return elementwise(sigmoid, x)


def minimum(x: cute.TensorSSA, bound: Float32) -> cute.TensorSSA:
    """Return the smaller of each element and a bound; NaN if one is."""
    return elementwise(lambda value: cute.arch.fmin(value, bound, nan=True), x)


def maximum(x: cute.TensorSSA, bound: Float32) -> cute.TensorSSA:
    """Return the larger of each element and a bound; NaN if one is."""
    return elementwise(lambda value: cute.arch.fmax(value, bound, nan=True), x)


def elementwise(function: Callable[[Float32], Float32], x: cute.TensorSSA) -> cute.TensorSSA:
    """Apply a function to every element.

    SM100 computes two elements at once where the DSL has an operation for vectors instead.
    """
    rX = registers(x)
    for i in range(cute.size(rX)):
        rX[i] = function(rX[i])
    return rX.load()


def thread_sum(x: cute.TensorSSA) -> Float32:
    """Return the sum of a thread's float32, a power of two of them.

    Sums are of pairs, so roundings are as deep as the logarithm of their number. They are those of
    vectors, the first half of the values and the second: SM100 adds two pairs at once.
    """
    while cute.size(x.shape) > 1:
        first, second = halves(x)
        x = first + second
    return registers(x)[0]


def thread_max(x: cute.TensorSSA) -> Uint32:
    """Return the maximum of a thread's integers, a power of two of them."""
    rX = registers(x)
    values = [rX[i] for i in range(cute.size(rX))]
    while len(values) > 1:
        half = len(values) // 2
        values = [cutlass.max(a, b) for a, b in zip(values[:half], values[half:], strict=True)]
    return Uint32(values[0])


def halves(x: cute.TensorSSA) -> list[cute.TensorSSA]:
    """Return the first and the second half of a vector."""
    rX = registers(x)
    size = cute.size(rX) // 2
    return [cute.make_tensor(rX.iterator + start, size).load() for start in (0, size)]


def fma(a: cute.TensorSSA, b: cute.TensorSSA, c: cute.TensorSSA) -> cute.TensorSSA:
    """Return a * b + c, rounded once, two elements at once where SM100 can."""
    if not ptx.target().packed_float32:
        return cute.math.fma(a, b, c)
    rA, rB, rC = registers(a), registers(b), registers(c)
    for i in range(0, cute.size(rC), 2):
        pairs = ((r[i], r[i + 1]) for r in (rA, rB, rC))
        rC[i], rC[i + 1] = cute.arch.fma_packed_f32x2(*pairs)
    return rC.load()


def warp_sum(value: Float32) -> Float32:
    """Return the sum over a warp in each of its lanes; 5 roundings deep.

    The order of additions is part of the result, so it is not left to `cute.arch.warp_reduction`.
    """
    for i in range(LANES.bit_length() - 1):
        value = value + cute.arch.shuffle_sync_bfly(value, offset=1 << i)
    return value
