"""Figures for notebooks and papers: a learned structure, its way there, and accuracy against cost. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

try:
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import MaxNLocator, PercentFormatter
    from matplotlib.transforms import ScaledTranslation
except ImportError as error:
    raise ImportError("gblr_plugin.plot needs matplotlib: pip install 'gblr-plugin[plot]'") from error

import torch
from torch import Tensor, nn

from .errors import ConfigError
from .structure import Intervals
from .tensorboard.pictures import POWER, blocks, colours, overlap_map, structure_image

__all__ = ["curves", "pareto", "structure"]

_INK, _MUTED, _HAIR = "#22252b", "#7a7f89", "#d5d8dd"
_ACCENT = "#2b4c9b"
_STEPS = [1, 2, 2.5, 5, 10]
_SERIES = (_ACCENT, "#d9772b", "#3c8f74", "#8c5aa8", "#b5473c", "#7a7f89")


def _axes(figure: Figure, *place: Any, **options: Any) -> Any:
    """Axes in the house style: few lines, small grey ticks."""
    axes = figure.add_subplot(*place, **options)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_HAIR)
    axes.tick_params(colors=_MUTED, labelsize=8, length=3, width=0.6)
    return axes


def _title(axes: Any, text: str, aside: str = "") -> None:
    axes.set_title(text, loc="left", fontsize=9, color=_INK, pad=6)
    if aside:
        axes.set_title(aside, loc="right", fontsize=8, color=_MUTED, pad=6)


# -- structure ---------------------------------------------------------------------------------------------------------


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
    cax.tick_params(labelsize=8, length=0, colors=_MUTED, pad=3)
    for spine in cax.spines.values():
        spine.set_visible(False)
    cax.set_title("overlapping blocks", loc="left", fontsize=8, color=_MUTED, pad=4)


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
    main = _axes(figure, grid[2, 0])
    most = _most(source)
    _picture(main, source, shape, most, 1024)
    for boundary in range(rows.length, m, rows.length):
        main.axhline(boundary, color="white", linewidth=1.2)
    for spine in main.spines.values():
        spine.set_visible(False)
    main.set_xlabel(f"column of {n}", fontsize=8, color=_MUTED)
    main.set_ylabel(f"row of {m}", fontsize=8, color=_MUTED)
    for axis in (main.xaxis, main.yaxis):
        axis.set_major_locator(MaxNLocator(5, steps=_STEPS, integer=True))

    stroke = min(2.2, max(0.35, 72 * panel / max(live, 1) * 0.6))
    for along, part, base, length, panel_at, profile_at in (
        ("rows", rows, offset, m, grid[2, 1], grid[2, 2]),
        ("columns", cols, torch.zeros_like(cols.start), n, grid[1, 0], grid[0, 0]),
    ):
        upright = along == "rows"
        share = {"sharey": main} if upright else {"sharex": main}
        spans, _ = _spans(part, base)
        intervals = _axes(figure, panel_at, **share)
        lines = [[(p, a), (p, b)] if upright else [(a, p), (b, p)] for p, a, b in spans]
        intervals.add_collection(LineCollection(lines, colors=_ACCENT, linewidths=stroke, capstyle="butt"))
        covered = _covering(part, base, length).double().numpy()
        edges = torch.arange(length + 1).numpy()
        counts = _axes(figure, profile_at, **share)
        counts.stairs(
            covered,
            edges,
            orientation="horizontal" if upright else "vertical",
            fill=True,
            color=_ACCENT,
            alpha=0.22,
            lw=0,
        )
        counts.stairs(covered, edges, orientation="horizontal" if upright else "vertical", color=_ACCENT, linewidth=0.8)
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
            intervals.set_xlabel("row intervals", fontsize=8, color=_MUTED, labelpad=14)
            counts.set_xlabel("per row", fontsize=8, color=_MUTED, labelpad=1)
        else:
            intervals.set_ylim(room[1], room[0])
            counts.set_ylim(0, top * 1.05)
            counts.set_yticks([top])
            counts.tick_params(labelleft=True)
            intervals.set_ylabel("column\nintervals", fontsize=8, color=_MUTED, labelpad=14)
            counts.set_ylabel("per\ncolumn", fontsize=8, color=_MUTED, labelpad=1)
        (counts.xaxis if upright else counts.yaxis).set_major_formatter(lambda value, _: f"{value:.0f}")
    main.set_xlim(0, n)
    main.set_ylim(m, 0)

    corner = figure.add_subplot(grid[0:2, 1:3])
    corner.axis("off")
    corner.text(0.06, 1.0, f"{relative:.1%}", fontsize=17, color=_INK, va="top", transform=corner.transAxes)
    facts = f"of dense FLOPs\n{m} × {n}, {live} components"
    corner.text(0.06, 0.8, facts, fontsize=8, color=_MUTED, va="top", linespacing=1.5, transform=corner.transAxes)
    _color_bar(corner.inset_axes((0.06, 0.17, 0.86, 0.07)), most)
    if title:
        figure.text(margins["left"] / total_w, 1 - 0.3 / total_h, title, fontsize=11, color=_INK, va="center")
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
        figure.text(x, y + 0.16 / total_h, _short(name, 22), fontsize=8, color=_INK, va="bottom")
        figure.text(x, y, f"{relative:.1%}", fontsize=8, color=_ACCENT, va="bottom", weight="bold")
        fact = f"{shape[0]}×{shape[1]}, {live} comp."
        figure.text(x + 0.47 / total_w, y, fact, fontsize=7, color=_MUTED, va="bottom")
    if title:
        figure.text(gap / total_w, 1 - 0.3 / total_h, title, fontsize=11, color=_INK, va="center")
    _color_bar(figure.add_axes((gap / total_w, 0.3 / total_h, min(2.0, total_w / 3) / total_w, 0.09 / total_h)), most)
    if len(parts) > len(shown):
        figure.text(
            1 - gap / total_w,
            0.3 / total_h,
            f"and {len(parts) - len(shown)} more layers",
            fontsize=8,
            color=_MUTED,
            ha="right",
        )
    return figure


# -- curves ------------------------------------------------------------------------------------------------------------

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


def _room(values: Sequence[float]) -> tuple[float, float]:
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
    known = {name for _, names in _CURVES for name in names} | {"frozen"}
    panels: list[tuple[str, Mapping[str, str]]] = [
        (label, {name: short for name, short in names.items() if history.get(name)}) for label, names in _CURVES
    ]
    panels += [(name, {name: ""}) for name in history if name not in known and len(history[name])]
    panels = [(label, names) for label, names in panels if names]
    columns = min(len(panels), 3)
    lines = math.ceil(len(panels) / columns)
    size = 3.3 * columns, 2.2 * lines + (0.4 if title else 0.1)
    figure = Figure(figsize=size, facecolor="white", layout="constrained")
    frozen = [step for step, value in zip(*_points(history.get("frozen", ())), strict=True) if value]
    end = max(max(_points(values)[0], default=0.0) for values in history.values())
    for index, (label, names) in enumerate(panels):
        axes = _axes(figure, lines, columns, index + 1)
        labels: list[tuple[str, tuple[float, float], str]] = []
        for color, (name, short) in zip(_SERIES, names.items(), strict=False):
            steps, values = _points(history[name])
            axes.plot(steps, values, color=color, linewidth=1.6, solid_capstyle="round")
            if short:
                labels.append((short, (steps[-1], values[-1]), color))
        _title(axes, label)
        axes.set_ylim(*_room([value for name in names for value in _points(history[name])[1]]))
        axes.set_xlim(0, end or 1)
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=_STEPS, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=_STEPS, integer=label == "live components"))
        if any(name in _SHARES for name in names):
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        if frozen:
            axes.axvline(frozen[0], color=_HAIR, linewidth=1, zorder=0)
        if index == 0 and frozen:
            axes.annotate(
                "frozen",
                (frozen[0], 1),
                (3, -2),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                fontsize=7,
                color=_MUTED,
                va="top",
            )
        if "relative_flops" in names and budget is not None:
            axes.axhline(budget, color=_SERIES[1], linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(
                f"budget {budget:.0%}", (0, budget), (4, 3), textcoords="offset points", fontsize=7, color=_SERIES[1]
            )
        if labels:
            figure.draw_without_rendering()
            _label_ends(axes, labels)
        if index >= len(panels) - columns:
            axes.set_xlabel("step", fontsize=8, color=_MUTED)
    if title:
        figure.suptitle(title, x=0.02, ha="left", fontsize=11, color=_INK)
    return figure


# -- accuracy against cost ---------------------------------------------------------------------------------------------


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
    axes = _axes(figure, 1, 1, 1)
    axes.grid(axis="y", color=_HAIR, linewidth=0.5, alpha=0.7)
    axes.set_axisbelow(True)
    dense = points.pop("dense", None)
    if dense is not None:
        level = sum(point[1] for point in dense) / len(dense)
        axes.axhspan(min(p[2] for p in dense), max(p[3] for p in dense), color=_MUTED, alpha=0.1, linewidth=0)
        axes.axhline(level, color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"dense {level:.4g}",
            (0, level),
            (5, 3),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            fontsize=8,
            color=_MUTED,
        )
    labels: list[tuple[str, tuple[float, float], str]] = []
    for index, (name, found) in enumerate(points.items()):
        color = _SERIES[index % len(_SERIES)]
        found.sort()
        cost, average, low, high = (list(part) for part in zip(*found, strict=True))
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
    _label_ends(axes, labels)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=_STEPS))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
    axes.set_xlabel("relative FLOPs of the compressed layers", fontsize=8, color=_MUTED)
    _title(axes, metric, "higher is better" if higher else "lower is better")
    if title:
        figure.suptitle(title, x=0.02, ha="left", fontsize=11, color=_INK)
    return figure


def _label_ends(axes: Any, labels: Sequence[tuple[str, tuple[float, float], str]]) -> None:
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
