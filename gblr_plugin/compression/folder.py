"""A pretrained model's folder compressed on a user's data into another folder, measured, with a card and a report.

Everything is made in a folder of work inside the output, and moved into place when it is complete, ``config.json``
last: what is unfinished cannot be loaded, and a command that was killed goes on where it was.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..calibration.allocation import check_rule
from ..errors import ConfigError
from ..families.registry import get
from ..huggingface.companions import copy_companions
from ..huggingface.folders import empty_network, save_pretrained
from ..huggingface.pretrained import find_folder, load_dense, stored_dtype
from ..loading import load
from ..serialization.container import shard_paths
from ..surgery.row_splits import row_splits_of
from ..surgery.selection import select_layers
from ..utils.files import write_text
from ..utils.unfinished import begin_work, end_work
from .card import model_card
from .compress import compress
from .forecast import Forecast, forecast
from .inputs import Batch, DataReader, kind_of
from .quality import measure_quality
from .report import CompressionReport
from .settings import CompressionSettings
from .speed import measure_speed
from .stages import Stages

__all__ = ["REPORT", "FolderJob"]

REPORT = "compress.json"
_WHO = "compress"
_ORDER = {REPORT: 1, "config.json": 2}  # of moving into place; the others before them
_RESULT = "result"  # the folder that will be the output
_COMPRESSED = "compressed.json"  # in the folder of work: the weights are done
_COMPLETE = "complete"  # there: so is all else, and the files are being moved


@dataclass(frozen=True)
class FolderJob:
    """What is to be compressed, by which data, and where the result goes.

    Args:
        model: Folder of the dense model, or a name in the local cache of the Hugging Face hub.
        output: A new folder, or one of the same job, interrupted.
        settings: Keyword arguments of :func:`gblr_plugin.compress`, ``budget`` among them, as JSON values.
        calibration: A text file, JSON-lines file or folder of images.
        evaluation: The same, held out; ``None``: nothing is measured.
        samples: Texts, sequences or images that are read of each; ``None``: as
            :class:`~gblr_plugin.compression.inputs.DataReader` does, which takes the length too.
        length: Tokens of a sequence, or most tokens of a text.
        dtype: Of the result, by the name of torch; ``None``: that of the dense model.
    """

    model: str
    output: Path
    settings: Mapping[str, Any]
    calibration: Path
    evaluation: Path | None = None
    samples: int | None = None
    length: int | None = None
    dtype: str | None = None

    def run(self) -> CompressionReport:
        """Compress, measure, write.

        Raises:
            ConfigError: If model, data, settings or output cannot be used; nothing is left in the output then.
            OSError: If a file cannot be written.
        """
        source, network = self._network()
        settings = self._settings(network)
        calibration, evaluation = self._data(source, network)
        work = begin_work(self.output, self._task(source), _WHO)
        if not (work / _COMPRESSED).exists():
            try:
                self._compress(source, work, settings, calibration)
            except ConfigError:  # these settings lead nowhere: others may be given for this output
                end_work(work)
                self.output.rmdir()
                raise
        if not (work / _COMPLETE).exists():
            self._describe(source, work, evaluation)
        for path in sorted((work / _RESULT).iterdir(), key=lambda path: _ORDER.get(path.name, 0)):
            os.replace(path, self.output / path.name)
        end_work(work)
        return CompressionReport.from_dict(json.loads((self.output / REPORT).read_text(encoding="utf-8")))

    def forecast(self) -> Forecast:
        """What :meth:`run` would do, and about how long and in how much memory; nothing is written.

        Raises:
            ConfigError: As there.
        """
        source, network = self._network()
        settings = self._settings(network)
        calibration, _ = self._data(source, network)
        selection = select_layers(network, settings.layers, settings.exclude)
        return forecast(network, selection, calibration, refine=settings.refine, recover=settings.recover)

    def _network(self) -> tuple[Path, Any]:
        """The folder of the dense model, and its network without weights."""
        source = find_folder(self.model, _WHO)
        if source.resolve() == self.output.resolve():
            raise ConfigError(f"{_WHO}: model and output are the same folder")
        return source, empty_network(source, _WHO)

    def _settings(self, network: nn.Module) -> CompressionSettings:
        """The settings, with row splits by full names."""
        settings = CompressionSettings.from_dict(self.settings)
        get(settings.family)
        if settings.allocation is not None:
            check_rule(settings.allocation, self.calibration)
        chosen = select_layers(network, settings.layers, settings.exclude).layers
        splits = row_splits_of(network, chosen, settings.row_splits)
        return replace(settings, row_splits=settings.row_splits if isinstance(settings.row_splits, int) else splits)

    def _data(self, source: Path, network: nn.Module) -> tuple[list[Batch], list[Batch] | None]:
        """The batches of both data."""
        config: Any = network.config
        longest = getattr(config, "max_position_embeddings", None)
        reader = DataReader(source, kind_of(network), longest, self.samples, self.length)
        batches = reader.read(self.calibration, "--calibration", self.settings.get("seed", 0))
        return batches, None if self.evaluation is None else reader.read(self.evaluation, "--eval")

    def _task(self, source: Path) -> dict[str, Any]:
        """All that the result depends on."""
        said = {name: value for name, value in asdict(self).items() if name not in ("output", "model")}
        files = (self.calibration, self.evaluation)
        return {
            **{name: str(value) if isinstance(value, Path) else value for name, value in said.items()},
            "data": [None if file is None else _fingerprint(file) for file in files],
            "source": [[path.name, path.stat().st_size] for path in shard_paths(source, _WHO)],
            "config": json.loads((source / "config.json").read_text(encoding="utf-8")),
        }

    def _compress(self, source: Path, work: Path, settings: CompressionSettings, calibration: list[Batch]) -> None:
        """The compressed weights into the folder of work, and what was found; that file comes last."""
        model = load_dense(source, _WHO)
        given = {name: value for name, value in self.settings.items() if value is not None}
        given["row_splits"] = settings.row_splits
        inputs = [{name: tensor for name, tensor in batch.items() if name != "labels"} for batch in calibration]
        report = compress(model, **given, calibration=inputs, resume=work / "blocks")
        save_pretrained(model.to(self._dtype(source)), work / _RESULT)
        write_text(work / _COMPRESSED, report.to_json())

    def _dtype(self, source: Path) -> torch.dtype:
        return stored_dtype(source, _WHO) if self.dtype is None else getattr(torch, self.dtype)

    def _describe(self, source: Path, work: Path, evaluation: list[Batch] | None) -> None:
        """Measure the folder as users load it; then the files beside the weights."""
        result = work / _RESULT
        values = json.loads((work / _COMPRESSED).read_text(encoding="utf-8"))
        values["command"] = {
            "model": _shown(self.model),
            "calibration": self.calibration.name,
            "eval": None if self.evaluation is None else self.evaluation.name,
            **{name: getattr(self, name) for name in ("samples", "length", "dtype")},
            "threads": torch.get_num_threads(),
        }
        stages = Stages(torch.device("cpu"))
        with stages("loading"):
            compressed = load(result)
        if evaluation is not None:
            with stages("loading"):
                dense = load_dense(source, _WHO, self._dtype(source))
            kind = kind_of(dense)
            with stages("quality"):
                values["quality"] = asdict(measure_quality(kind, dense, compressed, evaluation))
            with stages("speed"):
                speed = measure_speed(kind, dense, compressed, evaluation)
            values["speedup"], values["speed"] = speed.speedup, asdict(speed)
        values["stages"] += [asdict(stage) for stage in stages.rows()]
        copy_companions(source, result)
        write_text(result / "README.md", model_card(values, type(compressed).__name__, source))
        write_text(result / REPORT, json.dumps(values, indent=1))
        write_text(work / _COMPLETE, "")


def _shown(model: str) -> str:
    """A model's name without the path that it has on this machine."""
    return Path(model).resolve().name if Path(model).expanduser().exists() else model


def _fingerprint(path: Path) -> Any:
    """What tells data from other data: the checksum of a file, names and sizes of a folder's files."""
    if path.is_dir():
        return sorted([str(file.relative_to(path)), file.stat().st_size] for file in path.rglob("*") if file.is_file())
    return zlib.crc32(path.read_bytes())
