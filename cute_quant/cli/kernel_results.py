"""Call each kernel on numbers of all kinds, and return all that it writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import cute_quant
from cute_quant.contract import blocks
from cute_quant.contract.calls import ResultShape
from cute_quant.contract.dtypes import STORE_BYTES, UPPER_MAX, ceil_div
from cute_quant.contract.formats import DEEP_GEMM_SM90
from cute_quant.contract.rows import Indexed, Masked, PrefixSum, Rows
from cute_quant.contract.tensors import storage_bytes
from cute_quant.contract.upper_scales import AMAX, DECODE, ENCODE
from cute_quant.dispatch import presets
from cute_quant.jit import lookup
from cute_quant.kernels import heuristics
from cute_quant.kernels.config import (
    DENSE_ROWS,
    BlocksSpec,
    ColumnsSpec,
    ConvertSpec,
    DequantizeSpec,
    Domain,
    QuantizerSpec,
    QuantizeSpec,
    RequantizeSpec,
    RmsNormSpec,
    SiluMulBackwardSpec,
    SiluMulSpec,
    Spec,
)

COLUMNS = 1024
FEW_ROWS = 203
"""No multiple of 4, so that columns of scales have padding."""
SIZES = (
    (FEW_ROWS, COLUMNS),
    (4, COLUMNS // 4),
    (4, COLUMNS),
    *((rows + 3, COLUMNS) for i in range(1, 16) for rows in (2 << i, 3 << i)),
    *((1, COLUMNS >> i) for i in range(2, 5)),
)
"""(mn, k) of results, one for each range of the heuristics on GPUs of 3 to 2000 SMs.

