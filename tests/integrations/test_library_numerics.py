"""The formulas of `tests.peers.formulas`, held to the code of the libraries where it is installed.

vLLM, TransformerEngine, torchao and DeepGEMM have their rules in torch, too, and run here on the
CPU. Their kernels differ from that in what `tests.peers.formulas` says of each.
"""

import logging

import numpy as np
import pytest
import torch

from tests.peers import formulas, libraries

TENSOR_AMAX = 24.0
ENCODE_SCALE = 2688 / TENSOR_AMAX
DECODE_SCALE = float(np.float32(TENSOR_AMAX / 2688))


def every_bf16() -> np.ndarray:
    """Return the finite bf16 values that are not negative, as float32."""
    return (np.arange(0x7F80, dtype=np.uint32) << 16).view(np.float32)


def random_groups(size: int, scales: np.ndarray, seed: int, rows: int = 4096) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, size)) * rng.choice(scales, (rows, 1))
    return in_bf16(x.astype(np.float32))


def in_bf16(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(x).bfloat16().float().numpy()


def groups(size: int) -> dict[str, np.ndarray]:
    """Return float32 groups by what they try."""
    rng = np.random.default_rng(size)
    amax = every_bf16()
    with np.errstate(over="ignore"):
        patterns = amax[:, None] * rng.uniform(-1, 1, (len(amax), size)).astype(np.float32)
    patterns = in_bf16(patterns)
    patterns[np.arange(len(amax)), rng.integers(size, size=len(amax))] = amax
    zeros = np.zeros((4, size), np.float32)
    zeros[1] = -0.0
    zeros[2, ::2] = -0.0
    zeros[3, 3] = -1e-40
    bits = rng.integers(0, 1 << 16, (8192, size), dtype=np.uint32) << 16
    any_bf16 = bits.view(np.float32)
    return {
        "normal": random_groups(size, np.array([1.0]), 1),
        "wide": random_groups(size, 2.0 ** np.arange(-40, 6), 2),
        "underflowing": random_groups(size, 2.0 ** np.arange(-18, -6), 3),
        "ties": rng.integers(-48, 49, (4096, size)).astype(np.float32) / 8,
        "every amax": patterns,
        "zeros": zeros,
        "any bits": np.where(np.isfinite(any_bf16), any_bf16, np.float32(1)),
        "float32": rng.standard_normal((8192, size)).astype(np.float32),
    }


GROUPS = {size: groups(size) for size in (16, 32)}

of_sixteen = pytest.mark.parametrize("x", GROUPS[16].values(), ids=GROUPS[16])
of_thirty_two = pytest.mark.parametrize("x", GROUPS[32].values(), ids=GROUPS[32])
every_upper_scale = pytest.mark.parametrize("amax", [TENSOR_AMAX, 1.0, 3.1e-3, 7.7e4])


def as_bytes(t: torch.Tensor) -> np.ndarray:
    return t.contiguous().view(torch.uint8).numpy()


def unpacked(t: torch.Tensor, size: int) -> np.ndarray:
    """Return the codes of packed bytes, (groups, size)."""
    packed = as_bytes(t).reshape(-1)
    return np.stack([packed & 15, packed >> 4], -1).reshape(-1, size)


def encoded(values: torch.Tensor) -> np.ndarray:
    """Return the codes of float32 values that e2m1 has."""
    return formulas.e2m1(values.double().numpy())


def check(result: formulas.Quantized, scale_bytes: np.ndarray, codes: np.ndarray) -> None:
    sf, expected = result
    np.testing.assert_array_equal(sf, scale_bytes.reshape(sf.shape))
    np.testing.assert_array_equal(expected, codes.reshape(expected.shape))


def without_negative_zero(codes: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Clear the sign of elements that are -0: references lose it where kernels keep it."""
    return np.where((x == 0) & (codes == 8), np.uint8(0), codes)


@pytest.fixture(scope="module")
def torchao():
    libraries.skip_without("torchao")
    logging.disable(logging.WARNING)
    from torchao.prototype.mx_formats import mx_tensor, nvfp4_tensor

    logging.disable(logging.NOTSET)
    return mx_tensor, nvfp4_tensor


@every_upper_scale
@of_sixteen
def test_nvfp4_of_torchao(torchao, x, amax):
    decode_scale = torch.tensor(amax) / 2688
    sf, q = torchao[1].nvfp4_quantize(torch.from_numpy(x), 16, decode_scale)
    check(formulas.nvfp4_torchao(x, decode_scale.item()), as_bytes(sf), unpacked(q, 16))


@of_sixteen
def test_nvfp4_of_torchao_without_an_upper_scale(torchao, x):
    sf, q = torchao[1].nvfp4_quantize(torch.from_numpy(x))
    check(formulas.nvfp4_torchao(x, None), as_bytes(sf), unpacked(q, 16))


@pytest.mark.parametrize("mode", ["floor", "rceil", "ceil", "even"])
@of_thirty_two
def test_mx_of_torchao(torchao, x, mode):
    mode_of_torchao = torchao[0].ScaleCalculationMode(mode)
    sf, q = torchao[0].to_mx(torch.from_numpy(x), torch.float4_e2m1fn_x2, 32, mode_of_torchao)
    check(formulas.mxfp4_torchao(x, mode), as_bytes(sf), unpacked(q, 32))
    sf, q = torchao[0].to_mx(torch.from_numpy(x), torch.float8_e4m3fn, 32, mode_of_torchao)
    check(formulas.mxfp8_torchao(x, mode), as_bytes(sf), as_bytes(q))


@every_upper_scale
@of_sixteen
def test_nvfp4_of_deep_gemm(x, amax):
    math = libraries.deep_gemm_math()
    if not hasattr(math, "per_token_cast_to_nvfp4"):
        pytest.skip("this version has no NVFP4")
    decode_scale = (torch.tensor(amax) / 2688).item()
    t = torch.from_numpy(x).reshape(-1, 64)
    q, sf = math.per_token_cast_to_nvfp4(t, global_scale=decode_scale, use_packed_e4m3=True)
    check(formulas.nvfp4_deepgemm(x, decode_scale), as_bytes(sf), unpacked(q, 16))
    q, sf = math.per_token_cast_to_nvfp4(t, use_packed_e4m3=True)
    check(formulas.nvfp4_deepgemm(x, None), as_bytes(sf), unpacked(q, 16))


@of_thirty_two
def test_mx_of_deep_gemm(x):
    math = libraries.deep_gemm_math()
    t = torch.from_numpy(x).reshape(-1, 128)
    q, sf = math.per_token_cast_to_fp8(t, True, 32, use_packed_ue8m0=True)
    check(formulas.mxfp8_deepgemm(x), as_bytes(sf), as_bytes(q))
    q, sf = math.per_token_cast_to_fp4(t, True, 32, use_packed_ue8m0=True)
    check(formulas.mxfp4_deepgemm(x), as_bytes(sf), unpacked(q, 32))


@every_upper_scale
@of_sixteen
def test_nvfp4_of_vllm(x, amax):
    encode_scale = torch.tensor([2688 / amax])
    values, scales = libraries.vllm_nvfp4().ref_nvfp4_quant(torch.from_numpy(x), encode_scale, 16)
    sf = as_bytes(scales.to(torch.float8_e4m3fn))
    check(formulas.nvfp4_vllm_emulated(x, encode_scale.item()), sf, encoded(values))


@every_upper_scale
@of_sixteen
def test_dequantization_of_vllm(x, amax):
    decode_scale = torch.tensor(amax) / 2688
    sf, codes = formulas.nvfp4_torchao(x, decode_scale.item())
    packed = torch.from_numpy(codes[:, ::2] | codes[:, 1::2] << 4)
    scales = torch.from_numpy(sf)[:, None]
    values = libraries.vllm_nvfp4().dequantize_to_dtype(
        packed, scales, decode_scale, torch.float32, 16, swizzle=False
    )
    expected = formulas.dequantized_vllm(codes, sf, decode_scale.item()).astype(np.float32)
    np.testing.assert_array_equal(values.numpy().view(np.uint32), expected.view(np.uint32))


@of_thirty_two
def test_mxfp8_of_vllm(x):
    q, sf = libraries.vllm_mxfp8()._mxfp8_e4m3_quantize_torch(torch.from_numpy(x))
    check(formulas.mxfp8_vllm(x), as_bytes(sf), as_bytes(q))


def reference_of_te(x: np.ndarray, amax: float, **options) -> formulas.Quantized:
    reference = libraries.te_nvfp4().NVFP4QuantizerRef
    t, largest = torch.from_numpy(x), torch.tensor([amax])
    q, sf = reference._quantize_blockwise_reference(
        t, largest, 16, 1, pow_2_scales=False, eps=0.0, **options
    )
    return as_bytes(sf), unpacked(q, 16)


@every_upper_scale
@of_sixteen
def test_nvfp4_of_te(x, amax):
    sf, codes = formulas.nvfp4_te(x, formulas.te_encode_scale(np.float32(amax)))
    check((sf, without_negative_zero(codes, x)), *reference_of_te(x, amax))


@pytest.mark.parametrize("scaled_errors", [False, True])
@pytest.mark.parametrize("mode", ["MAE", "MSE"])
@pytest.mark.parametrize("e4m3_max", [448, 256])
@of_sixteen
def test_4over6_of_te(x, e4m3_max, mode, scaled_errors):
    options = {
        "nvfp4_use_4over6": True,
        "nvfp4_e4m3_max": e4m3_max,
        "nvfp4_4over6_err_mode": mode,
        "nvfp4_4over6_err_use_fast_math": scaled_errors,
    }
    sf, codes = formulas.nvfp4_te_4over6(x, TENSOR_AMAX, e4m3_max, mode == "MSE", scaled_errors)
    check((sf, without_negative_zero(codes, x)), *reference_of_te(x, TENSOR_AMAX, **options))
