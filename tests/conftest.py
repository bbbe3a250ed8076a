"""Devices: every contract test runs on the CPU, and on a GPU where there is one. The user's disk
cache is left alone."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from tests.emulator.quantizer import Kernels

HAS_GPU = torch.cuda.is_available()


def pytest_configure() -> None:
    # Also of what tests start. Those about the cache have directories of their own.
    os.environ["CUTE_QUANT_CACHE"] = "off"


def pytest_report_header() -> str:
    if HAS_GPU:
        return f"GPU: {torch.cuda.get_device_name()}"
    return "GPU: none, so the tests marked gpu are skipped; the emulator runs the kernels"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if not HAS_GPU and item.get_closest_marker("gpu"):
            item.add_marker(no_gpu)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """What the emulator runs, each compiled once in a session."""
    # CuTe DSL takes a second to import, and most tests need none of it.
    from tests.emulator.host import C_COMPILER
    from tests.emulator.quantizer import Kernels

    if C_COMPILER is None:
        pytest.skip("needs a C compiler")
    return Kernels(lambda: tmp_path_factory.mktemp("kernel"))
