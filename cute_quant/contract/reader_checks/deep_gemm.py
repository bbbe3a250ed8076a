"""Strides that DeepGEMM looks at, and the scales that its TMA reads."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from cute_quant.contract.format_choices import MN_MAJOR
from cute_quant.contract.reader_checks.quantized import Finding, Quantized
from cute_quant.contract.readers import DEEP_GEMM_SM90, DEEP_GEMM_SM90_K_GROUPED


def wrong_batch_strides(given: Quantized) -> Iterator[Finding]:
    """Yield what is wrong with the distance of matrices of values."""
    q = given.q
    if q.ndim == 3 and q.stride(0) != q.shape[1] * q.shape[2]:
        yield Finding(
            "strides",
            f"q: expected matrices {q.shape[1] * q.shape[2]} elements apart, got strides "
            f"{q.stride()}",
        )


def wrong_block_strides(sf: torch.Tensor) -> Iterator[Finding]:
    """Yield what is wrong with the strides of scales of blocks on SM90."""
    rows, columns = sf.shape[-2:]
    matrices = rows * columns
    together = sf.ndim == 2 or sf.stride(0) == matrices
    if not together or sf.stride()[-2:] not in ((columns, 1), (1, rows)):
        yield Finding(
            "strides",
            f"sf: expected scales of blocks contiguous along k or n, matrices {matrices} elements "
            f"apart, got strides {sf.stride()}",
        )


def read_by_tma(given: Quantized) -> bool:
    """Return whether TMA reads the scales as they lie: others are loaded or transformed first."""
    sf, fmt = given.sf, given.fmt
    if fmt.byte_scales:
        return True
    if given.kind not in (DEEP_GEMM_SM90, DEEP_GEMM_SM90_K_GROUPED) or sf.ndim < 2:
        return False
    # DeepGEMM looks at strides alone, of scales of rows: whatever the format says of them.
    *batch, mn, _ = sf.shape
    own = fmt.replace(scale_layout=MN_MAJOR).scale_strides(batch, mn, sf.shape[-1] * fmt.group_size)
    of_blocks = not given.reader.k_grouped and given.of_blocks
    return sf.stride() == own and not of_blocks
