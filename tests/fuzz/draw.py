"""Random calls that the contract allows: any operation, domain, stride, offset and storage.

What a kernel is compiled for comes from a limited number of combinations, since each takes a while
to compile; each gets many shapes, strides, places in memory, counts and indices.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch

from cute_quant.contract.dtypes import align
from cute_quant.contract.prologues import SILU_ROUNDINGS
from cute_quant.contract.rows import DENSE, Indexed, Masked, PrefixSum
from cute_quant.contract.upper_scales import AMAX, ENCODE
from cute_quant.contract.upper_scales import KINDS as UPPER_KINDS
from cute_quant.kernels.config import DEFAULT_TILE
from cute_quant.kernels.scheduler import EXPERTS_PER_CHUNK
from tests.fuzz.case import Case, Kernel, Place
from tests.helpers import E2M1, INPUT_DTYPES, all_formats

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
GUARD_BYTES = 256
BASE_BYTES = 64
"""Alignment of every allocation."""

DOMAINS = [
    *((DENSE, gathered, batched) for gathered in (False, True) for batched in (False, True)),
    *((Masked.kind, gathered, True) for gathered in (False, True)),
    *((kind, g, False) for kind in (PrefixSum.kind, Indexed.kind) for g in (False, True)),
]
DENSE_DOMAINS = [(DENSE, False, False), (DENSE, False, True)]
BATCH_SHAPES = [(1,), (2,), (3,), (5,), (2, 3), (1, 4), (4, 1), (2, 1, 2), (1, 1)]
SMALL, TINY = 40_000, 300
"""Elements of most cases, and of those for which there is little time."""


class Deck:
    """Values in random order, each of them once before any is drawn again."""

    def __init__(self, values: Sequence, generator: random.Random):
        self.values, self.generator, self.left = list(values), generator, []

    def draw(self) -> object:
        if not self.left:
            self.left = self.values.copy()
            self.generator.shuffle(self.left)
        return self.left.pop()


def powers_of_two(low: int, high: int) -> list[int]:
    return [1 << i for i in range(low.bit_length() - 1, high.bit_length())]


def draw_kernels(count: int, operation: str, seed: int) -> list[Kernel]:
    """Draw kernels; each choice comes up once before it does again."""
    generator = random.Random(f"{seed} {operation}")

    def deck(values: Sequence) -> Deck:
        return Deck(values, generator)

    formats, dtypes, ragged = deck(all_formats()), deck(INPUT_DTYPES), deck((False, True))
    fake = operation == "fake_quantize"
    domains = deck(DENSE_DOMAINS if fake else DOMAINS)
    loads = {size: deck(powers_of_two(size, 32)) for size in (2, 4)}
    stores = {size: deck(powers_of_two(size, 16 if size == 1 else 32)) for size in (1, 2, 4)}
    uppers = deck(UPPER_KINDS)
    options = {name: deck(values) for name, values in OPTIONS.get(operation, {}).items()}
    kernels = []
    for _ in range(count):
        dtype = dtypes.draw()
        size = dtype.itemsize
        accesses = loads[size].draw(), stores[size if fake else 1].draw(), ragged.draw()
        domain, fmt = domains.draw(), formats.draw()
        dense = domain[:2] == (DENSE, False)
        chosen = {
            name: choice.draw() if dense or name not in DENSE_OPTIONS else None
            for name, choice in options.items()
        }
        upper = uppers.draw() if fmt.upper_scale and not fmt.row_scale else None
        chosen_in = tuple(chosen.items())
        kernels.append(Kernel(dtype, fmt, *domain, *accesses, operation, chosen_in, upper))
    return kernels


OPTIONS = {
    "silu_mul": {"interleaved": (False, True), "rounding": SILU_ROUNDINGS},
    "rms_norm": {
        "rounding": ("fused", "unfused", "huggingface", "vllm"),
        "weight_dtype": ("x", "float32"),
        "residual": (None, "in place", "elsewhere"),
        "normalized": (None, "given"),
    },
}
"""Options of prologues that choose a kernel, besides their numbers and the weight of SiLU."""

DENSE_OPTIONS = ("residual", "normalized")
"""Those of dense rows alone: rows of these that do not exist would not be defined."""


class Draw:
    """A generator of cases for one kernel.

    Args:
        elements: of the input, most of the time at most.
    """

    def __init__(self, kernel: Kernel, seed: object, elements: int = SMALL):
        self.kernel = kernel
        self.generator = random.Random(f"{seed} {kernel}")
        self.elements = elements

    def chance(self, probability: float) -> bool:
        return self.generator.random() < probability

    def between(self, low: int, high: int) -> int:
        return self.generator.randint(low, high)

    def any_of(self, values: Sequence) -> object:
        return self.generator.choice(values)

    def case(self) -> Case:
        """Draw a case: most are small, some are wide, tall, or have many matrices."""
        batched, tiny = self.kernel.batched, self.elements <= TINY
        budget = self.elements
        kind = "tiny" if tiny else self.any_of(["small"] * 6 + ["wide", "tall", "deep"])
        batch_shape = self.any_of(BATCH_SHAPES) if batched else ()
        if self.kernel.kind == Masked.kind or self.kernel.gathered:
            batch_shape = batch_shape[:1]
        if kind == "deep" and batched:
            batch_shape = (self.between(6, 2 * EXPERTS_PER_CHUNK + 3),)
        matrices = math.prod(batch_shape)
        k = self.columns({"tiny": 70, "small": 1300, "wide": 9000, "tall": 48, "deep": 48}[kind])
        mn = self.between(1, max(1, min(budget // (matrices * k), 9 if tiny else 2000)))
        if self.chance(0.3):
            mn = min(mn, self.any_of([1, 2, 3, 4, 5, 8, 127, 128, 129]))
        if self.chance(0.03):
            match self.any_of(["batch", "mn", "k"]):
                case "batch" if batched:
                    batch_shape = (0, *batch_shape[1:])
                case "k" if not self.kernel.ragged:
                    k = 0
                case _:
                    mn = 0
        return self.finish(batch_shape, mn, k)

    def columns(self, limit: int) -> int:
        if self.kernel.ragged:
            tile = self.any_of([16, 16, 64, DEFAULT_TILE.columns])
            k = tile * self.between(0, limit // tile) + self.any_of([1, 2, 8, 15, tile - 1])
            k = k if k % 16 else k + self.between(1, 15)
            if self.kernel.fmt.values is E2M1 and k % 2:
                k += 1 if (k + 1) % 16 else -1
            return k
        tile = self.any_of([16, 16, 64, 128, DEFAULT_TILE.columns])
        return max(tile * self.between(0, limit // tile) + 16 * self.between(-1, 1), 16)

    def finish(self, batch_shape: tuple[int, ...], mn: int, k: int) -> Case:
        """Draw a case of this shape."""
        kernel, fmt = self.kernel, self.kernel.fmt
        places, contents = {}, {}
        columns = 2 * k if kernel.operation == "silu_mul" else k
        if kernel.gathered:
            tokens = self.between(0 if self.chance(0.05) else 1, max(1, min(mn, 40)))
            places["x"] = self.matrix(kernel.dtype, (tokens, columns), kernel.load_bytes, True)
            shape = (*batch_shape, mn)
            places["index"] = self.vector(shape)
            contents["index"] = self.numbers(math.prod(shape), -1, tokens)
        else:
            shape = (*batch_shape, mn, columns)
            places["x"] = self.matrix(kernel.dtype, shape, kernel.load_bytes, True)
        alignment = 1
        if kernel.kind != DENSE:
            contents["counts"], alignment = self.counts(batch_shape, mn)
            places["counts"] = self.vector((len(contents["counts"]),))
        masked = kernel.kind == Masked.kind
        extra_rows = 0 if masked or kernel.fake else self.any_of([0, 0, 0, 1, 2, 5, 130])
        q_rows = mn + (min(extra_rows, 2) if self.elements <= TINY else extra_rows)
        dtype = kernel.dtype if kernel.fake else fmt.values
        # What is allocated is not all defined where rows are masked. Where it starts at multiples
        # of other numbers than the kernel's, another one is compiled, so mostly it does not.
        columns = k if kernel.fake else fmt.value_columns(k)
        most = min(16 * dtype.itemsize * columns // max(k, 1), 32)
        same_kernel = kernel.store_bytes == most and not kernel.ragged
        given = self.chance(0.5 if same_kernel else 0.98)
        if masked or self.elements <= TINY or given:
            shape = (*batch_shape, q_rows, columns)
            places["q"] = self.matrix(dtype, shape, kernel.store_bytes, False)
        if not kernel.fake and (masked or self.elements <= TINY or self.chance(0.85)):
            places["sf"] = self.scales(batch_shape, mn, k)
            if fmt.row_scale:
                places["row_scales"] = self.vector((*batch_shape, mn), torch.float32)
        if kernel.upper is not None:
            shape = self.any_of([(), (1,), batch_shape])
            places["upper"] = self.vector(shape, torch.float32)
            contents["upper"] = self.upper_scales(math.prod(shape), kernel.upper)
        numbers = self.prologue(places, batch_shape, mn, k)
        return Case(
            kernel,
            places,
            contents,
            batch_shape,
            mn,
            k,
            alignment,
            fmt.replace(min_scale=self.min_scale()),
            numbers,
            seed=self.between(0, 2**31),
            special=self.chance(0.5),
        )

    def prologue(
        self, places: dict[str, Place], batch_shape: tuple[int, ...], mn: int, k: int
    ) -> dict[str, float | None]:
        """Draw places of a prologue's tensors, and its numbers."""
        kernel = self.kernel
        match kernel.operation:
            case "silu_mul":
                if self.chance(0.5):
                    places["weight"] = self.vector((*batch_shape, mn), torch.float32)
                return {
                    "clamp": self.any_of([None, None, 0.3, 7.0, 1e30]),
                    "alpha": self.any_of([1.0, 1.0, 1.702, -2.5, 0.0]),
                    "beta": self.any_of([0.0, 0.0, 1.0, -1e-3]),
                }
            case "rms_norm":
                as_x = kernel.option("weight_dtype") == "x"
                places["weight"] = self.vector((k,), kernel.dtype if as_x else torch.float32)
                shape = (*batch_shape, mn, k)
                names = []
                if kernel.option("residual"):
                    elsewhere = kernel.option("residual") == "elsewhere"
                    names += ["residual", *(["residual_out"] if elsewhere else [])]
                names += ["normalized"] if kernel.option("normalized") else []
                for name in names:
                    nbytes = self.any_of(powers_of_two(kernel.load_bytes, 32))
                    places[name] = self.matrix(kernel.dtype, shape, nbytes, False)
                # Roundings of libraries have no offset.
                offsets = [0.0, 0.0, 1.0, -0.25]
                if kernel.option("rounding") not in ("fused", "unfused"):
                    offsets = [0.0]
                return {
                    "eps": self.any_of([1e-6, 1e-6, 0.1, 1e-5]),
                    "weight_offset": self.any_of(offsets),
                }
        return {}

    def matrix(
        self, dtype: torch.dtype, shape: tuple[int, ...], nbytes: int, overlapping: bool
    ) -> Place:
        """Draw a place for (..., rows, k) whose rows are aligned to `nbytes` and no more.

        Args:
            overlapping: whether elements may share their memory.
        """
        *batch_shape, rows, k = shape
        step = nbytes // dtype.itemsize
        matrices = math.prod(batch_shape)
        padding = step * self.any_of([0, 0, 1, 2, 7])
        row = align(k, step) + padding
        batch = rows * row + step * self.any_of([0, 0, 1, 5])
        if self.chance(0.2):  # the batch inside of the rows
            batch, row = row, max(matrices, 1) * row + step * self.any_of([0, 0, 1, 5])
        if overlapping and self.chance(0.2):
            row = step * self.between(0, row // step)
        if overlapping and self.chance(0.2):
            batch = step * self.between(0, batch // step)
        if overlapping and self.chance(0.1):
            row = 0
        if overlapping and self.chance(0.1):
            batch = 0
        strides = self.batch_strides(batch_shape, batch)
        strides += (row if rows > 1 else self.unused_stride(row),)
        strides += (1 if k > 1 else self.unused_stride(1),)
        return self.place(dtype, shape, strides, nbytes)

    def batch_strides(self, batch_shape: Sequence[int], stride: int) -> tuple[int, ...]:
        strides = []
        for size in reversed(batch_shape):
            strides.append(stride if size != 1 else self.unused_stride(stride))
            stride *= size
        return tuple(reversed(strides))

    def unused_stride(self, stride: int) -> int:
        """Draw a stride for a dimension of size 1, which may have any."""
        return stride if self.chance(0.6) else self.any_of([0, 1, 3, 77, 12_345, 2**33 + 1])

    def scales(self, batch_shape: tuple[int, ...], mn: int, k: int) -> Place:
        fmt = self.kernel.fmt
        shape = fmt.scale_shape(batch_shape, mn, k)
        strides = fmt.scale_strides(batch_shape, mn, k)
        padding = fmt.scale_rows(mn) - mn if fmt.mn_major and math.prod(shape) else 0
        strides = tuple(
            stride if size != 1 else self.unused_stride(stride)
            for size, stride in zip(shape, strides, strict=True)
        )
        # The storage ends with the last row, in its padding, with it, or much later.
        after = self.any_of([0, 0, padding // 2, padding, padding, padding + 40])
        return self.place(fmt.sf_dtype, shape, strides, fmt.sf_dtype.itemsize, after)

    def vector(self, shape: tuple[int, ...], dtype: torch.dtype = torch.int32) -> Place:
        strides = [1] * bool(shape)
        for size in reversed(shape[1:]):
            strides.append(strides[-1] * size)
        strides = (
            stride if size != 1 else self.unused_stride(stride)
            for size, stride in zip(shape, reversed(strides), strict=True)
        )
        return self.place(dtype, shape, tuple(strides), dtype.itemsize)

    def place(
        self,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        nbytes: int,
        elements_after: int | None = None,
    ) -> Place:
        """Draw a place in a new arena.

        Args:
            nbytes: the alignment of the address; it has no larger one up to 32.
            elements_after: in the storage, after the last element of the tensor.
        """
        size = dtype.itemsize
        address = GUARD_BYTES + nbytes * (2 * self.between(0, 4) + 1)
        offset = self.any_of([0, 0, 1, 8, 40])
        start = address - offset * size
        if elements_after is None:
            elements_after = self.any_of([0, 0, 1, 50])
        extent = 0
        if math.prod(shape):
            extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        end = address + (extent + elements_after) * size
        return Place(dtype, shape, strides, offset, start, end, align(end, 4) + GUARD_BYTES)

    def numbers(self, count: int, low: int, high: int) -> list[int]:
        """Draw numbers from `low` to `high`, in some cases with a few out of range."""
        numbers = [self.between(low, high) for _ in range(count)]
        if count and self.chance(0.4):
            for value in (INT32_MIN, INT32_MAX, low - 1, high + 3):
                numbers[self.between(0, count - 1)] = value
        return numbers

    def counts(self, batch_shape: tuple[int, ...], mn: int) -> tuple[list[int], int]:
        """Draw the counts of the row domain, and its alignment."""
        match self.kernel.kind:
            case Masked.kind:
                counts = self.numbers(batch_shape[0], 0, mn)
                if self.chance(0.3):  # few live ones
                    counts = [count if self.chance(0.1) else 0 for count in counts]
                return counts, 1
            case Indexed.kind:
                return self.numbers(mn, self.any_of([-1, -30]), 30), 1
        groups = self.any_of([0, 1, 2, 5, 31, 32, 33, 70])
        alignment = self.any_of([1, 1, 2, 3, 4, 16, 128, 1000, INT32_MAX])
        ends = self.numbers(groups, 0, mn)
        return sorted(ends) if self.chance(0.8) else ends, alignment

    def upper_scales(self, count: int, kind: str) -> list[float]:
        """Draw upper scales, most of which fit the values, and a few that are out of range."""
        special = [0.0, -1.0, math.nan, math.inf, 2.0**-149, 2.0**-117, 2.0**117, 3.0e38]
        scales = []
        for _ in range(count):
            amax = 2.0 ** self.generator.uniform(-12, 12)
            likely = {AMAX: amax, ENCODE: 2688 / amax}.get(kind, amax / 2688)
            scales.append(self.any_of(special) if self.chance(0.1) else likely)
        return scales

    def min_scale(self) -> float | str | None:
        if self.kernel.fmt.upper_scale:
            return self.any_of([None, None, "deepgemm", "torchao", 2.0**-7, 0.3, 448.0])
        if self.chance(0.4):
            return self.any_of([1e-10, "vllm", "deepgemm", "sglang"])
        values = [2.0**-126, 1e-4, 1.0, 3.0, 2.0**100, 2.0 ** self.between(-30, 10)]
        return self.any_of(
            values + ([0.0, "ocp", 2.0**-149, 3e-39] if self.kernel.fmt.ue8m0 else [])
        )
