"""The formulas of `tests.peers.formulas`, held to the code of the libraries where it is installed.

vLLM, TransformerEngine, torchao and DeepGEMM have their rules in torch, too, and run here on the
CPU. FlashInfer's CuTe DSL kernels run in the emulator.
"""

import logging
from types import ModuleType

import numpy as np
import pytest
import torch

from tests.c_compiler import needs_c_compiler
from tests.peers import formulas, libraries
from tests.peers.groups import BF16_KINDS, KINDS, TENSOR_AMAX, UPPER_SCALES, groups

ENCODE_SCALE = 2688 / TENSOR_AMAX
DECODE_SCALE = TENSOR_AMAX / 2688

every_kind = pytest.mark.parametrize("kind", KINDS)
# In torch, ceil(log2(x)) of a float32 next to a power of two is that of the power.
every_kind_for_log2 = pytest.mark.parametrize("kind", KINDS[:-1])
every_bf16_kind = pytest.mark.parametrize("kind", BF16_KINDS)
every_upper_scale = pytest.mark.parametrize("amax", UPPER_SCALES)
every_error = pytest.mark.parametrize("squared", [False, True], ids=["MAE", "MSE"])
every_domain = pytest.mark.parametrize("scaled_errors", [False, True])
both_largest = pytest.mark.parametrize("e4m3_max", [448, 256])


def as_bytes(t: torch.Tensor) -> np.ndarray:
    return t.contiguous().view(torch.uint8).numpy()


def unpacked(t: torch.Tensor) -> np.ndarray:
    packed = as_bytes(t)
    return np.stack([packed & 15, packed >> 4], -1)


def check(expected: formulas.Quantized, scale_bytes: np.ndarray, codes: np.ndarray) -> None:
    np.testing.assert_array_equal(scale_bytes.reshape(-1), expected[0])
    np.testing.assert_array_equal(codes.reshape(expected[1].shape), expected[1])


# Zero and underflowing groups, where the libraries differ most


@pytest.mark.parametrize(
    ("quantize", "sf", "largest", "zero"),
    [
        (lambda x: formulas.nvfp4_vllm(x, ENCODE_SCALE), 0, 0, 0),
        (lambda x: formulas.nvfp4_vllm_emulated(x, ENCODE_SCALE), 0, 0, 0),
        (lambda x: formulas.nvfp4_flashinfer(x, ENCODE_SCALE), 0, 0, 0),
        (lambda x: formulas.nvfp4_flashinfer_cuda(x, ENCODE_SCALE), 0, 7, 7),
        (lambda x: formulas.nvfp4_flashinfer_strict(x, ENCODE_SCALE), 0, 7, 0),
        (lambda x: formulas.nvfp4_te(x, ENCODE_SCALE), 0, 7, 0),
        (lambda x: formulas.nvfp4_torchao(x, DECODE_SCALE), 8, 1, 0),
        (lambda x: formulas.nvfp4_deepgemm(x, DECODE_SCALE), 1, 4, 0),
    ],
    ids=["vllm", "emulated", "cute_dsl", "cuda", "strict", "te", "torchao", "deepgemm"],
)
def test_scale_that_underflows(quantize, sf, largest, zero):
    """A group whose scale is less than half the smallest e4m3 value."""
    x = np.zeros((1, 16), np.float32)
    x[0, 0] = 6 * 2.0**-10.5 / ENCODE_SCALE
    scale_bytes, codes = quantize(x)
    assert scale_bytes.tolist() == [sf]
    assert codes[0, :2].tolist() == [largest, zero]


@pytest.mark.parametrize(
    ("quantize", "byte"),
    [
        (formulas.mxfp4_vllm, 0),
        (formulas.mxfp4_flashinfer, 0),
        (lambda x: formulas.mxfp4_torchao(x, "rceil"), 0),
        (formulas.mxfp4_deepgemm, 112),
        (formulas.mxfp8_vllm, 0),
        (formulas.mxfp8_flashinfer, 0),
        (formulas.mxfp8_te, 0),
        (lambda x: formulas.mxfp8_torchao(x, "rceil"), 0),
        (formulas.mxfp8_deepgemm, 105),
    ],
)
def test_zero_groups_of_mx(quantize, byte):
    scale_bytes, codes = quantize(np.zeros((1, 32), np.float32))
    assert scale_bytes.tolist() == [byte] and not codes.any()


