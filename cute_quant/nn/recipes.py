"""Recipes: the formats of the operands of the three GEMMs of a linear layer."""

from __future__ import annotations

from typing import NamedTuple

import torch

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


SM90 = Recipe("SM90", DEEP_GEMM_SM90, DEEP_GEMM_SM90, transposed_groups=True)
SM100 = Recipe("SM100", DEEP_GEMM, DEEP_GEMM_32, transposed_groups=False)
RECIPES = {recipe.name: recipe for recipe in (SM90, SM100)}


def recipe_of(device: torch.device) -> Recipe:
    """Return the recipe of a device: that of its GPU, ``SM90`` on the CPU and on other GPUs."""
    blackwell = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 10
    return SM100 if blackwell else SM90
