"""Small checkpoints with the names of real ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import cute_quant as cq

Tensors = dict[str, torch.Tensor]

HIDDEN = 256
FP8_CONFIG = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
}


def weight(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).mul(0.02).to(dtype)


def layer(number: int, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """A layer of a Llama, with sizes that are no multiples of 128."""
    prefix = f"model.layers.{number}."
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (64, HIDDEN),
        "self_attn.v_proj": (64, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (352, HIDDEN),
        "mlp.up_proj": (352, HIDDEN),
        "mlp.down_proj": (HIDDEN, 352),
    }
    tensors = {
        f"{prefix}{name}.weight": weight(*shape, dtype=dtype, seed=number + i)
        for i, (name, shape) in enumerate(shapes.items())
    }
    tensors[f"{prefix}self_attn.q_proj.bias"] = weight(HIDDEN, dtype=dtype)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{prefix}{norm}.weight"] = torch.ones(HIDDEN, dtype=dtype)
    return tensors


def llama(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensors]:
    """Return the tensors of a Llama of two layers, by shard."""
    ends = {
        "model.embed_tokens.weight": weight(80, HIDDEN, dtype=dtype),
        "model.norm.weight": torch.ones(HIDDEN, dtype=dtype),
        "lm_head.weight": weight(80, HIDDEN, dtype=dtype, seed=1),
        "model.rotary_emb.step": torch.tensor(2.5),
        "model.position_ids": torch.arange(8)[None],
    }
    shards = [layer(0, dtype), layer(1, dtype), ends]
    return {f"model-{i:05}-of-00003.safetensors": t for i, t in enumerate(shards, 1)}


def experts(stacked: bool) -> dict[str, Tensors]:
    """Return the tensors of a layer of a Qwen-MoE, one matrix for each expert or all of them."""
    prefix = "model.layers.0.mlp."
    tensors = {f"{prefix}gate.weight": weight(3, HIDDEN)}
    if stacked:
        tensors[f"{prefix}experts.gate_up_proj"] = weight(3, 2 * 192, HIDDEN)
        tensors[f"{prefix}experts.down_proj"] = weight(3, HIDDEN, 192)
    else:
        for i in range(3):
            tensors[f"{prefix}experts.{i}.gate_proj.weight"] = weight(192, HIDDEN, seed=i)
            tensors[f"{prefix}experts.{i}.up_proj.weight"] = 3 * weight(192, HIDDEN, seed=i + 9)
            tensors[f"{prefix}experts.{i}.down_proj.weight"] = weight(HIDDEN, 192, seed=i)
    return {"model.safetensors": tensors}


def fp8(shards: Mapping[str, Tensors]) -> dict[str, Tensors]:
    """Return the same as FP8, with all scales in the last shard, as they may lie."""
    result: dict[str, Tensors] = {shard: {} for shard in shards}
    *_, last = shards
    for shard, tensors in shards.items():
        for name, t in tensors.items():
            if "_proj" in name and "bias" not in name:
                result[shard][name], scales = cq.quantize_blocks(t, cq.DEEP_GEMM_SM90)
                result[last][f"{name}_scale_inv"] = scales
            else:
                result[shard][name] = t
    return result


def save(
    directory: Path, shards: Mapping[str, Tensors], quantization: Mapping[str, Any] | None = None
) -> Path:
    """Write a checkpoint with a tokenizer beside it."""
    directory.mkdir(parents=True)
    for shard, tensors in shards.items():
        save_file(tensors, directory / shard, {"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
        index = {"metadata": {"total_size": 1, "total_parameters": 2}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config: dict[str, Any] = {"model_type": "llama", "hidden_size": HIDDEN, "dtype": "bfloat16"}
    if quantization is not None:
        config["quantization_config"] = quantization
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")
    (directory / "code").mkdir()
    (directory / "code" / "modeling.py").write_text("pass\n")
    (directory / ".gitattributes").write_text("")
    (directory / "pytorch_model.bin").write_bytes(b"weights in another format")
    return directory


def load(directory: Path) -> Tensors:
    """Return all tensors of a directory, as the library reads them."""
    tensors: Tensors = {}
    for shard in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(shard)
    return tensors


def contents(directory: Path) -> dict[str, bytes]:
    """Return the bytes of every file."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def config(directory: Path) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return parsed
