"""What the package may not contain: unpickling, evaluated text, shells, listeners; and what it depends on."""

from __future__ import annotations

import ast
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "gblr_plugin").rglob("*.py"))
FORBIDDEN = {
    "eval",
    "exec",
    "__import__",
    "os.system",
    "os.popen",
    "pickle.load",
    "pickle.loads",
    "dill.load",
    "joblib.load",
    "marshal.loads",
    "shelve.open",
    "yaml.unsafe_load",
    "yaml.full_load",
    "socket.socket",
    "socket.create_server",
    "werkzeug.serving.run_simple",
}
MODULES = {"subprocess", "socket", "socketserver", "http", "asyncio", "marshal", "shelve", "telnetlib", "ctypes"}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def findings(source: str, allowed: frozenset[str] = frozenset()) -> list[str]:
    """What a source text does that it may not, as ``line: what``."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name, options = dotted(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
            if name in FORBIDDEN and name.partition(".")[0] not in allowed:
                found.append(f"{node.lineno}: {name}")
            safe = options.get("weights_only")
            if name == "torch.load" and not (isinstance(safe, ast.Constant) and safe.value is True):
                found.append(f"{node.lineno}: torch.load without weights_only=True")
            if name.endswith("np.load") and not isinstance(options.get("allow_pickle"), ast.Constant):
                found.append(f"{node.lineno}: np.load without allow_pickle=False")
            if name == "yaml.load" and not dotted(options.get("Loader", ast.Name("", ast.Load()))).endswith("_Loader"):
                found.append(f"{node.lineno}: yaml.load without the safe loader")
            for option in ("shell", "trust_remote_code"):
                value = options.get(option)
                if value is not None and not (isinstance(value, ast.Constant) and value.value is False):
                    found.append(f"{node.lineno}: {option}")
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        found += [f"{node.lineno}: {n}" for n in names if n.partition(".")[0] in MODULES - allowed]
    return found


# The search starts NNI's service, in a network namespace of its own where the system allows it; kernels run on the
# threads of torch's OpenMP library.
SEARCH = {
    "kernels/cpu/threads.py": frozenset({"ctypes"}),
    "run/private_network.py": frozenset({"ctypes", "socket"}),
    "run/search.py": frozenset({"subprocess"}),
    "run/search_service.py": frozenset({"ctypes", "socket"}),
}
UNPICKLING = {"data/cifar.py"}  # an Unpickler that knows three names; tests/data/test_cifar.py attacks it


def test_there_are_sources() -> None:
    assert len(SOURCES) > 100


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_package_does_nothing_of_the_kind(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    name = path.relative_to(ROOT / "gblr_plugin").as_posix()
    assert not findings(text, SEARCH.get(name, frozenset()))
    assert name in UNPICKLING or "import pickle" not in text


@pytest.mark.parametrize(
    "source",
    [
        "eval(text)",
        "import os\nos.system(command)",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "import numpy as np\nnp.load(path)",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "import subprocess",
        "from socket import create_server",
        "run(command, shell=True)",
        "run(command, shell=choice)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "import pickle\npickle.loads(data)",
    ],
)
def test_the_search_finds_it(source: str) -> None:
    assert findings(source)


def table() -> dict[str, tuple[str, str]]:
    page = (ROOT / "docs" / "notes" / "dependencies.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-zA-Z][\w-]*) \| ([<>=.,\d ]+) \| ([^|]+) \|", page, re.MULTILINE)
    return {name: (versions.replace(" ", ""), licence.strip()) for name, versions, licence in rows}


def stated() -> dict[str, str]:
    """Dependencies and their versions, from pyproject.toml: the required ones and the extras."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    parts = [re.search(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)[1]]
    parts.append(re.search(r"^\[project.optional-dependencies\]\n(.*?)^\[", text, re.MULTILINE | re.DOTALL)[1])
    return dict(re.findall(r'"([a-zA-Z][\w-]*)([<>=][^"]*)"', "".join(parts)))


def test_the_bill_of_materials_names_every_dependency_with_its_range() -> None:
    assert {name: versions for name, (versions, _) in table().items()} == stated()


IMPORTED_AS = {
    "huggingface_hub": "huggingface-hub",
    "yaml": "pyyaml",
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "pytorch_lightning": "pytorch-lightning",
}
BROUGHT = {
    "numpy": "nni",
    "psutil": "nni",
    "schema": "nni",
    "scikit-learn": "nni",
    "werkzeug": "tensorboard",
    "llvmlite": "numba",
    "huggingface-hub": "transformers",
}
OPTIONAL = {"triton", "lightning"}  # used where they are there; torch brings triton where there is a GPU


def imported() -> set[str]:
    """Packages that the sources import from outside the standard library."""
    found = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                found.add(node.module.partition(".")[0])
    found -= {*sys.stdlib_module_names, "gblr_plugin"}
    return {IMPORTED_AS.get(name, name) for name in found}


def test_all_that_is_imported_is_stated_or_comes_with_something_that_is() -> None:
    assert imported() == {*stated(), *BROUGHT, *OPTIONAL} & imported()
    page = (ROOT / "docs" / "notes" / "dependencies.md").read_text(encoding="utf-8")
    for name, by in BROUGHT.items():
        assert by in stated()
        needed = [
            re.match(r"[\w-]+", line)[0].lower() for line in metadata.requires(by) or [] if "extra ==" not in line
        ]
        assert name in needed
        assert f"{name} (with {by})" in page


@pytest.mark.parametrize("name", sorted(stated()))
def test_the_documented_licence_is_the_one_that_is_installed(name: str) -> None:
    try:
        about = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed")
    said = " ".join([about.get("License-Expression") or "", about.get("License") or ""])
    said += " ".join(line for line in about.get_all("Classifier") or [] if line.startswith("License"))
    if not said.strip():
        files = [file for file in metadata.files(name) or [] if file.name.startswith("LICENSE")]
        said = " ".join(file.read_text(encoding="utf-8") for file in files[:1])
    words = {"BSD": "BSD|Redistribution and use in source and binary forms", "Apache": "Apache", "MIT": "MIT"}
    words = {"HPND": "HPND|MIT-CMU", "PSF": "Python Software Foundation", "Unlicense": "Unlicense|MIT", **words}
    kind = next(word for word in words if word in table()[name][1])
    assert re.search(words[kind], said), said[:200]
