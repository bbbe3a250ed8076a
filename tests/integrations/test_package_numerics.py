"""The package's numerics, held to the formulas of `tests.peers.formulas` in every bit.

The CPU reference is held to them on many groups, the kernels in the emulator on some of each kind.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable

import numpy as np
import pytest
import torch

import cute_quant as cq
from cute_quant.contract.dtypes import INPUT_DTYPES, dtype_name
from cute_quant.contract.upper_scales import DECODE, ENCODE, UpperScale
from tests.c_compiler import needs_c_compiler
from tests.helpers import ARCHITECTURES
from tests.peers import formulas
from tests.peers.groups import BF16_KINDS, KINDS, UPPER_SCALES, groups, neighbours

Formula = Callable[..., formulas.Quantized]
Quantize = Callable[..., tuple[torch.Tensor, ...]]

FORMULAS: dict[tuple[str, str], Formula] = {
    ("NVFP4", "vllm"): formulas.nvfp4_vllm,
    ("NVFP4", "vllm_emulation"): formulas.nvfp4_vllm_emulated,
    ("NVFP4", "flashinfer"): formulas.nvfp4_flashinfer,
    ("NVFP4", "te"): formulas.nvfp4_te,
    ("NVFP4", "torchao"): formulas.nvfp4_torchao,
    ("NVFP4", "deepgemm"): formulas.nvfp4_deepgemm,
    ("MXFP4", "vllm"): formulas.mxfp4_vllm,
    ("MXFP4", "flashinfer"): formulas.mxfp4_flashinfer,
    ("MXFP4", "torchao"): lambda x: formulas.mxfp4_torchao(x, "rceil"),
    ("MXFP4", "deepgemm"): formulas.mxfp4_deepgemm,
    ("MXFP8", "vllm"): formulas.mxfp8_vllm,
    ("MXFP8", "flashinfer"): formulas.mxfp8_flashinfer,
    ("MXFP8", "te"): formulas.mxfp8_te,
    ("MXFP8", "torchao"): lambda x: formulas.mxfp8_torchao(x, "rceil"),
    ("MXFP8", "deepgemm"): formulas.mxfp8_deepgemm,
    ("DEEP_GEMM", "vllm_bf16"): formulas.ue8m0_vllm_bf16,
}
FLOAT32_FORMULAS: dict[tuple[str, str], Formula] = {
    ("GROUPWISE_FP8", "vllm"): formulas.fp8_vllm,
    ("GROUPWISE_FP8", "vllm_triton"): formulas.fp8_vllm_triton,
    ("GROUPWISE_FP8", "vllm_bf16"): formulas.fp8_vllm_bf16,
    ("GROUPWISE_FP8", "sglang"): formulas.fp8_sglang,
    ("GROUPWISE_FP8", "torchao"): formulas.fp8_torchao,
    ("GROUPWISE_FP8", "tilekernels"): formulas.fp8_tilekernels,
    ("GROUPWISE_FP8", "deepgemm"): formulas.fp8_deepgemm,
    ("INT8", "vllm"): formulas.int8_vllm,
    ("INT8", "vllm_triton"): formulas.int8_triton,
    ("INT8", "sglang"): formulas.int8_sglang,
    ("ROWWISE_FP8", "vllm"): formulas.fp8_vllm,
    ("ROWWISE_FP8", "sglang"): formulas.fp8_sglang_rows,
    ("ROWWISE_INT8", "vllm"): formulas.int8_vllm_rows,
    ("ROWWISE_INT8", "sglang"): formulas.int8_sglang_rows,
}
NVFP4_FORMULAS = {key: formula for key, formula in FORMULAS.items() if key[0] == "NVFP4"}
CONVENTIONS = {"torchao": DECODE, "deepgemm": DECODE}
"""How the formula of a library takes the upper scale, others the encode scale."""

every_formula = pytest.mark.parametrize(("name", "numerics"), FORMULAS, ids=str)
every_float32_formula = pytest.mark.parametrize(("name", "numerics"), FLOAT32_FORMULAS, ids=str)
every_nvfp4_formula = pytest.mark.parametrize(("name", "numerics"), NVFP4_FORMULAS, ids=str)
every_input_dtype = pytest.mark.parametrize("dtype", INPUT_DTYPES, ids=dtype_name)
every_kind = pytest.mark.parametrize("kind", KINDS)

SLOW_GROUPS = int(os.environ.get("NUMERICS_GROUPS", 1 << 16))
"""Groups of each numerics. NUMERICS_GROUPS=1048576 takes some minutes."""
BLOCK = 1 << 16
ROW_GROUPS = 64
"""Groups of a row in the emulator."""


def format_of(name: str, numerics: str) -> cq.Format:
    """Return a format whose scales lie as the formulas return them."""
    return cq.NAMED_FORMATS[name].replace(numerics=numerics, scale_layout="row_major")


def in_dtype(x: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Return groups in a dtype of inputs, 1 for what it does not hold."""
    t = torch.from_numpy(x).to(dtype)
    return t.where(t.isfinite(), 1)


