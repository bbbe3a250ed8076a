"""Groups along rows: formats, experts, memory full of poison, and what every byte has to be."""

from __future__ import annotations

import math

import torch

from cute_quant import (
    DEEP_GEMM,
    DEEP_GEMM_32,
    DEEP_GEMM_SM90,
    GROUPWISE_FP8,
    MXFP8,
    Format,
    PrefixSum,
)
from tests import oracle
from tests.helpers import assert_same_bits, poisoned, poisoned_results, storage_bits
from tests.weights import DTYPES, special_weights, views

__all__ = ["DTYPES", "special_weights", "views"]

E5M2 = torch.float8_e5m2
FLOAT32_32 = DEEP_GEMM_SM90.replace(group_size=32)
POWERS = DEEP_GEMM_SM90.replace(round_scale=True, min_scale="deepgemm")
FORMATS = (
    DEEP_GEMM_SM90,
    DEEP_GEMM_32,
    MXFP8,
    POWERS,
    FLOAT32_32.replace(values=E5M2, numerics="deepgemm"),
    DEEP_GEMM_32.replace(values=E5M2, min_scale="ocp"),
    MXFP8.replace(values=E5M2, min_scale="ocp"),
    DEEP_GEMM_SM90.replace(values=torch.int8),
    POWERS.replace(group_size=32),
)
ROW_FORMATS = (
    DEEP_GEMM,
    DEEP_GEMM_SM90,
    DEEP_GEMM_32,
    MXFP8,
    GROUPWISE_FP8.replace(values=E5M2, round_scale=True),
    DEEP_GEMM.replace(scale_layout="row_major_packed"),
    MXFP8.replace(scale_layout="8x4", min_scale="ocp"),
    GROUPWISE_FP8.replace(values=torch.int8, group_size=32),
)
"""Formats of the rows that are quantized from the same read."""


def poisoned_columns(
    fmt: Format, shape: tuple[int, ...], transposed: bool, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return memory for q and sf of the columns of (..., mn, k)."""
    *leading, mn, k = shape
    q_shape = (*leading, k, mn) if transposed else shape
    q = poisoned(math.prod(q_shape), device).view(fmt.values).view(q_shape)
    words = -(-mn // fmt.group_size)
    sf_shape = (*leading, words if fmt.sf_dtype is torch.float32 else -(-words // 4), k)
    if fmt.blocked:
        sf_shape = fmt.scale_shape(tuple(leading), k, mn)
    nbytes = math.prod(sf_shape) * fmt.sf_dtype.itemsize
    return q, poisoned(nbytes, device).view(fmt.sf_dtype).view(sf_shape)


def assert_columns(
    given: tuple[torch.Tensor, torch.Tensor],
    x: torch.Tensor,
    fmt: Format,
    rows: PrefixSum | None,
    transposed: bool,
) -> None:
    """Check every byte of memory that `poisoned_columns` made and a call wrote."""
    expected = poisoned_columns(fmt, tuple(x.shape), transposed)
    oracle.quantize_columns_into(x, *expected, fmt, rows, transposed)
    assert_same_bits(given[0].cpu(), expected[0])
    assert torch.equal(storage_bits(given[1]), storage_bits(expected[1]))


def assert_rows(
    given: tuple[torch.Tensor, ...],
    x: torch.Tensor,
    fmt: Format,
    rows: PrefixSum | None,
    last_padding: bool = True,
) -> None:
    """Check every byte of memory for the results of rows that a call wrote."""
    *leading, mn, k = x.shape
    expected = poisoned_results(
        fmt, mn, k, "cpu", last_padding=last_padding, batch_shape=tuple(leading)
    )
    oracle.quantize_into(x, *expected, fmt, rows)
    assert_same_bits(given[0].cpu(), expected[0])
    assert torch.equal(storage_bits(given[1]), storage_bits(expected[1]))


def experts(mn: int, fmt: Format, kind: int, seed: int = 0) -> PrefixSum | None:
    """Return groups of rows of one of six kinds, None for all rows."""
    unit = fmt.group_size * fmt.groups_per_unit
    generator = torch.Generator().manual_seed(seed)
    if kind == 0:
        return None
    ends, end = [], 0
    for i in range(5 if kind < 5 else 40):
        # Experts without rows, with a whole number of groups, and with any.
        size = (0, unit, int(torch.randint(1, 3 * unit // 2, (1,), generator=generator)))[
            (i + kind) % 3
        ]
        start = -(-end // unit) * unit
        end = start + size
        ends.append(end)
    if kind == 2:  # ends that no caller should give
        ends = [ends[2], -5, ends[1], 2**31 - 1, ends[0]]
    if kind == 3:
        ends = [0, 0, min(ends[3], mn)]
    if kind == 4:
        ends = [-(2**31), mn]
    alignment = unit * (2 if kind == 3 else 1)
    return PrefixSum(torch.tensor(ends, dtype=torch.int32), alignment)
