"""Device functions of the contract: magnitudes, scales, exact multipliers, 8-bit values.

They work on the registers of a thread and the lanes of a group; nothing here touches memory.
Magnitudes, scales and multipliers travel as the bits of a float32, in which a comparison of
integers orders magnitudes: NaN above Inf above every finite value.
"""

import math
from collections.abc import Callable

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Boolean, Float16, Float32, Int32, Uint16, Uint32, const_expr
from cutlass._mlir.dialects import llvm
from cutlass.base_dsl import BaseDSL
from cutlass.base_dsl.enums import Arch
from cutlass.cutlass_dsl import T, dsl_user_op

from cute_quant.contract.formats import (
    FLOAT32_MANTISSA_BITS,
    UE8M0_MAX,
    UE8M0_NAN,
    Format,
    ValueType,
    to_float32,
)
from cute_quant.kernels.config import LANES
from cute_quant.kernels.params import Params

FLOAT32_INFINITY = 0x7F800000
FLOAT32_NAN = 0x7FC00000
SMALLEST_UE8M0 = 0x400000
"""2^-127, the only UE8M0 scale that is no normal number."""
MANTISSA_MASK = 0x7FFFFF
EXPONENT_MASK = 0xFF800000
MAGNITUDE_MASK = 0x7FFFFFFF

BELOW_PRECISION = {BFloat16: 0xFFFF, Float16: 0x1FFF, Float32: 0}
"""Bits of a float32's mantissa that the type does not have."""


@dsl_user_op
def _ptx(instruction: str, a: Uint32, b: Uint32, *, loc=None, ip=None) -> Uint32:
    """An instruction from two 32-bit registers to one."""
    operands = [Uint32(v).ir_value(loc=loc, ip=ip) for v in (a, b)]
    ptx = f"{instruction} $0, $1, $2;"
    return Uint32(llvm.inline_asm(T.i32(), operands, ptx, "=r,r,r", loc=loc, ip=ip))


def _max_magnitude(a: Uint32, b: Uint32, dtype: type[cutlass.Numeric]) -> Uint32:
    """The larger magnitudes of two float32, or of two pairs of halves, under some sign. An integer
    maximum would have to mask the signs of all its operands first."""
    kind = {BFloat16: "bf16x2", Float16: "f16x2", Float32: "f32"}[dtype]
    return _ptx(f"max.NaN.xorsign.abs.{kind}", a, b)


def _max_u16x2(a: Uint32, b: Uint32) -> Uint32:
    """Two maxima at once. The DSL has no pairs of integers."""
    return _ptx("max.u16x2", a, b)


def _multiply_bf16x2(a: Uint32, b: Uint32) -> Uint32:
    """Two products at once. The DSL has them only as part of a sum."""
    return _ptx("mul.rn.bf16x2", a, b)


@dsl_user_op
def _multiply_bf16(a: Uint16, b: Uint16, *, loc=None, ip=None) -> Float32:
    """A product of bfloat16 as float32: with -0 to add, SM100 widens and multiplies at once."""
    # As bits: the DSL takes -0.0 for the 0.0 that a kernel may have had before.
    negative_zero = Uint32(0x80000000).bitcast(Float32)
    operands = [v.ir_value(loc=loc, ip=ip) for v in (a, b, negative_zero)]
    ptx = "fma.rn.f32.bf16 $0, $1, $2, $3;"
    return Float32(llvm.inline_asm(T.f32(), operands, ptx, "=f,h,h,f", loc=loc, ip=ip))


@dsl_user_op
def _pack_int8(a: Float32, b: Float32, c: Uint32, *, loc=None, ip=None) -> Uint32:
    """``c << 16`` over two values as int8, rounded to nearest even; the DSL truncates. NaN gives
    0, what is beyond 127 is saturated."""
    words = []
    for value in (a, b):
        operand = [value.ir_value(loc=loc, ip=ip)]
        ptx = "cvt.rni.s32.f32 $0, $1;"
        words.append(llvm.inline_asm(T.i32(), operand, ptx, "=r,f", loc=loc, ip=ip))
    ptx = "cvt.pack.sat.s8.s32.b32 $0, $1, $2, $3;"
    operands = [words[1], words[0], Uint32(c).ir_value(loc=loc, ip=ip)]
    return Uint32(llvm.inline_asm(T.i32(), operands, ptx, "=r,r,r,r", loc=loc, ip=ip))


