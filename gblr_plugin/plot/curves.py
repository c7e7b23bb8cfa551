"""How a structure was learned, step by step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..errors import ConfigError
from .style import HAIR, MUTED, SERIES, STEPS, draw_title, label_ends, plain_axes, title_axes

__all__ = ["curves"]

_CURVES = (
    ("relative FLOPs", {"relative_flops": ""}),
    ("live components", {"live_components": ""}),
    ("mean width of live components", {"mean_row_width": "rows", "mean_column_width": "columns"}),
    ("sigma", {"sigma": ""}),
    ("lambda", {"lambda": ""}),
)
_SHARES = ("relative_flops", "mean_row_width")


def _points(values: Sequence[Any]) -> tuple[list[float], list[float]]:
    pairs = [point if isinstance(point, (tuple, list)) else (index, point) for index, point in enumerate(values)]
    return [float(step) for step, _ in pairs], [float(value) for _, value in pairs]


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Limits that hold zero and all finite values, with air where a curve would lie on the edge."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(0.0, *finite, 0.0), max(0.0, *finite, 0.0)
    air = 0.06 * (high - low) or 1.0
    return (low - air if low < 0 else 0.0), high + air


def curves(source: Any, *, budget: float | None = None, title: str | None = None) -> Figure:
    """How the structure was learned, step by step.

    Args:
        source: A :class:`~gblr_plugin.lightning.GBLRCallback`, or its ``history``: values, or (step, value) pairs, by
            name (``relative_flops``, ``live_components``, ``mean_row_width``, ``mean_column_width``, ``sigma``,
            ``lambda``, ``frozen``); other names get panels of their own.
        budget: Relative FLOPs asked for, drawn as a line.
        title: Above the figure.

    Returns:
        A matplotlib figure with one panel per quantity.

    Raises:
        ConfigError: If there is nothing to draw.
    """
    history = getattr(source, "history", source)
    if not isinstance(history, Mapping) or not any(len(values) for values in history.values()):
        raise ConfigError("curves: need a callback that has trained, or a mapping of names to values, and got neither")
    panels = _panels(history)
    columns = min(len(panels), 3)
    lines = math.ceil(len(panels) / columns)
    size = 3.3 * columns, 2.2 * lines + (0.4 if title else 0.1)
    figure = Figure(figsize=size, facecolor="white", layout="constrained")
    frozen = [step for step, value in zip(*_points(history.get("frozen", ())), strict=True) if value]
    end = max(max(_points(values)[0], default=0.0) for values in history.values())
    for index, (label, names) in enumerate(panels):
        axes = plain_axes(figure, lines, columns, index + 1)
        title_axes(axes, label)
        axes.set_xlim(0, end or 1)
        labels = _draw_panel(axes, label, names, history)
        if frozen:
            axes.axvline(frozen[0], color=HAIR, linewidth=1, zorder=0)
        if frozen and index == 0:
            where = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "top"}
            axes.annotate("frozen", (frozen[0], 1), (3, -2), fontsize=7, color=MUTED, **where)
        if "relative_flops" in names and budget is not None:
            axes.axhline(budget, color=SERIES[1], linewidth=1, linestyle=(0, (4, 3)))
            asked = f"budget {budget:.0%}"
            axes.annotate(asked, (0, budget), (4, 3), textcoords="offset points", fontsize=7, color=SERIES[1])
        if labels:
            figure.draw_without_rendering()
            label_ends(axes, labels)
        if index >= len(panels) - columns:
            axes.set_xlabel("step", fontsize=8, color=MUTED)
    draw_title(figure, title)
    return figure


def _panels(history: Mapping[str, Sequence[Any]]) -> list[tuple[str, Mapping[str, str]]]:
    """Titles of the panels, and the curves in each with the names beside their lines."""
    known = {name for _, names in _CURVES for name in names} | {"frozen"}
    panels: list[tuple[str, Mapping[str, str]]] = [
        (label, {name: short for name, short in names.items() if history.get(name)}) for label, names in _CURVES
    ]
    panels += [(name, {name: ""}) for name in history if name not in known and len(history[name])]
    return [(label, names) for label, names in panels if names]


def _draw_panel(
    axes: Any, label: str, names: Mapping[str, str], history: Mapping[str, Sequence[Any]]
) -> list[tuple[str, tuple[float, float], str]]:
    """Draw the curves of a panel; returns the names to write at their ends."""
    labels = []
    for color, (name, short) in zip(SERIES, names.items(), strict=False):
        steps, values = _points(history[name])
        axes.plot(steps, values, color=color, linewidth=1.6, solid_capstyle="round")
        if short:
            labels.append((short, (steps[-1], values[-1]), color))
    axes.set_ylim(*_limits([value for name in names for value in _points(history[name])[1]]))
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=STEPS, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=STEPS, integer=label == "live components"))
    if any(name in _SHARES for name in names):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return labels
