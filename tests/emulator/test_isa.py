"""Instructions against other ways to compute them: torch, rational arithmetic, plain integers."""

import math
import struct
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cute_quant.emulator import floats, isa
from tests.emulator import probes
from tests.exact import exact_e4m3

ALL_16 = np.arange(1 << 16, dtype=np.uint16)
WORDS = probes.words("isa", 1 << 16)
words = st.integers(0, 2**32 - 1).map(lambda w: w & 0xFFFFFFFF)


def compute(opcode: str, *operands: np.ndarray) -> np.ndarray:
    operation = isa.OPERATIONS[opcode]
    typed = [
        np.atleast_1d(o).view(isa.TYPES[t].dtype)
        for o, t in zip(operands, operation.operands, strict=True)
    ]
    with np.errstate(all="ignore"):
        return operation.compute(*typed)


def value(word: int) -> float:
    return struct.unpack("<f", struct.pack("<I", word))[0]


def rounded(exact: Fraction, negative_zero: bool = False) -> int:
    """The f32 pattern of a rational, by search among its neighbours."""
    if exact == 0:
        return 0x80000000 if negative_zero else 0
    sign, magnitude = (0x80000000, -exact) if exact < 0 else (0, exact)
    low, high = 0, 0x7F7FFFFF
    while low < high:  # the largest pattern not above
        middle = (low + high + 1) // 2
        low, high = (middle, high) if Fraction(value(middle)) <= magnitude else (low, middle - 1)
    below = Fraction(value(low))
    unit = Fraction(2) ** (max(low >> 23, 1) - 150)
    above = below + unit
    if magnitude - below > above - magnitude or (
        magnitude - below == above - magnitude and low & 1
    ):
        low += 1
    return sign | low


finite = words.filter(lambda w: w & 0x7F800000 != 0x7F800000)
# Exponents near each other, so that sums cancel and round.
near = st.builds(lambda w, e: w & 0x807FFFFF | e << 23, words, st.integers(100, 150))
tiny = st.builds(lambda w, e: w & 0x807FFFFF | e << 23, words, st.integers(0, 30))
numbers = st.one_of(finite, near, tiny)


def bits(result: np.ndarray) -> int:
    return int(result.view(np.uint32)[0])


def word(w: int) -> np.ndarray:
    return np.array([w], np.uint32)


@given(numbers, numbers, numbers)
@settings(max_examples=500, deadline=None)
def test_fma_is_rounded_once(a, b, c):
    x, y, z = (Fraction(value(w)) for w in (a, b, c))
    zero_signs = [a >> 31 ^ b >> 31, c >> 31]
    expected = rounded(x * y + z, all(zero_signs))
    assert bits(compute("fma.rn.f32", word(a), word(b), word(c))) == expected
    pair = compute("fma.rn.f32x2", *(np.array([w, 0], np.uint32) for w in (a, b, c)))
    assert bits(pair) == expected


@given(numbers, numbers)
@settings(max_examples=300, deadline=None)
def test_mul_add_div_round_to_nearest_even(a, b):
    x, y = Fraction(value(a)), Fraction(value(b))
    sign = bool((a ^ b) >> 31)
    assert bits(compute("mul.f32", word(a), word(b))) == rounded(x * y, sign)
    assert bits(compute("add.f32", word(a), word(b))) == rounded(x + y, a >> 31 & b >> 31)
    assert bits(compute("sub.f32", word(a), word(b))) == rounded(x - y, a >> 31 & ~b >> 31 & 1)
    if y:
        assert bits(compute("div.rn.f32", word(a), word(b))) == rounded(x / y, sign)
        assert bits(compute("rcp.rn.f32", word(b))) == rounded(1 / y)


@given(numbers, st.integers(0, 2**16 - 1), st.integers(0, 2**16 - 1))
@settings(max_examples=300, deadline=None)
def test_mixed_fma_widens_exactly(c, a, b):
    a, b = (h & ~0x100 if h & 0x7F80 == 0x7F80 else h for h in (a, b))
    halves = [np.array([h], np.uint16) for h in (a, b)]
    wide = compute("fma.rn.f32", word(a << 16), word(b << 16), word(c))
    assert bits(compute("fma.rn.f32.bf16", *halves, word(c))) == bits(wide)


