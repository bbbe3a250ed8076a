"""Resources of synthetic kernels whose bound is known, and ranks."""

import dataclasses

import pytest
import torch

from bench import resources, sass
from bench.resources import (
    ALU,
    CONVERT,
    FMA,
    IN_FLIGHT,
    ISSUE,
    MACHINES,
    MEMORY,
    MUFU,
    SHARED,
    Launch,
    bound,
    rank_correlation,
)
from bench.stream import Stream
from cute_quant import ROWWISE_INT8
from cute_quant.kernels.config import ONE_ROW, QuantizeSpec, RmsNormSpec, Tile
from cute_quant.lab.machine_code import Control, MachineCode, controls, machine_code
from tests.helpers import UE8M0

H100 = MACHINES["sm_90a"]
WARPS = 4
STEP = Control(1, None, ())


def kernel(*opcodes, registers=32, shared=0):
    """Return the code of a kernel: the wait for the one before, a load, the wait for that, others.

    The other instructions have fixed latencies.
    """
    names = ("ACQBULK", "LDG.E.128", "IADD3", *opcodes, "EXIT")
    waits = {1: Control(1, 0, ()), 2: Control(1, None, (0,))}
    steps = tuple(waits.get(i, STEP) for i in range(len(names)))
    return MachineCode(names, "", registers, 0, shared, steps)


def launch(code, ctas=H100.gpu.sms * 1000, nbytes=1):
    return Launch(code, ctas, WARPS, nbytes, 1 << 40)


@pytest.mark.parametrize(
    ("first", "code", "nbytes"),
    [
        (ISSUE, kernel(*["UMOV"] * 4000), 1),
        (ALU, kernel(*["LOP3.LUT"] * 4000), 1),
        (FMA, kernel(*["FFMA2"] * 4000), 1),
        (CONVERT, kernel(*["F2FP.SATFINITE.E4M3"] * 4000), 1),
        (MUFU, kernel(*["MUFU.RSQ"] * 2000), 1),
        (SHARED, kernel(*["LDS.128"] * 1000), 1),
        (MEMORY, kernel(), 1 << 40),
        (IN_FLIGHT, kernel(registers=255), 1),
        (IN_FLIGHT, kernel(shared=200 * 1024), 1),
    ],
)
def test_what_binds_first(first, code, nbytes):
    assert bound(launch(code, nbytes=nbytes), H100).first == first
    of_warp = resources.steady(code, WARPS, nbytes, H100)
    assert max(of_warp, key=of_warp.get) == first


@pytest.mark.parametrize(
    ("opcode", "pipe", "cycles"),
    [
        ("SHFL.BFLY", SHARED, 1),
        ("LDS.128", SHARED, 4),
        ("STG.E.U8", SHARED, 0.25),
        ("LDG.E.ENL2.256", SHARED, 8),
        ("FFMA", FMA, 0.25),
        ("FADD2", FMA, 0.5),
        ("IMAD.WIDE", FMA, 0.5),
        ("VIMNMX.U16x2", ALU, 0.5),
        ("MUFU.EX2", MUFU, 2),
        ("F2FP.BF16", CONVERT, 0.5),
        ("ULDC", ISSUE, 0.25),
    ],
)
def test_cycles_of_an_instruction(opcode, pipe, cycles):
    with_it, without = (resources.demands(kernel(*names)) for names in ((opcode,), ()))
    assert with_it[pipe] - without.get(pipe, 0) == cycles
    assert with_it[ISSUE] - without[ISSUE] == 0.25


def test_slow_paths_behind_the_exit_are_not_executed():
    code = kernel("FADD")
    slow = dataclasses.replace(
        code,
        opcodes=(*code.opcodes, *["FFMA"] * 60, "RET"),
        controls=(*code.controls, *[STEP] * 61),
    )
    assert resources.demands(slow) == resources.demands(code)
    assert resources.life(slow, 500) == resources.life(code, 500)


def test_a_life_is_latencies_and_stalls():
    # A wait, the load's latency, the instruction that waits for it, and the exit.
    assert resources.life(kernel(), 500) == 503
    assert resources.life(kernel("FADD", "FADD"), 500) == 505
    code = kernel()
    stalls = dataclasses.replace(code, controls=(*code.controls[:-1], Control(5, None, ())))
    assert resources.life(stalls, 500) == 507
    # What comes before the wait for another kernel runs meanwhile.
    names, steps = ("S2R", *code.opcodes), (Control(9, 3, ()), *code.controls)
    earlier = dataclasses.replace(code, opcodes=names, controls=steps)
    assert resources.life(earlier, 500) == 503


