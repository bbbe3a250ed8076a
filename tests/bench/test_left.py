"""Two trees compared: calls and their ceilings on the CPU, and the table of them."""

import json
import sys
import zipfile

import pytest
import torch

from bench import calls, ceiling, fp4, left, masked, mxfp8, stream
from bench.shapes import RMS_NORM_QUANTIZE, SILU_MUL_QUANTIZE
from bench.stream import BulkStream, Stream
from cute_quant import DEEP_GEMM, NVFP4, ROWWISE_FP8
from cute_quant.jit import lookup
from cute_quant.lab import timing

CASES = (
    (calls.quantizing_case(ROWWISE_FP8, 3, 640), 1.35),
    (calls.quantizing_case(NVFP4.replace(row_scale=True), 3, 640), None),
    (calls.quantizing_case(DEEP_GEMM, 4, 1024), 1.5),
    (calls.dequantizing_case(3, 640), 1.3),
    (calls.stage_case(SILU_MUL_QUANTIZE, 3, 640), 1.2),
    (calls.stage_case(RMS_NORM_QUANTIZE, 3, 640), None),
    (calls.masked_case(3, 16, 5, 640), None),
)


@pytest.fixture
def on_cpu(monkeypatch):
    """Have a CPU take all calls, and the ceiling's be torch, the second of them the fastest."""

    def function(spec, arch):
        def move(x, y):
            y.copy_(spec.expected(x).flatten())

        move.spec = spec
        return move

    def measure(graphs, replays=1):
        seconds = {}
        for key, graph in graphs.items():
            call = graph.calls[0]
            spec = getattr(getattr(call, "func", None), "spec", None)
            of_ceiling = {256: 1e-6}.get(getattr(spec, "threads", None), 2e-6)
            seconds[key] = 3e-6 if spec is None else of_ceiling
        return {key: timing.Timing((second, second)) for key, second in seconds.items()}

    def capture(made, launches=1):
        for call in made:
            call()
        return timing.Graph(None, launches, tuple(made))

    def family(pdl, traffic, sms):
        yield Stream(pdl, *traffic)
        yield Stream(pdl, *traffic, threads=256)
        yield BulkStream(pdl, *traffic)

    monkeypatch.setattr(stream, "family", family)
    monkeypatch.setattr(stream, "function", function)
    monkeypatch.setattr(timing, "measure", measure)
    monkeypatch.setattr(timing, "capture", capture)
    monkeypatch.setattr(timing, "warm_up", lambda: None)
    monkeypatch.setattr(timing, "buffer_count", lambda nbytes: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(lookup, "architecture", lambda device: "sm_90a")
    monkeypatch.setattr(lookup, "multiprocessors", lambda device: 132)
    for module in (calls, ceiling, fp4, masked):
        monkeypatch.setattr(module, "DEVICE", "cpu")


def test_calls_beside_their_ceilings(on_cpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(left, "every_case", lambda: iter(CASES[:3] + CASES[6:]))
    given, found = tmp_path / "given.json", tmp_path / "found.jsonl"
    given.write_text("{}")
    left.child("row|masked|128", given, found)
    measured = [left.Measured(**json.loads(line)) for line in found.read_text().splitlines()]
    assert [m.name for m in measured] == [case.name for case, _ in CASES[:3] + CASES[6:]]
    assert all((m.kernel, m.ratio) == (1, pytest.approx(3.0)) for m in measured)
    given.write_text(json.dumps({CASES[0][0].name: 0}))
    found.unlink()
    left.child("^e4m3:row", given, found)
    (line,) = found.read_text().splitlines()
    again = left.Measured(**json.loads(line))
    assert (again.kernel, again.ratio) == (0, pytest.approx(1.5))
    assert "us" in capsys.readouterr().out


@pytest.mark.parametrize("case", [case for case, _ in CASES], ids=lambda case: case.name)
def test_a_call_that_is_wrong_is_not_timed(on_cpu, monkeypatch, case):
    case.capture()
    bind = calls.bind

    def bind_to_wrong_values(*arguments, **options):
        launch = bind(*arguments, **options)

        def call():
            launch()[0].view(torch.uint8).zero_()

        call.results = launch.results
        return call

    for module in (calls, fp4):
        monkeypatch.setattr(module, "bind", bind_to_wrong_values)
    monkeypatch.setattr(masked, "difference", lambda *arguments: "a value")
    with pytest.raises(RuntimeError, match="differs from the reference"):
        case.capture()


def test_a_ceiling_that_moves_other_words_is_refused(on_cpu, monkeypatch):
    memory = [ceiling.allocate(stream.Traffic(), 4096)]
    monkeypatch.setattr(stream, "function", lambda spec, arch: lambda x, y: y.fill_(7))
    with pytest.raises(RuntimeError, match="moves other words"):
        ceiling.Ceiling(memory)


def measured(name, seconds, ceiling_seconds=1e-6):
    return left.Measured(name, seconds, 0.9 * seconds, 1.1 * seconds, ceiling_seconds, 0, "")


def test_a_table_of_two_trees():
    trees = {
        "before": left.cells([measured("a", 2e-6), measured("a", 4e-6), measured("b", 1e-6)]),
        "here": left.cells([measured("a", 1.2e-6)]),
    }
    header, a, b = left.table(trees, {"a": 1.5})
    assert header.split() == ["asked", "before", "here", "/", "before"]
    assert " ".join(a.split()) == (
        "a 1.50 3.00 us (2.70 to 3.30) 3.000* 1.20 us (1.08 to 1.32) 1.200 0.400"
    )
    assert " ".join(b.split()) == "b 1.00 us (0.90 to 1.10) 1.000"


def test_a_file_holds_the_times_of_its_tree(tmp_path):
    path = tmp_path / "some" / "left.jsonl"
    left.write(path, {"gpu": "GPU"}, [measured("a", 2e-6)])
    assert left.read(path) == [measured("a", 2e-6)]


def test_a_tree_without_the_package_is_refused(tmp_path, capfd):
    with pytest.raises(RuntimeError, match="was not measured"):
        left.run_tree(tmp_path, "", {})
    assert "expected a checkout with cute_quant" in capfd.readouterr().err


def test_kernels_of_a_wheel_are_imported_alone(tmp_path, monkeypatch):
    path = tmp_path / "flashinfer_python-0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("flashinfer/__init__.py", "raise ImportError")
        wheel.writestr("flashinfer/quantization/__init__.py", "raise ImportError")
        wheel.writestr("flashinfer/cute_dsl/fp4_common.py", "VALUE = 3")
        wheel.writestr(
            "flashinfer/quantization/kernels/mxfp8_quantize.py",
            "from ...api_logging import flashinfer_api\n"
            "from ...cute_dsl.fp4_common import VALUE\n"
            "@flashinfer_api\n"
            "def quantize():\n"
            "    from ...cute_dsl import fp4_common\n"
            "    return fp4_common.VALUE\n",
        )
    with monkeypatch.context() as patched:
        patched.setattr(sys, "modules", dict(sys.modules))
        module = mxfp8.load(path)
        assert (module.VALUE, module.quantize()) == (3, 3)
