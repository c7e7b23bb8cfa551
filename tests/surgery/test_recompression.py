"""Crowded boxes become dense blocks: the same matrix for fewer multiply-adds, from conversion to files and programs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import gblr_plugin as gblr
from gblr_plugin.matrix.structure import Intervals, StructuredMatrix
from gblr_plugin.surgery.conversion import frozen_like
from gblr_plugin.surgery.recompression import recompressed


def crowded(h: int, w: int, count: int, *, splits: int = 1, nested: bool = False, at: tuple[int, int] = (0, 0)):
    """Each split: ``count`` components in one h x w box of a 40 x 48 matrix, and 6 elsewhere."""
    torch.manual_seed(h + w + count)
    rows: list[tuple[int, int]] = []
    cols: list[tuple[int, int]] = []
    for _ in range(splits):
        for k in range(count):
            less = k % 3 if nested else 0  # the first fills the box
            rows.append((h - less, (at[0] + less) % 40))
            cols.append((w - less, at[1]))
        rows += [(9, 5 * k) for k in range(6)]
        cols += [(7, (11 * k + 3) % 48) for k in range(6)]
    ends = [torch.tensor(part) for part in (rows, cols)]
    num = len(rows)
    return StructuredMatrix.from_factors(
        torch.randn(num, 40, dtype=torch.float64),
        torch.randn(num, 48, dtype=torch.float64),
        Intervals(ends[0][:, 0], ends[0][:, 1], 40),
        Intervals(ends[1][:, 0], ends[1][:, 1], 48),
        (count + 6,) * splits,
    )


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    ("h", "w", "at"), [(8, 8, (3, 5)), (8, 12, (36, 45)), (12, 8, (30, 44)), (40, 6, (0, 46)), (5, 48, (38, 0))]
)
def test_the_matrix_stays_and_the_cost_falls(h: int, w: int, at: tuple[int, int], splits: int, nested: bool) -> None:
    before = crowded(h, w, 14, splits=splits, nested=nested, at=at)
    after = recompressed(before)
    torch.testing.assert_close(after.to_dense(), before.to_dense(), rtol=1e-13, atol=1e-13)
    own = int(before.component_multiply_adds[:14].sum())
    outside = int(before.component_multiply_adds.sum()) - splits * own
    assert int(after.component_multiply_adds.sum()) <= outside + splits * (h * w + min(h, w))
    assert after.stored < before.stored
    assert after.row_splits == splits
    assert recompressed(after) is after


def test_what_is_not_crowded_stays_itself() -> None:
    few = crowded(8, 12, 4)  # 80 multiply-adds in a box of 96
    between = crowded(8, 8, 7)  # 112 in a box of 64, but fewer components than rows of the box
    for matrix in (few, between, StructuredMatrix.from_factors(torch.randn(3, 40), torch.randn(3, 48))):
        assert recompressed(matrix) is matrix


def test_dead_components_and_several_boxes() -> None:
    parts = [crowded(8, 8, 12, at=(20 * k, 20 * k)) for k in range(2)]
    dead = (
        Intervals(torch.tensor([0, 4]), torch.tensor([0, 0]), 40),
        Intervals(torch.tensor([4, 0]), torch.tensor([0, 0]), 48),
    )
    both = StructuredMatrix(
        torch.cat([*(part.u for part in parts), torch.zeros(2, 40, dtype=torch.float64)]),
        torch.cat([*(part.v for part in parts), torch.zeros(2, 48, dtype=torch.float64)]),
        *(
            Intervals(
                torch.cat([getattr(part, axis).width for part in parts] + [extra.width]),
                torch.cat([getattr(part, axis).start for part in parts] + [extra.start]),
                extra.length,
            )
            for axis, extra in zip(("rows", "cols"), dead, strict=True)
        ),
        (38,),
    )
    after = recompressed(both)
    torch.testing.assert_close(after.to_dense(), both.to_dense(), rtol=1e-13, atol=1e-13)
    assert after.num_components == 12 + 16
    assert int(after.component_multiply_adds.sum()) == 12 * 16 + 2 * (64 + 8)


def test_from_conversion_to_files_and_programs(tmp_path: Path) -> None:
    matrix = crowded(8, 8, 12, at=(36, 45)).to(torch.float32)
    dense = nn.Linear(48, 40)
    model = nn.Sequential(frozen_like(dense, matrix))
    weight = model[0].weight
    assert weight.stored == 6 * 16 + 64 + 8
    torch.testing.assert_close(weight.to_dense(), matrix.to_dense(), rtol=1e-5, atol=1e-5)
    x = torch.randn(3, 48)
    torch.testing.assert_close(model(x), x @ matrix.to_dense().T + dense.bias, rtol=1e-4, atol=1e-4)
    gblr.save(model, tmp_path / "model.safetensors")
    again = gblr.load(tmp_path / "model.safetensors", nn.Sequential(nn.Linear(48, 40)))
    assert torch.equal(again(x), model(x))
    program = gblr.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4)
