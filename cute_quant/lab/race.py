"""Time layouts on a GPU relative to the default: same memory, interleaved replays, same bits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cute_quant.contract.dtypes import UPPER_MAX, ceil_div
from cute_quant.contract.tensors import storage_bytes
from cute_quant.jit import lookup
from cute_quant.kernels.config import MAX_GRID_Y, launched_on
from cute_quant.lab import timing
from cute_quant.lab.layout import Layout

DEVICE = "cuda"
POISON = 0xA5
NORMAL_AMAX = 6.0
"""About the amax of millions of normal numbers."""


class WrongResultError(RuntimeError):
    """A layout's results differ from the default's."""


@dataclass(frozen=True)
class Time:
    """Time of a call.

    Attributes:
        seconds: seconds of the layout, the median of the replays.
        default_seconds: seconds of the default, whose replays are interleaved with the layout's.
    """

    seconds: float
    default_seconds: float

    @property
    def ratio(self) -> float:
        """Return the time over that of the default."""
        return self.seconds / self.default_seconds


class Track:
    """Memory of one shape on the current GPU, and the default's results.

    Args:
        default: the layout that others are compared with. All have its format and dtype.
        mn: rows of the input.
        k: columns of the input.
    """

    def __init__(self, default: Layout, mn: int, k: int):
        self.default, self.mn, self.k = default, mn, k
        fmt, device = default.fmt, torch.device(DEVICE)
        columns = fmt.value_columns(k)
        moved = mn * (k * default.dtype.itemsize + columns * fmt.values.itemsize)
        self.launches = timing.launch_count(moved)
        self.buffers = [
            (
                torch.randn(mn, k, device=device).to(default.dtype),
                torch.empty(mn, columns, dtype=fmt.values, device=device),
                fmt.empty_scales((), mn, k, device),
            )
            for _ in range(timing.buffer_count(moved))
        ]
        self.encode_scale = None
        if fmt.upper_scale:
            self.encode_scale = torch.full((1,), UPPER_MAX / NORMAL_AMAX, device=device)
        self.calls = self._calls(default)
        self.expected = [
            [storage_bytes(t).clone() for t in results] for results in self._run(self.calls)
        ]
        self.graph = timing.capture(self.calls, self.launches)

    def time(self, layout: Layout) -> Time:
        """Time a layout and the default.

        Raises:
            ValueError: the layout does not take the shape.
            WrongResultError: the layout's results differ from the default's.
        """
        check_shape(layout, self.mn, self.k)
        calls = self._calls(layout)
        for got, expected in zip(self._run(calls), self.expected, strict=True):
            for name, t, bits in zip(("values", "scales"), got, expected, strict=True):
                wrong = int((storage_bytes(t) != bits).sum())
                if wrong:
                    raise WrongResultError(
                        f"{layout.name}: {wrong} bytes of the {name} of an ({self.mn}, {self.k}) "
                        f"input differ from the default's"
                    )
        graphs = {"default": self.graph, "layout": timing.capture(calls, self.launches)}
        medians = timing.median_seconds(graphs)
        return Time(medians["layout"], medians["default"])

    def _calls(self, layout: Layout) -> list[Callable[[], None]]:
        arch = lookup.architecture(torch.cuda.current_device())
        function = lookup.function(launched_on(layout.spec, arch), arch)
        upper, floor = self.encode_scale, layout.fmt.floor
        return [
            functools.partial(function, *operands, upper, None, None, None, 0, 1, 1, floor)
            for operands in self.buffers
        ]

    def _run(self, calls: list[Callable[[], None]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Run each call over poison and return its results."""
        for call, (_, *results) in zip(calls, self.buffers, strict=True):
            for t in results:
                storage_bytes(t).fill_(POISON)
            call()
        torch.cuda.synchronize()
        return [(q, sf) for _, q, sf in self.buffers]


def check_shape(layout: Layout, mn: int, k: int) -> None:
    """Check that a layout takes an (mn, k) input.

    Raises:
        ValueError: the layout does not take it.
    """
    if k % layout.column_multiple:
        raise ValueError(
            f"k: expected a multiple of {layout.column_multiple}, what a thread holds, got {k}"
        )
    if ceil_div(layout.fmt.scale_rows(mn), layout.tile.rows) > MAX_GRID_Y:
        raise ValueError(
            f"mn: expected at most {MAX_GRID_Y} tiles of {layout.tile.rows} rows, got {mn} rows"
        )
