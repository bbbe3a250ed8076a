"""The tests can fail: errors planted in a kernel's PTX are caught, each of them."""

import re
from collections.abc import Callable

import pytest
import torch

from tests.emulator.cases import ARCHITECTURES, check, special_groups
from tests.emulator.errors import EmulatorError, MemoryFault
from tests.emulator.host import C_COMPILER
from tests.emulator.quantizer import Kernel, load
from tests.helpers import FLOAT32, FLOAT32_ROUNDED, UE8M0, format_id

BF16 = torch.bfloat16
SCALE_STORE = r"(@!?%p\d+ )?st\.global\.(b8|b32)\s+\[(%rd\d+)\], (%\w+);"
VALUE_STORE = r"(st\.global\.v4\.b32\s+\[%rd\d+)\]"

every_arch = pytest.mark.parametrize("arch", ARCHITECTURES)
packed_and_float32 = pytest.mark.parametrize("fmt", [UE8M0, FLOAT32], ids=format_id)


@pytest.fixture
def planted(kernel_of, monkeypatch) -> Callable[..., Kernel]:
    def plant(arch, fmt, pattern: str, replacement: str, declare: str = "") -> Kernel:
        """The kernel with the first match of `pattern` in its PTX replaced."""
        kernel = kernel_of(BF16, fmt, arch)
        text, count = re.subn(pattern, replacement, kernel.text, count=1)
        assert count, f"no {pattern} in the PTX: plant this error in another way"
        text = text.replace("\t.reg .pred", f"\t{declare}\n\t.reg .pred", 1)
        monkeypatch.setattr(kernel, "program", load(text))
        return kernel

    return plant


def run(kernel: Kernel) -> None:
    """A few cases of the matrix, of those that find errors soonest."""
    for mn, groups, extra_rows in ((5, 5, 3), (4, 4, 0), (1, 1, 0), (33, 9, 0)):
        x = special_groups(mn, 128 * groups, BF16, seed=groups)
        check(kernel, x, extra_rows=extra_rows, last_padding=False)
        check(kernel, x, extra_rows=extra_rows)


@every_arch
@packed_and_float32
def test_without_errors(kernel_of, arch, fmt):
    run(kernel_of(BF16, fmt, arch))


@every_arch
def test_shuffle_mask_without_the_thread(planted, arch):
    kernel = planted(arch, UE8M0, r"(shfl\.sync\.bfly\.b32 [^;]*), -1;", r"\1, 65535;")
    with pytest.raises(EmulatorError, match="not in its own membermask"):
        run(kernel)


@every_arch
def test_shuffle_across_groups(planted, arch):
    kernel = planted(arch, UE8M0, r"(shfl\.sync\.bfly\.b32 [^;]*), 4, 31, -1;", r"\1, 8, 31, -1;")
    with pytest.raises(AssertionError, match="differ from the reference"):
        run(kernel)


@every_arch
def test_shuffle_by_some_lanes(planted, arch):
    """A lane that skips a shuffle is waited for by the others."""
    kernel = planted(
        arch,
        UE8M0,
        r"(shfl\.sync\.bfly\.b32 )",
        "mov.u32 %lane, %laneid; setp.ne.b32 %some, %lane, 3; @%some \\1",
        ".reg .pred %some; .reg .b32 %lane;",
    )
    with pytest.raises(EmulatorError, match=r"never come here|is undefined"):
        run(kernel)


@every_arch
@packed_and_float32
def test_comparison_off_by_one(planted, kernel_of, arch, fmt):
    """Every ordered comparison of integers, among them all predicates of rows and columns."""
    text = kernel_of(BF16, fmt, arch).text
    swap = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt"}
    comparisons = re.findall(r"setp\.(?:lt|le|gt|ge)\.[su]32\s+%p\d+, .*;", text)
    assert comparisons
    missed = []
    for comparison in comparisons:
        wrong = re.sub(r"(?<=setp\.)\w\w", lambda m: swap[m[0]], comparison)
        kernel = planted(arch, fmt, re.escape(comparison), wrong)
        try:
            run(kernel)
        except (EmulatorError, AssertionError):
            continue
        missed.append(wrong)
    # The amax of a group with Inf has bits below its precision, so it is above that bound.
    assert all(str(0x7F800000) in comparison for comparison in missed), missed


