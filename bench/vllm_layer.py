"""A linear layer of vLLM on a GPU, with the plug-in and without.

vLLM's Python files are enough: of its extensions and of most that it imports only names are needed.
They come as an archive that a machine with vLLM packs:

    python -m bench.vllm_layer pack vllm.tar.xz
    python -m bench.vllm_layer run vllm.tar.xz

Without a GPU both run on one that is pretended, `run` with ``--device cpu``.

The layer is DeepGEMM's, with FP8 weights in blocks of 128 x 128. Without the plug-in its quantizer
is what vLLM has under torch.compile, its own code in torch, compiled by Inductor.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.abc
import importlib.metadata
import io
import os
import sys
import tarfile
import tempfile
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from bench import missing_modules
from cute_quant.lab import timing

LAYERS = (
    "vllm.model_executor.layers.quantization.input_quant_fp8",
    "vllm.model_executor.layers.quantization.utils.fp8_utils",
    "vllm.model_executor.kernels.linear.scaled_mm.deep_gemm",
    "vllm.plugins",
    "vllm.platforms.cuda",
    "vllm.utils.deep_gemm",
)
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
"""Modules of vLLM, or packages with all of their modules, that the layer runs. Of others it imports
names alone, of which stand-ins are enough."""
PACKED = ("vllm", "packaging")
NAMES = "third_party.txt"
"""In the archive: the packages that vLLM imported, of which only names are needed."""


class _Others(importlib.abc.MetaPathFinder):
    """Finds, as the first one, stand-ins for the modules of vLLM that are not kept."""

    def find_spec(self, name: str, path: object, target: object = None) -> Any:
        if name == "vllm" or not name.startswith("vllm.") or _is_kept(name):
            return None
        return missing_modules.spec_of_stand_in(name)


def _is_kept(name: str) -> bool:
    """Return whether a module is kept, or has one in it that is."""
    return any(f"{name}.".startswith(f"{k}.") or f"{k}.".startswith(f"{name}.") for k in KEPT)


def pack(archive: Path) -> None:
    """Write the Python files of vLLM that the layer imports, and those of `packaging`."""
    sys.meta_path.insert(0, _Others())
    for name in LAYERS:
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
    others = sorted(imported - sys.stdlib_module_names - brought)
    files = {path for path in _files(root) if path.is_file()}
    with tarfile.open(archive, "w:xz", preset=9) as tar:
        for path in sorted(files):
            tar.add(path, path.relative_to(root))
        version = importlib.metadata.version("vllm")
        metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        _add_text(tar, f"vllm-{version}.dist-info/METADATA", metadata)
        _add_text(tar, NAMES, "\n".join(others))
    whole = sum(path.stat().st_size for path in files)
    packed = archive.stat().st_size
    print(f"{len(files)} files, {whole / 2**20:.2f} MiB, packed {packed / 2**20:.2f} MiB")


def _files(root: Path) -> Iterator[Path]:
    """Return the files of the modules that are kept, and of the packages that they are in."""
    for name in ("packaging", *KEPT):
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
    sys.meta_path.insert(0, _Others())
    missing_modules.install((directory / NAMES).read_text().split())
    if not torch.cuda.is_available():
        _pretend()
        return
    missing_modules.replace(EXTENSIONS)
    from vllm import platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform

    platforms._current_platform = NonNvmlCudaPlatform()


def _pretend() -> None:
    """Have vLLM see a GPU where there is none; its DeepGEMM is a product in float32."""
    from tests.engines.pretended_gpu import pretend

    pretend(*map(int, os.environ.get("PRETENDED_GPU", "9.0").split(".")))


class Layer:
    """DeepGEMM's kernel of vLLM for a linear layer, with its weights.

    Attributes:
        quantize: its quantizer, under torch.compile where vLLM compiles it.
        apply: the layer.
    """

    def __init__(self, n: int, k: int, *, device: torch.device) -> None:
        from vllm.config import vllm as config
        from vllm.config.compilation import CompilationMode
        from vllm.model_executor.kernels.linear.scaled_mm import deep_gemm
        from vllm.model_executor.layers.quantization.utils import quant_utils

        from cute_quant import DEEP_GEMM_SM90, quantize_blocks

        # As with the default optimization: Inductor compiles what vLLM has in torch.
        compilation = SimpleNamespace(
            custom_ops=["none"],
            enabled_custom_ops=set(),
            disabled_custom_ops=set(),
            mode=CompilationMode.VLLM_COMPILE,
            backend="inductor",
        )
        config._current_vllm_config = SimpleNamespace(compilation_config=compilation)
        kernel_config = SimpleNamespace(
            weight_quant_key=quant_utils.kFp8Static128BlockSym,
            activation_quant_key=quant_utils.kFp8Dynamic128Sym,
            weight_shape=(n, k),
            input_dtype=torch.bfloat16,
            out_dtype=torch.bfloat16,
        )
        kernel = deep_gemm.DeepGemmFp8BlockScaledMMKernel(kernel_config)
        w = torch.randn(n, k, device=device) / k**0.5
        w8, scales = quantize_blocks(w, DEEP_GEMM_SM90.replace(round_scale=True))
        weights = SimpleNamespace(weight=w8, weight_scale_inv=scales, weight_block_size=[128, 128])
        self.exact = w
        self.quantize: Callable[[torch.Tensor], Any] = kernel.quant_fp8
        self.quantizer = type(kernel.quant_fp8).__module__
        self.apply: Callable[[torch.Tensor], torch.Tensor] = lambda x: kernel.apply_weights(
            weights, x
        )


def run(options: argparse.Namespace) -> None:
    """Print times of the layer and of its quantizer, for each number of rows."""
    device = torch.device(options.device)
    with tempfile.TemporaryDirectory() as directory:
        load(options.archive, Path(directory))
        for name in LAYERS:
            importlib.import_module(name)
        from cute_quant.integrations.engines.vllm import ENGINE

        layers = {"vLLM": Layer(options.n, options.k, device=device)}
        os.environ["CUTE_QUANT_VLLM"] = "linear,group_quant,packed"
        ENGINE.install()
        ENGINE.import_all()
        print(ENGINE.summary())
        layers["cute_quant"] = Layer(options.n, options.k, device=device)
        for name, layer in layers.items():
            print(f"{name}: QuantFP8 of {layer.quantizer}")
        print("| rows | of | vLLM, us | cute_quant, us | vLLM / cute_quant |")
        print("| ---: | --- | ---: | ---: | ---: |")
        for rows in options.rows:
            x = torch.randn(rows, options.k, device=device).to(torch.bfloat16)
            for name, layer in layers.items():
                y = layer.apply(x)
                expected = x.float() @ layer.exact.mT
                error = ((y - expected).norm() / expected.norm()).item()
                if not error < 0.05:
                    raise RuntimeError(f"{name}, {rows} rows: the product is off by {error:.1%}")
            for part in ("quantize", "apply"):
                times = _times({name: getattr(layer, part) for name, layer in layers.items()}, x)
                ours, theirs = times["cute_quant"], times["vLLM"]
                print(
                    f"| {rows} | {part} | {1e6 * theirs:.2f} | {1e6 * ours:.2f} "
                    f"| {theirs / ours:.2f} |"
                )
        for takeover in ENGINE.takeovers:
            if takeover.counter.calls or takeover.counter.traced:
                print(takeover.key, takeover.counter)


def _times(calls: dict[str, Callable[[torch.Tensor], Any]], x: torch.Tensor) -> dict[str, float]:
    """Return the median seconds of calls in CUDA graphs; of one call each without a GPU."""
    bound = {name: functools.partial(call, x) for name, call in calls.items()}
    if not x.is_cuda:
        return {name: timeit.timeit(call, number=1) for name, call in bound.items()}
    timing.warm_up()
    return timing.median_seconds({name: timing.capture([call]) for name, call in bound.items()})


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.vllm_layer", description=__doc__)
    parser.add_argument("command", choices=("pack", "run"))
    parser.add_argument("archive", type=Path)
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--k", type=int, default=7168)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 1024, 4096])
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    if options.command == "pack":
        if not torch.cuda.is_available():
            _pretend()
        pack(options.archive)
    else:
        run(options)


if __name__ == "__main__":
    main()
