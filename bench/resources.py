"""Resources that bound a kernel, and the time that each needs, read from machine code.

A warp takes issue slots and cycles of pipes, moves bytes, and waits for results. `demands` counts
the first. `life` is the last: it replays the stalls and scoreboards that the assembler has encoded,
with the latencies of a GPU. By Little's law an SM moves the bytes of the warps that it holds once
in a life. Branches are not followed: what a warp skips counts, and a loop counts once.

A launch takes the gap between two dependent launches, the life of a warp, another one where CTAs
follow each other, and the longest of the times that the resources need.
"""

from __future__ import annotations

import collections
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cute_quant.contract.dtypes import ceil_div
from cute_quant.kernels import architectures
from cute_quant.kernels.architectures import B200, H100, SCHEDULERS_PER_SM, Gpu
from cute_quant.kernels.config import LANES
from cute_quant.lab.machine_code import MachineCode

ISSUE, ALU, FMA, CONVERT, MUFU, SHARED, MEMORY, IN_FLIGHT = (
    "issue slots",
    "ALU",
    "FMA",
    "conversions",
    "MUFU",
    "shared memory",
    "memory",
    "bytes in flight",
)
"""Resources. Shared memory is the pipe of shuffles and of global accesses too."""


class Machine(NamedTuple):
    """A GPU, but for its clock and bandwidth.

    Attributes:
        gpu: the GPU.
        arch: target of its kernels.
        sustained: share of the bandwidth that streams reach.
        l2_bytes: of the L2 cache. Half of it holds what all SMs read, since the cache has two
            parts, and an SM reads what belongs to the other through its own.
        l2_bandwidth: bytes a second.
        l2_latency, memory_latency: seconds of a load.
        launch: seconds between two dependent launches of kernels that do nothing.
    """

    gpu: Gpu
    arch: str
    sustained: float
    l2_bytes: int
    l2_bandwidth: float
    l2_latency: float
    memory_latency: float
    launch: float

    def cycles(self, seconds: float) -> float:
        return seconds * self.gpu.clock


MACHINES = {
    machine.arch: machine
    for machine in (
        Machine(
            H100,
            "sm_90a",
            # Streams of 350 MB, which move and compute nothing, in bench/results/h100.jsonl.
            sustained=0.925,
            # CUDA device properties.
            l2_bytes=50 << 20,
            # Chips and Cheese, "Nvidia's H100: Funny L2, and Tons of Bandwidth", 2023.
            l2_bandwidth=5.5e12,
            # Luo et al., arXiv:2402.13499: 263 cycles of an H100 PCIe at 1.755 GHz.
            l2_latency=263 / 1.755e9,
            # Derived: streams of 4.7 to 6.3 MB, which the cache does not hold, take 1.18 us more
            # than their bytes do, streams that it holds 0.70 us. The 479 cycles that are published
            # are those of one pointer on an idle GPU.
            memory_latency=263 / 1.755e9 + 0.48e-6,
            # Derived: the stream of one row, 0.70 us, less the life of its warps.
            launch=0.52e-6,
        ),
        Machine(
            B200,
            "sm_100a",
            sustained=0.925,  # derived: as of the H100
            # Chips and Cheese, "Nvidia's B200: Keeping the CUDA Juggernaut Rolling", 2025.
            l2_bytes=126 << 20,
            l2_bandwidth=5.5e12 * B200.sms / H100.sms,  # derived: as much for an SM as on the H100
            l2_latency=150e-9,  # Chips and Cheese, within a die
            memory_latency=150e-9 + 0.48e-6,  # derived: as of the H100
            launch=0.52e-6,  # derived: as of the H100
        ),
    )
}

RATES = {ALU: 64, FMA: 128, CONVERT: 64, MUFU: 16}
"""Results of a cycle and SM: CUDA C++ Programming Guide, "Throughput of Native Arithmetic
Instructions", compute capability 9.0 and 10.0."""
SHARED_BYTES_PER_CYCLE = 128
"""Bytes of an SM: the guide, "Shared Memory": 32 banks of 4."""

