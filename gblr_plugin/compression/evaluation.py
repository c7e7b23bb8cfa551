"""The quality of a pretrained model on a user's data: by itself, or beside the dense one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from ..huggingface.config import METHOD
from ..huggingface.folders import class_of
from ..huggingface.pretrained import find_folder, load_dense, stored_dtype
from ..loading import load
from ..utils.tables import table
from .inputs import DataReader, kind_of
from .quality import PERPLEXITIES, measure_quality, perplexity

__all__ = ["Evaluation", "evaluate_folder", "load_model"]


@dataclass(frozen=True)
class Evaluation:
    """Figures of a model.

    Args:
        metric: As :class:`~gblr_plugin.compression.quality.Quality` has it.
        value: Of the model.
        dense: Of the dense model, where there was one to compare to.
        samples: Texts, sequences or images over which it was taken.
        others: More figures by name, ``{"before": of the dense model, "after": of the model}``.
    """

    metric: str
    value: float
    dense: float | None
    samples: int
    others: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def to_json(self) -> str:
        """JSON text."""
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        """A table of the figures."""
        figures: list[tuple[str, ...]] = [(self.metric, f"{self.value:.4g}")]
        if self.dense is not None:
            figures = [(*figures[0], f"{self.dense:.4g}")]
            figures += [(name, f"{pair['after']:.4g}", f"{pair['before']:.4g}") for name, pair in self.others.items()]
        header = ("measure", "model", "dense")[: len(figures[0])]
        return "\n".join([*table(header, figures), f"over {self.samples} samples"])


def load_model(model: str, who: str, dtype: torch.dtype | None = None) -> tuple[Any, Path]:
    """A model of transformers, compressed or dense, in evaluation mode, and its folder.

    Args:
        model: A folder, or a name in the local cache of the Hugging Face hub.
        who: The command, for messages.
        dtype: Of a dense model; ``None``: as its ``config.json`` says.

    Raises:
        ConfigError: If there is none, or it cannot be loaded.
    """
    folder = find_folder(model, who)
    method = getattr(class_of(folder, who)[1], "quantization_config", None)
    if isinstance(method, dict) and method.get("quant_method") == METHOD:
        return load(folder), folder
    return load_dense(folder, who, dtype or stored_dtype(folder, who)), folder


def evaluate_folder(
    model: str, data: Path, against: str | None = None, samples: int | None = None, length: int | None = None
) -> Evaluation:
    """Take the figure of a model's kind on held-out data.

    Args:
        model: A folder, dense or compressed, or a name in the local cache of the Hugging Face hub.
        data: A text file, JSON lines with a field ``text``, or a folder of images.
        against: The dense model, in the same two forms. Models of language need none.
        samples: As :class:`~gblr_plugin.compression.inputs.DataReader` takes it, like the length.
        length: Tokens of a sequence, or most tokens of a text.

    Raises:
        ConfigError: If a model or the data cannot be used, or a dense model is needed and not given.
    """
    network, folder = load_model(model, "eval")
    kind, longest = kind_of(network), getattr(network.config, "max_position_embeddings", None)
    name = PERPLEXITIES.get(kind)
    if against is None and name is None:
        raise ConfigError(f"eval: {model!r} is judged beside the dense model; give it with --against")
    batches = DataReader(folder, kind, longest, samples, length).read(data, "--eval")
    if against is None:
        assert name is not None
        count = sum(len(next(iter(batch.values()))) for batch in batches)
        return Evaluation(name, perplexity(kind, network, batches), None, count)
    dense, _ = load_model(against, "eval", network.dtype)
    found = measure_quality(kind, dense, network, batches)
    return Evaluation(found.metric, found.after, found.before, found.samples, found.others)
