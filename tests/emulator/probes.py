"""Small kernels, one for each instruction, that hardware and the emulator both run.

A probe loads four words, executes its instruction on them and stores two words. Its PTX text is
made from the instruction's entry in the table, so an instruction that is added there is probed,
and what hardware answers checks the table. Inputs come from a hash, the same everywhere.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

import numpy as np

from cute_quant.emulator import isa

THREADS = 256
CHUNK = 512  # inputs of one checksum
COUNT = 16 * CHUNK
PATTERNS = 1 << 16

APPROXIMATE = re.compile(r"(?!rcp\.).*\.approx\..*")
"""Instructions whose last bits the emulator does not know: it computes what they are near."""

# Needs sm_100: PTX ISA 9.7.3 (f32x2) and 9.7.5. These are two scalar operations, or a widening and
# a scalar one, which are probed.
SM100_ONLY = re.compile(
    r".*\.f32x2|max\.NaN\.abs\.f32|.*\.e2m1x2.*|(?:fma\.rn|add|add\.rn)\.f32\.b?f16"
)
# Operands that must be constants.
_CONSTANTS = {"lop3.b32": {3: "0x1D"}}
# Operands for which results are defined where they are not 0.
_NOT_ZERO = {"div.u32": 1, "rem.u32": 1}
_SHUFFLE_CONTROLS = (0x1F, 0x00, 0x181F, 0x1800, 0x101F, 0x1C07)


@dataclass(frozen=True)
class Probe:
    name: str
    text: str  # of the kernel
    inputs: np.ndarray  # (count, 4) words
    approximate: bool = False


def words(seed: str, count: int) -> np.ndarray:
    """`count` random words: splitmix64 from the hash of a text."""
    step = np.uint64(0x9E3779B97F4A7C15)
    z = np.uint64(zlib.crc32(seed.encode())) + np.arange(1, count + 1, dtype=np.uint64) * step
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return (z ^ z >> np.uint64(31)).astype(np.uint32)


def _specials() -> np.ndarray:
    """Words that are corners of some type, each paired with each."""
    f32 = [0, 1, 0x7FFFFF, 0x800000, 0x3F800000, 0x43E00000, 0x43E80000, 0x7F7FFFFF, 0x7F800000]
    f32 += [0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0x3A800000, 0x3B000000]
    halves = [0x7C007C01, 0x7E007BFF, 0x00010400, 0x7F807F81, 0x7FC07F7F, 0x5F005F80, 0x3C003C01]
    integers = [31, 32, 33, 63, 0x80, 0xFF, 0x7FFF, 0x8000]
    corners = np.array([*f32, *halves, *integers], np.uint32)
    corners = np.concatenate([corners, corners ^ np.uint32(0x80000000)])
    pairs = np.stack(np.meshgrid(corners, corners, indexing="ij"), -1).reshape(-1, 2)
    return np.concatenate([pairs, pairs[::-1]], 1)


def operands(seed: str) -> np.ndarray:
    """(COUNT, 4) words: corners, random bits, and numbers near enough to each other to matter."""
    result = words(seed, 4 * COUNT).reshape(COUNT, 4).copy()
    specials = _specials()
    result[: len(specials)] = specials[np.argsort(words(seed + " order", len(specials)))]
    part = (COUNT - len(specials)) // 4
    single, bfloat, small = (len(specials) + i * part for i in range(3))
    exponents = words(seed + " exponents", 4 * part).reshape(part, 4)
    result[single:bfloat] &= np.uint32(0x807FFFFF)
    result[single:bfloat] |= (np.uint32(120) + exponents % 14) << np.uint32(23)
    result[bfloat:small] &= np.uint32(0x807F807F)
    for shift in (np.uint32(7), np.uint32(23)):
        result[bfloat:small] |= (np.uint32(120) + (exponents >> shift) % 14) << shift
    result[small : small + part, 1:] &= np.uint32(0x3F)
    result[small : small + part : 2, 0] = result[small : small + part : 2, 1]
    return result


def patterns(of_f32: bool) -> np.ndarray:
    """(PATTERNS, 4) words: all patterns of 16 bits, each beside others.

    Args:
        of_f32: each is the upper half of a word, a bf16 widened to f32; otherwise a word has two.
    """
    first = np.arange(PATTERNS, dtype=np.uint32)
    odd = [np.uint32(m) for m in (40503, 7, 30011)]  # permute the patterns
    second, third, fourth = ((first + np.uint32(1)) * m & np.uint32(0xFFFF) for m in odd)
    if of_f32:
        return np.stack([first, second, third, fourth], 1) << np.uint32(16)
    rows = first | second << np.uint32(16), third | fourth << np.uint32(16)
    return np.stack([*rows, *rows[::-1]], 1)


def _probe(
    name: str, body: str, inputs: np.ndarray, declare: str = "", approximate: bool = False
) -> Probe:
    return Probe(
        name,
        f"""
