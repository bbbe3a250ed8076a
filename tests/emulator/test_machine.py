"""Parsing, flow of control, lanes and memory, on kernels of a few lines."""

import struct

import numpy as np
import pytest
import torch

from tests.emulator import machine, ptx
from tests.emulator.errors import (
    Deadlock,
    EmulatorError,
    MemoryFault,
    UndefinedValue,
    UnknownInstruction,
)
from tests.emulator.memory import Memory

LANE = "mov.u32 %r0, %tid.x;"
STORE = "mul.wide.u32 %w1, %r0, 4; add.s64 %w1, %w0, %w1; st.global.b32 [%w1], %r1;"


def program(body: str) -> machine.Program:
    text = f"""
    .version 8.8
    .target sm_100a
    .address_size 64
    .visible .entry k(.param .u64 out, .param .align 8 .b8 extra[16])
    {{
        .reg .pred %p<8>; .reg .b16 %h<8>; .reg .b32 %r<16>; .reg .b64 %w<8>;
        ld.param.b64 %w0, [out];
        {body}
    }}
    """
    return machine.Program(ptx.parse(text)["k"])


def run(body: str, block=(32, 1, 1), grid=(1, 1, 1), words=None, **options) -> list[int]:
    """The words that the kernel left in its output, by default one for each thread."""
    out = torch.full((words or int(np.prod(block) * np.prod(grid)),), -1, dtype=torch.int32)
    memory = Memory()
    arguments = struct.pack("<Q", memory.add("out", out, False)), struct.pack("<4i", 1, 2, 3, 4)
    machine.run(program(body), grid, block, arguments, memory, **options)
    return out.tolist()


def test_divergent_branches_meet_again():
    body = f"""{LANE}
        and.b32 %r2, %r0, 1;
        setp.eq.b32 %p0, %r2, 0;
        @%p0 bra EVEN;
        mov.b32 %r1, 100;
        bra.uni JOIN;
    EVEN:
        mov.b32 %r1, 200;
    JOIN:
        shfl.sync.bfly.b32 %r1, %r1, 1, 31, -1;
        {STORE} ret;"""
    assert run(body) == [100, 200] * 16


