"""What each rank does in the tests of expert parallelism; all draw the same data."""

from __future__ import annotations

import math
import os
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

import cute_quant as cq
from cute_quant import Masked, PrefixSum, distributed
from cute_quant.contract.tensors import last_column_rows
from cute_quant.distributed.records import Record
from tests.helpers import storage_bits

LAYOUTS = {"psum": PrefixSum, "masked": Masked}
FORMATS = {
    "DEEP_GEMM": cq.DEEP_GEMM,
    "DEEP_GEMM_SM90": cq.DEEP_GEMM_SM90,
    "MXFP8": cq.MXFP8,
    "NVFP4": cq.NVFP4,
    "words": cq.DEEP_GEMM.replace(scale_layout="row_major_packed"),
}


SYMMETRIC = "symmetric"
"""In place of a directory: memory that GPUs see over NVLink."""


def device() -> str:
    """Return where the tensors of a rank are."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


class Data(NamedTuple):
    """Tokens, experts and weights of all ranks."""

    x: list[torch.Tensor]
    ids: list[torch.Tensor]
    weights: list[torch.Tensor]


def draw(kind: str, ranks: int, experts: int, topk: int, k: int, seed: int) -> Data:
    """Draw tokens of all ranks, numbers whose sums are exact, and their experts."""
    generator = torch.Generator().manual_seed(seed)
    x, ids, weights = [], [], []
    for rank in range(ranks):
        tokens = int(torch.randint(1, 9, (), generator=generator))
        if kind == "empty ranks" and rank % 2:
            tokens = 0
        scores = torch.rand(tokens, experts, generator=generator)
        if kind == "empty experts":
            scores[:, ::2] -= 1.0
        own = scores.topk(topk).indices
        if kind == "all to one":
            own = torch.full((tokens, topk), -1)
            own[:, 0] = experts - 1
        if kind == "none":
            own = torch.where(torch.rand(own.shape, generator=generator) < 0.5, own, -1)
        x.append(torch.randint(-8, 9, (tokens, k), generator=generator).bfloat16())
        ids.append(own)
        exponents = torch.randint(-2, 3, (tokens, topk), generator=generator)
        weights.append(2.0**exponents)
    return Data(x, ids, weights)


def arriving(data: Data, expert: int) -> list[tuple[int, int]]:
    """Return rank and token of each row of an expert, in their order."""
    return [
        (rank, token)
        for rank, ids in enumerate(data.ids)
        for token, own in enumerate(ids.tolist())
        if expert in own
    ]


def there_and_back(
    rank: int, kind: str, layout: str, name: str, bounded: bool, seed: int, memory: str | None
) -> None:
    """Route, dispatch and combine, and compare each of them with all ranks' data."""
    ranks, experts, topk, k = dist.get_world_size(), 8, 3, 640
    data, fmt, local = draw(kind, ranks, experts, topk, k, seed), FORMATS[name], experts // ranks
    upper = {"amax": torch.tensor(8.0, device=device())} if fmt.upper_scale else {}
    sizes = {"max_tokens": 9, "num_rows": 40 if layout == "masked" else 96} if bounded else {}
    x, ids = data.x[rank].to(device()), data.ids[rank].to(device())
    plan = distributed.route(
        ids.int(), experts, layout=LAYOUTS[layout], alignment=16, check=True, **sizes
    )
    if bounded:
        assert plan.num_rows == sizes["num_rows"] and plan.sent is None
    buffers = None
    if memory is not None:
        if memory == SYMMETRIC:
            buffers = distributed.PeerBuffers(fmt, k, sizes["max_tokens"])
        else:
            buffers = shared_buffers(fmt, k, sizes["max_tokens"], rank, memory)
    q, sf = distributed.dispatch(x, plan, fmt, buffers=buffers, **upper)
    expected_strides = fmt.scale_strides(plan.batch_shape, plan.num_rows, k)
    assert sf.shape == fmt.scale_shape(plan.batch_shape, plan.num_rows, k)
    assert not sf.numel() or sf.stride() == expected_strides

    rows_of_experts, start = [], 0
    for expert in range(rank * local, (rank + 1) * local):
        tokens = arriving(data, expert)
        if layout == "masked":
            start = (expert - rank * local) * plan.num_rows
        rows_of_experts.append((expert, start, tokens))
        start += -(-len(tokens) // 16) * 16
    counts = [len(tokens) for *_, tokens in rows_of_experts]
    ends = [start + len(tokens) for _, start, tokens in rows_of_experts]
    assert plan.rows.data.tolist() == (counts if layout == "masked" else ends)

    flat_q = q.view(torch.uint8).flatten(0, -2)
    rows = cq.dequantize(q, sf, fmt, dtype=torch.float32, **upper).flatten(0, -2)
    (sent_as_is,) = distributed.dispatch(x, plan, None)
    flat_q, rows, sent_as_is = (t.cpu() for t in (flat_q, rows, sent_as_is))
    live = torch.zeros(len(rows), dtype=torch.bool)
    y = torch.full((len(rows), 16), torch.nan)
    upper = {name: t.cpu() for name, t in upper.items()}
    for expert, start, tokens in rows_of_experts:
        for i, (source, token) in enumerate(tokens):
            own = cq.quantize(data.x[source], fmt, **upper)
            expected = cq.dequantize(*own, fmt, dtype=torch.float32, **upper)[token]
            assert torch.equal(flat_q[start + i], own[0].view(torch.uint8)[token])
            assert torch.equal(rows[start + i], expected)
            assert torch.equal(sent_as_is.flatten(0, -2)[start + i], data.x[source][token])
            y[start + i] = (expert + 1) * data.x[source][token][:16].float()
            live[start + i] = True
    if layout == "psum":
        assert flat_q[~live].eq(0).all() and rows[~live].eq(0).all()
        if fmt.mn_major and plan.num_rows:
            assert last_column_rows(sf) == fmt.scale_rows(plan.num_rows)
            padding = storage_bits(sf).view(torch.int32).view(-1, fmt.scale_rows(plan.num_rows))
            assert padding[:, plan.num_rows :].eq(0).all()
    y = y.view(*plan.batch_shape, plan.num_rows, 16).to(device())
    x, ids = x.cpu(), ids.cpu()
    for weights in (None, data.weights[rank].float()):
        given = None if weights is None else weights.to(device())
        combined = distributed.combine(y, plan, given).cpu()
        factors = torch.ones(ids.shape) if weights is None else weights
        factors = factors.where(ids >= 0, 0.0)
        total = (factors * (ids + 1)).sum(1, keepdim=True) * x[:, :16].float()
        assert torch.equal(combined, total)


def shared_buffers(
    fmt: cq.Format, k: int, max_tokens: int, rank: int, directory: str
) -> distributed.PeerBuffers:
    """Return buffers in files that all ranks map; poisoned by their owner."""
    shape = distributed.PeerBuffers.shape(fmt, k, max_tokens)

    def memory_of(peer: int) -> torch.Tensor:
        name, size = f"{directory}/{peer}", math.prod(shape)
        return torch.from_file(name, shared=True, size=size, dtype=torch.uint8).view(shape)

    memory_of(rank).fill_(0xA5)
    dist.barrier()
    memories = [memory_of(peer) for peer in range(dist.get_world_size())]
    return distributed.PeerBuffers.of_memory(fmt, k, max_tokens, memories, dist.barrier)


def too_few_rows(rank: int) -> None:
    """Route more rows than an arrival has; all others are there."""
    ids = torch.zeros(5, 1, dtype=torch.int64)
    plan = distributed.route(ids, 4, num_rows=16, max_tokens=5, alignment=16)
    assert int(plan.dropped) == (4 if rank == 0 else 0)
    assert plan.rows.data.tolist() == ([16] if rank == 0 else [0])
    x = torch.full((5, 128), rank + 1.0, dtype=torch.bfloat16)
    q, _ = distributed.dispatch(x, plan, cq.DEEP_GEMM)
    assert q.shape == (16, 128)
    combined = distributed.combine(torch.ones(16, 4), plan)
    assert combined.sum(1).tolist() == ([4.0] * 5 if rank < 3 else [4.0, 0.0, 0.0, 0.0, 0.0])
    own = 4 if rank == 0 else 0
    words = (
        f"num_rows: expected enough rows for what arrives, got 16: 4 rows did not find one, {own}"
    )
    expect_error(RuntimeError, words, plan.check)
    sizes = {"max_tokens": 5, "num_rows": 2, "layout": Masked}
    masked = distributed.route(ids, 4, **sizes)
    assert int(masked.dropped) == (18 if rank == 0 else 0)
    assert masked.rows.data.tolist() == ([2] if rank == 0 else [0])
    expect_error(
        RuntimeError, "18 rows did not find one", distributed.route, ids, 4, check=True, **sizes
    )


def errors(rank: int) -> None:
    """Refuse what is wrong before anything is sent."""
    ids = torch.zeros(2, 1, dtype=torch.int64)
    wrong = (
        ((ids.float(), 4), {}, TypeError, "topk_ids: expected a tensor of int32 or int64"),
        ((ids[0], 4), {}, ValueError, "topk_ids: expected shape (T, topk), got (1,)"),
        ((ids, 6), {}, ValueError, "experts: expected a multiple of the 4 ranks, got 6"),
        ((ids, 4.0), {}, TypeError, "experts: expected an int"),
        ((ids, 4), {"max_tokens": 1}, ValueError, "max_tokens: expected the tokens of every rank"),
        ((ids, 4), {"num_rows": 0}, ValueError, "num_rows: expected 1 to"),
        ((ids, 4), {"layout": cq.Indexed}, ValueError, "layout: expected PrefixSum or Masked"),
    )
    for arguments, options, error, words in wrong:
        expect_error(error, words, distributed.route, *arguments, **options)
    plan = distributed.route(ids, 4)
    x, y = torch.zeros(2, 128, dtype=torch.bfloat16), torch.zeros(plan.num_rows, 3)
    calls = (
        (distributed.dispatch, (x[:1], plan), {}, "x: expected shape (2, k), got (1, 128)"),
        (distributed.dispatch, (x, None), {}, "plan: expected a Plan"),
        (
            distributed.dispatch,
            (x, plan, cq.NVFP4.replace(row_scale=True)),
            {},
            "fmt: expected a format without row_scale",
        ),
        (distributed.combine, (torch.zeros(1, 2, 3), plan), {}, "y: expected shape ("),
        (distributed.combine, (y, plan, torch.zeros(1, 1)), {}, "weights: expected shape (2, 1)"),
    )
    nvfp4 = {"amax": torch.tensor(1.0)}
    memory = torch.zeros(distributed.PeerBuffers.shape(cq.DEEP_GEMM, 128, 2), dtype=torch.uint8)
    calls += (
        (distributed.dispatch, (x[:, :0], plan), {}, "x: expected columns, got shape (2, 0)"),
        (distributed.dispatch, (x.to("meta"), plan), {}, "x: expected a tensor"),
        (distributed.dispatch, (x, plan), {"buffers": 3}, "buffers: expected PeerBuffers, got"),
        (distributed.dispatch, (x, plan, None), nvfp4, "amax: expected None without a format"),
        (distributed.dispatch, (x, plan), nvfp4, "amax: expected None for e4m3"),
        (distributed.dispatch, (x[:, :127], plan, cq.NVFP4), nvfp4, "x: expected a multiple of 2"),
        (distributed.combine, (y, None), {}, "plan: expected a Plan"),
        (distributed.route, (ids.to("meta"), 4), {}, "topk_ids: expected a tensor"),
        (distributed.route, (ids, 4), {"check": 3}, "check: expected a bool"),
        (distributed.route, (ids, 4, 3), {}, "group: expected a process group, got"),
        (distributed.route, (ids, 4), {"num_rows": 100}, "a multiple of alignment 128"),
        (distributed.route, (ids, 4), {"max_tokens": 2**30}, "up to 2147483647 records of 4 ranks"),
        (
            distributed.route,
            (ids, 2**20),
            {"max_tokens": 2**12, "layout": Masked},
            f"num_rows: expected to be given, where {2**32} rows",
        ),
        (distributed.PeerBuffers.shape, (cq.NVFP4, 127, 2), {}, "k: expected a multiple of 2"),
        (distributed.PeerBuffers.shape, (cq.NVFP4, 128, 0), {}, "max_tokens: expected 1 to"),
        (
            distributed.PeerBuffers,
            (cq.DEEP_GEMM, 128, 2, None, "cpu"),
            {},
            "device: expected a CUDA",
        ),
        (
            distributed.PeerBuffers,
            (cq.DEEP_GEMM, 128, 2, None, "cuda", 5),
            {},
            "timeout: expected a timedelta, got 5",
        ),
        (
            distributed.PeerBuffers,
            (cq.DEEP_GEMM, 128, 2, None, "cuda", timedelta()),
            {},
            "timeout: expected a positive time up to 365 days",
        ),
        (
            distributed.PeerBuffers,
            (cq.DEEP_GEMM, 128, 2, None, "cuda", timedelta.max),
            {},
            "timeout: expected a positive time up to 365 days",
        ),
        (
            distributed.PeerBuffers,
            (cq.DEEP_GEMM, 128, 2, None, "nowhere"),
            {},
            "device: expected a CUDA device that is there, got 'nowhere'",
        ),
        *(
            (distributed.PeerBuffers.of_memory, (cq.DEEP_GEMM, 128, 2, *given), {}, words)
            for given, words in (
                ((None, dist.barrier), "memories: expected a tensor for each of 4 ranks, got None"),
                (([memory] * 3, dist.barrier), "memories: expected a tensor for each of 4 ranks"),
                (([memory[1:]] * 4, dist.barrier), "memories[0]: expected a contiguous tensor"),
                (([memory.int()] * 4, dist.barrier), "memories[0]: expected a tensor of uint8"),
                (([memory] * 4, None), "barrier: expected a function, got None"),
            )
        ),
        # What differs between ranks raises on all of them.
        (
            distributed.route,
            (ids, 4),
            {"check": True, "num_rows": 128 + 128 * rank},
            "got 128, 256",
        ),
        (distributed.PeerBuffers.shape, (cq.DEEP_GEMM, 128, 2 + rank), {}, "got 2, 3, 4, 5"),
    )
    for function, arguments, options, words in calls:
        expect_error((TypeError, ValueError), words, function, *arguments, **options)
    for function, given in ((distributed.dispatch, x), (distributed.combine, y)):
        needs_gradient = given.clone().requires_grad_()
        expect_error(RuntimeError, "is not differentiable", function, needs_gradient, plan)


def barriers(rank: int, directory: str) -> None:
    """Write own records, wait for others to have read theirs, write those, and wait again."""
    ranks, x = dist.get_world_size(), torch.ones(2, 128, dtype=torch.bfloat16)
    plan = distributed.route(torch.arange(ranks).expand(2, ranks), ranks, max_tokens=2)
    buffers = shared_buffers(cq.DEEP_GEMM, 128, 2, rank, directory)
    written: list[int] = []

    def barrier() -> None:
        written.append(sum(int(t[0, 0]) != 0xA5 for t in buffers.sent))
        dist.barrier()

    buffers._barrier = barrier
    assert distributed.route(plan.ids, ranks, dist.group.WORLD).group is plan.group
    distributed.dispatch(x, plan, cq.DEEP_GEMM, buffers=buffers)
    assert written == [1, ranks]
    others = distributed.route(torch.zeros(2, 1, dtype=torch.int64), ranks)
    for arguments, words in (
        ((x, others, cq.DEEP_GEMM), "buffers: expected those of the plan's max_tokens None, got 2"),
        ((x[:, :64], plan, cq.DEEP_GEMM), "buffers: expected those of e4m3"),
        ((x, plan, cq.DEEP_GEMM_SM90), "buffers: expected those of e4m3"),
    ):
        expect_error(ValueError, words, distributed.dispatch, *arguments, buffers=buffers)
    assert written == [1, ranks]


def expect_error(error, words, function, *arguments, **options) -> None:
    try:
        function(*arguments, **options)
    except error as raised:
        assert words in str(raised), raised
    else:
        raise AssertionError(f"{words}: nothing raised")


def die_or_dispatch(rank: int) -> str:
    """Have the last rank die while the others wait for it."""
    plan = distributed.route(torch.zeros(2, 1, dtype=torch.int64), 4)
    if rank == 3:
        os._exit(1)
    try:
        distributed.dispatch(torch.ones(2, 128, dtype=torch.bfloat16), plan)
    except RuntimeError as error:
        return str(error)
    return ""


def more_ranks_than_places(rank: int) -> None:
    """Quantize rows with more places than a launch takes, as for a group of 40 ranks."""
    from cute_quant.distributed.exchange import _quantize

    record = Record.of(cq.DEEP_GEMM, 640)
    x = torch.randn(3, 640).bfloat16()
    buffer = torch.zeros(120, record.nbytes, dtype=torch.uint8)
    places = torch.randperm(120).view(3, 40).int()
    q, sf = record.views(buffer)
    _quantize(x, places, record.fmt, (q, sf), {})
    own_q, own_sf = cq.quantize(x, record.fmt)
    for t, own in ((q, own_q), (sf, own_sf)):
        expected = own.view(torch.uint8).unsqueeze(1).expand(3, 40, -1)
        assert torch.equal(t.view(torch.uint8)[places.long()], expected)


def in_a_graph(rank: int, layout: str, peers: bool) -> None:
    """Replay a graph of all three calls for other tokens and experts."""
    ranks, experts, topk, k, tokens = dist.get_world_size(), 8, 3, 7168, 16
    generator = torch.Generator().manual_seed(rank)

    def draw_tokens() -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.rand(tokens, experts, generator=generator)
        x = torch.randn(tokens, k, generator=generator).bfloat16()
        return x.cuda(), scores.topk(topk).indices.cuda()

    num_rows = tokens * ranks if layout == "masked" else tokens * ranks * topk + 16 * experts
    x, ids = draw_tokens()
    sizes = {"max_tokens": tokens, "num_rows": num_rows, "alignment": 16}
    buffers = None
    if peers:
        buffers = distributed.PeerBuffers(cq.DEEP_GEMM, k, tokens)

    def call() -> tuple[torch.Tensor, ...]:
        plan = distributed.route(ids, experts, layout=LAYOUTS[layout], **sizes)
        q, sf = distributed.dispatch(x, plan, cq.DEEP_GEMM, buffers=buffers)
        y = cq.dequantize(q, sf, cq.DEEP_GEMM)
        return plan.rows.data, distributed.combine(y, plan)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    for _ in range(3):
        for t, new in zip((x, ids), draw_tokens(), strict=True):
            t.copy_(new)
        graph.replay()
        kept = [t.clone() for t in results]
        for t, expected in zip(kept, call(), strict=True):
            assert torch.equal(t, expected)


def example(rank: int) -> tuple[float, float]:
    """Compare the layer of the example with that on one GPU."""
    from examples import expert_parallel, moe_layer

    moe_layer.deep_gemm = moe_layer.TorchDeepGemm()
    return expert_parallel.compare(rank, 256, 128, 8, 1, 24, cq.DEEP_GEMM_SM90)
