"""Measured shapes, and the bytes that a quantizer moves for one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.names import ALONE, RMS_NORM, SILU_MUL

if TYPE_CHECKING:
    from cute_quant.contract.formats import Format

GROUP_SIZE = 128

ROWS = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
"""Tokens: from the decoding of one sequence to a large prefill."""

COLUMNS = (1536, 2048, 4096, 7168, 16384)
"""Inputs of the linear layers of DeepSeek-V3 and its like: low-rank queries, an expert's
intermediate, smaller models' hidden size, the hidden size, all heads of the attention."""

MAIN_COLUMN = 7168

QUICK_ROWS = (1, 64, 512, 4096, 32768)
QUICK_COLUMNS = (MAIN_COLUMN,)


def bytes_moved(mn: int, k: int, fmt: Format) -> int:
    """Return the bytes that a quantizer moves for an (mn, k) input of 16-bit elements."""
    return mn * k * 3 + mn * (k // fmt.group_size) * fmt.scale_dtype.itemsize


STAGE_ROWS = (1, 16, 64, 256, 1024, 4096, 16384, 65536)
STAGE_COLUMNS = (2048, 7168)
QUICK_STAGE_ROWS = (1, 64, 4096)
"""Shapes of the fused operations."""


VLLM_FP4_SHAPES = (
    *((m, k) for k in (4096, 8192) for m in (1, 2, 4, 8, 16, 24, 32)),
    *((1, 16), (1, 32), (2, 48), (7, 64), (16, 128), (33, 160), (128, 256), (256, 512)),
    *((1024, 1024), (5120, 2048), (2048, 4096), (4096, 7168), (8192, 8192), (128, 16384)),
)
"""Rows and columns of vLLM's tests of NVFP4 on GPUs that have none (its pull request 40033)."""


@dataclass(frozen=True)
class Operation:
    """Memory traffic of an operation for 16 elements of its result, one byte each.

    Attributes:
        loads: of 32 bytes, 16 elements of 16 bits.
        stores: of 16 bytes.
    """

    name: str
    loads: int
    stores: int

    def bytes_moved(self, mn: int, k: int) -> int:
        """Return the bytes to read and write for an (mn, k) result with a byte for each scale."""
        return mn * k * (2 * self.loads + self.stores) + mn * (k // GROUP_SIZE)


SILU_MUL_QUANTIZE = Operation(SILU_MUL, loads=2, stores=1)
RMS_NORM_QUANTIZE = Operation(RMS_NORM, loads=2, stores=3)
QUANTIZE_ALONE = Operation(ALONE, loads=1, stores=1)
OPERATIONS = (SILU_MUL_QUANTIZE, RMS_NORM_QUANTIZE, QUANTIZE_ALONE)
"""Gates and ups; rows and a residual, which is written too; rows."""


def positive_numbers(text: str) -> tuple[int, ...]:
    """Parse an argument such as ``1,16,64``.

    Raises:
        ValueError: it is none.
    """
    numbers = tuple(int(part) for part in text.split(","))
    if min(numbers) < 1:
        raise ValueError
    return numbers
