"""The house style: few lines, small grey ticks, names beside their lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

__all__ = ["ACCENT", "HAIR", "INK", "MUTED", "SERIES", "STEPS", "house_axes", "house_title", "label_ends"]

INK, MUTED, HAIR = "#22252b", "#7a7f89", "#d5d8dd"
ACCENT = "#2b4c9b"
STEPS = [1, 2, 2.5, 5, 10]
SERIES = (ACCENT, "#d9772b", "#3c8f74", "#8c5aa8", "#b5473c", "#7a7f89")


def house_axes(figure: Figure, *place: Any, **options: Any) -> Any:
    """Axes in the house style: few lines, small grey ticks."""
    axes = figure.add_subplot(*place, **options)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(HAIR)
    axes.tick_params(colors=MUTED, labelsize=8, length=3, width=0.6)
    return axes


def house_title(axes: Any, text: str, aside: str = "") -> None:
    """A small title on the left, and a remark on the right."""
    axes.set_title(text, loc="left", fontsize=9, color=INK, pad=6)
    if aside:
        axes.set_title(aside, loc="right", fontsize=8, color=MUTED, pad=6)


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
