"""RMSNorm in front of the quantizer: to the bit on the CPU, within bounds on a GPU."""

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
    INT8,
    ROWWISE_FP8,
    Format,
    Masked,
    quantize,
    rms_norm_quantize,
)
from tests.contract.test_inputs import ONE_OF_EACH_LAYOUT, ROWS, inputs, int32
from tests.helpers import (
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
    poisoned,
    poisoned_results,
    poisoned_scales,
    poisoned_values,
    random_bits,
    storage_bits,
    upper_scale,
    whole_bytes,
)
from tests.prologues import Bounds, gathered, norm_bounds

every_format = pytest.mark.parametrize("fmt", mostly_slow(all_formats(), 3), ids=str)
every_layout = pytest.mark.parametrize("fmt", ONE_OF_EACH_LAYOUT, ids=str)
every_dtype = pytest.mark.parametrize("dtype", INPUT_DTYPES, ids=str)
both_roundings = pytest.mark.parametrize("rounding", ["fused", "unfused"])
of_libraries = pytest.mark.parametrize("rounding", ["huggingface", "vllm"])


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(
    x: torch.Tensor,
    fmt: Format,
    device: str,
    rounding: str = "fused",
    *,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    residual: torch.Tensor | None = None,
    place: str = "residual",
    normalized: bool = True,
    rows: object = None,
    index: torch.Tensor | None = None,
    extra_rows: int = 0,
    last_padding: bool = True,
) -> tuple[torch.Tensor, ...]:
    """Quantize into poisoned memory, and compare every byte of all that is written.

    Args:
        place: where the updated residual goes: to "residual" in place, which is "same" as a third
            of `out`, "alias" as another tensor of its memory, or to "other" memory.
    """
    x = whole_bytes(x, fmt)
    residual = None if residual is None else whole_bytes(residual, fmt)
    source, places = gathered(x, index)
    weight = normal(x.shape[-1], dtype=x.dtype, seed=9) if weight is None else weight
    total = source.float() if residual is None else source.float() + residual.float()
    bounds = norm_bounds(total, weight, eps, weight_offset, rounding, x.dtype)
    *batch_shape, mn, k = total.shape
    own = poisoned_results(fmt, mn, k, device, extra_rows, last_padding, tuple(batch_shape))
    upper = upper_scale(bounds.values.float().to(device), fmt)
    out, row, given, before = own, None, None, None
    if residual is not None:
        given = moved(residual, device).clone(memory_format=torch.preserve_format)
        assert given.stride() == residual.stride()
        before = given.clone()
        target = {"other": poisoned_like(given), "alias": given.view_as(given)}.get(place, given)
        out = out if place == "residual" else (*own, target)
    if normalized:
        row = poisoned_like(source).to(device)
    results = rms_norm_quantize(
        moved(x, device),
        weight.to(device),
        fmt,
        eps=eps,
        residual=given,
        weight_offset=weight_offset,
        rounding=rounding,
        normalized=False if row is None else row,
        rows=on_device(rows, device),
        index=None if index is None else index.to(device),
        out=out,
        **as_arguments(upper),
    )
    expected = [*own, *([] if residual is None else [target]), *([] if row is None else [row])]
    assert len(results) == len(expected)
    assert all(result is wanted for result, wanted in zip(results, expected, strict=True))
    if residual is not None:
        assert_same_bits(nan_free(target), nan_free(total.to(x.dtype)))
        if place == "other":
            assert_same_bits(given, before)
    if row is not None:
        low, high = (t.to(x.dtype) for t in (bounds.low, bounds.high))
        exact = bounds.values.to(x.dtype)
        if device == "cpu":
            low = high = exact
        inside = (low <= row.cpu()) & (row.cpu() <= high) | exact.isnan() & row.cpu().isnan()
        assert inside.all()
    if index is not None:
        bounds = Bounds(*(t.flatten(0, -2) for t in bounds))
    q, sf, *row_scales = own
    row_scales = row_scales[0] if row_scales else None
    assert_quantized_as(q, sf, fmt, bounds, rows, places, upper=upper, row_scales=row_scales)
    return results


def poisoned_like(t: torch.Tensor) -> torch.Tensor:
    return poisoned(t.numel() * t.element_size(), t.device.type).view(t.dtype).view(t.shape)


