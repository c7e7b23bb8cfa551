"""Quality against cost, of the trials of a search."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..errors import ConfigError
from .style import HAIR, INK, MUTED, SERIES, STEPS, house_axes, house_title

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
    axes = house_axes(figure, 1, 1, 1)
    axes.grid(axis="y", color=HAIR, linewidth=0.5, alpha=0.7)
    axes.set_axisbelow(True)
    front = [(trial.relative_flops, trial.quality) for trial in report.front]
    most = max(trial.relative_flops for trial in report.done)
    # A budget between two trials is met by the cheaper of them.
    costs, qualities = zip(*front, (1.06 * most, front[-1][1]), strict=True)
    axes.plot(costs, qualities, color=INK, linewidth=1, alpha=0.6, drawstyle="steps-post", zorder=2)
    for index, name in enumerate(dict.fromkeys(trial.compressor for trial in report.done)):
        points = [(trial.relative_flops, trial.quality) for trial in report.done if trial.compressor == name]
        x, y = zip(*points, strict=True)
        color = SERIES[index % len(SERIES)]
        label = name.replace("_", "-")
        axes.plot(x, y, "o", color=color, ms=6, markeredgecolor="white", label=label, zorder=3)
    for trial in report.front:
        at = (trial.relative_flops, trial.quality)
        number = axes.annotate(
            str(trial.number), at, (5, -10), textcoords="offset points", fontsize=7, color=MUTED, zorder=4
        )
        number.set_path_effects([withStroke(linewidth=2, foreground="white")])
    if report.dense is not None:
        axes.axhline(report.dense, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"dense {report.dense:.4g}",
            (0, report.dense),
            (5, 3),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            fontsize=8,
            color=MUTED,
        )
    axes.set_xlim(0, min(1.02, 1.15 * most))
    axes.margins(y=0.12)
    axes.legend(fontsize=8, frameon=False, loc="best", labelcolor=INK, handletextpad=0.1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=STEPS))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
    axes.set_xlabel("relative FLOPs of the compressed layers", fontsize=8, color=MUTED)
    house_title(axes, report.metric, "higher is better" if report.higher_is_better else "lower is better")
    if title:
        figure.suptitle(title, x=0.02, ha="left", fontsize=11, color=INK)
    return figure