def quotient(a: Float32, b: float) -> Float32:
    """a / b with IEEE rounding, by Markstein's theorem: `b` is normal and its mantissa not all
    ones. Subnormal results are not exact."""
    reciprocal = Float32(1.0 / b)
    estimate = a * reciprocal
    remainder = cute.math.fma(Float32(-b), estimate, a)
    return cute.math.fma(remainder, reciprocal, estimate)


def reciprocal(a: Float32) -> Float32:
    """1 / a with IEEE rounding, for normal results: one step of Newton's method."""
    estimate = cute.arch.rcp_approx(a)
    error = cute.math.fma(Float32(0.0) - a, estimate, Float32(1.0))
    return cute.math.fma(error, estimate, estimate)


LOG2_E, LN_2 = math.log2(math.e), math.log(2.0)
LARGEST_EXPONENT = 127.99
"""Of what `sigmoid` takes 2 to the power of, which then is finite."""


class Exponent(Params):
    """A factor of the argument of `sigmoid`, as an argument of a kernel.

    Attributes:
        high, low: float32 whose sum is ``-factor * log2(e)``.
        bound: of the magnitude of what is multiplied with it.
    """

    def __init__(self, factor: Float32):
        self.high = Float32(-LOG2_E) * factor
        error = cute.math.fma(Float32(-LOG2_E), factor, Float32(0.0) - self.high)
        self.low = cute.math.fma(Float32(to_float32(LOG2_E) - LOG2_E), factor, error)
        magnitude = cutlass.max(self.high, Float32(0.0) - self.high)
        self.bound = Float32(LARGEST_EXPONENT) / magnitude


def sigmoid(x: cute.TensorSSA, factor: Exponent | None = None) -> cute.TensorSSA:
    """1 / (1 + e^-(factor * x)), or of x itself, of float32; at most 1, also of a NaN.

    The exponent of 2 has more bits than a float32: what its rounding leaves is made up for by
    ``2^rest = 1 + rest * ln(2)``. So the relative error is that of two approximations and three
    roundings, 2^-22 + 2^-23 + 3 * 2^-24 at most, however large x; below 2^-126 it may be 0.
    """
    high, low = Float32(-LOG2_E), Float32(to_float32(LOG2_E) - LOG2_E)
    bound = Float32(LARGEST_EXPONENT / LOG2_E)
    if factor is not None:
        high, low, bound = factor.high, factor.low, factor.bound
    x = each(lambda value: cute.arch.fmin(value, bound, abs=True), x)
    high, low = (cute.full_like(x, part) for part in (high, low))
    power = x * high
    rest = cute.math.fma(x, low, cute.math.fma(x, high, -power))
    exponential = cute.math.exp2(power, fastmath=True)
    exponential = cute.math.fma(exponential, rest * LN_2, exponential)
    return each(cute.arch.rcp_approx, exponential + 1.0)


def sum_of(x: cute.TensorSSA) -> Float32:
    """Of a thread's float32, a power of two of them, in pairs: as deep as its logarithm."""
    return _in_pairs(lambda a, b: a + b, x)


def max_of_all(x: cute.TensorSSA) -> Uint32:
    """Of a thread's numbers, a power of two of them."""
    return Uint32(_in_pairs(cutlass.max, x))


def _in_pairs(function: Callable, x: cute.TensorSSA) -> cutlass.Numeric:
    rX = registers(x)
    values = [rX[i] for i in range(cute.size(rX))]
    while len(values) > 1:
        half = len(values) // 2
        values = [function(a, b) for a, b in zip(values[:half], values[half:], strict=True)]
    return values[0]


