"""The largest magnitude of a tensor: checks, views, launches, and the operator that torch knows.

Memory without gaps is viewed as few long rows, so that a row's end costs nothing. A launch stores
the largest magnitudes of the parts that its CTAs have, and another one reduces these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from cute_quant.contract.dtypes import INPUT_DTYPES, LOAD_BYTES, align, ceil_div, describe
from cute_quant.contract.format_choices import MAX_COLUMNS
from cute_quant.contract.tensors import (
    MAX_SIZE,
    check_matrices,
    check_no_tangents,
    check_real,
    check_tensor,
)
from cute_quant.contract.torch_private import in_dual_level
from cute_quant.dispatch import operators
from cute_quant.dispatch.launch import has_kernels
from cute_quant.dispatch.plan import View, alignment, compiled, matrix_view, view_as_matrices
from cute_quant.jit import lookup
from cute_quant.kernels import architectures
from cute_quant.kernels.config import AMAX_WARPS, DEFAULT_TILE, AmaxSpec

MAX_ROW = 2**28
"""Most elements of a row that several are viewed as; kernels count its bytes in 32 bits."""
CTAS_PER_SM = 4
"""As many as an SM holds by their registers."""
PARTS_ALIGNMENT = LOAD_BYTES // torch.float32.itemsize


class Grid(NamedTuple):
    """Launch shape: warps of a CTA along N, and CTAs of each matrix along N and along M."""

    column_warps: int
    column_ctas: int
    row_ctas: int

    @property
    def parts(self) -> int:
        """Return the CTAs of a matrix."""
        return self.column_ctas * self.row_ctas


def check(x: torch.Tensor, per_matrix: object) -> None:
    """Check the arguments of ``cute_quant.tensor_amax``.

    Raises:
        TypeError, ValueError: one of them is wrong.
    """
    if not isinstance(per_matrix, bool):
        raise TypeError(f"per_matrix: expected a bool, got {describe(per_matrix)}")
    check_tensor("x", x, INPUT_DTYPES)
    check_matrices("x", x, MAX_COLUMNS)


def result_shape(x: torch.Tensor, *, per_matrix: bool) -> tuple[int, ...]:
    """Return the shape of the largest magnitudes."""
    return tuple(x.shape[:-2]) if per_matrix else ()


def run(x: torch.Tensor, per_matrix: bool) -> torch.Tensor:
    """Run ``cute_quant.tensor_amax`` on a tensor with memory."""
    check(x, per_matrix)
    check_real({"x": x})
    if in_dual_level():
        check_no_tangents({"x": x})
    shape = result_shape(x, per_matrix=per_matrix)
    if x.numel() == 0:
        return torch.zeros(shape, dtype=torch.float32, device=x.device)
    if has_kernels(x):
        return _launch(x, torch.empty(shape, dtype=torch.float32, device=x.device), per_matrix)
    magnitudes = x.detach().abs()
    amax = (magnitudes.amax((-2, -1)) if per_matrix else magnitudes.amax()).float()
    # One NaN, as the kernel returns.
    return amax.where(amax == amax, torch.nan)


def _launch(x: torch.Tensor, result: torch.Tensor, per_matrix: bool) -> torch.Tensor:
    """Write the largest magnitudes of `x` to `result`, and return it."""
    # The functions are there for larger inputs too once one was served: a capture compiles nothing.
    _function(x.get_device(), torch.float32, LOAD_BYTES)
    sms = lookup.multiprocessors(x.get_device())
    source = x
    while True:
        view = merged_view(source, per_matrix=per_matrix)
        nbytes = alignment(source.data_ptr(), view, source.element_size(), LOAD_BYTES)
        function, spec = _function(x.get_device(), source.dtype, nbytes)
        grid = choose_grid(view.shape, spec.tiles, sms)
        matrices, last = view.shape[0], grid.parts == 1 and view.shape[0] == result.numel()
        if last:
            parts = result.view(matrices, 1)
        else:
            # Parts of a matrix start where the widest loads can.
            width = align(grid.parts, PARTS_ALIGNMENT) if per_matrix else grid.parts
            memory = result.new_empty(matrices, width)
            parts = memory[:, : grid.parts]
        function(view.of(source), parts, grid.column_warps, grid.column_ctas)
        if last:
            return result
        source = parts.unsqueeze(-2)


def merged_view(t: torch.Tensor, *, per_matrix: bool) -> View:
    """Return the view (batch, rows, k) of a tensor (..., mn, k) with the fewest and longest rows.

    Args:
        t: the tensor.
        per_matrix: whether its matrices stay apart.
    """
    view = _merge_rows(matrix_view(t, batched=True))
    (count, rows, k), (batch_stride, row_stride, _) = view
    if not per_matrix and count * rows <= MAX_SIZE:
        if rows == 1 and batch_stride * t.element_size() <= MAX_SIZE:
            view = _merge_rows(View((1, count, k), (0, batch_stride, 1)))
        elif count == 1 or batch_stride == rows * row_stride:
            view = _merge_rows(View((1, count * rows, k), (0, row_stride, 1)))
    return view_as_matrices(view, t.element_size(), batched=True)


def _merge_rows(view: View) -> View:
    """Return a view (batch, rows, k) with as many rows as one as there can be."""
    (count, rows, k), (batch_stride, row_stride, _) = view
    if row_stride != k:
        return view
    merged = rows if rows * k <= MAX_ROW else rows & -rows
    while merged > 1 and merged * k > MAX_ROW:
        merged //= 2
    k *= merged
    return View((count, rows // merged, k), (batch_stride, k, 1))


def choose_grid(shape: tuple[int, ...], tiles: int, sms: int) -> Grid:
    """Return a grid that fills the GPU once, and goes on to the rest.

    Args:
        shape: (batch, rows, k).
        tiles: of a warp, in flight at once.
        sms: multiprocessors.
    """
    matrices, rows, k = shape
    most = max(1, CTAS_PER_SM * sms // matrices)
    columns = ceil_div(k, DEFAULT_TILE.columns * tiles)
    column_warps = min(AMAX_WARPS, 1 << (columns - 1).bit_length())
    column_ctas = min(ceil_div(columns, column_warps), most)
    row_ctas = min(ceil_div(rows, AMAX_WARPS // column_warps), max(1, most // column_ctas))
    return Grid(column_warps, column_ctas, row_ctas)


def _function(device: int, dtype: torch.dtype, nbytes: int) -> tuple[Callable[..., None], AmaxSpec]:
    """Return the compiled kernel for elements of a dtype in rows of an alignment.

    Raises:
        RuntimeError: the kernel is missing and cannot be compiled.
    """
    arch = lookup.architecture(device)
    spec = AmaxSpec(dtype, nbytes, architectures.named(arch).pdl)
    remedy = "call tensor_amax before, on an x of the same dtype and alignment"
    return compiled(spec, arch, lambda: remedy), spec


def _meta(x: torch.Tensor, per_matrix: bool) -> torch.Tensor:
    check(x, per_matrix)
    return x.new_empty(result_shape(x, per_matrix=per_matrix), dtype=torch.float32)


operators.register("tensor_amax", "(Tensor x, bool per_matrix) -> Tensor", run, _meta, "x")
