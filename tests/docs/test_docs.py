"""The pages in docs say what the package does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cute_quant import NAMED_FORMATS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_table_of_formats():
    text = (ROOT / "docs" / "formats.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `cq.")]
    expected = []
    for name, fmt in NAMED_FORMATS.items():
        values = str(fmt.values).removeprefix("torch.")
        group = "row" if fmt.whole_row else fmt.group_size
        expected.append(
            f"| `cq.{name}` | {values} | {group} | {fmt.sf_shape_facts} | {fmt.readers} |"
        )
    assert rows == expected


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_code_runs(page, tmp_path, monkeypatch):
    """All Python blocks of a page, one after the other; those with a GPU are in other tests."""
    monkeypatch.chdir(tmp_path)  # Some write files.
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    namespace: dict[str, object] = {}
    for block in blocks:
        if 'device="cuda"' not in block:
            exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
