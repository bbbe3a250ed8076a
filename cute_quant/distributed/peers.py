"""Memory of a rank that the other ranks of its host write to, so that quantizing is sending."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from cute_quant import ops
from cute_quant.contract.checks import check_format
from cute_quant.contract.dtypes import align
from cute_quant.contract.formats import Format
from cute_quant.contract.rows import Masked, PrefixSum
from cute_quant.distributed.routing import Plan, ranks_in_experts

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ALIGNMENT = 512
"""Bytes that values and scales start at a multiple of, as in memory of torch."""


class PeerBuffers:
    """Rows that arrive at each rank of a group, in memory that all of them see (NVLink).

    All ranks make one together, of the same sizes, for many calls. A result lies in it until the
    next call: ranks wait for each other before they write, on the stream.

    Args:
        fmt: of the results, without ``row_scale``.
        shape: of the values on each rank: (M, k), or (experts of a rank, max_m, k).
        group: the ranks, by default all.
        device: by default the current CUDA device.

    Raises:
        TypeError, ValueError: an argument is wrong.
        RuntimeError: the ranks cannot see each other's memory.
    """

    def __init__(
        self,
        fmt: Format,
        shape: tuple[int, ...],
        group: ProcessGroup | None = None,
        device: torch.device | str | None = None,
    ):
        import torch.distributed._symmetric_memory as symmetric_memory

        check_format(fmt)
        nbytes = sum(self._sizes(fmt, shape))
        place = torch.device("cuda" if device is None else device)
        memory = symmetric_memory.empty(nbytes, dtype=torch.uint8, device=place)
        own_group = dist.distributed_c10d._get_default_group() if group is None else group
        handle = symmetric_memory.rendezvous(memory, own_group)
        memories = [
            handle.get_buffer(rank, (nbytes,), torch.uint8) for rank in range(handle.world_size)
        ]
        self._set(fmt, shape, memories, handle.rank, handle.barrier)
        self._handle = handle

    @classmethod
    def of_memory(
        cls,
        fmt: Format,
        shape: tuple[int, ...],
        memories: list[torch.Tensor],
        rank: int,
        barrier: Callable[[], None],
    ) -> PeerBuffers:
        """Return buffers in memory that is there: bytes of each rank, and what waits for all."""
        buffers = cls.__new__(cls)
        buffers._set(fmt, shape, memories, rank, barrier)
        return buffers

    @staticmethod
    def nbytes(fmt: Format, shape: tuple[int, ...]) -> int:
        """Return the bytes that each rank needs."""
        return sum(PeerBuffers._sizes(fmt, shape))

    @staticmethod
    def _sizes(fmt: Format, shape: tuple[int, ...]) -> tuple[int, int]:
        *batch_shape, mn, k = shape
        if fmt.row_scale:
            raise ValueError(f"fmt: expected a format without row_scale, got {fmt}")
        if len(shape) not in (2, 3):
            raise ValueError(f"shape: expected (M, k) or (experts, max_m, k), got {shape}")
        matrices = math.prod(batch_shape)
        values = matrices * mn * fmt.value_columns(k) * fmt.values.itemsize
        scales = matrices * fmt.scale_rows(mn) * fmt.columns(k) * fmt.sf_dtype.itemsize
        return align(values, ALIGNMENT), align(scales, ALIGNMENT)

    def _set(
        self,
        fmt: Format,
        shape: tuple[int, ...],
        memories: list[torch.Tensor],
        rank: int,
        barrier: Callable[[], None],
    ) -> None:
        self.fmt = fmt
        self.shape = tuple(shape)
        self.rank = rank
        self._barrier = barrier
        self.results = [self._views(memory) for memory in memories]

    def _views(self, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return values and scales in the memory of a rank."""
        fmt, (*batch_shape, mn, k) = self.fmt, self.shape
        start, _ = self._sizes(fmt, self.shape)
        q_shape = (*batch_shape, mn, fmt.value_columns(k))
        q = memory[: math.prod(q_shape) * fmt.values.itemsize].view(fmt.values).view(q_shape)
        sf = memory[start:].view(fmt.sf_dtype)
        shape = fmt.scale_shape(tuple(batch_shape), mn, k)
        strides = fmt.scale_strides(tuple(batch_shape), mn, k)
        return q, sf.as_strided(shape, strides)

    def dispatch(
        self, x: torch.Tensor, plan: Plan, fmt: Format, upper: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantize tokens into the rows of their experts on all ranks, and return what arrives."""
        expected = (*plan.batch_shape, plan.num_rows, x.shape[1])
        if expected != self.shape or fmt is not self.fmt:
            raise ValueError(
                f"buffers: expected those of {fmt} and shape {expected}, got {self.fmt} and "
                f"{self.shape}"
            )
        targets = rows_at_targets(plan)
        self._barrier()
        # This rank clears the rows of its own that do not exist; no other does.
        for rank, (places, out) in enumerate(zip(targets, self.results, strict=True)):
            rows: Masked | PrefixSum | None = plan.rows
            if rank != self.rank:
                # A place of another rank is a row that exists there.
                all_rows = plan.rows.data.new_full((plan.experts,), plan.num_rows)
                rows = Masked(all_rows) if plan.batch_shape else None
            ops.quantize(x, fmt, rows=rows, scatter=places, out=out, **upper)
        self._barrier()
        return self.results[self.rank]


def rows_at_targets(plan: Plan) -> list[torch.Tensor]:
    """Return the row of each token's experts on each rank, (T, topk), -1 for those of others.

    One collective tells each rank how many rows the others have for each expert.
    """
    ids, experts = plan.ids, plan.experts
    ranks, me = plan.records.shape[1], dist.get_rank(plan.group)
    count, rank_in_expert = ranks_in_experts(ids, experts * ranks)
    counts = count.new_empty(ranks * experts * ranks)
    dist.all_gather_into_tensor(counts, count.contiguous(), group=plan.group)
    counts = counts.view(ranks, experts * ranks)
    before, total = counts[:me].sum(0), counts.sum(0).view(ranks, experts)
    if isinstance(plan.rows, Masked):
        start = torch.arange(experts, device=ids.device).repeat(ranks) * plan.num_rows
    else:
        padded = align(total, plan.rows.alignment)
        start = (padded.cumsum(1) - padded).flatten()
    here = ids.clamp(min=0)
    rank_in_expert = rank_in_expert + before[here]
    row = start[here] + rank_in_expert
    fits = (rank_in_expert if isinstance(plan.rows, Masked) else row) < plan.num_rows
    row = row.where(fits & (ids >= 0), -1)
    target = here.div(experts, rounding_mode="floor")
    return [row.where(target == rank, -1).int() for rank in range(ranks)]
