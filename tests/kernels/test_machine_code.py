"""The machine code of the kernels, read without a GPU."""

import pytest
import torch

from bench.sass import BYTES_PER_WARP, machine_code
from cute_quant import DEEP_GEMM, DEEP_GEMM_SM90, MXFP4, MXFP8, ROWWISE_INT8
from cute_quant.dispatch import blocks
from cute_quant.jit.lookup import ARCHITECTURES
from cute_quant.kernels import architectures, heuristics
from cute_quant.kernels.config import (
    DEFAULT_TILE,
    ONE_ROW,
    Access,
    Domain,
    QuantizeSpec,
    RmsNormSpec,
    SiluMulSpec,
    Tile,
    launched_on,
)
from cute_quant.kernels.heuristics import TWO_ROWS
from tests.helpers import FLOAT32, FLOAT32_ROUNDED, FORMATS, UE8M0

MAX_INSTRUCTIONS = {
    (UE8M0, 1): 95,
    (UE8M0, 2): 162,
    (FLOAT32, 1): 120,
    (FLOAT32, 2): 210,
    (FLOAT32_ROUNDED, 1): 98,
    (FLOAT32_ROUNDED, 2): 162,
}
"""Budgets of the bf16 kernels on sm_100a, by format and rows a thread. They only ever go down."""

MAX_STOCHASTIC = {"sm_90a": 393, "sm_100a": 391}
"""The same where values are rounded by random numbers, for float32 scales and one row a thread."""

MAX_NORM = {"sm_90a": 272, "sm_100a": 337}
"""The same of rows that are normalized, without a residual, whose launch has a tile or two."""

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TILES = {1: DEFAULT_TILE, 2: TWO_ROWS}
BLOCKED = MXFP8.replace(values=torch.float8_e5m2)
SMALL_GROUPS = DEEP_GEMM_SM90.replace(group_size=16, values=torch.int8, round_scale=True)

VARIANTS = {
    "fp32": (FP32, UE8M0, TWO_ROWS),
    "blocks": (FP32, BLOCKED, DEFAULT_TILE, Domain(batched=True)),
    "masked": (BF16, UE8M0, DEFAULT_TILE, Domain("masked", False, True)),
    "prefix sum": (BF16, UE8M0, TWO_ROWS, Domain("prefix_sum")),
    "gathered": (BF16, UE8M0, TWO_ROWS, Domain("indexed", True)),
    "ragged": (FP16, SMALL_GROUPS, DEFAULT_TILE, Domain(), Access(2, 1, True)),
    "fake": (BF16, UE8M0, TWO_ROWS, Domain(), Access(32, 32), True),
}

MEASURED = ("sm_90a", "sm_100a", "sm_103a")
every_arch = pytest.mark.parametrize(
    "arch",
    [
        pytest.param(arch, marks=[] if arch in MEASURED else pytest.mark.slow)
        for arch in ARCHITECTURES.values()
    ],
)
every_dtype = pytest.mark.parametrize("dtype", [BF16, FP16])
every_number_of_rows = pytest.mark.parametrize("rows", [1, 2])
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=str)


@pytest.mark.parametrize("arch", MAX_STOCHASTIC)
def test_stochastic_rounding(arch):
    code = machine_code(QuantizeSpec(BF16, FLOAT32, stochastic=True), arch)
    assert len(code.opcodes) <= MAX_STOCHASTIC[arch]
    assert code.stack == 0 and code.registers <= 40


@pytest.mark.slow
@every_arch
@every_dtype
@every_format
@every_number_of_rows
def test_memory_instructions(arch, dtype, fmt, rows):
    code = machine_code(launched_on(QuantizeSpec(dtype, fmt, TILES[rows]), arch), arch)
    wide = architectures.named(arch).widest_load == 32
    loads = ["LDG.E.ENL2.256"] if wide else ["LDG.E.128"] * 2
    stores = ["STG.E.U8" if fmt.packed else "STG.E"] + rows * ["STG.E.128"]
    assert [op for op in code.opcodes if op.startswith("LDG")] == rows * loads
    assert sorted(op for op in code.opcodes if op.startswith("STG")) == sorted(stores)


