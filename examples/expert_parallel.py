"""The mixture of experts of moe_layer.py over all GPUs of a host, each with its share of experts.

    tokens -> norm -> route, quantize + dispatch -> GEMM gate_up -> silu * mul + quantize
           -> GEMM down -> combine

    python examples/expert_parallel.py

prints, for each number of tokens a GPU, how much of the output has the bits of the layer on one
GPU, of tokens whose experts are all on one GPU (others are added up in another order, and there
products and sums are rounded once together), the error of all tokens, and the milliseconds of each
part; dispatch beside one in bf16 that is quantized on arrival. Without two GPUs and DeepGEMM two
processes run a small layer on the CPU.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

import cute_quant as cq
from cute_quant import distributed

try:
    from examples import moe_layer
except ImportError:  # run as a file
    import moe_layer  # type: ignore[no-redef]

TOKENS = (64, 512, 4096)
"""Tokens of each GPU."""
ALIGNMENT = 128
PARTS = ("route", "dispatch", "in bf16", "GEMMs", "combine")


class Share(NamedTuple):
    """The experts of a rank: weights for the GEMMs, and how many there are on all ranks."""

    gate_up: moe_layer.Fp8
    down: moe_layer.Fp8
    experts: int


class OneGpu(moe_layer.Fused):
    """Prologues of the layer on one GPU that give the bits of `forward`."""

    def norm(
        self, layer: moe_layer.MoeLayer, tokens: Tensor, placement: moe_layer.Placement
    ) -> moe_layer.Fp8:
        return moe_layer.Unfused().norm(layer, tokens, placement)


def share_of(layer: moe_layer.MoeLayer, rank: int, ranks: int) -> Share:
    """Return the experts of a rank of a layer that every rank has whole, to compare with it."""
    experts = len(layer.down)
    own = slice(rank * experts // ranks, (rank + 1) * experts // ranks)
    gate_up, down = (
        tuple(_experts(t, own) for t in operand) for operand in (layer.gate_up_fp8, layer.down_fp8)
    )
    return Share(gate_up, down, experts)


def _experts(t: Tensor, own: slice) -> Tensor:
    """Return weights or scales of some experts, in the strides that they have."""
    part = t[own]
    return torch.empty_strided(part.shape, part.stride(), dtype=t.dtype, device=t.device).copy_(
        part
    )


def forward(
    layer: moe_layer.MoeLayer, share: Share, tokens: Tensor, routing: moe_layer.Routing
) -> Tensor:
    """Compute the layer of all ranks for the tokens of this one."""
    plan = distributed.route(routing.ids, share.experts, alignment=ALIGNMENT)
    a = distributed.dispatch(moe_layer.torch_rms_norm(tokens, layer.norm), plan, layer.fmt)
    down = gemms(layer, share, plan, a)
    # The layer on one GPU rounds its weights.
    return distributed.combine(down, plan, routing.weights.to(down.dtype).float())


def gemms(
    layer: moe_layer.MoeLayer, share: Share, plan: distributed.Plan, a: moe_layer.Fp8
) -> Tensor:
    """Return what the experts of this rank make of the tokens that arrived."""
    gemm, indices = moe_layer.deep_gemm.m_grouped_fp8_gemm_nt_contiguous, m_indices(plan)
    gate_up = layer.norm.new_empty(plan.num_rows, layer.gate_up.shape[1])
    gemm(a, share.gate_up, gate_up, indices)
    a = cq.silu_mul_quantize(gate_up, layer.fmt, rows=plan.rows)
    down = layer.norm.new_empty(plan.num_rows, layer.down.shape[1])
    gemm(a, share.down, down, indices)
    return down


def m_indices(plan: distributed.Plan) -> Tensor:
    """Return the expert of each row of an arrival, -1 between the groups, for DeepGEMM."""
    ends = plan.rows.data.long()
    row = torch.arange(plan.num_rows, device=ends.device)
    aligned = (ends + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    expert = torch.searchsorted(aligned, row, right=True)
    here = expert.clamp(max=len(ends) - 1)
    return here.where(row < ends[here], -1).int()


def compare(
    rank: int, hidden: int, intermediate: int, experts: int, top_k: int, count: int, fmt: cq.Format
) -> tuple[float, float]:
    """Return how much of the output is the layer's on one GPU to the bit, and the error of all.

    Bits are compared where the order of additions is the same: of tokens with experts on one rank,
    of all ranks together; NaN where there are none. The error is the largest of a rank.
    """
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    torch.manual_seed(0)
    layer = moe_layer.random_layer(hidden, intermediate, experts, fmt, device)
    share = share_of(layer, rank, dist.get_world_size())
    torch.manual_seed(rank + 1)
    tokens = torch.randn(count, hidden, dtype=torch.bfloat16, device=device)
    routing = moe_layer.route(torch.randn(count, experts, device=device), top_k)
    result = forward(layer, share, tokens, routing)
    expected = moe_layer.contiguous(layer, tokens, routing, OneGpu())
    rank_of_expert = routing.ids * dist.get_world_size() // experts
    alone = (rank_of_expert == rank_of_expert[:, :1]).all(1)
    same = (result == expected)[alone].double()
    found = torch.stack([same.sum(), same.new_tensor(same.numel())])
    dist.all_reduce(found)
    error = found.new_tensor(moe_layer.relative_error(result, expected))
    dist.all_reduce(error, dist.ReduceOp.MAX)
    return (found[0] / found[1]).item(), error.item()


def times(rank: int, count: int) -> list[float]:
    """Return the milliseconds of each of ``PARTS``."""
    hidden, intermediate = moe_layer.HIDDEN, moe_layer.INTERMEDIATE
    torch.manual_seed(0)
    layer = moe_layer.random_layer(
        hidden, intermediate, moe_layer.EXPERTS, cq.deep_gemm_format(), "cuda"
    )
    share = share_of(layer, rank, dist.get_world_size())
    torch.manual_seed(rank + 1)
    x = torch.randn(count, hidden, dtype=torch.bfloat16, device="cuda")
    scores = torch.randn(count, moe_layer.EXPERTS, device="cuda")
    routing = moe_layer.route(scores, moe_layer.TOP_K)
    plan = distributed.route(routing.ids, share.experts, alignment=ALIGNMENT)
    a = distributed.dispatch(x, plan, layer.fmt)
    down = gemms(layer, share, plan, a)

    def in_bf16() -> object:
        (rows,) = distributed.dispatch(x, plan, None)
        return cq.quantize(rows, layer.fmt, rows=plan.rows)

    calls: tuple[Callable[[], object], ...] = (
        lambda: distributed.route(routing.ids, share.experts, alignment=ALIGNMENT),
        lambda: distributed.dispatch(x, plan, layer.fmt),
        in_bf16,
        lambda: gemms(layer, share, plan, a),
        lambda: distributed.combine(down, plan, routing.weights),
    )
    return [milliseconds(call) for call in calls]


def milliseconds(call: Callable[[], object]) -> float:
    """Return the median milliseconds of a call, which all ranks make together."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    rounds = []
    for _ in range(12):
        dist.barrier()
        start.record()
        call()
        end.record()
        end.synchronize()
        rounds.append(start.elapsed_time(end))
    return statistics.median(rounds[2:])


