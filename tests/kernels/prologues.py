"""What comes before the quantizer: inputs, and the comparison of every byte with its bounds."""

from __future__ import annotations

import math

import torch

from cute_quant.contract.formats import Format
from cute_quant.contract.prologues import make_rms_norm, make_silu_mul
from cute_quant.contract.rows import Masked
from tests.helpers import (
    assert_quantized_within,
    poisoned_results,
    storage_bits,
    upper_scale,
)
from tests.kernels.cases import assert_same_storage, poisoned_matrix, strided
from tests.kernels.emulated_gpu import Gpu
from tests.prologues import Bounds, gathered, norm_bounds, silu_bounds


def halves(mn: int, k: int, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates and ups, (mn, k) each, with all that needs care in groups of their own."""
    generator = torch.Generator().manual_seed(seed)
    gate, up = (torch.randn(mn, k, generator=generator) * 3 for _ in range(2))
    gate[:, 128:160] = 0.0
    up[:, 160:192] = -0.0
    gate[:, 256:384] *= 25  # to where the sigmoid is 0, or 1
    up[4::5, 384:512] *= 1e-9  # against the floor
    for rows, t, value in ((1, up, "nan"), (2, gate, "inf"), (3, gate, "-inf"), (3, up, "inf")):
        t[rows::5, 400:401] = float(value)
    return gate.to(dtype), up.to(dtype)


def check_silu_mul(
    gpu: Gpu,
    mn: int,
    k: int,
    fmt: Format,
    dtype: torch.dtype = torch.bfloat16,
    *,
    weighted: bool = False,
    interleaved: bool = False,
    rounding: str = "fused",
    extra_rows: int = 0,
    last_padding: bool = True,
    batch: tuple[int, ...] = (),
    **numbers: float,
) -> None:
    """Run a call of ``silu_mul_quantize`` into poisoned memory.

    Args:
        numbers: clamp, alpha and beta, where they are not the defaults.
    """
    rows = mn * batch[0] if batch else mn
    gate, up = halves(rows, k, dtype, seed=mn + k)
    x = torch.stack((gate, up), 2).flatten(1) if interleaved else torch.cat((gate, up), 1)
    x = strided(x.view(*batch, mn, 2 * k), 2 * k)
    weight = torch.linspace(-2, 3, rows).view(*batch, mn) if weighted else None
    results = poisoned_results(fmt, mn, k, "cpu", extra_rows, last_padding, batch)
    options = {"clamp": None, "alpha": 1.0, "beta": 0.0} | numbers
    prologue = make_silu_mul(interleaved=interleaved, rounding=rounding, weight=weight, **options)
    bounds = silu_bounds(x, weight, rounding, interleaved=interleaved, **numbers)
    quantize_within(gpu, x, results, fmt, bounds, prologue=prologue)


def quantize_within(
    gpu: Gpu,
    x: torch.Tensor,
    results: tuple[torch.Tensor, ...],
    fmt: Format,
    bounds: Bounds,
    rows: Masked | None = None,
    index: torch.Tensor | None = None,
    places: torch.Tensor | None = None,
    **options: object,
) -> None:
    """Run a call into `results`, under an upper scale that fits, and compare it with its bounds."""
    q, sf, *row_scales = results
    choices = {
        "upper": upper_scale(bounds.values.float(), fmt),
        "row_scales": row_scales[0] if row_scales else None,
    }
    gpu.quantize(x, q, sf, fmt, rows, index, **options, **choices)
    flat = bounds if index is None else Bounds(*(t.flatten(0, -2) for t in bounds))
    assert_quantized_within(q, sf, fmt, *flat, rows, places, **choices)


def rows_of(mn: int, k: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Rows of different magnitudes; of five, one with NaN and one with Inf in it."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(mn, k, generator=generator) * 3.0 ** (torch.arange(mn) % 7).unsqueeze(1)
    x[:, 3:5] = torch.tensor([0.0, -0.0])
    x[:, 128:256] *= 1e-3
    x[1::5, 5] = torch.nan
    x[2::5, min(300, k - 1)] = -torch.inf
    return x.to(dtype)


def check_rms_norm(
    gpu: Gpu,
    mn: int,
    k: int,
    fmt: Format,
    dtype: torch.dtype = torch.bfloat16,
    *,
    weight_dtype: torch.dtype | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    residual: bool = False,
    in_place: bool = False,
    normalized: bool = False,
    rounding: str = "fused",
    rows: Masked | None = None,
    index: torch.Tensor | None = None,
    extra_rows: int = 0,
    last_padding: bool = True,
    batch: tuple[int, ...] = (),
) -> None:
    """Run a call of ``rms_norm_quantize`` into poisoned memory.

    Args:
        index: row of as many tokens for each row, (batch, mn), or one that there is not.
    """
    shape = (*batch, mn, k)
    x = rows_of(math.prod(shape[:-1]), k, dtype, seed=mn + k)
    x = x if index is not None else x.view(shape)
    source, places = gathered(x, index)
    weight = torch.linspace(-1.5, 2, k).to(weight_dtype or dtype)
    strides = torch.empty(shape, device="meta").stride()
    outputs, total = {}, source.float()
    if residual:
        added = torch.randn(shape, generator=torch.Generator().manual_seed(k)).to(dtype)
        before = strided(added, k)
        sums = before if in_place else poisoned_matrix(shape, strides, dtype)
        outputs |= {"residual": before, "residual_out": sums}
        total = total + added.float()
    if normalized:
        outputs["normalized"] = poisoned_matrix(shape, strides, dtype)
    results = poisoned_results(fmt, mn, k, "cpu", extra_rows, last_padding, batch)
    prologue = make_rms_norm(weight, eps=eps, weight_offset=offset, rounding=rounding, **outputs)
    bounds = norm_bounds(total, weight, eps, offset, rounding, dtype)
    choices = rows, index, places
    quantize_within(gpu, strided(x, k), results, fmt, bounds, *choices, prologue=prologue)
    if residual:
        expected = strided(total.to(dtype), k)
        for t in (sums, expected):
            t.masked_fill_(t.isnan(), torch.nan)
        assert_same_storage("residual_out", sums, expected)
    if normalized:
        result = outputs["normalized"]
        low, high = (t.to(dtype) for t in (bounds.low, bounds.high))
        inside = (low <= result) & (result <= high) | low.isnan() & result.isnan()
        assert inside.all(), f"normalized: {(~inside).nonzero()[0].tolist()}"
        assert len(storage_bits(result)) > result.nbytes
        padding = storage_bits(result)[result.nbytes :]
        assert (padding == padding[0]).all(), "normalized: written past its end"
