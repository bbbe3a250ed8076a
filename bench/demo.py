"""Quantize real activations and print what came of it.

python -m bench.demo
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open

import cute_quant as cq
from cute_quant.lab import timing

ACTIVATIONS = Path(__file__).parent / "data" / "activations.safetensors"
FILLING_ROWS = 16384
CPU_CALLS = 5
SHOWN_WIDTH = 36


def show(label: str, value: object) -> None:
    print(f"  {label:<{SHOWN_WIDTH}}{value}")


def describe(t: torch.Tensor) -> str:
    name = str(t.dtype).removeprefix("torch.")
    return f"{name} {tuple(t.shape)}, strides {t.stride()}, {t.numel() * t.element_size():,} bytes"


def decibels(signal: torch.Tensor, result: torch.Tensor) -> float:
    noise = result.float() - signal.float()
    return 10 * torch.log10(signal.float().square().sum() / noise.square().sum()).item()


def nbytes(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def demonstrate(name: str, x: torch.Tensor) -> None:
    print(f"\n{name}")
    q, sf = cq.quantize(x)
    show("x", describe(x))
    show("q", describe(q))
    show("sf, packed UE8M0 for SM100", describe(sf))
    q32, sf32 = cq.quantize(x, cq.DEEP_GEMM_SM90)
    show("sf, float32 for SM90", describe(sf32))
    show("bytes saved", f"{1 - nbytes(q, sf) / nbytes(x):.1%}")
    show("signal to noise", f"{decibels(x, cq.dequantize(q, sf)):.1f} dB")
    restored = cq.dequantize(q32, sf32, cq.DEEP_GEMM_SM90)
    show("  with float32 scales", f"{decibels(x, restored):.1f} dB")
    exponents = (sf.unsqueeze(2) >> torch.arange(0, 32, 8, device=x.device) & 0xFF).flatten(1)
    groups = x.shape[1] // 128
    show("scale exponents of the first row", exponents[0, :groups].tolist())
    show("  bytes that fill up the last word", exponents[0, groups:].tolist())


def call_time(x: torch.Tensor) -> None:
    """Time the packed quantizer, on a GPU on enough copies of `x` to fill it."""
    if x.is_cuda:
        x = x.repeat(-(-FILLING_ROWS // len(x)), 1)
    out = cq.quantize(x)
    moved = nbytes(x, *out)
    if x.is_cuda:
        buffers = [(x.clone(), cq.quantize(x)) for _ in range(timing.buffer_count(moved))]
        calls = [lambda x=x, out=out: cq.quantize(x, out=out) for x, out in buffers]
        seconds = timing.median_seconds({"quantize": timing.capture(calls)})["quantize"]
        method = "median of graph replays"
    else:
        seconds = fastest(lambda: cq.quantize(x, out=out))
        method = f"fastest of {CPU_CALLS} calls of the reference on the CPU"
    print(f"\ntime of a call, {method}")
    show(
        f"quantize, x {tuple(x.shape)}",
        f"{significant(seconds * 1e6)} us, {significant(moved / seconds / 1e9)} GB/s",
    )


def fastest(call: Callable[[], object]) -> float:
    """Return the seconds of the fastest of some calls: other work on the CPU only adds to them."""
    seconds = []
    for _ in range(CPU_CALLS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def significant(number: float, digits: int = 3) -> str:
    """Return a positive number with as many significant digits, and with all before its point."""
    decimals = max(digits - 1 - math.floor(math.log10(number)), 0)
    return f"{number:,.{decimals}f}"


def show_machine_code() -> None:
    from cute_quant.kernels.config import QuantizeSpec
    from cute_quant.lab.machine_code import machine_code

    print("\nno GPU here: the kernel for SM100 (Blackwell), compiled on this machine")
    start = time.perf_counter()
    code = machine_code(QuantizeSpec(torch.bfloat16, cq.DEEP_GEMM), "sm_100a")
    show("compiled and disassembled in", f"{time.perf_counter() - start:.1f} s")
    show("instructions, registers", f"{len(code.opcodes)}, {code.registers}")
    show("loads", ", ".join(op for op in code.opcodes if op.startswith("LDG")))
    show("stores", ", ".join(op for op in code.opcodes if op.startswith("STG")))
    show("shuffles", code.count("SHFL"))
    show("conversions to e4m3, two at a time", code.count("F2FP"))
    show("shared memory, barriers, calls", code.count("LDS", "STS", "BAR", "CALL"))


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = (
        f"CUDA kernel on {torch.cuda.get_device_name()}" if device == "cuda" else "reference on CPU"
    )
    print(f"cute_quant {cq.__version__}, torch {torch.__version__}, path: {path}")
    with safe_open(ACTIVATIONS, "pt") as file:
        print(f"activations of {file.metadata()['model']}, {file.metadata()['layer']}")
        activations = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118
    for name, x in activations.items():
        demonstrate(name, x)
    call_time(activations["intermediate"])
    if device == "cpu":
        show_machine_code()


if __name__ == "__main__":
    main()
