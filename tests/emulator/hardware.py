"""What an H100 answers, recorded, for the emulator to be held against where there is no GPU.

    python -m tests.emulator.hardware record tests/emulator/vectors/sm_90a.npz

runs every probe and the quantizer's kernels for sm_90a on the GPU. Inputs are computed, not
stored, and of results most is kept as checksums: one for each ``probes.CHUNK`` inputs, one for
each row of q. The first results of each probe, those of its corner cases, are kept whole, and all
results of ex2 and rsqrt: those are compared by distance, for which checksums do not do. It prints
where the emulator differs; what it records is the hardware's.
"""

from __future__ import annotations

import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cute_quant import DEEP_GEMM, DEEP_GEMM_SM90, MXFP8, ROWWISE_INT8, quantize
from cute_quant.contract.formats import Format
from cute_quant.emulator import machine, ptx
from cute_quant.emulator.memory import Memory
from tests.emulator import probes
from tests.helpers import (
    poisoned_scales,
    poisoned_values,
    storage_bits,
)
from tests.kernels.cases import DTYPES, EVERY_FORMAT

ARCH = "sm_90a"
RECORDING = Path(__file__).parent / "vectors" / f"{ARCH}.npz"
WHOLE = 64  # results of a probe that are kept, beside the checksums
WHOLE_ROWS = 2  # rows of q
APPROXIMATION_ULPS = 2
"""How far approximations may be from the exact result, rounded. PTX ISA 9.7.3 promises 2 units in
the last place of ex2; of rsqrt it bounds the relative error, by about as much."""
MN, K, EXTRA_ROWS = 131, 640, 3

CONFIGURATIONS = [(dtype, fmt) for dtype in DTYPES for fmt in EVERY_FORMAT]
CONFIGURATIONS += [
    (torch.float32, MXFP8.replace(values=torch.float8_e5m2)),
    (torch.float32, DEEP_GEMM_SM90),
    (torch.bfloat16, DEEP_GEMM_SM90.replace(group_size=16, values=torch.int8, round_scale=True)),
    (torch.float16, ROWWISE_INT8),
    (
        torch.bfloat16,
        DEEP_GEMM.replace(scale_layout="row_major", group_size=256, values=torch.float8_e5m2),
    ),
]


def configuration_id(dtype: torch.dtype, fmt: Format) -> str:
    return f"{str(dtype).removeprefix('torch.')}-{fmt}"


@dataclass(frozen=True)
class Result:
    """What is kept of an array of results: checksums of parts, and the first parts whole."""

    checksums: np.ndarray
    whole: np.ndarray

    @classmethod
    def of(cls, data: np.ndarray, rows_per_checksum: int, whole: int) -> Result:
        parts = data.reshape(-1, rows_per_checksum, data.shape[1])
        checksums = [zlib.crc32(np.ascontiguousarray(part).tobytes()) for part in parts]
        return cls(np.array(checksums, np.uint32), data[:whole].copy())


def probe_result(probe: probes.Probe, outputs: np.ndarray) -> Result:
    return Result.of(outputs, probes.CHUNK, len(outputs) if probe.approximate else WHOLE)