.visible .entry {name}(.param .u64 inputs, .param .u64 outputs)
{{
    .reg .pred %p<8>;
    .reg .b16 %h<8>;
    .reg .b32 %a<4>, %d<2>, %t, %n, %i;
    .reg .b64 %w<8>, %in, %out, %at;
    {declare}
    mov.u32 %t, %tid.x;
    mov.u32 %n, %ntid.x;
    mov.u32 %i, %ctaid.x;
    mad.lo.s32 %i, %i, %n, %t;
    ld.param.u64 %in, [inputs];
    ld.param.u64 %out, [outputs];
    mul.wide.u32 %at, %i, 16;
    add.s64 %in, %in, %at;
    ld.global.v4.u32 {{%a0, %a1, %a2, %a3}}, [%in];
    mov.b32 %d1, 0;
    {body}
    mul.wide.u32 %at, %i, 8;
    add.s64 %out, %out, %at;
    st.global.v2.u32 [%out], {{%d0, %d1}};
    ret;
}}
""",
        inputs,
        approximate,
    )


def _instruction(opcode: str, name: str, inputs: np.ndarray) -> Probe:
    """A probe of an instruction of the table: operands from the words in turn, 64 bits from two."""
    operation = isa.OPERATIONS[opcode]
    lines, names = [], []
    if opcode in _NOT_ZERO:
        divisor = f"%a{_NOT_ZERO[opcode]}"
        lines.append(f"max.u32 {divisor}, {divisor}, 1;")
    for i, type_ in enumerate(operation.operands):
        width = isa.TYPES[type_].width
        constant = _CONSTANTS.get(opcode, {}).get(i)
        if constant:
            names.append(constant)
        elif width == 1:
            lines.append(f"setp.ne.b32 %p{i}, %a{i}, 0;")
            names.append(f"%p{i}")
        elif width <= 16:
            lines.append(f"cvt.u16.u32 %h{i}, %a{i};")
            names.append(f"%h{i}")
        elif width == 64:
            lines.append(f"mov.b64 %w{i}, {{%a{i}, %a{(i + 1) % 4}}};")
            names.append(f"%w{i}")
        else:
            names.append(f"%a{i}")
    width = isa.TYPES[operation.result].width
    result, after = {
        1: ("%p7", "selp.b32 %d0, 1, 0, %p7;"),
        8: ("%h7", "cvt.u32.u16 %d0, %h7;"),
        16: ("%h7", "cvt.u32.u16 %d0, %h7;"),
        32: ("%d0", ""),
        64: ("%w7", "mov.b64 {%d0, %d1}, %w7;"),
    }[width]
    lines += [f"{opcode} {', '.join([result, *names])};", after]
    approximate = bool(APPROXIMATE.fullmatch(opcode))
    return _probe(name, "\n    ".join(lines), inputs, approximate=approximate)


def _shuffles() -> list[Probe]:
    result = []
    for mode in ("up", "down", "bfly", "idx"):
        inputs = operands(f"shuffle {mode}")
        inputs[:, 1] &= 31
        controls = np.array(_SHUFFLE_CONTROLS, np.uint32)
        # One for each warp, so that lanes agree on their segments.
        inputs[:, 2] = controls[np.arange(COUNT) // 32 % len(controls)]
        body = f"shfl.sync.{mode}.b32 %d0|%p0, %a0, %a1, %a2, -1;\n    selp.b32 %d1, 1, 0, %p0;"
        result.append(_probe(f"shfl_{mode}", body, inputs))
    # Each half of a warp on its own, in branches that diverge: source and members are its own.
    body = """and.b32 %n, %t, 16;
    setp.eq.u32 %p0, %n, 0;
    @%p0 bra LOWER;
    shfl.sync.bfly.b32 %d0, %a0, 5, 0x101F, 0xFFFF0000;
    bra JOINED;
LOWER:
    shfl.sync.down.b32 %d0, %a0, 3, 0x101F, 0x0000FFFF;
JOINED:
    shfl.sync.up.b32 %d1, %d0, 1, 0, -1;"""
    return [*result, _probe("shfl_divergent", body, operands("shuffle divergent"))]


def _votes() -> Probe:
    """Of warps whose lanes agree on either answer, and of those that do not."""
    inputs = operands("vote")
    thresholds = np.array([0, 32, 1, 16, 31], np.uint32)
    inputs[:, 1] = thresholds[np.arange(COUNT) // 32 % len(thresholds)]
    body = """and.b32 %n, %a0, 31;
    setp.lt.u32 %p0, %n, %a1;
    vote.sync.ballot.b32 %d0, %p0, -1;
    vote.sync.any.pred %p1, %p0, -1;
    vote.sync.all.pred %p2, %p0, -1;
    vote.sync.uni.pred %p3, %p0, -1;
    selp.b32 %d1, 1, 0, %p1;
    @%p2 or.b32 %d1, %d1, 2;
    @%p3 or.b32 %d1, %d1, 4;"""
    return _probe("vote", body, inputs)


def _loop() -> Probe:
    """Threads that leave a loop at different times and meet behind it."""
    body = """and.b32 %n, %a1, 15;
    mov.b32 %d0, %a0;
