"""The quantizer in front of every low-precision GEMM, in CuTe DSL.

    q, sf = cute_quant.quantize(x)                          # values and scales for DeepGEMM
    q, sf = cute_quant.quantize(x, cute_quant.MXFP8)        # or in another format
    q, sf = cute_quant.silu_mul_quantize(gate_up)           # with what comes before it
    q, sf, residual = cute_quant.rms_norm_quantize(x, weight, residual=residual)
    q, sf = cute_quant.quantize(x, cute_quant.NVFP4, amax=cute_quant.tensor_amax(x))
    w8, w_sf = cute_quant.quantize_blocks(w)                # weights, in square blocks
    rows, columns = cute_quant.quantize_both(x, fmt, column_fmt)  # for FP8 training
    launch = cute_quant.bind(x, out=(q, sf))                # checked once, launched often
    sf = cute_quant.convert_scales(sf, fmt, to, x.shape)    # the same scales in another layout

``Format`` and the named formats say what results look like, ``Masked``, ``PrefixSum`` and
``Indexed`` which rows exist. ``cute_quant.kernels`` has the stage for kernels of your own,
``cute_quant.integrations`` the calls of DeepGEMM and vLLM, ``cute_quant.distributed`` expert
parallel layers and the shardings of DTensor, ``cute_quant.checkpoint`` what quantizes checkpoints
of Hugging Face.
"""

from cute_quant.contract.formats import (
    DEEP_GEMM,
    DEEP_GEMM_32,
    DEEP_GEMM_SM90,
    GROUPWISE_FP8,
    INT8,
    MXFP4,
    MXFP8,
    NAMED_FORMATS,
    NVFP4,
    ROWWISE_FP8,
    ROWWISE_INT8,
    Format,
)
from cute_quant.contract.rows import Indexed, Masked, PrefixSum, PrefixSumWithGaps
from cute_quant.dispatch.launch import Launch
from cute_quant.dispatch.warm_up import WarmUp, warm_up
from cute_quant.jit.aot_load import load
from cute_quant.jit.compilation import forbid_compilation
from cute_quant.ops.binding import bind
from cute_quant.ops.columns import (
    quantize_both,
    quantize_columns,
    silu_mul_backward_quantize_both,
    silu_mul_quantize_both,
)
from cute_quant.ops.rows import (
    dequantize,
    fake_quantize,
    quantize,
    rms_norm_quantize,
    silu_mul_backward_quantize,
    silu_mul_quantize,
    tensor_amax,
)
from cute_quant.ops.scales import check_scales, convert_scales, deep_gemm_format, empty_scales
from cute_quant.ops.weights import dequantize_blocks, quantize_blocks, requantize_blocks

__all__ = [
    "DEEP_GEMM",
    "DEEP_GEMM_32",
    "DEEP_GEMM_SM90",
    "GROUPWISE_FP8",
    "INT8",
    "MXFP4",
    "MXFP8",
    "NAMED_FORMATS",
    "NVFP4",
    "ROWWISE_FP8",
    "ROWWISE_INT8",
    "Format",
    "Indexed",
    "Launch",
    "Masked",
    "PrefixSum",
    "PrefixSumWithGaps",
    "WarmUp",
    "bind",
    "check_scales",
    "convert_scales",
    "deep_gemm_format",
    "dequantize",
    "dequantize_blocks",
    "empty_scales",
    "fake_quantize",
    "forbid_compilation",
    "load",
    "quantize",
    "quantize_blocks",
    "quantize_both",
    "quantize_columns",
    "requantize_blocks",
    "rms_norm_quantize",
    "silu_mul_backward_quantize",
    "silu_mul_backward_quantize_both",
    "silu_mul_quantize",
    "silu_mul_quantize_both",
    "tensor_amax",
    "warm_up",
]
__version__ = "0.1.0"
