"""Measure the dispatch of an expert-parallel layer between the GPUs of a host.

    python -m bench.dispatch [--tokens T,...] [--columns K]

Each way ends with quantized rows in front of a grouped GEMM: tokens quantized and sent as records
of FP8 values and scales (*FP8*), sent in bf16 and quantized on arrival (*bf16*), and quantized
into the memory of the other GPUs (*peers*). Parts of them are until records have arrived, by NCCL
(*sent*) or in the memory of peers (*written*); *copy* is a copy of the records for one peer to its
memory. *combine* sends as many bf16 results back and adds them up. All are CUDA graphs of calls
with bounded sizes, whose routing is known; the results of the three ways are compared first. A time
is that of the slowest rank, the median over replays that alternate.
"""

from __future__ import annotations

import argparse
import functools
import os
import socket
import statistics
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from bench import environment
from bench.problem import FLOAT32, UE8M0
from bench.shapes import MAIN_COLUMN, positive_numbers
from cute_quant import Format, distributed, quantize
from cute_quant.distributed.exchange import exchange_records
from cute_quant.distributed.records import Record

TOKENS = (64, 4096)
"""Tokens of each GPU."""
EXPERTS = 64
TOP_K = 8
ALIGNMENT = 128
CALLS = 10
REPLAYS = 20
TIMES = ("bf16", "FP8", "peers", "sent", "written", "copy", "route", "combine")
ROOM = 1.3
"""Rows of an arrival over those that come on average."""


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Return a graph of ``CALLS`` calls."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    return graph


def slowest_seconds(graphs: dict[str, torch.cuda.CUDAGraph]) -> dict[str, float]:
    """Return the median seconds of a call, each of the slowest rank."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    rounds: dict[str, list[float]] = {name: [] for name in graphs}
    for replay in range(REPLAYS + 2):
        for name, graph in graphs.items():
            dist.barrier()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            milliseconds = torch.tensor([start.elapsed_time(end)], device="cuda")
            dist.all_reduce(milliseconds, dist.ReduceOp.MAX)
            if replay >= 2:
                rounds[name].append(milliseconds.item() / 1e3 / CALLS)
    return {name: statistics.median(some) for name, some in rounds.items()}


def measure(rank: int, tokens: int, k: int, fmt: Format) -> dict[str, float]:
    """Return the seconds of each way to dispatch, of a route, and of the way back."""
    ranks = dist.get_world_size()
    torch.manual_seed(rank)
    x = torch.randn(tokens, k, dtype=torch.bfloat16, device="cuda")
    ids = torch.rand(tokens, EXPERTS, device="cuda").topk(TOP_K).indices
    average = tokens * TOP_K + EXPERTS // ranks * ALIGNMENT
    num_rows = int(average * ROOM) // ALIGNMENT * ALIGNMENT
    route = functools.partial(
        distributed.route,
        ids,
        EXPERTS,
        alignment=ALIGNMENT,
        max_tokens=tokens,
        num_rows=num_rows,
    )
    plan = route(check=True)
    buffers = distributed.PeerBuffers(fmt, k, tokens)

    def in_bf16() -> tuple[torch.Tensor, ...]:
        (rows,) = distributed.dispatch(x, plan, None)
        return quantize(rows, fmt, rows=plan.rows)

    calls: dict[str, Callable[[], object]] = {
        "bf16": in_bf16,
        "FP8": lambda: distributed.dispatch(x, plan, fmt),
        "peers": lambda: distributed.dispatch(x, plan, fmt, buffers=buffers),
    }
    expected = in_bf16()
    for name in ("FP8", "peers"):
        for own, other in zip(calls[name](), expected, strict=True):  # type: ignore[call-overload]
            own, other = (t.view(torch.uint8) if t.itemsize == 1 else t for t in (own, other))
            if not torch.equal(own, other):
                raise RuntimeError(f"{name}: other results than bf16 on rank {rank}")
    record = Record.of(fmt, k)
    calls["sent"] = lambda: exchange_records(x, plan, record, {})
    calls["written"] = lambda: buffers.exchange(x, plan, fmt, {})
    peer, count = (rank + 1) % ranks, int((plan.records[:, (rank + 1) % ranks] >= 0).sum())
    target = buffers.sent[peer][:count]
    source = torch.zeros_like(target, device=x.device)
    calls["copy"] = lambda: target.copy_(source)
    calls["route"] = route
    y = torch.randn(num_rows, k, dtype=torch.bfloat16, device="cuda")
    weights = torch.rand(tokens, TOP_K, device="cuda")
    calls["combine"] = lambda: distributed.combine(y, plan, weights)
    return slowest_seconds({name: captured(call) for name, call in calls.items()})


def on_rank(rank: int, ranks: int, port: int, options: argparse.Namespace) -> None:
    """Join the group and print, on rank 0, what all ranks measure."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=ranks)
    fmt = UE8M0 if torch.cuda.get_device_capability()[0] >= 10 else FLOAT32
    for tokens in options.tokens:
        seconds = measure(rank, tokens, options.columns, fmt)
        if rank == 0:
            times = " ".join(f"{seconds[name] * 1e6:8.1f}" for name in TIMES)
            ratios = [seconds["bf16"] / seconds["FP8"], seconds["sent"] / seconds["written"]]
            line = " ".join(f"{ratio:12.2f}" for ratio in ratios)
            print(f"{tokens:7} {times} {line}", flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.dispatch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--columns", type=int, default=MAIN_COLUMN, metavar="K", help="default: %(default)s")
    add("--tokens", type=positive_numbers, default=TOKENS, metavar="T,...", help="of each GPU")
    add("--commit", help="name of the measured version, where there is no git to ask")
    options = parser.parse_args()
    ranks = torch.cuda.device_count()
    if ranks < 2:
        sys.exit("bench.dispatch: needs two GPUs of compute capability 9.0, 10.0 or 10.3")
    machine = environment.describe("python -m bench.dispatch", options.commit)
    print(f"{ranks} x {machine['gpu']}, {machine['commit']}, k = {options.columns}")
    print(f"top {TOP_K} of {EXPERTS} experts, microseconds a call")
    ratios = " ".join(f"{title:>12}" for title in ("bf16/FP8", "sent/written"))
    print(f"{'tokens':>7} " + " ".join(f"{title:>8}" for title in TIMES) + f" {ratios}")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = int(found.getsockname()[1])
    spawn(on_rank, (ranks, port, options), ranks)


if __name__ == "__main__":
    main()
