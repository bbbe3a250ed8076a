"""What a quantized checkpoint holds: each byte is that of the operations on whole tensors."""

import json
from pathlib import Path

import pytest
import torch

import cute_quant as cq
from cute_quant.checkpoint import CONVENTIONS, conversion, quantize_checkpoint
from tests.checkpoint import made

ROUNDED = cq.DEEP_GEMM_SM90.replace(round_scale=True)
BLOCKS = {"fp8": cq.DEEP_GEMM_SM90, "fp8-ue8m0": ROUNDED}
GROUPS = {
    name: fmt.replace(scale_layout="row_major")
    for name, fmt in {"mxfp8": cq.MXFP8, "mxfp4": cq.MXFP4, "nvfp4": cq.NVFP4}.items()
}
WEIGHTS = [name for name in made.layer(0) if "_proj.weight" in name]
Q, K, V, O, GATE, UP, DOWN = WEIGHTS  # noqa: E741


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def kept(tensors: made.Tensors) -> made.Tensors:
    return {name: t for name, t in tensors.items() if "_proj.weight" not in name}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("fmt", "dtype"),
    [("fp8", torch.bfloat16), ("fp8-ue8m0", torch.float16), ("fp8", torch.float32)],
)
def test_blocks(tmp_path, out, fmt, dtype):
    source = made.load(made.save(tmp_path / "in", made.llama(dtype)))
    done = quantize_checkpoint(tmp_path / "in", out, fmt)
    result = made.load(out)
    assert (done.quantized, done.kept, done.resumed) == (14, 11, 0)
    for name in WEIGHTS:
        q, sf = cq.quantize_blocks(source[name], BLOCKS[fmt])
        assert result[name].dtype is torch.float8_e4m3fn and same_bytes(result[name], q)
        assert torch.equal(result[f"{name}_scale_inv"], sf)
        assert sf.shape == tuple(-(-size // 128) for size in source[name].shape)
    for name, t in kept(source).items():
        assert result[name].dtype is t.dtype and torch.equal(result[name], t)
    assert len(result) == len(source) + 14


@pytest.mark.parametrize("fmt", GROUPS)
def test_groups(tmp_path, out, fmt):
    source = made.load(made.save(tmp_path / "in", made.llama()))
    quantize_checkpoint(tmp_path / "in", out, fmt)
    result = made.load(out)
    for fused in ((Q, K, V), (O,), (GATE, UP), (DOWN,)):
        amax = torch.stack([source[name].abs().max() for name in fused]).max().float()
        encode = torch.tensor(2688.0) / amax
        upper = {"encode_scale": encode} if fmt == "nvfp4" else {}
        for name in fused:
            module = name.removesuffix("weight")
            q, sf = cq.quantize(source[name], GROUPS[fmt], **upper)
            values = result[module + ("weight" if fmt == "mxfp8" else "weight_packed")]
            scales = result[f"{module}weight_scale"]
            assert same_bytes(values.view(torch.uint8), q.view(torch.uint8))
            assert same_bytes(scales.view(torch.uint8), sf.view(torch.uint8))
            assert scales.shape == (
                len(source[name]),
                source[name].shape[1] // GROUPS[fmt].group_size,
            )
            assert scales.dtype is (torch.float8_e4m3fn if upper else torch.uint8)
            if upper:
                assert torch.equal(result[f"{module}weight_global_scale"], encode[None])
    assert kept(result).keys() >= kept(source).keys()


@pytest.mark.parametrize("fmt", [*GROUPS, "fp8-ue8m0"])
def test_fp8_checkpoints(tmp_path, out, fmt):
    """Scales lie in another shard than their weights."""
    shards = made.fp8(made.llama())
    source = made.load(made.save(tmp_path / "in", shards, made.FP8_CONFIG))
    quantize_checkpoint(tmp_path / "in", out, fmt)
    result = made.load(out)
    w8, w_sf = source[O], source[f"{O}_scale_inv"]
    upper = {}
    if fmt == "nvfp4":
        products = cq.dequantize_blocks(w8, w_sf, cq.DEEP_GEMM_SM90, dtype=torch.float32)
        upper["amax"] = products.abs().max()
    q, sf = cq.requantize_blocks(w8, w_sf, GROUPS.get(fmt, ROUNDED), **upper)
    module = O.removesuffix("weight")
    four_bits = fmt in ("mxfp4", "nvfp4")
    assert same_bytes(
        result[module + "weight" + "_packed" * four_bits].view(torch.uint8), q.view(torch.uint8)
    )
    scales = result[module + ("weight_scale_inv" if fmt == "fp8-ue8m0" else "weight_scale")]
    assert same_bytes(scales.view(torch.uint8), sf.view(torch.uint8))
    assert torch.equal(result["lm_head.weight"], source["lm_head.weight"])
    assert not any("_scale_inv" in name for name in result) or fmt == "fp8-ue8m0"


def test_stacked_experts(tmp_path, out):
    (tensors,) = made.experts(stacked=True).values()
    made.save(tmp_path / "in", {"model.safetensors": tensors})
    quantize_checkpoint(tmp_path / "in", out)
    result = made.load(out)
    for name in ("gate_up_proj", "down_proj"):
        name = f"model.layers.0.mlp.experts.{name}"
        q, sf = cq.quantize_blocks(tensors[name], cq.DEEP_GEMM_SM90)
        assert same_bytes(result[name], q) and torch.equal(result[f"{name}_scale_inv"], sf)
    assert not (out / "model.safetensors.index.json").exists()
    again = tmp_path / "again"
    quantize_checkpoint(out, again, "fp8-ue8m0")
    expected, _ = cq.requantize_blocks(q, sf, ROUNDED)
    assert same_bytes(made.load(again)[name], expected)


def test_experts_share_the_scale_of_gate_and_up(tmp_path, out):
    made.save(tmp_path / "in", made.experts(stacked=False))
    quantize_checkpoint(tmp_path / "in", out, "nvfp4")
    result = made.load(out)
    scales = [
        result[f"model.layers.0.mlp.experts.{i}.{name}_proj.weight_global_scale"].item()
        for i in range(2)
        for name in ("gate", "up", "down")
    ]
    assert scales[0] == scales[1] and scales[3] == scales[4]
    assert len(set(scales)) == 4


@pytest.mark.parametrize("fmt", CONVENTIONS)
def test_slabs_of_rows_change_nothing(tmp_path, out, fmt, monkeypatch):
    shards = made.experts(stacked=CONVENTIONS[fmt].stacked)
    shards["model.safetensors"] |= made.layer(0)
    made.save(tmp_path / "in", shards)
    quantize_checkpoint(tmp_path / "in", out, fmt)
    rows: list[int] = []
    quantize = conversion.conventions.Convention.quantize

    def spy(self, w, w_sf, encode_scale):
        rows.append(w.shape[-2])
        return quantize(self, w, w_sf, encode_scale)

    monkeypatch.setattr(conversion, "SLAB_VALUES", 1)
    monkeypatch.setattr(conversion.conventions.Convention, "quantize", spy)
    quantize_checkpoint(tmp_path / "in", tmp_path / "slabs", fmt)
    assert max(rows) == 128 and len(rows) > 20
    assert made.contents(tmp_path / "slabs") == made.contents(out)


def test_slabs_of_fp8(tmp_path, out, monkeypatch):
    made.save(tmp_path / "in", made.fp8(made.experts(stacked=True)), made.FP8_CONFIG)
    quantize_checkpoint(tmp_path / "in", out, "fp8-ue8m0")
    monkeypatch.setattr(conversion, "SLAB_VALUES", 1)
    quantize_checkpoint(tmp_path / "in", tmp_path / "slabs", "fp8-ue8m0")
    assert made.contents(tmp_path / "slabs") == made.contents(out)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("source", "fmt"),
    [("bf16", fmt) for fmt in CONVENTIONS] + [("fp8", fmt) for fmt in CONVENTIONS if fmt != "fp8"],
)
def test_a_gpu_writes_the_same_bytes(tmp_path, source, fmt):
    if source == "bf16":
        made.save(tmp_path / "in", made.llama())
    else:
        made.save(tmp_path / "in", made.fp8(made.llama()), made.FP8_CONFIG)
    quantize_checkpoint(tmp_path / "in", tmp_path / "cpu", fmt, device="cpu")
    quantize_checkpoint(tmp_path / "in", tmp_path / "cuda", fmt, device="cuda")
    assert made.contents(tmp_path / "cpu") == made.contents(tmp_path / "cuda")


# Files beside the weights


def test_files(tmp_path, out):
    made.save(tmp_path / "in", made.llama())
    done = quantize_checkpoint(tmp_path / "in", out)
    assert (out / "tokenizer.json").read_text() == "{}"
    assert (out / "code" / "modeling.py").read_text() == "pass\n"
    names = {*made.llama(), "model.safetensors.index.json", "config.json"}
    assert made.contents(out).keys() == {*names, "tokenizer.json", "code/modeling.py"}
    assert done.left_out == ("pytorch_model.bin",)


def test_text_of_the_config_that_is_no_unicode(tmp_path, out):
    """Half of a surrogate pair, as JSON escapes it."""
    directory = made.save(tmp_path / "in", {"model.safetensors": made.layer(0)})
    (directory / "config.json").write_text('{"name": "\\ud800"}')
    quantize_checkpoint(tmp_path / "in", out)
    assert json.loads((out / "config.json").read_text())["name"] == "\ud800"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directory": 3}, "directory: expected a path, got 3"),
        ({"output": b"out"}, "output: expected a path, got b'out'"),
        ({"device": 0}, "device: expected a name or a torch.device, got 0"),
        ({"allow_non_finite": "no"}, "allow_non_finite: expected True or False, got 'no'"),
    ],
)
def test_arguments_of_other_types(tmp_path, out, options, message):
    directory = made.save(tmp_path / "in", {"model.safetensors": made.layer(0)})
    with pytest.raises(TypeError, match=message):
        quantize_checkpoint(**{"directory": directory, "output": out, **options})
    assert not out.exists()


