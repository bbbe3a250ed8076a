"""Layers whose parameters or batches torch distributes, run by each rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from cute_quant.nn import Fp8GroupedLinear, Fp8Linear


class Layers(torch.nn.Module):
    """A linear layer, then experts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = Fp8Linear(64, 128)
        self.experts = Fp8GroupedLinear(2, 128, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.experts(self.first(x), torch.tensor([100, 200], dtype=torch.int32))
        return y


def gradients(rank: int, sharded: bool) -> float:
    """Return the largest difference of gradients from the mean of those of each rank."""
    torch.manual_seed(1 + rank)
    x, alone = torch.randn(256, 64), Layers()
    alone(x).square().sum().backward()
    distributed: torch.nn.Module = Layers()
    if sharded:
        fully_shard(distributed.first)
        fully_shard(distributed)
    else:
        distributed = DistributedDataParallel(distributed)
    distributed(x).square().sum().backward()
    worst = 0.0
    for own, actual in zip(alone.parameters(), distributed.parameters(), strict=True):
        dist.all_reduce(own.grad)
        grad = actual.grad.full_tensor() if sharded else actual.grad
        worst = max(worst, ((grad - own.grad / dist.get_world_size()).abs().max()).item())
        assert own.grad.any()
    return worst
