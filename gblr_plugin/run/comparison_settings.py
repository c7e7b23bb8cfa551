"""The settings of `gblr compare`; one dataclass field is one key of the YAML file."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from ..calibration.batches import CalibrationSettings
from ..errors import ConfigError
from ..utils.declared import check_declared
from .settings import Budget, Count, Method, RunSettings, Seed, Threads, Training

__all__ = ["ComparisonSettings"]


@dataclass
class ComparisonSettings:
    """The settings of a comparison.

    Args:
        task: As for ``gblr run``.
        budgets: Relative FLOPs of the compressed layers, each in (0, 1].
        config_list: Which layers, and gblr's own keys; without ``sparse_ratio``, which follows from the budgets.
            Default: the task's layers.
        calibration: Training batches to which the calibrated starts are fitted; methods are fine-tuned from there.
            Without it there is no calibrated phase.
        reorder: As for ``gblr run``.
        model: Arguments of the task.
        seeds: Seeds; each repeats the comparison with another split, initialisation and training.
        dense: Training of the dense network.
        finetune: Training after (gblr: during) compression; the dense network gets it once more too.
        methods: Methods to compare.
        trainer: As for ``gblr run``.
        evaluate_on: The same.
        threads: CPU threads; default torch's.
    """

    task: str
    budgets: list[Budget]
    config_list: list[dict[str, Any]] | None = None
    calibration: CalibrationSettings | None = None
    reorder: list[Any] = field(default_factory=list)
    model: dict[str, Any] = field(default_factory=dict)
    seeds: list[Seed] = field(default_factory=lambda: [0, 1, 2])
    dense: Training = field(default_factory=Training)
    finetune: Training = field(default_factory=Training)
    methods: list[Method] = field(default_factory=lambda: [Method("gblr"), Method("low_rank")])
    trainer: dict[str, Any] = field(default_factory=dict)
    evaluate_on: Count | None = None
    threads: Threads | None = None

    def __post_init__(self) -> None:
        check_declared(self)
        if not self.budgets or len(set(self.budgets)) < len(self.budgets):
            raise ConfigError("budgets must be different relative FLOPs, at least one")
        for entry in self.config_list or []:
            if "sparse_ratio" in entry or "sparse_threshold" in entry:
                raise ConfigError("config_list: budgets say how far to go; leave sparse_ratio and sparse_threshold out")
        for budget in self.budgets:
            self.at(budget)

    def at(self, budget: float) -> RunSettings:
        """The settings of a run at one budget.

        Raises:
            ConfigError: If a value is out of range.
        """
        entries = None
        if self.config_list is not None:
            entries = [{**copy.deepcopy(entry), "sparse_ratio": 1.0 - budget} for entry in self.config_list]
        return RunSettings(
            self.task,
            budget=budget if entries is None else None,
            config_list=entries,
            calibration=self.calibration,
            reorder=self.reorder,
            model=self.model,
            seeds=self.seeds,
            dense=self.dense,
            finetune=self.finetune,
            methods=self.methods,
            trainer=self.trainer,
            evaluate_on=self.evaluate_on,
            threads=self.threads,
        )
