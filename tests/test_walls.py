"""The rooms of docs/architecture.md: imports go downwards only, and no host is imported below its bridge."""

import ast
from pathlib import Path

import pytest

import gblr_plugin

PACKAGE = Path(gblr_plugin.__file__).parent
ROOMS = [
    {"after_import", "errors", "files", "progress", "quiet", "random_state", "structure"},
    {"kernels", "mask"},
    {
        "blockwise",
        "budget",
        "decomposition",
        "frozen",
        "gauge",
        "layers",
        "learner",
        "non_finite",
        "optim",
        "proximal",
        "recompression",
        "schedule",
        "sharding",
        "swap",
        "tensor",
    },
    {
        "allocation",
        "config",
        "conversion",
        "distributed",
        "exporting",
        "families",
        "heads",
        "hf",
        "matrices",
        "onnx",
        "patterns",
        "raw_weights",
        "reordering",
        "reporting",
        "selection",
        "serialization",
        "sharded",
        "starts",
        "ties",
    },
    {"lightning", "nni", "plot", "tensorboard"},
    {"bench", "bench_networks", "cli", "data", "run", "tasks"},
]
LEVEL = {name: level for level, room in enumerate(ROOMS) for name in room}
# NNI's evaluator of Lightning is cured in nni/, so that room sees both.
HOSTS = {
    "nni": {"nni"},
    "pytorch_lightning": {"lightning", "nni"},
    "lightning": {"lightning"},
    "tensorboard": {"tensorboard"},
}
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.name != "__init__.py")


def part_of(path):
    """The room's file or folder to which a source file belongs."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """(absolute dotted name, line) of everything a file imports, wherever in it."""
    package = ["gblr_plugin", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{stem}.{alias.name}", node.lineno


def test_every_part_of_the_package_has_a_room():
    assert {part_of(path) for path in SOURCES} == set(LEVEL)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downwards(path):
    here = part_of(path)
    for name, line in imports(path):
        parts = name.split(".")
        if parts[0] == "gblr_plugin":
            there = parts[1] if len(parts) > 1 and parts[1] in LEVEL else here  # else a name of the package itself
            assert LEVEL[there] <= LEVEL[here], f"{path.name}:{line} imports {name} from above"
        elif parts[0] in HOSTS and LEVEL[here] < len(ROOMS) - 1:
            assert here in HOSTS[parts[0]], f"{path.name}:{line} imports {name} outside its bridge"
