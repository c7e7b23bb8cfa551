"""The words of docs/glossary.md: names that were retired in favour of its terms do not come back as identifiers."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import gblr_plugin

PACKAGE = Path(gblr_plugin.__file__).parent
FILES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}
# Names that say too little where they stand alone -> what to write.
NAMES = {
    "one": "the name of the thing",
    "own": "whose it is",
    "part": "block, split, piece, or the name of the thing",
    "whole": "full, total, or every",
    "worth": "gain",
    "price": "cost, or least gain per multiply-add",
    "attached": "optimizers",
    "unit": "tile",
}
# Words that no identifier may contain -> the term of the glossary.
WORDS = {
    "gauge": "low-rank form or trapezoid form",
    "gauged": "trapezoid form",
    "ungauged": "low-rank form",
    "pinned": "fixed",
    "settled": "rounded, or replanned",
    "sharp": "exact boxcar",
    "swap": "replace",
    "hasten": "what is made faster, and how",
    "house": "what the thing is",
    "way": "product, or kernel",
    "ways": "products, or kernels",
    "worth": "gain",
}


def identifiers(path: Path) -> Iterator[tuple[str, int]]:
    """(identifier, line) of everything that a file names, or uses by name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        line = getattr(node, "lineno", 0)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name, line
        elif isinstance(node, ast.Name):
            yield node.id, line
        elif isinstance(node, ast.Attribute):
            yield node.attr, line
        elif isinstance(node, (ast.arg, ast.keyword)) and node.arg:
            yield node.arg, line
        elif isinstance(node, ast.alias):
            yield (node.asname or node.name).rpartition(".")[2], line


def words(identifier: str) -> list[str]:
    """The words of an identifier in snake case or camel case, in lower case."""
    return re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", identifier).lower())


@pytest.mark.parametrize("file", FILES)
def test_retired_words_are_no_identifiers(file: str) -> None:
    found = []
    for identifier, line in identifiers(FILES[file]):
        alone = identifier.strip("_").lower()
        if alone in NAMES:
            found.append(f"{file}:{line} {identifier}: write {NAMES[alone]}")
        found += [f"{file}:{line} {identifier}: write {WORDS[word]}" for word in words(identifier) if word in WORDS]
    assert not found, "\n".join(found)


def test_the_test_sees_every_kind_of_identifier(tmp_path: Path) -> None:
    source = "import a.gauge as b, c.swap\ndef f(one): g.part = h(own=1)\nclass IsPinned: pass\n"
    (tmp_path / "x.py").write_text(source, encoding="utf-8")
    seen = {identifier for identifier, _ in identifiers(tmp_path / "x.py")}
    assert {"b", "swap", "one", "part", "own", "IsPinned", "f", "g", "h"} <= seen
    assert words("IsPinned") == ["is", "pinned"]
    assert words("_gauge_is_free") == ["gauge", "is", "free"]