def nan_free(t: torch.Tensor) -> torch.Tensor:
    """`t` on the CPU with one NaN for all: which one an addition makes is not in the contract."""
    return t.cpu().where(~t.cpu().isnan(), torch.nan)


@every_dtype
@pytest.mark.parametrize("shape", [(7, 512), (2, 3, 140)])
@pytest.mark.parametrize("weight_dtype", ["x", "float32"])
def test_unfused_is_what_torch_computes(dtype, shape, weight_dtype):
    x, residual = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype, seed=1)
    x[0, 0], residual[0, 0] = 0.0, 0.0
    weight = normal(shape[-1], dtype=dtype, seed=2)
    y = functional.rms_norm(x + residual, shape[-1:], weight, 1e-6)
    if weight_dtype == "float32":
        weight = weight.float()
    updated = residual.clone()
    results = rms_norm_quantize(
        x, weight, DEEP_GEMM_32, eps=1e-6, residual=updated, rounding="unfused", normalized=True
    )
    assert results[2] is updated
    for result, expected in zip(
        results, (*quantize(y, DEEP_GEMM_32), x + residual, y), strict=True
    ):
        assert_same_bits(result, expected)
    y = functional.rms_norm(x, shape[-1:], weight.to(dtype), 1e-3)
    results = rms_norm_quantize(x, weight, eps=1e-3, rounding="unfused")
    for result, expected in zip(results, quantize(y), strict=True):
        assert_same_bits(result, expected)


def llama_rms_norm(hidden, residual, weight, eps):
    """LlamaRMSNorm of transformers, after the sum that its layers compute."""
    hidden = residual + hidden
    updated, dtype = hidden, hidden.dtype
    hidden = hidden.to(torch.float32)
    variance = hidden.pow(2).mean(-1, keepdim=True)
    hidden = hidden * torch.rsqrt(variance + eps)
    return weight * hidden.to(dtype), updated


def vllm_rms_norm(x, residual, weight, eps):
    """``fused_add_rms_norm`` of vllm.ir.ops.layernorm."""
    dtype = x.dtype
    x = x.to(torch.float32) + residual.to(torch.float32)
    updated = x.to(dtype)
    variance = x.pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + eps)
    x = x.to(weight.dtype) * weight
    return x.to(dtype), updated


@every_dtype
@of_libraries
@pytest.mark.parametrize("fmt", [DEEP_GEMM_32, ROWWISE_FP8], ids=str)
def test_rounding_of_a_library_is_its_formula(rounding, dtype, fmt):
    """To the bit, and other bits than those of the roundings beside it."""
    x, residual = normal(64, 1024, dtype=dtype), normal(64, 1024, dtype=dtype, seed=1)
    weight, eps = normal(1024, dtype=dtype, seed=2), torch.tensor(1e-6).item()
    formula = {"huggingface": llama_rms_norm, "vllm": vllm_rms_norm}[rounding]
    y, total = formula(x, residual, weight, eps)
    updated = residual.clone()
    results = rms_norm_quantize(
        x, weight, fmt, residual=updated, rounding=rounding, normalized=True
    )
    for result, expected in zip(results, (*quantize(y, fmt), total, y), strict=True):
        assert_same_bits(result, expected)
    if dtype is torch.float32:
        return
    for other in ("fused", "unfused", "huggingface", "vllm"):
        out = rms_norm_quantize(x, weight, fmt, residual=residual.clone(), rounding=other)
        assert (bits(out[0]) != bits(results[0])).any() == (other != rounding)


def test_rounding_of_vllm_with_a_float32_weight():
    """The row is not rounded then."""
    x, residual, weight = normal(8, 512), normal(8, 512, seed=1), normal(512, seed=2).float()
    y, _ = vllm_rms_norm(x, residual, weight, torch.tensor(1e-6).item())
    results = rms_norm_quantize(x, weight, residual=residual, rounding="vllm")
    for result, expected in zip(results, quantize(y), strict=False):
        assert_same_bits(result, expected)


@of_libraries
def test_rounding_of_a_library_has_no_offset(rounding):
    with pytest.raises(ValueError, match=f"weight_offset: expected 0 with rounding={rounding}"):
        rms_norm_quantize(normal(2, 128), normal(128), weight_offset=1, rounding=rounding)