AGAIN:
    setp.eq.u32 %p0, %n, 0;
    @%p0 bra DONE;
    mad.lo.u32 %d0, %d0, 1664525, 1013904223;
    sub.u32 %n, %n, 1;
    bra AGAIN;
DONE:
    shfl.sync.bfly.b32 %d1, %d0, 1, 31, -1;"""
    return _probe("loop", body, operands("loop"))


def _shared() -> list[Probe]:
    """Words that go from thread to thread, by each width of access, and again and again."""
    exchange = """mov.b32 %n, place;
    mad.lo.u32 %n, %t, 16, %n;
    {store}
    bar.sync 0;
    xor.b32 %t, %t, 37;
    mov.b32 %n, place;
    mad.lo.u32 %n, %t, 16, %n;
    mov.b32 %d0, 0;
    {load}
    xor.b32 %t, %t, 37;"""
    accesses = {
        "b8": ("st.shared.b8 [%n+3], %a0;", "ld.shared.b8 %d0, [%n+3];"),
        "b16": ("cvt.u16.u32 %h0, %a0;\n    st.shared.b16 [%n+2], %h0;",
                "ld.shared.b16 %h1, [%n+2];\n    cvt.u32.u16 %d0, %h1;"),
        "b32": ("st.shared.b32 [%n+12], %a0;", "ld.shared.b32 %d0, [%n+12];"),
        "b64": ("mov.b64 %w0, {%a0, %a1};\n    st.shared.b64 [%n+8], %w0;",
                "ld.shared.b64 %w1, [%n+8];\n    mov.b64 {%d0, %d1}, %w1;"),
        "v2": ("st.shared.v2.b32 [%n], {%a0, %a1};", "ld.shared.v2.b32 {%d0, %d1}, [%n];"),
        "v4": ("st.shared.v4.b32 [%n], {%a0, %a1, %a2, %a3};",
               "ld.shared.v4.b32 {%a0, %a1, %d0, %d1}, [%n];"),
        "generic": ("cvt.u64.u32 %w0, %n;\n    cvta.shared.u64 %w0, %w0;\n    st.b32 [%w0], %a0;",
                    "cvt.u64.u32 %w0, %n;\n    cvta.shared.u64 %w0, %w0;\n    ld.b32 %d0, [%w0];\n"
                    "    cvta.to.shared.u64 %w1, %w0;\n    ld.shared.b32 %d1, [%w1];"),
    }  # fmt: skip
    declare = f".shared .align 16 .b8 place[{16 * THREADS}];"
    result = []
    for name, (store, load) in accesses.items():
        body = exchange.format(store=store, load=load)
        result.append(_probe(f"shared_{name}", body, operands(f"shared {name}"), declare))
    # A sum over neighbours that goes round a loop, as often as the block says.
    body = """mov.b32 %n, place;
    mad.lo.u32 %n, %t, 4, %n;
    and.b32 %a1, %i, 0xFFFFFF00;
    shr.u32 %a1, %a1, 8;
    and.b32 %a1, %a1, 7;
    mov.b32 %d0, %a0;
AGAIN:
    st.shared.b32 [%n], %d0;
    barrier.sync.aligned 0;
    xor.b32 %a2, %t, 64;
    mov.b32 %a3, place;
    mad.lo.u32 %a3, %a2, 4, %a3;
    ld.shared.b32 %d1, [%a3];
    mad.lo.u32 %d0, %d0, 5, %d1;
    barrier.sync 1;
    setp.eq.u32 %p0, %a1, 0;
    @%p0 bra DONE;
    sub.u32 %a1, %a1, 1;
    bra AGAIN;
DONE:"""
    return [*result, _probe("shared_loop", body, operands("shared loop"), declare)]


def probes() -> list[Probe]:
    """All of them; every pattern of 16 bits for conversions of floats, max and min."""
    result = [*_shuffles(), _votes(), _loop(), *_shared()]
    for opcode, operation in isa.OPERATIONS.items():
        if SM100_ONLY.fullmatch(opcode):
            continue
        name = re.sub(r"\W", "_", opcode)
        result.append(_instruction(opcode, name, operands(opcode)))
        floating = any("f" in t for t in (operation.result, *operation.operands)) or "x2" in opcode
        exhaustive = opcode.startswith(("cvt", "max", "min")) and floating
        if exhaustive and operation.operands[0] not in ("u32", "s32"):
            of_f32 = operation.operands[0] == "f32"
            result.append(_instruction(opcode, f"{name}_patterns", patterns(of_f32)))
    return result


def module(chosen: list[Probe]) -> str:
    """A PTX module for Hopper; its version is one that drivers of CUDA 12.3 and later know."""
    header = ".version 8.3\n.target sm_90\n.address_size 64\n"
    return header + "".join(probe.text for probe in chosen)
