"""A layout: the choices of a kernel for its threads, values and memory accesses."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cute_quant.contract.dtypes import STORE_BYTES
from cute_quant.contract.format_choices import WHOLE_ROW
from cute_quant.contract.formats import DEEP_GEMM, Format
from cute_quant.contract.upper_scales import ENCODE
from cute_quant.kernels.config import (
    ALONG,
    DEFAULT_TILE,
    DOWN,
    LOAD_HINTS,
    Access,
    QuantizeSpec,
    Tile,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Layout:
    """A layout of the kernel that quantizes dense rows. Get one from :func:`make_layout`.

    Attributes:
        tile: how the threads of a CTA tile rows and columns.
        access: widths of loads and stores.
        fmt: format of the results. Its groups are not whole rows, nor have rows upper scales.
        dtype: dtype of x.
    """

    tile: Tile
    access: Access
    fmt: Format
    dtype: torch.dtype

    @property
    def spec(self) -> QuantizeSpec:
        """Return the spec of the kernel."""
        upper = ENCODE if self.fmt.upper_scale else None
        fmt = self.fmt.kernel_format
        return QuantizeSpec(self.dtype, fmt, self.tile, access=self.access, upper=upper)

    @property
    def lanes_per_group(self) -> int:
        """Return the lanes that hold a group."""
        return self.tile.lanes_per_group(self.fmt.group_size)

    @property
    def warps(self) -> int:
        """Return the warps of a CTA."""
        return self.tile.row_warps * self.tile.column_warps

    @property
    def cta_columns(self) -> int:
        """Return the columns of a CTA."""
        return self.tile.column_warps * self.tile.columns

    @property
    def packs(self) -> float:
        """Return the columns of sf that a CTA stores, fractions of a packed word included."""
        groups = self.tile.column_warps * self.tile.groups(self.fmt.group_size)
        return groups / self.fmt.groups_per_column

    @property
    def thread_bytes(self) -> int:
        """Return the bytes of x in the registers of a thread."""
        return self.tile.values_per_thread * self.tile.rows_per_thread * self.dtype.itemsize

    @property
    def default(self) -> Layout:
        """Return the layout that the package uses for the same dtype and format."""
        return make_layout(self.fmt, self.dtype)

    @property
    def name(self) -> str:
        """Return the differences from the default, in words."""
        default = self.default
        named = [
            text
            for (key, text), (_, usual) in zip(_words(self), _words(default), strict=True)
            if text != usual
        ]
        return ", ".join(named) if named else "default"

    @property
    def column_multiple(self) -> int:
        """Return the number of which k has to be a multiple."""
        return self.tile.values_per_thread * self.tile.rows_per_thread

    def choices(self) -> dict[str, Any]:
        """Return the choices as `make_layout` takes them, for JSON."""
        access = {"load_bytes": self.access.load_bytes, "load_hint": self.access.load_hint}
        return {**self.tile._asdict(), **access}


def _words(layout: Layout) -> list[tuple[str, str]]:
    tile, access, lanes = layout.tile, layout.access, layout.lanes_per_group
    values = tile.values_per_thread
    widest = make_layout(layout.fmt, layout.dtype, values_per_thread=values).access.load_bytes
    return [
        ("values", f"{lanes} threads x {values} values"),
        ("warps", f"{tile.row_warps} x {tile.column_warps} warps"),
        ("rows", f"rows a thread: {tile.rows_per_thread}"),
        ("warp order", f"warps {tile.warp_order} first"),
        ("CTA order", f"CTAs {tile.cta_order} first"),
        ("load", "widest" if access.load_bytes == widest else f"loads of {access.load_bytes} B"),
        ("hint", str(access.load_hint)),
        ("latency", "low latency" if tile.low_latency else ""),
    ]


def make_layout(
    fmt: Format = DEEP_GEMM,
    dtype: torch.dtype = torch.bfloat16,
    *,
    threads_per_group: int | None = None,
    values_per_thread: int | None = None,
    load_bytes: int | None = None,
    load_hint: str | None = None,
    **tile: Any,
) -> Layout:
    """Make a layout, with the package's defaults for the arguments that are not given.

    Args:
        fmt: format of the results.
        dtype: dtype of x.
        threads_per_group: threads that hold a group, group_size / `values_per_thread`.
        values_per_thread: values of a thread, contiguous along k. One of the two is enough.
        load_bytes: bytes of a load. By default a thread's values of a row, up to 32 bytes.
        load_hint: one of ``config.LOAD_HINTS``.
        tile: other attributes of `config.Tile`.

    Raises:
        TypeError: `tile` has an unknown name.
        ValueError: the choices break a rule of the contract, which the message names.
    """
    if fmt.group_size == WHOLE_ROW:
        raise ValueError(
            "group_size: expected groups that lie in a warp, to be drawn and tried, got whole rows"
        )
    values = values_per_thread
    if fmt.row_scale:
        raise ValueError(
            "row_scale: expected False, where a warp has no need of the whole row, got True"
        )
    if threads_per_group is not None:
        if threads_per_group < 1 or fmt.group_size % threads_per_group:
            raise ValueError(
                f"threads_per_group: expected a divisor of group_size {fmt.group_size}, "
                f"got {threads_per_group}"
            )
        held = fmt.group_size // threads_per_group
        if values not in (None, held):
            raise ValueError(
                f"threads_per_group, values_per_thread: expected a product of {fmt.group_size}, "
                f"the group_size, got {threads_per_group} * {values}"
            )
        values = held
    values = DEFAULT_TILE.values_per_thread if values is None else values
    widest = min(values * dtype.itemsize, Access().load_bytes)
    access = Access(
        widest if load_bytes is None else load_bytes,
        min(values * fmt.values.itemsize // fmt.value_type.per_byte, STORE_BYTES),
        load_hint=load_hint,
    )
    layout = Layout(Tile(values, **tile), access, fmt, dtype)
    if layout.tile.tiles_per_thread != 1:
        raise ValueError(
            f"tiles_per_thread: expected 1, to be drawn and tried, got "
            f"{layout.tile.tiles_per_thread}"
        )
    layout.tile.check(fmt, dtype, access)
    return layout


def product(
    fmt: Format, dtype: torch.dtype, choices: Mapping[str, Sequence[Any]]
) -> Iterator[tuple[dict[str, Any], Layout | ValueError]]:
    """Yield every combination of choices for `make_layout`, with its layout.

    A combination that `make_layout` refuses comes with the error instead.
    """
    for values in itertools.product(*choices.values()):
        chosen = dict(zip(choices, values, strict=True))
        try:
            yield chosen, make_layout(fmt, dtype, **chosen)
        except ValueError as error:
            yield chosen, error


def around_the_default(fmt: Format, dtype: torch.dtype) -> list[Layout]:
    """Return the default layout and those a step away from it, for a sweep of a minute."""
    shapes: list[dict[str, Any]] = [
        {"row_warps": down, "column_warps": along}
        for down, along in ((1, 1), (1, 4), (2, 2), (2, 1), (8, 1), (16, 1), (1, 8), (4, 2))
    ]
    some: list[dict[str, Any]] = [
        {},
        *({"threads_per_group": lanes} for lanes in (2, 4, 16, 32)),
        *({"rows_per_thread": rows} for rows in (2, 4, 8)),
        *({"threads_per_group": 16, "rows_per_thread": rows} for rows in (2, 4)),
        *({"threads_per_group": 4, "rows_per_thread": rows} for rows in (2, 4)),
        *shapes,
        {"row_warps": 2, "column_warps": 2, "warp_order": ALONG},
        {"row_warps": 4, "column_warps": 2, "warp_order": ALONG},
        {"cta_order": DOWN},
        {"cta_order": DOWN, "rows_per_thread": 2},
        {"row_warps": 1, "column_warps": 4, "rows_per_thread": 2},
        {"row_warps": 2, "rows_per_thread": 2},
        {"row_warps": 8, "rows_per_thread": 2},
        *({"load_bytes": nbytes} for nbytes in (16, 8, 4)),
        *({"load_hint": hint} for hint in LOAD_HINTS),
        *({"load_hint": hint, "rows_per_thread": 2} for hint in LOAD_HINTS),
    ]
    found: dict[Layout, None] = {}
    for choices in some:
        for _, layout in product(fmt, dtype, {key: (value,) for key, value in choices.items()}):
            if isinstance(layout, Layout):
                found.setdefault(layout)
    return list(found)
