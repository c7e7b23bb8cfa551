"""ALDS: column-partitioned low rank, with the budget shared out by the largest relative spectral error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..decomposition.curves import Curve, least_maximum
from ..errors import ConfigError
from ..matrix.metric import Metric
from .checks import check_count, check_weight, too_small
from .grid import BlockGrid, grid_factors
from .partition import Partition

__all__ = ["Alds"]

_CANDIDATES = (1, 2, 3, 4, 6, 8, 12, 16)


@dataclass(frozen=True, eq=False)
class _Choice:
    """One number of parts of one layer: what each rank costs and how large its error can be."""

    parts: int
    cost: Tensor  # (J,) int64 multiply-adds of rank 1 .. J
    error: Tensor  # (J,) float64 bound on the relative spectral error, not increasing


@dataclass(frozen=True, eq=False)
class Alds(BlockGrid):
    r"""k blocks of columns, each of rank j: j (k m + n) multiply-adds (Liebenwein et al., NeurIPS 2021, Sec. 3.1).

    ``W = [W_1 ... W_k]`` and ``W_i ~ U_i V_i``. The relative spectral error of a layer is at most
    ``sqrt(k) max_i s_{j+1}(W_i) / s_1(W)`` (Sec. 3.2), and over a network the parts and ranks of all layers are chosen
    to make the largest of these bounds as small as the budget allows. The published search alternates between ranks
    and parts from random starts; here each layer's cheapest (k, j) below an error is read off, and bisection over that
    error is exact.

    Options:
        parts: k, or ``None`` for that of 1, 2, 3, 4, 6, 8, 12, 16 with the least error bound.
    """

    name = "alds"

    @classmethod
    def _project(cls, weight: Tensor, max_multiply_adds: int, *, metric: Metric, parts: int | None = None) -> Alds:
        m, n = weight.shape
        best: tuple[float, int, int] | None = None
        for choice in _choices(weight, parts):
            rank = int((choice.cost <= max_multiply_adds).sum())
            if rank and (best is None or float(choice.error[rank - 1]) < best[0]):
                best = float(choice.error[rank - 1]), choice.parts, rank
        if best is None:
            count = parts or 1
            raise too_small(cls.name, weight.shape, max_multiply_adds, count * m + n, f"{count} parts of rank 1")
        return cls(*grid_factors(weight, Partition(m, 1), Partition(n, best[1]), best[2], metric))

    @classmethod
    def budgets(
        cls,
        weights: Mapping[str, Tensor],
        budget: float,
        *,
        row_splits: Mapping[str, int] | None = None,
        parts: int | None = None,
        **options: Any,
    ) -> dict[str, float]:
        """Budgets that minimise the largest error bound over the layers, by multiply-adds of one product each.

        Raises:
            ConfigError: If the budget is too small for rank 1 in every layer.
        """
        targets = {
            name: check_weight(f"{cls.name}: layer {name!r}", weight, budget) for name, weight in weights.items()
        }
        splits = row_splits or {}
        curves = {name: error_curve(target, splits.get(name, 1), parts) for name, target in targets.items()}
        max_multiply_adds = sum(budget * target.numel() for target in targets.values()) + 1e-6
        least = {name: float(curve.cost[0]) for name, curve in curves.items()}
        if sum(least.values()) > max_multiply_adds:
            total = sum(target.numel() for target in targets.values())
            raise ConfigError(
                f"{cls.name}: a budget of {budget:g} does not pay for rank 1 in each of {len(curves)} layers, which "
                f"takes {sum(least.values()) / total:.4g}; raise the budget or leave layers out"
            )
        most = {name: float(target.numel()) for name, target in targets.items()}
        spent = least_maximum(curves, max_multiply_adds, least, most)
        return {name: min(1.0, cost / targets[name].numel()) for name, cost in spent.items()}


def error_curve(weight: Tensor, row_splits: int = 1, parts: int | None = None) -> Curve:
    """Bound on the relative spectral error over multiply-adds, with the best number of parts at each.

    Args:
        weight: (m, n) floating point.
        row_splits: Matrices stacked in the rows, all with the same parts and rank.
        parts: Number of parts, or ``None`` for the best.

    Returns:
        The curve, from rank 1 up to at most the dense cost.
    """
    choices = _together([_choices(rows, parts) for rows in weight.double().chunk(row_splits)])
    return Curve.envelope(torch.cat([c.cost for c in choices]), torch.cat([c.error for c in choices]))


def _choices(weight: Tensor, parts: int | None) -> list[_Choice]:
    """The candidate numbers of parts of a float64 weight, with cost at most dense."""
    m, n = weight.shape
    counts = [c for c in _CANDIDATES if c <= n] if parts is None else [check_count("alds", "parts", parts, n)]
    largest = torch.linalg.matrix_norm(weight, 2).clamp(min=torch.finfo(torch.float64).tiny)
    choices = []
    for count in counts:
        blocks = Partition(n, count).split(weight).transpose(0, 1)  # (k, m, p)
        values = torch.linalg.svdvals(blocks).amax(0)
        tail = torch.cat([values[1:], values.new_zeros(1)])
        ranks = torch.arange(1, len(values) + 1)
        cost = ranks * (count * m + n)
        keep = cost <= m * n
        if bool(keep.any()):
            choices.append(_Choice(count, cost[keep], (tail * count**0.5 / largest).cpu()[keep]))
    if not choices:
        raise ConfigError(f"alds: a {m} x {n} matrix in {counts[0]} parts costs more than dense already at rank 1")
    return choices


def _together(choices: list[list[_Choice]]) -> list[_Choice]:
    """Choices of matrices stacked in one layer, all with the same parts and rank."""
    return [
        _Choice(same[0].parts, same[0].cost * len(same), torch.stack([choice.error for choice in same]).amax(0))
        for same in zip(*choices, strict=True)
    ]
