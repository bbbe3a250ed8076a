"""The quantizer in front of an FP8 GEMM, in CuTe DSL."""

from cute_quant.contract.rows import Indexed, Masked, PrefixSum
from cute_quant.jit.aot_load import load
from cute_quant.ops import dequantize, fake_quantize, quantize, rms_norm_quantize, silu_mul_quantize

__all__ = [
    "Indexed",
    "Masked",
    "PrefixSum",
    "dequantize",
    "fake_quantize",
    "load",
    "quantize",
    "rms_norm_quantize",
    "silu_mul_quantize",
]
__version__ = "0.1.0"
