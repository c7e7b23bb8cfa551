"""Pieces of a frozen weight, and weights above or beside each other: slices, splits and concatenations, all exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..errors import GBLRError
from ..matrix.structure import StructuredMatrix
from .weight import Weight

__all__ = ["cat", "mode_of", "select", "slice_of", "split"]


def mode_of(weight: Weight) -> torch.inference_mode:
    """The inference mode in which the weight was made, which torch requires of a view of the weight."""
    return torch.inference_mode(weight.is_inference())


def _axis(weight: Weight, dim: int) -> int:
    dims = len(weight.outer_shape)
    if not -dims <= dim < dims:
        raise IndexError(f"GBLR tensor: axis {dim} is out of range for a weight of shape {weight.outer_shape}")
    return dim % dims


def _rebuilt(
    weights: Sequence[Weight], change: Callable[[list[StructuredMatrix]], StructuredMatrix], outer: tuple[int, ...]
) -> Any:
    """The weight whose matrix is made of those of others by taking and joining components; int8 factors are kept.

    Args:
        weights: Weights of one dtype, on one device, all with int8 factors or none.
        change: Makes the matrix; it may look at nothing but the intervals of the matrices that it is given.
        outer: Shape of the result.
    """
    if any(type(weight.factors) is not Tensor or weight.factors.is_meta for weight in weights):
        raise GBLRError(
            "GBLR tensor: a weight without values, on the meta device or in a program that is being traced, cannot be "
            "cut or concatenated; do it before"
        )
    make: Any = type(weights[0])

    def apply(matrices: list[StructuredMatrix]) -> StructuredMatrix:
        pairs = zip(matrices, weights, strict=True)
        return change([matrix.t() if weight.packing.transposed else matrix for matrix, weight in pairs]).live()

    found = [weight.components() for weight in weights]
    matrix = apply([components for components, _ in found])
    if weights[0].scales is None:
        return make.from_structured(matrix, shape=outer)
    marked = []  # on the same intervals, matrices whose factors are each component's scale
    for components, scales in found:
        assert scales is not None  # int8 factors have scales
        u, v = (axis.support() * scales[:, None] for axis in (components.rows, components.cols))
        marked.append(StructuredMatrix(u, v, components.rows, components.cols, components.split_sizes))
    return make.from_int8(matrix, apply(marked).u.amax(1), outer)


def _cut(weight: Weight, dim: int, start: int, length: int) -> Any:
    """A copy of the indices ``start : start + length`` of one axis, where torch expects a view.

    The full axis gives the same buffers again, and no index at all gives a plain tensor.
    """
    shape = weight.outer_shape
    outer = (*shape[:dim], length, *shape[dim + 1 :])
    with mode_of(weight):
        if length == shape[dim]:
            return weight._apply_fn_to_data(lambda buffer: buffer)
        if not length:
            return torch.empty(outer, dtype=weight.dtype, device=weight.device)
        if dim > 1:
            raise GBLRError(f"GBLR tensor: only channels of a convolution can be cut, not axis {dim} of {shape}")
        taps = prod(shape[2:]) if dim == 1 else 1
        return _rebuilt([weight], lambda matrices: matrices[0].narrow(dim, start * taps, length * taps), outer)


def slice_of(weight: Weight, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Tensor:
    """``weight[start:end]`` along an axis, as ``aten.slice``."""
    if step != 1:
        raise GBLRError(f"GBLR tensor: every {step}th index of an axis has no GBLR structure; slices need step 1")
    dim = _axis(weight, dim)
    begin, stop, _ = slice(start, end).indices(weight.outer_shape[dim])
    return _cut(weight, dim, begin, max(stop - begin, 0))  # type: ignore[no-any-return]  # a tensor


def select(weight: Weight, dim: int, index: int) -> Tensor:
    """One row or column, or what belongs to one channel of a convolution, as ``aten.select``: a plain tensor."""
    dim = _axis(weight, dim)
    size = weight.outer_shape[dim]
    if not -size <= index < size:
        raise IndexError(f"GBLR tensor: index {index} is out of range for axis {dim} of length {size}")
    with mode_of(weight):
        row: Tensor = _cut(weight, dim, index % size, 1).to_dense().select(dim, 0)
        return row


def split(weight: Weight, each: int | list[int], dim: int = 0) -> list[Tensor]:
    """Consecutive pieces of an axis, as ``aten.split`` with one size or with a list of sizes."""
    dim = _axis(weight, dim)
    size = weight.outer_shape[dim]
    sizes = [min(each, size - at) for at in range(0, size, each)] if isinstance(each, int) else each
    return [_cut(weight, dim, end - length, length) for length, end in zip(sizes, accumulate(sizes), strict=True)]


def cat(kind: type[Tensor], tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Weights of the class ``kind`` above (``dim=0``) or beside (``dim=1``) each other, as ``aten.cat``."""
    weights: list[Any] = [tensor for tensor in tensors if isinstance(tensor, kind) or tensor.numel()]
    first: Any = next(weight for weight in weights if isinstance(weight, kind))
    dim = _axis(first, dim)
    facts = [(type(w), w.dtype, w.device, getattr(w, "factor_dtype", None)) for w in weights]
    if len(set(facts)) > 1:
        raise GBLRError(
            "GBLR tensor: only GBLR tensors of one dtype, device and dtype of factors are concatenated, got "
            + ", ".join(f"{cls.__name__} {dtype} {device} {factors}" for cls, dtype, device, factors in facts)
            + "; to_dense() gives the plain tensor"
        )
    shapes = [tuple(weight.shape) for weight in weights]
    if dim > 1 or len({(*shape[:dim], *shape[dim + 1 :]) for shape in shapes}) > 1:
        raise GBLRError(f"GBLR tensor: weights of shapes {shapes} are not concatenated along axis {dim}")
    outer = (*shapes[0][:dim], sum(shape[dim] for shape in shapes), *shapes[0][dim + 1 :])
    return _rebuilt(weights, lambda matrices: StructuredMatrix.cat(matrices, dim), outer)  # type: ignore[no-any-return]  # a tensor
