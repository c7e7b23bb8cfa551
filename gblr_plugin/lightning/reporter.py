"""Curves and pictures of structures, for whatever loggers a Trainer has."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ..layers import GBLRLayer, StructuredLayer
from ..learning.learner import StructureLearner
from ..matrix.structure import StructuredMatrix
from ..monitoring.pictures import structure_image
from ..monitoring.sinks import send_snapshot
from ..monitoring.statistics import Statistics, layer_statistics, total_statistics
from ._compat import takes_pictures

__all__ = ["StructureLog", "log_pictures", "scalars"]


class StructureLog:
    """The curves of the layers of one callback, as they are logged.

    Args:
        every: Optimizer steps between scalars; default the Trainer's.
        picture_every: Optimizer steps between pictures, besides those of epochs.

    Attributes:
        history: ``{"relative_flops": [(step, value), ...], "sigma": ..., ...}`` of all layers together.
        last_step: Of the Trainer, when a batch ended last.
        last_pictured: Step of the last pictures.
    """

    def __init__(self, every: int | None, picture_every: int | None) -> None:
        self._every, self._picture_every = every, picture_every
        self.history: dict[str, list[tuple[int, float]]] = {}
        self.last_step, self.last_pictured = 0, -1
        self._last_logged = -1
        self._shown = False

    def begin(self, step: int) -> None:
        """A training starts at this step of the Trainer."""
        self.last_step, self.last_pictured, self._last_logged, self._shown = step, -1, -1, False

    def advance(self, trainer: Any) -> tuple[bool, bool]:
        """After an optimizer step: whether scalars and whether pictures are due; scalars are after the first step."""
        before, self.last_step = self.last_step, trainer.global_step
        first, self._shown = not self._shown, True
        scalars_due = first or _due(before, self.last_step, self._every or trainer.log_every_n_steps)
        return scalars_due, _due(before, self.last_step, self._picture_every)

    def log(
        self, trainer: Any, layers: Mapping[str, StructuredLayer], learner: StructureLearner | None, totals: str
    ) -> dict[str, float]:
        """Log the scalars of this step, once, and return them by name.

        Args:
            trainer: Its loggers get them.
            layers: By name.
            learner: What drives the layers, where it is known.
            totals: Begins the names of what all layers are together.
        """
        statistics = layer_statistics(layers)
        sigma = next((layer.sigma for layer in layers.values() if layer.sigma is not None), None)
        frozen = _frozen(layers) if learner is None else learner.frozen
        lambdas = {} if learner is None else learner.lambdas()
        values = scalars(statistics, total_statistics(statistics), sigma, frozen, lambdas, totals=totals)
        step = trainer.global_step
        if step != self._last_logged:
            for logger in trainer.loggers:
                logger.log_metrics(dict(values), step=step)
            self._remember(step if learner is None else learner.step_count, values, totals)
        self._last_logged = step
        return values

    def _remember(self, step: int, values: Mapping[str, float], totals: str) -> None:
        for name, value in values.items():
            if not name.startswith(totals):
                continue
            curve = self.history.setdefault(name.removeprefix(totals), [])
            if curve and curve[-1][0] == step:  # a second fit starts where the first ended
                curve.pop()
            curve.append((step, value))


def _frozen(layers: Mapping[str, StructuredLayer]) -> bool:
    """Whether the structure is final: fixed, and not that of layers that are all trained as dense weights first."""
    fixed = all(layer.structure_frozen for layer in layers.values())
    return fixed and not all(isinstance(layer, GBLRLayer) and layer.trains_dense_weight for layer in layers.values())


def _due(before: int, now: int, every: int | None) -> bool:
    """Whether a multiple of ``every`` was reached; several optimizers may take several steps a batch."""
    return bool(every) and before // (every or 1) != now // (every or 1)


def scalars(
    layers: Mapping[str, Statistics],
    total: Statistics,
    sigma: float | None,
    frozen: bool,
    lambdas: Mapping[str, float],
    *,
    totals: str = "gblr/",
) -> dict[str, float]:
    """Everything that is logged at one step, by name.

    ``<totals><what>`` for all layers together, ``gblr_layers/<layer>/<what>`` for each: TensorBoard makes a section
    of the first part of a name. ``sigma`` is left out once the masks are exact boxcars (it is infinite then).
    """
    values = {f"{totals}{what}": value for what, value in total.items().items()}
    values[f"{totals}frozen"] = float(frozen)
    if sigma is not None:
        values[f"{totals}sigma"] = sigma
    if lambdas:
        values[f"{totals}lambda"] = sum(lambdas.values()) / len(lambdas)
    for name, statistics in layers.items():
        values |= {f"gblr_layers/{name}/{what}": value for what, value in statistics.items().items()}
        if name in lambdas:
            values[f"gblr_layers/{name}/lambda"] = lambdas[name]
    return {name: value for name, value in values.items() if math.isfinite(value)}


def log_pictures(
    loggers: Iterable[Any],
    layers: Mapping[str, StructuredLayer],
    step: int,
    *,
    max_size: int,
    budget: float | Mapping[str, float | None] | None = None,
    lambdas: Mapping[str, float] | None = None,
) -> None:
    """Draw each layer's structure, if a logger takes pictures, and send a snapshot where one is taken.

    Layers of a family are drawn as the GBLR matrices that they are, and left out where they are none.

    Loggers that take pictures are TensorBoard's, which also gets the data of its GBLR tab, and any that has
    ``log_image`` (Weights & Biases).
    """
    takers = [(logger, how) for logger in loggers if (how := takes_pictures(logger))]
    if not takers:
        return
    found = {name: _drawn(layer) for name, layer in layers.items()}
    sources = {name: source for name, source in found.items() if source is not None}
    images = {f"gblr_structure/{name}": structure_image(source, max_size) for name, source in sources.items()}
    for logger, how in takers:
        for name, image in images.items():
            if how == "log_image":
                logger.log_image(key=name, images=[image.permute(1, 2, 0).numpy()], step=step)
            else:
                logger.experiment.add_image(name, image, global_step=step)
        if sources:
            send_snapshot(logger, sources, step, budget=budget, lambdas=lambdas)


def _drawn(layer: StructuredLayer) -> GBLRLayer | StructuredMatrix | None:
    """What has the intervals of a layer."""
    return layer if isinstance(layer, GBLRLayer) else layer.frozen_structure()
