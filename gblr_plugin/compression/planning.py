"""What a compression would leave of a pretrained model, counted from its ``config.json`` alone."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import ConfigError, first_line
from ..huggingface.folders import empty_network
from ..huggingface.pretrained import find_folder, stored_dtype
from ..surgery.counting import report
from ..surgery.planning import planned
from ..surgery.report import Report
from ..surgery.selection import select_layers
from .examples import example_inputs

__all__ = ["plan_folder"]

_WHO = "plan"


def plan_folder(
    model: str,
    budget: float,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    length: int | None = None,
) -> Report:
    """Count a model on the meta device, dense and as ``gblr compress`` would leave it; no weight is read.

    Args:
        model: A folder, or a name in the local cache of the Hugging Face hub.
        budget: Relative FLOPs of the layers that would be compressed.
        include: Patterns of these; ``None``: all that can gain.
        exclude: Patterns of layers that stay dense.
        length: Tokens of the text that is counted.

    Raises:
        ConfigError: If there is no such model, nothing would be compressed, or it cannot be counted.
    """
    folder = find_folder(model, _WHO)
    network = empty_network(folder, _WHO).to(stored_dtype(folder, _WHO))
    selection = select_layers(network, include, exclude)
    example = example_inputs(network, length=length)
    example.pop("attention_mask", None)  # all ones; some models look into it, and here it has no values
    try:
        counted = report(network, example)
    except (RuntimeError, NotImplementedError, IndexError, TypeError, ValueError) as error:
        raise ConfigError(f"{_WHO}: {model!r} cannot be counted without weights: {first_line(error)}") from error
    return planned(counted, dict.fromkeys(selection.layers, budget), "it was not asked for")
