"""A linear layer whose three GEMMs read FP8."""

from __future__ import annotations

from typing import Any

import torch

from cute_quant.contract.dtypes import INPUT_DTYPES, describe, dtype_names
from cute_quant.contract.tensors import check_tensor
from cute_quant.nn import gemms
from cute_quant.nn.gemms import Fp8
from cute_quant.nn.recipes import SM90, SM100, Recipe, recipe_of
from cute_quant.ops.columns import quantize_both
from cute_quant.ops.rows import quantize
from cute_quant.ops.weights import quantize_blocks

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
        dtype: the same, bfloat16, float16 or float32.
        recipe: ``SM90`` or ``SM100`` of this package, formats of the operands; None for those that
            DeepGEMM reads on the device.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: features are no multiple of 16, or the recipe is another one.
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
        check_layer(dtype, recipe, in_features=in_features, out_features=out_features)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.recipe = recipe

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # its name in torch
        """Return ``input @ weight.T + bias``, (..., out_features).

        It has the dtype of `input`, or that of autocast. What is quantized is `input` as it is.

        Args:
            input: (..., in_features), bfloat16, float16 or float32.

        Raises:
            TypeError: `input` is no tensor of such a dtype, or the weight has another one.
            ValueError: it has another number of features or is on another kind of device; the
                weight has another shape or device; or DeepGEMM does not read the layer's recipe
                there.
        """
        check_input(input, self.in_features)
        check_weight(self.weight, (self.out_features, self.in_features), input)
        recipe = recipe_on(input.device, self.recipe)
        x = input.reshape(-1, self.in_features)
        trains = trains_weight(self.weight)
        y: torch.Tensor = _Linear.apply(x, self.weight, recipe, output_dtype(input), trains)
        y = y.view(*input.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        recipe: Recipe,
        dtype: torch.dtype,
        trains: bool,  # autograd passes positions
    ) -> torch.Tensor:
        ctx.recipe, ctx.x_dtype, ctx.weight_dtype = recipe, x.dtype, weight.dtype
        rows, columns = _both(x, recipe, with_columns=trains)
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, *columns)
        y = gemms.product(rows, quantize_blocks(weight, recipe.fmt), recipe)
        return as_dtype(y, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        refuse_second_derivative("Fp8Linear")
        weight, *columns = ctx.saved_tensors
        recipe = ctx.recipe
        rows, grad_columns = _both(grads[0], recipe, with_columns=len(columns) > 0)
        of_x = of_weight = None
        if weight is not None:
            # A square block is one of the transpose too, with the same scale and values.
            transposed = quantize_blocks(weight.mT, recipe.fmt)
            of_x = gemms.product(rows, transposed, recipe).to(ctx.x_dtype)
        if columns:
            q, sf = columns
            of_weight = gemms.weight_gradient(grad_columns, (q, sf), recipe)
            of_weight = of_weight.to(ctx.weight_dtype)
        return of_x, of_weight, None, None, None


def _both(x: torch.Tensor, recipe: Recipe, *, with_columns: bool) -> tuple[Fp8, Any]:
    """Quantize rows of x (m, k), and where they are wanted its transposed columns, (k, m)."""
    x = with_rows(x)
    if not with_columns:
        q, sf = quantize(x, recipe.fmt)
        return (q, sf), ()
    rows, (q, sf) = quantize_both(x, recipe.fmt, recipe.column_fmt, transposed=True)
    padding = -x.shape[0] % FEATURE_ALIGNMENT
    if padding:
        # Each row as TMA wants it.
        q = torch.nn.functional.pad(q.view(torch.uint8), (0, padding)).view(q.dtype)
    return rows, (q, sf)


def as_dtype(y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the result of an autograd function in a dtype.

    A graph of torch 2.11 has no gradient of the result of ``to`` where that does nothing.
    """
    return y if y.dtype is dtype else y.to(dtype)


def with_rows(x: torch.Tensor) -> torch.Tensor:
    """Return a matrix whose rows are contiguous and have memory of their own.

    Autograd expands the gradient of a sum, and an expanded tensor without elements lacks the
    strides of its shape.
    """
    if not x.numel():
        return x.new_empty(x.shape)
    return x if x.stride(-1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def trains_weight(weight: torch.Tensor) -> bool:
    """Return whether backward will want the gradient of a weight, and so columns of the input."""
    return torch.is_grad_enabled() and weight.requires_grad


def recipe_on(device: torch.device, recipe: Recipe | None) -> Recipe:
    """Return the recipe of a layer for inputs on a device, whose GEMMs have to read its formats."""
    if recipe is None:
        return recipe_of(device)
    gemms.check_recipe(recipe, device)
    return recipe


def check_layer(dtype: torch.dtype | None, recipe: Recipe | None, **features: int) -> None:
    """Check arguments of a layer: rows of inputs and outputs have whole vectors of TMA."""
    if recipe is not None and not isinstance(recipe, Recipe):
        raise TypeError(f"recipe: expected None, SM90 or SM100, got {describe(recipe)}")
    if recipe not in (None, SM90, SM100):
        raise ValueError(f"recipe: expected None, SM90 or SM100, got {recipe}")
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if dtype not in INPUT_DTYPES:
        raise TypeError(f"dtype: expected {dtype_names(INPUT_DTYPES)}, got {dtype}")
    for name, count in features.items():
        if not isinstance(count, int) or isinstance(count, bool):
            raise TypeError(f"{name}: expected an int, got {describe(count)}")
        if count < 1 or count % FEATURE_ALIGNMENT:
            raise ValueError(
                f"{name}: expected a multiple of {FEATURE_ALIGNMENT}, from which rows of FP8 are "
                f"aligned for TMA, got {count}"
            )


def check_input(x: torch.Tensor, features: int) -> None:
    """Check that an input can be quantized, and has so many features."""
    check_tensor("input", x, INPUT_DTYPES)
    if not (x.is_cpu or x.is_cuda):
        raise ValueError(f"input: expected a tensor on a CPU or a CUDA device, got {x.device}")
    if x.shape[-1:] != (features,):
        raise ValueError(f"input: expected shape (..., {features}), got {tuple(x.shape)}")


def check_weight(weight: torch.Tensor, shape: tuple[int, ...], x: torch.Tensor) -> None:
    """Check a weight that may have been assigned to a layer, for an input."""
    check_tensor("weight", weight, INPUT_DTYPES)
    if weight.shape != shape:
        raise ValueError(f"weight: expected shape {shape}, got {tuple(weight.shape)}")
    if weight.device != x.device:
        raise ValueError(f"weight: expected on {x.device}, as input, got {weight.device}")


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
