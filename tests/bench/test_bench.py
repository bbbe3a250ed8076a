"""Benchmarks: checks of results, and verdicts on targets."""

import types

import pytest
import torch

from bench import (
    cases,
    columns,
    columns_gated,
    convert_scales,
    demo,
    environment,
    masked,
    scatter,
    stage_report,
)
from bench.names import CUTE_QUANT, PLAIN, STREAM, of_operation
from bench.results import Result, Results
from bench.run import Check, Run
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
from cute_quant.lab import timing


@pytest.mark.parametrize("conversion", convert_scales.CONVERSIONS, ids=lambda c: c.name)
def test_conversions_are_checked(conversion, monkeypatch):
    monkeypatch.setattr(convert_scales, "random", lambda *shape: torch.randn(shape).bfloat16())
    convert_scales.converting(conversion, 133, COLUMNS)()

    def wrong(sf: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(sf)

    with pytest.raises(RuntimeError, match=f"^{conversion.name} of .* differs from the reference"):
        convert_scales.of_peer(wrong, conversion, 133, COLUMNS)


@pytest.fixture
def columns_on_cpu(monkeypatch):
    for module in (columns_gated, columns):
        monkeypatch.setattr(module, "DEVICE", "cpu")
        monkeypatch.setattr(module, "random", lambda *shape: torch.randn(shape).bfloat16())


@pytest.mark.parametrize("kind", columns_gated.KINDS[1::4], ids=str)
def test_both_directions_are_checked(kind, monkeypatch, columns_on_cpu):
    rows = columns.uneven_experts(512, 2) if kind.experts else None
    columns_gated.quantizing(kind, 512, 128, rows)()
    if not kind.stochastic:
        of_torch = columns_gated.values
        monkeypatch.setattr(columns_gated, "values", lambda *given: of_torch(*given).flip(0))
        with pytest.raises(RuntimeError, match=": columns: differs from the reference"):
            columns_gated.quantizing(kind, 512, 128, rows)


@pytest.mark.parametrize("kind", [k for k in columns.KINDS if k.row_fmt is None], ids=str)
def test_columns_at_both_ends_are_checked(kind, columns_on_cpu):
    """Their values and their scales, in blocks too, whose last rows are not those of a block."""
    mn, k = 512, 592
    rows = columns.uneven_experts(mn, 2) if kind.experts else None
    x = columns.random(mn, k)
    q, sf = columns.quantize_columns(x, kind.fmt, transposed=kind.transposed, rows=rows)
    columns.compare(x, kind, rows, (q, sf))
    # The last column is row 79 of the last block: the fourth of its 128 x 4 bytes is of group 3.
    last = -512 + 79 % 32 * 16 + 79 // 32 * 4 + 3
    for scale in (0, last if kind.fmt.blocked else -1):
        wrong = sf.clone()
        wrong.view(torch.uint8).flatten()[scale] ^= 1
        with pytest.raises(RuntimeError, match=": scales: differs from the reference"):
            columns.compare(x, kind, rows, (q, wrong))
    of_values = q.mT if kind.transposed else q
    of_values.view(torch.uint8)[0, -1] ^= 1
    with pytest.raises(RuntimeError, match=": values: differs from the reference"):
        columns.compare(x, kind, rows, (q, sf))


@pytest.mark.parametrize("mn", [256, 300, 2048, 8192, 16384])
def test_experts_of_a_benchmark_have_rows(mn, columns_on_cpu):
    """All but one; few rows have fewer experts. Padding is less than half."""
    rows = columns.uneven_experts(mn, columns.EXPERTS)
    ends = rows.ends.tolist()
    assert len(ends) == min(columns.EXPERTS, mn // 256) and ends[-1] <= mn
    starts = [0, *(-(-end // 128) * 128 for end in ends[:-1])]
    sizes = [end - start for start, end in zip(starts, ends, strict=True)]
    assert sizes.count(0) == (len(ends) > 1) and min(sizes) >= 0
    assert columns.existing_rows(rows, mn) == sum(sizes) > mn // 2


def test_experts_that_do_not_fit_are_refused(columns_on_cpu):
    for mn, count in ((255, 32), (2048, 0)):
        with pytest.raises(ValueError, match=f"at least 256 rows and 1 expert, got {mn}, {count}"):
            columns.uneven_experts(mn, count)


@pytest.mark.parametrize("module", [columns, columns_gated], ids=["columns", "gated"])
def test_the_ceiling_moves_the_bytes_of_a_call(module, monkeypatch, columns_on_cpu):
    """Rows between experts are written and not read."""
    mn, k = 2048, 512
    monkeypatch.setattr(cases, "allocate", lambda *traffic: traffic)
    made = {case.name: case for case in module.cases([(mn, k)], 32)}
    assert len(made) == len(module.KINDS)
    for kind in module.KINDS:
        rows = columns.uneven_experts(mn, 32) if kind.experts else None
        live = columns.existing_rows(rows, mn)
        if module is columns:
            read, written = 2 * k * live, mn * k * (1 if kind.row_fmt is None else 2)
        else:
            columns_in, columns_out = {"x": (1, 1), "products": (2, 1), "gradients": (3, 2)}[
                kind.of
            ]
            read, written = 2 * k * columns_in * live, 2 * mn * k * columns_out
        case = made[str(kind)]
        assert case.bytes == read + written
        traffic, elements = case.makers[STREAM]()
        words = traffic.loads * traffic.words_in + traffic.stores * traffic.words_out
        assert 0 <= 4 * words * elements // 16 - case.bytes < 4 * words
        assert (live == mn) == (rows is None)
        if rows is None:
            assert 4 * traffic.loads * traffic.words_in * elements // 16 == read


ROWS, COLUMNS = 5, 640
"""Five groups: the last word has padding."""

every_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)


def computed(operation):
    """Return a problem whose first buffer holds the reference's results."""
    torch.manual_seed(0)
    problem = StageProblem(ROWS, COLUMNS, "cpu")
    buffer = problem.buffers[0]
    buffer.poison()
    out = buffer.q, buffer.sf
    if operation is SILU_MUL_QUANTIZE:
        silu_mul_quantize(buffer.gate_up, out=out)
    elif operation is RMS_NORM_QUANTIZE:
        out = *out, buffer.residual_out
        rms_norm_quantize(buffer.x, buffer.weight, eps=EPS, residual=buffer.residual, out=out)
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


class Provider:
    """A provider with a given difference or error."""

    def __init__(self, name, difference="", error=None):
        self.name, self.launch, self.ours = name, PLAIN, name.startswith(CUTE_QUANT)
        self.difference, self.error = difference, error

    def calls(self, problem):
        if self.error:
            raise self.error
        return [lambda: None] * len(problem.buffers)

    def check(self, problem):
        return Check(self.difference, 0.25)

    def bytes_moved(self, problem):
        return problem.mn * problem.k


@pytest.fixture
def make_run(monkeypatch):
    """Make runs that capture and measure nothing."""
    monkeypatch.setattr(environment, "describe", lambda program, commit: {"commit": commit})
    monkeypatch.setattr(timing, "capture", lambda calls, launches: timing.Graph(None, launches, ()))
    monkeypatch.setattr(
        timing, "measure", lambda graphs: {key: timing.Timing((1.0, 2.0, 3.0)) for key in graphs}
    )
    return lambda *providers: Run(
        "bench", lambda mn, k: StageProblem(mn, k, "cpu"), providers, "abc"
    )


def test_a_machine_names_its_commit_and_the_command_without_paths(monkeypatch):
    properties = types.SimpleNamespace(name="GPU", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr("sys.argv", ["bench", "--rows", "1,2", "--output", "some/place/out"])
    machine = environment.describe("python -m bench", "abc")
    assert (machine["gpu"], machine["commit"]) == ("GPU", "abc")
    assert machine["command"] == "python -m bench --rows 1,2 --output out"
    monkeypatch.setattr(environment, "current_commit", lambda: "def")
    assert environment.describe("python -m bench", None)["commit"] == "def"


def test_run_measures_what_is_right(make_run, capsys):
    wrong, fails = Provider("a", "1 value"), Provider("b", error=RuntimeError("no\nmore"))
    right, ours = Provider(STREAM), Provider(CUTE_QUANT)
    run = make_run(wrong, fails, right, ours)
    for k in (128, 256):
        run.measure(ROWS, k, run.providers)
    assert run.providers == [wrong, right, ours] and not run.wrong
    assert run.results.machine["commit"] == "abc"
    for k in (128, 256):
        found = {result.provider: result for result in run.results if result.k == k}
        assert list(found) == ["a", STREAM, CUTE_QUANT]
        assert [result.difference for result in found.values()] == ["1 value", "", ""]
        assert found[STREAM].bytes == ROWS * k and found[STREAM].seconds == 2.0
        assert found[STREAM].differing == 0.25
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "a, plain, at 5 x 128 is not what the reference allows, marked !: 1 value",
        "dropped: b, plain: RuntimeError: no",
        "a, plain, at 5 x 256 is not what the reference allows, marked !: 1 value",
    ]


def test_run_does_not_time_our_wrong_results(make_run, capsys):
    run = make_run(Provider(CUTE_QUANT, "1 value"), Provider(STREAM))
    run.measure(ROWS, COLUMNS, run.providers)
    assert run.wrong and [result.provider for result in run.results] == [STREAM]
    assert capsys.readouterr().out.startswith(f"{CUTE_QUANT}, plain, at 5 x 640 is not what")


def test_run_raises_our_errors(make_run):
    run = make_run(Provider(CUTE_QUANT, error=RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        run.measure(ROWS, COLUMNS, run.providers)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.000412, "0.000412"), (0.0412, "0.0412"), (4.0, "4.00"), (23.45, "23.4"), (2345.6, "2,346")],
)
def test_significant_digits(number, text):
    assert demo.significant(number) == text


def test_the_demo_never_prints_a_time_of_nothing(monkeypatch, capsys):
    seconds = iter(range(0, 1000, 50))
    monkeypatch.setattr(demo.time, "perf_counter", lambda: float(next(seconds)))
    demo.call_time(torch.ones(4, 128, dtype=torch.bfloat16))
    out = capsys.readouterr().out
    assert "50,000,000 us, 0.0000000" in out and out.endswith(" GB/s\n")


def test_experts_are_pairs():
    assert masked._pairs("32:1024,256:4096") == ((32, 1024), (256, 4096))
    for text in ("32", "32:1024:8"):
        with pytest.raises(ValueError, match="unpack"):
            masked._pairs(text)


@pytest.mark.parametrize("kind", ["dense", "masked", "prefix_sum"])
def test_scatters_name_each_row_once(kind, monkeypatch):
    for module in (masked, scatter):
        monkeypatch.setattr(module, "DEVICE", "cpu")
    torch.manual_seed(0)
    call, gather, moved = scatter.calls(33, 8, 640, kind)
    call.run.keywords["check"] = True
    assert call.difference() == ""
    assert moved >= 33 * 640 * 2 + 33 * 8 * (640 + 5)
    monkeypatch.setattr(scatter, "poison", lambda *tensors: None)
    gather.run.keywords["index"].fill_(0)
    assert call.difference() != ""
