"""Choose which weights of a checkpoint are quantized, and check that they can be."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from cute_quant.checkpoint.conventions import FP8_CONFIG, FP8_SCALE_SUFFIX, Convention, Part
from cute_quant.checkpoint.source import CONFIG, FOREIGN_CONFIGS, Checkpoint, StoredTensor
from cute_quant.contract.dtypes import SOURCE_BLOCK, ceil_div

DEFAULT_KEEP = (
    "*head",
    "*embed*", "emb", "shared", "wte", "wpe", "*relative_attention_bias",
    "*norm*", "ln_*",
    "gate", "router", "router.*", "*_expert_gate",
    "visual.*", "vision_*", "vision_*.*", "audio_*", "audio_*.*", "*projector*", "*projector*.*",
    "weights_proj", "eh_proj", "in_proj_a", "in_proj_b", "in_proj_ba", "x_proj", "dt_proj",
)  # fmt: skip
"""Modules that stay as they are, as patterns of the end of their names: output heads, embeddings,
norms, routers, towers of other modalities, and projections that published checkpoints leave.

A ``*`` is of one part of a name, such as ``q_proj``, but one that is a part by itself is of one or
more."""

ALWAYS_LISTED = "lm_head"
"""A head that shares the embedding's weights is in no file, and readers would convert it."""

INPUT_DTYPES = ("BF16", "F16", "F32")
FP8 = "F8_E4M3"
SCALE_DTYPE = "F32"
BUFFER_DTYPES = ("BOOL", "I64", "F64")
"""Matrices of these are masks and positions. Integers of fewer bits are quantized weights."""
FOREIGN_SUFFIXES = (
    "qweight", "qzeros", "g_idx", "weight_packed", "weight_scale", "input_scale", "absmax",
    "activation_scale",
)  # fmt: skip
"""Last parts of names of tensors that other quantizers store."""

FUSED = (
    frozenset({"q_proj", "k_proj", "v_proj"}),
    frozenset({"query", "key", "value"}),
    frozenset({"gate_proj", "up_proj"}),
    frozenset({"w1", "w3"}),
    frozenset({"q_a_proj", "kv_a_proj_with_mqa"}),
    frozenset({"in_proj_qkv", "in_proj_z"}),
)
"""Projections that engines read as one matrix: all are quantized or none, under one upper scale."""
EXPERTS = "experts"
DOWN_PROJECTIONS = ("down_proj", "w2")
"""Projections of experts whose rows, not columns, are ``hidden_size`` many."""

CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""Models whose weights are (K, N), which no reader expects of a linear layer."""


@dataclass(frozen=True)
class Plan:
    """The destination of each tensor of a checkpoint.

    Attributes:
        quantized: weights, by name.
        scales: of weights that are FP8 already, by the name of the weight.
        kept: tensors that are copied, by name.
        kept_modules: names of modules with a weight matrix that is kept, for config.json.
        parts: tensors that replace each quantized weight.
        fused: of each quantized weight those that engines read as one matrix with it, and itself.
    """

    checkpoint: Checkpoint
    convention: Convention
    quantized: Mapping[str, StoredTensor]
    scales: Mapping[str, StoredTensor]
    kept: Mapping[str, StoredTensor]
    kept_modules: Sequence[str]
    parts: Mapping[str, Sequence[Part]]
    fused: Mapping[str, Sequence[str]]


def make_plan(checkpoint: Checkpoint, convention: Convention, keep: Sequence[str] = ()) -> Plan:
    """Decide which weights are quantized.

    Args:
        checkpoint: the input.
        convention: how they will be stored.
        keep: patterns of modules that stay as they are, as ``DEFAULT_KEEP`` has them.

    Raises:
        ValueError: a tensor cannot be quantized, or has been by another quantizer.
    """
    _check_config(checkpoint, convention)
    scales = _scales(checkpoint)
    consumed = {scale.name for scale in scales.values()}
    quantized: dict[str, StoredTensor] = {}
    kept: dict[str, StoredTensor] = {}
    for name, tensor in checkpoint.tensors.items():
        if name in consumed:
            continue
        _check_dtype(tensor, scales)
        taken = name in scales if scales else _is_weight(tensor) and not _kept(name, DEFAULT_KEEP)
        if taken and _kept(name, keep):
            if scales:
                raise ValueError(
                    f"keep: expected modules of 16-bit weights, got one that matches {name}, "
                    f"which is FP8"
                )
            taken = False
        (quantized if taken else kept)[name] = tensor
    _check_keep(checkpoint, keep)
    _check_fusions(quantized, kept)
    for tensor in quantized.values():
        _check_shape(tensor, checkpoint.config, convention)
    if not quantized:
        raise ValueError("source: expected weights to quantize, got none that is not kept")
    parts = {name: convention.parts(name, t.shape) for name, t in quantized.items()}
    _check_names(parts, kept)
    modules = {_module(name) for name, tensor in kept.items() if _is_weight(tensor)}
    modules |= {ALWAYS_LISTED, *_listed(checkpoint.config)}
    fused: dict[object, list[str]] = defaultdict(list)
    for name in quantized:
        fused[_fusion(name) or name].append(name)
    return Plan(
        checkpoint,
        convention,
        quantized,
        scales,
        kept,
        sorted(modules),
        parts,
        {name: fused[_fusion(name) or name] for name in quantized},
    )


def _module(name: str) -> str:
    """Return the module of a weight: stacked ones of experts have no `.weight` at their end."""
    return name.rpartition(".")[0]


def _is_weight(tensor: StoredTensor) -> bool:
    """Return whether a tensor is the weight of a linear layer, or of one for each expert."""
    *path, last = tensor.name.split(".")
    if len(tensor.shape) == 3:
        return EXPERTS in path and "bias" not in last
    return len(tensor.shape) == 2 and last == "weight"


def _kept(name: str, patterns: Collection[str]) -> bool:
    parts = name.removesuffix(".weight").split(".")
    return any(_matches_end(parts, pattern.split(".")) for pattern in patterns)


def _matches_end(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Return whether the last parts of a name are those of a pattern, as `DEFAULT_KEEP` says."""
    if not pattern:
        return True
    *before, last = pattern
    most = len(parts) if last == "*" else min(1, len(parts))
    return any(
        fnmatchcase(parts[-1], last) and _matches_end(parts[:-taken], before)
        for taken in range(1, most + 1)
    )


