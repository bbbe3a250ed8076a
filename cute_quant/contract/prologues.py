"""What comes before the quantizer in the same kernel: operations whose results it takes.

A prologue holds the options and the further tensors of one call. What it computes is in
`reference`, and what its tensors have to look like in `checks`.
"""

from __future__ import annotations

import numbers
from typing import NamedTuple

import torch

from cute_quant.contract.formats import to_float32

FUSED = "fused"
UNFUSED = "unfused"
ROUNDINGS = (FUSED, UNFUSED)
"""Whether values stay as exact as float32 until they are quantized, or are rounded to the input's
dtype after each operation, as the same operations of torch do."""

FLOAT32_MAX = (2 - 2.0**-23) * 2.0**127
MAX_ALPHA = 2.0**100
"""Which leaves room for its product with log2(e)."""


class SiluMul(NamedTuple):
    """A gated activation: ``(up + beta) * gate * sigmoid(alpha * gate)``. Get one from
    :func:`make_silu_mul`.

    Attributes:
        interleaved: whether gates and ups take turns in a row, rather than follow each other.
        clamp: upper bound of gates and bound of the magnitudes of ups, or None.
        alpha, beta: numbers of the formula.
        rounding: one of ``ROUNDINGS``.
        weight: a factor for each row of the result, float32, or None.
    """

    interleaved: bool
    clamp: float | None
    alpha: float
    beta: float
    rounding: str
    weight: torch.Tensor | None

    input_name = "gate_up"
    max_columns = 2**21

    def columns(self, columns: int) -> int:
        """Columns of the result of an input that has so many."""
        return columns // 2

    @property
    def options(self) -> tuple:
        """All but the tensors, in the order that operators take them."""
        return self.interleaved, self.clamp, self.alpha, self.beta, self.rounding

    @property
    def tensors(self) -> dict[str, torch.Tensor | None]:
        """All tensors of the call that are not the quantizer's, by the names of their arguments."""
        return {"weight": self.weight}

    @property
    def operands(self) -> tuple[torch.Tensor | None, ...]:
        """They, in the order that the kernel takes them."""
        return (self.weight,)

    @property
    def reads(self) -> dict[str, torch.Tensor]:
        """Those that are read and not written."""
        return {} if self.weight is None else {"weight": self.weight}

    @property
    def writes(self) -> dict[str, torch.Tensor]:
        """Those that are written."""
        return {}


class RmsNorm(NamedTuple):
    """Rows over their root mean square, after a residual is added. Get one from
    :func:`make_rms_norm`.

    Attributes:
        weight: (k,), a factor for each column.
        eps: what is added to the mean of squares.
        weight_offset: what is added to `weight`.
        rounding: one of ``ROUNDINGS``.
        residual: of x's shape and dtype, what is added to x, or None.
        residual_out: where the sum goes: `residual` itself if in place, None if there is none.
        normalized: of x's shape and dtype, where the values go that are quantized, or None.
    """

    weight: torch.Tensor
    eps: float
    weight_offset: float
    rounding: str
    residual: torch.Tensor | None
    residual_out: torch.Tensor | None
    normalized: torch.Tensor | None

    input_name = "x"
    max_columns = 2**15

    def columns(self, columns: int) -> int:
        """Columns of the result of an input that has so many."""
        return columns

    @property
    def options(self) -> tuple:
        """All but the tensors, in the order that operators take them."""
        return self.eps, self.weight_offset, self.rounding

    @property
    def tensors(self) -> dict[str, torch.Tensor | None]:
        """All tensors of the call that are not the quantizer's, by the names of their arguments."""
        return {
            "weight": self.weight,
            "residual": self.residual,
            "out residual": None if self.residual_out is self.residual else self.residual_out,
            "normalized": self.normalized,
        }

    @property
    def operands(self) -> tuple[torch.Tensor | None, ...]:
        """They, in the order that the kernel takes them."""
        return self.weight, self.residual, self.residual_out, self.normalized

    @property
    def in_place(self) -> bool:
        """Whether the sum replaces the residual, of a call on real tensors that has one."""
        old, new = self.residual, self.residual_out
        return old is new or (
            old.data_ptr() == new.data_ptr()
            and old.shape == new.shape
            and old.stride() == new.stride()
        )

    @property
    def reads(self) -> dict[str, torch.Tensor]:
        """Those that are read and not written."""
        if self.residual is None or self.in_place:
            return {"weight": self.weight}
        return {"weight": self.weight, "residual": self.residual}

    @property
    def writes(self) -> dict[str, torch.Tensor]:
        """Those that are written."""
        name = "residual" if self.residual_out is self.residual else "out residual"
        outputs = {name: self.residual_out, "normalized": self.normalized}
        return {name: t for name, t in outputs.items() if t is not None}


Prologue = SiluMul | RmsNorm


def make_silu_mul(
    interleaved: bool,
    clamp: float | None,
    alpha: float,
    beta: float,
    rounding: str,
    weight: torch.Tensor | None,
) -> SiluMul:
    """A prologue of these options, its numbers rounded to float32. `weight` is not looked at.

    Raises:
        TypeError: an option has a wrong type.
        ValueError: `rounding` is none of ``ROUNDINGS``, a number is not finite in float32, or
            `clamp` is not above 0.
    """
    if not isinstance(interleaved, bool):
        raise TypeError(f"interleaved: expected a bool, got {interleaved!r}")
    if clamp is not None:
        given, clamp = clamp, _number("clamp", clamp)
        if clamp <= 0:
            raise ValueError(f"clamp: expected None or a float32 above 0, got {given!r}")
    given, alpha, beta = alpha, _number("alpha", alpha), _number("beta", beta)
    if abs(alpha) > MAX_ALPHA:
        raise ValueError(f"alpha: expected a magnitude up to {MAX_ALPHA}, got {given!r}")
    _check_rounding(rounding)
    return SiluMul(interleaved, clamp, alpha, beta, rounding, weight)


def make_rms_norm(
    weight: torch.Tensor,
    eps: float,
    weight_offset: float,
    rounding: str,
    residual: torch.Tensor | None = None,
    residual_out: torch.Tensor | None = None,
    normalized: torch.Tensor | None = None,
) -> RmsNorm:
    """A prologue of these options, its numbers rounded to float32. Tensors are not looked at.

    Args:
        residual_out: where the updated residual goes, by default to `residual`.

    Raises:
        TypeError: an option has a wrong type.
        ValueError: `rounding` is none of ``ROUNDINGS``, a number is not finite in float32, `eps` is
            below 0, or there is nothing to write to `residual_out`.
    """
    given, eps = eps, _number("eps", eps)
    if given < 0:
        raise ValueError(f"eps: expected 0 or more, got {given!r}")
    weight_offset = _number("weight_offset", weight_offset)
    _check_rounding(rounding)
    if residual_out is None:
        residual_out = residual
    elif residual is None:
        raise ValueError(
            f"out residual: expected None without a residual, got {type(residual_out).__name__}"
        )
    return RmsNorm(weight, eps, weight_offset, rounding, residual, residual_out, normalized)


def _number(name: str, value: object) -> float:
    # True is a number, but a switch is not what these are.
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not -FLOAT32_MAX <= value <= FLOAT32_MAX:
        raise ValueError(f"{name}: expected a number that is finite in float32, got {value!r}")
    return to_float32(float(value))


def _check_rounding(rounding: object) -> None:
    if not isinstance(rounding, str) or rounding not in ROUNDINGS:
        raise ValueError(f"rounding: expected one of {ROUNDINGS}, got {rounding!r}")
