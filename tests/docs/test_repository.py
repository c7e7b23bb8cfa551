"""The files that a code-hosting site, the package index and other tools read: they agree with each other."""

from __future__ import annotations

import configparser
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import gblr_plugin

ROOT = Path(__file__).parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def read(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def tox() -> configparser.ConfigParser:
    found = configparser.ConfigParser(interpolation=None)
    found.read(ROOT / "tox.ini")
    return found


@pytest.mark.parametrize("path", [".github/dependabot.yml", ".github/ISSUE_TEMPLATE/bug.yml", ".readthedocs.yaml"])
def test_yaml_files_are_read(path: str) -> None:
    assert isinstance(read(path), dict)


def test_the_citation_has_this_version_and_the_paper() -> None:
    citation = read("CITATION.cff")
    assert citation["version"] == gblr_plugin.__version__
    assert citation["references"][0]["title"] in (ROOT / "README.md").read_text(encoding="utf-8").replace("\n", " ")


def test_the_suite_runs_on_every_python_that_is_stated() -> None:
    stated = set(re.findall(r"Programming Language :: Python :: (3\.\d+)", PROJECT))
    jobs = read(".github/workflows/tests.yml")["jobs"]
    setups = [step["with"] for step in jobs["suite"]["steps"] if "setup-python" in step.get("uses", "")]
    python = [setup["python-version"] for setup in setups]
    others = jobs["pythons"]["strategy"]["matrix"]["python"]
    assert {*python, *others} == stated
    assert all(f"py{version.replace('.', '')}" in environments() for version in others)
    assert f'requires-python = ">={min(stated, key=lambda version: int(version[2:]))}"' in PROJECT


def environments() -> set[str]:
    """Names of tox environments, with those of a section for several."""
    found = set()
    for section in tox().sections():
        name = section.removeprefix("testenv:")
        several = re.fullmatch(r"(.*)\{([\d,]+)\}", name)
        found |= {several[1] + end for end in several[2].split(",")} if several else {name}
    return found


def test_workflows_run_what_the_documents_say() -> None:
    suite = read(".github/workflows/tests.yml")["jobs"]["suite"]["steps"]
    assert ".ci/run" in suite[-1]["run"]
    release = read(".github/workflows/release.yml")["jobs"]
    assert release["publish"]["permissions"] == {"id-token": "write"}
    assert release["publish"]["needs"] == "build"


def test_the_release_workflow_finds_the_version_where_it_stands() -> None:
    version = gblr_plugin.__version__
    assert f'__version__ = "{version}"' in (ROOT / "gblr_plugin" / "__init__.py").read_text("utf-8").splitlines()
    assert f"version: {version}" in (ROOT / "CITATION.cff").read_text("utf-8").splitlines()
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert headings
    assert all(re.fullmatch(r"\[Unreleased\]|\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", heading) for heading in headings)


def test_pre_commit_runs_the_ruff_of_the_suite() -> None:
    revision = read(".pre-commit-config.yaml")["repos"][0]["rev"]
    assert f"ruff=={revision.removeprefix('v')}" in tox()["testenv:test"]["deps"].split()
