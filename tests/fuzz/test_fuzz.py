"""Random calls: a GPU against the reference on the CPU, in memory with guards around each tensor.

    FUZZ_CASES=20000 FUZZ_SEED=7 pytest tests/test_fuzz.py -m gpu

What a kernel is compiled for comes from a limited number of combinations, since each takes a while
to compile; each gets many shapes, strides, places in memory, counts and indices. Every tensor lies
in an arena of its own. The arenas are compared as a whole, so a byte that is wrongly written
anywhere shows, and NaN lies where nothing may be read. On the CPU the same generator draws tiny
cases, whose expected bytes are those of `oracle`.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch

from cute_quant import dequantize, fake_quantize, quantize
from cute_quant.contract.dtypes import align
from cute_quant.contract.format_choices import BLOCKED, MN_MAJOR, MN_MAJOR_PACKED, ROW_MAJOR
from cute_quant.contract.formats import Format
from cute_quant.contract.rows import (
    DENSE,
    Indexed,
    Masked,
    PrefixSum,
    RowOperands,
    from_operands,
)
from cute_quant.kernels.config import DEFAULT_TILE, MAX_GRID_Y, MAX_GRID_Z
from cute_quant.kernels.heuristics import TWO_ROWS_FROM
from cute_quant.kernels.scheduler import EXPERTS_PER_CHUNK
from tests.contract.test_inputs import live_sources
from tests.helpers import (
    EVERY_DTYPE,
    INPUT_DTYPES,
    POISON,
    all_formats,
    oracle_choices,
    random_bits,
    storage_bits,
)
from tests.oracle import expected_bytes

SEED = int(os.environ.get("FUZZ_SEED", 0))
CASES = int(os.environ.get("FUZZ_CASES", 4000))
KERNELS, FAKES, DEQUANTIZATIONS = 150, 30, 40
CASES_PER_KERNEL = -(-CASES // (KERNELS + FAKES + DEQUANTIZATIONS))
CASES_ON_CPU = 3
KERNELS_ON_CPU = 60

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
GUARD_BYTES = 256
BASE_BYTES = 64
"""Alignment of every allocation."""

DOMAINS = [
    *((DENSE, gathered, batched) for gathered in (False, True) for batched in (False, True)),
    *((Masked.kind, gathered, True) for gathered in (False, True)),
    *((kind, g, False) for kind in (PrefixSum.kind, Indexed.kind) for g in (False, True)),
]
BATCH_SHAPES = [(1,), (2,), (3,), (5,), (2, 3), (1, 4), (4, 1), (2, 1, 2), (1, 1)]


@dataclass(frozen=True)
class Kernel:
    """The choices that a kernel is compiled for.

    Attributes:
        dtype: of x.
        kind: of the row domain.
        gathered: whether there is an index.
        load_bytes, store_bytes: alignment of the rows of x and of the result.
        ragged: whether k is no multiple of the values of a thread.
        fake: whether it is that of `fake_quantize`.
    """

    dtype: torch.dtype
    fmt: Format
    kind: str
    gathered: bool
    batched: bool
    load_bytes: int
    store_bytes: int
    ragged: bool
    fake: bool = False

    def __str__(self) -> str:
        parts = [
            str(self.dtype).removeprefix("torch."),
            str(self.fmt),
            self.kind,
            *(["index"] if self.gathered else []),
            *(["batch"] if self.batched else []),
            f"{self.load_bytes}to{self.store_bytes}",
            *(["ragged"] if self.ragged else []),
        ]
        return "-".join(parts)


@dataclass(frozen=True)
class Place:
    """The memory of a tensor: its storage is bytes [start, end) of an arena of `nbytes`.

    Attributes:
        offset: of the first element in the storage, in elements.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    start: int
    end: int
    nbytes: int

    def view(self, arena: torch.Tensor) -> torch.Tensor:
        storage = arena.untyped_storage()[self.start : self.end]
        empty = torch.empty(0, dtype=self.dtype, device=arena.device)
        return empty.set_(storage, self.offset, self.shape, self.strides)

    def elements(self) -> torch.Tensor:
        """Return the elements of the arena that the tensor covers, in the tensor's order."""
        last = self.start // self.dtype.itemsize + self.offset
        last += sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True) if n)
        numbers = torch.arange(last + 1 if math.prod(self.shape) else 0)
        if not len(numbers):
            return numbers
        first = self.start // self.dtype.itemsize + self.offset
        return numbers.as_strided(self.shape, self.strides, first).flatten()


