"""The contract in plain torch: quantize and dequantize without a kernel.

It is an oracle independent of the kernels: a scale exponent comes from a division in float64 and
`frexp`, not from bit arithmetic. Tensors on the CPU, and on a GPU that no kernel is built for, are
quantized by it, to the same bits.

A batch dimension is always there: tensors with other leading dimensions are flattened to one.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional
from torch.nn.functional import pad

from cute_quant.contract.calls import Call
from cute_quant.contract.dtypes import (
    BLOCK_GROUPS,
    BLOCK_LANES,
    BLOCK_ROWS,
    BYTES_PER_WORD,
    FLOAT32_MAX,
    INT8_MAX,
    SCALE_ROW_ALIGNMENT,
    SMALLEST_NORMAL,
    UE8M0_BIAS,
    UE8M0_MAX,
    UE8M0_NAN,
    align,
)
from cute_quant.contract.formats import Format
from cute_quant.contract.prologues import FUSED, RmsNorm, SiluMul
from cute_quant.contract.rows import Indexed, Masked, PrefixSum, Rows
from cute_quant.contract.tensors import flat_batch, last_column_rows


def ue8m0_to_float32(exponents: torch.Tensor) -> torch.Tensor:
    """Return 2^(exponent - 127) for biased exponents 0 .. 254, NaN for 255."""
    bits = exponents.int() << 23
    scales = bits.where(exponents != 0, 0x400000).view(torch.float32)
    return scales.where(exponents != UE8M0_NAN, torch.nan)


def group_scales(x: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Return the scales of the groups of `x` (..., k), k > 0.

    Returns:
        (..., groups): int32 biased exponents where scales are powers of two, else float32.
    """
    amax = _in_groups(x, fmt).abs().amax(-1)
    # As a tensor: torch multiplies a CUDA tensor with the reciprocal of a number.
    exact = torch.float64 if fmt.power_of_two else torch.float32
    largest = amax.new_full((), fmt.value_type.max, dtype=exact)
    if not fmt.power_of_two:
        scales = amax.float() * (1.0 / largest) if fmt.reciprocal else amax.float() / largest
        return scales.clamp(min=fmt.floor).where(amax.isfinite(), torch.nan)
    # In float64 no quotient of a float32 amax rounds onto a power of two that it is not.
    mantissa, exponent = torch.frexp(amax.double() / largest)
    exponent = (exponent - (mantissa == 0.5).int() + UE8M0_BIAS).where(amax > 0, 0)
    return exponent.clamp(min=fmt.floor).where(amax.isfinite(), UE8M0_NAN)


