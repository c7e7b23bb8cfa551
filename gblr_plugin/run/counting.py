"""Counts the multiply-adds of a config's network, dense and as planned, before data is read or a network trained."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ConfigError, first_line
from ..nni.settings import read_config
from ..surgery.counting import report
from ..surgery.planning import planned
from ..surgery.report import Report
from .context import config_list_of, make_task
from .settings import RunSettings

__all__ = ["count_config"]


def count_config(settings: RunSettings) -> Report:
    """Count a config's network on the meta device: no memory for weights, no arithmetic.

    Layers to which the config gives a budget are shown as ``planned``, at that budget
    (:func:`~gblr_plugin.surgery.planning.planned`). A fixed lambda has no known cost: its layers count dense.

    Args:
        settings: Settings of the run; the run's first method's ``config_list``, or its own.

    Raises:
        ConfigError: If the task, its network or the config list cannot be used.
    """
    task = make_task(settings)
    with torch.device("meta"):
        network = getattr(task, "architecture", task.network)()
        example = task.example_input()
    try:
        counted = report(network, example)
    except (RuntimeError, NotImplementedError, IndexError, TypeError, ValueError) as error:
        raise ConfigError(f"model: the network cannot be counted without weights: {first_line(error)}") from error
    return planned(counted, _budgets(settings, task, network), "the config does not ask for it")


def _budgets(settings: RunSettings, task: Any, network: torch.nn.Module) -> dict[str, float]:
    """Budget by layer name."""
    entries = config_list_of(settings.methods[0], settings, task)
    module = task.module(network, settings.dense, 1)  # names in config lists are the Lightning module's
    plan = read_config(module, entries)
    return {
        name.removeprefix("network."): layer.goal.budget
        for name, layer in plan.layers.items()
        if layer.goal.budget is not None
    }