@of_libraries
@every_layout
def test_layouts_of_libraries(fmt, rounding, device):
    x, residual = inputs((6, 140), torch.bfloat16, 1), inputs((6, 140), torch.bfloat16, 2)
    check(x, fmt, device, rounding, residual=residual)


def test_weight_offset_is_what_gemma_computes():
    x, weight = normal(7, 512), normal(512, seed=2) * 0.1
    y = functional.rms_norm(x.float(), (512,), 1.0 + weight.float(), 1e-6).to(torch.bfloat16)
    results = rms_norm_quantize(x, weight, weight_offset=1, rounding="unfused")
    for result, expected in zip(results, quantize(y), strict=True):
        assert_same_bits(result, expected)


@both_roundings
@every_format
def test_every_format(fmt, rounding, device):
    check(normal(6, 70), fmt, device, rounding)
    options = {"residual": normal(2, 3, 33, dtype=torch.float16, seed=1), "extra_rows": 2}
    check(normal(2, 3, 33, dtype=torch.float16), fmt, device, rounding, **options)
    check(normal(5, 600), fmt, device, rounding, last_padding=False, weight_offset=1.0)


@both_roundings
@every_dtype
@pytest.mark.parametrize("weight_dtype", ["x", "float32"])
@pytest.mark.parametrize("place", ["residual", "same", "alias", "other", "none"])
@pytest.mark.parametrize(("eps", "weight_offset"), [(1e-6, 0.0), (0.1, 0.3), (0, -1)])
def test_options(eps, weight_offset, place, weight_dtype, dtype, rounding, device):
    weight = normal(300, dtype=dtype if weight_dtype == "x" else torch.float32, seed=3)
    options = {"weight": weight, "eps": eps, "weight_offset": weight_offset, "place": place}
    for x, residual in (
        (normal(33, 300, dtype=dtype), normal(33, 300, dtype=dtype, seed=1)),
        (inputs((12, 300), dtype, 1), inputs((12, 300), dtype, 3)),
        (random_bits((12, 300), dtype, 4), random_bits((12, 300), dtype, 5)),
    ):
        residual = None if place == "none" else residual
        check(x, UE8M0, device, rounding, residual=residual, **options)
        fmt = INT8.replace(group_size=16)
        check(x, fmt, device, rounding, residual=residual, **options, normalized=False)


@both_roundings
@every_dtype
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-3, 1e4, 1e18, 3e37])
def test_magnitudes(scale, dtype, rounding, device):
    """Sums of squares overflow float32, and underflow it."""
    x = (normal(9, 512, dtype=torch.float32) * scale).to(dtype)
    fmt = DEEP_GEMM_SM90.replace(group_size=32, min_scale=2.0**-126)
    for eps in (0.0, 1e-6):
        check(x, fmt, device, rounding, eps=eps)


@both_roundings
@pytest.mark.parametrize("name", ROWS)
@every_layout
def test_rows(name, fmt, rounding, device):
    rows, shape, index = ROWS[name]
    x = inputs(shape, torch.bfloat16, 2) if shape[0] else torch.empty(shape, dtype=torch.bfloat16)
    extra_rows = 0 if isinstance(rows, Masked) else 3
    choices = {"rows": rows, "index": index, "normalized": False}
    check(x, fmt, device, rounding, **choices, extra_rows=extra_rows)
    check(x, fmt, device, rounding, **choices, last_padding=False)


@both_roundings
def test_strides(rounding, device):
    """X may have any strides; residual and normalized rows have its strides, without overlap."""
    wide = normal(4, 12, 300)
    fmt = DEEP_GEMM_SM90.replace(group_size=32)
    for view in (
        lambda t: t[0, :, 7:147],
        lambda t: t[:, 2:7, :140],
        lambda t: t[:, ::2, 16:80],
        lambda t: t.transpose(0, 1)[..., 32:172],
        lambda t: t[:, None, :3, :1],
    ):
        check(view(wide), fmt, device, rounding)
        residual, row = (moved(normal(4, 12, 300, seed=s), device) for s in (1, 2))
        around = residual.clone(), row.clone()
        x = moved(view(wide), device)
        weight = normal(x.shape[-1], seed=3).to(device)
        options = {"fmt": DEEP_GEMM_32, "rounding": rounding}
        expected = rms_norm_quantize(
            x, weight, residual=view(residual).contiguous(), **options, normalized=True
        )
        results = rms_norm_quantize(
            x, weight, residual=view(residual), **options, normalized=view(row)
        )
        for result, wanted in zip(results, expected, strict=True):
            assert_same_bits(result, wanted)
        # Nothing between the rows is touched.
        for t, before, wanted in zip((residual, row), around, expected[2:], strict=True):
            view(before).copy_(wanted)
            assert_same_bits(t, before)
    for x in (wide[:1, :, :66].expand(3, 12, 66), wide[0, :1, :66].expand(5, 66)):
        residual = normal(*x.shape, seed=1)
        check(x, fmt, device, rounding, residual=residual, place="other")