def test_backward_branches_with_counts_of_their_own():
    body = f"""{LANE}
        mov.b32 %r1, 0;
        mov.b32 %r2, %r0;
    LOOP:
        setp.eq.b32 %p0, %r2, 0;
        @%p0 bra DONE;
        add.s32 %r1, %r1, %r2;
        add.s32 %r2, %r2, -1;
        bra LOOP;
    DONE:
        {STORE} ret;"""
    assert run(body, block=(48, 1, 1)) == [n * (n + 1) // 2 for n in range(48)]


def test_shuffle_waits_for_lanes_that_come_from_above():
    """Half of the warp reaches the shuffle first, though it stands lower in the text."""
    body = f"""{LANE}
        setp.lt.u32 %p0, %r0, 16;
        mov.b32 %r1, %r0;
        @%p0 bra AWAY;
    MEET:
        shfl.sync.bfly.b32 %r1, %r1, 16, 31, -1;
        {STORE} ret;
    AWAY:
        add.s32 %r1, %r1, 1000;
        bra MEET;"""
    assert run(body) == [*range(16, 32), *range(1000, 1016)]


def test_shuffle_without_its_lanes():
    body = f"""{LANE}
        setp.eq.b32 %p0, %r0, 5;
        @%p0 bra OUT;
        shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;
    OUT:
        shfl.sync.idx.b32 %r1, %r0, 0, 31, -1;
        ret;"""
    with pytest.raises(Deadlock, match=r"thread \(\d+, 0, 0\): .*shfl\.sync"):
        run(body)


def test_shuffle_does_not_wait_for_exited_lanes_but_their_values_are_undefined():
    body = f"""{LANE}
        setp.ge.u32 %p0, %r0, 8;
        @%p0 exit;
        shfl.sync.down.b32 %r1, %r0, 4, 31, -1;
        setp.lt.u32 %p1, %r0, 4;
        @%p1 {STORE.replace("; ", "; @%p1 ")}
        ret;"""
    assert run(body)[:5] == [4, 5, 6, 7, -1]
    with pytest.raises(UndefinedValue, match=r"thread \(4, 0, 0\): .*%r1 is undefined"):
        run(body.replace("@%p1 ", ""))


def test_shuffle_outside_of_its_own_mask():
    with pytest.raises(EmulatorError, match="not in its own membermask 0x0000ffff"):
        run(f"{LANE} shfl.sync.bfly.b32 %r1, %r0, 1, 31, 0xFFFF; ret;")


def test_shuffle_modes_and_segments():
    for mode, b, c, expected in (
        ("up", 2, 0, [0, 1, *range(30)]),
        ("down", 3, 31, [*range(3, 32), 29, 30, 31]),
        ("bfly", 9, 31, [n ^ 9 for n in range(32)]),
        ("idx", 5, 31, [5] * 32),
        ("idx", 5, 0x181F, [n & 24 | 5 for n in range(32)]),
        ("down", 1, 0x181F, [n if n % 8 == 7 else n + 1 for n in range(32)]),
    ):
        body = f"{LANE} shfl.sync.{mode}.b32 %r1|%p0, %r0, {b}, {c}, -1; {STORE} ret;"
        assert run(body) == expected, mode


def test_votes():
    agree = f"""{LANE} and.b32 %r2, %r0, 8; setp.ne.b32 %p0, %r2, 0;"""
    assert (
        run(f"{agree} vote.sync.ballot.b32 %r1, %p0, -1; {STORE} ret;") == [0xFF00FF00 - 2**32] * 32
    )
    for mode, expected in (("any", 1), ("all", 0), ("uni", 0)):
        body = f"{agree} vote.sync.{mode}.pred %p1, %p0, -1; selp.b32 %r1, 1, 0, %p1; {STORE} ret;"
        assert run(body) == [expected] * 32, mode
    body = f"""{LANE} setp.eq.b32 %p0, %r0, 5; @%p0 bra OUT;
        vote.sync.ballot.b32 %r1, %p0, -1;
    OUT: vote.sync.ballot.b32 %r1, %p0, 32; ret;"""
    with pytest.raises(EmulatorError, match="not in its own membermask"):
        run(body)


def test_undefined_bits_may_be_moved_but_not_used():
    pack = f"{LANE} cvt.u16.u32 %h0, %r0; mov.b32 %r2, {{%h0, %h1}};"
    assert run(f"{pack} prmt.b32 %r1, %r2, 0, 0x7710; {STORE} ret;") == list(range(32))
    with pytest.raises(UndefinedValue, match=r"%r2 is undefined"):
        run(f"{pack} add.u32 %r1, %r2, 0; {STORE} ret;")


def test_local_memory():
    local = f".local .align 16 .b8 depot[32]; {LANE} mov.b64 %w2, depot; st.local.b32 [%w2+4], %r0;"
    assert run(f"{local} ld.local.b32 %r1, [%w2+4]; {STORE} ret;") == list(range(32))
    for place, problem in ((32, "access of 4 bytes to local"), (8, "that nobody wrote")):
        with pytest.raises(MemoryFault, match=problem):
            run(f"{local} ld.local.b32 %r1, [%w2+{place}]; {STORE} ret;")


def test_threads_blocks_and_grids():
    body = (
        """mov.u32 %r2, %tid.y; mov.u32 %r3, %ntid.x; mov.u32 %r4, %tid.x;
        mad.lo.u32 %r0, %r2, %r3, %r4;
        mov.u32 %r2, %ctaid.z; mov.u32 %r3, %nctaid.x; mov.u32 %r4, %ctaid.x;
        mad.lo.u32 %r5, %r2, %r3, %r4;
        mad.lo.u32 %r0, %r5, 12, %r0;
        mov.u32 %r1, %r0;"""
        + f"{STORE} ret;"
    )
    assert run(body, block=(4, 3, 1), grid=(2, 1, 3)) == list(range(72))
    some = run(body, block=(4, 3, 1), grid=(2, 1, 3), only=[(1, 0, 2)])
    assert some == [-1] * 60 + list(range(60, 72))


def test_many_batches():
    body = (
        """mov.u32 %r2, %ctaid.x; mov.u32 %r3, %tid.x; mad.lo.u32 %r0, %r2, 128, %r3;
        mov.u32 %r1, %r0;"""
        + f"{STORE} ret;"
    )
    blocks = machine.THREADS_PER_BATCH // 128 * 2 + 1
    result = run(body, block=(128, 1, 1), grid=(blocks, 1, 1))
    assert result == list(range(blocks * 128))


def test_packing_and_scopes():
    body = f"""{LANE}
        mov.b64 %w2, {{%r0, 7}};
        mov.b64 {{_, %r1}}, %w2;
        {{ .reg .b32 %r1; mov.b32 %r1, 99; }}
        mov.b32 {{%h0, %h1}}, 0x00050003;
        cvt.u32.u16 %r2, %h1;
        add.u32 %r1, %r1, %r2;
        {STORE} ret;"""
    assert run(body) == [12] * 32


def test_parameters():
    body = f"""{LANE} ld.param.v2.b32 {{%r2, %r1}}, [extra+8]; {STORE} ret;"""
    assert run(body) == [4] * 32
    with pytest.raises(UnknownInstruction, match="past the parameter"):
        program("ld.param.v2.b32 {%r2, %r1}, [extra+12]; ret;")


def test_a_grid_alone_depends_on_no_other():
    body = f"griddepcontrol.wait; {LANE} mov.b32 %r1, 3; {STORE} griddepcontrol.launch_dependents;"
    assert run(f"{body} ret;") == [3] * 32


@pytest.mark.parametrize(
    "instruction",
    [
        "add.sat.s32 %r1, %r1, %r1",
        "mul.ftz.f32 %r1, %r1, %r1",
        "cvt.rz.f16.f32 %h1, %r1",
        "ld.volatile.global.b32 %r1, [%w0]",
        "st.global.v3.b32 [%w0], {%r1, %r1, %r1}",
        "bar.arrive 0, 64",
        "shfl.bfly.b32 %r1, %r1, 1, 31",
        "frobnicate.b32 %r1",
    ],
)
def test_unknown_instructions_are_named(instruction):
    opcode = instruction.split(" ")[0].replace(".", r"\.")
    with pytest.raises(UnknownInstruction, match=rf"k: line \d+: .*unknown instruction {opcode}"):
        program(f"{instruction}; ret;")


@pytest.mark.parametrize(
    "instruction",
    [
        "add.s32 %r1, %r1, %w1",
        "add.s32 %h1, %r1, %r1",
        "add.s32 %r1, %r1, 0f3F800000",
        "mul.f32 %r1, %r1, 1",
        "add.s32 %r1, {%h0, %h1}, %r1",
        "add.s32 %r1, %r1",
        "bra NOWHERE",
        "ld.global.b32 %r1, [%r1]",
    ],
)
def test_operands_must_fit(instruction):
    with pytest.raises(UnknownInstruction):
        program(f"{instruction}; ret;")


def test_undefined_registers():
    with pytest.raises(UndefinedValue, match=r"thread \(0, 0, 0\): line \d+: .*%r7 is undefined"):
        run("add.s32 %r1, %r7, 1; ret;")
    body = f"""{LANE} setp.ne.b32 %p0, %r0, 9; @%p0 mov.b32 %r1, 1; {STORE} ret;"""
    with pytest.raises(UndefinedValue, match=r"thread \(9, 0, 0\)"):
        run(body)


def test_block_of_another_size():
    text = ".target sm_90\n.entry k()\n.reqntid 64, 1, 1\n{ ret; }"
    with pytest.raises(EmulatorError, match="compiled for"):
        machine.run(machine.Program(ptx.parse(text)["k"]), (1, 1, 1), (32, 1, 1), (), Memory())


def test_stores_out_of_bounds():
    body = f"{LANE} mov.b32 %r1, 0; {STORE} ret;"
    with pytest.raises(MemoryFault) as caught:
        run(body, grid=(1, 2, 1), words=31)
    message = str(caught.value)
    assert "k: block (0, 0, 0) thread (31, 0, 0): line " in message
    assert (
        "store of 4 bytes at 0x1800000007c out of bounds; 0 bytes past the end of 'out'" in message
    )
    with pytest.raises(MemoryFault, match="4 bytes before the start of 'out'"):
        run("mov.b32 %r1, 0; st.global.b32 [%w0+-4], %r1; ret;")
    with pytest.raises(MemoryFault, match="outside of every tensor"):
        run("mov.b32 %r1, 0; mov.b64 %w1, 4096; st.global.b32 [%w1], %r1; ret;")


def test_misaligned():
    with pytest.raises(MemoryFault, match="misaligned for 8 bytes"):
        run("mov.b32 %r1, 0; st.global.v2.b32 [%w0+4], {%r1, %r1}; ret;")


def test_read_of_bytes_nobody_wrote():
    with pytest.raises(MemoryFault, match=r"load of 4 bytes .* that nobody wrote; byte 8 of 'out'"):
        run("ld.global.b32 %r1, [%w0+8]; ret;")


def test_two_threads_write_a_byte():
    with pytest.raises(MemoryFault, match=r"thread \(\d+, 0, 0\): .*another thread"):
        run("mov.b32 %r1, 0; st.global.b32 [%w0], %r1; ret;")
    later = f"""{LANE} mov.b32 %r1, 0; {STORE}
        and.b32 %r2, %r0, 30; setp.eq.b32 %p0, %r0, 3; mov.b32 %r0, %r2;
        @%p0 {STORE.replace("; ", "; @%p0 ")} ret;"""
    with pytest.raises(MemoryFault, match=r"thread \(3, 0, 0\): .*another thread"):
        run(later)


def test_read_of_what_another_thread_wrote():
    body = f"""{LANE} mov.b32 %r1, 0; {STORE} ld.global.b32 %r2, [%w0]; ret;"""
    with pytest.raises(MemoryFault, match=r"thread \(1, 0, 0\): .*load of 4 bytes"):
        run(body)


def test_256_bits():
    body = """mov.b64 %w1, 1; mov.b64 %w2, 2;
        st.global.v4.b64 [%w0], {%w1, %w2, %w1, %w2};
        ld.global.v8.b32 {%r0, %r1, %r2, %r3, %r4, %r5, %r6, %r7}, [%w0];
        st.global.v8.b32 [%w0+32], {%r7, %r6, %r5, %r4, %r3, %r2, %r1, %r0}; ret;"""
    assert run(body, block=(1, 1, 1), words=16) == [1, 0, 2, 0] * 2 + [0, 2, 0, 1] * 2


def test_watch_prints_the_registers_of_a_thread(capsys):
    run(f"{LANE} add.u32 %r1, %r0, 1; {STORE} ret;", watch=((0, 0, 0), (6, 0, 0)))
    lines = capsys.readouterr().out.splitlines()
    assert any(line.endswith("%r1 = 0x7") and "add.u32" in line for line in lines)
