"""Directories built ahead of time: used without CuTe DSL, on any processor of a kind, from C++."""

import concurrent.futures
import itertools
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import cute_quant
from cute_quant.cli import main
from cute_quant.contract.calls import Call
from cute_quant.contract.formats import Format
from cute_quant.contract.prologues import FUSED, Prologue, make_rms_norm, make_silu_mul
from cute_quant.contract.rows import Rows
from cute_quant.contract.upper_scales import ENCODE
from cute_quant.dispatch import plan, presets, reachable
from cute_quant.dispatch.call_range import QUANTIZE, REQUANTIZE_BLOCKS, SILU_MUL
from cute_quant.dispatch.plan import Gpu
from cute_quant.jit import aot_build, aot_load, keys, lookup, shared_objects, toolchain
from cute_quant.jit.trusted_files import check_writers
from cute_quant.kernels.config import QuantizeSpec, RmsNormSpec, SiluMulSpec, Spec
from tests.helpers import UE8M0

SPEC = QuantizeSpec(torch.bfloat16, UE8M0)
NAME = keys.spec_name(SPEC)
ARCH = "sm_90a"
ROOT = Path(cute_quant.__file__).parent.parent
EXAMPLE = ROOT / "examples" / "cpp"
AARCH64 = toolchain.HOSTS["aarch64"]

DISASSEMBLER = shutil.which("objdump") or shutil.which("llvm-objdump")
CUDA = shutil.which("nvcc")
CMAKE = shutil.which("cmake")

# VEX and EVEX: all of AVX, AVX2 and AVX-512 begins with a v, mask registers aside.
BEYOND_BASELINE = re.compile(r"\t(v[a-z0-9]+|k[a-z]+[bwdq]|andn|bextr|mulx|[rs][oah][lrx]+x)\b.*")

ASK = f"""
import sys
import torch
import cute_quant
from cute_quant import DEEP_GEMM
from cute_quant.jit import lookup
from cute_quant.kernels.config import QuantizeSpec
function = lookup.function(QuantizeSpec(torch.bfloat16, DEEP_GEMM), "{ARCH}")
try:
    function()
except TypeError as error:
    assert str(error).startswith("Expects 11 parameters when calling")
try:
    lookup.function(QuantizeSpec(torch.float16, DEEP_GEMM), "{ARCH}")
except RuntimeError as error:
    print(error)
assert not {{"cutlass", "nvidia_cutlass_dsl", "cuda"}} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one kernel for one architecture; not to be changed."""
    made = tmp_path_factory.mktemp("built") / "kernels"
    assert main.main(["build", "--kernel", NAME, "--arch", ARCH, "-o", str(made)]) == 0
    return made


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built, tmp_path / "copy")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """The packages of this environment without CuTe DSL and what only it needs."""
    made = tmp_path / "site"
    made.mkdir()
    places = [Path(entry) for entry in sys.path if (Path(entry).is_dir() and Path(entry) != ROOT)]
    for path in (path for place in places for path in place.iterdir()):
        left_out = re.match(r"nvidia_cutlass|cutlass|cuda|cute_quant|.*\.pth$", path.name)
        if not (left_out or (path.parent / "os.py").exists() or (made / path.name).exists()):
            (made / path.name).symlink_to(path)
    return made


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUTE_QUANT_AOT_DIR", raising=False)
    monkeypatch.setattr(aot_load, "_loaded", [])
    aot_load._of_environment.cache_clear()


def change_manifest(directory: Path, **changes: object) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def object_file(directory: Path) -> Path:
    return directory / f"{NAME}-{ARCH}.so"


# What is built.


def test_content(built):
    manifest = json.loads((built / "manifest.json").read_text())
    assert sorted(path.name for path in built.iterdir()) == sorted(
        [object_file(built).name, "manifest.json", toolchain.RUNTIME_NAME]
    )
    (kernel,) = manifest["kernels"]
    assert kernel == shared_objects.read_record(object_file(built).read_bytes())
    assert kernel["symbol"] == f"{NAME}_{ARCH}".replace("-", "_")
    assert manifest["machine"] == platform.machine()


