"""Estimates beside measured times, and none for other GPUs unless they are close."""

import json

import pytest
import torch

from bench import bound
from bench.bound import MEASURED, Check, Estimate, Time
from bench.resources import MACHINES, MEMORY, Bound
from cute_quant import DEEP_GEMM, MXFP8, NVFP4, ROWWISE_FP8
from cute_quant.contract.prologues import make_rms_norm
from cute_quant.dispatch.call_range import OPERATIONS
from tests.helpers import poisoned_results
from tests.kernels.emulated_gpu import Gpu

COMMIT = "0000000"
H100 = MACHINES["sm_90a"]


def estimated(factors, kernels=30):
    """Return estimates that are so many times the measured times, of so many kernels."""
    found = []
    for i, factor in enumerate(factors):
        time = Time("quantize", str(DEEP_GEMM), 1 + i, 7168, 1e-6 * (1 + i), COMMIT)
        found.append(Estimate(time, i % kernels, Bound({MEMORY: factor * time.seconds}, 0.0)))
    return found


CLOSE = [1.05] * 40
FAR = [1.2] * 40
UNORDERED = [1 / (1 + i) for i in range(40)]


@pytest.mark.parametrize(
    ("found", "passes"),
    [
        (estimated(CLOSE), True),
        (estimated(CLOSE, kernels=bound.LEAST_KERNELS), True),
        (estimated(CLOSE, kernels=bound.LEAST_KERNELS - 1), False),
        (estimated(FAR), False),
        (estimated(UNORDERED), False),
        (estimated([1.0] * 21 + [1.3] * 19), True),
    ],
)
def test_only_close_estimates_pass(found, passes):
    assert bound.check(found).passes == passes


def test_the_limits_are_those_that_were_asked():
    assert Check(20, 0.95, 0.10, 9.0).passes
    for check in (Check(19, 1, 0, 0), Check(20, 0.949, 0, 0), Check(20, 1, 0.101, 0)):
        assert not check.passes


@pytest.mark.parametrize(("factors", "passes"), [(CLOSE, True), (FAR, False), (UNORDERED, False)])
def test_a_b200_is_estimated_only_if_the_h100_is_close(factors, passes, monkeypatch):
    asked = []

    def estimates(times, machine):
        asked.append(machine.gpu.name)
        return estimated(factors)

    monkeypatch.setattr(bound, "estimates", estimates)
    lines, result = bound.report([])
    text = "\n".join(lines)
    assert result == passes
    assert asked == (["H100", "B200"] if passes else ["H100"])
    assert ("B200: estimate, not measured" in text) == passes
    assert passes or ("B200" not in text and "no estimates for other GPUs" in text)
    assert "rank correlation" in text and "relative error: median" in text


@pytest.mark.parametrize("passes", [True, False])
def test_the_command_says_whether_they_pass(passes, monkeypatch, capsys, tmp_path):
    path = tmp_path / "times.jsonl"
    time = Time("quantize", str(DEEP_GEMM), 1, 7168, 1e-6, COMMIT)
    lines = [{"machine": {}}, {"time": time._asdict()}]
    path.write_text("\n".join(map(json.dumps, lines)))
    given = []

    def report(times):
        given.extend(times)
        return ["a table"], passes

    monkeypatch.setattr(bound, "report", report)
    monkeypatch.setattr("sys.argv", ["bench.bound", "--against", str(path)])
    with pytest.raises(SystemExit) as stopped:
        bound.main()
    assert bool(stopped.value.code) != passes
    assert given == [time] and capsys.readouterr().out == "a table\n"


def test_the_recorded_times_name_gpu_and_commits():
    first, *_ = MEASURED.read_text().splitlines()
    machine = json.loads(first)["machine"]
    times = bound.read(MEASURED)
    assert "H100" in machine["gpu"]
    assert set(machine["commit"].split(", ")) == {time.commit for time in times}
    assert {time.operation for time in times} <= set(OPERATIONS)
    assert len({time[:4] + time[6:] for time in times}) > 100


@pytest.mark.parametrize(
    ("operation", "fmt", "options", "nbytes"),
    [
        ("quantize", DEEP_GEMM, {}, 2 + 1 + 1 / 128),
        ("quantize", MXFP8, {}, 2 + 1 + 1 / 32),
        ("quantize", NVFP4, {}, 2 + 1 / 2 + 1 / 16),
        ("quantize", ROWWISE_FP8, {}, 2 + 1),
        ("silu_mul_quantize", DEEP_GEMM, {}, 4 + 1 + 1 / 128),
        ("silu_mul_backward_quantize", DEEP_GEMM, {}, 3 + 1 + 1 / 128),
        ("rms_norm_quantize", DEEP_GEMM, {}, 2 + 1 + 1 / 128),
        ("rms_norm_quantize", DEEP_GEMM, {"residual": True}, 6 + 1 + 1 / 128),
        ("quantize_blocks", DEEP_GEMM, {}, 3),
        ("requantize_blocks", NVFP4, {}, 1.5),
        ("dequantize_blocks", DEEP_GEMM, {}, 3),
    ],
)
def test_bytes_of_a_call(operation, fmt, options, nbytes):
    time = Time(operation, str(fmt), 3, 4096, 1e-6, COMMIT, **options)
    assert time.nbytes == 3 * 4096 * nbytes


@pytest.mark.parametrize(
    ("fmt", "norm"), [(DEEP_GEMM, False), (MXFP8, True), (ROWWISE_FP8, False)], ids=str
)
def test_the_grid_is_that_of_the_call(kernels, fmt, norm):
    gpu = Gpu(kernels, "sm_90a")
    m, k = 5, 1536
    x, weight = torch.randn(m, k).bfloat16(), torch.ones(k).bfloat16()
    prologue = None
    if norm:
        prologue = make_rms_norm(weight, eps=1e-6, weight_offset=0.0, rounding="fused")
    gpu.quantize(x, *poisoned_results(fmt, m, k, "cpu")[:2], fmt, prologue=prologue)
    launched = gpu.launched[-1]
    time = Time("rms_norm_quantize" if norm else "quantize", str(fmt), m, k, 1e-6, COMMIT)
    spec, launch = bound.launch_of(time, H100)
    assert spec == launched.kernel.spec
    host = launched.host.launches[-1]
    threads = torch.tensor(host.block).prod().item()
    assert (launch.ctas, 32 * launch.warps) == (torch.tensor(host.grid).prod().item(), threads)
