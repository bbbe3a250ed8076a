"""Random calls on columns, of x and of gated activations, for the CPU, a GPU and the emulator."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from cute_quant import Format
from tests.columns import (
    DTYPES,
    FORMATS,
    GATED,
    ROW_FORMATS,
    STATES,
    GatedCase,
    experts,
    special_weights,
)
from tests.helpers import ARCHITECTURES
from tests.kernels.columns import check
from tests.kernels.emulated_gpu import Gpu, Kernels

CASES = 2
ELEMENTS = 4000
"""Most of a case, results in both directions counted once."""


@dataclass(frozen=True)
class Shape:
    """Shape, experts and random numbers of a case."""

    leading: tuple[int, ...]
    mn: int
    k: int
    experts: int
    seed: int


@dataclass(frozen=True)
class ColumnSession:
    """One kernel on an emulated GPU.

    Attributes:
        gated: of ``GATED``, None for x as it is.
        row_fmt: of rows, None without.
        stochastic: whether values are rounded by random numbers.
        grouped: whether rows are experts.
    """

    gated: str | None
    dtype: torch.dtype
    fmt: Format
    row_fmt: Format | None
    transposed: bool
    stochastic: bool
    grouped: bool
    arch: str

    def __str__(self) -> str:
        words = [self.gated or "x", str(self.dtype), self.fmt.text]
        words += [] if self.row_fmt is None else [self.row_fmt.text]
        flags = ("transposed", "stochastic", "grouped")
        words += [name for name in flags if getattr(self, name)]
        return "-".join([*words, self.arch]).replace(" ", "_")

    def cases(self, seed: int) -> Iterator[Shape]:
        """Draw the cases of the session."""
        draw = random.Random(f"{self} {seed}")
        for _ in range(CASES):
            k = draw.choice((1, 24, 72, 128, 136, draw.randint(1, 200)))
            most = max(ELEMENTS // k, 1)
            leading = () if self.grouped or draw.random() < 0.6 else (2,)
            mn = min(draw.choice((1, 16, 129, draw.randint(1, 300))), most)
            kind = draw.randint(1, 5) if self.grouped else 0
            yield Shape(leading, mn, k, kind, draw.randint(0, 99))

    def run(self, kernels: Kernels, case: Shape) -> None:
        """Run a case and compare every byte with the oracle."""
        shape, gated = (*case.leading, case.mn, case.k), None
        if self.gated is None:
            x = special_weights(shape, self.dtype, self.fmt.group_size, case.seed)
        else:
            gated = GatedCase.make(shape, self.dtype, case.seed, **GATED[self.gated])
            x = gated.values
        rows = experts(case.mn, self.fmt, case.experts, case.seed)
        state = STATES[case.seed % len(STATES)] if self.stochastic else None
        gpu, last = Gpu(kernels, self.arch), case.seed % 2 == 0
        try:
            check(gpu, x, self.fmt, rows, self.transposed, self.row_fmt, last, gated, state)
        except Exception as error:
            raise AssertionError(f"{error}\n{self}\n{case}") from error


def sessions(count: int, seed: int) -> list[ColumnSession]:
    """Draw sessions."""
    draw, drawn = random.Random(f"columns {seed}"), []
    for i in range(count):
        gated = draw.choice((None, *GATED))
        both = gated is not None or draw.random() < 0.5
        fmt, row_fmt = draw.choice(FORMATS), draw.choice(ROW_FORMATS) if both else None
        nearest = any(f is not None and f.numerics != "ieee" for f in (fmt, row_fmt))
        drawn.append(
            ColumnSession(
                gated,
                draw.choice(DTYPES),
                fmt,
                row_fmt,
                draw.random() < 0.5,
                not nearest and draw.random() < 0.4,
                draw.random() < 0.4,
                ARCHITECTURES[i % len(ARCHITECTURES)],
            )
        )
    return drawn
