"""Prologues: operations before the quantizer in the same kernel, whose results it quantizes.

A prologue holds the options and the further tensors of one call. `reference.prologues` has what it
computes, `checks` what its tensors have to look like.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from cute_quant.contract.dtypes import FLOAT32_MAX, describe, is_number, to_float32
from cute_quant.contract.format_choices import MAX_COLUMNS

FUSED = "fused"
UNFUSED = "unfused"
VLLM = "vllm"
HUGGINGFACE = "huggingface"
VLLM_TRITON = "vllm_triton"
VLLM_CUDA = "vllm_cuda"
VLLM_BF16 = "vllm_bf16"
SGLANG = "sglang"
SILU_ROUNDINGS = (FUSED, UNFUSED, VLLM, VLLM_TRITON, VLLM_CUDA, VLLM_BF16, SGLANG)
NORM_ROUNDINGS = (FUSED, UNFUSED, HUGGINGFACE, VLLM)
ROUNDINGS = tuple(dict.fromkeys((*SILU_ROUNDINGS, *NORM_ROUNDINGS)))
"""Rounding points: once to float32, or to the input's dtype after each operation, as torch does, or
where a library's kernels round to it."""


def rounds_activation(rounding: str) -> bool:
    """Return whether activations, and bounds, are rounded before they are multiplied."""
    return rounding in (UNFUSED, VLLM_TRITON, VLLM_BF16)


def rounds_shifted(rounding: str) -> bool:
    """Return whether the sum of an up and beta is rounded before it is multiplied."""
    return rounding in (UNFUSED, VLLM_TRITON, VLLM_BF16, SGLANG)


def rounds_product(rounding: str) -> bool:
    """Return whether the product of an activation and an up is rounded before it is quantized."""
    return rounding in (UNFUSED, VLLM, VLLM_TRITON, VLLM_BF16)


def rounds_sum(rounding: str) -> bool:
    """Return whether a sum with the residual is rounded before it is normalized."""
    return rounding in (UNFUSED, HUGGINGFACE)


def rounds_row(rounding: str, weight_dtype: torch.dtype) -> bool:
    """Return whether a normalized row is rounded before it is multiplied with the weight.

    vLLM rounds to the dtype of the weight, which for float32 leaves the row as it is.
    """
    narrow = weight_dtype is not torch.float32
    return rounding == HUGGINGFACE or (rounding == VLLM and narrow)


MAX_ALPHA = 2.0**100
"""Leaves room for its product with log2(e)."""

MAX_GATE_UP_COLUMNS = 2**21
MAX_NORM_COLUMNS = 2**15
"""Columns of the input of a prologue."""

Option = bool | float | str | None
"""A choice or a number of a prologue."""


class SiluMul(NamedTuple):
    """A gated activation: ``(up + beta) * gate * sigmoid(alpha * gate)``.

    :func:`make_silu_mul` makes one.

    Attributes:
        interleaved: whether gates and ups alternate in a row, rather than lie in its halves.
        clamp: upper bound of gates and bound of the magnitudes of ups, or None.
        alpha, beta: numbers of the formula.
        rounding: one of ``SILU_ROUNDINGS``.
        weight: a factor for each row of the result, float32, or None.
    """

    interleaved: bool
    clamp: float | None
    alpha: float
    beta: float
    rounding: str
    weight: torch.Tensor | None

    @property
    def input_name(self) -> str:
        """Return the name of the argument that the input is given as."""
        return "gate_up"

    @property
    def max_columns(self) -> int:
        """Return the most columns that the input may have."""
        return MAX_GATE_UP_COLUMNS

    def columns(self, columns: int) -> int:
        """Return the columns of the result for an input with this many."""
        return columns // 2

    @property
    def options(self) -> tuple[Option, ...]:
        """Return all but the tensors; with their looks they decide which plan a call takes."""
        return self.interleaved, self.clamp, self.alpha, self.beta, self.rounding

    @property
    def tensors(self) -> dict[str, torch.Tensor | None]:
        """Return the further tensors of the call by the names of their arguments."""
        return {"weight": self.weight}

    @property
    def operands(self) -> tuple[torch.Tensor | None, ...]:
        """Return the further tensors in kernel-argument order."""
        return (self.weight,)

    @property
    def reads(self) -> dict[str, torch.Tensor]:
        """Return the further tensors that are read and not written."""
        return {} if self.weight is None else {"weight": self.weight}

    @property
    def writes(self) -> dict[str, torch.Tensor]:
        """Return the further tensors that are written."""
        return {}


