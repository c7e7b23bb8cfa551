"""Finds local rank-1 blocks in a residual, by power iterations on overlapping tiles of several shapes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..matrix.structure import Intervals
from ..matrix.tiles import TiledAxis
from .spans import Spans, best_spans, cell_sums

__all__ = ["Blocks", "find_blocks"]

POWER_STEPS = 3
TINY = 1e-30
"""Norms below this count as this."""
MAX_CANDIDATES = 4096
"""Bounds the quadratic cost of comparing candidates; what does not fit is found in a later round."""
CONFINE = 3
"""A candidate may grow to this many times its tile before it is compared with the others."""


@dataclass(frozen=True, eq=False)
class Blocks:
    """K rank-1 blocks: row factors (K, m), unit column factors (K, n), and their intervals."""

    u: Tensor
    v: Tensor
    rows: Spans
    cols: Spans


def _normalised(rows: Tensor) -> Tensor:
    scaled: Tensor = rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp(min=TINY)
    return scaled


def _stride(size: int, tile: int) -> int:
    return max(tile, size // 2 // tile * tile)


def _tile_vectors(
    residual: Tensor, height: int, width: int, rows: TiledAxis, cols: TiledAxis
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Leading right vector (T, width), squared singular value, first row and first column (T,) of each tile."""
    down, across = _stride(height, rows.tile), _stride(width, cols.tile)
    tiles = residual.unfold(0, height, down).unfold(1, width, across)
    per_row = tiles.shape[1]
    flat = tiles.reshape(-1, height, width)
    v = flat.gather(1, flat.square().sum(2).argmax(1)[:, None, None].expand(-1, 1, width)).transpose(1, 2)
    for _ in range(POWER_STEPS):
        u = flat @ v
        u = u / torch.linalg.vector_norm(u, dim=1, keepdim=True).clamp(min=TINY)
        v = flat.transpose(1, 2) @ u
    index = torch.arange(len(flat), device=residual.device)
    return v[:, :, 0], v.square().sum((1, 2)), index // per_row * down, index % per_row * across


def _apart(rows: Intervals, cols: Intervals, overlap: float, count: int) -> Tensor:
    """Positions of the candidates, given best first, that do not overlap a better chosen candidate too much.

    Args:
        rows: K row intervals.
        cols: K column intervals.
        overlap: Largest share of the smaller of two candidates that may lie in the other.
        count: Largest number of them.
    """
    on_rows, on_cols = rows.support().float(), cols.support().float()
    inter = (on_rows @ on_rows.T) * (on_cols @ on_cols.T)
    area = inter.diagonal()
    yields = torch.tril(inter > overlap * torch.minimum(area, area[:, None]), -1)
    keep = torch.ones(len(area), dtype=torch.bool, device=area.device)
    while True:  # each pass decides on at least the best undecided candidate
        kept = ~(yields & keep).any(1)
        if bool((kept == keep).all()):
            return keep.nonzero()[:count, 0]
        keep = kept


def find_blocks(
    residual: Tensor,
    rows: TiledAxis,
    cols: TiledAxis,
    *,
    count: int,
    candidates: int,
    min_gain: float,
    shapes: list[tuple[int, int]],
    refine: int,
    overlap: float,
    offset: tuple[int, int],
) -> Blocks:
    """Local rank-1 blocks that gain enough, none of them overlapping a better one by much.

    Args:
        residual: (m, n) matrix in which blocks are sought.
        rows: TiledAxis of the rows.
        cols: TiledAxis of the columns.
        count: Largest number of blocks.
        candidates: Number of tiles, those that gain most, whose blocks are refined and compared.
        min_gain: Squared error that one multiply-add must save.
        shapes: Heights and widths of the tiles, in indices.
        refine: Alternations that choose a block's intervals by maximum sums, near its tile.
        overlap: Largest share of the smaller of two blocks that may lie in the other.
        offset: First row and column of the first tile; varying it between calls shows other tiles.
    """
    m, n = residual.shape
    limit = min(candidates, MAX_CANDIDATES)
    turned = residual.roll((-offset[0], -offset[1]), (0, 1)) if offset != (0, 0) else residual
    vectors, scores, places = [], [], []
    for height, width in shapes:
        height, width = min(height, m), min(width, n)
        v, energy, top, left = _tile_vectors(turned, height, width, rows, cols)
        score = energy - min_gain * (height + width)
        score, best = score.topk(min(len(score), limit))
        scores.append(score)
        dense = turned.new_zeros(len(best), n)
        at = left[best, None] + torch.arange(width, device=residual.device)
        vectors.append(dense.scatter_(1, at, v[best]))
        size = torch.tensor([[height], [width]], device=residual.device).expand(2, len(best))
        places.append(torch.cat([torch.stack([top[best], left[best]]), size]))
    best = torch.cat(scores).topk(min(limit, sum(map(len, scores)))).indices
    v = _normalised(torch.cat(vectors)[best]).roll(offset[1], 1)
    top, left, height_of, width_of = torch.cat(places, 1)[:, best]
    row_spans = Spans(-(-height_of // rows.tile), (top + offset[0]) % m // rows.tile, rows)
    col_spans = Spans(-(-width_of // cols.tile), (left + offset[1]) % n // cols.tile, cols)
    near_rows, near_cols = _widened(row_spans), _widened(col_spans)
    for _ in range(refine):
        image = v @ residual.T
        row_spans, _ = best_spans(cell_sums(image.square(), rows) * near_rows, rows, min_gain)
        u = _normalised(image * row_spans.support())
        image = u @ residual
        col_spans, _ = best_spans(cell_sums(image.square(), cols) * near_cols, cols, min_gain)
        v = _normalised(image * col_spans.support())
    u = (v @ residual.T) * row_spans.support()
    net = u.square().sum(1) - min_gain * (row_spans.widths() + col_spans.widths())
    order = torch.argsort(net, descending=True, stable=True)
    order = order[(net[order] > 0) & (row_spans.cells[order] > 0) & (col_spans.cells[order] > 0)]
    row_spans, col_spans = row_spans.select(order), col_spans.select(order)
    keep = _apart(row_spans.intervals(), col_spans.intervals(), overlap, count)
    return Blocks(u[order[keep]], v[order[keep]], row_spans.select(keep), col_spans.select(keep))


def _widened(spans: Spans) -> Tensor:
    """(K, cells) bool indicator of the neighbourhood in which a candidate may grow."""
    count = spans.grid.cells
    cells = (spans.cells * CONFINE).clamp(max=count)
    return Intervals.of_known(cells, (spans.start - (cells - spans.cells) // 2) % count, count).support()
