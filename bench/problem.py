"""Inputs, outputs and expected results of one shape."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from bench.shapes import GROUP_SIZE, bytes_moved
from cute_quant import DEEP_GEMM, DEEP_GEMM_SM90, Format
from cute_quant.contract.calls import Call
from cute_quant.contract.reference.quantize import quantize_into
from cute_quant.lab import timing

UE8M0 = DEEP_GEMM.replace(group_size=GROUP_SIZE)
FLOAT32 = DEEP_GEMM_SM90.replace(group_size=GROUP_SIZE)

POISON = 0xA5
EDGE_ROWS = 4
MIDDLE_ROWS = 8


@dataclass(frozen=True)
class Buffer:
    """Memory for one call.

    Attributes:
        x: (mn, k), bfloat16, normally distributed.
        q: (mn, k), e4m3.
        scales: for each format, MN-major.
    """

    x: torch.Tensor
    q: torch.Tensor
    scales: dict[Format, torch.Tensor]

    def input(self, dtype: torch.dtype) -> torch.Tensor:
        """Return x, or its bits viewed as float16: as many bytes, finite, other values."""
        return self.x.view(dtype)

    def poison(self) -> None:
        """Fill the outputs with bytes that are not the result."""
        for t in (self.q, *self.scales.values()):
            storage = torch.empty(0, dtype=torch.uint8, device=t.device)
            storage.set_(t.untyped_storage()).fill_(POISON)


def sampled_rows(mn: int) -> torch.Tensor:
    """Return the indices of the first of `mn` rows, of the last, and of some between them."""
    middle = torch.linspace(0, mn - 1, MIDDLE_ROWS + 2).round().long()
    edges = torch.arange(EDGE_ROWS)
    rows = torch.cat([edges, middle, mn - 1 - edges]).clamp(0, mn - 1)
    indices: torch.Tensor = rows.unique()
    return indices


class Problem:
    """Rotating buffers of one shape on the current GPU."""

    def __init__(self, mn: int, k: int):
        self.mn, self.k = mn, k
        self.bytes = bytes_moved(mn, k, UE8M0)
        self.buffers = [
            Buffer(
                torch.randn(mn, k, dtype=torch.bfloat16, device="cuda"),
                torch.empty(mn, k, dtype=UE8M0.values, device="cuda"),
                {
                    fmt: fmt.empty_scales((), mn, k, torch.device("cuda"))
                    for fmt in (UE8M0, FLOAT32)
                },
            )
            for _ in range(timing.buffer_count(self.bytes))
        ]
        self._expected: dict[
            tuple[int, torch.dtype, Format], tuple[torch.Tensor, torch.Tensor]
        ] = {}

    @functools.cached_property
    def rows(self) -> torch.Tensor:
        """Return the rows that checks look at."""
        return sampled_rows(self.mn).cuda()

    def expected(
        self, index: int, dtype: torch.dtype, fmt: Format
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the reference's values and scales for ``rows`` of a buffer, on the CPU."""
        key = (index, dtype, fmt)
        if key in self._expected:
            return self._expected[key]
        x = self.buffers[index].input(dtype)[self.rows].cpu()
        q = torch.empty(x.shape, dtype=fmt.values)
        mn, k = x.shape
        sf = fmt.empty_scales((), mn, k, x.device)
        quantize_into(Call(x, fmt), q, sf)
        self._expected[key] = q, sf
        return q, sf

    def difference(
        self, index: int, dtype: torch.dtype, fmt: Format, q: torch.Tensor, sf: torch.Tensor
    ) -> str:
        """Describe how results differ from the reference in ``rows``; empty if they are equal."""
        expected_q, expected_sf = self.expected(index, dtype, fmt)
        found = []
        for name, t, expected in (("values", q, expected_q), ("scales", sf, expected_sf)):
            integer = torch.uint8 if t is q else torch.int32
            actual = t.view(integer)[self.rows].cpu()
            wrong = int((actual != expected.view(integer)).sum())
            if wrong:
                found.append(f"{wrong} of {actual.numel()} {name} in {len(actual)} rows")
        return ", ".join(found)
