"""The calls that vLLM and DeepGEMM users already have, with their floors and their results."""

from __future__ import annotations

import numbers

import torch

from cute_quant.contract.formats import (
    DEFAULT_MIN_SCALE,
    E4M3_MAX,
    INPUT_DTYPES,
    MAX_MIN_SCALE,
    RECIPROCAL_FLOAT32,
    VALUE_DTYPE,
    to_float32,
)
from cute_quant.contract.tensors import check_tensor
from cute_quant.ops import quantize

__all__ = ["per_token_cast_to_fp8", "per_token_group_quant_fp8_packed_for_deepgemm"]

GROUP_SIZES = (128,)


def per_token_group_quant_fp8_packed_for_deepgemm(
    x: torch.Tensor,
    group_size: int,
    eps: float = 1e-10,
    use_ue8m0: bool | None = True,
    out_q: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """vLLM's quantizer for DeepGEMM on SM100, equal to it to the bit on finite input.

    Args:
        x: (..., k), bfloat16, float16 or float32, k a multiple of `group_size`, neighbours
            contiguous. Where one row stride cannot walk its leading dimensions it is copied
            first; vLLM copies whatever is not contiguous.
        group_size: neighbours that share a scale, 128.
        eps: lower bound of a group's amax, above 0; vLLM bounds the scale by 1e-10 besides.
        use_ue8m0: True, or None for the same; the packed format has no other scales.
        out_q: float8_e4m3fn to write values into: the shape of x, or any that holds as many rows
            of k or more, contiguous. Rows past those of x become 0.

    Returns:
        The values, of the shape of x, and the scales: int32, packed UE8M0, (rows of x,
        ceil(k / group_size / 4)), MN-major and aligned for TMA.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`cute_quant.quantize`.
    """
    if use_ue8m0 is not None and use_ue8m0 is not True:
        raise ValueError(f"use_ue8m0: expected True or None, got {use_ue8m0!r}")
    if not isinstance(eps, numbers.Real):
        raise TypeError(f"eps: expected a number, got {eps!r}")
    if not 0 < eps <= E4M3_MAX * MAX_MIN_SCALE:
        raise ValueError(f"eps: expected 0 < eps <= {E4M3_MAX * MAX_MIN_SCALE}, got {eps!r}")
    check_tensor("x", x, INPUT_DTYPES)
    if x.ndim == 0:
        raise ValueError("x: expected at least 1 dimension, got 0")
    _check_groups("group_size", group_size, x)
    rows = _rows(x)
    if out_q is not None:
        check_tensor("out_q", out_q, (VALUE_DTYPE,))
        if out_q.shape[-1:] != x.shape[-1:] or not out_q.is_contiguous():
            raise ValueError(
                f"out_q: expected a contiguous tensor of rows of {x.shape[-1]}, "
                f"got shape {tuple(out_q.shape)}, strides {out_q.stride()}"
            )
        out_q = _rows(out_q)
    min_scale = max(to_float32(eps) / E4M3_MAX, DEFAULT_MIN_SCALE)
    q, sf = quantize(rows, group_size, "ue8m0", min_scale=min_scale, out=(out_q, None))
    return q[: rows.shape[0]].view(x.shape), sf


def per_token_cast_to_fp8(
    x: torch.Tensor, use_ue8m0: bool, gran_k: int = 128, use_packed_ue8m0: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """DeepGEMM's cast, equal to it to the bit on finite input.

    The scales come MN-major and aligned for TMA, so that DeepGEMM takes them as they are; its own
    cast returns them row-major and its GEMM transposes them first.

    Args:
        x: (m, n), bfloat16, float16 or float32, n a multiple of `gran_k`, neighbours contiguous.
        use_ue8m0: round scales up to powers of two.
        gran_k: neighbours that share a scale, 128.
        use_packed_ue8m0: pack the exponents of four scales to an int32; needs `use_ue8m0`.

    Returns:
        The values, (m, n) float8_e4m3fn, and the scales, float32 (m, n / gran_k) or int32
        (m, ceil(n / gran_k / 4)).

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`cute_quant.quantize`.
    """
    for name, flag in (("use_ue8m0", use_ue8m0), ("use_packed_ue8m0", use_packed_ue8m0)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: expected a bool, got {flag!r}")
    check_tensor("x", x, INPUT_DTYPES)
    if x.ndim != 2:
        raise ValueError(f"x: expected 2 dimensions (m, n), got shape {tuple(x.shape)}")
    _check_groups("gran_k", gran_k, x)
    if use_packed_ue8m0 and not use_ue8m0:
        raise ValueError("use_packed_ue8m0: expected False where use_ue8m0 is False")
    if use_packed_ue8m0:
        return quantize(x, gran_k, "ue8m0", min_scale="deepgemm")
    if use_ue8m0:
        return quantize(x, gran_k, "float32", round_scale=True, min_scale="deepgemm")
    # DeepGEMM divides by 448 in torch, which on CUDA multiplies by the rounded reciprocal.
    quotient = RECIPROCAL_FLOAT32 if x.is_cuda else "float32"
    return quantize(x, gran_k, quotient, min_scale="deepgemm")


def _check_groups(name: str, group_size: int, x: torch.Tensor) -> None:
    """Check what the peers demand and `quantize` does not: whole groups of the sizes they have."""
    if group_size not in GROUP_SIZES:
        raise ValueError(f"{name}: expected one of {GROUP_SIZES}, got {group_size!r}")
    if x.shape[-1] % group_size:
        raise ValueError(
            f"x: expected rows of a multiple of {group_size}, got shape {tuple(x.shape)}"
        )


def _rows(t: torch.Tensor) -> torch.Tensor:
    return t.unsqueeze(0) if t.ndim == 1 else t.flatten(0, -2)
