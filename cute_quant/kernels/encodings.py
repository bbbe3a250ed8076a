"""Values in registers: element types, widening to float32, products, and encoding to 8 bits."""

import cutlass
import cutlass.cute as cute
import torch
from cutlass import BFloat16, Float32, Uint16, Uint32, const_expr

from cute_quant.contract.dtypes import INPUT_DTYPES
from cute_quant.contract.formats import Format
from cute_quant.kernels import ptx

ELEMENT_TYPES = {
    torch.bfloat16: cutlass.BFloat16,
    torch.float16: cutlass.Float16,
    torch.float32: cutlass.Float32,
    torch.float8_e4m3fn: cutlass.Float8E4M3FN,
    torch.float8_e5m2: cutlass.Float8E5M2,
    torch.int8: cutlass.Int8,
    torch.float8_e8m0fnu: cutlass.Float8E8M0FNU,
    torch.int32: cutlass.Int32,
}
"""CuTe's type of the elements of a torch tensor."""

INPUT_TYPES = {ELEMENT_TYPES[dtype]: dtype for dtype in INPUT_DTYPES}
"""Types that can be quantized, and torch's dtypes of them."""


def value_type_of(fmt: Format) -> type[cutlass.Numeric]:
    """Return the element type of the values of a format."""
    return ELEMENT_TYPES[fmt.values]


def scale_type_of(fmt: Format) -> type[cutlass.Numeric]:
    """Return the element type of the tensor of scales of a format: int32 where they are packed."""
    return ELEMENT_TYPES[fmt.sf_dtype]


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
    """Return a thread's values, (values,), bfloat16, float16 or float32, as float32; exact."""
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
def encode(rX: cute.Tensor, dtype: cutlass.Constexpr[type]) -> cute.Tensor:
    """Return float32 values in a dtype, rounded to nearest even and saturated."""
    rQ = cute.make_rmem_tensor(rX.shape, dtype)
    if const_expr(dtype is cutlass.Int8):
        words = cute.recast_tensor(rQ, Uint32)
        for i in cutlass.range_constexpr(cute.size(words)):
            upper = ptx.pack_int8(rX[4 * i + 2], rX[4 * i + 3], Uint32(0))
            words[i] = ptx.pack_int8(rX[4 * i], rX[4 * i + 1], upper)
    else:
        rQ.store(rX.load().to(dtype))
    return rQ
