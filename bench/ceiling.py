"""The ceiling of a traffic at a size: the fastest of the kernels that only move its bytes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from bench import stream
from bench.stream import BulkStream, Stream, Traffic
from cute_quant.jit import lookup
from cute_quant.kernels import architectures
from cute_quant.lab import timing

DEVICE = "cuda"

REPLAYS = 5
"""Replays of each kernel of the family: the fastest is measured again beside what it bounds."""

ELEMENTS = 16
"""Elements of a `Traffic`."""


class Words(NamedTuple):
    """Memory of a call.

    Attributes:
        traffic: of 16 elements.
        x: int32 words to be read, (loads words_in vectors,).
        y: int32 words to be written, (stores words_out vectors,).
    """

    traffic: Traffic
    x: torch.Tensor
    y: torch.Tensor


def allocate(traffic: Traffic, elements: int) -> Words:
    """Return memory for the traffic of so many elements, rounded up to a whole number of 16."""
    vectors = -(-elements // ELEMENTS)
    size = vectors * traffic.loads * traffic.words_in
    x = torch.randint(2**31 - 1, (size,), dtype=torch.int32, device=DEVICE)
    return Words(traffic, x, x.new_empty(vectors * traffic.stores * traffic.words_out))


class Ceiling:
    """The fastest kernel of the family for a traffic and a size.

    Args:
        memory: of the calls, all of one traffic and size.
        pdl: whether launches are programmatic dependent ones.
        kernel: its place in the family, where another process found it; None to find it.

    Attributes:
        kernel: its place in the family.
        spec: its compile-time choices.

    Raises:
        RuntimeError: a kernel moves other words.
    """

    def __init__(self, memory: Sequence[Words], *, pdl: bool = True, kernel: int | None = None):
        self.memory = memory
        traffic, x, y = memory[0]
        device = torch.cuda.current_device()
        self.arch = lookup.architecture(device)
        family = list(stream.family(pdl, traffic, lookup.multiprocessors(device)))
        if kernel is None:
            vectors = x.numel() // (traffic.loads * traffic.words_in)
            kernel = self.fastest(family, vectors, timing.launch_count(x.nbytes + y.nbytes))
        self.kernel = kernel
        self.spec: Stream | BulkStream = family[kernel]
        self.check(self.spec)

    def fastest(self, family: Sequence[Stream | BulkStream], vectors: int, launches: int) -> int:
        """Return the place of the fastest kernel for so many vectors."""
        graphs = {}
        for place, spec in enumerate(family):
            bulk = isinstance(spec, BulkStream) and not architectures.named(self.arch).pdl
            if spec.fits(vectors) and not bulk:
                self.check(spec)
                calls = [self.bind(spec, words) for words in self.memory]
                graphs[place] = timing.capture(calls, launches)
        measured = timing.measure(graphs, REPLAYS)
        return min(measured, key=lambda place: measured[place].median)

    def calls(self) -> list[Callable[[], None]]:
        """Return calls of the kernel on each memory."""
        return [self.bind(self.spec, words) for words in self.memory]

    def bind(self, spec: Stream | BulkStream, words: Words) -> Callable[[], None]:
        """Return a call of a kernel."""
        return functools.partial(stream.function(spec, self.arch), words.x, words.y)

    def check(self, spec: Stream | BulkStream) -> None:
        """Check that a kernel moves every word."""
        words = self.memory[-1]
        words.y.fill_(-1)
        self.bind(spec, words)()
        expected = spec.expected(words.x)
        if not torch.equal(words.y.view_as(expected), expected):
            raise RuntimeError(f"{spec}: moves other words")
