"""Values in registers: element types, widening to float32, products, encoding to 8 and 4 bits."""

import cutlass
import cutlass.cute as cute
import torch
from cutlass import (
    BFloat16,
    Boolean,
    Float4E2M1FNx2,
    Float16,
    Float32,
    Int32,
    Uint8,
    Uint16,
    Uint32,
    const_expr,
)

from cute_quant.contract.dtypes import (
    BELOW_HALF,
    E2M1_MAX,
    FLOAT32_BIAS,
    FLOAT32_MANTISSA_BITS,
    INPUT_DTYPES,
    VALUE_TYPES,
)
from cute_quant.contract.formats import Format
from cute_quant.kernels import ptx

ELEMENT_TYPES = {
    torch.bfloat16: cutlass.BFloat16,
    torch.float16: cutlass.Float16,
    torch.float32: cutlass.Float32,
    torch.float8_e4m3fn: cutlass.Float8E4M3FN,
    torch.float8_e5m2: cutlass.Float8E5M2,
    torch.int8: cutlass.Int8,
    torch.float4_e2m1fn_x2: Float4E2M1FNx2,
    torch.float8_e8m0fnu: cutlass.Float8E8M0FNU,
    torch.int32: cutlass.Int32,
}
"""CuTe's type of the elements of a torch tensor."""

DTYPES = {element: dtype for dtype, element in ELEMENT_TYPES.items()}
"""torch's dtype of CuTe's type."""

INPUT_TYPES = {ELEMENT_TYPES[dtype]: dtype for dtype in INPUT_DTYPES}
"""Types that can be quantized, and torch's dtypes of them."""


E2M1_PER_WORD = 8
"""Codes of e2m1 in a register."""
_INTEGERS = 2**23
"""The least float32 from which on there are only integers."""
_E2M1_OFFSETS = sum((0x4B000000 << 1) << 4 * i for i in range(E2M1_PER_WORD)) % 2**32
"""The bits of `_INTEGERS` in each code, as they add up in a word."""
_BF16_ONE = 0x3F80
_BF16_INTEGERS = 2**7
"""The least bfloat16 from which on there are only integers."""
_LAST_SLOPE = 0.298828125
"""A bfloat16 below 0.3: times 5 it is at most 1.5, and more for every bfloat16 above 5."""
BYTES = 2**32 // 255
"""The factor that takes a byte to a word of four of it."""
_EVEN_BYTES, _ODD_BYTES = 0x6420, 0x7531
"""Bytes of two registers."""


def value_type_of(fmt: Format) -> type[cutlass.Numeric]:
    """Return the element type of the values of a format."""
    return ELEMENT_TYPES[fmt.values]


def scale_type_of(fmt: Format) -> type[cutlass.Numeric]:
    """Return the element type of the tensor of scales of a format: int32 where they are packed."""
    return ELEMENT_TYPES[fmt.sf_dtype]


def values_per_element(dtype: type[cutlass.Numeric]) -> int:
    """Return how many values an element of a type has."""
    return 2 if dtype is Float4E2M1FNx2 else 1


def registers(x: cute.TensorSSA) -> cute.Tensor:
    """Return a vector of values as registers of a thread, of its shape and type."""
    rX = cute.make_rmem_tensor(x.shape, x.dtype)
    rX.store(x)
    return rX


def zeros(values: int, dtype: type[cutlass.Numeric]) -> cute.Tensor:
    """Return registers of a thread, (values,), that hold 0. They fill whole 32-bit registers."""
    tXrX = cute.make_rmem_tensor(values, dtype)
    cute.recast_tensor(tXrX, Uint32).fill(0)
    return tXrX


@cute.jit
def widen(rX: cute.Tensor) -> cute.Tensor:
    """Return a thread's values, (values,), as float32; exact."""
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


