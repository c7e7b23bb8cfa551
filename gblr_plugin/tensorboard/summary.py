"""Writes the structure of layers into TensorBoard logs, for the GBLR tab."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2

from ..errors import ConfigError
from ..monitoring.records import PLUGIN_NAME, STRUCTURE_TAG, SUMMARY_TAG, encode_layer, encode_step
from ..monitoring.snapshot import take_snapshot
from ._compat import file_writer, summary_writer

__all__ = ["log_snapshot", "structure_summary", "write_structure"]


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
        lambdas: Present lambda by layer name.
        loss: Task loss.

    Raises:
        ConfigError: If the writer or a layer is of another kind, or the step is negative.
    """
    if step < 0:
        raise ConfigError(f"write_structure: step must be at least 0, got {step}")
    summary = structure_summary(layers, budget=budget, sigma=sigma, lambdas=lambdas, loss=loss)
    holder = summary_writer(writer)
    target = writer if holder is None else file_writer(holder)
    if target is None:  # another process than the first, which writes nothing
        return
    if callable(getattr(target, "add_summary", None)):
        target.add_summary(summary, step)
    elif callable(getattr(target, "add_event", None)):
        target.add_event(event_pb2.Event(summary=summary, step=step, wall_time=time.time()))
    else:
        raise ConfigError(
            f"write_structure: cannot write to a {type(writer).__name__}; allowed are torch's SummaryWriter, "
            "Lightning's TensorBoardLogger, and writers with add_summary or add_event"
        )


def log_snapshot(logger: Any, layers: Mapping[str, Any], step: int, **about: Any) -> None:
    """The sink of :mod:`gblr_plugin.monitoring.sinks`: writes through loggers that hold a ``SummaryWriter``."""
    if summary_writer(logger) is not None:
        write_structure(logger, layers, step, **about)


def structure_summary(
    layers: Mapping[str, Any],
    *,
    budget: float | Mapping[str, float | None] | None = None,
    sigma: float | None = None,
    lambdas: Mapping[str, float] | None = None,
    loss: float | None = None,
) -> summary_pb2.Summary:
    """The protocol buffer that :func:`write_structure` logs; arguments as there."""
    step, records = take_snapshot(layers, budget=budget, sigma=sigma, lambdas=lambdas, loss=loss)
    return summary_pb2.Summary(
        value=[
            _value(SUMMARY_TAG, summary_pb2.DATA_CLASS_TENSOR, encode_step(step)),
            *(
                _value(STRUCTURE_TAG + record.shape.name, summary_pb2.DATA_CLASS_BLOB_SEQUENCE, encode_layer(record))
                for record in records
            ),
        ]
    )


def _value(tag: str, data_class: Any, record: bytes) -> summary_pb2.Summary.Value:
    metadata = summary_pb2.SummaryMetadata(
        plugin_data=summary_pb2.SummaryMetadata.PluginData(plugin_name=PLUGIN_NAME), data_class=data_class
    )
    # A sequence of one: blob sequences must have one axis.
    shape = tensor_shape_pb2.TensorShapeProto(dim=[tensor_shape_pb2.TensorShapeProto.Dim(size=1)])
    tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, tensor_shape=shape, string_val=[record])
    return summary_pb2.Summary.Value(tag=tag, metadata=metadata, tensor=tensor)
