"""What the private name of torch's ``SummaryWriter`` stands for, seen through public behaviour."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto import summary_pb2
from torch.utils.tensorboard import SummaryWriter

from gblr_plugin.tensorboard._compat import file_writer, summary_writer

_LIGHTNING = "lightning.pytorch" if find_spec("pytorch_lightning") is None else "pytorch_lightning"
pl, loggers = import_module(_LIGHTNING), import_module(f"{_LIGHTNING}.loggers")
rank_zero_only = import_module(f"{_LIGHTNING}.utilities").rank_zero_only


def test_the_file_writer_takes_a_summary_that_tensorboard_reads(tmp_path: Path) -> None:
    writer = SummaryWriter(str(tmp_path))
    target = file_writer(writer)
    target.add_summary(summary_pb2.Summary(value=[summary_pb2.Summary.Value(tag="a", simple_value=2.0)]), 7)
    writer.close()
    (point,) = EventAccumulator(str(tmp_path)).Reload().Scalars("a")
    assert (point.step, point.value) == (7, 2.0)


def test_a_closed_writer_is_opened_again(tmp_path: Path) -> None:
    writer = SummaryWriter(str(tmp_path))
    writer.close()
    assert file_writer(writer) is not None
    writer.close()


def test_the_summary_writer_of_every_kind_of_logger(tmp_path: Path) -> None:
    writer = SummaryWriter(str(tmp_path / "plain"))
    assert summary_writer(writer) is writer
    logger = loggers.TensorBoardLogger(tmp_path / "lightning")
    assert summary_writer(logger) is logger.experiment
    for other in (loggers.CSVLogger(tmp_path / "csv"), pl.LightningModule(), None):
        assert summary_writer(other) is None
    writer.close()
    logger.experiment.close()


def test_processes_but_the_first_have_a_silent_writer(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    silent = summary_writer(loggers.TensorBoardLogger(tmp_path))
    assert silent is not None
    assert file_writer(silent) is None
