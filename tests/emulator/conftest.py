"""Each kernel is compiled once in a session."""

import pytest

from tests.emulator.cases import ARCHITECTURES
from tests.emulator.host import C_COMPILER
from tests.emulator.quantizer import Gpu, Kernels


def pytest_report_header() -> str:
    linked = f"linked by {C_COMPILER}" if C_COMPILER else "no C compiler found to link it, skipped"
    return f"emulated kernels: launched by their host code, {linked}"


@pytest.fixture(scope="session")
def kernels(tmp_path_factory) -> Kernels:
    if C_COMPILER is None:
        pytest.skip("needs a C compiler")
    return Kernels(lambda: tmp_path_factory.mktemp("kernel"))


@pytest.fixture(params=ARCHITECTURES)
def arch(request) -> str:
    return request.param


@pytest.fixture
def gpu(kernels, arch) -> Gpu:
    return Gpu(kernels, arch)
