"""The page on checkpoints has the formats and the patterns that there are."""

import re
from pathlib import Path

from cute_quant.checkpoint import CONVENTIONS, DEFAULT_KEEP
from tests.docs.test_docs import table_rows

PAGE = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()


def rows(header: str) -> list[list[str]]:
    return [cells for names, cells in table_rows(PAGE) if names[0] == header]


def test_formats():
    found = {name.strip("`"): cells for name, *cells in rows("`--format`")}
    assert list(found) == list(CONVENTIONS)
    for name, (what, stored, method) in found.items():
        convention = CONVENTIONS[name]
        assert (what, method) == (convention.what, f"`{convention.quant_method}`")
        parts = convention.parts("layer.weight", (256, 256))
        names = [f"`{part.name.removeprefix('layer.')}`" for part in parts]
        assert stored == ", ".join(names) or stored.startswith("the same")


def test_patterns():
    patterns = [p for _, cell in rows("kind") for p in re.findall("`([^`]+)`", cell)]
    assert tuple(patterns) == DEFAULT_KEEP
