"""Both architectures, and what the emulator needs to launch kernels."""

import pytest

from tests.emulator.cases import ARCHITECTURES
from tests.emulator.host import C_COMPILER
from tests.emulator.quantizer import Gpu


def pytest_report_header() -> str:
    linked = f"linked by {C_COMPILER}" if C_COMPILER else "no C compiler found to link it, skipped"
    return f"emulated kernels: launched by their host code, {linked}"


@pytest.fixture(params=ARCHITECTURES)
def arch(request) -> str:
    return request.param


@pytest.fixture
def gpu(kernels, arch) -> Gpu:
    return Gpu(kernels, arch)
