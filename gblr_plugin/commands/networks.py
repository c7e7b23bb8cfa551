"""Networks that users name by a folder: of transformers, or the output of ``gblr run``."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor, nn

from ..errors import ConfigError

__all__ = ["opened"]


def opened(place: str, batch: int, length: int | None) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network in evaluation mode that takes and returns tensors, and example inputs of it.

    Args:
        place: Folder of a model of transformers, or its name in the local cache, or the output of ``gblr run``.
        batch: Size of the example batch.
        length: Tokens of a text; ``None``: the default of the model's kind.

    Raises:
        ConfigError: If there is no such model, or it cannot be loaded.
    """
    report = Path(place, "report.json")
    return _of_run(report, batch) if report.is_file() else _of_transformers(place, batch, length)


def _of_transformers(place: str, batch: int, length: int | None) -> tuple[nn.Module, tuple[Tensor, ...]]:
    from ..compression.evaluation import load_model
    from ..compression.examples import example_inputs
    from ..exporting.files import Tensors

    model, _ = load_model(place, "export")
    inputs = example_inputs(model, batch, length)
    return Tensors(model, list(inputs)).eval(), tuple(inputs.values())


def _of_run(report: Path, batch: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    from ..loading import load
    from ..run.context import make_task
    from ..run.yaml_config import Located
    from .configs import read

    try:
        settings = json.loads(report.read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"export: {str(report)!r} is no report of gblr run") from error
    from ..run.settings import RunSettings

    task = make_task(read(Located(str(report), settings, {}), RunSettings))
    return load(report.parent / "model.safetensors", task.network).eval(), (task.example_input(batch),)
