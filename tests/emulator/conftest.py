"""Each kernel is compiled once in a session."""

import functools
from collections.abc import Callable

import pytest
import torch

from cute_quant.formats import Format
from tests.emulator.host import C_COMPILER
from tests.emulator.quantizer import Kernel


def pytest_report_header() -> str:
    linked = f"linked by {C_COMPILER}" if C_COMPILER else "no C compiler found to link it, skipped"
    return f"emulated kernels: launched by their host code, {linked}"


@pytest.fixture(scope="session")
def kernel_of(tmp_path_factory) -> Callable[..., Kernel]:
    @functools.cache
    def get(dtype: torch.dtype, fmt: Format, arch: str, *shape: int) -> Kernel:
        if C_COMPILER is None:
            pytest.skip("needs a C compiler")
        return Kernel(dtype, fmt, arch, tmp_path_factory.mktemp("kernel"), *shape)

    return get
