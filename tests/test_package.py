"""The package as a user meets it: what importing does, which names there are, what works without the hosts."""

import ast
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gblr_plugin

ROOT = Path(gblr_plugin.__file__).parents[1]


def run_python(code, *arguments):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )


def test_import_is_light_and_silent():
    done = run_python(
        "import sys, gblr_plugin\n"
        "heavy = {'nni', 'pytorch_lightning', 'lightning', 'tensorboard', 'torchao', 'yaml', 'matplotlib', 'numba'}\n"
        "sys.exit(' '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_training_path_needs_no_host_and_no_torchao():
    code = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"nni", "pytorch_lightning", "lightning", "tensorboard", "torchao"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
import torch
import gblr_plugin as gblr

model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 16))
layers = gblr.prepare(model)
optimizer = torch.optim.AdamW(gblr.param_groups(model), lr=1e-3)
learner = gblr.StructureLearner(layers, {name: gblr.LayerGoal(budget=0.5) for name in layers}, gblr.Schedule(1, 4))
learner.attach_all([optimizer])
for _ in range(6):
    optimizer.zero_grad()
    model(torch.randn(4, 16)).square().mean().backward()
    optimizer.step()
assert learner.frozen and learner.relative_flops <= 0.5
print(gblr.report(model, torch.randn(1, 16)).relative_flops <= 0.5)
"""
    done = run_python(code)
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr


def test_convert_save_and_load_work_without_nni(tmp_path):
    code = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "nni":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
import torch
import gblr_plugin as gblr
from gblr_plugin.surgery.layer_settings import LayerSettings

make = lambda: torch.nn.Sequential(torch.nn.Linear(16, 16))
model = make()
gblr.prepare(model, settings=LayerSettings("trapezoid", budget=0.5))
gblr.convert(model)
gblr.save(model, sys.argv[1])
x = torch.randn(3, 16)
assert torch.equal(gblr.load(sys.argv[1], make)(x), model(x))
try:
    gblr.nni
except ImportError as error:
    assert "nni" in str(error) and "\\n" not in str(error)
else:
    sys.exit("nni was found")
"""
    done = run_python(code, str(tmp_path / "model.safetensors"))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", gblr_plugin.__all__)
def test_public_name_resolves(name):
    if name == "plot":
        pytest.importorskip("matplotlib")
    if name == "nni":
        pytest.importorskip("nni")
    assert getattr(gblr_plugin, name) is not None
    assert name in dir(gblr_plugin)


def test_no_submodule_shadows_a_public_name():
    submodules = {module.name for module in pkgutil.iter_modules(gblr_plugin.__path__)}
    assert not submodules & set(gblr_plugin._EXPORTS)
    assert {room.split(".")[0] for room in gblr_plugin._EXPORTS.values()} <= submodules


def test_public_functions_are_callable_after_their_submodules_are_imported():
    from gblr_plugin import decomposition, loading, serialization
    from gblr_plugin.surgery import conversion, counting

    for module, name in (
        (conversion, "convert"),
        (conversion, "prepare"),
        (decomposition, "decompose"),
        (counting, "report"),
        (loading, "load"),
        (serialization, "save"),
    ):
        assert getattr(gblr_plugin, name) is getattr(module, name)
        assert callable(getattr(gblr_plugin, name))


def test_types_are_offered_to_the_users_checker():
    assert (Path(gblr_plugin.__file__).parent / "py.typed").is_file()


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'decomposes'"):
        gblr_plugin.decomposes  # noqa: B018


def test_config_error_is_a_value_error():
    assert issubclass(gblr_plugin.ConfigError, ValueError)
    assert issubclass(gblr_plugin.ConfigError, gblr_plugin.GBLRError)


def dataclasses_of_the_package():
    """(file and name, decorator, annotations of the fields) of every dataclass, also where a host is not installed."""
    package = Path(gblr_plugin.__file__).parent
    for file in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            for decorator in getattr(node, "decorator_list", ()):
                called = decorator.func if isinstance(decorator, ast.Call) else decorator
                if ast.unparse(called).rpartition(".")[2] == "dataclass":
                    fields = [part.annotation for part in node.body if isinstance(part, ast.AnnAssign)]
                    yield f"{file.relative_to(package)}:{node.name}", decorator, fields


def holds_arrays(annotation):
    """Whether an annotation names a tensor or an array, but as an argument or result of a function."""
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Callable":
        return False
    if isinstance(annotation, ast.Name | ast.Attribute):
        return ast.unparse(annotation).rpartition(".")[2] in ("Tensor", "Parameter", "NDArray", "ndarray")
    return any(map(holds_arrays, ast.iter_child_nodes(annotation)))


def test_dataclasses_that_hold_tensors_are_compared_by_identity():
    """The ``==`` that a dataclass gets by default asks for the truth of a tensor of truths, which is an error."""
    found = [
        (name, decorator) for name, decorator, fields in dataclasses_of_the_package() if any(map(holds_arrays, fields))
    ]
    assert len(found) > 20
    wrong = [
        name
        for name, decorator in found
        if not any(
            word.arg == "eq" and ast.unparse(word.value) == "False" for word in getattr(decorator, "keywords", ())
        )
    ]
    assert wrong == []


def test_matrices_can_be_compared_and_kept_in_sets():
    one, two = (gblr_plugin.decompose(torch.ones(8, 6), 0.5) for _ in range(2))
    assert {one} == {one}
    assert one != two
    assert one.rows != two.rows
    assert len({one, two, one}) == 2
