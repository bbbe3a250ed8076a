"""Run the package on an arm64 Debian under QEMU: ``make test-arm64``.

Each step is a line: ok or FAILED, seconds, what it did. Output of its commands is in
``.arm64/logs``, and the end of it is printed where one failed. CONTRIBUTING.md says what it needs.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from cute_quant.jit import toolchain
from tests.arm64 import kernels
from tests.arm64.logs import run
from tests.arm64.root import CHECKOUT, Root

FOLDER = CHECKOUT / ".arm64"
LOGS = FOLDER / "logs"
TAIL = 30
"""Lines of a log that are printed where a step failed."""

PROGRAMS = {
    "qemu-aarch64-static": "qemu-user-static",
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
    "unshare": "util-linux",
}
"""What is needed, and the package of Debian that has it."""

IMPORT = """
import platform, sys
import torch
import cute_quant
assert platform.machine() == "aarch64"
assert not {"cutlass", "tvm_ffi"} & set(sys.modules)
print(f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}")
"""
CPU_TESTS = (
    "tests/test_oracle.py",
    "tests/contract/test_reference.py",
    "tests/contract/test_silu_mul.py",
    "tests/contract/test_rms_norm.py",
)
CPU_CASES = (
    "test_exact_oracle",
    "test_known_values",
    "test_one_special_value",
    "test_random_finite_bits",
    "test_powers_of_two",
    "test_dequantize_is_close",
    "test_zeros_keep_their_sign",
    "test_clamp_beyond_the_dtype",
    "test_unfused_is_what_torch_computes",
    "test_weight_offset_is_what_gemma_computes",
)
EMULATOR_TEST = "tests/kernels/test_quantize.py"
EMULATOR_CASE = "test_no_min_scale and sm_100a and bfloat16"
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow")

CROSS, NATIVE = "/srv/built-on-x86-64", "/srv/built-on-aarch64"
"""Directories of kernels, in the root."""
RECORDS = "/srv/records"


class Transcript:
    """Steps, and whether all of them succeeded."""

    def __init__(self) -> None:
        self.failed = 0

    def step(self, name: str, function: Callable[[Path], str]) -> None:
        """Run a step and print how it ended: the last line that the function returns."""
        log = LOGS / f"{name.replace(' ', '-')}.log"
        log.unlink(missing_ok=True)
        start = time.monotonic()
        if sys.stdout.isatty():
            print(f"...    {name}", end="\r", flush=True)
        try:
            detail, result = function(log).rstrip().splitlines()[-1], "ok    "
        except subprocess.CalledProcessError as error:
            detail, result = f"exit status {error.returncode}, see {log}", "FAILED"
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            detail, result = str(error).splitlines()[0], "FAILED"
        self.failed += result == "FAILED"
        print(f"{result} {time.monotonic() - start:5.0f} s  {name}: {detail}", flush=True)
        if result == "FAILED" and log.exists():
            print("".join(f"    {line}\n" for line in log.read_text().splitlines()[-TAIL:]))


def main() -> int:
    """Run all steps."""
    missing = [package for program, package in PROGRAMS.items() if shutil.which(program) is None]
    if toolchain.HOSTS["aarch64"].linker() is None:
        missing.append("binutils-aarch64-linux-gnu")
    if missing or platform.machine() != "x86_64":
        print(f"needs an x86-64 Debian, and of its packages: {' '.join(missing) or 'all there'}")
        return 1
    # Directories of kernels that others may write to are refused.
    os.umask(0o022)
    LOGS.mkdir(parents=True, exist_ok=True)
    root = Root(FOLDER / "root")
    transcript = Transcript()
    transcript.step("root", root.make)
    if transcript.failed:
        return 1
    for path in (CROSS, NATIVE, RECORDS):
        shutil.rmtree(_outside(root, path), ignore_errors=True)

    def on_arm(*arguments: str) -> Callable[[Path], str]:
        return lambda log: run(root.command("python3", *arguments), log)

    transcript.step("import", on_arm("-c", IMPORT))
    transcript.step("CPU path", on_arm(*PYTEST, *CPU_TESTS, "-k", " or ".join(CPU_CASES)))
    transcript.step("emulator", on_arm(*PYTEST, EMULATOR_TEST, "-k", EMULATOR_CASE))
    transcript.step("build on x86-64", lambda log: _build_here(root, log))
    call = ["-m", kernels.__name__, "call"]
    transcript.step("call what x86-64 built", on_arm(*call, CROSS, RECORDS))
    transcript.step("build on aarch64", on_arm(*_build(), "-o", NATIVE))
    transcript.step("call what aarch64 built", on_arm(*call, NATIVE, RECORDS))
    transcript.step("compare", lambda log: _compare(root, log))
    return min(transcript.failed, 1)


def _outside(root: Root, path: str) -> Path:
    """Return where a path of the root lies on this machine."""
    return root.path / path.removeprefix("/")


def _build() -> list[str]:
    """Return the arguments of Python that build the kernels."""
    names = [f"--kernel={name}" for name in kernels.NAMES]
    architectures = [f"--arch={arch}" for arch in kernels.ARCHITECTURES]
    return ["-m", "cute_quant", "build", *names, *architectures]


def _build_here(root: Root, log: Path) -> str:
    """Build for aarch64, and record what the objects hold."""
    flavour = toolchain.installed_dsl().flavour
    runtime = root.site_packages / "nvidia_cutlass_dsl" / flavour / "lib" / toolchain.RUNTIME_NAME
    directory = str(_outside(root, CROSS))
    _outside(root, CROSS).parent.mkdir(exist_ok=True)
    record = ["-m", kernels.__name__, "record", str(_outside(root, RECORDS))]
    run([sys.executable, *record], log)
    host = ["--host", "aarch64", "--runtime", str(runtime)]
    return run([sys.executable, *_build(), *host, "-o", directory], log)


def _compare(root: Root, log: Path) -> str:
    """Compare machine code, and all of an object where the same linker made both.

    Raises:
        ValueError: something differs.
    """
    cross, native = _outside(root, CROSS), _outside(root, NATIVE)
    commands = [toolchain.HOSTS["aarch64"].linker()], root.command("ld")
    linkers = [run([*command, "--version"], log).splitlines()[0] for command in commands]
    identical = 0
    for spec in kernels.SPECS:
        for arch in kernels.ARCHITECTURES:
            stem = kernels.stem(spec, arch)
            cubin = (_outside(root, RECORDS) / f"{stem}.cubin").read_bytes()
            objects = [(directory / f"{stem}.so").read_bytes() for directory in (cross, native)]
            if not all(cubin in content for content in objects):
                raise ValueError(f"{stem}: machine code differs")
            identical += objects[0] == objects[1]
    total = len(kernels.SPECS) * len(kernels.ARCHITECTURES)
    if linkers[0] != linkers[1]:
        return f"same machine code in {total} objects, linked by {' and '.join(linkers)}"
    if identical != total:
        raise ValueError(f"{total - identical} of {total} objects differ in their host code")
    return f"{total} objects are the same in every byte, linked by {linkers[0]}"


if __name__ == "__main__":
    raise SystemExit(main())
