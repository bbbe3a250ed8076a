"""Comparisons of the calls with vLLM's own functions, on small tensors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from cute_quant.integrations.engines.comparison import difference, sample
from cute_quant.integrations.engines.takeover import Function, NotComparable

ROWS, COLUMNS = 12, 512
"""Columns of scales are as long as there are rows, in every layout."""


def quant_fp8(ours: Function, theirs: Function, device: torch.device) -> str | None:
    """Compare ``QuantFP8``: float32 scales of either rounding, and packed ones.

    Its ``forward_native`` is compared where its bits are CUDA's, which these are: not for groups of
    zeros, nor for scales that are no powers of two.
    """
    from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8

    native = theirs.__name__ == "forward_native"
    others = [False] if native else [False, True]
    rounded = [True] if native or device.type != "cuda" else [True, False]
    x = sample((ROWS, COLUMNS), device, zeros=not native and device.type == "cuda") * 1024
    for round_scale, column_major, supported in itertools.product(rounded, others, others):
        layer = SimpleNamespace(
            static=False,
            is_group_quant=True,
            group_size=128,
            use_ue8m0=round_scale,
            use_deep_gemm_supported=supported,
            column_major_scales=column_major,
            tma_aligned_scales=False,
        )
        layer._quantize_group_native = QuantFP8._quantize_group_native.__get__(layer)
        found = difference(ours(layer, x), theirs(layer, x))
        if found is not None:
            return found
    return None


def group_quant(ours: Function, theirs: Function, device: torch.device) -> str | None:
    """Compare ``per_token_group_quant_fp8`` in all of its layouts.

    Triton's kernel, which runs without CUDA, has other float32 scales, and for zeros other powers
    of two.
    """
    cuda = device.type == "cuda"
    x = sample((ROWS, COLUMNS), device, zeros=cuda)
    layouts = ((False, False), (True, False), (True, True))
    return _first(
        ours,
        theirs,
        (
            dict(
                x=x,
                group_size=128,
                column_major_scales=column_major,
                tma_aligned_scales=tma_aligned,
                use_ue8m0=round_scale,
            )
            for (column_major, tma_aligned), round_scale in itertools.product(
                layouts, (True, False) if cuda else (True,)
            )
        ),
    )


def packed(ours: Function, theirs: Function, device: torch.device) -> str | None:
    """Compare ``per_token_group_quant_fp8_packed_for_deepgemm``, both sizes of a group."""
    x = sample((ROWS, COLUMNS), device)
    return _first(ours, theirs, (dict(x=x, group_size=size, use_ue8m0=True) for size in (128, 32)))


def silu_packed(ours: Function, theirs: Function, device: torch.device) -> str | None:
    """Compare ``silu_mul_quant_fp8_packed_triton``, with and without a clamp."""
    gate_up = _gate_up((ROWS, 2 * COLUMNS), device)
    return _first(ours, theirs, (dict(input=gate_up, clamp_limit=clamp) for clamp in (None, 4.0)))


def silu_column_major(ours: Function, theirs: Function, device: torch.device) -> str | None:
    """Compare ``silu_mul_per_token_group_quant_fp8_colmajor``."""
    gate_up = _gate_up((128, 2 * COLUMNS), device)
    return _first(
        ours,
        theirs,
        (
            dict(input=gate_up, clamp_limit=clamp, use_ue8m0=round_scale)
            for clamp, round_scale in itertools.product((None, 4.0), (True, False))
        ),
    )


def silu_masked(ours: Function, theirs: Function, device: torch.device) -> str | None:
    """Compare ``persistent_masked_m_silu_mul_quant`` in each format; padding is zeros in both."""
    from vllm.utils.deep_gemm import DeepGemmQuantScaleFMT

    _need_cuda(device)
    counts = torch.tensor([ROWS, 5], dtype=torch.int32, device=device)
    gate_up = _gate_up((2, ROWS, 2 * COLUMNS), device)
    for name in ("UE8M0", "FLOAT32_CEIL_UE8M0", "FLOAT32"):
        results = []
        for function in (ours, theirs):
            q, sf = function(gate_up, counts, quant_scale_fmt=DeepGemmQuantScaleFMT[name])
            # Values of rows that do not exist are what memory held.
            results.append([q[0], q[1, :5], sf])
        found = difference(*results)
        if found is not None:
            return f"{found}, as {name}"
    return None


def fused_activation(ours: Function, theirs: Function, device: torch.device) -> str | None:
    """Compare a producer of ``fused_act_quant``."""
    gate_up = _gate_up((ROWS, 2 * COLUMNS), device)
    linear = SimpleNamespace(input_global_scale_inv=torch.tensor([4.0], device=device))
    results = [function(gate_up, linear) for function in (ours, theirs)]
    if results[0] is NotImplemented:
        return difference(*results)
    return difference(*([r.data, r.scale] for r in results))


def mxfp8(ours: Function, theirs: Function, device: torch.device) -> str | None:
    """Compare ``mxfp8_e4m3_quantize`` in both layouts."""
    x = sample((ROWS, COLUMNS), device)
    return _first(ours, theirs, (dict(x=x, is_sf_swizzled_layout=s) for s in (True, False)))


def nvfp4(ours: Function, theirs: Function, device: torch.device) -> str | None:
    """Compare ``scaled_fp4_quant`` in both layouts."""
    x = sample((ROWS, COLUMNS), device)
    scale = torch.tensor([4.0], device=device)
    return _first(
        ours,
        theirs,
        (dict(input=x, input_global_scale=scale, is_sf_swizzled_layout=s) for s in (True, False)),
    )


def scaled_fp8(ours: Function, theirs: Function, device: torch.device) -> str | None:
    """Compare ``scaled_fp8_quant`` for scales of rows."""
    x = sample((ROWS, COLUMNS), device)
    return _first(ours, theirs, iter([dict(input=x, use_per_token_if_dynamic=True)]))


def group_quant_int8(ours: Function, theirs: Function, device: torch.device) -> str | None:
    """Compare ``per_token_group_quant_int8`` with CUDA's kernel; Triton's has other bits."""
    _need_cuda(device)
    return _first(ours, theirs, iter([dict(x=sample((ROWS, COLUMNS), device), group_size=128)]))


def rows_int8_of_triton(ours: Function, theirs: Function, device: torch.device) -> str | None:
    """Compare ``per_token_quant_int8``, which rounds by a function of CUDA."""
    _need_cuda(device)
    return _first(ours, theirs, iter([dict(x=sample((ROWS, COLUMNS), device))]))


def scaled_int8(ours: Function, theirs: Function, device: torch.device) -> str | None:
    """Compare ``scaled_int8_quant`` for scales of rows, a row of zeros among them."""
    x = sample((ROWS, COLUMNS), device)
    x[1] = 0.0
    return difference(ours(x)[:2], theirs(x)[:2])


def swizzle(ours: Function, theirs: Function, device: torch.device) -> str | None:
    """Compare ``swizzle_mxfp8_scale`` for rows and groups that do not fill their blocks."""
    rows, groups = 130, 6
    sf = torch.arange(rows * groups, device=device).remainder(255).to(torch.uint8)
    sf = sf.view(rows, groups)
    return difference(ours(sf, rows, 32 * groups), theirs(sf, rows, 32 * groups))


def _need_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise NotComparable("CUDA's kernel is the one whose bits these are")


def _first(ours: Function, theirs: Function, calls: Iterator[dict[str, Any]]) -> str | None:
    """Return the difference of the first call that has one."""
    for call in calls:
        found = difference(ours(**call), theirs(**call))
        if found is not None:
            options = ", ".join(
                f"{name}={value}"
                for name, value in call.items()
                if not isinstance(value, torch.Tensor)
            )
            return f"{found}, with {options}"
    return None


def _gate_up(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return gates up to about 16 and ups of all magnitudes."""
    x = sample(shape, device, torch.float32)
    gate, _ = x.chunk(2, -1)
    gate.clamp_(-16.0, 16.0)
    return x.to(torch.bfloat16)
