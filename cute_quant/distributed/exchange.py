"""Quantized tokens to the ranks of their experts, and results back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from cute_quant.contract.checks import MAX_PLACES, check_format, check_whole_bytes
from cute_quant.contract.dtypes import INPUT_DTYPES, describe
from cute_quant.contract.formats import DEEP_GEMM, Format
from cute_quant.contract.tensors import check_real, check_tensor
from cute_quant.dispatch import operators
from cute_quant.distributed.arrival import lay_out
from cute_quant.distributed.combination import add_up
from cute_quant.distributed.peers import PeerBuffers
from cute_quant.distributed.records import Record
from cute_quant.distributed.routing import Plan, all_to_all
from cute_quant.ops.rows import quantize


def dispatch(
    x: torch.Tensor,
    plan: Plan,
    fmt: Format | None = DEEP_GEMM,
    *,
    buffers: PeerBuffers | None = None,
    encode_scale: torch.Tensor | None = None,
    decode_scale: torch.Tensor | None = None,
    amax: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Quantize tokens, and send them to the ranks of their experts, in front of a grouped GEMM.

    One kernel quantizes each token and writes values and scales, as one record for each rank, into
    the buffer that is sent. One ``all_to_all`` moves it. What arrives is put in the rows of the
    experts: values are copied, and scales laid out as the GEMM reads them. All ranks call this
    together, with arguments alike, which are not compared. With `buffers` there is no buffer that
    is sent: for each rank a kernel writes the records to the memory where they arrive.

    Args:
        x: (T, k), bfloat16, float16 or float32, contiguous along k.
        plan: of :func:`route`.
        fmt: what the result looks like, without ``row_scale``; None to send x as it is.
        buffers: memory that all ranks see; of the same format and k, and of the `max_tokens` that
            :func:`route` was told.
        encode_scale: as for :func:`cute_quant.quantize`, one number, the same on all ranks.
        decode_scale: the same.
        amax: the same.

    Returns:
        q: (M, k), or (experts, max_m, k) where rows are ``Masked``; x's dtype without a format.
        sf: its scales, if there is a format. Rows that do not exist are as :func:`route` makes
            them: 0 between the groups of a ``PrefixSum``; undefined past the count of ``Masked``
            experts.

    Raises:
        TypeError, ValueError: an argument is wrong.
        RuntimeError: a tensor requires a gradient while gradients are recorded, or a rank is gone.
    """
    _check_input("dispatch", "x", x, plan)
    tokens = plan.records.shape[0]
    if x.ndim != 2 or x.shape[0] != tokens:
        raise ValueError(f"x: expected shape ({tokens}, k), got {tuple(x.shape)}")
    if x.shape[1] == 0:
        raise ValueError(f"x: expected columns, got shape {tuple(x.shape)}")
    upper = {"encode_scale": encode_scale, "decode_scale": decode_scale, "amax": amax}
    if buffers is not None and not isinstance(buffers, PeerBuffers):
        raise TypeError(f"buffers: expected PeerBuffers, got {describe(buffers)}")
    if fmt is None:
        for name, given in (*upper.items(), ("buffers", buffers)):
            if given is not None:
                raise ValueError(f"{name}: expected None without a format, got {describe(given)}")
        received = plan.exchange(x.index_select(0, plan.tokens) if len(x) else _nothing(x, plan))
        y = received.index_select(0, plan.sources)
        return (y.view(*plan.batch_shape, plan.num_rows, x.shape[1]),)
    check_format(fmt)
    if fmt.row_scale:
        raise ValueError(f"fmt: expected a format without row_scale, got {fmt}")
    if not fmt.upper_scale and any(given is not None for given in upper.values()):
        name = next(name for name, given in upper.items() if given is not None)
        raise ValueError(f"{name}: expected None for {fmt}, which has no upper scale")
    check_whole_bytes("x", fmt, x.shape[1])
    record = Record.of(fmt, x.shape[1])
    if buffers is not None:
        received = buffers.exchange(x, plan, fmt, upper)
    else:
        received = exchange_records(x, plan, record, upper)
    return lay_out(received, plan, record, fmt, x.shape[1])


def exchange_records(
    x: torch.Tensor, plan: Plan, record: Record, upper: dict[str, Any]
) -> torch.Tensor:
    """Quantize tokens into records, send them, and return those that arrive.

    Bytes of records that hold no token are sent as memory has them, and nobody reads them.
    """
    send = x.new_empty((len(plan.tokens), record.nbytes), dtype=torch.uint8)
    _quantize(x, plan.records, record.fmt, record.views(send), upper)
    return plan.exchange(send)


def _quantize(
    x: torch.Tensor,
    places: torch.Tensor,
    fmt: Format,
    out: tuple[torch.Tensor, torch.Tensor],
    upper: dict[str, Any],
) -> None:
    """Write each row to its places, as many at once as a row may have."""
    for first in range(0, places.shape[1], MAX_PLACES):
        some = places[:, first : first + MAX_PLACES].contiguous()
        quantize(x, fmt, scatter=some, out=out, **upper)


def combine(y: torch.Tensor, plan: Plan, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Send results of experts back to the ranks of their tokens, and add them up.

    A rank adds up, in float32, what its experts have for a token, rounds the sum to y's dtype and
    sends it as one row; the token's rank adds up those of all ranks, in their order. Rows of tokens
    without experts are 0.

    Args:
        y: (M, n), or (experts, max_m, n) where rows are ``Masked``: results in the rows of the
            arrival. Rows that do not exist are not read.
        plan: of :func:`route`.
        weights: (T, topk), float32: factors of the experts of each token, 1 by default.

    Returns:
        (T, n), y's dtype.

    Raises:
        TypeError, ValueError: an argument is wrong.
        RuntimeError: a tensor requires a gradient while gradients are recorded, or a rank is gone.
    """
    _check_input("combine", "y", y, plan)
    shape = (*plan.batch_shape, plan.num_rows)
    if y.shape[:-1] != shape:
        expected = ", ".join(map(str, shape))
        raise ValueError(f"y: expected shape ({expected}, n), got {tuple(y.shape)}")
    factors = None
    if weights is not None:
        _check_input("combine", "weights", weights, plan, (torch.float32,))
        if weights.shape != plan.ids.shape:
            raise ValueError(
                f"weights: expected shape {tuple(plan.ids.shape)}, got {tuple(weights.shape)}"
            )
        sent = weights.index_select(0, plan.tokens) if len(weights) else _nothing(weights, plan)
        factors = plan.exchange(sent)[:-1]
    returned = _return(add_up(y.flatten(0, -2), plan.places, factors), plan)
    return add_up(returned, plan.records)


def _return(rows: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Send rows back the way of their records."""
    returned = rows.new_empty((len(plan.tokens), rows.shape[1]))
    all_to_all(returned, rows, plan.sent, plan.received, plan.group)
    return returned


def _nothing(t: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Return records of a rank without tokens."""
    return t.new_zeros((len(plan.tokens), *t.shape[1:]))


def _check_input(
    function: str,
    name: str,
    t: torch.Tensor,
    plan: Plan,
    dtypes: Iterable[torch.dtype] = INPUT_DTYPES,
) -> None:
    """Check a tensor that travels, and the plan that it has to be on the device of."""
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: expected a Plan, as route returns it, got {describe(plan)}")
    check_tensor(name, t, dtypes)
    check_real({name: t})
    if t.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(operators.not_differentiable(f"distributed.{function}", name))
    if t.device != plan.ids.device:
        raise ValueError(f"{name}: expected the plan's device {plan.ids.device}, got {t.device}")
