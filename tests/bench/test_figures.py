"""Figures and tables of the documents are those of the recorded results."""

import dataclasses
import json

import pytest

from bench import figures, report
from bench.masked import Result as MaskedResult
from bench.names import CUTE_QUANT, PDL, PLAIN, STREAM
from bench.results import Result, Results, machine_lines
from cute_quant.lab import report as sweep_report
from cute_quant.lab.sweep import from_json, origin

VLLM = "vLLM 0.33.0"


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n == "bound" else []) for n in figures.TABLES],
)
def test_a_table_of_a_document_is_of_its_record(name):
    holding = [
        text
        for path in figures.DOCUMENTS
        if f"<!-- make figures: {name} -->" in (text := path.read_text(encoding="utf-8"))
    ]
    (document,) = holding
    assert figures.filled(document, [name]) == document


def test_no_table_of_measurements_is_written_by_hand():
    for path in figures.DOCUMENTS:
        document = path.read_text(encoding="utf-8")
        for name in figures.TABLES:
            start = document.find(f"<!-- make figures: {name} -->")
            if start >= 0:
                document = document[:start] + document[document.index("<!-- end -->", start) :]
        assert "---:" not in document  # a column of numbers


def test_a_table_without_a_record_is_left_out(monkeypatch, tmp_path):
    lines = figures.TABLES["quantize"][1]
    monkeypatch.setitem(figures.TABLES, "quantize", (tmp_path / "none.jsonl", lines))
    document = "<!-- make figures: quantize -->\n\n| old |\n\n<!-- end -->\nmore"
    filled = figures.filled(document, ["quantize"])
    assert filled == "<!-- make figures: quantize -->\n\n<!-- end -->\nmore"


def machine() -> dict:
    return {
        "gpu": "NVIDIA H100",
        "date": "2026-11-26 10:00 UTC",
        "commit": "abcdef",
        "versions": {},
    }


def test_tables_name_gpu_and_commit(monkeypatch, tmp_path):
    path = tmp_path / "host.jsonl"
    Results(machine(), host={"quantize(x)": 3e-6, "torch.neg(x)": 2e-6}).write(path)
    monkeypatch.setattr(figures, "HOST", path)
    text = "\n".join(figures.host_table())
    assert "NVIDIA H100" in text and "commit abcdef" in text
    assert "| `quantize(x)` | 3.00 | 1.50 |" in text
    path = tmp_path / "masked.jsonl"
    result = MaskedResult("index", 64, 128, 1000, 2, 3e-6, (3e-6, 3e-6), 2e-6, 1.5e-6)
    alone = dataclasses.replace(result, name="whole row", dense_seconds=None)
    records = [{"machine": machine()}, *({"result": vars(r)} for r in (result, alone))]
    path.write_text("\n".join(map(json.dumps, records)))
    monkeypatch.setattr(figures, "MASKED", path)
    text = "\n".join(figures.masked_table())
    assert "NVIDIA H100" in text and "commit abcdef" in text
    assert "| index | 64 | 3.00 | 2.00 | 1.50 | 2.00 |" in text
    assert "| whole row | 64 | 3.00 |  |  | 2.00 |" in text


@pytest.mark.parametrize(
    ("name", "other"), [("FP4", "vLLM"), ("BLOCKS", "DeepGEMM"), ("COLUMNS", "transpose first")]
)
def test_the_tables_of_cases_have_another_library(name, other, monkeypatch, tmp_path):
    path = tmp_path / "cases.jsonl"
    seconds = {"cute_quant": 2e-6, "stream": 1e-6}
    results = [
        {"name": "quantize NVFP4", "m": 64, "k": 128, "seconds": seconds},
        {"name": "dequantize NVFP4", "m": 1, "k": 16, "seconds": {**seconds, other: 3e-6}},
    ]
    records = [{"machine": machine()}, *({"result": result} for result in results)]
    path.write_text("\n".join(map(json.dumps, records)))
    monkeypatch.setattr(figures, name, path)
    text = "\n".join(figures.TABLES[name.lower()][1]())
    assert "NVIDIA H100" in text and "commit abcdef" in text
    assert "| quantize NVFP4 | 64 x 128 | 2.00 | 2.00 |  |" in text
    assert "| dequantize NVFP4 | 1 x 16 | 2.00 | 2.00 | 1.50 |" in text


def test_the_plot_of_the_sweep_is_of_its_record():
    data = json.loads(figures.SWEEP.read_text(encoding="utf-8"))
    drawing = sweep_report.plot(from_json(data), origin(data))
    assert drawing.svg() == figures.SWEEP.with_suffix(".svg").read_text(encoding="utf-8")


def test_a_faster_launch_is_higher_in_the_plot():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    times = {
        (STREAM, PLAIN): 1.2,
        (STREAM, PDL): 0.7,
        (CUTE_QUANT, PLAIN): 1.4,
        (CUTE_QUANT, PDL): 0.8,
        (VLLM, PLAIN): 2.3,
        (VLLM, PDL): 2.0,
    }
    results = [
        Result(name, launch, 1, 7168, seconds, (seconds, seconds), 1, 1, 1, 1)
        for (name, launch), seconds in times.items()
    ]
    figure, (time, share) = pyplot.subplots(1, 2)
    report.panels(Results(machine(), results), 7168, time, share)
    heights = {line.get_ydata()[0] for line in share.lines}
    expected = {100 * times[STREAM, PDL] / seconds for seconds in times.values()}
    assert {round(h, 6) for h in heights} == {round(h, 6) for h in expected}
    assert "stream with PDL" in share.get_title(loc="left")
    pyplot.close(figure)


def test_what_was_not_recorded_is_left_out():
    (first,) = machine_lines(machine())
    assert first == "NVIDIA H100, 2026-11-26 10:00 UTC, commit abcdef"
    known = {
        "driver": "580",
        "cuda": "13.0",
        "python": "3.12",
        "versions": {"torch": "2", "x": None},
    }
    first, second = machine_lines(machine() | known)
    assert first == "NVIDIA H100, driver 580, CUDA 13.0, 2026-11-26 10:00 UTC, commit abcdef"
    assert second == "torch 2, Python 3.12"


def test_plots_name_gpu_and_commit():
    assert report.origin(machine()) == "NVIDIA H100, 2026-11-26, commit abcdef"
