"""The kernel that lays out what arrives, beside what torch does on the CPU."""

from types import SimpleNamespace
from zlib import crc32

import pytest
import torch

from cute_quant import (
    DEEP_GEMM,
    DEEP_GEMM_SM90,
    MXFP8,
    NVFP4,
    Format,
    Masked,
    PrefixSum,
    dequantize,
)
from cute_quant.distributed.arrival import lay_out
from cute_quant.distributed.records import Record
from tests.helpers import assert_same_bits
from tests.kernels.emulated_gpu import Gpu

FORMATS = {
    "words": DEEP_GEMM,
    "float32": DEEP_GEMM_SM90,
    "blocks": MXFP8,
    "blocks of 8": NVFP4.replace(scale_layout="8x4"),
    "rows": DEEP_GEMM.replace(scale_layout="row_major_packed"),
}
RECORDS = 9


def arrival(record: Record, k: int) -> torch.Tensor:
    """Random records, whose padding of words is 0 as quantize leaves it, and one of zeros last."""
    generator = torch.Generator().manual_seed(k)
    shape = RECORDS + 1, record.nbytes
    received = torch.randint(1, 120, shape, generator=generator).to(torch.uint8)
    received[-1].zero_()
    used = record.fmt.groups(k) * (1 if record.fmt.byte_scales else 4)
    received[:, record.scale_start + used :] = 0
    return received


def plan_of(rows: Masked | PrefixSum, num_rows: int, seed: str = "") -> SimpleNamespace:
    """What is read of a plan: some rows have no record."""
    batch_shape = (len(rows.data),) if isinstance(rows, Masked) else ()
    total = num_rows * (len(rows.data) if batch_shape else 1)
    generator = torch.Generator().manual_seed(crc32(seed.encode()))
    sources = torch.randint(0, RECORDS + 1, (total,), generator=generator)
    return SimpleNamespace(rows=rows, num_rows=num_rows, batch_shape=batch_shape, sources=sources)


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_a_prefix_sum(kernels, arch, name):
    fmt, plan = FORMATS[name], plan_of(PrefixSum(torch.tensor([45], dtype=torch.int32)), 45)
    for k in (640, *([2688] if fmt is DEEP_GEMM else [])):
        record = Record.of(fmt, k)
        received = arrival(record, k)
        actual = Gpu(kernels, arch).lay_out(received, plan, record, fmt, k)
        for a, b in zip(actual, lay_out(received, plan, record, fmt, k), strict=True):
            assert_same_bits(a, b)
            assert a.stride() == b.stride()


@pytest.mark.parametrize("name", FORMATS)
def test_masked_experts(kernels, arch, name):
    """Rows past a count are left alone, but for scales up to the next multiple of 4."""
    fmt, k, counts = FORMATS[name], 640, [5, 0, 44, 46]
    # Others for each test: memory of one before is not taken for what the kernel wrote.
    plan = plan_of(Masked(torch.tensor(counts, dtype=torch.int32)), 45, f"{arch} {name}")
    record = Record.of(fmt, k)
    received = arrival(record, k)
    actual = Gpu(kernels, arch, max_grid=2).lay_out(received, plan, record, fmt, k)
    expected = lay_out(received, plan, record, fmt, k)
    rows = [dequantized(*results, fmt) for results in (actual, expected)]
    for expert, count in enumerate(counts):
        assert_same_bits(actual[0][expert, :count], expected[0][expert, :count])
        assert_same_bits(*(t[expert, :count] for t in rows))
        past = [t[expert, count:].view(torch.uint8) for t in (actual[0], expected[0])]
        assert count or not torch.equal(*past)


def dequantized(q: torch.Tensor, sf: torch.Tensor, fmt: Format) -> torch.Tensor:
    upper = {"encode_scale": torch.ones(())} if fmt.upper_scale else {}
    return dequantize(q, sf, fmt, dtype=torch.float32, **upper)


def test_what_has_no_kernel(kernels):
    """Bytes of rows that end within a vector, or scales of rows that end within a word."""
    gpu = Gpu(kernels, "sm_90a")
    row_major = MXFP8.replace(scale_layout="row_major")
    for fmt, k in ((DEEP_GEMM, 136), (row_major, 640)):
        plan = plan_of(PrefixSum(torch.tensor([45], dtype=torch.int32)), 45)
        record = Record.of(fmt, k)
        received = arrival(record, k)
        q, _ = gpu.lay_out(received, plan, record, fmt, k)
        values, _ = record.views(received)
        assert_same_bits(q, values[plan.sources])
    assert not any("Arrival" in kernel.program.kernel.label for kernel in gpu.launched)