@dataclass(frozen=True)
class Case:
    """A call of `quantize` or `fake_quantize`.

    Attributes:
        places: of "x", "q", "sf", "counts" and "index"; results that are not here get allocated.
        contents: of counts and index.
        mn: rows of the result.
        fmt: the kernel's, with the smallest scale of the call.
        seed: of the values of x.
        special: whether among them are NaN and Inf.
    """

    kernel: Kernel
    places: dict[str, Place]
    contents: dict[str, list[int]]
    batch_shape: tuple[int, ...]
    mn: int
    alignment: int
    fmt: Format
    seed: int
    special: bool

    def arenas(self) -> dict[str, torch.Tensor]:
        """Return the memory before the call, on the CPU."""
        return {name: self._arena(name, place) for name, place in self.places.items()}

    def _arena(self, name: str, place: Place) -> torch.Tensor:
        arena = torch.full((place.nbytes,), POISON, dtype=torch.uint8)
        if name == "x":
            own = place.elements()
            typed = arena.fill_(0xFF).view(place.dtype)  # NaN
            typed[own] = values(len(typed), place.dtype, self.seed, self.special)[own]
        elif name in self.contents:
            # What lies beside them would make more rows live.
            arena.view(torch.int32).fill_(0 if name == "index" else self.mn)
            contents = torch.tensor(self.contents[name], dtype=torch.int32)
            arena.view(torch.int32)[place.elements()] = contents
        return arena

    def call(self, arenas: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Run the call and return its results; those that have a place are views of the arenas."""
        tensors = {name: place.view(arenas[name]) for name, place in self.places.items()}
        x, q, sf = (tensors.get(name) for name in ("x", "q", "sf"))
        if self.kernel.fake:
            return (fake_quantize(x, self.fmt, out=q),)
        rows = from_operands(RowOperands(self.kernel.kind, tensors.get("counts"), self.alignment))
        out = None if q is None and sf is None else (q, sf)
        return quantize(x, self.fmt, rows=rows, index=tensors.get("index"), out=out)


def values(count: int, dtype: torch.dtype, seed: int, special: bool) -> torch.Tensor:
    """Return values in pieces of random kinds.

    They are any finite bits, normal distributions of any scale, zeros of both signs, and, if
    `special`, any bits and single NaN and Inf.
    """
    generator = torch.Generator().manual_seed(seed)

    def integers(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator)

    length = (5, 16, 37, 128, 600)[seed % 5]
    pieces = -(-count // length)
    kinds = integers(12 if special else 10, pieces, 1)
    anything = random_bits((pieces, length), dtype, seed)
    normal = torch.randn(pieces, length, generator=generator)
    exponents = integers(24, pieces, 1) - 14
    x = torch.where(kinds < 7, normal, normal * 2.0**exponents).to(dtype)
    x = torch.where(kinds < 3, anything.where(anything.isfinite(), 1.0), x)
    x = torch.where(kinds == 3, torch.zeros((), dtype=dtype).copysign(x), x)
    x = torch.where(kinds == 10, anything, x)
    if special:
        single = (kinds == 11) & (torch.arange(length) == integers(length, pieces, 1))
        choices = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)
        x = torch.where(single, choices[integers(3, pieces, 1)], x)
    return x.flatten()[:count]


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


def draw_kernels(count: int, fake: bool) -> list[Kernel]:
    generator = random.Random(f"{SEED} {fake}")

    def deck(values: Sequence) -> Deck:
        return Deck(values, generator)

    formats, dtypes, ragged = deck(all_formats()), deck(INPUT_DTYPES), deck((False, True))
    fakes = [(DENSE, False, False), (DENSE, False, True)]
    domains = deck(fakes if fake else DOMAINS)
    loads = {size: deck(powers_of_two(size, 32)) for size in (2, 4)}
    stores = {size: deck(powers_of_two(size, 16 if size == 1 else 32)) for size in (1, 2, 4)}
    kernels = []
    for _ in range(count):
        dtype = dtypes.draw()
        size = dtype.itemsize
        accesses = loads[size].draw(), stores[size if fake else 1].draw(), ragged.draw()
        kernels.append(Kernel(dtype, formats.draw(), *domains.draw(), *accesses, fake))
    return kernels


class Draw:
    """A generator of cases for one kernel.

    Args:
        size: "tiny", which the oracle has time for, or "small".
    """

    def __init__(self, kernel: Kernel, seed: object, size: str = "small"):
        self.kernel = kernel
        self.generator = random.Random(f"{SEED} {kernel} {seed}")
        self.size = size

    def chance(self, probability: float) -> bool:
        return self.generator.random() < probability

    def between(self, low: int, high: int) -> int:
        return self.generator.randint(low, high)

    def any_of(self, values: Sequence) -> object:
        return self.generator.choice(values)

    def case(self) -> Case:
        """Draw a case: most are small, some are wide, tall, or have many matrices."""
        batched, tiny = self.kernel.batched, self.size == "tiny"
        budget = 300 if tiny else 40_000
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
            return k if k % 16 else k + self.between(1, 15)
        tile = self.any_of([16, 16, 64, 128, DEFAULT_TILE.columns])
        return max(tile * self.between(0, limit // tile) + 16 * self.between(-1, 1), 16)

    def finish(self, batch_shape: tuple[int, ...], mn: int, k: int) -> Case:
        """Draw a case of this shape."""
        kernel, fmt = self.kernel, self.kernel.fmt
        places, contents = {}, {}
        if kernel.gathered:
            tokens = self.between(0 if self.chance(0.05) else 1, max(1, min(mn, 40)))
            places["x"] = self.matrix(kernel.dtype, (tokens, k), kernel.load_bytes, True)
            shape = (*batch_shape, mn)
            places["index"] = self.vector(shape)
            contents["index"] = self.numbers(math.prod(shape), -1, tokens)
        else:
            shape = (*batch_shape, mn, k)
            places["x"] = self.matrix(kernel.dtype, shape, kernel.load_bytes, True)
        alignment = 1
        if kernel.kind != DENSE:
            contents["counts"], alignment = self.counts(batch_shape, mn)
            places["counts"] = self.vector((len(contents["counts"]),))
        masked = kernel.kind == Masked.kind
        extra_rows = 0 if masked or kernel.fake else self.any_of([0, 0, 0, 1, 2, 5, 130])
        q_rows = mn + (min(extra_rows, 2) if self.size == "tiny" else extra_rows)
        dtype = kernel.dtype if kernel.fake else fmt.values
        # What is allocated is not all defined where rows are masked. Where it starts at multiples
        # of other numbers than the kernel's, another one is compiled, so mostly it does not.
        same_kernel = kernel.store_bytes == min(16 * dtype.itemsize, 32) and not kernel.ragged
        given = self.chance(0.5 if same_kernel else 0.98)
        if masked or self.size == "tiny" or given:
            shape = (*batch_shape, q_rows, k)
            places["q"] = self.matrix(dtype, shape, kernel.store_bytes, False)
        if not kernel.fake and (masked or self.size == "tiny" or self.chance(0.85)):
            places["sf"] = self.scales(batch_shape, mn, k)
        return Case(
            kernel,
            places,
            contents,
            batch_shape,
            mn,
            alignment,
            fmt.replace(min_scale=self.min_scale()),
            seed=self.between(0, 2**31),
            special=self.chance(0.5),
        )

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

    def vector(self, shape: tuple[int, ...]) -> Place:
        strides = [1]
        for size in reversed(shape[1:]):
            strides.append(strides[-1] * size)
        strides = (
            stride if size != 1 else self.unused_stride(stride)
            for size, stride in zip(shape, reversed(strides), strict=True)
        )
        return self.place(torch.int32, shape, tuple(strides), torch.int32.itemsize)

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

    def min_scale(self) -> float | str:
        if self.chance(0.4):
            return self.any_of([1e-10, "vllm", "deepgemm", "sglang"])
        values = [2.0**-126, 1e-4, 1.0, 3.0, 2.0**100, 2.0 ** self.between(-30, 10)]
        return self.any_of(
            values + ([0.0, "ocp", 2.0**-149, 3e-39] if self.kernel.fmt.ue8m0 else [])
        )


def same_nan(arena: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the bytes of floats with every NaN replaced by the same one."""
    size = len(arena) // dtype.itemsize * dtype.itemsize
    floats = arena[:size].view(dtype)
    return torch.cat([floats.where(floats == floats, math.nan).view(torch.uint8), arena[size:]])


def check_same_bytes(name: str, case: object, actual: torch.Tensor, expected: torch.Tensor) -> None:
    wrong = (actual != expected).nonzero().flatten()
    if len(wrong):
        first = wrong[0].item()
        raise AssertionError(
            f"{name}: {len(wrong)} of {len(actual)} bytes differ; byte {first} is "
            f"{actual[first]:#x}, expected {expected[first]:#x}; bytes {wrong[:20].tolist()}\n"
            f"FUZZ_SEED={SEED}, {case}"
        )


def check_on_gpu(case: Case) -> None:
    """Check every byte of every arena, and of what is allocated, against the reference."""
    expected_arenas = case.arenas()
    arenas = {name: arena.cuda() for name, arena in expected_arenas.items()}
    try:
        results = case.call(arenas)
    except Exception as error:
        raise AssertionError(f"FUZZ_SEED={SEED}, {case}") from error
    expected_results = case.call(expected_arenas)
    names = ("q",) if case.kernel.fake else ("q", "sf")
    for name, result, expected in zip(names, results, expected_results, strict=True):
        assert result.shape == expected.shape, case
        assert result.numel() == 0 or result.stride() == expected.stride(), case
        if name not in case.places:
            arenas[name], expected_arenas[name] = storage_bits(result), storage_bits(expected)
    for name, arena in arenas.items():
        actual, expected = arena.cpu(), expected_arenas[name]
        if case.kernel.fake and name == "q":
            actual, expected = (same_nan(a, case.kernel.dtype) for a in (actual, expected))
        check_same_bytes(name, case, actual, expected)


KERNELS_TO_FUZZ = draw_kernels(KERNELS, fake=False)
FAKES_TO_FUZZ = draw_kernels(FAKES, fake=True)


@pytest.fixture(scope="module", autouse=True)
def announcement(request: pytest.FixtureRequest) -> Iterator[None]:
    """Print the settings that repeat a run."""
    counted["cases"] = 0
    yield
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\n{counted['cases']} random cases, FUZZ_SEED={SEED}, FUZZ_CASES={CASES}")


counted = {"cases": 0}


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [*KERNELS_TO_FUZZ, *FAKES_TO_FUZZ], ids=str)
def test_against_the_reference(kernel):
    for number in range(CASES_PER_KERNEL):
        check_on_gpu(Draw(kernel, number).case())
        counted["cases"] += 1


