"""Where the blocks of structured matrices lie."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from ..errors import ConfigError
from ..matrix.structure import Intervals
from ..monitoring.pictures import POWER, blocks, colours, overlap_map, structure_image
from .style import ACCENT, INK, MUTED, STEPS, house_axes

__all__ = ["structure"]


def _summary(source: Any) -> tuple[tuple[int, int], int, float]:
    """Shape, live components, relative FLOPs."""
    rows, cols, sizes = blocks(source)
    shape = rows.length * len(sizes), cols.length
    return shape, rows.num_components, int((rows.width + cols.width).sum()) / math.prod(shape)


def _structured_parts(model: nn.Module) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    for name, module in model.named_modules():
        try:
            blocks(module)
        except ConfigError:
            continue
        parts[name] = module
    return parts


def _spans(part: Intervals, offset: Tensor) -> tuple[list[tuple[int, float, float]], Tensor]:
    """Segments (place, from, to) of intervals in order of their first index, and how many cover each index."""
    order = torch.argsort((part.start + offset) * (part.length + 1) + part.length - part.width)
    spans = []
    for place, index in enumerate(order.tolist()):
        first, width, base = int(part.start[index]), int(part.width[index]), int(offset[index])
        last = first + width
        spans.append((place, float(base + first), float(base + min(last, part.length))))
        if last > part.length:  # wraps around
            spans.append((place, float(base), float(base + last - part.length)))
    return spans, order


def _covering(part: Intervals, offset: Tensor, length: int) -> Tensor:
    """(length,) number of intervals over each index."""
    steps = torch.zeros(length + 1, dtype=torch.int64)
    end = part.start + part.width
    for first, last in ((part.start, end.clamp(max=part.length)), (0 * end, (end - part.length).clamp(min=0))):
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
    for spine in cax.spines.values():
        spine.set_visible(False)
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
            layer, or a model that holds some.
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
        parts = _structured_parts(source) if isinstance(source, nn.Module) else {}
        if not parts:
            raise
        if len(parts) == 1:
            name, part = next(iter(parts.items()))
            return _one(part, title or name)
        return _many(parts, title, max_panels)
    return _one(source, title)


def _one(source: Any, title: str | None) -> Figure:
    shape, live, relative = _summary(source)
    rows, cols, sizes = blocks(source)
    rows, cols = (Intervals(part.width.cpu(), part.start.cpu(), part.length) for part in (rows, cols))
    offset = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)) * rows.length
    m, n = shape
    # The picture keeps its proportions, up to a limit that leaves thin matrices readable.
    longest = 5.0
    width, height = (max(longest * size / max(m, n), longest / 4) for size in (n, m))
    panel, profile, gap = 1.15, 0.55, 0.12
    margins = {"left": 0.72, "right": 0.25, "bottom": 0.55, "top": 0.62 if title else 0.3}
    total_w = margins["left"] + width + gap + panel + gap + profile + margins["right"]
    total_h = margins["bottom"] + height + gap + panel + gap + profile + margins["top"]
    figure = Figure(figsize=(total_w, total_h), facecolor="white")
    grid = figure.add_gridspec(
        3,
        3,
        width_ratios=[width, panel, profile],
        height_ratios=[profile, panel, height],
        left=margins["left"] / total_w,
        right=1 - margins["right"] / total_w,
        bottom=margins["bottom"] / total_h,
        top=1 - margins["top"] / total_h,
        wspace=3 * gap / (width + panel + profile),
        hspace=3 * gap / (height + panel + profile),
    )
    main = house_axes(figure, grid[2, 0])
    most = _most(source)
    _picture(main, source, shape, most, 1024)
    for boundary in range(rows.length, m, rows.length):
        main.axhline(boundary, color="white", linewidth=1.2)
    for spine in main.spines.values():
        spine.set_visible(False)
    main.set_xlabel(f"column of {n}", fontsize=8, color=MUTED)
    main.set_ylabel(f"row of {m}", fontsize=8, color=MUTED)
    for axis in (main.xaxis, main.yaxis):
        axis.set_major_locator(MaxNLocator(5, steps=STEPS, integer=True))

    stroke = min(2.2, max(0.35, 72 * panel / max(live, 1) * 0.6))
    for along, part, base, length, panel_at, profile_at in (
        ("rows", rows, offset, m, grid[2, 1], grid[2, 2]),
        ("columns", cols, torch.zeros_like(cols.start), n, grid[1, 0], grid[0, 0]),
    ):
        upright = along == "rows"
        share = {"sharey": main} if upright else {"sharex": main}
        spans, _ = _spans(part, base)
        intervals = house_axes(figure, panel_at, **share)
        lines = [[(p, a), (p, b)] if upright else [(a, p), (b, p)] for p, a, b in spans]
        intervals.add_collection(LineCollection(lines, colors=ACCENT, linewidths=stroke, capstyle="butt"))
        covered = _covering(part, base, length).double().numpy()
        edges = torch.arange(length + 1).numpy()
        counts = house_axes(figure, profile_at, **share)
        counts.stairs(
            covered,
            edges,
            orientation="horizontal" if upright else "vertical",
            fill=True,
            color=ACCENT,
            alpha=0.22,
            lw=0,
        )
        counts.stairs(covered, edges, orientation="horizontal" if upright else "vertical", color=ACCENT, linewidth=0.8)
        for axes in (intervals, counts):
            axes.tick_params(labelbottom=False, labelleft=False, length=0)
            for spine in axes.spines.values():
                spine.set_visible(False)
        room = (-1, max(live, 1))
        top = max(float(covered.max()) if length else 0.0, 1.0)
        if upright:
            intervals.set_xlim(*room)
            counts.set_xlim(0, top * 1.05)
            counts.set_xticks([top])
            counts.tick_params(labelbottom=True)
            intervals.set_xlabel("row intervals", fontsize=8, color=MUTED, labelpad=14)
            counts.set_xlabel("per row", fontsize=8, color=MUTED, labelpad=1)
        else:
            intervals.set_ylim(room[1], room[0])
            counts.set_ylim(0, top * 1.05)
            counts.set_yticks([top])
            counts.tick_params(labelleft=True)
            intervals.set_ylabel("column\nintervals", fontsize=8, color=MUTED, labelpad=14)
            counts.set_ylabel("per\ncolumn", fontsize=8, color=MUTED, labelpad=1)
        (counts.xaxis if upright else counts.yaxis).set_major_formatter(lambda value, _: f"{value:.0f}")
    main.set_xlim(0, n)
    main.set_ylim(m, 0)

    corner = figure.add_subplot(grid[0:2, 1:3])
    corner.axis("off")
    corner.text(0.06, 1.0, f"{relative:.1%}", fontsize=17, color=INK, va="top", transform=corner.transAxes)
    facts = f"of dense FLOPs\n{m} × {n}, {live} components"
    corner.text(0.06, 0.8, facts, fontsize=8, color=MUTED, va="top", linespacing=1.5, transform=corner.transAxes)
    _color_bar(corner.inset_axes((0.06, 0.17, 0.86, 0.07)), most)
    if title:
        figure.text(margins["left"] / total_w, 1 - 0.3 / total_h, title, fontsize=11, color=INK, va="center")
    return figure


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else "…" + name[len(name) - length + 1 :]


def _columns(count: int) -> int:
    """Panels a line: a number that fills all lines, if there is one, since layers come in periods."""
    wanted = min(6, max(3, math.ceil(math.sqrt(count * 1.2))))
    return min(count, min((3, 4, 5, 6), key=lambda columns: (-count % columns, abs(columns - wanted))))


def _many(parts: Mapping[str, Any], title: str | None, max_panels: int) -> Figure:
    shown = dict(list(parts.items())[:max_panels])
    facts = {name: _summary(part) for name, part in shown.items()}
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
    most = max(_most(part) for part in shown.values())
    for index, (name, part) in enumerate(shown.items()):
        shape, live, relative = facts[name]
        width, height = sizes[index]
        line, column = divmod(index, columns)
        left = gap + column * (side + gap)
        top = head + sum(tall + text + 0.1 for tall in lines[:line]) + text
        axes = figure.add_axes((left / total_w, 1 - (top + height) / total_h, width / total_w, height / total_h))
        _picture(axes, part, shape, most, 384)
        axes.axis("off")
        x, y = left / total_w, 1 - (top - 0.06) / total_h
        figure.text(x, y + 0.16 / total_h, _short(name, 22), fontsize=8, color=INK, va="bottom")
        figure.text(x, y, f"{relative:.1%}", fontsize=8, color=ACCENT, va="bottom", weight="bold")
        fact = f"{shape[0]}×{shape[1]}, {live} comp."
        figure.text(x + 0.47 / total_w, y, fact, fontsize=7, color=MUTED, va="bottom")
    if title:
        figure.text(gap / total_w, 1 - 0.3 / total_h, title, fontsize=11, color=INK, va="center")
    _color_bar(figure.add_axes((gap / total_w, 0.3 / total_h, min(2.0, total_w / 3) / total_w, 0.09 / total_h)), most)
    if len(parts) > len(shown):
        figure.text(
            1 - gap / total_w,
            0.3 / total_h,
            f"and {len(parts) - len(shown)} more layers",
            fontsize=8,
            color=MUTED,
            ha="right",
        )
    return figure