def test_the_index(tmp_path, out):
    made.save(tmp_path / "in", made.llama())
    done = quantize_checkpoint(tmp_path / "in", out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    result = made.load(out)
    total = sum(t.numel() * t.element_size() for t in result.values())
    assert index["metadata"] == {"total_size": total, "total_parameters": 2}
    assert done.bytes_written == total
    assert index["weight_map"].keys() == result.keys()
    for shard in made.llama():
        placed = {name for name, file in index["weight_map"].items() if file == shard}
        assert placed == made.load_file(out / shard).keys()


def test_a_shard_that_only_held_scales_is_left_out(tmp_path, out):
    shards = made.fp8({"a.safetensors": made.layer(0), "b.safetensors": {}})
    made.save(tmp_path / "in", shards, made.FP8_CONFIG)
    quantize_checkpoint(tmp_path / "in", out, "mxfp8")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"a.safetensors"}
    assert not (out / "b.safetensors").exists()


@pytest.mark.parametrize("fmt", CONVENTIONS)
def test_the_config(tmp_path, out, fmt):
    made.save(tmp_path / "in", made.llama())
    quantize_checkpoint(tmp_path / "in", out, fmt, keep=["o_proj"])
    config = made.config(out)
    quantization = config.pop("quantization_config")
    assert config == made.config(tmp_path / "in")
    modules = ["lm_head", "model.embed_tokens"]
    modules += [f"model.layers.{i}.self_attn.o_proj" for i in range(2)]
    if fmt in BLOCKS:
        scale_fmt = {"scale_fmt": "ue8m0"} if fmt == "fp8-ue8m0" else {}
        expected = {**made.FP8_CONFIG, **scale_fmt, "modules_to_not_convert": modules}
        assert quantization == expected
    else:
        assert quantization["quant_method"] == "compressed-tensors"
        assert quantization["ignore"] == modules


