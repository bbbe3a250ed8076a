"""Compile vLLM's quantizers for CUDA from its sources, as operators under their own names.

The extensions of vLLM's wheel are hundreds of megabytes; the quantizers alone compile in a minute.
"""

from __future__ import annotations

import concurrent.futures
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

SOURCES = (
    "quantization/w8a8/fp8/per_token_group_quant.cu",
    "quantization/w8a8/fp8/common.cu",
    "quantization/activation_kernels.cu",
    "quantization/fused_kernels/fused_silu_mul_block_quant.cu",
    "quantization/fused_kernels/fused_layernorm_dynamic_per_token_quant.cu",
)
OPERATORS = (
    "per_token_group_fp8_quant",
    "per_token_group_fp8_quant_packed",
    "per_token_group_quant_int8",
    "dynamic_per_token_scaled_fp8_quant",
    "persistent_masked_m_silu_mul_quant",
    "silu_and_mul_per_block_quant",
    "rms_norm_per_block_quant",
)
BINDINGS, DECLARATIONS = "torch_bindings.cpp", "ops.h"

INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
DEFINITION = re.compile(r'ops\.def\(\s*((?:"[^"]*"\s*)+)\);')
REGISTRATION = re.compile(r'ops\.impl\(\s*"(\w+)",\s*TORCH_BOX\(&(\w+)\)\)')


def files(csrc: Path) -> Iterator[Path]:
    """Return the files under vLLM's `csrc` that the operators are compiled from."""
    waiting, found = [csrc / name for name in (*SOURCES, BINDINGS, DECLARATIONS)], set()
    while waiting:
        path = waiting.pop().resolve()
        if path in found:
            continue
        found.add(path)
        yield path
        if path.name != BINDINGS:
            names = INCLUDE.findall(path.read_text())
            near = (directory / name for name in names for directory in (path.parent, csrc))
            waiting += [other for other in near if other.is_file()]


def bindings(text: str, operators: Sequence[str] = OPERATORS) -> str:
    """Return the source that registers some of the operators of vLLM's bindings.

    Raises:
        ValueError: the bindings have no such operator.
    """
    schemas = ("".join(re.findall('"([^"]*)"', found)) for found in DEFINITION.findall(text))
    definitions = {schema.partition("(")[0]: schema for schema in schemas}
    functions = dict(REGISTRATION.findall(text))
    missing = sorted(set(operators) - (definitions.keys() & functions.keys()))
    if missing:
        raise ValueError(f"operators: vLLM's {BINDINGS} has no {', '.join(missing)}")
    lines = [f'#include "{DECLARATIONS}"', "#include <torch/csrc/stable/library.h>"]
    lines += ["STABLE_TORCH_LIBRARY_FRAGMENT(_C, ops) {"]
    lines += [f'  ops.def("{definitions[name]}");' for name in operators]
    lines += ["}", "STABLE_TORCH_LIBRARY_IMPL(_C, CUDA, ops) {"]
    lines += [f'  ops.impl("{name}", TORCH_BOX(&{functions[name]}));' for name in operators]
    return "\n".join([*lines, "}", ""])


def build(csrc: Path, directory: Path, arch: str) -> Path:
    """Compile the operators into a library, which ``torch.ops.load_library`` takes.

    Args:
        csrc: vLLM's directory of sources.
        directory: for the library and what it is linked from.
        arch: of the GPU, such as "90a".

    Raises:
        RuntimeError: nvcc is missing, or fails.
    """
    packages = Path(torch.__file__).parent.parent
    of_packages = map(str, packages.glob("nvidia/cu*/bin/nvcc"))
    places = ("nvcc", "/usr/local/cuda/bin/nvcc", *of_packages)
    nvcc = next(filter(None, (shutil.which(place) for place in places)), None)
    if nvcc is None:
        raise RuntimeError("nvcc is missing")
    registered = directory / "bindings.cpp"
    registered.write_text(bindings((csrc / BINDINGS).read_text()))
    torch_headers = Path(torch.__file__).parent / "include"
    major, minor = (int(word) for word in torch.__version__.split(".")[:2])
    cuda_headers = sorted(packages.glob("nvidia/cu*/include"))
    headers = (csrc, torch_headers, torch_headers / "torch/csrc/api/include", *cuda_headers)
    options = (
        *("-O3", "-std=c++17", "-Xcompiler=-fPIC", "-DUSE_CUDA", "-DENABLE_FP8"),
        *("--expt-relaxed-constexpr", "--expt-extended-lambda"),
        f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000",
        f"-gencode=arch=compute_{arch},code=sm_{arch}",
        *(f"-I{path}" for path in headers),
    )

    def compile_one(path: Path) -> Path:
        target = directory / f"{path.stem}.o"
        _run(nvcc, "-c", *options, str(path), "-o", str(target))
        return target

    sources = [registered, *(csrc / name for name in SOURCES)]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    library = directory / "vllm_quantizers.so"
    libraries = ("-ltorch", "-ltorch_cpu", "-ltorch_cuda", "-lc10")
    where = f"-L{torch_headers.parent / 'lib'}"
    _run(nvcc, "-shared", *map(str, objects), where, *libraries, "-o", str(library))
    return library


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-12:])
        raise RuntimeError(f"{' '.join(command[:2])} {command[-3]}: {last}")
