"""Quality over cost, of a comparison: training and held-out figures side by side."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from ..errors import ConfigError
from .style import ACCENT, INK, SERIES, cost_axes, draw_dense, draw_title, title_axes

__all__ = ["comparison"]

_OTHERS = (*SERIES[1:5], "#c2a83e", "#4fa3c7", "#111111", "#6b8e23", "#d16ba5", "#5b6770")


def comparison(report: Any, *, phase: str = "fine_tuned", loss: bool = False, title: str | None = None) -> Figure:
    """Quality over relative FLOPs, a line per method, on training data (left) and on held-out data (right).

    A point is a mean over seeds, the band around a line their range. Dashed lines are pruners of NNI, whose masks leave
    a dense product: they are drawn at the share of the weights that is left. The dense network is the grey line.

    Args:
        report: A :class:`~gblr_plugin.run.comparison_report.ComparisonReport`.
        phase: ``"one_shot"``, ``"calibrated"`` or ``"fine_tuned"``.
        loss: Draw the mean cross-entropy in place of the metric.
        title: Above the figure.

    Returns:
        A matplotlib figure.

    Raises:
        ConfigError: If the report has no row of that phase.
    """
    names = [name for name in report.methods if report.select(name, phase)]
    if not names:
        raise ConfigError(f"comparison: the report has no row of phase {phase!r}")
    figure = Figure(figsize=(9.2, 4.2), facecolor="white", layout="constrained")
    sides = {"training data": ("train", "train_loss"), "held-out data": ("held_out", "held_out_loss")}
    lines: list[Any] = []
    for place, (side, keys) in enumerate(sides.items()):
        axes = cost_axes(figure, 1, 2, place + 1, marks=6)
        key = keys[int(loss)]
        dense = [getattr(row, key) for row in report.select("dense", "fine_tuned")]
        if dense:
            draw_dense(axes, sum(dense) / len(dense))
        lines = [_line(axes, report, name, phase, key, _colour(names, name)) for name in names]
        _limits(axes, report, phase, key)
        better = "higher" if report.higher_is_better and not loss else "lower"
        title_axes(axes, f"{'loss' if loss else report.metric}, {side}", f"{better} is better" if place else "")
    rising = report.higher_is_better and not loss
    # From the best at the largest budget down, as the lines end.
    lines.sort(key=lambda line: -line.get_ydata()[-1] if rising else line.get_ydata()[-1])
    legend = figure.legend(handles=lines, loc="outside right center", fontsize=8.5, frameon=False, labelcolor=INK)
    legend.set_title("")
    draw_title(figure, title)
    return figure


def _colour(names: list[str], name: str) -> str:
    others = [other for other in names if other != "gblr"]
    return ACCENT if name == "gblr" else _OTHERS[others.index(name) % len(_OTHERS)]


def _line(axes: Any, report: Any, name: str, phase: str, key: str, color: str) -> Any:
    points = []
    for budget in report.budgets:
        rows = report.select(name, phase, budget)
        if rows:
            values = [getattr(row, key) for row in rows]
            cost = sum(row.relative_flops for row in rows) / len(rows)
            points.append((cost, sum(values) / len(values), min(values), max(values)))
    cost, mean, low, high = (list(values) for values in zip(*sorted(points), strict=True))
    masked = not report.select(name, "one_shot")
    ours = name.startswith("gblr")
    style: dict[str, Any] = {"linestyle": (0, (2, 1.5))} if masked else {}
    axes.fill_between(cost, low, high, color=color, alpha=0.13 if ours else 0.06, linewidth=0)
    order = 4 if ours else 3
    style["label"] = name.replace("_", "-")
    width = 2.2 if ours else 1.2
    return axes.plot(cost, mean, color=color, lw=width, marker="o", ms=4, mec="white", zorder=order, **style)[0]


def _limits(axes: Any, report: Any, phase: str, key: str) -> None:
    """Failures do not squeeze the others into one line."""
    costs = [row.relative_flops for row in report.rows if row.method != "dense"]
    axes.set_xlim(0, min(1.0, max(costs) * 1.1))
    found = [report.select(name, phase, budget) for name in report.methods for budget in report.budgets]
    means = [sum(getattr(row, key) for row in rows) / len(rows) for rows in found if rows]
    means = sorted([*means, *(getattr(row, key) for row in report.select("dense", "fine_tuned"))])
    low, high = means[len(means) // 10], means[-1 - len(means) // 10]
    air = 0.35 * (high - low) or 1.0
    bottom, top = axes.get_ylim()
    axes.set_ylim(max(bottom, low - air), min(top, high + air))
