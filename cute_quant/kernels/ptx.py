"""Instructions that the DSL has no name for, each as a typed function of one.

All inline PTX and all private names of the DSL that the kernels use stand here.
"""

import cutlass
from cutlass import BFloat16, Float16, Float32, Int32, Int64, Uint16, Uint32
from cutlass._mlir.dialects import llvm
from cutlass.base_dsl import BaseDSL
from cutlass.cutlass_dsl import T, dsl_user_op

from cute_quant.kernels import architectures
from cute_quant.kernels.architectures import Architecture

NEGATIVE_ZEROS = 0x80008000
"""A pair of halves, which a sum with leaves everything as it is."""


def target() -> Architecture:
    """Return the architecture that is compiled for."""
    return architectures.named(BaseDSL._get_dsl().get_arch_enum().name)


@dsl_user_op
def _apply(instruction: str, *operands: Uint32, loc=None, ip=None) -> Uint32:
    """Emit an instruction from 32-bit registers to one."""
    values = [Uint32(v).ir_value(loc=loc, ip=ip) for v in operands]
    registers = ", ".join(f"${i}" for i in range(len(values) + 1))
    ptx = f"{instruction} {registers};"
    constraints = ",".join(["=r"] + ["r"] * len(values))
    return Uint32(llvm.inline_asm(T.i32(), values, ptx, constraints, loc=loc, ip=ip))


def max_magnitude(a: Uint32, b: Uint32, dtype: type[cutlass.Numeric]) -> Uint32:
    """Return the larger magnitudes of two float32, or of two pairs of halves, under some sign.

    NaN is larger than all. An integer maximum would have to mask the signs of its operands first.
    """
    kind = {BFloat16: "bf16x2", Float16: "f16x2", Float32: "f32"}[dtype]
    return _apply(f"max.NaN.xorsign.abs.{kind}", a, b)


def max_magnitude_of_3(a: Uint32, b: Uint32, c: Uint32) -> Uint32:
    """Return the largest magnitude of three float32: needs `three_input_max`. NaN is largest."""
    return _apply("max.NaN.abs.f32", a, b, c)


def max_u16x2(a: Uint32, b: Uint32) -> Uint32:
    """Return the maxima of two pairs of 16-bit integers: needs `pair_arithmetic`."""
    return _apply("max.u16x2", a, b)


def mul_bf16x2(a: Uint32, b: Uint32) -> Uint32:
    """Return the products of two pairs of bfloat16; the DSL has them only as part of a sum."""
    if target().pair_arithmetic:
        return _apply("mul.rn.bf16x2", a, b)
    return _apply("fma.rn.bf16x2", a, b, Uint32(NEGATIVE_ZEROS))


def fma_bf16x2(a: Uint32, b: Uint32, c: Uint32) -> Uint32:
    """Return the fused sums of products of two pairs of bfloat16 and a third, rounded once."""
    return _apply("fma.rn.bf16x2", a, b, c)


def min_bf16x2(a: Uint32, b: Uint32) -> Uint32:
    """Return the minima of two pairs of bfloat16."""
    return _apply("min.bf16x2", a, b)


def fma_saturated(a: Float32, b: Float32, c: Float32) -> Float32:
    """Return a * b + c, rounded once and clamped to 0 to 1; NaN gives 0."""
    return _fma("fma.rn.sat.f32", a, b, c)


def fma_down(a: Float32, b: Float32, c: Float32) -> Float32:
    """Return a * b + c, rounded down once."""
    return _fma("fma.rm.f32", a, b, c)


@dsl_user_op
def _fma(instruction: str, a: Float32, b: Float32, c: Float32, *, loc=None, ip=None) -> Float32:
    operands = [v.ir_value(loc=loc, ip=ip) for v in (a, b, c)]
    ptx = f"{instruction} $0, $1, $2, $3;"
    return Float32(llvm.inline_asm(T.f32(), operands, ptx, "=f,f,f,f", loc=loc, ip=ip))


def select_bytes(a: Uint32, b: Uint32, selector: int) -> Uint32:
    """Return bytes of two registers: each hexadecimal digit names one, 0 to 3 of a, 4 to 7 of b."""
    return _apply("prmt.b32", a, b, Uint32(selector))