@pytest.mark.skipif(DISASSEMBLER is None, reason="needs objdump")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="about x86-64")
def test_host_code_runs_on_any_x86_64(built):
    assert BEYOND_BASELINE.search("\tvmovups %zmm0,(%rax)")  # the check below can fail
    listing = subprocess.run(
        [DISASSEMBLER, "-d", object_file(built)], capture_output=True, text=True, check=True
    ).stdout
    assert len(listing.splitlines()) > 500
    assert [line for line in listing.splitlines() if BEYOND_BASELINE.search(line)] == []


@pytest.mark.slow
@pytest.mark.skipif(AARCH64.linker() is None, reason="needs a linker for aarch64")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="about building for another machine")
def test_aarch64(tmp_path, capsys):
    directory = tmp_path / "kernels"
    arguments = ["--kernel", NAME, "--arch", ARCH, "--host", "aarch64", "-o", str(directory)]
    assert main.main(["build", *arguments]) == 0
    assert "it lacks the libcute_dsl_runtime.so of aarch64: give it" in capsys.readouterr().out
    header = object_file(directory).read_bytes()[:20]
    assert header[:5] == b"\x7fELF\x02" and int.from_bytes(header[18:20], "little") == 183
    with pytest.raises(ValueError, match="built for machine x86_64, got aarch64"):
        cute_quant.load(directory)


def test_other_files_are_left_alone(tmp_path):
    (tmp_path / "thesis.pdf").write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected a new directory.*got \['thesis.pdf'\]"):
        aot_build.write(tmp_path, toolchain.this_host(), None, [])
    assert (tmp_path / "thesis.pdf").exists()


def test_objects_of_others_are_left_alone(tmp_path):
    (tmp_path / "lib.so").write_bytes(b"")
    with pytest.raises(ValueError, match="expected a new directory"):
        aot_build.write(tmp_path, toolchain.this_host(), None, [])
    assert (tmp_path / "lib.so").exists()


@pytest.mark.parametrize(
    "manifest", [{"manifest_version": 3}, [], {"format": 1, "kernels": [{"file": "lib.so"}]}]
)
def test_manifests_of_others_are_left_alone(manifest, tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "lib.so").write_bytes(b"")
    with pytest.raises(ValueError, match="expected a new directory or one built before, got"):
        aot_build.write(tmp_path, toolchain.this_host(), None, [])
    assert json.loads((tmp_path / "manifest.json").read_text()) == manifest
    assert (tmp_path / "lib.so").exists()


@pytest.mark.parametrize("name", ["mine.so", "settings.json", "notes.tmp"])
def test_files_that_the_manifest_does_not_list_are_left_alone(name, copy):
    (copy / name).write_bytes(b"")
    before = sorted(copy.iterdir())
    with pytest.raises(ValueError, match=rf"got \['{name}'\]"):
        aot_build.write(copy, toolchain.this_host(), None, [])
    assert sorted(copy.iterdir()) == before


