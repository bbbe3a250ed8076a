"""Quantizers to measure. Each provider binds its calls to buffers and checks their results."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench.ceiling import Ceiling, Words
from bench.names import (
    COMPILED,
    COPY,
    CUTE_QUANT,
    FLOAT16_INPUT,
    FLOAT32_SCALES,
    PDL,
    PLAIN,
    STREAM,
    TRITON,
)
from bench.problem import FLOAT32, UE8M0, Buffer, Problem
from bench.run import Check, first_line
from bench.stream import Traffic
from bench.vllm_kernels import Module
from cute_quant import Format, quantize
from cute_quant.contract.dtypes import BYTES_PER_WORD, UE8M0_NAN
from cute_quant.jit import lookup
from cute_quant.kernels import heuristics
from cute_quant.kernels.config import QuantizeSpec

NAMES = (CUTE_QUANT, STREAM, "copy", "vllm", "triton", "torch", "deep_gemm")

PLAIN_ONLY = ("copy", "triton", "torch", "deep_gemm")

RECOMPILE_LIMIT = 64
MIN_EXPONENT = int(UE8M0.floor)


class Provider(abc.ABC):
    """A way to quantize.

    Attributes:
        name: in tables and plots.
        launch: one of ``names.LAUNCHES``.
        dtype: of the input.
        fmt: of the scales.
        everywhere: whether the targets need it at every shape; else it gives context at one k.
        ours: whether a wrong result is a defect of this package.
    """

    everywhere = True
    ours = False

    def __init__(
        self,
        name: str,
        launch: str = PLAIN,
        dtype: torch.dtype = torch.bfloat16,
        fmt: Format = UE8M0,
    ):
        self.name = name
        self.launch = launch
        self.dtype = dtype
        self.fmt = fmt

    def calls(self, problem: Problem) -> list[Callable[[], object]]:
        """Return a call on each buffer."""
        return [self.bind(buffer) for buffer in problem.buffers]

    def check(self, problem: Problem) -> Check:
        """Compare results with the reference bitwise."""
        return Check(self.difference(problem))

    def bytes_moved(self, problem: Problem) -> int:
        """Return the bytes that a quantizer moves."""
        return problem.bytes

    @abc.abstractmethod
    def bind(self, buffer: Buffer) -> Callable[[], tuple[torch.Tensor, torch.Tensor] | None]:
        """Return a call on a buffer, which returns (q, sf) unless it writes the buffer's."""

    def difference(self, problem: Problem) -> str:
        """Run on poisoned outputs, first and last buffer, and say how results are not right."""
        for index in (0, len(problem.buffers) - 1):
            buffer = problem.buffers[index]
            buffer.poison()
            q, sf = self.bind(buffer)() or (buffer.q, buffer.scales[self.fmt])
            difference = problem.difference(index, self.dtype, self.fmt, q, sf)
            if difference:
                return difference
        return ""


class CuteQuant(Provider):
    """The compiled kernel, called on tensors without the checks of `cute_quant.quantize`."""

    ours = True

    def __init__(
        self,
        name: str = CUTE_QUANT,
        launch: str = PLAIN,
        dtype: torch.dtype = torch.bfloat16,
        fmt: Format = UE8M0,
    ):
        super().__init__(name, launch, dtype, fmt)

    def bind(self, buffer: Buffer) -> Callable[[], None]:
        x, sf = buffer.input(self.dtype), buffer.scales[self.fmt]
        sms = lookup.multiprocessors(x.get_device())
        mn, k = x.shape
        tile = heuristics.shape(1, mn, k, self.fmt, False, sms, architecture()).tile
        spec = QuantizeSpec(self.dtype, self.fmt, tile, pdl=self.launch == PDL)
        function = lookup.function(spec, architecture())
        operands = x, buffer.q, sf, None, None, None, None, 0, 1, 0, self.fmt.floor
        return functools.partial(function, *operands)

    def difference(self, problem: Problem) -> str:
        difference = super().difference(problem)
        if difference:
            return difference
        # The last buffer now holds the kernel's result, of every row.
        buffer = problem.buffers[-1]
        q, sf = quantize(buffer.input(self.dtype), self.fmt)
        same = torch.equal(q.view(torch.uint8), buffer.q.view(torch.uint8)) and torch.equal(
            sf, buffer.scales[self.fmt]
        )
        return "" if same else "cute_quant.quantize gives other bits than its kernel"


