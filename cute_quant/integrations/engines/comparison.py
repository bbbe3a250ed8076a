"""Compare results of a replacement with those of the engine's own function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def sample(
    shape: Sequence[int],
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    *,
    zeros: bool = True,
) -> torch.Tensor:
    """Return finite numbers of magnitudes from 2^-12 to 2^12, the same ones in every process.

    Args:
        shape: of the result; the last dimension is at least 128.
        device: of the result.
        dtype: of the result.
        zeros: whether the first row has 128 zeros.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator)
    x *= torch.exp2(torch.randint(-12, 10, (*shape[:-1], 1), generator=generator).float())
    if zeros:
        x.view(-1)[:128] = 0.0
    return x.to(dtype).to(device)


def difference(ours: Any, theirs: Any) -> str | None:
    """Return how results differ in dtype, shape, strides or a bit, None if they do not.

    Args:
        ours: a tensor, or a sequence of tensors. ``NotImplemented`` differs from everything.
        theirs: the same.
    """
    if ours is NotImplemented:
        return "the arguments were not taken"
    if isinstance(ours, torch.Tensor):
        ours, theirs = [ours], [theirs]
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        for name, ours_is, theirs_is in (
            ("dtype", a.dtype, b.dtype),
            ("shape", tuple(a.shape), tuple(b.shape)),
            ("strides", _strides(a), _strides(b)),
        ):
            if ours_is != theirs_is:
                return f"result {number} has {name} {ours_is}, the engine's {theirs_is}"
        unequal = (_bytes(a) != _bytes(b)).sum().item()
        if unequal:
            return f"{unequal} of {a.numel() * a.element_size()} bytes of result {number}"
    return None


def _strides(t: torch.Tensor) -> tuple[int, ...]:
    """Return the strides of the dimensions that have more than one element."""
    return tuple(stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1)


def _bytes(t: torch.Tensor) -> torch.Tensor:
    # A column by itself passes for contiguous, and cannot be viewed.
    return t.contiguous().flatten().view(torch.uint8)
