"""Quantize the linear layers of a Hugging Face checkpoint of safetensors.

Weights are bf16, fp16 or float32, or e4m3 with float32 scales of blocks of 128 x 128. Heads,
embeddings, norms, routers, vision towers and all that is no linear layer are copied, and so are the
tokenizer and other files. --list prints which is which.

A run that was interrupted goes on when the command is given again.

examples:
  cute-quant checkpoint Qwen3-8B -o Qwen3-8B-FP8
  cute-quant checkpoint DeepSeek-V3 -o DeepSeek-V3-UE8M0 --format fp8-ue8m0
  cute-quant checkpoint Qwen3-8B -o Qwen3-8B-NVFP4 --format nvfp4 --keep 'layers.0.*'
  cute-quant checkpoint Qwen3-8B --list
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from cute_quant.checkpoint import (
    CONVENTIONS,
    Conversion,
    Plan,
    plan_checkpoint,
    quantize_checkpoint,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to its parser."""
    parser.add_argument("source", type=Path, metavar="DIR", help="the checkpoint")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="directory to make")
    parser.add_argument("--format", choices=CONVENTIONS, default="fp8", help="(default: fp8)")
    parser.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="PATTERN",
        help="modules to leave as they are too, such as o_proj or 'layers.0.*', by the end of "
        "their names; may be given several times",
    )
    parser.add_argument(
        "--device", help="cpu or cuda, to the same bytes (default: the GPU if there is one)"
    )
    parser.add_argument(
        "--allow-non-finite",
        action="store_true",
        help="go on where a weight is Inf or NaN: its block becomes NaN",
    )
    parser.add_argument("--list", action="store_true", help="print the choice, write nothing")
    parser.add_argument("--json", action="store_true", help="print JSON")
    lines = [f"  {name:10} {c.what} ({c.quant_method})" for name, c in CONVENTIONS.items()]
    parser.epilog = "\n".join(["formats, and quant_method of config.json:", *lines])


def run(options: argparse.Namespace) -> int:
    """Run the command, and return the exit status."""
    if options.list:
        plan = plan_checkpoint(options.source, options.format, keep=options.keep)
        names = {"quantized": list(plan.quantized), "kept": list(plan.kept)}
        print(json.dumps(names, indent=1) if options.json else "\n".join(_plan_lines(plan)))
        return 0
    if options.output is None:
        raise ValueError("expected -o DIR, the directory to make")
    done = quantize_checkpoint(
        options.source,
        options.output,
        options.format,
        keep=options.keep,
        device=options.device,
        allow_non_finite=options.allow_non_finite,
    )
    print(json.dumps(asdict(done), indent=1) if options.json else "\n".join(_lines(done)))
    return 0


def _plan_lines(plan: Plan) -> list[str]:
    tensors = plan.checkpoint.tensors.values()
    lines = []
    for tensor in tensors:
        if tensor.name in plan.quantized:
            lines.append(f"quantize {tensor.name} {tensor.dtype} {list(tensor.shape)}")
        elif tensor.name in plan.kept:
            lines.append(f"keep     {tensor.name} {tensor.dtype} {list(tensor.shape)}")
    return lines


def _lines(done: Conversion) -> list[str]:
    lines = [
        f"{done.quantized} tensors quantized, {done.kept} kept, "
        f"{done.bytes_read / 2**20:.1f} MiB to {done.bytes_written / 2**20:.1f} MiB, in "
        f"{done.output}"
    ]
    if done.resumed:
        lines.append(f"{done.resumed} shards are of an earlier run")
    if done.left_out:
        lines.append(f"not copied: {', '.join(done.left_out)}")
    return lines