def _listed(config: Mapping[str, Any]) -> list[str]:
    """Return modules that the config of an FP8 checkpoint names as not converted."""
    quantization = config.get("quantization_config") or {}
    listed: list[str] = []
    for key in ("modules_to_not_convert", "ignored_layers"):
        names = quantization.get(key) or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(
                f"source: expected a list of names as {key} of {CONFIG}, got {names!r}"
            )
        listed += names
    return listed


def _check_config(checkpoint: Checkpoint, convention: Convention) -> None:
    config = checkpoint.config
    for name in FOREIGN_CONFIGS:
        if (checkpoint.directory / name).exists():
            raise ValueError(f"source: expected no quantizer's config, got {name}")
    for key, value in config.items():
        if isinstance(value, dict) and value.get("quantization_config"):
            raise ValueError(f"source: expected no quantization_config in {key} of {CONFIG}")
    if config.get("model_type") in CONV1D_MODELS:
        raise ValueError(
            f"source: expected weights (N, K) of linear layers, got model_type "
            f"{config['model_type']!r}, whose weights are (K, N)"
        )
    has_fp8 = any(tensor.dtype == FP8 for tensor in checkpoint.tensors.values())
    found = config.get("quantization_config") or config.get("compression_config")
    if found and not isinstance(found, dict):
        raise ValueError(
            f"source: expected a JSON object as quantization_config of {CONFIG}, got {found!r}"
        )
    if not found:
        if has_fp8:
            raise ValueError(f"source: expected quantization_config in {CONFIG} of FP8 weights")
        return
    for key, expected in FP8_CONFIG.items():
        if found.get(key, expected if key == "fmt" else None) != expected:
            raise ValueError(
                f"source: expected 16-bit weights, or FP8 in blocks with {key} {expected!r} in "
                f"quantization_config of {CONFIG}, got {found.get(key)!r}"
            )
    scale_fmt = convention.config.get("scale_fmt")
    if convention.in_blocks and scale_fmt in (None, found.get("scale_fmt")):
        kind = "powers of two" if found.get("scale_fmt") else "float32 scales"
        raise ValueError(
            f"fmt: expected a format that FP8 with {kind} is requantized to, got "
            f"{convention.name!r}"
        )


