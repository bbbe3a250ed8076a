"""The tests can fail: errors planted in a kernel's PTX are caught, each of them."""

import re
from collections.abc import Callable
from functools import partial
from unittest import mock

import pytest
import torch

from cute_quant import INT8
from cute_quant.contract.rows import Indexed, Masked, PrefixSum
from cute_quant.emulator import EmulatedKernel as Kernel
from cute_quant.emulator import EmulatorError
from cute_quant.emulator.kernel import load
from cute_quant.kernels.config import ONE_ROW
from tests.helpers import FLOAT32, FLOAT32_ROUNDED, UE8M0
from tests.kernels.cases import check, special_groups
from tests.kernels.emulated_gpu import H100_SMS, Gpu
from tests.kernels.prologues import check_rms_norm, check_silu_mul

BF16 = torch.bfloat16
SCALE_STORE = r"(@!?%p\d+ )?st\.global\.(b8|b32)\s+\[(%rd\d+)\], (%\w+);"
VALUE_STORE = r"(st\.global\.v4\.b32\s+\[%rd\d+)\]"
COMPARISON = r"setp\.(?:lt|le|gt|ge)\.[su]32\s+%p\d+, .*;"
SWAPPED = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt"}
ROW_MAJOR = INT8.replace(group_size=16)

packed_and_float32 = pytest.mark.parametrize("fmt", [UE8M0, FLOAT32], ids=str)


def dense(gpu: Gpu, fmt=UE8M0) -> None:
    """A few cases of the matrix, of those that find errors soonest."""
    for mn, groups, extra_rows in ((5, 5, 4), (4, 4, 0), (1, 1, 0), (33, 9, 0)):
        x = special_groups(mn, 128 * groups, BF16, seed=groups)
        check(gpu, x, fmt, extra_rows=extra_rows, last_padding=False)
        check(gpu, x, fmt, extra_rows=extra_rows)


def ragged(gpu: Gpu) -> None:
    for k in (7, 9, 513, 999):
        check(gpu, special_groups(5, k, torch.float32, 1, ROW_MAJOR), ROW_MAJOR, extra_rows=2)


def numbers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def masked(gpu: Gpu) -> None:
    for counts in ((3, -1, 9, 8, 0, 1, 12), (0, 4, 5, 0, 0, 0, 0, 0, 9)):
        x = special_groups(9 * len(counts), 640, BF16, 1).view(-1, 9, 640)
        for last_padding, sms in ((False, 1), (True, H100_SMS)):
            some = Gpu(gpu.kernels, gpu.arch, sms=sms)
            check(some, x, UE8M0, rows=Masked(numbers(*counts)), last_padding=last_padding)
            gpu.launched += some.launched


def gathered(gpu: Gpu) -> None:
    index = numbers(0, 10, -1, 11, 3, 12, -(2**31), 2**31 - 1, 5)
    check(gpu, special_groups(11, 640, BF16, 1), UE8M0, index=index, extra_rows=4)
    check(gpu, special_groups(11, 640, BF16, 1), UE8M0, index=index[:7], last_padding=False)


def prefix_sum(gpu: Gpu) -> None:
    x = special_groups(39, 640, BF16, 1)
    ends = numbers(*(i if i % 3 else i - 1 for i in range(40)))
    for alignment, chosen in ((4, numbers(3, 9, 14)), (8, numbers(2, -3, 17, 99, 9)), (1, ends)):
        check(gpu, x, UE8M0, rows=PrefixSum(chosen, alignment), extra_rows=2)
    check(gpu, x[:38], UE8M0, rows=PrefixSum(numbers(38), 1), last_padding=False)


def indexed(gpu: Gpu) -> None:
    rows = Indexed(numbers(0, -1, 1, 2**31 - 1, -(2**31), 0, -1))
    check(gpu, special_groups(7, 640, BF16, 1), UE8M0, rows=rows, extra_rows=3)
    check(gpu, special_groups(7, 640, BF16, 1), UE8M0, rows=rows, last_padding=False)


def silu_mul(gpu: Gpu) -> None:
    check_silu_mul(gpu, 5, 640, UE8M0)


def rms_norm(gpu: Gpu) -> None:
    """Of rows that three warps share, amid some that one has to itself."""
    wide = Gpu(gpu.kernels, gpu.arch, tile=ONE_ROW, max_warps=16, tiles_per_thread=1)
    for mn, k in ((1, 128), (5, 1040)):
        check_rms_norm(wide, mn, k, UE8M0, residual=True, in_place=True)
    gpu.launched += wide.launched


