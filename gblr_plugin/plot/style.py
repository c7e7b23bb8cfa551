"""How all figures look: few lines, small grey ticks, names beside their lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, PercentFormatter

__all__ = [
    "ACCENT",
    "HAIR",
    "INK",
    "MUTED",
    "SERIES",
    "STEPS",
    "cost_axes",
    "draw_dense",
    "draw_title",
    "label_ends",
    "plain_axes",
    "title_axes",
]

INK, MUTED, HAIR = "#22252b", "#7a7f89", "#d5d8dd"
ACCENT = "#2b4c9b"
STEPS = [1, 2, 2.5, 5, 10]
SERIES = (ACCENT, "#d9772b", "#3c8f74", "#8c5aa8", "#b5473c", "#7a7f89")


def plain_axes(figure: Figure, *place: Any, **options: Any) -> Any:
    """Axes with two sides and small grey ticks; arguments as ``Figure.add_subplot`` takes them."""
    axes = figure.add_subplot(*place, **options)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(HAIR)
    axes.tick_params(colors=MUTED, labelsize=8, length=3, width=0.6)
    return axes


def cost_axes(figure: Figure, *place: Any, marks: int = 5) -> Any:
    """Axes for quality over relative FLOPs, with about so many marks along the quality."""
    axes = plain_axes(figure, *place)
    axes.grid(axis="y", color=HAIR, linewidth=0.5, alpha=0.7)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=STEPS))
    axes.yaxis.set_major_locator(MaxNLocator(marks, steps=STEPS))
    axes.set_xlabel("relative FLOPs of the compressed layers", fontsize=8, color=MUTED)
    return axes


def draw_dense(axes: Any, level: float) -> None:
    """A dashed line at the quality of the dense network."""
    axes.axhline(level, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    where = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axes.annotate(f"dense {level:.4g}", (0, level), (5, 3), fontsize=8, color=MUTED, **where)


def title_axes(axes: Any, text: str, aside: str = "") -> None:
    """A small title on the left, and a remark on the right."""
    axes.set_title(text, loc="left", fontsize=9, color=INK, pad=6)
    if aside:
        axes.set_title(aside, loc="right", fontsize=8, color=MUTED, pad=6)


def draw_title(figure: Figure, title: str | None) -> None:
    """A title above all axes of a figure."""
    if title:
        figure.suptitle(title, x=0.02, ha="left", fontsize=11, color=INK)


def label_ends(axes: Any, labels: Sequence[tuple[str, tuple[float, float], str]]) -> None:
    """Names at the right of the last points of lines, moved apart where they would collide."""
    placed = [(axes.transData.transform(end), name, end, color) for name, end, color in labels]
    line = 12 * axes.figure.dpi / 72
    taken: list[tuple[float, float]] = []
    for (x, at), name, end, color in sorted(placed, key=lambda label: -label[0][1]):
        y = at
        for other_x, other_y in taken:
            if abs(other_x - x) < 8 * line and y > other_y - line:
                y = other_y - line
        taken.append((x, y))
        shift = (y - at) * 72 / axes.figure.dpi
        label = axes.annotate(
            name, end, (9, shift), textcoords="offset points", fontsize=8.5, va="center", color=color, zorder=5
        )
        label.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
