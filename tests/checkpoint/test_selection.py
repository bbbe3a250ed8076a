"""Which weights are quantized, and what is refused by name."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cute_quant.checkpoint import CONVENTIONS, plan_checkpoint
from tests.checkpoint import made

FP8 = torch.float8_e4m3fn

QUANTIZED = [
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
    "model.layers.3.mlp.experts.17.down_proj.weight",
    "model.layers.3.mlp.shared_experts.gate_proj.weight",
    "model.layers.0.block_sparse_moe.experts.1.w2.weight",
    "model.layers.0.self_attn.indexer.wk.weight",
    "encoder.layer.0.attention.self.query.weight",
    "pooler.dense.weight",
]
KEPT = [
    "lm_head.weight",
    "model.embed_tokens.weight",
    "model.layers.61.shared_head.head.weight",
    "model.layers.61.eh_proj.weight",
    "model.layers.3.mlp.gate.weight",
    "model.layers.0.mlp.shared_expert_gate.weight",
    "model.layers.0.feed_forward.router.weight",
    "model.layers.0.block_sparse_moe.router.layer.weight",
    "model.layers.0.self_attn.indexer.weights_proj.weight",
    "model.layers.0.linear_attn.in_proj_ba.weight",
    "model.visual.blocks.0.attn.qkv.weight",
    "vision_tower.encoder.layers.0.mlp.fc1.weight",
    "multi_modal_projector.linear_1.weight",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "shared.weight",
    "transformer.wte.weight",
    "embeddings.word_embeddings.weight",
    "model.layers.0.lora_A",
]


def save(directory: Path, tensors: made.Tensors, **options) -> Path:
    return made.save(directory, {"model.safetensors": tensors}, **options)


def matrix(n: int = 128, k: int = 256) -> torch.Tensor:
    return torch.ones(n, k, dtype=torch.bfloat16)


def refuses(directory: Path, match: str, fmt: str = "fp8", keep: Sequence[str] = ()) -> None:
    with pytest.raises(ValueError, match=match):
        plan_checkpoint(directory, fmt, keep=keep)


def test_names(tmp_path):
    plan = plan_checkpoint(save(tmp_path / "in", {name: matrix() for name in QUANTIZED + KEPT}))
    assert sorted(plan.quantized) == sorted(QUANTIZED)
    assert sorted(plan.kept) == sorted(KEPT)
    modules = {name.removesuffix(".weight") for name in KEPT if name.endswith(".weight")}
    assert set(plan.kept_modules) == modules


def test_shapes(tmp_path):
    tensors = {
        "a.q_proj.weight": matrix(),
        "a.conv1d.weight": torch.ones(64, 1, 4),
        "patches.proj.weight": torch.ones(8, 3, 2, 2),
        "a.experts.gate_up_proj_bias": torch.ones(3, 64),
        "a.experts.bias": torch.ones(3, 1, 64),
        "a.weight": torch.ones(64),
        "empty.weight": torch.ones(0, 64),
    }
    plan = plan_checkpoint(save(tmp_path / "in", tensors))
    assert set(plan.quantized) == {"a.q_proj.weight", "empty.weight"}
    assert plan.kept_modules == ["lm_head"]


def test_a_head_that_shares_weights_is_named(tmp_path):
    plan = plan_checkpoint(save(tmp_path / "in", made.layer(0)))
    assert plan.kept_modules == ["lm_head"]


@pytest.mark.parametrize(
    ("pattern", "count"), [("o_proj", 2), ("layers.1.*", 7), ("model.*", 14), ("mlp.*_proj", 6)]
)
def test_keep(tmp_path, pattern, count):
    shards = made.llama()
    shards["model-00001-of-00003.safetensors"]["first.weight"] = matrix()
    plan = plan_checkpoint(made.save(tmp_path / "in", shards), keep=[pattern])
    kept = [name for name in plan.kept if "_proj.weight" in name]
    assert len(kept) == count and len(plan.quantized) == 15 - count


@pytest.mark.parametrize("pattern", ["proj", "layers.2.*", "", "self_attn"])
def test_a_pattern_that_matches_nothing(tmp_path, pattern):
    directory = save(tmp_path / "in", made.layer(0))
    refuses(
        directory, f"keep: expected a pattern of names of modules, got '{pattern}'", keep=[pattern]
    )


def test_a_star_is_of_one_part_of_a_name(tmp_path):
    names = ["norms.0.q_proj.weight", "embedder.up.weight", "vision_tower.a.fc1.weight"]
    names += ["a.vision_proj.weight", "multi_modal_projector.linear_1.weight", "a.norm2.weight"]
    plan = plan_checkpoint(save(tmp_path / "in", {name: matrix() for name in names}))
    assert set(plan.quantized) == set(names[:2])


@pytest.mark.parametrize("keep", ["o_proj", [1]])
def test_keep_is_a_sequence_of_patterns(tmp_path, keep):
    with pytest.raises(TypeError, match="keep: expected a sequence of patterns, got"):
        plan_checkpoint(save(tmp_path / "in", made.layer(0)), keep=keep)


@pytest.mark.parametrize("pattern", ["q_proj", "up_proj", "experts.1.*", "kv_a_proj_with_mqa"])
def test_a_part_of_what_engines_fuse(tmp_path, pattern):
    tensors = made.layer(0) | made.experts(stacked=False)["model.safetensors"]
    tensors["a.q_a_proj.weight"] = tensors["a.kv_a_proj_with_mqa.weight"] = matrix()
    tensors = {name: t.clone() for name, t in tensors.items()}
    refuses(
        save(tmp_path / "in", tensors), "keep: expected to keep .* or none of them", keep=[pattern]
    )


def test_projections_of_linear_attention_share_a_scale(tmp_path):
    names = [f"layers.0.linear_attn.in_proj_{part}.weight" for part in ("qkv", "z")]
    directory = save(tmp_path / "in", {name: matrix() for name in names})
    assert plan_checkpoint(directory, "nvfp4").fused == dict.fromkeys(names, names)
    refuses(directory, "engines load them as one", keep=["in_proj_z"])


def test_an_index_with_other_metadata(tmp_path):
    directory = made.save(tmp_path / "in", made.llama())
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "metadata": "x"}))
    refuses(directory, "JSON object as metadata")


@pytest.mark.parametrize("pattern", ["*_proj", "experts.*"])
def test_all_of_what_engines_fuse(tmp_path, pattern):
    tensors = made.experts(stacked=False)["model.safetensors"] | {"a.weight": matrix()}
    plan = plan_checkpoint(save(tmp_path / "in", tensors), keep=[pattern])
    assert list(plan.quantized) == ["a.weight"]


def test_nothing_to_quantize(tmp_path):
    refuses(save(tmp_path / "in", {"lm_head.weight": matrix()}), "expected weights to quantize")


@pytest.mark.parametrize("fmt", ["DEEP_GEMM", "int8", "MXFP8", None])
def test_formats_that_no_engine_reads(tmp_path, fmt):
    refuses(save(tmp_path / "in", made.layer(0)), f"fmt: expected one of fp8, .*, got {fmt!r}", fmt)


@pytest.mark.parametrize(("fmt", "multiple"), [("mxfp8", 32), ("mxfp4", 32), ("nvfp4", 16)])
def test_columns_that_are_no_groups(tmp_path, fmt, multiple):
    directory = save(tmp_path / "in", {"a.weight": matrix(k=multiple * 3 + multiple // 2)})
    refuses(directory, f"columns that are a multiple of {multiple}.*as a.weight in model", fmt)


@pytest.mark.parametrize("fmt", [name for name, c in CONVENTIONS.items() if not c.stacked])
def test_stacked_experts_of_other_formats(tmp_path, fmt):
    directory = made.save(tmp_path / "in", made.experts(stacked=True))
    refuses(directory, rf"no engine reads {fmt} of stacked ones; 'experts\.\*'", fmt)


def test_stacked_experts_that_are_transposed(tmp_path):
    name = "model.layers.0.mlp.experts.gate_up_proj"
    directory = save(tmp_path / "in", {name: torch.ones(2, made.HIDDEN, 384)})
    refuses(directory, rf"\(E, N, K\) with hidden_size 256, got \(2, 256, 384\) as {name}")


def test_hidden_sizes_of_several_configs(tmp_path):
    config = {"llm": {"text": {"hidden_size": 384}}, "vision": {"hidden_size": 64}}
    tensors = {"model.safetensors": {"a.experts.gate_up_proj": torch.ones(2, 256, 512)}}
    directory = made.save(tmp_path / "in", tensors)
    (directory / "config.json").write_text(json.dumps(config))
    refuses(directory, r"with hidden_size 64 or 384, got \(2, 256, 512\)")


def test_models_of_transposed_weights(tmp_path):
    directory = save(tmp_path / "in", {"h.0.attn.c_attn.weight": matrix()})
    (directory / "config.json").write_text('{"model_type": "gpt2"}')
    refuses(directory, r"got model_type 'gpt2', whose weights are \(K, N\)")


# Other quantizers


@pytest.mark.parametrize(
    ("name", "t"),
    [
        ("a.q_proj.qweight", torch.ones(8, 8, dtype=torch.int32)),
        ("a.q_proj.g_idx", torch.ones(8, dtype=torch.int32)),
        ("a.q_proj.weight", torch.ones(8, 8, dtype=torch.int8)),
        ("a.q_proj.weight", torch.ones(8, 8, dtype=torch.uint8)),
        ("a.q_proj.weight", torch.ones(8, 8, dtype=torch.int64)),
        ("a.q_proj.weight", torch.ones(8, 8).to(torch.float8_e5m2)),
        ("a.q_proj.input_scale", torch.ones(())),
    ],
)
def test_foreign_tensors(tmp_path, name, t):
    directory = save(tmp_path / "in", {**made.layer(0), name: t})
    refuses(directory, f"expected weights in BF16, F16, F32, or F8_E4M3 .* as {name} in model")


@pytest.mark.parametrize(
    ("quantization", "match"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method 'fp8' .*, got 'gptq'"),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "'dynamic' .*, got 'static'"),
        ({**made.FP8_CONFIG, "weight_block_size": None}, r"\[128, 128\] .*, got None"),
        ({**made.FP8_CONFIG, "weight_block_size": [1, 128]}, r"\[128, 128\] .*, got \[1, 128\]"),
        ({**made.FP8_CONFIG, "fmt": "e5m2"}, "fmt 'e4m3' .*, got 'e5m2'"),
        ("fp8", "JSON object as quantization_config .*, got 'fp8'"),
        (
            {**made.FP8_CONFIG, "modules_to_not_convert": "lm_head"},
            "list of names as modules_to_not_convert .*, got 'lm_head'",
        ),
    ],
)
def test_foreign_configs(tmp_path, quantization, match):
    directory = made.save(tmp_path / "in", made.fp8(made.llama()), quantization)
    refuses(directory, match, "fp8-ue8m0")


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantize_config.json"])
def test_files_of_other_quantizers(tmp_path, name):
    directory = save(tmp_path / "in", made.layer(0))
    (directory / name).write_text("{}")
    refuses(directory, f"expected no quantizer's config, got {name}")


def test_a_config_inside_of_another(tmp_path):
    directory = save(tmp_path / "in", made.layer(0))
    (directory / "config.json").write_text('{"text_config": {"quantization_config": {"bits": 4}}}')
    refuses(directory, "expected no quantization_config in text_config")


# FP8 checkpoints


WEIGHT = "model.layers.0.self_attn.q_proj.weight"


def fp8_with(directory: Path, changes: dict[str, torch.Tensor | None], **options) -> Path:
    """Save an FP8 checkpoint with tensors replaced, or left out where they are None."""
    (tensors,) = made.fp8({"model.safetensors": made.layer(0)}).values()
    changed = {name: t for name, t in {**tensors, **changes}.items() if t is not None}
    return save(directory, changed, **{"quantization": made.FP8_CONFIG, **options})


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({f"{WEIGHT}_scale_inv": None}, f"expected the scales {WEIGHT}_scale_inv of the FP8"),
        ({WEIGHT: None}, f"expected the weight of the scales {WEIGHT}_scale_inv in"),
        (
            {f"{WEIGHT}_scale_inv": torch.ones(2, 3)},
            rf"expected scales \(2, 2\) of {WEIGHT} \(256, 256\), got \(2, 3\)",
        ),
        ({f"{WEIGHT}_scale_inv": torch.ones(2, 2).bfloat16()}, "expected F32 scales, got BF16"),
        ({WEIGHT: matrix(256)}, "expected a matrix of F8_E4M3 with the scales"),
    ],
)
def test_scales_that_do_not_fit(tmp_path, changes, match):
    refuses(fp8_with(tmp_path / "in", changes), match, "fp8-ue8m0")


def test_fp8_without_a_config(tmp_path):
    directory = fp8_with(tmp_path / "in", {}, quantization=None)
    refuses(directory, "expected quantization_config in config.json of FP8 weights", "fp8-ue8m0")


def test_fp8_weights_are_not_kept(tmp_path):
    refuses(fp8_with(tmp_path / "in", {}), f"matches {WEIGHT}, which is FP8", "mxfp8", ["q_proj"])


def test_fp8_of_no_linear_layer(tmp_path):
    """Other names have no place for scales in every format."""
    scales = torch.ones(1, 2)
    changes = {"a.kernel": matrix().to(torch.float8_e4m3fn), "a.kernel_scale_inv": scales}
    refuses(fp8_with(tmp_path / "in", changes), "a matrix of F8_E4M3 .* as a.kernel", "nvfp4")


def test_what_an_fp8_checkpoint_leaves_stays(tmp_path):
    plan = plan_checkpoint(fp8_with(tmp_path / "in", {"a.weight": matrix()}), "mxfp8")
    assert "a.weight" in plan.kept and "a" in plan.kept_modules


@pytest.mark.parametrize("fmt", ["fp8", "fp8-ue8m0"])
def test_the_format_of_the_source(tmp_path, fmt):
    said = {**made.FP8_CONFIG, "scale_fmt": "ue8m0"}
    directory = fp8_with(tmp_path / "in", {}, quantization=said)
    refuses(directory, f"FP8 with powers of two is requantized to, got '{fmt}'", fmt)
    assert plan_checkpoint(directory, "mxfp8").quantized


def test_a_name_that_the_result_has(tmp_path):
    directory = save(
        tmp_path / "in", {**made.layer(0), f"{WEIGHT.removesuffix('weight')}extra": matrix()}
    )
    assert plan_checkpoint(directory).quantized
    save_file(
        {"a.weight": matrix(), "a.weight_global_scale": torch.ones(1)},
        directory / "model.safetensors",
    )
    refuses(directory, "expected no tensor named a.weight_global_scale", "nvfp4")
