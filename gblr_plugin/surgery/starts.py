"""Where a structured layer starts: a decomposition of its weight, or a member of a family that GBLR contains."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..decomposition import METHODS, initialise
from ..errors import BudgetError, ConfigError
from ..matrix.metric import Metric
from ..matrix.structure import StructuredMatrix

__all__ = ["EMBEDDED", "INITIALISERS", "LEARNED_RANK", "UNBUDGETED", "StartSettings", "start"]

EMBEDDED = ("block_low_rank", "block_sparse", "block_diagonal")
"""Families whose members are GBLR matrices as they stand (and low rank, which is ``"svd"`` at a budget)."""

LEARNED_RANK = "learned_rank"
"""A full SVD whose components are learned to be on or off as a whole: layers of their own, with no other settings."""

INITIALISERS = (*METHODS, *EMBEDDED, LEARNED_RANK)
"""Names of all starts."""

UNBUDGETED = ("svd", "random", LEARNED_RANK)
"""Starts on full widths unless they are given a budget."""


class StartSettings(Protocol):
    """The settings of one layer that a start needs; see :class:`gblr_plugin.surgery.conversion.LayerSettings`."""

    @property
    def initialiser(self) -> str:
        """One of :data:`INITIALISERS`."""

    @property
    def num_components(self) -> int | None:
        """K of each split."""

    @property
    def row_splits(self) -> int:
        """Number of matrices stacked in the rows."""

    @property
    def align(self) -> int | tuple[int, int]:
        """Tile of rows and columns."""

    @property
    def budget(self) -> float | None:
        """Relative FLOPs."""

    @property
    def seed(self) -> int:
        """Of random draws."""


def start(weight: Tensor, settings: StartSettings, metric: Metric | None = None) -> StructuredMatrix:
    """The structured matrix from which a layer starts to learn.

    Families are counted as they count: as components their dense blocks cost more, h w + min(h, w) multiply-adds, which
    learning takes away again. A budget below a family's smallest member is decomposed instead (an allocation may leave
    a layer that little).

    Args:
        weight: (m, n) to approximate.
        settings: How.
        metric: Norm in which to approximate; default the Frobenius norm.

    Raises:
        ConfigError: If the settings cannot be used for this weight.
    """
    method = settings.initialiser
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


def _embedded(weight: Tensor, settings: StartSettings, metric: Metric | None) -> StructuredMatrix | None:
    """The family's member at the budget; ``None``: it has none so small."""
    from ..families import get  # some of them convert, which starts layers

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
