"""Numbers to watch while structures are learned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..layers import GBLRLayer, StructuredLayer
from ..matrix.structure import multiply_adds

__all__ = ["Statistics", "layer_statistics", "total_statistics"]


@dataclass(frozen=True)
class Statistics:
    """Of one layer, or of several together.

    Args:
        relative_flops: Multiply-adds over those of the dense product.
        live_components: Components with two non-zero widths.
        mean_row_width: Mean row width of the live components, as a fraction of the axis; 0 if none is live.
        mean_column_width: Likewise of the columns.
        dense: Multiply-adds of the dense product.
        has_components: Whether there are components at all; layers of other families than GBLR have none.
    """

    relative_flops: float
    live_components: int
    mean_row_width: float
    mean_column_width: float
    dense: int
    has_components: bool = True

    def items(self) -> dict[str, float]:
        """What is logged, by name."""
        if not self.has_components:
            return {"relative_flops": self.relative_flops}
        return {
            "relative_flops": self.relative_flops,
            "live_components": float(self.live_components),
            "mean_row_width": self.mean_row_width,
            "mean_column_width": self.mean_column_width,
        }


@torch.no_grad()
def layer_statistics(layers: Mapping[str, StructuredLayer]) -> dict[str, Statistics]:
    """Statistics of each layer at present, with one transfer from the device for the intervals of all layers."""
    gblr = {name: layer for name, layer in layers.items() if isinstance(layer, GBLRLayer)}
    measured = _interval_statistics(gblr) if gblr else {}
    for name, layer in layers.items():
        if name not in gblr:
            measured[name] = Statistics(
                layer.relative_flops, 0, 0.0, 0.0, math.prod(layer.matrix_shape), has_components=False
            )
    return {name: measured[name] for name in layers}


def _interval_statistics(layers: Mapping[str, GBLRLayer]) -> dict[str, Statistics]:
    sums: list[Tensor] = []
    for layer in layers.values():
        rows, cols = layer.intervals()
        cost = multiply_adds(rows.width, cols.width)
        live = cost > 0
        sums.append(torch.stack([cost.sum(), live.sum(), (rows.width * live).sum(), (cols.width * live).sum()]))
    result = {}
    for (name, layer), (cost, live, row, col) in zip(layers.items(), torch.stack(sums).tolist(), strict=True):
        m, n = layer.axis_lengths
        dense = math.prod(layer.matrix_shape)
        result[name] = Statistics(
            1.0 if layer.trains_dense_weight else cost / dense,
            live,
            row / max(live * m, 1),
            col / max(live * n, 1),
            dense,
        )
    return result


def total_statistics(layers: Mapping[str, Statistics]) -> Statistics:
    """All layers together: costs weighted by dense multiply-adds, widths by live components."""
    dense = sum(layer.dense for layer in layers.values())
    live = sum(layer.live_components for layer in layers.values())
    return Statistics(
        sum(layer.relative_flops * layer.dense for layer in layers.values()) / max(dense, 1),
        live,
        sum(layer.mean_row_width * layer.live_components for layer in layers.values()) / max(live, 1),
        sum(layer.mean_column_width * layer.live_components for layer in layers.values()) / max(live, 1),
        dense,
        has_components=any(layer.has_components for layer in layers.values()),
    )
