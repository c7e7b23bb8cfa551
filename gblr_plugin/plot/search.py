"""Quality against cost, of the trials of a search."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from ..errors import ConfigError
from .style import INK, MUTED, SERIES, cost_axes, draw_dense, draw_title, title_axes

__all__ = ["search"]


def search(report: Any, *, title: str | None = None) -> Figure:
    """Every trial of ``gblr search`` by relative FLOPs and quality, coloured by compressor, and their Pareto front.

    Trials of the front are numbered. The dense network is the dashed line.

    Args:
        report: The report of ``gblr search``, a ``gblr_plugin.run.search_report.SearchReport``.
        title: Above the figure.

    Returns:
        A matplotlib figure.

    Raises:
        ConfigError: If no trial came to its end.
    """
    if not report.done:
        raise ConfigError("search: no trial of the report came to its end")
    figure = Figure(figsize=(5.4, 3.6), facecolor="white", layout="constrained")
    axes = cost_axes(figure, 1, 1, 1)
    front = [(trial.relative_flops, trial.quality) for trial in report.front]
    most = max(trial.relative_flops for trial in report.done)
    # A budget between two trials is met by the cheaper of them.
    costs, qualities = zip(*front, (1.06 * most, front[-1][1]), strict=True)
    axes.plot(costs, qualities, color=INK, linewidth=1, alpha=0.6, drawstyle="steps-post", zorder=2)
    for index, name in enumerate(dict.fromkeys(trial.compressor for trial in report.done)):
        points = [(trial.relative_flops, trial.quality) for trial in report.done if trial.compressor == name]
        color = SERIES[index % len(SERIES)]
        label = name.replace("_", "-")
        axes.plot(*zip(*points, strict=True), "o", color=color, ms=6, markeredgecolor="white", label=label, zorder=3)
    for trial in report.front:
        at = (trial.relative_flops, trial.quality)
        offset = {"xytext": (5, -10), "textcoords": "offset points"}
        number = axes.annotate(str(trial.number), at, fontsize=7, color=MUTED, zorder=4, **offset)
        number.set_path_effects([withStroke(linewidth=2, foreground="white")])
    if report.dense is not None:
        draw_dense(axes, report.dense)
    axes.set_xlim(0, min(1.02, 1.15 * most))
    axes.margins(y=0.12)
    axes.legend(fontsize=8, frameon=False, loc="best", labelcolor=INK, handletextpad=0.1)
    title_axes(axes, report.metric, "higher is better" if report.higher_is_better else "lower is better")
    draw_title(figure, title)
    return figure
