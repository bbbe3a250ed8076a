"""Which rank and which row each token goes to, found on the device by all ranks together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from cute_quant.contract.dtypes import align, describe
from cute_quant.contract.rows import Masked, PrefixSum
from cute_quant.contract.tensors import MAX_SIZE, check_real, check_tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, eq=False)
class Plan:
    """The way of the tokens of all ranks to their experts and back; :func:`route` makes one.

    A token is sent once to each rank that has one of its experts, as a record. Tensors are on the
    device of the ids.

    Attributes:
        group: the ranks.
        experts: of this rank.
        rows: which rows of the arrival exist: ``PrefixSum`` or ``Masked``.
        num_rows: rows of the arrival: M, or max_m of each expert.
        dropped: (), int32: how many rows found no place in the arrival, of this rank's experts.
        records: (T, ranks), int32: the record that holds a token for each rank, -1 for none.
        slots: (ranks, T, 1), int32: its place among the records for that rank, -1 for none.
        tokens: (records,), int64: the token of each record that is sent, 0 where none is.
        max_tokens: records to and from each rank; None where they are counted.
        sent, received: the counted ones.
        num_received: records that arrive.
        sources: (rows,), int64: the record of each row of the arrival, `num_received` of none.
        places: (received, topk), int32: the row for each of a record's experts, -1 for none.
        ids: (T, topk), int64: the experts of tokens, -1 for none.
    """

    group: ProcessGroup
    experts: int
    rows: PrefixSum | Masked
    num_rows: int
    dropped: torch.Tensor
    records: torch.Tensor
    slots: torch.Tensor
    tokens: torch.Tensor
    max_tokens: int | None
    sent: list[int] | None
    received: list[int] | None
    num_received: int
    sources: torch.Tensor
    places: torch.Tensor
    ids: torch.Tensor

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Return the leading dimensions of the arrival: (experts,) where rows are masked."""
        return (self.experts,) if isinstance(self.rows, Masked) else ()

    def exchange(self, send: torch.Tensor) -> torch.Tensor:
        """Send records, (records, ...), and return those received, and one of zeros behind them."""
        received = send.new_empty((self.num_received + 1, *send.shape[1:]))
        received[-1].zero_()
        all_to_all(received[:-1], send, self.received, self.sent, self.group)
        return received

    def check(self) -> None:
        """Synchronize, and check that each row found a place. All ranks call this together.

        Raises:
            RuntimeError: the arrival of some rank has too few rows; on all ranks.
        """
        total = self.dropped.clone()
        dist.all_reduce(total, group=self.group)
        dropped = int(total)
        if dropped:
            raise RuntimeError(
                f"num_rows: expected enough rows for what arrives, got {self.num_rows}: "
                f"{dropped} rows did not find one, {int(self.dropped)} of them on this rank"
            )


def all_to_all(
    received: torch.Tensor,
    send: torch.Tensor,
    received_counts: list[int] | None,
    sent_counts: list[int] | None,
    group: ProcessGroup | None,
) -> None:
    """Send rows to each rank of a group, and receive theirs; in one collective.

    Raises:
        RuntimeError: a rank is gone, or did not answer within the timeout of the group.
    """
    dist.all_to_all_single(received, send, received_counts, sent_counts, group=group)


