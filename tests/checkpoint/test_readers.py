"""Libraries that read checkpoints read ours: their configs, their modules, and what they compute.

transformers needs a GPU to keep FP8; on the CPU it multiplies weights by their scales.
"""

from pathlib import Path

import pytest
import torch

import cute_quant as cq
from cute_quant.checkpoint import CONVENTIONS, quantize_checkpoint
from tests.checkpoint import made

FP8 = ["fp8", "fp8-ue8m0"]
PRESETS = {"mxfp8": "MXFP8", "mxfp4": "MXFP4", "nvfp4": "NVFP4A16"}
"""Formats by the names that compressed-tensors gives them."""

pytestmark = pytest.mark.slow


def save_model(directory: Path, kind: str) -> Path:
    """Save a small model with random weights in several shards."""
    import transformers

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 128,
        "hidden_size": 256,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    }
    if kind == "llama":
        config = transformers.LlamaConfig(**sizes, tie_word_embeddings=True)
        model = transformers.LlamaForCausalLM(config)
    else:
        of_experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
        config = transformers.Qwen3MoeConfig(**sizes, **of_experts)
        model = transformers.Qwen3MoeForCausalLM(config)
    model.bfloat16().save_pretrained(directory, max_shard_size="1MB")
    return directory


def load_model(directory: Path):
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    y: torch.Tensor = model(torch.arange(12)[None]).logits.float()
    return y


@pytest.mark.library("transformers")
@pytest.mark.parametrize("kind", ["llama", "qwen"])
@pytest.mark.parametrize("fmt", FP8)
def test_transformers_computes_nearly_the_same(tmp_path, fmt, kind):
    directory = save_model(tmp_path / "in", kind)
    quantize_checkpoint(directory, tmp_path / "out", fmt)
    expected = logits(load_model(directory))
    difference = logits(load_model(tmp_path / "out")) - expected
    assert difference.norm() / expected.norm() < 0.1


@pytest.mark.library("compressed_tensors")
@pytest.mark.parametrize(("fmt", "error"), [("mxfp8", 0.1), ("mxfp4", 0.4), ("nvfp4", 0.25)])
def test_transformers_with_compressed_tensors(tmp_path, fmt, error):
    pytest.importorskip("transformers")
    directory = save_model(tmp_path / "in", "llama")
    quantize_checkpoint(directory, tmp_path / "out", fmt)
    expected = logits(load_model(directory))
    difference = logits(load_model(tmp_path / "out")) - expected
    assert difference.norm() / expected.norm() < error


@pytest.mark.library("transformers")
@pytest.mark.parametrize("kind", ["llama", "qwen"])
@pytest.mark.parametrize("fmt", FP8)
def test_transformers_modules_take_every_tensor(tmp_path, fmt, kind, monkeypatch):
    """As on a GPU: no tensor is missing, or left over, and each goes into its module."""
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None)
    quantize_checkpoint(save_model(tmp_path / "in", kind), tmp_path / "out", fmt)
    model = load_model(tmp_path / "out")
    tensors = made.load(tmp_path / "out")
    projection = model.model.layers[1].self_attn.q_proj
    name = "model.layers.1.self_attn.q_proj.weight"
    assert type(projection).__name__ == "FP8Linear" and type(model.lm_head).__name__ == "Linear"
    assert torch.equal(projection.weight.view(torch.uint8), tensors[name].view(torch.uint8))
    assert torch.equal(projection.weight_scale_inv.float(), tensors[f"{name}_scale_inv"])


@pytest.mark.library("compressed_tensors")
@pytest.mark.parametrize("fmt", PRESETS)
def test_compressed_tensors_reads_the_config_and_the_weights(tmp_path, fmt):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme

    directory = made.save(tmp_path / "in", made.llama())
    quantize_checkpoint(directory, tmp_path / "out", fmt)
    config = QuantizationConfig.model_validate(made.config(tmp_path / "out")["quantization_config"])
    assert config.ignore == ["lm_head", "model.embed_tokens"]
    (scheme,) = config.config_groups.values()
    expected = preset_name_to_scheme(PRESETS[fmt], ["Linear"])
    described = scheme.model_dump(exclude={"format"}, exclude_none=True)
    assert described == without(expected.model_dump(exclude={"format"}, exclude_none=True))

    module = "model.layers.0.mlp.down_proj."
    tensors = made.load(tmp_path / "out")
    state = {k.removeprefix(module): t for k, t in tensors.items() if k.startswith(module)}
    compressor = BaseCompressor.get_value_from_registry(config.format)
    theirs = compressor.decompress(state, scheme)["weight"].float()
    ours = dequantize(state, fmt)
    # Theirs is rounded to bfloat16.
    torch.testing.assert_close(theirs, ours, rtol=2**-7, atol=0)


def without(described: dict) -> dict:
    """Leave out the dtype of zero points, which there are none of."""
    for arguments in described.values():
        if isinstance(arguments, dict):
            arguments.pop("zp_dtype", None)
    return described


def dequantize(state: made.Tensors, fmt: str) -> torch.Tensor:
    stored = CONVENTIONS[fmt].fmt
    q = state["weight" if fmt == "mxfp8" else "weight_packed"].view(stored.values)
    sf = state["weight_scale"].view(stored.scale_dtype)
    upper = {"encode_scale": state["weight_global_scale"]} if fmt == "nvfp4" else {}
    return cq.dequantize(q, sf, stored, dtype=torch.float32, **upper)