The first that takes a kernel is run: those of a single row on GPUs of few SMs alone."""
WHOLE_ROWS = 208
"""A multiple of 16, for weights that are contiguous along them."""
MATRICES = 3
GROUPS = {PrefixSum.kind: 2, Indexed.kind: 4}
"""Groups of rows stacked along M."""
SEED = 0
POISON = 0xA5


class Results(NamedTuple):
    """Everything that a call writes.

    Attributes:
        values: what is quantized, or multiplied back.
        scales: if there are any, with all padding in their storage.
        residual, normalized: of a norm, if it writes them.
        decode_scales: of rows, where the call returns them; else of the upper scale, if it has one.
    """

    values: torch.Tensor
    scales: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    normalized: torch.Tensor | None = None
    decode_scales: torch.Tensor | None = None


def results_of(spec: Spec, device: str) -> Results:
    """Return the results of a call that takes this kernel."""
    generator = torch.Generator().manual_seed(SEED)
    if isinstance(spec, ConvertSpec):
        return _conversion(spec, device, generator)
    if isinstance(spec, BlocksSpec | RequantizeSpec) or getattr(spec, "square", False):
        return _weights(spec, device, generator)
    assert isinstance(spec, QuantizerSpec | DequantizeSpec), "no selection has it"
    fmt = spec.fmt
    domain = DENSE_ROWS if isinstance(spec, DequantizeSpec) else spec.domain
    batch_shape = (MATRICES,) if domain.batched else ()
    mn, k = size_for(spec)
    index = None
    if domain.gathered:
        index = torch.randint(FEW_ROWS, (*batch_shape, mn), dtype=torch.int32, generator=generator)
    own_rows = domain.gathered or domain.scattered
    shape = (FEW_ROWS, k) if own_rows else (*batch_shape, mn, k)
    if isinstance(spec, SiluMulSpec):
        shape = (*shape[:-1], 2 * k)
    # Under one scale for all rows, smaller ones would be 0.
    x = _activations(shape, spec.dtype, generator, 3 if fmt.upper_scale else 14)
    decode_scales = None if spec.upper is None else _decode_scale(spec, x).to(device)
    upper: dict[str, Any] = _upper_scale(spec.upper, decode_scales)
    if domain.grouped:
        # Values are compared before they are multiplied with those of their groups.
        factors = 2.0 ** torch.arange(GROUPS[domain.kind], device=device)
        upper = {name: t * factors for name, t in upper.items()}
        decode_scales = torch.ones((), device=device)
    x = x.to(device)
    if isinstance(spec, QuantizeSpec) and spec.fake:
        return Results(cute_quant.fake_quantize(x, fmt, **upper))
    if isinstance(spec, DequantizeSpec):
        q, sf, *row_scales = cute_quant.quantize(x, fmt, **({} if fmt.row_scale else upper))
        upper = {DECODE: row_scales[0]} if row_scales else upper
        return Results(cute_quant.dequantize(q, sf, fmt, dtype=spec.dtype, **upper))
    columns = fmt.value_columns(k)
    q = torch.full((*batch_shape, mn, columns), POISON, dtype=torch.uint8, device=device)
    q = q.view(fmt.values)
    sf = fmt.empty_scales(batch_shape, mn, k, q.device)
    storage_bytes(sf).fill_(POISON)
    out: tuple[torch.Tensor, ...] = (q, sf)
    if fmt.row_scale:
        decode_scales = torch.full((*batch_shape, mn), torch.nan, device=device)
        out = (q, sf, decode_scales)
    rows = _rows(domain, mn, device, generator)
    moves: dict[str, Any] = {"rows": rows, "index": None if index is None else index.to(device)}
    if domain.scattered:
        # Each row of the result once, and -1.
        places = torch.full((FEW_ROWS * ceil_div(q.numel() // columns + 1, FEW_ROWS),), -1)
        order = torch.randperm(len(places), generator=generator)
        places[order[: q.numel() // columns]] = torch.arange(q.numel() // columns)
        moves["scatter"] = places.view(FEW_ROWS, -1).to(device, torch.int32)
    residual = normalized = None
    rng_state = torch.tensor([1, 2], device=device) if getattr(spec, "stochastic", False) else None
    match spec:
        case QuantizeSpec():
            cute_quant.quantize(x, fmt, **moves, rng_state=rng_state, out=out, **upper)
        case SiluMulSpec():
            weight = None
            if spec.weighted:
                of_rows = x.shape[:-1] if domain.scattered else q.shape[:-1]
                weight = torch.rand(of_rows, generator=generator).to(device)
            cute_quant.silu_mul_quantize(
                x,
                fmt,
                **moves,
                interleaved=spec.interleaved,
                clamp=7.0 if spec.clamped else None,
                alpha=1.702 if spec.scaled else 1.0,
                beta=1.0 if spec.shifted else 0.0,
                weight=weight,
                rounding=spec.rounding,
                out=out,
                **upper,
            )
        case SiluMulBackwardSpec():
            grad = torch.randn((*x.shape[:-1], k // 2), generator=generator)
            cute_quant.silu_mul_backward_quantize(
                grad.to(device, x.dtype),
                x,
                fmt,
                rows=rows,
                interleaved=spec.interleaved,
                clamp=7.0 if spec.clamped else None,
                alpha=1.702 if spec.scaled else 1.0,
                beta=1.0 if spec.shifted else 0.0,
                rng_state=rng_state,
                out=out,
                **upper,
            )
        case RmsNormSpec():
            weight = torch.randn(k, generator=generator).to(device, spec.weight_dtype)
            if spec.residual:
                residual = torch.randn(x.shape, generator=generator).to(device, x.dtype)
            written = cute_quant.rms_norm_quantize(
                x,
                weight,
                fmt,
                residual=residual,
                **moves,
                rounding=spec.rounding,
                normalized=spec.normalized,
                out=out,
                **upper,
            )
            normalized = written[-1] if spec.normalized else None
    return Results(q, sf, residual, normalized, decode_scales)


def results_of_columns(spec: ColumnsSpec, device: str) -> list[Results]:
    """Return the results of a call on columns: those of the transpose, then those of rows."""
    generator = torch.Generator().manual_seed(SEED)
    gated, k = spec.gated, COLUMNS
    mn = FEW_ROWS if spec.q_access.ragged and spec.transposed else WHOLE_ROWS
    columns = 2 * k if gated is not None and not gated.backward else k
    x = _activations((mn, columns), spec.dtype, generator, 7).to(device)
    shape = (k, ceil_div(mn, STORE_BYTES) * STORE_BYTES) if spec.transposed else (mn, k)
    memory = torch.full(shape, POISON, dtype=torch.uint8, device=device).view(spec.fmt.values)
    out: Any = (memory[:, :mn] if spec.transposed else memory, None)
    rows, rng_state = None, None
    if spec.kind == PrefixSum.kind:
        rows = PrefixSum(torch.tensor([mn // 4, mn // 2 + 64], dtype=torch.int32, device=device))
    if spec.stochastic:
        rng_state = torch.tensor([1, 2], device=device)
    options: dict[str, Any] = {"rows": rows, "rng_state": rng_state, "transposed": spec.transposed}
    formats: list[Any] = [spec.fmt] if spec.row_fmt is None else [spec.row_fmt, spec.fmt]
    options["out"] = out if spec.row_fmt is None else (None, out)
    inputs: list[torch.Tensor] = [x]
    operation: Callable[..., Any] = cute_quant.quantize_columns
    if spec.row_fmt is not None:
        operation = cute_quant.quantize_both
    if gated is not None:
        operation = cute_quant.silu_mul_quantize_both
        options |= {
            "interleaved": gated.interleaved,
            "clamp": 7.0 if gated.clamped else None,
            "alpha": 1.702 if gated.scaled else 1.0,
            "beta": 1.0 if gated.shifted else 0.0,
        }
        if gated.backward:
            operation = cute_quant.silu_mul_backward_quantize_both
            grad = torch.randn((mn, k // 2), generator=generator)
            inputs.insert(0, grad.to(device, spec.dtype))
        else:
            weight = torch.rand(mn, generator=generator) if gated.weighted else None
            options["weight"] = None if weight is None else weight.to(device)
            options["rounding"] = gated.rounding
    results: Any = operation(*inputs, *formats, **options)
    of_rows, (q, sf) = (None, results) if spec.row_fmt is None else results
    q = q if spec.transposed else q.mT.contiguous()
    found = [Results(q, sf if spec.fmt.blocked else sf.mT)]
    return found if of_rows is None else [*found, Results(*of_rows)]


def _weights(spec: Spec, device: str, generator: torch.Generator) -> Results:
    """Return the results of a call on weights that takes this kernel."""
    assert isinstance(spec, BlocksSpec | RequantizeSpec | DequantizeSpec)
    fmt, transposed = spec.fmt, isinstance(spec, BlocksSpec) and spec.transposed
    rows, k = (WHOLE_ROWS, COLUMNS) if transposed else size_for(spec)
    w = _activations((rows, k), torch.float32, generator, 3)
    if isinstance(spec, DequantizeSpec):
        q, sf = cute_quant.quantize_blocks(w.to(device), fmt)
        return Results(cute_quant.dequantize_blocks(q, sf, fmt, dtype=spec.dtype))
    upper = None if isinstance(spec, BlocksSpec) else spec.upper
    scales = _upper_scale(upper, _decode_scale(spec, w).to(device))
    q = torch.full((rows, fmt.value_columns(k)), POISON, dtype=torch.uint8, device=device)
    q = q.view(fmt.values)
    by_row = isinstance(spec, RequantizeSpec)
    sf = (
        fmt.empty_scales((), rows, k, q.device)
        if by_row
        else blocks.empty_scales(fmt, ResultShape((), rows, k), q.device)
    )
    storage_bytes(sf).fill_(POISON)
    if by_row or spec.dtype is fmt.values:
        w8, w_sf = cute_quant.quantize_blocks(
            w, DEEP_GEMM_SM90.replace(group_size=spec.source_block)
        )
        w8, w_sf = (_along_n(w8) if transposed else w8).to(device), w_sf.to(device)
        cute_quant.requantize_blocks(w8, w_sf, fmt, out=(q, sf), **scales)
    else:
        w = w.to(spec.dtype)
        w = (_along_n(w) if transposed else w).to(device)
        cute_quant.quantize_blocks(w, fmt, out=(q, sf))
    return Results(q, sf)


def _along_n(w: torch.Tensor) -> torch.Tensor:
    """Return the same weights contiguous along n."""
    return w.mT.contiguous().mT


def _conversion(spec: ConvertSpec, device: str, generator: torch.Generator) -> Results:
    """Return the results of a conversion of scales that takes this kernel."""
    fmt, to = (one.replace(round_scale=not one.byte_scales) for one in (spec.source, spec.result))
    x = _activations((FEW_ROWS, COLUMNS), torch.float32, generator, 14)
    _, sf = cute_quant.quantize(x.to(device), fmt)
    result = to.empty_scales((), FEW_ROWS, COLUMNS, sf.device)
    storage_bytes(result).fill_(POISON)
    cute_quant.convert_scales(sf, fmt, to, x.shape, out=result)
    return Results(result, result)


def _decode_scale(spec: Spec, x: torch.Tensor) -> torch.Tensor:
    """Return a scale that maps what a call quantizes to the range of its format."""
    amax = x.float().nan_to_num(0.0, 0.0, 0.0).abs().amax()
    match spec:
        case SiluMulSpec() | SiluMulBackwardSpec():
            amax = amax * amax
        case RmsNormSpec():
            amax = amax.new_tensor(32.0)
    return amax / UPPER_MAX


def _upper_scale(kind: str | None, decode_scale: torch.Tensor | None) -> dict[str, Any]:
    """Return the argument that gives an upper scale, none without one."""
    if kind is None or decode_scale is None:
        return {}
    forms = {
        DECODE: decode_scale,
        ENCODE: 1.0 / decode_scale,
        AMAX: decode_scale * UPPER_MAX,
    }
    return {kind: forms[kind]}


def size_for(spec: Spec) -> tuple[int, int]:
    """(mn, k) of a result that a kernel of this tile is launched for."""
    if isinstance(spec, QuantizerSpec) and (isinstance(spec, RmsNormSpec) or spec.fmt.by_row):
        return presets.size_of_whole_rows(spec)
    if not isinstance(spec, QuantizeSpec | SiluMulSpec | SiluMulBackwardSpec | RequantizeSpec):
        return SIZES[0]
    domain = DENSE_ROWS if isinstance(spec, RequantizeSpec) else spec.domain
    if domain.scattered or getattr(spec, "fake", False):
        return SIZES[0]
    shape = heuristics.silu_shape
    if isinstance(spec, RequantizeSpec):
        shape = heuristics.wide_shape
    elif isinstance(spec, QuantizeSpec):
        shape = heuristics.wide_shape if spec.stochastic else heuristics.shape
    device = torch.cuda.current_device()
    gpu = lookup.multiprocessors(device), lookup.architecture(device)
    matrices = MATRICES if domain.batched else 1
    for mn, k in SIZES:
        if shape(matrices, mn, k, spec.fmt, domain.masked, *gpu).tile == spec.tile:
            return mn, k
    raise ValueError(f"spec: expected a tile that is chosen for some size, got {spec.tile}")


def _activations(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, octaves: int
) -> torch.Tensor:
    """Rows of magnitudes from 2^-octaves to 2^octaves; of the first four, some are not finite."""
    x = torch.randn(shape, generator=generator)
    x *= 2.0 ** torch.randint(-octaves, octaves, (*shape[:-1], 1), generator=generator)
    # Slices may be empty, where there are fewer rows or columns.
    x[..., 1:2, :] = 0.0
    x[..., 2:3, 5] = float("nan")
    x[..., 3:4, 200:201] = float("inf")
    return x.to(dtype)


def _rows(domain: Domain, mn: int, device: str, generator: torch.Generator) -> Rows | None:
    def integers(*values: Any) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    if domain.masked:
        return Masked(integers(0, mn // 3, mn))
    if domain.prefix_sum:
        return PrefixSum(integers(mn // 4, min(mn // 2 + 64, mn)))  # GROUPS of them
    if domain.indexed:
        groups = GROUPS[domain.kind]
        experts = torch.randint(-1, groups, (mn,), dtype=torch.int32, generator=generator)
        return Indexed(experts.to(device))
    return None
