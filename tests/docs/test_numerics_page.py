"""The page on numerics says what the package does."""

from __future__ import annotations

import math
import re
import shlex

import pytest
import torch

import cute_quant as cq
from bench import numerics as bench_numerics
from cute_quant.cli import main
from cute_quant.cli.differences import CODE_REASONS, SCALE_REASONS
from cute_quant.contract import format_choices
from cute_quant.contract.dtypes import VALUE_TYPES
from cute_quant.contract.format_choices import LIBRARIES, known_numerics
from cute_quant.contract.rcp_approx import rcp_approx
from tests.docs.test_docs import DOCS, ROOT, table_rows

MX_LIBRARIES = {name for names in format_choices.MX_LIBRARIES.values() for name in names}
PAGE = (DOCS / "numerics.md").read_text(encoding="utf-8")


def rows(first: str, *others: str) -> list[list[str]]:
    """Return the rows of the tables whose columns start so."""
    names = [first, *others]
    return [cells for header, cells in table_rows(PAGE) if header[: len(names)] == names]


def numerics_of(fmt: cq.Format) -> list[str]:
    return list(known_numerics(fmt.values, fmt.group_size, fmt.scale_dtype, fmt.round_scale))


def quoted(cell: str) -> list[str]:
    return re.findall(r'`"(\w+)"`', cell)


def upper_scale(fmt: cq.Format) -> dict[str, torch.Tensor]:
    return {"encode_scale": torch.tensor(1.0)} if fmt.upper_scale else {}


def test_which_formats_have_which_numerics():
    table = dict(rows("format", "`numerics`"))
    for name in ("NVFP4", "MXFP8", "MXFP4"):
        assert quoted(table[name]) == numerics_of(cq.NAMED_FORMATS[name])
    for name, fmt in (
        ("e4m3 under float32 scales", cq.GROUPWISE_FP8),
        ("e4m3 under powers of two, but MXFP8", cq.DEEP_GEMM),
        ("int8 in groups", cq.INT8),
        ("int8, whole rows", cq.ROWWISE_INT8),
    ):
        assert quoted(table[name]) == numerics_of(fmt)


def test_steps_of_float32_scales():
    """Each formula of the page, in torch, gives the bits of the package."""
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    v = x.unflatten(1, (-1, 128)).abs().amax(2)
    groups, largest = x.unflatten(1, (-1, 128)), torch.tensor(448.0)
    names = {"v": v, "M": largest, "c": 1 / largest, "rcp": rcp_approx, "x": groups}
    names["bf16"] = lambda t: t.bfloat16().float()
    table = rows("`numerics`", "scale", "value, before it is rounded", "at least")
    assert [quoted(cells[0])[0] for cells in table] == numerics_of(cq.GROUPWISE_FP8)
    for name, scale, value, least in table:
        fmt = cq.GROUPWISE_FP8.replace(numerics=quoted(name)[0])
        q, sf = cq.quantize(x, fmt)
        names["scale"] = eval(scale.replace("·", "*"), names)
        assert torch.equal(sf, names["scale"])
        names |= {name: names[name][..., None] for name in ("v", "scale")}
        values = eval(value.replace("·", "*"), names).to(torch.float8_e4m3fn)
        assert torch.equal(q.view(torch.uint8), values.flatten(1).view(torch.uint8))
        names["v"] = v
        kind, _, bound = least.partition(" ")
        assert fmt.bounds_amax == (kind == "v")
        assert math.isclose(fmt.floor, eval(bound.replace("512 M", "512 * 448")), rel_tol=1e-6)


def test_steps_of_stochastic_rounding():
    facts = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "int8": torch.int8}
    facts["e2m1"] = torch.float4_e2m1fn_x2
    for name, bits, below in rows("dtype", "F"):
        value_type = VALUE_TYPES[facts.pop(name)]
        assert value_type.fraction_bits == int(bits)
        base, _, power = below.partition("^")
        assert 2.0**value_type.min_exponent == float(base) ** float(power or 1)
    assert not facts


def test_every_library_is_described():
    assert {quoted(cells[0])[0] for cells in rows("name", "is")} == set(LIBRARIES)