def rms_norm_in_a_loop(gpu: Gpu) -> None:
    shape = {"tile": ONE_ROW, "max_warps": 16, "tiles_per_thread": 1}
    few = Gpu(gpu.kernels, gpu.arch, max_grid=2, **shape)
    check_rms_norm(few, 3, 1040, UE8M0, batch=(5,))
    gpu.launched += few.launched


CASES = {
    "ue8m0": dense,
    "float32": partial(dense, fmt=FLOAT32),
    "ragged": ragged,
    "masked": masked,
    "gathered": gathered,
    "prefix sum": prefix_sum,
    "indexed": indexed,
}
REDUNDANT = {"float32": 1, "gathered": 1, "prefix sum": 1}
"""Comparisons that another one repeats: a column past the last has no element either, a row past
the last has no index, and a loop that goes round once more finds no group."""


def kernel_of(gpu: Gpu, case: Callable[[Gpu], None]) -> Kernel:
    """The one kernel that runs in a case, which passes."""
    gpu.launched.clear()
    case(gpu)
    (kernel,) = set(gpu.launched)
    return kernel


def caught(gpu: Gpu, case: Callable[[Gpu], None], kernel: Kernel, text: str) -> str:
    """What is said of the kernel with another text in its place; nothing if nothing is."""
    with mock.patch.object(kernel, "program", load(text)):
        try:
            case(gpu)
        except (EmulatorError, AssertionError) as error:
            return f"{type(error).__name__}: {error}"
    return ""


@pytest.fixture
def plant(gpu) -> Callable[..., str]:
    def plant(case, pattern: str, replacement: str, declare: str = "") -> str:
        """Run a case with the first match of `pattern` in the PTX replaced."""
        kernel = kernel_of(gpu, case)
        text, count = re.subn(pattern, replacement, kernel.text, count=1)
        assert count, f"no {pattern} in the PTX: plant this error in another way"
        text = text.replace("\t.reg .pred", f"\t{declare}\n\t.reg .pred", 1)
        return caught(gpu, case, kernel, text)

    return plant


def test_shuffle_mask_without_the_thread(plant):
    said = plant(dense, r"(shfl\.sync\.bfly\.b32 [^;]*), -1;", r"\1, 65535;")
    assert "not in its own membermask" in said


def test_shuffle_across_groups(plant):
    said = plant(dense, r"(shfl\.sync\.bfly\.b32 [^;]*), 4, 31, -1;", r"\1, 8, 31, -1;")
    assert "differ from the oracle" in said


@pytest.mark.slow
def test_shuffle_by_some_lanes(plant):
    """A lane that skips a shuffle is waited for by the others."""
    skip = "mov.u32 %lane, %laneid; setp.ne.b32 %some, %lane, 3; @%some \\1"
    said = plant(dense, r"(shfl\.sync\.bfly\.b32 )", skip, ".reg .pred %some; .reg .b32 %lane;")
    assert re.search("never come here|is undefined", said)


@pytest.mark.slow
def test_vote_by_some_lanes(plant):
    skip = "mov.u32 %lane, %laneid; setp.ne.b32 %some, %lane, 3; @%some \\1"
    for case in (masked, prefix_sum):
        said = plant(case, r"(vote\.sync\.)", skip, ".reg .pred %some; .reg .b32 %lane;")
        assert re.search("never come here|is undefined", said)


@pytest.mark.parametrize("name", ["ue8m0", "float32", "gathered", "prefix sum", "indexed"])
def test_comparison_off_by_one(gpu, name):
    """Every ordered comparison of integers, among them all predicates of rows and columns."""
    case = CASES[name]
    kernel = kernel_of(gpu, case)
    comparisons = list(re.finditer(COMPARISON, kernel.text))
    assert comparisons
    missed = []
    for comparison in comparisons:
        wrong = re.sub(r"(?<=setp\.)\w\w", lambda m: SWAPPED[m[0]], comparison[0])
        text = kernel.text[: comparison.start()] + wrong + kernel.text[comparison.end() :]
        if not caught(gpu, case, kernel, text):
            missed.append(wrong)
    # The amax of a group with Inf has bits below its precision, so it is above that bound.
    missed = [comparison for comparison in missed if str(0x7F800000) not in comparison]
    assert len(missed) <= REDUNDANT.get(name, 0), missed


