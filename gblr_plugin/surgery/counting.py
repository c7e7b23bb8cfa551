"""Count what a model costs: multiply-adds and parameters per layer and in total.

The model runs once on an example input, with torch's counter of FLOPs. A structured layer counts the multiply-adds of
its structure times the number of its products, even if it multiplies by a dense matrix at present. All other products
count as torch's counter reports them.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..layers import StructuredLayer
from ..layers.full import FULL
from ..layers.separation import separated
from ..utils.running import run_example
from .matrices import WeightMatrix, is_layer, weight_matrices, weight_shape
from .raw_weights import RawWeights
from .report import LayerReport, Report
from .selection import Policy

__all__ = ["report"]

_MANY_ZEROS = 0.05  # share of a dense weight's entries from which the report notes them


def _positions(module: nn.Module, output: Tensor) -> int:
    """Count the matrix-vector products of one call: its output entries over its output channels."""
    channels = weight_shape(module)[0]
    return output.numel() // channels if channels else 0


@dataclass(frozen=True)
class _Cost:
    """What one weight costs: stored entries, multiply-adds of one product, kind of structure, live components."""

    stored: int
    multiply_adds: int
    structure: str
    components: int = 0


def _cost(matrix: WeightMatrix, frozen: Any) -> _Cost:
    module, entries = matrix.module, matrix.entries
    if isinstance(module, StructuredLayer):
        return _Cost(module.stored, module.multiply_adds, module.structure_name, module.num_components)
    if frozen is not None:
        return _Cost(int(frozen.stored), int(frozen.stored), "gblr", int(frozen.num_components))
    return _Cost(entries, entries, "full" if isinstance(module, FULL) else "dense")


def _frozen_weight(module: nn.Module) -> Any:
    """Return the module's weight if it is a frozen GBLRTensor, else ``None``."""
    weight = module._parameters.get("weight")
    if weight is None or type(weight.data) is Tensor:
        return None
    from ..tensor.gblr_tensor import GBLRTensor  # needs torchao, as the weight that is looked at does

    return weight if isinstance(weight.data, GBLRTensor) else None


def _note(module: nn.Module, structure: str) -> str:
    """Note about a dense weight that was compressed, or in which pruning left zeros."""
    if structure == "full":
        return "not cheaper than dense, stored dense"
    weight = module._parameters.get("weight")
    if structure != "dense" or weight is None or type(weight.data) is not Tensor or weight.is_meta:
        return ""
    zeros = 1 - int(weight.count_nonzero()) / max(weight.numel(), 1)
    return f"{zeros:.0%} of its entries are zero, and multiplied" if zeros >= _MANY_ZEROS else ""


def _layer_report(matrix: WeightMatrix, positions: int, embeddings: set[int], policy: Policy) -> LayerReport:
    """Report a layer whose weight made ``positions`` matrix-vector products."""
    module, dense = matrix.module, matrix.entries
    frozen = _frozen_weight(module)
    cost = _cost(matrix, frozen)
    planned: dict[str, Any] = {}
    if frozen is not None:
        planned = {
            "kernel": ", ".join(dict.fromkeys(name for _, name in frozen.plan.kernels)),
            "padding": float(frozen.packing.padding),
            "predicted": float(frozen.predicted_cost),
            "matrix_bytes": 0 if frozen.matrix is None else int(frozen.matrix.nbytes),
        }
    return LayerReport(
        name=matrix.name,
        kind=type(module).__name__,
        shape=matrix.shape,
        structure=cost.structure,
        components=cost.components,
        multiply_adds=cost.multiply_adds * positions,
        dense_multiply_adds=dense * positions,
        parameters=cost.stored,
        dense_parameters=dense,
        note=_note(module, cost.structure),
        output_embedding=id(module._parameters.get("weight")) in embeddings,
        left_dense=(policy.default(matrix) or "") if cost.structure == "dense" else "",
        **planned,
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
    """Count the stored parameters, and those of the dense model; tied layers count once."""
    owned: set[int] = set()
    weights, dense = 0, 0
    for module, layer in layers:
        bias = getattr(module, "bias", None)
        held = {id(p) for p in module.parameters() if p is not bias}
        if not held or held - owned:
            weights, dense = weights + layer.parameters, dense + layer.dense_parameters
        owned |= held
    rest = sum(p.numel() for p in model.parameters() if id(p) not in owned)
    return weights + rest, dense + rest


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    flops: int = sdpa_flop_count(query, key, value)  # on shapes
    return flops


def _grouped_flops(left: Any, right: Any, *args: Any, out_shape: Any, **kwargs: Any) -> int:
    """FLOPs of a grouped product: rows in groups, each times the matrix of its group (mixtures of experts)."""
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


def report(model: nn.Module, example_input: Any) -> Report:
    """Count multiply-adds and parameters of a model on an example input.

    Structured layers count the multiply-adds of their structured product (paper Eq. 4), however they are computed at
    the moment; a layer used several times counts each time.

    Args:
        model: Dense, in training, or converted.
        example_input: A tensor, a tuple of positional arguments, or a dict of keyword arguments.

    Returns:
        The report; print it for a table. Of attention with packed projections each projection is a layer.
    """
    with separated(model), torch.no_grad():
        return _report(model, example_input)


def _report(model: nn.Module, example_input: Any) -> Report:
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
        # torch's fused encoder layer would hide its layers from hooks and its products from the counter.
        torch.backends.mha.set_fastpath_enabled(False)
        undo.callback(torch.backends.mha.set_fastpath_enabled, fastpath)
        undo.enter_context(counting)
        run_example(model, example_input)
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
