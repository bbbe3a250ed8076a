"""Examine a layout without a GPU, from its machine code and from the layout itself."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from cute_quant.kernels import architectures
from cute_quant.kernels.config import LANES, launched_on
from cute_quant.lab import assignment
from cute_quant.lab.assignment import Request
from cute_quant.lab.layout import Layout
from cute_quant.lab.machine_code import machine_code

ELEMENTS = 512
"""Elements for which instructions are counted, so that layouts of any size compare. A warp of the
default layout takes as many at once."""


@dataclass(frozen=True)
class Examination:
    """A layout on an architecture.

    Attributes:
        instructions: instructions of the kernel.
        registers: registers of a thread.
        spills: instructions that move registers to the stack or back.
        issue_slots: instructions for 512 elements.
        budget: instructions that a warp may issue while memory moves 512 elements.
        resident_warps: warps that are resident on an SM.
        bytes_in_flight: bytes of x in flight on an SM while all of its warps wait for loads.
        load_sectors, store_sectors: sectors of 32 bytes that an instruction of a warp requests.
        load_efficiency, store_efficiency: share of their bytes that the instruction moves.
    """

    instructions: int
    registers: int
    spills: int
    issue_slots: float
    budget: int
    resident_warps: int
    bytes_in_flight: int
    load_sectors: float
    load_efficiency: float
    store_sectors: float
    store_efficiency: float

    @property
    def budget_share(self) -> float:
        """Return the issue slots over the budget."""
        return self.issue_slots / self.budget


@functools.cache
def examine(layout: Layout, arch: str) -> Examination:
    """Compile a layout's kernel for an architecture and read what came of it.

    Raises:
        FileNotFoundError: NVIDIA's disassembler is not installed.
        ValueError: there is no such architecture, or no clock and bandwidth of a GPU of it.
    """
    architecture = architectures.named(arch)
    if architecture.gpu is None:
        raise ValueError(f"arch: expected one whose issue budget is known, got {arch!r}")
    code = machine_code(launched_on(layout.spec, arch), arch)
    tile, fmt = layout.tile, layout.fmt
    elements = tile.columns * tile.rows_per_thread
    scale_bytes = fmt.scale_dtype.itemsize / fmt.group_size
    value_bytes = fmt.values.itemsize / fmt.value_type.per_byte
    moved = layout.dtype.itemsize + value_bytes + scale_bytes
    warps = code.resident_warps(layout.warps, architecture)
    loads, stores = assignment.loads(layout, arch), assignment.stores(layout, arch)
    return Examination(
        instructions=len(code.opcodes),
        registers=code.registers,
        spills=code.count("LDL", "STL"),
        issue_slots=len(code.opcodes) * ELEMENTS / elements,
        budget=architecture.gpu.issue_budget(ELEMENTS * moved),
        resident_warps=warps,
        bytes_in_flight=warps * LANES * layout.thread_bytes,
        load_sectors=_sectors(loads),
        load_efficiency=_efficiency(loads),
        store_sectors=_sectors(stores),
        store_efficiency=_efficiency(stores),
    )


def _sectors(requests: Sequence[Request]) -> float:
    return statistics.fmean(len(r.sectors) for r in requests)


def _efficiency(requests: Sequence[Request]) -> float:
    return statistics.fmean(r.efficiency for r in requests)
