"""The rooms of docs/architecture.md: imports go downwards only, between rooms and between files.

Deferred imports, those inside functions, count like any other.
"""

import ast
import runpy
from functools import cache
from pathlib import Path

import pytest

import gblr_plugin

PACKAGE = Path(gblr_plugin.__file__).parent
ROOMS = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "rooms.py"))
LEVELS = [set(rooms) for _, rooms in reversed(ROOMS["LEVELS"])]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
# The only rooms that may import a host. NNI's evaluator trains by Lightning, so that bridge sees both.
HOSTS = {
    "lightning": {"lightning"},
    "matplotlib": {"plot"},
    "nni": {"nni"},
    "onnx": {"exporting"},
    "onnxruntime": {"exporting"},
    "pytorch_lightning": {"lightning", "nni"},
    "tensorboard": {"tensorboard"},
    "torchao": {"exporting", "serialization", "tensor", "torchao"},
    "transformers": {"huggingface"},
}
COMMAND = {"bench", "cli", "commands", "data", "run", "tasks"}
TESTS = Path(__file__).parent
# Folders of tests that are about the whole project.
OF_THE_PROJECT = {"docs", "integration", "trust"}
# Tests that are about several files of their room, or about what happens between rooms -> what they hold.
ACROSS = {
    "kernels/cuda/test_float32_products_compile": "triton's products in float32, compiled without a GPU",
    "kernels/cuda/test_masks_compile": "triton's masks and proximal step, compiled without a GPU",
    "kernels/cuda/test_products_compile": "triton's products, compiled without a GPU",
    "learning/test_synchronisations": "how often learning waits for a GPU",
    "lightning/test_averages": "averages of weights",
    "lightning/test_distributed": "DDP and FSDP2",
    "lightning/test_with_lightning_cli": "the callback in a config of LightningCLI",
    "lightning/test_with_nni": "the callback beside NNI's pruner",
    "nni/test_fusion": "a distiller, a pruner and a quantizer together",
    "nni/test_import": "what the import prints and leaves",
    "nni/test_whole_way": "from a config list to a converted model",
    "plot/test_figures": "all figures",
    "run/test_calibration": "calibration as a key of a run",
    "serialization/test_processors": "files between processors",
    "surgery/test_conversion_of_families": "prepare and convert with every family",
    "surgery/test_selection_of_models": "selection on models of other packages",
    "tasks/test_models": "networks of all tasks",
    "tensorboard/test_browser": "the tab in a browser",
    "test_machines": "other systems than Linux",
    "test_package": "public names",
    "test_walls": "imports",
    "test_words": "identifiers",
}
FILES = {
    ".".join(["gblr_plugin", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def room_of(module):
    """The folder or file directly under the package to which a module belongs; "" for the package itself."""
    return module.split(".")[1] if "." in module else ""


@cache
def imports(module):
    """(absolute dotted name, line) of everything that a file imports, wherever in it."""
    path = FILES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            found += [(f"{stem}.{alias.name}", node.lineno) for alias in node.names]
    return found


def file_of(name):
    """The module of the package that a dotted name lies in."""
    while name and name not in FILES:
        name = name.rpartition(".")[0]
    return name


def arrows(module):
    """(module of the package, line) that a file imports, without the package itself."""
    found = [(file_of(name), line) for name, line in imports(module)]
    return [(target, line) for target, line in found if target not in ("", "gblr_plugin", module)]


def circles():
    """Sets of files that import each other in a circle."""
    reach = {module: {target for target, _ in arrows(module)} for module in FILES}
    changed = True
    while changed:
        changed = False
        for module, targets in reach.items():
            wider = targets.union(*(reach[target] for target in targets)) if targets else targets
            changed |= wider != targets
            reach[module] = wider
    inside = {module for module, targets in reach.items() if module in targets}
    return {
        frozenset(other for other in inside if other in reach[module] and module in reach[other]) for module in inside
    }


def test_every_room_has_a_level():
    assert {room_of(module) for module in FILES} - {""} == set(LEVEL)


def test_the_picture_shows_these_levels():
    assert ROOMS["PICTURE"].read_text(encoding="utf-8") == ROOMS["picture"](), "run python docs/rooms.py"


def test_few_names_stand_directly_under_the_package():
    beside = [path.name for path in PACKAGE.iterdir() if path.is_file()]
    assert len(beside) <= 12, beside


def test_tests_mirror_the_tree():
    sources = {path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/_", "/") for path in FILES.values()}
    for path in sorted(TESTS.rglob("test_*.py")):
        place = path.relative_to(TESTS).with_suffix("")
        mirrored = (place.parent / place.name.removeprefix("test_")).as_posix()
        if place.parts[0] not in OF_THE_PROJECT and place.as_posix() not in ACROSS:
            assert mirrored in sources, f"{path} is the test of no file"


@pytest.mark.parametrize("module", FILES)
def test_imports_go_downwards(module):
    here = room_of(module)
    for target, line in arrows(module) if here else ():
        there = room_of(target)
        if there != here:
            assert LEVEL[there] < LEVEL[here], f"{FILES[module]}:{line} imports {target}, which is not below"


def test_no_files_import_each_other_in_a_circle():
    assert circles() == set()


@pytest.mark.parametrize("module", FILES)
def test_hosts_are_imported_by_their_bridge_alone(module):
    here = room_of(module)
    for name, line in imports(module):
        host = name.split(".")[0]
        if host in HOSTS and here not in COMMAND:
            assert here in HOSTS[host], f"{FILES[module]}:{line} imports {name} outside its bridge"