@pytest.mark.slow
@packed_and_float32
def test_swapped_scales(plant, fmt):
    """The bytes of two groups, or the scales of two rows."""
    swap = rf"xor.b64 %swapped, \3, {1 if fmt.packed else 4}; \1st.global.\2 [%swapped], \4;"
    assert plant(partial(dense, fmt=fmt), SCALE_STORE, swap, ".reg .b64 %swapped;")


@pytest.mark.slow
@pytest.mark.parametrize("fmt", [UE8M0, FLOAT32_ROUNDED], ids=str)
def test_dropped_padding(plant, fmt):
    """The scales that are 0 are those of the padding."""
    width = 16 if fmt.packed else 32
    drop = rf"setp.ne.b{width} %scale, \4, 0; @%scale st.global.\2 [\3], \4;"
    said = plant(partial(dense, fmt=fmt), SCALE_STORE, drop, ".reg .pred %scale;")
    assert re.search(r"sf: .* expected 0x00", said)


@pytest.mark.slow
@packed_and_float32
def test_store_out_of_bounds(plant, fmt):
    said = plant(partial(dense, fmt=fmt), VALUE_STORE, r"\1+16]")
    assert re.search(r"block \(.*\) thread \(.*\): .*out of bounds; .* of 'mQ'", said)


@pytest.mark.slow
def test_store_misaligned(plant):
    assert "misaligned for 16 bytes" in plant(dense, VALUE_STORE, r"\1+8]")


@pytest.mark.slow
def test_two_threads_store_the_same_scale(plant):
    """The predicate that picks one thread of a group, dropped."""
    assert plant(dense, r"setp\.ne\.b32 (\s*%p\d+, %r\d+), 0;", r"setp.ne.b32 \1, -1;")


@pytest.mark.slow
def test_load_of_the_next_row(plant):
    load = r"(ld\.global\.v[48]\.b\d+\s+\{[^}]*\}, \[%rd\d+)\]"
    for case in (dense, masked, gathered):
        assert plant(case, load, r"\1+1280]")


@pytest.mark.slow
def test_element_of_a_tail_that_is_the_next_one(plant):
    assert plant(ragged, r"(ld\.global\.b32\s+%r\d+, \[%rd\d+)\+24\]", r"\1+28]")
    assert plant(ragged, r"(st\.global\.b8\s+\[%rd\d+)\+5\]", r"\1+6]")


@pytest.mark.slow
def test_count_that_is_not_clamped(plant):
    """Of an expert, or the end of a group: below 0 and past the rows."""
    for case in (masked, prefix_sum):
        assert plant(case, r"max\.s32 (\s*%r\d+, )(%r\d+), 0;", r"mov.b32 \1\2;")
        assert plant(case, r"min\.u32 (\s*%r\d+, )(%r\d+), %r\d+;", r"mov.b32 \1\2;")


@pytest.mark.slow
def test_index_that_is_not_checked(plant):
    """Signed, so that negative ones pass."""
    loaded = r"(ld\.global\.b32\s+(%r\d+), (?s:.*?)setp\.\w\w)\.u32"
    compared = r"(\s+%p\d+, (?:\2, %r\d+|%r\d+, \2);)"
    assert plant(gathered, loaded + compared, r"\1.s32\3")


@pytest.mark.slow
def test_load_before_the_grid_before_ended(plant):
    wait_later = (
        r"griddepcontrol\.wait;((?s:.*?)ld\.global[^;]*;)",
        r"\1 griddepcontrol.wait;",
    )
    for case in (dense, masked):
        assert "before griddepcontrol.wait" in plant(case, *wait_later)


@pytest.mark.slow
def test_no_wait_for_the_grid_before(plant):
    """Of a dependent launch; told by the launch attribute, which takes the host code."""
    said = plant(dense, r"griddepcontrol\.wait;", "")
    assert "as a programmatic dependent, and its code does not" in said


@pytest.mark.slow
def test_rounding_that_is_not_there(gpu):
    """An instruction without its modifier is unknown, not taken for its like."""
    text = kernel_of(gpu, dense).text
    with pytest.raises(EmulatorError, match=r"unknown instruction cvt\.rn\.e4m3x2\.f32"):
        load(text.replace("cvt.rn.satfinite.e4m3x2.f32", "cvt.rn.e4m3x2.f32"))


