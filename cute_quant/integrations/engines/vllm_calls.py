"""Functions with the parameters of vLLM's, which compute on kernels of this package.

Each returns ``NotImplemented`` for arguments that vLLM's own function has to take.
"""

from __future__ import annotations

from typing import Any

import torch

from cute_quant.contract import prologues
from cute_quant.contract.dtypes import (
    BLOCK_GROUPS,
    E4M3_MAX,
    INPUT_DTYPES,
    INT8_MAX,
    SCALE_ROW_ALIGNMENT,
    VLLM_MIN_SCALE,
    align,
    to_float32,
)
from cute_quant.contract.format_choices import (
    FLASHINFER,
    GROUP_SIZES,
    IEEE,
    MIN_EXACT_SCALE,
    MX_GROUP_SIZE,
    ROW_MAJOR,
    SGLANG,
    VLLM,
    VLLM_BF16,
    VLLM_TRITON,
)
from cute_quant.contract.formats import (
    DEEP_GEMM,
    DEEP_GEMM_SM90,
    GROUPWISE_FP8,
    INT8,
    MXFP8,
    NVFP4,
    ROWWISE_FP8,
    ROWWISE_INT8,
    Format,
)
from cute_quant.contract.rows import Masked, PrefixSum, PrefixSumWithGaps
from cute_quant.contract.torch_private import constant_in_graphs
from cute_quant.ops.rows import quantize, silu_mul_quantize
from cute_quant.ops.scales import convert_scales

MIN_AMAX = 1e-10
"""vLLM's `eps`."""

_PACKED_GROUP_SIZES = (32, 128)
_MXFP8_ROWS = MXFP8.replace(scale_layout=ROW_MAJOR)
_NVFP4 = NVFP4.replace(numerics=VLLM)
_NVFP4_ROWS = NVFP4.replace(numerics=VLLM, scale_layout=ROW_MAJOR)
_ROWS = ROWWISE_FP8.replace(numerics=VLLM)
_ROWS_INT8 = ROWWISE_INT8.replace(numerics=VLLM, min_scale=MIN_EXACT_SCALE)
"""vLLM's scales have no lower bound."""
_ROWS_INT8_TRITON = ROWWISE_INT8.replace(numerics=SGLANG)
"""SGLang has the same kernel."""
_MASKED_FORMATS = {
    "FLOAT32": DEEP_GEMM_SM90.replace(numerics=VLLM_BF16),
    "FLOAT32_CEIL_UE8M0": DEEP_GEMM_SM90.replace(numerics=VLLM_BF16, round_scale=True),
    "UE8M0": DEEP_GEMM.replace(numerics=VLLM_BF16),
}
"""Formats of ``DeepGemmQuantScaleFMT``."""


# What vLLM decides once in a process. Its functions import modules that the plug-in does not.


@constant_in_graphs
def _uses_ue8m0() -> bool:
    from vllm.utils.deep_gemm import is_deep_gemm_e8m0_used

    used: bool = is_deep_gemm_e8m0_used()
    return used


@constant_in_graphs
def _packs_scales() -> bool:
    from vllm.utils.deep_gemm import DeepGemmQuantScaleFMT

    packs: bool = DeepGemmQuantScaleFMT.from_oracle() == DeepGemmQuantScaleFMT.UE8M0
    return packs


@constant_in_graphs
def _mxfp8_format(swizzled: bool) -> Format:
    from vllm.platforms import current_platform
    from vllm.utils.flashinfer import has_flashinfer

    by_flashinfer = current_platform.has_device_capability(100) and has_flashinfer()
    fmt = MXFP8 if swizzled else _MXFP8_ROWS
    return fmt.replace(numerics=FLASHINFER if by_flashinfer else VLLM)


@constant_in_graphs
def _fuses_fp4() -> bool:
    """Return whether passes of vLLM look for its own NVFP4 operator in a graph."""
    from vllm.config import get_cached_compilation_config

    passes = get_cached_compilation_config().pass_config
    return bool(
        passes.fuse_norm_quant
        or passes.fuse_act_quant
        or passes.fuse_attn_quant
        or passes.fuse_allreduce_rms
    )


