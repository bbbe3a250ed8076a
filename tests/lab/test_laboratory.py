"""Layouts as the laboratory evaluates, draws, examines and reports them."""

import html
import json
import math
import re
import shlex
import sys
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from cute_quant import (
    DEEP_GEMM_32,
    DEEP_GEMM_SM90,
    GROUPWISE_FP8,
    MXFP4,
    MXFP8,
    NAMED_FORMATS,
    NVFP4,
    lab,
    quantize,
)
from cute_quant.kernels import architectures
from cute_quant.kernels.config import ALONG, DEFAULT_TILE, DOWN, LANES, Access, QuantizeSpec
from cute_quant.kernels.heuristics import TWO_ROWS
from cute_quant.lab import (
    assignment,
    binary_utilities,
    command,
    draw,
    examine,
    make_layout,
    pictures,
    report,
)
from cute_quant.lab.drawing import Box, Words
from cute_quant.lab.examination import ELEMENTS
from cute_quant.lab.layout import around_the_default
from cute_quant.lab.machine_code import EXAMINED, MachineCode, machine_code
from cute_quant.lab.sweep import Trial, from_json, origin, to_json
from tests.helpers import FLOAT32, UE8M0

ROW_MAJOR = GROUPWISE_FP8.replace(group_size=64)
SVG = "{http://www.w3.org/2000/svg}"

LAYOUTS = {
    "default": {},
    "two rows": {"rows_per_thread": 2},
    "16 threads, 3 along": {"threads_per_group": 16, "column_warps": 3, "warp_order": ALONG},
    "4 threads": {"threads_per_group": 4, "load_bytes": 8, "rows_per_thread": 4},
    "1 thread": {"threads_per_group": 1, "row_warps": 2},
    "1 thread, 2 rows": {"threads_per_group": 1, "row_warps": 1, "rows_per_thread": 2},
    "2 threads, 4 rows": {"threads_per_group": 2, "row_warps": 1, "rows_per_thread": 4},
    "2 by 2 warps": {"row_warps": 2, "column_warps": 2, "warp_order": DOWN},
}
every_layout = pytest.mark.parametrize("choices", LAYOUTS.values(), ids=LAYOUTS)
FP4_FORMATS = (
    NVFP4,
    MXFP4,
    NVFP4.replace(scale_layout="8x4"),
    MXFP4.replace(scale_layout="8x4"),
    NVFP4.replace(scale_layout="row_major_packed"),
    NVFP4.replace(scale_layout="mn_major_packed"),
    NVFP4.replace(scale_layout="row_major"),
)
FORMATS = (UE8M0, FLOAT32, DEEP_GEMM_32, MXFP8, ROW_MAJOR, *FP4_FORMATS)
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=str)


# Thread-value layouts


@every_layout
def test_every_element_of_a_cta_has_one_thread(choices):
    layout = make_layout(**choices)
    held = [
        (s.row, s.column + i)
        for t in assignment.threads(layout)
        for s in t.segments
        for i in range(s.values)
    ]
    assert len(held) == len(set(held)) == layout.tile.rows * layout.cta_columns
    assert max(held) == (layout.tile.rows - 1, layout.cta_columns - 1)


@every_layout
def test_every_scale_of_a_cta_is_written_by_one_thread_of_its_group(choices):
    layout = make_layout(**choices)
    threads = assignment.threads(layout)
    writes = [place for t in threads for place in t.writes]
    groups = layout.cta_columns // 128
    assert sorted(writes) == [(r, g) for r in range(layout.tile.rows) for g in range(groups)]
    for t in threads:
        assert set(t.writes) <= set(t.groups)
        for s, (row, group) in zip(t.segments, t.groups, strict=True):
            assert (s.row, s.column // 128) == (row, group)


@pytest.mark.slow
@every_layout
def test_partners_are_those_of_the_shuffles_in_the_machine_code(choices):
    layout = make_layout(**choices)
    text = machine_code(layout.spec, "sm_90a").text
    offsets = [int(n, 16) for n in re.findall(r"SHFL\.BFLY \w+, \w+, \w+, (0x\w+),", text)]
    for t in assignment.threads(layout)[:: LANES + 3]:
        distances = [t.number ^ partner for partner in t.partners]
        assert sorted(distances * layout.tile.rows_per_thread) == sorted(offsets)


def test_the_order_of_warps():
    down, along = (
        assignment.places_of_warps(make_layout(row_warps=2, column_warps=3, warp_order=order))
        for order in (DOWN, ALONG)
    )
    assert down == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]
    assert along == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


