"""The command line: what it prints, its exit codes, and errors of one line."""

import json
import os
import re
import subprocess
import sys
import unittest.mock
from pathlib import Path

import pytest
import torch

import cute_quant
from cute_quant import kernels
from cute_quant.cli import check, kernel_results, main, selection
from cute_quant.cli.kernel_comparison import WrongResult, compare, compare_columns
from cute_quant.cli.kernel_results import results_of_columns
from cute_quant.contract.calls import Call
from cute_quant.contract.formats import DEEP_GEMM, MXFP4, ROWWISE_FP8
from cute_quant.contract.tensors import storage_bytes
from cute_quant.dispatch import launch, plan, presets, reachable
from cute_quant.dispatch.call_range import QUANTIZE, SILU_MUL, CallRange
from cute_quant.dispatch.plan import Gpu
from cute_quant.jit import disk_cache, keys, lookup, progress, toolchain, workers
from cute_quant.jit.disk_cache import Cache
from cute_quant.kernels.config import (
    DEFAULT_TILE,
    ColumnsSpec,
    Domain,
    QuantizerSpec,
    QuantizeSpec,
    RequantizeSpec,
    RmsNormSpec,
    SiluMulSpec,
    Spec,
    Tile,
    launched_on,
)
from tests.helpers import UE8M0

WITH_EXAMPLES = [name for name in main.COMMANDS if name != "layout"]
SPEC = QuantizeSpec(torch.bfloat16, UE8M0)
NAME = "quantize-bfloat16-e4m3_128_e8m0_mn_major_packed"


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


def fails(capsys: pytest.CaptureFixture, *arguments: str, status: int = 1) -> str:
    """The one line that a failing command prints."""
    assert main.main(list(arguments)) == status
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert not out and line.startswith(f"cute-quant {arguments[0]}: ")
    return line


def test_module_runs():
    done = subprocess.run(
        [sys.executable, "-m", "cute_quant", "--version"], capture_output=True, text=True
    )
    assert done.stdout == f"cute_quant {cute_quant.__version__}\n" and done.returncode == 0


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_overview_imports_neither_torch_nor_the_package(option):
    directory = Path(cute_quant.__file__).parent / "cli" / "entry"
    code = (
        f"import sys; sys.path.insert(0, {str(directory)!r}); import cute_quant_command\n"
        "try: cute_quant_command.main()\n"
        "finally: assert not {'torch', 'cute_quant'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, option], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    assert cute_quant.__version__ in done.stdout or "exit codes" in done.stdout


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_help_has_examples(name, capsys):
    with pytest.raises(SystemExit) as exit:
        main.main([name, "--help"])
    out = capsys.readouterr().out
    assert exit.value.code == 0
    assert f"usage: cute-quant {name}" in out and f"\n  cute-quant {name}" in out


def test_overview_names_every_command(capsys):
    with pytest.raises(SystemExit) as exit:
        main.main(["--help"])
    out = capsys.readouterr().out
    assert exit.value.code == 0 and "exit codes" in out
    for name, (_, text) in main.COMMANDS.items():
        assert re.search(rf"{name} +{re.escape(text)}\n", out)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["wash"],
        ["bench"],
        ["cache"],
        ["cache", "wash"],
        ["info", "--wash"],
        ["build", "--arch", "sm_80"],
    ],
)
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main.main(arguments)
    assert exit.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_command_that_is_not_installed(monkeypatch, capsys):
    monkeypatch.setitem(main.COMMANDS, "layout", ("cute_quant.missing", ""))
    assert "not part of this installation" in fails(capsys, "layout")


