"""Architectures that kernels are compiled for, and what each of them has. Needs no CuTe DSL.

Code that depends on an architecture asks for one of the facts here, never for a name. The limits of
an SM are those of the CUDA programming guide ("Compute Capabilities"), the instructions those of
the PTX ISA, which a test asks the assembler about.
"""

from __future__ import annotations

from typing import NamedTuple

SCHEDULERS_PER_SM = 4
"""Each issues an instruction of a warp in a cycle."""
REGISTERS_PER_SM = 65536
REGISTERS_AT_ONCE = 8
"""Registers of a thread are allocated in multiples of these."""
MAX_WARPS_PER_SM = 64
"""Warps of the largest SM."""


class Gpu(NamedTuple):
    """A GPU as its maker describes it.

    Attributes:
        sms: streaming multiprocessors.
        clock: cycles a second under load.
        bandwidth: bytes a second from and to memory.
    """

    name: str
    sms: int
    clock: float
    bandwidth: float

    def issue_budget(self, bytes_per_warp: float) -> int:
        """Return how many instructions a warp may issue while memory moves its bytes."""
        warps = self.bandwidth / bytes_per_warp
        return round(self.sms * SCHEDULERS_PER_SM * self.clock / warps)


# Boost clocks and bandwidths of data sheets and architecture whitepapers.
L40S = Gpu("L40S", 142, 2.52e9, 0.864e12)
H100 = Gpu("H100", 132, 1.98e9, 3.35e12)  # SXM5
B200 = Gpu("B200", 148, 1.9e9, 7.67e12)  # no clock is published, and this one approximate
THOR = Gpu("Jetson T5000", 20, 1.57e9, 0.273e12)
RTX_5090 = Gpu("RTX 5090", 170, 2.407e9, 1.792e12)


class Architecture(NamedTuple):
    """A target of the compiler.

    Attributes:
        name: of the target.
        capability: compute capability of the GPUs, the least one of a family.
        pdl: whether kernels can be programmatic dependents (``griddepcontrol``).
        widest_load: bytes that an instruction loads or stores for a thread.
        pair_arithmetic: whether there is a maximum of two pairs of 16-bit integers
            (``max.u16x2``), and a product of two pairs of bfloat16 (``mul.bf16x2``).
        packed_float32: whether two float32 are added and multiplied at once (``fma.f32x2``).
        mixed_fma: whether bfloat16 can be multiplied and added to float32 (``fma.f32.bf16``).
        e2m1: whether float32 and bfloat16 can be converted to e2m1 (``cvt.e2m1x2``).
        three_input_max: whether there is a maximum of three float32.
        shared_bytes: most bytes of shared memory of a CTA.
        warps, ctas: most of them that an SM holds.
        gpu: one whose clock and bandwidth are published, None where there is none.
    """

    name: str
    capability: tuple[int, int]
    pdl: bool = True
    widest_load: int = 32
    pair_arithmetic: bool = True
    packed_float32: bool = True
    mixed_fma: bool = True
    e2m1: bool = True
    three_input_max: bool = True
    shared_bytes: int = 227 * 1024
    warps: int = 64
    ctas: int = 32
    gpu: Gpu | None = None

    @property
    def is_family(self) -> bool:
        """Return whether GPUs of several compute capabilities run what is compiled for it."""
        return self.name.endswith("f")

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Return whether a GPU of a compute capability runs what is compiled for the target.

        Code for a family runs on the same major version, from the family's minor version on.
        """
        if self.is_family:
            return capability[0] == self.capability[0] and capability >= self.capability
        return capability == self.capability


_SM_89 = Architecture(
    "sm_89",
    (8, 9),
    pdl=False,
    widest_load=16,
    pair_arithmetic=False,
    packed_float32=False,
    mixed_fma=False,
    e2m1=False,
    three_input_max=False,
    shared_bytes=99 * 1024,
    warps=48,
    ctas=24,
    gpu=L40S,
)
_SM_90A = Architecture(
    "sm_90a",
    (9, 0),
    widest_load=16,
    packed_float32=False,
    mixed_fma=False,
    e2m1=False,
    three_input_max=False,
    gpu=H100,
)
_SM_100A = Architecture("sm_100a", (10, 0), gpu=B200)
_SM_103A = Architecture("sm_103a", (10, 3))
# The guide does not list 10.7 yet: warps and CTAs are those of 10.0 and 10.3.
_SM_107A = Architecture("sm_107a", (10, 7), shared_bytes=327 * 1024)
_SM_110A = Architecture("sm_110a", (11, 0), warps=48, ctas=24, gpu=THOR)
_SM_120A = Architecture("sm_120a", (12, 0), shared_bytes=99 * 1024, warps=48, ctas=24, gpu=RTX_5090)
_SM_121A = _SM_120A._replace(name="sm_121a", capability=(12, 1), gpu=None)

ARCHITECTURES = (
    _SM_89,
    _SM_90A,
    _SM_100A,
    _SM_103A,
    _SM_107A,
    _SM_110A,
    _SM_120A,
    _SM_121A,
)
"""One for each compute capability that kernels are built for."""

FAMILIES = (
    _SM_100A._replace(name="sm_100f", gpu=None),
    _SM_120A._replace(name="sm_120f", gpu=None),
)
"""Targets of which one object serves GPUs of several compute capabilities."""

_BY_NAME = {architecture.name: architecture for architecture in (*ARCHITECTURES, *FAMILIES)}


def named(name: str) -> Architecture:
    """Return the architecture of a target.

    Raises:
        ValueError: there is none.
    """
    if name not in _BY_NAME:
        raise ValueError(f"arch: expected one of {', '.join(_BY_NAME)}, got {name!r}")
    return _BY_NAME[name]


def find(capability: tuple[int, int]) -> Architecture | None:
    """Return the architecture of a compute capability, None if no kernels are built for it."""
    return next((a for a in ARCHITECTURES if a.capability == capability), None)


def targets(name: str) -> list[str]:
    """Return the targets whose objects the GPUs of an architecture run, the closest one first."""
    capability = named(name).capability
    families = (family.name for family in FAMILIES if family.runs_on(capability))
    return list(dict.fromkeys([name, *families]))


def supported() -> str:
    """Return the compute capabilities that kernels are built for, for messages."""
    *others, last = (f"{major}.{minor}" for major, minor in (a.capability for a in ARCHITECTURES))
    return f"{', '.join(others)} or {last}"
