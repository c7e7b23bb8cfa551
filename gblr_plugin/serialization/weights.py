"""A structured weight as plain tensors and a small record: intervals and the factors inside them, nothing else.

A file holds the structure, not the layout of a kernel: blocks, lists and groups are made anew when it is loaded, so
that a file stays readable when kernels change, and a small layer's file is smaller than its dense weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..kernels.buffers import interval_facts, unpack
from ..kernels.layout import Layout
from ..kernels.packing import narrowed, pack
from ..kernels.plan import Plan
from ..matrix.structure import Intervals, StructuredMatrix
from ..tensor.gblr_tensor import GBLRTensor

__all__ = ["flatten_weight", "part_names", "plan_record", "unflatten_weight"]

_PARTS = ("factors", "intervals", "scales")
_MOST_UNPACKED = 64  # times the dense matrix: what K rows of u and v may take while they are packed
_KEYS = {"shape", "splits", "plan", "dense", "transposed"}


class _UnsoundError(Exception):
    """A record or its tensors do not fit together."""


def part_names(name: str) -> tuple[str, str, str]:
    """Names of the tensors that stand for the weight ``name``: factors, intervals, scales."""
    return f"{name}_{_PARTS[0]}", f"{name}_{_PARTS[1]}", f"{name}_{_PARTS[2]}"


def plan_record(plan: Plan) -> dict[str, Any]:
    """The fields of a plan that differ from their defaults, without what the cost model once predicted."""
    defaults = {field.name: field.default for field in fields(Plan) if field.default is not MISSING}
    return {
        key: value
        for key, value in plan.to_dict().items()
        if key not in ("predicted", "padding") and (key not in defaults or value != defaults[key])
    }


def flatten_weight(name: str, weight: GBLRTensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the record of a weight; :func:`unflatten_weight` gives the same weight back, bit by bit.

    Args:
        name: Name of the weight in the state dict.
        weight: Any structured weight.

    Returns:
        ``factors`` (stored entries: all u inside their intervals, then all v; or the dense matrix), ``intervals``
        ((4, K) row widths and starts, column widths and starts, in the narrowest integer dtype), ``scales`` of int8
        factors; and the record without its plan.

    Raises:
        ConfigError: If the components would take more than 64 times the dense matrix to pack, or its buffers do not
            hold what its layout says.
    """
    factors, intervals, scales = part_names(name)
    record: dict[str, Any] = {"shape": list(weight.outer_shape)}
    if weight.packing.transposed:
        weight, record["transposed"] = weight.t(), True
    layout = weight.packing
    try:
        weight.check()
    except ConfigError as error:
        raise ConfigError(f"save: {name!r} is damaged: {error}") from error
    tensors: dict[str, Tensor] = {}
    if layout.dense:
        record["dense"] = True
        tensors[factors] = weight.factors
        if weight.scales is not None:
            tensors[scales] = weight.scales
        return tensors, record
    matrix = unpack(layout, weight.factors, weight.lists)
    if _too_many(len(matrix.u), layout.shape):
        raise ConfigError(f"save: {name!r} has {len(matrix.u)} components, too many for a {layout.shape} matrix")
    values = [matrix.rows.width, matrix.rows.start, matrix.cols.width, matrix.cols.start]
    ends = torch.stack(values)
    largest = max(layout.shape)
    tensors[factors] = torch.cat([matrix.u[matrix.rows.support()], matrix.v[matrix.cols.support()]])
    tensors[intervals] = ends.to(torch.uint8 if largest < 1 << 8 else torch.int16 if largest < 1 << 15 else torch.int32)
    if weight.scales is not None:
        tensors[scales] = weight.scales[torch.argsort(_order(layout, weight.lists))]
    if len(matrix.split_sizes) > 1:
        record["splits"] = list(matrix.split_sizes)
    return tensors, record


def _order(layout: Layout, lists: Tensor) -> Tensor:
    """Original number of each packed component, (K,) int64."""
    return interval_facts(layout, lists)[4]


def _too_many(components: int, shape: tuple[int, int]) -> bool:
    m, n = shape
    return components * (m + n) > _MOST_UNPACKED * max(m * n, 4096)