class SiluMulBackward(NamedTuple):
    """Gradients of gates and ups of ``(up + beta) * gate * sigmoid(alpha * gate)``.

    :func:`make_silu_mul_backward` makes one.

    Attributes:
        grad: gradient of the products, of half as many columns as gates and ups.
        interleaved, clamp, alpha, beta: as of `SiluMul`.
    """

    grad: torch.Tensor
    interleaved: bool
    clamp: float | None
    alpha: float
    beta: float

    @property
    def input_name(self) -> str:
        """Return the name of the argument that the input is given as."""
        return "gate_up"

    @property
    def max_columns(self) -> int:
        """Return the most columns that the input may have."""
        return MAX_COLUMNS

    def columns(self, columns: int) -> int:
        """Return the columns of the result for an input with this many."""
        return columns

    @property
    def options(self) -> tuple[Option, ...]:
        """Return all but the tensors; with their looks they decide which plan a call takes."""
        return self.interleaved, self.clamp, self.alpha, self.beta

    @property
    def tensors(self) -> dict[str, torch.Tensor | None]:
        """Return the further tensors of the call by the names of their arguments."""
        return {"grad": self.grad}

    @property
    def operands(self) -> tuple[torch.Tensor | None, ...]:
        """Return the further tensors in kernel-argument order."""
        return (self.grad,)

    @property
    def reads(self) -> dict[str, torch.Tensor]:
        """Return the further tensors that are read and not written."""
        return {"grad": self.grad}

    @property
    def writes(self) -> dict[str, torch.Tensor]:
        """Return the further tensors that are written."""
        return {}


class RmsNorm(NamedTuple):
    """Rows over their root mean square, after a residual is added.

    :func:`make_rms_norm` makes one.

    Attributes:
        weight: (k,), a factor for each column.
        eps: added to the mean of squares.
        weight_offset: added to `weight`.
        rounding: one of ``NORM_ROUNDINGS``.
        residual: added to x, of its shape and dtype, or None.
        residual_out: receives the sum: `residual` itself if in place, None if there is none.
        normalized: receives the values that are quantized, of x's shape and dtype, or None.
    """

    weight: torch.Tensor
    eps: float
    weight_offset: float
    rounding: str
    residual: torch.Tensor | None
    residual_out: torch.Tensor | None
    normalized: torch.Tensor | None

    @property
    def input_name(self) -> str:
        """Return the name of the argument that the input is given as."""
        return "x"

    @property
    def max_columns(self) -> int:
        """Return the most columns that the input may have."""
        return MAX_NORM_COLUMNS

    def columns(self, columns: int) -> int:
        """Return the columns of the result for an input with this many."""
        return columns

    @property
    def options(self) -> tuple[Option, ...]:
        """Return all but the tensors; with their looks they decide which plan a call takes."""
        return self.eps, self.weight_offset, self.rounding

    @property
    def tensors(self) -> dict[str, torch.Tensor | None]:
        """Return the further tensors of the call by the names of their arguments."""
        return {
            "weight": self.weight,
            "residual": self.residual,
            "out residual": None if self.residual_out is self.residual else self.residual_out,
            "normalized": self.normalized,
        }

    @property
    def operands(self) -> tuple[torch.Tensor | None, ...]:
        """Return the further tensors in kernel-argument order."""
        return self.weight, self.residual, self.residual_out, self.normalized

    @property
    def in_place(self) -> bool:
        """Return whether the sum replaces the residual, in a call on real tensors."""
        old, new = self.residual, self.residual_out
        if old is None or new is None:
            return False
        return old is new or (
            old.data_ptr() == new.data_ptr()
            and old.shape == new.shape
            and old.stride() == new.stride()
        )

    @property
    def reads(self) -> dict[str, torch.Tensor]:
        """Return the further tensors that are read and not written."""
        if self.residual is None or self.in_place:
            return {"weight": self.weight}
        return {"weight": self.weight, "residual": self.residual}

    @property
    def writes(self) -> dict[str, torch.Tensor]:
        """Return the further tensors that are written."""
        name = "residual" if self.residual_out is self.residual else "out residual"
        outputs = {name: self.residual_out, "normalized": self.normalized}
        return {name: t for name, t in outputs.items() if t is not None}


GatedPrologue = SiluMul | SiluMulBackward
Prologue = GatedPrologue | RmsNorm


