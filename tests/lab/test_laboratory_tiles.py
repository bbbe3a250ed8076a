"""Kernels of other tiles than the default, in the emulator against the oracle."""

import pytest
import torch

from cute_quant import (
    DEEP_GEMM,
    DEEP_GEMM_32,
    DEEP_GEMM_SM90,
    GROUPWISE_FP8,
    MXFP4,
    MXFP8,
    NVFP4,
)
from cute_quant.contract.format_choices import WHOLE_ROW
from cute_quant.contract.upper_scales import ENCODE, UpperScale
from cute_quant.kernels.config import ALONG, DOWN, LOAD_HINTS, Access, Domain, QuantizeSpec, Tile
from cute_quant.lab.machine_code import machine_code
from tests import oracle
from tests.helpers import (
    ARCHITECTURES,
    FLOAT32,
    UE8M0,
    poisoned_scales,
    poisoned_values,
)
from tests.kernels.cases import assert_same_storage, special_groups

BF16, FP32 = torch.bfloat16, torch.float32
ROW_MAJOR = GROUPWISE_FP8.replace(group_size=64)
NVFP4_8 = NVFP4.replace(scale_layout="8x4")
NVFP4_PACKED = NVFP4.replace(scale_layout="row_major_packed")

TILES = {
    "16 threads a group": (Tile(8), UE8M0, BF16, Access(16, 8)),
    "4 threads a group": (Tile(32), UE8M0, BF16, Access(32, 16)),
    "1 thread a group": (Tile(128, row_warps=1), UE8M0, BF16, Access(32, 32)),
    "32 threads a group": (Tile(4), UE8M0, BF16, Access(8, 4)),
    "4 packs along k": (Tile(16, 1, 1, 4), UE8M0, BF16, Access()),
    "2 packs, 2 rows, along": (Tile(16, 2, 2, 2, 1, ALONG), UE8M0, BF16, Access()),
    "2 packs, float32": (Tile(16, 2, 1, 2, 1, DOWN), FLOAT32, BF16, Access()),
    "half a word a warp, 3 along k": (Tile(8, 2, 2, 3, 1, ALONG, DOWN), UE8M0, BF16, Access(16, 8)),
    "CTAs down first": (Tile(16, 4, 1, 1, 1, DOWN, DOWN), UE8M0, BF16, Access()),
    "8 rows a thread": (Tile(16, 2, 8), UE8M0, BF16, Access()),
    "narrow": (Tile(), UE8M0, BF16, Access(4, 2)),
    "2 packs of 16 groups": (Tile(16, 2, 1, 2), DEEP_GEMM_32, BF16, Access()),
    "2 blocks along k": (Tile(16, 2, 2, 2), MXFP8, BF16, Access()),
    "row-major": (Tile(8, 2, 1, 2), ROW_MAJOR, FP32, Access(32, 8)),
    "NVFP4, 8 values": (Tile(8, 2, 2), NVFP4, BF16, Access(16, 4)),
    "NVFP4, 4 rows of 1 lane": (Tile(16, 2, 4), NVFP4, BF16, Access(32, 8)),
    "NVFP4, 2 warps along k, 8x4": (Tile(16, 2, 1, 2), NVFP4_8, FP32, Access(32, 8)),
    "MXFP4, 32 values": (Tile(32, 2, 2), MXFP4, BF16, Access(32, 16)),
    "NVFP4, 2 tiles a thread": (Tile(tiles_per_thread=2), NVFP4, BF16, Access(32, 8)),
    "NVFP4, packed": (Tile(16, 2, 2), NVFP4_PACKED, BF16, Access(32, 8)),
    **{hint: (Tile(), UE8M0, BF16, Access(load_hint=hint)) for hint in LOAD_HINTS},
}


