"""Every code block of the README and of docs/ runs, and every command in them parses."""

from __future__ import annotations

import configparser
import dataclasses
import re
import shlex
import sys
import textwrap
import types
from pathlib import Path
from typing import NamedTuple

import pytest

from gblr_plugin import cli
from gblr_plugin.bench import command as bench
from gblr_plugin.run.comparison_settings import ComparisonSettings
from gblr_plugin.run.search_settings import SearchSettings
from gblr_plugin.run.settings import RunSettings
from gblr_plugin.run.yaml_config import load_yaml, parse_overrides, read_settings

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(?P<indent> *)```(?P<kind>[^\n]*)\n(?P<code>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
SETTINGS = {"compare": ComparisonSettings, "plan": RunSettings, "run": RunSettings, "search": SearchSettings}
NOT_RUN = {"text", "{toctree}", "{eval-rst}", "{include}"}


class Block(NamedTuple):
    page: Path
    line: int
    code: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(*kinds: str) -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            if match["kind"] in kinds:
                line = text.count("\n", 0, match.start("code"))
                found.append(Block(page, line + 1, textwrap.dedent(match["code"])))
    return found


def indented_commands() -> list[Block]:
    """The README writes commands as indented blocks, which look the same everywhere."""
    readme = PAGES[0]
    lines = FENCE.sub("", readme.read_text(encoding="utf-8")).splitlines()
    return [Block(readme, 1, line.strip()) for line in lines if line.startswith("    ") and line.strip()]


def commands() -> list[tuple[str, list[str]]]:
    found = []
    for block in [*blocks("shell"), *indented_commands()]:
        for line in block.code.replace("\\\n", " ").splitlines():
            for command in line.split("&&"):
                if words := shlex.split(command, comments=True):
                    found.append((str(block), words))
    return found


def run(page: types.ModuleType, block: Block) -> None:
    # Line numbers of tracebacks are the page's.
    source = "\n" * (block.line - 1) + block.code
    exec(compile(source, str(block.page), "exec", dont_inherit=True), page.__dict__)


@pytest.fixture
def module_of(given_names, monkeypatch, tmp_path):
    """A module in which a page's blocks run, in an empty folder; dataclasses look their module up."""
    monkeypatch.chdir(tmp_path)

    def make(page: Path) -> types.ModuleType:
        module = types.ModuleType("page_" + re.sub(r"\W", "_", page.stem))
        module.__dict__.update(given_names(page.stem))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return module

    return make


@pytest.mark.parametrize("block", [b for b in blocks("python") if b.page == PAGES[0]], ids=str)
def test_readme_block(block, module_of):
    """Each stands alone: it starts from the reader's own network."""
    run(module_of(block.page), block)


@pytest.mark.parametrize("page", sorted({b.page for b in blocks("python")} - {PAGES[0]}), ids=lambda page: page.stem)
def test_page(page, module_of):
    """Blocks build on each other, from the top of the page to its end."""
    module = module_of(page)
    for block in blocks("python"):
        if block.page == page:
            run(module, block)


def test_no_block_is_passed_over():
    kinds = {
        match["kind"].partition(" ")[0] for page in PAGES for match in FENCE.finditer(page.read_text(encoding="utf-8"))
    }
    assert kinds <= {"python", "shell", "yaml"} | NOT_RUN
    assert len(blocks("python")) > 25
    for page in PAGES:
        assert page.read_text(encoding="utf-8").count("```") == 2 * len(FENCE.findall(page.read_text(encoding="utf-8")))


@pytest.mark.parametrize(("place", "words"), commands(), ids=lambda value: value if isinstance(value, str) else "")
def test_command(place, words):
    program, *arguments = words
    if words == ["gblr", "--version"]:
        return
    if program == "gblr" and arguments[0] == "bench":
        bench.make_parser().parse_args(arguments[1:])
    elif program == "gblr" and "--help-config" in arguments:
        with pytest.raises(SystemExit, match="0"):
            cli._parser().parse_args(arguments)
    elif program == "gblr":
        parsed = cli._parser().parse_args(arguments)
        config = Path(getattr(parsed, "config", getattr(parsed, "what", "")))
        if config.suffix == ".yaml":
            located = load_yaml(ROOT / config)
            parse_overrides(located, parsed.set)
            read_settings(SETTINGS[parsed.command], located)
    elif program == "python":
        script = (ROOT / arguments[0]).read_text(encoding="utf-8")
        assert [word for word in arguments if word.startswith("--") and f'"{word}"' not in script] == []
    elif program.endswith("tox"):
        tox = configparser.ConfigParser()
        tox.read(ROOT / "tox.ini")
        for name in arguments[arguments.index("-e") + 1].split(","):
            assert f"testenv:{name}" in tox
    elif program.endswith("pip"):
        extras = re.findall(r"\[(.+)\]", arguments[-1])
        known = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(",".join(extras).split(",")) - {""} <= set(known)
    elif program == "tensorboard":
        assert all(word.startswith(("--logdir", "--samples_per_plugin=gblr=")) for word in arguments[::2])
    else:
        assert words[:3] == ["python3", "-m", "venv"], f"{place}: nothing checks {program!r}"


@pytest.mark.parametrize("block", [b for b in blocks("yaml") if b.page.stem != "lightning"], ids=str)
def test_yaml_block(block, tmp_path):
    """Each is a config of `gblr run`; that of LightningCLI is used by the page's own code."""
    config = tmp_path / "config.yaml"
    config.write_text(block.code, encoding="utf-8")
    read_settings(RunSettings, load_yaml(config))


def first_column(page: str, heading: str) -> set[str]:
    """Keys of the table whose first column is called ``heading``."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    rows = text.split(f"| {heading} |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return {key for row in rows for key in re.findall(r"`(\w+)`", row.split("|")[1])}


def test_the_yaml_table_has_every_key():
    assert first_column("configuration.md", "key") == {field.name for field in dataclasses.fields(RunSettings)}


def test_the_search_table_has_every_key():
    assert first_column("searching.md", "search key") == {field.name for field in dataclasses.fields(SearchSettings)}


def test_the_nni_table_has_every_own_key():
    pytest.importorskip("nni")
    from gblr_plugin.nni.keys import KEYS_OF_GBLR

    assert first_column("nni.md", "own key") == set(KEYS_OF_GBLR)
