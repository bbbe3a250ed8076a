"""A linear layer whose three GEMMs read FP8."""

from __future__ import annotations

from typing import Any

import torch

from cute_quant.contract.dtypes import align
from cute_quant.contract.formats import Format
from cute_quant.nn import gemms
from cute_quant.nn.gemms import Fp8
from cute_quant.nn.recipes import Recipe, recipe_of
from cute_quant.ops import quantize, quantize_blocks, quantize_both

FEATURE_ALIGNMENT = 16
"""Bytes that TMA aligns rows to, and so features, of which each has a byte."""


class Fp8Linear(torch.nn.Linear):
    """``torch.nn.Linear`` in FP8: forward, gradient of the input and gradient of the weight.

    Activations and gradients are quantized in groups of 128 features, weights in blocks of
    128 x 128, and for the gradient of the weight activations and gradients in groups of rows, as
    DeepSeek-V3 is trained (DeepSeek-AI, 2024). Products are accumulated in float32. Backward keeps
    the input in FP8, in groups of rows, and the weight as it is.

    It works under ``torch.autocast``, whose dtype the output has then, and under activation
    checkpointing. Second derivatives are refused.

    Args:
        in_features: a multiple of 16, as `out_features`.
        out_features: the same.
        bias: whether to add one, in the dtype of the output.
        device: as of ``torch.nn.Linear``.
        dtype: the same, bfloat16 or float32.
        recipe: formats of the operands; None for those that DeepGEMM reads on the device.

    Raises:
        ValueError: features are no multiple of 16.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        recipe: Recipe | None = None,
    ) -> None:
        check_features(in_features, out_features)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.recipe = recipe

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # its name in torch
        """Return ``input @ weight.T + bias``, (..., out_features).

        It has the dtype of `input`, or that of autocast. What is quantized is `input` as it is.

        Args:
            input: (..., in_features), bfloat16, float16 or float32.

        Raises:
            ValueError: `input` has another number of features.
        """
        check_input(input, self.in_features)
        recipe = recipe_of(input.device) if self.recipe is None else self.recipe
        x = input.reshape(-1, self.in_features)
        y: torch.Tensor = _Linear.apply(x, self.weight, recipe, output_dtype(input))
        y = y.view(*input.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, recipe: Recipe, dtype: torch.dtype
    ) -> torch.Tensor:
        of_x, of_weight, *_ = ctx.needs_input_grad
        ctx.recipe, ctx.dtypes = recipe, (x.dtype, weight.dtype)
        rows, columns = _both(x, recipe, with_columns=of_weight)
        ctx.save_for_backward(weight if of_x else None, *columns)
        return gemms.product(rows, quantize_blocks(weight, recipe.fmt), recipe).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        refuse_second_derivative("Fp8Linear")
        weight, *columns = ctx.saved_tensors
        recipe, (x_dtype, weight_dtype) = ctx.recipe, ctx.dtypes
        rows, grad_columns = _both(grads[0], recipe, with_columns=bool(columns))
        of_x = of_weight = None
        if weight is not None:
            # A square block is one of the transpose too, with the same scale and values.
            transposed = quantize_blocks(weight.mT, recipe.fmt)
            of_x = gemms.product(rows, transposed, recipe).to(x_dtype)
        if columns:
            q, sf = columns
            of_weight = gemms.weight_gradient(grad_columns, (q, sf), recipe).to(weight_dtype)
        return of_x, of_weight, None, None


def _both(x: torch.Tensor, recipe: Recipe, *, with_columns: bool) -> tuple[Fp8, Any]:
    """Quantize rows of x (m, k), and where they are wanted its transposed columns, (k, m)."""
    x = contiguous(x)
    if not with_columns:
        q, sf = quantize(x, recipe.fmt)
        return (q, sf), ()
    m, k = x.shape
    out = _padded_columns(k, m, recipe.column_fmt, x.device)
    rows, (_, sf) = quantize_both(
        x, recipe.fmt, recipe.column_fmt, transposed=True, out=(None, (out[:, :m], None))
    )
    return rows, (out, sf)


def _padded_columns(k: int, m: int, fmt: Format, device: torch.device) -> torch.Tensor:
    """Return memory for values (k, m), each row padded with zeros as TMA wants it."""
    padded = align(m, FEATURE_ALIGNMENT)
    if padded == m:
        return torch.empty((k, m), dtype=fmt.values, device=device)
    return torch.zeros((k, padded), dtype=torch.uint8, device=device).view(fmt.values)


def contiguous(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor with the strides of its shape, which an expanded one without elements lacks.

    Autograd expands the gradient of a sum.
    """
    return x.contiguous() if x.numel() else x.new_empty(x.shape)


def check_features(in_features: int, out_features: int) -> None:
    """Check that rows of both have whole vectors of TMA."""
    for name, count in (("in_features", in_features), ("out_features", out_features)):
        if count < 1 or count % FEATURE_ALIGNMENT:
            raise ValueError(
                f"{name}: expected a multiple of {FEATURE_ALIGNMENT}, from which rows of FP8 are "
                f"aligned for TMA, got {count}"
            )


def check_input(x: torch.Tensor, features: int) -> None:
    """Check that an input has so many features."""
    if x.shape[-1:] != (features,):
        raise ValueError(f"input: expected shape (..., {features}), got {tuple(x.shape)}")


def output_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype of the output for an input: its own, or that of autocast."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def refuse_second_derivative(layer: str) -> None:
    """Raise where autograd records what backward does, to differentiate it again."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{layer} has no second derivative, since quantizing is not differentiable: call "
            "backward without create_graph"
        )
