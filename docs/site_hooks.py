"""Build the site from the repository as it is.

README.md opens it, and links to files outside of docs/ lead to copies.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\(([^)#\s]+)")
ROLE = re.compile(r":(?:class|func|meth):(?=<code>)|:(?:class|func|meth):`([^`]+)`")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the overview, and a copy of each file outside of docs/ that a page links to."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    overview = LINK.sub(lambda link: f"]({_from_readme(link[1])}", readme)
    files.append(File.generated(config, "index.md", content=overview))
    links = [("../README.md", target) for target in LINK.findall(readme)] + _links(files)
    for target in {_outside(*link) for link in links}:
        if target is not None and (ROOT / target).is_file():
            path = str(ROOT / target)
            files.append(File.generated(config, _copied(target), abs_src_path=path))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Lead links to files outside of docs/ to their copies."""
    if page.file.src_uri == "index.md":
        return markdown

    def copy(link: re.Match) -> str:
        target = _outside(page.file.src_uri, link[1])
        if target is None:
            return link[0]
        return f"]({_relative(_copied(target), page.file.src_uri)}"

    return LINK.sub(copy, markdown)


def on_page_content(html: str, **_: object) -> str:
    """Show the roles of docstrings as code."""
    return ROLE.sub(lambda role: f"<code>{role[1]}</code>" if role[1] else "", html)


def _links(files: Files) -> list[tuple[str, str]]:
    pages = [file for file in files.documentation_pages() if file.src_uri != "index.md"]
    return [
        (page.src_uri, target) for page in pages for target in LINK.findall(page.content_string)
    ]


def _outside(page: str, target: str) -> str | None:
    """Return the path in the repository of what a page links to; None if it is in docs/."""
    if "://" in target:
        return None
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    return None if path.startswith("docs/") else path


def _from_readme(target: str) -> str:
    if "://" in target:
        return target
    return target.removeprefix("docs/") if target.startswith("docs/") else _copied(target)


def _copied(target: str) -> str:
    # A page of Markdown that is no page of the site is shown as text. Names that start with a dot
    # are left out of sites.
    target = target.lstrip(".")
    return f"source/{target}.txt" if target.endswith(".md") else f"source/{target}"


def _relative(target: str, page: str) -> str:
    return posixpath.relpath(target, posixpath.dirname(page) or ".")