def unflatten_weight(
    record: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str, expected: tuple[int, ...] | None = None
) -> GBLRTensor:
    """The weight that :func:`flatten_weight` took apart, with ``record["plan"]`` filled in.

    Everything is checked before anything is allocated by it: the shape against ``expected``, the tensors against the
    shape, the intervals against their axes.

    Args:
        record: The record, from an untrusted file.
        tensors: The tensors, from an untrusted file.
        name: Name of the weight.
        expected: Shape that the network has there.

    Raises:
        ConfigError: With a reason that begins with the name, if they do not fit together or to the network.
    """
    shape = record.get("shape")
    if not isinstance(shape, list) or not 2 <= len(shape) <= 4 or not all(_is_count(size) for size in shape):
        raise ConfigError(f"the record of {name!r} is damaged")
    if expected is not None and tuple(shape) != expected:
        raise ConfigError(f"{name!r} has shape {tuple(shape)}, the network's has {expected}")
    try:
        return _unflatten(record, tensors, name, tuple(shape))
    except (_UnsoundError, ConfigError, TypeError, ValueError, KeyError, OverflowError) as error:
        raise ConfigError(f"the record or the tensors of {name!r} do not fit together") from error


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31


def _unflatten(
    record: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]
) -> GBLRTensor:
    transposed = record.get("transposed", False)
    if record.keys() - _KEYS or not isinstance(transposed, bool) or not isinstance(record["plan"], dict):
        raise _UnsoundError
    if transposed:
        if len(shape) != 2:
            raise _UnsoundError
        upright = _unflatten({**record, "transposed": False}, tensors, name, shape[::-1])
        return upright.t()  # type: ignore[no-any-return]  # a GBLRTensor
    plan = Plan.from_dict(record["plan"])
    m, n = shape[0], prod(shape[1:])
    factors_name, intervals_name, scales_name = part_names(name)
    factors, scales = tensors[factors_name], tensors.get(scales_name)
    if factors.dim() != 1 or (factors.dtype == torch.int8) != (scales is not None):
        raise _UnsoundError
    if not (factors if scales is None else scales).is_floating_point():
        raise _UnsoundError
    if record.get("dense", False):
        if factors.numel() != m * n or plan.block_rows or (scales is not None and scales.shape != (m,)):
            raise _UnsoundError
        layout = Layout((m, n), m, (m,), m * n, (), (), 0, dense=True)
        return GBLRTensor(factors, torch.zeros(0, dtype=torch.int32), layout, plan, shape, scales)
    matrix = _matrix(record, factors, tensors[intervals_name], m, n)
    if not plan.block_rows or plan.block_cols % prod(shape[2:]):
        raise _UnsoundError
    if matrix.live().rows.num_components != matrix.rows.num_components:
        raise _UnsoundError
    layout, values, lists = pack(matrix, plan.block_rows, plan.block_cols, plan.even and len(shape) == 2)
    if scales is not None:
        if scales.shape != (layout.num_components,):
            raise _UnsoundError
        scales = scales[_order(layout, lists)]
    layout, lists = narrowed(layout, lists)
    return GBLRTensor(values, lists, layout, plan, shape, scales).with_matrix()


def _matrix(record: Mapping[str, Any], factors: Tensor, ends: Tensor, m: int, n: int) -> StructuredMatrix:
    if ends.dim() != 2 or ends.shape[0] != 4 or ends.dtype not in (torch.uint8, torch.int16, torch.int32):
        raise _UnsoundError
    num = ends.shape[1]
    splits = record.get("splits", [num])
    if (
        not isinstance(splits, list)
        or not all(_is_count(size) or size == 0 for size in splits)
        or _too_many(num, (m, n))
    ):
        raise _UnsoundError
    if not splits or sum(splits) != num or m % len(splits):
        raise _UnsoundError
    split_rows = m // len(splits)
    row_width, row_start, col_width, col_start = ends.long().unbind()
    rows, cols = Intervals(row_width, row_start, split_rows), Intervals(col_width, col_start, n)
    inside = int(row_width.sum())
    if inside + int(col_width.sum()) != factors.numel():
        raise _UnsoundError
    u, v = factors.new_zeros(num, split_rows), factors.new_zeros(num, n)
    u[rows.support()], v[cols.support()] = factors[:inside], factors[inside:]
    return StructuredMatrix(u, v, rows, cols, tuple(splits))
