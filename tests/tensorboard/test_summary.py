"""Layers of every kind reach the event file, through every kind of writer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing import event_file_loader
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import gblr_plugin as gblr
from gblr_plugin.matrix.structure import Intervals, StructuredMatrix
from gblr_plugin.monitoring.records import decode_layer, decode_step
from gblr_plugin.tensorboard import write_structure
from gblr_plugin.tensorboard.summary import structure_summary


def make_matrix() -> StructuredMatrix:
    generator = torch.Generator().manual_seed(0)
    rows = Intervals(torch.tensor([3, 0, 4]), torch.tensor([2, 1, 0]), 4)
    cols = Intervals(torch.tensor([2, 5, 6]), torch.tensor([5, 0, 0]), 6)
    u, v = torch.randn(3, 4, generator=generator), torch.randn(3, 6, generator=generator)
    return StructuredMatrix.from_factors(u, v, rows, cols, (2, 1))


def records_of(summary: Any) -> tuple[Any, list[Any]]:
    head, *layers = [value.tensor.string_val[0] for value in summary.value]
    return decode_step(head), [decode_layer(data) for data in layers]


def test_counts_and_energies_are_those_of_the_matrix() -> None:
    matrix = make_matrix()
    summary = structure_summary({"a": matrix}, budget={"a": 0.25}, sigma=3.0, lambdas={"a": 2.0}, loss=1.5)
    step, (layer,) = records_of(summary)
    assert step.stored.tolist() == [matrix.stored]
    assert step.live.tolist() == [matrix.num_components] == [2]
    assert (step.budget.tolist(), step.lambdas.tolist(), step.sigma, step.loss) == ([0.25], [2.0], 3.0, 1.5)
    assert layer.shape.split_sizes == (2, 1)
    blocks = torch.einsum("km,kn->kmn", matrix.u, matrix.v).square().sum((1, 2))
    torch.testing.assert_close(torch.from_numpy(layer.energy).float(), blocks, rtol=0.045, atol=0.0)


class Logger:
    """Stands for Lightning's TensorBoardLogger."""

    def __init__(self, experiment: Any) -> None:
        self.experiment = experiment


class Silent:
    """Stands for Lightning's dummy experiment on all ranks but the first."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def events(folder: Path) -> list[Any]:
    (file,) = folder.glob("events*")
    return [event for event in event_file_loader.EventFileLoader(str(file)).Load() if event.summary.value]


@pytest.mark.parametrize("kind", ["writer", "logger", "file_writer", "event_writer"])
def test_writers(tmp_path: Path, kind: str) -> None:
    layers = {"a": make_matrix()}
    if kind == "event_writer":
        writer: Any = EventFileWriter(str(tmp_path))
        write_structure(writer, layers, 5)
    else:
        writer = SummaryWriter(str(tmp_path))
        target = {"writer": writer, "logger": Logger(writer), "file_writer": writer._get_file_writer()}[kind]
        write_structure(target, layers, 5)
    writer.close()
    (event,) = events(tmp_path)
    assert event.step == 5
    assert [value.tag for value in event.summary.value] == ["gblr/summary", "gblr/structure/a"]
    assert {value.metadata.plugin_data.plugin_name for value in event.summary.value} == {"gblr"}


def test_other_ranks_write_nothing() -> None:
    for writer in (Silent(), Logger(Silent())):
        write_structure(writer, {"a": make_matrix()}, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"writer": object()}, "cannot write to a object"),
        ({"layers": {"fc": nn.Linear(2, 2)}}, "layer 'fc' is a Linear"),
        ({"step": -1}, "step must be at least 0"),
    ],
)
def test_what_cannot_be_logged_is_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"writer": Silent(), "layers": {"a": make_matrix()}, "step": 0} | change
    with pytest.raises(gblr.ConfigError, match=message):
        write_structure(arguments["writer"], arguments["layers"], arguments["step"])


def test_the_server_side_imports_no_torch() -> None:
    code = "import sys, gblr_plugin.tensorboard.plugin; assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