@pytest.mark.parametrize(
    ("quantize", "value"),
    [
        (formulas.mxfp8_vllm, 0x30),
        (formulas.mxfp8_te, 0x30),
        (formulas.mxfp8_flashinfer, 0),
        (lambda x: formulas.mxfp8_torchao(x, "rceil"), 0),
        (lambda x: formulas.mxfp8_torchao(x, "floor"), 0x28),
        (formulas.mxfp8_deepgemm, 0),
    ],
)
def test_values_under_the_smallest_scale(quantize, value):
    _, codes = quantize(np.full((1, 32), 2.0**-128, np.float32))
    assert codes[0, 0] == value


@every_upper_scale
@every_kind
def test_kernel_of_vllm_differs_from_its_reference_beside_middles(kind, amax):
    """The reference rounds reciprocals that the kernel approximates. No scale underflows here."""
    x, encode_scale = groups(16, kind), formulas.f32(2688 / amax)
    sf, codes = formulas.nvfp4_vllm(x, encode_scale)
    expected_sf, expected = formulas.nvfp4_vllm_emulated(x, encode_scale)
    np.testing.assert_array_equal(sf, expected_sf)
    x, sf = x[sf > 0], sf[sf > 0]
    codes, expected = (np.where(c == 8, 0, c)[expected_sf > 0] for c in (codes, expected))
    group, column = np.nonzero(codes != expected)
    steps = np.abs((codes & 7).astype(int) - (expected & 7))[group, column]
    products = np.abs(x[group, column].astype(np.float64)) * encode_scale
    products /= formulas.decoded(sf[group])
    middles = (formulas.E2M1[1:] + formulas.E2M1[:-1]) / 2
    distances = np.abs(products[:, None] / middles - 1).min(1)
    assert (steps == 1).all() and (distances < 2.0**-21).all()


@pytest.mark.parametrize(
    ("amax", "encode_scale"), [(24.0, 112.0), (0.0, 1.0), (1e-38, formulas.FLOAT32_MAX)]
)
def test_encode_scale_of_te(amax, encode_scale):
    assert formulas.te_encode_scale(amax) == encode_scale


@every_kind
def test_mxfp4_of_vllm_is_mode_even_of_torchao_above_the_smallest_scale(kind):
    x = groups(32, kind)
    sf, codes = formulas.mxfp4_vllm(x)
    expected_sf, expected = formulas.mxfp4_torchao(x, "even")
    check((expected_sf, expected[sf > 0]), sf, codes[sf > 0])


@every_kind
def test_mxfp8_of_te_is_that_of_vllm(kind):
    x = groups(32, kind)
    check(formulas.mxfp8_vllm(x), *formulas.mxfp8_te(x))


# torchao


@pytest.fixture(scope="module")
def torchao() -> tuple[ModuleType, ModuleType]:
    libraries.skip_without("torchao")
    logging.disable(logging.WARNING)  # kernels for another version of torch
    try:
        from torchao.prototype.mx_formats import mx_tensor, nvfp4_tensor
    finally:
        logging.disable(logging.NOTSET)
    return mx_tensor, nvfp4_tensor


@pytest.mark.library("torchao")
@every_upper_scale
@every_kind
def test_nvfp4_of_torchao(torchao, kind, amax):
    x = groups(16, kind)
    decode_scale = torchao[1].per_tensor_amax_to_scale(torch.tensor(amax))
    sf, q = torchao[1].nvfp4_quantize(torch.from_numpy(x), 16, decode_scale)
    check(formulas.nvfp4_torchao(x, decode_scale.item()), as_bytes(sf), unpacked(q))


