"""The ranges of the calls that a process made, to warm up those that it will make.

An engine runs its model once with as many rows as it will ever have. What it then calls is known,
though not which kernels take fewer rows.
"""

from __future__ import annotations

import threading

import torch

from cute_quant.dispatch import warm_up as warming
from cute_quant.dispatch.call_range import CallRange
from cute_quant.dispatch.plan import watch_calls
from cute_quant.dispatch.warm_up import WarmUp

_ranges: dict[CallRange, int] = {}
"""The most rows, by the range with no rows."""
_lock = threading.Lock()


def watch() -> None:
    """Note the ranges of all calls from now on."""
    watch_calls(_note)


def forget() -> None:
    """Note no calls any more, and forget those that were."""
    watch_calls(None)
    with _lock:
        _ranges.clear()


def ranges() -> list[CallRange]:
    """Return the ranges of the calls so far."""
    with _lock:
        return [calls._replace(max_rows=rows) for calls, rows in _ranges.items()]


def warm_up(device: torch.device) -> WarmUp:
    """Make the kernels of all calls like those so far, with as many rows or fewer, ready."""
    found = ranges()
    return warming.on_device(found, device) if found else WarmUp([], 0.0)


def _note(calls: CallRange) -> None:
    key = calls._replace(max_rows=0)
    with _lock:
        _ranges[key] = max(calls.max_rows, _ranges.get(key, 0))