def large_shapes() -> dict[str, tuple[tuple[int, ...], int, int]]:
    """Return batch shape, rows and columns by name, one for each kind of launch."""
    sms = (
        torch.cuda.get_device_properties(0).multi_processor_count
        if torch.cuda.is_available()
        else 1
    )
    elements = TWO_ROWS_FROM * sms
    tall = DEFAULT_TILE.rows * MAX_GRID_Y
    return {
        "two-rows": ((), elements // 992 + 2, 992),
        "two-rows-wide": ((), elements // 16_000 + 3, 16_000),
        "two-rows-batch": ((3,), elements // 3000 + 1, 1056),
        "large-and-ragged": ((), elements // 1000 + 2, 1000),
        "tall": ((), tall + 5, 3),
        "tall-two-rows": ((), 2 * tall + 7, 32),
        "deep": ((MAX_GRID_Z + 4,), 2, 16),
        "deep-and-large": ((MAX_GRID_Z + 3,), 5, 33),
    }


@pytest.mark.gpu
@pytest.mark.parametrize("name", large_shapes())
@pytest.mark.parametrize("number", range(5))
def test_large(name, number):
    """Run few cases: the reference is slow at these sizes."""
    batch_shape, mn, k = large_shapes()[name]
    generator = random.Random(f"{SEED} {name} {number}")
    domains = [d for d in DOMAINS if d[2] == bool(batch_shape) and (d[0] == DENSE or number > 1)]
    kind, gathered, batched = generator.choice(domains)
    # The values of x of all widths, and the narrowest that the rows allow.
    kernel = replace(
        generator.choice(KERNELS_TO_FUZZ + FAKES_TO_FUZZ[:10]),
        kind=kind,
        gathered=gathered,
        batched=batched,
        ragged=k % 16 != 0,
        fake=False,
    )
    if kernel.fmt.group_size == -1 and k > 1000:
        kernel = replace(kernel, fmt=kernel.fmt.replace(group_size=128))
    store = min(kernel.store_bytes, 16)
    draw = Draw(replace(kernel, store_bytes=store), f"{name} {number}")
    check_on_gpu(draw.finish(batch_shape, mn, k))
    counted["cases"] += 1


# Multiplying back.

SCALES = (
    (torch.float8_e8m0fnu, MN_MAJOR_PACKED),
    (torch.float8_e8m0fnu, ROW_MAJOR),
    (torch.float8_e8m0fnu, BLOCKED),
    (torch.float32, MN_MAJOR),
)
"""Dtypes and layouts of scales that `dequantize` has code of its own for."""


def draw_dequantizations() -> list[Kernel]:
    """Draw kernels whose `dtype` is that of the result, which is contiguous."""
    generator = random.Random(f"{SEED} dequantize")
    formats = [
        fmt
        for fmt in all_formats()
        if (fmt.scale_dtype, fmt.scale_layout) in SCALES and not fmt.round_scale
    ]
    values = formats, INPUT_DTYPES, powers_of_two(1, 16), powers_of_two(1, 8), (False, True)
    decks = [Deck(v, generator) for v in values]
    kernels = []
    for _ in range(DEQUANTIZATIONS):
        fmt, dtype, load_bytes, step, ragged = (deck.draw() for deck in decks)
        store_bytes = dtype.itemsize * (step if ragged else 16)
        kernels.append(Kernel(dtype, fmt, DENSE, False, True, load_bytes, store_bytes, ragged))
    return kernels


def scale_strides(draw: Draw, shape: tuple[int, ...], blocked: bool) -> tuple[int, ...]:
    """Draw strides: the last two dimensions transposed, padded or expanded.

    One stride walks the leading dimensions, and the bytes of blocks stay contiguous.
    """
    inner = 1 if blocked else 2
    order = list(range(len(shape) - inner, len(shape)))
    draw.generator.shuffle(order)
    strides, stride = ({len(shape) - 1: 1}, shape[-1]) if blocked else ({}, 1)
    for dimension in () if blocked else order:
        stride += draw.any_of([0, 0, 0, 1, 3, 16])
        strides[dimension] = 0 if draw.chance(0.1) else stride
        stride *= max(shape[dimension], 1)
    batch = 0 if draw.chance(0.1) else stride + draw.any_of([0, 0, 1, 5])
    outer = draw.batch_strides(shape[:-inner], batch)
    return (*outer, *(strides[dimension] for dimension in sorted(strides)))


def dequantization(draw: Draw) -> dict[str, tuple[Place, torch.Tensor]]:
    """Draw places and arenas of "q" and "sf", which hold any bits."""
    kernel, fmt = draw.kernel, draw.kernel.fmt
    tall = draw.chance(0.2)
    batch_shape = draw.any_of([(), *BATCH_SHAPES, (70,)])
    k = draw.columns(48 if tall else 1300)
    if kernel.ragged:
        step = kernel.store_bytes // kernel.dtype.itemsize
        k = step * (k // step | 1)
    rows = 40_000 // (k * math.prod(batch_shape))
    mn = draw.between(1, max(1, min(rows, draw.any_of([1, 4, 130, 3000]))))
    if draw.chance(0.03):
        mn = 0
    shape = fmt.scale_shape(batch_shape, mn, k)
    strides = scale_strides(draw, shape, fmt.blocked)
    places = {
        "q": draw.matrix(fmt.values, (*batch_shape, mn, k), kernel.load_bytes, True),
        "sf": draw.place(fmt.sf_dtype, shape, strides, fmt.sf_dtype.itemsize),
    }
    generator = torch.Generator().manual_seed(draw.between(0, 2**31))
    arenas = {
        name: torch.randint(256, (place.nbytes,), generator=generator, dtype=torch.uint8)
        for name, place in places.items()
    }
    if fmt.sf_dtype is torch.float32:
        # All bits are as likely, but most magnitudes should be those of scales.
        floats = arenas["sf"].view(torch.float32)
        likely = torch.rand(len(floats), generator=generator) < 0.8
        floats[likely] = values(len(floats), torch.float32, draw.between(0, 2**31), True)[likely]
    return {name: (place, arenas[name]) for name, place in places.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", draw_dequantizations(), ids=str)
def test_dequantize(kernel):
    for number in range(CASES_PER_KERNEL):
        drawn = dequantization(Draw(kernel, number))
        described = f"{kernel}, {number}: { {name: place for name, (place, _) in drawn.items()} }"
        on_gpu = {name: arena.cuda() for name, (_, arena) in drawn.items()}
        choices = {"fmt": kernel.fmt, "dtype": kernel.dtype}
        try:
            actual = dequantize(
                *(place.view(on_gpu[name]) for name, (place, _) in drawn.items()), **choices
            )
        except Exception as error:
            raise AssertionError(f"FUZZ_SEED={SEED}, {described}") from error
        expected = dequantize(*(place.view(arena) for place, arena in drawn.values()), **choices)
        assert actual.shape == expected.shape and actual.stride() == expected.stride(), described
        assert actual.dtype == kernel.dtype, described
        results = (same_nan(storage_bits(t), kernel.dtype) for t in (actual, expected))
        check_same_bytes("result", described, *results)
        for name, (_, arena) in drawn.items():
            check_same_bytes(name, described, on_gpu[name].cpu(), arena)
        counted["cases"] += 1


# The generator itself, where there is no GPU.


@pytest.mark.parametrize("kernel", KERNELS_TO_FUZZ[:KERNELS_ON_CPU], ids=str)
def test_the_cpu_against_the_oracle(kernel):
    for number in range(CASES_ON_CPU):
        case = Draw(kernel, number, "tiny").case()
        places, arenas = case.places, case.arenas()
        before = {name: arena.clone() for name, arena in arenas.items()}
        x, q, sf = (places[name].view(before[name]) for name in ("x", "q", "sf"))
        results = case.call(arenas)
        assert results[0].data_ptr() == places["q"].view(arenas["q"]).data_ptr() or not q.numel()
        if q.numel() and case.mn:
            counts = places["counts"].view(before["counts"]) if "counts" in places else None
            index = places["index"].view(before["index"]) if "index" in places else None
            rows = from_operands(RowOperands(kernel.kind, counts, case.alignment))
            sources, live = live_sources(x, rows, index)
            choices = oracle_choices(case.fmt, x.shape[-1], sources, live)
            first = places["sf"].start + places["sf"].offset * sf.element_size()
            stored = before["sf"][first : places["sf"].end]
            q_bytes, sf_bytes = expected_bytes(
                choices, bytes([POISON]) * q.numel(), q.shape[-2], bytes(stored.tolist())
            )
            codes = torch.tensor(list(q_bytes), dtype=torch.uint8)
            before["q"][places["q"].elements()] = codes
            stored.copy_(torch.tensor(list(sf_bytes), dtype=torch.uint8))
        elif q.numel():
            before["q"][places["q"].elements()] = 0
        for name, arena in arenas.items():
            check_same_bytes(name, case, arena, before[name])
        counted["cases"] += 1


def test_the_generator_draws_everything():
    """Each choice is drawn, and rows have exactly the alignment of their kernel."""
    assert {kernel.fmt for kernel in KERNELS_TO_FUZZ} == set(all_formats())
    assert {(k.kind, k.gathered, k.batched) for k in KERNELS_TO_FUZZ} == set(DOMAINS)
    assert {kernel.fmt.values for kernel in FAKES_TO_FUZZ} == set(EVERY_DTYPE)
    seen = set()
    for kernel in [*KERNELS_TO_FUZZ, *FAKES_TO_FUZZ]:
        for number in range(4):
            case = Draw(kernel, number).case()
            x = case.places["x"]
            seen |= {"sf-padding"} if "sf" in case.places else {"allocated"}
            seen |= {"expanded"} if 0 in x.strides else set()
            seen |= {"nothing"} if 0 in x.shape else set()
            address = x.start + x.offset * kernel.dtype.itemsize
            strides = [
                stride * kernel.dtype.itemsize
                for size, stride in zip(x.shape[:-1], x.strides[:-1], strict=True)
                if size > 1
            ]
            assert math.gcd(32, address, *strides) == kernel.load_bytes, case
            assert x.shape[-1] % 16 == 0 or kernel.ragged
    assert seen == {"sf-padding", "allocated", "expanded", "nothing"}
