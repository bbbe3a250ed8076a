"""Calls of every operation, the memory they run in, and the comparison of every byte of it.

Every tensor lies in an arena of its own, with guards around it. The arenas are compared as a whole,
so a byte that is wrongly written anywhere shows, and NaN lies where nothing may be read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from cute_quant import fake_quantize, quantize, rms_norm_quantize, silu_mul_quantize
from cute_quant.contract.formats import Format
from cute_quant.contract.prologues import make_rms_norm, make_silu_mul
from cute_quant.contract.rows import RowOperands, from_operands
from cute_quant.contract.upper_scales import UpperScale
from tests import oracle
from tests.helpers import (
    POISON,
    as_arguments,
    assert_quantized_within,
    poisoned_results,
    random_bits,
    storage_bits,
)
from tests.prologues import Bounds, gathered, norm_bounds, silu_bounds

OPERATIONS = ("quantize", "fake_quantize", "silu_mul", "rms_norm")
RESULTS = ("q", "sf", "row_scales")
"""Places of what calls return."""


@dataclass(frozen=True)
class Kernel:
    """The choices that a kernel is compiled for.

    Attributes:
        dtype: of x.
        kind: of the row domain.
        gathered: whether there is an index.
        load_bytes, store_bytes: alignment of the rows of x and of the result.
        ragged: whether k is no multiple of the values of a thread.
        operation: one of ``OPERATIONS``.
        options: of the prologue, those that are compiled in, by name.
        upper: the argument that the scale over e4m3 scales is given as, None without one.
    """

    dtype: torch.dtype
    fmt: Format
    kind: str
    gathered: bool
    batched: bool
    load_bytes: int
    store_bytes: int
    ragged: bool
    operation: str = "quantize"
    options: tuple[tuple[str, Any], ...] = ()
    upper: str | None = None

    @property
    def fake(self) -> bool:
        """True if it is that of `fake_quantize`."""
        return self.operation == "fake_quantize"

    def option(self, name: str) -> Any:
        """Return an option of the prologue."""
        return dict(self.options)[name]

    def __str__(self) -> str:
        parts = [
            str(self.dtype).removeprefix("torch."),
            str(self.fmt),
            self.kind,
            *(["index"] if self.gathered else []),
            *(["batch"] if self.batched else []),
            f"{self.load_bytes}to{self.store_bytes}",
            *(["ragged"] if self.ragged else []),
            *([] if self.operation == "quantize" else [self.operation]),
            *([] if self.upper is None else [self.upper]),
            *(f"{name}={value}" for name, value in self.options if value not in (False, None)),
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
    """A call of an operation.

    Attributes:
        places: of the tensors by name; results that are not here get allocated.
        contents: of counts, index and upper scales.
        mn: rows of the result.
        fmt: the kernel's, with the smallest scale of the call.
        numbers: of the prologue, by name.
        seed: of the values.
        special: whether among them are NaN and Inf.
    """

    kernel: Kernel
    places: dict[str, Place]
    contents: dict[str, list]
    batch_shape: tuple[int, ...]
    mn: int
    k: int
    alignment: int
    fmt: Format
    numbers: dict[str, float | None]
    seed: int
    special: bool

    def arenas(self) -> dict[str, torch.Tensor]:
        """Return the memory before the call, on the CPU."""
        return {name: self._arena(name, place) for name, place in self.places.items()}

    def _arena(self, name: str, place: Place) -> torch.Tensor:
        arena = torch.full((place.nbytes,), POISON, dtype=torch.uint8)
        if name in ("x", "weight", "residual"):
            own = place.elements()
            typed = arena.fill_(0xFF).view(place.dtype)  # NaN
            special = self.special and name != "weight"
            tame = self.kernel.operation == "rms_norm"
            seed = self.seed + len(name)
            typed[own] = values(len(typed), place.dtype, seed, special, tame)[own]
        elif name == "upper":
            typed = arena.fill_(0xFF).view(place.dtype)
            typed[place.elements()] = torch.tensor(self.contents[name], dtype=place.dtype)
        elif name in self.contents:
            # What lies beside them would make more rows live.
            arena.view(torch.int32).fill_(0 if name == "index" else self.mn)
            contents = torch.tensor(self.contents[name], dtype=torch.int32)
            arena.view(torch.int32)[place.elements()] = contents
        return arena

    def views(self, arenas: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the tensors of the call in their arenas."""
        return {name: place.view(arenas[name]) for name, place in self.places.items()}

    def rows(self, tensors: dict[str, torch.Tensor]) -> Any:
        """Return the row domain of the call."""
        return from_operands(RowOperands(self.kernel.kind, tensors.get("counts"), self.alignment))

    def upper(self, tensors: dict[str, torch.Tensor]) -> UpperScale | None:
        """Return the upper scale of the call."""
        return (
            None if self.kernel.upper is None else UpperScale(self.kernel.upper, tensors["upper"])
        )

    def call(self, arenas: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Run the call and return q, sf and scales of rows; those that have a place are views."""
        tensors, options = self.views(arenas), dict(self.kernel.options)
        x, q, sf, row_scales = (tensors.get(name) for name in ("x", "q", "sf", "row_scales"))
        memory = (q, sf, row_scales) if self.fmt.row_scale else (q, sf)
        out = None if all(t is None for t in memory) else memory
        upper = as_arguments(self.upper(tensors))
        domain = {"rows": self.rows(tensors), "index": tensors.get("index"), **upper}
        match self.kernel.operation:
            case "quantize":
                return quantize(x, self.fmt, **domain, out=out)
            case "fake_quantize":
                return (fake_quantize(x, self.fmt, out=q, **upper),)
            case "silu_mul":
                options |= {"weight": tensors.get("weight")} | self.numbers
                return silu_mul_quantize(x, self.fmt, **options, **domain, out=out)
        out = (*memory, tensors["residual_out"]) if "residual_out" in tensors else out
        normalized = tensors.get("normalized", False)
        results = rms_norm_quantize(
            x,
            tensors["weight"],
            self.fmt,
            residual=tensors.get("residual"),
            normalized=normalized,
            rounding=options["rounding"],
            **self.numbers,
            **domain,
            out=out,
        )
        return results[: len(memory)]

    def emulate(self, gpu: Any, arenas: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Run the call on an emulated GPU, as :meth:`call` does on a device."""
        tensors, options = self.views(arenas), dict(self.kernel.options)
        x, q, sf, row_scales = (tensors.get(name) for name in ("x", "q", "sf", "row_scales"))
        prologue, upper = None, self.upper(tensors)
        match self.kernel.operation:
            case "fake_quantize":
                return (gpu.fake_quantize(x, q, self.fmt, upper),)
            case "silu_mul":
                prologue = make_silu_mul(weight=tensors.get("weight"), **options, **self.numbers)
            case "rms_norm":
                prologue = make_rms_norm(
                    tensors["weight"],
                    rounding=options["rounding"],
                    residual=tensors.get("residual"),
                    residual_out=tensors.get("residual_out"),
                    normalized=tensors.get("normalized"),
                    **self.numbers,
                )
        domain = self.rows(tensors), tensors.get("index")
        return gpu.quantize(x, q, sf, self.fmt, *domain, prologue, upper, row_scales)

    def check(
        self,
        before: dict[str, torch.Tensor],
        after: dict[str, torch.Tensor],
        results: tuple[torch.Tensor, ...],
        exact: bool,
    ) -> None:
        """Compare every byte of every arena, and of what was allocated, with the oracle.

        Args:
            before: the arenas before the call, on the CPU.
            after: the arenas after it, on its device.
            results: what the call returned.
            exact: whether prologues are computed exactly, rather than within bounds.
        """
        expected = {name: arena.clone() for name, arena in before.items()}
        actual = {name: arena.cpu() for name, arena in after.items()}
        shape = *self.batch_shape, self.mn, self.k
        if self.kernel.fake:
            (result,) = results
            assert result.shape == shape, self
            self._expect_fake(expected, actual, result)
        else:
            q, sf, *row_scales = results
            fmt = self.fmt
            assert q.shape[-1] == fmt.value_columns(self.k) and q.dtype is fmt.values, self
            assert sf.shape == fmt.scale_shape(self.batch_shape, self.mn, self.k), self
            assert [t.shape for t in row_scales] == [shape[:-1]] * fmt.row_scale, self
            if self.kernel.operation == "quantize":
                self._expect_quantized(expected, actual, results)
            else:
                self._check_prologue(expected, actual, results, exact)
        for name in expected:
            check_same_bytes(name, self, actual[name], expected[name])

    def _expect_fake(self, expected: dict, actual: dict, result: torch.Tensor) -> None:
        x = self.places["x"].view(expected["x"])
        y = oracle.fake_quantize(x, self.fmt, self.upper(self.views(expected)))
        if "q" not in self.places:
            assert result.is_contiguous(), self
            actual["q"] = same_nan(storage_bits(result), x.dtype)
            expected["q"] = same_nan(y.contiguous().flatten().view(torch.uint8), x.dtype)
            return
        typed = expected["q"].view(x.dtype)
        typed[self.places["q"].elements()] = y.flatten()
        for arenas in (expected, actual):
            arenas["q"] = same_nan(arenas["q"], x.dtype)

    def _expect_quantized(
        self, expected: dict, actual: dict, results: tuple[torch.Tensor, ...]
    ) -> None:
        tensors = self.views(expected)
        memory = poisoned_results(self.fmt, self.mn, self.k, "cpu", batch_shape=self.batch_shape)
        new = dict(zip(RESULTS, memory, strict=False))
        for name, result in zip(RESULTS, results, strict=False):
            if name not in tensors:
                assert result.stride() == new[name].stride() or not result.numel(), self
                actual[name] = storage_bits(result)
                tensors[name] = new[name]
        oracle.quantize_into(
            tensors["x"],
            tensors["q"],
            tensors["sf"],
            self.fmt,
            self.rows(tensors),
            tensors.get("index"),
            self.upper(tensors),
            tensors.get("row_scales"),
        )
        if not self.k or not math.prod(self.batch_shape):
            return
        for name in new:
            if name not in self.places:
                expected[name] = storage_bits(tensors[name])

    def _check_prologue(
        self, expected: dict, actual: dict, results: tuple[torch.Tensor, ...], exact: bool
    ) -> None:
        """Check what prologues write against its bounds; what it may write is taken over."""
        tensors, written = self.views(expected), self.views(actual)
        q = results[0]
        rounding = self.kernel.option("rounding")
        x, index = tensors["x"], tensors.get("index")
        source, places = gathered(x, index)
        if self.kernel.operation == "silu_mul":
            options = {"interleaved": self.kernel.option("interleaved"), **self.numbers}
            bounds = silu_bounds(source, tensors.get("weight"), rounding, **options)
        else:
            total = source.float()
            if "residual" in tensors:
                total = total + tensors["residual"].float()
            numbers = self.numbers["eps"], self.numbers["weight_offset"]
            bounds = norm_bounds(total, tensors["weight"], *numbers, rounding, x.dtype)
            self._expect_rows(expected, actual, total.to(x.dtype), bounds)
        if q.numel() and self.mn:
            if exact:
                bounds = Bounds(*[bounds.values] * 3)
            flat = bounds if index is None else Bounds(*(t.flatten(0, -2) for t in bounds))
            q, sf, *row_scales = (
                written.get(name, t) for name, t in zip(RESULTS, results, strict=False)
            )
            # In storage of their own.
            upper = self.upper(tensors), *(t.cpu().clone() for t in row_scales)
            domain = self.rows(tensors), places
            try:
                differing = assert_quantized_within(q, sf, self.fmt, *flat, *domain, *upper)
                assert not (exact and differing), "other bytes than those of the exact values"
            except AssertionError as error:
                raise AssertionError(f"{error}\n{self}") from error
        elif "q" in self.places:
            expected["q"][self.places["q"].elements()] = 0
        for name in RESULTS:
            # Every byte of these was compared; those around them were not.
            if name in self.places and q.numel() and self.mn:
                place = self.places[name]
                own = slice(place.start, place.end) if name == "sf" else place.elements()
                kind = torch.int32 if name == "row_scales" else torch.uint8
                expected[name].view(kind)[own] = actual[name].view(kind)[own]

    def _expect_rows(
        self, expected: dict, actual: dict, total: torch.Tensor, bounds: Bounds
    ) -> None:
        """Expect the updated residual, and of the normalized rows what lies within bounds."""
        dtype = total.dtype
        name = "residual_out" if "residual_out" in self.places else "residual"
        if name in self.places:
            own = self.places[name].elements()
            for arena, new in ((expected[name], total), (actual[name], None)):
                typed = arena.view(dtype)
                content = typed[own] if new is None else new.flatten()
                typed[own] = content.where(~content.isnan(), torch.nan)
        if "normalized" in self.places:
            own = self.places["normalized"].elements()
            row = actual["normalized"].view(dtype)[own].view(total.shape)
            low, high = (t.to(dtype) for t in (bounds.low, bounds.high))
            inside = (low <= row) & (row <= high) | low.isnan() & row.isnan()
            assert inside.all(), f"normalized: {(~inside).nonzero()[0].tolist()}, {self}"
            expected["normalized"].view(dtype)[own] = row.flatten()


def values(
    count: int, dtype: torch.dtype, seed: int, special: bool, tame: bool = False
) -> torch.Tensor:
    """Return values in pieces of random kinds.

    They are any finite bits, normal distributions of any scale, zeros of both signs, and, if
    `special`, any bits and single NaN and Inf.

    Args:
        tame: leave out bits whose squares no float32 can hold.
    """
    generator = torch.Generator().manual_seed(seed)

    def integers(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator)

    length = (5, 16, 37, 128, 600)[seed % 5]
    pieces = -(-count // length)
    kinds = integers(12 if special else 10, pieces, 1)
    if tame:
        kinds = kinds.where((kinds > 2) & (kinds != 10), 5)
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
            f"{case}"
        )