PIPES = {
    FMA: "FFMA FMUL FADD HFMA2 HMUL2 HADD2 FHFMA FFMA2 FMUL2 FADD2 IMAD",
    CONVERT: "F2FP",
    # Derived: conversions from and to integers run on the unit of the functions, as on Volta.
    MUFU: "MUFU F2I F2F I2F FRND",
    ALU: "IADD3 LOP3 SHF SHL SHR SEL FSEL PRMT LEA VIADD VIMNMX VIMNMX3 VIADDMNMX IMNMX FMNMX "
    "FMNMX3 HMNMX2 ISETP FSETP HSETP2 PLOP3 MOV I2FP IABS LOP POPC FLO BMSK SGXT CS2R I2IP "
    "VHMNMX FSET HSET2 R2P P2R",
}
"""Instructions of the pipes, by mnemonic; others take an issue slot alone."""
HALF_RATE = {"FFMA2", "FMUL2", "FADD2", "IMAD"}
"""Instructions of the FMA pipe with two results for a thread, or on half of its lanes."""
ACCESSES = {"LDS", "STS", "LDG", "STG", "LDL", "STL", "SHFL"}

_PIPE_OF = {name: pipe for pipe, names in PIPES.items() for name in names.split()}
_WIDTH = re.compile(r"\.(256|128|64|U16|S16|U8|S8)\b")

SHUFFLE_CYCLES = 24
MUFU_CYCLES = 23
CONSTANT_CYCLES = 38
"""Latencies of Volta, whose successors have similar ones: Jia et al., arXiv:1804.06826."""
SHARED_CYCLES = 29
"""Luo et al., as above."""


def access_bytes(opcode: str) -> int:
    """Return the bytes that an instruction loads or stores for a thread."""
    found = _WIDTH.search(opcode)
    width = found.group(1) if found else "32"
    return int(width.strip("US")) // 8


def executed(code: MachineCode) -> int:
    """Return the number of instructions up to the last exit.

    Slow paths, such as those of divisions, come after it and return.
    """
    exits = (i + 1 for i, name in enumerate(code.opcodes) if name == "EXIT")
    return max(exits, default=len(code.opcodes))


def demands(code: MachineCode) -> dict[str, float]:
    """Return the cycles of an SM that a warp takes of its issue slots and of each pipe."""
    opcodes = code.opcodes[: executed(code)]
    cycles: dict[str, float] = collections.defaultdict(float)
    cycles[ISSUE] = len(opcodes) / SCHEDULERS_PER_SM
    for opcode in opcodes:
        name = opcode.split(".")[0]
        if name in ACCESSES:
            cycles[SHARED] += LANES * access_bytes(opcode) / SHARED_BYTES_PER_CYCLE
        elif pipe := _PIPE_OF.get(name):
            cycles[pipe] += LANES / RATES[pipe] * (2 if name in HALF_RATE else 1)
    return dict(cycles)


def bytes_in_flight(code: MachineCode) -> int:
    """Return the bytes that a warp loads from memory, all of them at once."""
    return LANES * sum(access_bytes(name) for name in code.opcodes if name.startswith("LDG"))


def life(code: MachineCode, load_cycles: float) -> float:
    """Return the cycles from the wait for the kernel before to the exit of a warp that is alone.

    Args:
        code: without branches that go back.
        load_cycles: latency of a load from memory.
    """
    latencies = {
        "LDG": load_cycles,
        "LDS": SHARED_CYCLES,
        "SHFL": SHUFFLE_CYCLES,
        "LDC": CONSTANT_CYCLES,
        "S2R": CONSTANT_CYCLES,
    }
    time, start = 0.0, 0.0
    released = [0.0] * 6
    instructions = zip(code.opcodes, code.controls, strict=True)
    for opcode, control in itertools.islice(instructions, executed(code)):
        time = max([time, *(released[i] for i in control.waits)])
        name = opcode.split(".")[0]
        if name == "ACQBULK":
            # The kernel before ends later than what comes first.
            start = time = max([time, *released])
        if control.sets is not None:
            done = time + latencies.get(name, MUFU_CYCLES)
            released[control.sets] = max(released[control.sets], done)
        time += max(control.stall, 1)
    return time - start


