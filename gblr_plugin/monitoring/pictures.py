"""Pictures of a learned structure as plain tensors: where the blocks of a matrix lie and how many overlap.

Needs torch alone, so that any logger can be given the result.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..layers import GBLRLayer
from ..matrix.structure import Intervals, multiply_adds
from .snapshot import structured_matrix

__all__ = ["POWER", "blocks", "colours", "overlap_map", "segments", "split_offsets", "structure_image"]

_PAPER = (255, 255, 255)
_EMPTY = (236, 238, 241)  # no block here: a cool grey that the ramp does not contain
_LEVELS = 256
POWER = 0.65
"""Colours go with this power of the number of blocks above one: few blocks differ visibly, many still do."""

_THIN = 16  # least side of a picture in pixels: a very thin matrix is shown less thin than it is

# 3 x 5 pixel digits, one bit a pixel, rows from the top.
_DIGITS = {
    "0": (7, 5, 5, 5, 7),
    "1": (2, 6, 2, 2, 7),
    "2": (7, 1, 7, 4, 7),
    "3": (7, 1, 3, 1, 7),
    "4": (5, 5, 7, 1, 1),
    "5": (7, 4, 7, 1, 7),
    "6": (7, 4, 7, 5, 7),
    "7": (7, 1, 2, 2, 2),
    "8": (7, 5, 7, 5, 7),
    "9": (7, 5, 7, 1, 7),
}
_INK = (70, 74, 84)


def blocks(source: Any) -> tuple[Intervals, Intervals, tuple[int, ...]]:
    """Row intervals, column intervals and split sizes of whatever has a structure, without dead components."""
    if isinstance(source, GBLRLayer):
        rows, cols = source.intervals()
        sizes: tuple[int, ...] = (rows.num_components // source.row_splits,) * source.row_splits
    else:
        matrix = structured_matrix(source)
        if matrix is None:
            raise ConfigError(
                f"picture: a {type(source).__name__} has no structure; allowed are a StructuredMatrix, a structured "
                "layer and a converted layer or weight"
            )
        rows, cols, sizes = matrix.rows, matrix.cols, matrix.split_sizes
    live = multiply_adds(rows.width, cols.width) > 0
    kept = tuple(int(of_split.sum()) for of_split in live.split(sizes))
    return rows.select(live), cols.select(live), kept


def split_offsets(rows: Intervals, sizes: tuple[int, ...]) -> Tensor:
    """(K,) first row of the split that each component belongs to."""
    counts = torch.tensor(sizes, device=rows.start.device)
    return torch.arange(len(sizes), device=counts.device).repeat_interleave(counts) * rows.length


def segments(intervals: Intervals) -> list[tuple[Tensor, Tensor]]:
    """Cyclic intervals as two ordinary ones [a, b) each, the second of which is mostly empty."""
    end = intervals.start + intervals.width
    length = intervals.length
    return [(intervals.start, end.clamp(max=length)), (torch.zeros_like(end), (end - length).clamp(min=0))]


@torch.no_grad()
def overlap_map(matrix: Any) -> Tensor:
    """Number of blocks that cover each entry of a matrix.

    Four corners a block are written to one array of differences, which is then summed along both axes: O(K + mn) time,
    and no K x m x n (or K x m) intermediate.

    Args:
        matrix: An (m, n) :class:`~gblr_plugin.StructuredMatrix`, a structured layer, or a converted layer or weight.

    Returns:
        (m, n) int32 counts, on the CPU.

    Raises:
        ConfigError: If the argument has no structure.
    """
    rows, cols, sizes = blocks(matrix)
    m, n = rows.length * len(sizes), cols.length
    offset = split_offsets(rows, sizes)
    corners = torch.zeros((m + 1) * (n + 1), dtype=torch.int32)
    for top, bottom in segments(rows):
        for left, right in segments(cols):
            for row, row_sign in ((top, 1), (bottom, -1)):
                for col, col_sign in ((left, 1), (right, -1)):
                    at = ((row + offset) * (n + 1) + col).cpu()
                    corners.index_add_(0, at, torch.full((at.numel(),), row_sign * col_sign, dtype=torch.int32))
    grid = corners.view(m + 1, n + 1)
    torch.cumsum(grid, 0, dtype=torch.int32, out=grid)
    torch.cumsum(grid, 1, dtype=torch.int32, out=grid)
    return grid[:m, :n].contiguous()


def _coverage(intervals: Intervals, offset: Tensor, length: int, bins: int) -> Tensor:
    """(K, bins) share of each of ``bins`` equal bins of an axis that the intervals cover."""
    edges = torch.linspace(0, length, bins + 1, dtype=torch.float64, device=intervals.start.device)
    total = torch.zeros(intervals.num_components, bins, dtype=torch.float64, device=edges.device)
    for first, last in segments(intervals):
        low = torch.maximum((first + offset)[:, None].double(), edges[:-1])
        high = torch.minimum((last + offset)[:, None].double(), edges[1:])
        total += (high - low).clamp(min=0)
    return (total * (bins / length)).float()


@functools.lru_cache(maxsize=1)
def _ramp() -> Tensor:
    """(256, 3) uint8 sRGB, evenly spaced in perceived lightness (OKLab): pale aqua, blue, deep violet."""
    t = torch.linspace(0, 1, _LEVELS, dtype=torch.float64)
    lightness = 0.92 - 0.69 * t
    hue = torch.deg2rad(172 + (296 - 172) * t**0.8)
    chroma = 0.06 + 0.085 * torch.sin(math.pi * t) + 0.035 * t
    a, b = chroma * hue.cos(), chroma * hue.sin()
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = torch.stack(
        [
            4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
            -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
            -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
        ],
        dim=1,
    ).clamp(0, 1)
    gamma = torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (gamma * 255).round().to(torch.uint8)


@torch.no_grad()
def colours(counts: Tensor, most: float) -> Tensor:
    """Colour of overlap counts: grey for none, then light to dark as a power of the count above one.

    Args:
        counts: (...,) numbers >= 0; fractions (averages over a pixel) fade into the grey.
        most: Count that has the darkest colour.

    Returns:
        (..., 3) uint8 sRGB.
    """
    values = counts.to(torch.float32)
    # A picture with one or two levels keeps to the light half: two blocks look like two, not like the most there can
    # be.
    share = ((values.clamp(min=1) - 1) / (max(most, 4.0) - 1)).clamp(max=1) ** POWER
    share = 0.08 + 0.92 * share
    ramp = _ramp().to(device=values.device, dtype=torch.float32)
    colour = ramp[(share * (_LEVELS - 1)).round().long()]
    blend = values.clamp(0, 1)[..., None]
    empty = torch.tensor(_EMPTY, dtype=torch.float32, device=values.device)
    return (empty + (colour - empty) * blend).round().to(torch.uint8)


def _write(image: Tensor, text: str, top: int, left: int, scale: int) -> None:
    """Draw digits into an (H, W, 3) image."""
    ink = torch.tensor(_INK, dtype=torch.uint8)
    for digit in text:
        for y, bits in enumerate(_DIGITS[digit]):
            for x in range(3):
                if bits >> (2 - x) & 1:
                    image[top + y * scale : top + (y + 1) * scale, left + x * scale : left + (x + 1) * scale] = ink
        left += 4 * scale


def _with_legend(image: Tensor, most: int) -> Tensor:
    """The image with a scale from one block (bottom) to ``most`` (top) at its right."""
    height = image.shape[0]
    scale = 1 if height < 96 else 2
    bar, gap, label = 4 * scale, 4 * scale, 4 * scale * len(str(most))
    wide = torch.tensor(_PAPER, dtype=torch.uint8).repeat(height, image.shape[1] + 3 * gap + bar + label, 1)
    wide[:, : image.shape[1]] = image
    left = image.shape[1] + gap
    # Even steps in colour: the labels at both ends say what they mean.
    counts = 1 + torch.linspace(1, 0, height) ** (1 / POWER) * (most - 1)
    wide[:, left : left + bar] = colours(counts, most)[:, None]
    _write(wide, str(most), scale, left + bar + gap, scale)
    if most > 1 and height >= 12 * scale:
        _write(wide, "1", height - 6 * scale, left + bar + gap, scale)
    return wide


@torch.no_grad()
def structure_image(matrix: Any, max_size: int = 512, *, most: int | None = None, legend: bool = True) -> Tensor:
    """Picture of a structure: one colour per number of overlapping blocks, grey where there is none.

    A small matrix is enlarged by whole factors, so that its entries stay crisp; a large one is reduced by exact area
    averages, so that thin blocks fade instead of vanishing. Nothing of size m x n is made for a large matrix.

    Args:
        matrix: As in :func:`overlap_map`.
        max_size: Longest side of the picture of the matrix in pixels, at least 16.
        most: Count with the darkest colour; default the largest in this picture. Give one to compare pictures.
        legend: Add the scale at the right (some 60 pixels) to pictures at least 32 pixels high.

    Returns:
        (3, H, W) uint8 sRGB, on the CPU.

    Raises:
        ConfigError: If the argument has no structure or ``max_size`` is under 16.
    """
    if max_size < 16:
        raise ConfigError(f"picture: max_size must be at least 16 pixels, got {max_size}")
    rows, cols, sizes = blocks(matrix)
    m, n = rows.length * len(sizes), cols.length
    factor = max_size // max(m, n)
    if factor >= 1:
        counts = overlap_map(matrix).float()
        for axis, size in enumerate((m, n)):
            counts = counts.repeat_interleave(max(factor, -(-_THIN // size)), axis)
    else:
        height, width = (max(round(size * max_size / max(m, n)), _THIN) for size in (m, n))
        zero = torch.zeros_like(cols.start)
        row_share = _coverage(rows, split_offsets(rows, sizes), m, height)
        counts = (row_share.T @ _coverage(cols, zero, n, width)).cpu()
        rounded = counts.round()
        counts = torch.where((counts - rounded).abs() < 1e-3, rounded, counts)
    darkest = most if most is not None else max(math.ceil(float(counts.max()) if counts.numel() else 0.0), 1)
    image = colours(counts, darkest)
    if legend and image.shape[0] >= 2 * _THIN:
        image = _with_legend(image, darkest)
    return image.permute(2, 0, 1).contiguous()
