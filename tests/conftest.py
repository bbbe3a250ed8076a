"""Devices, emulated GPUs, and a disk cache that is not the user's."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from typing import TYPE_CHECKING
from zlib import crc32

import pytest
import torch

from tests.helpers import ARCHITECTURES
from tests.parts import part

if TYPE_CHECKING:
    from tests.kernels.emulated_gpu import Gpu, Kernels

FIRST, *OTHERS = ARCHITECTURES
HAS_GPU = torch.cuda.is_available()
SLOW_PARTS = 8


def pytest_configure() -> None:
    # Also of what tests start. Those about the cache have directories of their own.
    os.environ["CUTE_QUANT_CACHE"] = "off"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--slow-part",
        type=of_slow_tests,
        default=(0, 1),
        help="of the tests marked slow, a part such as 1/2, or today's eighth",
    )


def of_slow_tests(text: str) -> tuple[int, int]:
    return part(text, SLOW_PARTS)


def pytest_report_header() -> list[str]:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    gpu = torch.cuda.get_device_name() if HAS_GPU else "none, so tests marked gpu are deselected"
    linked = f"host code linked by {compiler}" if compiler else "skipped, there is no C compiler"
    return [f"GPU: {gpu}", f"emulated kernels: {linked}"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    number, count = config.getoption("slow_part")
    deselected = [
        item
        for item in items
        if not can_run(item)
        or (item.get_closest_marker("slow") and crc32(item.nodeid.encode()) % count != number)
    ]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        left_out = set(deselected)
        items[:] = [item for item in items if item not in left_out]


def can_run(item: pytest.Item) -> bool:
    """Return whether the GPU and the libraries that a test needs are there."""
    if item.get_closest_marker("gpu") and not HAS_GPU:
        return False
    library = item.get_closest_marker("library")
    return library is None or any(map(is_installed, library.args))


@functools.cache
def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[FIRST, *(pytest.param(arch, marks=pytest.mark.slow) for arch in OTHERS)])
def arch(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """What the emulator runs, each compiled once in a session."""
    # CuTe DSL takes a second to import, and most tests need none of it.
    from cute_quant.emulator.host import C_COMPILER
    from tests.kernels.emulated_gpu import Kernels

    if C_COMPILER is None:
        pytest.skip("needs a C compiler")
    return Kernels(lambda: tmp_path_factory.mktemp("kernel"))


@pytest.fixture
def gpu(kernels: Kernels, arch: str) -> Gpu:
    """An emulated GPU of each architecture."""
    from tests.kernels.emulated_gpu import Gpu

    return Gpu(kernels, arch)