@pytest.mark.parametrize("name", ["NVFP4", "MXFP4", "MXFP8"])
def test_zeros_and_numbers_that_are_not_finite(name):
    (row,) = (cells for cells in rows("", "scale of a group of zeros") if cells[0] == name)
    usual, *exceptions = re.split(r"; |, ", row[1])
    zeros = {quoted(text)[0]: int(text.split()[1], 0) for text in exceptions}
    for numerics in numerics_of(cq.NAMED_FORMATS[name]):
        fmt = cq.NAMED_FORMATS[name].replace(numerics=numerics, scale_layout="row_major")
        x = torch.zeros(3, fmt.group_size)
        x[1, 3], x[2, 0] = torch.nan, torch.inf
        q, sf = cq.quantize(x, fmt, **upper_scale(fmt))
        assert sf.view(torch.uint8).flatten().tolist() == [
            zeros.get(numerics, int(usual, 0)),
            *[int(row[2], 0)] * 2,
        ]
        (value,) = q.view(torch.uint8)[1:].unique().tolist()
        assert value == {"+0": 0, "NaN": 0x7F}[row[3]]


def test_the_smallest_scales_of_nvfp4():
    for names, _, least, _ in rows("`numerics`", "scale, before it is rounded to e4m3"):
        for numerics in quoted(names):
            base, _, exponent = least.partition("^")
            floor = float(base) ** int(exponent) if exponent else float(base)
            assert cq.NVFP4.replace(numerics=numerics).floor == floor


def test_the_smallest_bytes_of_mx():
    table = rows("`numerics`", "scale", "smallest byte")
    named = [name for cells in table for name in quoted(cells[0])]
    assert set(named) == {"ieee", *MX_LIBRARIES}
    for names, _, bytes_, _ in table:
        for numerics in set(quoted(names)) - {"ieee", "deepgemm"}:
            formats = [f for f in (cq.MXFP4, cq.MXFP8) if numerics in numerics_of(f)]
            assert {f.replace(numerics=numerics).floor for f in formats} == {int(bytes_)}
    (ours,) = (cells[2] for cells in table if quoted(cells[0]) == ["ieee"])
    assert ours.endswith(f"{cq.MXFP8.floor} by default") and cq.MXFP4.floor == cq.MXFP8.floor
    (theirs,) = (cells[2] for cells in table if quoted(cells[0]) == ["deepgemm"])
    floors = (f.replace(numerics="deepgemm").floor for f in (cq.MXFP4, cq.MXFP8))
    assert theirs == " or ".join(map(str, floors))


def test_the_one_amax_that_rounds_down():
    smallest = torch.tensor(6 * 2.0**-127).view(torch.int32)
    bits = smallest + torch.tensor([0, 1, 2], dtype=torch.int32)
    x = torch.zeros(3, 32)
    x[:, 0] = bits.view(torch.float32)
    stored = {
        numerics: cq.quantize(
            x, cq.MXFP4.replace(numerics=numerics, scale_layout="row_major", min_scale="ocp")
        )[1]
        .view(torch.uint8)
        .flatten()
        .tolist()
        for numerics in ("ieee", "flashinfer", "torchao")
    }
    assert stored == {"ieee": [0, 1, 1], "flashinfer": [0, 0, 1], "torchao": [0, 0, 1]}


def test_the_command_prints_what_is_shown(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ((line, shown),) = re.findall(r"```console\n\$ cute-quant (.*)\n([^`]*)```", PAGE)
    assert main.main(shlex.split(line)) == 0
    printed = iter(capsys.readouterr().out.splitlines())
    for line in shown.splitlines():
        assert line in printed, "as it is printed, and in this order"


def test_the_reasons():
    expected = [["scale", *reason] for reason in SCALE_REASONS.items()]
    expected += [["code", *reason] for reason in CODE_REASONS.items()]
    assert rows("what differs", "reason", "meaning") == expected


def test_the_picture_is_of_the_activations():
    assert bench_numerics.PICTURE.read_text(encoding="utf-8") == bench_numerics.picture().svg()
    assert f"({bench_numerics.PICTURE.name})" in PAGE
