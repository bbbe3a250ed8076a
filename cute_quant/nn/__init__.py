"""Linear layers that are trained in FP8: forward and both gradients are GEMMs of FP8 operands.

    layer = cute_quant.nn.Fp8Linear(4096, 1024, device="cuda", dtype=torch.bfloat16)
    layer(x).sum().backward()

They take the place of ``torch.nn.Linear``, with its parameters and their names. On a GPU the GEMMs
are DeepGEMM's. On the CPU, and where it is not installed, torch multiplies the same operands.
"""

from cute_quant.nn.grouped import Fp8GroupedLinear
from cute_quant.nn.linear import Fp8Linear
from cute_quant.nn.recipes import SM90, SM100, Recipe

__all__ = ["SM90", "SM100", "Fp8GroupedLinear", "Fp8Linear", "Recipe"]