# Scales in memory


@every_format
def test_scales_lie_where_the_format_puts_them(fmt):
    mn, k = 6, fmt.group_size * 5
    sf = fmt.empty_scales((), mn, k, torch.device("cpu"))
    scales = assignment.scales(make_layout(fmt), mn, k)
    covered = [byte for s in scales for byte in range(s.offset, s.offset + s.nbytes)]
    assert sorted(covered) == list(range(sf.untyped_storage().nbytes()))
    size, per_column = fmt.sf_dtype.itemsize, fmt.groups_per_column
    for s in scales:
        assert s.padding == (s.row >= mn or s.group >= 5)
        if not fmt.blocked:
            column, byte = divmod(s.group, per_column)
            assert s.offset == (s.row * sf.stride(0) + column * sf.stride(1)) * size + byte


# Coalescing


@pytest.mark.slow
@pytest.mark.parametrize("arch", EXAMINED)
@every_layout
def test_as_many_requests_as_memory_instructions(choices, arch):
    check_requests(make_layout(**choices), arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", EXAMINED)
@pytest.mark.parametrize("choices", [{}, {"rows_per_thread": 2}, {"values_per_thread": 8}])
@pytest.mark.parametrize("fmt", [NVFP4, MXFP4], ids=str)
def test_as_many_requests_of_fp4_as_memory_instructions(fmt, choices, arch):
    check_requests(make_layout(fmt, **choices), arch)


def check_requests(layout, arch):
    code, rows = machine_code(layout.spec, arch), layout.tile.rows_per_thread
    loads, stores = assignment.loads(layout, arch), assignment.stores(layout, arch)
    scale_stores = -(-rows // layout.lanes_per_group)
    upper_loads = int(layout.fmt.upper_scale)
    assert code.count("LDG") == rows * len(loads) + upper_loads
    assert code.count("STG") == rows * len(stores) + scale_stores
    for requests, bits in ((loads, 16), (stores, 8 // layout.fmt.value_type.per_byte)):
        moved = {byte for r in requests for first, end in r.ranges for byte in range(first, end)}
        assert moved == set(range(layout.tile.columns * bits // 8))


def test_sectors():
    default = make_layout()
    on_hopper, on_blackwell = (assignment.loads(default, arch) for arch in EXAMINED)
    assert [(len(r.sectors), r.efficiency) for r in on_hopper] == [(32, 0.5)] * 2
    assert [(len(r.sectors), r.efficiency) for r in on_blackwell] == [(32, 1.0)]
    (request,) = assignment.loads(make_layout(threads_per_group=16), "sm_90a")
    assert (len(request.sectors), request.efficiency) == (16, 1.0)
    narrow = assignment.loads(make_layout(load_bytes=4), "sm_100a")
    assert [(len(r.sectors), r.efficiency) for r in narrow] == [(32, 0.125)] * 8


def test_stores_of_half_bytes():
    for values, sectors in ((8, 4), (16, 8)):
        (request,) = assignment.stores(make_layout(NVFP4, values_per_thread=values), "sm_90a")
        nbytes = values // 2
        assert request.ranges == tuple((nbytes * i, nbytes * (i + 1)) for i in range(LANES))
        assert (len(request.sectors), request.efficiency) == (sectors, 1.0)


@pytest.mark.parametrize("fmt", FP4_FORMATS, ids=str)
def test_nibbles_are_where_the_reference_puts_them(fmt):
    """A row with one value that is not 0, in each column in turn."""
    nibbles = assignment.nibbles(make_layout(fmt))
    assert [nibble.column for nibble in nibbles] == list(range(16))
    options = {"encode_scale": torch.tensor(1.0)} if fmt.upper_scale else {}
    q, _ = quantize(torch.eye(16), fmt, **options)
    for nibble, row in zip(nibbles, q.view(torch.uint8), strict=True):
        (byte,) = row.nonzero().flatten().tolist()
        assert (byte, row[byte].item() > 0xF) == (nibble.byte, nibble.high)
    assert assignment.nibbles(make_layout(MXFP8)) == []


# Choices


def test_the_default_is_the_one_that_calls_use():
    assert make_layout().spec == QuantizeSpec(torch.bfloat16, UE8M0)
    assert make_layout(rows_per_thread=2).tile == TWO_ROWS
    assert make_layout().name == "default"
    assert make_layout(MXFP4).spec == QuantizeSpec(
        torch.bfloat16, MXFP4, access=Access(store_bytes=8)
    )
    assert make_layout(NVFP4).spec == QuantizeSpec(
        torch.bfloat16, NVFP4, access=Access(store_bytes=8), upper="encode_scale"
    )


def test_names_tell_layouts_apart():
    layouts = around_the_default(UE8M0, torch.bfloat16)
    assert len(layouts) >= 24
    assert len({layout.name for layout in layouts}) == len(layouts)
    assert layouts[0].tile == DEFAULT_TILE


@pytest.mark.parametrize(
    ("choices", "rule"),
    [
        ({"threads_per_group": 5}, "threads_per_group: expected a divisor of group_size 128"),
        ({"threads_per_group": 8, "values_per_thread": 8}, "expected a product of 128"),
        ({"threads_per_group": 4, "rows_per_thread": 6}, "at most 4 or a multiple"),
        ({"fmt": NVFP4, "values_per_thread": 4}, "a power of two from 8 on"),
        ({"fmt": NVFP4, "values_per_thread": 32}, "a divisor of group_size 16"),
        ({"fmt": NVFP4.replace(row_scale=True)}, "row_scale: expected False"),
        ({"tiles_per_thread": 2}, "tiles_per_thread: expected 1"),
        ({"load_bytes": 64}, "load_bytes: expected a power of two from 2 to 32"),
        ({"column_warps": 16}, "at most 1024 threads"),
        ({"fmt": DEEP_GEMM_SM90.replace(group_size=-1)}, "got whole rows"),
    ],
)
def test_refused_with_the_rule(choices, rule):
    with pytest.raises(ValueError, match=rule):
        make_layout(**choices)


# Drawings


@every_layout
def test_text_has_every_group(choices):
    layout = make_layout(**choices)
    text = draw(layout)
    rows = [line.split() for line in text.splitlines() if re.match(r" +\d+ +\d+ … \d+", line)]
    assert len(rows) == layout.tile.rows * layout.cta_columns // 128
    assert all(len(row) == 6 + layout.lanes_per_group for row in rows)


@every_format
def test_svg(fmt, tmp_path):
    layout = make_layout(fmt, rows_per_thread=2)
    draw(layout, tmp_path / "layout.svg", 5, 4 * fmt.group_size)
    root = ElementTree.parse(tmp_path / "layout.svg").getroot()
    boxes = list(root.iter(f"{SVG}rect"))
    threads = [b for b in boxes if b.get("data-t")]
    assert len(threads) == layout.warps * LANES * 2
    assert sum(int(b.get("data-n")) for b in threads) == layout.tile.rows * layout.cta_columns
    width, height = float(root.get("width")), float(root.get("height"))
    for b in boxes:
        x, y, w, h = (float(b.get(name)) for name in ("x", "y", "width", "height"))
        assert x >= 0 and y >= 0 and x + w <= width + 0.01 and y + h <= height + 0.01


def test_nibbles_in_a_drawing(tmp_path):
    draw(make_layout(NVFP4, row_warps=1), tmp_path / "layout.svg")
    boxes = ElementTree.parse(tmp_path / "layout.svg").getroot().iter(f"{SVG}rect")
    left = {int(b.get("data-nibble")): float(b.get("x")) for b in boxes if b.get("data-nibble")}
    order = sorted(left, key=left.__getitem__)
    assert order == [1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14]
    assert "1,0@0 3,2@1" in draw(make_layout(NVFP4))
    assert "lane 0 in q" not in draw(make_layout(MXFP8))


@pytest.mark.parametrize(
    ("fmt", "words"),
    [
        (UE8M0, "packed words of four UE8M0 bytes"),
        (NVFP4, "float8_e4m3fn scales, 128x4"),
        (NVFP4.replace(scale_layout="8x4"), "float8_e4m3fn scales, 8x4"),
        (FP4_FORMATS[4], "packed words of four e4m3 bytes, row-major"),
        (FP4_FORMATS[5], "packed words of four e4m3 bytes"),
    ],
    ids=str,
)
def test_scales_in_words(fmt, words):
    assert pictures.scales_in_words(fmt) == words


def test_svg_brings_its_colours():
    svg = pictures.pictures(make_layout())[0].svg()
    used = set(re.findall(r"[fs]-(\w+)", re.sub("<style>.*</style>", "", svg)))
    assert used and all(f".f-{name}{{fill:var(--{name})}}" in svg for name in used)
    assert "prefers-color-scheme:dark" in svg


def test_png(tmp_path):
    pytest.importorskip("matplotlib")
    draw(make_layout(), tmp_path / "layout.png")
    assert (tmp_path / "layout.png").read_bytes().startswith(b"\x89PNG")


def test_a_drawing_of_no_known_kind(tmp_path):
    with pytest.raises(ValueError, match="path: expected a name that ends in one of"):
        draw(make_layout(), tmp_path / "layout.gif")
    with pytest.raises(ValueError, match="mn: expected at least 1"):
        draw(make_layout(), mn=0)


@pytest.mark.parametrize("shape", [{"mn": 1_000_000}, {"k": 1 << 40}, {"mn": 4096, "k": 8192}])
def test_a_drawing_of_too_many_scales(shape, monkeypatch):
    monkeypatch.setattr(assignment, "scales", lambda *of: pytest.fail("it has begun"))
    with pytest.raises(ValueError, match="mn, k: expected at most 32768 scales to draw"):
        draw(make_layout(), **shape)


@every_format
def test_scales_are_counted_as_they_are_drawn(fmt, monkeypatch):
    layout, (mn, k) = make_layout(fmt), (6, fmt.group_size * 5)
    count = len(assignment.scales(layout, mn, k))
    module = sys.modules["cute_quant.lab.draw"]  # The package has a function of this name.
    monkeypatch.setattr(module, "MAX_SCALES", count)
    draw(layout, mn=mn, k=k)
    monkeypatch.setattr(module, "MAX_SCALES", count - 1)
    with pytest.raises(ValueError, match=f"got {count} of an"):
        draw(layout, mn=mn, k=k)


# Examinations


def test_examination_of_the_default():
    found = examine(make_layout(), "sm_100a")
    code = machine_code(make_layout().spec, "sm_100a")
    assert (found.instructions, found.registers) == (len(code.opcodes), code.registers)
    assert found.issue_slots == found.instructions and found.spills == 0
    moved = ELEMENTS * (2 + 1 + 1 / 128)
    assert found.budget == EXAMINED["sm_100a"].gpu.issue_budget(moved)
    assert found.resident_warps == 64
    assert found.bytes_in_flight == 64 * 32 * 32


def test_larger_tiles_take_fewer_issue_slots():
    one, two, many = (
        examine(make_layout(**c), "sm_90a")
        for c in ({}, {"rows_per_thread": 2}, {"threads_per_group": 4})
    )
    assert many.issue_slots < two.issue_slots < one.issue_slots


@pytest.mark.parametrize(
    ("arch", "registers", "warps", "resident"),
    [
        ("sm_90a", 32, 4, 64),
        ("sm_90a", 33, 4, 48),
        ("sm_90a", 128, 4, 16),
        ("sm_90a", 40, 1, 32),
        ("sm_90a", 16, 32, 64),
        ("sm_90a", 64, 3, 30),
        ("sm_120a", 32, 4, 48),
        ("sm_120a", 40, 1, 24),
    ],
)
def test_resident_warps(arch, registers, warps, resident):
    code = MachineCode((), "", registers, 0, 0)
    assert code.resident_warps(warps, architectures.named(arch)) == resident


def test_examination_of_other_architectures():
    found = examine(make_layout(), "sm_89")
    assert found.resident_warps == 48 and len(assignment.loads(make_layout(), "sm_89")) == 2
    with pytest.raises(ValueError, match="arch: expected one whose issue budget is known, got 'sm"):
        examine(make_layout(), "sm_107a")


# Reports and the command line


def trials(*ratios: float) -> list[Trial]:
    layouts = around_the_default(UE8M0, torch.bfloat16)[: len(ratios)]
    found = [Trial(layout) for layout in layouts]
    for trial, ratio in zip(found, ratios, strict=True):
        trial.ratios[256, 7168] = ratio
        trial.microseconds[256, 7168] = 4.0 * ratio
    return found


def test_the_legend_of_a_plot_lies_below_its_source():
    source = "a GPU of some length, torch 2.11.0+cu130, 2026-11-26, commit 0123456789ab"
    drawing = report.plot(trials(1.0, 1.25), source)
    text = next(p for p in drawing.parts if isinstance(p, Words) and p.text == source)
    legend = next(p for p in drawing.parts if isinstance(p, Box))
    assert legend.y > text.y and legend.y + legend.height < report.PLOT_HEADER - 20


def test_a_sweep_names_its_version():
    data = to_json(trials(1.0), "0123456789ab")
    assert origin(data).endswith(", commit 0123456789ab")
    assert origin(to_json(trials(1.0))).endswith(", commit not recorded")


def test_json_keeps_trials():
    before = trials(1.0, 1.25, 0.98)
    before[1].failure = "k: expected a multiple of 64"
    before[0].examine()
    assert from_json(json.loads(json.dumps(to_json(before)))) == before


def test_tables_and_plots():
    found = trials(1.0, 1.25, 5.0)
    headings, table = report.columns(found)
    assert headings[-1] == "256 x 7168" and [row[-1] for row in table] == [
        "1.000",
        "1.250",
        "5.000",
    ]
    assert all(len(row) == len(headings) for row in table)
    assert report.markdown_table(found).count("\n") == len(found) + 1
    bars = [line.count("█") for line in report.text_plot(found).splitlines()[1:]]
    assert bars == [math.floor(report.BAR / 5 + 0.5), 6, report.BAR]
    svg = ElementTree.fromstring(report.plot(found, "a GPU").svg())
    words = [t.text for t in svg.iter(f"{SVG}text")]
    assert {"a GPU", "default", "5.0", "256 x 7168"} <= set(words)


def test_a_failure_is_not_drawn_as_a_time():
    found = trials(1.0, 1.25, 0.98)
    found[1].failure = "it crashed"
    found[1].ratios.clear()
    assert report.columns(found)[1][1][-1] == "failed"
    lines = report.text_plot(found).splitlines()
    assert lines[2].endswith("  failed") and "█" not in lines[2]
    for trial in found:
        trial.failure = "it crashed"
        trial.ratios.clear()
    assert all(line.endswith("failed") for line in report.text_plot(found).splitlines()[1:])


def test_a_layout_without_code_keeps_the_others_columns():
    found = trials(1.0, 1.25)
    found[0].examine()
    headings, (first, second) = report.columns(found)
    assert "spills" in headings and len(first) == len(second) == len(headings)
    assert "-" not in first and second[2:-1] == ["-"] * (len(headings) - 3)


def test_no_plot_without_times():
    with pytest.raises(ValueError, match="plot: expected trials with times"):
        report.plot([Trial(make_layout())], "")


@pytest.mark.slow
@every_format
def test_formats_of_the_command_line(fmt, capsys):
    names = [name for name, named in NAMED_FORMATS.items() if named is fmt]
    for text in (fmt.text, *names):
        assert command.main(["show", "--format", text]) == 0
        assert capsys.readouterr().out == draw(make_layout(fmt)) + "\n"


def test_show(capsys, tmp_path):
    assert command.main(["show", "--threads-per-group", "4"]) == 0
    assert "4 threads hold a group of 128" in capsys.readouterr().out
    path = tmp_path / "layout.html"
    assert command.main(["show", "--column-warps", "2", "-o", str(path)]) == 0
    assert "layout show --column-warps 2 -o " in path.read_text()


def test_a_page_names_the_command_that_draws_it_again(capsys, tmp_path):
    path = tmp_path / "a layout.html"
    choices = ["--column-warps", "2", "--format", "e4m3:64:float32:mn_major"]
    choices += ["--dtype", "fp32", "--mn", "6", "--k", "512"]
    assert command.main(["show", *choices, "-o", str(path)]) == 0
    page = path.read_text(encoding="utf-8")
    (line,) = re.findall(r"Written by <code>(.*)</code>", page)
    program, arguments = command.PROGRAM.split(), shlex.split(html.unescape(line))
    assert arguments == [*program, "show", *choices, "-o", str(path)]
    assert command.main(arguments[len(program) :]) == 0
    assert path.read_text(encoding="utf-8") == page


def test_try(capsys):
    assert command.main(["try", "--rows-per-thread", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith(("default", "rows a thread: 2"))]


def test_refusals_of_the_command_line(capsys, tmp_path):
    assert command.main(["show", "--rows-per-thread", "9"]) == 2
    assert "rows_per_thread: expected at most 8" in capsys.readouterr().err
    assert command.main(["show", "--format", "ue8m0"]) == 2
    assert "fmt: expected one of DEEP_GEMM, " in capsys.readouterr().err
    assert command.main(["try", "--shapes", "4x"]) == 2
    assert "shapes: expected MNxK" in capsys.readouterr().err
    (tmp_path / "wrong.json").write_text("{}")
    assert command.main(["report", str(tmp_path / "wrong.json")]) == 2
    assert "expected what a sweep writes" in capsys.readouterr().err


def spoiled(path: tuple, value: object) -> object:
    """Return what a sweep writes, with `value` at a path; `value` itself if the path is empty."""
    found = trials(1.0, 1.25)
    for trial in found:
        trial.examine()
    data = json.loads(json.dumps(to_json(found)))
    if not path:
        return value
    *parents, name = path
    place = data
    for parent in parents:
        place = place[parent]
    place[name] = value
    return data


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ((), []),
        ((), 3),
        (("trials",), []),
        (("trials",), [3]),
        (("trials", 0), {}),
        (("trials", 0, "code"), []),
        (("trials", 0, "code", "sm_90a"), {}),
        (("trials", 0, "code", "sm_90a", "registers"), "many"),
        (("trials", 0, "code", "sm_90a", "budget"), 0),
        (("trials", 0, "choices"), None),
        (("trials", 0, "choices", "values_per_thread"), 0),
        (("trials", 0, "times", 0, "ratio"), math.nan),
        (("trials", 0, "times", 0, "ratio"), None),
        (("format",), "x"),
        (("format",), 3),
        (("format",), []),
        (("dtype",), "int3"),
    ],
)
def test_report_of_what_no_sweep_wrote(path, value, capsys, tmp_path):
    file = tmp_path / "wrong.json"
    file.write_text(json.dumps(spoiled(path, value)))
    assert command.main(["report", str(file)]) == 2
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 1
    assert f"{file}: expected what a sweep writes, got " in err


@pytest.mark.parametrize("content", [b"", b"\xff", b"[" * 100_000, b"{"])
def test_report_of_what_is_not_json(content, capsys, tmp_path):
    file = tmp_path / "wrong.json"
    file.write_bytes(content)
    assert command.main(["report", str(file)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["report"], ["show", "-o"]])
def test_files_that_cannot_be_used(arguments, capsys, tmp_path):
    file = tmp_path / "none" / "layout.svg"
    assert command.main([*arguments, str(file)]) == 1
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 1 and str(file) in err


@pytest.mark.slow
def test_sweep_and_report(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "sweep.json"
    choices = ["--threads-per-group", "4,8", "--rows-per-thread", "1,6"]
    assert command.main(["sweep", *choices, "--json", str(path)]) == 0
    out, err = capsys.readouterr()
    assert "refused: threads_per_group=4, rows_per_thread=6: rows_per_thread" in err
    assert "3/3 done" in err
    assert command.main(["report", str(path)]) == 0
    assert capsys.readouterr().out == out
    assert command.main(["report", str(path), "--markdown"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[0] for row in table[2:]] == [
        "| default",
        "| 4 threads x 32 values",
        "| rows a thread: 6",
    ]


@pytest.mark.parametrize(
    ("options", "status"),
    [
        (["--plot", "plot.gif"], 2),
        (["--plot", "none/plot.svg"], 1),
        (["--json", "none/sweep.json"], 1),
        (["--json", "."], 1),
    ],
)
def test_sweep_refuses_names_of_files_before_its_work(
    options, status, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    module = sys.modules["cute_quant.lab.sweep"]  # The package has a function of this name.
    monkeypatch.setattr(module, "sweep", lambda *of: pytest.fail("it has begun"))
    assert command.main(["sweep", *options]) == status
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 1 and options[1] in err
    assert not list(tmp_path.iterdir())


def test_a_png_without_matplotlib(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert command.main(["report", "none.json", "--plot", str(tmp_path / "plot.png")]) == 1
    assert "plot: expected matplotlib" in capsys.readouterr().err


def test_the_table_is_printed_before_a_plot_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plot = tmp_path / "plot.svg"
    assert command.main(["sweep", "--threads-per-group", "8", "--plot", str(plot)]) == 2
    out, err = capsys.readouterr()
    assert out.startswith("layout ") and "plot: expected trials with times" in err
    assert not plot.exists()


def test_without_a_disassembler(capsys, monkeypatch):
    def missing(tool, *arguments):
        raise FileNotFoundError(f"{tool}: not found; pip install nvidia-cuda-{tool}")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(binary_utilities, "run", missing)
    machine_code.cache_clear()
    examine.cache_clear()
    assert command.main(["try"]) == 1
    assert "nvdisasm: not found; pip install nvidia-cuda-nvdisasm" in capsys.readouterr().err


def test_the_public_names():
    assert set(lab.__all__) <= set(dir(lab))
