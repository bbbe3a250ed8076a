"""Linear layers of experts whose rows are stacked along M, in FP8."""

from __future__ import annotations

import math
from typing import Any

import torch

from cute_quant.contract.dtypes import describe
from cute_quant.contract.rows import PrefixSum
from cute_quant.contract.tensors import check_tensor
from cute_quant.nn import gemms
from cute_quant.nn.linear import (
    as_dtype,
    check_input,
    check_layer,
    check_weight,
    output_dtype,
    recipe_on,
    refuse_second_derivative,
    trains_weight,
    with_rows,
)
from cute_quant.nn.recipes import Recipe
from cute_quant.nn.rows import GROUP_ALIGNMENT
from cute_quant.ops.columns import quantize_both
from cute_quant.ops.rows import quantize
from cute_quant.ops.weights import quantize_blocks


class Fp8GroupedLinear(torch.nn.Module):
    """A linear layer for each group of rows: the experts of a mixture of experts, in FP8.

    As :class:`Fp8Linear` for each group, without a bias, in three grouped GEMMs. The gradient of
    the weights reads the ends of the groups on the host, which synchronizes.

    Args:
        groups: how many there are.
        in_features: a multiple of 16, as `out_features`.
        out_features: the same.
        device: of the weights, (groups, out_features, in_features), which are initialized as those
            of ``torch.nn.Linear``.
        dtype: of the weights, bfloat16, float16 or float32.
        recipe: ``SM90`` or ``SM100`` of this package, formats of the operands; None for those that
            DeepGEMM reads on the device.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: features are no multiple of 16, or there is no group.
    """

    def __init__(
        self,
        groups: int,
        in_features: int,
        out_features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        recipe: Recipe | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(groups, int) or isinstance(groups, bool):
            raise TypeError(f"groups: expected an int, got {describe(groups)}")
        if groups < 1:
            raise ValueError(f"groups: expected at least 1, got {groups}")
        check_layer(dtype, recipe, in_features=in_features, out_features=out_features)
        self.groups, self.in_features, self.out_features = groups, in_features, out_features
        self.recipe = recipe
        shape = groups, out_features, in_features
        self.weight = torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the weights, uniform within 1 / sqrt(in_features)."""
        bound = 1 / math.sqrt(self.in_features)
        torch.nn.init.uniform_(self.weight, -bound, bound)

    def extra_repr(self) -> str:
        """Return the sizes, for the repr of the module."""
        return (
            f"groups={self.groups}, in_features={self.in_features}, "
            f"out_features={self.out_features}"
        )

    def forward(self, input: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:  # noqa: A002
        """Return each row times the transposed weights of its group, 0 for rows of none.

        Args:
            input: (M, in_features), M a multiple of 128; bfloat16, float16 or float32. Group g has
                the rows from the end of the group before, rounded up to a multiple of 128, to its
                own.
            ends: (groups,), int32, contiguous, on the device of `input`: the row past the last of
                each group. The forward GEMM reads them on the device, and clamps them.

        Returns:
            (M, out_features), in the dtype of `input`, or that of autocast. Its gradient for rows
            of no group is not used, and that of `input` is 0 there.

        Raises:
            TypeError: an argument is no tensor of such a dtype.
            ValueError: a shape does not fit. Of backward, if the weight takes a gradient: `ends`,
                rounded up to 128, decrease or are past M.
        """
        x = input
        check_input(x, self.in_features)
        check_tensor("ends", ends, (torch.int32,))
        if not ends.is_contiguous():
            raise ValueError(
                f"ends: expected a contiguous tensor, got strides {tuple(ends.stride())}"
            )
        if x.ndim != 2 or len(x) % GROUP_ALIGNMENT or ends.shape != (self.groups,):
            raise ValueError(
                f"input, ends: expected shapes (M, {self.in_features}) and ({self.groups},), M a "
                f"multiple of {GROUP_ALIGNMENT}, got {tuple(x.shape)} and {tuple(ends.shape)}"
            )
        check_weight(self.weight, (self.groups, self.out_features, self.in_features), x)
        recipe = recipe_on(x.device, self.recipe)
        trains = trains_weight(self.weight)
        y: torch.Tensor = _GroupedLinear.apply(
            x, self.weight, ends, recipe, output_dtype(x), trains
        )
        return y


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        ends: torch.Tensor,
        recipe: Recipe,
        dtype: torch.dtype,
        trains: bool,  # autograd passes positions
    ) -> torch.Tensor:
        ctx.recipe, ctx.x_dtype, ctx.weight_dtype = recipe, x.dtype, weight.dtype
        rows = PrefixSum(ends, GROUP_ALIGNMENT)
        of_rows, columns = _both(x, rows, recipe, with_columns=trains)
        ctx.save_for_backward(ends, weight if ctx.needs_input_grad[0] else None, *columns)
        weights = quantize_blocks(weight, recipe.fmt)
        return as_dtype(gemms.product(of_rows, weights, recipe, ends), dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        refuse_second_derivative("Fp8GroupedLinear")
        ends, weight, *columns = ctx.saved_tensors
        recipe = ctx.recipe
        rows = PrefixSum(ends, GROUP_ALIGNMENT)
        of_rows, grad_columns = _both(grads[0], rows, recipe, with_columns=len(columns) > 0)
        of_x = of_weight = None
        if weight is not None:
            transposed = quantize_blocks(weight.mT, recipe.fmt)
            of_x = gemms.product(of_rows, transposed, recipe, ends).to(ctx.x_dtype)
        if columns:
            q, sf = columns
            of_weight = gemms.weight_gradient(grad_columns, (q, sf), recipe, ends)
            of_weight = of_weight.to(ctx.weight_dtype)
        return of_x, of_weight, None, None, None, None


def _both(
    x: torch.Tensor, rows: PrefixSum, recipe: Recipe, *, with_columns: bool
) -> tuple[gemms.Fp8, Any]:
    """Quantize the rows of x (M, k) that exist, and where they are wanted its columns."""
    x = with_rows(x)
    if with_columns:
        return quantize_both(
            x, recipe.fmt, recipe.column_fmt, transposed=recipe.transposed_groups, rows=rows
        )
    q, sf = quantize(x, recipe.fmt, rows=rows)
    return (q, sf), ()
