"""The kernel under measurement and its compile-time choices, in one place."""

from __future__ import annotations

import cutlass

from cute_quant.formats import Format
from cute_quant.kernels.quantize import Quantize


def quantize(dtype: type[cutlass.Numeric], fmt: Format, pdl: bool) -> tuple:
    """The class and its choices, as `cute_quant.compile` and `bench.sass` take them.

    Args:
        dtype: element type of the input.
        pdl: launch as a programmatic dependent of the kernel before it.
    """
    return Quantize, dtype, fmt, pdl
