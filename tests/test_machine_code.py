"""What the kernels compile to, on a machine without a GPU."""

import cutlass
import pytest

from bench.sass import machine_code
from cute_quant.compile import ARCHITECTURES
from cute_quant.kernels.quantize import Quantize
from tests.helpers import FLOAT32, FLOAT32_ROUNDED, FORMATS, UE8M0, format_id

MAX_INSTRUCTIONS = {
    (UE8M0, 1): 96,
    (UE8M0, 2): 165,
    (FLOAT32, 1): 298,
    (FLOAT32, 2): 421,
    (FLOAT32_ROUNDED, 1): 99,
    (FLOAT32_ROUNDED, 2): 165,
}
"""Budgets of the bf16 kernels on sm_100a, by format and rows a thread. They only ever go down."""

every_arch = pytest.mark.parametrize("arch", ARCHITECTURES.values())
every_dtype = pytest.mark.parametrize("dtype", [cutlass.BFloat16, cutlass.Float16])
every_number_of_rows = pytest.mark.parametrize("rows", [1, 2])
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=format_id)


@every_arch
@every_dtype
@every_format
@every_number_of_rows
def test_memory_instructions(arch, dtype, fmt, rows):
    code = machine_code(Quantize, arch, dtype, fmt, rows)
    loads = ["LDG.E.128"] * 2 if arch == "sm_90a" else ["LDG.E.ENL2.256"]
    stores = ["STG.E.U8" if fmt.packed else "STG.E"] + rows * ["STG.E.128"]
    assert [op for op in code.opcodes if op.startswith("LDG")] == rows * loads
    assert sorted(op for op in code.opcodes if op.startswith("STG")) == sorted(stores)


@every_arch
@every_dtype
@every_format
@every_number_of_rows
def test_registers_and_shuffles_only(arch, dtype, fmt, rows):
    code = machine_code(Quantize, arch, dtype, fmt, rows)
    assert code.count("SHFL") == 3 * rows
    assert code.count("LDS", "STS", "BAR", "ATOM", "ATOMS", "RED", "LDL", "STL") == 0
    assert code.stack == 0 and code.shared == 0


@every_arch
@every_dtype
@every_format
def test_no_division(arch, dtype, fmt):
    code = machine_code(Quantize, arch, dtype, fmt)
    if fmt is FLOAT32:
        assert code.count("MUFU") > 0  # the check below can fail
    else:
        assert code.count("CALL", "MUFU", "FCHK") == 0


@every_format
@every_number_of_rows
def test_instruction_budget(fmt, rows):
    code = machine_code(Quantize, "sm_100a", cutlass.BFloat16, fmt, rows)
    assert len(code.opcodes) <= MAX_INSTRUCTIONS[fmt, rows]
