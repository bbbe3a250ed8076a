"""Time ways to do the same to a matrix: ours, another library's, and a copy of as many bytes.

Calls are captured in CUDA graphs over rotating buffers, and replayed in turns.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import environment
from bench.ceiling import ELEMENTS, Ceiling, Words, allocate
from bench.names import CUTE_QUANT, STREAM
from bench.stream import BYTES_PER_WORD, Traffic
from cute_quant.lab import timing

Run = Callable[[], object]

Makers = dict[str, Callable[[], Run | Words]]
"""Functions that make a call, or memory for the ceiling, by name."""


class Case(NamedTuple):
    """Ways to do the same to an (m, k) matrix.

    Attributes:
        bytes: that each has to move.
        makers: functions that make a call with memory of its own and check it, by name; the first
            is ours. Under "stream" they make memory, for the ceiling to be chosen.
    """

    name: str
    m: int
    k: int
    bytes: int
    makers: Makers


def streaming(words_in: int, words_out: int, vectors: int, loads: int = 1) -> Words:
    """Return memory of the ceiling for so many times 16 elements, each with several `loads`."""
    return allocate(Traffic(loads, 1, words_in, words_out), ELEMENTS * vectors)


def streaming_bytes(nbytes: int, words_in: int, words_out: int, loads: int = 1) -> Words:
    """Return memory of the ceiling for so many bytes, read and written in the ratio of the words.

    A call that reads fewer bytes has as many in all, in the ratio of one that reads them all.
    """
    vectors = -(-nbytes // (BYTES_PER_WORD * (loads * words_in + words_out)))
    return streaming(words_in, words_out, vectors, loads)


def parser_of(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return the parser of a benchmark's options, with those that all have."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--output", type=Path, metavar="FILE", help="JSON lines: the machine, then the results")
    add("--commit", help="name of the measured version, where there is no git to ask")
    return parser


def begin(name: str, commit: str | None) -> dict[str, object]:
    """Return the description of the machine, or exit where it has no GPU."""
    if not torch.cuda.is_available():
        sys.exit(f"{name}: needs a CUDA GPU that has kernels")
    torch.manual_seed(0)
    return environment.describe(f"python -m {name}", commit)


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
        made = [make() for _ in range(timing.buffer_count(case.bytes))]
        memory = [words for words in made if isinstance(words, Words)]
        calls = [call for call in made if not isinstance(call, Words)]
        graphs[name] = timing.capture(Ceiling(memory).calls() if memory else calls, launches)
    return {name: measured.median for name, measured in timing.measure(graphs).items()}


def line(case: Case, seconds: Mapping[str, float], other: str) -> str:
    """Return a row of a table, beside another library where it was timed."""
    ours = seconds[CUTE_QUANT]
    words = [f"{case.name:32} {case.m:6} x {case.k:5} {ours * 1e6:8.2f} us"]
    words.append(f"{ours / seconds[STREAM]:5.2f} x stream")
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
