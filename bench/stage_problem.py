"""Inputs, outputs and expected results of the operations that end with the quantizer.

What they compute before they quantize is exact in the reference and not in any kernel. So a result
is right where it is that of values within some relative error of the exact ones: each scale between
those of the smallest and the largest amax that its group may have, each value between what the two
ends become under the scale that is stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from bench.problem import POISON, UE8M0, sampled_rows
from bench.run import Check
from bench.shapes import QUANTIZE_ALONE, RMS_NORM_QUANTIZE, SILU_MUL_QUANTIZE, Operation
from cute_quant.contract.dtypes import E4M3_MAX
from cute_quant.contract.prologues import FUSED, make_rms_norm, make_silu_mul
from cute_quant.contract.reference.prologues import rms_norm, silu_mul
from cute_quant.contract.reference.scales import group_scales
from cute_quant.contract.reference.values import group_values
from cute_quant.lab import timing

EPS = 1e-6
MIN_EXPONENT = int(UE8M0.floor)

EXACT = 0.0
FLOAT32_ERROR = 2.0**-18
"""Relative error of a few float32 operations, among them a sum of thousands and a sigmoid of an
argument below 8."""
BFLOAT16_ERROR = 2.0**-7
"""Relative error of up to three of these operations that round to bfloat16."""


class Expected(NamedTuple):
    """The reference's of some rows, on the CPU.

    Attributes:
        values: (rows, k), float32, what is quantized.
        residual: (rows, k), bfloat16, or None.
    """

    values: torch.Tensor
    residual: torch.Tensor | None


@dataclass(frozen=True)
class StageBuffer:
    """Memory for one call of any of the operations.

    Attributes:
        x, residual: (mn, k), bfloat16, normally distributed.
        gate_up: (mn, 2 k), the same.
        weight: (k,), bfloat16, near 1.
        q: (mn, k), e4m3.
        residual_out: (mn, k), bfloat16.
        sf: packed scales, MN-major.
    """

    x: torch.Tensor
    residual: torch.Tensor
    gate_up: torch.Tensor
    weight: torch.Tensor
    q: torch.Tensor
    residual_out: torch.Tensor
    sf: torch.Tensor

    @classmethod
    def random(cls, mn: int, k: int, device: str = "cuda") -> StageBuffer:
        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, dtype=torch.bfloat16, device=device)

        return cls(
            normal(mn, k),
            normal(mn, k),
            normal(mn, 2 * k),
            normal(k).mul_(0.1).add_(1.0),
            torch.empty(mn, k, dtype=UE8M0.values, device=device),
            torch.empty(mn, k, dtype=torch.bfloat16, device=device),
            UE8M0.empty_scales((), mn, k, torch.device(device)),
        )

    def poison(self) -> None:
        """Fill the outputs with bytes that are not the result."""
        for t in (self.q, self.residual_out, self.sf):
            storage = torch.empty(0, dtype=torch.uint8, device=t.device)
            storage.set_(t.untyped_storage()).fill_(POISON)


class StageProblem:
    """Rotating buffers of one shape."""

    def __init__(self, mn: int, k: int, device: str = "cuda"):
        self.mn, self.k = mn, k
        # As many as the operation that moves the least needs.
        count = timing.buffer_count(QUANTIZE_ALONE.bytes_moved(mn, k))
        self.buffers = [StageBuffer.random(mn, k, device) for _ in range(count)]
        self.rows = sampled_rows(mn).to(device)
        self._expected: dict[tuple[str, int], Expected] = {}

    def expected(self, operation: Operation, index: int) -> Expected:
        """Return the expected results of ``rows`` of a buffer."""
        key = operation.name, index
        if key not in self._expected:
            self._expected[key] = expected(operation, self.buffers[index], self.rows)
        return self._expected[key]

    def check(self, operation: Operation, index: int, error: float) -> Check:
        """Compare the results in a buffer with the reference, in ``rows``.

        Args:
            operation: the operation whose results the buffer holds.
            index: index of the buffer.
            error: relative error that values may have before they are quantized.
        """
        buffer, wanted = self.buffers[index], self.expected(operation, index)
        q = buffer.q.view(torch.uint8)[self.rows].cpu().view(UE8M0.values)
        check = check_quantized(q, buffer.sf[self.rows].cpu(), wanted.values, error)
        if not check.difference and wanted.residual is not None:
            wrong = int((buffer.residual_out[self.rows].cpu() != wanted.residual).sum())
            if wrong:
                return Check(f"{wrong} elements of the residual in {len(q)} rows", check.differing)
        return check


def expected(operation: Operation, buffer: StageBuffer, rows: torch.Tensor) -> Expected:
    """Compute the expected results of an operation on some rows of a buffer."""
    x = buffer.x[rows].cpu()
    if operation is QUANTIZE_ALONE:
        return Expected(x.float(), None)
    if operation is SILU_MUL_QUANTIZE:
        activation = make_silu_mul(
            interleaved=False, clamp=None, alpha=1.0, beta=0.0, rounding=FUSED, weight=None
        )
        return Expected(silu_mul(buffer.gate_up[rows].cpu()[None], activation)[0], None)
    if operation is RMS_NORM_QUANTIZE:
        residual, total = buffer.residual[rows].cpu()[None], torch.empty_like(x)[None]
        norm = make_rms_norm(
            buffer.weight.cpu(),
            eps=EPS,
            weight_offset=0.0,
            rounding=FUSED,
            residual=residual,
            residual_out=total,
        )
        return Expected(rms_norm(x[None], norm)[0], total[0])
    raise ValueError(f"operation: expected one of bench.shapes.OPERATIONS, got {operation}")


def check_quantized(q: torch.Tensor, sf: torch.Tensor, values: torch.Tensor, error: float) -> Check:
    """Compare quantized rows with the values that they are of.

    Args:
        q: (rows, k), e4m3.
        sf: (rows, words), packed.
        values: (rows, k), float32, finite.
        error: relative error that the values may have before they are quantized.
    """
    exact = values.double()
    low, high = ((exact * factor).float() for factor in (1 - error, 1 + error))
    groups = UE8M0.groups(values.shape[1])
    shifts = torch.arange(0, 32, 8, dtype=torch.int32)
    stored = (sf.unsqueeze(2) >> shifts & 0xFF).flatten(1)
    exponents, padding = stored[:, :groups], stored[:, groups:]
    least, wanted, most = (group_scales(t, UE8M0) for t in (low, values, high))
    wrong_scales = int(((exponents < least) | (exponents > most)).sum()) + int((padding != 0).sum())
    multipliers = torch.exp2(127.0 - exponents.float()).repeat_interleave(UE8M0.group_size, 1)
    ends = [
        (t * multipliers).clamp(-E4M3_MAX, E4M3_MAX).to(UE8M0.values).float() for t in (low, high)
    ]
    actual = q.float()
    inside = (torch.minimum(*ends) <= actual) & (actual <= torch.maximum(*ends))
    wrong_values = int((~inside).sum())
    wanted_q = group_values(values, wanted, UE8M0)
    differing = int((q.view(torch.uint8) != wanted_q.view(torch.uint8)).sum())
    differing += int((exponents != wanted).sum())
    difference = ""
    if wrong_scales or wrong_values:
        difference = f"{wrong_values} values and {wrong_scales} scales in {len(q)} rows"
    return Check(difference, differing / (q.numel() + exponents.numel()))
