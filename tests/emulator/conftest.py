"""Each kernel is compiled once in a session."""

import functools
from collections.abc import Callable

import pytest
import torch

from cute_quant.formats import Format
from tests.emulator.host import C_COMPILER
from tests.emulator.quantizer import Kernel


def pytest_report_header() -> str:
    path = f"through the host code, linked by {C_COMPILER}"
    return "emulated kernels: " + (path if C_COMPILER else "launched directly, no C compiler found")


@pytest.fixture(scope="session")
def kernel_of(tmp_path_factory) -> Callable[[torch.dtype, Format, str], Kernel]:
    @functools.cache
    def get(dtype: torch.dtype, fmt: Format, arch: str) -> Kernel:
        return Kernel(dtype, fmt, arch, tmp_path_factory.mktemp("kernel"))

    return get
