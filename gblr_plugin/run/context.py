"""The values that every step of a run needs: the settings, the task, the console, and the folder of events."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from .. import __version__, families
from ..errors import ConfigError
from ..kernels.measure import circumstances
from ..learning.pace import PACE
from ..tasks import get_task
from ..utils.console import Console
from .measure import METRICS
from .settings import Method, RunSettings, Training

__all__ = ["DENSE", "RunContext", "config_list_of", "environment", "make_task"]

DENSE = "dense"
"""Name of the network before compression in reports, folders and lines of the console."""


@dataclass(frozen=True)
class RunContext:
    """The surroundings of a run.

    Args:
        settings: What to do.
        task: Network, data and metric.
        console: Console that shows the progress.
        events: Folder of TensorBoard events, made when it is needed.
        watchers: Callbacks of every training under a method.
    """

    settings: RunSettings
    task: Any
    console: Console = field(default_factory=Console)
    events: Path = Path()
    watchers: tuple[pl.Callback, ...] = ()

    @classmethod
    def of(cls, settings: RunSettings) -> RunContext:
        """The context of a run that only looks at things.

        Raises:
            ConfigError: If the task cannot be made.
        """
        return cls(settings, make_task(settings))

    def on(self, task: Any, name: str) -> RunContext:
        """The same for another task, whose events go to a folder of that name."""
        return replace(self, task=task, events=self.events / name)

    def training_of(self, method: Method) -> Training:
        """The training settings of a method; if it has none, the run's ``finetune``."""
        return method.training or self.settings.finetune


def make_task(settings: RunSettings) -> Any:
    """The task that the settings name, made with its arguments.

    Raises:
        ConfigError: If there is none, or an argument is wrong.
    """
    kind = get_task(settings.task)
    try:
        task = kind(**settings.model)
    except TypeError as error:
        raise ConfigError(f"model: {error}") from error
    metric = getattr(task, "metric", None)
    if metric not in METRICS:
        raise ConfigError(f"task: {settings.task!r} is judged by {metric!r}; allowed are {', '.join(METRICS)}")
    return task


def config_list_of(method: Method, settings: RunSettings, task: Any) -> list[dict[str, Any]]:
    """NNI's compression config of a method: its own, the run's, or the task's layers at the run's budget.

    Where the weights are trained already, gblr begins at their decomposition if the run names a budget alone, and the
    factors of other families move as far as those of gblr do then, unless the config gives their ``pace``.
    """
    trained = method.start == "trained" or "pretrained" in settings.model
    given = settings.config_list if method.config_list is None else method.config_list
    if given is None:
        start: dict[str, Any] = {"initialiser": "gblr"} if method.name == "gblr" and trained else {}
        given = [{"op_names": list(task.layers), "sparse_ratio": 1 - (settings.budget or 1.0), "gblr": start}]
        if settings.allocation is not None:
            given[0]["global_group_id"] = "all"
            start["allocation"] = settings.allocation
    entries = copy.deepcopy(given)
    if trained and method.name in (*families.names(), "gblr_fixed") and method.name != "gblr":
        for entry in entries:
            if "gblr_pace" not in entry:
                entry["gblr"] = {"pace": PACE, **entry.get("gblr", {})}
    return entries


def environment() -> dict[str, Any]:
    """Versions, threads and processor, for a report."""
    import platform

    return {
        "gblr_plugin": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "processor": circumstances(torch.device("cpu"), torch.float32)["machine"],
    }
