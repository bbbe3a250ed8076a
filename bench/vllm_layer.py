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
import os
import tempfile
import timeit
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from bench import vllm_archive
from cute_quant.lab import timing

LAYERS = (
    "vllm.model_executor.layers.quantization.input_quant_fp8",
    "vllm.model_executor.layers.quantization.utils.fp8_utils",
    "vllm.model_executor.kernels.linear.scaled_mm.deep_gemm",
    "vllm.plugins",
    "vllm.platforms.cuda",
    "vllm.utils.deep_gemm",
)


class Weights(NamedTuple):
    """Weights of a linear layer, which both layers read: the cache has one copy of them.

    Attributes:
        exact: (n, k), float32.
        quantized: as vLLM's layer has them.
    """

    exact: torch.Tensor
    quantized: SimpleNamespace


def random_weights(n: int, k: int, device: torch.device) -> Weights:
    """Return weights in FP8, in blocks of 128 x 128."""
    from cute_quant import DEEP_GEMM_SM90, quantize_blocks

    w = torch.randn(n, k, device=device) / k**0.5
    w8, scales = quantize_blocks(w, DEEP_GEMM_SM90.replace(round_scale=True))
    attributes = {"weight": w8, "weight_scale_inv": scales, "weight_block_size": [128, 128]}
    return Weights(w, SimpleNamespace(**attributes))


class Layer:
    """DeepGEMM's kernel of vLLM for a linear layer.

    Attributes:
        quantize: its quantizer, under torch.compile where vLLM compiles it.
        apply: the layer.
    """

    def __init__(self, weights: Weights) -> None:
        from vllm.config import vllm as config
        from vllm.config.compilation import CompilationMode
        from vllm.model_executor.kernels.linear.scaled_mm import deep_gemm
        from vllm.model_executor.layers.quantization.utils import quant_utils

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
            weight_shape=tuple(weights.exact.shape),
            input_dtype=torch.bfloat16,
            out_dtype=torch.bfloat16,
        )
        kernel = deep_gemm.DeepGemmFp8BlockScaledMMKernel(kernel_config)
        self.quantize: Callable[[torch.Tensor], Any] = kernel.quant_fp8
        self.quantizer = type(kernel.quant_fp8).__module__
        self.apply: Callable[[torch.Tensor], torch.Tensor] = lambda x: kernel.apply_weights(
            weights.quantized, x
        )


def run(options: argparse.Namespace) -> None:
    """Print times of the layer and of its quantizer, for each number of rows."""
    device = torch.device(options.device)
    with tempfile.TemporaryDirectory() as directory:
        vllm_archive.load(options.archive, Path(directory))
        for name in LAYERS:
            importlib.import_module(name)
        from cute_quant.integrations.engines.vllm import ENGINE

        weights = random_weights(options.n, options.k, device)
        layers = {"vLLM": Layer(weights)}
        os.environ["CUTE_QUANT_VLLM"] = "linear,group_quant,packed"
        ENGINE.install()
        ENGINE.import_all()
        print(ENGINE.summary())
        layers["cute_quant"] = Layer(weights)
        for name, layer in layers.items():
            print(f"{name}: QuantFP8 of {layer.quantizer}")
        print("| rows | of | vLLM, us | cute_quant, us | vLLM / cute_quant |")
        print("| ---: | --- | ---: | ---: | ---: |")
        for rows in options.rows:
            x = torch.randn(rows, options.k, device=device).to(torch.bfloat16)
            for name, layer in layers.items():
                y = layer.apply(x)
                expected = x.float() @ weights.exact.mT
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
            vllm_archive.pretend()
        vllm_archive.pack(options.archive, LAYERS)
    else:
        run(options)


if __name__ == "__main__":
    main()
