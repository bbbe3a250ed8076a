"""Groups along rows: formats, experts, memory full of poison, and what every byte has to be."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

import cute_quant
from cute_quant import (
    DEEP_GEMM,
    DEEP_GEMM_32,
    DEEP_GEMM_SM90,
    GROUPWISE_FP8,
    MXFP8,
    Format,
    PrefixSum,
)
from cute_quant.contract.prologues import GatedPrologue, make_silu_mul, make_silu_mul_backward
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


STATES = [torch.tensor(numbers) for numbers in ([0, 0], [-1, 2**47 - 1], [2**40 + 9, 2**33 + 7])]
"""Seeds and offsets of random numbers."""


class GatedCase(NamedTuple):
    """Inputs of a gated activation, and what every device computes of them, to the bit.

    Gates are so large that their sigmoid is 1 in float32, and in float64 too. What is left are
    products of two numbers, which are rounded once.

    Attributes:
        gate_up: (..., mn, 2 k).
        grad: (..., mn, k) for gradients, None for products.
        values: the products, or the gradients of gates and ups, as they are quantized.
        options: of the operation.
    """

    gate_up: torch.Tensor
    grad: torch.Tensor | None
    values: torch.Tensor
    options: dict[str, Any]

    @staticmethod
    def make(
        shape: tuple[int, ...],
        dtype: torch.dtype,
        seed: int,
        *,
        backward: bool = False,
        interleaved: bool = False,
        rounding: str = "fused",
        weighted: bool = False,
    ) -> GatedCase:
        """Return a case of products of this shape, with all values that need care."""
        generator = torch.Generator().manual_seed(seed)
        gate = (torch.randint(48, 97, shape, generator=generator)).to(dtype)
        up = special_weights(shape, dtype, 32, seed)

        def joined(gates: torch.Tensor, ups: torch.Tensor) -> torch.Tensor:
            if interleaved:
                return torch.stack((gates, ups), -1).flatten(-2)
            return torch.cat((gates, ups), -1)

        options: dict[str, Any] = {"interleaved": interleaved}
        if backward:
            grad = special_weights(shape, dtype, 32, seed + 1)
            of_gates = (grad.double() * up.double()).float()
            of_ups = (grad.double() * gate.double()).float()
            return GatedCase(joined(gate, up), grad, joined(of_gates, of_ups), options)
        values = (gate.double() * up.double()).float()
        values = values if rounding == "fused" else values.to(dtype)
        if weighted:
            # Powers of two, which round nothing but what is subnormal.
            weight = 2.0 ** torch.randint(-2, 3, shape[:-1], generator=generator)
            values = (values.float() * weight.unsqueeze(-1)).to(values.dtype)
            options["weight"] = weight
        return GatedCase(joined(gate, up), None, values, options | {"rounding": rounding})

    @property
    def prologue(self) -> GatedPrologue:
        """Return the prologue of the call."""
        numbers = {"clamp": None, "alpha": 1.0, "beta": 0.0}
        if self.grad is not None:
            return make_silu_mul_backward(self.grad, **numbers, **self.options)
        return make_silu_mul(**{"weight": None} | numbers | self.options)

    def call(self, device: str, *formats: Format, **options: Any) -> tuple[Any, ...]:
        """Call the operation on a device."""
        own = {name: t.to(device) if name == "weight" else t for name, t in self.options.items()}
        gate_up = self.gate_up.to(device)
        if self.grad is None:
            return cute_quant.silu_mul_quantize_both(gate_up, *formats, **own, **options)
        grad = self.grad.to(device)
        return cute_quant.silu_mul_backward_quantize_both(grad, gate_up, *formats, **own, **options)


GATED = {
    "products": {},
    "interleaved products": {"interleaved": True},
    "rounded products": {"rounding": "unfused", "weighted": True},
    "gradients": {"backward": True},
    "interleaved gradients": {"backward": True, "interleaved": True},
}
"""Options of cases, by name."""


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
    rng_state: torch.Tensor | None = None,
) -> None:
    """Check every byte of memory that `poisoned_columns` made and a call wrote."""
    expected = poisoned_columns(fmt, tuple(x.shape), transposed)
    oracle.quantize_columns_into(x, *expected, fmt, rows, transposed, rng_state)
    assert_same_bits(given[0].cpu(), expected[0])
    assert torch.equal(storage_bits(given[1]), storage_bits(expected[1]))


def assert_rows(
    given: tuple[torch.Tensor, ...],
    x: torch.Tensor,
    fmt: Format,
    rows: PrefixSum | None,
    last_padding: bool = True,
    rng_state: torch.Tensor | None = None,
) -> None:
    """Check every byte of memory for the results of rows that a call wrote."""
    *leading, mn, k = x.shape
    expected = poisoned_results(
        fmt, mn, k, "cpu", last_padding=last_padding, batch_shape=tuple(leading)
    )
    oracle.quantize_into(x, *expected, fmt, rows, rng_state=rng_state)
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
