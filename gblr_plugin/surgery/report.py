"""Count what a model costs: multiply-adds and parameters per layer and in total, and relative FLOPs."""

from __future__ import annotations

import contextlib
import json
import math
import textwrap
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from .matrices import WeightMatrix, is_layer, weight_matrices, weight_shape
from .raw_weights import RawWeights
from .selection import Policy

__all__ = ["LayerReport", "Report", "report"]

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
        multiply_adds: Of one forward pass of the example input.
        dense_multiply_adds: The same, had the weight been dense.
        parameters: Stored weight entries (a structured weight stores what it multiplies).
        dense_parameters: m * n.
        kernel: Kernels that the plan of a converted weight chose, if any.
        padding: Stored entries of the planned layout over those of the structure; 1.0 without padding.
        predicted: Cost of a token by the plan's cost model, padding and overheads included, over the dense product's.
        note: Why a layer stayed dense, if it was asked not to.
        output_embedding: Whether its weight is that of an embedding too: the output layer of a language model.
        matrix_bytes: Of the dense matrix that the plan of a converted weight keeps beside its factors; mostly 0.
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
        """Multiply-adds over those of the dense weight; stored over all entries where the layer was not used."""
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
        """The compressed layers; one that was asked to be but is too small to gain is dense, with a note."""
        return [layer for layer in self.layers if layer.structure != "dense"]

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

    @property
    def published_multiply_adds(self) -> int:
        """As the paper counts: of attention one product (tokens^2 * dim), and no output layer tied to an embedding."""
        return self.multiply_adds - self._not_published("multiply_adds")

    @property
    def published_dense_multiply_adds(self) -> int:
        """The same with dense weights: 1.72e10 for ViT-Base/16 at 224 pixels, 9.66e10 for GPT-2 at 1024 tokens."""
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
        """A table that fits 80 columns; shares are of the model's multiply-adds."""
        total = self.multiply_adds
        rows = [("layer", "shape", "structure", "comp.", "mult-adds", "params", "rel.", "share")]
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
        widths = [max(len(row[i]) for row in [*rows, last]) for i in range(8)]
        widths[0] = min(widths[0], max(_COLUMNS - sum(widths[1:]) - 7, 8))

        def line(row: tuple[str, ...]) -> str:
            left = (_shortened(row[0], widths[0]).ljust(widths[0]), row[1].rjust(widths[1]), row[2].ljust(widths[2]))
            return " ".join(
                [*left, *(cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True))]
            ).rstrip()

        rule = "-" * (sum(widths) + 7)
        text = [line(rows[0]), rule, *map(line, rows[1:]), rule, line(last), *self._plans()]
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
        """What stays dense unless it is asked for by name, with its share of the multiply-adds: a line per reason."""
        groups: dict[str, list[LayerReport]] = {}
        for layer in self.layers:
            if layer.left_dense and not layer.note:
                groups.setdefault(layer.left_dense, []).append(layer)
        lines = []
        parts = {reason: sum(layer.multiply_adds for layer in group) for reason, group in groups.items()}
        for reason, group in sorted(groups.items(), key=lambda entry: -parts[entry[0]]):
            share = _share(parts[reason], self.multiply_adds)
            names = group[0].name if len(group) == 1 else f"{len(group)} layers, {group[0].name} to {group[-1].name}"
            lines += textwrap.wrap(f"  {share} {names}: {reason}", _COLUMNS, subsequent_indent="    ")
        return ["left dense (share of the multiply-adds, reason):", *lines] if lines else []

    def _plans(self) -> list[str]:
        """A line per converted layer: what its plan chose and foresees."""
        lines = []
        for layer in self.layers:
            if layer.kernel:
                facts = f"{layer.kernel}, padding {layer.padding:.3f}, predicted cost {layer.predicted:.3f}"
                facts += f", matrix {_short(layer.matrix_bytes)}B" if layer.matrix_bytes else ""
                lines.append(f"  {_shortened(layer.name, _COLUMNS - len(facts) - 4)}: {facts}")
        return ["plans (kernels, entries stored over those needed, cost over dense):", *lines] if lines else []


