"""Compute ``rcp.approx.ftz.f32`` of a GPU, the reciprocal of vLLM's and FlashInfer's NVFP4.

PTX promises an error of one unit in the last place at most and leaves the bits open. The file
``rcp_approx.xz`` has what an H100 returned for the 2^23 float32 from 1 to 2. It holds an int8 for
each mantissa: by how many units in the last place the result exceeds the correctly rounded one.
All other exponents and both signs were recorded, too. They change exponent and sign of the result,
and not its mantissa, unless it is subnormal.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from cute_quant.contract.dtypes import FLOAT32_MANTISSA_BITS, describe

RECORDING = Path(__file__).with_name("rcp_approx.xz")

SIGN = -(1 << 31)
EXPONENT = 0xFF
MANTISSA = (1 << FLOAT32_MANTISSA_BITS) - 1
SMALLEST_NORMAL, ONE, INFINITY, NAN = 0x00800000, 0x3F800000, 0x7F800000, 0x7FFFFFFF
"""As the bits of a float32."""
BIAS = 127


def rcp_approx(x: torch.Tensor) -> torch.Tensor:
    """Return what ``rcp.approx.ftz.f32`` returns on an H100, to the bit.

    Subnormal numbers are zeros of their sign, as operands and as results. The reciprocal of a zero
    is an infinity and that of an infinity a zero, of the same sign. That of NaN is 0x7FFFFFFF.

    Args:
        x: float32 of any shape and strides, on any device.

    Returns:
        float32, of x's shape and device.

    Raises:
        TypeError: x is not float32.
        OSError: the recording does not lie beside this module.
        ImportError: this Python was built without ``lzma``.
    """
    if x.dtype is not torch.float32:
        raise TypeError(f"x: expected a tensor of float32, got {describe(x)}")
    bits = x.view(torch.int32)
    exponent = bits >> FLOAT32_MANTISSA_BITS & EXPONENT
    mantissa = bits & MANTISSA
    rounded = (1.0 / (mantissa | ONE).view(torch.float32)).view(torch.int32)
    # Negative where the exponent is below all that float32 has.
    magnitude = rounded + _errors(x.device)[mantissa] + (BIAS - exponent << FLOAT32_MANTISSA_BITS)
    magnitude = magnitude.where(magnitude >= SMALLEST_NORMAL, 0)
    magnitude = magnitude.where(exponent != 0, INFINITY)
    result = magnitude | bits & SIGN
    return result.where(~x.isnan(), NAN).view(torch.float32)


@functools.cache
def _errors(device: torch.device) -> torch.Tensor:
    """Return the error of the result for each mantissa in units of the last place.

    Returns:
        (2^23,), int8.
    """
    # Not at the top: some builds of Python lack it, and other numerics do without.
    import lzma

    content = bytearray(lzma.decompress(RECORDING.read_bytes()))
    return torch.frombuffer(content, dtype=torch.int8).to(device)