def test_building_again_replaces(copy):
    aot_build.write(copy, toolchain.this_host(), None, [])
    assert [path.name for path in copy.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_building_that_ends_early_leaves_what_was_there(error, copy):
    def built():
        yield SPEC, ARCH, b"content"
        raise error

    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    with pytest.raises(error):
        aot_build.write(copy, toolchain.this_host(), None, built())
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert list(copy.parent.iterdir()) == [copy]


def test_directory_that_cannot_be_replaced_is_put_back(copy, monkeypatch):
    replace = Path.replace

    def fail(path, target):
        if path.name == "new":
            raise OSError("no space")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", fail)
    before = sorted(copy.iterdir())
    with pytest.raises(OSError, match="no space"):
        aot_build.write(copy, toolchain.this_host(), None, [])
    assert sorted(copy.iterdir()) == before
    assert list(copy.parent.iterdir()) == [copy]


def test_files_that_come_while_it_builds_are_left_alone(copy):
    def built():
        (copy / "thesis.pdf").write_bytes(b"")
        yield SPEC, ARCH, b"content"

    with pytest.raises(ValueError, match=r"got .*thesis\.pdf"):
        aot_build.write(copy, toolchain.this_host(), None, built())
    assert (copy / "thesis.pdf").exists()


def test_runtime_may_be_that_of_the_directory(copy):
    runtime = copy / toolchain.RUNTIME_NAME
    content = runtime.read_bytes()
    aot_build.write(copy, toolchain.this_host(), runtime, [])
    assert runtime.read_bytes() == content
    assert list(copy.parent.iterdir()) == [copy]


def test_runtime_is_for_the_host(copy, tmp_path):
    text = tmp_path / "runtime.txt"
    text.write_text("INPUT(libother.so)")
    runtime = copy / toolchain.RUNTIME_NAME
    other = next(host for host in toolchain.HOSTS.values() if host.machine != platform.machine())
    before = sorted(copy.iterdir())
    for host, file in ((toolchain.this_host(), text), (other, runtime)):
        with pytest.raises(ValueError, match=f"runtime: expected .* for {host.machine}, got /"):
            aot_build.write(copy, host, file, [])
    assert sorted(copy.iterdir()) == before


@pytest.mark.slow
def test_interrupt_from_a_terminal_is_one_line(tmp_path):
    command = [sys.executable, "-m", "cute_quant", "build", "--kernel", NAME, "--arch", ARCH]
    process = subprocess.Popen(
        [*command, "-o", tmp_path / "kernels"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")

    def has_worker() -> bool:
        commands = (Path(f"/proc/{pid}/cmdline") for pid in children.read_text().split())
        return any(b"workers" in path.read_bytes() for path in commands if path.exists())

    deadline = time.monotonic() + 60
    while not has_worker() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert stderr == "cute-quant build: interrupted\n"
    assert process.returncode == 1
    assert list(tmp_path.iterdir()) == []


# How it is used.


@pytest.mark.slow
@pytest.mark.parametrize("how", ["variable", "load"])
def test_without_cute_dsl(built, site, tmp_path, how):
    load = f"cute_quant.load({str(built)!r})" if how == "load" else ""
    variables = {} if how == "load" else {"CUTE_QUANT_AOT_DIR": str(built)}
    start = f"import sys; sys.path[:0] = [{str(site)!r}, {str(ROOT)!r}]; import cute_quant; {load}"
    done = subprocess.run(
        [sys.executable, "-IS", "-c", start + ASK],
        env={**variables, "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.strip() == (
        f"{NAME.replace('bfloat16', 'float16')} for {ARCH} is not among those of {built}, and "
        f"CuTe DSL is not installed to compile it: pip install nvidia-cutlass-dsl"
    )


def test_directories_loaded_later_are_asked_first(built, copy, monkeypatch):
    monkeypatch.setenv("CUTE_QUANT_AOT_DIR", str(built))
    cute_quant.load(built)
    cute_quant.load(copy)
    assert [directory.path for directory in aot_load.loaded()] == [copy, built, built]


def test_found_by_spec_and_architecture(built):
    cute_quant.load(built)
    assert aot_load.find(SPEC, ARCH) is not None
    assert aot_load.find(SPEC, "sm_100a") is None
    assert aot_load.find(QuantizeSpec(torch.float16, UE8M0), ARCH) is None


def test_no_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a directory made by python -m cute"):
        cute_quant.load(tmp_path)


def test_variable_that_names_no_directory_is_said_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("CUTE_QUANT_AOT_DIR", str(tmp_path))
    assert aot_load.find(SPEC, ARCH) is None
    assert aot_load.find(SPEC, ARCH) is None
    (record,) = caplog.records
    assert record.getMessage().startswith(f"CUTE_QUANT_AOT_DIR not used: {tmp_path}: expected a")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": "0"}, "expected kernels built for sources .*, got 0: build them again"),
        ({"machine": "riscv64"}, f"built for machine {platform.machine()}, got riscv64"),
        ({"format": 0}, "built for format 2, got 0"),
        ({"versions": {"apache-tvm-ffi": "0.0.9"}}, "built with apache-tvm-ffi .*, got 0.0.9"),
        ({"kernels": None}, "not a manifest"),
        ({"kernels": [{}]}, "not a manifest"),
    ],
)
def test_built_for_something_else(copy, changes, message):
    change_manifest(copy, **changes)
    with pytest.raises(ValueError, match=message):
        cute_quant.load(copy)


DAMAGED = [b"", b"{", b"null", b"[]", b"\xff\xfe{", b"[" * 100000, b"1" * 5000]


@pytest.mark.parametrize("content", DAMAGED, ids=lambda content: str(content[:5]))
def test_damaged_manifest(content, copy):
    (copy / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"^{copy}/manifest.json: not a manifest: "):
        cute_quant.load(copy)


NAMES = ["format", "machine", "sources", "versions", "kernels", "runtime"]


VALUES = [None, 1.5, True, [None], [[]], {"apache-tvm-ffi": None}]
WRONG = [pair for pair in itertools.product(NAMES, VALUES) if pair != ("runtime", None)]
"""Without a runtime is how a directory may be built."""


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_malformed_manifest_is_one_line(name, value, copy, monkeypatch, caplog, capsys):
    change_manifest(copy, **{name: value})
    with pytest.raises(ValueError, match=f"^{copy}/manifest.json: not a manifest: {name}: "):
        cute_quant.load(copy)
    monkeypatch.setenv("CUTE_QUANT_AOT_DIR", str(copy))
    assert aot_load.find(SPEC, ARCH) is None
    (record,) = caplog.records
    assert record.getMessage().startswith(f"CUTE_QUANT_AOT_DIR not used: {copy}/manifest.json: ")
    assert main.main(["info"]) == 0
    assert re.search(f"built ahead: +not used: {copy}/manifest.json", capsys.readouterr().out)


def test_directory_that_fails_in_any_way_breaks_no_call(copy, monkeypatch, caplog):
    def fail(path):
        raise RuntimeError("in two\nlines")

    monkeypatch.setattr(aot_load, "open_directory", fail)
    monkeypatch.setenv("CUTE_QUANT_AOT_DIR", str(copy))
    assert aot_load.find(SPEC, ARCH) is None
    (record,) = caplog.records
    assert record.getMessage() == "CUTE_QUANT_AOT_DIR not used: in two lines"


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775])
def test_directory_that_others_may_write_to(mode, copy):
    copy.chmod(mode)
    with pytest.raises(ValueError, match=r"only its owner may .*, got mode \d+: chmod go-w"):
        cute_quant.load(copy)


