from __future__ import annotations

import pytest
import torch
from torch import nn

from gblr_plugin.families import get
from gblr_plugin.families.layers import trainable
from gblr_plugin.layers import GBLRConv2d, GBLRLinear
from gblr_plugin.matrix.structure import Intervals, StructuredMatrix
from gblr_plugin.monitoring.statistics import layer_statistics, total_statistics


def matrix(row_widths, col_widths, m, n, splits=1):
    num = len(row_widths)
    start = torch.arange(num) % n
    rows = Intervals(torch.tensor(row_widths), start % (m // splits), m // splits)
    cols = Intervals(torch.tensor(col_widths), start, n)
    return StructuredMatrix.from_factors(
        torch.ones(num, m // splits), torch.ones(num, n), rows, cols, (num // splits,) * splits
    )


def test_statistics_of_layers_and_of_all():
    # The third component has no rows: it costs nothing and is no live one.
    linear = GBLRLinear(matrix([2, 4, 0], [5, 3, 7], 8, 10))
    conv = GBLRConv2d(matrix([3, 1], [9, 18], 6, 18, splits=2), nn.Conv2d(2, 6, 3))
    parts = layer_statistics({"fc": linear, "conv": conv})
    fc = parts["fc"]
    assert (fc.relative_flops, fc.live_components, fc.dense) == (14 / 80, 2, 80)
    assert (fc.mean_row_width, fc.mean_column_width) == (3 / 8, 4 / 10)
    assert parts["conv"].relative_flops == pytest.approx(conv.relative_flops)
    assert parts["conv"].mean_row_width == pytest.approx(2 / 3)  # rows of a split are its own axis
    total = total_statistics(parts)
    assert total.relative_flops == pytest.approx((14 + 31) / (80 + 108))
    assert total.live_components == 4
    assert total.mean_row_width == pytest.approx((2 * 3 / 8 + 2 * 2 / 3) / 4)


def test_a_dead_layer_has_zero_widths():
    part = layer_statistics({"fc": GBLRLinear(matrix([0, 0], [4, 4], 8, 8))})["fc"]
    assert (part.relative_flops, part.live_components, part.mean_row_width, part.mean_column_width) == (
        0.0,
        0,
        0.0,
        0.0,
    )


def test_layers_without_components_count_by_their_cost():
    layer = trainable(get("monarch"), nn.Linear(16, 16), 0.5)
    each = layer_statistics({"fixed": layer, "fc": GBLRLinear(matrix([2, 4], [5, 3], 8, 10))})
    assert list(each) == ["fixed", "fc"]
    assert each["fixed"].items() == {"relative_flops": layer.relative_flops}
    total = total_statistics(each)
    assert total.relative_flops == pytest.approx((layer.multiply_adds + 14) / (256 + 80))
    assert total.items().keys() == each["fc"].items().keys()
    assert total_statistics({"fixed": each["fixed"]}).items() == {"relative_flops": layer.relative_flops}


def test_nothing_to_count():
    assert layer_statistics({}) == {}
    assert total_statistics({}).relative_flops == 0.0
