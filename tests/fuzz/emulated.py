"""Random calls in the emulator: a few kernels of each operation, each on a GPU of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.fuzz import columns, dequantization
from tests.fuzz.case import Case, Kernel
from tests.fuzz.columns import ColumnSession
from tests.fuzz.dequantization import Dequantization
from tests.fuzz.draw import Draw, draw_kernels
from tests.helpers import ARCHITECTURES
from tests.kernels.emulated_gpu import H100_SMS, Gpu, Kernels

ELEMENTS = 12_000
"""Of most cases: a kernel of two tiles a row, and of several experts, among them."""
SESSIONS = {"quantize": 12, "silu_mul": 8, "rms_norm": 10, "fake_quantize": 3, "dequantize": 4}
COLUMN_SESSIONS = 4
CASES = 4


@dataclass(frozen=True)
class Session:
    """One kernel on one emulated GPU.

    Attributes:
        sms, max_grid, rows_per_thread: of the GPU; few of them have CTAs loop.
    """

    kernel: Kernel
    operation: str
    arch: str
    sms: int
    max_grid: int
    rows_per_thread: int

    def __str__(self) -> str:
        gpu = f"{self.arch}-{self.sms}-{self.max_grid}-{self.rows_per_thread}"
        return f"{self.operation}-{self.kernel}-{gpu}"

    def cases(self, seed: int) -> Iterator[Case | Dequantization]:
        """Draw the cases of the session."""
        for number in range(CASES):
            if self.operation == "dequantize":
                yield Dequantization(self.kernel, f"{seed} {number}", ELEMENTS)
            else:
                yield Draw(self.kernel, f"{seed} {number}", ELEMENTS).case()

    def run(self, kernels: Kernels, case: Case | Dequantization) -> None:
        """Run a case and compare every byte with the oracle."""
        gpu = Gpu(kernels, self.arch, self.rows_per_thread, self.sms, self.max_grid)
        before = case.arenas if isinstance(case, Dequantization) else case.arenas()
        after = {name: arena.clone() for name, arena in before.items()}
        try:
            results: Any
            if isinstance(case, Dequantization):
                fmt, dtype = self.kernel.fmt, self.kernel.dtype
                results = gpu.dequantize(*case.views(after), fmt, dtype, case.upper(after))
            else:
                results = case.emulate(gpu, after)
        except Exception as error:
            raise AssertionError(f"{error}\n{self}\n{case}") from error
        if isinstance(case, Dequantization):
            case.check(after, results)
        else:
            case.check(before, after, results, exact=False)


def sessions(seed: int = 0) -> list[Session | ColumnSession]:
    """Draw sessions: kernels of all operations on GPUs of all kinds."""
    drawn: list[Session | ColumnSession] = []
    for operation, count in SESSIONS.items():
        if operation == "dequantize":
            kernels = dequantization.draw_kernels(count, seed)
        else:
            kernels = draw_kernels(count, operation, seed)
        for i, kernel in enumerate(kernels):
            arch = ARCHITECTURES[i % len(ARCHITECTURES)]
            sms = (H100_SMS, 1)[i // 2 % 2]
            max_grid = (65535, 65535, 2)[i % 3]
            drawn.append(Session(kernel, operation, arch, sms, max_grid, 1 + (i // 4) % 2))
    return drawn + columns.sessions(COLUMN_SESSIONS, seed)
