"""The quantizer in front of an FP8 GEMM, in CuTe DSL."""

from cute_quant.ahead_of_time import load
from cute_quant.ops import dequantize, fake_quantize, quantize
from cute_quant.rows import Indexed, Masked, PrefixSum

__all__ = ["Indexed", "Masked", "PrefixSum", "dequantize", "fake_quantize", "load", "quantize"]
__version__ = "0.1.0"
