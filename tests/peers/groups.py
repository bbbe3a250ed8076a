"""Groups on which the numerics of libraries differ, or may differ."""

import functools

import numpy as np
import torch

from tests.peers import formulas

TENSOR_AMAX = 24.0
UPPER_SCALES = [TENSOR_AMAX, 1.0, 3.1e-3, 7.7e4]
"""The amax of tensors."""
BF16_KINDS = ("normal", "wide", "underflowing", "ties", "every amax", "zeros", "any bits")
KINDS = (*BF16_KINDS, "float32", "boundaries")


@functools.cache
def groups(size: int, kind: str) -> np.ndarray:
    """Return finite float32 groups, all but the last two kinds of values that bf16 has."""
    rng = np.random.default_rng(size)
    match kind:
        case "normal":
            x = rng.standard_normal((4096, size))
        case "wide":
            x = rng.standard_normal((4096, size)) * 2.0 ** rng.integers(-40, 6, (4096, 1))
        case "underflowing":
            x = rng.standard_normal((4096, size)) * 2.0 ** rng.integers(-18, -6, (4096, 1))
        case "ties":
            x = rng.integers(-48, 49, (4096, size)) / 8
        case "every amax":
            amax = (np.arange(0x7F80, dtype=np.uint32) << 16).view(np.float32)
            x = amax[:, None].astype(np.float64) * rng.uniform(-1, 1, (len(amax), size))
            x[np.arange(len(amax)), rng.integers(size, size=len(amax))] = amax
        case "zeros":
            x = np.zeros((4, size))
            x[1], x[2, ::2], x[3, 3] = -0.0, -0.0, -(2.0**-133)
        case "any bits":
            x = (rng.integers(1 << 16, size=(8192, size), dtype=np.uint32) << 16).view(np.float32)
            x = np.where(np.isfinite(x), x, 1)
        case "float32":
            return rng.standard_normal((8192, size)).astype(np.float32)
        case "boundaries":
            amax = neighbours(boundaries_of_e4m3() if size == 16 else boundaries_of_powers())
            x = amax[:, None] * rng.uniform(-1, 1, (len(amax), size)).astype(np.float32)
            x[:, 0] = amax
            return x
    return torch.from_numpy(x).bfloat16().float().numpy()


def boundaries_of_e4m3() -> np.ndarray:
    """Return the amax of groups whose scale is halfway between two of e4m3."""
    middles = (formulas.E4M3[1:] + formulas.E4M3[:-1]) / 2
    return np.outer(UPPER_SCALES, middles * 6 / 2688).ravel()


def boundaries_of_powers() -> np.ndarray:
    """Return the amax of groups where some library goes from a power of two to the next."""
    return np.outer([1, 1.5, 1.75, 1.9375], 2.0 ** np.arange(-126, 100)).ravel()


def neighbours(a: np.ndarray) -> np.ndarray:
    """Return eight neighbours in float32 of each element."""
    bits = a.astype(np.float32).view(np.int32)
    return (bits[:, None] + np.arange(-4, 4, dtype=np.int32)).ravel().view(np.float32)
