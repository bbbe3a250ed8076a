"""How quantized weights are stored: names, dtypes and shapes of tensors, and what config.json says.

Only what published readers know: the FP8 of DeepSeek's checkpoints, which transformers'
``FineGrainedFP8Config`` and vLLM's ``Fp8Config`` read, and compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from cute_quant.contract import blocks
from cute_quant.contract.dtypes import SOURCE_BLOCK, ceil_div
from cute_quant.contract.formats import DEEP_GEMM_SM90, MXFP4, MXFP8, NVFP4, Format
from cute_quant.ops.rows import quantize
from cute_quant.ops.weights import quantize_blocks, requantize_blocks

FP8_CONFIG: Mapping[str, Any] = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [SOURCE_BLOCK, SOURCE_BLOCK],
}
"""Description of FP8 weights in blocks by config.json, in an input and in an output."""
FP8_SCALE_SUFFIX = "_scale_inv"
"""Appended to the name of a weight it names the scales of its blocks, which are multiplied."""

STORED_NAMES = {torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32"}
"""Names of dtypes in safetensors; others of ours are stored as bytes."""


class Part(NamedTuple):
    """A tensor that belongs to a quantized weight.

    Attributes:
        name: in the file.
        dtype: as safetensors names it.
        shape: (..., rows, columns), or (1,).
        weight_rows: rows of the weight for each of its rows.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    weight_rows: int = 1


@dataclass(frozen=True)
class Convention:
    """A way to store quantized weights.

    Attributes:
        name: as ``--format`` takes it.
        fmt: values and scales, in the layout of the file.
        what: blocks or groups, and scales, in words.
        config: ``quantization_config``, without the modules that are not converted.
        keep_key: under which it lists these.
        stacked: whether it has weights of experts stacked to (E, N, K).
    """

    name: str
    fmt: Format
    what: str
    config: Mapping[str, Any] = field(repr=False)
    keep_key: str = "ignore"
    stacked: bool = False

    @property
    def quant_method(self) -> str:
        """Return the name by which readers know the convention."""
        return str(self.config["quant_method"])

    @property
    def in_blocks(self) -> bool:
        """Return whether a scale is of a square block and stored once."""
        return blocks.stored_once(self.fmt)

    @property
    def column_multiple(self) -> int:
        """Return what the columns of a weight have to be a multiple of."""
        return 1 if self.in_blocks else self.fmt.group_size

    def parts(self, name: str, shape: Sequence[int]) -> list[Part]:
        """Return the tensors of a weight: values, scales, and the scale over these if there is one.

        Args:
            name: of the weight in the input.
            shape: (..., N, K).
        """
        *batch, n, k = shape
        if self.in_blocks:
            scales = blocks.scale_shape(self.fmt, batch, n, k)
            return [
                Part(name, "F8_E4M3", tuple(shape)),
                Part(name + FP8_SCALE_SUFFIX, "F32", scales, self.fmt.group_size),
            ]
        per_byte = self.fmt.value_type.per_byte
        values = "weight" if per_byte == 1 else "weight_packed"
        module = name.removesuffix("weight")
        parts = [
            Part(module + values, self._stored(self.fmt.values), (*batch, n, k // per_byte)),
            Part(
                module + "weight_scale",
                self._stored(self.fmt.scale_dtype),
                (*batch, n, ceil_div(k, self.fmt.group_size)),
            ),
        ]
        if self.fmt.upper_scale:
            parts.append(Part(module + "weight_global_scale", "F32", (1,)))
        return parts

    @staticmethod
    def _stored(dtype: torch.dtype) -> str:
        return STORED_NAMES.get(dtype, "U8")

    def quantize(
        self, w: torch.Tensor, w_sf: torch.Tensor | None, encode_scale: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return values and scales of rows of a weight.

        Args:
            w: (..., rows, K), from a multiple of 128 on.
            w_sf: where w is FP8, the scales of its blocks.
            encode_scale: the scale over e4m3 scales, if the format has one.
        """
        if w_sf is not None:
            return requantize_blocks(w, w_sf, self.fmt, encode_scale=encode_scale)
        if self.in_blocks:
            return quantize_blocks(w, self.fmt)
        q, sf = quantize(w, self.fmt, encode_scale=encode_scale)
        return q, sf

    def quantization_config(self, kept: Sequence[str]) -> dict[str, Any]:
        """Return ``quantization_config`` of config.json.

        Args:
            kept: modules that are not converted.
        """
        return {**self.config, self.keep_key: list(kept)}


def _row_major(fmt: Format) -> Format:
    return fmt.replace(scale_layout="row_major")


def _group_arguments(fmt: Format, *, dynamic: bool) -> dict[str, Any]:
    """Return compressed-tensors' description of weights, or of activations if `dynamic`."""
    scales = torch.float8_e4m3fn if fmt.upper_scale else torch.uint8
    return {
        "num_bits": 8 // fmt.value_type.per_byte,
        "type": "float",
        "symmetric": True,
        "group_size": fmt.group_size,
        "strategy": "tensor_group" if fmt.upper_scale else "group",
        "dynamic": dynamic,
        "scale_dtype": str(scales),
    }


def _compressed_tensors(fmt: Format, name: str, *, activations: bool) -> dict[str, Any]:
    """Return compressed-tensors' config for all linear layers."""
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": _group_arguments(fmt, dynamic=False),
                "input_activations": _group_arguments(fmt, dynamic=True) if activations else None,
                "output_activations": None,
                "format": name,
            }
        },
    }


CONVENTIONS: dict[str, Convention] = {
    convention.name: convention
    for convention in (
        Convention(
            "fp8",
            DEEP_GEMM_SM90,
            "e4m3, blocks of 128 x 128, float32 scales",
            FP8_CONFIG,
            "modules_to_not_convert",
            stacked=True,
        ),
        Convention(
            "fp8-ue8m0",
            DEEP_GEMM_SM90.replace(round_scale=True),
            "the same, but scales are powers of two",
            {**FP8_CONFIG, "scale_fmt": "ue8m0"},
            "modules_to_not_convert",
            stacked=True,
        ),
        Convention(
            "mxfp8",
            _row_major(MXFP8),
            "e4m3, groups of 32, UE8M0 bytes",
            _compressed_tensors(MXFP8, "mxfp8-quantized", activations=True),
        ),
        Convention(
            "mxfp4",
            _row_major(MXFP4),
            "e2m1, groups of 32, UE8M0 bytes",
            _compressed_tensors(MXFP4, "mxfp4-pack-quantized", activations=True),
        ),
        # Activations in NVFP4 would need a calibrated scale.
        Convention(
            "nvfp4",
            _row_major(NVFP4),
            "e2m1, groups of 16, e4m3 scales, 16-bit activations",
            _compressed_tensors(NVFP4, "nvfp4-pack-quantized", activations=False),
        ),
    )
}
"""Conventions by their names."""


def find(name: object) -> Convention:
    """Return the convention of a name.

    Raises:
        ValueError: there is none; what engines make of weights when they load them has none.
    """
    if isinstance(name, str) and name in CONVENTIONS:
        return CONVENTIONS[name]
    raise ValueError(
        f"fmt: expected one of {', '.join(CONVENTIONS)}, got {name!r}: no engine reads other "
        f"formats from a checkpoint, and packed or blocked scales are made when one is loaded"
    )
