"""Functions with the parameters of SGLang's, which compute on kernels of this package.

Each returns ``NotImplemented`` for arguments that SGLang's own function has to take. Its kernels
are compiled with fast arithmetic, whose bits the numerics "sglang" and "vllm_triton" have.
"""

from __future__ import annotations

from typing import Any

import torch

from cute_quant.contract import checks, prologues
from cute_quant.contract.calls import ResultShape
from cute_quant.contract.dtypes import (
    BLOCK_GROUPS,
    E4M3_MAX,
    INPUT_DTYPES,
    INT8_MAX,
    SCALE_ROW_ALIGNMENT,
    align,
)
from cute_quant.contract.format_choices import (
    BLOCKED,
    BLOCKED_8,
    FLASHINFER,
    GROUP_SIZES,
    IEEE,
    MN_MAJOR,
    MN_MAJOR_PACKED,
    MX_GROUP_SIZE,
    ROW_MAJOR,
    ROW_MAJOR_PACKED,
    SGLANG,
    VLLM_TRITON,
)
from cute_quant.contract.formats import (
    DEEP_GEMM,
    DEEP_GEMM_SM90,
    INT8,
    MXFP8,
    NVFP4,
    ROWWISE_FP8,
    ROWWISE_INT8,
    Format,
)
from cute_quant.contract.rows import Masked
from cute_quant.contract.torch_private import constant_in_graphs
from cute_quant.ops.rows import quantize, silu_mul_quantize

MIN_AMAX = 1e-10
"""SGLang's `eps`, which its kernels have as a constant."""

_MIN_BF16_SCALE = torch.tensor(MIN_AMAX, dtype=torch.bfloat16).item() / E4M3_MAX
"""Where Triton bounds an amax in bfloat16, it rounds the bound."""


@constant_in_graphs
def _format(
    group_size: int,
    *,
    column_major: bool,
    ue8m0: bool,
    packed: bool,
    numerics: str = SGLANG,
    min_scale: str | float = SGLANG,
) -> Format | None:
    """Return the format of e4m3 groups, None for a size that there is not.

    Args:
        group_size: elements that share a scale.
        column_major: whether scales of consecutive rows are contiguous.
        ue8m0: whether scales are powers of two.
        packed: whether these have four in an int32.
        numerics: of float32 scales that are no powers of two.
        min_scale: of these.
    """
    if group_size not in GROUP_SIZES:
        return None
    if packed:
        layout = MN_MAJOR_PACKED if column_major else ROW_MAJOR_PACKED
        return DEEP_GEMM.replace(group_size=group_size, min_scale=SGLANG, scale_layout=layout)
    return DEEP_GEMM_SM90.replace(
        group_size=group_size,
        scale_layout=MN_MAJOR if column_major else ROW_MAJOR,
        round_scale=ue8m0,
        min_scale=SGLANG if ue8m0 else min_scale,
        numerics=IEEE if ue8m0 else numerics,
    )


def _quantize(
    x: torch.Tensor,
    fmt: Format | None,
    *,
    silu: str | None = None,
    clamp: float | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    masked_m: torch.Tensor | None = None,
    out: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
) -> Any:
    """Quantize x, or the product of its SiLU and the other half, into memory that may be given.

    Args:
        x: as of ``quantize``.
        fmt: as of ``quantize``; None is not taken.
        silu: the rounding of the product, None without SiLU.
        clamp: as of ``silu_mul_quantize``.
        alpha: as of ``silu_mul_quantize``.
        beta: as of ``silu_mul_quantize``.
        masked_m: rows of each expert, None if all of them exist.
        out: q and sf of the caller.
    """
    columns = x.shape[-1] // (1 if silu is None else 2)
    if fmt is None or x.dtype not in INPUT_DTYPES or x.ndim < 2:
        return NotImplemented
    if (not fmt.whole_row and columns % fmt.group_size) or (masked_m is not None and x.ndim != 3):
        return NotImplemented
    if out[1] is not None and not _fits(out[1], fmt, (*x.shape[:-1], columns)):
        return NotImplemented
    rows = None if masked_m is None else Masked(masked_m.to(torch.int32))
    if silu is None:
        return quantize(x, fmt, rows=rows, out=out)
    return silu_mul_quantize(
        x, fmt, clamp=clamp, alpha=alpha, beta=beta, rounding=silu, rows=rows, out=out
    )


def _fits(sf: torch.Tensor, fmt: Format, shape: tuple[int, ...]) -> bool:
    """Return whether scales of a caller are as the format has them for values of a shape."""
    *batch, mn, k = shape
    if sf.dtype is not fmt.sf_dtype:
        return False
    try:
        checks.check_call_scales(sf, fmt, ResultShape(tuple(batch), mn, k))
    except ValueError:
        return False
    return True