def test_widening_with_mixed_fma():
    """The sum x · m + (-0.0), as kernels use it, is the f32 product with the sign of zero kept."""
    m = np.full(1 << 16, 0x3F80, np.uint16)
    result = compute("fma.rn.f32.bf16", ALL_16, m, np.full(1 << 16, 0x80000000, np.uint32))
    expected = ALL_16.astype(np.uint32) << np.uint32(16)
    is_nan = ALL_16 & 0x7FFF > 0x7F80
    assert (result.view(np.uint32)[~is_nan] == expected[~is_nan]).all()
    assert (result.view(np.uint32)[is_nan] == 0x7FFFFFFF).all()


@pytest.mark.parametrize(
    ("opcode", "dtype"), [("cvt.f32.f16", torch.float16), ("cvt.f32.bf16", torch.bfloat16)]
)
def test_widening(opcode, dtype):
    expected = torch.from_numpy(ALL_16.view(np.int16)).view(dtype).float().numpy()
    np.testing.assert_array_equal(compute(opcode, ALL_16), expected)


@pytest.mark.parametrize(
    ("t", "dtype", "nan"), [("f16", torch.float16, 0x7FFF), ("bf16", torch.bfloat16, 0x7FFF)]
)
def test_narrowing(t, dtype, nan):
    """All upper halves with random lower ones, and ties."""
    upper = ALL_16.astype(np.uint32) << np.uint32(16)
    for lower in (WORDS & 0xFFFF, 0x8000, 0x1000, 0x7FFF, 0x8001):
        source = upper | np.asarray(lower, np.uint32)
        tensor = torch.from_numpy(source.view(np.float32).copy())
        expected = tensor.to(dtype).view(torch.int16).numpy().view(np.uint16)
        expected = np.where(np.isnan(source.view(np.float32)), nan, expected)
        np.testing.assert_array_equal(compute(f"cvt.rn.{t}.f32", source), expected)


@pytest.mark.parametrize(
    ("t", "dtype", "largest"),
    [("e4m3x2", torch.float8_e4m3fn, 0x7E), ("e5m2x2", torch.float8_e5m2, 0x7B)],
)
def test_conversion_to_8_bits(t, dtype, largest):
    upper = ALL_16.astype(np.uint32) << np.uint32(16)
    for lower in (0, WORDS & 0xFFFF, 0xFFFF, 1):
        source = upper | np.asarray(lower, np.uint32)
        values = torch.from_numpy(source.view(np.float32).copy())
        limit = torch.finfo(dtype).max
        expected = values.clamp(-limit, limit).to(dtype).view(torch.uint8).numpy()
        expected = np.where(np.isnan(values.numpy()), 0x7F, expected)
        result = compute(f"cvt.rn.satfinite.{t}.f32", source, np.roll(source, 1))
        np.testing.assert_array_equal(result >> 8, expected)
        np.testing.assert_array_equal(result & 0xFF, np.roll(expected, 1))
    assert (result[np.isposinf(values.numpy())] >> 8 == largest).all()


@given(finite)
@settings(max_examples=300, deadline=None)
def test_e4m3_is_the_nearest(w):
    """To a value between two of e4m3, or beyond the last."""
    w = w & 0x83FFFFFF | 0x3C000000  # magnitudes around those of e4m3
    result = int(compute("cvt.rn.satfinite.e4m3x2.f32", word(w), word(0))[0]) >> 8
    sign = 0x80 if math.copysign(1.0, value(w)) < 0 else 0
    assert result == sign | exact_e4m3(abs(Fraction(value(w))))


def test_8_bits_to_f16():
    codes = np.arange(256, dtype=np.uint16)
    for t, dtype in (("e4m3x2", torch.float8_e4m3fn), ("e5m2x2", torch.float8_e5m2)):
        lower = compute(f"cvt.rn.f16x2.{t}", codes) & 0xFFFF
        expected = torch.from_numpy(codes.astype(np.uint8)).view(dtype).half()
        expected = torch.where(expected.isnan(), torch.nan, expected).numpy()
        np.testing.assert_array_equal(lower.astype(np.uint16).view(np.float16), expected)
        assert (lower[np.isnan(expected)] == 0x7FFF).all()


