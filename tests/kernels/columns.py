"""Emulated kernels of groups along rows, checked in memory full of poison."""

from __future__ import annotations

import torch

from cute_quant import Format, PrefixSum
from cute_quant.contract.columns import ColumnCall, Output
from tests.columns import GatedCase, assert_columns, assert_rows, poisoned_columns
from tests.helpers import poisoned_results
from tests.kernels.emulated_gpu import Gpu


def check(
    gpu: Gpu,
    x: torch.Tensor,
    fmt: Format,
    rows: PrefixSum | None = None,
    transposed: bool = False,
    row_fmt: Format | None = None,
    last_padding: bool = True,
    gated: GatedCase | None = None,
    rng_state: torch.Tensor | None = None,
) -> None:
    """Quantize on the emulated GPU into poisoned memory; every byte must be the oracle's.

    Of a gated activation x is what it computes.
    """
    *leading, mn, k = x.shape
    columns = poisoned_columns(fmt, tuple(x.shape), transposed)
    along_k, of_rows = None, None
    if row_fmt is not None:
        of_rows = poisoned_results(
            row_fmt, mn, k, "cpu", last_padding=last_padding, batch_shape=tuple(leading)
        )
        along_k = Output(row_fmt, *of_rows)
    source, prologue = (x, None) if gated is None else (gated.gate_up, gated.prologue)
    call = ColumnCall(source, Output(fmt, *columns), transposed, rows, along_k, prologue, rng_state)
    gpu.quantize_columns(call)
    assert_columns(columns, x, fmt, rows, transposed, rng_state)
    if row_fmt is not None:
        assert_rows(of_rows, x, row_fmt, rows, last_padding, rng_state)