def _layout_of(sf: torch.Tensor) -> bool:
    """Return whether scales are column-major, as SGLang tells it from their strides."""
    return sf.stride(-2) < sf.stride(-1)


def sglang_per_token_group_quant_fp8(
    x: torch.Tensor,
    group_size: int,
    eps: float = 1e-10,
    column_major_scales: bool = False,
    scale_tma_aligned: bool = False,
    scale_ue8m0: bool = False,
    fuse_silu_and_mul: bool = False,
    masked_m: torch.Tensor | None = None,
    *,
    output_q: torch.Tensor | None = None,
    output_s: torch.Tensor | None = None,
) -> Any:
    """Compute the function of this name in SGLang's ``fp8_kernel``."""
    if eps != MIN_AMAX or (output_q is not None and output_q.dtype is not torch.float8_e4m3fn):
        return NotImplemented
    plain = not (column_major_scales or scale_ue8m0 or fuse_silu_and_mul)
    if group_size == x.shape[-1] and x.ndim == 2 and plain and masked_m is None:
        return sglang_per_token_quant_fp8(x, output_q=output_q, output_s=output_s)
    column_major, packed = column_major_scales, scale_ue8m0 and column_major_scales
    if output_s is not None:
        column_major, packed = _layout_of(output_s), output_s.dtype is torch.int32
    elif column_major and not scale_tma_aligned:
        if scale_ue8m0 or x.ndim != 2 or fuse_silu_and_mul:
            return NotImplemented
        # Columns without padding.
        output_s = x.new_empty((x.shape[1] // group_size, x.shape[0]), dtype=torch.float32).mT
    fmt = _format(group_size, column_major=column_major, ue8m0=scale_ue8m0, packed=packed)
    silu = prologues.UNFUSED if fuse_silu_and_mul else None
    return _quantize(x, fmt, silu=silu, masked_m=masked_m, out=(output_q, output_s))


def sglang_per_token_group_quant_fp8_row_padded(
    x: torch.Tensor, group_size: int, eps: float = 1e-10, row_alignment: int = 4
) -> Any:
    """Compute the function of this name in SGLang's ``fp8_kernel``: padding rows become 0."""
    if eps != MIN_AMAX or row_alignment != SCALE_ROW_ALIGNMENT or x.ndim != 2:
        return NotImplemented
    m, k = x.shape
    if group_size not in GROUP_SIZES or k % group_size:
        return NotImplemented
    padded = align(m, row_alignment)
    q = x.new_empty((padded, k), dtype=torch.float8_e4m3fn)
    sf = x.new_empty((k // group_size, padded), dtype=torch.float32).mT
    fmt = _format(group_size, column_major=True, ue8m0=False, packed=False)
    found = _quantize(x, fmt, out=(q, sf[:m]))
    return found if found is NotImplemented else (q, sf)


def sglang_per_token_quant_fp8(
    x: torch.Tensor,
    dtype: torch.dtype = torch.float8_e4m3fn,
    *,
    output_q: torch.Tensor | None = None,
    output_s: torch.Tensor | None = None,
) -> Any:
    """Compute the function of this name in SGLang's ``fp8_kernel``.

    SGLang compiles it with fast arithmetic for compute capability 9.0 alone. On others a row of
    zeros has the smallest scale, where SGLang's is 0.
    """
    if dtype is not torch.float8_e4m3fn or x.ndim != 2 or x.dtype not in INPUT_DTYPES:
        return NotImplemented
    fast = not x.is_cuda or torch.cuda.get_device_capability(x.device) == (9, 0)
    fmt = ROWWISE_FP8.replace(numerics=SGLANG if fast else IEEE, min_scale=SGLANG)
    if output_s is not None and not _fits(output_s, fmt, tuple(x.shape)):
        return NotImplemented
    return quantize(x, fmt, out=(output_q, output_s))


def scaled_fp8_quant(
    input: torch.Tensor,  # noqa: A002
    scale: torch.Tensor | None = None,
    num_token_padding: int | None = None,
    use_per_token_if_dynamic: bool = False,
) -> Any:
    """Compute the function of this name in SGLang's ``fp8_kernel``, for scales of rows."""
    if scale is not None or num_token_padding or not use_per_token_if_dynamic:
        return NotImplemented
    return sglang_per_token_quant_fp8(input) if input.is_contiguous() else NotImplemented


def per_token_group_quant(
    input: torch.Tensor,  # noqa: A002
    output_q: torch.Tensor | None = None,
    output_s: torch.Tensor | None = None,
    group_size: int = 128,
    scale_ue8m0: bool = False,
    fuse_silu_and_mul: bool = False,
    masked_m: torch.Tensor | None = None,
    expected_m: int | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    column_major_scales: bool = False,
    sorted_token_ids: torch.Tensor | None = None,
    num_tokens_post_padded: torch.Tensor | None = None,
    num_valid_tokens: int = 0,
    silu_and_mul_mode: str = "legacy",
) -> Any:
    """Compute the function of this name in SGLang's ``per_token_group_quant``.

    All rows of the sorted layout are quantized, of which SGLang skips those that no GEMM reads.
    """
    dtype = out_dtype if output_q is None else output_q.dtype
    column_major, packed = column_major_scales, scale_ue8m0
    if output_s is not None:
        column_major, packed = _layout_of(output_s), output_s.dtype is torch.int32
    if dtype is torch.int8:
        if scale_ue8m0 or group_size not in GROUP_SIZES:
            return NotImplemented
        layout = MN_MAJOR if column_major else ROW_MAJOR
        fmt: Format | None = INT8.replace(
            group_size=group_size, numerics=SGLANG, scale_layout=layout
        )
    elif dtype in (None, torch.float8_e4m3fn):
        fmt = _format(group_size, column_major=column_major, ue8m0=scale_ue8m0, packed=packed)
    else:
        return NotImplemented
    rounding = prologues.VLLM if silu_and_mul_mode == "dense" else prologues.UNFUSED
    silu = rounding if fuse_silu_and_mul else None
    return _quantize(input, fmt, silu=silu, masked_m=masked_m, out=(output_q, output_s))


def sglang_per_token_group_quant_int8(
    x: torch.Tensor, group_size: int, eps: float = 1e-10, dtype: torch.dtype = torch.int8
) -> Any:
    """Compute the function of this name in SGLang's ``int8_kernel``."""
    if eps != MIN_AMAX or dtype is not torch.int8:
        return NotImplemented
    return per_token_group_quant(x, group_size=group_size, out_dtype=dtype)


def per_token_quant_int8(
    x: torch.Tensor, scale_dtype: torch.dtype = torch.float32, cal_sum: bool = False
) -> Any:
    """Compute the function of this name in SGLang's ``int8_kernel``."""
    if scale_dtype is not torch.float32 or cal_sum or not x.is_contiguous():
        return NotImplemented
    return _quantize(x, ROWWISE_INT8.replace(numerics=SGLANG))


def per_token_group_quant_int8(
    x: torch.Tensor, group_size: int, eps: float = 1e-10, dtype: torch.dtype = torch.int8
) -> Any:
    """Compute the function of this name in SGLang's ``int8_kernel``, a kernel of Triton."""
    if dtype is not torch.int8 or not eps > 0 or group_size not in GROUP_SIZES:
        return NotImplemented
    fmt = INT8.replace(group_size=group_size, numerics=VLLM_TRITON, min_scale=eps / INT8_MAX)
    return _quantize(x, fmt) if x.is_contiguous() else NotImplemented


def silu_and_mul_masked_post_quant_fwd(
    input: torch.Tensor,  # noqa: A002
    output: torch.Tensor,
    output_scale: torch.Tensor,
    quant_group_size: int,
    masked_m: torch.Tensor,
    scale_ue8m0: bool = False,
    gemm1_alpha: float = 0.0,
    gemm1_clamp_limit: float = 0.0,
    num_real_tokens: int | None = None,
    topk: int | None = None,
) -> Any:
    """Compute the function of this name in SGLang's ``ep_moe_kernels``.

    With an alpha it is the activation of gpt-oss, whose bound of ups is one of x's dtype.
    """
    activation: dict[str, Any] = {"silu": prologues.UNFUSED}
    min_scale: str | float = _MIN_BF16_SCALE
    if gemm1_alpha:
        limit = gemm1_clamp_limit or 0.0
        if gemm1_alpha < 0 or limit <= 0 or limit != torch.tensor(limit, dtype=input.dtype).item():
            return NotImplemented
        activation = {"silu": prologues.SGLANG, "clamp": limit, "alpha": gemm1_alpha, "beta": 1.0}
        min_scale = SGLANG
    packed = output_scale.dtype is torch.int32
    sf = output_scale.mT if packed else output_scale
    fmt = _format(
        quant_group_size,
        column_major=packed,
        ue8m0=scale_ue8m0,
        packed=packed,
        numerics=VLLM_TRITON,
        min_scale=min_scale,
    )
    found = _quantize(input, fmt, **activation, masked_m=masked_m, out=(output, sf))
    return found if found is NotImplemented else None


def silu_and_mul_masked_post_quant(
    input: torch.Tensor,  # noqa: A002
    output: torch.Tensor,
    output_scale: torch.Tensor,
    quant_group_size: int,
    masked_m: torch.Tensor,
    scale_ue8m0: bool = False,
    topk: int = 8,
    transposed: bool = False,
    swiglu_limit: float | None = None,
    swizzle: bool = False,
) -> Any:
    """Compute the function of this name in SGLang's ``dsv4``."""
    if swizzle:
        return NotImplemented
    fmt = _post_quant_format(quant_group_size, scale_ue8m0, transposed)
    sf = output_scale.mT if transposed else output_scale
    return _post_quant(input, fmt, swiglu_limit, masked_m, (output, sf))


def silu_and_mul_contig_post_quant(
    input: torch.Tensor,  # noqa: A002
    output: torch.Tensor,
    output_scale: torch.Tensor,
    quant_group_size: int,
    scale_ue8m0: bool = False,
    transposed: bool = False,
    swiglu_limit: float | None = None,
    swizzle: bool = False,
) -> Any:
    """Compute the function of this name in SGLang's ``silu_and_mul_clamp``."""
    if swizzle:
        return NotImplemented
    fmt = _post_quant_format(quant_group_size, scale_ue8m0, transposed)
    return _post_quant(input, fmt, swiglu_limit, None, (output, output_scale))


def _post_quant_format(group_size: int, ue8m0: bool, transposed: bool) -> Format | None:
    """Return the format of what follows SiLU in float32; transposed scales are packed."""
    return _format(
        group_size,
        column_major=transposed,
        ue8m0=ue8m0,
        packed=transposed,
        numerics=VLLM_TRITON,
    )


def _post_quant(
    x: torch.Tensor,
    fmt: Format | None,
    limit: float | None,
    masked_m: torch.Tensor | None,
    out: tuple[torch.Tensor, torch.Tensor],
) -> Any:
    """Compute SiLU in float32, without a rounding, with a limit that bfloat16 has."""
    clamp = None if limit is None else torch.tensor(limit, dtype=x.dtype).item()
    found = _quantize(x, fmt, silu=prologues.FUSED, clamp=clamp, masked_m=masked_m, out=out)
    return found if found is NotImplemented else None


def flashinfer_mxfp8_quantize(
    input: torch.Tensor,  # noqa: A002
    is_sf_swizzled_layout: bool = True,
    alignment: int = 32,
    backend: str = "cute-dsl",
) -> Any:
    """Compute the function of this name in SGLang's ``fp8_utils``."""
    k = input.shape[-1]
    if input.dtype not in INPUT_DTYPES or k % max(alignment, MX_GROUP_SIZE):
        return NotImplemented
    layout = BLOCKED if is_sf_swizzled_layout else ROW_MAJOR
    fmt = MXFP8.replace(numerics=FLASHINFER, scale_layout=layout)
    q, sf = quantize(input.reshape(-1, k), fmt)
    return q, sf.view(torch.uint8).flatten()


def fp4_quantize(
    input: torch.Tensor,  # noqa: A002
    global_scale: torch.Tensor | None = None,
    sf_vec_size: int = 16,
    sf_use_ue8m0: bool = False,
    is_sf_swizzled_layout: bool = True,
    is_sf_8x4_layout: bool = False,
    enable_pdl: bool | None = None,
) -> Any:
    """Compute ``fp4_quantize`` of SGLang's ``fp4_utils``, FlashInfer's, for NVFP4."""
    k = input.shape[-1]
    if (
        global_scale is None
        or global_scale.numel() != 1
        or sf_use_ue8m0
        or sf_vec_size != NVFP4.group_size
        or input.dtype not in (torch.float16, torch.bfloat16)
        or input.stride(-1) != 1
        or k % NVFP4.group_size
    ):
        return NotImplemented
    blocked = BLOCKED_8 if is_sf_8x4_layout else BLOCKED
    layout = blocked if is_sf_swizzled_layout else ROW_MAJOR
    fmt = NVFP4.replace(numerics=FLASHINFER, scale_layout=layout)
    x = input.reshape(-1, k)
    q, sf = quantize(x, fmt, encode_scale=global_scale.float().reshape(()))
    sf = sf.view(torch.uint8)
    if is_sf_swizzled_layout:
        sf = sf.view(-1, align(k // NVFP4.group_size, BLOCK_GROUPS))
    return q.view(torch.uint8).view(*input.shape[:-1], k // 2), sf
