"""The files that a run leaves: networks, figures and reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..serialization import save
from ..tensor.gblr_tensor import GBLRTensor
from ..utils.files import write_atomic, write_text
from .context import DENSE
from .recording import Records
from .summary import RunReport

__all__ = ["draw", "write_run"]


def write_run(output: Path, summary: RunReport, records: Records) -> None:
    """Write everything of a run, the report last.

    Args:
        output: An existing folder.
        summary: The report; its second method is the one that is saved.
        records: Networks and curves.
    """
    first = summary.methods[1].name
    network, history = records.networks[first], records.histories.get(first, {})
    save(records.networks[DENSE], output / "dense.safetensors")
    save(network, output / "model.safetensors")
    figures: dict[str, Callable[[Any], Any]] = {"pareto": lambda plot: plot.pareto([summary])}
    if any(isinstance(parameter.data, GBLRTensor) for parameter in network.parameters()):
        figures["structure"] = lambda plot: plot.structure(network)
    if history:
        figures["curves"] = lambda plot: plot.curves(history)
    draw(output / "figures", figures)
    write_text(output / "report.txt", f"{summary}\n")
    write_text(output / "report.json", summary.to_json())


def draw(folder: Path, figures: Mapping[str, Callable[[Any], Any]]) -> None:
    """Write figures as PNG files, where matplotlib is installed.

    Args:
        folder: Made if needed.
        figures: By the name of the file, what makes the figure of :mod:`gblr_plugin.plot`.
    """
    try:
        from .. import plot
    except ImportError:
        return
    for name, make in figures.items():
        write_atomic(folder / f"{name}.png", partial(make(plot).savefig, format="png", dpi=150))
