"""GEMMs of FP8 operands: DeepGEMM's, or torch's of the dequantized operands.

Those of torch are what the others are tested against, and what runs without DeepGEMM. A tracer sees
a GEMM as one operator, whatever runs it: Dynamo traces no functions of C++.
"""

from __future__ import annotations

import functools
import warnings
from types import ModuleType

import torch

from cute_quant.dispatch import operators
from cute_quant.nn.recipes import RECIPES, Recipe, recipe_of
from cute_quant.nn.rows import GROUP_ALIGNMENT, group_sizes, groups_of_rows
from cute_quant.ops.arguments import is_traced
from cute_quant.ops.rows import dequantize
from cute_quant.ops.weights import dequantize_blocks

Fp8 = tuple[torch.Tensor, torch.Tensor]
"""Values and scales."""

NARROW_FEATURES = 32
"""Up to as many rows of a weight gradient have no kernel of DeepGEMM's on SM90."""

_SCHEMA = "(Tensor a, Tensor a_sf, Tensor b, Tensor b_sf, Tensor? ends, str recipe) -> Tensor"


def product(a: Fp8, weight: Fp8, recipe: Recipe, ends: torch.Tensor | None = None) -> torch.Tensor:
    """Return rows times weights, (M, k) times (n, k) transposed: (M, n), bfloat16.

    Args:
        a: rows.
        weight: (n, k) in square blocks; of groups of rows (G, n, k).
        recipe: of the layer.
        ends: of the groups, (G,), int32; rows of no group are 0 in the result.
    """
    run = torch.ops.cute_quant.fp8_product if is_traced(a[0]) else _product
    y: torch.Tensor = run(*a, *weight, ends, recipe.name)
    return y


def weight_gradient(
    grad: Fp8, x: Fp8, recipe: Recipe, ends: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the product over rows of transposed columns, (n, M) times (k, M): (n, k), float32.

    Args:
        grad: (n, M) and scales of its columns; of groups of rows (M, n) where the recipe says so.
        x: the same with k.
        recipe: of the layer.
        ends: of groups of rows, (G,), int32, for a result (G, n, k). They are read on the host:
            DeepGEMM takes the sizes of groups from there.
    """
    run = torch.ops.cute_quant.fp8_weight_gradient if is_traced(grad[0]) else _weight_gradient
    y: torch.Tensor = run(*grad, *x, ends, recipe.name)
    return y


def check_recipe(recipe: Recipe, device: torch.device) -> None:
    """Check that the GEMMs of a device read the formats of a recipe. Those of torch read all."""
    if _deep_gemm(device) is not None and recipe != recipe_of(device):
        raise ValueError(
            f"recipe: expected None or {recipe_of(device).name}, whose formats DeepGEMM reads on "
            f"this GPU, got {recipe.name}"
        )


def _product(
    a: torch.Tensor,
    a_sf: torch.Tensor,
    w: torch.Tensor,
    w_sf: torch.Tensor,
    ends: torch.Tensor | None,
    recipe: str,
) -> torch.Tensor:
    rows, weight = (a, a_sf), (w, w_sf)
    if ends is None:
        return _dense_product(rows, weight, RECIPES[recipe])
    return _grouped_product(rows, weight, ends, RECIPES[recipe])


def _new_product(a: torch.Tensor, _a_sf: object, w: torch.Tensor, *_: object) -> torch.Tensor:
    """Allocate the result of `_product`."""
    return a.new_empty((a.shape[0], w.shape[-2]), dtype=torch.bfloat16)


def _weight_gradient(
    grad: torch.Tensor,
    grad_sf: torch.Tensor,
    x: torch.Tensor,
    x_sf: torch.Tensor,
    ends: torch.Tensor | None,
    recipe: str,
) -> torch.Tensor:
    columns = (grad, grad_sf), (x, x_sf)
    if ends is None:
        return _dense_weight_gradient(*columns, RECIPES[recipe])
    return _grouped_weight_gradient(*columns, ends, RECIPES[recipe])


def _new_weight_gradient(
    grad: torch.Tensor,
    _grad_sf: object,
    x: torch.Tensor,
    _x_sf: object,
    ends: torch.Tensor | None,
    recipe: str,
) -> torch.Tensor:
    """Allocate the result of `_weight_gradient`."""
    features = 0 if ends is None or RECIPES[recipe].transposed_groups else 1
    groups = () if ends is None else (ends.shape[0],)
    shape = (*groups, grad.shape[features], x.shape[features])
    return grad.new_empty(shape, dtype=torch.float32)


operators.register("fp8_product", _SCHEMA, _product, _new_product, "operands")
operators.register(
    "fp8_weight_gradient", _SCHEMA, _weight_gradient, _new_weight_gradient, "operands"
)


def _dense_product(a: Fp8, weight: Fp8, recipe: Recipe) -> torch.Tensor:
    deep_gemm = _deep_gemm(a[0].device)
    if deep_gemm is None:
        return _multiply(_rows(a, recipe), _blocks(weight, recipe)).to(torch.bfloat16)
    d = a[0].new_empty((a[0].shape[0], weight[0].shape[0]), dtype=torch.bfloat16)
    with torch.cuda.device_of(d):
        deep_gemm.fp8_gemm_nt(a, weight, d)
    return d


def _dense_weight_gradient(grad: Fp8, x: Fp8, recipe: Recipe) -> torch.Tensor:
    n, k = grad[0].shape[0], x[0].shape[0]
    deep_gemm = _deep_gemm_of_gradients(grad[0].device, n, k, recipe)
    if deep_gemm is None:
        return _multiply(_columns(grad, recipe), _columns(x, recipe))
    if _is_narrow(n, recipe):
        return _dense_weight_gradient(x, grad, recipe).mT.contiguous()
    d = grad[0].new_zeros((n, k), dtype=torch.float32)
    a, b = ((q, sf.mT) for q, sf in (grad, x))
    with torch.cuda.device_of(d):
        deep_gemm.fp8_gemm_nt(a, b, d, c=d, recipe=(1, 1, recipe.column_fmt.group_size))
    return d


def _grouped_product(a: Fp8, weights: Fp8, ends: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    d = a[0].new_zeros((a[0].shape[0], weights[0].shape[1]), dtype=torch.bfloat16)
    group = groups_of_rows(ends, d.shape[0])
    deep_gemm = _deep_gemm(d.device)
    if deep_gemm is not None:
        with torch.cuda.device_of(d):
            deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, weights, d, group)
        return d
    x, w = _rows(a, recipe), _blocks(weights, recipe)
    for i, matrix in enumerate(w):
        here = (group == i).unsqueeze(1)
        d = _multiply(x, matrix).to(d.dtype).where(here, d)
    return d


def _grouped_weight_gradient(grad: Fp8, x: Fp8, ends: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    sizes = group_sizes(ends, grad[0].shape[1 if recipe.transposed_groups else 0])
    n, k = (q.shape[0 if recipe.transposed_groups else 1] for q, _ in (grad, x))
    deep_gemm = _deep_gemm_of_gradients(grad[0].device, n, k, recipe)
    if deep_gemm is not None and _is_narrow(n, recipe):
        return _grouped_weight_gradient(x, grad, ends, recipe).mT.contiguous()
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
    with torch.cuda.device_of(d):
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
