"""Parsing, flow of control, lanes and memory, on kernels of a few lines."""

import re
import struct

import numpy as np
import pytest
import torch

from cute_quant.emulator import machine, ptx
from cute_quant.emulator.errors import (
    Deadlock,
    EmulatorError,
    MemoryFault,
    UndefinedValue,
    UnknownInstruction,
)
from cute_quant.emulator.memory import Memory

LANE = "mov.u32 %r0, %tid.x;"
STORE = "mul.wide.u32 %w1, %r0, 4; add.s64 %w1, %w0, %w1; st.global.b32 [%w1], %r1;"


def program(body: str, limits: str = "") -> machine.Program:
    text = f"""
    .version 8.8
    .target sm_100a
    .address_size 64
    .visible .entry k(.param .u64 out, .param .align 8 .b8 extra[16])
    {limits}
    {{
        .reg .pred %p<8>; .reg .b16 %h<8>; .reg .b32 %r<16>; .reg .b64 %w<8>;
        ld.param.b64 %w0, [out];
        {body}
    }}
    """
    return machine.Program(ptx.parse(text)["k"])


def run(body: str, block=(32, 1, 1), grid=(1, 1, 1), words=None, limits="", **options) -> list[int]:
    """The words that the kernel left in its output, by default one for each thread."""
    out = torch.full((words or int(np.prod(block) * np.prod(grid)),), -1, dtype=torch.int32)
    memory = Memory()
    arguments = struct.pack("<Q", memory.add("out", out, False)), struct.pack("<4i", 1, 2, 3, 4)
    machine.run(program(body, limits), grid, block, arguments, memory, **options)
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
    with pytest.raises(UnknownInstruction, match=rf"line \d+ of k: .*unknown instruction {opcode}"):
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


@pytest.mark.parametrize("half", [0, 1], ids=["low", "high"])
def test_halves_of_packed_operands_are_defined_by_themselves(half):
    """Of a sum of pairs, the half of which nothing was defined may not be used, the other may."""
    halves = ["%r1", "%r2"]
    halves[half] = "%r7"  # that nothing defines
    used = ["%r1", "%r2"][1 - half]
    body = f"""{LANE} mov.b32 %r1, 0f3F800000; mov.b32 %r2, %r1;
        mov.b64 %w2, {{{", ".join(halves)}}}; add.rn.f32x2 %w2, %w2, %w2; mov.b64 {{%r1, %r2}}, %w2;
        mov.b32 %r1, {used}; {STORE} ret;"""
    assert run(body) == [0x40000000] * 32
    unused = "%r2" if used == "%r1" else "%r1"
    with pytest.raises(UndefinedValue, match="is undefined"):
        run(body.replace(f"mov.b32 %r1, {used}; mul", f"add.s32 %r1, {unused}, 1; mul"))


def test_undefined_registers():
    with pytest.raises(
        UndefinedValue, match=r"thread \(0, 0, 0\): line \d+ of k: .*%r7 is undefined"
    ):
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
    assert message.startswith("block (0, 0, 0) thread (31, 0, 0): line 10 of k: `st.global.b32 ")
    place = r"at 0x18000000[0-9a-f]{3} out of bounds; 0 bytes past the end of 'out'"
    assert re.search(f"store of 4 bytes {place}", message)
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


# Shared memory and barriers

IN_BLOCK = """mov.u32 %r0, %tid.x; mov.u32 %r14, %tid.y; mov.u32 %r15, %ntid.x;
    mad.lo.u32 %r0, %r14, %r15, %r0; mov.u32 %r14, %tid.z; mov.u32 %r15, %ntid.y;
    mul.lo.u32 %r14, %r14, %r15; mov.u32 %r15, %ntid.x; mad.lo.u32 %r0, %r14, %r15, %r0;"""
"""The number of a thread in its block."""
SHARED = f""".shared .align 4 .b8 place[256]; {IN_BLOCK}
    mov.b32 %r2, place; mad.lo.u32 %r2, %r0, 4, %r2;
    xor.b32 %r3, %r0, 33; mov.b32 %r4, place; mad.lo.u32 %r4, %r3, 4, %r4;"""
"""Addresses of a thread's word, and of that of another thread of another warp, for 64 threads."""
PUT, GET = "st.shared.b32 [%r2], %r0;", "ld.shared.b32 %r1, [%r4];"
TWO_WARPS = {"block": (32, 2, 1)}
CROSSED = [n ^ 33 for n in range(64)]