class Stream(Provider):
    """The ceiling: the same bytes but for the scales, and no arithmetic."""

    def __init__(self, launch: str = PLAIN):
        super().__init__(STREAM, launch)

    def calls(self, problem: Problem) -> list[Callable[[], object]]:
        return [*self.fastest(problem.buffers)]

    def bind(self, buffer: Buffer) -> Callable[[], None]:
        return self.fastest([buffer])[0]

    def fastest(self, buffers: Sequence[Buffer]) -> list[Callable[[], None]]:
        """Return calls of the fastest kernel for these buffers."""
        words = [[t.view(torch.int32).flatten() for t in (b.x, b.q)] for b in buffers]
        memory = [Words(Traffic(), *tensors) for tensors in words]
        return Ceiling(memory, pdl=self.launch == PDL).calls()

    def difference(self, problem: Problem) -> str:
        return ""  # The ceiling is checked where it is chosen.


class Copy(Provider):
    """``torch.Tensor.copy_`` of as many bytes in all, half of them read and half written."""

    everywhere = False

    def __init__(self) -> None:
        super().__init__(COPY)

    def bind(self, buffer: Buffer) -> Callable[[], None]:
        source = torch.empty(buffer.q.numel() * 3 // 2, dtype=torch.uint8, device="cuda").random_()
        target = torch.empty_like(source)

        def call() -> None:
            target.copy_(source)

        return call

    def difference(self, problem: Problem) -> str:
        return ""  # torch's own: nothing of ours to check


class Vllm(Provider):
    """The kernel of a vLLM wheel, without what vLLM does around it."""

    def __init__(self, module: Module, launch: str):
        super().__init__(f"vLLM {module.version}", launch)
        self.module = module

    def bind(self, buffer: Buffer) -> Callable[[], None]:
        return self.module.bind(buffer.x, buffer.q, buffer.scales[UE8M0], self.launch == PDL)


class Triton(Provider):
    everywhere = False

    def __init__(self) -> None:
        from bench import triton_quantize

        super().__init__(TRITON)
        self.function = triton_quantize.quantize

    def bind(self, buffer: Buffer) -> Callable[[], None]:
        sf = buffer.scales[UE8M0]
        return functools.partial(self.function, buffer.x, buffer.q, sf, MIN_EXPONENT)


def formula(x: torch.Tensor, q: torch.Tensor, sf: torch.Tensor) -> None:
    """Compute the contract in plain torch for a compiler to fuse, into `q` and packed `sf`."""
    groups = x.unflatten(1, (-1, UE8M0.group_size)).float()
    amax = groups.abs().amax(2)
    carried = (amax.view(torch.int32) + 0x1FFFFF) >> 23
    finite = amax.isfinite()
    exponent = (carried - 8).clamp(min=MIN_EXPONENT).where(finite, UE8M0_NAN)
    multiplier = ((254 - exponent) << 23).view(torch.float32).where(finite, torch.nan)
    q.copy_((groups * multiplier.unsqueeze(2)).to(q.dtype).flatten(1))
    exponent = torch.nn.functional.pad(exponent, (0, -exponent.shape[1] % BYTES_PER_WORD))
    shifts = torch.arange(0, 32, 8, device=x.device, dtype=torch.int32)
    words = exponent.unflatten(1, (-1, BYTES_PER_WORD)) << shifts
    sf.copy_(words.sum(2, dtype=torch.int32))


class TorchCompile(Provider):
    """``torch.compile`` of the formula, for any number of rows and one k at a time."""

    everywhere = False

    def __init__(self) -> None:
        super().__init__(COMPILED)
        torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
        self.function = torch.compile(formula, fullgraph=True)

    def bind(self, buffer: Buffer) -> Callable[[], None]:
        tensors = buffer.x, buffer.q, buffer.scales[UE8M0]
        for t in tensors:
            torch._dynamo.maybe_mark_dynamic(t, 0)
            torch._dynamo.mark_static(t, 1)
        return functools.partial(self.function, *tensors)


class DeepGemm(Provider):
    """DeepGEMM's cast, in torch, and its kernel that packs the scales. Both allocate."""

    everywhere = False

    def __init__(self) -> None:
        import deep_gemm
        from deep_gemm.utils.math import per_token_cast_to_fp8

        super().__init__("DeepGEMM")
        self.cast = per_token_cast_to_fp8
        self.pack = deep_gemm.get_mn_major_tma_aligned_packed_ue8m0_tensor

    def bind(self, buffer: Buffer) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        def call() -> tuple[torch.Tensor, torch.Tensor]:
            q, sf = self.cast(buffer.x, use_ue8m0=True)
            return q, self.pack(sf)

        return call


def create(
    names: Sequence[str], launches: Sequence[str], wheels: Sequence[Path]
) -> tuple[list[Provider], list[str]]:
    """Return the providers of `names` that can run here, and a line for each that cannot.

    The streaming ceiling is always among them, since everything is measured against it.
    """
    providers: list[Provider] = []
    absent: list[str] = []
    for name, factory in _factories(launches, wheels):
        if name not in names and name != STREAM:
            continue
        try:
            providers += factory()
        except Exception as error:
            if name in (CUTE_QUANT, STREAM):
                raise
            absent.append(f"{name}: {first_line(error)}")
    for provider in [p for p in providers if isinstance(p, Vllm) and p.launch == PDL]:
        if not provider.module.waits:
            providers.remove(provider)
            absent.append(f"{provider.name}, {PDL}: its code does not wait for its predecessor")
    if PLAIN not in launches:
        absent += [f"{name}: launched plainly only" for name in PLAIN_ONLY if name in names]
    if "vllm" in names and not wheels:
        absent.append("vllm: point to a wheel, or to what was extracted from one, with --vllm")
    return providers, absent


def _factories(
    launches: Sequence[str], wheels: Sequence[Path]
) -> list[tuple[str, Callable[[], list[Provider]]]]:
    """Return names with functions that make providers, each on its own: one may fail alone."""
    factories: list[tuple[str, Callable[[], list[Provider]]]] = [
        (STREAM, lambda: [Stream(launch) for launch in launches]),
        (CUTE_QUANT, lambda: [CuteQuant(launch=launch) for launch in launches]),
    ]
    if PLAIN in launches:
        factories += [
            (CUTE_QUANT, lambda: [CuteQuant(FLOAT16_INPUT, dtype=torch.float16)]),
            (CUTE_QUANT, lambda: [CuteQuant(FLOAT32_SCALES, fmt=FLOAT32)]),
        ]
    factories += [("vllm", functools.partial(_vllm, wheel, launches)) for wheel in wheels]
    if PLAIN in launches:
        factories += [
            ("copy", lambda: [Copy()]),
            ("triton", lambda: [Triton()]),
            ("torch", lambda: [TorchCompile()]),
            ("deep_gemm", lambda: [DeepGemm()]),
        ]
    return factories


def _vllm(wheel: Path, launches: Sequence[str]) -> list[Provider]:
    # Wheels hold code for the plain architecture, which runs on the specific one.
    module = Module(wheel, architecture().removesuffix("a"))
    return [Vllm(module, launch) for launch in launches]


def architecture() -> str:
    """Return the target for the current device."""
    return lookup.architecture(torch.cuda.current_device())
