"""The README can be taken in, tables fit a screen, and what the documents name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
MOST_WORDS, MOST_TABLES, MOST_WIDTH = 900, 2, 120
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_SEPARATOR = re.compile(r"^\s*\|[-:| ]+\|$", re.MULTILINE)
_BENCHMARK = re.compile(r"benchmarks/\w+\.py")
_MODULE = re.compile(r"`packager\.(?!json)([a-z_.]+)`")

each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


def prose_of(path: Path) -> str:
    """The text without its blocks of code."""
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors_of(path: Path) -> set[str]:
    """What links may point to within a document: its headings, as GitHub spells them."""
    headings = _HEADING.findall(prose_of(path))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_can_be_taken_in() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.split()) <= MOST_WORDS
    assert len(_SEPARATOR.findall(text)) <= MOST_TABLES


@each_document
def test_tables_fit_a_screen(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    wide = [line for line in lines if line.lstrip().startswith("|") and len(line) > MOST_WIDTH]
    assert not wide


@each_document
def test_relative_links_lead_somewhere(path: Path) -> None:
    for link in _LINK.findall(prose_of(path)):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), f"{path.name} links to {link}"
        assert not anchor or anchor in anchors_of(target), f"{path.name} links to {link}"


@each_document
def test_benchmarks_and_modules_that_are_named_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not [name for name in _BENCHMARK.findall(text) if not (ROOT / name).is_file()]
    for name in _MODULE.findall(text):
        module = ROOT / "packager" / name.replace(".", "/")
        assert module.is_dir() or module.with_suffix(".py").is_file(), f"{path.name} names packager.{name}"
