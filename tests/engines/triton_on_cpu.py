"""Triton's interpreter, whose casts are mended.

Its casts to e4m3 round ties away from zero and lose a carry, those to bfloat16 truncate, and it
multiplies numbers of bfloat16 as if their bits were integers.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

# Before triton is imported. Without a visible device vLLM takes Triton without a driver.
os.environ["TRITON_INTERPRET"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import triton.language as tl
from triton.runtime import interpreter

_convert = interpreter._convert_float
_NARROW = {tl.float8e4nv: torch.float8_e4m3fn, tl.bfloat16: torch.bfloat16}


def _convert_float(data: Any, source: Any, result: Any, rounding: Any) -> Any:
    if source == tl.float32 and result in _NARROW:
        rounded = torch.from_numpy(np.ascontiguousarray(data)).to(_NARROW[result])
        bits = torch.uint8 if result == tl.float8e4nv else torch.int16
        return rounded.view(bits).numpy()
    return _convert(data, source, result, rounding)


_binary = interpreter.InterpreterBuilder.binary_op


def _binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
    if lhs.dtype.scalar != tl.bfloat16:
        return _binary(self, lhs, rhs, op)
    wide = [self.cast_impl(operand, tl.float32) for operand in (lhs, rhs)]
    return self.cast_impl(_binary(self, *wide, op), tl.bfloat16)


def mend() -> None:
    """Have the interpreter round as GPUs do."""
    interpreter._convert_float = _convert_float
    interpreter.InterpreterBuilder.binary_op = _binary_op
