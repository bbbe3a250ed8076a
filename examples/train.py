"""A small transformer, trained in bf16 and in FP8 from one seed: losses, times and memory.

    python examples/train.py [--steps 250] [--plot losses.svg]

The text is the source of Python's standard library, byte by byte. Both runs begin with the same
weights, see the same batches and keep weights and moments in float32. They differ in their linear
layers alone: ``torch.nn.Linear`` under autocast to bfloat16, or ``cute_quant.nn.Fp8Linear``, whose
three GEMMs are DeepGEMM's. It compiles each of its kernels for some seconds in the first steps. On
the CPU a tiny model is trained, with GEMMs of torch.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sysconfig
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cute_quant.lab.drawing import Box, Drawing, Words
from cute_quant.nn import Fp8Linear

BYTES = 256
WARM_UP = 20
"""Steps in which the learning rate grows; the first of them are left out of times."""
LAST = 50
"""Steps whose mean is the loss at the end."""
TICKS = 2
"""Of the picture, in a nat."""
COLOURS = ("b0", 6.0), ("mark", 1.5)
"""Names of colours, and pixels, of the lines of bf16 and FP8."""


class Size(NamedTuple):
    """Sizes of the model, and of a batch."""

    width: int
    heads: int
    layers: int
    intermediate: int
    length: int
    batch: int
    rate: float


LARGE = Size(2048, 16, 8, 5632, length=1024, batch=16, rate=3e-4)
TINY = Size(64, 4, 2, 160, length=48, batch=4, rate=3e-3)


class Block(nn.Module):
    """Attention and SwiGLU, each behind a norm and beside a residual."""

    def __init__(self, size: Size, linear: type[nn.Linear]):
        super().__init__()
        self.heads = size.heads
        self.norms = nn.ModuleList(nn.RMSNorm(size.width, eps=1e-6) for _ in range(2))
        self.qkv = linear(size.width, 3 * size.width, bias=False)
        self.out = linear(size.width, size.width, bias=False)
        self.gate_up = linear(size.width, 2 * size.intermediate, bias=False)
        self.down = linear(size.intermediate, size.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, length, width of a head)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norms[1](x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Transformer(nn.Module):
    """Bytes to the logits of the next one. The first and the last layer stay in bf16."""

    def __init__(self, size: Size, linear: type[nn.Linear]):
        super().__init__()
        self.embedding = nn.Embedding(BYTES, size.width)
        self.positions = nn.Embedding(size.length, size.width)
        self.blocks = nn.Sequential(*(Block(size, linear) for _ in range(size.layers)))
        self.norm = nn.RMSNorm(size.width, eps=1e-6)
        self.head = nn.Linear(size.width, BYTES, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                depth = 2 * size.layers if name.endswith(("out.weight", "down.weight")) else 1
                nn.init.normal_(p, std=0.02 / depth**0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


class Run(NamedTuple):
    """The record of a training.

    Attributes:
        losses: of each step, in nats a byte.
        milliseconds: the median of a step.
        mebibytes: the most memory that was allocated on the GPU, 0 on the CPU.
    """

    name: str
    losses: list[float]
    milliseconds: float
    mebibytes: float

    @property
    def last(self) -> float:
        """Return the mean loss of the last steps."""
        return statistics.mean(self.losses[-LAST:])


def text() -> Tensor:
    """Return the bytes of the standard library's modules."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(p.read_bytes() for p in paths)), dtype=torch.uint8)