@pytest.mark.parametrize("t", ["f16", "bf16"])
@pytest.mark.parametrize("o", ["add", "sub", "mul"])
def test_halves_round_as_torch(t, o):
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[t]
    a, b = (
        torch.from_numpy(h.view(np.int16).copy()).view(dtype)
        for h in (ALL_16, (WORDS & 0xFFFF).astype(np.uint16))
    )
    exact = getattr(torch, o)(a.double(), b.double()).to(dtype)
    expected = exact.view(torch.int16).numpy().view(np.uint16)
    expected = np.where(exact.isnan().numpy(), 0x7FFF, expected)
    result = compute(f"{o}.{t}", ALL_16, (WORDS & 0xFFFF).astype(np.uint16))
    np.testing.assert_array_equal(result, expected)


def test_nan_is_canonical():
    for opcode, count in (("add.f32", 2), ("mul.f32", 2), ("fma.rn.f32", 3), ("rcp.rn.f32", 1)):
        result = compute(opcode, *[word(0xFFC12345)] * count)
        assert bits(result) == floats.F32.nan


def test_max_and_min_of_floats():
    nan, zero, minus = 0x7FC00001, 0, 0x80000000
    one = 0x3F800000
    for opcode, a, b, expected in (
        ("max.f32", nan, one, one),
        ("max.f32", one, nan, one),
        ("max.f32", nan, nan, 0x7FFFFFFF),
        ("max.f32", minus, zero, zero),
        ("max.f32", zero, minus, zero),
        ("min.f32", zero, minus, minus),
        ("min.f32", nan, one, one),
        ("max.NaN.f32", nan, one, 0x7FFFFFFF),
        ("min.NaN.f32", one, nan, 0x7FFFFFFF),
        ("max.NaN.f32", minus, one, one),
    ):
        assert bits(compute(opcode, word(a), word(b))) == expected, (opcode, hex(a), hex(b))


@given(words, words, words)
@settings(max_examples=200, deadline=None)
def test_integers(a, b, c):
    mask = 0xFFFFFFFF
    signed = [w - 2**32 if w >> 31 else w for w in (a, b)]
    x, y, z = word(a), word(b), word(c)
    assert bits(compute("add.s32", x, y)) == (a + b) & mask
    assert bits(compute("mad.lo.s32", x, y, z)) == (a * b + c) & mask
    assert int(compute("mul.wide.s32", x, y)[0]) == signed[0] * signed[1]
    assert int(compute("mul.wide.u32", x, y)[0]) == a * b
    assert bits(compute("mul.hi.u32", x, y)) == a * b >> 32
    assert bits(compute("mul.hi.s32", x, y)) == signed[0] * signed[1] >> 32 & mask
    assert bits(compute("shl.b32", x, y)) == (a << b if b < 32 else 0) & mask
    assert bits(compute("shr.u32", x, y)) == (a >> b if b < 32 else 0)
    assert bits(compute("shr.s32", x, y)) == signed[0] >> min(b, 31) & mask
    n = b & 31
    assert bits(compute("shl.b32", x, word(n))) == a << n & mask
    assert bits(compute("shf.l.wrap.b32", x, y, z)) == ((b << 32 | a) << (c & 31) >> 32) & mask
    assert bits(compute("shf.r.wrap.b32", x, y, z)) == (b << 32 | a) >> (c & 31) & mask
    assert bits(compute("popc.b32", x)) == a.bit_count()
    assert bits(compute("lop3.b32", x, y, z, word(0xE8))) == a & b | a & c | b & c
    assert bits(compute("lop3.b32", x, y, z, word(0xCA))) == (a & b | ~a & c) & mask
    halves = [max(p >> s & 0xFFFF, q >> s & 0xFFFF) for p, q in ((a, b),) for s in (0, 16)]
    assert compute("max.u16x2", x, y).tolist() == halves
    position, length = b & 0xFF, c & 0xFF
    assert bits(compute("bfe.u32", x, y, z)) == a >> position & (1 << length) - 1
    memory = (b << 32 | a).to_bytes(8, "little")
    selected = bytes(memory[c >> 4 * i & 7] for i in range(4))
    assert bits(compute("prmt.b32", x, y, word(c & 0x7777))) == int.from_bytes(selected, "little")


@given(words, words, words)
@settings(max_examples=200, deadline=None)
def test_integer_division_and_fields(a, b, c):
    x, y = word(a), word(b)
    assert bits(compute("div.u32", x, word(b or 1))) == a // (b or 1)
    assert bits(compute("rem.u32", x, word(b or 1))) == a % (b or 1)
    position, length = c & 31, b & 31
    mask = ((1 << length) - 1 << position) & 0xFFFFFFFF
    result = bits(compute("bfi.b32", x, y, word(position), word(length)))
    assert result == b & ~mask | a << position & mask