@both_roundings
@pytest.mark.parametrize("shape", [(0, 70), (3, 0), (0, 0), (2, 0, 33), (0, 3, 33), (2, 3, 0)])
def test_nothing(shape, rounding, device):
    x, residual = (torch.empty(shape, dtype=torch.bfloat16, device=device) for _ in range(2))
    weight = x.new_empty(shape[-1])
    results = rms_norm_quantize(
        x, weight, eps=1e-6, residual=residual, rounding=rounding, normalized=True
    )
    assert results[2] is residual and results[3].shape == shape and results[3].dtype == x.dtype
    for result, wanted in zip(results[:2], quantize(x), strict=True):
        assert_same_bits(result, wanted)
        assert result.stride() == wanted.stride()


@both_roundings
@pytest.mark.parametrize("k", [1, 2, 16, 8192, 32767, 32768])
def test_sizes_of_rows(k, rounding, device):
    check(normal(3, k), UE8M0, device, rounding, residual=normal(3, k, seed=1))
    check(normal(3, k), DEEP_GEMM_SM90.replace(group_size=-1), device, rounding)


@pytest.mark.parametrize("given", ["both", "q", "sf", "neither"])
@pytest.mark.parametrize("length", [2, 3])
def test_out(given, length, device):
    x, weight = normal(2, 5, 70).to(device), normal(70, seed=1).to(device)
    expected = rms_norm_quantize(x, weight)
    assert len(expected) == 2
    q = poisoned_values(7, 70, device, batch_shape=(2,)) if given in ("both", "q") else None
    sf = None
    if given in ("both", "sf"):
        sf = poisoned_scales(UE8M0, 5, 70, device, batch_shape=(2,))
    results = rms_norm_quantize(x, weight, out=(q, sf, None)[:length])
    assert len(results) == 2
    assert q is None or (results[0] is q and bits(q[:, 5:]).eq(0).all())
    assert sf is None or results[1] is sf
    assert_same_bits(results[0][:, :5], expected[0])
    assert_same_bits(results[1], expected[1])
    assert torch.equal(storage_bits(results[1]), storage_bits(expected[1]))


def test_what_is_returned(device):
    x, weight = normal(5, 70).to(device), normal(70, seed=1).to(device)
    residual, other = normal(5, 70, seed=2).to(device), torch.empty_like(x)
    row = torch.empty_like(x)
    assert len(rms_norm_quantize(x, weight)) == 2
    assert len(rms_norm_quantize(x, weight, normalized=True)) == 3
    assert rms_norm_quantize(x, weight, residual=residual)[2] is residual
    assert (
        rms_norm_quantize(x, weight, eps=1e-6, residual=residual, out=(None, None, other))[2]
        is other
    )
    results = rms_norm_quantize(x, weight, eps=1e-6, residual=residual, normalized=row)
    assert len(results) == 4 and results[2] is residual and results[3] is row
    results = rms_norm_quantize(x, weight, eps=1e-6, residual=residual, normalized=True)
    assert results[3].is_contiguous() and results[3].dtype == x.dtype


@both_roundings
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["x", "residual"])
def test_special_values(special, where, rounding, device):
    """NaN makes its row NaN. Inf, over a root mean square of Inf, is NaN, and all else 0."""
    x, residual = normal(3, 70), normal(3, 70, seed=1)
    {"x": x, "residual": residual}[where][1, 35] = special
    fmt = DEEP_GEMM_SM90.replace(group_size=32)
    q, sf, updated, row = check(x, fmt, device, rounding, residual=residual)
    nan = torch.zeros(3, 3, dtype=torch.bool)
    nan[1] = torch.tensor([math.isnan(special), True, math.isnan(special)])
    assert torch.equal(sf.isnan().cpu(), nan)
    assert torch.equal(q.float().isnan().cpu(), nan.repeat_interleave(32, 1)[:, :70])
    assert (~updated.isfinite()).sum() == 1
    if not math.isnan(special):
        assert row[1, :35].eq(0).all() and row[1, 36:].eq(0).all() and row[1, 35].isnan()


