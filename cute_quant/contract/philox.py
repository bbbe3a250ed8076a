"""Philox 4x32-10, the random numbers of stochastic rounding (Salmon et al., SC 2011), in torch.

A random word belongs to an element by its place in the result and to a call by its state, whatever
computes it: columns 8 i to 8 i + 7 of a row have the four words of one counter, two columns each.
"""

from __future__ import annotations

import torch

ROUNDS = 10
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_STEPS = 0x9E3779B9, 0xBB67AE85
VALUES_PER_CALL = 8
"""Values that share the four words of a counter, two of them a word."""
OFFSET_SHIFT = 17
"""Bits of a counter's first word below those of the offset: they number the octets of a row."""
COLUMN_DRAWS = 2**31
"""Added to the row of a counter where groups lie along rows: no row has such an index."""
WORD = 0xFFFFFFFF

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def random_words(counter: Words, key: tuple[torch.Tensor, torch.Tensor]) -> Words:
    """Return the four random words of counters; all of them are int64 from 0 to 2^32 - 1."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # Products wrap around, and keep the bits of unsigned ones.
        p0, p1 = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b = (p1 >> 32 & WORD) ^ b ^ k0, p1 & WORD
        c, d = (p0 >> 32 & WORD) ^ d ^ k1, p0 & WORD
        k0, k1 = k0 + KEY_STEPS[0] & WORD, k1 + KEY_STEPS[1] & WORD
    return a, b, c, d


def random_of_elements(
    rng_state: torch.Tensor, batch: int, mn: int, k: int, first_row: int = 0
) -> torch.Tensor:
    """Return a random word for each element of a result.

    The counter is ``(c // 8 + 2^17 * (offset >> 32), row, matrix, offset)`` for column c, the key
    the seed, low words first. An odd column takes a word as it is, an even one its halves swapped.
    Groups along rows have other words than groups along k: 2^31 is added to the row.

    Args:
        rng_state: (2,), int64, the seed and the offset.
        batch: matrices of the result.
        mn: rows of each.
        k: columns.
        first_row: what the first row counts as: 0, or ``COLUMN_DRAWS`` for groups along rows.

    Returns:
        (batch, mn, k), int64 from 0 to 2^32 - 1.
    """
    seed, offset = rng_state[0], rng_state[1]

    def numbers(count: int, *shape: int) -> torch.Tensor:
        return torch.arange(count, device=rng_state.device).view(shape)

    octets = -(-k // VALUES_PER_CALL)
    first = numbers(octets, 1, 1, -1) + (offset >> 32 << OFFSET_SHIFT) & WORD
    row = numbers(mn, 1, -1, 1) + first_row
    counter = first, row, numbers(batch, -1, 1, 1), offset & WORD
    words = torch.stack(random_words(counter, (seed & WORD, seed >> 32 & WORD)), -1)
    swapped = (words << 16 | words >> 16) & WORD
    return torch.stack((swapped, words), -1).flatten(-3)[..., :k]
