"""Places that rows are scattered to, for tests: random, with all that names no row among them."""

from __future__ import annotations

import torch

from cute_quant.contract.formats import Format
from cute_quant.contract.rows import KINDS, Indexed, Masked, Rows
from tests import oracle
from tests.helpers import POISON

DOMAINS = ("dense", "masked", "prefix_sum", "indexed")


def row_domain(kind: str, seed: int) -> tuple[Rows | None, int, int]:
    """Return a row domain, the matrices of its result, and rows of each."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int, low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, (count,), generator=generator, dtype=torch.int32)

    match kind:
        case "masked":
            counts = torch.cat([draw(3, 0, 12), torch.tensor([-(2**31), 11, 0], dtype=torch.int32)])
            return Masked(counts[torch.randperm(6, generator=generator)]), 6, 11
        case "prefix_sum" | "prefix_sum_with_gaps":
            alignment = (4, 16, 7)[seed % 3]
            ends, start = [], 0
            for count in draw(5, 0, 20).tolist():
                ends.append(start + count)
                start = -(-ends[-1] // alignment) * alignment
            ends = torch.tensor(ends, dtype=torch.int32)
            return KINDS[kind](ends, alignment), 1, start + seed % 5
        case "indexed":
            return Indexed(draw(70, -1, 3)), 1, 70
    return None, 1, 37 + seed % 3


def places(
    rows: Rows | None,
    matrices: int,
    mn: int,
    seed: int,
    width: int = 4,
    unnamed: int = 0,
) -> torch.Tensor:
    """Return places, (T, width), that name each row that exists once, but for some of them.

    The others are -1, out of range, or rows that do not exist.
    """
    generator = torch.Generator().manual_seed(seed)
    alive = torch.from_numpy(oracle.live_rows(rows, None, matrices, mn, matrices * mn).flatten())
    names = alive[alive >= 0]
    dead = (alive < 0).nonzero().flatten()
    names = names[torch.randperm(len(names), generator=generator)][unnamed:]
    others = torch.cat(
        [torch.tensor([-1, -(2**31), 2**31 - 1, matrices * mn, -1]), dead, torch.full((5,), -1)]
    )
    count = -(-(len(names) + len(others)) // width) * width
    padded = torch.full((count,), -1)
    padded[: len(names) + len(others)] = torch.cat([names, others])
    return padded[torch.randperm(count, generator=generator)].view(-1, width).int()


def in_records(fmt: Format, rows: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return poisoned values and row-major scales whose rows lie beside each other."""
    scale_bytes = fmt.columns(k) * fmt.sf_dtype.itemsize
    start = -(-k // 16) * 16
    record = -(-(start + scale_bytes + 1) // 32) * 32
    storage = torch.full((rows, record), POISON, dtype=torch.uint8)
    q = storage[:, :k].view(fmt.values)
    return q, storage[:, start : start + scale_bytes].view(fmt.sf_dtype)
