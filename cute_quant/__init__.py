"""The quantizer in front of an FP8 GEMM, in CuTe DSL."""

from cute_quant.ops import dequantize, fake_quantize, quantize
from cute_quant.rows import Indexed, Masked, PrefixSum

__all__ = ["Indexed", "Masked", "PrefixSum", "dequantize", "fake_quantize", "quantize"]
__version__ = "0.1.0"
