"""GEMMs of FP8 operands: DeepGEMM's, or torch's of the dequantized operands.

Those of torch are what the others are tested against, and what runs without DeepGEMM.
"""

from __future__ import annotations

import functools
import warnings
from types import ModuleType

import torch

from cute_quant.contract.rows import PrefixSum
from cute_quant.nn.recipes import Recipe
from cute_quant.nn.rows import GROUP_ALIGNMENT, group_sizes, groups_of_rows
from cute_quant.ops.rows import dequantize
from cute_quant.ops.weights import dequantize_blocks

Fp8 = tuple[torch.Tensor, torch.Tensor]
"""Values and scales."""

NARROW_FEATURES = 32
"""Up to as many rows of a weight gradient have no kernel of DeepGEMM's on SM90."""


def product(a: Fp8, weight: Fp8, recipe: Recipe) -> torch.Tensor:
    """Return rows times weights, (m, k) times (n, k) transposed: (m, n), bfloat16."""
    d = a[0].new_empty((a[0].shape[0], weight[0].shape[0]), dtype=torch.bfloat16)
    deep_gemm = _deep_gemm(d.device)
    if deep_gemm is None:
        return d.copy_(_multiply(_rows(a, recipe), _blocks(weight, recipe)))
    deep_gemm.fp8_gemm_nt(a, weight, d)
    return d


def weight_gradient(grad: Fp8, x: Fp8, recipe: Recipe) -> torch.Tensor:
    """Return the product over rows of transposed columns, (n, m) times (k, m): (n, k), float32."""
    n, k = grad[0].shape[0], x[0].shape[0]
    deep_gemm = _deep_gemm_of_gradients(grad[0].device, n, k, recipe)
    if deep_gemm is not None and _is_narrow(n, recipe):
        return weight_gradient(x, grad, recipe).mT
    d = grad[0].new_zeros((n, k), dtype=torch.float32)
    if deep_gemm is None:
        return d.copy_(_multiply(_columns(grad, recipe), _columns(x, recipe)))
    a, b = ((q, sf.mT) for q, sf in (grad, x))
    deep_gemm.fp8_gemm_nt(a, b, d, c=d, recipe=(1, 1, recipe.column_fmt.group_size))
    return d


def grouped_product(a: Fp8, weights: Fp8, rows: PrefixSum, recipe: Recipe) -> torch.Tensor:
    """Return each group's rows times its weights, (M, k) times (G, n, k): (M, n), bfloat16.

    Rows of no group are 0.
    """
    d = a[0].new_zeros((a[0].shape[0], weights[0].shape[1]), dtype=torch.bfloat16)
    group = groups_of_rows(rows, d.shape[0])
    deep_gemm = _deep_gemm(d.device)
    if deep_gemm is not None:
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, weights, d, group)
        return d
    x, w = _rows(a, recipe), _blocks(weights, recipe)
    for i, matrix in enumerate(w):
        here = (group == i).unsqueeze(1)
        d = _multiply(x, matrix).to(d.dtype).where(here, d)
    return d