def codes_of(q: torch.Tensor, fmt: cq.Format) -> np.ndarray:
    """Return a byte for each value."""
    stored = q.view(torch.uint8).numpy()
    if fmt.value_type.per_byte == 1:
        return stored
    return np.stack([stored & 15, stored >> 4], -1).reshape(*stored.shape[:-1], -1)


def check(x: torch.Tensor, name: str, numerics: str, encode: np.ndarray, quantize: Quantize):
    """Hold `quantize` to the formula.

    Args:
        x: (..., mn, k).
        encode: the encode scale, or one for each matrix of x.
        quantize: takes x, a format and an upper scale.
    """
    fmt = format_of(name, numerics)
    upper, options = None, ()
    if fmt.upper_scale:
        kind = CONVENTIONS.get(numerics, ENCODE)
        scale = encode.astype(np.float32)
        scale = scale if kind == ENCODE else np.reciprocal(scale, dtype=np.float32)[...]
        upper = UpperScale(kind, torch.from_numpy(scale))
        per_matrix = x[0].numel() // fmt.group_size if scale.ndim else 1
        options = (np.repeat(scale.astype(np.float64), per_matrix),)
    in_groups = x.float().numpy()
    if not fmt.whole_row:
        in_groups = in_groups.reshape(-1, fmt.group_size)
    scale_bytes, codes = (FORMULAS | FLOAT32_FORMULAS)[name, numerics](in_groups, *options)
    q, sf = quantize(x, fmt, upper)
    found = sf.view(torch.uint8).numpy().reshape(-1)
    wrong = np.flatnonzero(found != scale_bytes)
    assert not len(wrong), (wrong[:4], found[wrong[:4]], scale_bytes[wrong[:4]])
    np.testing.assert_array_equal(codes_of(q, fmt).reshape(codes.shape), codes)


def on_cpu(
    x: torch.Tensor, fmt: cq.Format, upper: UpperScale | None
) -> tuple[torch.Tensor, torch.Tensor]:
    q, sf = cq.quantize(x, fmt, **({} if upper is None else {upper.kind: upper.tensor}))
    return q, sf


def encode_scale(amax: float) -> np.ndarray:
    return np.array(2688 / amax)


# The CPU


@every_input_dtype
@every_kind
@every_formula
def test_groups(name, numerics, kind, dtype):
    x = in_dtype(groups(cq.NAMED_FORMATS[name].group_size, kind), dtype)
    for amax in UPPER_SCALES if name == "NVFP4" else UPPER_SCALES[:1]:
        check(x, name, numerics, encode_scale(amax), on_cpu)


@every_float32_formula
def test_float32_scales(name, numerics):
    """Also on elements beside the middle of two values, where an error of the last bit counts."""
    for kind, dtype in zip(KINDS, itertools.cycle(INPUT_DTYPES)):
        check(in_dtype(some_groups(128, kind)[::4], dtype), name, numerics, np.ones(()), on_cpu)
    check(torch.from_numpy(beside_middles_of_8_bits(name)), name, numerics, np.ones(()), on_cpu)


def beside_middles_of_8_bits(name: str) -> np.ndarray:
    """Return groups with elements up to four units in the last place from where values change."""
    rng = np.random.default_rng(8)
    fmt = cq.NAMED_FORMATS[name]
    amax = (2.0 ** rng.uniform(-12, 12, (256, 1))).astype(np.float32).astype(np.float64)
    if fmt.values is torch.int8:
        middles = rng.integers(1, 255, (256, 128)) / 2.0
    else:
        at = rng.integers(1, len(formulas.E4M3) - 1, (256, 128))
        middles = (formulas.E4M3[at] + formulas.E4M3[at + 1]) / 2
    signs = rng.choice([-1, 1], middles.shape)
    x = (signs * middles * amax / fmt.value_type.max).astype(np.float32)
    x.view(np.int32)[...] += rng.integers(-4, 5, x.shape, dtype=np.int32)
    x = x.clip(-amax, amax).astype(np.float32)
    x[:, :1] = amax
    return x


