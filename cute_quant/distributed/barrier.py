"""Ranks of a host wait for each other, in one launch on the stream of each."""

from __future__ import annotations

from datetime import timedelta

import torch

from cute_quant.dispatch import launch
from cute_quant.distributed.compilation import compiled
from cute_quant.jit import lookup
from cute_quant.kernels.config import BarrierSpec, launched_on


class Barrier:
    """A rank's call of the kernel that counts, signals and waits, on the current stream.

    Args:
        counters: of each rank, (ranks + 1,), int32, zeros, in the memory of that rank.
        rank: of this process.
        timeout: after which a rank whose peers do not come traps: its next calls raise.

    Raises:
        RuntimeError: the kernel cannot be compiled.
    """

    def __init__(self, counters: list[torch.Tensor], rank: int, timeout: timedelta):
        own = counters[rank]
        arch = lookup.architecture(own.get_device())
        function = compiled(launched_on(BarrierSpec(), arch), arch)
        addresses = torch.tensor([t.data_ptr() for t in counters], device=own.device)
        nanoseconds = timeout // timedelta(microseconds=1) * 1000
        self._counters = counters
        self._function = function
        self._arguments = (own, addresses, rank, nanoseconds)

    def __call__(self) -> None:
        """Launch."""
        launch.run(self._function, self._arguments, [])