@pytest.mark.parametrize(
    "barrier", ["bar.sync 0;", "barrier.sync 3;", "barrier.cta.sync.aligned 15;", "bar.cta.sync 1;"]
)
def test_exchange_through_shared_memory(barrier):
    assert run(f"{SHARED} {PUT} {barrier} {GET} {STORE} ret;", **TWO_WARPS) == CROSSED


def test_blocks_have_shared_memory_of_their_own():
    body = f"""{SHARED} mov.u32 %r5, %ctaid.x; mad.lo.u32 %r6, %r5, 1000, %r0;
        st.shared.b32 [%r2], %r6; bar.sync 0; {GET}
        mad.lo.u32 %r0, %r5, 64, %r0; {STORE} ret;"""
    result = run(body, grid=(3, 1, 1), **TWO_WARPS)
    assert result == [1000 * block + n for block in range(3) for n in CROSSED]


def test_blocks_of_three_dimensions():
    """Of more than 128 threads, and as many as are known at launch alone."""
    body = f""".shared .b32 place[1024]; {IN_BLOCK}
        mov.b32 %r2, place; mad.lo.u32 %r3, %r0, 4, %r2; st.shared.b32 [%r3], %r0; bar.sync 0;
        mov.u32 %r4, %ntid.x; mov.u32 %r5, %ntid.y; mul.lo.u32 %r4, %r4, %r5;
        mov.u32 %r5, %ntid.z; mul.lo.u32 %r4, %r4, %r5; sub.u32 %r4, %r4, 1; sub.u32 %r4, %r4, %r0;
        mad.lo.u32 %r4, %r4, 4, %r2; ld.shared.b32 %r1, [%r4]; {STORE} ret;"""
    for block in ((32, 7, 3), (32, 32, 1), (32, 1, 4), (8, 3, 5)):
        threads = int(np.prod(block))
        assert run(body, block=block, limits=".maxntid 32, 32, 1") == [*range(threads)][::-1]


def test_barriers_in_loops():
    """Also between reads and the next writes; blocks go round as often as their number says."""
    body = f"""{SHARED} mov.u32 %r5, %ctaid.x; mov.u32 %r6, 0; mov.b32 %r1, %r0;
    AGAIN:
        st.shared.b32 [%r2], %r1; bar.sync 0; {GET} add.u32 %r1, %r1, 1; bar.sync 0;
        setp.ge.u32 %p0, %r6, %r5; @%p0 bra DONE; add.u32 %r6, %r6, 1; bra AGAIN;
    DONE:
        mad.lo.u32 %r0, %r5, 64, %r0; {STORE} ret;"""
    expected = [n + 1 for n in CROSSED] + [n + 2 for n in range(64)] + [n + 3 for n in CROSSED]
    assert run(body, grid=(3, 1, 1), **TWO_WARPS) == expected
    first, second = body.split("add.u32 %r1, %r1, 1; bar.sync 0;")
    with pytest.raises(MemoryFault, match=r"store .* that another thread read since the last barr"):
        run(f"{first} add.u32 %r1, %r1, 1; {second}", grid=(3, 1, 1), **TWO_WARPS)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (f"{PUT} {GET}", "load .* that another thread wrote since the last barrier"),
        (f"{PUT} bar.sync 0; {GET} st.shared.b32 [%r2], %r1;", "store .* another thread read"),
        (f"{PUT} bar.sync 0; st.shared.b8 [place+3], %r0;", "store .* another thread wrote"),
        (f"{PUT} st.shared.b32 [%r4], %r0;", "store .* another thread wrote"),
    ],
)
def test_races(body, problem):
    with pytest.raises(MemoryFault, match=problem):
        run(f"{SHARED} {body} ret;", **TWO_WARPS)


def test_what_is_no_race():
    """All read a word, a thread what it wrote itself, and one writes what it alone has read."""
    body = f"""{SHARED} {PUT} ld.shared.b32 %r5, [%r2]; bar.sync 0; ld.shared.b32 %r5, [place+4];
        ld.shared.b32 %r5, [place+4]; bar.sync 0;
        ld.shared.b32 %r1, [%r2]; add.u32 %r1, %r1, %r5; st.shared.b32 [%r2], %r1; {STORE} ret;"""
    assert run(body, **TWO_WARPS) == [n + 1 for n in range(64)]


