"""Quality against cost, of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

from ..errors import ConfigError
from .style import MUTED, SERIES, cost_axes, draw_dense, draw_title, label_ends, title_axes

__all__ = ["pareto"]


def _methods(report: Any) -> tuple[str, bool, list[tuple[str, list[float], list[float]]]]:
    """Metric, its direction, and (name, relative FLOPs, metric) over the seeds of each method."""
    values = report if isinstance(report, Mapping) else report.to_dict()
    try:
        metric = str(values["metric"])
        methods = [
            (
                str(method["name"]),
                [float(seed["relative_flops"]) for seed in method["seeds"]],
                [float(seed[metric]) for seed in method["seeds"]],
            )
            for method in values["methods"]
        ]
    except (KeyError, TypeError) as error:
        raise ConfigError(f"pareto: not a report of `gblr run`: {error!r} is missing") from error
    return metric, bool(values.get("higher_is_better", True)), methods


def pareto(reports: Sequence[Any], *, title: str | None = None) -> Figure:
    """Quality against relative FLOPs, of every method in reports of ``gblr run``.

    A point is a mean over seeds, its whisker their range. Several reports (say at several budgets) make a line per
    method. The dense network is the dashed line.

    Args:
        reports: Reports, or what ``report.json`` holds, of one task.
        title: Above the figure.

    Returns:
        A matplotlib figure.

    Raises:
        ConfigError: If there is no report, or the reports judge by different metrics.
    """
    if not reports:
        raise ConfigError("pareto: need at least one report")
    parsed = [_methods(report) for report in reports]
    metric, higher = parsed[0][0], parsed[0][1]
    if any(other[:2] != (metric, higher) for other in parsed):
        raise ConfigError(f"pareto: reports judge by different metrics: {sorted({other[0] for other in parsed})}")
    points: dict[str, list[tuple[float, float, float, float]]] = {}
    for _, _, methods in parsed:
        for name, cost, quality in methods:
            mean = sum(quality) / len(quality)
            points.setdefault(name, []).append((sum(cost) / len(cost), mean, min(quality), max(quality)))
    figure = Figure(figsize=(5.4, 3.6), facecolor="white", layout="constrained")
    axes = cost_axes(figure, 1, 1, 1)
    dense = points.pop("dense", None)
    if dense is not None:
        level = sum(point[1] for point in dense) / len(dense)
        axes.axhspan(min(p[2] for p in dense), max(p[3] for p in dense), color=MUTED, alpha=0.1, linewidth=0)
        draw_dense(axes, level)
    labels: list[tuple[str, tuple[float, float], str]] = []
    for index, (name, found) in enumerate(points.items()):
        color = SERIES[index % len(SERIES)]
        found.sort()
        cost, average, low, high = (list(values) for values in zip(*found, strict=True))
        # Methods are compared at equal cost: stand beside each other instead of on top.
        aside = ScaledTranslation(4 * (index - (len(points) - 1) / 2) / 72, 0, figure.dpi_scale_trans)
        beside = axes.transData + aside
        axes.vlines(cost, low, high, color=color, linewidth=1.4, alpha=0.5, transform=beside)
        axes.plot(cost, average, color=color, lw=1.4, marker="o", ms=6, markeredgecolor="white", transform=beside)
        axes.update_datalim(list(zip(cost + cost, low + high, strict=True)))
        labels.append((name.replace("_", "-"), (cost[-1], average[-1]), color))
    axes.autoscale_view()
    right = max((point[0] for found in points.values() for point in found), default=1.0)
    axes.set_xlim(0, min(1.0, right * 1.6) if points else 1.0)
    figure.draw_without_rendering()
    label_ends(axes, labels)
    title_axes(axes, metric, "higher is better" if higher else "lower is better")
    draw_title(figure, title)
    return figure