@pytest.mark.slow
@every_arch
@pytest.mark.parametrize(
    ("nbytes", "load"), [(2, "U16"), (4, ""), (8, "64"), (16, "128"), (32, "128")]
)
def test_loads_are_as_wide_as_the_access(arch, nbytes, load):
    spec = launched_on(QuantizeSpec(BF16, UE8M0, access=Access(nbytes, 16)), arch)
    code = machine_code(spec, arch)
    loads = [op for op in code.opcodes if op.startswith("LDG")]
    if architectures.named(arch).widest_load == nbytes == 32:
        assert loads == ["LDG.E.ENL2.256"]
    else:
        assert loads == [".".join(("LDG.E", load)).rstrip(".")] * (32 // min(nbytes, 16))


@pytest.mark.slow
@every_arch
@every_dtype
@every_format
@every_number_of_rows
def test_registers_and_shuffles_only(arch, dtype, fmt, rows):
    code = machine_code(launched_on(QuantizeSpec(dtype, fmt, TILES[rows]), arch), arch)
    assert code.count("SHFL") == 3 * rows
    assert_in_registers(code)


@pytest.mark.slow
@every_arch
@pytest.mark.parametrize("choices", VARIANTS.values(), ids=VARIANTS)
def test_registers_only(arch, choices):
    assert_in_registers(machine_code(launched_on(QuantizeSpec(*choices), arch), arch))


def assert_in_registers(code):
    assert code.count("LDS", "STS", "BAR", "ATOM", "ATOMS", "RED", "LDL", "STL") == 0
    assert code.stack == 0 and code.shared == 0


@every_arch
@pytest.mark.parametrize("tiles", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_row_that_is_one_group_is_read_once(arch, tiles):
    """All loads are in flight at once; registers leave an SM 32 warps."""
    spec = QuantizeSpec(BF16, ROWWISE_INT8, ONE_ROW._replace(tiles_per_thread=tiles))
    code = machine_code(launched_on(spec, arch), arch)
    wide = architectures.named(arch).widest_load == 32
    loads = [i for i, op in enumerate(code.opcodes) if op.startswith("LDG")]
    assert len(loads) == (tiles if wide else 2 * tiles)
    assert loads[-1] < code.opcodes.index("SHFL.BFLY")
    assert (code.count("SHFL"), code.count("BAR")) == (5, 1)
    assert code.count("LDL", "STL") == 0 and code.stack == 0 and code.registers <= 64


@pytest.mark.parametrize(("arch", "limit"), MAX_NORM.items())
def test_rows_that_are_normalized(arch, limit):
    """As launched for k = 7168, on sm_100a with three quarters of B200's issue slots."""
    least_tiles = heuristics.norm_tiles(arch)
    shape = heuristics.norm_shape(1, 4096, 7168, UE8M0, False, 132, least_tiles)
    tiles, warps = shape.tiles_per_thread, shape.max_warps
    code = machine_code(
        RmsNormSpec(BF16, UE8M0, shape.tile, Domain(), Access(), tiles, warps), arch
    )
    assert len(code.opcodes) <= limit
    gpu = architectures.named(arch).gpu
    assert limit <= 0.75 * gpu.issue_budget(tiles * BYTES_PER_WARP)
    assert code.stack == 0 and code.registers <= 64


@pytest.mark.parametrize(
    "spec",
    [
        QuantizeSpec(BF16, UE8M0, Tile(low_latency=True)),
        SiluMulSpec(BF16, UE8M0, Tile(8, low_latency=True)),
    ],
    ids=["quantize", "silu"],
)
def test_addresses_are_known_before_the_wait(spec):
    """The assembler would compute them after it: what a thread loads first is an instant away."""
    opcodes = machine_code(launched_on(spec, "sm_90a"), "sm_90a").opcodes
    wait = opcodes.index("ACQBULK")
    load = next(i for i, op in enumerate(opcodes) if op.startswith("LDG"))
    assert "IMAD.WIDE.U32" in opcodes[:wait]
    assert "S2R" not in opcodes[wait:load] and "IMAD.WIDE.U32" not in opcodes[wait:load]


@pytest.mark.slow
@every_arch
@every_dtype
@every_format
def test_no_division(arch, dtype, fmt):
    code = machine_code(launched_on(QuantizeSpec(dtype, fmt), arch), arch)
    if fmt is FLOAT32:
        assert code.count("MUFU") > 0  # the check below can fail
    else:
        assert code.count("CALL", "MUFU", "FCHK") == 0


@every_format
@every_number_of_rows
def test_instruction_budget(fmt, rows):
    code = machine_code(QuantizeSpec(BF16, fmt, TILES[rows]), "sm_100a")
    assert len(code.opcodes) <= MAX_INSTRUCTIONS[fmt, rows]


@every_arch
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "fmt",
    [
        DEEP_GEMM,
        *(pytest.param(fmt, marks=pytest.mark.slow) for fmt in (DEEP_GEMM_SM90, MXFP8, MXFP4)),
    ],
    ids=str,
)
def test_blocks_of_weights(fmt, transposed, arch):
    """Vectors as wide as the architecture has them, no spills, and 4 CTAs of 8 warps on an SM.

    For sm_107a the assembler takes more registers through shared memory, and 3 CTAs fit.
    """
    w = torch.empty(4096, 4096, dtype=BF16, device="meta")
    q = torch.empty(4096, fmt.value_columns(4096), dtype=fmt.values, device="meta")
    spec = blocks.choose_spec(w.mT if transposed else w, fmt, q, arch)
    code = machine_code(spec, arch)
    values = spec.values_per_thread
    width = ".256" if values * BF16.itemsize == 32 else ".128"
    loads = [opcode for opcode in code.opcodes if opcode.startswith("LDG")]
    assert len(loads) == 64 // values and all(opcode.endswith(width) for opcode in loads)
    assert code.count("BAR") == 1 + transposed
    assert code.stack == 0 and code.registers <= (80 if arch == "sm_107a" and transposed else 64)
    assert code.count("CALL") == 0
