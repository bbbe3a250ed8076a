"""Scales of groups: amax, multiplier and the scale that is stored.

A scale has two forms. The *multiplier* is what values are multiplied with, a float32; the *scale*
is what is stored, a UE8M0 or e4m3 byte, or a float32. Magnitudes travel as the bits of a float32,
in which a comparison of integers orders them: NaN above Inf above every finite value.
"""

from collections.abc import Callable
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import BFloat16, Boolean, Float16, Float32, Int32, Uint16, Uint32, const_expr

from cute_quant.contract.dtypes import (
    E2M1_MAX,
    FLOAT32_BIAS,
    FLOAT32_MANTISSA_BITS,
    FLOAT32_MAX,
    SMALLEST_UE8M0,
    UE8M0_MAX,
    UE8M0_NAN,
    VLLM_ZERO_MULTIPLIER,
    ValueType,
)
from cute_quant.contract.format_choices import (
    APPROXIMATE_OF_SCALE,
    BF16_OF_SCALE,
    BF16_PRODUCT,
    DEEPGEMM,
    FLASHINFER,
    INVERTED,
    OF_AMAX,
    PRODUCT,
    QUOTIENT,
    TE,
    TORCHAO,
    VLLM,
    VLLM_EMULATION,
)
from cute_quant.contract.formats import Format
from cute_quant.kernels import arithmetic, ptx
from cute_quant.kernels.arithmetic import FLOAT32_INFINITY, FLOAT32_NAN, LOG2_E
from cute_quant.kernels.upper_scales import Factors

MANTISSA_MASK = 0x7FFFFF
QUARTER_MANTISSA = 0x200000
EXPONENT_MASK = 0xFF800000
MAGNITUDE_MASK = 0x7FFFFFFF
FLOAT32_ONE = 0x3F800000
MAGNITUDE_MASK_X2 = 0x7FFF7FFF

BELOW_PRECISION = {BFloat16: 0xFFFF, Float16: 0x1FFF, Float32: 0}
"""Bits of a float32's mantissa that the type does not have."""


class GroupScale(NamedTuple):
    """The two forms of the scale of a group.

    Attributes:
        multiplier: what values are multiplied with: the scale's reciprocal, NaN where the group
            is not finite. Of e4m3 scales see `e4m3_multiplier`.
        scale: what is stored: a UE8M0 or e4m3 byte in the low bits, or a float32.
        unrounded: the e4m3 scale before it is rounded; None of other scales.
    """

    multiplier: Float32
    scale: Uint32 | Float32
    unrounded: Float32 | None = None


@cute.jit
def thread_amax(rX: cute.Tensor) -> Uint32:
    """Return the largest magnitude of a thread's values.

    The bits of a float32, or of a pair of halves that `group_amax` joins.
    """
    words = cute.recast_tensor(rX, Uint32)
    if const_expr(rX.element_type is Float32 and ptx.target().three_input_max):
        result = ptx.max_magnitude_of_3(words[0], words[1], words[2])
        for i in cutlass.range_constexpr(3, cute.size(words), 2):
            last = words[min(i + 1, cute.size(words) - 1)]
            result = ptx.max_magnitude_of_3(result, words[i], last)
        return result
    result = ptx.max_magnitude(words[0], words[1], rX.element_type)
    for i in cutlass.range_constexpr(2, cute.size(words), 2):
        pair = ptx.max_magnitude(words[i], words[i + 1], rX.element_type)
        result = ptx.max_magnitude(result, pair, rX.element_type)
    single = rX.element_type is Float32
    return result & Uint32(MAGNITUDE_MASK if single else MAGNITUDE_MASK_X2)


def larger(dtype: type[cutlass.Numeric]) -> Callable[[Uint32, Uint32], Uint32]:
    """Return the function that takes the larger of two of `thread_amax`."""
    if dtype is Float32:
        return cutlass.max
    if ptx.target().pair_arithmetic:
        return ptx.max_u16x2
    # As floating-point numbers; the sign of a NaN is not specified.
    return lambda a, b: ptx.max_magnitude(a, b, dtype) & Uint32(MAGNITUDE_MASK_X2)