@cute.jit
def widen_and_add(rX: cute.Tensor, addend: Float32) -> cute.Tensor:
    """Return the sums of a thread's values, (values,), and a float32, rounded once."""
    if const_expr(rX.element_type is BFloat16 and ptx.target().mixed_fma):
        rY = cute.make_rmem_tensor(rX.shape, Float32)
        halves = cute.recast_tensor(rX, Uint16)
        for i in cutlass.range_constexpr(cute.size(rX)):
            rY[i] = ptx.fma_bf16_to_f32(halves[i], Uint16(_BF16_ONE), addend)
        return rY
    rY = widen(rX)
    rY.store(rY.load() + addend)
    return rY


def round_to(x: cute.TensorSSA, dtype: type[cutlass.Numeric]) -> cute.TensorSSA:
    """Return float32 rounded to the precision of a dtype."""
    return x if dtype is Float32 else widen(registers(x.to(dtype))).load()


@cute.jit
def multiply(rX: cute.Tensor, multiplier: Float32) -> cute.Tensor:
    """Return the products of values and a multiplier as float32."""
    rY = widen(rX)
    rY.store(rY.load() * multiplier)
    return rY


@cute.jit
def divide(rX: cute.Tensor, divisor: Float32) -> cute.Tensor:
    """Return the quotients of values and a divisor as float32, with IEEE rounding."""
    rY = widen(rX)
    for i in cutlass.range_constexpr(cute.size(rY)):
        rY[i] = rY[i] / divisor
    return rY


@cute.jit
def divide_by(rX: cute.Tensor, divisor: Float32, inverse: Float32) -> cute.Tensor:
    """Return the quotients of values and a divisor as float32, with IEEE rounding.

    By Markstein's theorem, for a normal divisor, its rounded `inverse`, and quotients that are
    normal; smaller ones are not exact. A zero keeps its sign, which the remainder would lose.
    """
    rY = widen(rX)
    for i in cutlass.range_constexpr(cute.size(rY)):
        estimate = rY[i] * inverse
        remainder = cute.math.fma(-divisor, estimate, rY[i])
        quotient = cute.math.fma(remainder, inverse, estimate)
        sign = rY[i].bitcast(Uint32) & Uint32(0x80000000)
        rY[i] = (quotient.bitcast(Uint32) | sign).bitcast(Float32)
    return rY


@cute.jit
def add_half(rX: cute.Tensor):
    """Move float32 away from zero by a half, or the number below it where that rounds up."""
    for i in cutlass.range_constexpr(cute.size(rX)):
        bits = rX[i].bitcast(Uint32)
        magnitude = (bits & Uint32(0x7FFFFFFF)).bitcast(Float32) + Float32(BELOW_HALF)
        rX[i] = (magnitude.bitcast(Uint32) | bits & Uint32(0x80000000)).bitcast(Float32)


@cute.jit
def multiply_power_of_two(rX: cute.Tensor, multiplier: Float32) -> cute.Tensor:
    """Return the products of values and a power of two, or NaN, as float32.

    Such a multiplier is a bfloat16 too, the upper half of the float32. So are its products with
    bfloat16, but for those below bfloat16's smallest value, which encode to 0 either way.
    """
    if const_expr(rX.element_type is not BFloat16):
        return multiply(rX, multiplier)
    bits = multiplier.bitcast(Uint32)
    if const_expr(ptx.target().mixed_fma):
        rY = cute.make_rmem_tensor(rX.shape, Float32)
        halves = cute.recast_tensor(rX, Uint16)
        for i in cutlass.range_constexpr(cute.size(rX)):
            rY[i] = ptx.mul_bf16_to_f32(halves[i], Uint16(bits >> 16))
        return rY
    rY = cute.make_rmem_tensor_like(rX)
    pairs, products = cute.recast_tensor(rX, Uint32), cute.recast_tensor(rY, Uint32)
    factors = bits | bits >> 16
    for i in cutlass.range_constexpr(cute.size(pairs)):
        products[i] = ptx.mul_bf16x2(pairs[i], factors)
    return widen(rY)