def test_commands_need_no_cute_dsl():
    modules = [module for module, _ in main.COMMANDS.values()]
    code = f"import sys, {', '.join(modules)}; assert 'cutlass' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_imports_need_no_cute_dsl():
    modules = ["cute_quant", "cute_quant.kernels", "cute_quant.kernels.config"]
    modules += ["cute_quant.integrations.deep_gemm", "cute_quant.integrations.vllm"]
    code = (
        f"import sys, {', '.join(modules)}; assert not {{'cutlass', 'tvm_ffi'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_of_kernels_load_when_they_are_used():
    assert set(kernels.__all__) <= set(dir(kernels))
    for name in kernels.__all__:
        assert getattr(kernels, name) is not None
    with pytest.raises(AttributeError, match=r"'cute_quant\.kernels' has no attribute 'missing'"):
        _ = kernels.missing


# info


def test_info(store, capsys):
    assert main.main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["torch"] == torch.__version__
    found = f"{store.directory}, 2 kernels; an entry was written and read"
    assert report["disk cache"] == found
    assert len(list(store.directory.iterdir())) == 2
    assert main.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"{'torch:':20} {torch.__version__}" in lines
    assert all(line.startswith(tuple(f"{name}:" for name in report)) for line in lines)


def test_info_says_why_the_cache_is_not_used(store, capsys):
    store.directory.chmod(0o777)
    assert main.main(["info"]) == 0
    expected = f"not used: {store.directory} has mode 0777: chmod 700 it"
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((9, 0), "cuda:0, H, of 9.0: path: kernels, sm_90a"),
        (
            (8, 0),
            "cuda:0, H, of 8.0: path: reference on the GPU, slowly: kernels are built for compute "
            "capability 8.9, 9.0, 10.0, 10.3, 10.7, 11.0, 12.0 or 12.1",
        ),
    ],
)
def test_info_says_what_a_gpu_is_good_for(capability, expected, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H")
    lookup.find_architecture.cache_clear()
    assert main.main(["info", "--json"]) == 0
    lookup.find_architecture.cache_clear()
    assert json.loads(capsys.readouterr().out)["GPUs"] == [expected]


@pytest.mark.parametrize("fault", ["store", "find"])
def test_info_tries_the_cache(store, fault, monkeypatch, capsys):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Cache, fault, full if fault == "store" else lambda *_: None)
    assert main.main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    reason = "No space left" if fault == "store" else "was written and is not found"
    assert report["disk cache"].startswith("not used: ") and reason in report["disk cache"]


def test_info_says_which_presets_are_complete(store, monkeypatch, capsys):
    specs = list(presets.deepgemm("sm_90a"))
    options = lookup.compile_options("sm_90a")
    for spec in specs[1:]:
        key = disk_cache.key(spec, "sm_90a", options)
        store.store(key, b"", {"name": "a", "arch": "sm_90a"})
    monkeypatch.setattr(presets, "PRESETS", {"deepgemm": presets.deepgemm})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main.main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["presets"] == [f"deepgemm for sm_90a: {len(specs) - 1} of {len(specs)} kernels"]
    key = disk_cache.key(specs[0], "sm_90a", options)
    store.store(key, b"", {"name": "a", "arch": "sm_90a"})
    assert main.main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["presets"] == ["deepgemm for sm_90a: complete"]


def test_info_says_what_does_not_fit_together(store, monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    dsl = toolchain.installed_dsl()._replace(flavour="cu12", version="5.1.0.dev1")
    monkeypatch.setattr(toolchain, "installed_dsl", lambda: dsl)
    monkeypatch.setattr(toolchain, "tvm_ffi_version", lambda: "0.1.9.post1")
    assert main.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["conflicts"] == [
        "nvidia-cutlass-dsl: expected at least 4.8 and below 5, got 5.1.0.dev1",
        "apache-tvm-ffi: expected at least 0.1.10 and below 0.2, got 0.1.9.post1",
        "torch is built for CUDA 13.0, and CuTe DSL runs in its flavour cu12: "
        "pip install 'nvidia-cutlass-dsl[cu13]'",
    ]


def test_bounds_are_those_of_the_dependencies():
    text = (Path(cute_quant.__file__).parents[1] / "pyproject.toml").read_text()
    for name, (low, high) in toolchain.BOUNDS.items():
        low_text, high_text = (".".join(map(str, bound)) for bound in (low, high))
        assert f'"{name}>={low_text},<{high_text}"' in text


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "are compiled in the call"),
        ({"CUTE_QUANT_JIT": "off"}, "calls raise: CUTE_QUANT_JIT=off forbids compiling"),
        ({"CUTE_QUANT_JIT": "no"}, "calls raise: CUTE_QUANT_JIT: expected one of"),
        ({"CUTE_DSL_DRYRUN": "1"}, "calls raise: CUTE_DSL_DRYRUN"),
    ],
)
def test_info_says_what_a_missing_kernel_means(variables, expected, store, monkeypatch, capsys):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["missing kernels"].startswith(expected)


# warm-up


