"""A model in vLLM on Hopper, with the plug-in and without: times of its steps, and its tokens.

The model has the layers of Qwen3-8B, fewer of them, with random weights in blocks of 128 x 128. It
runs as vLLM runs it by default: compiled, in CUDA graphs, with vLLM's own kernels and DeepGEMM. An
archive is packed where vLLM is installed, for a machine that has torch, transformers and DeepGEMM
in the same version of Python:

    python -m bench.vllm_model pack model.tar.xz
    python -m bench.vllm_model run model.tar.xz

A step of decoding is one token of each sequence. Its graph is what of it runs on the GPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench import fatbin
from cute_quant.lab import timing

EXTENSIONS = ("vllm/_C_stable_libtorch.abi3.so", "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so")
DISTRIBUTIONS = """
    vllm annotated-types blake3 cachetools cbor2 compressed-tensors depyf fastapi httpcore2 httpx2
    llguidance loguru msgspec openai openai-harmony opentelemetry-api opentelemetry-sdk
    opentelemetry-semantic-conventions partial-json-parser pybase64 pydantic pydantic-core pyzmq
    setproctitle sniffio starlette truststore typing-inspection xgrammar
"""
"""vLLM and what it imports, without what torch and transformers bring."""
HEAD_SIZE, VOCABULARY = 128, 32768
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": HEAD_SIZE,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "quantization_config": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
}
SEQUENCES, STEPS, PROMPT, PREFILL = (1, 64), 33, 64, 4096
REPEATS = 10
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_DEEP_GEMM_WARMUP": "skip",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "HF_HUB_OFFLINE": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}


def pack(archive: Path) -> None:
    """Write vLLM and what it imports, with the code of its extensions for Hopper."""
    with tempfile.TemporaryDirectory() as name, tarfile.open(archive, "w:xz", preset=6) as tar:
        for place, path in _files():
            if place in EXTENSIONS:
                fatbin.shrink(path, Path(name, "code"), 90, _is_needed)
                path = Path(name, "code")
            tar.add(path, place)
    print(f"{archive}: {archive.stat().st_size / 2**20:.1f} MiB")


def _files() -> Iterator[tuple[str, Path]]:
    for name in DISTRIBUTIONS.split():
        for file in importlib.metadata.files(name) or ():
            code = name != "vllm" or file.suffix == ".py" or "dist-info" in file.parts[0]
            outside = file.parts[0] == ".." or file.suffix == ".pyc"
            if not outside and (code or str(file) in EXTENSIONS):
                yield str(file), Path(str(file.locate()))


def _is_needed(code: bytes) -> bool:
    """Return whether code is not that of attention, or is that of bf16 heads of this model."""
    head = rb"ELi%dENS_\d+bfloat16_tEf" % HEAD_SIZE
    return b"FlashAttnFwdSm90" not in code or re.search(head, code) is not None


_generators: dict[torch.device, torch.Generator] = {}
"""Random numbers of their own: the plug-in may draw others."""


def random_weight(param: torch.Tensor, *, name: str) -> None:
    """Fill a weight so that each layer's output has the magnitude of its input."""
    device = param.device
    generator = _generators.setdefault(device, torch.Generator(device).manual_seed(0))
    if param.dtype == torch.float8_e4m3fn:
        values = torch.randn(param.shape, generator=generator, device=device)
        param.data.copy_((100 * values).clamp(-448, 448))
    elif param.dim() < 2:
        param.data.fill_(1)
    elif "scale" in name:
        param.data.uniform_(0.5, 1.5, generator=generator)
        param.data.mul_(0.01 * (128 * param.shape[1]) ** -0.5)
    else:
        param.data.normal_(std=param.shape[1] ** -0.5, generator=generator)


