"""SwiGLU in front of the quantizer: to the bit on the CPU, within bounds on a GPU."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from cute_quant import (
    DEEP_GEMM,
    DEEP_GEMM_32,
    DEEP_GEMM_SM90,
    GROUPWISE_FP8,
    INT8,
    ROWWISE_FP8,
    Format,
    Indexed,
    Masked,
    PrefixSum,
    quantize,
    silu_mul_quantize,
)
from tests.contract.test_inputs import ONE_OF_EACH_LAYOUT, ROWS, inputs, int32
from tests.helpers import (
    DIFFERING_SHARE,
    INPUT_DTYPES,
    UE8M0,
    all_formats,
    as_arguments,
    assert_quantized_as,
    assert_same_bits,
    bits,
    mostly_slow,
    moved,
    on_device,
    poisoned_results,
    poisoned_scales,
    poisoned_values,
    random_bits,
    storage_bits,
    upper_scale,
    whole_bytes,
)
from tests.prologues import Bounds, gathered, silu_bounds, split_halves

every_format = pytest.mark.parametrize("fmt", mostly_slow(all_formats(), 3), ids=str)
every_layout = pytest.mark.parametrize("fmt", ONE_OF_EACH_LAYOUT, ids=str)
every_dtype = pytest.mark.parametrize("dtype", INPUT_DTYPES, ids=str)
both_roundings = pytest.mark.parametrize("rounding", ["fused", "unfused"])

GPT_OSS = {"clamp": 7, "alpha": 1.702, "beta": 1, "interleaved": True}
OPTIONS = [
    {},
    GPT_OSS,
    {"interleaved": True},
    {"clamp": 0.3},
    {"alpha": -2.5, "beta": 0.25},
    {"alpha": 0, "beta": -1e-3, "clamp": 1e30},
]
every_option = pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda o: "-".join(f"{k}{v}" for k, v in o.items()) or "plain"
)


def check(
    gate_up: torch.Tensor,
    fmt: Format,
    device: str,
    rounding: str = "fused",
    *,
    weight: torch.Tensor | None = None,
    rows: object = None,
    index: torch.Tensor | None = None,
    extra_rows: int = 0,
    last_padding: bool = True,
    share: float = DIFFERING_SHARE,
    **options: object,
) -> tuple[torch.Tensor, ...]:
    """Quantize into poisoned memory, and compare every byte; on a GPU a `share` may differ."""
    gate_up = whole_bytes(gate_up, fmt, 2)
    source, place = gathered(gate_up, index)
    bounds = silu_bounds(source, weight, rounding, **options)
    *batch_shape, mn, k = bounds.values.shape
    out = poisoned_results(fmt, mn, k, device, extra_rows, last_padding, tuple(batch_shape))
    upper = upper_scale(bounds.values.float().to(device), fmt)
    results = silu_mul_quantize(
        moved(gate_up, device),
        fmt,
        **options,
        weight=None if weight is None else weight.to(device),
        rounding=rounding,
        rows=on_device(rows, device),
        index=None if index is None else index.to(device),
        out=out,
        **as_arguments(upper),
    )
    assert len(results) == len(out)
    assert all(result is own for result, own in zip(results, out, strict=True))
    q, sf, *row_scales = out
    if index is not None:
        bounds = Bounds(*(t.flatten(0, -2) for t in bounds))
    row_scales = row_scales[0] if row_scales else None
    assert_quantized_as(q, sf, fmt, bounds, rows, place, share, upper, row_scales)
    return out


def weights(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(7, 512), (2, 3, 140)])
def test_unfused_is_what_torch_computes(dtype, shape):
    x = inputs(shape, dtype)
    gate, up = x.chunk(2, -1)
    pairs = [
        ({}, functional.silu(gate) * up),
        ({"alpha": 1.702}, gate * torch.sigmoid(1.702 * gate) * up),
        ({"beta": 1}, functional.silu(gate) * (up + 1)),
        (
            {"clamp": 7.0, "alpha": 1.702, "beta": 1.0},
            gate.clamp(max=7.0)
            * torch.sigmoid(1.702 * gate.clamp(max=7.0))
            * (up.clamp(-7.0, 7.0) + 1.0),
        ),
    ]
    for options, y in pairs:
        results = silu_mul_quantize(x, DEEP_GEMM_32, rounding="unfused", **options)
        for result, expected in zip(results, quantize(y, DEEP_GEMM_32), strict=True):
            assert_same_bits(result, expected)


def silu_mul_of_vllm(gate_up, clamp, alpha, beta):
    """The steps of ``_silu_mul_quant_fp8_packed_kernel`` before its quantizer, in torch."""
    gate, up = gate_up.float().chunk(2, -1)
    if clamp is not None:
        gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
    glu = gate * torch.sigmoid(gate * alpha)
    return ((up + beta) * glu).to(gate_up.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_of_vllm_is_its_formula(dtype):
    """With SiLU to the bit; other bits than those of the roundings beside it."""
    x = torch.randn(64, 2048, generator=torch.Generator().manual_seed(3)).to(dtype)
    gate, up = x.float().chunk(2, -1)
    results = silu_mul_quantize(x, rounding="vllm")
    y = (functional.silu(gate) * up).to(dtype)
    for result, expected in zip(results, quantize(y), strict=True):
        assert_same_bits(result, expected)
    limit = torch.tensor(7.03).item()
    options = {"clamp": limit, "alpha": 1.75, "beta": 0.3}
    y = silu_mul_of_vllm(4 * x, limit, 1.75, torch.tensor(0.3).item())
    results = silu_mul_quantize(4 * x, rounding="vllm", **options)
    for result, expected in zip(results, quantize(y), strict=True):
        assert_same_bits(result, expected)
    for other in ("fused", "unfused"):
        q, _ = silu_mul_quantize(4 * x, rounding=other, **options)
        assert (bits(q) != bits(results[0])).any()


def test_rounding_of_triton(device):
    """As vLLM writes it; other values than those of "unfused", whose sigmoid is rounded."""
    x = inputs((64, 2048), torch.bfloat16, 1)
    options = {"clamp": 7.03, "alpha": 1.702, "beta": 1.0}
    q, _ = check(x, DEEP_GEMM_32, device, "vllm_triton", **options)
    others = silu_mul_quantize(x.to(device), DEEP_GEMM_32, rounding="unfused", **options)[0]
    assert (bits(q) != bits(others)).any()
    gate, up = (t.float() for t in x.chunk(2, -1))
    limit = torch.tensor(7.03).bfloat16().float()
    gate, up = gate.clamp(max=limit), (up.clamp(-limit, limit) + 1).bfloat16()
    glu = (gate * torch.sigmoid(gate * torch.tensor(1.702))).bfloat16()
    results = silu_mul_quantize(x, DEEP_GEMM_32, rounding="vllm_triton", **options)
    for result, expected in zip(results, quantize(glu * up, DEEP_GEMM_32), strict=True):
        assert_same_bits(result, expected)


def test_rounding_of_sglang(device):
    """Ups plus beta are rounded, and nothing else: other values than those of "fused"."""
    x = inputs((64, 2048), torch.bfloat16, 1)
    options = {"clamp": 7.0, "alpha": 1.702, "beta": 1.0}
    q, _ = check(x, DEEP_GEMM_32, device, "sglang", **options)
    others = silu_mul_quantize(x.to(device), DEEP_GEMM_32, **options)[0]
    assert (bits(q) != bits(others)).any()
    plain = silu_mul_quantize(x, DEEP_GEMM_32, rounding="sglang")
    for result, expected in zip(plain, silu_mul_quantize(x, DEEP_GEMM_32), strict=True):
        assert_same_bits(result, expected)


@pytest.mark.parametrize(
    ("rounding", "same"), [("vllm_cuda", "fused"), ("vllm_bf16", "vllm_triton")]
)
def test_exponential_of_cuda(rounding, same, device):
    """Kernels alone have it: the CPU has an exact one, and rounds where another rounding does."""
    x = inputs((64, 2048), torch.bfloat16, 1)
    for options in ({}, {"clamp": 7.03, "alpha": 1.702, "beta": 1.0}):
        check(x, DEEP_GEMM_32, device, rounding, **options)
        expected = silu_mul_quantize(x, DEEP_GEMM_32, rounding=same, **options)
        results = silu_mul_quantize(x, DEEP_GEMM_32, rounding=rounding, **options)
        for result, other in zip(results, expected, strict=True):
            assert_same_bits(result, other)


def test_rounding_of_vllm_with_weights(device):
    check(inputs((6, 140), torch.bfloat16, 1), DEEP_GEMM_32, device, "vllm", weight=weights(6))


@both_roundings
@every_format
def test_every_format(fmt, rounding, device):
    check(inputs((6, 140), torch.bfloat16, 1), fmt, device, rounding)
    options = {**GPT_OSS, "weight": weights(2, 3)}
    check(inputs((2, 3, 66), torch.float16, 2), fmt, device, rounding, extra_rows=2, **options)
    check(inputs((5, 1200), torch.bfloat16, 3), fmt, device, rounding, last_padding=False)


@both_roundings
@every_dtype
@every_option
@pytest.mark.parametrize("weighted", [False, True])
def test_options(options, dtype, rounding, weighted, device):
    weight = weights(33) if weighted else None
    fmt = INT8.replace(group_size=16)
    for x in (random_bits((33, 192), dtype, 5), inputs((33, 192), dtype, 6)):
        check(x, UE8M0, device, rounding, weight=weight, **options)
        check(x, fmt, device, rounding, weight=weight, **options)


@both_roundings
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"alpha": 1.702}], ids=["silu", "gelu"])
def test_every_gate(dtype, rounding, options, device):
    """Quantize every gate beside an up of 1, in groups of consecutive gates.

    The magnitudes of a group are about the same. The result of a small gate is half of it, which
    often lies halfway between two values.
    """
    gate = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = torch.cat([gate.view(-1, 256), torch.ones(256, 256, dtype=dtype)], 1)
    for fmt in (DEEP_GEMM, DEEP_GEMM_SM90):
        fmt = fmt.replace(group_size=16, min_scale=2.0**-126)
        check(x, fmt, device, rounding, share=0.02, **options)


@both_roundings
@pytest.mark.parametrize("name", ROWS)
@every_layout
def test_rows(name, fmt, rounding, device):
    rows, shape, index = ROWS[name]
    shape = (*shape[:-1], 66)
    x = inputs(shape, torch.bfloat16, 2) if shape[0] else torch.empty(shape, dtype=torch.bfloat16)
    results = shape[:-1] if index is None else index.shape
    extra_rows = 0 if isinstance(rows, Masked) else 3
    choices = {"rows": rows, "index": index}
    check(x, fmt, device, rounding, **choices, extra_rows=extra_rows)
    check(x, fmt, device, rounding, **choices, weight=weights(*results), last_padding=False)


@pytest.mark.parametrize("name", ["masked", "psum", "indexed", "index-2d"])
def test_weights_of_rows_that_do_not_exist(name, device):
    """Weights of rows that do not exist are not used: NaN among them changes nothing."""
    rows, shape, index = ROWS[name]
    x = inputs((*shape[:-1], 66), torch.bfloat16, 2).to(device)
    weight = weights(*(shape[:-1] if index is None else index.shape)).to(device)
    index = None if index is None else index.to(device)
    mn = weight.shape[-1]
    row = torch.arange(mn, device=device)
    match rows:
        case Masked():
            live = row < rows.masked_m.to(device).clamp(0, mn)[:, None]
        case PrefixSum():
            live = (row < 3) | ((row >= 4) & (row < 12))
        case Indexed():
            live = rows.m_indices.to(device) >= 0
        case None:
            live = (index >= 0) & (index < shape[0])
    choices = {"fmt": DEEP_GEMM_32, "rows": on_device(rows, device), "index": index}
    results = []
    for w in (weight, weight.where(live, torch.nan)):
        out = poisoned_values(mn, 33, device, batch_shape=tuple(weight.shape[:-1])), None
        q, sf = silu_mul_quantize(x, weight=w, **choices, out=out)
        results.append((q, sf[live]))
    for one, other in zip(*results, strict=True):
        assert_same_bits(one, other)


@both_roundings
def test_strides(rounding, device):
    wide = inputs((4, 12, 300), torch.bfloat16, 3)
    views = [
        wide[0, :, 7:147],
        wide[:, 2:7, :140],
        wide[:, ::2, 16:80],
        wide.transpose(0, 1)[..., 32:172],
        wide[:1, :, :66].expand(3, 12, 66),
        wide[0, :1, :66].expand(5, 66),
        wide[:, None, :3, :2],
    ]
    for x in views:
        for options in ({}, GPT_OSS):
            check(x, DEEP_GEMM_SM90.replace(group_size=32), device, rounding, **options)


@both_roundings
@every_dtype
def test_interleaving(dtype, rounding, device):
    if rounding == "unfused" and dtype == torch.float32:
        pytest.skip("torch's float32 sigmoid on the CPU depends on the strides")
    x = inputs((9, 280), dtype, 4).to(device)
    gate, up = x.chunk(2, -1)
    interleaved = torch.stack([gate, up], -1).flatten(-2)
    results = silu_mul_quantize(x, DEEP_GEMM_32, rounding=rounding)
    expected = silu_mul_quantize(interleaved, DEEP_GEMM_32, rounding=rounding, interleaved=True)
    for one, other in zip(results, expected, strict=True):
        assert_same_bits(one, other)


@both_roundings
@pytest.mark.parametrize("shape", [(0, 140), (3, 0), (0, 0), (2, 0, 66), (0, 3, 66), (2, 3, 0)])
def test_nothing(shape, rounding, device):
    x = torch.empty(shape, dtype=torch.bfloat16, device=device)
    q, sf = silu_mul_quantize(x, rounding=rounding, weight=x.new_empty(shape[:-1]).float())
    expected = quantize(x[..., : shape[-1] // 2])
    for result, wanted in zip((q, sf), expected, strict=True):
        assert_same_bits(result, wanted)
        assert result.stride() == wanted.stride()


def test_largest_rows(device):
    """Quantize k = 2^20 columns, from rows of 2^21."""
    x = torch.ones(1, 2**21, dtype=torch.bfloat16, device=device)
    q, sf = silu_mul_quantize(x, GROUPWISE_FP8)
    assert q.shape == (1, 2**20) and sf.unique().numel() == 1
    q, sf = silu_mul_quantize(x, ROWWISE_FP8)
    assert q.float().unique().tolist() == [448.0]


@pytest.mark.parametrize("given", ["both", "q", "sf", "neither"])
def test_out(given, device):
    x = inputs((2, 5, 140), torch.bfloat16, 5).to(device)
    expected = silu_mul_quantize(x)
    q = poisoned_values(7, 70, device, batch_shape=(2,)) if given in ("both", "q") else None
    sf = None
    if given in ("both", "sf"):
        sf = poisoned_scales(UE8M0, 5, 70, device, batch_shape=(2,))
    results = silu_mul_quantize(x, out=(q, sf))
    assert q is None or (results[0] is q and bits(q[:, 5:]).eq(0).all())
    assert sf is None or results[1] is sf
    assert_same_bits(results[0][:, :5], expected[0])
    assert_same_bits(results[1], expected[1])
    assert torch.equal(storage_bits(results[1]), storage_bits(expected[1]))


@both_roundings
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", [3, 131])
@pytest.mark.parametrize("clamp", [None, 7.0])
def test_special_values(special, column, clamp, rounding, device):
    """NaN makes its group NaN, and no other. A clamp makes Inf finite, except for gates of -Inf."""
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    x[0, column] = special
    gate = column < 128
    finite = clamp is not None and not math.isnan(special) and not (gate and special < 0)
    q, sf = check(x, DEEP_GEMM_SM90.replace(group_size=32), device, rounding, clamp=clamp)
    nan = torch.zeros(2, 4, dtype=torch.bool)
    nan[0, column % 128 // 32] = not finite
    assert torch.equal(sf.isnan().cpu(), nan)
    assert torch.equal(q.float().isnan().cpu(), nan.repeat_interleave(32, 1))


def test_zeros_keep_their_sign(device):
    x = torch.tensor([[1.0, -1.0, 1.0, -1.0, 0.0, 0.0, -0.0, -0.0]] * 4, device=device)
    for rounding in ("fused", "unfused"):
        q, _ = silu_mul_quantize(x, DEEP_GEMM_32, rounding=rounding)
        assert bits(q[0]).tolist() == [0x00, 0x80, 0x80, 0x00]


def test_numbers_are_float32(device):
    """Options are rounded to float32 first, whatever their types are."""
    x = inputs((5, 140), torch.float32, 7).to(device)
    options = {"clamp": 0.1, "alpha": 0.3, "beta": 0.7}
    as_float32 = {name: torch.tensor(value).item() for name, value in options.items()}
    assert as_float32 != options
    as_numpy = {name: np.float32(value) for name, value in options.items()}
    expected = silu_mul_quantize(x, **options)
    for same in (as_float32, as_numpy):
        for result, wanted in zip(silu_mul_quantize(x, **same), expected, strict=True):
            assert_same_bits(result, wanted)


def test_clamp_beyond_the_dtype():
    """A clamp beyond float16 rounds to Inf, and so clamps nothing."""
    x = torch.tensor([[65504.0, 1.0, math.inf, 2.0]], dtype=torch.float16)
    for result, wanted in zip(
        silu_mul_quantize(x, clamp=70000, rounding="unfused"),
        silu_mul_quantize(x, rounding="unfused"),
        strict=True,
    ):
        assert_same_bits(result, wanted)


@pytest.mark.parametrize("options", OPTIONS[1:])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bounds_hold_for_float32(dtype, options):
    """The bounds for a GPU hold for arithmetic in float32, with a float64 exponential."""
    for x in (
        random_bits((33, 512), dtype, 1),
        torch.linspace(-120, 120, 2**12).to(dtype).view(-1, 64).repeat(1, 2),
    ):
        x = x.where((x.abs() < 1e4) & (x.abs() > 1e-18), 1.0)
        gate, up = split_halves(x.float(), options.get("interleaved", False))
        clamp, alpha, beta = (options.get(o) for o in ("clamp", "alpha", "beta"))
        if clamp is not None:
            gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
        alpha = torch.tensor(1.0 if alpha is None else alpha).item()
        y = gate / (1 + torch.exp(-alpha * gate.double()).float()) * (up + (beta or 0.0))
        bounds = silu_bounds(x, **options)
        assert ((bounds.low <= y) & (y <= bounds.high)).all()
        bounds = silu_bounds(x, None, "unfused", **options)
        assert ((bounds.low <= bounds.values) & (bounds.values <= bounds.high)).all()


def test_input_is_left_alone(device):
    x = inputs((5, 140), torch.float32, 8).to(device)
    weight = weights(5).to(device)
    before = x.clone(), weight.clone()
    for rounding in ("fused", "unfused"):
        silu_mul_quantize(x, weight=weight, clamp=1.0, rounding=rounding)
    assert_same_bits(x, before[0])
    assert_same_bits(weight, before[1])


def test_counts_are_checked(device):
    x = inputs((4, 66), torch.bfloat16).to(device)
    index = int32([0, 3, 4], device)
    silu_mul_quantize(x, index=index)
    with pytest.raises(ValueError, match=r"index: expected -1 to 3, got 4 at 2"):
        silu_mul_quantize(x, index=index, check=True)


@pytest.mark.parametrize("sign", [1, -1])
def test_alpha_leaves_room_for_its_product(sign, device):
    gate_up = torch.ones(2, 256, dtype=torch.bfloat16, device=device)
    silu_mul_quantize(gate_up, alpha=sign * 2.0**100)
    with pytest.raises(ValueError, match="alpha: expected a magnitude up to"):
        silu_mul_quantize(gate_up, alpha=sign * 2.0**100 * (1 + 2.0**-23))