def train(
    name: str, linear: type[nn.Linear], size: Size, steps: int, data: Tensor, device: str
) -> Run:
    """Train a model, with weights and batches of one seed."""
    torch.manual_seed(0)
    model = Transformer(size, linear).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=size.rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / WARM_UP))
    generator = torch.Generator().manual_seed(1)
    losses, times = [], []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(steps):
        starts = torch.randint(len(data) - size.length - 1, (size.batch,), generator=generator)
        places = starts[:, None] + torch.arange(size.length + 1)
        tokens = data[places].long().to(device)
        started = time.perf_counter()
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # waits for the GPU
        times.append(1e3 * (time.perf_counter() - started))
    most = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else 0.0
    return Run(name, losses, statistics.median(times[min(WARM_UP, steps // 2) :]), most)


def smoothed(losses: list[float], weight: float = 0.9) -> list[float]:
    """Return moving averages, less and less of the first."""
    averages, sum_, total = [], 0.0, 0.0
    for loss in losses:
        sum_, total = weight * sum_ + (1 - weight) * loss, weight * total + (1 - weight)
        averages.append(sum_ / total)
    return averages


def picture(runs: list[Run]) -> Drawing:
    """Draw the losses of runs over their steps, the first as a band that the second crosses."""
    width, height, left, top = 640, 300, 60, 50
    title = "Training loss, nats a byte, moving average"
    drawing = Drawing(f"{title}, over the steps", left + width + 30, top + height + 75)
    curves = [smoothed(run.losses) for run in runs]
    steps = len(curves[0])
    low, high = (pick(pick(c) for c in curves) for pick in (min, max))
    scale, step = height / max(high - low, 1e-9), width / steps
    drawing.add(Words(left, 28, title, 15, bold=True))
    for tick in range(math.ceil(low * TICKS), math.floor(high * TICKS) + 1):
        y = top + (high - tick / TICKS) * scale
        drawing.add(
            Box(left, y, width, 1, "faint"),
            Words(left - 8, y + 4, f"{tick / TICKS:g}", anchor="end"),
        )
    for i in range(6):
        place = left + width * i / 5
        drawing.add(Words(place, top + height + 22, f"{steps * i / 5:.0f}", anchor="middle"))
    drawing.add(Words(left + width, top + height + 46, "steps", anchor="end"))
    for number, (run, curve) in enumerate(zip(runs, curves, strict=True)):
        colour, thick = COLOURS[number]
        for i, loss in enumerate(curve):
            y, before = (top + (high - value) * scale for value in (loss, curve[max(i - 1, 0)]))
            up, down = min(y, before) - thick / 2, max(y, before) + thick / 2
            drawing.add(Box(left + i * step, up, step, down - up, colour))
        y = top + height + 46 + 20 * number
        words = f"{run.name}, {run.last:.4f} at the end, {run.milliseconds:.1f} ms a step"
        drawing.add(Box(left, y - 9, 10, 10, colour), Words(left + 16, y, words))
    return drawing


def report(runs: list[Run]) -> str:
    """Return a table of runs, with the difference of their losses."""
    lines = [f"{'':6}{'loss at the end':>16}{'ms a step':>12}{'MiB at most':>13}"]
    lines += [
        f"{run.name:6}{run.last:16.4f}{run.milliseconds:12.2f}{run.mebibytes:13.0f}" for run in runs
    ]
    first, last = runs[0].last, runs[-1].last
    lines.append(f"difference {last - first:+.4f}, {100 * (last - first) / first:+.2f} %")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> list[Run]:
    """Train both models, and print and draw how they did."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=250, help="of each run (250)")
    parser.add_argument("--plot", type=Path, help="where to draw the losses, as SVG")
    options = parser.parse_args(arguments)
    device, size = ("cuda", LARGE) if torch.cuda.is_available() else ("cpu", TINY)
    where = torch.cuda.get_device_name() if device == "cuda" else "the CPU, so a tiny model"
    data = text()
    print(f"{where}; {size}, {options.steps} steps on {len(data)} bytes\n")
    kinds = {"bf16": nn.Linear, "FP8": Fp8Linear}
    runs = [
        train(name, linear, size, options.steps, data, device) for name, linear in kinds.items()
    ]
    print(report(runs))
    if options.plot:
        options.plot.write_text(picture(runs).svg(), encoding="utf-8")
    return runs


if __name__ == "__main__":
    main()
