"""The command line: what it prints, its exit codes, and errors of one line."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cute_quant
from cute_quant import cli, compile, presets
from cute_quant.cache import Cache
from cute_quant.commands import check
from cute_quant.specs import DequantizeSpec, QuantizeSpec
from tests.helpers import UE8M0

COMMANDS = [name for name in cli.COMMANDS if name != "layout"]
SPEC = QuantizeSpec(torch.bfloat16, UE8M0)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """A cache with two entries, one of them corrupt."""
    directory = tmp_path / "cache"
    directory.mkdir(mode=0o700)
    monkeypatch.setenv("CUTE_QUANT_CACHE_DIR", str(directory))
    monkeypatch.delenv("CUTE_QUANT_CACHE", raising=False)
    store = Cache(directory, True)
    store.store("a", b"content", {"name": "some-kernel", "arch": "sm_90a"})
    store.store("b", b"content", {}).write_bytes(b"")
    return store


def fails(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """The one line that a failing command prints."""
    assert cli.main(list(arguments)) == 1
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert not out and line.startswith(f"cute-quant {arguments[0]}: ")
    return line


def test_module_runs():
    done = subprocess.run(
        [sys.executable, "-m", "cute_quant", "--version"], capture_output=True, text=True
    )
    assert done.stdout == f"cute_quant {cute_quant.__version__}\n" and done.returncode == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples(name, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([name, "--help"])
    out = capsys.readouterr().out
    assert exit.value.code == 0
    assert f"usage: cute-quant {name}" in out and f"\n  cute-quant {name}" in out


def test_overview_names_every_command(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["--help"])
    out = capsys.readouterr().out
    assert exit.value.code == 0 and "exit codes" in out
    for name, (_, text) in cli.COMMANDS.items():
        assert f"{name:8} {text}" in out


@pytest.mark.parametrize(
    "arguments",
    [[], ["wash"], ["cache"], ["cache", "wash"], ["info", "--wash"], ["build", "--arch", "sm_80"]],
)
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_command_that_is_not_installed(monkeypatch, capsys):
    monkeypatch.setitem(cli.COMMANDS, "layout", ("cute_quant.missing", ""))
    assert "not part of this installation" in fails(capsys, "layout")


def test_commands_need_no_cute_dsl():
    modules = [module for name, (module, _) in cli.COMMANDS.items() if name in COMMANDS]
    code = f"import sys, {', '.join(modules)}; assert 'cutlass' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# info


def test_info(store, capsys):
    assert cli.main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["torch"] == torch.__version__
    assert report["disk cache"] == f"{store.directory}, 2 kernels"
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"{'torch:':20} {torch.__version__}" in lines
    assert all(line.startswith(tuple(f"{name}:" for name in report)) for line in lines)


def test_info_says_why_the_cache_is_not_used(store, capsys):
    store.directory.chmod(0o777)
    assert cli.main(["info"]) == 0
    expected = f"not used: {store.directory} has mode 0777: chmod 700 it"
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((9, 0), "cuda:0 H, 9.0: supported, sm_90a"),
        (
            (12, 0),
            "cuda:0 H, 12.0: not supported, kernels exist for compute capability 9.0, 10.0, 10.3",
        ),
    ],
)
def test_info_says_what_a_gpu_is_good_for(capability, expected, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H")
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["GPUs"] == [expected]


# cache


def test_cache_list(store, capsys):
    assert cli.main(["cache", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert any(line.endswith("sm_90a   some-kernel") for line in lines)
    assert any(line.endswith("corrupt") for line in lines)
    assert cli.main(["cache", "list", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert {Path(entry["file"]).name for entry in entries} == {"a.so", "b.so"}


def test_cache_size(store, capsys):
    assert cli.main(["cache", "size", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kernels"] == 2 and report["bytes"] == store.path("a").stat().st_size
    assert cli.main(["cache", "size"]) == 0
    assert f"2 kernels, 0.0 MiB of at most 256 MiB, in {store.directory}" in capsys.readouterr().out


def test_cache_clear(store, capsys):
    assert cli.main(["cache", "clear"]) == 0
    assert capsys.readouterr().out == f"removed 2 kernels from {store.directory}\n"
    assert not list(store.directory.iterdir())
    assert cli.main(["cache", "list"]) == 0
    assert capsys.readouterr().out == "no kernels\n"


def test_cache_clear_of_what_is_readonly(store, monkeypatch, capsys):
    monkeypatch.setenv("CUTE_QUANT_CACHE", "readonly")
    assert "is not writable" in fails(capsys, "cache", "clear")
    assert len(store.entries()) == 2


def test_cache_that_is_off(store, monkeypatch, capsys):
    monkeypatch.setenv("CUTE_QUANT_CACHE", "off")
    assert "CUTE_QUANT_CACHE is off" in fails(capsys, "cache", "list")


def test_cache_that_may_not_be_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUTE_QUANT_CACHE", "readonly")
    monkeypatch.setenv("CUTE_QUANT_CACHE_DIR", str(tmp_path / "none"))
    expected = f"{tmp_path / 'none'} does not exist, and may not be made"
    assert expected in fails(capsys, "cache", "list")
    assert cli.main(["info"]) == 0
    assert f"none: {expected}" in capsys.readouterr().out


def test_cache_that_is_refused(store, capsys):
    store.directory.chmod(0o755)
    assert "has mode 0755: chmod 700 it" in fails(capsys, "cache", "size")


# build


def test_build_list(capsys):
    assert cli.main(["build", "--preset", "deepgemm", "--list"]) == 0
    names = capsys.readouterr().out.splitlines()
    assert len(names) == len(presets.deepgemm())
    assert "quantize-bfloat16-128-ue8m0-float8_e4m3fn" in names
    assert cli.main(["build", "--kernel", "dequantize-128-ue8m0-*", "--list", "--json"]) == 0
    names = json.loads(capsys.readouterr().out)
    assert names and all(name.startswith("dequantize-128-ue8m0-") for name in names)


def test_build_of_an_unknown_kernel(capsys, tmp_path):
    line = fails(capsys, "build", "--kernel", "wash-*", "-o", str(tmp_path))
    assert "--kernel: expected a name or a pattern" in line and "got 'wash-*'" in line


def test_build_needs_a_directory(capsys):
    assert "expected -o DIR" in fails(capsys, "build", "--preset", "moe")


def test_build_into_a_directory_of_other_things(capsys, tmp_path):
    (tmp_path / "thesis.pdf").write_bytes(b"")
    assert "got ['thesis.pdf']" in fails(capsys, "build", "-o", str(tmp_path))


def test_build_without_cute_dsl(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("cute_quant.toolchain.installed_dsl", lambda: None)
    assert "pip install nvidia-cutlass-dsl" in fails(capsys, "build", "-o", str(tmp_path))


def test_build_without_a_linker(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    assert "install binutils" in fails(capsys, "build", "-o", str(tmp_path))


# check


def test_check_compiles_for_each_architecture(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(presets, "of_each_kind", lambda: [SPEC])
    assert cli.main(["check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        *(
            f"ok     compiled {arch:8} quantize-bfloat16-128-ue8m0-float8_e4m3fn"
            for arch in compile.ARCHITECTURES.values()
        ),
        "3 of 3 are right",
    ]


def test_check_names_what_fails(monkeypatch, capsys):
    def build(kernel, arch):
        if arch == "sm_100a":
            raise ValueError("broken\nin two lines")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(presets, "of_each_kind", lambda: [SPEC])
    monkeypatch.setattr(compile, "build", build)
    assert cli.main(["check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("FAILED compiled sm_100a ")
    assert lines[1].endswith(": ValueError: broken in two lines")
    assert lines[-1] == "2 of 3 are right"
    assert cli.main(["check", "--json"]) == 1
    errors = [outcome["error"] for outcome in json.loads(capsys.readouterr().out)]
    assert errors == [None, "ValueError: broken in two lines", None]


RUNNABLE = [s for s in presets.of_each_kind() if isinstance(s, (QuantizeSpec, DequantizeSpec))]


@pytest.mark.parametrize("spec", RUNNABLE[:: len(RUNNABLE) // 6])
def test_check_sees_a_wrong_byte(spec, monkeypatch):
    results = check._results

    def planted(spec, device):
        parts = results(spec, "cpu")
        if device == "cuda":
            parts[-1].flatten()[7] ^= 1
        return parts

    class Properties:
        multi_processor_count = 1

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(check, "_results", lambda spec, device: results(spec, "cpu"))
    assert check._difference(spec) is None
    monkeypatch.setattr(check, "_results", planted)
    assert check._difference(spec).startswith("1 of ")


@pytest.mark.gpu
def test_check_on_the_gpu(capsys):
    assert cli.main(["check", "--preset", "deepgemm"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(presets.deepgemm()) + 1
    assert all(line.startswith("ok     ran ") for line in lines[:-1])


# bench


def test_bench_gets_its_options(monkeypatch):
    calls = []
    monkeypatch.setattr("subprocess.call", lambda command: calls.append(command) or 3)
    assert cli.main(["bench", "--quick", "--rows", "1,2"]) == 3
    assert calls == [[sys.executable, "-m", "bench", "--quick", "--rows", "1,2"]]


def test_bench_outside_of_the_repository(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "bench" else find(name)
    )
    assert "run this in a checkout" in fails(capsys, "bench")
