"""The pages say what the package does: code runs, messages are raised, links lead on."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Callable, Iterator
from difflib import SequenceMatcher
from pathlib import Path

import pytest
import torch

import cute_quant as cq
from cute_quant import checkpoint, emulator, jit, kernels, lab, nn
from cute_quant.integrations import deep_gemm, vllm

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / ".github" / "SECURITY.md",
    ROOT / "examples" / "cpp" / "README.md",
    *sorted(DOCS.rglob("*.md")),
]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def is_excerpt(block: str) -> bool:
    """Return whether a block shows a part of the file that its first line names."""
    return re.match(r"# \S+\.py\n", block) is not None


def run_blocks(page: Path) -> dict[str, object]:
    """Run the blocks of a page in their order; those with a GPU are in other tests."""
    namespace: dict[str, object] = {}
    for block in python_blocks(page):
        if 'device="cuda"' not in block and not is_excerpt(block):
            exec(compile(block, str(page), "exec"), namespace)
    return namespace


def table_rows(text: str) -> Iterator[tuple[list[str], list[str]]]:
    """Yield the header and the cells of each row of the tables of a page."""
    header: list[str] | None = None
    for line in text.splitlines():
        if not line.startswith("|"):
            header = None
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if header is None:
            header = cells
        elif not set(line) <= set("|-: "):
            yield header, cells


@every_page
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Some write files.
    run_blocks(page)


@every_page
def test_excerpts_are_of_their_files(page):
    for block in filter(is_excerpt, python_blocks(page)):
        name, text = block.removeprefix("# ").split("\n", 1)
        assert text in (ROOT / name).read_text()


@pytest.mark.parametrize(("page", "column"), [("choose.md", "call"), ("migrate.md", "ours")])
def test_calls_in_tables_run(page, column):
    """Each call returns values of one byte and scales."""
    namespace = run_blocks(DOCS / page)
    rows = [
        dict(zip(header, cells, strict=True))
        for header, cells in table_rows((DOCS / page).read_text())
        if column in header
    ]
    assert len(rows) > 12
    for row in rows:
        call = row[column].strip("`")
        q, sf, *_ = eval(call, namespace)
        assert q.element_size() == 1 and sf.numel(), call


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub and mkdocs make them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_links(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / ".mkdocs.yml").read_text()
    for page in DOCS.rglob("*.md"):
        assert f": {page.relative_to(DOCS)}\n" in navigation


def test_the_table_of_formats():
    text = (DOCS / "formats.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `cq.")]
    expected = []
    for name, fmt in cq.NAMED_FORMATS.items():
        values = str(fmt.values).removeprefix("torch.")
        group = "row" if fmt.whole_row else fmt.group_size
        expected.append(
            f"| `cq.{name}` | {values} | {group} | {fmt.sf_shape_facts} | {fmt.readers} |"
        )
    assert rows == expected


def test_the_table_of_smallest_scales():
    rows = [
        cells
        for header, cells in table_rows((DOCS / "formats.md").read_text())
        if header[-1].startswith("UE8M0 byte of a group of zeros")
    ]
    assert len(rows) == 4
    for name, _, byte in rows:
        fmt = cq.DEEP_GEMM.replace(min_scale=re.search(r'"(\w+)"', name)[1])
        _, sf = cq.quantize(torch.zeros(1, 128), fmt)
        assert sf.item() == int(byte)


def test_the_reference_has_every_public_name():
    text = (DOCS / "reference.md").read_text()
    modules = {"cute_quant": cq, "jit": jit, "kernels": kernels, "emulator": emulator, "lab": lab}
    modules["nn"] = nn
    modules["checkpoint"] = checkpoint
    constants = {*cq.NAMED_FORMATS, "NAMED_FORMATS", "LANES", "SM90", "SM100"}
    constants |= {"CONVENTIONS", "DEFAULT_KEEP"}
    for module_name, module in modules.items():
        prefix = "cute_quant" if module is cq else f"cute_quant.{module_name}"
        for name in module.__all__:
            if name in constants:
                assert f"`{name}`" in text
            else:  # A module of the same name would be shown in place of the function.
                module_too = importlib.util.find_spec(f"{prefix}.{name}") is not None
                assert f"::: {prefix}.{name}{f'.{name}' if module_too else ''}\n" in text
    for function in (
        deep_gemm.per_token_cast_to_fp8,
        deep_gemm.per_block_cast_to_fp8,
        vllm.per_token_group_quant_fp8_packed_for_deepgemm,
    ):
        assert f"::: {function.__module__}.{function.__name__}\n" in text


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_changelog_has_the_version():
    assert f"## [{cq.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


# Messages of the page on errors


def bf16(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bfloat16)


def masked(*counts: int, dtype: torch.dtype = torch.int32) -> cq.Masked:
    return cq.Masked(torch.tensor(counts, dtype=dtype))


RAISED: dict[str, Callable[[], object]] = {
    "fmt: expected a Format, such as cute_quant.DEEP_GEMM, got a tensor": (
        lambda: cq.silu_mul_quantize(bf16(4, 256), bf16(4, 256))
    ),
    "x: expected rows contiguous along k": lambda: cq.quantize(bf16(256, 4).t()),
    "x: expected leading dimensions that one stride walks": (
        lambda: cq.quantize(bf16(3, 4, 5, 256)[:, ::2].transpose(0, 1))
    ),
    "x: expected a tensor of bfloat16 or float16 or float32": (
        lambda: cq.quantize(bf16(4, 256).double())
    ),
    "x: expected a tensor that requires no gradient": (
        lambda: cq.quantize(bf16(4, 256).requires_grad_())
    ),
    "out sf: expected strides": (
        lambda: cq.quantize(bf16(6, 1024), out=(None, torch.empty(6, 2, dtype=torch.int32)))
    ),
    "expected memory of its own, got memory that overlaps": (
        lambda: cq.fake_quantize(x := bf16(4, 256), out=x)
    ),
    "rows.masked_m: expected a tensor of int32": (
        lambda: cq.quantize(bf16(2, 4, 256), rows=masked(1, 2, dtype=torch.int64))
    ),
    "sf: expected a tensor of float8_e8m0fnu": (
        lambda: cq.dequantize(*cq.quantize(bf16(4, 256)), cq.MXFP8)
    ),
    "group_size: expected 32 for scale_layout=128x4": lambda: cq.MXFP8.replace(group_size=128),
    "check: expected False under a tracer": (
        lambda: torch.export.export(Checked(), (bf16(2, 4, 256), torch.ones(2, dtype=torch.int32)))
    ),
    "torch.jit.trace is not supported": lambda: torch.jit.trace(cq.quantize, (bf16(4, 256),)),
    "x: expected a tensor outside of torch.func transforms": (
        lambda: torch.vmap(cq.quantize)(bf16(2, 4, 256))
    ),
}


class Checked(torch.nn.Module):
    def forward(self, x: torch.Tensor, counts: torch.Tensor) -> object:
        return cq.quantize(x, rows=cq.Masked(counts), check=True)


def messages() -> list[str]:
    """Return what the tables of the page quote in the columns of messages."""
    rows = table_rows((DOCS / "troubleshooting.md").read_text())
    cells = [cells[0] for header, cells in rows if header[0] == "message"]
    return [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]


@pytest.mark.parametrize("message", RAISED)
def test_messages_are_raised(message):
    assert message in messages()
    with pytest.raises(Exception, match=re.escape(message)):
        RAISED[message]()


def string_pieces() -> list[str]:
    """Return the constant text of every string of the package."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "cute_quant").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return [node.value for node in nodes if isinstance(node.value, str)]


def test_other_messages_are_in_the_package():
    pieces = string_pieces()
    others = [m for m in messages() if m not in RAISED and m not in ("sf", "aot_eager")]
    assert len(others) > 8
    for message in others:
        # Values stand between the pieces.
        shared = max(
            SequenceMatcher(None, message, piece, autojunk=False).find_longest_match().size
            for piece in pieces
            if len(piece) < 400
        )
        assert shared >= min(len(message), 16), message