def route(
    topk_ids: torch.Tensor,
    experts: int,
    group: ProcessGroup | None = None,
    *,
    layout: type[PrefixSum] | type[Masked] = PrefixSum,
    alignment: int = 128,
    max_tokens: int | None = None,
    num_rows: int | None = None,
    check: bool = False,
) -> Plan:
    """Find the way of each token to its experts, which the ranks of a group have in turn.

    Rank r has experts ``r * experts / ranks`` and so on. All ranks call this together. The rows of
    an expert come from rank 0, 1, ..., each in the order of its tokens.

    With `max_tokens` nothing synchronizes, sizes are the same at every call, and the call may be
    captured in a CUDA graph: each rank sends as many records to each other, and without `num_rows`
    the arrival has the rows of the worst case. Without `max_tokens` it reads counts, and sends what
    there is; without `num_rows` the arrival then has the rows that it needs.

    Args:
        topk_ids: (T, topk), int32 or int64, the experts of each token, all different; -1, or what
            is out of range, is none. T may differ between ranks.
        experts: of all ranks together, a multiple of their number.
        group: the ranks, by default all. What follows is the same on all of them.
        layout: of the arrival: ``PrefixSum`` for DeepGEMM's psum and contiguous GEMMs, ``Masked``
            for its masked one.
        alignment: rows that groups of a ``PrefixSum`` start at multiples of.
        max_tokens: most tokens of any rank, the same on all ranks.
        num_rows: rows of the arrival: M, a multiple of `alignment`, or max_m of ``Masked`` experts.
            What finds no place is dropped, and counted.
        check: whether to synchronize, and raise on all ranks where rows were dropped on one, or
            arguments differ between them. Otherwise these are not compared.

    Returns:
        The plan.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong value or shape, or another one than on other ranks.
        RuntimeError: rows were dropped and `check` is set, or a rank is gone.
    """
    ranks = check_group(group)
    _check_route(topk_ids, experts, layout, alignment, max_tokens, num_rows, ranks)
    if not isinstance(check, bool):
        raise TypeError(f"check: expected a bool, got {describe(check)}")
    if check:
        check_agreement(
            group,
            topk=topk_ids.shape[1],
            experts=experts,
            layout=layout.__name__,
            alignment=alignment,
            max_tokens=max_tokens,
            num_rows=num_rows,
        )
    device, (tokens, topk) = topk_ids.device, topk_ids.shape
    local = experts // ranks
    ids = topk_ids.long()
    ids = ids.where((ids >= 0) & (ids < experts), -1)
    rank = torch.arange(ranks, device=device)
    goes = (ids.unsqueeze(1).div(local, rounding_mode="floor") == rank.unsqueeze(1)).any(2)
    slot = (goes.cumsum(0) - 1).where(goes, -1)

    sent = received = None
    if max_tokens is not None:
        first, num_sent, num_received = rank * max_tokens, ranks * max_tokens, ranks * max_tokens
    else:
        counts = goes.sum(0)
        of_others = torch.empty_like(counts)
        all_to_all(of_others, counts, None, None, group)
        sent, received = torch.stack([counts, of_others]).tolist()
        first = counts.cumsum(0) - counts
        num_sent, num_received = sum(sent), sum(received)
    records = (first + slot).where(goes, -1)

    # Of each record the experts on its rank, as these count them.
    of_rank = ids.unsqueeze(1) - (rank * local).unsqueeze(1)
    of_rank = of_rank.where((of_rank >= 0) & (of_rank < local), -1)
    where = records.where(goes, num_sent).flatten()
    sent_ids = ids.new_full((num_sent + 1, topk), -1, dtype=torch.int32)
    sent_ids[where] = of_rank.flatten(0, 1).int()
    token = torch.arange(tokens, device=device).unsqueeze(1).expand(tokens, ranks)
    token_of_record = ids.new_zeros(num_sent + 1)
    token_of_record[where] = token.flatten()
    expert = sent_ids.new_empty((num_received, topk))
    all_to_all(expert, sent_ids[:num_sent], received, sent, group)

    expert = expert.long()
    count, position_in_expert = _positions_in_experts(expert, local)
    if num_rows is None:
        num_rows = _rows_needed(count, layout, alignment, num_received, topk, max_tokens)
    total = num_rows * (local if layout is Masked else 1)
    if total > MAX_SIZE:
        raise ValueError(
            f"num_rows: expected to be given, where {total} rows of all experts may arrive, more "
            f"than {MAX_SIZE}"
        )
    rows, row, dropped = _rows(expert, count, position_in_expert, layout, alignment, num_rows)
    sources = ids.new_full((total + 1,), num_received)
    record = torch.arange(num_received, device=device).unsqueeze(1).expand_as(row)
    sources[row.where(row >= 0, total).flatten()] = record.flatten()
    plan = Plan(
        world(group),
        local,
        rows,
        num_rows,
        dropped,
        records.int(),
        slot.t().int().unsqueeze(2).contiguous(),
        token_of_record[:num_sent],
        max_tokens,
        sent,
        received,
        num_received,
        sources[:total],
        row.int(),
        ids,
    )
    if check:
        plan.check()
    return plan