def sum_of_lanes(value: Float32) -> Float32:
    """Of a warp, in each of its lanes; 5 roundings deep."""
    for i in range(LANES.bit_length() - 1):
        value = value + cute.arch.shuffle_sync_bfly(value, offset=1 << i)
    return value


def reciprocal_root(x: Float32) -> Float32:
    """1 / sqrt(x), with a relative error of 2^-22.4 at most."""
    return cute.math.rsqrt(x, approx=True, ftz=True)


def minimum(x: cute.TensorSSA, bound: Float32) -> cute.TensorSSA:
    """The smaller one; NaN if one is."""
    return each(lambda value: cute.arch.fmin(value, bound, nan=True), x)


def maximum(x: cute.TensorSSA, bound: Float32) -> cute.TensorSSA:
    """The larger one; NaN if one is."""
    return each(lambda value: cute.arch.fmax(value, bound, nan=True), x)


def each(function: Callable[[Float32], Float32], x: cute.TensorSSA) -> cute.TensorSSA:
    """A function of every element. What vectors have operations for SM100 computes two at once."""
    rX = registers(x)
    for i in range(cute.size(rX)):
        rX[i] = function(rX[i])
    return rX.load()


def registers(x: cute.TensorSSA) -> cute.Tensor:
    """A vector in a thread's registers."""
    rX = cute.make_rmem_tensor(x.shape, x.dtype)
    rX.store(x)
    return rX


def rounded(x: cute.TensorSSA, dtype: type[cutlass.Numeric]) -> cute.TensorSSA:
    """float32 rounded to the precision of a dtype."""
    return x if dtype is Float32 else widen(registers(x.to(dtype))).load()


@cute.jit
def amax(rX: cute.Tensor) -> Uint32:
    """Largest magnitude of a thread's values: the bits of a float32, or a pair of halves to be
    joined by `group_amax`."""
    words = cute.recast_tensor(rX, Uint32)
    result = _max_magnitude(words[0], words[1], rX.element_type)
    for i in cutlass.range_constexpr(2, cute.size(words), 2):
        pair = _max_magnitude(words[i], words[i + 1], rX.element_type)
        result = _max_magnitude(result, pair, rX.element_type)
    return result & Uint32(MAGNITUDE_MASK if rX.element_type is Float32 else 0x7FFF7FFF)


@cute.jit
def group_amax(
    thread_amax: Uint32, dtype: cutlass.Constexpr[type], lanes: cutlass.Constexpr[int]
) -> Uint32:
    """Largest `amax` of a group held by `lanes` neighbours, as a float32.

    Bits below the precision of `dtype` have no meaning.
    """
    larger = max_of(dtype)
    result = thread_amax
    for i in cutlass.range_constexpr(lanes.bit_length() - 1):
        result = larger(result, cute.arch.shuffle_sync_bfly(result, offset=1 << i))
    if const_expr(dtype is Float32):
        return result
    result = _max_u16x2(result, result << 16 | result >> 16)
    if const_expr(dtype is Float16):
        return Float32(Uint16(result).bitcast(Float16)).bitcast(Uint32)
    return result


def max_of(dtype: type[cutlass.Numeric]) -> Callable[[Uint32, Uint32], Uint32]:
    """The larger of two of `amax`."""
    return cutlass.max if dtype is Float32 else _max_u16x2


@cute.jit
def is_finite(amax: Uint32) -> Boolean:
    """Whether the group of this amax holds neither NaN nor Inf."""
    return amax < Uint32(FLOAT32_INFINITY)


@cute.jit
def max_multiplier(min_exponent: Int32) -> Uint32:
    """Bits of the reciprocal of the smallest scale, 2^(min_exponent - 127)."""
    return Uint32((UE8M0_MAX - min_exponent) << FLOAT32_MANTISSA_BITS)