def _constant(number: float) -> Any:
    """Return one of the numbers that formats are made of as a constant, None for another.

    ``torch.compile(dynamic=True)``, which vLLM uses, has symbols for attributes and globals alike.
    """
    if number == 128:
        return 128
    if number == 32:
        return 32
    if number == 64:
        return 64
    if number == 1e-10:
        return 1e-10
    return None if torch.compiler.is_compiling() else number


@constant_in_graphs
def _packed_format(group_size: int, eps: float) -> Format:
    min_scale = max(to_float32(eps) / E4M3_MAX, VLLM_MIN_SCALE)
    return DEEP_GEMM.replace(group_size=group_size, min_scale=min_scale)


@constant_in_graphs
def _float32_format(
    group_size: int, column_major: bool, round_scale: bool, eps: float = MIN_AMAX
) -> Format:
    """Return the format of groups with float32 scales.

    The bound is on the amax; where CUDA rounds scales to powers of two, one on the scale is above
    it.
    """
    min_scale = max(eps / E4M3_MAX, VLLM_MIN_SCALE) if round_scale else eps / E4M3_MAX
    fmt = DEEP_GEMM_SM90 if column_major else GROUPWISE_FP8
    return fmt.replace(group_size=group_size, round_scale=round_scale, min_scale=min_scale)


@constant_in_graphs
def _triton_format(group_size: int, round_scale: bool, eps: float) -> Format:
    """Return the format of Triton's kernels, which multiply by 1 / 448 and bound the amax alone."""
    return DEEP_GEMM_SM90.replace(
        group_size=group_size,
        round_scale=round_scale,
        min_scale=eps / E4M3_MAX,
        numerics=IEEE if round_scale else VLLM_TRITON,
    )


@constant_in_graphs
def _int8_format(group_size: int, eps: float) -> Format:
    return INT8.replace(group_size=group_size, numerics=VLLM, min_scale=eps / INT8_MAX)


def _without_padding(sf: torch.Tensor) -> torch.Tensor:
    """Return MN-major scales with columns that are as long as there are rows."""
    if torch.compiler.is_compiling():
        # Whether that is a copy would depend on the number of rows.
        return sf.mT.clone(memory_format=torch.contiguous_format).mT
    return sf.mT.contiguous().mT


def _fits(x: torch.Tensor, group_size: int | None, eps: float | None) -> bool:
    return (
        x.dtype in INPUT_DTYPES
        and group_size in GROUP_SIZES
        and x.shape[-1] % group_size == 0
        and x.stride(-1) == 1
        and eps is not None
        and eps > 0
    )


