"""The float32 scale over the e4m3 scales of NVFP4: of the tensor, of each matrix, or of each row.

It has two conventions that must not be mixed up. The *encode* scale S maps magnitudes up to amax to
the range of values and scales together, ``S = 2688 / amax``. The *decode* scale is 1 / S, with
which GEMMs multiply their result.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from cute_quant.contract.dtypes import MAX_UPPER_SCALE, UPPER_MAX, describe

ENCODE, DECODE, AMAX = KINDS = ("encode_scale", "decode_scale", "amax")
"""Arguments that an upper scale is given as."""


class UpperScale(NamedTuple):
    """An upper scale as a call gives it.

    Attributes:
        kind: one of ``KINDS``.
        tensor: float32, one number, or one for each matrix of a batch.
    """

    kind: str
    tensor: torch.Tensor


class Factors(NamedTuple):
    """Both forms of an upper scale, float32; NaN where it is out of range."""

    encode: torch.Tensor
    decode: torch.Tensor


def make_upper_scale(**given: torch.Tensor | None) -> UpperScale | None:
    """Return the upper scale that a call gives, None if it gives none.

    Args:
        **given: arguments of the call by the names in ``KINDS``.

    Raises:
        TypeError: it is no tensor.
        ValueError: the call gives more than one.
    """
    scales = [UpperScale(name, t) for name, t in given.items() if t is not None]
    if not scales:
        return None
    if len(scales) > 1:
        names = " and ".join(scale.kind for scale in scales)
        raise ValueError(f"{names}: expected one of {', '.join(KINDS)}, got {len(scales)}")
    (scale,) = scales
    if not isinstance(scale.tensor, torch.Tensor):
        raise TypeError(
            f"{scale.kind}: expected a float32 tensor on the device of the input, which is read "
            f"there, got {describe(scale.tensor)}"
        )
    return scale


def factors(scale: UpperScale) -> Factors:
    """Return both forms of an upper scale, in its tensor's shape.

    They are NaN unless both lie from 2^-117 to 2^117: then no step of the computation of scales and
    values leaves the normal numbers of float32.
    """
    given = scale.tensor
    if scale.kind == AMAX:
        return factors_of_amax(given)
    valid = (given >= 1 / MAX_UPPER_SCALE) & (given <= MAX_UPPER_SCALE)
    given = given.where(valid, torch.nan)
    reciprocal = 1.0 / given
    return Factors(given, reciprocal) if scale.kind == ENCODE else Factors(reciprocal, given)


def factors_of_amax(amax: torch.Tensor) -> Factors:
    """Return both forms of the upper scale for a largest magnitude, float32.

    The encode scale is 2688 / amax, but at most 2^117, and 1 where amax is 0.
    """
    # As tensors: torch multiplies a CUDA tensor with the reciprocal of a number.
    largest = amax.new_full((), UPPER_MAX)
    encode = largest / amax.clamp(min=UPPER_MAX / MAX_UPPER_SCALE)
    valid = (amax >= 0) & amax.isfinite()
    encode = encode.where(amax != 0, 1.0).where(valid, torch.nan)
    return Factors(encode, 1.0 / encode)


def decode_scale(scale: UpperScale) -> torch.Tensor:
    """Return what values and their groups' scales are multiplied with, in the tensor's shape.

    A decode scale is taken as it is, 0 for rows that do not exist.
    """
    return scale.tensor if scale.kind == DECODE else factors(scale).decode
