"""``layout explain``: what it says of a layout is where the scales of quantized values are."""

import json

import pytest
import torch

import cute_quant as cq
from cute_quant.contract.formats import all_formats
from cute_quant.contract.readers import READERS
from cute_quant.lab import command, explanation

FORMATS = [*cq.NAMED_FORMATS.values(), cq.NVFP4.replace(scale_layout="8x4")]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_the_scale_of_a_place_is_there(fmt):
    """One group is larger than the others: its scale alone differs."""
    mn, k, row, group = 37, 1000, 34, 5 if not fmt.whole_row else 0
    x = torch.ones(mn, k)
    options = {"amax": torch.tensor(2.0**6)} if fmt.upper_scale else {}
    columns = slice(None) if fmt.whole_row else slice(group * fmt.group_size, None)
    _, plain = cq.quantize(x, fmt, **options)
    x[row, columns] *= 64
    if not fmt.whole_row:
        x[row, (group + 1) * fmt.group_size :] = 1
    _, sf = cq.quantize(x, fmt, **options)
    size = 1 if fmt.byte_scales else 4
    changed = [
        torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()).view(-1, size)
        for t in (plain, sf)
    ]
    (offset,) = (changed[0] != changed[1]).any(1).nonzero().flatten().tolist()
    found = explanation.place(fmt, mn, k, row, group)
    assert found["byte"] == offset * size and not found["padding"]
    assert found["columns"][0] == (columns.start or 0)
    facts = explanation.explain(fmt, mn, k)
    assert facts["storage_bytes"] == sf.untyped_storage().nbytes()
    assert tuple(facts["shape"]) == sf.shape and tuple(facts["strides"]) == sf.stride()
    assert facts["readers"] == fmt.readers


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_drawing_has_places_and_padding(fmt):
    text = explanation.describe(fmt, 5, 560)
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("Place of"))
    header, *rows = lines[start + 1 : lines.index("", start)]
    groups = [int(word[1:]) for word in header.split()[1:]]
    for row in rows:
        number, *places = row.split()
        for group, place in zip(groups, places, strict=True):
            found = explanation.place(fmt, 5, 560, int(number), group)
            unit = 1 if fmt.byte_scales else 4
            assert int(place.strip("[]")) * unit == found["byte"]
            assert place.startswith("[") == found["padding"]
    first = lines[-1].split()
    for offset, word in enumerate(first):
        row, group = map(int, word.split("."))
        found = explanation.place(fmt, 5, 560, row, group)
        assert found["byte"] == offset * (1 if fmt.byte_scales else 4)


def test_command(capsys):
    assert command.main(["explain", "DEEP_GEMM", "--mn", "5", "--k", "1000"]) == 0
    assert "read by   DeepGEMM on SM100" in capsys.readouterr().out
    one = ["explain", "DEEP_GEMM", "--mn", "5", "--k", "1000", "--row", "5", "--group", "7"]
    assert command.main(one) == 0
    assert capsys.readouterr().out.startswith("row 5, group 7 (padding): byte 3 of word 13, 55")
    assert command.main([*one, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["place"]["byte"] == 55 and facts["rows"] == 5 and facts["groups"] == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MXFP9", "--mn", "5", "--k", "64"], "fmt: expected one of DEEP_GEMM, "),
        (["MXFP8", "--mn", "0", "--k", "64"], "mn: expected 1 or more, got 0"),
        (["MXFP4", "--mn", "5", "--k", "65"], "k: expected a multiple of 2 columns"),
        (["MXFP8", "--mn", "5", "--k", str(2**40)], "k: expected up to "),
        (["MXFP8", "--mn", str(2**31), "--k", "64"], "mn: expected up to "),
        (["MXFP8", "--mn", "5", "--k", "64", "--row", "1"], "row, group: expected both or"),
        (
            ["MXFP8", "--mn", "5", "--k", "64", "--row", "128", "--group", "0"],
            "row: expected 0 to 127, got 128",
        ),
        (
            ["MXFP8", "--mn", "5", "--k", "64", "--row", "1", "--group", "-1"],
            "group: expected 0 to 3, got -1",
        ),
    ],
)
def test_refusals(arguments, message, capsys):
    assert command.main(["explain", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("fmt", all_formats(), ids=str)
def test_explanations_agree_with_check_scales(fmt):
    facts = explanation.explain(fmt, 5, 64)
    names = facts["check_scales"]
    assert all(READERS[name].name in fmt.readers for name in names)
    checked = explanation.describe(fmt, 5, 64).splitlines()[2]
    assert checked == f"checked   by check_scales for {', '.join(names) or 'no reader'}"
    q = torch.zeros(5, fmt.value_columns(64), dtype=torch.uint8).view(fmt.values)
    for name in READERS:
        if "k_grouped" not in name:
            found = cq.check_scales(q, fmt.empty_scales((), 5, 64, "cpu"), fmt, name)
            assert any(f.rule == "format" for f in found) == (name not in names)
    # What a format says of a reader is what the reader says.
    known = {
        "DeepGEMM on SM100": ["deep_gemm_sm100"],
        "DeepGEMM on SM90": ["deep_gemm_sm90"],
        "scaled_mm": ["scaled_mm"],
        "CUTLASS": ["cutlass"],
        "TensorRT-LLM": ["trtllm_8x4"],
    }
    for word, readers in known.items():
        if word in fmt.readers:
            assert set(readers) <= set(names)


def test_readers_of_formats_that_name_none():
    fmt = cq.MXFP8.replace(scale_layout="8x4")
    facts = explanation.explain(fmt, 5, 64)
    assert facts["readers"] == "TensorRT-LLM's kernels for few rows"
    assert facts["check_scales"] == ["trtllm_8x4"]
