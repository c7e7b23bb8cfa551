"""Guides are short, and their code is as wide as a page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GUIDES = sorted((ROOT / "docs").glob("*.md"))
ALL = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
REFERENCE = {"api", "glossary"}
WORDS = 1200
COLUMNS = 88
CODE = re.compile(r"^ *```[^\n]*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [page for page in GUIDES if page.stem not in REFERENCE], ids=lambda page: page.stem)
def test_a_guide_is_short(page: Path) -> None:
    """What was measured stands in docs/results and docs/notes."""
    assert len(page.read_text(encoding="utf-8").split()) <= WORDS


@pytest.mark.parametrize("page", ALL, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_is_no_wider_than_the_page(page: Path) -> None:
    lines = "\n".join(CODE.findall(page.read_text(encoding="utf-8"))).splitlines()
    assert [line for line in lines if len(line) > COLUMNS] == []