def grouped_weight_gradient(grad: Fp8, x: Fp8, rows: PrefixSum, recipe: Recipe) -> torch.Tensor:
    """Return the products over each group's rows of columns: (G, n, k), float32.

    Args:
        grad: (M, n), or (n, M) where the recipe has them transposed, and scales of its columns.
        x: the same with k.
        rows: the groups, whose ends are read on the host: DeepGEMM takes their sizes from there.
        recipe: of the layer.
    """
    sizes = group_sizes(rows, grad[0].shape[1 if recipe.transposed_groups else 0])
    n, k = (q.shape[0 if recipe.transposed_groups else 1] for q, _ in (grad, x))
    deep_gemm = _deep_gemm_of_gradients(grad[0].device, n, k, recipe)
    if deep_gemm is not None and _is_narrow(n, recipe):
        return grouped_weight_gradient(x, grad, rows, recipe).mT
    d = grad[0].new_zeros((len(sizes), n, k), dtype=torch.float32)
    if deep_gemm is None:
        a, b = (_columns(t, recipe, transposed=recipe.transposed_groups) for t in (grad, x))
        start = 0
        for i, size in enumerate(sizes):
            of_group = slice(start, start + size)
            d[i] = _multiply(a[:, of_group], b[:, of_group])
            start += size
        return d
    layout = torch.tensor(sizes, dtype=torch.int32).to(d.device, non_blocking=True)
    choices = {"c": d, "recipe": (1, 1, recipe.column_fmt.group_size)}
    if recipe.transposed_groups:
        a8, b8 = (_stacked(t, sizes) for t in (grad, x))
        deep_gemm.k_grouped_fp8_gemm_nt_contiguous(a8, b8, d, sizes, layout, **choices)
    else:
        total = sum(sizes)
        a8, b8 = ((q[:total], sf[: total // GROUP_ALIGNMENT]) for q, sf in (grad, x))
        deep_gemm.k_grouped_fp8_gemm_tn_contiguous(a8, b8, d, sizes, layout, **choices)
    return d


def _stacked(columns: Fp8, sizes: list[int]) -> Fp8:
    """Return transposed columns (n, M) as DeepGEMM has them: those of each group contiguous.

    A group of rows with one scale is as large as what sizes are multiples of.
    """
    q, sf = columns
    # 8 bytes at a time, of which rows and groups have whole numbers.
    words = q.view(torch.int64)
    stacked = words.new_empty(words.numel())
    start = 0
    for size in sizes:
        end = start + size // words.itemsize
        part = words[:, start:end]
        stacked[len(q) * start : len(q) * end].view_as(part).copy_(part)
        start = end
    total = sum(sizes)
    return stacked.view(q.dtype)[: len(q) * total], sf[: total // GROUP_ALIGNMENT].mT


def _multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return float32 `a` times the transpose of `b`, which autocast would round to its dtype."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b.mT


def _rows(a: Fp8, recipe: Recipe) -> torch.Tensor:
    return dequantize(*a, recipe.fmt, dtype=torch.float32)


def _blocks(weight: Fp8, recipe: Recipe) -> torch.Tensor:
    return dequantize_blocks(*weight, recipe.fmt, dtype=torch.float32)


def _columns(columns: Fp8, recipe: Recipe, *, transposed: bool = True) -> torch.Tensor:
    """Return columns as rows; their scales have a row for each group, or for each of its words."""
    q, sf = columns
    q = q if transposed else q.mT.contiguous()
    return dequantize(q, sf.mT, recipe.column_fmt, dtype=torch.float32)


def _is_narrow(features: int, recipe: Recipe) -> bool:
    """Return whether DeepGEMM has no kernel for gradients of so few rows.

    On SM90 it chooses tiles of 16 or 32 rows for them, which its kernel does not compile with.
    """
    return recipe.transposed_groups and features <= NARROW_FEATURES


def _deep_gemm_of_gradients(
    device: torch.device, n: int, k: int, recipe: Recipe
) -> ModuleType | None:
    """Return DeepGEMM if it has GEMMs for weight gradients (n, k), or their transposes.

    Where both sides are narrow torch multiplies, on a GPU too.
    """
    return None if _is_narrow(max(n, k), recipe) else _deep_gemm(device)


def _deep_gemm(device: torch.device) -> ModuleType | None:
    """Return DeepGEMM if it has GEMMs for a device."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] not in (9, 10):
        return None
    return _installed()


@functools.cache
def _installed() -> ModuleType | None:
    try:
        import deep_gemm
    except ImportError:
        warnings.warn(
            "cute_quant.nn multiplies with torch, slowly: DeepGEMM "
            "(github.com/deepseek-ai/DeepGEMM) is not installed",
            UserWarning,
            stacklevel=2,
        )
        return None
    module: ModuleType = deep_gemm
    return module
