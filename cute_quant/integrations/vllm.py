"""Functions of vLLM, with its names and lower bounds and, on finite input, its bits."""

from __future__ import annotations

import torch

from cute_quant.contract.dtypes import (
    BLOCK_GROUPS,
    E4M3_MAX,
    INPUT_DTYPES,
    MAX_MIN_SCALE,
    VLLM_MIN_SCALE,
    align,
    describe,
    is_number,
    to_float32,
)
from cute_quant.contract.format_choices import ROW_MAJOR, VLLM_EMULATION
from cute_quant.contract.formats import DEEP_GEMM, NVFP4, Format
from cute_quant.contract.tensors import check_device, check_tensor
from cute_quant.ops.rows import dequantize, quantize

GROUP_SIZES = (32, 128)
BYTE_DTYPES = (torch.float8_e4m3fn, torch.uint8, torch.int8)
"""Dtypes that e4m3 scales come in."""

_ROW_MAJOR = NVFP4.replace(scale_layout=ROW_MAJOR, numerics=VLLM_EMULATION)
_FLOAT32_SCALES = Format(NVFP4.values, NVFP4.group_size, torch.float32, ROW_MAJOR)


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


def dequantize_to_dtype(
    tensor_fp4: torch.Tensor,
    tensor_sf: torch.Tensor,
    global_scale: torch.Tensor,
    dtype: torch.dtype,
    block_size: int = 16,
    swizzle: bool | None = True,
) -> torch.Tensor:
    """Dequantize NVFP4 as vLLM does, to the bit: value * (scale * global_scale), then rounded.

    The original is ``vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils
    .dequantize_to_dtype``. It runs in one kernel for either layout of scales, and on strided
    values, which vLLM's kernel for row-major scales takes for contiguous ones.

    Args:
        tensor_fp4: uint8, two values in a byte, the earlier one in the low four bits: (m, k / 2),
            or (E, m, k / 2) of experts. k is a multiple of 16.
        tensor_sf: the e4m3 scales, as float8_e4m3fn or bytes. In blocks of 128x4, contiguous, those
            of all E * m rows together, in any shape; or row-major, of the shape
            (..., m, k / 16) and any strides.
        global_scale: float32, one element, or one for each expert; the decode scale: what values
            and scales are multiplied with.
        dtype: of the result: bfloat16, float16 or float32.
        block_size: elements that share a scale, 16.
        swizzle: whether scales lie in blocks of 128x4.

    Returns:
        `dtype`, (m, k) or (E, m, k), contiguous.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`cute_quant.dequantize`.
    """
    _check_block_size(block_size)
    if swizzle is not None and not isinstance(swizzle, bool):
        raise TypeError(f"swizzle: expected a bool or None, got {describe(swizzle)}")
    check_tensor("tensor_fp4", tensor_fp4, (torch.uint8,))
    check_tensor("tensor_sf", tensor_sf, BYTE_DTYPES)
    check_device("tensor_sf", tensor_sf, tensor_fp4, "tensor_fp4")
    if tensor_fp4.ndim not in (2, 3) or tensor_fp4.shape[-1] % (block_size // 2):
        raise ValueError(
            f"tensor_fp4: expected (m, k / 2) or (E, m, k / 2), k a multiple of {block_size}, "
            f"got shape {tuple(tensor_fp4.shape)}"
        )
    *leading, m, columns = tensor_fp4.shape
    experts = leading[0] if leading else 1
    scale = _global_scale(global_scale, tensor_fp4, "tensor_fp4", experts)
    groups = 2 * columns // block_size
    if tensor_fp4.stride(-1) != 1:
        tensor_fp4 = tensor_fp4.contiguous()
    values, scales = tensor_fp4.view(NVFP4.values), tensor_sf.view(NVFP4.scale_dtype)
    if not swizzle:
        shape = (*leading, m, groups)
        if scales.shape != shape:
            raise ValueError(
                f"tensor_sf: expected shape {shape} without swizzle, got {tuple(scales.shape)}"
            )
        return dequantize(values, scales, _ROW_MAJOR, dtype=dtype, decode_scale=scale)
    rows = experts * m
    size = align(rows, NVFP4.block_rows) * align(groups, BLOCK_GROUPS)
    if scales.numel() != size or not scales.is_contiguous():
        raise ValueError(
            f"tensor_sf: expected {size} contiguous scales in blocks of 128x4, those of {rows} "
            f"rows, got shape {tuple(scales.shape)}, strides {scales.stride()}"
        )
    if m % NVFP4.block_rows == 0 or not leading:
        scales = scales.view(*leading, -1) if size else scales.view(*leading, 0)
        return dequantize(values, scales, NVFP4, dtype=dtype, decode_scale=scale)
    # A block has rows of two experts: each row brings the scale of its own.
    row_scales = scale.reshape(-1, 1).expand(experts, m).flatten().contiguous()
    fmt = NVFP4.replace(row_scale=True)
    y = dequantize(
        values.flatten(0, 1), scales.view(size), fmt, dtype=dtype, decode_scale=row_scales
    )
    return y.view(experts, m, 2 * columns)


def ref_nvfp4_quant_dequant(
    x: torch.Tensor, global_scale: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Quantize to NVFP4 as vLLM's emulation does, and multiply back.

    The original is ``vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils
    .ref_nvfp4_quant_dequant``. The result is that of its reference in torch, to the bit
    (``numerics="vllm_emulation"``). On CUDA the original multiplies by global_scale / scale in
    Triton instead, whose division is approximate: an x next to the middle of two values may get the
    other one.

    Args:
        x: (m, k), bfloat16, float16 or float32, k a multiple of 16, contiguous along k.
        global_scale: float32, one element, from 2^-117 to 2^117; the encode scale: about 2688 over
            the largest magnitude.
        block_size: elements that share a scale, 16.

    Returns:
        x's dtype and shape, contiguous: value * (scale / global_scale), the quotient rounded.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`cute_quant.quantize`.
    """
    _check_block_size(block_size)
    check_tensor("x", x, INPUT_DTYPES)
    if x.ndim != 2 or x.shape[1] % block_size:
        raise ValueError(
            f"x: expected (m, k), k a multiple of {block_size}, got shape {tuple(x.shape)}"
        )
    scale = _global_scale(global_scale, x, "x")
    q, sf = quantize(x, _ROW_MAJOR, encode_scale=scale)
    # `fake_quantize` would multiply by 1 / global_scale, which is not always the same float32.
    return dequantize(q, sf.float() / scale, _FLOAT32_SCALES, dtype=x.dtype)


def _check_block_size(block_size: object) -> None:
    if type(block_size) is not int or block_size != NVFP4.group_size:
        raise ValueError(f"block_size: expected {NVFP4.group_size}, got {describe(block_size)}")


def _global_scale(t: torch.Tensor, x: torch.Tensor, name: str, experts: int = 1) -> torch.Tensor:
    """Return a global scale, (), or (experts,) where each has its own."""
    check_tensor("global_scale", t, (torch.float32,))
    check_device("global_scale", t, x, name)
    if t.numel() == 1:
        return t.reshape(())
    if t.shape != (experts,):
        more = f" or {experts}, one for each expert" if experts > 1 else ""
        raise ValueError(f"global_scale: expected 1 element{more}, got shape {tuple(t.shape)}")
    return t.contiguous()


def _rows(t: torch.Tensor) -> torch.Tensor:
    return t.unsqueeze(0) if t.ndim == 1 else t.flatten(0, -2)
