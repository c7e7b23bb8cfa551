"""What a compression would leave of a model, layer by layer, before anything is done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from .report import LayerReport, Report

__all__ = ["PLANNED", "planned"]

PLANNED = "planned"
"""Structure of a layer in a report of what would be done."""


def planned(counted: Report, budgets: Mapping[str, float], others: str) -> Report:
    """A report of the dense model as if its layers met their budgets exactly.

    Layers that share a budget are shown at equal relative FLOPs, though learning would split it.

    Args:
        counted: Of the dense model.
        budgets: Relative FLOPs by name, of the layers that would be compressed.
        others: Why a layer stays dense that has no budget and no reason of its own.
    """

    def of(layer: LayerReport) -> LayerReport:
        budget = budgets.get(layer.name)
        if budget is None:
            return replace(layer, left_dense=layer.left_dense or others)
        return replace(
            layer,
            structure=PLANNED,
            multiply_adds=round(budget * layer.dense_multiply_adds),
            parameters=round(budget * layer.dense_parameters),
            left_dense="",
        )

    layers = [of(layer) for layer in counted.layers]
    saved = sum(layer.dense_parameters - layer.parameters for layer in layers)
    return replace(counted, layers=layers, parameters=counted.parameters - saved)
