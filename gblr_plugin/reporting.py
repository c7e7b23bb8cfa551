"""Count what a model costs: multiply-adds and parameters per layer and in total, and relative FLOPs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop
from torch.utils.hooks import RemovableHandle

from .layers import GBLRLayer
from .swap import structurable, weight_matrix

__all__ = ["LayerReport", "Report", "report"]


@dataclass(frozen=True)
class LayerReport:
    """What one layer costs.

    Args:
        name: Module name.
        kind: Module type.
        shape: (m, n) of its weight matrix.
        structure: ``"dense"``, or the kind of structured weight.
        components: Live components; 0 for a dense weight.
        multiply_adds: Of one forward pass of the example input.
        dense_multiply_adds: The same, had the weight been dense.
        parameters: Stored weight entries (a structured weight stores what it multiplies).
        dense_parameters: m * n.
        kernel: Kernels that the plan of a converted weight chose, if any.
        padding: Stored entries of the planned layout over those of the structure; 1.0 without padding.
        note: Why a layer stayed dense, if it was asked not to.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    structure: str
    components: int
    multiply_adds: int
    dense_multiply_adds: int
    parameters: int
    dense_parameters: int
    kernel: str = ""
    padding: float = 1.0
    note: str = ""

    @property
    def relative_flops(self) -> float:
        """Multiply-adds over those of the dense weight."""
        return self.parameters / self.dense_parameters


