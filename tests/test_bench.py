"""What benchmarks say of results: whether they are right, and whether targets are met."""

import pytest
import torch

from bench import stage_report, stream
from bench.names import CUTE_QUANT, PLAIN, STREAM, of_operation
from bench.results import Result, Results
from bench.shapes import OPERATIONS, QUANTIZE_ALONE, RMS_NORM_QUANTIZE, SILU_MUL_QUANTIZE
from bench.stage_problem import (
    BFLOAT16_ERROR,
    EPS,
    EXACT,
    FLOAT32_ERROR,
    StageProblem,
    check_quantized,
)
from bench.targets import Target, verdicts
from cute_quant import quantize, rms_norm_quantize, silu_mul_quantize

ROWS, COLUMNS = 5, 640
"""Five groups: the last word has padding."""

every_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)


def computed(operation):
    """A problem whose first buffer holds what the reference makes of it."""
    torch.manual_seed(0)
    problem = StageProblem(ROWS, COLUMNS, "cpu")
    buffer = problem.buffers[0]
    buffer.poison()
    out = buffer.q, buffer.sf
    if operation is SILU_MUL_QUANTIZE:
        silu_mul_quantize(buffer.gate_up, out=out)
    elif operation is RMS_NORM_QUANTIZE:
        out = *out, buffer.residual_out
        rms_norm_quantize(buffer.x, buffer.weight, EPS, buffer.residual, out=out)
    else:
        quantize(buffer.x, out=out)
    return problem, buffer


@every_operation
def test_the_reference_is_right(operation):
    problem, _ = computed(operation)
    assert problem.check(operation, 0, EXACT) == ("", 0.0)


@every_operation
@pytest.mark.parametrize("row", [0, ROWS - 1])
@pytest.mark.parametrize(
    ("tensor", "said"), [("q", "1 values"), ("sf", "1 scales"), ("residual_out", "residual")]
)
def test_an_error_is_found(operation, row, tensor, said):
    problem, buffer = computed(operation)
    t = getattr(buffer, tensor)
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[t.dtype.itemsize]
    t.view(integer)[row, 0] ^= 1
    difference = problem.check(operation, 0, FLOAT32_ERROR).difference
    if tensor == "residual_out" and operation is not RMS_NORM_QUANTIZE:
        assert not difference
    else:
        assert said in difference


def test_padding_of_a_word_is_looked_at():
    problem, buffer = computed(QUANTIZE_ALONE)
    buffer.sf[2, 1] |= 1 << 8
    assert "1 scales" in problem.check(QUANTIZE_ALONE, 0, FLOAT32_ERROR).difference


def test_values_within_the_error_are_right():
    values = torch.randn(64, 128)
    q, sf = quantize(values * (1 + 2.0**-8))
    assert check_quantized(q, sf, values, FLOAT32_ERROR).difference
    difference, differing = check_quantized(q, sf, values, BFLOAT16_ERROR)
    assert not difference and differing > 0


@pytest.mark.parametrize(("loads", "stores"), [(1, 1), (2, 1), (2, 3)])
def test_every_word_counts_in_a_stream(loads, stores):
    x = torch.arange(loads * 16, dtype=torch.int32)
    y = stream.expected(x, loads, stores)
    assert y.shape == (stores, 8)
    for i in range(len(x)):
        x[i] ^= 1 << 20
        assert int((stream.expected(x, loads, stores) != y).sum()) == min(stores, 2)
        x[i] ^= 1 << 20


def result(operation, provider, mn, seconds):
    name = of_operation(operation.name, provider)
    return Result(name, PLAIN, mn, 2048, seconds, (seconds, seconds), 1, 1, 1, 1)


def test_targets_between_operations():
    times = {(SILU_MUL_QUANTIZE, 1): 1.2, (SILU_MUL_QUANTIZE, 64): 1.5, (QUANTIZE_ALONE, 1): 1.0}
    times[QUANTIZE_ALONE, 64] = 1.0
    results = Results({}, [result(o, CUTE_QUANT, mn, t) for (o, mn), t in times.items()])
    (line,) = stage_report.judge(results)
    assert line.startswith("MISSED  1.500 <= 1.3") and line.endswith("worst of 2 at 64 x 2048")
    names = (of_operation(o.name, CUTE_QUANT) for o in (SILU_MUL_QUANTIZE, QUANTIZE_ALONE))
    (line,) = verdicts(results, [Target(*names, (PLAIN,), (1, 16), 1.3)])
    assert line.startswith("met     1.200")


def test_results_of_an_operation():
    results = Results({}, [result(o, STREAM, 1, 1.0) for o in OPERATIONS])
    part = stage_report.of(results, RMS_NORM_QUANTIZE.name)
    assert part.providers() == [STREAM] and part.get(STREAM, PLAIN, 1, 2048)
