"""The installed CuTe DSL and the other tools that make objects, found without importing it."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
import platform
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import torch

RUNTIME_NAME = "libcute_dsl_runtime.so"
"""Library through which objects call CUDA; its name is also its SONAME."""


BOUNDS = {
    "nvidia-cutlass-dsl": ((4, 8), (5,)),
    "apache-tvm-ffi": ((0, 1, 10), (0, 2)),
}
"""Versions that this package works with, from and below, as its dependencies say."""


class Host(NamedTuple):
    """A processor that host code is made for.

    Attributes:
        machine: as `platform.machine` names it.
        triple: as LLVM names it.
        cpu: the oldest one that the code runs on, in LLVM's words.
        linkers: names of programs that link for it, the first that exists is taken.
    """

    machine: str
    triple: str
    cpu: str
    linkers: tuple[str, ...]

    def linker(self) -> str | None:
        """The path of a linker, None if there is none."""
        native = ("ld",) if self.machine == platform.machine() else ()
        return next(filter(None, map(shutil.which, (*native, *self.linkers))), None)


# Code for the oldest processor costs nothing: what a call does on the host is a few branches and
# stores. Left alone, the compiler uses all that the machine has, such as AVX-512.
HOSTS = {
    host.machine: host
    for host in (
        Host(
            "x86_64",
            "x86_64-unknown-linux-gnu",
            "x86-64",
            ("x86_64-linux-gnu-ld", "ld.lld"),
        ),
        Host(
            "aarch64",
            "aarch64-unknown-linux-gnu",
            "generic",
            ("aarch64-linux-gnu-ld", "ld.lld"),
        ),
    )
}


def this_host() -> Host:
    """The processor that this runs on.

    Raises:
        RuntimeError: CuTe DSL has no code for it.
    """
    if platform.machine() not in HOSTS:
        raise RuntimeError(
            f"expected a processor of one of {tuple(HOSTS)}, got {platform.machine()}"
        )
    return HOSTS[platform.machine()]


class Dsl(NamedTuple):
    """An installed CuTe DSL.

    Attributes:
        version: of the distribution.
        flavour: of the CUDA toolkit that it brings, such as ``cu13``.
        root: of its package.
    """

    version: str
    flavour: str
    root: Path

    @property
    def runtime(self) -> Path:
        """The runtime library for this machine."""
        return self.root / self.flavour / "lib" / RUNTIME_NAME

    def runtime_to_link(self, host: Host) -> Path:
        """A library with the runtime's symbols, for a host that may be another."""
        if host.machine == platform.machine():
            return self.runtime
        return self.root / self.flavour / "lib" / "stubs" / host.triple / RUNTIME_NAME


@functools.cache
def installed_dsl() -> Dsl | None:
    """CuTe DSL, in the flavour that it takes by itself: the newest that the driver runs.

    None if it is not installed.
    """
    spec = importlib.util.find_spec("nvidia_cutlass_dsl")
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(next(iter(spec.submodule_search_locations)))
    try:
        version = importlib.metadata.version("nvidia-cutlass-dsl")
    except importlib.metadata.PackageNotFoundError:
        return None
    majors = [
        int(directory.name.removeprefix("cu"))
        for directory in root.glob("cu[0-9]*")
        if (directory / "lib" / RUNTIME_NAME).exists()
    ]
    driver = driver_cuda_version()
    runnable = [major for major in majors if driver is None or major <= driver[0]]
    return Dsl(version, f"cu{max(runnable)}", root) if runnable else None


@functools.cache
def driver_cuda_version() -> tuple[int, int] | None:
    """Major and minor version of CUDA that the driver runs, None without a driver."""
    version = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)):
            return None
    except (OSError, AttributeError):
        return None
    return version.value // 1000, version.value % 1000 // 10


def tvm_ffi_version() -> str | None:
    """The version of apache-tvm-ffi, None if it is not installed."""
    try:
        return importlib.metadata.version("apache-tvm-ffi")
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Versions that what is compiled here depends on."""
    dsl = installed_dsl()
    return {
        "torch": torch.__version__,
        "nvidia-cutlass-dsl": None if dsl is None else f"{dsl.version} {dsl.flavour}",
        "apache-tvm-ffi": tvm_ffi_version(),
    }


def conflicts() -> list[str]:
    """Return what is wrong about the installed versions, a sentence each."""
    found = []
    dsl = installed_dsl()
    installed = {
        "nvidia-cutlass-dsl": None if dsl is None else dsl.version,
        "apache-tvm-ffi": tvm_ffi_version(),
    }
    for name, version in installed.items():
        low, high = BOUNDS[name]
        if version is not None and not low <= _numbers(version) < high:
            low_text, high_text = (".".join(map(str, bound)) for bound in (low, high))
            found.append(
                f"{name}: expected at least {low_text} and below {high_text}, got {version}"
            )
    cuda = torch.version.cuda
    if dsl is not None and cuda is not None and int(cuda.split(".")[0]) > int(dsl.flavour[2:]):
        found.append(
            f"torch is built for CUDA {cuda}, and CuTe DSL runs in its flavour {dsl.flavour}: "
            f"pip install 'nvidia-cutlass-dsl[cu{cuda.split('.')[0]}]'"
        )
    return found


def _numbers(version: str) -> tuple[int, ...]:
    """Return the numbers that a version starts with."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in found[0].split(".")) if found else ()
