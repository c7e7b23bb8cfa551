"""A full disk, a file that may not grow, a read-only folder: the earlier output stays, and one line says so."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gblr_plugin as gblr
from gblr_plugin.surgery import conversion

CANNOT = 77


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("fault", "says"),
    [("read_only", "Read-only file system"), ("file_size", "File too large"), ("full_disk", "No space left on device")],
)
def test_the_earlier_model_stays(server: Any, tmp_path: Path, fault: str, says: str) -> None:
    folder = tmp_path / "models"
    server.finish("small", folder)
    before = contents(folder)
    answer = server.run("large", folder, fault=fault)
    if answer["code"] == CANNOT:
        pytest.skip("this system does not let a process mount")
    said = folder.with_suffix(".log").read_text()
    assert answer["code"] == 1, said
    assert says in said.splitlines()[-1]
    assert contents(folder) == before
    assert gblr.load(folder / "model.safetensors", lambda: nn.Sequential(nn.Linear(16, 16))) is not None
    server.finish("large", folder)  # once there is room
    assert contents(folder) != before


@pytest.mark.parametrize("fault", ["read_only", "file_size"])
def test_the_command_says_so_in_one_line_and_goes_on_later(
    server: Any, dense_folder: Path, tmp_path: Path, fault: str
) -> None:
    shutil.copytree(dense_folder, tmp_path / "dense")
    source = contents(tmp_path / "dense")
    folder = tmp_path / "faulty"
    answer = server.run("command", folder, fault=fault)
    if answer["code"] == CANNOT:
        pytest.skip("this system does not let a process mount")
    (said,) = [line for line in folder.with_suffix(".log").read_text().splitlines() if line.startswith("gblr")]
    assert answer["code"] == 1
    assert said.startswith("gblr: compress: ")
    assert said.endswith("; the same command goes on where it was")
    assert not (folder / "out" / "config.json").exists()
    assert contents(tmp_path / "dense") == source
    server.finish("command", folder)
    server.finish("command", tmp_path / "whole")
    assert contents(folder / "out") == contents(tmp_path / "whole" / "out")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))


@pytest.mark.parametrize("way", ["prepare", "convert"])
@pytest.mark.parametrize("number", [0, 2, 3])
def test_an_interrupted_swap_leaves_the_model_as_it_was(monkeypatch: Any, way: str, number: int) -> None:
    model, name = network(), "structured_from"
    if way == "convert":
        for layer in gblr.prepare(model).values():
            layer.freeze_structure()
        name = "frozen_like"
    x = torch.randn(3, 16)
    before, modules = model(x), list(model)
    original, calls = getattr(conversion, name), []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(0)
        if len(calls) > number:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(conversion, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            getattr(gblr, way)(model)
    assert all(a is b for a, b in zip(model, modules, strict=True))
    assert torch.equal(model(x), before)
    getattr(gblr, way)(model)
    assert all(a is not b for a, b in zip(model, modules, strict=True))
