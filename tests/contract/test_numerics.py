"""Device functions alone, on every operand that makes a difference."""

import pytest
import torch

from cute_quant.contract.dtypes import VALUE_TYPES
from cute_quant.jit import lookup
from cute_quant.kernels import arithmetic
from tests.kernels.elementwise import Apply


def apply(function, x):
    y = torch.full_like(x, torch.nan)
    arch = lookup.architecture(x.get_device())
    lookup.build(Apply(function), arch)(x, y)
    return y


def every_mantissa(exponent):
    """Return all 2^23 float32 from 2^exponent to the next power of two."""
    bits = torch.arange(2**23, dtype=torch.int32, device="cuda") | (exponent + 127) << 23
    return bits.view(torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("exponent", [-126, -125, -33, -1, 0, 1, 60, 119, 124])
def test_reciprocal_has_ieee_rounding(exponent):
    """Scales are from 2^-126 to 2^121.

    No quotient in float64 comes close enough to the middle of two float32 to be rounded onto it
    first.
    """
    x = every_mantissa(exponent)
    expected = (1.0 / x.double()).float()
    assert torch.equal(apply(arithmetic.reciprocal, x), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("largest", [t.max for t in VALUE_TYPES.values()])
@pytest.mark.parametrize("exponent", [-110, -30, -1, 0, 1, 15, 100, 127])
def test_quotient_has_ieee_rounding(largest, exponent):
    """Normal quotients are rounded correctly; others are below the smallest scale."""
    x = every_mantissa(exponent)
    expected = (x.double() / largest).float()

    def quotient(a):
        return arithmetic.quotient(a, largest)

    assert torch.equal(apply(quotient, x), expected)
