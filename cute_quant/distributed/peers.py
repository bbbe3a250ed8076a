"""Memory of each rank that the others of its host write to, so that quantizing is sending."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from cute_quant.contract import torch_private
from cute_quant.contract.checks import check_format, check_whole_bytes
from cute_quant.contract.dtypes import describe
from cute_quant.contract.formats import Format
from cute_quant.contract.tensors import check_tensor
from cute_quant.distributed.barrier import Barrier
from cute_quant.distributed.records import Record
from cute_quant.distributed.routing import Plan, check_agreement, check_group, check_sizes, world
from cute_quant.ops.rows import quantize

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the others, as NCCL does by default."""
LONGEST_TIMEOUT = timedelta(days=365)
"""One whose nanoseconds are a 64-bit number."""


class PeerBuffers:
    """Records that arrive at each rank of a group, in memory that all of them see (NVLink).

    All ranks make one together, for many calls. Those of all buffers of a group follow each other
    on one stream of each rank, in the same order: ranks wait for each other before they write, and
    after.

    Attributes:
        fmt, k, max_tokens, group: as given.
        rank: of this process in the group.
        received: (ranks * max_tokens + 1, bytes), uint8: records that arrive, one of zeros last.
        sent: (max_tokens, bytes) for each rank: the records there that this rank writes.

    Args:
        fmt: of what is sent, without ``row_scale``.
        k: columns of the values.
        max_tokens: most tokens of any rank, as :func:`route` is told.
        group: the ranks, by default all.
        device: a CUDA device, by default the current one.
        timeout: after which a rank whose peers do not come traps: its next calls raise.

    Raises:
        TypeError, ValueError: an argument is wrong, or another one than on other ranks.
        RuntimeError: the ranks cannot see each other's memory.
    """

    def __init__(
        self,
        fmt: Format,
        k: int,
        max_tokens: int,
        group: ProcessGroup | None = None,
        device: torch.device | str | None = None,
        timeout: timedelta = TIMEOUT,
    ):
        shape = self.shape(fmt, k, max_tokens, group)
        if not isinstance(timeout, timedelta):
            raise TypeError(f"timeout: expected a timedelta, got {describe(timeout)}")
        if not timedelta() < timeout <= LONGEST_TIMEOUT:
            raise ValueError(
                f"timeout: expected a positive time up to {LONGEST_TIMEOUT}, got {timeout}"
            )
        place = self._device(device)
        group = world(group)
        memories, keep_memories = torch_private.symmetric_memory(shape, place, group)
        counters, keep_counters = torch_private.symmetric_memory(
            (4 * (dist.get_world_size(group) + 1),), place, group
        )
        barrier = Barrier([t.view(torch.int32) for t in counters], dist.get_rank(group), timeout)
        self._set(fmt, k, max_tokens, group, memories, barrier)
        self._handles = keep_memories, keep_counters

    @classmethod
    def of_memory(
        cls,
        fmt: Format,
        k: int,
        max_tokens: int,
        memories: list[torch.Tensor],
        barrier: Callable[[], None],
        group: ProcessGroup | None = None,
    ) -> PeerBuffers:
        """Return buffers in memory of another kind, such as files that processes share.

        Args:
            fmt: as of the class.
            k: the same.
            max_tokens: the same.
            group: the same.
            memories: of each rank, `shape`, uint8.
            barrier: waits for all ranks, and has each see what the others wrote.
        """
        shape = cls.shape(fmt, k, max_tokens, group)
        ranks = dist.get_world_size(group)
        if not isinstance(memories, (list, tuple)) or len(memories) != ranks:
            raise ValueError(
                f"memories: expected a tensor for each of {ranks} ranks, got {describe(memories)}"
            )
        for rank, memory in enumerate(memories):
            name = f"memories[{rank}]"
            check_tensor(name, memory, (torch.uint8,))
            if memory.shape != shape or not memory.is_contiguous():
                raise ValueError(
                    f"{name}: expected a contiguous tensor of shape {shape}, got "
                    f"{tuple(memory.shape)} and strides {memory.stride()}"
                )
        if not callable(barrier):
            raise TypeError(f"barrier: expected a function, got {describe(barrier)}")
        buffers = cls.__new__(cls)
        buffers._set(fmt, k, max_tokens, group, memories, barrier)
        return buffers

    @staticmethod
    def shape(
        fmt: Format, k: int, max_tokens: int, group: ProcessGroup | None = None
    ) -> tuple[int, int]:
        """Return the records of a rank, and the bytes of each.

        Raises:
            TypeError, ValueError: an argument is wrong, or another one than on other ranks.
        """
        ranks = check_group(group)
        check_format(fmt)
        if fmt.row_scale:
            raise ValueError(f"fmt: expected a format without row_scale, got {fmt}")
        check_sizes(k=k, max_tokens=max_tokens)
        check_whole_bytes("k", fmt, k)
        check_agreement(group, fmt=str(fmt), k=k, max_tokens=max_tokens)
        return ranks * max_tokens + 1, Record.of(fmt, k).nbytes

    @staticmethod
    def _device(device: torch.device | str | None) -> torch.device:
        """Return a CUDA device that is there.

        Raises:
            ValueError: it is not.
        """
        words = f"device: expected a CUDA device that is there, got {describe(device)}"
        try:
            place = torch.device("cuda" if device is None else device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(words) from error
        if place.type != "cuda" or (place.index or 0) >= torch.cuda.device_count():
            raise ValueError(words)
        return place

    def _set(
        self,
        fmt: Format,
        k: int,
        max_tokens: int,
        group: ProcessGroup | None,
        memories: list[torch.Tensor],
        barrier: Callable[[], None],
    ) -> None:
        self.fmt = fmt
        self.k = k
        self.max_tokens = max_tokens
        self.group = world(group)
        self.rank = dist.get_rank(group)
        self._barrier = barrier
        self._record = Record.of(fmt, k)
        self.received = memories[self.rank]
        self.received[-1].zero_()
        first = self.rank * max_tokens
        self.sent = [memory[first : first + max_tokens] for memory in memories]

    def exchange(
        self, x: torch.Tensor, plan: Plan, fmt: Format, upper: dict[str, Any]
    ) -> torch.Tensor:
        """Quantize tokens into the records of all ranks, and return those that arrive.

        Args:
            x: as of :func:`dispatch`, which has checked it.
            plan: the same.
            fmt: the same.
            upper: its arguments for an upper scale.

        Raises:
            TypeError, ValueError: an argument is wrong, before any rank waits for this one.
        """
        if fmt is not self.fmt or x.shape[1] != self.k or x.device != self.received.device:
            raise ValueError(
                f"buffers: expected those of {fmt} and k {x.shape[1]} on {x.device}, got "
                f"{self.fmt} and {self.k} on {self.received.device}"
            )
        if plan.group is not self.group:
            raise ValueError("buffers: expected those of the plan's group, got another one's")
        if plan.max_tokens != self.max_tokens:
            raise ValueError(
                f"buffers: expected those of the plan's max_tokens {plan.max_tokens}, got "
                f"{self.max_tokens}"
            )
        # Own records come first: nobody else touches them, and what is wrong is found. Then each
        # rank goes on with the one after it, so that none is written by all at once.
        ranks = len(self.sent)
        self._write(x, plan, self.rank, upper)
        self._barrier()
        for i in range(1, ranks):
            self._write(x, plan, (self.rank + i) % ranks, upper)
        self._barrier()
        return self.received

    def _write(self, x: torch.Tensor, plan: Plan, rank: int, upper: dict[str, Any]) -> None:
        """Quantize tokens into the records for a rank."""
        out = self._record.views(self.sent[rank])
        quantize(x, self._record.fmt, scatter=plan.slots[rank], out=out, **upper)