@every_arch
@packed_and_float32
def test_swapped_scales(planted, arch, fmt):
    """The bytes of two groups, or the scales of two rows."""
    unit = 1 if fmt.packed else 4
    kernel = planted(
        arch,
        fmt,
        SCALE_STORE,
        rf"xor.b64 %swapped, \3, {unit}; \1st.global.\2 [%swapped], \4;",
        ".reg .b64 %swapped;",
    )
    with pytest.raises((AssertionError, MemoryFault)):
        run(kernel)


@every_arch
@pytest.mark.parametrize("fmt", [UE8M0, FLOAT32_ROUNDED], ids=format_id)
def test_dropped_padding(planted, arch, fmt):
    """The scales that are 0 are those of the padding."""
    width = 16 if fmt.packed else 32
    kernel = planted(
        arch,
        fmt,
        SCALE_STORE,
        rf"setp.ne.b{width} %scale, \4, 0; @%scale st.global.\2 [\3], \4;",
        ".reg .pred %scale;",
    )
    with pytest.raises(AssertionError, match=r"sf: .* expected 0x00"):
        run(kernel)


@every_arch
@packed_and_float32
def test_store_out_of_bounds(planted, arch, fmt):
    kernel = planted(arch, fmt, VALUE_STORE, r"\1+16]")
    with pytest.raises(MemoryFault, match=r"block \(.*\) thread \(.*\): .*past the end of 'q'"):
        run(kernel)


@every_arch
def test_store_misaligned(planted, arch):
    kernel = planted(arch, UE8M0, VALUE_STORE, r"\1+8]")
    with pytest.raises(MemoryFault, match="misaligned for 16 bytes"):
        run(kernel)


@every_arch
def test_two_threads_store_the_same_scale(planted, arch):
    """The predicate that picks one thread of a group, dropped."""
    kernel = planted(arch, UE8M0, r"setp\.ne\.b32 (\s*%p\d+, %r\d+), 0;", r"setp.ne.b32 \1, -1;")
    with pytest.raises((MemoryFault, AssertionError)):
        run(kernel)


@every_arch
def test_load_of_the_next_row(planted, arch):
    kernel = planted(arch, UE8M0, r"(ld\.global\.v[48]\.b\d+\s+\{[^}]*\}, \[%rd\d+)\]", r"\1+1280]")
    with pytest.raises((MemoryFault, AssertionError)):
        run(kernel)


@every_arch
def test_load_before_the_grid_before_ended(planted, arch):
    kernel = planted(
        arch, UE8M0, r"griddepcontrol\.wait;((?s:.*?)ld\.global[^;]*;)", r"\1 griddepcontrol.wait;"
    )
    with pytest.raises(EmulatorError, match=r"before griddepcontrol\.wait"):
        run(kernel)


@every_arch
def test_no_wait_for_the_grid_before(planted, arch):
    """Of a dependent launch; told by the launch attribute, which takes the host code."""
    if C_COMPILER is None:
        pytest.skip("needs a C compiler")
    kernel = planted(arch, UE8M0, r"griddepcontrol\.wait;", "")
    with pytest.raises(EmulatorError, match="as a programmatic dependent, and its code does not"):
        run(kernel)


@every_arch
def test_rounding_that_is_not_there(planted, arch):
    """An instruction without its modifier is unknown, not taken for its like."""
    pattern = r"cvt\.rn\.satfinite\.e4m3x2\.f32"
    with pytest.raises(EmulatorError, match=r"unknown instruction cvt\.rn\.e4m3x2\.f32"):
        planted(arch, UE8M0, pattern, "cvt.rn.e4m3x2.f32")