def mul_bf16_to_f32(a: Uint16, b: Uint16) -> Float32:
    """Return the product of two bfloat16 as float32, a fused sum with -0: needs `mixed_fma`."""
    # As bits: the DSL takes -0.0 for the 0.0 that a kernel may have had before.
    negative_zero = Uint32(0x80000000).bitcast(Float32)
    return fma_bf16_to_f32(a, b, negative_zero)


@dsl_user_op
def fma_bf16_to_f32(a: Uint16, b: Uint16, c: Float32, *, loc=None, ip=None) -> Float32:
    """Return the fused sum of the product of two bfloat16 and a float32: needs `mixed_fma`."""
    operands = [v.ir_value(loc=loc, ip=ip) for v in (a, b, c)]
    ptx = "fma.rn.f32.bf16 $0, $1, $2, $3;"
    return Float32(llvm.inline_asm(T.f32(), operands, ptx, "=f,h,h,f", loc=loc, ip=ip))


@dsl_user_op
def mul_rn(a: Float32, b: Float32, *, loc=None, ip=None) -> Float32:
    """Return a product that is rounded: no compiler fuses it with a sum, as it may the DSL's."""
    operands = [v.ir_value(loc=loc, ip=ip) for v in (a, b)]
    ptx = "mul.rn.f32 $0, $1, $2;"
    return Float32(llvm.inline_asm(T.f32(), operands, ptx, "=f,f,f", loc=loc, ip=ip))


@dsl_user_op
def e4m3_of_f32(a: Float32, *, loc=None, ip=None) -> Uint32:
    """Return a float32 as e4m3, rounded to nearest even and saturated; 0x7F for NaN."""
    operands = [v.ir_value(loc=loc, ip=ip) for v in (Float32(0.0), a)]
    ptx = "cvt.rn.satfinite.e4m3x2.f32 $0, $1, $2;"
    pair = Uint16(llvm.inline_asm(T.i16(), operands, ptx, "=h,f,f", loc=loc, ip=ip))
    return Uint32(pair)


@dsl_user_op
def f32_of_e4m3(code: Uint32, *, loc=None, ip=None) -> Float32:
    """Return the float32 of an e4m3."""
    operand = [Uint16(code).ir_value(loc=loc, ip=ip)]
    ptx = "cvt.rn.f16x2.e4m3x2 $0, $1;"
    pair = Uint32(llvm.inline_asm(T.i32(), operand, ptx, "=r,h", loc=loc, ip=ip))
    return Uint16(pair).bitcast(Float16).to(Float32)


@dsl_user_op
def e2m1_of_f32(values: list[Float32], *, loc=None, ip=None) -> Uint32:
    """Return eight float32 as e2m1, the first in the low bits: needs `e2m1`.

    They are rounded to nearest even and saturated; NaN gives 6.
    """
    operands = [v.ir_value(loc=loc, ip=ip) for v in values]
    pairs = (f"cvt.rn.satfinite.e2m1x2.f32 b{i}, ${2 * i + 2}, ${2 * i + 1};" for i in range(4))
    ptx = f"{{ .reg .b8 b0, b1, b2, b3; {' '.join(pairs)} mov.b32 $0, {{b0, b1, b2, b3}}; }}"
    constraints = ",".join(["=r"] + ["f"] * len(operands))
    return Uint32(llvm.inline_asm(T.i32(), operands, ptx, constraints, loc=loc, ip=ip))


@dsl_user_op
def e2m1_of_bf16x2(pairs: list[Uint32], *, loc=None, ip=None) -> Uint32:
    """Return four pairs of bfloat16 as e2m1, the first in the low bits: needs `e2m1`."""
    operands = [Uint32(v).ir_value(loc=loc, ip=ip) for v in pairs]
    codes = (f"cvt.rn.satfinite.e2m1x2.bf16x2 b{i}, ${i + 1};" for i in range(4))
    ptx = f"{{ .reg .b8 b0, b1, b2, b3; {' '.join(codes)} mov.b32 $0, {{b0, b1, b2, b3}}; }}"
    return Uint32(llvm.inline_asm(T.i32(), operands, ptx, "=r,r,r,r,r", loc=loc, ip=ip))


