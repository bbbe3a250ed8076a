"""What other libraries compute for FP4, FP8 and int8, in numpy.

Each function takes finite groups (groups, size) in float32, and returns their scale bytes (groups,)
and a byte for each element: an e2m1 code, or an e4m3 or int8 value. Every operation on float32 is
done in float64 and rounded once. Float64 has more than twice the bits, so this is the rounding of
the exact sum, product or quotient.

The encode scale of NVFP4 is 2688 / amax of the tensor, the decode scale is its inverse.
`test_library_numerics` compares the functions with the libraries where they are installed.
"""

import functools
import lzma
from collections.abc import Callable
from pathlib import Path

import numpy as np

Quantized = tuple[np.ndarray, np.ndarray]
Scale = float | np.ndarray
"""An upper scale, or one for each group."""

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E4M3 = np.array([(m / 8 + (e > 0)) * 2.0 ** (max(e, 1) - 7) for e in range(16) for m in range(8)])[
    :-1
]
"""Magnitudes by their code."""
FLOAT32_MAX = np.float64(np.finfo(np.float32).max)
SMALLEST_NORMAL = 2.0**-126
RECORDED_ERRORS = Path(__file__).parents[2] / "cute_quant" / "contract" / "rcp_approx.xz"
SIXTH = np.float64(np.float32(1 / 6))
"""1/6 as a float32 constant; the assembler makes it of ``rcp.approx.ftz.f32`` of 6, too."""


def f32(a: np.ndarray) -> np.ndarray:
    """Round float64 to float32, and return float64."""
    with np.errstate(over="ignore"):
        return np.asarray(a, np.float64).astype(np.float32).astype(np.float64)


def mul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):
        return f32(np.multiply(a, b))