def _group_quant(
    x: torch.Tensor,
    group_size: int,
    *,
    column_major: bool,
    tma_aligned: bool,
    round_scale: bool,
    eps: float = MIN_AMAX,
    out_q: torch.Tensor | None = None,
) -> Any:
    size, bound = _constant(group_size), _constant(eps)
    most = 3 if tma_aligned else 2
    if not _fits(x, size, bound) or x.ndim < 2 or (column_major and x.ndim > most):
        return NotImplemented
    fmt = _float32_format(size, column_major, round_scale, bound)
    sf = None
    padded = tma_aligned or not column_major
    if not (padded or torch.compiler.is_compiling()):
        sf = x.new_empty((x.shape[-1] // size, x.shape[0]), dtype=torch.float32).mT
    q, sf = quantize(x, fmt, out=None if out_q is None and sf is None else (out_q, sf))
    return q, sf if padded else _without_padding(sf)


def _stacked(
    ends: torch.Tensor | None, alignment: int, output: torch.Tensor | None
) -> PrefixSum | None:
    """Return the rows of experts; in memory of the caller, those between them stay as they are."""
    if ends is None:
        return None
    return (PrefixSum if output is None else PrefixSumWithGaps)(ends, alignment)


def _packed(
    x: torch.Tensor,
    group_size: int,
    eps: float = MIN_AMAX,
    out_q: torch.Tensor | None = None,
) -> Any:
    size, bound = _constant(group_size), _constant(eps)
    if not _fits(x, size, bound) or size not in _PACKED_GROUP_SIZES:
        return NotImplemented
    if out_q is not None and (out_q.shape != x.shape or not out_q.is_contiguous()):
        return NotImplemented
    out = None if out_q is None else (_as_rows(out_q), None)
    q, sf = quantize(_as_rows(x), _packed_format(size, bound), out=out)
    return q.view(x.shape), sf


def _as_rows(t: torch.Tensor) -> torch.Tensor:
    return t.unsqueeze(0) if t.ndim == 1 else t.flatten(0, -2)


def _rows(x: torch.Tensor, scale_ub: torch.Tensor | None, per_token: bool) -> Any:
    if not per_token or scale_ub is not None or x.ndim != 2 or x.stride(-1) != 1:
        return NotImplemented
    if x.dtype not in INPUT_DTYPES:
        return NotImplemented
    return quantize(x, _ROWS)


def quant_fp8_forward(
    self: Any,
    x: torch.Tensor,
    scale: torch.Tensor | None = None,
    scale_ub: torch.Tensor | None = None,
    use_triton: bool = False,
) -> Any:
    """Compute ``QuantFP8.forward_cuda``, and ``forward_native``, which Inductor compiles.

    Both have the bits and the scales of the former.
    """
    if self.static or scale is not None:
        return NotImplemented
    if not self.is_group_quant:
        padded = bool(self.num_token_padding)
        return NotImplemented if padded else _rows(x, scale_ub, self.use_per_token_if_dynamic)
    packs = self.use_ue8m0 and self.use_deep_gemm_supported and self.group_size == 128
    if packs and _packs_scales():
        return _packed(x, self.group_size)
    return _group_quant(
        x,
        self.group_size,
        column_major=self.column_major_scales,
        tma_aligned=self.tma_aligned_scales,
        round_scale=bool(self.use_ue8m0),
    )


def per_token_group_quant_fp8(
    x: torch.Tensor,
    group_size: int,
    eps: float = 1e-10,
    dtype: torch.dtype | None = None,
    column_major_scales: bool = False,
    tma_aligned_scales: bool = False,
    out_q: torch.Tensor | None = None,
    use_ue8m0: bool | None = None,
) -> Any:
    """Compute the function of this name in vLLM's ``fp8_utils``."""
    if dtype not in (None, torch.float8_e4m3fn):
        return NotImplemented
    return _group_quant(
        x,
        group_size,
        column_major=column_major_scales,
        tma_aligned=tma_aligned_scales,
        round_scale=_uses_ue8m0() if use_ue8m0 is None else bool(use_ue8m0),
        eps=eps,
        out_q=out_q,
    )


def per_token_group_quant_fp8_packed_for_deepgemm(
    x: torch.Tensor,
    group_size: int,
    eps: float = 1e-10,
    use_ue8m0: bool | None = None,
    out_q: torch.Tensor | None = None,
) -> Any:
    """Compute the function of this name in vLLM's ``fp8_utils``."""
    if use_ue8m0 is False:
        return NotImplemented
    return _packed(x, group_size, eps, out_q)


def silu_mul_quant_fp8_packed_triton(
    input: torch.Tensor,  # noqa: A002
    group_size: int = 128,
    output_q: torch.Tensor | None = None,
    clamp_limit: float | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    *,
    expert_ends: torch.Tensor | None = None,
    expert_alignment: int = 0,
) -> Any:
    """Compute the function of this name in vLLM's ``fp8_utils``."""
    size = _constant(group_size)
    if size not in _PACKED_GROUP_SIZES:
        return NotImplemented
    return silu_mul_quantize(
        input,
        DEEP_GEMM.replace(group_size=size),
        clamp=clamp_limit,
        alpha=alpha,
        beta=beta,
        rounding=VLLM,
        rows=_stacked(expert_ends, expert_alignment, output_q),
        out=None if output_q is None else (output_q, None),
    )


def silu_mul_per_token_group_quant_fp8_colmajor(
    input: torch.Tensor,  # noqa: A002
    output: torch.Tensor | None = None,
    use_ue8m0: bool | None = None,
    eps: float = 1e-10,
    clamp_limit: float | None = None,
    group_size: int = 128,
    alpha: float = 1.0,
    beta: float = 0.0,
    *,
    expert_ends: torch.Tensor | None = None,
    expert_alignment: int = 0,
) -> Any:
    """Compute the function of this name in vLLM's ``fp8_utils``."""
    size, bound = _constant(group_size), _constant(eps)
    if size not in GROUP_SIZES or bound is None:
        return NotImplemented
    round_scale = _uses_ue8m0() if use_ue8m0 is None else bool(use_ue8m0)
    return silu_mul_quantize(
        input,
        _triton_format(size, round_scale, bound),
        clamp=clamp_limit,
        alpha=alpha,
        beta=beta,
        rounding=prologues.VLLM_TRITON,
        rows=_stacked(expert_ends, expert_alignment, output),
        out=None if output is None else (output, None),
    )


def per_token_group_quant_int8(
    x: torch.Tensor, group_size: int, eps: float = 1e-10, dtype: torch.dtype = torch.int8
) -> Any:
    """Compute the function of this name in vLLM's ``int8_utils``."""
    size, bound = _constant(group_size), _constant(eps)
    if not _fits(x, size, bound) or x.ndim < 2 or dtype is not torch.int8:
        return NotImplemented
    return quantize(x, _int8_format(size, bound))


def per_token_quant_int8(x: torch.Tensor) -> Any:
    """Compute the function of this name in vLLM's ``int8_utils``, a kernel of Triton."""
    if x.dtype not in INPUT_DTYPES or x.ndim < 2 or x.stride(-1) != 1:
        return NotImplemented
    return quantize(x, _ROWS_INT8_TRITON)


def scaled_int8_quant(
    input: torch.Tensor,  # noqa: A002
    scale: torch.Tensor | None = None,
    azp: torch.Tensor | None = None,
    symmetric: bool = True,
) -> Any:
    """Compute the function of this name in vLLM's ``_custom_ops``, for scales of rows."""
    if scale is not None or azp is not None or not symmetric or not input.is_contiguous():
        return NotImplemented
    if input.dtype not in INPUT_DTYPES or input.ndim < 2:
        return NotImplemented
    q, sf = quantize(input, _ROWS_INT8)
    return q, sf.view(-1, 1), None


def scaled_fp8_quant(
    input: torch.Tensor,  # noqa: A002
    scale: torch.Tensor | None = None,
    num_token_padding: int | None = None,
    scale_ub: torch.Tensor | None = None,
    use_per_token_if_dynamic: bool = False,
    output: torch.Tensor | None = None,
    group_shape: tuple[int, int] | None = None,
) -> Any:
    """Compute the function of this name in vLLM's ``_custom_ops``, for scales of rows."""
    if scale is not None or num_token_padding or output is not None:
        return NotImplemented
    return _rows(input, scale_ub, use_per_token_if_dynamic)


def mxfp8_e4m3_quantize(
    x: torch.Tensor, is_sf_swizzled_layout: bool = False, alignment: int = 0
) -> Any:
    """Compute the function of this name in vLLM's ``mxfp8_utils``."""
    if x.dtype not in INPUT_DTYPES or x.ndim not in (2, 3) or x.stride(-1) != 1:
        return NotImplemented
    if x.shape[-1] % max(alignment, MX_GROUP_SIZE):
        return NotImplemented
    q, sf = quantize(x, _mxfp8_format(is_sf_swizzled_layout))
    sf = sf.view(torch.uint8)
    return q, sf.flatten() if is_sf_swizzled_layout else sf


def swizzle_mxfp8_scale(sf: torch.Tensor, M: int, K: int) -> Any:  # noqa: N803
    """Compute the function of this name in vLLM's ``mxfp8_utils``, in one kernel."""
    if sf.dtype is not torch.uint8 or sf.shape != (M, K // MX_GROUP_SIZE) or K % MX_GROUP_SIZE:
        return NotImplemented
    return convert_scales(sf.view(MXFP8.scale_dtype), _MXFP8_ROWS, MXFP8, (M, K)).view(torch.uint8)


def scaled_fp4_quant(
    input: torch.Tensor,  # noqa: A002
    input_global_scale: torch.Tensor,
    is_sf_swizzled_layout: bool = True,
    backend: str = "none",
    padded_n: int | None = None,
) -> Any:
    """Compute the function of this name in vLLM's ``_custom_ops``."""
    n = input.shape[-1]
    if (
        input.dtype not in (torch.float16, torch.bfloat16)
        or n % NVFP4.group_size
        or "trtllm" in backend
        or padded_n not in (None, n)
        or input_global_scale.numel() != 1
        or input_global_scale.dtype is not torch.float32
        or (torch.compiler.is_compiling() and _fuses_fp4())
    ):
        return NotImplemented
    fmt = _NVFP4 if is_sf_swizzled_layout else _NVFP4_ROWS
    x = input.reshape(1 if input.ndim == 1 else -1, n)
    q, sf = quantize(x, fmt, encode_scale=input_global_scale.reshape(()))
    if is_sf_swizzled_layout:
        sf = sf.view(-1, align(n // NVFP4.group_size, BLOCK_GROUPS))
    return q.view(torch.uint8), sf


def persistent_masked_m_silu_mul_quant(
    y: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    num_parallel_tokens: int = 16,
    group_size: int = 128,
    quant_scale_fmt: Any = ...,
) -> Any:
    """Compute the function of this name in vLLM's ``batched_deep_gemm_moe``, in bf16 as it does."""
    fmt = _MASKED_FORMATS.get(getattr(quant_scale_fmt, "name", ""))
    experts, rows, columns = y.shape
    if fmt is None or group_size != fmt.group_size or rows % SCALE_ROW_ALIGNMENT:
        return NotImplemented
    if y.dtype is not torch.bfloat16 or columns // 2 % group_size:
        return NotImplemented
    # A GEMM may look at the scales of rows that do not exist.
    sf = fmt.empty_scales((experts,), rows, columns // 2, y.device).zero_()
    counts = tokens_per_expert.to(y.device, torch.int32)
    return silu_mul_quantize(
        y, fmt, rounding=prologues.VLLM_BF16, rows=Masked(counts), out=(None, sf)
    )


def silu_and_mul_fp8_dynamic_128(x: torch.Tensor, linear: Any) -> Any:
    """Compute ``_silu_and_mul_fp8_dynamic_128`` of vLLM's ``fused_act_quant``."""
    from vllm.model_executor.layers.fusion.quant_activation import QuantizedActivation
    from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8Dynamic128Sym

    if x.shape[-1] // 2 % GROUPWISE_FP8.group_size:
        return NotImplemented
    fmt = GROUPWISE_FP8.replace(numerics=VLLM)
    q, sf = silu_mul_quantize(x, fmt, rounding=prologues.VLLM_CUDA)
    return QuantizedActivation(q, sf, x.dtype, q.shape, kFp8Dynamic128Sym)


def silu_and_mul_nvfp4_dynamic(x: torch.Tensor, linear: Any) -> Any:
    """Compute ``_silu_and_mul_nvfp4_dynamic`` of vLLM's ``fused_act_quant``."""
    from vllm.model_executor.layers.fusion.quant_activation import QuantizedActivation
    from vllm.model_executor.layers.quantization.utils.quant_utils import kNvfp4Dynamic

    scale = getattr(linear, "input_global_scale_inv", None)
    k = x.shape[-1] // 2
    if k % NVFP4.group_size or scale is None or scale.numel() != 1:
        return NotImplemented
    q, sf = silu_mul_quantize(
        x.flatten(0, -2),
        _NVFP4,
        rounding=VLLM,
        encode_scale=scale.reshape(()),
    )
    shape = torch.Size((*x.shape[:-1], k))
    return QuantizedActivation(
        q.view(torch.uint8).view(*x.shape[:-1], k // 2),
        sf.view(-1, align(k // NVFP4.group_size, BLOCK_GROUPS)),
        x.dtype,
        shape,
        kNvfp4Dynamic,
    )
