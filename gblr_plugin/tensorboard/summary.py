"""Writes the structure of layers into TensorBoard logs, for the GBLR tab."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2
from torch import Tensor

from ..errors import ConfigError
from ..layers import GBLRLayer
from ..matrix.structure import Intervals, StructuredMatrix, multiply_adds
from .records import (
    PLUGIN_NAME,
    STRUCTURE_TAG,
    SUMMARY_TAG,
    LayerRecord,
    LayerShape,
    StepRecord,
    encode_layer,
    encode_step,
)

__all__ = ["structure_summary", "write_structure"]


def write_structure(
    writer: Any,
    layers: Mapping[str, Any],
    step: int,
    *,
    budget: float | Mapping[str, float | None] | None = None,
    sigma: float | None = None,
    lambdas: Mapping[str, float] | None = None,
    loss: float | None = None,
) -> None:
    """Log the present structure of layers for TensorBoard's GBLR tab.

    A snapshot of a GPT-2 small model (36 layers, 768 components each) is about 0.2 MB.

    Args:
        writer: ``torch.utils.tensorboard.SummaryWriter``, Lightning's ``TensorBoardLogger``, or a writer of event files
            that has ``add_summary`` or ``add_event``.
        layers: Layers by name: trainable :class:`~gblr_plugin.layers.GBLRLayer`, frozen
            :class:`~gblr_plugin.tensor.gblr_tensor.GBLRTensor` or a module with such a weight, or
            :class:`~gblr_plugin.matrix.structure.StructuredMatrix`.
        step: Step of the snapshot, at least 0.
        budget: Relative FLOPs asked for, of every layer or by name.
        sigma: Smoothness of the masks; default that of the trainable layers (the exact boxcar for frozen ones).
        lambdas: Present shrinkage by layer name.
        loss: Task loss.

    Raises:
        ConfigError: If the writer or a layer is of another kind, or the step is negative.
    """
    if step < 0:
        raise ConfigError(f"write_structure: step must be at least 0, got {step}")
    summary = structure_summary(layers, budget=budget, sigma=sigma, lambdas=lambdas, loss=loss)
    _add_summary(writer, summary, step)


def structure_summary(
    layers: Mapping[str, Any],
    *,
    budget: float | Mapping[str, float | None] | None = None,
    sigma: float | None = None,
    lambdas: Mapping[str, float] | None = None,
    loss: float | None = None,
) -> summary_pb2.Summary:
    """The protocol buffer that :func:`write_structure` logs; arguments as there."""
    records = [_layer_record(name, layer) for name, layer in layers.items()]
    if sigma is None:
        sigma = _sigma_of(layers)
    budgets = budget if isinstance(budget, Mapping) else dict.fromkeys(layers, budget)
    step = StepRecord(
        layers=tuple(record.shape for record in records),
        stored=np.array([_costs(record).sum() for record in records], dtype=np.int64),
        live=np.array([np.count_nonzero(_costs(record)) for record in records], dtype=np.int64),
        budget=np.array([_number(budgets.get(name)) for name in layers], dtype=np.float64),
        lambdas=np.array([_number((lambdas or {}).get(name)) for name in layers], dtype=np.float64),
        sigma=_number(sigma),
        loss=_number(loss),
    )
    return summary_pb2.Summary(
        value=[
            _value(SUMMARY_TAG, summary_pb2.DATA_CLASS_TENSOR, encode_step(step)),
            *(
                _value(STRUCTURE_TAG + record.shape.name, summary_pb2.DATA_CLASS_BLOB_SEQUENCE, encode_layer(record))
                for record in records
            ),
        ]
    )


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _sigma_of(layers: Mapping[str, Any]) -> float:
    trainable = [layer.sigma for layer in layers.values() if isinstance(layer, GBLRLayer)]
    finite = [sigma for sigma in trainable if sigma is not None]
    return min(finite, default=math.inf)


def _value(tag: str, data_class: Any, record: bytes) -> summary_pb2.Summary.Value:
    metadata = summary_pb2.SummaryMetadata(
        plugin_data=summary_pb2.SummaryMetadata.PluginData(plugin_name=PLUGIN_NAME), data_class=data_class
    )
    # A sequence of one: blob sequences must have one axis.
    shape = tensor_shape_pb2.TensorShapeProto(dim=[tensor_shape_pb2.TensorShapeProto.Dim(size=1)])
    tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, tensor_shape=shape, string_val=[record])
    return summary_pb2.Summary.Value(tag=tag, metadata=metadata, tensor=tensor)


@torch.no_grad()
def _layer_record(name: str, layer: Any) -> LayerRecord:
    if isinstance(layer, GBLRLayer):
        # All K components, dead ones too: a component keeps its number while it is watched.
        rows, cols = layer.intervals()
        sizes = (layer.U.shape[0] // layer.row_splits,) * layer.row_splits
        energy = _interval_energy(layer.U.detach(), rows) * _interval_energy(layer.V.detach(), cols)
        shape = layer.matrix_shape
    else:
        matrix = _structured(name, layer)
        rows, cols, sizes, shape = matrix.rows, matrix.cols, matrix.split_sizes, matrix.shape
        energy = _energy(matrix.u) * _energy(matrix.v)
    row_width, row_start, col_width, col_start = (
        part.cpu().numpy() for part in (rows.width, rows.start, cols.width, cols.start)
    )
    return LayerRecord(
        LayerShape(name, shape[0], shape[1], tuple(sizes)),
        row_width,
        row_start,
        col_width,
        col_start,
        energy.cpu().numpy(),
    )


def _structured(name: str, layer: Any) -> StructuredMatrix:
    if isinstance(layer, StructuredMatrix):
        return layer
    for candidate in (layer, getattr(layer, "weight", None)):
        # Duck-typed: importing the tensor would import torchao.
        to_structured = getattr(candidate, "to_structured", None)
        if callable(to_structured):
            matrix: StructuredMatrix = to_structured()
            return matrix
    raise ConfigError(
        f"write_structure: layer {name!r} is a {type(layer).__name__}; allowed are GBLR layers, GBLRTensor (or a "
        "module with one as its weight) and StructuredMatrix"
    )


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


def _costs(record: LayerRecord) -> np.ndarray[Any, np.dtype[np.int64]]:
    return multiply_adds(torch.from_numpy(record.row_width), torch.from_numpy(record.col_width)).numpy()


def _add_summary(writer: Any, summary: summary_pb2.Summary, step: int) -> None:
    if not hasattr(writer, "_get_file_writer"):
        # Lightning's logger holds a SummaryWriter as `experiment`.
        writer = getattr(writer, "experiment", writer)
    if hasattr(writer, "_get_file_writer"):
        file_writer = writer._get_file_writer()
        if file_writer is None:  # Lightning's silent dummy, on all ranks but the first
            return
        writer = file_writer
    if hasattr(writer, "add_summary"):
        writer.add_summary(summary, step)
    elif hasattr(writer, "add_event"):
        writer.add_event(event_pb2.Event(summary=summary, step=step, wall_time=time.time()))
    else:
        raise ConfigError(
            f"write_structure: cannot write to a {type(writer).__name__}; allowed are torch's SummaryWriter, "
            "Lightning's TensorBoardLogger, and writers with add_summary or add_event"
        )