def random_groups(count: int, size: int, seed: int) -> np.ndarray:
    """Return groups of random bits, half of them of one magnitude each, up to 2^40 apart."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(1 << 32, size=(count // 2, size), dtype=np.uint32).view(np.float32)
    near = rng.standard_normal((count // 2, size)) * 2.0 ** rng.uniform(-20, 20, (count // 2, 1))
    x = np.concatenate([np.where(np.isfinite(bits), bits, 1), near])
    return rng.permutation(x).astype(np.float32)


@pytest.mark.parametrize(
    "blocks", [1, pytest.param(SLOW_GROUPS // BLOCK, marks=pytest.mark.slow)], ids=["some", "many"]
)
@every_formula
def test_random_groups(name, numerics, blocks):
    size = cq.NAMED_FORMATS[name].group_size
    for seed in range(blocks):
        dtype = INPUT_DTYPES[seed % 3] if blocks > 1 else torch.float32
        x = in_dtype(random_groups(BLOCK if blocks > 1 else BLOCK // 2, size, seed), dtype)
        check(x, name, numerics, encode_scale(float(2.0 ** (seed - 8.3))), on_cpu)


def scales_of_the_domain(count: int) -> np.ndarray:
    """Return encode scales from 2^-117 to 2^117, and both ends."""
    rng = np.random.default_rng(count)
    scales = (2.0 ** rng.uniform(-117, 117, count)).astype(np.float32).clip(2.0**-117, 2.0**117)
    scales[:2] = 2.0**-117, 2.0**117
    return scales


@every_nvfp4_formula
def test_upper_scales(name, numerics):
    """Every matrix of a batch has an encode scale, and groups around what it maps to 2688."""
    scales = scales_of_the_domain(2048)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2048, 16, 16)) * 2.0 ** rng.uniform(-14, 2, (2048, 16, 1))
    with np.errstate(over="ignore"):
        x = (x * 600 / scales[:, None, None].astype(np.float64)).astype(np.float32)
    x = np.where(np.isfinite(x), x, np.float32(1))
    check(torch.from_numpy(x), name, numerics, scales, on_cpu)


def beside_middles(scales: np.ndarray, rows: int) -> np.ndarray:
    """Return groups with elements that an error of the last bit of their multiplier can change.

    After the amax come 15 elements, at most two units in the last place from the middle of two
    codes.

    Args:
        scales: encode scales, one for each matrix.

    Returns:
        (matrices, rows, 16), float32.
    """
    rng = np.random.default_rng(rows)
    encode = scales.astype(np.float64)[:, None]
    shape = len(scales), rows
    x = np.empty((*shape, 16), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        x[..., 0] = 2688 / encode * 2.0 ** rng.uniform(-10, 0, shape)
        scale_bytes = formulas.e4m3(x[..., 0].astype(np.float64) * encode / 6)
        steps = formulas.decoded(scale_bytes) / encode
        middles = rng.choice([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], (*shape, 15))
        x[..., 1:] = middles * steps[..., None]
    x[..., 1:].view(np.int32)[...] += rng.integers(-2, 3, (*shape, 15), dtype=np.int32)
    return np.where(np.isfinite(x), x, np.float32(1))


@every_nvfp4_formula
def test_products_beside_middles(name, numerics):
    scales = scales_of_the_domain(2048)
    check(torch.from_numpy(beside_middles(scales, 16)), name, numerics, scales, on_cpu)


@pytest.mark.parametrize("amax", [*UPPER_SCALES, 0.0, 1e-30, 3.3e38])
def test_amax_of_te(amax):
    """From the amax of a tensor, TransformerEngine computes the encode scale as the package."""
    x = groups(16, "normal").astype(np.float64)
    x = torch.from_numpy((x * (amax / np.abs(x).max())).astype(np.float32))
    fmt = format_of("NVFP4", "te")
    scale_bytes, codes = formulas.nvfp4_te(x.numpy(), formulas.te_encode_scale(np.float32(amax)))
    q, sf = cq.quantize(x, fmt, amax=torch.tensor(amax))
    np.testing.assert_array_equal(sf.view(torch.uint8).numpy().reshape(-1), scale_bytes)
    np.testing.assert_array_equal(codes_of(q, fmt), codes)


@every_kind
def test_rows_of_te(kind):
    """Under a scale for each row, too, as far as its amax is 2688 / 2^117 or more."""
    x = groups(16, kind)
    x = x[: len(x) // 4 * 4].reshape(-1, 64)
    x = np.where(formulas.amax_of(x)[:, None] < 2688 / 2.0**117, np.float32(0), x)
    rows, scale = torch.from_numpy(x), formulas.te_encode_scale(formulas.amax_of(x))
    fmt = format_of("NVFP4", "te").replace(row_scale=True)
    scale_bytes, codes = formulas.nvfp4_te(rows.numpy().reshape(-1, 16), scale.repeat(4))
    q, sf, row_scales = cq.quantize(rows, fmt)
    np.testing.assert_array_equal(sf.view(torch.uint8).numpy().reshape(-1), scale_bytes)
    np.testing.assert_array_equal(codes_of(q, fmt).reshape(codes.shape), codes)
    np.testing.assert_array_equal(row_scales.numpy(), formulas.div(1, scale))


# Kernels in the emulator


def some_groups(size: int, kind: str) -> np.ndarray:
    """Return a few groups of a kind, from all of it, in rows."""
    x = groups(size, kind)
    x = x[:: max(len(x) // 512, 1)][:512]
    return np.resize(x, (-(-len(x) // ROW_GROUPS) * ROW_GROUPS, size))


@needs_c_compiler
@pytest.mark.parametrize("arch", ARCHITECTURES)
@every_formula
def test_kernels(name, numerics, arch, kernels):
    from tests.kernels.emulated_gpu import Gpu

    gpu = Gpu(kernels, arch)

    def quantize(x: torch.Tensor, fmt: cq.Format, upper: UpperScale | None):
        return gpu.quantize(x, None, None, fmt, upper=upper)

    size = cq.NAMED_FORMATS[name].group_size
    for dtype in INPUT_DTYPES:
        for kind in BF16_KINDS if dtype is not torch.float32 else KINDS:
            x = in_dtype(some_groups(size, kind), dtype).view(-1, ROW_GROUPS * size)
            check(x, name, numerics, encode_scale(UPPER_SCALES[len(kind) % 4]), quantize)
    if name != "NVFP4":
        x = np.zeros((ROW_GROUPS, size), np.float32)
        largest = cq.NAMED_FORMATS[name].value_type.max
        x[:8, 0] = neighbours(np.array([largest * 2.0**-127]))
        check(in_dtype(x, torch.float32).view(1, -1), name, numerics, encode_scale(1.0), quantize)
    else:
        scales = scales_of_the_domain(64)
        x = groups(16, "underflowing")[: 64 * 8].reshape(64, 2, 64).astype(np.float64)
        x = (x * 2.0**14 / scales[:, None, None]).clip(-3e38, 3e38).astype(np.float32)
        check(torch.from_numpy(x), name, numerics, scales, quantize)
        x = beside_middles(scales, 4).reshape(64, 1, 64)
        check(torch.from_numpy(x), name, numerics, scales, quantize)


@pytest.mark.slow
@needs_c_compiler
@every_float32_formula
def test_kernels_of_float32_scales(name, numerics, kernels):
    from tests.kernels.emulated_gpu import Gpu

    # Half of the numerics on each architecture.
    arch = ARCHITECTURES[list(FLOAT32_FORMULAS).index((name, numerics)) % len(ARCHITECTURES)]
    gpu = Gpu(kernels, arch)

    def quantize(x: torch.Tensor, fmt: cq.Format, upper: UpperScale | None):
        return gpu.quantize(x, None, None, fmt, upper=upper)

    x = np.concatenate([some_groups(128, kind)[::8] for kind in KINDS])
    check(in_dtype(x, torch.bfloat16), name, numerics, np.ones(()), quantize)
    x = np.concatenate([x, beside_middles_of_8_bits(name)])
    check(torch.from_numpy(x), name, numerics, np.ones(()), quantize)


@needs_c_compiler
@pytest.mark.parametrize("numerics", ["sglang", "vllm"])
def test_kernels_on_groups_that_are_not_finite(numerics, kernels):
    """Values and scale are NaN, as on the CPU, also where the inverse of Inf is 0."""
    from tests.kernels.emulated_gpu import Gpu

    x = torch.ones(1, 4 * 128)
    x[0, 3], x[0, 130], x[0, 257] = torch.nan, torch.inf, -torch.inf
    fmt = format_of("GROUPWISE_FP8", numerics)
    for quantize in (on_cpu, lambda x, fmt, _: Gpu(kernels, "sm_90a").quantize(x, None, None, fmt)):
        q, sf = quantize(x, fmt, None)
        assert sf.isnan().tolist() == [[True, True, True, False]]
        assert (codes_of(q, fmt)[0, : 3 * 128] == 0x7F).all() and not q[
            0, 384:
        ].float().isnan().any()


@pytest.mark.gpu
@every_float32_formula
def test_float32_scales_on_a_gpu(name, numerics):
    x = np.concatenate(
        [*(some_groups(128, kind) for kind in KINDS), beside_middles_of_8_bits(name)]
    )

    def on_gpu(x: torch.Tensor, fmt: cq.Format, upper: UpperScale | None):
        return tuple(t.cpu() for t in cq.quantize(x.cuda(), fmt))

    for dtype in INPUT_DTYPES:
        check(in_dtype(x, dtype), name, numerics, np.ones(()), on_gpu)