@pytest.mark.library("torchao")
@every_kind
def test_nvfp4_of_torchao_without_an_upper_scale(torchao, kind):
    x = groups(16, kind)
    sf, q = torchao[1].nvfp4_quantize(torch.from_numpy(x))
    check(formulas.nvfp4_torchao(x, None), as_bytes(sf), unpacked(q))


@pytest.mark.library("torchao")
@pytest.mark.parametrize("mode", ["floor", "ceil", "even"])
@every_kind
def test_mx_of_torchao(torchao, kind, mode):
    check_mx_of_torchao(torchao, kind, mode)


@pytest.mark.library("torchao")
@every_kind_for_log2
def test_mx_of_torchao_by_log2(torchao, kind):
    check_mx_of_torchao(torchao, kind, "rceil")


def check_mx_of_torchao(torchao, kind, mode):
    x = groups(32, kind)
    t, their_mode = torch.from_numpy(x), torchao[0].ScaleCalculationMode(mode)
    sf, q = torchao[0].to_mx(t, torch.float4_e2m1fn_x2, 32, their_mode)
    check(formulas.mxfp4_torchao(x, mode), as_bytes(sf), unpacked(q))
    sf, q = torchao[0].to_mx(t, torch.float8_e4m3fn, 32, their_mode)
    check(formulas.mxfp8_torchao(x, mode), as_bytes(sf), as_bytes(q))


# DeepGEMM