@pytest.mark.parametrize(
    ("fmt", "bits", "size", "scales"),
    [("mxfp8", 8, 32, "uint8"), ("mxfp4", 4, 32, "uint8"), ("nvfp4", 4, 16, "float8_e4m3fn")],
)
def test_what_compressed_tensors_is_told(fmt, bits, size, scales):
    config = CONVENTIONS[fmt].quantization_config(["lm_head"])
    (group,) = config["config_groups"].values()
    packed = "-pack" if bits == 4 else ""
    assert config["format"] == group["format"] == f"{fmt}{packed}-quantized"
    assert group["targets"] == ["Linear"] and config["ignore"] == ["lm_head"]
    weights = {
        "num_bits": bits,
        "type": "float",
        "symmetric": True,
        "group_size": size,
        "strategy": "tensor_group" if fmt == "nvfp4" else "group",
        "dynamic": False,
        "scale_dtype": f"torch.{scales}",
    }
    assert group["weights"] == weights
    activations = None if fmt == "nvfp4" else {**weights, "dynamic": True}
    assert group["input_activations"] == activations


def test_modules_that_the_source_names_are_named_again(tmp_path, out):
    said = {**made.FP8_CONFIG, "modules_to_not_convert": ["model.layers.9.mlp.gate"]}
    made.save(tmp_path / "in", made.fp8(made.llama()), said)
    quantize_checkpoint(tmp_path / "in", out, "fp8-ue8m0")
    modules = made.config(out)["quantization_config"]["modules_to_not_convert"]
    assert modules == ["lm_head", "model.embed_tokens", "model.layers.9.mlp.gate"]


