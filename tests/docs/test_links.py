"""Links and pictures of the pages of the root and of docs/ work as they stand, as on a code-hosting site."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
CODE = re.compile(r"^ *```.*?^ *```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", page.read_text("utf-8")))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    for link in links(page):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: no such file"
        assert target.is_relative_to(ROOT), f"{link}: outside the repository"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


def test_every_page_is_reached():
    index = ROOT / "docs" / "index.md"
    reached, waiting = set(), [index]
    while waiting:
        page = waiting.pop()
        if page not in reached:
            reached.add(page)
            targets = [(page.parent / link.partition("#")[0]).resolve() for link in links(page) if link[0] != "#"]
            waiting += [target for target in targets if target.suffix == ".md" and target.is_file()]
    assert set((ROOT / "docs").rglob("*.md")) <= reached


def test_pictures_are_small_and_shown():
    text = "".join(page.read_text("utf-8") for page in PAGES)
    pictures = list((ROOT / "docs" / "images").iterdir())
    assert pictures
    for picture in pictures:
        most = {".png": 150_000, ".svg": 20_000}
        assert picture.suffix in most
        assert picture.stat().st_size < most[picture.suffix], picture.name
        assert f"images/{picture.name})" in text, f"{picture.name} is shown nowhere"


def test_drawings_stand_alone_and_follow_the_theme():
    drawings = sorted((ROOT / "docs" / "images").glob("*.svg"))
    assert drawings
    for drawing in drawings:
        root = ElementTree.parse(drawing).getroot()
        assert root.find("{*}title") is not None, f"{drawing.name} has no title"
        text = drawing.read_text("utf-8")
        assert "prefers-color-scheme: dark" in text
        assert "<script" not in text
        assert re.findall(r"(?:href|src)=|https?://(?!www\.w3\.org/)", text) == []