def test_write_to_device_memory_that_another_thread_read():
    """Of a tensor that a kernel reads and writes, such as a residual."""
    values = torch.arange(64, dtype=torch.int32)
    body = f"""{LANE} mul.wide.u32 %w1, %r0, 4; add.s64 %w1, %w0, %w1;
        ld.global.b32 %r1, [%w1{{0}}]; add.u32 %r1, %r1, 5; {STORE} ret;"""
    extra = struct.pack("<4i", 1, 2, 3, 4)
    for offset in ("", "+4"):
        memory = Memory()
        arguments = memory.add("in", values, True), memory.add("out", values[:32], False)
        assert arguments[0] == arguments[1]
        arguments = struct.pack("<Q", arguments[1]), extra
        code = program(body.replace("{0}", offset))
        if not offset:
            machine.run(code, (1, 1, 1), (32, 1, 1), arguments, memory)
            assert values.tolist() == [*range(5, 37), *range(32, 64)]
            continue
        with pytest.raises(MemoryFault, match=r"another thread read in this launch; .* of 'in'"):
            machine.run(code, (1, 1, 1), (32, 1, 1), arguments, memory)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("ld.shared.b32 %r1, [place+256];", "out of bounds; 0 bytes past the end of 'place'"),
        ("st.shared.b32 [%r2+-4], %r0;", "4 bytes before the start of 'place' .256 bytes"),
        ("st.shared.b8 [%r0], %r0;", "outside of every shared variable"),
        ("st.shared.b32 [%r2+2], %r0;", "misaligned for 4 bytes"),
        ("st.shared.v2.b32 [place], {%r0, %r0};", "misaligned for 8 bytes"),  # as it is declared
        (f"{PUT} bar.sync 0; ld.shared.b8 %r1, [other];", "of bytes that nobody wrote"),
        ("mov.b32 %r1, other; sub.u32 %r1, %r1, %r2; add.u32 %r1, %r1, %r2; add.u32 %r1, %r1, 5;"
         "st.shared.b8 [%r1], %r0;", "1 bytes past the end of 'other'"),
        ("st.global.b32 [%w1], %r0;", "outside of every tensor"),
    ],
)  # fmt: skip
def test_faults_in_shared_memory(body, problem):
    addresses = "cvt.u64.u32 %w1, %r2;"
    with pytest.raises(MemoryFault, match=problem):
        run(f".shared .align 1 .b8 other[4]; {SHARED} {addresses} {body} ret;", **TWO_WARPS)


@pytest.mark.parametrize("access", ["b8", "b16", "b32", "b64", "v2.b32", "v4.b32", "v2.b64"])
def test_widths_of_shared_accesses(access):
    count, width = int(access[1]) if access[0] == "v" else 1, int(access.split("b")[1])
    register = {8: "%h", 16: "%h", 32: "%r", 64: "%w"}[width]
    values = ", ".join(f"{register}{i + 2}" for i in range(count))
    values = f"{{{values}}}" if count > 1 else values
    nbytes = count * width // 8
    body = f""".shared .align 16 .b8 place[512]; {LANE} mov.b32 %r8, place;
        mad.lo.u32 %r8, %r0, {nbytes}, %r8; add.u32 %r1, %r0, 7; mov.b64 %w4, 3;
        cvt.u16.u32 %h2, %r1; mov.b32 %r2, %r1; cvt.u64.u32 %w2, %r1;
        mov.b32 %r3, 1; mov.b32 %r4, 2; mov.b32 %r5, 3; mov.b64 %w3, 9;
        st.shared.{access} [%r8], {values};
        mov.b32 %r2, 0; mov.b64 %w2, 0; mov.b16 %h2, 0;
        ld.shared::cta.{access} {values}, [%r8];"""
    back = {8: "cvt.u32.u16 %r1, %h2;", 16: "cvt.u32.u16 %r1, %h2;"}.get(
        width, "mov.b32 %r1, %r2;" if width == 32 else "cvt.u32.u64 %r1, %w2;"
    )
    assert run(f"{body} {back} {STORE} ret;") == [n + 7 for n in range(32)]
    with pytest.raises(UnknownInstruction, match="4 values of 8 bytes"):
        program("ld.shared.v4.b64 {%w0, %w1, %w2, %w3}, [%r0]; ret;")


