"""Runs killed with SIGKILL at random moments, and started again, end as if they had not been killed."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

KILLS = int(os.environ.get("GBLR_KILLS", "20"))
FEWER = max(2, KILLS // 5)  # of runs that take seconds


def assert_same(a: Any, b: Any, where: str = "") -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}.{index}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def killed_folders(server: Any, job: str, tmp_path: Path, seconds: float, count: int) -> list[Path]:
    """Folders of runs that were killed, at moments spread at random over the duration of a whole run."""
    draw = random.Random(f"moments of {job}")
    folders: list[Path] = []
    for number in range(count):
        folder, moment = tmp_path / f"killed{number}", draw.uniform(0, 0.95) * seconds
        while not server.run(job, folder, moment)["killed"] or (folder / "done.pt").exists():  # it was faster this time
            folder, moment = folder.with_name(f"{folder.name}x"), 0.7 * moment
        folders.append(folder)
    return folders


@pytest.mark.parametrize(
    ("job", "kills"),
    [("plain", KILLS), ("pair", FEWER), ("shards", FEWER // 2), ("lightning", FEWER), ("epochs", KILLS)],
)
def test_training_ends_at_the_same_bits(server: Any, tmp_path: Path, job: str, kills: int) -> None:
    seconds = server.finish(job, tmp_path / "whole")
    seconds = server.finish(job, tmp_path / "again")  # warm
    whole = torch.load(tmp_path / "whole" / "done.pt", weights_only=True)
    assert whole["learner"]["frozen"]
    begun = 0
    for folder in killed_folders(server, job, tmp_path, seconds, kills):
        assert not (folder / "done.pt").exists()
        begun += (folder / "last.pt").exists() or any(folder.glob("steps*/*"))
        server.finish(job, folder)
        assert_same(torch.load(folder / "done.pt", weights_only=True), whole)
    assert begun >= kills // 4  # most had a checkpoint to go on from; the others began anew


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_decomposition_of_a_folder_ends_at_the_same_bytes(server: Any, dense_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(dense_folder, tmp_path / "dense")
    server.finish("compress", tmp_path / "whole")
    seconds = server.finish("compress", tmp_path / "again")
    whole = contents(tmp_path / "whole" / "out")
    for folder in killed_folders(server, "compress", tmp_path, seconds, KILLS):
        server.finish("compress", folder)
        assert contents(folder / "out") == whole


def figures(folder: Path, file: str) -> Any:
    """A report without what depends on the clock, and without what is measured."""

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: kept(inner) for key, inner in value.items() if key not in ("seconds", "latency_ms", "latency")}
        return [kept(inner) for inner in value] if isinstance(value, list) else value

    return kept(json.loads((folder / "out" / file).read_text()))


@pytest.mark.parametrize(
    ("job", "file", "models"),
    [
        ("run", "report.json", ["dense.safetensors", "model.safetensors"]),
        ("compare", "comparison.json", ["dense/seed0.safetensors"]),
    ],
)
def test_commands_end_with_the_same_report(server: Any, tmp_path: Path, job: str, file: str, models: list[str]) -> None:
    server.finish(job, tmp_path / "whole")
    seconds = server.finish(job, tmp_path / "again")
    for folder in killed_folders(server, job, tmp_path, seconds, FEWER):
        server.finish(job, folder)
        assert figures(folder, file) == figures(tmp_path / "whole", file)
        for model in models:
            assert (folder / "out" / model).read_bytes() == (tmp_path / "whole" / "out" / model).read_bytes()
        assert not list((folder / "out").glob(".unfinished"))
