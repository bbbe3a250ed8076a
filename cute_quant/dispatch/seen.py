"""The ranges of the calls that a process made, to warm up those that it will make.

An engine runs its model once with as many rows as it will ever have. What it then calls is known,
though not which kernels take fewer rows.
"""

from __future__ import annotations

import threading

import torch

from cute_quant.contract.tensors import MAX_SIZE
from cute_quant.dispatch import warm_up as warming
from cute_quant.dispatch.call_range import CallRange
from cute_quant.dispatch.plan import watch_calls
from cute_quant.dispatch.warm_up import WarmUp

_ranges: dict[CallRange, int] = {}
"""The most rows, by the range with no rows."""
_ready: dict[CallRange, int] = {}
"""The most rows that kernels are ready for."""
_lock = threading.Lock()


def watch() -> None:
    """Note the ranges of all calls from now on."""
    watch_calls(_note)


def forget() -> None:
    """Note no calls any more, and forget those that were."""
    watch_calls(None)
    with _lock:
        _ranges.clear()
        _ready.clear()


def ranges() -> list[CallRange]:
    """Return the ranges of the calls so far."""
    with _lock:
        return [calls._replace(max_rows=rows) for calls, rows in _ranges.items()]


def has_new() -> bool:
    """Return whether there were calls that :func:`warm_up` has not made ready."""
    with _lock:
        return any(rows > _ready.get(key, 0) for key, rows in _ranges.items())


def warm_up(device: torch.device, times: int = 1) -> WarmUp:
    """Make the kernels of all calls like those so far ready, with as many rows or fewer.

    Args:
        device: that the calls run on.
        times: how many times as many rows there may be.
    """
    found = [calls._replace(max_rows=min(times * calls.max_rows, MAX_SIZE)) for calls in ranges()]
    with _lock:
        _ready.update({calls._replace(max_rows=0): calls.max_rows for calls in found})
    return warming.on_device(found, device) if found else WarmUp([], 0.0)


def _note(calls: CallRange) -> None:
    key = calls._replace(max_rows=0)
    with _lock:
        _ranges[key] = max(calls.max_rows, _ranges.get(key, 0))
