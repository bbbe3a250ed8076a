"""Functions of DeepGEMM, with its names and lower bounds and, on finite input, its bits."""

from __future__ import annotations

import torch

from cute_quant.contract.dtypes import INPUT_DTYPES, describe
from cute_quant.contract.format_choices import DEEPGEMM, IEEE
from cute_quant.contract.formats import DEEP_GEMM, DEEP_GEMM_SM90, Format
from cute_quant.contract.tensors import check_tensor
from cute_quant.ops.rows import quantize
from cute_quant.ops.weights import quantize_blocks

GROUP_SIZES = (32, 128)


def per_token_cast_to_fp8(
    x: torch.Tensor, use_ue8m0: bool, gran_k: int = 128, use_packed_ue8m0: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize as ``deep_gemm.utils.math.per_token_cast_to_fp8``, to the bit on finite input.

    The scales come MN-major and aligned for TMA, so that DeepGEMM takes them as they are; its own
    cast returns them row-major and its GEMM transposes them first. Packed words have 0 in the bytes
    of groups past the last, where DeepGEMM's have 127.

    Args:
        x: (m, n), bfloat16, float16 or float32, contiguous along n. The last group may be short.
        use_ue8m0: round scales up to powers of two.
        gran_k: elements that share a scale, 128 or 32.
        use_packed_ue8m0: pack the exponents of four scales to an int32; needs `use_ue8m0`.

    Returns:
        q: float8_e4m3fn, (m, n).
        sf: float32 (m, ceil(n / gran_k)) or int32 (m, ceil(n / gran_k / 4)).

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`cute_quant.quantize`.
    """
    _check_flags(use_ue8m0=use_ue8m0, use_packed_ue8m0=use_packed_ue8m0)
    _check_matrix(x, gran_k)
    if use_packed_ue8m0 and not use_ue8m0:
        raise ValueError("use_packed_ue8m0: expected False where use_ue8m0 is False, got True")
    if use_packed_ue8m0:
        fmt = DEEP_GEMM.replace(group_size=gran_k, min_scale="deepgemm")
    else:
        fmt = _float32_format(x, use_ue8m0, gran_k)
    q, sf = quantize(x, fmt)
    return q, sf


def per_block_cast_to_fp8(
    x: torch.Tensor, use_ue8m0: bool, gran_k: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize as ``deep_gemm.utils.math.per_block_cast_to_fp8``, to the bit on finite input.

    For GEMMs on SM100, ``quantize_blocks(x, cute_quant.DEEP_GEMM)`` returns what they transform
    these scales into.

    Args:
        x: (m, n), bfloat16, float16 or float32, contiguous along n or m, of any size.
        use_ue8m0: round scales up to powers of two.
        gran_k: rows, and columns, of a block, 128 or 32.

    Returns:
        q: float8_e4m3fn, (m, n), contiguous.
        sf: float32, (ceil(m / gran_k), ceil(n / gran_k)), contiguous.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`cute_quant.quantize_blocks`.
    """
    _check_flags(use_ue8m0=use_ue8m0)
    _check_matrix(x, gran_k)
    return quantize_blocks(x, _float32_format(x, use_ue8m0, gran_k))


def _check_flags(**flags: object) -> None:
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: expected a bool, got {describe(flag)}")


def _check_matrix(x: torch.Tensor, gran_k: object) -> None:
    check_tensor("x", x, INPUT_DTYPES)
    if x.ndim != 2:
        raise ValueError(f"x: expected 2 dimensions (m, n), got shape {tuple(x.shape)}")
    if type(gran_k) is not int or gran_k not in GROUP_SIZES:
        raise ValueError(f"gran_k: expected one of {GROUP_SIZES}, got {describe(gran_k)}")


def _float32_format(x: torch.Tensor, use_ue8m0: bool, gran_k: int) -> Format:
    """Return the format of float32 scales whose bits DeepGEMM's casts of `x` have."""
    return DEEP_GEMM_SM90.replace(
        group_size=gran_k,
        round_scale=use_ue8m0,
        min_scale="deepgemm",
        # The casts divide by 448 in torch, which on CUDA multiplies by the rounded reciprocal.
        numerics=DEEPGEMM if x.is_cuda and not use_ue8m0 else IEEE,
    )