@dataclass(frozen=True)
class Report:
    """What a model costs; one multiply-add counts as one FLOP, as in the paper.

    Args:
        layers: Every layer with a weight matrix, in the model's order.
        other_multiply_adds: Matrix products outside these layers (attention scores, tied output embeddings).
        parameters: All stored parameters of the model.
        dense_parameters: The same with dense weights.
    """

    layers: list[LayerReport] = field(default_factory=list)
    other_multiply_adds: int = 0
    parameters: int = 0
    dense_parameters: int = 0

    @property
    def structured(self) -> list[LayerReport]:
        """The layers whose weight is structured, or was asked to be."""
        return [layer for layer in self.layers if layer.structure != "dense" or layer.note]

    @property
    def multiply_adds(self) -> int:
        """Of the whole model on the example input."""
        return sum(layer.multiply_adds for layer in self.layers) + self.other_multiply_adds

    @property
    def dense_multiply_adds(self) -> int:
        """Of the whole model with dense weights."""
        return sum(layer.dense_multiply_adds for layer in self.layers) + self.other_multiply_adds

    @property
    def relative_flops(self) -> float:
        """Of the structured layers together: their multiply-adds over those of their dense weights; 1 without any."""
        dense = sum(layer.dense_multiply_adds for layer in self.structured)
        return sum(layer.multiply_adds for layer in self.structured) / dense if dense else 1.0

    @property
    def model_relative_flops(self) -> float:
        """Of the whole model."""
        return self.multiply_adds / self.dense_multiply_adds if self.dense_multiply_adds else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        layers = [{**asdict(layer), "relative_flops": layer.relative_flops} for layer in self.layers]
        return {
            "relative_flops": self.relative_flops,
            "model_relative_flops": self.model_relative_flops,
            "multiply_adds": self.multiply_adds,
            "dense_multiply_adds": self.dense_multiply_adds,
            "other_multiply_adds": self.other_multiply_adds,
            "parameters": self.parameters,
            "dense_parameters": self.dense_parameters,
            "layers": layers,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Report:
        """Inverse of :meth:`to_dict`."""
        known = set(LayerReport.__dataclass_fields__)
        layers = [
            LayerReport(**{**{k: v for k, v in layer.items() if k in known}, "shape": tuple(layer["shape"])})
            for layer in values["layers"]
        ]
        return cls(layers, values["other_multiply_adds"], values["parameters"], values["dense_parameters"])

    def to_json(self) -> str:
        """JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        """A table that fits 80 columns."""
        rows = [("layer", "shape", "structure", "comp.", "multiply-adds", "rel.")]
        for layer in self.layers:
            shape = "x".join(map(str, layer.shape))
            rel = f"{layer.relative_flops:.3f}"
            components = str(layer.components) if layer.components else "-"
            rows.append((layer.name, shape, layer.structure, components, f"{layer.multiply_adds:,}", rel))
        if self.other_multiply_adds:
            rows.append(("(other products)", "", "", "", f"{self.other_multiply_adds:,}", ""))
        total = ("total", "", "", "", f"{self.multiply_adds:,}", f"{self.model_relative_flops:.3f}")
        widths = [max(len(row[i]) for row in [*rows, total]) for i in range(6)]
        widths[0] = min(widths[0], 78 - sum(widths[1:]) - 5)

        def line(row: tuple[str, ...]) -> str:
            name = row[0] if len(row[0]) <= widths[0] else "…" + row[0][1 - widths[0] :]
            left = (name.ljust(widths[0]), row[1].rjust(widths[1]), row[2].ljust(widths[2]))
            return " ".join(
                [*left, *(cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True))]
            ).rstrip()

        rule = "-" * min(sum(widths) + 5, 80)
        text = [line(rows[0]), rule, *map(line, rows[1:]), rule, line(total)]
        notes = [f"{layer.name}: {layer.note}" for layer in self.layers if layer.note]
        text.append(f"structured layers: {self.relative_flops:.2%} of their dense multiply-adds")
        text.append(f"parameters: {self.parameters:,} of {self.dense_parameters:,} dense")
        return "\n".join(text + notes)


def _is_layer(module: nn.Module) -> bool:
    if isinstance(module, GBLRLayer) or hasattr(module, "matrix_shape"):
        return True
    return structurable(module) or type(module) in (nn.Linear, nn.Conv1d, nn.Conv2d)


def _positions(module: nn.Module, output: Tensor) -> int:
    """Matrix-vector products of one call: output entries per output channel."""
    channels = weight_shape(module)[0]
    return output.numel() // channels if channels else 0


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """(m, n) of a layer's weight matrix."""
    if hasattr(module, "matrix_shape"):
        m, n = module.matrix_shape  # type: ignore[misc]  # a pair
        return int(m), int(n)
    weight: Any = module.weight
    if structurable(module) and type(weight.data) is Tensor:
        shape = weight_matrix(module).shape
        return shape[0], shape[1]
    return weight.shape[0], math.prod(weight.shape[1:])


def _layer_report(name: str, module: nn.Module, positions: int) -> LayerReport:
    m, n = weight_shape(module)
    stored, components, structure, kernel, padding = m * n, 0, "dense", "", 1.0
    groups = getattr(module, "groups", 1)
    weight: Any = None if hasattr(module, "matrix_shape") else getattr(module, "weight", None)
    if hasattr(module, "matrix_shape"):
        measured: Any = module
        stored, structure = int(measured.stored), getattr(module, "structure_name", "gblr")
        components = int(getattr(module, "num_components", 0))
    elif hasattr(weight, "to_structured"):
        stored, components, structure = int(weight.stored), int(weight.num_components), "gblr"
        plan = getattr(weight, "plan", None)
        kernel = str(getattr(plan, "summary", "") or "")
        padding = float(getattr(weight, "padding", 1.0))
    dense = m * n
    return LayerReport(
        name=name,
        kind=type(module).__name__,
        shape=(m, n * groups),
        structure=structure,
        components=components,
        multiply_adds=stored * positions,
        dense_multiply_adds=dense * positions,
        parameters=stored,
        dense_parameters=dense,
        kernel=kernel,
        padding=padding,
        note=str(getattr(module, "gblr_note", "")),
    )


def _count_parameters(model: nn.Module, layers: list[LayerReport], owned: set[int]) -> tuple[int, int]:
    weights = sum(layer.parameters for layer in layers)
    dense = sum(layer.dense_parameters for layer in layers)
    rest = sum(p.numel() for p in model.parameters() if id(p) not in owned)
    return weights + rest, dense + rest


@torch.no_grad()
def report(model: nn.Module, example_input: Any) -> Report:
    """Count multiply-adds and parameters of a model on an example input.

    Structured layers count the multiply-adds of their structured product (paper Eq. 4), however they are computed at
    the moment; a layer used several times counts each time.

    Args:
        model: Dense, in training, or converted.
        example_input: A tensor, a tuple of positional arguments, or a dict of keyword arguments.

    Returns:
        The report; print it for a table.
    """
    calls: dict[str, int] = {}
    handles: list[RemovableHandle] = []
    layers: dict[str, nn.Module] = {}

    def counter(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                calls[name] = calls.get(name, 0) + _positions(module, output)

        return hook

    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in layers)
        if _is_layer(module) and not inside:
            layers[name] = module
            handles.append(module.register_forward_hook(counter(name)))
    was_training = model.training
    # torch counts attention on GPUs; its CPU kernel has the same formula.
    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop}
    counting = FlopCounterMode(display=False, custom_mapping=attention)
    try:
        model.eval()
        with counting:
            if isinstance(example_input, dict):
                model(**example_input)
            elif isinstance(example_input, tuple):
                model(*example_input)
            else:
                model(example_input)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    flops = counting.get_flop_counts()
    prefix = type(model).__name__
    inside_layers = sum(sum(flops.get(f"{prefix}.{name}" if name else prefix, {}).values()) for name in layers)
    other = max(counting.get_total_flops() - inside_layers, 0) // 2
    reports = [_layer_report(name, module, calls.get(name, 0)) for name, module in layers.items()]
    owned: set[int] = set()
    for module in layers.values():
        bias = getattr(module, "bias", None)
        owned |= {id(p) for p in module.parameters() if p is not bias}
    parameters, dense_parameters = _count_parameters(model, reports, owned)
    return Report(reports, other, parameters, dense_parameters)
