"""The report of what a model costs: a value with one entry per weight, written as JSON or as a table.

:func:`gblr_plugin.report`, in ``counting.py``, makes it.
"""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict, dataclass, field
from typing import Any

from ..utils.tables import aligned, table

__all__ = ["LayerReport", "Report"]

_COLUMNS = 80


@dataclass(frozen=True)
class LayerReport:
    """What one layer costs.

    Args:
        name: Module name.
        kind: Module type.
        shape: (m, n) of its weight matrix.
        structure: ``"dense"``, the kind of structured weight, or ``"full"``: compressed, but no cheaper than dense and
            so stored dense.
        components: Live components; 0 for a dense weight.
        multiply_adds: Multiply-adds of one forward pass of the example input.
        dense_multiply_adds: The same, had the weight been dense.
        parameters: Stored weight entries (a structured weight stores what it multiplies).
        dense_parameters: m * n.
        kernel: Kernels that the plan of a converted weight chose, if any.
        padding: Stored entries of the planned layout over those of the structure; 1.0 without padding.
        predicted: Cost of a token by the plan's cost model, padding and overheads included, over the dense product's.
        note: That a converted layer is stored dense, or that entries of a dense weight are zero.
        output_embedding: Whether its weight is that of an embedding too: the output layer of a language model.
        matrix_bytes: Bytes of the dense matrix that the plan of a converted weight keeps beside its factors; mostly 0.
        left_dense: Why a dense weight stays so unless its layer is asked for by name, see
            :func:`~gblr_plugin.surgery.selection.select_layers`; empty where it can be structured.
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
    predicted: float = 1.0
    note: str = ""
    output_embedding: bool = False
    matrix_bytes: int = 0
    left_dense: str = ""

    @property
    def relative_flops(self) -> float:
        """Multiply-adds over those of the dense weight; of a layer that was not used, stored over all entries."""
        if self.dense_multiply_adds:
            return self.multiply_adds / self.dense_multiply_adds
        return self.parameters / self.dense_parameters if self.dense_parameters else 1.0


@dataclass(frozen=True)
class Report:
    """What a model costs; one multiply-add counts as one FLOP, as in the paper.

    Args:
        layers: Every weight matrix, in the model's order: of layers, and parameters by which other modules multiply
            (packed projections of attention, stacked matrices of experts).
        other_multiply_adds: Other matrix products (attention's two).
        parameters: All stored parameters of the model.
        dense_parameters: The same with dense weights.
        attention_multiply_adds: Those of the other products whose two factors are activations: attention's scores, and
            its sums over the values.
    """

    layers: list[LayerReport] = field(default_factory=list)
    other_multiply_adds: int = 0
    parameters: int = 0
    dense_parameters: int = 0
    attention_multiply_adds: int = 0

    @property
    def structured(self) -> list[LayerReport]:
        """The compressed layers."""
        return [layer for layer in self.layers if layer.structure != "dense"]

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of the model on the example input."""
        return sum(layer.multiply_adds for layer in self.layers) + self.other_multiply_adds

    @property
    def dense_multiply_adds(self) -> int:
        """Multiply-adds of the model on the example input, had its weights been dense."""
        return sum(layer.dense_multiply_adds for layer in self.layers) + self.other_multiply_adds

    @property
    def relative_flops(self) -> float:
        """Multiply-adds of the compressed layers over those of their dense weights; 1 if there are none."""
        dense = sum(layer.dense_multiply_adds for layer in self.structured)
        return sum(layer.multiply_adds for layer in self.structured) / dense if dense else 1.0

    @property
    def model_relative_flops(self) -> float:
        """Multiply-adds of the model over those of the dense model."""
        return self.multiply_adds / self.dense_multiply_adds if self.dense_multiply_adds else 1.0

    @property
    def published_multiply_adds(self) -> int:
        """Multiply-adds as the paper counts: one product of attention, and no output layer tied to an embedding."""
        return self.multiply_adds - self._not_published("multiply_adds")

    @property
    def published_dense_multiply_adds(self) -> int:
        """The paper's count with dense weights: 1.72e10 for ViT-Base/16 at 224 pixels, 9.66e10 for GPT-2 at 1024."""
        return self.dense_multiply_adds - self._not_published("dense_multiply_adds")

    def _not_published(self, which: str) -> int:
        tied = sum(getattr(layer, which) for layer in self.layers if layer.output_embedding)
        return int(tied) + (self.attention_multiply_adds + 1) // 2

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        layers = [{**asdict(layer), "relative_flops": layer.relative_flops} for layer in self.layers]
        return {
            "relative_flops": self.relative_flops,
            "model_relative_flops": self.model_relative_flops,
            "multiply_adds": self.multiply_adds,
            "dense_multiply_adds": self.dense_multiply_adds,
            "other_multiply_adds": self.other_multiply_adds,
            "attention_multiply_adds": self.attention_multiply_adds,
            "published_multiply_adds": self.published_multiply_adds,
            "published_dense_multiply_adds": self.published_dense_multiply_adds,
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
        return cls(
            layers,
            values["other_multiply_adds"],
            values["parameters"],
            values["dense_parameters"],
            values.get("attention_multiply_adds", 0),  # reports of earlier runs have none
        )

    def to_json(self) -> str:
        """JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        """Write a table that fits 80 columns; shares are those of the model's multiply-adds."""
        total = self.multiply_adds
        header = ("layer", "shape", "structure", "comp.", "mult-adds", "params", "rel.", "share")
        rows: list[tuple[str, ...]] = []
        for layer in self.layers:
            counts = _short(layer.multiply_adds), _short(layer.parameters)
            components = str(layer.components) if layer.components else "-"
            rel, share = f"{layer.relative_flops:.3f}", _share(layer.multiply_adds, total)
            rows.append((layer.name, "x".join(map(str, layer.shape)), layer.structure, components, *counts, rel, share))
        rest = self.other_multiply_adds - self.attention_multiply_adds
        for name, value in (("(attention)", self.attention_multiply_adds), ("(other products)", rest)):
            if value:
                rows.append((name, "", "", "", _short(value), "", "", _share(value, total)))
        rel = f"{self.model_relative_flops:.3f}"
        last = ("total", "", "", "", _short(total), _short(self.parameters), rel, _share(total, total))
        others = max(map(len, aligned([row[1:] for row in (header, *rows, last)], left=(1,), gap=" ")))
        longest = max(_COLUMNS - others - 1, 8)
        rows = [(_shortened(row[0], longest), *row[1:]) for row in rows]
        text = [*table(header, rows, total=last, left=(0, 2), gap=" "), *self._plans()]
        notes = [
            f"{_shortened(layer.name, _COLUMNS - len(layer.note) - 2)}: {layer.note}"
            for layer in self.layers
            if layer.note
        ]
        if self.structured:
            text.append(f"compressed layers: {self.relative_flops:.2%} of their dense multiply-adds")
        text.append(f"multiply-adds: {total:,} of {self.dense_multiply_adds:,} dense")
        published, dense = self.published_multiply_adds, self.published_dense_multiply_adds
        if dense and dense != self.dense_multiply_adds:
            text.append(f"as the paper counts: {published:.3g} of {dense:.3g} dense ({published / dense:.2%})")
        text.append(f"parameters: {self.parameters:,} of {self.dense_parameters:,} dense")
        return "\n".join(text + notes + self._left_dense())

    def _left_dense(self) -> list[str]:
        """Say in one line per reason which weights are dense, and their share of the multiply-adds."""
        groups: dict[str, list[LayerReport]] = {}
        for layer in self.layers:
            if layer.left_dense:
                groups.setdefault(layer.left_dense, []).append(layer)
        lines = []
        counts = {reason: sum(layer.multiply_adds for layer in group) for reason, group in groups.items()}
        for reason, group in sorted(groups.items(), key=lambda entry: -counts[entry[0]]):
            share = _share(counts[reason], self.multiply_adds)
            names = group[0].name if len(group) == 1 else f"{len(group)} layers, {group[0].name} to {group[-1].name}"
            lines += textwrap.wrap(f"  {share} {names}: {reason}", _COLUMNS, subsequent_indent="    ")
        return ["left dense (share of the multiply-adds, reason):", *lines] if lines else []

    def _plans(self) -> list[str]:
        """Say in one line per converted layer what its kernel plan chose and predicts."""
        lines = []
        for layer in self.layers:
            if layer.kernel:
                facts = f"{layer.kernel}, padding {layer.padding:.3f}, predicted cost {layer.predicted:.3f}"
                facts += f", matrix {_short(layer.matrix_bytes)}B" if layer.matrix_bytes else ""
                lines.append(f"  {_shortened(layer.name, _COLUMNS - len(facts) - 4)}: {facts}")
        return ["plans (kernels, entries stored over those needed, cost over dense):", *lines] if lines else []


def _short(value: int) -> str:
    """Write a count with three digits: 950, 9.50k, 12.3M, 1.72G, 145T."""
    if value < 1000:
        return str(value)
    digits = f"{value:.2e}"  # rounds up to the next power where it must
    power = int(digits[-2:]) // 3 * 3
    return f"{float(digits) / 10**power:.{2 - int(digits[-2:]) % 3}f}{'kMGTPE'[power // 3 - 1]}"


def _share(count: int, total: int) -> str:
    return f"{count / total:.1%}" if total else "-"


def _shortened(name: str, width: int) -> str:
    """Shorten a name: the words between dots to their first letters, from the left; if needed, to the name's end."""
    steps = name.split(".")
    for index in range(len(steps) - 1):
        if len(".".join(steps)) <= width:
            break
        if not steps[index].isdigit():
            steps[index] = steps[index][:1]
    name = ".".join(steps)
    return name if len(name) <= width else "…" + name[len(name) - width + 1 :]
