"""``cute-quant diff``: what it counts, the reasons that it finds, and what it says of bad input."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import cute_quant as cq
from cute_quant.cli import differences, main
from cute_quant.cli.differences import (
    CODE_REASONS,
    HALF_UP,
    MULTIPLIER,
    OTHER_SCALE,
    QUOTIENT,
    SCALE_REASONS,
    SMALLEST,
    UNDERFLOW,
    ZERO_SIGN,
)
from tests.peers.groups import groups

ACTIVATIONS = Path(__file__).parents[2] / "bench" / "data" / "activations.safetensors"
NVFP4 = cq.NVFP4.replace(scale_layout="row_major")
MXFP4 = cq.MXFP4.replace(scale_layout="row_major")


def of_numerics(fmt: cq.Format, *names: str) -> list[cq.Format]:
    return [fmt.replace(numerics=name) for name in names]


def compare(x: torch.Tensor, fmt: cq.Format, a: str, b: str, amax: float | None = None):
    given = None if amax is None else torch.tensor(amax)
    return differences.compare(x, *of_numerics(fmt, a, b), given)


def group(*values: float, size: int = 16, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor([[*values, *[0.0] * (size - len(values))]], dtype=dtype)


# Counts and reasons


def test_quotient():
    x = torch.from_numpy(groups(16, "boundaries"))
    found = compare(x, NVFP4, "vllm", "te", 3.1e-3)
    assert set(found.scale_reasons) == {QUOTIENT} and found.scale_reasons[QUOTIENT] > 20
    places = [place for place in found.places if place.reason == QUOTIENT]
    assert len(places) == differences.PLACES
    for place in places:
        _, exponent = np.frexp(max(place.scales))
        assert abs(place.scales[0] - place.scales[1]) == 2.0 ** max(exponent - 4, -9)


def test_quotient_beside_the_smallest_scale():
    """About half of the smallest e4m3 scale is rounded to 0, or up; neither is a bound."""
    x = group(float.fromhex("0x1.b6db6ep-15"))
    found = compare(x, NVFP4, "vllm", "te", 24.0)
    assert found.scale_reasons == {QUOTIENT: 1} and found.places[0].scales == (0.0, 2.0**-9)


def test_smallest_scale():
    found = compare(group(5e-4), NVFP4, "te", "torchao", 24.0)
    assert found.scale_reasons == {SMALLEST: 1}
    assert set(found.code_reasons) <= {OTHER_SCALE}
    (place,) = found.places
    assert place.scales[1] == 2.0**-6 > place.scales[0]
    assert place.column == 0 and place.x == pytest.approx(5e-4)


def test_places_of_a_later_group():
    found = compare(torch.cat([group(24.0), group(0.0, 5e-4)], 1), NVFP4, "te", "torchao", 24.0)
    (place,) = found.places
    assert (place.group, place.column) == (1, 17) and place.x == pytest.approx(5e-4)


def test_smallest_power_of_two():
    found = compare(group(1e-6, size=32), MXFP4, "ieee", "deepgemm")
    assert found.scale_reasons == {SMALLEST: 1}


def test_rounding_half_up():
    found = compare(group(1.7, 0.4, size=32), MXFP4, "ieee", "vllm")
    assert found.scale_reasons == {HALF_UP: 1}
    assert found.code_reasons == {OTHER_SCALE: 2}
    assert found.largest_difference == 0.125


def test_sign_of_zero():
    found = compare(group(6.0, -0.01, -0.0), NVFP4, "vllm", "deepgemm", 6.0)
    assert not found.scale_reasons and found.code_reasons == {ZERO_SIGN: 2}
    assert [(p.column, p.codes) for p in found.places] == [(1, (8, 0)), (2, (8, 0))]
    assert found.largest_difference == 0


def test_scale_of_zero():
    found = compare(group(1e-5, -1e-5), NVFP4, "vllm", "te", 2688.0)
    assert not found.scale_reasons and found.code_reasons == {UNDERFLOW: 2}
    assert [p.codes for p in found.places] == [(0, 7), (8, 15)]


def test_flushed_values():
    fmt = cq.MXFP8.replace(scale_layout="row_major")
    found = compare(torch.full((1, 32), 2.0**-128), fmt, "te", "torchao")
    assert not found.scale_reasons and found.code_reasons == {UNDERFLOW: 32}


@pytest.mark.parametrize(("a", "b"), [("te", "torchao"), ("torchao", "vllm")])
def test_multiplier(a, b):
    x = load_file(ACTIVATIONS)["intermediate"]
    found = compare(x, NVFP4, a, b, x.abs().max().item())
    assert not found.scale_reasons and set(found.code_reasons) == {MULTIPLIER}


def test_approximate_multiplier():
    """The multiplier 2/3 is one unit above, and one below: products lie beside middles of codes."""
    found = compare(group(9.0, 1.125, 2.625, 5.25), NVFP4, "ieee", "vllm", 9.0)
    assert not found.scale_reasons and found.code_reasons == {MULTIPLIER: 3}
    assert [p.codes for p in found.places] == [(2, 1), (4, 3), (6, 5)]
    assert not compare(group(9.0, 1.125), NVFP4, "vllm", "flashinfer", 9.0).code_reasons


def test_scale_of_each_row():
    x = torch.tensor([[1.0], [1e-3]]) * torch.linspace(-1, 1, 64)
    found = compare(x.bfloat16(), NVFP4.replace(row_scale=True), "vllm", "te")
    assert found.groups == 8


@pytest.mark.parametrize("name", ["GROUPWISE_FP8", "ROWWISE_FP8"])
def test_float32_scales(name):
    x = torch.randn(64, 384, generator=torch.Generator().manual_seed(0))
    found = compare(x, cq.NAMED_FORMATS[name], "ieee", "deepgemm")
    assert set(found.scale_reasons) == {QUOTIENT} and found.groups in (64, 192)


@pytest.mark.parametrize("numerics", [("vllm", "te"), ("torchao", "deepgemm")])
def test_counts_are_those_of_the_results(numerics):
    x = torch.randn(64, 192, generator=torch.Generator().manual_seed(0))
    x *= 2.0 ** torch.arange(-16, 16).repeat_interleave(2).unsqueeze(1)
    amax = x.abs().max()
    found = compare(x, NVFP4, *numerics, amax.item())
    (q, sf), (other_q, other_sf) = (
        [t.view(torch.uint8) for t in cq.quantize(x, fmt, amax=amax)]
        for fmt in of_numerics(NVFP4, *numerics)
    )
    differing = sum(int((q & mask != other_q & mask).sum()) for mask in (0xF, 0xF0))
    assert found.code_reasons.total() == differing > 0
    assert found.scale_reasons.total() == (sf != other_sf).sum()
    assert (found.groups, found.elements) == (64 * 12, 64 * 192)
    counts = found.scale_reasons + found.code_reasons
    for reason in counts.keys() - {OTHER_SCALE}:
        shown = [place for place in found.places if place.reason == reason]
        assert len(shown) == min(counts[reason], differences.PLACES)


def test_blocks_of_rows(monkeypatch):
    x = torch.randn(3, 20, 96, generator=torch.Generator().manual_seed(0))
    x[0, :9] = 4.0
    whole = compare(x, NVFP4, "deepgemm", "vllm", 4.0)
    monkeypatch.setattr(differences, "BLOCK_ELEMENTS", 7 * 96)
    assert compare(x, NVFP4, "deepgemm", "vllm", 4.0) == whole
    assert whole.elements == x.numel() and whole.code_reasons[ZERO_SIGN]
    assert all(place.row >= 9 for place in whole.places)


# The command


def run(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    assert main.main(["diff", *map(str, arguments)]) == 0
    out, err = capsys.readouterr()
    assert not err
    return out


def fails(capsys: pytest.CaptureFixture, *arguments: object, status: int = 2) -> str:
    assert main.main(["diff", *map(str, arguments)]) == status
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert not out and line.startswith("cute-quant diff: ")
    return line


def test_text_and_json_say_the_same(capsys):
    text = run(capsys, ACTIVATIONS, "--a", "te", "--b", "torchao", "--tensor", "intermediate")
    data = json.loads(
        run(
            capsys, ACTIVATIONS, "--a", "te", "--b", "torchao", "--tensor", "intermediate", "--json"
        )
    )
    assert data["format"] == str(NVFP4) and (data["a"], data["b"]) == ("te", "torchao")
    (tensor,) = data["tensors"]
    assert tensor["name"] == "intermediate" and tensor["shape"] == [250, 1536]
    assert tensor["code_reasons"] == {MULTIPLIER: tensor["codes_differ"]} and tensor["codes_differ"]
    assert f"codes          {tensor['codes_differ']} of {tensor['codes']} differ" in text
    assert f"{CODE_REASONS[MULTIPLIER]}\n" in text
    assert text.count("  last bit of the multiplier\n") == len(tensor["places"])
    place = tensor["places"][0]
    assert f"{place['row']:6} {place['group']:6} {place['column']:6}" in text


def test_amax(capsys):
    arguments = (ACTIVATIONS, "--a", "te", "--b", "torchao", "--amax", 1e4)
    text = run(capsys, *arguments)
    assert "encode scale 0.2688" in text and SCALE_REASONS[SMALLEST] in text


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", "one.pt", ".npy"])
def test_files(suffix, tmp_path, capsys):
    path = tmp_path / f"x{suffix}"
    x = torch.randn(4, 64)
    match suffix:
        case ".safetensors":
            save_file({"x": x}, path)
        case ".pt":
            torch.save({"x": x.requires_grad_(), "step": 3}, path)
        case "one.pt":
            torch.save(x, path)
        case ".npy":
            np.save(path, x.numpy())
    assert f"{path.stem}: float32 (4, 64), vllm and te\n" in run(
        capsys, path, "--a", "vllm", "--b", "te"
    )


def test_tensors_that_do_not_fit_are_skipped(tmp_path, capsys):
    tensors = {
        "odd": torch.ones(2, 15),
        "vector": torch.ones(32),
        "whole": torch.ones(2, 16, dtype=torch.int64),
        "infinite": torch.full((2, 16), torch.inf),
        "fits": torch.ones(2, 16),
    }
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    out = run(capsys, path, "--a", "vllm", "--b", "te")
    assert "fits: float32" in out and out.count("skipped ") == 4
    for text in ("odd: k = 15 is odd", "vector: shape (32,)", "whole: int64", "infinite: its amax"):
        assert f"skipped {text}" in out
    assert "infinite: float32" in run(capsys, path, "--a", "vllm", "--b", "te", "--amax", 1)
    for name in ("odd", "vector", "whole", "infinite"):
        line = fails(capsys, path, "--a", "vllm", "--b", "te", "--tensor", name)
        assert f"got {name}: " in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--a", "te", "--b", "te"), "a, b: expected two numerics, got 'te' twice"),
        (("--a", "te", "--b", "cutlass"), "a, b: numerics: expected one of ('ieee', 'vllm'"),
        (("--a", "ieee", "--b", "te", "--format", "MXFP4"), "a, b: numerics: expected one of"),
        (("--a", "ieee", "--b", "te", "--format", "FP3"), "fmt: expected one of DEEP_GEMM"),
        (("--a", "ieee", "--b", "te", "--tensor", "w"), "tensor: expected one of intermediate"),
        (("--a", "ieee", "--b", "te", "--amax", "-1"), "amax: expected a finite number from 0"),
        (("--a", "ieee", "--b", "te", "--amax", "nan"), "amax: expected a finite number from 0"),
        (
            ("--a", "ieee", "--b", "vllm", "--format", "MXFP4", "--amax", "1"),
            "amax: expected none",
        ),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    assert f"cute-quant diff: {message}" in fails(capsys, ACTIVATIONS, *arguments)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".npy"])
def test_malformed_files(suffix, tmp_path, capsys):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(b"no tensors")
    line = fails(capsys, path, "--a", "vllm", "--b", "te")
    assert f"file: expected a {suffix[1:]} file of tensors, got '{path}'" in line


def test_files_that_cannot_be_read(tmp_path, capsys):
    names = ("missing.pt", "x.gguf")
    messages = ("expected a file, got", "expected a name that ends in .safetensors, .pt")
    for name, message in zip(names, messages, strict=True):
        assert message in fails(capsys, tmp_path / name, "--a", "vllm", "--b", "te")
    torch.save([1, 2], tmp_path / "list.pt")
    line = fails(capsys, tmp_path / "list.pt", "--a", "vllm", "--b", "te")
    assert "neither a tensor nor a dict of tensors but a list" in line
    torch.save({}, tmp_path / "empty.pt")
    line = fails(capsys, tmp_path / "empty.pt", "--a", "vllm", "--b", "te")
    assert "file: expected a matrix of bfloat16 or float16 or float32" in line


def test_without_safetensors(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    line = fails(capsys, ACTIVATIONS, "--a", "vllm", "--b", "te", status=1)
    assert "file: expected the package safetensors" in line and "pip install safetensors" in line


def test_objects_in_a_file_are_not_loaded(tmp_path, capsys):
    torch.save({"x": Path("x")}, tmp_path / "x.pt")
    line = fails(capsys, tmp_path / "x.pt", "--a", "vllm", "--b", "te")
    assert "file: expected a pt file of tensors" in line