def _scales(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """Return the scales of FP8 weights by the names of these.

    Raises:
        ValueError: one has no weight, or is not that of its blocks.
    """
    scales = {}
    for name, scale in checkpoint.tensors.items():
        if not name.endswith(FP8_SCALE_SUFFIX):
            continue
        weight = checkpoint.tensors.get(name.removesuffix(FP8_SCALE_SUFFIX))
        if weight is None:
            raise ValueError(
                f"source: expected the weight of the scales {scale}, got no such tensor"
            )
        matrix = len(weight.shape) == 3 or weight.name.endswith(".weight")
        if weight.dtype != FP8 or len(weight.shape) not in (2, 3) or not matrix:
            raise ValueError(
                f"source: expected a matrix of {FP8} with the scales {scale}, got {weight.dtype} "
                f"{weight.shape} as {weight}"
            )
        if scale.dtype != SCALE_DTYPE:
            raise ValueError(f"source: expected {SCALE_DTYPE} scales, got {scale.dtype} as {scale}")
        *batch, n, k = weight.shape
        expected = (*batch, ceil_div(n, SOURCE_BLOCK), ceil_div(k, SOURCE_BLOCK))
        if scale.shape != expected:
            raise ValueError(
                f"source: expected scales {expected} of {weight.name} {weight.shape}, got "
                f"{scale.shape} as {scale}"
            )
        scales[weight.name] = scale
    return scales


def _check_dtype(tensor: StoredTensor, scales: Mapping[str, StoredTensor]) -> None:
    """Check that a tensor is none of another quantizer."""
    if tensor.dtype == FP8 and tensor.name not in scales:
        raise ValueError(
            f"source: expected the scales {tensor.name}{FP8_SCALE_SUFFIX} of the FP8 weight "
            f"{tensor}, got no such tensor"
        )
    foreign_name = tensor.name.rpartition(".")[2] in FOREIGN_SUFFIXES
    plain = len(tensor.shape) not in (2, 3) or tensor.dtype in (*INPUT_DTYPES, FP8, *BUFFER_DTYPES)
    if foreign_name or not plain or (_is_weight(tensor) and tensor.dtype in BUFFER_DTYPES):
        raise ValueError(
            f"source: expected weights in {', '.join(INPUT_DTYPES)}, or {FP8} with scales of "
            f"blocks, got {tensor.dtype} {tensor.shape} as {tensor}"
        )


def _check_keep(checkpoint: Checkpoint, keep: Sequence[str]) -> None:
    """Check that each pattern names something, so that a misspelt one does not pass."""
    for pattern in keep:
        if not any(_kept(name, [pattern]) for name in checkpoint.tensors):
            raise ValueError(f"keep: expected a pattern of names of modules, got {pattern!r}")


def _fusion(name: str) -> tuple[str, frozenset[str]] | None:
    """Return the key that a projection shares with those that it is fused with, if any."""
    parent, _, last = name.removesuffix(".weight").rpartition(".")
    return next(((parent, group) for group in FUSED if last in group), None)


def _units(name: str) -> Iterator[object]:
    """Yield keys of what engines load as a whole: a fused matrix, all experts of a layer."""
    fusion = _fusion(name)
    if fusion is not None:
        yield fusion
    path = name.split(".")
    if EXPERTS in path:
        yield ".".join(path[: path.index(EXPERTS) + 1])


def _check_fusions(quantized: Mapping[str, StoredTensor], kept: Mapping[str, StoredTensor]) -> None:
    first: dict[object, str] = {}
    for name in quantized:
        for unit in _units(name):
            first.setdefault(unit, name)
    for name, tensor in kept.items():
        for unit in _units(name) if _is_weight(tensor) else ():
            if unit in first:
                raise ValueError(
                    f"keep: expected to keep {first[unit]} with {name}, or none of them: engines "
                    f"load them as one"
                )


def _check_shape(tensor: StoredTensor, config: Mapping[str, Any], convention: Convention) -> None:
    *batch, n, k = tensor.shape
    if batch and not convention.stacked:
        raise ValueError(
            f"source: expected a matrix for each expert, got {tensor.shape} as {tensor}: no engine "
            f"reads {convention.name} of stacked ones; '{EXPERTS}.*' as keep leaves them"
        )
    if k % convention.column_multiple:
        raise ValueError(
            f"source: expected columns that are a multiple of {convention.column_multiple} for "
            f"{convention.name}, got {tensor.shape} as {tensor}"
        )
    last = tensor.name.removesuffix(".weight").rpartition(".")[2]
    side, sizes = n if last in DOWN_PROJECTIONS else k, sorted(set(_hidden_sizes(config)))
    if batch and sizes and side not in sizes:
        raise ValueError(
            f"source: expected stacked experts (E, N, K) with hidden_size "
            f"{' or '.join(map(str, sizes))}, got "
            f"{tensor.shape} as {tensor}: no engine reads transposed ones; '{EXPERTS}.*' as keep "
            f"leaves them"
        )


def _hidden_sizes(config: Mapping[str, Any]) -> Iterator[int]:
    """Yield each hidden_size of a config: models of several modalities have several configs."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _hidden_sizes(value)
        elif key == "hidden_size" and isinstance(value, int):
            yield value


def _check_names(parts: Mapping[str, Sequence[Part]], kept: Mapping[str, StoredTensor]) -> None:
    """Check that no tensor of the result has the name of another."""
    names: dict[str, int] = defaultdict(int)
    for name in (*kept, *(part.name for of_one in parts.values() for part in of_one)):
        names[name] += 1
        if names[name] > 1:
            raise ValueError(f"source: expected no tensor named {name}, which the result has")
