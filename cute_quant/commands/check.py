"""Hold every kernel against the reference on this machine's GPU, one line each.

Without a GPU, see that each compiles for each architecture. Kernels are those of bf16 and the
formats of DeepGEMM, or of a preset.

examples:
  cute-quant check
  cute-quant check --preset all --json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

import cute_quant
from cute_quant import compile, naming, presets
from cute_quant.formats import ceil_div
from cute_quant.launch import TWO_ROWS, TWO_ROWS_FROM
from cute_quant.rows import Indexed, Masked, PrefixSum, Rows
from cute_quant.specs import DequantizeSpec, QuantizeSpec, Spec

COLUMNS = 1024
FEW_ROWS = 200
MATRICES = 3
SEED = 0


@dataclass(frozen=True)
class Outcome:
    """What became of one kernel.

    Attributes:
        did: whether it was run or only compiled.
        error: what is wrong, None if nothing is.
    """

    kernel: str
    arch: str
    did: str
    error: str | None

    def __str__(self) -> str:
        verdict = "ok" if self.error is None else "FAILED"
        line = f"{verdict:6} {self.did:8} {self.arch:8} {self.kernel}"
        return line if self.error is None else f"{line}: {self.error}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=presets.PRESETS, help="kernels by use")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    specs = presets.PRESETS[options.preset]() if options.preset else presets.of_each_kind()
    outcomes = []
    for outcome in _outcomes(specs):
        outcomes.append(outcome)
        if not options.json:
            print(outcome, flush=True)
    failed = sum(outcome.error is not None for outcome in outcomes)
    if options.json:
        print(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
    else:
        print(f"{len(outcomes) - failed} of {len(outcomes)} are right")
    return 1 if failed else 0


def _outcomes(specs: list[Spec]) -> Iterator[Outcome]:
    gpu = torch.cuda.is_available()
    if gpu:
        architectures = [compile.architecture(torch.cuda.current_device())]
    else:
        architectures = list(compile.ARCHITECTURES.values())
    for arch in architectures:
        for spec in specs:
            runs = gpu and isinstance(spec, (QuantizeSpec, DequantizeSpec))
            error = None
            try:
                if runs:
                    error = _difference(spec)
                else:
                    compile.build(compile.kernel(spec), arch)
            except Exception as raised:
                error = " ".join(f"{type(raised).__name__}: {raised}".split())
            yield Outcome(naming.spec_name(spec), arch, "ran" if runs else "compiled", error)


def _difference(spec: QuantizeSpec | DequantizeSpec) -> str | None:
    """How the GPU's result differs from the CPU's, None if it does not."""
    for name, actual, expected in zip(
        ("values", "scales"), _results(spec, "cuda"), _results(spec, "cpu"), strict=False
    ):
        differing = int((actual.cpu() != expected).sum())
        if differing:
            return f"{differing} of {expected.numel()} bytes of {name} differ from the reference"
    return None


def _results(spec: QuantizeSpec | DequantizeSpec, device: str) -> tuple[torch.Tensor, ...]:
    """The bytes of everything that a call which takes this kernel writes."""
    fmt = spec.fmt
    choices = {
        "group_size": fmt.group_size,
        "scale_format": fmt.scale_format,
        "dtype": fmt.dtype,
        "round_scale": fmt.round_scale,
    }
    domain = presets.DENSE_ROWS if isinstance(spec, DequantizeSpec) else spec.domain
    generator = torch.Generator().manual_seed(SEED)
    mn = FEW_ROWS
    if isinstance(spec, QuantizeSpec) and spec.tile == TWO_ROWS:
        sms = torch.cuda.get_device_properties(0).multi_processor_count
        mn = ceil_div(TWO_ROWS_FROM * sms, COLUMNS)
    batch_shape = (MATRICES,) if domain.batched else ()
    index = None
    if domain.gathered:
        index = torch.randint(FEW_ROWS, (*batch_shape, mn), dtype=torch.int32, generator=generator)
    shape = (FEW_ROWS, COLUMNS) if domain.gathered else (*batch_shape, mn, COLUMNS)
    x = _activations(shape, spec.dtype, generator).to(device)
    if isinstance(spec, QuantizeSpec) and spec.fake:
        return (_bytes(cute_quant.fake_quantize(x, **choices)),)
    if isinstance(spec, DequantizeSpec):
        q, sf = cute_quant.quantize(x, **choices)
        return (_bytes(cute_quant.dequantize(q, sf, fmt.group_size, spec.dtype)),)
    q = torch.zeros((*batch_shape, mn, COLUMNS), dtype=fmt.dtype, device=device)
    sf = fmt.empty_scales(batch_shape, mn, COLUMNS, q.device)
    storage = torch.empty(0, dtype=torch.uint8, device=device).set_(sf.untyped_storage())
    storage.zero_()
    rows = _rows(domain.kind, mn, device, generator)
    index = None if index is None else index.to(device)
    cute_quant.quantize(x, **choices, rows=rows, index=index, out=(q, sf))
    return _bytes(q), storage


def _activations(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    """Rows of all magnitudes, and some with what is not finite."""
    x = torch.randn(shape, generator=generator)
    x *= 2.0 ** torch.randint(-14, 14, (*shape[:-1], 1), generator=generator)
    x[..., 1, :] = 0.0
    x[..., 2, 5] = float("nan")
    x[..., 3, 200] = float("inf")
    return x.to(dtype)


def _rows(kind: str, mn: int, device: str, generator: torch.Generator) -> Rows | None:
    def integers(*values: Any) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    if kind == Masked.kind:
        return Masked(integers(0, mn // 3, mn))
    if kind == PrefixSum.kind:
        return PrefixSum(integers(mn // 4, mn // 2 + 64))
    if kind == Indexed.kind:
        experts = torch.randint(-1, 4, (mn,), dtype=torch.int32, generator=generator)
        return Indexed(experts.to(device))
    return None


def _bytes(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view(torch.uint8)