@given(words, words)
@settings(max_examples=300, deadline=None)
def test_max_of_magnitudes(a, b):
    result = bits(compute("max.NaN.xorsign.abs.f32", word(a), word(b)))
    magnitudes = a & 0x7FFFFFFF, b & 0x7FFFFFFF
    if max(magnitudes) > 0x7F800000:
        assert result == 0x7FFFFFFF
    else:
        assert result == max(magnitudes) | (a ^ b) & 0x80000000


@given(words, words, words)
@settings(max_examples=500, deadline=None)
def test_fma_rounded_down(a, b, c):
    """Exact by fractions: no float32 lies between the result and the sum."""
    operands = [value(v) for v in (a, b, c)]
    result = value(bits(compute("fma.rm.f32", word(a), word(b), word(c))))
    if not all(map(math.isfinite, operands)):
        return
    exact = Fraction(operands[0]) * Fraction(operands[1]) + Fraction(operands[2])
    if math.isfinite(result):
        with np.errstate(over="ignore"):
            above = np.nextafter(np.float32(result), np.float32(np.inf))
        assert Fraction(result) <= exact
        assert np.isinf(above) or exact < Fraction(float(above))
    else:
        assert result < 0 and exact < Fraction(-float(np.finfo(np.float32).max))


def test_fma_of_zeros_and_saturated():
    zero, minus, one = word(0), word(0x80000000), word(0x3F800000)
    for a, b, c, expected in (
        (one, zero, minus, 0x80000000),
        (one, zero, zero, 0),
        (one, one, word(0xBF800000), 0x80000000),
    ):
        assert bits(compute("fma.rm.f32", a, b, c)) == expected
    for a, expected in ((0x3F000000, 0x3F000000), (0x40000000, 0x3F800000), (0xBF800000, 0)):
        assert bits(compute("fma.rn.sat.f32", word(a), one, zero)) == expected
    assert bits(compute("fma.rn.sat.f32", word(0x7FC00000), one, zero)) == 0


def test_rounding_to_integers():
    values = np.array([0.5, 1.5, -2.5, 126.5, np.nan, np.inf, -np.inf, 3e9, -0.0], np.float32)
    result = compute("cvt.rni.s32.f32", values)
    assert result.tolist() == [0, 2, -2, 126, 0, 2**31 - 1, -(2**31), 2**31 - 1, 0]
    truncated = compute("cvt.rzi.s32.f32", values)
    assert truncated.tolist() == [0, 1, -2, 126, 0, 2**31 - 1, -(2**31), 2**31 - 1, 0]
    upper, lower = np.array([300, -1, 5], np.int32), np.array([-300, 127, -128], np.int32)
    packed = compute("cvt.pack.sat.s8.s32.b32", upper, lower, np.full(3, 0xABCD1234, np.uint32))
    assert packed.tolist() == [0x12347F80, 0x1234FF7F, 0x12340580]


def test_comparisons_with_nan():
    nan, one = word(0x7FC00000), word(0x3F800000)
    for name, ordered, unordered in (
        ("eq", True, False),
        ("ne", False, False),
        ("lt", False, False),
        ("le", True, False),
        ("equ", True, True),
        ("neu", False, True),
        ("ltu", False, True),
        ("geu", True, True),
        ("num", True, False),
        ("nan", False, True),
    ):
        assert compute(f"setp.{name}.f32", one, one)[0] == ordered, name
        assert compute(f"setp.{name}.f32", nan, one)[0] == unordered, name


NAN, INFINITY, MINUS = 0x7FFFFFFF, 0x7F800000, 0x80000000
ONE, SMALLEST_NORMAL, LARGEST_SUBNORMAL = 0x3F800000, 0x800000, 0x7FFFFF