def _short(value: int) -> str:
    """Three digits of a count: 950, 9.50k, 12.3M, 1.72G, 145T."""
    if value < 1000:
        return str(value)
    digits = f"{value:.2e}"  # rounds up to the next power where it must
    power = int(digits[-2:]) // 3 * 3
    return f"{float(digits) / 10**power:.{2 - int(digits[-2:]) % 3}f}{'kMGTPE'[power // 3 - 1]}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _shortened(name: str, width: int) -> str:
    """A name with its parts cut to their first letters from the left, as far as needed; then its end."""
    parts = name.split(".")
    for index in range(len(parts) - 1):
        if len(".".join(parts)) <= width:
            break
        if not parts[index].isdigit():
            parts[index] = parts[index][:1]
    name = ".".join(parts)
    return name if len(name) <= width else "…" + name[len(name) - width + 1 :]


def _positions(module: nn.Module, output: Tensor) -> int:
    """Matrix-vector products of one call: output entries per output channel."""
    channels = weight_shape(module)[0]
    return output.numel() // channels if channels else 0


def _layer_report(matrix: WeightMatrix, positions: int, embeddings: set[int], policy: Policy) -> LayerReport:
    module, (m, n) = matrix.module, matrix.shape
    stored, components, structure, kernel, padding, predicted, beside = m * n, 0, "dense", "", 1.0, 1.0, 0
    weight: Any = None if hasattr(module, "matrix_shape") else getattr(module, "weight", None)
    if hasattr(module, "matrix_shape"):
        measured: Any = module
        stored, structure = int(measured.stored), getattr(module, "structure_name", "gblr")
        components = int(getattr(module, "num_components", 0))
    elif hasattr(weight, "to_structured"):
        stored, components, structure = int(weight.stored), int(weight.num_components), "gblr"
        kernel = ", ".join(dict.fromkeys(name for _, name in weight.plan.kernels))
        padding, predicted = float(weight.packing.padding), float(weight.predicted_cost)
        beside = 0 if weight.matrix is None else int(weight.matrix.nbytes)
    elif hasattr(module, "structure_name"):
        structure = str(module.structure_name)
    dense = m * n
    return LayerReport(
        name=matrix.name,
        kind=type(module).__name__,
        shape=(m, n),
        structure=structure,
        components=components,
        multiply_adds=int(getattr(module, "multiply_adds", stored)) * positions,
        dense_multiply_adds=dense * positions,
        parameters=stored,
        dense_parameters=dense,
        kernel=kernel,
        padding=padding,
        predicted=predicted,
        note=str(getattr(module, "gblr_note", "")),
        output_embedding=id(weight) in embeddings,
        matrix_bytes=beside,
        left_dense=(policy.default(matrix) or "") if structure == "dense" else "",
    )


def _other_report(matrix: WeightMatrix, multiply_adds: int, policy: Policy) -> LayerReport:
    return LayerReport(
        name=matrix.name,
        kind=type(matrix.module).__name__,
        shape=matrix.shape,
        structure="dense",
        components=0,
        multiply_adds=multiply_adds,
        dense_multiply_adds=multiply_adds,
        parameters=matrix.entries,
        dense_parameters=matrix.entries,
        left_dense=policy.default(matrix) or "",
    )


def _count_parameters(model: nn.Module, layers: list[tuple[nn.Module, LayerReport]]) -> tuple[int, int]:
    """Stored parameters, and those of the dense model; each parameter once, also where layers are tied."""
    owned: set[int] = set()
    weights, dense = 0, 0
    for module, layer in layers:
        bias = getattr(module, "bias", None)
        own = {id(p) for p in module.parameters() if p is not bias}
        if not own or own - owned:
            weights, dense = weights + layer.parameters, dense + layer.dense_parameters
        owned |= own
    rest = sum(p.numel() for p in model.parameters() if id(p) not in owned)
    return weights + rest, dense + rest


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    flops: int = sdpa_flop_count(query, key, value)  # on shapes
    return flops


