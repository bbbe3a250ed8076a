"""Device and shared memory with checked accesses.

A kernel addresses allocations: tensors of device memory, or variables of shared memory. They lie so
far apart that an address which leaves one is in no other. Addresses are the emulator's and no host
pointers: host code that launches a kernel only passes them on.

For each byte, shadow memory records whether it was ever written, and which threads read and wrote
it in the current epoch: a launch for device memory, the time between barriers for shared memory.
Nothing orders the threads of an epoch, so no thread may access a byte that another one writes.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from cute_quant.emulator.errors import MemoryFault

DEVICE_SPACING_BITS = 40
SHARED_SPACING_BITS = 20

ALIGNMENT = 256
"""Alignment of what a CUDA allocator returns, all that a kernel can know of an address."""

MAP_NORESERVE = 0x4000
"""A flag of Linux, which Python names from 3.11 on, and not everywhere."""

SEVERAL = -1
"""Stands for the thread that read a byte where more than one did."""


@dataclass
class Allocation:
    """Bytes at an address, of which each block may have its own.

    The shadows of device memory are allocated as zeros, of which the operating system holds the
    pages that are touched: gigabytes between two rows cost nothing.

    Attributes:
        name: of the tensor or variable.
        base: address of the first byte.
        size: bytes that a thread sees.
        data: uint8: the bytes of a tensor, or those of one block after the other.
        written: bool: bytes with a defined value.
        reader: int32: 1 + the thread that read a byte in this epoch, 0 or ``SEVERAL``.
        writer: int32: 1 + the thread that wrote a byte in this epoch, or 0.
    """

    name: str
    base: int
    size: int
    data: np.ndarray
    written: np.ndarray
    reader: np.ndarray | None = None
    writer: np.ndarray | None = None

    @property
    def end(self) -> int:
        """Return the address past the last byte."""
        return self.base + self.size

    def read(self, places: np.ndarray, threads: np.ndarray) -> np.ndarray:
        """Record that each thread reads its row of `places`.

        Returns:
            Whether another thread wrote there in this epoch, of the shape of `places`.
        """
        if self.reader is None:
            self.reader = _shadow(len(self.data))
        thread = threads[:, None] + 1
        before = self.reader[places]
        self.reader[places] = np.where((before == 0) | (before == thread), thread, SEVERAL)
        # Of threads that read a byte in this very instruction, one is left as its reader.
        shared = places[self.reader[places] != thread]
        self.reader[shared] = SEVERAL
        if self.writer is None:
            return np.zeros(places.shape, bool)
        writer = self.writer[places]
        return (writer != 0) & (writer != thread)

    def write(self, places: np.ndarray, threads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Record that each thread writes its row of `places`.

        Returns:
            Whether another thread wrote there in this epoch, and whether another read there, of the
            shape of `places`.
        """
        if self.writer is None:
            self.writer = _shadow(len(self.data))
        thread = threads[:, None] + 1
        before = self.writer[places]
        self.writer[places] = thread
        # Of threads that write a byte in this very instruction, one is left as its writer.
        wrote = (before != 0) & (before != thread) | (self.writer[places] != thread)
        if self.reader is None:
            return wrote, np.zeros(places.shape, bool)
        reader = self.reader[places]
        return wrote, (reader != 0) & (reader != thread)


def _shadow(nbytes: int) -> np.ndarray:
    """Return an int32 zero for each byte, in memory that is not reserved.

    For tensors of gigabytes, of which a kernel touches little, these numbers together would be more
    than there is memory.
    """
    if not nbytes:
        return np.zeros(0, np.int32)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return np.frombuffer(mmap.mmap(-1, 4 * nbytes, flags=flags), np.int32)