@cute.jit
def multiply_columns(
    rX: cute.Tensor, multipliers: cute.Tensor, power_of_two: cutlass.Constexpr[bool]
) -> cute.Tensor:
    """Return the products of values and multipliers of their own as float32, (values,).

    Powers of two are taken as `multiply_power_of_two` does.
    """
    if const_expr(not power_of_two or rX.element_type is not BFloat16):
        rY = widen(rX)
        rY.store(rY.load() * multipliers.load())
        return rY
    bits = cute.recast_tensor(multipliers, Uint32)
    if const_expr(ptx.target().mixed_fma):
        rY = cute.make_rmem_tensor(rX.shape, Float32)
        halves = cute.recast_tensor(rX, Uint16)
        for i in cutlass.range_constexpr(cute.size(rX)):
            rY[i] = ptx.mul_bf16_to_f32(halves[i], Uint16(bits[i] >> 16))
        return rY
    rY = cute.make_rmem_tensor_like(rX)
    pairs, products = cute.recast_tensor(rX, Uint32), cute.recast_tensor(rY, Uint32)
    for i in cutlass.range_constexpr(cute.size(pairs)):
        # The low half of a NaN is not 0.
        factors = bits[2 * i + 1] & Uint32(0xFFFF0000) | bits[2 * i] >> 16
        products[i] = ptx.mul_bf16x2(pairs[i], factors)
    return widen(rY)


@cute.jit
def encode(
    rX: cute.Tensor,
    dtype: cutlass.Constexpr[type],
    truncates: cutlass.Constexpr[bool] = False,
) -> cute.Tensor:
    """Return float32 values in a dtype, rounded to nearest even and saturated.

    Integers may be rounded towards zero. Of e2m1 two share a byte: (values / 2,).
    """
    if const_expr(dtype is Float4E2M1FNx2):
        return encode_e2m1(rX)
    rQ = cute.make_rmem_tensor(rX.shape, dtype)
    if const_expr(dtype is cutlass.Int8):
        words = cute.recast_tensor(rQ, Uint32)
        for i in cutlass.range_constexpr(cute.size(words)):
            upper = ptx.pack_int8(rX[4 * i + 2], rX[4 * i + 3], Uint32(0), truncates)
            words[i] = ptx.pack_int8(rX[4 * i], rX[4 * i + 1], upper, truncates)
    else:
        rQ.store(rX.load().to(dtype))
    return rQ