def test_exponential():
    """PTX ISA 9.7.3 "ex2": of special operands, and flushing of operands and results."""
    for a, expected in (
        (0, ONE),
        (MINUS, ONE),
        (LARGEST_SUBNORMAL, ONE),
        (MINUS | LARGEST_SUBNORMAL, ONE),
        (INFINITY, INFINITY),
        (MINUS | INFINITY, 0),
        (0x7FC00001, NAN),
        (0x43000000, INFINITY),  # 128
        (0x42FE0000, 0x7F000000),  # 127
        (0xC2FC0000, SMALLEST_NORMAL),  # -126
        (0xC2FC0001, 0),
        (0xC3150000, 0),  # -149, of which the result is subnormal
        (0x3F000000, 0x3FB504F3),  # 0.5
    ):
        assert bits(compute("ex2.approx.ftz.f32", word(a))) == expected, hex(a)


def test_reciprocal_root():
    """PTX ISA 9.7.3 "rsqrt": of special operands, and flushing of operands."""
    for a, expected in (
        (0, INFINITY),
        (MINUS, MINUS | INFINITY),
        (LARGEST_SUBNORMAL, INFINITY),
        (MINUS | LARGEST_SUBNORMAL, MINUS | INFINITY),
        (INFINITY, 0),
        (MINUS | INFINITY, NAN),
        (MINUS | ONE, NAN),
        (0xFFC00001, NAN),
        (SMALLEST_NORMAL, 0x5F000000),  # 2^63
        (0x7F7FFFFF, 0x1F800000),  # 2^-64
        (0x40000000, 0x3F3504F3),
    ):
        assert bits(compute("rsqrt.approx.ftz.f32", word(a))) == expected, hex(a)


def test_reciprocal():
    """PTX ISA 9.7.3 "rcp": of special operands, and flushing of operands and results."""
    for a, expected in (
        (0, INFINITY),
        (MINUS, MINUS | INFINITY),
        (MINUS | LARGEST_SUBNORMAL, MINUS | INFINITY),
        (INFINITY, 0),
        (MINUS | INFINITY, MINUS),
        (0x7F800001, NAN),
        (0x7E800000, SMALLEST_NORMAL),  # 2^126
        (0xFE800001, MINUS),
    ):
        assert bits(compute("rcp.approx.ftz.f32", word(a))) == expected, hex(a)


def test_reciprocals_of_any_array():
    """Reversed, and of memory that must not be written."""
    opcode = "rcp.approx.ftz.f32"
    expected = compute(opcode, WORDS).view(np.uint32)
    assert np.array_equal(compute(opcode, WORDS[::-1])[::-1].view(np.uint32), expected)
    constant = WORDS.copy()
    constant.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(compute(opcode, constant).view(np.uint32), expected)


@given(words)
@settings(max_examples=300, deadline=None)
def test_approximations_are_exact_and_rounded(w):
    """By rational arithmetic: of the neighbours of a result, one lies on the other side."""
    a = w & 0x7FFFFF | 0x3F000000 + (w >> 23 & 3) * 0x800000
    for sign in (0, MINUS):
        result = value(bits(compute("ex2.approx.ftz.f32", word(a | sign))))
        exponent = Fraction(value(a | sign))
        assert abs(Fraction(result) / Fraction(2.0 ** float(exponent)) - 1) < Fraction(1, 2**24)
    root = bits(compute("rsqrt.approx.ftz.f32", word(a)))
    for low, high in ((root - 1, root), (root, root + 1)):
        middle = (Fraction(value(low)) + Fraction(value(high))) / 2
        above = middle * middle * Fraction(value(a)) > 1
        assert above == (low == root)


def test_neg():
    for a, expected in (
        (0, MINUS),
        (MINUS, 0),
        (1, MINUS | 1),  # subnormal numbers stay
        (INFINITY, MINUS | INFINITY),
        (MINUS | ONE, ONE),
        (0xFFC12345, NAN),
    ):
        assert bits(compute("neg.f32", word(a))) == expected, hex(a)


@given(words, words, words, words, words, words)
@settings(max_examples=200, deadline=None)
def test_pairs_are_two_scalars(a, b, c, d, e, f):
    pairs = [np.array(pair, np.uint32) for pair in ((a, b), (c, d), (e, f))]
    opcodes = [(f"{o}{r}.f32", 2) for o in ("add", "sub", "mul") for r in ("", ".rn")]
    for opcode, count in (*opcodes, ("fma.rn.f32", 3)):
        expected = [bits(compute(opcode, *(p[i] for p in pairs[:count]))) for i in (0, 1)]
        assert compute(f"{opcode}x2", *pairs[:count]).view(np.uint32).tolist() == expected, opcode