def test_parent_that_others_may_write_to(copy):
    copy.parent.chmod(0o777)
    with pytest.raises(ValueError, match=f"lies in {copy.parent}, which anybody may write to"):
        cute_quant.load(copy)


def test_directory_of_somebody_else(copy, monkeypatch):
    status = os.stat_result((0o40755, 0, 0, 1, os.geteuid() + 1, 0, 0, 0, 0, 0))
    with pytest.raises(ValueError, match="expected root or you as its owner, got user"):
        check_writers(copy, status)


@pytest.mark.parametrize("name", ["manifest.json", "object", "runtime"])
def test_file_that_others_may_write_to(name, copy, monkeypatch, caplog):
    files = {"object": object_file(copy), "runtime": copy / toolchain.RUNTIME_NAME}
    files.get(name, copy / name).chmod(0o666)
    monkeypatch.setenv("CUTE_QUANT_AOT_DIR", str(copy))
    assert aot_load.find(SPEC, ARCH) is None
    (record,) = caplog.records
    assert "got mode 0666: chmod go-w" in record.getMessage()


def test_tampered_runtime_is_not_loaded(copy, caplog):
    with (copy / toolchain.RUNTIME_NAME).open("ab") as file:
        file.write(b"0")
    cute_quant.load(copy)
    assert aot_load.find(SPEC, ARCH) is None
    assert "expected the digest that the manifest has, got another" in caplog.text