def _grouped_flops(left: Any, right: Any, *args: Any, out_shape: Any, **kwargs: Any) -> int:
    """Rows of a matrix, in groups, each times the matrix of its group: mixtures of experts."""
    flops: int = 2 * math.prod(out_shape) * left[-1]
    return flops


# torch's counter knows attention on GPUs; the CPU's kernel has the same formula. It does not know grouped products.
_FORMULAS: dict[Any, Any] = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
if hasattr(torch.ops.aten, "_grouped_mm"):
    _FORMULAS[torch.ops.aten._grouped_mm] = _grouped_flops

# Of these products one factor is a weight; all others are of two activations, in batches: attention.
_WITH_WEIGHT = {
    torch.ops.aten.mm,
    torch.ops.aten.addmm,
    torch.ops.aten.convolution,
    torch.ops.aten._convolution,
    torch.ops.aten.convolution_overrideable,
}


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
    matrices = [matrix for matrix in weight_matrices(model) if matrix.name or is_layer(matrix.module)]
    layers = {matrix.name: matrix.module for matrix in matrices if is_layer(matrix.module)}
    others = RawWeights((matrix for matrix in matrices if not is_layer(matrix.module)), model, _WITH_WEIGHT)
    calls = dict.fromkeys(layers, 0)
    names = {id(module): name for name, module in layers.items()}
    counting = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    inside: Counter[Any] = Counter()  # layers, and what other modules make with their own weights
    entered: list[tuple[Counter[Any], Counter[Any]]] = []

    def before(_module: nn.Module, _args: Any) -> None:
        entered.append((_by_operation(counting), inside.copy()))

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        begun, counted = entered.pop()
        made = _by_operation(counting) - begun - (inside - counted)  # without that of layers inside
        if id(module) not in names:
            made = others.add(module, made, args, kwargs)
        elif isinstance(output, Tensor):
            calls[names[id(module)]] += _positions(module, output)
        inside.update(made)

    fastpath = torch.backends.mha.get_fastpath_enabled()
    with contextlib.ExitStack() as undo:
        for module in (*layers.values(), *others.modules):
            undo.callback(module.register_forward_pre_hook(before).remove)
            undo.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        undo.callback(_restore_modes, [(module, module.training) for module in model.modules()])
        model.eval()
        # torch's fused encoder layer would hide its layers from hooks and its products from the counter.
        torch.backends.mha.set_fastpath_enabled(False)
        undo.callback(torch.backends.mha.set_fastpath_enabled, fastpath)
        undo.enter_context(counting)
        if isinstance(example_input, Mapping):
            model(**example_input)
        elif isinstance(example_input, tuple):
            model(*example_input)
        else:
            model(example_input)
    outside = _by_operation(counting) - inside
    attention = sum(flops for operation, flops in outside.items() if operation not in _WITH_WEIGHT) // 2
    embeddings = {id(module.weight) for module in model.modules() if type(module) is nn.Embedding}
    policy = Policy(model)
    reports = [
        _layer_report(matrix, calls[matrix.name], embeddings, policy)
        if matrix.name in layers
        else _other_report(matrix, others.multiply_adds(matrix), policy)
        for matrix in matrices
    ]
    counted = [(layers[entry.name], entry) for entry in reports if entry.name in layers]
    parameters, dense_parameters = _count_parameters(model, counted)
    return Report(reports, outside.total() // 2, parameters, dense_parameters, attention)


def _by_operation(counting: FlopCounterMode) -> Counter[Any]:
    return Counter(counting.get_flop_counts().get("Global", {}))


def _restore_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, mode in modes:
        module.training = mode
