"""The tour of the layouts says what its commands print."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from bench.figures import PICTURES
from cute_quant.lab import command, draw, make_layout
from cute_quant.lab.command import PROGRAM

DOCS = Path(__file__).parents[2] / "docs"
TOUR = (DOCS / "layouts.md").read_text(encoding="utf-8")
COMMANDS = re.findall(rf"```console\n\$ {PROGRAM} (.*)\n([^`]*)```", TOUR)


def numbered(values: list) -> list[str]:
    return [f"{i}-{value[0]}" for i, value in enumerate(values)]


@pytest.mark.parametrize(("line", "shown"), COMMANDS, ids=numbered(COMMANDS))
def test_commands_print_what_is_shown(line, shown, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status = command.main(shlex.split(line))
    out, err = capsys.readouterr()
    printed = iter((err if status else out).splitlines())
    for line in shown.splitlines():
        assert line in printed, "as it is printed, and in this order"


def test_there_are_commands():
    assert len(COMMANDS) == TOUR.count("```console") >= 8


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_what_the_layouts_are(name, tmp_path):
    assert f"(layouts/{name}.svg)" in TOUR
    path = tmp_path / "layout.svg"
    draw(make_layout(**PICTURES[name]), path)
    assert path.read_bytes() == (DOCS / "layouts" / f"{name}.svg").read_bytes()


def test_the_table_is_of_the_sweep(capsys):
    assert command.main(["report", str(DOCS / "layouts" / "sweep.json"), "--markdown"]) == 0
    table = capsys.readouterr().out
    assert table in TOUR
    assert table.count("\n") >= 24 + 2


def test_all_that_is_linked_is_there():
    for target in re.findall(r"\]\((layouts/[^)]*)\)", TOUR):
        assert (DOCS / target).is_file()
