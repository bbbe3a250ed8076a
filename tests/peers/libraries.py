"""Load the reference code of other libraries, single files of it where a package needs a GPU."""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest


def skip_without(package: str) -> Path:
    """Return the folder of an installed package without importing it, or skip the test."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"needs {package}")
    return Path(next(iter(spec.submodule_search_locations)))


def load_file(path: Path, **stand_ins: ModuleType | mock.Mock | SimpleNamespace) -> ModuleType:
    """Execute a file alone, stand-ins in the place of the modules that it imports.

    Args:
        stand_ins: by module name, with double underscores for dots.
    """
    if not path.exists():
        pytest.skip(f"this version has no {path.name}")
    spec = importlib.util.spec_from_file_location(f"peer_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    with standing_in({name.replace("__", "."): stand_in for name, stand_in in stand_ins.items()}):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def standing_in(modules: dict[str, ModuleType]) -> Iterator[None]:
    """Put modules into `sys.modules`, and keep what is imported meanwhile, but for them."""
    hidden = {name: sys.modules[name] for name in modules if name in sys.modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
        sys.modules.update(hidden)


def vllm_nvfp4() -> ModuleType:
    """Return vLLM's ``nvfp4_emulation_utils``, as on a machine without a GPU."""
    folder = skip_without("vllm") / "model_executor/layers/quantization/utils"
    platform = SimpleNamespace(is_cuda_alike=lambda: False)
    e2m1 = SimpleNamespace(max=lambda: 6.0)
    return load_file(
        folder / "nvfp4_emulation_utils.py",
        vllm=mock.Mock(),
        vllm__platforms=SimpleNamespace(current_platform=platform),
        vllm__scalar_type=SimpleNamespace(scalar_types=SimpleNamespace(float4_e2m1f=e2m1)),
        vllm__triton_utils=mock.Mock(),
        vllm__utils=mock.Mock(),
        vllm__utils__torch_utils=mock.Mock(),
    )


def vllm_mxfp8() -> ModuleType:
    """Return vLLM's ``mxfp8_utils``."""
    folder = skip_without("vllm") / "model_executor/layers/quantization/utils"
    return load_file(
        folder / "mxfp8_utils.py",
        vllm=mock.Mock(),
        vllm__utils=mock.Mock(),
        vllm__utils__torch_utils=mock.Mock(),
    )


def te_nvfp4() -> ModuleType:
    """Return TransformerEngine's ``reference_nvfp4``."""
    folder = skip_without("transformer_engine") / "pytorch/custom_recipes"
    utils = load_file(folder / "reference_utils.py")
    recipes = SimpleNamespace(gemm=mock.Mock(), reference_utils=utils)
    bases = SimpleNamespace(
        QuantizedTensorStorage=type("QuantizedTensorStorage", (), {}),
        Quantizer=type("Quantizer", (), {}),
    )
    return load_file(
        folder / "reference_nvfp4.py",
        transformer_engine=mock.Mock(),
        transformer_engine__pytorch=mock.Mock(),
        transformer_engine__pytorch__custom_recipes=recipes,
        transformer_engine__pytorch__quantized_tensor=bases,
    )


def deep_gemm_math() -> ModuleType:
    """Return DeepGEMM's ``utils/math.py``, of the package or of the copy in vLLM."""
    if importlib.util.find_spec("deep_gemm"):
        folder = skip_without("deep_gemm")
    else:
        folder = skip_without("vllm") / "third_party/deep_gemm"
    return load_file(folder / "utils/math.py")


def flashinfer(module: str) -> ModuleType:
    """Return a module of ``flashinfer.quantization`` in CuTe DSL, without what it launches with.

    The packages are bare folders, and what would compile, log and ask the GPU stands in.
    """
    folder = skip_without("flashinfer")
    modules = {}
    for name in ("flashinfer", *(f"flashinfer.{sub}" for sub in FLASHINFER_PACKAGES)):
        modules[name] = ModuleType(name)
        modules[name].__path__ = [str(folder.joinpath(*name.split(".")[1:]))]
    modules["flashinfer.api_logging"] = SimpleNamespace(flashinfer_api=lambda function: function)
    for name in ("flashinfer.jit", "flashinfer.jit.cute_dsl_core", "flashinfer.cute_dsl.utils"):
        modules[name] = mock.Mock()
    with standing_in(modules):
        return importlib.import_module(f"flashinfer.quantization.{module}")


FLASHINFER_PACKAGES = ("cute_dsl", "quantization", "quantization.kernels")
