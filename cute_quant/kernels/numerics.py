"""Device functions of the contract: magnitudes, scales, exact multipliers.

They work on the registers of a thread and the lanes of a group; nothing here touches memory.
Scales and multipliers travel as the bits of a float32, in which a comparison of integers orders
magnitudes: NaN above Inf above every finite value.
"""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Boolean, Float16, Float32, Int32, Uint16, Uint32, const_expr
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op

from cute_quant.formats import E4M3_MAX, UE8M0_NAN

E4M3_MAX_MANTISSA = 0x600000
E4M3_MAX_EXPONENT = 8

FLOAT32_INFINITY = 0x7F800000
FLOAT32_NAN = 0x7FC00000
MANTISSA_BITS = 23
MANTISSA_MASK = 0x7FFFFF

UE8M0_MAX = 254


@dsl_user_op
def max_u16x2(a: Uint32, b: Uint32, *, loc=None, ip=None) -> Uint32:
    """``max.u16x2``: one instruction for two magnitudes; the DSL has no packed 16-bit integers."""
    operands = [Uint32(a).ir_value(loc=loc, ip=ip), Uint32(b).ir_value(loc=loc, ip=ip)]
    return Uint32(
        llvm.inline_asm(T.i32(), operands, "max.u16x2 $0, $1, $2;", "=r,r,r", loc=loc, ip=ip)
    )


@cute.jit
def group_amax(rX: cute.Tensor, lanes: cutlass.Constexpr[int]) -> Uint32:
    """Bits of the largest magnitude in a group of 16-bit floats held by `lanes` neighbours."""
    pairs = cute.recast_tensor(rX, Uint32)
    amax = pairs[0] & 0x7FFF7FFF
    for i in cutlass.range_constexpr(1, cute.size(pairs)):
        amax = max_u16x2(amax, pairs[i] & 0x7FFF7FFF)
    for i in cutlass.range_constexpr(lanes.bit_length() - 1):
        amax = max_u16x2(amax, cute.arch.shuffle_sync_bfly(amax, offset=1 << i))
    if const_expr(rX.element_type is Float16):
        half = Uint16(cutlass.max(amax & 0xFFFF, amax >> 16))
        return Float32(half.bitcast(Float16)).bitcast(Uint32)
    return cutlass.max(amax << 16, amax & Uint32(0xFFFF0000))


@cute.jit
def widen(rX: cute.Tensor) -> cute.Tensor:
    """The registers of `rX` as float32, exact."""
    rY = cute.make_rmem_tensor(rX.shape, Float32)
    if const_expr(rX.element_type is BFloat16):
        # Two shifts or masks a pair; converting each half alone first moves it to the low half.
        pairs = cute.recast_tensor(rX, Uint32)
        bits = cute.recast_tensor(rY, Uint32)
        for i in cutlass.range_constexpr(cute.size(pairs)):
            bits[2 * i] = pairs[i] << 16
            bits[2 * i + 1] = pairs[i] & Uint32(0xFFFF0000)
    else:
        rY.store(rX.load().to(Float32))
    return rY


@cute.jit
def is_finite(amax: Uint32) -> Boolean:
    """Whether the group of this amax holds neither NaN nor Inf."""
    return amax < Uint32(FLOAT32_INFINITY)


@cute.jit
def ue8m0_exponent(amax: Uint32, min_exponent: Int32) -> Int32:
    """Biased exponent of the smallest power of two that is at least amax / 448.

    Adding the largest mantissa less that of 448 carries into the exponent exactly where the
    mantissa of amax is above that of 448. 255, the UE8M0 NaN, where amax is not finite.
    """
    carried = Int32((amax + Uint32(MANTISSA_MASK - E4M3_MAX_MANTISSA)) >> MANTISSA_BITS)
    exponent = cutlass.max(carried - E4M3_MAX_EXPONENT, min_exponent)
    return exponent if is_finite(amax) else Int32(UE8M0_NAN)


@cute.jit
def power_of_two(exponent: Int32) -> Float32:
    """The scale 2^(exponent - 127), for exponents from 1; NaN for the UE8M0 NaN."""
    bits = exponent << MANTISSA_BITS
    bits = Int32(FLOAT32_NAN) if exponent == UE8M0_NAN else bits
    return bits.bitcast(Float32)


@cute.jit
def exact_reciprocal(exponent: Int32) -> Float32:
    """1 / 2^(exponent - 127), exact for every exponent; NaN for the UE8M0 NaN."""
    bits = (UE8M0_MAX - exponent) << MANTISSA_BITS
    bits = Int32(FLOAT32_NAN) if exponent == UE8M0_NAN else bits
    return bits.bitcast(Float32)


@cute.jit
def float32_scale(amax: Uint32, min_scale: Float32, reciprocal: cutlass.Constexpr[bool]) -> Float32:
    """max(amax / 448, min_scale), NaN where amax is not finite.

    The quotient has IEEE rounding; with `reciprocal` it is amax times the rounded 1 / 448.
    """
    scale = amax.bitcast(Float32)
    scale = scale * (1.0 / E4M3_MAX) if const_expr(reciprocal) else scale / E4M3_MAX
    scale = cutlass.max(scale, min_scale)
    return scale if is_finite(amax) else Uint32(FLOAT32_NAN).bitcast(Float32)
