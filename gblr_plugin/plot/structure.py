"""Where the blocks of structured matrices lie."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from ..errors import ConfigError
from ..matrix.structure import Intervals
from ..monitoring.pictures import POWER, blocks, colours, overlap_map, segments, split_offsets, structure_image
from .style import ACCENT, INK, MUTED, STEPS, plain_axes

__all__ = ["structure"]


def _summary(source: Any) -> tuple[tuple[int, int], int, float]:
    """Shape, live components, relative FLOPs."""
    rows, cols, sizes = blocks(source)
    shape = rows.length * len(sizes), cols.length
    return shape, rows.num_components, int((rows.width + cols.width).sum()) / math.prod(shape)


def _structured_layers(model: nn.Module) -> dict[str, Any]:
    layers: dict[str, Any] = {}
    for name, module in model.named_modules():
        with contextlib.suppress(ConfigError):
            blocks(module)
            layers[name] = module
    return layers


def _lines(intervals: Intervals, offset: Tensor, upright: bool) -> list[list[tuple[float, float]]]:
    """A line for each interval (two where it wraps around), side by side in order of their first index."""
    order = torch.argsort((intervals.start + offset) * (intervals.length + 1) + intervals.length - intervals.width)
    lines: list[list[tuple[float, float]]] = []
    for first, last in segments(intervals):
        ends = zip((first + offset)[order].tolist(), (last + offset)[order].tolist(), strict=True)
        lines += [[(place, a), (place, b)] for place, (a, b) in enumerate(ends) if a < b]
    return lines if upright else [[(y, x) for x, y in line] for line in lines]


def _covering(intervals: Intervals, offset: Tensor, length: int) -> Tensor:
    """(length,) number of intervals over each index."""
    steps = torch.zeros(length + 1, dtype=torch.int64)
    for first, last in segments(intervals):
        ones = torch.ones_like(last)
        steps.index_add_(0, first + offset, ones)
        steps.index_add_(0, last + offset, -ones)
    return steps.cumsum(0)[:length]


def _color_bar(cax: Any, most: int) -> None:
    """Colour scale from 1 to ``most`` blocks, as the pictures have it: a swatch each where they are few."""
    few = most <= 8
    if few:
        ticks = shown = list(range(1, most + 1))
        counts = torch.arange(1, most + 1)
    else:
        shown = [1, round(1 + (most - 1) * 0.25), most]
        ticks = [1 + 255 * ((count - 1) / (most - 1)) ** POWER for count in shown]
        counts = 1 + torch.linspace(0, 1, 256) ** (1 / POWER) * (most - 1)
    cax.imshow(colours(counts, most)[None].numpy(), extent=(0.5, len(counts) + 0.5, 0, 1), aspect="auto")
    for boundary in range(1, most if few else 0):
        cax.axvline(boundary + 0.5, color="white", linewidth=1)
    cax.set_xticks(ticks, [str(count) for count in shown])
    cax.set_yticks([])
    cax.tick_params(labelsize=8, length=0, colors=MUTED, pad=3)
    _hide_sides(cax)
    cax.set_title("overlapping blocks", loc="left", fontsize=8, color=MUTED, pad=4)


def _picture(axes: Any, source: Any, shape: tuple[int, int], most: int, size: int) -> None:
    image = structure_image(source, size, most=most, legend=False).permute(1, 2, 0).numpy()
    axes.imshow(image, extent=(0, shape[1], shape[0], 0), interpolation="nearest", aspect="auto")


def _most(source: Any) -> int:
    return max(int(overlap_map(source).max()), 1)


def structure(source: Any, *, title: str | None = None, max_panels: int = 48) -> Figure:
    """Where the blocks lie.

    Of one matrix: how many blocks overlap at each entry; beside it the row intervals (above it the column intervals) in
    order of their first index, and how many components cover each row (column), which bounds the local rank. Of a
    model: one small picture for each structured layer, on one colour scale.

    Args:
        source: A :class:`~gblr_plugin.StructuredMatrix`, :class:`~gblr_plugin.GBLRTensor`, a structured or converted
            layer, or a model that holds some, or a mapping of names to any of the first.
        title: Above the figure; default none.
        max_panels: Most layers of a model to show.

    Returns:
        A matplotlib figure; ``figure.savefig("structure.png")``.

    Raises:
        ConfigError: If nothing in ``source`` has a structure.
    """
    try:
        blocks(source)
    except ConfigError:
        layers = dict(source) if isinstance(source, Mapping) else {}
        if isinstance(source, nn.Module):
            layers = _structured_layers(source)
        if not layers:
            raise
        if len(layers) > 1:
            return _draw_layers(layers, title, max_panels)
        ((name, source),) = layers.items()
        title = title or name
    return _draw_matrix(source, title)


def _draw_matrix(source: Any, title: str | None) -> Figure:
    """One matrix, its intervals along both axes, and how many cover each row and column."""
    shape, live, relative = _summary(source)
    m, n = shape
    rows, cols, sizes = blocks(source)
    rows, cols = (Intervals(on.width.cpu(), on.start.cpu(), on.length) for on in (rows, cols))
    figure, grid, left = _layout(shape, bool(title))
    main = plain_axes(figure, grid[2, 0])
    most = _most(source)
    _picture(main, source, shape, most, 1024)
    for boundary in range(rows.length, m, rows.length):
        main.axhline(boundary, color="white", linewidth=1.2)
    _hide_sides(main)
    main.set_xlabel(f"column of {n}", fontsize=8, color=MUTED)
    main.set_ylabel(f"row of {m}", fontsize=8, color=MUTED)
    for axis in (main.xaxis, main.yaxis):
        axis.set_major_locator(MaxNLocator(5, steps=STEPS, integer=True))
    beside = [plain_axes(figure, place, sharey=main) for place in (grid[2, 1], grid[2, 2])]
    _draw_axis(beside, rows, split_offsets(rows, sizes).cpu(), m, live, upright=True)
    above = [plain_axes(figure, place, sharex=main) for place in (grid[1, 0], grid[0, 0])]
    _draw_axis(above, cols, torch.zeros_like(cols.start), n, live, upright=False)
    main.set_xlim(0, n)
    main.set_ylim(m, 0)

    corner = figure.add_subplot(grid[0:2, 1:3])
    corner.axis("off")
    corner.text(0.06, 1.0, f"{relative:.1%}", fontsize=17, color=INK, va="top", transform=corner.transAxes)
    facts = f"of dense FLOPs\n{m} × {n}, {live} components"
    corner.text(0.06, 0.8, facts, fontsize=8, color=MUTED, va="top", linespacing=1.5, transform=corner.transAxes)
    _color_bar(corner.inset_axes((0.06, 0.17, 0.86, 0.07)), most)
    if title:
        figure.text(left, 1 - 0.3 / figure.get_figheight(), title, fontsize=11, color=INK, va="center")
    return figure


_PANEL, _PROFILE, _GAP = 1.15, 0.55, 0.12  # inches: intervals, counts beside them, and the space between


def _layout(shape: tuple[int, int], titled: bool) -> tuple[Figure, Any, float]:
    """A figure with the grid of a matrix and its two axes, and the left edge of the matrix."""
    # The picture keeps its proportions, up to a limit that leaves thin matrices readable.
    longest = 5.0
    height, width = (max(longest * size / max(shape), longest / 4) for size in shape)
    left, right, bottom, top = 0.72, 0.25, 0.55, 0.62 if titled else 0.3
    beside = _GAP + _PANEL + _GAP + _PROFILE
    total_w, total_h = left + width + beside + right, bottom + height + beside + top
    figure = Figure(figsize=(total_w, total_h), facecolor="white")
    grid = figure.add_gridspec(
        3,
        3,
        width_ratios=[width, _PANEL, _PROFILE],
        height_ratios=[_PROFILE, _PANEL, height],
        left=left / total_w,
        right=1 - right / total_w,
        bottom=bottom / total_h,
        top=1 - top / total_h,
        wspace=3 * _GAP / (width + _PANEL + _PROFILE),
        hspace=3 * _GAP / (height + _PANEL + _PROFILE),
    )
    return figure, grid, left / total_w


def _draw_axis(
    panels: Sequence[Any], intervals: Intervals, offset: Tensor, length: int, live: int, *, upright: bool
) -> None:
    """The intervals along one axis of the matrix, and beside them how many cover each of its indices."""
    lines, counts = panels
    stroke = min(2.2, max(0.35, 72 * _PANEL / max(live, 1) * 0.6))
    segments_of = _lines(intervals, offset, upright)
    lines.add_collection(LineCollection(segments_of, colors=ACCENT, linewidths=stroke, capstyle="butt"))
    covered = _covering(intervals, offset, length).double().numpy()
    edges = torch.arange(length + 1).numpy()
    for style in ({"fill": True, "alpha": 0.22, "lw": 0}, {"linewidth": 0.8}):
        counts.stairs(covered, edges, orientation="horizontal" if upright else "vertical", color=ACCENT, **style)
    for axes in (lines, counts):
        axes.tick_params(labelbottom=False, labelleft=False, length=0)
        _hide_sides(axes)
    top = max(float(covered.max()) if length else 0.0, 1.0)
    small = {"fontsize": 8, "color": MUTED}
    if upright:
        lines.set_xlim(-1, max(live, 1))
        counts.set(xlim=(0, top * 1.05), xticks=[top])
        counts.tick_params(labelbottom=True)
        lines.set_xlabel("row intervals", labelpad=14, **small)
        counts.set_xlabel("per row", labelpad=1, **small)
    else:
        lines.set_ylim(max(live, 1), -1)
        counts.set(ylim=(0, top * 1.05), yticks=[top])
        counts.tick_params(labelleft=True)
        lines.set_ylabel("column\nintervals", labelpad=14, **small)
        counts.set_ylabel("per\ncolumn", labelpad=1, **small)
    (counts.xaxis if upright else counts.yaxis).set_major_formatter(lambda value, _: f"{value:.0f}")


def _hide_sides(axes: Any) -> None:
    for spine in axes.spines.values():
        spine.set_visible(False)


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else "…" + name[len(name) - length + 1 :]


def _columns(count: int) -> int:
    """Panels a line: a number that fills all lines, if there is one, since layers come in periods."""
    wanted = min(6, max(3, math.ceil(math.sqrt(count * 1.2))))
    return min(count, min((3, 4, 5, 6), key=lambda columns: (-count % columns, abs(columns - wanted))))


def _draw_layers(layers: Mapping[str, Any], title: str | None, max_panels: int) -> Figure:
    """One small picture for each layer of a model, on one colour scale."""
    shown = dict(list(layers.items())[:max_panels])
    facts = {name: _summary(layer) for name, layer in shown.items()}
    columns = _columns(len(shown))
    side, gap, text = 1.7, 0.3, 0.5
    longest = max(max(shape) for shape, _, _ in facts.values())

    def size(shape: tuple[int, int]) -> tuple[float, float]:
        # Larger layers look larger, but the smallest is not tiny.
        scale = side * max(1 / longest, 0.45 / max(shape))
        return max(shape[1] * scale, side / 8), max(shape[0] * scale, side / 8)

    sizes = [size(shape) for shape, _, _ in facts.values()]
    lines = [max(height for _, height in sizes[i : i + columns]) for i in range(0, len(sizes), columns)]
    head, foot = (0.55 if title else 0.1), 0.75
    total_w, total_h = columns * (side + gap) + gap, head + sum(line + text + 0.1 for line in lines) + foot
    figure = Figure(figsize=(total_w, total_h), facecolor="white")
    most = max(map(_most, shown.values()))
    for index, (name, layer) in enumerate(shown.items()):
        shape, live, relative = facts[name]
        width, height = sizes[index]
        line, column = divmod(index, columns)
        left = gap + column * (side + gap)
        top = head + sum(tall + text + 0.1 for tall in lines[:line]) + text
        axes = figure.add_axes((left / total_w, 1 - (top + height) / total_h, width / total_w, height / total_h))
        _picture(axes, layer, shape, most, 384)
        axes.axis("off")
        x, y = left / total_w, 1 - (top - 0.06) / total_h
        figure.text(x, y + 0.16 / total_h, _short(name, 22), fontsize=8, color=INK, va="bottom")
        figure.text(x, y, f"{relative:.1%}", fontsize=8, color=ACCENT, va="bottom", weight="bold")
        fact = f"{shape[0]}×{shape[1]}, {live} comp."
        figure.text(x + 0.47 / total_w, y, fact, fontsize=7, color=MUTED, va="bottom")
    if title:
        figure.text(gap / total_w, 1 - 0.3 / total_h, title, fontsize=11, color=INK, va="center")
    _color_bar(figure.add_axes((gap / total_w, 0.3 / total_h, min(2.0, total_w / 3) / total_w, 0.09 / total_h)), most)
    if len(layers) > len(shown):
        more = f"and {len(layers) - len(shown)} more layers"
        figure.text(1 - gap / total_w, 0.3 / total_h, more, fontsize=8, color=MUTED, ha="right")
    return figure