# Weights that are not finite


def test_the_first_that_is_not_finite_is_named(tmp_path, out, monkeypatch):
    monkeypatch.setattr(conversion, "SLAB_VALUES", 1)
    shards = made.llama()
    shards["model-00001-of-00003.safetensors"][GATE][130, 7] = torch.inf
    shards["model-00001-of-00003.safetensors"][GATE][300, 2] = torch.nan
    made.save(tmp_path / "in", shards)
    for fmt in ("fp8", "nvfp4"):
        with pytest.raises(ValueError, match=rf"Inf or NaN at \[130, 7\] of {GATE} in model-00001"):
            quantize_checkpoint(tmp_path / "in", tmp_path / fmt, fmt)
    quantize_checkpoint(tmp_path / "in", out, allow_non_finite=True)
    y = made.load(out)[GATE].float()
    assert y[128:256, :128].isnan().all() and not y[:128].isnan().any()


def test_what_is_not_finite_in_an_expert(tmp_path, out):
    shards = made.experts(stacked=True)
    name = "model.layers.0.mlp.experts.down_proj"
    shards["model.safetensors"][name][2, 130, 5] = torch.nan
    made.save(tmp_path / "in", shards)
    with pytest.raises(ValueError, match=rf"\[2, 130, 5\] of {name}"):
        quantize_checkpoint(tmp_path / "in", out)


@pytest.mark.parametrize("what", ["nan", "scale", "overflow"])
def test_fp8_that_is_not_finite(tmp_path, out, what):
    shards = made.fp8(made.experts(stacked=False))
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    tensors = shards["model.safetensors"]
    if what == "nan":
        tensors[name].view(torch.uint8)[130, 3] = 0xFF
        at = r"\[130, 3\]"
    elif what == "scale":
        tensors[f"{name}_scale_inv"][1, 1] = torch.nan
        at = r"\[128, 128\]"
    else:
        tensors[name] = torch.ones(192, made.HIDDEN).to(torch.float8_e4m3fn)
        tensors[name][131, 129] = 448.0
        tensors[f"{name}_scale_inv"][1, 1] = 2.0**126
        at = r"\[131, 129\]"
    made.save(tmp_path / "in", shards, made.FP8_CONFIG)
    with pytest.raises(ValueError, match=rf"Inf or NaN at {at} of {name}"):
        quantize_checkpoint(tmp_path / "in", out, "fp8-ue8m0")


def test_large_scales_of_finite_products(tmp_path, out):
    shards = made.fp8(made.experts(stacked=False))
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    shards["model.safetensors"][name] = torch.ones(192, made.HIDDEN).to(torch.float8_e4m3fn)
    shards["model.safetensors"][f"{name}_scale_inv"].fill_(2.0**126)
    made.save(tmp_path / "in", shards, made.FP8_CONFIG)
    quantize_checkpoint(tmp_path / "in", out, "fp8-ue8m0")
    assert made.load(out)[f"{name}_scale_inv"][0, 0] == 2.0**118