def test_rows_of_zeros(device):
    """Rows of zeros stay zeros with an eps, such as the default; without one they are 0 / 0."""
    x = torch.zeros(2, 70, dtype=torch.bfloat16, device=device)
    weight = torch.ones(70, device=device)
    for rounding in ("fused", "unfused"):
        q, sf = rms_norm_quantize(x, weight, DEEP_GEMM_SM90, rounding=rounding)
        assert bits(q).eq(0).all() and sf.isfinite().all()
        q, sf = rms_norm_quantize(x, weight, DEEP_GEMM_SM90, eps=0, rounding=rounding)
        assert sf.isnan().all()


def test_numbers_are_float32(device):
    x = normal(5, 70, dtype=torch.float32).to(device)
    weight = normal(70, dtype=torch.float32, seed=1).to(device)
    expected = rms_norm_quantize(x, weight, eps=0.1, weight_offset=0.3, normalized=True)
    for number in (lambda value: torch.tensor(value).item(), np.float32):
        same = rms_norm_quantize(
            x, weight, eps=number(0.1), weight_offset=number(0.3), normalized=True
        )
        for result, wanted in zip(same, expected, strict=True):
            assert_same_bits(result, wanted)


@both_roundings
def test_inputs_are_left_alone(rounding, device):
    x = normal(5, 70, dtype=torch.float32).to(device)
    weight = normal(70, dtype=torch.float32, seed=1).to(device)
    residual = normal(5, 70, dtype=torch.float32, seed=2).to(device)
    before = x.clone(), weight.clone(), residual.clone()
    out = (None, None, torch.empty_like(x))
    rms_norm_quantize(
        x, weight.float(), eps=1e-6, residual=residual, weight_offset=1, rounding=rounding, out=out
    )
    for t, wanted in zip((x, weight, residual), before, strict=True):
        assert_same_bits(t, wanted)


@pytest.mark.parametrize("weight_offset", [0.0, 0.3])
def test_bounds_hold_for_float32(weight_offset):
    """The bounds for a GPU hold for arithmetic in float32, and are not much wider."""
    x, weight = normal(33, 4096, dtype=torch.float32), normal(4096, dtype=torch.float32, seed=1)
    bounds = norm_bounds(x, weight, 1e-6, weight_offset, "fused", x.dtype)
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (weight + weight_offset)
    assert ((bounds.low <= y) & (y <= bounds.high)).all()
    assert ((bounds.high - bounds.low) <= bounds.values.abs() * 2.0**-16 + 2.0**-100).all()


def test_failed_calls_leave_the_residual(device):
    x, weight = normal(5, 70).to(device), normal(70, seed=1).to(device)
    residual = normal(5, 70, seed=2).to(device)
    before = residual.clone()
    with pytest.raises(ValueError, match="min_scale"):
        rms_norm_quantize(x, weight, DEEP_GEMM.replace(min_scale=-1), eps=1e-6, residual=residual)
    assert_same_bits(residual, before)


def test_parameters_without_gradients(device):
    """A module's weight is a parameter, and a residual may be."""
    x = normal(5, 70).to(device)
    weight = torch.nn.Parameter(normal(70, seed=1).to(device))
    residual = torch.nn.Parameter(normal(5, 70, seed=2).to(device))
    expected = rms_norm_quantize(x, weight.detach(), eps=1e-6, residual=residual.detach().clone())
    with torch.no_grad():
        for result, wanted in zip(
            rms_norm_quantize(x, weight, eps=1e-6, residual=residual), expected, strict=True
        ):
            assert_same_bits(result, wanted)


def test_counts_are_checked(device):
    x, weight = normal(4, 70).to(device), normal(70, seed=1).to(device)
    index = int32([0, 3, 4], device)
    rms_norm_quantize(x, weight, index=index)
    with pytest.raises(ValueError, match=r"index: expected -1 to 3, got 4 at 2"):
        rms_norm_quantize(x, weight, index=index, check=True)
