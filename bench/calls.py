"""Calls to be timed beside their ceilings, through the public interface alone.

Each is a launch that `cute_quant.bind` returns, or a call on memory of the caller, so that any
version of the package takes it. Results are compared with the reference when a call is made.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from bench import masked
from bench.cases import Run, require
from bench.ceiling import Ceiling, allocate
from bench.fp4 import bytes_of, quantizing
from bench.shapes import SILU_MUL_QUANTIZE, Operation
from bench.stage_problem import EPS, FLOAT32_ERROR, StageProblem
from bench.stream import Traffic
from cute_quant import (
    DEEP_GEMM,
    Format,
    bind,
    dequantize,
    quantize,
    rms_norm_quantize,
    silu_mul_quantize,
)
from cute_quant.lab import timing

DEVICE = "cuda"


class Case(NamedTuple):
    """A call of some operation and size.

    Attributes:
        bytes: that it moves.
        traffic: of 16 elements.
        elements: that it reads and writes.
        maker: returns a function that makes a call and checks it. As many calls as are captured
            have memory of their own.
    """

    name: str
    bytes: int
    traffic: Traffic
    elements: int
    maker: Callable[[], Callable[[], Run]]

    def capture(self, make: Callable[[], Run] | None = None) -> timing.Graph:
        """Capture calls on rotating buffers, of a function that `maker` returned before."""
        make = make or self.maker()
        return self.captured([make() for _ in range(timing.buffer_count(self.bytes))])

    def captured(self, calls: Sequence[Run]) -> timing.Graph:
        """Capture some calls as often as this case's own."""
        return timing.capture(calls, timing.launch_count(self.bytes))

    def ceiling(self, kernel: int | None = None) -> Ceiling:
        """Return the fastest kernel that moves these bytes, or that of a place in its family."""
        count = timing.buffer_count(self.bytes)
        memory = [allocate(self.traffic, self.elements) for _ in range(count)]
        return Ceiling(memory, kernel=kernel)


def quantizing_case(fmt: Format, m: int, k: int) -> Case:
    """Return the case of `quantize`."""
    traffic = Traffic(words_out=fmt.value_columns(16) // 4)
    nbytes = 2 * m * k + bytes_of(fmt, m, k)
    make = functools.partial(quantizing, fmt, m, k)
    return Case(f"{fmt}, {m} x {k}", nbytes, traffic, m * k, lambda: make)


def dequantizing_case(m: int, k: int) -> Case:
    """Return the case of `dequantize`, of values for DeepGEMM."""
    quantized, name = Traffic(), f"dequantize, {m} x {k}"
    traffic = Traffic(words_in=quantized.words_out, words_out=quantized.words_in)

    def make() -> Run:
        q, sf = quantize(masked.random(m, k))
        launch = bind(q, sf, operation=dequantize)
        launch.results.fill_(float("nan"))
        launch()
        require(not masked.different_rows(launch.results, dequantize, q, sf), name)
        return launch

    nbytes = 2 * m * k + bytes_of(DEEP_GEMM, m, k)
    return Case(name, nbytes, traffic, m * k, lambda: make)


def stage_case(operation: Operation, m: int, k: int) -> Case:
    """Return the case of a fused operation, the norm with a residual."""
    traffic = Traffic(operation.loads, operation.stores)
    maker = functools.partial(_stage_maker, operation, m, k)
    name = f"{operation.name}, {m} x {k}"
    return Case(name, operation.bytes_moved(m, k), traffic, m * k, maker)


def masked_case(experts: int, max_m: int, live: int, k: int) -> Case:
    """Return the case of experts that all have `live` of `max_m` rows."""
    rows = experts * live
    name = f"masked {experts} x {max_m}, {live} rows each"
    nbytes = masked.bytes_moved(rows, k, DEEP_GEMM)

    def make() -> Run:
        call = masked.masked(max_m, k, torch.full((experts,), live, dtype=torch.int32))
        require(not call.difference(), name)
        return call.run

    return Case(name, nbytes, Traffic(), rows * k, lambda: make)


def _stage_maker(operation: Operation, m: int, k: int) -> Callable[[], Run]:
    """Return a function that makes calls on one buffer of a problem after the other, in turns."""
    problem = StageProblem(m, k, DEVICE)
    indices = itertools.cycle(range(len(problem.buffers)))

    def make() -> Run:
        index = next(indices)
        buffer = problem.buffers[index]
        buffer.poison()
        if operation is SILU_MUL_QUANTIZE:
            out = buffer.q, buffer.sf
            launch = bind(buffer.gate_up, out=out, operation=silu_mul_quantize)
        else:
            launch = bind(
                buffer.x,
                buffer.weight,
                eps=EPS,
                residual=buffer.residual,
                out=(buffer.q, buffer.sf, buffer.residual_out),
                operation=rms_norm_quantize,
            )
        launch()
        require(not problem.check(operation, index, FLOAT32_ERROR).difference, operation.name)
        return launch

    return make
