"""The quantizer in front of an FP8 GEMM, in CuTe DSL."""

from cute_quant.ops import dequantize, quantize

__all__ = ["dequantize", "quantize"]
__version__ = "0.1.0"
