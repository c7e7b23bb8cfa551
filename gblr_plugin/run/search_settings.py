"""The settings of `gblr search`; one dataclass field is one key of the YAML file."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass, field
from typing import Annotated, Any

from ..errors import ConfigError
from ..utils.declared import Integer, Interval, OneOf, check_declared
from ..utils.validation import did_you_mean
from .settings import Count, Positive, RunSettings
from .yaml_config import Located

__all__ = ["TUNERS", "SearchSettings", "Tuner", "refuse_plain_experiment"]

TUNERS = {
    "TPE": "tpe_tuner.TpeTuner",
    "Random": "random_tuner.RandomTuner",
    "GridSearch": "gridsearch_tuner.GridSearchTuner",
    "Evolution": "evolution_tuner.EvolutionTuner",
    "Anneal": "hyperopt_tuner.HyperoptTuner",
    "GP": "gp_tuner.GPTuner",
    "Metis": "metis_tuner.MetisTuner",
    "SMAC": "smac_tuner.SMACTuner",
    "DNGO": "dngo_tuner.DNGOTuner",
}
"""NNI's tuners over an ordinary search space, and their classes in ``nni.algorithms.hpo``."""

_NO_ARGUMENTS = ("GridSearch",)
_NO_DIRECTION = ("GridSearch", "Random")


@dataclass
class Tuner:
    """What proposes the next trial.

    Args:
        name: A key of :data:`TUNERS`.
        args: Its arguments, as NNI calls ``classArgs`` (``seed`` of TPE and Random, ``population_size`` of Evolution);
            the direction follows from the task.
    """

    name: str = "TPE"
    args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in TUNERS:
            hint = did_you_mean(self.name, TUNERS)
            raise ConfigError(f"name: unknown tuner {self.name!r}{hint} (allowed: {', '.join(TUNERS)})")
        if "optimize_mode" in self.args:
            raise ConfigError("args: leave optimize_mode out, it follows from the task's metric")
        if self.args and self.name in _NO_ARGUMENTS:
            raise ConfigError(f"args: {self.name} takes none")

    def class_args(self, higher_is_better: bool) -> dict[str, Any]:
        """NNI's ``classArgs``."""
        if self.name in _NO_DIRECTION:
            return dict(self.args)
        return {**self.args, "optimize_mode": "maximize" if higher_is_better else "minimize"}

    def check(self, space: dict[str, dict[str, Any]], higher_is_better: bool) -> None:
        """Try the tuner on the space.

        Raises:
            ConfigError: If it is not installed, or does not take its arguments or the space.
        """
        module, _, name = TUNERS[self.name].partition(".")
        try:
            kind = getattr(importlib.import_module(f"nni.algorithms.hpo.{module}"), name)
        except ImportError as error:
            raise ConfigError(f"tuner: {self.name} is not installed with NNI: {error}") from error
        first = ("anneal",) if self.name == "Anneal" else ()
        try:
            tuner = kind(*first, **self.class_args(higher_is_better))
            tuner.update_search_space(space)
            tuner.generate_parameters(0)
        except Exception as error:  # every tuner has errors of its own
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(f"tuner: {self.name} does not take its arguments or this space: {reason}") from error


def refuse_plain_experiment(located: Located) -> None:
    """Say how to start a config in NNI's own format.

    Raises:
        ConfigError: If this is one.
    """
    if "trialCommand" not in located.data and "trial_command" not in located.data:
        return
    nnictl = "nnictl create"
    if importlib.util.find_spec("pkg_resources") is None:
        nnictl = "nnictl does not start without pkg_resources, which setuptools<81 has"
    raise ConfigError(
        f"{located.source}: an experiment in NNI's own format; start it from Python: nni.experiment.Experiment("
        f"ExperimentConfig.load({located.source!r})).run(8080) ({nnictl})"
    )


@dataclass
class SearchSettings:
    """The settings of a search.

    Args:
        run: The run that is varied, as ``gblr run`` takes it, with one method. It must be complete by itself.
        space: What varies: keys of the run, with dots (``finetune.lr``, ``methods.0.warmup``; ``*`` for every entry of
            a list), or ``budget``, ``compressor`` and ``initialiser``, each with one of NNI's types.
        tuner: What proposes the next trial.
        trials: Largest number of trials.
        concurrency: Largest number of trials at a time.
        trial_minutes: A trial that takes longer is stopped.
        minutes: After them the search ends, with the trials that are done.
        flops_price: What the tuner subtracts from the metric (adds, where lower is better) for relative FLOPs of 1.
            With 0 it looks at the metric alone, and so at the largest budgets.
        network: ``"private"``: NNI's service and the trials run in a network of their own, where the system allows it.
            ``"host"``: the service listens on *every* interface of this machine; see docs/searching.md.
        port: Port of NNI's service in the host's network; default a free one.
    """

    run: RunSettings
    space: dict[str, Any]
    tuner: Tuner = field(default_factory=Tuner)
    trials: Count = 20
    concurrency: Count = 1
    trial_minutes: Positive | None = None
    minutes: Positive | None = None
    flops_price: Annotated[float, Interval("[0, inf)")] = 0.0
    network: Annotated[str, OneOf(("private", "host"))] = "private"
    port: Annotated[int, Integer(1024, 65535)] | None = None

    def __post_init__(self) -> None:
        check_declared(self)
        names = [method.name for method in self.run.methods]
        if len(names) != 1:
            raise ConfigError(
                f"run: methods: a trial compresses by one method, got {', '.join(names)}; give one, and vary compressor"
            )

    @property
    def task(self) -> str:
        """Name of the run's task."""
        return self.run.task