@cute.jit
def exact_multiplier(
    amax: Uint32,
    dtype: cutlass.Constexpr[type],
    values: cutlass.Constexpr[ValueType],
    max_multiplier: Uint32,
) -> Uint32:
    """Bits of the largest power of two m with amax * m <= ``values.max``, at most `max_multiplier`.

    It is the reciprocal of the UE8M0 scale, its exponent 254 less that of the scale. Subtracting
    amax from that maximum with the exponent of m for amax = 1 leaves it in place: the mantissa
    borrows from the exponent exactly where that of amax is above that of the maximum. NaN where
    amax is not finite.
    """
    minuend = UE8M0_MAX + values.max_exponent << FLOAT32_MANTISSA_BITS | values.max_mantissa
    multiplier = (Uint32(minuend | BELOW_PRECISION[dtype]) - amax) & Uint32(EXPONENT_MASK)
    multiplier = cutlass.min(multiplier, max_multiplier)
    # Zero times amax is NaN where amax is not finite, and one instruction.
    return (amax.bitcast(Float32) * Float32(0.0) + multiplier.bitcast(Float32)).bitcast(Uint32)


@cute.jit
def ue8m0(multiplier: Uint32) -> Uint32:
    """The UE8M0 byte of 1 / `multiplier`, in the low byte: 254 less its exponent, 255 of a NaN."""
    bits = Uint32(UE8M0_MAX << FLOAT32_MANTISSA_BITS | MANTISSA_MASK) - multiplier
    return bits >> FLOAT32_MANTISSA_BITS


@cute.jit
def power_of_two(multiplier: Uint32, subnormal: cutlass.Constexpr[bool]) -> Float32:
    """1 / `multiplier`, which may be 2^-127 if `subnormal`; NaN of a NaN."""
    bits = Uint32(UE8M0_MAX << FLOAT32_MANTISSA_BITS) - multiplier
    if const_expr(subnormal):
        bits = cutlass.max(bits, Uint32(SMALLEST_UE8M0))
    bits = bits if multiplier < Uint32(FLOAT32_INFINITY) else Uint32(FLOAT32_NAN)
    return bits.bitcast(Float32)


@cute.jit
def float32_scale(
    amax: Uint32,
    dtype: cutlass.Constexpr[type],
    values: cutlass.Constexpr[ValueType],
    min_scale: Float32,
    reciprocal_of_max: cutlass.Constexpr[bool],
) -> Float32:
    """max(amax / values.max, min_scale), NaN where amax is not finite.

    The quotient has IEEE rounding; with `reciprocal_of_max` it is amax times the
    rounded reciprocal.
    """
    scale = (amax & Uint32(0xFFFFFFFF ^ BELOW_PRECISION[dtype])).bitcast(Float32)
    if const_expr(reciprocal_of_max):
        scale = scale * (1.0 / values.max)
    else:
        scale = quotient(scale, values.max)
    scale = cutlass.max(scale, min_scale)
    return scale if is_finite(amax) else Uint32(FLOAT32_NAN).bitcast(Float32)


@cute.jit
def group_scale(
    amax: Uint32,
    dtype: cutlass.Constexpr[type],
    floor: Uint32 | Float32,
    fmt: cutlass.Constexpr[Format],
) -> Uint32 | Float32:
    """The scale of a group, as `scaled`, `stored_scale` and `float32_of` take it: its multiplier
    where it is a power of two, else itself.

    Args:
        amax: of the group, as `group_amax` has it.
        floor: the smallest scale, or the largest multiplier.
    """
    if const_expr(fmt.power_of_two):
        return exact_multiplier(amax, dtype, fmt.value_type, floor)
    return float32_scale(amax, dtype, fmt.value_type, floor, fmt.reciprocal)


@cute.jit
def scaled(rX: cute.Tensor, scale: Uint32 | Float32, fmt: cutlass.Constexpr[Format]) -> cute.Tensor:
    """`rX` over the scale of its group, as float32."""
    if const_expr(fmt.power_of_two):
        return multiply_exact(rX, scale)
    return multiply(rX, reciprocal(scale))