def test_warm_up(store, monkeypatch, capsys):
    monkeypatch.setattr(lookup, "_functions", {})
    lookup._cache.cache_clear()
    command = ["warm-up", "--k", "512", "--max-rows", "4", "--arch", "sm_90a"]
    try:
        assert main.main(command) == 0
        assert re.fullmatch(
            rf"1 kernel for sm_90a in \d+\.\d s: 1 compiled, in {store.directory}\n",
            capsys.readouterr().out,
        )
        lookup._functions.clear()
        assert main.main([*command, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["kernels"] == [{"name": NAME, "arch": "sm_90a", "source": lookup.DISK_CACHE}]
        assert main.main(["cache", "list"]) == 0
        assert f"sm_90a   {NAME}" in capsys.readouterr().out
    finally:
        lookup._cache.cache_clear()


def test_warm_up_by_several_processes(store, monkeypatch, capsys):
    monkeypatch.setattr(lookup, "_functions", {})
    monkeypatch.setattr(workers, "count_for", lambda tasks: 2)
    lookup._cache.cache_clear()
    try:
        assert main.main(["warm-up", "--k", "100", "--max-rows", "2", "--arch", "sm_90a"]) == 0
    finally:
        lookup._cache.cache_clear()
    found = re.match(
        r"(\d+) kernels for sm_90a in .* s: (\d+) compiled, in", capsys.readouterr().out
    )
    assert found and found[1] == found[2] == str(len(store.entries()) - 2)


def test_warm_up_without_a_cache(store, monkeypatch, capsys):
    monkeypatch.setenv("CUTE_QUANT_CACHE", "off")
    lookup._cache.cache_clear()
    try:
        assert "there is no disk cache to compile into" in fails(capsys, "warm-up", "--k", "512")
    finally:
        lookup._cache.cache_clear()


def test_warm_up_of_calls_that_there_are_not(capsys):
    arguments = ["--k", "512", "--operation", "dequantize", "--rows", "masked"]
    assert "expected calls that there are" in fails(capsys, "warm-up", *arguments, status=2)


# cache


def test_cache_list(store, capsys):
    assert main.main(["cache", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert any(line.endswith("sm_90a   some-kernel") for line in lines)
    assert any(line.endswith("corrupt") for line in lines)
    assert main.main(["cache", "list", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert {Path(entry["file"]).name for entry in entries} == {"a.so", "b.so"}


def test_cache_size(store, capsys):
    assert main.main(["cache", "size", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kernels"] == 2 and report["bytes"] == store.path("a").stat().st_size
    assert main.main(["cache", "size"]) == 0
    assert f"2 kernels, 0.0 MiB of at most 256 MiB, in {store.directory}" in capsys.readouterr().out


def test_cache_clear(store, capsys):
    assert main.main(["cache", "clear"]) == 0
    assert capsys.readouterr().out == f"removed 2 kernels from {store.directory}\n"
    assert not list(store.directory.iterdir())
    assert main.main(["cache", "list"]) == 0
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
    assert main.main(["info"]) == 0
    assert f"none: {expected}" in capsys.readouterr().out


def test_cache_that_is_refused(store, capsys):
    store.directory.chmod(0o755)
    assert "has mode 0755: chmod 700 it" in fails(capsys, "cache", "size")


# build


def test_build_list(capsys):
    assert main.main(["build", "--preset", "deepgemm", "--list"]) == 0
    names = capsys.readouterr().out.splitlines()
    every = {selection.name(s) for a in lookup.ARCHITECTURES.values() for s in presets.deepgemm(a)}
    assert set(names) == every and len(names) == len(every)
    assert NAME in names
    pattern = "dequantize-e4m3_128_e8m0_*"
    assert main.main(["build", "--kernel", pattern, "--list", "--json"]) == 0
    names = json.loads(capsys.readouterr().out)
    assert names and all(name.startswith(pattern.removesuffix("*")) for name in names)


def test_build_list_depends_on_the_architecture(capsys):
    tile = "values_per_thread_8"
    pattern = f"silu_mul-*-{tile}-*"
    assert main.main(["build", "--kernel", pattern, "--list"]) == 0
    names = capsys.readouterr().out.splitlines()
    assert names and all(tile in name for name in names)
    assert main.main(["build", "--kernel", pattern, "--arch", "sm_90a", "--list"]) == 0
    assert capsys.readouterr().out.splitlines() == names
    refused = ["build", "--kernel", pattern, "--arch", "sm_100a", "--list"]
    assert pattern in fails(capsys, *refused, status=2)


@pytest.mark.parametrize(
    ("arguments", "calls"),
    [
        (
            ["--operation", "silu_mul_quantize", "--k", "7168", "--max-rows", "64"],
            CallRange(SILU_MUL, DEEP_GEMM, torch.bfloat16, (7168,), 64),
        ),
        # Between 20,000 and 30,000 elements an SM, on one GPU alone.
        (
            ["--format", "MXFP4", "--k", "72000", "--max-rows", "1"],
            CallRange(QUANTIZE, MXFP4, torch.bfloat16, (72000,), 1),
        ),
    ],
    ids=["silu_mul", "fp4"],
)
def test_build_has_what_calls_take_on_any_gpu(arguments, calls, capsys):
    assert main.main(["build", "--list", "--arch", "sm_90a", *arguments]) == 0
    specs = [s for sms in range(1, 200) for s in reachable.specs(calls, Gpu("sm_90a", sms))]
    assert set(capsys.readouterr().out.split()) == {keys.spec_name(s) for s in specs}


def test_build_has_what_an_error_asks_for(capsys):
    """The command that a call's error prints builds the kernel of that call."""
    gpu, calls = Gpu("sm_90a", 132), CallRange(SILU_MUL, DEEP_GEMM, torch.bfloat16, (7168,), 64)
    asked = reachable.spec_of(next(reachable.variants(calls)), 32, gpu)
    options = re.search(r"`cute-quant warm-up (.*)`", calls.remedy(gpu.arch))
    assert options and main.main(["build", *options[1].split(), "--list"]) == 0
    assert keys.spec_name(asked) in capsys.readouterr().out.split()


def test_build_of_an_unknown_kernel(capsys, tmp_path):
    line = fails(capsys, "build", "--kernel", "wash-*", "-o", str(tmp_path), status=2)
    assert "--kernel: expected a name or a pattern" in line and "got 'wash-*'" in line


def test_build_needs_a_directory(capsys):
    assert "expected -o DIR" in fails(capsys, "build", "--preset", "moe", status=2)


def test_build_into_nothing(capsys):
    with pytest.raises(SystemExit, match="2"):
        main.main(["build", "-o", ""])
    assert "argument -o/--output: expected a path, got nothing" in capsys.readouterr().err


def test_build_into_a_directory_of_other_things(capsys, tmp_path):
    (tmp_path / "thesis.pdf").write_bytes(b"")
    assert "got ['thesis.pdf']" in fails(capsys, "build", "-o", str(tmp_path), status=2)


def test_build_without_cute_dsl(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("cute_quant.jit.toolchain.installed_dsl", lambda: None)
    assert "pip install nvidia-cutlass-dsl" in fails(capsys, "build", "-o", str(tmp_path))


def test_build_without_a_linker(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    assert "install binutils" in fails(capsys, "build", "-o", str(tmp_path))


# check


def test_check_compiles_for_each_architecture(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(presets, "of_each_kind", lambda arch: [launched_on(SPEC, arch)])
    assert main.main(["check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"8 kernels for {', '.join(lookup.ARCHITECTURES.values())}, no GPU: compiling only",
        *(
            f"ok     compiled {arch:8} {keys.spec_name(launched_on(SPEC, arch))}"
            for arch in lookup.ARCHITECTURES.values()
        ),
        "8 of 8 kernels compiled, none was run",
    ]


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_check_shows_progress_in_a_terminal(arguments, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(presets, "of_each_kind", lambda arch: [SPEC, SPEC])
    monkeypatch.setattr(lookup, "build", lambda kernel, arch: None)
    assert main.main(["check", *arguments]) == 0
    assert not capsys.readouterr().err, "no terminal"
    monkeypatch.setattr(progress, "_is_terminal", lambda: True)
    assert main.main(["check", *arguments]) == 0
    bars = re.findall(r" (\d+)/16 (sm_\w+) ", capsys.readouterr().err)
    architectures = [arch for arch in lookup.ARCHITECTURES.values() for _ in range(2)]
    assert bars == [(str(done), arch) for done, arch in enumerate(architectures)]


def test_check_names_what_fails(monkeypatch, capsys):
    def build(kernel, arch):
        if arch == "sm_100a":
            raise ValueError("broken\nin two lines")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(presets, "of_each_kind", lambda arch: [SPEC])
    monkeypatch.setattr(lookup, "build", build)
    assert main.main(["check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    (failed,) = [line for line in lines if line.startswith("FAILED")]
    assert failed.startswith("FAILED compiled sm_100a ")
    assert failed.endswith(": ValueError: broken in two lines")
    assert lines[-1] == "7 of 8 kernels compiled, none was run"
    assert main.main(["check", "--json"]) == 1
    errors = [outcome["error"] for outcome in json.loads(capsys.readouterr().out)]
    assert [e for e in errors if e] == ["ValueError: broken in two lines"] and len(errors) == 8


SPECS = [(spec, arch) for arch in ("sm_90a", "sm_100a") for spec in presets.of_each_kind(arch)]
EXACT = [s for s, _ in SPECS if not isinstance(s, (SiluMulSpec, RmsNormSpec))]
# Results of few gates are too small for a share of their values.
MANY_GATES = DEFAULT_TILE, Tile(8, 8)
COMPUTED = [
    s
    for s, _ in SPECS
    if isinstance(s, RmsNormSpec) or (isinstance(s, SiluMulSpec) and s.tile in MANY_GATES)
]
FP4_COMPUTED = [s for s in COMPUTED if s.fmt.value_type.per_byte == 2]
COMPUTED = [s for s in COMPUTED if s.fmt.value_type.per_byte == 1]
NORMS = [s for s in COMPUTED if isinstance(s, RmsNormSpec)]


@pytest.fixture
def small_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    put_small_gpu(monkeypatch)


def put_small_gpu(monkeypatch: pytest.MonkeyPatch, spec: Spec | None = None) -> None:
    """Pretend that there is a GPU that a million elements are many for, and which has a kernel."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(lookup, "multiprocessors", lambda index: 20)
    if spec is not None:
        arch = next((arch for s, arch in SPECS if s == spec), "sm_90a")
        monkeypatch.setattr(lookup, "architecture", lambda index: arch)


def results_of(spec: Spec) -> kernel_results.Results:
    """Return the reference's results of the call that takes a kernel."""
    with pytest.MonkeyPatch.context() as patch:
        put_small_gpu(patch, spec)
        return kernel_results.results_of(spec, "cpu")


def calls_of_check(
    monkeypatch: pytest.MonkeyPatch, arch: str, specs: list[Spec]
) -> list[tuple[Spec, str]]:
    """Return the kernels that a GPU takes for the calls which check some."""
    asked: list[tuple[Spec, str]] = []
    function = unittest.mock.Mock()

    def quantize_into(call: Call, q: torch.Tensor, sf: torch.Tensor, row_scales: object) -> None:
        values = plan.View(tuple(q.shape), q.stride())
        scales = plan.View(tuple(sf.shape), sf.stride())
        plan.choose_kernel(call, plan.Destination(values, q.data_ptr(), q.dtype), scales)

    monkeypatch.setattr(lookup, "architecture", lambda index: arch)
    monkeypatch.setattr(lookup, "function", lambda *of: asked.append(of) or function)
    monkeypatch.setattr(launch, "quantize_into", quantize_into)
    for spec in specs:
        kernel_results.results_of(spec, "cpu")
    return asked


def quantizers(arch: str) -> list[Spec]:
    """Return the kernels of each kind that write values and scales of rows."""
    return [
        spec
        for spec in presets.of_each_kind(arch)
        if isinstance(spec, QuantizerSpec) and not getattr(spec, "fake", False)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_check_calls_what_asks_for_each_kernel(arch, small_gpu, monkeypatch):
    specs = quantizers(arch)
    assert calls_of_check(monkeypatch, arch, specs) == [(spec, arch) for spec in specs]


@pytest.mark.parametrize("sms", [3, 8, 16, 20, 132])
@pytest.mark.parametrize("arch", ["sm_89", "sm_90a", "sm_100a"])
def test_check_has_a_size_for_each_tile_on_any_gpu(arch, sms, small_gpu, monkeypatch):
    """Gates and ups of a batch are in no preset, but in what is built for calls of one."""
    monkeypatch.setattr(lookup, "architecture", lambda index: arch)
    monkeypatch.setattr(lookup, "multiprocessors", lambda index: sms)
    specs = {
        (type(s), s.tile, s.fmt.value_type.per_byte): s
        for s in quantizers(arch)
        if not s.fmt.by_row
    }
    tiles = {s.tile for s in specs.values() if isinstance(s, SiluMulSpec)}
    assert len(tiles) == (1 if arch == "sm_100a" else 4)
    for spec in specs.values():
        kernel_results.size_for(spec)
        if isinstance(spec, SiluMulSpec) and not spec.domain.masked:
            kernel_results.size_for(spec._replace(domain=Domain(batched=True)))
    requantized = [s for s in presets.weights(arch) if isinstance(s, RequantizeSpec)]
    assert len({s.tile for s in requantized}) == 2
    for spec in requantized:
        kernel_results.size_for(spec)


@pytest.mark.parametrize("sms", [8, 16, 188])
def test_check_calls_what_asks_for_kernels_of_few_sms(sms, small_gpu, monkeypatch):
    """Those of fewest values, and those of whole rows, of which few have an SM each."""
    columns = (*presets.COLUMNS, presets.LONG_COLUMNS)
    calls = CallRange(QUANTIZE, ROWWISE_FP8, torch.bfloat16, columns, presets.MAX_ROWS)
    specs = list(reachable.specs(calls, Gpu("sm_90a", presets.SMS)))
    assert {spec.max_warps for spec in specs} == {1, 8, 16}
    few = [
        s
        for s in quantizers("sm_90a")
        if isinstance(s, SiluMulSpec) and s.tile == Tile(8, low_latency=True)
    ]
    specs += [few[0], few[-1]]
    monkeypatch.setattr(lookup, "multiprocessors", lambda index: sms)
    assert calls_of_check(monkeypatch, "sm_90a", specs) == [(spec, "sm_90a") for spec in specs]


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_check_calls_what_asks_for_each_kernel_of_weights(arch, small_gpu, monkeypatch):
    """The last kernel that is asked for is the one to check; others make its input."""
    asked = []
    monkeypatch.setattr(launch, "has_kernels", lambda t: True)
    monkeypatch.setattr(lookup, "architecture", lambda index: arch)
    monkeypatch.setattr(lookup, "function", lambda *of: asked.append(of) or (lambda *_: None))
    for name, empty in (("_plans", {}), ("_recent", []), ("_recent_out", [])):
        monkeypatch.setattr(launch, name, empty)
    specs = presets.weights(arch)
    assert {spec.kernel.split(".")[0] for spec in specs} == {
        "blocks",
        "convert_scales",
        "dequantize",
        "requantize",
    }
    for spec in specs:
        kernel_results.results_of(spec, "cpu")
        assert asked[-1] == (spec, arch)


@pytest.mark.parametrize("spec", [*EXACT[::40], *{s.kernel: s for s in EXACT}.values()])
def test_check_sees_a_wrong_byte(spec):
    expected, actual = (results_of(spec) for _ in range(2))
    assert compare(spec, actual, expected) is None
    for t in actual.values, actual.scales:
        if t is not None:
            data = storage_bytes(t)
            # The bits of a NaN that is multiplied back are any.
            byte = 7
            if t.dtype in (torch.bfloat16, torch.float16, torch.float32):
                byte = int(t.flatten().isfinite().nonzero()[0]) * t.itemsize
            data[byte] ^= 1
            with pytest.raises(WrongResult, match=r"^1 of \d+ bytes of (values|scales) are"):
                compare(spec, actual, expected)
            data[byte] ^= 1


@pytest.fixture(
    scope="module", params=[COMPUTED[0], NORMS[0], NORMS[3], COMPUTED[-1]], ids=keys.spec_name
)
def computed(request: pytest.FixtureRequest) -> tuple[Spec, kernel_results.Results]:
    return request.param, results_of(request.param)


def copied(results: kernel_results.Results) -> kernel_results.Results:
    def copy(t: torch.Tensor) -> torch.Tensor:
        storage = storage_bytes(t).clone().view(t.dtype)
        return storage.as_strided(t.shape, t.stride(), t.storage_offset())

    return kernel_results.Results(*(t if t is None else copy(t) for t in results))


def flip(t: torch.Tensor, count: int, bit: int) -> None:
    """Flip a bit of the first bytes, of a row of ordinary magnitude."""
    storage_bytes(t)[:count] ^= bit


def move_to_neighbours(t: torch.Tensor, count: int) -> None:
    """Make the first values those next to them: towards 0, or from it."""
    data = storage_bytes(t)[:count]
    data += torch.where((data & 0x7F) == 0, 1, -1).to(torch.uint8)


def test_check_counts_neighbours(computed):
    spec, expected = computed
    actual = copied(expected)
    assert compare(spec, actual, expected) == 0
    move_to_neighbours(actual.values, 3)
    assert compare(spec, actual, expected) == 3


def test_check_sees_many_neighbours(computed):
    spec, expected = computed
    actual = copied(expected)
    count = expected.values.numel() // 900
    move_to_neighbours(actual.values, count)
    with pytest.raises(WrongResult, match=f"^{count} of .* values are neighbours .* at most"):
        compare(spec, actual, expected)


@pytest.mark.parametrize("bit", [0x80, 0x40, 0x10])
def test_check_sees_values_that_are_far_off(computed, bit):
    spec, expected = computed
    actual = copied(expected)
    flip(actual.values, 1, bit)
    with pytest.raises(WrongResult, match=r"^1 of \d+ values are not neighbours"):
        compare(spec, actual, expected)


def test_check_sees_wrong_scales(computed):
    spec, expected = computed
    actual = copied(expected)
    flip(actual.scales, 4, 1 if spec.fmt.ue8m0 else 0x10)
    with pytest.raises(WrongResult, match=r"(values|scales) are"):
        compare(spec, actual, expected)


def test_check_sees_padding_that_is_not_written(computed):
    spec, expected = computed
    actual = copied(expected)
    data = storage_bytes(actual.scales)
    zeros = (data.view(torch.int32) == 0).nonzero()
    data.view(torch.int32)[zeros[-1]] = 0x01010101 * kernel_results.POISON - 2**32
    with pytest.raises(WrongResult, match=r"scales are"):
        compare(spec, actual, expected)


def test_check_takes_a_scale_that_is_a_neighbour(monkeypatch):
    spec = next(s for s in COMPUTED if s.fmt.ue8m0 and s.fmt.group_size == 128)
    expected = results_of(spec)
    actual = copied(expected)
    # The next power of two for the first group of row 0, and its values under that.
    values = expected.values.flatten()[:128].float()
    flatten = actual.values.flatten()
    flatten[:128] = (values / 2).to(spec.fmt.values)
    storage_bytes(actual.scales)[0] += 1
    assert compare(spec, actual, expected) == 1


@pytest.mark.parametrize("name", ["residual", "normalized"])
def test_check_sees_a_norms_other_results(name):
    spec = next(s for s in NORMS if s.residual and s.normalized)
    expected = results_of(spec)
    actual = copied(expected)
    flip(getattr(actual, name), 1, 1)
    if name == "normalized":  # computed in float32, too
        assert compare(spec, actual, expected) == 1
        flip(getattr(actual, name), 2, 0x40)
    with pytest.raises(WrongResult, match=rf"1 of \d+ .*{name} are not"):
        compare(spec, actual, expected)


SOME_FP4 = [
    next(s for s in FP4_COMPUTED if isinstance(s, kind) and s.fmt is fmt)
    for kind in (SiluMulSpec, RmsNormSpec)
    for fmt in (cute_quant.NVFP4, cute_quant.MXFP4)
]


@pytest.fixture(scope="module", params=SOME_FP4, ids=keys.spec_name)
def computed_fp4(request: pytest.FixtureRequest) -> tuple[Spec, kernel_results.Results]:
    return request.param, results_of(request.param)


def test_check_counts_each_value_of_a_byte(computed_fp4):
    """The lowest bit of a code is that of a neighbour, bit 4 of a byte that of another value."""
    spec, expected = computed_fp4
    actual = copied(expected)
    flip(actual.values, 3, 0x01)
    assert compare(spec, actual, expected) == 3
    flip(actual.values, 2, 0x10)
    assert compare(spec, actual, expected) == 5


@pytest.mark.parametrize("bit", [0x04, 0x40])
def test_check_sees_fp4_values_that_are_far_off(computed_fp4, bit):
    spec, expected = computed_fp4
    actual = copied(expected)
    flip(actual.values, 8, bit)
    with pytest.raises(WrongResult, match=r"of \d+ values are not neighbours"):
        compare(spec, actual, expected)


def test_check_sees_wrong_scales_of_fp4(computed_fp4):
    spec, expected = computed_fp4
    actual = copied(expected)
    flip(actual.scales, 1, 0x10)
    with pytest.raises(WrongResult, match=r"scales are not neighbours"):
        compare(spec, actual, expected)


def test_check_sees_wrong_scales_of_rows():
    fmt = cute_quant.NVFP4.replace(row_scale=True)
    spec = next(
        s
        for s in presets.all_kernels("sm_90a")
        if isinstance(s, QuantizeSpec) and s.fmt is fmt and not s.fake
    )
    expected = results_of(spec)
    actual = copied(expected)
    assert compare(spec, actual, expected) is None
    flip(actual.decode_scales, 1, 1)
    with pytest.raises(WrongResult, match=r"1 of \d+ bytes of decode scales are not"):
        compare(spec, actual, expected)


ON_COLUMNS = [s for s in presets.training("sm_90a") if isinstance(s, ColumnsSpec)]


@pytest.mark.parametrize("spec", ON_COLUMNS[::9], ids=keys.spec_name)
def test_check_sees_wrong_columns(spec):
    """In either direction, in values and in scales."""
    expected = results_of_columns(spec, "cpu")
    assert compare_columns(spec, expected, expected) == (None if spec.gated is None else 0)
    for number, result in enumerate(expected):
        for name in ("values", "scales"):
            wrong = [copied(r) for r in expected]
            storage_bytes(getattr(wrong[number], name))[1000:1010] ^= 0x30
            with pytest.raises(WrongResult, match=name):
                compare_columns(spec, wrong, expected)
        assert result.scales is not None


def test_check_says_how_many_are_neighbours(monkeypatch, capsys):
    spec = COMPUTED[0]
    expected = results_of(spec)
    results = {"cpu": expected, "cuda": copied(expected)}
    move_to_neighbours(results["cuda"].values, 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(lookup, "architecture", lambda index: "sm_90a")
    monkeypatch.setattr(presets, "of_each_kind", lambda arch: [spec])
    monkeypatch.setattr(check, "results_of", lambda spec, device: results[device])
    line = f"ran      sm_90a   {keys.spec_name(spec)}: "
    assert main.main(["check"]) == 0
    _, kernel, total = capsys.readouterr().out.splitlines()
    assert kernel == f"ok     {line}2 rounded to the neighbour"
    assert total == "1 of 1 kernels match the reference"
    flip(results["cuda"].values, 1, 0x80)
    assert main.main(["check"]) == 1
    _, kernel, total = capsys.readouterr().out.splitlines()
    assert kernel.startswith(f"FAILED {line}1 of ")
    assert total == "0 of 1 kernels match the reference"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["deepgemm", "moe", "weights", "training"])
def test_check_on_the_gpu(name, monkeypatch, capsys):
    functions = {}
    monkeypatch.setattr(lookup, "_functions", functions)
    monkeypatch.setattr(launch, "_plans", {})
    for recent in ("_recent", "_recent_out"):
        monkeypatch.setattr(launch, recent, [])
    assert main.main(["check", "--preset", name]) == 0
    arch = lookup.architecture(0)
    specs = presets.PRESETS[name](arch)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(specs) + 2
    assert all(line.startswith("ok     ran ") for line in lines[1:-1])
    asked = {(spec, arch) for spec in specs}
    # Scales to convert are made by kernels of other presets.
    assert asked <= set(functions) if name == "weights" else asked == set(functions)


# layout


def test_layout_help(capsys):
    done = subprocess.run(
        [sys.executable, "-m", "cute_quant", "layout", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.startswith("usage: cute-quant layout")
    for name in ("show", "try", "sweep", "explain", "report"):
        assert f"\n    {name} " in done.stdout


@pytest.mark.slow
def test_layout_show(tmp_path):
    command = [sys.executable, "-m", "cute_quant", "layout", "show", "--threads-per-group", "4"]
    done = subprocess.run(
        [*command, "--format", "e4m3:64:e8m0:mn_major_packed"], capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.strip()
    file = tmp_path / "layout.svg"
    done = subprocess.run([*command, "-o", str(file)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == f"wrote {file}\n"
    assert "<svg" in file.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("module", [["cute_quant", "layout"], ["cute_quant.lab"]])
def test_layout_show_to_who_reads_no_more(module):
    read, write = os.pipe()
    os.close(read)
    with open(write, "wb") as closed:
        done = subprocess.run(
            [sys.executable, "-m", *module, "show"], stdout=closed, stderr=subprocess.PIPE
        )
    assert done.returncode == 1 and not done.stderr


def test_layout_that_is_refused(capsys):
    assert main.main(["layout", "show", "--threads-per-group", "3"]) == 2
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 1 and "threads_per_group" in err