@cute.jit
def encode_stochastically(
    rX: cute.Tensor, random: list[Uint32], dtype: cutlass.Constexpr[type], number: Boolean
) -> cute.Tensor:
    """Return float32 values in a dtype, rounded up or down by a random word each, saturated.

    The bits of a float32 count in steps of its last place, also from one power of two to the next.
    Those of a value that is normal in the dtype are the code and its fraction, but for the bias of
    the exponent. Below, those of the sum with the smallest normal value are, which has steps of
    constant size, less one in the exponent. Of the two the larger one counts: they meet there. The
    carry out of fraction and random bits rounds up, into the exponent too.

    Args:
        rX: (values,), float32.
        random: a word for each value, of which the first bits are used.
        dtype: of the codes; of e2m1 two share a byte: (values / 2,).
        number: whether the scale of the values is no NaN; they are NaN if it is.
    """
    facts = VALUE_TYPES[DTYPES[dtype]]
    code_bits, fraction = 8 // facts.per_byte, facts.fraction_bits
    per_word = 32 // code_bits
    last_bits = sum(1 << code_bits * i for i in range(per_word))
    signs = last_bits << code_bits - 1
    # What the exponents of a float32 have more than those of the dtype, in a word of codes.
    bias = (facts.min_exponent + FLOAT32_BIAS - 1) << facts.mantissa_bits
    nan_word = Uint32(facts.nan_byte * BYTES if facts.per_byte == 1 else 0)
    rQ = cute.make_rmem_tensor(
        cute.size(rX) // facts.per_byte, Uint8 if facts.per_byte > 1 else dtype
    )
    words = cute.recast_tensor(rQ, Uint32)
    for i in cutlass.range_constexpr(cute.size(words)):
        word = Uint32(0)
        for j in cutlass.range_constexpr(per_word - 1, -1, -1):
            value, drawn = rX[per_word * i + j], random[per_word * i + j]
            bits = value.bitcast(Uint32)
            magnitude = (bits & Uint32(0x7FFFFFFF)).bitcast(Float32)
            magnitude = cute.arch.fmin(magnitude, Float32(facts.max))
            total = magnitude + Float32(2.0**facts.min_exponent)
            below = total.bitcast(Int32) - Int32(1 << FLOAT32_MANTISSA_BITS)
            steps = Uint32(cutlass.max(magnitude.bitcast(Int32), below))
            code = (steps + (drawn >> 32 - fraction)) >> fraction
            # The sign below its code, since one shift of both registers takes it there.
            word = (word << code_bits) + (code << 1 | bits >> 31)
        word = word - Uint32((bias << 1) * last_bits % 2**32)
        magnitudes, negative = word >> 1 & Uint32(~signs % 2**32), word & Uint32(last_bits)
        if const_expr(dtype is cutlass.Int8):
            # Two's complement: 128 plus or minus a magnitude, which no other byte feels.
            below = magnitudes & negative * Uint32(0x7F)
            word = (Uint32(signs) + (magnitudes ^ below) - below) ^ Uint32(signs)
        else:
            word = magnitudes | negative << code_bits - 1
        words[i] = word if number else nan_word
    return rQ


@cute.jit
def clear_unless(predicate: Boolean, rQ: cute.Tensor):
    """Make bytes, (values,), of a thread 0 where the predicate is false."""
    words = cute.recast_tensor(rQ, Uint32)
    for i in cutlass.range_constexpr(cute.size(words)):
        words[i] = words[i] if predicate else Uint32(0)


@cute.jit
def clear_bytes(masks: list[Uint32], rQ: cute.Tensor):
    """Make bytes, (values,), of a thread 0 where the bits of masks, one for each word, are."""
    words = cute.recast_tensor(rQ, Uint32)
    for i in cutlass.range_constexpr(cute.size(words)):
        words[i] = words[i] & masks[i]


@cute.jit
def put_nans(masks: list[Uint32], rQ: cute.Tensor):
    """Make bytes, (values,), of a thread NaN where the bits of masks, one for each word, are."""
    nan_word = Uint32(VALUE_TYPES[DTYPES[rQ.element_type]].nan_byte * BYTES)
    words = cute.recast_tensor(rQ, Uint32)
    for i in cutlass.range_constexpr(cute.size(words)):
        words[i] = words[i] & ~masks[i] | nan_word & masks[i]