def group_values(x: torch.Tensor, scales: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Return the values of `x` (..., k) under its groups' scales: (..., k), ``fmt.values``."""
    if fmt.power_of_two:
        finite = scales != UE8M0_NAN
        multipliers = ue8m0_to_float32((UE8M0_MAX - scales).where(finite, UE8M0_NAN))
    else:
        finite = scales.isfinite()
        multipliers = 1.0 / scales
    k = x.shape[-1]
    values = _in_groups(x.float(), fmt) * multipliers.unsqueeze(-1)
    if fmt.values is torch.int8:
        values = values.round().clamp(-INT8_MAX, INT8_MAX).where(finite.unsqueeze(-1), 0.0)
    codes = values.to(fmt.values).view(torch.uint8)
    return (
        codes.where(finite.unsqueeze(-1), fmt.value_type.nan_byte)
        .flatten(-2)[..., :k]
        .view(fmt.values)
    )


def _in_groups(x: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Return `x` (..., k) as (..., groups, group_size), the last group filled up with zeros."""
    k = x.shape[-1]
    size = k if fmt.whole_row else fmt.group_size
    padded = pad(x, (0, -k % size))
    return padded.view(*x.shape[:-1], padded.shape[-1] // size, size)


def live_rows(
    x: torch.Tensor, rows: Rows | None, index: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which rows of the result exist, and their values in `x`.

    Returns:
        live: (batch, mn), bool.
        source: (batch, mn, k), the rows of x in their places; where none is live, anything.
    """
    if index is None:
        source = x.view(flat_batch("x", x.shape, x.stride())[0], *x.shape[-2:])
        live = torch.ones(source.shape[:2], dtype=torch.bool, device=x.device)
    else:
        index = index if index.ndim == 2 else index.unsqueeze(0)
        tokens = x.shape[0]
        live = (index >= 0) & (index < tokens)
        # A row of zeros for those that have none, also where x has no rows at all.
        source = torch.cat([x, x.new_zeros(1, x.shape[1])])[index.long().where(live, tokens)]
    row = torch.arange(live.shape[1], device=x.device)
    match rows:
        case Masked():
            live = live & below_count(rows, live.shape[1], live.shape[1])
        case PrefixSum():
            ends = rows.ends.long().clamp(0, live.shape[1])
            starts = pad(align(ends, rows.alignment)[:-1], (1, 0))[: ends.shape[0]]
            live = live & ((starts[:, None] <= row) & (row < ends[:, None])).any(0)
        case Indexed():
            live = live & (rows.m_indices >= 0)
    return live, source


def below_count(masked: Masked, mn: int, rows: int, alignment: int = 1) -> torch.Tensor:
    """Return which rows lie below an expert's count, rounded up to `alignment`: (E, rows)."""
    counts = align(masked.masked_m.long().clamp(0, mn), alignment)
    return torch.arange(rows, device=counts.device) < counts[:, None]


def silu_mul(gate_up: torch.Tensor, prologue: SiluMul) -> torch.Tensor:
    """Return the gated activation of `gate_up` (batch, mn, 2k).

    Returns:
        (batch, mn, k): float32 if it is fused, else the dtype of `gate_up`.
    """
    if prologue.interleaved:
        gate, up = gate_up[..., 0::2], gate_up[..., 1::2]
    else:
        gate, up = gate_up.chunk(2, -1)
    alpha, beta, weight = prologue.alpha, prologue.beta, prologue.weight
    if weight is not None:
        weight = weight.view(*gate.shape[:-1], 1)
    # Adding 0 would make 0 of -0.
    limit = clamp_limit(prologue, gate.dtype)
    if prologue.rounding == FUSED:
        gate, up = _clamp(gate.double(), up.double(), limit)
        up = up if beta == 0 else up + beta
        values = (up * gate * torch.sigmoid(alpha * gate)).float()
        return values if weight is None else values * weight
    gate, up = _clamp(gate, up, limit)
    activation = functional.silu(gate) if alpha == 1 else gate * torch.sigmoid(alpha * gate)
    # On the CPU, and there alone, torch rounds a number that it adds to the tensor's dtype first.
    values = activation * (up if beta == 0 else (up.float() + beta).to(up.dtype))
    return values if weight is None else (values.float() * weight).to(values.dtype)


def clamp_limit(prologue: SiluMul, dtype: torch.dtype) -> float:
    """Return the bound of gates and ups, rounded to `dtype` unless they are fused; Inf if none."""
    if prologue.clamp is None:
        return math.inf
    if prologue.rounding == FUSED:
        return prologue.clamp
    return torch.tensor(prologue.clamp, dtype=torch.float64).to(dtype).item()


def _clamp(gate: torch.Tensor, up: torch.Tensor, limit: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return gates up to `limit`, and ups from minus that to that."""
    if limit == math.inf:
        return gate, up
    return gate.clamp(max=limit), up.clamp(-limit, limit)


def rms_norm(x: torch.Tensor, prologue: RmsNorm) -> torch.Tensor:
    """Normalize `x` (batch, mn, k) plus the residual, by the root mean square of each row.

    The updated residual and the normalized rows are written to the tensors of `prologue`.

    Returns:
        (batch, mn, k): float32 if it is fused, else x's dtype.
    """
    total = x.float()
    if prologue.residual is not None:
        total = total + prologue.residual.view(x.shape).float()
    if prologue.residual_out is not None:
        prologue.residual_out.view(x.shape).copy_(total)
    weight = prologue.weight.float()
    if prologue.weight_offset != 0:
        weight = weight + prologue.weight_offset
    if prologue.rounding == FUSED:
        values = _normalized(total, weight, prologue.eps).float()
    else:
        total = total.to(x.dtype).float()
        exact = _normalized(total, weight, prologue.eps).float()
        values = functional.rms_norm(total, x.shape[-1:], weight, prologue.eps)
        values = values.where(exact.isfinite(), exact).to(x.dtype)
    if prologue.normalized is not None:
        prologue.normalized.view(x.shape).copy_(values)
    return values


def _normalized(r: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return rows over the root of their mean square plus `eps`, times `weight`.

    The precision is that of float64, the range that of float32: products with the weight and sums
    of squares beyond it are Inf, and a mean square below its normal numbers is 0.
    """
    products = (r * weight).double()
    products = products.where(products.isinf(), r.double() * weight)
    squares = r.double().square().sum(-1, keepdim=True)
    # As a tensor, since torch multiplies a CUDA tensor with the reciprocal of a number.
    count = squares.new_full((), r.shape[-1])
    square = squares.masked_fill(squares > FLOAT32_MAX, torch.inf) / count + eps
    return products / square.masked_fill(square < SMALLEST_NORMAL, 0.0).sqrt()


def quantize_into(call: Call, q: torch.Tensor, sf: torch.Tensor) -> None:
    """Quantize what `call` asks for into `q` and `sf`, and define their padding.

    Args:
        call: a call that was checked. What else its prologue writes is written too.
        q: (..., q_rows, k), q_rows >= mn. Rows past mn become 0.
        sf: scales as the format lays them out. Padding rows become 0 if the storage has them.
    """
    x, fmt, rows, prologue = call.x, call.fmt, call.rows, call.prologue
    if x.shape[-1] == 0:
        return
    live, source = live_rows(x, rows, call.index)
    match prologue:
        case SiluMul():
            source = silu_mul(source, prologue)
        case RmsNorm():
            source = rms_norm(source, prologue)
    batch, mn = live.shape
    scales = group_scales(source, fmt)
    codes = group_values(source, scales, fmt).view(torch.uint8).where(live.unsqueeze(2), 0)

    bytes_ = q.view(torch.uint8).view(batch, *q.shape[-2:])
    if isinstance(rows, Masked):
        below = below_count(rows, mn, mn).unsqueeze(2)
        bytes_.copy_(codes.where(below, bytes_))
        written = below_count(rows, mn, fmt.scale_rows(mn), SCALE_ROW_ALIGNMENT)
    else:
        bytes_[:, :mn].copy_(codes)
        bytes_[:, mn:].zero_()
        written = live.new_ones(batch, fmt.scale_rows(mn))
    _store_scales(scales.where(live.unsqueeze(2), 0), written, sf, fmt)


def _store_scales(
    scales: torch.Tensor, written: torch.Tensor, sf: torch.Tensor, fmt: Format
) -> None:
    """Write scales to the rows of `sf` that `written` names.

    Rows past mn and groups past the last become 0.

    Args:
        scales: (batch, mn, groups), exponents or floats.
        written: (batch, stored rows), bool.
        sf: as the format lays it out.
        fmt: the format.
    """
    batch, mn, groups = scales.shape
    if batch == 0 or mn == 0:
        return
    if fmt.ue8m0:
        scales = scales.to(torch.uint8)
        padding = -groups % (BLOCK_GROUPS if fmt.blocked else BYTES_PER_WORD if fmt.packed else 1)
        scales = pad(scales, (0, padding))
        sf = sf if fmt.packed else sf.view(torch.uint8)
        scales = scales.view(torch.int32) if fmt.packed else scales
    elif fmt.power_of_two:
        # Exponent 0 is that of a row that does not exist: float32 scales are normal numbers.
        scales = ue8m0_to_float32(scales).where(scales > 0, 0.0)
    if fmt.blocked:
        sf = sf.view(batch, -1)
        stored = to_blocks(pad(scales, (0, 0, 0, written.shape[1] - mn)))
        sf.copy_(stored.where(to_blocks(written.unsqueeze(2).expand(-1, -1, scales.shape[2])), sf))
        return
    flat = sf.view(batch, mn, scales.shape[2])
    flat.copy_(scales.where(written[:, :mn].unsqueeze(2), flat))
    if fmt.mn_major and fmt.scale_rows(mn) > mn:
        _clear_padding_rows(sf, written[:, mn:].repeat_interleave(scales.shape[2], 0), mn)


def _clear_padding_rows(sf: torch.Tensor, written: torch.Tensor, mn: int) -> None:
    """Write 0 to the rows past `mn` of MN-major scales, as far as their storage goes.

    Args:
        sf: (..., mn, columns).
        written: (columns, padding rows), which of them, for the columns of all matrices in turn.
        mn: rows of a matrix.
    """
    columns, padding = written.shape
    aligned = mn + padding
    start = sf.storage_offset() + mn
    inner = sf.as_strided((columns - 1, padding), (aligned, 1), start)
    inner.masked_fill_(written[:-1], 0)
    last_padding = last_column_rows(sf) - mn
    last = sf.as_strided((last_padding,), (1,), start + (columns - 1) * aligned)
    last.masked_fill_(written[-1, :last_padding], 0)


def to_blocks(t: torch.Tensor) -> torch.Tensor:
    """Return scales (batch, rows, groups) in blocks, (batch, rows * groups).

    Rows and groups are multiples of a block's.
    """
    batch, rows, groups = t.shape
    row_blocks, group_blocks = rows // BLOCK_ROWS, groups // BLOCK_GROUPS
    blocks = t.reshape(
        batch, row_blocks, BLOCK_ROWS // BLOCK_LANES, BLOCK_LANES, group_blocks, BLOCK_GROUPS
    )
    return blocks.permute(0, 1, 4, 3, 2, 5).reshape(batch, rows * groups)


def from_blocks(t: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
    """Invert :func:`to_blocks`: return (batch, rows * groups) as (batch, rows, groups)."""
    row_blocks, group_blocks = rows // BLOCK_ROWS, groups // BLOCK_GROUPS
    shape = row_blocks, group_blocks, BLOCK_LANES, BLOCK_ROWS // BLOCK_LANES, BLOCK_GROUPS
    blocks = t.reshape(t.shape[0], *shape)
    return blocks.permute(0, 1, 4, 3, 2, 5).reshape(t.shape[0], rows, groups)


def dequantize(q: torch.Tensor, sf: torch.Tensor, fmt: Format, dtype: torch.dtype) -> torch.Tensor:
    """Return q times scale, multiplied in float32 and rounded to `dtype`; contiguous.

    Args:
        q: (..., mn, k), values of `fmt`.
        sf: the scales of `fmt` for q's shape.
        fmt: the format of both.
        dtype: of the result.
    """
    y = torch.empty(q.shape, dtype=dtype, device=q.device)
    dequantize_into(q, sf, fmt, y)
    return y


def dequantize_into(q: torch.Tensor, sf: torch.Tensor, fmt: Format, y: torch.Tensor) -> None:
    """Write what :func:`dequantize` returns to `y`, of q's shape."""
    mn, k = q.shape[-2:]
    if q.numel() == 0:
        return
    if fmt.packed:
        shifts = torch.arange(0, 32, 8, device=sf.device)
        scales = ue8m0_to_float32((sf.unsqueeze(-1) >> shifts & 0xFF).flatten(-2))
    elif fmt.blocked:
        rows, columns = fmt.scale_rows(mn), fmt.columns(k)
        exponents = from_blocks(sf.view(torch.uint8).reshape(-1, sf.shape[-1]), rows, columns)
        scales = ue8m0_to_float32(exponents[:, :mn]).view(*q.shape[:-1], columns)
    else:
        scales = ue8m0_to_float32(sf.view(torch.uint8)) if fmt.ue8m0 else sf
    y.copy_(multiply_back(q, scales[..., : fmt.groups(k)], fmt, y.dtype))


def multiply_back(
    q: torch.Tensor, scales: torch.Tensor, fmt: Format, dtype: torch.dtype
) -> torch.Tensor:
    """Return `q` (..., k) times the float32 `scales` (..., groups) of its groups, in `dtype`."""
    values = _in_groups(q.float(), fmt) * scales.unsqueeze(-1)
    return values.to(dtype).flatten(-2)[..., : q.shape[-1]]


def fake_quantize_into(x: torch.Tensor, fmt: Format, out: torch.Tensor) -> None:
    """Write `x` (..., mn, k), quantized and multiplied back, to `out`, of x's shape."""
    if x.numel() == 0:
        return
    scales = group_scales(x, fmt)
    q = group_values(x, scales, fmt)
    scales = ue8m0_to_float32(scales) if fmt.power_of_two else scales
    out.copy_(multiply_back(q, scales, fmt, x.dtype))