@pytest.mark.library("deep_gemm", "vllm")
@pytest.mark.parametrize("amax", [None, *UPPER_SCALES])
@every_kind
def test_nvfp4_of_deep_gemm(kind, amax):
    math = libraries.deep_gemm_math()
    if not hasattr(math, "per_token_cast_to_nvfp4"):
        pytest.skip("this version has no NVFP4")
    decode_scale = None if amax is None else (torch.tensor(amax) / 2688).item()
    x = groups(16, kind)
    # What a scale above 448 becomes is up to the version of torch.
    x = x[formulas.amax_of(x) <= (amax or 2688)]
    x = x[: len(x) // 4 * 4]
    q, sf = math.per_token_cast_to_nvfp4(
        torch.from_numpy(x).view(-1, 64), global_scale=decode_scale, use_packed_e4m3=True
    )
    check(formulas.nvfp4_deepgemm(x, decode_scale), as_bytes(sf), unpacked(q))


@pytest.mark.library("deep_gemm", "vllm")
@every_kind
def test_mx_of_deep_gemm(kind):
    math = libraries.deep_gemm_math()
    x = groups(32, kind)
    t = torch.from_numpy(x).view(-1, 128)
    q, sf = math.per_token_cast_to_fp8(t, True, 32, use_packed_ue8m0=True)
    check(formulas.mxfp8_deepgemm(x), as_bytes(sf), as_bytes(q))
    q, sf = math.per_token_cast_to_fp4(t, True, 32, use_packed_ue8m0=True)
    check(formulas.mxfp4_deepgemm(x), as_bytes(sf), unpacked(q))


# vLLM


@pytest.mark.library("vllm")
@every_upper_scale
@every_kind
def test_nvfp4_of_vllm(kind, amax):
    x = groups(16, kind)
    encode_scale = torch.tensor([2688 / amax])
    values, scales = libraries.vllm_nvfp4().ref_nvfp4_quant(torch.from_numpy(x), encode_scale, 16)
    sf = as_bytes(scales.to(torch.float8_e4m3fn))
    codes = formulas.e2m1(values.double().numpy())
    check(formulas.nvfp4_vllm_emulated(x, encode_scale.item()), sf, codes)


@pytest.mark.library("vllm")
@every_upper_scale
@every_kind
def test_dequantization_of_vllm(kind, amax):
    decode_scale = torch.tensor(amax) / 2688
    sf, codes = formulas.nvfp4_torchao(groups(16, kind), decode_scale.item())
    packed = torch.from_numpy(codes[:, ::2] | codes[:, 1::2] << 4)
    values = libraries.vllm_nvfp4().dequantize_to_dtype(
        packed, torch.from_numpy(sf)[:, None], decode_scale, torch.float32, 16, swizzle=False
    )
    expected = formulas.dequantized_vllm(codes, sf, decode_scale.item()).astype(np.float32)
    np.testing.assert_array_equal(values.numpy().view(np.uint32), expected.view(np.uint32))


@pytest.mark.library("vllm")
@every_kind_for_log2
def test_mxfp8_of_vllm(kind):
    x = groups(32, kind)
    q, sf = libraries.vllm_mxfp8()._mxfp8_e4m3_quantize_torch(torch.from_numpy(x))
    check(formulas.mxfp8_vllm(x), as_bytes(sf), as_bytes(q))


# TransformerEngine


def reference_of_te(x: np.ndarray, amax: torch.Tensor, **options) -> formulas.Quantized:
    reference = libraries.te_nvfp4().NVFP4QuantizerRef
    q, sf = reference._quantize_blockwise_reference(
        torch.from_numpy(x), amax, 16, 1, pow_2_scales=False, eps=0.0, **options
    )
    return as_bytes(sf), unpacked(q)


def without_negative_zero(
    quantized: formulas.Quantized, x: np.ndarray, encode_scale: formulas.Scale
) -> formulas.Quantized:
    """Clear the sign of products that are -0: the reference loses it, the kernels keep it."""
    sf, codes = quantized
    products = formulas.times(x, formulas.te_multipliers(sf, encode_scale))
    return sf, np.where(products == 0, np.uint8(0), codes)


@pytest.mark.library("transformer_engine")
@every_upper_scale
@every_kind
def test_nvfp4_of_te(kind, amax):
    x = groups(16, kind)
    largest = torch.tensor([amax])
    encode_scale = formulas.te_encode_scale(largest.double().numpy())
    expected = without_negative_zero(formulas.nvfp4_te(x, encode_scale), x, encode_scale)
    check(expected, *reference_of_te(x, largest))


@pytest.mark.library("transformer_engine")
@every_kind
def test_row_scaled_nvfp4_of_te(kind):
    x = groups(16, kind)
    amax = formulas.amax_of(x)
    encode_scale = formulas.te_encode_scale(amax)
    expected = without_negative_zero(formulas.nvfp4_te(x, encode_scale), x, encode_scale)
    result = reference_of_te(x, torch.from_numpy(amax).float(), row_scaled_nvfp4=True)
    check(expected, *result)


@pytest.mark.library("transformer_engine")
@every_domain
@every_error
@both_largest
@every_kind
def test_4over6_of_te(kind, e4m3_max, squared, scaled_errors):
    x = groups(16, kind)
    result = reference_of_te(
        x,
        torch.tensor([TENSOR_AMAX]),
        nvfp4_use_4over6=True,
        nvfp4_e4m3_max=e4m3_max,
        nvfp4_4over6_err_mode="MSE" if squared else "MAE",
        nvfp4_4over6_err_use_fast_math=scaled_errors,
    )
    expected = formulas.nvfp4_te_4over6(x, TENSOR_AMAX, e4m3_max, squared, scaled_errors)
    encode_scale = formulas.te_encode_scale(TENSOR_AMAX, e4m3_max)
    check(without_negative_zero(expected, x, encode_scale), *result)


# FlashInfer


@pytest.mark.library("flashinfer")
@needs_c_compiler
@pytest.mark.parametrize("strict", [False, True], ids=["fast", "strict"])
@every_bf16_kind
def test_nvfp4_of_flashinfer(kind, strict):
    from tests.peers import kernels

    module = libraries.flashinfer("quantization_cute_dsl_utils")
    x = groups(16, kind)
    formula = formulas.nvfp4_flashinfer_strict if strict else formulas.nvfp4_flashinfer
    check(formula(x, ENCODE_SCALE), *kernels.nvfp4(module, strict).run(x, ENCODE_SCALE))


@pytest.mark.library("flashinfer")
@needs_c_compiler
@every_domain
@every_error
@every_bf16_kind
def test_4over6_of_flashinfer(kind, squared, scaled_errors):
    from tests.peers import kernels

    module = libraries.flashinfer("quantization_cute_dsl_utils")
    recipe = module.NVFP44Over6Config(448, "MSE" if squared else "MAE", scaled_errors)
    x = groups(16, kind)[:4096]
    result = kernels.nvfp4(module, recipe=recipe).run(x, ENCODE_SCALE)
    expected = formulas.nvfp4_flashinfer_4over6(x, ENCODE_SCALE, squared, scaled_errors)
    check(expected, *result)


def rows_of_groups(kind: str) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Return rows of 64 in bf16, their groups, and the amax of the row of each group."""
    x = groups(16, kind)[:2048]
    t = torch.from_numpy(x).view(-1, 64)
    t = torch.cat([t, torch.zeros(1, 64)])
    row_amax = t.abs().amax(1).double().numpy().repeat(4)
    return t.bfloat16(), t.view(-1, 16).numpy(), row_amax


@pytest.mark.library("flashinfer")
@needs_c_compiler
@pytest.mark.parametrize("strict", [False, True], ids=["fast", "strict"])
@every_bf16_kind
def test_per_token_nvfp4_of_flashinfer(kind, strict):
    from tests.peers import kernels

    module = libraries.flashinfer("kernels.nvfp4_quantize")
    t, x, row_amax = rows_of_groups(kind)
    row_scale, *result = kernels.run_per_token(module, t, strict)
    if strict:
        encode_scale = formulas.te_encode_scale(row_amax)
        stored = np.where(row_amax == 0, 0, formulas.div(1, encode_scale))
        expected = formulas.nvfp4_flashinfer_strict(x, encode_scale)
    else:
        encode_scale, stored = formulas.flashinfer_row_scales(row_amax)
        expected = formulas.nvfp4_flashinfer(x, encode_scale)
    check(expected, *result)
    np.testing.assert_array_equal(row_scale, stored[::4])


@pytest.mark.library("flashinfer")
@needs_c_compiler
@every_error
@both_largest
@pytest.mark.parametrize("strict", [False, True], ids=["fast", "strict"])
@pytest.mark.parametrize("kind", ["normal", "any bits", "zeros"])
def test_per_token_4over6_of_flashinfer(kind, strict, e4m3_max, squared):
    from tests.peers import kernels

    module = libraries.flashinfer("kernels.nvfp4_quantize")
    t, x, row_amax = rows_of_groups(kind)
    recipe = module.NVFP44Over6Config(e4m3_max, "MSE" if squared else "MAE")
    _, *result = kernels.run_per_token(module, t, strict, recipe)
    if strict:
        te = formulas.nvfp4_te_4over6(x, row_amax, e4m3_max, squared)
        expected = formulas.without_zero_groups(x, te)
    else:
        expected = formulas.nvfp4_flashinfer_per_token_4over6(x, row_amax, e4m3_max, squared)
    check(expected, *result)


@pytest.mark.library("flashinfer")
@needs_c_compiler
@every_bf16_kind
def test_mxfp4_of_flashinfer(kind):
    from tests.peers import kernels

    x = groups(32, kind)
    module = libraries.flashinfer("quantization_cute_dsl_utils")
    check(formulas.mxfp4_flashinfer(x), *kernels.mxfp4(module).run(x))


@pytest.mark.library("flashinfer")
@needs_c_compiler
@every_kind
def test_mxfp8_of_flashinfer(kind):
    from tests.peers import kernels

    module = libraries.flashinfer("kernels.mxfp8_quantize")
    x = groups(32, kind)
    t = torch.from_numpy(x).clone()  # aligned for loads of 32 bytes
    check(formulas.mxfp8_flashinfer(x), *kernels.run_mxfp8(module, t))
    if kind in BF16_KINDS:
        check(formulas.mxfp8_flashinfer(x), *kernels.run_mxfp8(module, t.bfloat16()))
