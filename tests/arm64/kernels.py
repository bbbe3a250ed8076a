"""Call kernels of a directory built ahead of time where there is neither a GPU nor CuTe DSL.

    python -m tests.arm64.kernels record RECORDS         # where CuTe DSL is
    python -m tests.arm64.kernels call DIRECTORY RECORDS

The directory is loaded as on a server, its runtime library too. Before it a stand-in is loaded,
which the objects then call CUDA through: it hands the launches to the emulator, which runs the PTX
that was recorded, and checks that the objects hold the machine code compiled from it.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import cute_quant
from cute_quant import DEEP_GEMM
from cute_quant.contract.calls import Call
from cute_quant.contract.rows import Masked
from cute_quant.dispatch import launch
from cute_quant.emulator import EmulatedKernel, host
from cute_quant.emulator.host import HostFunction
from cute_quant.emulator.kernel import load
from cute_quant.jit import keys, lookup
from cute_quant.kernels.config import Domain, QuantizeSpec, Spec
from tests import oracle
from tests.helpers import (
    assert_same_bits,
    poisoned_scales,
    poisoned_values,
    random_bits,
    storage_bits,
)

ARCHITECTURES = ("sm_100a", "sm_90a")
SPECS = (
    QuantizeSpec(torch.bfloat16, DEEP_GEMM),
    QuantizeSpec(torch.bfloat16, DEEP_GEMM, domain=Domain(Masked.kind, batched=True)),
)
NAMES = tuple(map(keys.spec_name, SPECS))
SIZES = ((1, 128), (5, 512), (33, 640))
"""Rows and columns of what is quantized."""
EXPERTS = 3
H100_SMS = 132


def record(records: Path) -> None:
    """Write PTX and machine code of each kernel."""
    records.mkdir()
    for spec in SPECS:
        for arch in ARCHITECTURES:
            with tempfile.TemporaryDirectory() as dumped:
                options = ("--keep-ptx", "--keep-cubin", f"--dump-dir {dumped}")
                compiled = lookup.build(lookup.kernel(spec), arch, *options)
                name = stem(spec, arch)
                (records / f"{name}.ptx").write_text(compiled.__ptx__)
                (records / f"{name}.cubin").write_bytes(compiled.__cubin__)


class OnGpu(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = True
    __torch_function__ = torch._C._disabled_torch_function_impl


class LoadedFunction(HostFunction):
    """A function of a loaded object, which calls CUDA through a stand-in that others share."""

    def __init__(self, function: Callable[..., None], runtime: ctypes.CDLL, cubin: bytes):
        self.cubin = cubin
        self.launches = []
        self.error = None
        self._lock = threading.Lock()
        self._callbacks = host._LOAD(self._loaded), host._LAUNCH(self._launched)
        self._library = runtime
        self._function = function

    def __call__(self, *arguments: Any, **options: Any) -> None:
        self._library.emulator_connect(*self._callbacks)
        super().__call__(*arguments, **options)


class LoadedKernel(EmulatedKernel):
    """A function of a loaded object and the PTX that its launches run."""

    def __init__(self, function: Callable[..., None], runtime: ctypes.CDLL, recorded: Path):
        self.text = recorded.with_suffix(".ptx").read_text()
        self.program = load(self.text)
        cubin = recorded.with_suffix(".cubin").read_bytes()
        self.host = LoadedFunction(function, runtime, cubin)

    def __call__(self, *arguments: Any, **options: Any) -> None:
        self.names = [f"operand {i}" for i in range(len(arguments))]
        super().__call__(*arguments, **options)


def call(directory: Path, records: Path) -> None:
    """Quantize with every kernel of a directory, and compare every byte with the oracle."""
    runtime = _load_stand_in()
    # What is not in the directory must not be compiled.
    sys.modules["cutlass"] = None  # type: ignore[assignment]
    cute_quant.load(directory)
    count = 0
    for arch in ARCHITECTURES:
        for spec in SPECS:
            recorded = records / f"{stem(spec, arch)}.ptx"
            kernel = LoadedKernel(lookup.function(spec, arch), runtime, recorded)
            for mn, k in SIZES:
                _check_call(kernel, spec, arch, mn, k)
                count += 1
            assert len(kernel.host.launches) == len(SIZES)
    print(f"{count} calls of {len(ARCHITECTURES) * len(SPECS)} kernels, every byte the oracle's")


def _load_stand_in() -> ctypes.CDLL:
    """Load the stand-in for the CUDA runtime, whose symbols come before those of the real one."""
    source = Path(host.__file__).with_name("runtime.c")
    with tempfile.TemporaryDirectory() as directory:
        library = Path(directory) / "runtime.so"
        options = ["-shared", "-fPIC", "-O1", "-o", library]
        subprocess.run([str(host.C_COMPILER), *options, source], check=True)
        return ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


def _check_call(kernel: LoadedKernel, spec: Spec, arch: str, mn: int, k: int) -> None:
    """Quantize with a kernel that the package has to choose by itself."""
    batch = (EXPERTS,) if spec.domain.batched else ()
    x = random_bits((*batch, mn, k), torch.bfloat16, seed=mn)
    rows = Masked(torch.tensor([mn, 0, mn // 2], dtype=torch.int32)) if batch else None
    (q, sf), expected = (
        (
            poisoned_values(mn, k, "cpu", batch_shape=batch),
            poisoned_scales(DEEP_GEMM, mn, k, "cpu", batch_shape=batch),
        )
        for _ in range(2)
    )
    reads = {t.data_ptr() for t in (x, *(() if rows is None else [rows.data]))}

    def function(chosen: Spec, chosen_arch: str) -> Callable[..., None]:
        assert (chosen, chosen_arch) == (spec, arch)
        return run

    def run(*operands: Any) -> None:
        tensors = [t for t in operands if isinstance(t, torch.Tensor)]
        kernel(*operands, outputs=[t for t in tensors if t.data_ptr() not in reads])

    with (
        mock.patch.multiple(
            lookup,
            architecture=lambda device: arch,
            multiprocessors=lambda device: H100_SMS,
            function=function,
        ),
        mock.patch.object(launch, "_plans", {}),
    ):
        launch.quantize(Call(x.as_subclass(OnGpu), DEEP_GEMM, q, sf, rows))
    oracle.quantize_into(x, *expected, DEEP_GEMM, rows)
    assert_same_bits(q, expected[0])
    assert torch.equal(storage_bits(sf), storage_bits(expected[1]))


def stem(spec: Spec, arch: str) -> str:
    return f"{keys.spec_name(spec)}-{arch}"


if __name__ == "__main__":
    command, *paths = sys.argv[1:]
    {"record": record, "call": call}[command](*map(Path, paths))