def div(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return f32(np.divide(a, b))


def rcp_approx(a: np.ndarray) -> np.ndarray:
    """Return what ``rcp.approx.ftz.f32`` returns on an H100, of which the recording is read.

    The recording has units in the last place of the reciprocals of 1 to 2, which are from 1/2 to 1.
    """
    a = flushed(a)
    finite = np.isfinite(a) & (a != 0)
    significand, exponent = np.frexp(np.where(finite, np.abs(a), 0.5))
    from_one = np.asarray(2 * significand)
    errors = recorded_errors()[((from_one - 1) * 2**23).astype(np.int64)]
    result = np.ldexp(div(1.0, from_one) + errors * 2.0**-24, 1 - exponent)
    return flushed(np.where(finite, np.copysign(result, a), div(1.0, a)))


@functools.cache
def recorded_errors() -> np.ndarray:
    """Return by how much ``rcp.approx`` differs from the rounded reciprocal, by mantissa."""
    return np.frombuffer(lzma.decompress(RECORDED_ERRORS.read_bytes()), np.int8)


def flushed(a: np.ndarray) -> np.ndarray:
    return np.where(np.abs(a) < SMALLEST_NORMAL, np.copysign(0.0, a), a)


def nearest(a: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Return the code of the magnitude nearest to |a|, the even one of two; the last one above."""
    a = np.abs(a)
    middles = (table[1:] + table[:-1]) / 2
    below, through = (np.searchsorted(middles, a, side) for side in ("left", "right"))
    return np.where(below % 2 == 0, below, through).astype(np.uint8)


def e4m3(a: np.ndarray) -> np.ndarray:
    """Return the bytes of a rounded to e4m3, saturating; NaN becomes 0x7F."""
    codes = nearest(a, E4M3) | np.where(np.signbit(a), np.uint8(0x80), np.uint8(0))
    return np.where(np.isnan(a), np.uint8(0x7F), codes)


def e2m1(a: np.ndarray) -> np.ndarray:
    """Return what ``cvt.rn.satfinite.e2m1x2.f32`` makes of each element: NaN becomes 6."""
    codes = nearest(a, E2M1) | np.where(np.signbit(a), np.uint8(8), np.uint8(0))
    return np.where(np.isnan(a), np.uint8(7), codes)


def e2m1_without_negative_zero(a: np.ndarray) -> np.ndarray:
    codes = e2m1(a)
    return np.where(codes == 8, np.uint8(0), codes)


def decoded(scale_bytes: np.ndarray) -> np.ndarray:
    """Return the values of e4m3 bytes without a sign."""
    return np.append(E4M3, np.nan)[scale_bytes]


def amax_of(x: np.ndarray) -> np.ndarray:
    return np.abs(x.astype(np.float64)).max(-1)


def times(x: np.ndarray, multipliers: np.ndarray) -> np.ndarray:
    """Return the products of the groups of x with one multiplier each."""
    return mul(x.astype(np.float64), multipliers[:, None])


def of_rows(scale: Scale) -> np.ndarray:
    return np.reshape(scale, (-1, 1))


# NVFP4


def nvfp4_vllm(x: np.ndarray, encode_scale: Scale) -> Quantized:
    """Quantize as vLLM's kernel ``cvt_warp_fp16_to_fp4``."""
    sf = e4m3(mul(encode_scale, mul(amax_of(x), SIXTH)))
    multipliers = rcp_approx(mul(decoded(sf), rcp_approx(encode_scale)))
    return sf, e2m1(times(x, np.where(sf == 0, 0.0, multipliers)))


def nvfp4_vllm_emulated(x: np.ndarray, encode_scale: Scale) -> Quantized:
    """Quantize as vLLM's ``ref_nvfp4_quant``, in which 1/0 is 1e-8, and -0 loses its sign."""
    sf = e4m3(mul(encode_scale, mul(amax_of(x), SIXTH)))
    divisors = mul(decoded(sf), div(1.0, encode_scale))
    products = times(x, div(1.0, np.where(divisors == 0, f32(1e8), divisors)))
    return sf, np.where(products == 0, np.uint8(0), e2m1(products))


nvfp4_flashinfer = nvfp4_vllm
"""FlashInfer's CuTe DSL kernels have the formula of vLLM."""


def nvfp4_flashinfer_cuda(x: np.ndarray, encode_scale: Scale) -> Quantized:
    """Quantize as FlashInfer's CUDA kernel ``cvt_warp_fp16_to_fp4``.

    It is compiled to flush subnormals, and looks for a zero amax, not for a zero scale.
    """
    v = flushed(amax_of(x))
    sf = e4m3(flushed(mul(encode_scale, flushed(mul(v, SIXTH)))))
    multipliers = rcp_approx(mul(decoded(sf), rcp_approx(encode_scale)))
    return sf, e2m1(flushed(times(flushed(x), np.where(v == 0, 0.0, multipliers))))


def flashinfer_row_scales(row_amax: np.ndarray, e4m3_max: int = 448) -> Quantized:
    """Return the encode scales of rows, and the decode scales that FlashInfer stores."""
    stored = mul(row_amax, f32(1 / (e4m3_max * 6)))
    return np.where(row_amax == 0, FLOAT32_MAX, rcp_approx(stored)), stored


def te_encode_scale(amax: Scale, e4m3_max: int = 448) -> np.ndarray:
    """Return the encode scale that TransformerEngine computes from the amax of a tensor."""
    scale = np.minimum(div(e4m3_max * 6.0, amax), FLOAT32_MAX)
    return np.where((np.asarray(amax) == 0) | (scale == 0), 1.0, scale)


def nvfp4_te(x: np.ndarray, encode_scale: Scale) -> Quantized:
    """Quantize as TransformerEngine's kernels ``quantize_transpose_nvfp4`` and its kin."""
    v = amax_of(x)
    sf = e4m3(np.minimum(mul(v, mul(encode_scale, SIXTH)), FLOAT32_MAX))
    return sf, e2m1(times(x, te_multipliers(sf, encode_scale)))


nvfp4_flashinfer_strict = nvfp4_te
"""FlashInfer with ``FLASHINFER_DISABLE_FP4_QUANT_FAST_MATH`` has the formula of TE.

It multiplies a zero group by 0 instead of the largest float32, which gives the same codes.
"""


def te_multipliers(sf: np.ndarray, encode_scale: Scale) -> np.ndarray:
    return np.minimum(div(1.0, mul(decoded(sf), div(1.0, encode_scale))), FLOAT32_MAX)


def nvfp4_torchao(x: np.ndarray, decode_scale: float | None) -> Quantized:
    """Quantize as torchao's ``nvfp4_quantize`` on the CPU."""
    v = div(amax_of(x), 6.0)
    if decode_scale is None:
        sf = e4m3(np.clip(v, 2.0**-6, 448))
        multipliers = div(1.0, decoded(sf))
    else:
        sf = e4m3(np.clip(div(v, decode_scale), 2.0**-6, 448))
        multipliers = div(div(1.0, decode_scale), decoded(sf))
    return sf, e2m1(times(x, multipliers))


def nvfp4_deepgemm(x: np.ndarray, decode_scale: float | None) -> Quantized:
    """Quantize as DeepGEMM's ``per_token_cast_to_nvfp4``."""
    decode_scale = 1.0 if decode_scale is None else decode_scale
    sf = e4m3(np.maximum(mul(mul(amax_of(x), SIXTH), div(1.0, decode_scale)), 2.0**-9))
    divisors = mul(decoded(sf), decode_scale)[:, None]
    return sf, e2m1_without_negative_zero(div(x.astype(np.float64), divisors))


# 4over6: the scale of amax / 6 or that of amax / 4, whichever has the smaller error.


def four_over_six(
    x: np.ndarray,
    base: np.ndarray,
    encode_scale: Scale,
    multipliers: Callable[[np.ndarray], np.ndarray],
    dequantized: Callable[[np.ndarray], np.ndarray],
    squared: bool,
    scaled_errors: bool,
) -> Quantized:
    """Quantize with both scales, and keep that of amax / 4 where the sum of its errors is smaller.

    Args:
        base: scales of amax / 6 before they are rounded to e4m3.
        multipliers: maps scale bytes to multipliers.
        dequantized: maps products of codes and scales to values.
        squared: whether errors are squares, or magnitudes.
        scaled_errors: compare the products of codes and scales with the input times the encode
            scale, not values with the input.
    """
    exact = x.astype(np.float64)
    candidates = []
    for scales in (base, mul(base, 1.5)):
        sf = e4m3(scales)
        codes = e2m1(times(x, multipliers(sf)))
        products = np.where(codes & 8, -1.0, 1.0) * E2M1[codes & 7] * decoded(sf)[:, None]
        if scaled_errors:
            d = f32(products - mul(exact, of_rows(encode_scale)))
        else:
            d = f32(dequantized(products) - exact)
        error = np.zeros(len(x))
        for term in (mul(d, d) if squared else np.abs(d)).T:
            error = f32(error + term)
        candidates.append((sf, codes, error))
    (sf6, codes6, error6), (sf4, codes4, error4) = candidates
    four = error4 < error6
    return np.where(four, sf4, sf6), np.where(four[:, None], codes4, codes6)


def nvfp4_te_4over6(
    x: np.ndarray,
    amax: Scale,
    e4m3_max: int = 448,
    squared: bool = False,
    scaled_errors: bool = False,
) -> Quantized:
    """Quantize as TransformerEngine's 4over6.

    Args:
        amax: of the tensor or, row-scaled, of the row of each group.
        scaled_errors: ``nvfp4_4over6_err_use_fast_math``.
    """
    encode_scale = te_encode_scale(amax, e4m3_max)
    return four_over_six(
        x,
        mul(div(amax_of(x), 6.0), encode_scale),
        encode_scale,
        lambda sf: te_multipliers(sf, encode_scale),
        lambda products: div(mul(products, of_rows(amax)), 6.0 * e4m3_max),
        squared,
        scaled_errors,
    )


def nvfp4_flashinfer_4over6(
    x: np.ndarray, encode_scale: float, squared: bool = False, scaled_errors: bool = False
) -> Quantized:
    """Quantize as FlashInfer's 4over6 per tensor, in its CuTe DSL kernels.

    Args:
        encode_scale: e4m3_max * 6 / amax of the tensor, e4m3_max being 448 or 256.
    """
    return without_zero_groups(
        x,
        four_over_six(
            x,
            mul(encode_scale, mul(amax_of(x), SIXTH)),
            encode_scale,
            lambda sf: rcp_approx(mul(decoded(sf), rcp_approx(encode_scale))),
            lambda products: mul(products, rcp_approx(encode_scale)),
            squared,
            scaled_errors,
        ),
    )


def nvfp4_flashinfer_per_token_4over6(
    x: np.ndarray, row_amax: np.ndarray, e4m3_max: int = 448, squared: bool = False
) -> Quantized:
    """Quantize as FlashInfer's 4over6 per token, each group with the amax of its row."""
    encode_scale, _ = flashinfer_row_scales(row_amax, e4m3_max)
    return without_zero_groups(
        x,
        four_over_six(
            x,
            mul(encode_scale, mul(amax_of(x), SIXTH)),
            encode_scale,
            lambda sf: rcp_approx(mul(decoded(sf), rcp_approx(encode_scale))),
            lambda products: div(mul(products, of_rows(row_amax)), 6.0 * e4m3_max),
            squared,
            scaled_errors=False,
        ),
    )


def without_zero_groups(x: np.ndarray, quantized: Quantized) -> Quantized:
    zero = amax_of(x) == 0
    sf, codes = quantized
    return np.where(zero, np.uint8(0), sf), np.where(zero[:, None], np.uint8(0), codes)


# MXFP4 and MXFP8: UE8M0 bytes


def exponent_field(a: np.ndarray) -> np.ndarray:
    return (bits_of(a) >> 23).astype(np.int64)


def bits_of(a: np.ndarray) -> np.ndarray:
    return np.asarray(a).astype(np.float32).view(np.uint32)


def power_of_two_at_least(a: np.ndarray) -> np.ndarray:
    """Return the UE8M0 bytes of the smallest powers of two that are no less than a, from 2^-127."""
    mantissa, exponent = np.frexp(a)
    return np.where(a == 0, 0, np.maximum(exponent - (mantissa == 0.5) + 127, 0))


def exact_multipliers(exponents: np.ndarray) -> np.ndarray:
    return np.exp2(127.0 - exponents)


def mxfp4_vllm(x: np.ndarray) -> Quantized:
    """Quantize as vLLM's ``cvt_warp_fp16_to_fp4`` with UE8M0 scales.

    The amax is rounded to a power of two: up from 7/4 of one.
    """
    rounded = ((bits_of(amax_of(x)).astype(np.int64) + (1 << 21)) >> 23).clip(0, 255)
    exponents = (rounded - 2).clip(0)
    multipliers = np.where(exponents == 0, 0.0, exact_multipliers(exponents))
    return exponents.astype(np.uint8), e2m1(times(x, multipliers))


def mxfp4_flashinfer(x: np.ndarray) -> Quantized:
    """Quantize as FlashInfer's ``process_mxfp4_block_bfloat``."""
    exponents = power_of_two_at_least(mul(amax_of(x), SIXTH))
    multipliers = np.where(exponents == 0, 0.0, exact_multipliers(exponents))
    return exponents.astype(np.uint8), e2m1(times(x, multipliers))


def mxfp8_flashinfer(x: np.ndarray) -> Quantized:
    """Quantize as FlashInfer's ``MXFP8QuantizeLinearKernel`` and its kin."""
    exponents = power_of_two_at_least(mul(amax_of(x), f32(1 / 448)))
    multipliers = np.where(exponents == 0, 0.0, exact_multipliers(exponents))
    return exponents.astype(np.uint8), e4m3(times(x, multipliers))


def mxfp8_te(x: np.ndarray) -> Quantized:
    """Quantize as TransformerEngine's kernel ``quantize_mxfp8``."""
    exponents = power_of_two_at_least(mul(amax_of(x), f32(1 / 448)))
    return exponents.astype(np.uint8), e4m3(times(x, exact_multipliers(exponents)))


def mxfp8_vllm(x: np.ndarray) -> Quantized:
    """Quantize as vLLM's ``_mxfp8_e4m3_quantize_torch``, which it calls without FlashInfer."""
    exponents = power_of_two_at_least(div(np.maximum(amax_of(x), SMALLEST_NORMAL), 448.0))
    return exponents.astype(np.uint8), e4m3(times(x, exact_multipliers(exponents)))


def mxfp4_torchao(x: np.ndarray, mode: str) -> Quantized:
    """Quantize as torchao's ``to_mx``, `mode` being a ``ScaleCalculationMode`` in lower case."""
    exponents, multipliers = torchao_scales(x, mode, 6.0, 2, 1)
    return exponents, e2m1(times(x, multipliers))


def mxfp8_torchao(x: np.ndarray, mode: str) -> Quantized:
    """Quantize as torchao's ``to_mx``, `mode` being a ``ScaleCalculationMode`` in lower case."""
    exponents, multipliers = torchao_scales(x, mode, 448.0, 8, 3)
    return exponents, e4m3(times(x, multipliers))


def torchao_scales(
    x: np.ndarray, mode: str, largest: float, largest_exponent: int, mantissa_bits: int
) -> Quantized:
    """Return UE8M0 bytes and multipliers. Byte 0 stands for 2^-127, but multiplies otherwise."""
    v = amax_of(x)
    if mode == "rceil":
        exponents = power_of_two_at_least(div(v, largest))
        multiplier_of_zero = 1.0
    else:
        half = {"floor": 0, "ceil": (1 << 23) - 1, "even": 1 << (22 - mantissa_bits)}[mode]
        rounded = (bits_of(v).astype(np.int64) + half) >> 23
        exponents = (rounded - largest_exponent).clip(0)
        multiplier_of_zero = 2.0**126
    multipliers = np.where(exponents == 0, multiplier_of_zero, exact_multipliers(exponents))
    return exponents.astype(np.uint8), multipliers


def mxfp4_deepgemm(x: np.ndarray) -> Quantized:
    """Quantize as ``per_token_cast_to_fp4(use_ue8m0=True)`` of DeepGEMM 2.8."""
    exponents = power_of_two_at_least(div(np.maximum(amax_of(x), f32(1e-4)), 6.0))
    codes = e2m1_without_negative_zero(times(x, exact_multipliers(exponents)))
    return exponents.astype(np.uint8), codes


def mxfp8_deepgemm(x: np.ndarray) -> Quantized:
    """Quantize as DeepGEMM's ``per_token_cast_to_fp8(use_ue8m0=True)``."""
    exponents = power_of_two_at_least(div(np.maximum(amax_of(x), f32(1e-4)), 448.0))
    return exponents.astype(np.uint8), e4m3(times(x, exact_multipliers(exponents)))


# Dequantization of NVFP4


def dequantized_vllm(codes: np.ndarray, sf: np.ndarray, decode_scale: float) -> np.ndarray:
    """Return the values of vLLM's ``dequantize_to_dtype`` in float32."""
    values = np.where(codes & 8, -1.0, 1.0) * E2M1[codes & 7]
    return mul(values, mul(decoded(sf), decode_scale)[:, None])


# Float32 scales


def bounded(x: np.ndarray, smallest: float) -> np.ndarray:
    return np.maximum(amax_of(x), f32(smallest))


def in_float32(scales: np.ndarray, codes: np.ndarray) -> Quantized:
    """Return scales as bytes, four of each."""
    return scales.astype(np.float32).view(np.uint8), codes


def int8(a: np.ndarray) -> np.ndarray:
    """Return integers, saturated, as bytes."""
    return a.clip(-128, 127).astype(np.int8).view(np.uint8)


def fp8_vllm(x: np.ndarray) -> Quantized:
    """Quantize as vLLM's ``dynamic_per_token_scaled_fp8_quant`` and its fused kernels."""
    scales = np.maximum(div(amax_of(x), 448), f32(1 / (448 * 512)))
    return in_float32(scales, e4m3(div(x.astype(np.float64), scales[:, None])))


def fp8_vllm_triton(x: np.ndarray) -> Quantized:
    """Quantize as ``_per_token_group_quant_fp8``, whose ``/`` is ``div.full``: rcp.approx, times x.

    `test_triton` holds it to Triton on a GPU.
    """
    scales = mul(bounded(x, 1e-10), f32(1 / 448))
    return in_float32(scales, e4m3(times(x, rcp_approx(scales))))


def bf16(a: np.ndarray) -> np.ndarray:
    """Round float64 that are float32, too, to bfloat16, and return float64."""
    bits = np.asarray(a, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32).astype(np.float64)


def fp8_vllm_bf16(x: np.ndarray) -> Quantized:
    """Quantize as ``silu_mul_fp8_quant_deep_gemm_kernel``, in bfloat16."""
    scales = bf16(mul(bounded(x, 1e-10), bf16(1 / 448)))
    return in_float32(scales, e4m3(bf16(times(x, bf16(div(1.0, scales))))))


def ue8m0_vllm_bf16(x: np.ndarray) -> Quantized:
    """Quantize as the same kernel with ``CEIL_UE8M0``, which rounds a logarithm to bfloat16."""
    scales = bf16(mul(bounded(x, 1e-10), bf16(1 / 448)))
    exponents = (np.ceil(bf16(np.log2(scales))) + 127).astype(np.int64)
    return exponents.astype(np.uint8), e4m3(times(x, exact_multipliers(exponents)))


def fp8_sglang(x: np.ndarray) -> Quantized:
    """Quantize as ``per_token_group_quant.cuh``, which is compiled with ``--use_fast_math``."""
    amax = bounded(x, 1e-10)
    return in_float32(mul(amax, f32(1 / 448)), e4m3(times(x, mul(rcp_approx(amax), 448))))


def fp8_sglang_rows(x: np.ndarray) -> Quantized:
    """Quantize as ``per_token_quant_fp8.cuh`` on SM90, with ``--use_fast_math``."""
    scales = mul(bounded(x, 1e-10), f32(1 / 448))
    codes = e4m3(times(x, rcp_approx(scales)))
    return in_float32(np.where(amax_of(x) == 0, 0.0, scales), codes)


def fp8_torchao(x: np.ndarray) -> Quantized:
    """Quantize as ``triton_fp8_blockwise_act_quant_lhs``."""
    inverse = div(448, bounded(x, 1e-12))
    return in_float32(div(1.0, inverse), e4m3(times(x, inverse)))


def fp8_tilekernels(x: np.ndarray) -> Quantized:
    """Quantize as TileKernels' ``get_sf_and_inv``."""
    amax = bounded(x, 1e-4)
    return in_float32(div(amax, 448), e4m3(times(x, div(448, amax))))


def fp8_deepgemm(x: np.ndarray) -> Quantized:
    """Quantize as ``per_token_cast_to_fp8`` on CUDA, with the lower bound of `cute_quant`."""
    scales = np.maximum(mul(amax_of(x), f32(1 / 448)), f32(1e-10))
    return in_float32(scales, e4m3(times(x, div(1.0, scales))))


def int8_vllm(x: np.ndarray) -> Quantized:
    """Quantize as vLLM's ``per_token_group_quant_int8``, which truncates."""
    scales = div(bounded(x, 1e-10), 127)
    return in_float32(scales, int8(np.trunc(times(x, div(1.0, scales)))))


def int8_vllm_rows(x: np.ndarray) -> Quantized:
    """Quantize as vLLM's ``dynamic_scaled_int8_quant``, with the lower bound of `cute_quant`."""
    amax = bounded(x, 1e-10)
    scales = np.where(amax_of(x) == 0, 0.0, div(amax, 127))
    return in_float32(scales, int8(np.rint(times(x, div(127, amax)))))


def int8_sglang(x: np.ndarray) -> Quantized:
    """Quantize as ``per_token_group_quant.cuh``, which truncates."""
    amax = bounded(x, 1e-10)
    products = times(x, mul(rcp_approx(amax), 127))
    return in_float32(mul(amax, f32(1 / 127)), int8(np.trunc(products)))


def int8_sglang_rows(x: np.ndarray) -> Quantized:
    """Quantize as SGLang's ``per_token_quant_int8``: halves away from zero."""
    amax = bounded(x, 1e-10)
    products = times(x, mul(rcp_approx(amax), 127)).astype(np.float64)
    rounded = np.copysign(np.floor(np.abs(products) + 0.5), products)
    return in_float32(mul(amax, f32(1 / 127)), int8(rounded))


def int8_triton(x: np.ndarray) -> Quantized:
    """Quantize as ``_per_token_group_quant_int8``, whose ``/`` is ``div.full``; it truncates."""
    scales = mul(bounded(x, 1e-10), f32(1 / 127))
    return in_float32(scales, int8(np.trunc(times(x, rcp_approx(scales)))))