def measure(directory: Path) -> None:
    """Print, as JSON, seconds of steps, and the first tokens with their logarithms."""
    from cute_quant.integrations.engines.vllm import ENGINE, install

    install()
    from vllm import LLM, SamplingParams
    from vllm.model_executor.model_loader import dummy_loader

    dummy_loader.initialize_single_dummy_weight = random_weight
    replayed: list[torch.cuda.CUDAGraph] = []
    replay = torch.cuda.CUDAGraph.replay

    def noted(graph: torch.cuda.CUDAGraph) -> None:
        replayed.append(graph)
        replay(graph)

    torch.cuda.CUDAGraph.replay = noted  # type: ignore[method-assign,assignment]
    llm = LLM(
        model=str(directory),
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=PREFILL + PROMPT,
        max_num_batched_tokens=PREFILL,
        max_num_seqs=max(SEQUENCES),
        gpu_memory_utilization=0.5,
        enable_prefix_caching=False,
        compilation_config={"cudagraph_capture_sizes": [*SEQUENCES]},
    )
    print(ENGINE.summary())
    for takeover in ENGINE.takeovers:
        if takeover.counter.calls or takeover.counter.traced:
            print(takeover.key, takeover.counter)

    def generate(sequences: int, length: int, tokens: int) -> tuple[float, Any]:
        numbers = torch.Generator().manual_seed(0)
        ids = torch.randint(VOCABULARY, (sequences, length), generator=numbers)
        prompts = [{"prompt_token_ids": row} for row in ids.tolist()]
        options = {"ignore_eos": True, "detokenize": False, "logprobs": 0 if tokens == 1 else None}
        params = SamplingParams(temperature=0, max_tokens=tokens, **options)
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start, outputs

    def seconds(*sizes: int) -> float:
        return statistics.median([generate(*sizes)[0] for _ in range(REPEATS)][1:])

    found: dict[str, float] = {}
    for n in SEQUENCES:
        several, one = seconds(n, PROMPT, STEPS), seconds(n, PROMPT, 1)
        found[f"decode, {n}"] = (several - one) / (STEPS - 1)
        replayed.clear()
        generate(n, PROMPT, STEPS)
        if len(replayed) > 1 and replayed[-1] is replayed[-2]:
            graph = timing.Graph(replayed[-1], 1, ())
            found[f"decode, {n}, its graph"] = timing.median_seconds({n: graph})[n]
    found[f"prefill, {PREFILL}"] = seconds(1, PREFILL, 1)
    first = [output.outputs[0] for output in generate(max(SEQUENCES), PROMPT, 1)[1]]
    tokens = [output.token_ids[0] for output in first]
    logprobs = [output.logprobs[0][output.token_ids[0]].logprob for output in first]
    print(json.dumps({"seconds": found, "tokens": tokens, "logprobs": logprobs}))


def run(options: argparse.Namespace) -> None:
    """Print a table of steps, from a process with the plug-in and one without."""
    results = []
    with tempfile.TemporaryDirectory() as directory:
        with tarfile.open(options.archive) as tar:
            tar.extractall(directory, filter="data")
        config = CONFIG | {"num_hidden_layers": options.layers}
        Path(directory, "config.json").write_text(json.dumps(config))
        path = os.pathsep.join(filter(None, (directory, os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", "bench.vllm_model", "measure", directory]
        for selected in ("0", options.select):
            own = {"CUTE_QUANT_VLLM": selected, "PYTHONPATH": path}
            environment = SETTINGS | os.environ | own
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
            print(done.stdout, flush=True)
            done.check_returncode()
            results.append(json.loads(done.stdout.splitlines()[-1]))
    theirs, ours = results
    print("| step | vLLM, us | cute_quant, us | vLLM / cute_quant |")
    print("| --- | ---: | ---: | ---: |")
    for step in [s for s in theirs["seconds"] if s in ours["seconds"]]:
        a, b = (1e6 * result["seconds"][step] for result in results)
        print(f"| {step} | {a:.0f} | {b:.0f} | {a / b:.2f} |")
    pairs = [zip(r["tokens"], r["logprobs"], strict=True) for r in results]
    off = [abs(a - b) for (i, a), (j, b) in zip(*pairs, strict=True) if i == j]
    print(f"first tokens: {len(off)} of {len(theirs['tokens'])} are equal", end="")
    print(f", their logarithms differ by {max(off):.4f} at most" if off else "")


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.vllm_model", description=__doc__)
    parser.add_argument("command", choices=("pack", "run", "measure"))
    parser.add_argument("archive", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--select", default="all", help="what CUTE_QUANT_VLLM selects")
    options = parser.parse_args()
    if options.command == "pack":
        pack(options.archive)
    elif options.command == "run":
        run(options)
    else:
        measure(options.archive)


if __name__ == "__main__":
    main()
