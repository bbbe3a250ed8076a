"""What comes before the quantizer: inputs, results in float64, and the comparison of every byte."""

from __future__ import annotations

import math

import torch

from cute_quant.contract.formats import Format
from cute_quant.contract.prologues import FUSED, UNFUSED, make_rms_norm, make_silu_mul
from cute_quant.contract.rows import Masked
from tests.helpers import poisoned, poisoned_scales, poisoned_values, storage_bits
from tests.kernels.cases import (
    assert_quantized_within,
    assert_same_storage,
    poisoned_matrix,
    strided,
)
from tests.kernels.emulated_gpu import Gpu
from tests.kernels.intervals import Interval

RELATIVE_ERROR = 1e-6
"""What a few roundings of float32, and the errors of exponential, reciprocal and root, stay below.
"""


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


def sigmoid_product(
    gate: torch.Tensor,
    up: torch.Tensor,
    clamp: float | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    factors: torch.Tensor | None = None,
    unfused: bool = False,
) -> Interval:
    """``(up + beta) * gate * sigmoid(alpha * gate)`` in float64; unfused rounded at each step."""
    dtype = gate.dtype

    def step(values: Interval) -> Interval:
        return values.spread(RELATIVE_ERROR).rounded(dtype) if unfused else values

    alpha, beta = (torch.tensor(number, dtype=torch.float32).double() for number in (alpha, beta))
    gate, up = gate.double(), up.double()
    if clamp is not None:
        gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
    gates = Interval.of(gate)
    arguments = Interval.of(gate * alpha)
    ups = Interval.of(up)
    if alpha != 1:
        arguments = step(arguments)
    if beta != 0:
        ups = step(Interval.of(up + beta))
    sigmoids = Interval(*(end.sigmoid() for end in arguments))
    if alpha != 1:
        sigmoids = step(sigmoids)
    product = step(step(gates.times(sigmoids)).times(ups))
    if factors is not None:
        product = step(product.times(Interval.of(factors.unsqueeze(-1))))
    return product if unfused else product.spread(RELATIVE_ERROR)


def check_silu_mul(
    gpu: Gpu,
    mn: int,
    k: int,
    fmt: Format,
    dtype: torch.dtype = torch.bfloat16,
    *,
    weighted: bool = False,
    interleaved: bool = False,
    extra_rows: int = 0,
    last_padding: bool = True,
    batch: tuple[int, ...] = (),
    unfused: bool = False,
    **variant: float,
) -> None:
    """Run a call of ``silu_mul_quantize`` into poisoned memory.

    Args:
        variant: options of the prologue.
    """
    rows = mn * batch[0] if batch else mn
    gate, up = halves(rows, k, dtype, seed=mn + k)
    factors = torch.linspace(-2, 3, rows) if weighted else None
    x = torch.stack((gate, up), 2).flatten(1) if interleaved else torch.cat((gate, up), 1)
    x = strided(x.view(*batch, mn, 2 * k), 2 * k)
    q = poisoned_values(mn + extra_rows, k, "cpu", fmt.values, batch)
    sf = poisoned_scales(fmt, mn, k, "cpu", last_padding, batch)
    weight = None if factors is None else factors.view(*batch, mn)
    options = {"clamp": None, "alpha": 1.0, "beta": 0.0} | variant
    prologue = make_silu_mul(
        interleaved=interleaved, rounding=UNFUSED if unfused else FUSED, weight=weight, **options
    )
    gpu.quantize(x, q, sf, fmt, prologue=prologue)
    product = sigmoid_product(gate, up, factors=factors, unfused=unfused, **variant)
    assert_quantized_within(q, sf, fmt, Interval(*(end.view(*batch, mn, k) for end in product)))


