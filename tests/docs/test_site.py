"""The strict build of the site: what it must notice, as `tox run -e docs` runs it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("furo")
pytest.importorskip("myst_parser")

DOCS = Path(__file__).parents[2] / "docs"


def build(folder: Path, name: str) -> subprocess.CompletedProcess[str]:
    """The strict build of an index and one more page, with the project's own configuration."""
    source = folder / "docs"
    source.mkdir()
    shutil.copy(DOCS / "conf.py", source)
    shutil.copytree(DOCS / "_static", source / "_static")
    module = "```{py:module} something\n```"  # then there is an index of modules
    (source / "index.md").write_text(f"# Index\n\n{module}\n\n```{{toctree}}\n{name}\n```\n", encoding="utf-8")
    (source / f"{name}.md").write_text("# A page\n\nText.\n", encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        *["-W", "--keep-going", "-n", "-q", "-E", "-b", "html"],
        source,
        folder / "site",
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["search", "genindex", "py-modindex"])
def test_a_page_at_the_address_of_the_builders_own_is_an_error(name, tmp_path):
    ended = build(tmp_path, name)
    assert ended.returncode != 0
    assert f"{name}.md: WARNING: the builder writes its own page at the address of this document" in ended.stderr


def test_a_page_with_an_address_of_its_own_is_built(tmp_path):
    ended = build(tmp_path, "searching")
    assert ended.returncode == 0, ended.stderr
    assert "Text." in (tmp_path / "site" / "searching.html").read_text("utf-8")
