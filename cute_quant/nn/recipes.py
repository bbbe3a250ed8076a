"""Recipes: the formats of the operands of the three GEMMs of a linear layer."""

from __future__ import annotations

from typing import NamedTuple

import torch

from cute_quant.contract.dtypes import SMALLEST_NORMAL
from cute_quant.contract.formats import DEEP_GEMM, DEEP_GEMM_32, DEEP_GEMM_SM90, Format


class Recipe(NamedTuple):
    """Formats of a linear layer, as DeepGEMM reads them on an architecture.

    Attributes:
        name: by which operators know it.
        fmt: of rows of inputs and output gradients, in groups along the features, and of weights in
            square blocks.
        column_fmt: of the same inputs and gradients in groups of rows, for the gradient of weights.
        transposed_groups: whether the gradient of grouped weights takes these transposed.
    """

    name: str
    fmt: Format
    column_fmt: Format
    transposed_groups: bool


# Gradients may be small, so that scales are as small as those of their dtypes, not 1e-10.
_FLOAT32_SCALES = DEEP_GEMM_SM90.replace(min_scale=SMALLEST_NORMAL)

SM90 = Recipe("SM90", _FLOAT32_SCALES, _FLOAT32_SCALES, transposed_groups=True)
SM100 = Recipe(
    "SM100",
    DEEP_GEMM.replace(min_scale="ocp"),
    DEEP_GEMM_32.replace(min_scale="ocp"),
    transposed_groups=False,
)
RECIPES = {recipe.name: recipe for recipe in (SM90, SM100)}


def recipe_of(device: torch.device) -> Recipe:
    """Return the recipe of a device: that of its GPU, ``SM90`` on the CPU and on other GPUs."""
    blackwell = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 10
    return SM100 if blackwell else SM90
