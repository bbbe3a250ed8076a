"""Print the functions that a call passes through.

    python docs/internals/walk.py

Each line is a function of the package that a warm call enters, in order, with the names of its
arguments. It takes a GPU if there is one, else the CPU, where only the outer functions are shown.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import cute_quant as cq

PACKAGE = Path(cq.__file__).parent
CPU_DEPTH = 5


def walk(call: Any, max_depth: int) -> list[str]:
    """Return a line for each function of the package that `call` enters, up to a depth."""
    lines: list[str] = []
    depth = 0

    def profile(frame: FrameType, event: str, _: object) -> None:
        nonlocal depth
        path = Path(frame.f_code.co_filename)
        if not path.is_relative_to(PACKAGE):
            return
        if event == "call":
            code = frame.f_code
            names = ", ".join(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
            where = path.relative_to(PACKAGE).with_suffix("")
            if depth < max_depth:
                lines.append(f"{'  ' * depth}{where}: {code.co_name}({names})")
            depth += 1
        elif event == "return":
            depth -= 1

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return lines


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(16, 7168, device=device).to(torch.bfloat16)
    out = cq.quantize(x)
    launch = cq.bind(x, out=out)
    calls = {
        "quantize(x)": lambda: cq.quantize(x),
        "quantize(x, out=(q, sf))": lambda: cq.quantize(x, out=out),
        "launch()": launch,
    }
    for name, call in calls.items():
        call()
        lines = walk(call, sys.maxsize if device == "cuda" else CPU_DEPTH)
        noun = "function" if len(lines) == 1 else "functions"
        print(f"{name} on {device}" + f", {len(lines)} {noun}" * (device == "cuda"))
        print(*(f"  {line}" for line in lines), sep="\n")


if __name__ == "__main__":
    main()