@pytest.mark.slow
def test_exponential_that_is_not_one(plant):
    outside = r"AssertionError: (scales|q): "
    assert re.match(outside, plant(silu_mul, r"neg\.f32", "mov.b32"))
    assert re.match(outside, plant(silu_mul, r"ex2\.approx", "rsqrt.approx"))


@pytest.mark.slow
def test_gates_from_the_place_of_ups(plant):
    """The row's second half is `k` elements, here 1280 bytes, away."""
    assert plant(silu_mul, r"(ld\.global\.v[48]\.b\d+\s+\{[^}]*\}, \[%rd\d+)\]", r"\1+1280]")


def test_no_barrier(plant):
    """Nor that before a loop's next row, which has the first one's sums overwritten early."""
    said = plant(rms_norm, r"bar\.sync\s+0;", "")
    assert re.search("load of .* that (another thread|nobody) wrote", said)
    said = plant(rms_norm_in_a_loop, r"bar\.sync\s+0;", "")
    assert re.search("store of 4 bytes .* another thread (read|wrote) since the last", said)


@pytest.mark.slow
@pytest.mark.parametrize("condition", ["%laneid, 3", "%tid.y, 0"], ids=["lane", "warp"])
def test_barrier_in_divergent_code(plant, condition):
    """One in each branch, and one in one of them alone."""
    register, number = condition.split(", ")
    some = f"mov.u32 %own, {register}; setp.eq.b32 %some, %own, {number}; @%some"
    declare = ".reg .pred %some; .reg .b32 %own;"
    branches = f"{some} bra OWN; bar.sync 0; bra JOIN; OWN: bar.sync 0; JOIN:"
    said = plant(rms_norm, r"bar\.sync\s+0;", branches, declare)
    assert "threads of its block never come here" in said
    said = plant(rms_norm, r"bar\.sync\s+0;", f"{some} bar.sync 0;", declare)
    assert re.search("have exited|never come here|that another thread wrote", said)


@pytest.mark.slow
def test_barrier_behind_the_exit_of_some_threads(plant):
    exits = "mov.u32 %own, %tid.y; setp.eq.b32 %some, %own, 1; @%some exit; bar.sync 0;"
    said = plant(rms_norm, r"bar\.sync\s+0;", exits, ".reg .pred %some; .reg .b32 %own;")
    assert "threads of its block have exited" in said


@pytest.mark.slow
def test_wrong_offset_in_shared_memory(plant):
    loads = r"(ld\.shared\.v[24]\.b\d+\s+\{[^}]*\}, \[[^\]]+)\]"
    for access in (r"(st\.shared\.b32\s+\[%r\d+)\]", loads):
        said = plant(rms_norm, access, r"\1+64]")
        assert "out of bounds" in said or "that nobody wrote" in said
        assert "out of bounds; " in plant(rms_norm, access, r"\1+-16]")
        assert "misaligned for" in plant(rms_norm, access, r"\1+2]")
    # Of the neighbour, or past the last one.
    said = plant(rms_norm, r"(st\.shared\.b32\s+\[%r\d+)\]", r"\1+4]")
    assert "another thread wrote" in said or "out of bounds" in said


@pytest.mark.slow
def test_all_lanes_store_to_shared_memory(plant):
    """To the place of their warp, or to places that shared memory does not have."""
    place = r"mad\.lo\.s32\s+(%r\d+), %r\d+, %r\d+, (%r\d+);(\s+setp\.gt\.u32\s+%p\d+, \1, 15;)"
    said = plant(rms_norm, place, r"mov.b32 \1, \2;\3")
    assert re.search("store of 4 bytes .* another thread wrote since the last barrier", said)
    branch = r"(setp\.gt\.u32\s+%p\d+, %r\d+, 15;\s+)@%p\d+ bra[^;]*;"
    assert "out of bounds" in plant(rms_norm, branch, r"\1")


@pytest.mark.slow
def test_residual_that_another_thread_overwrites(plant):
    """In place: a thread stores the sums of its neighbour."""
    said = plant(rms_norm, r"(st\.global\.v[48]\.b\d+\s+\[%rd\d+)\]", r"\1+32]")
    assert re.search("that another thread (read|wrote) in this launch|of 'mResidual'", said)
