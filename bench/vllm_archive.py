"""The Python files of vLLM that a benchmark runs, packed for a machine without vLLM.

Of its extensions, of most that it imports, and of its other modules only names are needed:
`missing_modules` has stand-ins for them.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.metadata
import io
import os
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import missing_modules

EXTENSIONS = ("vllm._C", "vllm._C_stable_libtorch", "vllm._moe_C", "vllm.vllm_flash_attn")
KEPT = (
    "vllm._custom_ops",
    "vllm._version",
    "vllm.config.compilation",
    "vllm.config.utils",
    "vllm.config.vllm",
    "vllm.env_override",
    "vllm.envs",
    "vllm.ir",
    "vllm.logger",
    "vllm.logging_utils",
    "vllm.model_executor.custom_op",
    "vllm.model_executor.kernels.linear.base",
    "vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel",
    "vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel",
    "vllm.model_executor.kernels.linear.scaled_mm.deep_gemm",
    "vllm.model_executor.layers.quantization.input_quant_fp8",
    "vllm.model_executor.layers.quantization.utils.fp8_utils",
    "vllm.model_executor.layers.quantization.utils.quant_utils",
    "vllm.model_executor.layers.quantization.utils.w8a8_utils",
    "vllm.model_executor.parameter",
    "vllm.model_executor.utils",
    "vllm.platforms",
    "vllm.plugins",
    "vllm.scalar_type",
    "vllm.triton_utils",
    "vllm.utils",
)
"""Modules of vLLM, or packages with all of their modules, that a linear layer runs."""
PACKED = ("vllm", "packaging")
NAMES = "third_party.txt"
"""In the archive: the packages that vLLM imported, of which only names are needed."""
KEPT_NAMES = "kept.txt"
"""In the archive: the modules of vLLM that are more than names."""


class _Others(importlib.abc.MetaPathFinder):
    """Finds, as the first one, stand-ins for the modules of vLLM that are not kept."""

    def __init__(self, kept: Sequence[str]) -> None:
        self.kept = [f"{name}." for name in kept]

    def find_spec(self, name: str, path: object, target: object = None) -> Any:
        # A package is kept if one of its modules is.
        kept = any(f"{name}.".startswith(k) or k.startswith(f"{name}.") for k in self.kept)
        if kept or not name.startswith("vllm."):
            return None
        return missing_modules.spec_of_stand_in(name)


def pack(
    archive: Path,
    imports: Sequence[str],
    kept: Sequence[str] = KEPT,
    others: Mapping[str, Path] | None = None,
) -> None:
    """Write the Python files of modules of vLLM, and those of `packaging`.

    Args:
        archive: to write.
        imports: modules that are imported here, so that it is known what they import.
        kept: modules that are packed, or packages with all of their modules.
        others: further files, by their places in the archive.
    """
    sys.meta_path.insert(0, _Others(kept))
    for name in imports:
        importlib.import_module(name)
    root = Path(sys.modules["vllm"].__file__ or "").parent.parent
    # What vLLM looks for, and does without, must not be found.
    imported = {
        name.partition(".")[0]
        for name, module in list(sys.modules.items())
        if not str(getattr(module, "__file__", None)).startswith(str(root / "vllm"))
    }
    brought = {
        "deep_ep",
        "deep_gemm",
        "torch",
        "triton",
        "triton_kernels",
        *PACKED,
        "bench",
        "cute_quant",
    }
    third_party = sorted(imported - sys.stdlib_module_names - brought)
    paths = {path for path in _files(root, kept) if path.is_file()}
    files = {str(path.relative_to(root)): path for path in paths} | dict(others or {})
    with tarfile.open(archive, "w:xz", preset=9) as tar:
        for name, path in sorted(files.items()):
            tar.add(path, name)
        version = importlib.metadata.version("vllm")
        metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        _add_text(tar, f"vllm-{version}.dist-info/METADATA", metadata)
        _add_text(tar, NAMES, "\n".join(third_party))
        _add_text(tar, KEPT_NAMES, "\n".join(kept))
    whole = sum(path.stat().st_size for path in files.values())
    packed = archive.stat().st_size
    print(f"{len(files)} files, {whole / 2**20:.2f} MiB, packed {packed / 2**20:.2f} MiB")


def _files(root: Path, kept: Sequence[str]) -> Iterator[Path]:
    """Return the files of the modules that are kept, and of the packages that they are in."""
    for name in ("packaging", *kept):
        path = root.joinpath(*name.split("."))
        yield from path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]
        for parent in path.relative_to(root).parents:
            yield root / parent / "__init__.py"


def _add_text(tar: tarfile.TarFile, name: str, text: str) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(text)
    tar.addfile(entry, io.BytesIO(text.encode()))


def load(archive: Path, directory: Path) -> None:
    """Unpack vLLM, and make it importable on this GPU without its extensions."""
    with tarfile.open(archive) as tar:
        tar.extractall(directory, filter="data")
    sys.path.insert(0, str(directory))
    sys.meta_path.insert(0, _Others((directory / KEPT_NAMES).read_text().split()))
    missing_modules.install((directory / NAMES).read_text().split())
    if not torch.cuda.is_available():
        pretend()
        return
    missing_modules.replace(EXTENSIONS)
    from vllm import platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform

    platforms._current_platform = NonNvmlCudaPlatform()


def pretend() -> None:
    """Have vLLM see a GPU where there is none; its DeepGEMM is a product in float32."""
    from tests.engines import pretended_gpu, triton_on_cpu

    triton_on_cpu.mend()
    pretended_gpu.pretend(*map(int, os.environ.get("PRETENDED_GPU", "9.0").split(".")))
