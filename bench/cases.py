"""Time ways to do the same to a matrix: ours, another library's, and a copy of as many bytes.

Calls are captured in CUDA graphs over rotating buffers, and replayed in turns.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import stream
from cute_quant.jit import lookup
from cute_quant.lab import timing

DEVICE = "cuda"

Run = Callable[[], object]


class Case(NamedTuple):
    """Ways to do the same to an (m, k) matrix.

    Attributes:
        bytes: that each has to move.
        makers: functions that make a call with memory of its own and check it, by name; the first
            is ours, "stream" the ceiling.
    """

    name: str
    m: int
    k: int
    bytes: int
    makers: Mapping[str, Callable[[], Run]]


def streaming(words_in: int, words_out: int, threads: int, loads: int = 1) -> Run:
    """Return a call of the ceiling, whose threads load `words_in` so many times."""
    spec = stream.Stream(True, loads, 1, words_in, words_out)
    function = stream.function(spec, lookup.architecture(torch.cuda.current_device()))
    x = torch.randint(2**31 - 1, (loads * threads * words_in,), dtype=torch.int32, device=DEVICE)
    y = torch.full((threads * words_out,), -1, dtype=torch.int32, device=DEVICE)
    function(x, y)
    if not torch.equal(y[None], stream.expected(spec, x)):
        raise RuntimeError("stream: wrote other words")
    return functools.partial(function, x, y)


def require(same: bool, name: str) -> None:
    """Stop where a result is wrong.

    Raises:
        RuntimeError: it is.
    """
    if not same:
        raise RuntimeError(f"{name}: differs from the reference")


def measure(case: Case) -> dict[str, float]:
    """Return the seconds of a call, by name."""
    torch.cuda.empty_cache()
    launches = timing.launch_count(case.bytes)
    graphs = {}
    for name, make in case.makers.items():
        calls = [make() for _ in range(timing.buffer_count(case.bytes))]
        graphs[name] = timing.capture(calls, launches)
    return {name: measured.median for name, measured in timing.measure(graphs).items()}


def line(case: Case, seconds: Mapping[str, float], other: str) -> str:
    """Return a row of a table, beside another library where it was timed."""
    ours = seconds["cute_quant"]
    words = [f"{case.name:32} {case.m:6} x {case.k:5} {ours * 1e6:8.2f} us"]
    words.append(f"{ours / seconds['stream']:5.2f} x stream")
    if other in seconds:
        words.append(f"{seconds[other] / ours:6.2f} x faster than {other}")
    return "  ".join(words)


def run(cases: Iterable[Case], machine: dict[str, Any], other: str, output: Path | None) -> None:
    """Time cases and print them, and write JSON lines, the machine first, after each."""
    print(f"{machine['gpu']}, {machine['commit']}", flush=True)
    timing.warm_up()
    lines = [json.dumps({"machine": machine})]
    for case in cases:
        seconds = measure(case)
        print(line(case, seconds, other), flush=True)
        result = {"name": case.name, "m": case.m, "k": case.k, "seconds": seconds}
        lines.append(json.dumps({"result": result}))
        if output:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text("\n".join(lines) + "\n")