@cute.jit
def group_amax(
    amax: Uint32, dtype: cutlass.Constexpr[type], lanes: cutlass.Constexpr[int]
) -> Uint32:
    """Return the largest `thread_amax` of a group held by adjacent lanes, as a float32.

    Bits below the precision of `dtype` have no meaning.
    """
    result = cute.arch.warp_reduction(amax, larger(dtype), threads_in_group=lanes)
    if const_expr(dtype is Float32):
        return result
    result = larger(dtype)(result, result << 16 | result >> 16)
    if const_expr(dtype is Float16):
        return Float32(Uint16(result).bitcast(Float16)).bitcast(Uint32)
    return result


def column_amaxes(rows: list[cute.Tensor]) -> list[Uint32]:
    """Return the largest magnitude of each of a thread's columns, of rows (values,).

    The bits of a float32, or of a pair of halves, for each register of a row.
    """
    dtype = rows[0].element_type
    words = [cute.recast_tensor(rX, Uint32) for rX in rows]
    single = dtype is Float32
    mask = Uint32(MAGNITUDE_MASK if single else MAGNITUDE_MASK_X2)
    amaxes = []
    for i in range(cute.size(words[0])):
        values = [row[i] for row in words]
        result = values[0]
        if single and ptx.target().three_input_max:
            for j in range(1, len(values), 2):
                last = values[min(j + 1, len(values) - 1)]
                result = ptx.max_magnitude_of_3(result, values[j], last)
        else:
            for value in values[1:]:
                result = ptx.max_magnitude(result, value, dtype)
        amaxes.append(result & mask)
    return amaxes


def amax_of_half(bits: Uint16, dtype: type[cutlass.Numeric]) -> Uint32:
    """Return the magnitude of a half as `group_scale` takes it."""
    if dtype is Float16:
        return Float32(bits.bitcast(Float16)).bitcast(Uint32)
    return Uint32(bits) << 16


@cute.jit
def is_finite(amax: Uint32) -> Boolean:
    """Return whether the group of this amax holds neither NaN nor Inf."""
    return amax < Uint32(FLOAT32_INFINITY)


@cute.jit
def group_scale(
    amax: Uint32,
    dtype: cutlass.Constexpr[type],
    bound: Float32 | Factors,
    fmt: cutlass.Constexpr[Format],
) -> GroupScale:
    """Return multiplier and scale of a group.

    Args:
        amax: of the group, as `group_amax` returns it.
        dtype: of the values.
        bound: as `scale_bound` returns it; forms of the upper scale where there is one.
        fmt: the format of the scale.
    """
    if const_expr(fmt.upper_scale):
        return e4m3_scale(amax, dtype, bound, fmt.numerics)
    if const_expr(fmt.power_of_two):
        exponents = largest_exponents
        if const_expr(fmt.rounds_half_up or fmt.in_bf16):
            exponents = half_up_exponents if const_expr(fmt.rounds_half_up) else bf16_exponents
        if const_expr(fmt.rounds_quotient and dtype is Float32):
            amax = amax - Uint32(amax == Uint32(above_smallest_scale(fmt.value_type)))
        multiplier = power_of_two_multiplier(amax, exponents(amax, dtype, fmt.value_type), bound)
        if const_expr(fmt.ue8m0):
            scale = ue8m0_scale(multiplier)
            if const_expr(fmt.flushes):
                multiplier = multiplier if scale != Uint32(0) else Float32(0.0)
            return GroupScale(multiplier, scale)
        return GroupScale(multiplier, float32_of_multiplier(multiplier, False))
    if const_expr(fmt.bounds_amax):
        return scale_of_bounded_amax(amax, dtype, bound, fmt)
    scale = float32_scale(amax, dtype, fmt.value_type, bound, fmt.steps.scale == PRODUCT)
    return GroupScale(arithmetic.reciprocal(scale), scale)


def scale_bound(floor: Int32 | Float32, fmt: Format) -> Float32:
    """Return the bound on a scale: its smallest value, or its largest multiplier.

    Args:
        floor: the smallest scale, a UE8M0 exponent where scales are powers of two.
        fmt: the format of the scale.
    """
    if fmt.power_of_two:
        return Uint32((UE8M0_MAX - floor) << FLOAT32_MANTISSA_BITS).bitcast(Float32)
    return floor


