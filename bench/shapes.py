"""What is measured: shapes, and the bytes that a quantizer moves for one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cute_quant.formats import Format

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
    """Bytes that a quantizer must read and write for an (mn, k) input of 16-bit elements."""
    scale_bytes = 1 if fmt.packed else fmt.scale_dtype.itemsize
    return mn * k * 3 + mn * (k // fmt.group_size) * scale_bytes
