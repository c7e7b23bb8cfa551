"""Blocks that stand out of a residual are found where they are."""

from __future__ import annotations

import torch

from gblr_plugin.decomposition.search import find_blocks
from gblr_plugin.matrix.tiles import TiledAxis


def test_planted_blocks_are_found_at_their_place() -> None:
    g = torch.Generator().manual_seed(0)
    residual = 0.1 * torch.randn(64, 80, generator=g)
    planted = [(5, 8, 30, 9), (40, 12, 74, 10)]  # the second wraps around the columns
    for top, height, left, width in planted:
        u, v = 2 + torch.rand(height, generator=g), 2 + torch.rand(width, generator=g)
        residual[top : top + height, (left + torch.arange(width)) % 80] += torch.outer(u, v)
    found = find_blocks(
        residual,
        TiledAxis(64, 1),
        TiledAxis(80, 1),
        count=2,
        candidates=6,
        min_gain=0.1,
        shapes=[(8, 8)],
        refine=3,
        overlap=0.2,
        offset=(3, 5),
    )
    rows, cols = found.rows.intervals(), found.cols.intervals()
    places = sorted(
        zip(rows.start.tolist(), rows.width.tolist(), cols.start.tolist(), cols.width.tolist(), strict=True)
    )
    assert places == planted


def test_nothing_pays_in_silence() -> None:
    found = find_blocks(
        torch.zeros(16, 16),
        TiledAxis(16, 1),
        TiledAxis(16, 1),
        count=4,
        candidates=12,
        min_gain=0.1,
        shapes=[(4, 4)],
        refine=1,
        overlap=0.5,
        offset=(0, 0),
    )
    assert len(found.u) == 0
