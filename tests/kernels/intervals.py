"""Interval arithmetic: where a result may lie that is known up to a relative error.

Kernels compute in float32 what has a float64 result; a rounding in between turns a last bit into
one of bfloat16, which the two ends of an interval follow.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Interval(NamedTuple):
    """Two float64 tensors; where one is NaN both are."""

    low: torch.Tensor
    high: torch.Tensor

    @classmethod
    def of(cls, values: torch.Tensor) -> Interval:
        return cls(values.double(), values.double())

    def times(self, other: Interval) -> Interval:
        products = [a * b for a in self for b in other]
        return Interval(
            torch.stack(products).amin(0),
            torch.stack(products).amax(0),
        )

    def spread(self, relative: float) -> Interval:
        """By a share of the magnitude, to both sides; zeros keep their sign."""
        share = torch.tensor(relative, dtype=torch.float64)
        low, high = self
        return Interval(
            low * (1 - torch.copysign(share, low)), high * (1 + torch.copysign(share, high))
        )

    def rounded(self, dtype: torch.dtype) -> Interval:
        return Interval(*(end.to(dtype).double() for end in self))
