"""Functions of vLLM, with its names and lower bounds and, on finite input, its bits."""

from __future__ import annotations

import torch

from cute_quant.contract.dtypes import (
    E4M3_MAX,
    INPUT_DTYPES,
    MAX_MIN_SCALE,
    VLLM_MIN_SCALE,
    describe,
    is_number,
    to_float32,
)
from cute_quant.contract.formats import DEEP_GEMM
from cute_quant.contract.tensors import check_tensor
from cute_quant.ops import quantize

GROUP_SIZES = (32, 128)


def per_token_group_quant_fp8_packed_for_deepgemm(
    x: torch.Tensor,
    group_size: int,
    eps: float = 1e-10,
    use_ue8m0: bool | None = True,
    out_q: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize as vLLM does for DeepGEMM on SM100, to the bit on finite input.

    The original is ``vllm.model_executor.layers.quantization.utils.fp8_utils
    .per_token_group_quant_fp8_packed_for_deepgemm``.

    Args:
        x: (..., k), bfloat16, float16 or float32, k a multiple of `group_size`, contiguous along k.
            Where one row stride cannot walk its leading dimensions it is copied first; vLLM copies
            whatever is not contiguous.
        group_size: elements that share a scale, 128 or 32.
        eps: lower bound of a group's amax, above 0; vLLM bounds the scale by 1e-10 besides.
        use_ue8m0: True, or None for the same; the packed format has no other scales.
        out_q: float8_e4m3fn to write values into: the shape of x, or any that holds as many rows
            of k or more, contiguous. Rows past those of x become 0.

    Returns:
        q: float8_e4m3fn, the shape of x.
        sf: int32, packed UE8M0, (rows of x, ceil(k / group_size / 4)), MN-major, aligned for TMA.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`cute_quant.quantize`.
    """
    if use_ue8m0 is not None and use_ue8m0 is not True:
        raise ValueError(f"use_ue8m0: expected True or None, got {describe(use_ue8m0)}")
    if not is_number(eps):
        raise TypeError(f"eps: expected a number, got {describe(eps)}")
    if not 0 < eps <= E4M3_MAX * MAX_MIN_SCALE:
        raise ValueError(f"eps: expected 0 < eps <= {E4M3_MAX * MAX_MIN_SCALE}, got {eps!r}")
    check_tensor("x", x, INPUT_DTYPES)
    if x.ndim == 0:
        raise ValueError("x: expected at least 1 dimension, got 0")
    if type(group_size) is not int or group_size not in GROUP_SIZES:
        raise ValueError(f"group_size: expected one of {GROUP_SIZES}, got {describe(group_size)}")
    if x.shape[-1] % group_size:
        raise ValueError(
            f"x: expected rows of a multiple of {group_size}, got shape {tuple(x.shape)}"
        )
    rows = _rows(x)
    if out_q is not None:
        check_tensor("out_q", out_q, (torch.float8_e4m3fn,))
        if out_q.shape[-1:] != x.shape[-1:] or not out_q.is_contiguous():
            raise ValueError(
                f"out_q: expected a contiguous tensor of rows of {x.shape[-1]}, "
                f"got shape {tuple(out_q.shape)}, strides {out_q.stride()}"
            )
        out_q = _rows(out_q)
    min_scale = max(to_float32(float(eps)) / E4M3_MAX, VLLM_MIN_SCALE)
    fmt = DEEP_GEMM.replace(group_size=group_size, min_scale=min_scale)
    q, sf = quantize(rows, fmt, out=(out_q, None))
    return q[: rows.shape[0]].view(x.shape), sf


def _rows(t: torch.Tensor) -> torch.Tensor:
    return t.unsqueeze(0) if t.ndim == 1 else t.flatten(0, -2)
