"""Sends scalars and pictures of structures to whatever loggers a Trainer has."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ..layers import GBLRLayer
from ..monitoring.pictures import structure_image
from ..monitoring.sinks import send_snapshot
from ..monitoring.statistics import Statistics

__all__ = ["log_pictures", "log_scalars", "scalars"]


def scalars(
    parts: Mapping[str, Statistics],
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
    for name, part in parts.items():
        values |= {f"gblr_layers/{name}/{what}": value for what, value in part.items().items()}
        if name in lambdas:
            values[f"gblr_layers/{name}/lambda"] = lambdas[name]
    return {name: value for name, value in values.items() if math.isfinite(value)}


def log_scalars(loggers: Iterable[Any], values: Mapping[str, float], step: int) -> None:
    """Log to every logger."""
    for logger in loggers:
        logger.log_metrics(dict(values), step=step)


def _takes_pictures(logger: Any) -> bool:
    return callable(getattr(logger, "log_image", None)) or callable(
        getattr(getattr(logger, "experiment", None), "add_image", None)
    )


def log_pictures(
    loggers: Iterable[Any],
    layers: Mapping[str, GBLRLayer],
    step: int,
    *,
    max_size: int,
    budget: float | Mapping[str, float | None] | None = None,
    lambdas: Mapping[str, float] | None = None,
) -> None:
    """Draw each layer's structure, if a logger takes pictures.

    Those are TensorBoard's, and any that has ``log_image`` (Weights & Biases). TensorBoard also gets the data of its
    GBLR tab.
    """
    takers = [logger for logger in loggers if _takes_pictures(logger)]
    if not takers:
        return
    images = {f"gblr_structure/{name}": structure_image(layer, max_size) for name, layer in layers.items()}
    for logger in takers:
        if callable(getattr(logger, "log_image", None)):
            for name, image in images.items():
                logger.log_image(key=name, images=[image.permute(1, 2, 0).numpy()], step=step)
            continue
        for name, image in images.items():
            logger.experiment.add_image(name, image, global_step=step)
        send_snapshot(logger, layers, step, budget=budget, lambdas=lambdas)