class _Space:
    """Allocations, and checked access to them.

    Attributes:
        spacing_bits: the logarithm of the distance between two.
        nowhere: how messages call an address outside of every allocation.
        epoch: how messages call the current epoch.
    """

    spacing_bits: int
    nowhere: str
    epoch: str

    def __init__(self) -> None:
        self.allocations: list[Allocation] = []

    def load(
        self, addresses: np.ndarray, width: int, threads: np.ndarray, where: Callable[[int], str]
    ) -> np.ndarray:
        """Return the bytes at each thread's address, (threads, width).

        Args:
            addresses: uint64, one for each thread.
            width: bytes that each accesses, which is also their alignment (PTX ISA 6.4.1).
            threads: numbers that tell threads apart.
            where: describes the thread at an index of these arrays.

        Raises:
            MemoryFault: an access is out of bounds, misaligned, undefined, or in a race.
        """
        result = np.empty((len(addresses), width), np.uint8)
        for allocation, chosen, places in self._places("load", addresses, width, threads, where):
            raced = allocation.read(places, threads[chosen])
            for problem, bad in (
                ("of bytes that nobody wrote", ~allocation.written[places]),
                (f"of bytes that another thread wrote {self.epoch}", raced),
            ):
                if bad.any():
                    at = chosen[np.argmax(bad.any(1))]
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
        """Write each thread's row of `values`, (threads, width) bytes, to its address.

        Raises:
            MemoryFault: an access is out of bounds, misaligned, or in a race.
        """
        width = values.shape[1]
        for allocation, chosen, places in self._places("store", addresses, width, threads, where):
            wrote, read = allocation.write(places, threads[chosen])
            for problem, bad in (
                (f"to bytes that another thread wrote {self.epoch}", wrote),
                (f"to bytes that another thread read {self.epoch}", read),
            ):
                if bad.any():
                    at = chosen[np.argmax(bad.any(1))]
                    self._fault("store", problem, addresses, at, width, where)
            allocation.data[places] = values[chosen]
            allocation.written[places] = True

    def _places(
        self,
        access: str,
        addresses: np.ndarray,
        width: int,
        threads: np.ndarray,
        where: Callable[[int], str],
    ) -> Iterator[tuple[Allocation, np.ndarray, np.ndarray]]:
        """Yield each allocation, the threads that access it, by index, and their bytes in it."""
        misaligned = addresses % np.uint64(width) != 0
        if misaligned.any():
            at = int(np.argmax(misaligned))
            self._fault(access, f"misaligned for {width} bytes", addresses, at, width, where)
        region = (addresses >> np.uint64(self.spacing_bits)).astype(np.int64) - 1
        for r in np.unique(region):
            chosen = np.flatnonzero(region == r)
            if not 0 <= r < len(self.allocations):
                self._fault(access, self.nowhere, addresses, chosen[0], width, where)
            allocation = self.allocations[r]
            offsets = addresses[chosen].astype(np.int64) - allocation.base
            outside = (offsets < 0) | (offsets + width > allocation.size)
            if outside.any():
                at = chosen[np.argmax(outside)]
                self._fault(access, "out of bounds", addresses, at, width, where)
            first = offsets + self._start(allocation, threads[chosen])
            yield allocation, chosen, first[:, None] + np.arange(width)

    def _start(self, allocation: Allocation, threads: np.ndarray) -> np.ndarray | int:
        """Return where the part of an allocation begins that threads see."""
        return 0

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
        """Describe where an address is, from the allocation next to it."""
        if not self.allocations:
            return "there is none"

        def distance(a: Allocation) -> int:
            return max(a.base - address, address - a.end + 1, 0)

        near = min(self.allocations, key=distance)
        extent = f"{near.name!r} ({near.size} bytes)"
        if address < near.base:
            return f"{near.base - address} bytes before the start of {extent}"
        if address >= near.end:
            return f"{address - near.end} bytes past the end of {extent}"
        return f"byte {address - near.base} of {extent}"


class Memory(_Space):
    """Device memory: tensors. Threads have launch-wide numbers."""

    spacing_bits = DEVICE_SPACING_BITS
    nowhere = "outside of every tensor"
    epoch = "in this launch"

    def add(self, name: str, tensor: torch.Tensor, written: bool) -> int:
        """Make the storage of a CPU tensor an allocation, unless it is one.

        Args:
            name: of the allocation, for messages.
            tensor: on the CPU, of any shape and strides. A kernel reads and writes its memory.
            written: whether the elements of the tensor hold values. Other bytes of its storage,
                between rows for instance, never do.

        Returns:
            The address of the tensor's first element.
        """
        storage = tensor.untyped_storage()
        data = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        allocation = self._of(data)
        if allocation is None:
            # Half a spacing above its multiple, so that one below the base is told apart too, and
            # aligned as the storage is on the host.
            number, bits = len(self.allocations) + 1, self.spacing_bits
            base = number << bits | 1 << (bits - 1) | storage.data_ptr() % ALIGNMENT
            allocation = Allocation(name, base, len(data), data, np.zeros(len(data), bool))
            self.allocations.append(allocation)
        if written:
            strides = [n * tensor.itemsize for n in tensor.stride()]
            start = allocation.written[tensor.storage_offset() * tensor.itemsize :]
            np.lib.stride_tricks.as_strided(
                start, (*tensor.shape, tensor.itemsize), (*strides, 1)
            ).fill(True)
        return allocation.base + int(tensor.storage_offset()) * tensor.itemsize

    def _of(self, data: np.ndarray) -> Allocation | None:
        """Return the allocation of these bytes, None if they have none."""
        same = (a for a in self.allocations if len(data) and a.data.ctypes.data == data.ctypes.data)
        return next(same, None)

    def begin_launch(self) -> None:
        """Begin an epoch: forget which threads read and wrote."""
        for allocation in self.allocations:
            allocation.reader = allocation.writer = None


class SharedMemory(_Space):
    """Shared memory of some blocks: variables, of which each block has its own.

    Threads are numbered block after block.

    Args:
        variables: names, addresses and sizes.
        blocks: how many there are.
        threads: of a block.
    """

    spacing_bits = SHARED_SPACING_BITS
    nowhere = "outside of every shared variable"
    epoch = "since the last barrier"

    def __init__(self, variables: Iterable[tuple[str, int, int]], blocks: int, threads: int):
        super().__init__()
        self.blocks = blocks
        self.threads = threads
        for name, address, size in variables:
            data, written = np.zeros(blocks * size, np.uint8), np.zeros(blocks * size, bool)
            self.allocations.append(Allocation(name, address, size, data, written))

    def _start(self, allocation: Allocation, threads: np.ndarray) -> np.ndarray:
        return threads // self.threads * allocation.size

    def end_epoch(self, blocks: np.ndarray) -> None:
        """Begin an epoch of the blocks at a barrier; `blocks`, (blocks,), is true for them."""
        for allocation in self.allocations:
            for shadow in (allocation.reader, allocation.writer):
                if shadow is not None:
                    shadow.reshape(self.blocks, -1)[blocks] = 0


def shared_address(number: int, alignment: int) -> int:
    """Return the address of the shared variable of a number, aligned as declared and no better."""
    return number + 1 << SHARED_SPACING_BITS | 1 << (SHARED_SPACING_BITS - 1) | alignment