@cute.jit
def products_e2m1(
    rX: cute.Tensor, multiplier: Float32, power_of_two: cutlass.Constexpr[bool]
) -> cute.Tensor:
    """Return the products of values and a multiplier as e2m1, (values / 2,) bytes.

    Powers of two are multipliers of the values' own group, and NaN where it is not finite: the
    products are below 8, or what they become is any.
    """
    if const_expr(not (power_of_two and rX.element_type is BFloat16)):
        return encode_e2m1(multiply(rX, multiplier))
    rQ = cute.make_rmem_tensor(cute.size(rX) // 2, Uint8)
    pairs, words = cute.recast_tensor(rX, Uint32), cute.recast_tensor(rQ, Uint32)
    bits = multiplier.bitcast(Uint32)
    factors = bits | bits >> 16
    e2m1 = ptx.e2m1_of_bf16x2 if const_expr(ptx.target().e2m1) else e2m1_of_small_pairs
    per_word = E2M1_PER_WORD // 2
    for i in cutlass.range_constexpr(cute.size(words)):
        products = [ptx.mul_bf16x2(pairs[per_word * i + j], factors) for j in range(per_word)]
        words[i] = e2m1(products)
    return rQ


@cute.jit
def encode_e2m1(rX: cute.Tensor) -> cute.Tensor:
    """Return float32 values as e2m1, (values / 2,) bytes, the earlier value in the low bits."""
    rQ = cute.make_rmem_tensor(cute.size(rX) // 2, Uint8)
    words = cute.recast_tensor(rQ, Uint32)
    e2m1 = ptx.e2m1_of_f32 if const_expr(ptx.target().e2m1) else e2m1_by_arithmetic
    for i in cutlass.range_constexpr(cute.size(words)):
        words[i] = e2m1([rX[E2M1_PER_WORD * i + j] for j in range(E2M1_PER_WORD)])
    return rQ


def e2m1_by_arithmetic(values: list[Float32]) -> Uint32:
    """Return eight float32 as e2m1, the first in the low bits.

    Codes count in steps of 0.5 up to 2, of 1 up to 4, and of 2 up to 6. A line of each slope is
    rounded by adding 2^23, which leaves integers, and the code is the least of the three: the line
    of its own range. It fills the low bits of the sum.
    """
    word = Uint32(0)
    for value in reversed(values):
        bits = value.bitcast(Uint32)
        magnitude = (bits & Uint32(0x7FFFFFFF)).bitcast(Float32)
        magnitude = cute.arch.fmin(magnitude, Float32(E2M1_MAX))
        steps = cute.math.fma(magnitude, Float32(2.0), Float32(_INTEGERS))
        steps = cute.arch.fmin(steps, magnitude + Float32(_INTEGERS + 2))
        coarse = cute.math.fma(magnitude, Float32(0.5), Float32(_INTEGERS + 4))
        code = cute.arch.fmin(steps, coarse).bitcast(Uint32)
        # The sign below its code, since one shift of both registers takes it there.
        word = word * 16 + (code << 1 | bits >> 31)
    word = word - Uint32(_E2M1_OFFSETS)
    return word >> 1 & Uint32(0x77777777) | word << 3 & Uint32(0x88888888)


def e2m1_of_small_pairs(pairs: list[Uint32]) -> Uint32:
    """Return four pairs of bfloat16 below 8 as e2m1, the first in the low bits.

    The lines of `e2m1_by_arithmetic`, but for the last, which is so flat that nothing has to be
    bounded: it goes through (5, 6.5), or just below, reaches 7.4 at 8, and is above the other two
    where these are right. A sum with 2^7 has no bits for less than 1.
    """

    def line(magnitudes: Uint32, slope: float, start: int) -> Uint32:
        return ptx.fma_bf16x2(magnitudes, _bf16_pair(slope), _bf16_pair(_BF16_INTEGERS + start))

    codes = []
    for pair in pairs:
        magnitudes = pair & Uint32(0x7FFF7FFF)
        code = ptx.min_bf16x2(line(magnitudes, 2.0, 0), line(magnitudes, 1.0, 2))
        codes.append(ptx.min_bf16x2(code, line(magnitudes, _LAST_SLOPE, 5)))
    fours = []
    for i in range(0, len(pairs), 2):
        # The low byte of each half has the code, the high byte the sign.
        four = ptx.select_bytes(codes[i], codes[i + 1], _EVEN_BYTES)
        signs = ptx.select_bytes(pairs[i], pairs[i + 1], _ODD_BYTES)
        fours.append(four | signs >> 4 & Uint32(0x08080808))
    return ptx.select_bytes(*fours, _EVEN_BYTES) | ptx.select_bytes(*fours, _ODD_BYTES) << 4


def _bf16_pair(value: float) -> Uint32:
    """Return a bfloat16 twice."""
    bits = torch.tensor(value, dtype=torch.bfloat16).view(torch.uint16).item()
    return Uint32(bits << 16 | bits)


@cute.jit
def round_to_e2m1(rX: cute.Tensor) -> cute.Tensor:
    """Return float32 values rounded to those of e2m1, without a code for them; NaN gives 6.

    Below 2 the values are multiples of 0.5, and of twice as much from each power of two on. A sum
    with 2^22 times that power has no bits for less.
    """
    rY = cute.make_rmem_tensor(rX.shape, Float32)
    for i in cutlass.range_constexpr(cute.size(rX)):
        bits = rX[i].bitcast(Uint32)
        magnitude = (bits & Uint32(0x7FFFFFFF)).bitcast(Float32)
        magnitude = cute.arch.fmin(magnitude, Float32(E2M1_MAX))
        power = (magnitude.bitcast(Uint32) & Uint32(0x7F800000)).bitcast(Float32)
        power = cute.arch.fmax(power, Float32(1.0))
        total = cute.math.fma(power, Float32(2.0**22), magnitude)
        rounded = cute.math.fma(power, Float32(-(2.0**22)), total)
        rY[i] = (rounded.bitcast(Uint32) | bits & Uint32(0x80000000)).bitcast(Float32)
    return rY


@cute.jit
def drop_signs_of_zeros(rQ: cute.Tensor):
    """Make 0 of each -0 among e2m1 in bytes, (values / 2,)."""
    words = cute.recast_tensor(rQ, Uint32)
    for i in cutlass.range_constexpr(cute.size(words)):
        word = words[i]
        nonzero = (word | word >> 1 | word >> 2) & Uint32(0x11111111)
        words[i] = word & (Uint32(0x77777777) | nonzero << 3)


@cute.jit
def drop_signs_of_zero_products(rX: cute.Tensor):
    """Make 0 of each -0 among float32, (values,). A sum with 0 would be fused with the product."""
    words = cute.recast_tensor(rX, Uint32)
    for i in cutlass.range_constexpr(cute.size(words)):
        words[i] = words[i] if words[i] != Uint32(0x80000000) else Uint32(0)


def decode(rQ: cute.Tensor, fmt: Format) -> cute.Tensor:
    """Return a thread's quantized values, (values,) or bytes of two, as float32, (values,)."""
    return decode_e2m1(rQ) if fmt.value_type.per_byte > 1 else widen(rQ)


@cute.jit
def decode_e2m1(rQ: cute.Tensor) -> cute.Tensor:
    """Return the float32 values, (2 bytes,), of e2m1 in bytes."""
    rX = cute.make_rmem_tensor(2 * cute.size(rQ), Float32)
    words = cute.recast_tensor(rQ, Uint32)
    for i in cutlass.range_constexpr(cute.size(words)):
        values = f32_of_e2m1(words[i])
        for j in cutlass.range_constexpr(E2M1_PER_WORD):
            rX[E2M1_PER_WORD * i + j] = values[j]
    return rX


def f32_of_e2m1(word: Uint32) -> list[Float32]:
    """Return the eight e2m1 of a word.

    Three bits of a code, at the place of the last exponent bit and of the first two of the mantissa
    of a float16, are the value times 2^-14: there and here the lowest exponent means subnormal.
    """
    pairs = range(E2M1_PER_WORD // 2)
    if ptx.target().e2m1:
        halves = [ptx.f16x2_of_e2m1(word, j) for j in pairs]
        return [f16.to(Float32) for pair in halves for f16 in halves_of(pair)]
    values = []
    for j in pairs:
        # The halves of a pair are four codes apart, so that a mask finds both.
        pair = word >> 4 * j
        bits = pair << 9 & Uint32(0x0E000E00) | pair << 12 & Uint32(0x80008000)
        values.append([f16.to(Float32) * Float32(2.0**14) for f16 in halves_of(bits)])
    low, high = zip(*values, strict=True)
    return [*low, *high]


def halves_of(pair: Uint32) -> tuple[Float16, Float16]:
    """Return the float16 in the low and the high half of a register."""
    return Uint16(pair).bitcast(Float16), Uint16(pair >> 16).bitcast(Float16)