def test_runtime_that_is_none(copy, caplog):
    runtime = copy / toolchain.RUNTIME_NAME
    cute_quant.load(copy)
    runtime.write_bytes(b"")
    assert aot_load.find(SPEC, ARCH) is None
    assert f"{runtime}: expected the digest that the manifest has" in caplog.text
    runtime.unlink()
    runtime.mkdir()
    descriptors = len(os.listdir("/proc/self/fd"))
    assert aot_load.find(SPEC, ARCH) is None
    assert f"{runtime}: expected a regular file" in caplog.text
    # Fewer where directories of other tests are collected meanwhile.
    assert len(os.listdir("/proc/self/fd")) <= descriptors


def test_runtime_is_loaded_where_there_are_no_threads(copy, monkeypatch, caplog):
    def submit(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(concurrent.futures.ThreadPoolExecutor, "submit", submit)
    cute_quant.load(copy)
    assert aot_load.find(SPEC, ARCH) is not None and not caplog.records


@pytest.mark.parametrize("path", ["new", "file"])
def test_load_of_no_directory(path, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match=r"expected a directory made by python -m cute_q"):
        cute_quant.load(tmp_path / path)


@pytest.mark.parametrize("directory", [None, b"kernels", 3])
def test_load_takes_a_path(directory):
    with pytest.raises(TypeError, match="directory: expected a path of text, got"):
        cute_quant.load(directory)
    with pytest.raises(ValueError, match="directory: expected a path, got nothing"):
        cute_quant.load("")


def test_manifest_that_is_a_link(copy):
    manifest = copy / "manifest.json"
    manifest.rename(copy.parent / "elsewhere.json")
    manifest.symlink_to(copy.parent / "elsewhere.json")
    with pytest.raises(ValueError, match=r"manifest\.json: expected a regular file, got a symb"):
        cute_quant.load(copy)


def test_manifest_of_somebody_else(copy):
    (copy / "manifest.json").chmod(0o666)
    with pytest.raises(ValueError, match=rf"^{copy}/manifest.json: expected that only its owner"):
        cute_quant.load(copy)


@pytest.mark.parametrize("name", ["../a.so", "/a.so", "..", ""])
def test_names_in_manifest_are_of_the_directory(name, copy):
    (kernel,) = json.loads((copy / "manifest.json").read_text())["kernels"]
    change_manifest(copy, kernels=[{**kernel, "file": name}])
    with pytest.raises(ValueError, match="not a manifest: kernels: expected"):
        cute_quant.load(copy)


def test_built_under_any_umask(tmp_path):
    before = os.umask(0)
    try:
        aot_build.write(tmp_path / "new", toolchain.this_host(), None, [])
    finally:
        os.umask(before)
    cute_quant.load(tmp_path / "new")


def test_tampered_object_is_not_loaded(copy, caplog):
    path = object_file(copy)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    cute_quant.load(copy)
    assert aot_load.find(SPEC, ARCH) is None
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{NAME} for {ARCH} not taken from {copy}: its digest")


def test_object_of_another_kernel_is_not_loaded(copy, caplog):
    other = shared_objects.seal(b"", {"name": "other"})
    object_file(copy).write_bytes(other)
    cute_quant.load(copy)
    assert aot_load.find(SPEC, ARCH) is None
    assert "it holds another kernel than the manifest says" in caplog.text


# Presets.


ARCHITECTURES = ("sm_90a", "sm_100a")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_names_in_presets_are_distinct(arch):
    for preset in presets.PRESETS.values():
        specs = preset(arch)
        assert len({keys.spec_name(spec) for spec in specs}) == len(set(specs)) == len(specs)


class Asked(list):
    """Specs of the kernels that calls ask for."""

    def call(
        self,
        x: torch.Tensor,
        shape: tuple[int, ...],
        fmt: Format = UE8M0,
        rows: Rows | None = None,
        index: torch.Tensor | None = None,
        prologue: Prologue | None = None,
    ) -> Spec:
        """Return what a call asks for whose q has this shape."""
        *batch_shape, mn, k = shape
        values = plan.View(shape, plan.contiguous_strides(shape))
        scales = plan.View(
            fmt.scale_shape(batch_shape, mn, k), fmt.scale_strides(batch_shape, mn, k)
        )
        call = Call(x, fmt, rows=rows, index=index, prologue=prologue)
        plan.choose_kernel(call, plan.Destination(values, 0, fmt.values), scales)
        return self.pop()


@pytest.fixture(params=ARCHITECTURES)
def arch(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def asked(arch: str, monkeypatch: pytest.MonkeyPatch) -> Asked:
    made = Asked()
    monkeypatch.setattr(lookup, "architecture", lambda index: arch)
    monkeypatch.setattr(lookup, "multiprocessors", lambda index: 132)
    monkeypatch.setattr(lookup, "function", lambda spec, arch: made.append(spec))
    return made


def rows_of(kind: str, mn: int) -> Rows | None:
    counts = torch.zeros(3, dtype=torch.int32)
    return {
        "masked": cute_quant.Masked(counts),
        "prefix_sum": cute_quant.PrefixSum(counts),
        "indexed": cute_quant.Indexed(torch.zeros(mn, dtype=torch.int32)),
    }.get(kind)


every_format = pytest.mark.parametrize("fmt", presets.DEEPGEMM_FORMATS, ids=str)


@every_format
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("kind", ["dense", "batch", "masked", "prefix_sum", "indexed"])
def test_presets_have_what_calls_ask_for(kind, large, gathered, fmt, asked, arch, monkeypatch):
    monkeypatch.setattr(lookup, "multiprocessors", lambda index: 1 if large else 10**6)
    batch_shape = (3,) if kind in ("batch", "masked") else ()
    if kind == "batch" and gathered:
        pytest.skip("tokens are gathered for experts, not for batches")
    shape = (*batch_shape, 64, 1024)
    index = torch.zeros(shape[:-1], dtype=torch.int32) if gathered else None
    x = torch.zeros((64, 1024) if gathered else shape, dtype=torch.bfloat16)
    spec = asked.call(x, shape, fmt, rows_of(kind, 64), index)
    assert spec in presets.moe(arch) or (kind == "batch" and spec in presets.deepgemm(arch))
    assert gathered or spec in presets.deepgemm(arch)


@pytest.mark.parametrize("preset", ["moe", "weights"])
def test_presets_have_all_of_their_calls_on_any_gpu(preset, arch):
    """Of every format and number of rows, at another k and on GPUs of other sizes."""
    ranges = {"moe": presets._of_moe, "weights": presets._of_weights}[preset]()
    assert {fmt.values for fmt in (calls.fmt for calls in ranges)} == {
        torch.float8_e4m3fn,
        torch.float4_e2m1fn_x2,
    }
    kernels = presets.PRESETS[preset](arch)
    for calls in ranges:
        if calls.operation not in (QUANTIZE, SILU_MUL, REQUANTIZE_BLOCKS):
            continue
        calls = calls._replace(k=(7168,), max_rows=2**14).with_upper_scale(ENCODE)
        for sms in (16, 132):
            missing = set(reachable.specs(calls, Gpu(arch, sms))) - set(kernels)
            assert not [spec for spec in missing if presets._has_whole_vectors(spec)], calls


ACTIVATIONS = {
    "plain": {"interleaved": False, "clamp": None, "alpha": 1.0, "beta": 0.0},
    "gpt-oss": {"interleaved": True, "clamp": 7.0, "alpha": 1.702, "beta": 1.0},
}


@every_format
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mn", [1, 64, 8192])
@pytest.mark.parametrize("kind", ["dense", "masked", "prefix_sum", "indexed"])
@pytest.mark.parametrize("options", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_moe_has_what_activations_ask_for(options, kind, mn, weighted, fmt, asked, arch):
    shape = (3, mn, 1024) if kind == "masked" else (mn, 1024)
    gate_up = torch.empty((*shape[:-1], 2048), dtype=torch.bfloat16)
    weight = torch.empty(shape[:-1]) if weighted else None
    prologue = make_silu_mul(**options, rounding=FUSED, weight=weight)
    spec = asked.call(gate_up, shape, fmt, rows_of(kind, mn), prologue=prologue)
    assert isinstance(spec, SiluMulSpec)
    assert spec in presets.moe(arch)


@every_format
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_moe_has_what_norms_ask_for(with_residual, normalized, fmt, asked, arch):
    found = set()
    for k in (16, 128, 496, 512, 528, *range(1024, 32769, 512), 4112, 32752):
        x = torch.empty((8, k), dtype=torch.bfloat16)
        residual = torch.empty_like(x) if with_residual else None
        prologue = make_rms_norm(
            torch.empty(k, dtype=torch.bfloat16),
            eps=1e-6,
            weight_offset=0.0,
            rounding=FUSED,
            residual=residual,
            normalized=torch.empty_like(x) if normalized else None,
        )
        found.add(asked.call(x, (8, k), fmt, prologue=prologue))
    # All of them, and no others.
    assert found == {
        spec
        for spec in presets.moe(arch)
        if isinstance(spec, RmsNormSpec)
        and (spec.fmt, spec.residual, spec.normalized) == (fmt, with_residual, normalized)
    }


# From C++.


@pytest.fixture(scope="module")
def example() -> Iterator[Path]:
    if not (CMAKE and CUDA):
        pytest.skip("needs cmake and the CUDA toolkit")
    with tempfile.TemporaryDirectory() as directory:
        configure = [CMAKE, "-S", EXAMPLE, "-B", directory]
        for command in (
            [*configure, f"-DPython_EXECUTABLE={sys.executable}"],
            [CMAKE, "--build", directory],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
        yield Path(directory) / "quantize"


@pytest.mark.slow
def test_cpp_example_loads(example, built):
    done = subprocess.run([example, built, ARCH], capture_output=True, text=True, env={})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"loaded {object_file(built)}\n")


def test_cpp_example_says_what_is_missing(example, built):
    done = subprocess.run([example, built, "sm_100a"], capture_output=True, text=True, env={})
    assert done.returncode == 1 and "sm_100a.so" in done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a Hopper GPU",
)
def test_cpp_example_quantizes(example, built):
    done = subprocess.run([example, built, ARCH], capture_output=True, text=True, env={})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("right")


@pytest.mark.gpu
def test_runs_on_the_gpu_without_cute_dsl(site, tmp_path):
    directory = tmp_path / "kernels"
    arch = lookup.architecture(0)
    assert main.main(["build", "--kernel", NAME, "--arch", arch, "-o", str(directory)]) == 0
    code = f"""
import sys
sys.path[:0] = [{str(site)!r}, {str(ROOT)!r}]
import torch
from cute_quant import quantize
x = torch.randn(64, 512, dtype=torch.bfloat16)
(q, sf), (expected_q, expected_sf) = quantize(x.cuda()), quantize(x)
assert torch.equal(q.cpu().view(torch.uint8), expected_q.view(torch.uint8))
assert torch.equal(sf.cpu(), expected_sf)
assert "cutlass" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-IS", "-c", code],
        env={**os.environ, "CUTE_QUANT_AOT_DIR": str(directory)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