def check(kernels, arch, tile, fmt, dtype, access, mn, k, batch=()):
    """Run a kernel into poisoned memory; every byte of it must be the oracle's."""
    tile.check(fmt, dtype, access)
    rows = mn * (batch[0] if batch else 1)
    x = special_groups(rows, k, dtype, k, fmt).view(*batch, mn, k)
    results = [
        (
            poisoned_values(mn, k, "cpu", fmt.values, batch),
            poisoned_scales(fmt, mn, k, "cpu", batch_shape=batch),
        )
        for _ in range(2)
    ]
    spec = QuantizeSpec(dtype, fmt, tile, Domain(batched=bool(batch)), access)
    upper = UpperScale(ENCODE, torch.ones(1)) if fmt.upper_scale else None
    spec = spec._replace(upper=upper and upper.kind)
    operands = x, *results[0], upper and upper.tensor, None, None, None, 0, 1, 1, fmt.floor
    kernels.get(spec, arch)(*operands, outputs=results[0])
    oracle.quantize_into(x, *results[1], fmt, upper=upper)
    for name, actual, expected in zip(("q", "sf"), *results, strict=True):
        assert_same_storage(name, actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("choices", TILES.values(), ids=TILES)
def test_every_byte(kernels, arch, choices):
    tile, fmt, dtype, access = choices
    for mn, groups in ((1, 8), (5, 40), (33, 24)):
        check(kernels, arch, tile, fmt, dtype, access, mn, fmt.group_size * groups)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_hints_are_in_the_machine_code(arch):
    modifiers = {None: "", "no_allocate": "NA", "streaming": "EF", "prefetch_256": "LTC256B"}
    assert set(modifiers) == {None, *LOAD_HINTS}
    plain = machine_code(QuantizeSpec(BF16, UE8M0), arch)
    for hint, modifier in modifiers.items():
        code = machine_code(QuantizeSpec(BF16, UE8M0, access=Access(load_hint=hint)), arch)
        for op, usual in zip(code.opcodes, plain.opcodes, strict=True):
            added = set(op.split(".")) - set(usual.split("."))
            assert added == ({modifier} if op.startswith("LDG") and modifier else set())


@pytest.mark.slow
@pytest.mark.parametrize("fmt", [UE8M0, FLOAT32, ROW_MAJOR])
def test_warps_past_the_columns_of_one_matrix_leave_the_next_alone(kernels, fmt):
    for tile in (Tile(16, 2, 1, 4), Tile(8, 1, 2, 3, 1, ALONG)):
        access = Access(store_bytes=8 if tile.values_per_thread == 8 else 16)
        access = Access(min(32, 2 * tile.values_per_thread), access.store_bytes)
        check(kernels, "sm_90a", tile, fmt, BF16, access, 6, 640, (3,))


BROKEN = {
    "a power of two": (Tile(12), UE8M0, BF16, Access()),
    "a divisor of group_size 16": (Tile(32), DEEP_GEMM.replace(group_size=16), BF16, Access()),
    "at least 8 for group_size 256": (Tile(4), DEEP_GEMM.replace(group_size=256), BF16, Access(8)),
    "row_warps: expected at least 1": (Tile(row_warps=0), UE8M0, BF16, Access()),
    "at most 1024 threads": (Tile(16, 8, 1, 8), UE8M0, BF16, Access()),
    "a power of two from 8 on": (Tile(4), NVFP4, BF16),
    "rows_per_thread: expected at most 8": (Tile(16, 4, 9), UE8M0, BF16, Access()),
    "at most 512 bytes": (Tile(128, 1, 2), DEEP_GEMM.replace(group_size=256), FP32, Access()),
    "load_bytes: expected a power of two from 2 to 16": (Tile(8), UE8M0, BF16, Access()),
    "store_bytes: expected a power of two from 1 to 16": (Tile(), UE8M0, BF16, Access(32, 32)),
    "load_hint: expected None": (Tile(), UE8M0, BF16, Access(load_hint="fast")),
    "warp_order: expected one of": (Tile(warp_order="up"), UE8M0, BF16, Access()),
    "a row being one group": (
        Tile(column_warps=2),
        DEEP_GEMM_SM90.replace(group_size=WHOLE_ROW),
        BF16,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("rule", BROKEN)
def test_the_broken_rule_is_named(rule):
    tile, *choices = BROKEN[rule]
    with pytest.raises(ValueError, match=rule):
        tile.check(*choices)


@pytest.mark.slow
def test_the_default_keeps_the_rules():
    for fmt in (UE8M0, FLOAT32, DEEP_GEMM_32, DEEP_GEMM_SM90.replace(group_size=WHOLE_ROW)):
        for dtype in (BF16, FP32):
            Tile().check(fmt, dtype, Access())