@cute.jit
def float32_of(scale: Uint32 | Float32, fmt: cutlass.Constexpr[Format]) -> Float32:
    """A scale as float32."""
    return power_of_two(scale, fmt.ue8m0) if const_expr(fmt.power_of_two) else scale


@cute.jit
def float32_of_ue8m0(exponent: Uint32) -> Float32:
    """The scale of a UE8M0 byte, the low one: 2^(byte - 127), NaN of 255."""
    byte = exponent & Uint32(0xFF)
    bits = cutlass.max(byte << FLOAT32_MANTISSA_BITS, Uint32(SMALLEST_UE8M0))
    bits = bits if byte != Uint32(UE8M0_NAN) else Uint32(FLOAT32_NAN)
    return bits.bitcast(Float32)


@cute.jit
def stored_scale(scale: Uint32 | Float32, fmt: cutlass.Constexpr[Format]) -> Uint32 | Float32:
    """A scale as its format stores it: a UE8M0 byte or a float32."""
    return ue8m0(scale) if const_expr(fmt.ue8m0) else float32_of(scale, fmt)


@cute.jit
def round_to(values: cute.Tensor, dtype: cutlass.Constexpr[type]) -> cute.Tensor:
    """float32 `values` (16,) rounded to nearest even, saturated."""
    rQ = cute.make_rmem_tensor(values.shape, dtype)
    if const_expr(dtype is cutlass.Int8):
        words = cute.recast_tensor(rQ, Uint32)
        for i in cutlass.range_constexpr(cute.size(words)):
            upper = _pack_int8(values[4 * i + 2], values[4 * i + 3], Uint32(0))
            words[i] = _pack_int8(values[4 * i], values[4 * i + 1], upper)
    else:
        rQ.store(values.load().to(dtype))
    return rQ


@cute.jit
def multiply_exact(rX: cute.Tensor, multiplier: Uint32) -> cute.Tensor:
    """Products of `rX` and a multiplier that is a power of two or NaN, as float32.

    Such a multiplier is a bfloat16 too, the upper half of the float32, and so are the products:
    those that get lost below its smallest value are below that of any 8 bits by far.
    """
    if const_expr(rX.element_type is not BFloat16):
        return multiply(rX, multiplier.bitcast(Float32))
    if const_expr(_has_mixed_fma()):
        rY = cute.make_rmem_tensor(rX.shape, Float32)
        halves = cute.recast_tensor(rX, Uint16)
        for i in cutlass.range_constexpr(cute.size(rX)):
            rY[i] = _multiply_bf16(halves[i], Uint16(multiplier >> 16))
        return rY
    rY = cute.make_rmem_tensor_like(rX)
    pairs, products = cute.recast_tensor(rX, Uint32), cute.recast_tensor(rY, Uint32)
    factors = multiplier | multiplier >> 16
    for i in cutlass.range_constexpr(cute.size(pairs)):
        products[i] = _multiply_bf16x2(pairs[i], factors)
    return widen(rY)


@cute.jit
def multiply(rX: cute.Tensor, multiplier: Float32) -> cute.Tensor:
    """Products of `rX` and `multiplier` as float32."""
    rY = widen(rX)
    rY.store(rY.load() * multiplier)
    return rY


@cute.jit
def widen(rX: cute.Tensor) -> cute.Tensor:
    """`rX` as float32."""
    rY = cute.make_rmem_tensor(rX.shape, Float32)
    if const_expr(rX.element_type is BFloat16):
        # A shift and a mask for a pair; converting a half alone first moves it to the low half.
        pairs = cute.recast_tensor(rX, Uint32)
        bits = cute.recast_tensor(rY, Uint32)
        for i in cutlass.range_constexpr(cute.size(pairs)):
            bits[2 * i] = pairs[i] << 16
            bits[2 * i + 1] = pairs[i] & Uint32(0xFFFF0000)
    else:
        rY.store(rX.load().to(Float32))
    return rY


def _has_mixed_fma() -> bool:
    """Whether the target has ``fma.rn.f32.bf16``."""
    return BaseDSL._get_dsl().get_arch_enum() >= Arch.sm_100