def test_generic_addresses():
    body = f"""{SHARED} cvt.u64.u32 %w2, %r2; cvta.shared.u64 %w2, %w2;
        st.b32 [%w2], %r0; bar.sync 0;
        cvta.shared.u64 %w3, place; ld.b32 %r5, [%w3+4];
        cvta.to.shared.u64 %w4, %w2; ld.shared.b32 %r1, [%w4]; add.u32 %r1, %r1, %r5;
        mul.wide.u32 %w1, %r0, 4; add.s64 %w1, %w0, %w1; st.b32 [%w1], %r1; """
    assert run(f"{body} ret;", **TWO_WARPS) == [n + 1 for n in range(64)]
    with pytest.raises(MemoryFault, match="is no address of shared memory"):
        run(f"{body} cvta.to.shared.u64 %w4, %w0; ret;", **TWO_WARPS)
    with pytest.raises(MemoryFault, match="outside of every tensor"):
        run(f"{body} st.global.b32 [%w2], %r1; ret;", **TWO_WARPS)
    with pytest.raises(MemoryFault, match="outside of every shared variable"):
        run(f"{body} st.shared.b32 [%w0], %r1; ret;", **TWO_WARPS)


DIVERGENT = """setp.lt.u32 %p0, %r0, {threads}; {before} @%p0 bra AWAY;
    bar.sync 0; {after} AWAY: {away} ret;"""


@pytest.mark.parametrize("threads", [1, 32, 63])
@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ({}, "threads of its block have exited"),  # some pass the barrier by
        ({"away": "bar.sync 0;"}, "threads of its block never come here"),  # at another one
        ({"before": "@%p0 exit;"}, "threads of its block have exited"),
        ({"after": "bar.sync 1;", "away": "bar.sync 1;"}, "threads of its block never come here"),
    ],
    ids=["passed by", "another", "exited", "two"],
)
def test_barriers_of_some_threads(threads, parts, problem):
    filled = DIVERGENT.format(threads=threads, **{"before": "", "after": "", "away": "", **parts})
    with pytest.raises(Deadlock, match=rf"thread \(.*\): line \d+ of k: `bar\.sync \d`: {problem}"):
        run(f"{IN_BLOCK} {filled}", **TWO_WARPS)


def test_barrier_under_a_guard():
    with pytest.raises(Deadlock, match="have exited"):
        run(f"{IN_BLOCK} setp.lt.u32 %p0, %r0, 40; @%p0 bar.sync 0; ret;", **TWO_WARPS)
    assert run(f"{SHARED} {PUT} setp.lt.u32 %p0, %r0, 64; @%p0 bar.sync 0; {GET} {STORE} ret;",
               **TWO_WARPS) == CROSSED  # fmt: skip


def test_barrier_after_branches_that_meet():
    body = f"""{SHARED} setp.lt.u32 %p0, %r0, 40; @%p0 bra THERE;
        st.shared.b32 [%r2], %r0; bra JOIN;
    THERE: add.u32 %r5, %r0, 100; st.shared.b32 [%r2], %r5;
    JOIN: bar.sync 0; {GET} {STORE} ret;"""
    assert run(body, **TWO_WARPS) == [n + 100 if n < 40 else n for n in CROSSED]


def test_a_barrier_in_place_of_a_shuffle_that_waits():
    """Half a warp at a shuffle, half at a barrier: neither goes on."""
    body = """setp.lt.u32 %p0, %r0, 16; @%p0 bra AWAY; bar.sync 0;
    AWAY: shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1; ret;"""
    with pytest.raises(Deadlock, match="never come here"):
        run(f"{IN_BLOCK} {body}", **TWO_WARPS)


@pytest.mark.parametrize(
    "instruction", ["bar.sync 0, 32", "bar.sync 16", "bar.sync %r0", "bar.sync"]
)
def test_barriers_of_another_kind(instruction):
    with pytest.raises(UnknownInstruction):
        program(f"{instruction}; ret;")


def test_more_threads_than_a_block_may_have():
    for block, limits, most in (
        ((32, 3, 1), ".maxntid 64", 64),
        ((32, 2, 5), ".maxntid 32, 2, 4", 256),
        ((1025, 1, 1), "", 1024),
        ((32, 33, 1), ".maxntid 32, 16, 4", 1024),
    ):
        with pytest.raises(EmulatorError, match=rf"at most {most} threads are allowed"):
            run("ret;", block=block, limits=limits)
    run("ret;", block=(64, 1, 4), limits=".maxntid 32, 2, 4")  # the product alone counts


@pytest.mark.parametrize(
    "declaration",
    [
        ".extern .shared .b8 place[]",
        ".shared .b8 place[]",
        ".shared .v4 .b32 place",
        ".shared .x place",
    ],
)
def test_declarations_that_are_not_understood(declaration):
    with pytest.raises(EmulatorError, match="not understood"):
        program(f"{declaration}; ret;")