class Launch(NamedTuple):
    """A launch of a kernel.

    Attributes:
        code: of the kernel.
        ctas: of the grid.
        warps: of a CTA.
        nbytes: that the launch reads and writes.
        cycled: bytes that launches move until one takes the same memory again.
    """

    code: MachineCode
    ctas: int
    warps: int
    nbytes: int
    cycled: int


def resident_ctas(code: MachineCode, warps: int, arch: str) -> int:
    """Return the CTAs that an SM has registers, shared memory and places for; at least one."""
    architecture = architectures.named(arch)
    by_registers = code.resident_warps(warps, architecture) // warps
    by_shared = architecture.shared_bytes // max(code.shared, 1)
    return max(1, min(by_registers, by_shared))


class Bound(NamedTuple):
    """Bounds of the time of a launch.

    Attributes:
        seconds: that each resource needs.
        fixed: seconds that no resource shortens: the gap between launches, and lives of CTAs.
    """

    seconds: Mapping[str, float]
    fixed: float

    @property
    def first(self) -> str:
        """Return the resource that binds first."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def estimate(self) -> float:
        """Return the seconds of the launch."""
        return self.fixed + self.seconds[self.first]


def bound(launch: Launch, machine: Machine) -> Bound:
    """Return what bounds a launch between others that it depends on."""
    code, gpu = launch.code, machine.gpu
    # Between half of the cache and all of it, more and more of it is gone before it is read again.
    missing = min(1.0, max(0.0, 2 * launch.cycled / machine.l2_bytes - 1))
    latency = machine.l2_latency + missing * (machine.memory_latency - machine.l2_latency)
    one_life = life(code, machine.cycles(latency)) / gpu.clock
    ctas = ceil_div(launch.ctas, gpu.sms)
    seconds = {
        name: ctas * launch.warps * cycles / gpu.clock for name, cycles in demands(code).items()
    }
    memory = missing / (gpu.bandwidth * machine.sustained) + (1 - missing) / machine.l2_bandwidth
    seconds[MEMORY] = launch.nbytes * memory
    waves = ctas / resident_ctas(code, launch.warps, machine.arch)
    seconds[IN_FLIGHT] = max(0.0, waves - 1) * one_life
    return Bound(seconds, machine.launch + one_life * min(2.0, max(1.0, waves)))


def steady(code: MachineCode, warps: int, nbytes: float, machine: Machine) -> dict[str, float]:
    """Return the cycles of an SM that each resource needs for a warp among many, from memory.

    Args:
        code: of the kernel.
        warps: of a CTA.
        nbytes: that a warp reads and writes.
        machine: the GPU.
    """
    cycles = demands(code)
    of_sm = machine.gpu.bandwidth * machine.sustained / machine.gpu.sms / machine.gpu.clock
    cycles[MEMORY] = nbytes / of_sm
    resident = resident_ctas(code, warps, machine.arch) * warps
    cycles[IN_FLIGHT] = life(code, machine.cycles(machine.memory_latency)) / resident
    return cycles


def ranks(values: Sequence[float]) -> list[float]:
    """Return the rank of each value from 1 on, the mean of their ranks for equal ones."""
    ordered = sorted(values)
    first = {value: i for i, value in reversed(list(enumerate(ordered)))}
    counts = collections.Counter(values)
    return [first[value] + (counts[value] + 1) / 2 for value in values]


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Spearman's rank correlation, that of the ranks; 0 where all values are equal.

    Raises:
        ValueError: the numbers of values differ, or there are less than two.
    """
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"b: expected {max(len(a), 2)} values as of a, got {len(b)}")
    x, y = ranks(a), ranks(b)
    mean = (len(a) + 1) / 2
    covariance = sum((i - mean) * (j - mean) for i, j in zip(x, y, strict=True))
    deviations = math.sqrt(sum((i - mean) ** 2 for i in x) * sum((j - mean) ** 2 for j in y))
    return covariance / deviations if deviations else 0.0