def make_silu_mul(
    *,
    interleaved: bool,
    clamp: float | None,
    alpha: float,
    beta: float,
    rounding: str,
    weight: torch.Tensor | None,
) -> SiluMul:
    """Return a prologue of these options, its numbers rounded to float32.

    `weight` is left to ``checks``.

    Raises:
        TypeError: an option has a wrong type.
        ValueError: there is no such `rounding`, a number is not finite in float32, or
            `clamp` is not above 0.
    """
    clamp, alpha, beta = _gated_numbers(interleaved, clamp, alpha, beta)
    _check_rounding(rounding, SILU_ROUNDINGS)
    return SiluMul(interleaved, clamp, alpha, beta, rounding, weight)


def make_silu_mul_backward(
    grad: torch.Tensor, *, interleaved: bool, clamp: float | None, alpha: float, beta: float
) -> SiluMulBackward:
    """Return a prologue of these options, its numbers rounded to float32.

    `grad` is left to ``checks``. Errors are those of :func:`make_silu_mul`.
    """
    clamp, alpha, beta = _gated_numbers(interleaved, clamp, alpha, beta)
    return SiluMulBackward(grad, interleaved, clamp, alpha, beta)


def _gated_numbers(
    interleaved: object, clamp: float | None, alpha: float, beta: float
) -> tuple[float | None, float, float]:
    """Check options of a gated activation, and return its numbers rounded to float32."""
    if not isinstance(interleaved, bool):
        raise TypeError(f"interleaved: expected a bool, got {describe(interleaved)}")
    if clamp is not None:
        given, clamp = clamp, _number("clamp", clamp)
        if clamp <= 0:
            raise ValueError(f"clamp: expected None or a float32 above 0, got {given!r}")
    given, alpha, beta = alpha, _number("alpha", alpha), _number("beta", beta)
    if abs(alpha) > MAX_ALPHA:
        raise ValueError(f"alpha: expected a magnitude up to {MAX_ALPHA}, got {given!r}")
    return clamp, alpha, beta


def make_rms_norm(
    weight: torch.Tensor,
    *,
    eps: float,
    weight_offset: float,
    rounding: str,
    residual: torch.Tensor | None = None,
    residual_out: torch.Tensor | None = None,
    normalized: torch.Tensor | None = None,
) -> RmsNorm:
    """Return a prologue of these options, its numbers rounded to float32.

    Tensors are left to ``checks``. `residual_out`, which receives the updated residual, is
    `residual` by default.

    Raises:
        TypeError: an option has a wrong type.
        ValueError: there is no such `rounding`, or it has no `weight_offset`, a number is not
            finite in float32, `eps` is below 0, or there is no residual for `residual_out`.
    """
    given, eps = eps, _number("eps", eps)
    if given < 0:
        raise ValueError(f"eps: expected 0 or more, got {given!r}")
    weight_offset = _number("weight_offset", weight_offset)
    _check_rounding(rounding, NORM_ROUNDINGS)
    if rounding in (HUGGINGFACE, VLLM) and weight_offset != 0:
        raise ValueError(
            f"weight_offset: expected 0 with {rounding=!s}, got {weight_offset!r}: the norms that "
            f"have an offset, Gemma's, round once, as {UNFUSED} does"
        )
    if residual_out is None:
        residual_out = residual
    elif residual is None:
        raise ValueError(
            f"out residual: expected None without a residual, got {describe(residual_out)}"
        )
    return RmsNorm(weight, eps, weight_offset, rounding, residual, residual_out, normalized)


def clamp_limit(prologue: SiluMul, dtype: torch.dtype) -> float:
    """Return the bound of gates and ups, rounded to `dtype` if activations are; Inf if none."""
    if prologue.clamp is None:
        return math.inf
    if not rounds_activation(prologue.rounding):
        return prologue.clamp
    return torch.tensor(prologue.clamp, dtype=torch.float64).to(dtype).item()


def _number(name: str, value: object) -> float:
    if not is_number(value):
        raise TypeError(f"{name}: expected a number, got {describe(value)}")
    if not -FLOAT32_MAX <= value <= FLOAT32_MAX:
        raise ValueError(f"{name}: expected a number that is finite in float32, got {value!r}")
    return to_float32(float(value))


def _check_rounding(rounding: object, known: tuple[str, ...]) -> None:
    if not isinstance(rounding, str) or rounding not in known:
        raise ValueError(f"rounding: expected one of {known}, got {describe(rounding)}")