def test_fewer_warps_have_fewer_bytes_in_flight():
    few, many = kernel(registers=128), kernel(registers=64)
    assert resources.resident_ctas(few, WARPS, "sm_90a") == 4
    assert resources.resident_ctas(many, WARPS, "sm_90a") == 8
    seconds = [bound(launch(code), H100).seconds[IN_FLIGHT] for code in (few, many)]
    assert seconds[0] == pytest.approx(2 * seconds[1], rel=0.01)
    assert resources.bytes_in_flight(few) == 512
    assert resources.resident_ctas(kernel(shared=100 * 1024), WARPS, "sm_90a") == 2
    assert resources.resident_ctas(kernel(registers=255), 32, "sm_90a") == 1


def test_a_small_launch_takes_its_gap_and_a_life():
    code = kernel(*["UMOV"] * 400)
    one, full, more = (bound(launch(code, ctas), H100) for ctas in (1, 132, 133))
    assert one.estimate == full.estimate > H100.launch
    # The tail: an SM has two CTAs.
    assert more.seconds[ISSUE] == 2 * full.seconds[ISSUE]
    waves = bound(launch(code, 132 * 16 * 3), H100)
    assert waves.fixed - H100.launch == pytest.approx(2 * (one.fixed - H100.launch))


def test_a_cache_holds_what_is_moved_again_soon():
    code, nbytes = kernel(), 10**6
    kept, lost = (
        bound(Launch(code, 1, WARPS, nbytes, cycled), H100)
        for cycled in (H100.l2_bytes // 2, H100.l2_bytes)
    )
    assert kept.seconds[MEMORY] == pytest.approx(nbytes / H100.l2_bandwidth)
    assert lost.seconds[MEMORY] == pytest.approx(nbytes / (H100.gpu.bandwidth * H100.sustained))
    assert lost.fixed - kept.fixed == pytest.approx(H100.memory_latency - H100.l2_latency)


def test_rank_correlation():
    assert rank_correlation([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [9, 5, 4]) == pytest.approx(-1)
    # Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: 4.5 / sqrt(4.5 * 5).
    assert rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / 22.5**0.5)
    assert rank_correlation([5, 5], [1, 2]) == 0
    with pytest.raises(ValueError, match="b: expected 3 values as of a, got 2"):
        rank_correlation([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="b: expected 2 values as of a, got 1"):
        rank_correlation([1], [1])


def test_control_bits_of_a_listing():
    listing = """
        /*0120*/   LDG.E.128 R4, desc[UR4][R16.64] ;   /* 0x0000000410047981 */
                                                       /* 0x000ea8000c1e1d00 */
        /*0130*/   IMAD.WIDE.U32 R4, R13, UR4, R4 ;    /* 0x000000040d047c25 */
                                                       /* 0x042fe2000f8e0004 */
    """
    assert controls(listing) == (Control(4, 2, ()), Control(1, None, (1,)))


def test_lines_about_the_resources_of_a_kernel():
    spec = QuantizeSpec(torch.bfloat16, UE8M0)
    lines = sass.resource_lines(spec, machine_code(spec, "sm_90a"), 1, H100)
    text = " ".join(map(str.strip, lines))
    assert "H100, estimated cycles of an SM for 512 elements: memory 129.9, issue slots" in text
    assert text.endswith("Bound by memory. 64 warps load 64 KB at once.")


def test_warps_of_a_cta():
    bf16 = torch.bfloat16
    assert sass.cta_warps(Stream(True, threads=256)) == 8
    assert sass.cta_warps(QuantizeSpec(bf16, UE8M0, Tile(row_warps=2, column_warps=4))) == 8
    assert sass.cta_warps(RmsNormSpec(bf16, UE8M0, Tile(row_warps=2), max_warps=3)) == 6
    assert sass.cta_warps(QuantizeSpec(bf16, ROWWISE_INT8, ONE_ROW, max_warps=7)) == 7


@pytest.mark.parametrize("arch", MACHINES)
def test_every_instruction_has_control_bits(arch):
    code = machine_code(QuantizeSpec(torch.bfloat16, UE8M0), arch)
    assert len(code.controls) == len(code.opcodes)
    steps = dict(zip(code.opcodes, code.controls, strict=True))
    assert (
        steps["SHFL.BFLY"].sets is not None
        and steps["F2FP.SATFINITE.E4M3.F32.PACK_AB_MERGE_C"].sets is None
    )
    assert any(control.waits for control in code.controls)
    # A load from memory, three shuffles, and the arithmetic in between.
    assert 600 < resources.life(code, 500) < 1000
