"""Comparisons of the calls with SGLang's own functions, on small tensors."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from typing import Any

import torch

from cute_quant.integrations.engines.comparison import difference, sample
from cute_quant.integrations.engines.takeover import Function

ROWS, COLUMNS = 12, 1024
MOST_DIFFERING = 2.0**-7
"""Share of bytes that may differ behind SiLU, whose exponential is approximate in both."""


def _first(ours: Function, theirs: Function, cases: Iterable[dict[str, Any]]) -> str | None:
    for case in cases:
        found = difference(ours(**case), theirs(**case))
        if found is not None:
            return found
    return None


def group_quant(ours: Function, theirs: Function, device: torch.device) -> str | None:
    """Compare ``sglang_per_token_group_quant_fp8`` in its layouts."""
    x = sample((ROWS, COLUMNS), device)
    layouts = ((False, False, False), (True, True, False), (True, True, True), (False, False, True))
    names = ("column_major_scales", "scale_tma_aligned", "scale_ue8m0")
    cases = (
        {"x": x, "group_size": size, **dict(zip(names, layout, strict=True))}
        for size, layout in itertools.product((128, 32), layouts)
    )
    return _first(ours, theirs, cases)


def row_padded(ours: Function, theirs: Function, device: torch.device) -> str | None:
    """Compare ``sglang_per_token_group_quant_fp8_row_padded``."""
    return _first(ours, theirs, [{"x": sample((ROWS - 1, COLUMNS), device), "group_size": 128}])


def per_token_group_quant(ours: Function, theirs: Function, device: torch.device) -> str | None:
    """Compare ``per_token_group_quant``: packed and float32 scales, e4m3 and int8."""
    x = sample((ROWS, COLUMNS), device)
    options: tuple[dict[str, Any], ...] = (
        {"scale_ue8m0": True, "column_major_scales": True},
        {"scale_ue8m0": True},
        {"column_major_scales": True},
        {"out_dtype": torch.int8},
        {"out_dtype": torch.int8, "column_major_scales": True},
    )
    return _first(ours, theirs, ({"input": x, **option} for option in options))


def per_token(ours: Function, theirs: Function, device: torch.device) -> str | None:
    """Compare ``sglang_per_token_quant_fp8``, without a row of zeros."""
    return _first(ours, theirs, [{"x": sample((ROWS, COLUMNS), device, zeros=False)}])


def scaled_fp8(ours: Function, theirs: Function, device: torch.device) -> str | None:
    """Compare ``scaled_fp8_quant`` for scales of rows, without a row of zeros."""
    x = sample((ROWS, COLUMNS), device, zeros=False)
    return _first(ours, theirs, [{"input": x, "use_per_token_if_dynamic": True}])


def group_quant_int8(ours: Function, theirs: Function, device: torch.device) -> str | None:
    """Compare int8 groups of CUDA's kernel, and of Triton's."""
    return _first(ours, theirs, [{"x": sample((ROWS, COLUMNS), device), "group_size": 128}])


def rows_int8(ours: Function, theirs: Function, device: torch.device) -> str | None:
    """Compare ``per_token_quant_int8``."""
    return _first(ours, theirs, [{"x": sample((ROWS, COLUMNS), device)}])


def mxfp8(ours: Function, theirs: Function, device: torch.device) -> str | None:
    """Compare ``flashinfer_mxfp8_quantize`` in both layouts."""
    x = sample((ROWS, COLUMNS), device)
    return _first(ours, theirs, ({"input": x, "is_sf_swizzled_layout": s} for s in (True, False)))


def nvfp4(ours: Function, theirs: Function, device: torch.device) -> str | None:
    """Compare ``fp4_quantize`` in both layouts."""
    x, scale = sample((ROWS, COLUMNS), device), torch.tensor([4.0], device=device)
    cases = ({"input": x, "global_scale": scale, "is_sf_swizzled_layout": s} for s in (True, False))
    return _first(ours, theirs, cases)


def silu_masked(ours: Function, theirs: Function, device: torch.device) -> str | None:
    """Compare a masked quantizer behind SiLU, on rows that exist."""
    counts = torch.tensor([ROWS, 5], dtype=torch.int32, device=device)
    gate_up = sample((2, ROWS, 2 * COLUMNS), device) / 64
    return _behind_silu(ours, theirs, gate_up, masked_m=counts)


def silu_masked_with_alpha(ours: Function, theirs: Function, device: torch.device) -> str | None:
    """Compare ``silu_and_mul_masked_post_quant_fwd``, without an alpha and with that of gpt-oss."""
    found = silu_masked(ours, theirs, device)
    if found is not None:
        return found
    with_alpha = functools.partial(functools.partial, gemm1_alpha=1.702, gemm1_clamp_limit=7.0)
    return silu_masked(with_alpha(ours), with_alpha(theirs), device)


def silu_contiguous(ours: Function, theirs: Function, device: torch.device) -> str | None:
    """Compare ``silu_and_mul_contig_post_quant``."""
    return _behind_silu(ours, theirs, sample((ROWS, 2 * COLUMNS), device) / 64)


def _behind_silu(
    ours: Function, theirs: Function, gate_up: torch.Tensor, **options: Any
) -> str | None:
    """Compare what both write, with float32 scales, into memory of zeros."""
    results = []
    for function in (ours, theirs):
        q = gate_up.new_zeros((*gate_up.shape[:-1], COLUMNS), dtype=torch.float8_e4m3fn)
        sf = gate_up.new_zeros((*gate_up.shape[:-1], COLUMNS // 128), dtype=torch.float32)
        found = function(input=gate_up, output=q, output_scale=sf, quant_group_size=128, **options)
        if found is NotImplemented:
            return difference(found, None)
        results.append((q.view(torch.uint8), sf))
    (q, sf), (their_q, their_sf) = results
    differing = (q != their_q).float().mean().item()
    if differing > MOST_DIFFERING:
        return f"{differing:.1%} of the values"
    if not torch.allclose(sf, their_sf, rtol=2.0**-7, atol=0):
        return "scales are off by more than a rounding"
    return None
