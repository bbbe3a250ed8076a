"""Memory of each rank that the others of its host write to, so that quantizing is sending."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from cute_quant import ops
from cute_quant.contract.checks import check_format
from cute_quant.contract.formats import Format
from cute_quant.distributed.records import Record
from cute_quant.distributed.routing import Plan, check_sizes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class PeerBuffers:
    """Records that arrive at each rank of a group, in memory that all of them see (NVLink).

    All ranks make one together, of the same sizes, for many calls. The calls of one follow each
    other on one stream of each rank: ranks wait for each other before they write, and after.

    Attributes:
        sent: (max_tokens, bytes): for each rank the records there that this rank writes.

    Args:
        fmt: of what is sent, without ``row_scale``.
        k: columns of the values.
        max_tokens: most tokens of any rank, as :func:`route` is told.
        group: the ranks, by default all.
        device: by default the current CUDA device.

    Raises:
        TypeError, ValueError: an argument is wrong.
        RuntimeError: the ranks cannot see each other's memory.
    """

    def __init__(
        self,
        fmt: Format,
        k: int,
        max_tokens: int,
        group: ProcessGroup | None = None,
        device: torch.device | str | None = None,
    ):
        import torch.distributed._symmetric_memory as symmetric_memory

        shape = self._shape(fmt, k, max_tokens, group)
        place = torch.device("cuda" if device is None else device)
        own = symmetric_memory.empty(shape, dtype=torch.uint8, device=place)
        own_group = dist.distributed_c10d._get_default_group() if group is None else group
        handle = symmetric_memory.rendezvous(own, own_group)
        memories = [
            handle.get_buffer(rank, shape, torch.uint8) for rank in range(handle.world_size)
        ]
        self._set(fmt, k, max_tokens, memories, handle.rank, handle.barrier)
        self._handle = handle

    @classmethod
    def of_memory(
        cls,
        fmt: Format,
        k: int,
        max_tokens: int,
        memories: list[torch.Tensor],
        rank: int,
        barrier: Callable[[], None],
    ) -> PeerBuffers:
        """Return buffers in memory that is there: that of each rank, and what waits for all."""
        buffers = cls.__new__(cls)
        buffers._set(fmt, k, max_tokens, memories, rank, barrier)
        return buffers

    @staticmethod
    def _shape(
        fmt: Format, k: int, max_tokens: int, group: ProcessGroup | None = None
    ) -> tuple[int, int]:
        """Return the records of a rank, one of zeros behind them, and the bytes of each."""
        check_format(fmt)
        if fmt.row_scale:
            raise ValueError(f"fmt: expected a format without row_scale, got {fmt}")
        check_sizes(k=k, max_tokens=max_tokens)
        return dist.get_world_size(group) * max_tokens + 1, Record.of(fmt, k).nbytes

    def _set(
        self,
        fmt: Format,
        k: int,
        max_tokens: int,
        memories: list[torch.Tensor],
        rank: int,
        barrier: Callable[[], None],
    ) -> None:
        self.fmt = fmt
        self.k = k
        self.max_tokens = max_tokens
        self.rank = rank
        self._barrier = barrier
        self._record = Record.of(fmt, k)
        self._received = memories[rank]
        self._received[-1].zero_()
        first = rank * max_tokens
        self.sent = [memory[first : first + max_tokens] for memory in memories]

    def exchange(
        self, x: torch.Tensor, plan: Plan, fmt: Format, upper: dict[str, Any]
    ) -> torch.Tensor:
        """Quantize tokens into the records of all ranks, and return those that arrive."""
        if fmt is not self.fmt or x.shape[1] != self.k:
            raise ValueError(
                f"buffers: expected those of {fmt} and k {x.shape[1]}, got {self.fmt} and {self.k}"
            )
        if plan.sent is not None or plan.num_received != len(self._received) - 1:
            raise ValueError(
                f"buffers: expected a plan of route with max_tokens {self.max_tokens}, got one "
                f"of {plan.num_received} records"
            )
        self._barrier()
        ranks = len(self.sent)
        # Each rank begins with the one after it, so that none is written by all at once.
        for i in range(ranks):
            rank = (self.rank + 1 + i) % ranks
            out = self._record.views(self.sent[rank])
            ops.quantize(x, self._record.fmt, scatter=plan.slots[rank], out=out, **upper)
        self._barrier()
        return self._received
