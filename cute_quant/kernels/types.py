"""The types of torch as CuTe has them."""

import cutlass
import torch

from cute_quant.contract.formats import INPUT_DTYPES

ELEMENT_TYPES = {
    torch.bfloat16: cutlass.BFloat16,
    torch.float16: cutlass.Float16,
    torch.float32: cutlass.Float32,
    torch.float8_e4m3fn: cutlass.Float8E4M3FN,
    torch.float8_e5m2: cutlass.Float8E5M2,
    torch.int8: cutlass.Int8,
    torch.float8_e8m0fnu: cutlass.Float8E8M0FNU,
    torch.int32: cutlass.Int32,
}

INPUT_TYPES = {ELEMENT_TYPES[dtype]: dtype for dtype in INPUT_DTYPES}
"""What the quantizer takes, the other way around."""
