"""Checks of arguments that all operations have, and who runs a call: the launcher, or a tracer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.compiler import is_dynamo_compiling

from cute_quant.contract.dtypes import describe
from cute_quant.contract.formats import Format
from cute_quant.contract.prologues import Prologue
from cute_quant.contract.torch_private import is_fake, jit_tracing_state, num_dispatch_modes
from cute_quant.dispatch import operators

Out = Sequence[torch.Tensor | None]
_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)


def check_input(function: str, name: str, t: object) -> None:
    """Check that an input is a tensor that requires no gradient."""
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {describe(t)}")
    if t.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(operators.not_differentiable(function, name))


def check_bool(name: str, value: object) -> None:
    """Check that an argument is True or False."""
    if value is not False and value is not True:
        raise TypeError(f"{name}: expected a bool, got {describe(value)}")


def is_traced(t: torch.Tensor) -> bool:
    """Return whether the dispatcher has to see a call: a tracer, a mode or a subclass wants it."""
    if is_dynamo_compiling():
        return True
    if jit_tracing_state() is not None:
        raise RuntimeError(
            "torch.jit.trace is not supported, it would record results as constants: use "
            "torch.export or torch.compile"
        )
    return num_dispatch_modes() > 0 or type(t) not in _PLAIN_TYPES or t.is_meta


def goes_to_tracer(inputs: Sequence[torch.Tensor], check: bool, contents: str) -> bool:
    """Return whether the dispatcher has to see a call, which then may not check `contents`."""
    if not any(map(is_traced, inputs)):
        return False
    if check:
        raise ValueError(
            "check: expected False under a tracer or dispatch mode, or with a tensor subclass, "
            f"whose {contents} are not read"
        )
    return True


def inputs_of(x: torch.Tensor, prologue: Prologue | None) -> list[torch.Tensor]:
    """Return the inputs of a call that a tracer may ask for."""
    # A fake beside a real input is a mistake that the checks name.
    further = () if prologue is None else prologue.operands
    return [x, *(t for t in further if isinstance(t, torch.Tensor) and not is_fake(t))]


class Outputs(NamedTuple):
    """Memory of the caller, None where there is none."""

    q: torch.Tensor | None = None
    sf: torch.Tensor | None = None
    row_scales: torch.Tensor | None = None
    residual: torch.Tensor | None = None


def outputs_of(out: Out | None, fmt: Format, *, with_residual: bool = False) -> Outputs:
    """Return what `out` gives, by name."""
    if out is None:
        return Outputs()
    names = ["q", "sf"]
    if isinstance(fmt, Format) and fmt.row_scale:
        names.append("row_scales")
    expected = [f"({', '.join(names)})"]
    if with_residual:
        names.append("residual")
        expected.append(f"({', '.join(names)})")
    most = len(names)
    least = most - with_residual
    if not isinstance(out, (tuple, list)) or not least <= len(out) <= most:
        got = f"{len(out)} items" if isinstance(out, (tuple, list)) else describe(out)
        raise TypeError(f"out: expected {' or '.join(expected)}, got {got}")
    return Outputs(**dict(zip(names, out, strict=False)))