def rows_of(mn: int, k: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Rows of different magnitudes; of five, one with NaN and one with Inf in it."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(mn, k, generator=generator) * 3.0 ** (torch.arange(mn) % 7).unsqueeze(1)
    x[:, 3:5] = torch.tensor([0.0, -0.0])
    x[:, 128:256] *= 1e-3
    x[1::5, 5] = torch.nan
    x[2::5, min(300, k - 1)] = -torch.inf
    return x.to(dtype)


def normalized_rows(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, unfused: bool
) -> Interval:
    """``x * rsqrt(mean(x^2) + eps) * (weight + offset)`` in float64; unfused rounded at the end."""
    factors = (weight.float() + offset).double()
    eps = torch.tensor(eps, dtype=torch.float32).double()
    mean = x.double().square().mean(-1, keepdim=True)
    result = Interval.of(x.double() / (mean + eps).sqrt() * factors).spread(RELATIVE_ERROR)
    return result.rounded(x.dtype) if unfused else result


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
    unfused: bool = False,
    extra_rows: int = 0,
    last_padding: bool = True,
    batch: tuple[int, ...] = (),
) -> None:
    """Run a call of ``rms_norm_quantize`` into poisoned memory."""
    shape = (*batch, mn, k)
    strides = torch.empty(shape, device="meta").stride()
    x = rows_of(math.prod(shape[:-1]), k, dtype, seed=mn + k).view(shape)
    weight = torch.linspace(-1.5, 2, k).to(weight_dtype or dtype)
    added = torch.randn(shape, generator=torch.Generator().manual_seed(k)).to(dtype)
    outputs, rows = {}, x
    if residual:
        before = strided(added, k)
        sums = before if in_place else poisoned_matrix(shape, strides, dtype)
        outputs |= {"residual": before, "residual_out": sums}
        rows = x.float() + added.float()
        expected_sums = strided(rows.to(dtype), k)
        rows = rows.to(dtype) if unfused else rows
    if normalized:
        outputs["normalized"] = poisoned_matrix(shape, strides, dtype)
    q = poisoned_values(mn + extra_rows, k, "cpu", fmt.values, batch)
    sf = poisoned_scales(fmt, mn, k, "cpu", last_padding, batch)
    prologue = make_rms_norm(
        weight,
        eps=eps,
        weight_offset=offset,
        rounding=UNFUSED if unfused else FUSED,
        **outputs,
    )
    gpu.quantize(strided(x, k), q, sf, fmt, prologue=prologue)

    values = normalized_rows(rows, weight, eps, offset, unfused)
    assert_quantized_within(q, sf, fmt, values)
    if residual:
        for t in (sums, expected_sums):
            t.masked_fill_(t.isnan(), torch.nan)
        assert_same_storage("residual_out", sums, expected_sums)
    if normalized:
        result = outputs["normalized"]
        low, high = values.rounded(dtype)
        inside = (low <= result) & (result <= high) | low.isnan() & result.isnan()
        assert inside.all(), f"normalized: {(~inside).nonzero()[0].tolist()}"
        assert len(storage_bits(result)) > result.nbytes
        padding = storage_bits(result)[result.nbytes :]
        assert (padding == padding[0]).all(), "normalized: written past its end"


def check_masked_rms_norm(
    gpu: Gpu,
    counts: torch.Tensor,
    max_m: int,
    k: int,
    fmt: Format,
    dtype: torch.dtype,
    index: torch.Tensor | None = None,
) -> None:
    """Run the norm of masked experts: rows that exist are those of a dense call.

    Scale rows from a count to the next multiple of 4 are 0; all else keeps what it held.

    Args:
        index: row of x of each row, (experts, max_m), or -1.
    """
    experts, scale_rows = len(counts), fmt.scale_rows(max_m)
    tokens = rows_of(experts * max_m, k, dtype, seed=max_m + k)
    x = tokens.view(experts, max_m, k)
    exists = torch.arange(max_m) < counts[:, None]
    if index is not None:
        x = tokens[index.clamp(0)]
        exists &= index >= 0
    weight = torch.linspace(-1.5, 2, k).to(dtype)
    results = []
    for rows in (Masked(counts), None):
        q = poisoned_values(max_m, k, "cpu", fmt.values, (experts,))
        sf = poisoned_scales(fmt, max_m, k, "cpu", True, (experts,))
        masked = rows is not None
        source = tokens if masked and index is not None else x
        choices = {"rows": rows, "index": index} if masked else {}
        prologue = make_rms_norm(weight, eps=1e-6, weight_offset=0.0, rounding=FUSED)
        gpu.quantize(strided(source, k), q, sf, fmt, prologue=prologue, **choices)
        padded = sf.as_strided((experts, scale_rows, sf.shape[-1]), sf.stride())
        results.append((q, padded.clone()))
    (q, sf), (expected_q, expected_sf) = results
    poison = poisoned(4, "cpu")
    row = torch.arange(scale_rows)
    counts = counts.clamp(0, max_m)[:, None]
    kept = row >= ((counts + 3) // 4 * 4).clamp(max=scale_rows)
    gone = torch.ones(experts, scale_rows, dtype=torch.bool)
    gone[:, :max_m] = ~exists
    expected_sf[gone] = 0
    expected_sf[kept] = poison.view(sf.dtype)
    unwritten = torch.arange(max_m) >= counts
    integers = expected_q.view(torch.uint8)
    integers[~exists] = 0
    integers[unwritten] = poison[0]
    assert torch.equal(q.view(torch.uint8), integers)
    assert torch.equal(sf.view(torch.int32), expected_sf.view(torch.int32))
