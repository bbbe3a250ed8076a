"""What the comparison of machine code says, and what it refuses."""

import pytest
import torch

from bench import sass_diff
from bench.sass_diff import Code
from cute_quant import DEEP_GEMM
from cute_quant.kernels.config import QuantizeSpec

BEFORE = Code(95, 25, 0, "a")


@pytest.mark.parametrize(
    ("after", "verdict", "exceeds"),
    [
        (BEFORE, "identical", False),
        (BEFORE._replace(opcodes="b"), "equal count", False),
        (BEFORE._replace(instructions=94, opcodes="b"), "shorter", False),
        (BEFORE._replace(instructions=96, opcodes="b"), "longer by one", False),
        (BEFORE._replace(instructions=97, opcodes="b"), "longer", True),
        (BEFORE._replace(registers=26), "identical", True),
        (BEFORE._replace(spills=8), "identical", True),
    ],
)
def test_verdicts(after, verdict, exceeds, capsys):
    assert sass_diff.verdict(BEFORE, after) == verdict
    assert sass_diff.exceeds(BEFORE, after) == exceeds
    key = "a kernel", "sm_90a"
    assert sass_diff.report({key: BEFORE}, {key: after}, False) == exceeds
    out = capsys.readouterr().out
    assert f"1 {verdict}" in out and ("EXCEEDS" in out) == exceeds


def test_kernels_that_came_and_went(capsys):
    assert sass_diff.report({("old", "sm_90a"): BEFORE}, {("new", "sm_90a"): BEFORE}, False) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "removed" in lines[1] and "added" in lines[2]


def test_names_are_of_what_a_format_means():
    """So that a field of another name is the same kernel."""
    fmt = DEEP_GEMM
    text = sass_diff.spec_text(QuantizeSpec(torch.bfloat16, fmt))
    assert "[128 torch.float8_e4m3fn packed mn_major ue8m0 power_of_two]" in text
    assert "scale_format" not in text and "kernel=quantize.Quantize" in text


def test_names_are_unique():
    names = [name for name, _ in sass_diff.kernels(True, "sm_90a")]
    assert len(set(names)) == len(names) > 1000


def test_nothing_to_compare():
    assert sass_diff.report({}, {}, False) == 1
    assert sass_diff.report({}, {("new", "sm_90a"): BEFORE}, False) == 1


def test_a_commit_that_is_not_there(tmp_path):
    with pytest.raises(RuntimeError, match="nosuchcommit"):
        sass_diff.extract("nosuchcommit", tmp_path)
