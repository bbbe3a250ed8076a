"""Implementations to measure of the operations that end in the quantizer."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch.nn import functional

from bench import ceiling
from bench.names import (
    COMPILED,
    CUTE_QUANT,
    LAUNCHES,
    PDL,
    PLAIN,
    STREAM,
    TRITON,
    TWO_KERNELS,
    of_operation,
)
from bench.problem import UE8M0
from bench.providers import RECOMPILE_LIMIT, architecture, formula
from bench.run import Check, first_line
from bench.shapes import (
    OPERATIONS,
    QUANTIZE_ALONE,
    RMS_NORM_QUANTIZE,
    SILU_MUL_QUANTIZE,
    Operation,
)
from bench.stage_problem import (
    BFLOAT16_ERROR,
    EPS,
    EXACT,
    FLOAT32_ERROR,
    MIN_EXPONENT,
    StageBuffer,
    StageProblem,
)
from bench.stream import Traffic
from cute_quant import quantize, rms_norm_quantize, silu_mul_quantize
from cute_quant.jit import lookup
from cute_quant.kernels import heuristics
from cute_quant.kernels.config import Domain, QuantizeSpec, RmsNormSpec, SiluMulSpec, Tile
from cute_quant.lab import timing

COMPILED_ROWS = 4096
"""Rows of the first call of a compiled function, from which `torch.compile` picks block sizes."""
TUNING_REPLAYS = 5

StageSpec = QuantizeSpec | SiluMulSpec | RmsNormSpec
"""Specs of the operations."""


class StageProvider(abc.ABC):
    """A way to compute an operation.

    Attributes:
        name: in tables and plots, beside others of the same operation.
        launch: one of ``names.LAUNCHES``.
        error: that what is quantized may have, relative.
        ours: whether a wrong result is a defect of this package.
    """

    ours = False

    def __init__(self, name: str, operation: Operation, launch: str, error: float):
        self.name = of_operation(operation.name, name)
        self.operation = operation
        self.launch = launch
        self.error = EXACT if operation is QUANTIZE_ALONE else error

    def bytes_moved(self, problem: StageProblem) -> int:
        """Return the bytes that its operation moves."""
        return self.operation.bytes_moved(problem.mn, problem.k)

    def calls(self, problem: StageProblem) -> list[Callable[[], None]]:
        """Return a call on each buffer, with what suits the shape."""
        return [self.bind(buffer) for buffer in problem.buffers]

    @abc.abstractmethod
    def bind(self, buffer: StageBuffer) -> Callable[[], None]:
        """Return a call on a buffer."""

    def check(self, problem: StageProblem) -> Check:
        """Run on poisoned outputs, first and last buffer, and compare with the reference."""
        checks = []
        for index in (0, len(problem.buffers) - 1):
            problem.buffers[index].poison()
            self.bind(problem.buffers[index])()
            checks.append(problem.check(self.operation, index, self.error))
        differences = (check.difference for check in checks)
        return Check(next(filter(None, differences), ""), max(check.differing for check in checks))


def default_spec(operation: Operation, mn: int, k: int, pdl: bool) -> StageSpec:
    """Return the spec that the public call of an operation launches, with or without PDL."""
    sms = lookup.multiprocessors(torch.cuda.current_device())
    size = 1, mn, k, UE8M0, False, sms
    if operation is RMS_NORM_QUANTIZE:
        least_tiles = heuristics.norm_tiles(architecture())
        norm = heuristics.norm_shape(*size, least_tiles=least_tiles)
        return norm_spec(norm.tile, norm.tiles_per_thread, norm.max_warps, pdl)
    if operation is SILU_MUL_QUANTIZE:
        shape = heuristics.silu_shape(*size, architecture())
        domain = Domain(batched=shape.tall)
        return SiluMulSpec(torch.bfloat16, UE8M0, shape.tile, domain, pdl=pdl)
    shape = heuristics.shape(*size, architecture())
    domain = Domain(batched=shape.tall)
    return QuantizeSpec(torch.bfloat16, UE8M0, shape.tile, domain, pdl=pdl)


def norm_spec(tile: Tile, tiles_per_thread: int, max_warps: int, pdl: bool) -> RmsNormSpec:
    """Return the spec for bfloat16 rows and weights with a residual."""
    return RmsNormSpec(
        torch.bfloat16,
        UE8M0,
        tile,
        tiles_per_thread=tiles_per_thread,
        max_warps=max_warps,
        residual=True,
        pdl=pdl,
    )


def bind_spec(spec: StageSpec, buffer: StageBuffer) -> Callable[[], None]:
    """Return the compiled kernel on a buffer, without the checks of a public call."""

    def matrix(t: torch.Tensor) -> torch.Tensor:
        return t.unsqueeze(0) if spec.domain.batched else t

    source = buffer.gate_up if isinstance(spec, SiluMulSpec) else buffer.x
    results = matrix(buffer.q), matrix(buffer.sf)
    # No counts, no index; all padding rows have storage.
    common = matrix(source), *results, None, None, None, None, 0, 1, 0, MIN_EXPONENT
    others: tuple[object, ...] = ()
    if isinstance(spec, SiluMulSpec):
        bound, alpha, beta, weight = 0.0, 1.0, 0.0, None
        others = bound, alpha, beta, weight
    elif isinstance(spec, RmsNormSpec):
        residual, residual_out = matrix(buffer.residual), matrix(buffer.residual_out)
        offset, normalized = 0.0, None
        others = EPS, offset, buffer.weight, residual, residual_out, normalized
    return functools.partial(lookup.function(spec, architecture()), *common, *others)


class Ours(StageProvider):
    """The kernels of this package, as the public calls launch them."""

    ours = True

    def __init__(self, operation: Operation, launch: str):
        super().__init__(CUTE_QUANT, operation, launch, FLOAT32_ERROR)

    def bind(self, buffer: StageBuffer) -> Callable[[], None]:
        mn, k = buffer.x.shape
        spec = default_spec(self.operation, mn, k, self.launch == PDL)
        return bind_spec(spec, buffer)

    def check(self, problem: StageProblem) -> Check:
        check = super().check(problem)
        # The last buffer now holds the kernel's result, of every row.
        buffer = problem.buffers[-1]
        q, sf = self.public(buffer)
        same = torch.equal(q.view(torch.uint8), buffer.q.view(torch.uint8)) and torch.equal(
            sf, buffer.sf
        )
        if check.difference or same:
            return check
        return Check(f"cute_quant.{self.operation.name} gives other bits", check.differing)

    def public(self, buffer: StageBuffer) -> tuple[torch.Tensor, torch.Tensor]:
        if self.operation is SILU_MUL_QUANTIZE:
            q, sf = silu_mul_quantize(buffer.gate_up)
            return q, sf
        if self.operation is RMS_NORM_QUANTIZE:
            out = None, None, torch.empty_like(buffer.x)
            q, sf, *_ = rms_norm_quantize(
                buffer.x, buffer.weight, eps=EPS, residual=buffer.residual, out=out
            )
            return q, sf
        q, sf = quantize(buffer.x)
        return q, sf


class Ceiling(StageProvider):
    """A kernel that moves the same bytes but for the scales, without arithmetic."""

    ours = True

    def __init__(self, operation: Operation, launch: str):
        super().__init__(STREAM, operation, launch, EXACT)

    def calls(self, problem: StageProblem) -> list[Callable[[], None]]:
        return self.fastest(problem.buffers)

    def bind(self, buffer: StageBuffer) -> Callable[[], None]:
        return self.fastest([buffer])[0]

    def fastest(self, buffers: Sequence[StageBuffer]) -> list[Callable[[], None]]:
        """Return calls of the fastest kernel for these buffers."""
        memory = [self.words(buffer) for buffer in buffers]
        return ceiling.Ceiling(memory, pdl=self.launch == PDL).calls()

    def words(self, buffer: StageBuffer) -> ceiling.Words:
        """Return the words to read, and memory for those to write."""
        x = buffer.gate_up if self.operation.loads == 2 else buffer.x
        size = self.operation.stores * buffer.q.numel() // 4
        y = torch.empty(size, dtype=torch.int32, device=x.device)
        traffic = Traffic(self.operation.loads, self.operation.stores)
        return ceiling.Words(traffic, x.view(torch.int32).flatten(), y)

    def check(self, problem: StageProblem) -> Check:
        return Check("")  # The ceiling is checked where it is chosen.


class Triton(StageProvider):
    """A Triton kernel, in whichever shape of a tile is the fastest for the problem."""

    def __init__(self, operation: Operation):
        # Imported here: it is not everywhere, and everything else can do without.
        from bench import triton_stages

        super().__init__(TRITON, operation, PLAIN, FLOAT32_ERROR)
        self.kernels = triton_stages
        self.config: triton_stages.Config | None = None

    def calls(self, problem: StageProblem) -> list[Callable[[], None]]:
        configs = self.kernels.SILU_MUL_CONFIGS
        if self.operation is RMS_NORM_QUANTIZE:
            configs = self.kernels.rms_norm_configs(problem.k)
        launches = timing.launch_count(self.operation.bytes_moved(problem.mn, problem.k))
        graphs = {}
        for config in configs:
            self.config = config
            graphs[config] = timing.capture(super().calls(problem), launches)
        measured = timing.measure(graphs, TUNING_REPLAYS)
        self.config = min(measured, key=lambda config: measured[config].median)
        return super().calls(problem)

    def bind(self, buffer: StageBuffer) -> Callable[[], None]:
        assert self.config is not None  # `calls` comes before.
        results = buffer.q, buffer.sf, MIN_EXPONENT
        if self.operation is SILU_MUL_QUANTIZE:
            silu_mul = self.kernels.silu_mul_quantize
            return functools.partial(silu_mul, buffer.gate_up, *results, self.config)
        inputs = buffer.x, buffer.residual, buffer.residual_out, buffer.weight
        rms_norm = self.kernels.rms_norm_quantize
        return functools.partial(rms_norm, *inputs, *results, EPS, self.config)


def silu_mul(gate_up: torch.Tensor, y: torch.Tensor) -> None:
    """Compute SiLU of gates times ups, (mn, 2 k) to (mn, k), for a compiler to fuse."""
    gate, up = gate_up.chunk(2, 1)
    y.copy_(functional.silu(gate) * up)


def silu_mul_formula(gate_up: torch.Tensor, q: torch.Tensor, sf: torch.Tensor) -> None:
    """Compute the same, quantized into `q` and packed `sf`."""
    gate, up = gate_up.chunk(2, 1)
    formula(functional.silu(gate) * up, q, sf)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    residual_out: torch.Tensor,
    y: torch.Tensor,
) -> None:
    """Compute the sum and its normalized rows, all (mn, k), for a compiler to fuse."""
    total = x + residual
    residual_out.copy_(total)
    y.copy_(functional.rms_norm(total, weight.shape, weight, EPS))


def add_rms_norm_formula(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    residual_out: torch.Tensor,
    q: torch.Tensor,
    sf: torch.Tensor,
) -> None:
    """Compute the same, quantized into `q` and packed `sf`."""
    total = x + residual
    residual_out.copy_(total)
    formula(functional.rms_norm(total, weight.shape, weight, EPS), q, sf)


class Compiled(StageProvider):
    """``torch.compile`` of a function, for any number of rows and one k at a time."""

    functions: ClassVar[dict[Operation, Callable[..., None]]] = {
        SILU_MUL_QUANTIZE: silu_mul_formula,
        RMS_NORM_QUANTIZE: add_rms_norm_formula,
    }

    def __init__(self, operation: Operation, name: str = COMPILED, launch: str = PLAIN):
        super().__init__(name, operation, launch, BFLOAT16_ERROR)
        torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
        self.function = torch.compile(self.functions[operation], fullgraph=True)
        self.compiled: set[int] = set()

    def calls(self, problem: StageProblem) -> list[Callable[[], None]]:
        if problem.k not in self.compiled:
            self.bind(StageBuffer.random(COMPILED_ROWS, problem.k))()
            self.compiled.add(problem.k)
        return super().calls(problem)

    def bind(self, buffer: StageBuffer) -> Callable[[], None]:
        return self.bind_function(buffer, buffer.q, buffer.sf)

    def bind_function(self, buffer: StageBuffer, *results: torch.Tensor) -> Callable[[], None]:
        """Return the compiled function on the inputs of a buffer and some results."""
        if self.operation is SILU_MUL_QUANTIZE:
            tensors = buffer.gate_up, *results
        else:
            tensors = buffer.x, buffer.residual, buffer.weight, buffer.residual_out, *results
        for t in tensors:
            torch._dynamo.mark_static(t, t.ndim - 1)
            if t.ndim == 2:
                torch._dynamo.maybe_mark_dynamic(t, 0)
        return functools.partial(self.function, *tensors)


class TwoKernels(Compiled):
    """``torch.compile`` of the prologue, followed by the quantizer's kernel."""

    functions: ClassVar[dict[Operation, Callable[..., None]]] = {
        SILU_MUL_QUANTIZE: silu_mul,
        RMS_NORM_QUANTIZE: add_rms_norm,
    }

    def __init__(self, operation: Operation, launch: str):
        super().__init__(operation, TWO_KERNELS, launch)

    def bind(self, buffer: StageBuffer) -> Callable[[], None]:
        between = torch.empty_like(buffer.x)
        first = self.bind_function(buffer, between)
        mn, k = between.shape
        spec = default_spec(QUANTIZE_ALONE, mn, k, self.launch == PDL)
        common = buffer.q, buffer.sf, None, None, None, None, 0, 1, 0, MIN_EXPONENT
        second = functools.partial(lookup.function(spec, architecture()), between, *common)

        def call() -> None:
            first()
            second()

        return call


def create() -> tuple[list[StageProvider], list[str]]:
    """Return all providers that can run here, and a line for each that cannot."""
    providers: list[StageProvider] = []
    absent: list[str] = []
    for operation in OPERATIONS:
        providers += (Ceiling(operation, launch) for launch in LAUNCHES)
        providers += (Ours(operation, launch) for launch in LAUNCHES)
        if operation is QUANTIZE_ALONE:
            continue
        for name, make in others(operation):
            try:
                providers += make()
            except Exception as error:
                absent.append(f"{of_operation(operation.name, name)}: {first_line(error)}")
    return providers, absent


def others(operation: Operation) -> Sequence[tuple[str, Callable[[], list[StageProvider]]]]:
    """Return names with functions that make providers, each on its own: one may fail alone."""
    return (
        (TWO_KERNELS, lambda: [TwoKernels(operation, launch) for launch in LAUNCHES]),
        (COMPILED, lambda: [Compiled(operation)]),
        (TRITON, lambda: [Triton(operation)]),
    )