def on_rank(rank: int, ranks: int, backend: str, port: int) -> None:
    """Join the group and print, on rank 0, the comparison of all ranks and its own times."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if backend == "nccl":
        torch.cuda.set_device(rank)
    else:
        moe_layer.deep_gemm = moe_layer.TorchDeepGemm()
        torch.set_num_threads(1)
    dist.init_process_group(backend, rank=rank, world_size=ranks)
    if backend == "gloo":
        same, error = compare(rank, 512, 256, 8, 2, 32, cq.DEEP_GEMM_SM90)
        if rank == 0:
            words = (
                "of the output to the bit, of tokens whose experts are on one rank; error of all"
            )
            print(f"{100 * same:.1f} % {words} {100 * error:.3f} %")
        dist.destroy_process_group()
        return
    if rank == 0:
        print("".join(f"{title:>12}" for title in ("tokens", "same bits", "error", *PARTS)))
    for count in TOKENS:
        sizes = moe_layer.HIDDEN, moe_layer.INTERMEDIATE, moe_layer.EXPERTS, moe_layer.TOP_K
        same, error = compare(rank, *sizes, count, cq.deep_gemm_format())
        parts = [f"{time:.3f} ms" for time in times(rank, count)]
        if rank == 0:
            bits = "no such" if math.isnan(same) else f"{100 * same:.1f} %"
            cells = (str(count), bits, f"{100 * error:.3f} %", *parts)
            print("".join(f"{cell:>12}" for cell in cells), flush=True)
    dist.destroy_process_group()


def free_port() -> int:
    """Return a port that nobody uses."""
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def main() -> None:
    ranks, backend = torch.cuda.device_count(), "nccl"
    if ranks < 2 or moe_layer.missing() is not None:
        ranks, backend = 2, "gloo"
        print("Two processes run a small layer on the CPU, with GEMMs of torch.")
    else:
        print(f"{ranks} x {torch.cuda.get_device_name()}; {moe_layer.EXPERTS} experts of")
        print(f"{moe_layer.INTERMEDIATE}, {moe_layer.TOP_K} a token, hidden {moe_layer.HIDDEN}\n")
    torch.multiprocessing.spawn(on_rank, (ranks, backend, free_port()), ranks)


if __name__ == "__main__":
    main()
