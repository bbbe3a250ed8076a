"""Philox 4x32-10 in registers: `cute_quant.contract.philox`, for a thread's part of a row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Int32, Uint32, Uint64

from cute_quant.contract.philox import (
    COLUMN_DRAWS,
    KEY_STEPS,
    MULTIPLIERS,
    OFFSET_SHIFT,
    ROUNDS,
    VALUES_PER_CALL,
)
from cute_quant.kernels.config import LANES
from cute_quant.kernels.copy import Segment
from cute_quant.kernels.params import Params


class Random(NamedTuple):
    """A random word for each element of a row of the result.

    Attributes:
        key: the seed, low word first.
        first, last: words of the counter that the offset has a part in: that of columns, and the
            fourth.
        row, matrix: the other two.
    """

    key: tuple[Uint32, Uint32]
    first: Uint32
    last: Uint32
    row: Uint32
    matrix: Uint32

    @property
    def of_columns(self) -> Random:
        """Return the words that the same row has for groups along rows."""
        return self._replace(row=self.row | Uint32(COLUMN_DRAWS))

    def words(self, segment: Segment, values: int) -> list[Uint32]:
        """Return a word for each of a thread's `values`, a multiple of ``VALUES_PER_CALL``."""
        words = []
        for call in self._calls(segment, values):
            for word in call:
                words += [word << 16 | word >> 16, word]
        return words

    def pairs(self, segment: Segment, values: int) -> list[Uint32]:
        """Return a word for each two of a thread's `values`, from which `word_of` takes theirs."""
        return [word for call in self._calls(segment, values) for word in call]

    def _calls(
        self, segment: Segment, values: int
    ) -> Iterator[tuple[Uint32, Uint32, Uint32, Uint32]]:
        """Yield the words of each ``VALUES_PER_CALL`` of a thread's values."""
        calls = values // VALUES_PER_CALL
        octet = Uint32(segment.tile * LANES + segment.lane) * calls + self.first
        for i in range(calls):
            yield self._call(octet + i)

    def _call(self, octet: Uint32) -> tuple[Uint32, Uint32, Uint32, Uint32]:
        """Return the four words of a counter."""
        (k0, k1), a, b, c, d = self.key, octet, self.row, self.matrix, self.last
        for _ in range(ROUNDS):
            p0, p1 = (Uint64(x) * Uint64(m) for x, m in zip((a, c), MULTIPLIERS, strict=True))
            a, b = Uint32(p1 >> 32) ^ b ^ k0, Uint32(p1)
            c, d = Uint32(p0 >> 32) ^ d ^ k1, Uint32(p0)
            k0, k1 = (k + Uint32(step) for k, step in zip((k0, k1), KEY_STEPS, strict=True))
        return a, b, c, d


def word_of(pairs: list[Uint32], i: int) -> Uint32:
    """Return the word of a thread's value, of those of `Random.pairs`."""
    word = pairs[i // 2]
    return word if i % 2 else word << 16 | word >> 16


def words_of(random: Random | None, segment: Segment, tXrV: cute.Tensor) -> list[Uint32] | None:
    """Return a random word for each value of a thread's segment, None without random numbers."""
    return None if random is None else random.words(segment, cute.size(tXrV))


class RngState(Params):
    """Seed and offset, as an argument of a kernel.

    Attributes:
        tensor: (2,), int64.
        matrix: of a batch, None for the only one.
    """

    def __init__(self, tensor: cute.Tensor):
        self.tensor = tensor
        self.matrix = None

    def slice_batch(self, batch: Int32) -> RngState:
        """Return that of one matrix of a batch."""
        return self.replace(matrix=batch)

    def of_row(self, row: Uint32) -> Random:
        """Read the state, for a row of the result."""
        seed, offset = Uint64(self.tensor[0]), Uint64(self.tensor[1])
        return Random(
            key=(Uint32(seed), Uint32(seed >> 32)),
            first=Uint32(offset >> 32) << OFFSET_SHIFT,
            last=Uint32(offset),
            row=row,
            matrix=Uint32(0 if self.matrix is None else self.matrix),
        )