def differ(probe: probes.Probe, outputs: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Which results, rows of two words, are not the expected ones."""
    if not probe.approximate:
        return (outputs != expected).any(1)
    nan = [
        np.isnan(a[:, 0].view(np.float32)) for a in map(np.ascontiguousarray, (outputs, expected))
    ]
    distance = np.abs(_ordinals(outputs[:, 0]) - _ordinals(expected[:, 0]))
    near = np.where(nan[0] | nan[1], nan[0] & nan[1], distance <= APPROXIMATION_ULPS)
    return ~near | (outputs[:, 1:] != expected[:, 1:]).any(1)


def _ordinals(words: np.ndarray) -> np.ndarray:
    """Numbers that count float32 from zero, without subnormal ones: those are flushed."""
    magnitude = np.maximum((words & 0x7FFFFFFF).astype(np.int64) - 0x7FFFFF, 0)
    return np.where(words >> 31, -magnitude, magnitude)


def kernel_input(dtype: torch.dtype) -> torch.Tensor:
    """Rows of random bits: as they are, only finite ones, and magnitudes near each other."""
    name = configuration_id(dtype, EVERY_FORMAT[0])
    words = probes.words(name, MN * K).reshape(MN, K)
    if dtype == torch.float32:
        exponent, nearby, one = 0x7F800000, 0x07800000, 0x30000000
        bits = words
    else:
        exponent = 0x7F80 if dtype == torch.bfloat16 else 0x7C00
        nearby, one = 0x0F80 & exponent, 0x3000
        bits = (words & 0xFFFF).astype(np.uint16)
    exponent, nearby, one = (bits.dtype.type(v) for v in (exponent, nearby, one))
    finite = np.where(bits & exponent == exponent, bits ^ exponent, bits)
    bits[1::4] = finite[1::4]
    bits[2::4] = bits[2::4] & ~exponent | one | bits[2::4] & nearby
    bits[3::4] = bits[3::4] & ~exponent | exponent >> bits.dtype.type(1) & exponent
    signed = {2: np.int16, 4: np.int32}[bits.itemsize]
    return torch.from_numpy(bits.view(signed)).clone().view(dtype)  # aligned as torch does it


def run_kernel(function, dtype: torch.dtype, fmt: Format, device: str) -> dict[str, Result]:
    """Call ``function(x, q, sf, fmt)`` on poisoned results."""
    q = poisoned_values(MN + EXTRA_ROWS, K, device, fmt.values)
    sf = poisoned_scales(fmt, MN, K, device)
    function(kernel_input(dtype).to(device), q, sf, fmt)
    values = storage_bits(q).numpy().reshape(MN + EXTRA_ROWS, K)
    scales = storage_bits(sf).numpy().reshape(1, -1)
    return {"q": Result.of(values, 1, WHOLE_ROWS), "sf": Result.of(scales, 1, 1)}


def emulate_probe(probe: probes.Probe) -> np.ndarray:
    text = probes.module([probe])
    program = machine.Program(ptx.parse(text)[probe.name])
    memory = Memory()
    inputs = torch.from_numpy(probe.inputs.view(np.int32))
    outputs = torch.empty(len(probe.inputs), 2, dtype=torch.int32)
    arguments = [
        memory.add(name, tensor, name == "inputs").to_bytes(8, "little")
        for name, tensor in (("inputs", inputs), ("outputs", outputs))
    ]
    grid = (len(probe.inputs) // probes.THREADS, 1, 1)
    machine.run(program, grid, (probes.THREADS, 1, 1), arguments, memory)
    return outputs.numpy().view(np.uint32)


class Gpu:
    """The current CUDA device."""

    def __init__(self, chosen: list[probes.Probe]):
        from cuda.bindings import driver

        capability = torch.cuda.get_device_capability()
        if capability != (9, 0):
            raise RuntimeError(f"expected a GPU of compute capability 9.0, got {capability}")
        self._driver = driver
        torch.zeros(1, device="cuda")  # makes the primary context current
        (self._module,) = self._call("cuModuleLoadData", probes.module(chosen).encode() + b"\0")

    def _call(self, name: str, *arguments) -> tuple:
        status, *results = getattr(self._driver, name)(*arguments)
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{name}: {status!r}")
        return tuple(results)

    def probe(self, probe: probes.Probe) -> np.ndarray:
        (function,) = self._call("cuModuleGetFunction", self._module, probe.name.encode())
        inputs = torch.from_numpy(probe.inputs.view(np.int32)).cuda()
        outputs = torch.zeros(len(probe.inputs), 2, dtype=torch.int32, device="cuda")
        torch.cuda.synchronize()
        values = [np.array([t.data_ptr()], np.uint64) for t in (inputs, outputs)]
        pointers = np.array([v.ctypes.data for v in values], np.uint64)
        grid = len(probe.inputs) // probes.THREADS
        stream = self._driver.CUstream(0)
        shape = (grid, 1, 1, probes.THREADS, 1, 1, 0)
        self._call("cuLaunchKernel", function, *shape, stream, pointers.ctypes.data, 0)
        torch.cuda.synchronize()
        return outputs.cpu().numpy().view(np.uint32)

    def kernel(self, dtype: torch.dtype, fmt: Format) -> dict[str, Result]:
        def call(x: torch.Tensor, q: torch.Tensor, sf: torch.Tensor, fmt: Format) -> None:
            quantize(x, fmt, out=(q, sf))
            torch.cuda.synchronize()

        return run_kernel(call, dtype, fmt, "cuda")


def save(path: Path, results: dict[str, Result], **facts: str) -> None:
    """A few arrays for all results: an entry of an npz costs more than a probe's checksums."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = [r.whole.astype(np.uint32) for r in results.values()]
    np.savez_compressed(
        path,
        names=np.array(list(results)),
        checksums=np.concatenate([r.checksums for r in results.values()]),
        checksum_counts=np.array([len(r.checksums) for r in results.values()], np.uint32),
        whole=np.concatenate([w.ravel() for w in whole]),
        whole_shapes=np.array([w.shape for w in whole], np.uint32),
        **{key: np.array(value) for key, value in facts.items()},
    )


def load(path: Path = RECORDING) -> dict[str, Result]:
    with np.load(path, allow_pickle=False) as file:
        ends = np.cumsum(file["checksum_counts"])
        checksums = np.split(file["checksums"], ends[:-1])
        shapes = file["whole_shapes"]
        whole = np.split(file["whole"], np.cumsum(shapes.prod(1))[:-1])
        return {
            str(name): Result(c, w.reshape(shape))
            for name, c, w, shape in zip(file["names"], checksums, whole, shapes, strict=True)
        }


def report_differences(probe: probes.Probe, outputs: np.ndarray) -> None:
    """Print where the emulator computes something else: the recording cannot say it later."""
    emulated = emulate_probe(probe)
    places = np.flatnonzero(differ(probe, outputs, emulated))
    if len(places):
        print(f"{probe.name}: the emulator differs on {len(places)} of {len(outputs)} inputs")
    for at in places[:: max(1, len(places) // 8)][:8]:
        hexadecimal = [
            " ".join(f"{word:08x}" for word in a[at]) for a in (probe.inputs, outputs, emulated)
        ]
        print("    inputs {}  hardware {}  emulator {}".format(*hexadecimal))


def record(path: Path) -> None:
    chosen = probes.probes()
    gpu = Gpu(chosen)
    results = {}
    for probe in chosen:
        outputs = gpu.probe(probe)
        results[probe.name] = probe_result(probe, outputs)
        report_differences(probe, outputs)
    save(path, results, device=torch.cuda.get_device_name())
    print(f"{len(results)} probes")
    for dtype, fmt in CONFIGURATIONS:
        name = configuration_id(dtype, fmt)
        results |= {f"{name}.{key}": value for key, value in gpu.kernel(dtype, fmt).items()}
        print(name)
    save(path, results, device=torch.cuda.get_device_name())
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "record":
        sys.exit(__doc__)
    record(Path(sys.argv[2]))