@cute.jit
def power_of_two_multiplier(amax: Uint32, bits: Uint32, max_multiplier: Float32) -> Float32:
    """Return a power of two, at most `max_multiplier`; NaN where amax is not finite."""
    bits = cutlass.min(bits, max_multiplier.bitcast(Uint32))
    # Zero times amax is NaN where amax is not finite, and one instruction.
    return amax.bitcast(Float32) * Float32(0.0) + bits.bitcast(Float32)


def largest_exponents(amax: Uint32, dtype: type[cutlass.Numeric], values: ValueType) -> Uint32:
    """Return the bits of the largest power of two m with ``amax * m <= values.max``.

    It is the reciprocal of the UE8M0 scale. Its exponent is that of ``values.max`` less that of
    amax, less one where the mantissa of amax is above that of the maximum. Subtracting amax from
    the maximum as integers does all of this: the mantissa borrows from the exponent exactly there.
    """
    minuend = UE8M0_MAX + values.max_exponent << FLOAT32_MANTISSA_BITS | values.max_mantissa
    return (Uint32(minuend | BELOW_PRECISION[dtype]) - amax) & Uint32(EXPONENT_MASK)


def above_smallest_scale(values: ValueType) -> int:
    """Return the bits of the first float32 above ``values.max`` * 2^-127.

    Over ``values.max``, which leaves a subnormal, it is the one amax that rounds to a power of two.
    """
    return (values.max_exponent << FLOAT32_MANTISSA_BITS | values.max_mantissa) + 1


def half_up_exponents(amax: Uint32, dtype: type[cutlass.Numeric], values: ValueType) -> Uint32:
    """Return the bits of a power of two whose exponent is that of ``values.max`` less amax's.

    The exponent of amax counts one more from the mantissa 1.75 on.
    """
    minuend = UE8M0_MAX + values.max_exponent << FLOAT32_MANTISSA_BITS
    return Uint32(minuend) - (amax + Uint32(QUARTER_MANTISSA) & Uint32(EXPONENT_MASK))


def bf16_exponents(amax: Uint32, dtype: type[cutlass.Numeric], values: ValueType) -> Uint32:
    """Return the bits of the power of two over that of a `bf16_scale`, whose log2 is rounded, too.

    The log2 of the scale is rounded to bfloat16, then up to an integer. Where a bfloat16 is too
    coarse for the log2 of the mantissa that integer is the exponent. A parabola through 0 is near
    enough to this log2: the tests have every bfloat16.
    """
    bits = bf16_scale(magnitude(amax, dtype), values).bitcast(Uint32)
    mantissa = (bits & Uint32(MANTISSA_MASK) | Uint32(FLOAT32_ONE)).bitcast(Float32) - Float32(1.0)
    exponent = bits >> FLOAT32_MANTISSA_BITS
    whole = Float32(Int32(exponent) - FLOAT32_BIAS)
    log2 = cute.math.fma(mantissa, mantissa * Float32(-0.6) + Float32(LOG2_E), whole)
    exponent = exponent + Uint32(bf16(log2) > whole)
    return Uint32(UE8M0_MAX << FLOAT32_MANTISSA_BITS) - (exponent << FLOAT32_MANTISSA_BITS)


def bf16_scale(amax: Float32, values: ValueType) -> Float32:
    """Return amax times the inverse of ``values.max``, both rounded to bfloat16."""
    inverse = torch.tensor(1.0 / values.max).bfloat16().item()
    return bf16(amax * inverse)


def bf16(value: Float32) -> Float32:
    """Return a float32 rounded to bfloat16."""
    return value.to(BFloat16).to(Float32)


@cute.jit
def ue8m0_scale(multiplier: Float32) -> Uint32:
    """Return the UE8M0 byte of a multiplier's reciprocal: 254 less its exponent, 255 of a NaN."""
    bits = Uint32(UE8M0_MAX << FLOAT32_MANTISSA_BITS | MANTISSA_MASK) - multiplier.bitcast(Uint32)
    return bits >> FLOAT32_MANTISSA_BITS


