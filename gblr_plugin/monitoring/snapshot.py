"""Snapshots: the structure of layers at one step, as the records that logs hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from ..layers import GBLRLayer
from ..matrix.structure import Intervals, StructuredMatrix, multiply_adds
from .records import LayerRecord, LayerShape, StepRecord

__all__ = ["layer_record", "structured_matrix", "take_snapshot"]


def take_snapshot(
    layers: Mapping[str, Any],
    *,
    budget: float | Mapping[str, float | None] | None = None,
    sigma: float | None = None,
    lambdas: Mapping[str, float] | None = None,
    loss: float | None = None,
) -> tuple[StepRecord, list[LayerRecord]]:
    """The summary of all layers and the structure of each, at present.

    Args:
        layers: Layers by name: trainable :class:`~gblr_plugin.layers.GBLRLayer`, frozen
            :class:`~gblr_plugin.tensor.gblr_tensor.GBLRTensor` or a module with such a weight, or
            :class:`~gblr_plugin.matrix.structure.StructuredMatrix`.
        budget: Relative FLOPs asked for, of every layer or by name.
        sigma: Smoothness of the masks; default that of the trainable layers (the exact boxcar for frozen ones).
        lambdas: Present lambda by layer name.
        loss: Task loss.

    Raises:
        ConfigError: If a layer is of another kind.
    """
    records = [layer_record(name, layer) for name, layer in layers.items()]
    costs = [
        multiply_adds(torch.from_numpy(record.row_width), torch.from_numpy(record.col_width)) for record in records
    ]
    if sigma is None:
        smooth = [layer.sigma for layer in layers.values() if isinstance(layer, GBLRLayer) and layer.sigma is not None]
        sigma = min(smooth, default=math.inf)
    budgets = budget if isinstance(budget, Mapping) else dict.fromkeys(layers, budget)
    step = StepRecord(
        layers=tuple(record.shape for record in records),
        stored=np.array([int(cost.sum()) for cost in costs], dtype=np.int64),
        live=np.array([int(cost.count_nonzero()) for cost in costs], dtype=np.int64),
        budget=np.array([_number(budgets.get(name)) for name in layers], dtype=np.float64),
        lambdas=np.array([_number((lambdas or {}).get(name)) for name in layers], dtype=np.float64),
        sigma=float(sigma),
        loss=_number(loss),
    )
    return step, records


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


@torch.no_grad()
def layer_record(name: str, layer: Any) -> LayerRecord:
    """The structure of one layer, of any kind that :func:`take_snapshot` takes."""
    if isinstance(layer, GBLRLayer):
        # All K components, dead ones too: a component keeps its number while it is watched.
        rows, cols = layer.intervals()
        sizes = (layer.U.shape[0] // layer.row_splits,) * layer.row_splits
        energy = _interval_energy(layer.U.detach(), rows) * _interval_energy(layer.V.detach(), cols)
        shape = layer.matrix_shape
    else:
        matrix = structured_matrix(layer)
        if matrix is None:
            raise ConfigError(
                f"write_structure: layer {name!r} is a {type(layer).__name__}; allowed are GBLR layers, GBLRTensor "
                "(or a module with one as its weight) and StructuredMatrix"
            )
        rows, cols, sizes, shape = matrix.rows, matrix.cols, matrix.split_sizes, matrix.shape
        energy = _energy(matrix.u) * _energy(matrix.v)
    row_width, row_start, col_width, col_start = (
        values.cpu().numpy() for values in (rows.width, rows.start, cols.width, cols.start)
    )
    layer_shape = LayerShape(name, shape[0], shape[1], tuple(sizes))
    return LayerRecord(layer_shape, row_width, row_start, col_width, col_start, energy.cpu().numpy())


def structured_matrix(source: Any) -> StructuredMatrix | None:
    """The structure of a frozen weight, of a module that has one as its weight, or of a matrix; else ``None``."""
    if isinstance(source, StructuredMatrix):
        return source
    for candidate in (source, getattr(source, "weight", None)):
        # By its method, not its type: importing the tensor would import torchao.
        to_structured = getattr(candidate, "to_structured", None)
        if callable(to_structured):
            matrix: StructuredMatrix = to_structured()
            return matrix
    return None


def _interval_energy(factors: Tensor, intervals: Intervals) -> Tensor:
    """(K,) float64 sum of squares of each factor inside its cyclic interval, from running sums: no (K, N) mask."""
    running = factors.to(torch.float32).square().cumsum(dim=1)
    last = intervals.start + intervals.width

    def until(index: Tensor) -> Tensor:
        sums = running.gather(1, (index - 1).clamp(min=0)[:, None])[:, 0]
        return torch.where(index > 0, sums, sums.new_zeros(()))

    beyond = until((last - intervals.length).clamp(min=0))
    energy = until(last.clamp(max=intervals.length)) - until(intervals.start) + beyond
    return energy.clamp(min=0).to(torch.float64)


def _energy(factors: Tensor) -> Tensor:
    """(K,) float64 sum of squares of factors that are zero outside their intervals."""
    return factors.to(torch.float32).square().sum(dim=1).to(torch.float64)
