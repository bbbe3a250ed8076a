"""Device memory in which every mistake is an error.

Each tensor is an allocation of its own, terabytes from the next, so an address that leaves one
lands nowhere. Addresses are the emulator's and no host pointers: host code that launches a kernel
only passes them on. Per byte, shadows say whether it was ever written, and which thread of the
current launch wrote it. They are allocated as zeros, of which the operating system holds the pages
that are touched: gigabytes between two rows cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from tests.emulator.errors import MemoryFault

SPACING_BITS = 40


@dataclass
class Allocation:
    name: str
    base: int
    data: np.ndarray  # uint8, shared with the tensor
    written: np.ndarray  # bool: bytes with a defined value
    writer: np.ndarray | None = None  # 1 + the thread of this launch that wrote a byte, or 0

    @property
    def end(self) -> int:
        return self.base + len(self.data)


class Memory:
    def __init__(self):
        self.allocations: list[Allocation] = []

    def add(self, name: str, tensor: torch.Tensor, written: bool) -> int:
        """Make the storage of a CPU tensor an allocation; return the address of the tensor.

        Args:
            written: whether the elements of the tensor hold values. Other bytes of its storage,
                between rows for instance, never do.
        """
        storage = tensor.untyped_storage()
        data = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        shadow = np.zeros(len(data), bool)
        if written:
            strides = [n * tensor.itemsize for n in tensor.stride()]
            start = shadow[tensor.storage_offset() * tensor.itemsize :]
            np.lib.stride_tricks.as_strided(
                start, (*tensor.shape, tensor.itemsize), (*strides, 1)
            ).fill(True)
        # Half a spacing above its multiple, so that an address below the base is told apart too.
        base = len(self.allocations) + 1 << SPACING_BITS | 1 << (SPACING_BITS - 1)
        self.allocations.append(Allocation(name, base, data, shadow))
        return base + tensor.storage_offset() * tensor.itemsize

    def begin_launch(self) -> None:
        for allocation in self.allocations:
            allocation.writer = None

    def load(
        self, addresses: np.ndarray, width: int, threads: np.ndarray, where: Callable[[int], str]
    ) -> np.ndarray:
        """The bytes at each thread's address: (threads, width).

        Args:
            addresses: uint64, one for each thread.
            width: bytes that each accesses, which is also their alignment (PTX ISA 6.4.1).
            threads: the launch-wide numbers of the threads.
            where: describes the thread at an index of these arrays.
        """
        result = np.empty((len(addresses), width), np.uint8)
        for allocation, chosen, places in self._places("load", addresses, width, where):
            undefined = ~allocation.written[places].all(1)
            if undefined.any():
                at = chosen[np.argmax(undefined)]
                self._fault("load", "of bytes that nobody wrote", addresses, at, width, where)
            if allocation.writer is not None:
                writer = allocation.writer[places]
                raced = ((writer != 0) & (writer != threads[chosen, None] + 1)).any(1)
                if raced.any():
                    at = chosen[np.argmax(raced)]
                    problem = "of bytes that another thread of this launch wrote"
                    self._fault("load", problem, addresses, at, width, where)
            result[chosen] = allocation.data[places]
        return result

    def store(
        self,
        addresses: np.ndarray,
        values: np.ndarray,
        threads: np.ndarray,
        where: Callable[[int], str],
    ) -> None:
        """Write each thread's row of `values`, (threads, width) bytes, to its address."""
        width = values.shape[1]
        for allocation, chosen, places in self._places("store", addresses, width, where):
            if allocation.writer is None:
                allocation.writer = np.zeros(len(allocation.data), np.int32)
            thread = threads[chosen, None] + 1
            before = allocation.writer[places]
            allocation.writer[places] = thread
            # Of threads that write a byte in this very instruction, one is left as its writer.
            clash = (before != 0) & (before != thread) | (allocation.writer[places] != thread)
            if clash.any():
                at = chosen[np.argmax(clash.any(1))]
                problem = "to bytes that another thread of this launch wrote"
                self._fault("store", problem, addresses, at, width, where)
            allocation.data[places] = values[chosen]
            allocation.written[places] = True

    def _places(self, access: str, addresses: np.ndarray, width: int, where: Callable[[int], str]):
        """(allocation, indices of the threads that access it, their bytes in it)."""
        misaligned = addresses % np.uint64(width) != 0
        if misaligned.any():
            at = int(np.argmax(misaligned))
            self._fault(access, f"misaligned for {width} bytes", addresses, at, width, where)
        region = (addresses >> np.uint64(SPACING_BITS)).astype(np.int64) - 1
        for r in np.unique(region):
            chosen = np.flatnonzero(region == r)
            if not 0 <= r < len(self.allocations):
                self._fault(access, "outside of every tensor", addresses, chosen[0], width, where)
            allocation = self.allocations[r]
            offsets = addresses[chosen].astype(np.int64) - allocation.base
            outside = (offsets < 0) | (offsets + width > len(allocation.data))
            if outside.any():
                at = chosen[np.argmax(outside)]
                self._fault(access, "out of bounds", addresses, at, width, where)
            yield allocation, chosen, offsets[:, None] + np.arange(width)

    def _fault(
        self,
        access: str,
        problem: str,
        addresses: np.ndarray,
        at: int,
        width: int,
        where: Callable[[int], str],
    ) -> None:
        address = int(addresses[at])
        message = f"{where(at)}: {access} of {width} bytes at {address:#x} {problem}"
        raise MemoryFault(f"{message}; {self.nearest(address)}")

    def nearest(self, address: int) -> str:
        """Where an address is, seen from the allocation next to it."""
        if not self.allocations:
            return "there is no tensor"

        def distance(a: Allocation) -> int:
            return max(a.base - address, address - a.end + 1, 0)

        near = min(self.allocations, key=distance)
        extent = f"{near.name!r} ({len(near.data)} bytes)"
        if address < near.base:
            return f"{near.base - address} bytes before the start of {extent}"
        if address >= near.end:
            return f"{address - near.end} bytes past the end of {extent}"
        return f"byte {address - near.base} of {extent}"