@dsl_user_op
def f16x2_of_e2m1(word: Uint32, byte: int, *, loc=None, ip=None) -> Uint32:
    """Return the two e2m1 of a byte of a word as float16: needs `e2m1`."""
    ptx = (
        "{ .reg .b8 b0, b1, b2, b3; mov.b32 {b0, b1, b2, b3}, $1; "
        f"cvt.rn.f16x2.e2m1x2 $0, b{byte}; }}"
    )
    operand = [Uint32(word).ir_value(loc=loc, ip=ip)]
    return Uint32(llvm.inline_asm(T.i32(), operand, ptx, "=r,r", loc=loc, ip=ip))


@dsl_user_op
def pack_int8(
    a: Float32, b: Float32, upper: Uint32, truncates: bool, *, loc=None, ip=None
) -> Uint32:
    """Return ``upper << 16`` over two values as int8, saturated; NaN gives 0.

    They are rounded towards zero or to nearest even. The assembler makes one instruction of it.
    """
    rounding = "rzi" if truncates else "rni"
    words = []
    for value in (a, b):
        operand = [value.ir_value(loc=loc, ip=ip)]
        ptx = f"cvt.{rounding}.s32.f32 $0, $1;"
        words.append(llvm.inline_asm(T.i32(), operand, ptx, "=r,f", loc=loc, ip=ip))
    ptx = "cvt.pack.sat.s8.s32.b32 $0, $1, $2, $3;"
    operands = [words[1], words[0], Uint32(upper).ir_value(loc=loc, ip=ip)]
    return Uint32(llvm.inline_asm(T.i32(), operands, ptx, "=r,r,r,r", loc=loc, ip=ip))


@dsl_user_op
def wait_behind(addresses: list[Int64], *, loc=None, ip=None) -> None:
    """Wait for the grid before, once these addresses are known.

    The assembler puts a wait ahead of all that it does not depend on. So this one depends on the
    addresses, by a condition that holds for all of them, which the assembler does not see.
    """
    words = [Uint32(address).ir_value(loc=loc, ip=ip) for address in addresses]
    common = [f"and.b32 t, t, ${i};" for i in range(len(words))]
    ptx = (
        f"{{ .reg .b32 t; .reg .pred p; mov.b32 t, -2; {' '.join(common)} "
        "setp.ne.b32 p, t, -1; @p griddepcontrol.wait; }"
    )
    constraints = ",".join(["r"] * len(words) + ["~{memory}"])
    llvm.inline_asm(None, words, ptx, constraints, has_side_effects=True, loc=loc, ip=ip)


@dsl_user_op
def store_release(address: Int64, value: Int32, *, loc=None, ip=None) -> None:
    """Store a number that any GPU of the host sees, and all that was stored before it."""
    operands = [Int64(address).ir_value(loc=loc, ip=ip), Int32(value).ir_value(loc=loc, ip=ip)]
    ptx = "st.release.sys.global.b32 [$0], $1;"
    llvm.inline_asm(None, operands, ptx, "l,r", has_side_effects=True, loc=loc, ip=ip)


@dsl_user_op
def load_acquire(address: Int64, *, loc=None, ip=None) -> Int32:
    """Load a number that any GPU of the host may store, and see all that it stored before it."""
    operands = [Int64(address).ir_value(loc=loc, ip=ip)]
    ptx = "ld.acquire.sys.global.b32 $0, [$1];"
    return Int32(
        llvm.inline_asm(T.i32(), operands, ptx, "=r,l", has_side_effects=True, loc=loc, ip=ip)
    )


@dsl_user_op
def nanoseconds(*, loc=None, ip=None) -> Int64:
    """Return the time of the GPU."""
    ptx = "mov.u64 $0, %globaltimer;"
    return Int64(llvm.inline_asm(T.i64(), [], ptx, "=l", has_side_effects=True, loc=loc, ip=ip))


@dsl_user_op
def trap(*, loc=None, ip=None) -> None:
    """End the kernel with an error, which the context keeps."""
    llvm.inline_asm(None, [], "trap;", "", has_side_effects=True, loc=loc, ip=ip)