@cute.jit
def float32_of_multiplier(multiplier: Float32, subnormal: cutlass.Constexpr[bool]) -> Float32:
    """Return the reciprocal of a power of two, NaN of a NaN.

    The exponents of both add up to 254. A NaN, which is above 254 << 23, wraps around to a number
    above all finite ones.

    Args:
        multiplier: a power of two, or NaN.
        subnormal: whether the result may be 2^-127.
    """
    bits = Uint32(UE8M0_MAX << FLOAT32_MANTISSA_BITS) - multiplier.bitcast(Uint32)
    if const_expr(subnormal):
        bits = cutlass.max(bits, Uint32(SMALLEST_UE8M0))
    return cutlass.min(bits, Uint32(FLOAT32_NAN)).bitcast(Float32)


@cute.jit
def float32_of_ue8m0(exponent: Uint32) -> Float32:
    """Return the scale of a UE8M0 byte, the low one: 2^(byte - 127), NaN of 255."""
    byte = exponent & Uint32(0xFF)
    bits = cutlass.max(byte << FLOAT32_MANTISSA_BITS, Uint32(SMALLEST_UE8M0))
    bits = bits if byte != Uint32(UE8M0_NAN) else Uint32(FLOAT32_NAN)
    return bits.bitcast(Float32)


@cute.jit
def float32_scale(
    amax: Uint32,
    dtype: cutlass.Constexpr[type],
    values: cutlass.Constexpr[ValueType],
    min_scale: Float32,
    reciprocal_of_max: cutlass.Constexpr[bool],
) -> Float32:
    """Return ``max(amax / values.max, min_scale)``, NaN where amax is not finite.

    The quotient has IEEE rounding; with `reciprocal_of_max` it is amax times the rounded
    reciprocal.
    """
    scale = magnitude(amax, dtype)
    if const_expr(reciprocal_of_max):
        scale = scale * (1.0 / values.max)
    else:
        scale = arithmetic.quotient(scale, values.max)
    scale = cutlass.max(scale, min_scale)
    return scale if is_finite(amax) else Uint32(FLOAT32_NAN).bitcast(Float32)


@cute.jit
def scale_of_bounded_amax(
    amax: Uint32,
    dtype: cutlass.Constexpr[type],
    min_amax: Float32,
    fmt: cutlass.Constexpr[Format],
) -> GroupScale:
    """Return multiplier and float32 scale of an amax by its steps; it is `min_amax` at least."""
    largest, (scale_step, multiplier_step) = Float32(fmt.value_type.max), fmt.steps
    largest_magnitude = magnitude(amax, dtype)
    bounded = cutlass.max(largest_magnitude, min_amax)
    scale = multiplier = largest
    if const_expr(scale_step == PRODUCT):
        scale = bounded * (1.0 / fmt.value_type.max)
    elif const_expr(scale_step == QUOTIENT):
        scale = arithmetic.quotient(bounded, fmt.value_type.max)
    elif const_expr(scale_step == BF16_PRODUCT):
        scale = bf16_scale(bounded, fmt.value_type)
    if const_expr(multiplier_step == OF_AMAX):
        multiplier = largest / bounded
    elif const_expr(multiplier_step == APPROXIMATE_OF_SCALE):
        multiplier = cute.arch.rcp_approx(scale)
    elif const_expr(multiplier_step == BF16_OF_SCALE):
        # The reciprocal of a bfloat16 is never near the middle of two.
        multiplier = bf16(cute.arch.rcp_approx(scale))
    else:
        multiplier = cute.arch.rcp_approx(bounded) * largest
    if const_expr(scale_step == INVERTED):
        scale = arithmetic.reciprocal(multiplier)
    if const_expr(fmt.zeros_have_zero):
        scale = scale if largest_magnitude != Float32(0.0) else Float32(0.0)
    nan = Uint32(FLOAT32_NAN).bitcast(Float32)
    finite = is_finite(amax)
    return GroupScale(multiplier if finite else nan, scale if finite else nan)


def magnitude(amax: Uint32, dtype: type[cutlass.Numeric]) -> Float32:
    """Return an amax as a number, without the bits below the precision of `dtype`."""
    return (amax & Uint32(0xFFFFFFFF ^ BELOW_PRECISION[dtype])).bitcast(Float32)


