"""Results of each instruction, computed for all threads at once.

The table is keyed by whole opcodes, modifiers included: a spelling that is not in it is unknown,
so no modifier can be ignored by accident. Instructions that touch memory, other lanes or the flow
of control are the machine's.

Sections are those of NVIDIA's "Parallel Thread Execution ISA", version 9.0. A packed type such as
f32x2 reads a register as twice as many elements, low half first, so that most packed instructions
are their scalar selves. Where the document leaves bits open (payloads of NaN, the last bit of a
reciprocal), the H100 decides: `hardware.py` records it, `test_hardware.py` compares.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from cute_quant.contract.rcp_approx import rcp_approx
from cute_quant.emulator import floats

Array = np.ndarray
"""An element for each thread, or as many as a packed register has."""


Compute = Callable[..., Array]
"""Computes the result of an instruction from its operands."""


class Type(NamedTuple):
    """How an instruction reads a register (9.4): elements of `dtype` in `width` bits."""

    dtype: type
    width: int


TYPES = {"pred": Type(np.bool_, 1), "f32": Type(np.float32, 32)}
for _width, _signed, _unsigned in (
    (8, np.int8, np.uint8),
    (16, np.int16, np.uint16),
    (32, np.int32, np.uint32),
    (64, np.int64, np.uint64),
):
    TYPES[f"s{_width}"] = Type(_signed, _width)
    TYPES[f"u{_width}"] = TYPES[f"b{_width}"] = Type(_unsigned, _width)
TYPES["f64"] = Type(np.float64, 64)
TYPES["f16"] = TYPES["bf16"] = Type(np.uint16, 16)  # bits: numpy has no bf16
TYPES["f16x2"] = TYPES["bf16x2"] = TYPES["u16x2"] = Type(np.uint16, 32)
TYPES["s16x2"] = Type(np.int16, 32)
TYPES["f32x2"] = Type(np.float32, 64)


class Operation(NamedTuple):
    """Semantics of an opcode.

    Attributes:
        result: type of the result, a key of ``TYPES``.
        operands: types of the operands.
        compute: from the operands to the result, arrays of all threads.
        resizes: whether registers may be wider than the types (9.4.1).
    """

    result: str
    operands: tuple[str, ...]
    compute: Compute
    resizes: bool


OPERATIONS: dict[str, Operation] = {}


def operation(
    opcode: str, result: str, operands: str, resizes: bool = False, **alternatives: str
) -> Callable[[Compute], Compute]:
    """Enter a function into the table, once for each combination of the alternatives.

    They are words that replace their name in braces in the opcode and the types. A function that
    has a parameter of an alternative's name is given the word.
    """

    def enter(function: Compute) -> Compute:
        code = function.__code__
        parameters = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        for words in itertools.product(*(a.split() for a in alternatives.values())):
            chosen = dict(zip(alternatives, words, strict=True))
            given = {name: word for name, word in chosen.items() if name in parameters}
            OPERATIONS[opcode.format(**chosen)] = Operation(
                result.format(**chosen),
                tuple(operands.format(**chosen).split()),
                _with(function, given) if given else function,
                resizes,
            )
        return function

    return enter


def _with(function: Compute, given: dict[str, str]) -> Compute:
    return lambda *operands: function(*operands, **given)


INTEGERS = "u16 s16 u32 s32 u64 s64"
WORDS = "u32 s32"
BITS = "b16 b32 b64"

# 9.7.1 Integer Arithmetic Instructions. Results wrap around.


@operation("add.{t}", "{t}", "{t} {t}", t=INTEGERS + " u16x2 s16x2")
def add(a: Array, b: Array) -> Array:
    return a + b


@operation("sub.{t}", "{t}", "{t} {t}", t=INTEGERS)
def sub(a: Array, b: Array) -> Array:
    return a - b


@operation("mul.lo.{t}", "{t}", "{t} {t}", t=INTEGERS)
def mul_lo(a: Array, b: Array) -> Array:
    return a * b


@operation("mul.wide.u16", "u32", "u16 u16")
@operation("mul.wide.u32", "u64", "u32 u32")
def mul_wide_unsigned(a: Array, b: Array) -> Array:
    wide = {2: np.uint32, 4: np.uint64}[a.itemsize]
    return a.astype(wide) * b.astype(wide)


@operation("mul.wide.s16", "s32", "s16 s16")
@operation("mul.wide.s32", "s64", "s32 s32")
def mul_wide_signed(a: Array, b: Array) -> Array:
    wide = {2: np.int32, 4: np.int64}[a.itemsize]
    return a.astype(wide) * b.astype(wide)


@operation("mul.hi.u32", "u32", "u32 u32")
def mul_hi_unsigned(a: Array, b: Array) -> Array:
    return (mul_wide_unsigned(a, b) >> np.uint64(32)).astype(np.uint32)


@operation("mul.hi.s32", "s32", "s32 s32")
def mul_hi_signed(a: Array, b: Array) -> Array:
    return (mul_wide_signed(a, b) >> np.int64(32)).astype(np.int32)


@operation("mad.lo.{t}", "{t}", "{t} {t} {t}", t=INTEGERS)
def mad_lo(a: Array, b: Array, c: Array) -> Array:
    return a * b + c


@operation("mad.wide.u32", "u64", "u32 u32 u64")
def mad_wide_unsigned(a: Array, b: Array, c: Array) -> Array:
    return mul_wide_unsigned(a, b) + c


@operation("mad.wide.s32", "s64", "s32 s32 s64")
def mad_wide_signed(a: Array, b: Array, c: Array) -> Array:
    return mul_wide_signed(a, b) + c


@operation("div.u32", "u32", "u32 u32")
def div_unsigned(a: Array, b: Array) -> Array:
    """Divide; by zero the result is anything (9.7.1.8)."""
    return a // np.maximum(b, 1)


@operation("rem.u32", "u32", "u32 u32")
def rem_unsigned(a: Array, b: Array) -> Array:
    """Return the remainder; by zero it is anything (9.7.1.9)."""
    return a % np.maximum(b, 1)


@operation("neg.{t}", "{t}", "{t}", t="s16 s32 s64")
def neg(a: Array) -> Array:
    return -a


@operation("abs.{t}", "{t}", "{t}", t="s16 s32 s64")
def absolute(a: Array) -> Array:
    return np.abs(a)


@operation("max.{t}", "{t}", "{t} {t}", t=INTEGERS + " u16x2 s16x2")
def maximum(a: Array, b: Array) -> Array:
    return np.maximum(a, b)


@operation("min.{t}", "{t}", "{t} {t}", t=INTEGERS + " u16x2 s16x2")
def minimum(a: Array, b: Array) -> Array:
    return np.minimum(a, b)


@operation("popc.b32", "u32", "b32")
def popc(a: Array) -> Array:
    return np.unpackbits(a.view(np.uint8).reshape(-1, 4), axis=1).sum(1).astype(np.uint32)


@operation("bfe.u32", "u32", "u32 u32 u32")
def bfe(a: Array, position: Array, length: Array) -> Array:
    """Extract a field. Position and length are their low bytes; what lies past the word is 0."""
    position, length = position & np.uint32(0xFF), length & np.uint32(0xFF)
    field = (np.uint64(1) << np.minimum(length, 32).astype(np.uint64)) - np.uint64(1)
    return shift_right(a, position) & field.astype(np.uint32)


@operation("bfi.b32", "b32", "b32 b32 u32 u32")
def bfi(a: Array, b: Array, position: Array, length: Array) -> Array:
    """Insert the low bits of `a` into `b`; bits past the word are dropped."""
    position, length = position & np.uint32(0xFF), length & np.uint32(0xFF)
    ones = (np.uint64(1) << np.minimum(length, 32).astype(np.uint64)) - np.uint64(1)
    mask = shift_left(ones.astype(np.uint32), position)
    return b & ~mask | shift_left(a, position) & mask


# 9.7.3 Floating Point Instructions: f32 and f32x2, IEEE 754 with subnormals, round to nearest
# even by default; every NaN result is 0x7FFFFFFF.

SINGLE = "f32 f32x2"


def canonical(result: Array) -> Array:
    """Return float32 results with one NaN, 0x7FFFFFFF."""
    return np.where(np.isnan(result), np.uint32(floats.F32.nan), result.view(np.uint32)).view(
        np.float32
    )


@operation("add{r}.{t}", "{t}", "{t} {t}", r=".rn", t=SINGLE)
@operation("add.{t}", "{t}", "{t} {t}", t=SINGLE)
def add_f32(a: Array, b: Array) -> Array:
    return canonical(a + b)


@operation("sub{r}.{t}", "{t}", "{t} {t}", r=".rn", t=SINGLE)
@operation("sub.{t}", "{t}", "{t} {t}", t=SINGLE)
def sub_f32(a: Array, b: Array) -> Array:
    return canonical(a - b)


@operation("mul{r}.{t}", "{t}", "{t} {t}", r=".rn", t=SINGLE)
@operation("mul.{t}", "{t}", "{t} {t}", t=SINGLE)
def mul_f32(a: Array, b: Array) -> Array:
    return canonical(a * b)


@operation("fma.rn.{t}", "{t}", "{t} {t} {t}", t=SINGLE)
def fma_f32(a: Array, b: Array, c: Array) -> Array:
    exact = floats.fma(a.astype(np.float64), b.astype(np.float64), c.astype(np.float64))
    return canonical(exact.astype(np.float32))


@operation("fma.rn.sat.f32", "f32", "f32 f32 f32")
def fma_saturated_f32(a: Array, b: Array, c: Array) -> Array:
    """Clamp to 0 to 1; NaN becomes 0 (9.7.3)."""
    result = fma_f32(a, b, c)
    return np.where(result > 0, np.minimum(result, np.float32(1)), np.float32(0))


@operation("fma.rm.f32", "f32", "f32 f32 f32")
def fma_down_f32(a: Array, b: Array, c: Array) -> Array:
    """Round down; a sum of zero, but of zeros with one sign, is -0."""
    a, b, c = (v.astype(np.float64) for v in (a, b, c))
    exact = floats.fma(a, b, c)
    rounded = exact.astype(np.float32)
    rounded = np.where(rounded > exact, np.nextafter(rounded, np.float32(-np.inf)), rounded)
    signs_differ = np.signbit(a * b) != np.signbit(c)
    return canonical(np.where((exact == 0) & signs_differ, np.float32(-0.0), rounded))


@operation("div.rn.f32", "f32", "f32 f32")
def div_f32(a: Array, b: Array) -> Array:
    return canonical(a / b)


@operation("neg.f32", "f32", "f32")
def neg_f32(a: Array) -> Array:
    return canonical(-a)


@operation("rcp.approx.ftz.f32", "f32", "f32")
def rcp_approx_f32(a: Array) -> Array:
    """Look up what an H100 returns."""
    # A copy, since torch takes no strides below 0 and warns of memory that it must not write.
    return rcp_approx(torch.from_numpy(np.array(a, order="C"))).numpy()


# Other approximations are computed as if they were exact, and rounded. Hardware may be as much as 2
# units in the last place off, so a kernel must not depend on their last bits.


def flushed(a: Array) -> Array:
    """Return subnormal numbers as zeros of their sign, as .ftz does to operands and results."""
    return np.where(np.abs(a) < np.float32(2.0**-126), np.copysign(np.float32(0), a), a)


@operation("rsqrt.approx.ftz.f32", "f32", "f32")
def rsqrt_approx_f32(a: Array) -> Array:
    """Return 1 / sqrt(a): infinite for zeros, of their sign; NaN below."""
    return canonical((1.0 / np.sqrt(flushed(a).astype(np.float64))).astype(np.float32))


@operation("ex2.approx.ftz.f32", "f32", "f32")
def ex2_approx_f32(a: Array) -> Array:
    return flushed(canonical(np.exp2(flushed(a).astype(np.float64)).astype(np.float32)))


@operation("rcp.rn.f32", "f32", "f32")
def rcp_f32(a: Array) -> Array:
    return canonical(np.float32(1.0) / a)


@operation("sqrt.rn.f32", "f32", "f32")
def sqrt_f32(a: Array) -> Array:
    return canonical(np.sqrt(a))


def choose(a: Array, b: Array, larger: bool) -> Array:
    """Return whether max (or min) picks `a`: numbers before NaN, +0.0 above -0.0."""
    a_first = (a > b) if larger else (a < b)
    a_first |= (a == b) & (np.signbit(b) if larger else np.signbit(a))
    return a_first | np.isnan(b)


@operation("max.f32", "f32", "f32 f32")
def max_f32(a: Array, b: Array) -> Array:
    return canonical(np.where(choose(a, b, True), a, b))


@operation("min.f32", "f32", "f32 f32")
def min_f32(a: Array, b: Array) -> Array:
    return canonical(np.where(choose(a, b, False), a, b))


@operation("max.NaN.f32", "f32", "f32 f32")
def max_nan_f32(a: Array, b: Array) -> Array:
    return canonical(np.where(choose(a, b, True) & ~np.isnan(b) | np.isnan(a), a, b))


@operation("min.NaN.f32", "f32", "f32 f32")
def min_nan_f32(a: Array, b: Array) -> Array:
    return canonical(np.where(choose(a, b, False) & ~np.isnan(b) | np.isnan(a), a, b))


@operation("max.NaN.xorsign.abs.f32", "f32", "f32 f32")
def max_magnitude_f32(a: Array, b: Array) -> Array:
    """Return the larger magnitude under the product of the signs, NaN if one is."""
    x, y = np.abs(a), np.abs(b)
    sign = (a.view(np.uint32) ^ b.view(np.uint32)) & np.uint32(0x80000000)
    magnitude = np.where(choose(x, y, True), x, y).view(np.uint32) | sign
    return np.where(np.isnan(a) | np.isnan(b), np.uint32(floats.F32.nan), magnitude).view(
        np.float32
    )


@operation("max.NaN.abs.f32", "f32", "f32 f32 f32")
def max_magnitude_of_3_f32(a: Array, b: Array, c: Array) -> Array:
    """Return the largest magnitude of three, NaN if one is."""
    return canonical(np.maximum(np.maximum(np.abs(a), np.abs(b)), np.abs(c)))


@operation("min.xorsign.abs.f32", "f32", "f32 f32")
def min_magnitude_f32(a: Array, b: Array) -> Array:
    """Return the smaller magnitude under the product of the signs.

    If one is NaN, it is that of the other.
    """
    x, y = np.abs(a), np.abs(b)
    sign = (a.view(np.uint32) ^ b.view(np.uint32)) & np.uint32(0x80000000)
    magnitude = np.where(np.isnan(y) | (x < y), x, y).view(np.uint32) | sign
    return np.where(np.isnan(a) & np.isnan(b), np.uint32(floats.F32.nan), magnitude).view(
        np.float32
    )


# 9.7.4 Half Precision Floating Point Instructions: f16 and bf16, with subnormals; every NaN result
# is 0x7FFF.

HALVES = "f16 f16x2 bf16 bf16x2"


def half(t: str) -> floats.Format:
    """Return the format of the elements of a type, such as bf16x2."""
    return floats.BF16 if t.startswith("bf16") else floats.F16


@operation("{o}.rn.{t}", "{t}", "{t} {t}", o="add sub mul", t=HALVES)
@operation("{o}.{t}", "{t}", "{t} {t}", o="add sub mul", t=HALVES)
def arithmetic_half(a: Array, b: Array, o: str, t: str) -> Array:
    a, b = floats.decode(a, half(t)), floats.decode(b, half(t))
    # In float64 products are exact and sums have more than twice the bits they are rounded to.
    return floats.encode({"add": np.add, "sub": np.subtract, "mul": np.multiply}[o](a, b), half(t))


@operation("fma.rn.{t}", "{t}", "{t} {t} {t}", t=HALVES)
def fma_half(a: Array, b: Array, c: Array, t: str) -> Array:
    return floats.encode(floats.fma(*(floats.decode(v, half(t)) for v in (a, b, c))), half(t))


@operation("{o}.{t}", "{t}", "{t} {t}", o="max min", t=HALVES)
@operation("{o}{n}.{t}", "{t}", "{t} {t}", o="max min", n=".NaN", t=HALVES)
def choose_half(a: Array, b: Array, o: str, t: str, n: str = "") -> Array:
    x, y = floats.decode(a, half(t)), floats.decode(b, half(t))
    chosen = np.where(choose(x, y, o == "max"), a, b)
    nan = (np.isnan(x) | np.isnan(y)) if n else (np.isnan(x) & np.isnan(y))
    return np.where(nan, np.uint16(half(t).nan), chosen)


@operation("max.NaN.xorsign.abs.{t}", "{t}", "{t} {t}", t="f16x2 bf16x2")
def max_magnitude_half(a: Array, b: Array, t: str) -> Array:
    x, y = (np.abs(floats.decode(v, half(t))) for v in (a, b))
    magnitude = np.where(choose(x, y, True), a, b) & np.uint16(0x7FFF)
    chosen = magnitude | (a ^ b) & np.uint16(0x8000)
    return np.where(np.isnan(x) | np.isnan(y), np.uint16(half(t).nan), chosen)


# 9.7.5 Mixed Precision Floating Point Instructions


@operation("fma.rn.f32.{t}", "f32", "{t} {t} f32", t="f16 bf16")
def fma_mixed(a: Array, b: Array, c: Array, t: str) -> Array:
    a, b = floats.decode(a, half(t)), floats.decode(b, half(t))
    return canonical(floats.fma(a, b, c.astype(np.float64)).astype(np.float32))


@operation("add.f32.{t}", "f32", "{t} f32", t="f16 bf16")
@operation("add.rn.f32.{t}", "f32", "{t} f32", t="f16 bf16")
def add_mixed(a: Array, c: Array, t: str) -> Array:
    return canonical(floats.decode(a, half(t)).astype(np.float32) + c)


# 9.7.6 Comparison and Selection Instructions

COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@operation("setp.{c}.{t}", "pred", "{t} {t}", c="eq ne", t=BITS)
@operation("setp.{c}.{t}", "pred", "{t} {t}", c=" ".join(COMPARE), t=INTEGERS)
@operation("setp.{c}.{t}", "pred", "{t} {t}", c=" ".join(UNSIGNED_NAMES), t="u16 u32 u64")
def setp(a: Array, b: Array, c: str) -> Array:
    return COMPARE[UNSIGNED_NAMES.get(c, c)](a, b)


@operation("setp.{c}.{o}.{t}", "pred", "{t} {t} pred", c="eq ne", o=" ".join(COMBINE), t=BITS)
@operation(
    "setp.{c}.{o}.{t}", "pred", "{t} {t} pred", c=" ".join(COMPARE), o="and or xor", t=INTEGERS
)
def setp_combined(a: Array, b: Array, p: Array, c: str, o: str) -> Array:
    return COMBINE[o](COMPARE[c](a, b), p)


@operation("setp.{c}.f32", "pred", "f32 f32", c=" ".join(COMPARE) + " equ neu ltu leu gtu geu")
@operation("setp.{c}.f32", "pred", "f32 f32", c="num nan")
def setp_f32(a: Array, b: Array, c: str) -> Array:
    unordered = np.isnan(a) | np.isnan(b)
    if c in ("num", "nan"):
        return unordered if c == "nan" else ~unordered
    if c.endswith("u"):
        return unordered | COMPARE[c[:-1]](a, b)
    return ~unordered & COMPARE[c](a, b)


@operation("selp.{t}", "{t}", "{t} {t} pred", t=f"{BITS} {INTEGERS} f32 f64")
def selp(a: Array, b: Array, p: Array) -> Array:
    return np.where(p, a, b)


# 9.7.8 Logic and Shift Instructions


@operation("and.{t}", "{t}", "{t} {t}", t="pred " + BITS)
def bitwise_and(a: Array, b: Array) -> Array:
    return a & b


@operation("or.{t}", "{t}", "{t} {t}", t="pred " + BITS)
def bitwise_or(a: Array, b: Array) -> Array:
    return a | b


@operation("xor.{t}", "{t}", "{t} {t}", t="pred " + BITS)
def bitwise_xor(a: Array, b: Array) -> Array:
    return a ^ b


@operation("not.{t}", "{t}", "{t}", t="pred " + BITS)
def bitwise_not(a: Array) -> Array:
    return ~a


@operation("lop3.b32", "b32", "b32 b32 b32 b32")
def lop3(a: Array, b: Array, c: Array, table: Array) -> Array:
    result = np.zeros_like(a)
    for minterm in range(8):
        x, y, z = (v if minterm >> i & 1 else ~v for v, i in ((a, 2), (b, 1), (c, 0)))
        result |= np.where(table >> np.uint32(minterm) & 1, x & y & z, 0)
    return result.astype(np.uint32)


@operation("shl.{t}", "{t}", "{t} u32", t=BITS)
def shift_left(a: Array, amount: Array) -> Array:
    """Shift left. Amounts past the width clamp to it."""
    width = 8 * a.itemsize
    shifted = a << np.minimum(amount, width - 1).astype(a.dtype)
    return np.where(amount < width, shifted, 0).astype(a.dtype)


@operation("shr.{t}", "{t}", "{t} u32", t=f"{BITS} {INTEGERS}")
def shift_right(a: Array, amount: Array) -> Array:
    """Shift right. Amounts past the width clamp to it: 0, or the sign of signed types."""
    width = 8 * a.itemsize
    shifted = a >> np.minimum(amount, width - 1).astype(a.dtype)
    if a.dtype.kind == "i":
        return shifted
    return np.where(amount < width, shifted, 0).astype(a.dtype)


@operation("shf.{d}.wrap.b32", "b32", "b32 b32 u32", d="l r")
def funnel_shift(a: Array, b: Array, amount: Array, d: str) -> Array:
    both = b.astype(np.uint64) << np.uint64(32) | a
    amount = (amount & 31).astype(np.uint64)
    return (both << amount >> np.uint64(32) if d == "l" else both >> amount).astype(np.uint32)


# 9.7.9 Data Movement and Conversion Instructions. Vectors in mov pack and unpack; the machine
# reads and writes them.


@operation("mov.{t}", "{t}", "{t}", t=f"pred {BITS} {INTEGERS} f32 f64")
def mov(a: Array) -> Array:
    return a


@operation("prmt.b32", "b32", "b32 b32 b32")
def prmt(a: Array, b: Array, selector: Array) -> Array:
    both = (b.astype(np.uint64) << np.uint64(32) | a).view(np.uint8).reshape(-1, 8)
    control = (selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)) & np.uint32(15)
    byte = np.take_along_axis(both, (control & 7).astype(np.intp), 1)
    sign = np.where(byte & 0x80, 0xFF, 0).astype(np.uint8)
    return np.where(control & 8, sign, byte).view(np.uint32)[:, 0]


@operation("cvt.{d}.{s}", "{d}", "{s}", resizes=True, d="u8 s8 " + INTEGERS, s="u8 s8 " + INTEGERS)
def cvt_integer(a: Array, d: str) -> Array:
    """Truncate, or extend by the sign of the source type."""
    return a.astype(TYPES[d].dtype)


@operation("cvt.rn.f32.{s}", "f32", "{s}", s="u8 s8 u16 s16 u32 s32", resizes=True)
def cvt_integer_to_f32(a: Array) -> Array:
    return a.astype(np.float32)


@operation("cvt.{r}.s32.f32", "s32", "f32", r="rni rzi")
def cvt_f32_to_s32(a: Array, r: str) -> Array:
    """Round to nearest even or towards zero, saturated (9.7.9.22); NaN becomes 0."""
    limits = np.iinfo(np.int32)
    rounded = {"rni": np.rint, "rzi": np.trunc}[r](np.where(np.isnan(a), 0.0, a.astype(np.float64)))
    return np.clip(rounded, limits.min, limits.max).astype(np.int32)


@operation("cvt.pack.sat.s8.s32.b32", "b32", "s32 s32 b32")
def cvt_pack_s8(a: Array, b: Array, c: Array) -> Array:
    """Pack the first operand above the second, under the lower half of the third."""
    upper, lower = (np.clip(v, -128, 127).astype(np.int8).view(np.uint8) for v in (a, b))
    pair = upper.astype(np.uint32) << np.uint32(8) | lower
    return c << np.uint32(16) | pair


@operation("cvt.f32.f16", "f32", "f16")
def cvt_f16_to_f32(a: Array) -> Array:
    return canonical(floats.decode(a, floats.F16).astype(np.float32))


@operation("cvt.f32.bf16", "f32", "bf16")
def cvt_bf16_to_f32(a: Array) -> Array:
    """Return the same bits above 16 zeros, NaN included."""
    return (a.astype(np.uint32) << np.uint32(16)).view(np.float32)


@operation("cvt.rn.{t}.f32", "{t}", "f32", t="f16 bf16")
def cvt_f32_to_half(a: Array, t: str) -> Array:
    return floats.encode(a.astype(np.float64), half(t))


@operation("cvt.rn.{t}.f32", "b32", "f32 f32", t="f16x2 bf16x2")
def cvt_f32_to_pair(a: Array, b: Array, t: str) -> Array:
    """Round two operands, of which the first goes to the upper half."""
    upper, lower = (cvt_f32_to_half(v, t).astype(np.uint32) for v in (a, b))
    return upper << np.uint32(16) | lower


EIGHT_BITS = {"e4m3x2": floats.E4M3, "e5m2x2": floats.E5M2}


@operation("cvt.rn.satfinite.{t}.f32", "b16", "f32 f32", t=" ".join(EIGHT_BITS))
def cvt_f32_to_fp8(a: Array, b: Array, t: str) -> Array:
    """Round two operands, the first to the upper byte; what overflows becomes the largest value."""
    upper, lower = (
        floats.encode(v.astype(np.float64), EIGHT_BITS[t], saturate=True).astype(np.uint16)
        for v in (a, b)
    )
    return upper << np.uint16(8) | lower


@operation("cvt.rn.satfinite.{t}.f16x2", "b16", "f16x2", t=" ".join(EIGHT_BITS))
def cvt_f16_to_fp8(a: Array, t: str) -> Array:
    values = floats.decode(a, floats.F16)
    return floats.encode(values, EIGHT_BITS[t], saturate=True).view(np.uint16)


@operation("cvt.rn.f16x2.{t}", "b32", "b16", t=" ".join(EIGHT_BITS))
def cvt_fp8_to_f16(a: Array, t: str) -> Array:
    return floats.encode(floats.decode(a.view(np.uint8), EIGHT_BITS[t]), floats.F16).view(np.uint32)


@operation("cvt.rn.satfinite.e2m1x2.f32", "b8", "f32 f32")
def cvt_f32_to_fp4(a: Array, b: Array) -> Array:
    """Round two operands, the first to the upper four bits; NaN becomes 6."""
    upper, lower = (floats.encode(v.astype(np.float64), floats.E2M1, saturate=True) for v in (a, b))
    return upper << np.uint8(4) | lower


@operation("cvt.rn.satfinite.e2m1x2.{t}", "b8", "{t}", t="f16x2 bf16x2")
def cvt_half_to_fp4(a: Array, t: str) -> Array:
    codes = floats.encode(floats.decode(a, half(t)), floats.E2M1, saturate=True)
    return codes[1::2] << np.uint8(4) | codes[0::2]


@operation("cvt.rn.f16x2.e2m1x2", "b32", "b8")
def cvt_fp4_to_f16(a: Array) -> Array:
    pairs = np.stack([a & np.uint8(0xF), a >> np.uint8(4)], -1).reshape(-1)
    return floats.encode(floats.decode(pairs, floats.E2M1), floats.F16).view(np.uint32)
