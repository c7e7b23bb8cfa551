"""Every structure family as a compressor of NNI's shape: projected in one shot, then fine-tuned by the evaluator."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nni.compression.utils import Evaluator
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import families
from ..calibration.batches import CalibrationSettings
from ..errors import ConfigError
from ..layers.dense import weight_matrix
from ..learning.pace import FactorPace
from ..surgery.conversion import prepare_layers
from ..surgery.layer_settings import FamilySettings
from .calibration import allocated_budgets, calibration_data
from .evaluators import record_optimizers, train_bound
from .optimizers import adopt, check_recorded, rename_recorded
from .settings import LayerConfig, read_config

__all__ = ["FamilyCompressor", "family_factory"]

_logger = logging.getLogger(__name__)


class FamilyCompressor:
    """Replaces layers by a structure family at the budgets of an NNI config list, and fine-tunes.

    The structure is fixed from the start, so NNI has nothing to schedule and no masks to apply.

    Args:
        family: Name of the family, see :mod:`gblr_plugin.families`.
        model: Changed in place.
        config_list: As for gblr: ``sparse_ratio`` r gives a budget of 1 - r; layers that share a ``global_group_id``
            share a budget, which the family may split among them (ALDS does). gblr's key ``pace`` says how far
            factors move in a step, see :class:`~gblr_plugin.learning.pace.FactorPace`; default 1.
        evaluator: Fine-tunes; without one :meth:`compress` only returns the model.
        calibration: ``CalibrationSettings``, a table of their fields, or ``True``: the projection is fitted to the
            layers' outputs over training batches of the evaluator.
        **options: The family's own.

    Raises:
        ConfigError: Before the model is touched, for a config, budget or option that cannot be used.
    """

    def __init__(
        self,
        family: str,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        evaluator: Evaluator | None = None,
        calibration: CalibrationSettings | Mapping[str, Any] | bool | None = None,
        **options: Any,
    ) -> None:
        read = read_config(model, config_list)
        config = read.layers
        calibrated = CalibrationSettings.read(calibration)
        fixed = next((name for name, layer in config.items() if layer.goal.budget is None), None)
        if fixed is not None:
            raise ConfigError(f"layer {fixed!r}: {family} has no lambda; give sparse_ratio instead of sparse_threshold")
        if "row_splits" in options:
            raise ConfigError(f"compressor {family!r}: row_splits: it belongs into the config list, by layer")
        if evaluator is not None:
            record_optimizers(evaluator, model)
            check_recorded(evaluator, config)
        data = None if calibrated is None else calibration_data(evaluator, model, calibrated)
        kind = families.get(family)
        if family != "gblr" and any(layer.settings.align != (1, 1) for layer in config.values()):
            _logger.warning("%s has no intervals: granularity is left out", family)
        budgets = _budgets(kind, config, options)
        uniform = kind.budgets.__func__ is families.FamilyMatrix.budgets.__func__  # type: ignore[attr-defined]  # methods
        goals = {name: layer.goal.budget for name, layer in config.items()}
        budgets |= allocated_budgets(model, config, goals, data, "sensitivity" if uniform else None)
        settings = {name: _settings(family, layer, budgets[name], options) for name, layer in config.items()}
        modules = prepare_layers(model, settings, calibration=data)
        _check_bounds(family, config, modules)
        if evaluator is not None:
            rename_recorded(evaluator, {f"{name}.weight": _factor_names(name, new) for name, new in modules.items()})
            adopt(evaluator, (), None, self._optimizer_built)
        self._pace = FactorPace(list(modules.values()), read.pace or 1.0)
        self.bound_model, self.evaluator = model, evaluator

    def _optimizer_built(self, optimizer: Optimizer) -> None:
        self._pace.follow(optimizer)

    def compress(self, max_steps: int | None = None, max_epochs: int | None = None) -> tuple[nn.Module, dict[str, Any]]:
        """Fine-tune for so many steps or epochs.

        Returns:
            The model, and no masks: the layers hold their factors alone.
        """
        if self.evaluator is not None and (max_steps or max_epochs):
            try:
                train_bound(self.evaluator, self.bound_model, max_steps=max_steps, max_epochs=max_epochs)
            finally:
                self._pace.release()
        return self.bound_model, {}

    def unwrap_model(self) -> None:
        """Nothing is wrapped; here because every compressor has it."""


def _settings(family: str, layer: LayerConfig, budget: float, options: Mapping[str, Any]) -> FamilySettings:
    """The settings of one layer: options for all layers, and what the config says of this one."""
    of_layer = {"align": layer.settings.align} if family == "gblr" else {}
    return FamilySettings(family, budget, layer.settings.row_splits, {**of_layer, **options})


def _budgets(kind: Any, config: Mapping[str, LayerConfig], options: Mapping[str, Any]) -> dict[str, float]:
    """Budget of each layer: its own, or its share of its group's."""
    groups: dict[Any, list[str]] = {}
    for name, layer in config.items():
        if layer.allocation is None:
            groups.setdefault(("layer", name) if layer.goal.group is None else layer.goal.group, []).append(name)
    budgets: dict[str, float] = {}
    for members in groups.values():
        weights: dict[str, Tensor] = {name: weight_matrix(config[name].module) for name in members}
        splits = {name: config[name].settings.row_splits for name in members}
        budgets.update(kind.budgets(weights, config[members[0]].goal.budget, row_splits=splits, **options))
    return budgets


def _check_bounds(family: str, config: Mapping[str, LayerConfig], modules: Mapping[str, Any]) -> None:
    """Warn where whole ranks and blocks fall short of the least that a layer of a group was to keep."""
    for name, module in modules.items():
        least, kept = config[name].goal.min_flops, module.relative_flops
        if kept < least - 0.01:
            _logger.warning(
                "layer %r keeps %.3f of its multiply-adds, less than the %.3f that max_sparse_ratio leaves it: "
                "%s has no matrix between that and its budget",
                *(name, kept, least, family),
            )


def _factor_names(name: str, module: nn.Module) -> list[str]:
    return [f"{name}.{parameter}" for parameter, _ in module.named_parameters() if parameter != "bias"]


def family_factory(family: str) -> Callable[..., FamilyCompressor]:
    """Factory for :func:`~gblr_plugin.nni.create_compressor`."""

    def create(
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        evaluator: Evaluator | None = None,
        calibration: CalibrationSettings | Mapping[str, Any] | bool | None = None,
        **options: Any,
    ) -> FamilyCompressor:
        return FamilyCompressor(family, model, config_list, evaluator, calibration, **options)

    return create