def _positions_in_experts(expert: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how many of (n, topk) each expert has, and the place of each in its expert."""
    flat = expert.where(expert >= 0, experts).flatten()
    count = flat.new_zeros(experts + 1).scatter_add_(0, flat, torch.ones_like(flat))
    order = flat.argsort(stable=True)
    first = count.cumsum(0) - count
    number = torch.arange(len(flat), device=flat.device)
    position = torch.empty_like(flat).scatter_(0, order, number - first[flat[order]])
    return count[:experts], position.view_as(expert)


def _rows_needed(
    count: torch.Tensor,
    layout: type,
    alignment: int,
    received: int,
    topk: int,
    max_tokens: int | None,
) -> int:
    """Return the rows of an arrival: what is there, or may be if that is not known."""
    experts = len(count)
    if layout is Masked:
        return received if max_tokens is not None else align(int(count.max()), 4)
    if max_tokens is None:
        return int(align(count, alignment).sum())
    return align(received * min(topk, experts) + experts * (alignment - 1), alignment)


def _rows(
    expert: torch.Tensor,
    count: torch.Tensor,
    position: torch.Tensor,
    layout: type,
    alignment: int,
    num_rows: int,
) -> tuple[PrefixSum | Masked, torch.Tensor, torch.Tensor]:
    """Return the row domain of an arrival, the row of each expert of a record, and the dropped."""
    here, known = expert.clamp(min=0), expert >= 0
    if layout is Masked:
        fits = known & (position < num_rows)
        row = here * num_rows + position
        rows: PrefixSum | Masked = Masked(count.clamp(max=num_rows).int())
    else:
        padded = align(count, alignment)
        start = padded.cumsum(0) - padded
        row = start[here] + position
        fits = known & (row < num_rows)
        rows = PrefixSum((start + count).clamp(max=num_rows).int(), alignment)
    dropped = (known & ~fits).sum(dtype=torch.int32)
    return rows, row.where(fits, -1), dropped


def check_sizes(**sizes: int) -> None:
    """Check arguments that are sizes.

    Raises:
        TypeError, ValueError: one is no positive int, or too large.
    """
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"{name}: expected an int, got {describe(size)}")
        if not 1 <= size <= MAX_SIZE:
            raise ValueError(f"{name}: expected 1 to {MAX_SIZE}, got {size}")


def check_group(group: ProcessGroup | None) -> int:
    """Return how many ranks a group has.

    Raises:
        TypeError: it is no group.
        ValueError: this process is not in it.
        RuntimeError: there are no groups yet.
    """
    if not dist.is_initialized():
        raise RuntimeError("group: expected init_process_group to have been called")
    given: object = group
    outside = given == dist.GroupMember.NON_GROUP_MEMBER
    if not (given is None or outside or isinstance(given, dist.ProcessGroup)):
        raise TypeError(f"group: expected a process group, got {describe(given)}")
    if outside or dist.get_rank(group) < 0:
        raise ValueError("group: expected one that this process is in")
    return dist.get_world_size(group)


def world(group: ProcessGroup | None) -> ProcessGroup:
    """Return a group, that of all ranks for None."""
    if group is None:
        group = dist.group.WORLD
    assert group is not None  # there are groups
    return group


def check_agreement(group: ProcessGroup | None, **given: object) -> None:
    """Synchronize, and check that all ranks were given the same.

    Raises:
        ValueError: an argument differs; on all ranks.
    """
    of_all: list[dict[str, object]] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(of_all, given, group=group)
    for name in given:
        values = [of_rank[name] for of_rank in of_all]
        if any(value != values[0] for value in values):
            raise ValueError(
                f"{name}: expected the same on all ranks, got {', '.join(map(str, values))}"
            )


def _check_route(
    ids: torch.Tensor,
    experts: int,
    layout: object,
    alignment: int,
    max_tokens: int | None,
    num_rows: int | None,
    ranks: int,
) -> None:
    check_tensor("topk_ids", ids, (torch.int32, torch.int64))
    check_real({"topk_ids": ids})
    if ids.ndim != 2:
        raise ValueError(f"topk_ids: expected shape (T, topk), got {tuple(ids.shape)}")
    check_sizes(experts=experts, alignment=alignment)
    if max_tokens is not None:
        check_sizes(max_tokens=max_tokens)
    if num_rows is not None:
        check_sizes(num_rows=num_rows)
    if layout is not PrefixSum and layout is not Masked:
        raise ValueError(f"layout: expected PrefixSum or Masked, got {describe(layout)}")
    local = experts // ranks
    if ranks * (max_tokens or 0) > MAX_SIZE:
        raise ValueError(
            f"max_tokens: expected up to {MAX_SIZE} records of {ranks} ranks, got {max_tokens}"
        )
    if num_rows is not None and layout is PrefixSum and num_rows % alignment:
        raise ValueError(
            f"num_rows: expected a multiple of alignment {alignment}, as groups start at, got "
            f"{num_rows}"
        )
    if num_rows is not None and layout is Masked and local * num_rows > MAX_SIZE:
        raise ValueError(
            f"num_rows: expected up to {MAX_SIZE} rows of {local} experts, got {num_rows}"
        )
    if experts % ranks:
        raise ValueError(f"experts: expected a multiple of the {ranks} ranks, got {experts}")
    if max_tokens is not None and ids.shape[0] > max_tokens:
        raise ValueError(
            f"max_tokens: expected the tokens of every rank, {ids.shape[0]} or more, "
            f"got {max_tokens}"
        )
