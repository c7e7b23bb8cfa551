"""Settings that say how a dense layer becomes a trainable structured one, and the layer that they make.

:class:`LayerSettings` make a GBLR layer whose structure is learned. :class:`FamilySettings` make a layer of any family,
whose structure is fixed from the beginning and whose factors train.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..decomposition import METHODS, initialise
from ..decomposition.anchor import anchored
from ..decomposition.exact import full_lines
from ..errors import BudgetError, ConfigError
from ..families.layers import FamilyLayer, trainable
from ..families.registry import get
from ..layers import GBLRLayer
from ..layers.dense import structured_like, weight_matrix
from ..layers.learned_rank import learned_rank_like
from ..matrix.metric import Metric
from ..matrix.structure import StructuredMatrix
from ..utils.validation import check_row_splits, check_tile

__all__ = ["DENSE", "EMBEDDED", "INITIALISERS", "UNBUDGETED", "FamilySettings", "LayerSettings", "structured_from"]

EMBEDDED = ("block_low_rank", "block_sparse", "block_diagonal")
"""Families whose members are GBLR matrices as they stand (and low rank, which is ``"svd"`` at a budget)."""

LEARNED_RANK = "learned_rank"
"""A full SVD whose components are learned to be on or off on both full axes; it has no other settings."""

DENSE = "dense"
"""The weight itself, one component a row or column; what is learned is then decomposed anew at the budget."""

INITIALISERS = (DENSE, *METHODS, *EMBEDDED, LEARNED_RANK)
"""Names of all initialisers."""

UNBUDGETED = (DENSE, "svd", "random", LEARNED_RANK)
"""Initialisers that begin with full widths unless they are given a budget (``"dense"`` takes none)."""


@dataclass(frozen=True)
class LayerSettings:
    """How a dense layer is turned into a trainable GBLR layer, whose structure is learned.

    Args:
        initialiser: ``"dense"`` (the weight itself, which is decomposed anew while it is trained), ``"svd"`` (full
            widths, as published), ``"trapezoid"``, ``"random"``, or at
            ``budget`` a decomposition (``"pursuit"``, ``"gblr"``) or a family that GBLR contains
            (``"block_low_rank"``, ``"block_sparse"``, ``"block_diagonal"``); ``"learned_rank"``: a full SVD whose
            components are learned to be on or off on both full axes, with no other settings.
        num_components: K per split; default min(m / s, n).
        row_splits: Number of matrices packed along the rows (packed query, key, value: 3).
        align: Tile of rows and columns to which intervals snap; an integer or a pair.
        budget: Relative FLOPs to start at, for initialisers that take one.
        seed: Seed of random initialisers.
    """

    initialiser: str = "svd"
    num_components: int | None = None
    row_splits: int = 1
    align: int | tuple[int, int] = 1
    budget: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class FamilySettings:
    """How a dense layer is turned into a layer of a family, whose structure is fixed and whose factors train.

    Args:
        family: Its name, see :func:`gblr_plugin.families.names`; ``"gblr"`` too.
        budget: Relative FLOPs in (0, 1].
        row_splits: Number of matrices packed along the rows (packed query, key, value: 3).
        options: The family's own, see its class.
    """

    family: str
    budget: float
    row_splits: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)


def structured_from(
    module: nn.Module,
    settings: LayerSettings | FamilySettings,
    target: Tensor | None = None,
    metric: Metric | None = None,
) -> GBLRLayer | FamilyLayer:
    """Make the trainable layer that takes the place of a dense one.

    Args:
        module: The dense layer.
        settings: What it is to become.
        target: (m, n) matrix to approximate in place of the layer's weight.
        metric: Norm in which to approximate; default the Frobenius norm.

    Raises:
        ConfigError: If the layer or a setting cannot be used.
    """
    weight = weight_matrix(module) if target is None else target
    if isinstance(settings, FamilySettings):
        options = {**settings.options, "row_splits": settings.row_splits, "calibration": metric}
        return trainable(get(settings.family), module, settings.budget, weight=weight, **options)
    if settings.initialiser == LEARNED_RANK:
        alone = {"num_components": (None,), "row_splits": (1,), "align": (1, (1, 1))}
        changed = next((name for name, values in alone.items() if getattr(settings, name) not in values), None)
        if changed is not None:
            raise ConfigError(f"{LEARNED_RANK} begins at the full SVD, on both full axes: leave {changed} out")
        return learned_rank_like(module, weight)
    tiles = settings.align if isinstance(settings.align, tuple) else (settings.align, settings.align)
    layer = structured_like(module, anchored(initial_matrix(weight, settings, metric), tiles), align=settings.align)
    layer.use_low_rank_form()
    return layer


def initial_matrix(weight: Tensor, settings: LayerSettings, metric: Metric | None = None) -> StructuredMatrix:
    """Make the GBLR matrix from which a layer begins to learn.

    A family's matrix is within the budget as the family counts. As components, its dense blocks of h x w cost more,
    h w + min(h, w) multiply-adds each, until learning shrinks them to the budget. If the budget of a layer, as an
    allocation may set it, is below the family's smallest matrix, the weight is decomposed by ``"gblr"`` instead.

    Args:
        weight: (m, n) to approximate.
        settings: The initialiser and what it takes.
        metric: Norm in which to approximate; default the Frobenius norm.

    Raises:
        ConfigError: If the settings cannot be used for this weight.
    """
    method = settings.initialiser
    if method == DENSE:
        if settings.budget is not None or settings.num_components is not None:
            raise ConfigError("initialise: 'dense' begins at the whole weight; leave its budget and num_components out")
        check_row_splits("initialise: row_splits", settings.row_splits, len(weight))
        tiles = check_tile("initialise: align", settings.align)
        return StructuredMatrix.cat([full_lines(split, tiles) for split in weight.chunk(settings.row_splits)], 0)
    if method in EMBEDDED:
        matrix = _embedded(weight, settings, metric)
        if matrix is not None:
            return matrix
        method = "gblr"
    return initialise(
        weight,
        method,
        num_components=settings.num_components,
        row_splits=settings.row_splits,
        budget=settings.budget,
        align=settings.align,
        seed=settings.seed,
        calibration=metric,
    )


def _embedded(weight: Tensor, settings: LayerSettings, metric: Metric | None) -> StructuredMatrix | None:
    """Project the weight onto the family; ``None`` if the budget does not allow its smallest member."""
    name, budget = settings.initialiser, settings.budget
    if budget is None:
        raise ConfigError(f"initialise: {name!r} needs a budget")
    if settings.align not in (1, (1, 1)):
        raise ConfigError(f"initialise: {name!r} has no aligned form; leave align (granularity) at 1 or use 'gblr'")
    if settings.num_components is not None:
        raise ConfigError(f"initialise: {name!r} has as many components as its blocks; leave num_components out")
    try:
        member = get(name).from_dense(weight, budget, row_splits=settings.row_splits, calibration=metric)
    except BudgetError:
        return None
    return member.to_structured()