@cute.jit
def e4m3_scale(
    amax: Uint32,
    dtype: cutlass.Constexpr[type],
    upper: Factors,
    numerics: cutlass.Constexpr[str],
) -> GroupScale:
    """Return multiplier and e4m3 scale of a group under an upper scale.

    A group that is not finite, or whose upper scale is NaN, has the scale NaN.
    """
    largest = magnitude(amax, dtype)
    scale = e4m3_quotient(largest, upper, numerics)
    # Inf times zero is NaN, and any other amax times zero adds nothing.
    scale = cute.math.fma(largest, Float32(0.0), scale)
    return rounded_e4m3_scale(cute.arch.fmax(scale, upper.floor, nan=True), upper, numerics)


def rounded_e4m3_scale(unrounded: Float32, upper: Factors, numerics: str) -> GroupScale:
    """Return multiplier and scale for a scale before it is rounded."""
    byte = ptx.e4m3_of_f32(unrounded)
    return GroupScale(e4m3_multiplier(ptx.f32_of_e4m3(byte), upper, numerics), byte, unrounded)


def e4m3_quotient(largest: Float32, upper: Factors, numerics: str) -> Float32:
    """Return the amax of a group over the largest value, in units of the upper scale."""
    sixth = Float32(1.0 / E2M1_MAX)
    if numerics in (VLLM, VLLM_EMULATION, FLASHINFER):
        return upper.encode * (largest * sixth)
    if numerics == TORCHAO:
        # Where the quotient overflows it is Inf, and e4m3 saturates.
        return largest / Float32(E2M1_MAX) / upper.decode
    if numerics == DEEPGEMM:
        return largest * sixth * arithmetic.reciprocal(upper.decode)
    return largest * (upper.encode * sixth)


@cute.jit
def e4m3_multiplier(scale: Float32, upper: Factors, numerics: cutlass.Constexpr[str]) -> Float32:
    """Return what values are multiplied with under an e4m3 scale; DeepGEMM divides by it."""
    if const_expr(numerics in (VLLM, FLASHINFER)):
        return approximate_reciprocal(scale * cute.arch.rcp_approx(upper.encode))
    if const_expr(numerics == TORCHAO):
        return arithmetic.reciprocal(upper.decode) / scale
    if const_expr(numerics == DEEPGEMM):
        return scale * upper.decode
    divisor = scale * upper.decode
    multiplier = arithmetic.reciprocal(divisor)
    if const_expr(numerics == VLLM_EMULATION):
        return multiplier if divisor != Float32(0.0) else Float32(VLLM_ZERO_MULTIPLIER)
    # The step of Newton's method makes NaN of the reciprocal of 0, and a maximum or minimum drops
    # it.
    if const_expr(numerics == TE):
        return cute.arch.fmin(multiplier, Float32(FLOAT32_MAX))
    return cute.arch.fmax(multiplier, Float32(0.0))


@cute.jit
def approximate_reciprocal(divisor: Float32) -> Float32:
    """Return ``rcp.approx`` of a divisor, 0 of 0."""
    return cute.arch.rcp_approx(divisor) if divisor != Float32(0.0) else Float32(0.0)


def scale_of_multiplier(multiplier: Float32, fmt: Format) -> GroupScale:
    """Return the scale of a multiplier: UE8M0, or else a float32 that is NaN where it is."""
    return GroupScale(multiplier, ue8m0_scale(multiplier) if fmt.ue8m0 else multiplier)


def is_number(scale: GroupScale, fmt: Format) -> Boolean:
    """Return whether the scale of a group is not NaN."""
    if fmt.ue8m0:
        # Above the byte of NaN there are bits too.
        return scale.scale < Uint32(UE8M0_NAN)
    number = scale.unrounded if fmt.upper_scale else scale.scale
    return number == number


def float32_of_scale(scale: Uint32 | Float32, fmt: Format) -> Float32:
    """Return what is stored, without an upper scale, as a float32; NaN of NaN."""
    if fmt.ue8m0:
        return float32_of_ue8m0(scale)
    return ptx.f32_of_e4m3(scale) if fmt.upper_scale else scale
