"""``cute-quant checkpoint``: what it prints, its exit codes, and errors of one line."""

import json
import sys
from pathlib import Path

import pytest

from cute_quant.checkpoint import CONVENTIONS, conversion, output_directory, quantize_checkpoint
from cute_quant.cli import main
from tests.checkpoint import made


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return made.save(tmp_path / "in", made.experts(stacked=False))


def run(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    status = main.main(["checkpoint", *map(str, arguments)])
    return status, *capsys.readouterr()


def test_a_checkpoint(capsys, tmp_path, directory):
    status, out, err = run(capsys, directory, "-o", tmp_path / "out", "--device", "cpu")
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        f"9 tensors quantized, 1 kept, 0.8 MiB to 0.4 MiB, in {tmp_path / 'out'}",
        "not copied: pytorch_model.bin",
    ]
    quantize_checkpoint(directory, tmp_path / "same", device="cpu")
    assert made.contents(tmp_path / "out") == made.contents(tmp_path / "same")


def test_options(capsys, tmp_path, directory):
    options = ["--format", "nvfp4", "--keep", "experts.*", "--json", "--device", "cpu"]
    made.save(tmp_path / "both", {"model.safetensors": {**made.layer(0), **experts()}})
    status, out, _ = run(capsys, tmp_path / "both", "-o", tmp_path / "out", *options)
    assert status == 0
    report = json.loads(out)
    assert (report["quantized"], report["kept"]) == (7, 13)
    assert report["output"] == str(tmp_path / "out")
    assert made.config(tmp_path / "out")["quantization_config"]["format"] == "nvfp4-pack-quantized"


def experts() -> made.Tensors:
    return made.experts(stacked=False)["model.safetensors"]


def test_a_list(capsys, tmp_path, directory):
    before = made.contents(tmp_path)
    status, out, _ = run(capsys, directory, "--list")
    lines = out.splitlines()
    assert status == 0 and len(lines) == 10
    assert "keep     model.layers.0.mlp.gate.weight BF16 [3, 256]" in lines
    assert "quantize model.layers.0.mlp.experts.0.down_proj.weight BF16 [256, 192]" in lines
    _, out, _ = run(capsys, directory, "--list", "--json")
    names = json.loads(out)
    assert names["kept"] == ["model.layers.0.mlp.gate.weight"] and len(names["quantized"]) == 9
    assert made.contents(tmp_path) == before


def test_a_run_that_goes_on_says_so(capsys, tmp_path):
    made.save(tmp_path / "in", made.llama())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion._Converter, "other_files", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quantize_checkpoint(tmp_path / "in", tmp_path / "out")
    _, out, _ = run(capsys, tmp_path / "in", "-o", tmp_path / "out")
    assert "3 shards are of an earlier run" in out.splitlines()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none", "-o", "out"], "source: expected a directory, got 'none', where there is none"),
        (["in"], "expected -o DIR, the directory to make"),
        (["in", "-o", "in"], "output: expected a directory outside of the source, got 'in'"),
        (
            ["in", "-o", "out", "--keep", "x"],
            "keep: expected a pattern of names of modules, got 'x'",
        ),
        (["in", "-o", "out", "--device", "tpu"], "device: expected cpu or cuda, got 'tpu'"),
    ],
)
def test_wrong_usage(capsys, tmp_path, directory, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith(f"cute-quant checkpoint: {message}")
    assert not (tmp_path / "out").exists()


def test_another_run(capsys, tmp_path, directory, monkeypatch):
    def held(*_):
        raise BlockingIOError

    monkeypatch.setattr(output_directory.fcntl, "flock", held)
    status, _, err = run(capsys, directory, "-o", tmp_path / "out")
    assert status == 1 and "another run writes to" in err and len(err.splitlines()) == 1


def test_without_safetensors(capsys, tmp_path, directory, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    status, _, err = run(capsys, directory, "-o", tmp_path / "out")
    assert status == 1 and "pip install 'cute_quant[checkpoint]'" in err
    assert not (tmp_path / "out").exists()


def test_help_names_every_format(capsys):
    with pytest.raises(SystemExit):
        main.main(["checkpoint", "--help"])
    text = capsys.readouterr().out
    for name, convention in CONVENTIONS.items():
        assert f"  {name:10} {convention.what} ({convention.quant_method})" in text
    assert max(map(len, text.splitlines())) <= 100
