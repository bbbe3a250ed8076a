"""Random calls of ``dequantize``: any bits of values and scales, of any strides."""

from __future__ import annotations

import math
import random
from typing import Any

import torch

from cute_quant.contract.format_choices import (
    BLOCKED,
    BLOCKED_8,
    MN_MAJOR,
    MN_MAJOR_PACKED,
    ROW_MAJOR,
    ROW_MAJOR_PACKED,
)
from cute_quant.contract.rows import DENSE
from cute_quant.contract.upper_scales import DECODE, UpperScale
from cute_quant.contract.upper_scales import KINDS as UPPER_KINDS
from tests import oracle
from tests.fuzz.case import Kernel, Place, check_same_bytes, same_nan, values
from tests.fuzz.draw import BATCH_SHAPES, SMALL, Deck, Draw, powers_of_two
from tests.helpers import INPUT_DTYPES, all_formats, storage_bits

BYTE_LAYOUTS = (MN_MAJOR_PACKED, ROW_MAJOR, ROW_MAJOR_PACKED, BLOCKED, BLOCKED_8)
SCALES = (
    *((torch.float8_e8m0fnu, layout) for layout in BYTE_LAYOUTS),
    *((torch.float8_e4m3fn, layout) for layout in BYTE_LAYOUTS),
    (torch.float32, MN_MAJOR),
)
"""Dtypes and layouts of scales that `dequantize` has code of its own for."""


def draw_kernels(count: int, seed: int) -> list[Kernel]:
    """Draw kernels whose `dtype` is that of the result, which is contiguous."""
    generator = random.Random(f"{seed} dequantize")
    formats = [
        fmt
        for fmt in all_formats()
        if (fmt.scale_dtype, fmt.scale_layout) in SCALES and not fmt.round_scale
    ]
    values = formats, INPUT_DTYPES, powers_of_two(1, 16), powers_of_two(1, 8), (False, True)
    decks = [Deck(v, generator) for v in values]
    uppers = Deck(UPPER_KINDS, generator)
    kernels = []
    for _ in range(count):
        fmt, dtype, load_bytes, step, ragged = (deck.draw() for deck in decks)
        store_bytes = dtype.itemsize * (step if ragged else 16)
        upper = None
        if fmt.upper_scale:
            upper = DECODE if fmt.row_scale else uppers.draw()
        accesses = load_bytes, store_bytes, ragged
        kernels.append(Kernel(dtype, fmt, DENSE, False, True, *accesses, upper=upper))
    return kernels


def scale_strides(draw: Draw, shape: tuple[int, ...], blocked: bool) -> tuple[int, ...]:
    """Draw strides: the last two dimensions transposed, padded or expanded.

    One stride walks the leading ones. The bytes of blocks stay contiguous.
    """
    inner = 1 if blocked else 2
    order = list(range(len(shape) - inner, len(shape)))
    draw.generator.shuffle(order)
    strides, stride = ({len(shape) - 1: 1}, shape[-1]) if blocked else ({}, 1)
    for dimension in () if blocked else order:
        stride += draw.any_of([0, 0, 0, 1, 3, 16])
        strides[dimension] = 0 if draw.chance(0.1) else stride
        stride *= max(shape[dimension], 1)
    batch = 0 if draw.chance(0.1) else stride + draw.any_of([0, 0, 1, 5])
    outer = draw.batch_strides(shape[:-inner], batch)
    return (*outer, *(strides[dimension] for dimension in sorted(strides)))


class Dequantization:
    """A call of `dequantize`.

    Attributes:
        places: of "q" and "sf".
        arenas: their memory, which holds any bits.
    """

    def __init__(self, kernel: Kernel, seed: object, elements: int = SMALL):
        self.kernel = kernel
        self.seed = seed
        draw, fmt = Draw(kernel, seed), kernel.fmt
        tall = draw.chance(0.2)
        batch_shape = draw.any_of([(), *BATCH_SHAPES, (70,)])
        k = draw.columns(48 if tall else 1300)
        if kernel.ragged:
            step = max(kernel.store_bytes // kernel.dtype.itemsize, fmt.value_type.per_byte)
            k = step * (k // step | 1)
        rows = elements // (k * math.prod(batch_shape))
        mn = draw.between(1, max(1, min(rows, draw.any_of([1, 4, 130, 3000]))))
        if draw.chance(0.03):
            mn = 0
        shape = fmt.scale_shape(batch_shape, mn, k)
        strides = scale_strides(draw, shape, fmt.blocked)
        self.places: dict[str, Place] = {
            "q": draw.matrix(
                fmt.values, (*batch_shape, mn, fmt.value_columns(k)), kernel.load_bytes, True
            ),
            "sf": draw.place(fmt.sf_dtype, shape, strides, fmt.sf_dtype.itemsize),
        }
        if kernel.upper is not None:
            shape = (*batch_shape, mn) if fmt.row_scale else draw.any_of([(), (1,), batch_shape])
            self.places["upper"] = draw.vector(shape, torch.float32)
        generator = torch.Generator().manual_seed(draw.between(0, 2**31))
        self.arenas = {
            name: torch.randint(256, (place.nbytes,), generator=generator, dtype=torch.uint8)
            for name, place in self.places.items()
        }
        for name in self.places:
            if self.places[name].dtype is not torch.float32:
                continue
            # All bits are as likely, but most magnitudes should be those of scales.
            floats = self.arenas[name].view(torch.float32)
            likely = torch.rand(len(floats), generator=generator) < 0.8
            scales = values(len(floats), torch.float32, draw.between(0, 2**31), True)
            floats[likely] = scales[likely]

    def __str__(self) -> str:
        return f"{self.kernel}, {self.seed}: {self.places}"

    def views(self, arenas: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return q and sf in their arenas."""
        q, sf = (self.places[name].view(arenas[name]) for name in ("q", "sf"))
        return q, sf

    def upper(self, arenas: dict[str, torch.Tensor]) -> UpperScale | None:
        """Return the upper scale of the call."""
        if self.kernel.upper is None:
            return None
        return UpperScale(self.kernel.upper, self.places["upper"].view(arenas["upper"]))

    def check(self, after: dict[str, torch.Tensor], result: Any) -> None:
        """Compare every byte of the result with the oracle, and of the arenas with before."""
        kernel = self.kernel
        q, sf = self.views(self.arenas)
        expected = oracle.dequantize(q, sf, kernel.fmt, kernel.dtype, self.upper(self.arenas))
        assert result.shape == expected.shape and result.is_contiguous(), str(self)
        assert result.dtype == kernel.dtype, str(self)
        content = expected.contiguous().flatten().view(torch.uint8)
        pair = (same_nan(t, kernel.dtype) for t in (storage_bits(result), content))
        check_same_bytes("result", self, *pair)
        for name, arena in self.arenas.items():
            check_same_bytes(name, self, after[name].cpu(), arena)
