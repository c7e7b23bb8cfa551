"""The settings of ``gblr run``, with their meaning; one dataclass field is one key of the YAML file."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from ..calibration.allocation import check_rule
from ..calibration.batches import CalibrationSettings
from ..errors import ConfigError
from ..kernels.cpu.threads import MOST_THREADS
from ..surgery.layer_settings import INITIALISERS
from ..utils.declared import Integer, Interval, OneOf, check_declared

__all__ = ["Budget", "Count", "Method", "Positive", "RunSettings", "Seed", "Threads", "Training"]

Budget = Annotated[float, Interval("(0, 1]", "relative FLOPs")]
Count = Annotated[int, Integer(1)]
Fraction = Annotated[float, Interval("[0, 1)")]
Positive = Annotated[float, Interval("(0, inf)")]
Seed = Annotated[int, Integer(0, 2**31 - 1)]
Threads = Annotated[int, Integer(1, MOST_THREADS)]  # torch ends the process where it gets no more


@dataclass
class Training:
    """One training phase.

    Args:
        epochs: Passes over the training set.
        lr: Peak learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        warmup_fraction: Share of the steps over which the rate rises; it falls as a half cosine afterwards.
        batch_size: Examples in a training batch.
        label_smoothing: Label smoothing of the cross-entropy.
        distillation: Share of the loss that compares predictions with those of the dense network before compression
            (Hinton et al. 2015); 0 for none, at most 1. Only where a network is compressed.
        temperature: Temperature by which both predictions are softened for this comparison.
        limit_train_batches: Share of each epoch's batches that is used, in (0, 1], as Lightning's trainer means it.
    """

    epochs: Count = 30
    lr: Positive = 1e-3
    weight_decay: Fraction = 0.05
    warmup_fraction: Fraction = 0.1
    batch_size: Count = 64
    label_smoothing: Fraction = 0.0
    distillation: Annotated[float, Interval("[0, 1]")] = 0.0
    temperature: Positive = 1.0
    limit_train_batches: Annotated[float, Interval("(0, 1]")] = 1.0

    def __post_init__(self) -> None:
        check_declared(self)

    def steps(self, batches: int, accumulated: int = 1) -> int:
        """Number of optimizer steps in all epochs.

        Args:
            batches: Per epoch.
            accumulated: Batches whose gradients make one step; the last step of an epoch may have fewer.
        """
        return self.epochs * math.ceil(max(int(batches * self.limit_train_batches), 1) / accumulated)

    def shortened(self, share: float) -> Training:
        """The same, in ``share`` of the steps."""
        epochs = max(round(share * self.epochs), 1)
        return replace(
            self, epochs=epochs, limit_train_batches=min(self.limit_train_batches * share * self.epochs / epochs, 1.0)
        )


@dataclass
class Method:
    """One method of compressing the trained network; several are compared in one run.

    Args:
        name: ``"gblr"``, learned through NNI's GBLRPruner, or another compressor by its name, then fine-tuned.
        config_list: NNI's compression config; default the run's.
        training: How it is trained while it is compressed and fine-tuned; default the run's ``finetune``.
        start: ``"trained"``: from the dense network that the run trained. ``"initial"``: from the task's network as it
            is before that, randomly initialised (training from scratch) or pretrained.
        warmup: Share of the steps before anything shrinks (gblr).
        cooldown: Share of the steps, at the end, with the structure frozen (gblr).
        compact: Whether dead components are dropped at the freeze, for a cheaper cool-down (gblr).
        starts: Initialisers to choose from (gblr): each is trained for the share ``trial`` of the steps, and the one
            that then fits the training data best is trained in full. Default: the one of the config list.
        trial: Share of the steps in a trial of a start; with 1 all starts are trained in full and the best is kept.
        folds: Number of parts of the training data, 2 or more, by which the start that generalises best is chosen. For
            each part a dense network is trained without it, the trials start from that network, and the task's metric
            on the part judges them. The best start is then trained in full on all training data. 0: the loss on
            training data decides.
        calibration: Batches to which the one-shot start is fitted; default the run's.
        options: Further arguments of the compressor.
    """

    name: str
    config_list: list[dict[str, Any]] | None = None
    training: Training | None = None
    warmup: Fraction = 0.05
    cooldown: Fraction = 0.3
    calibration: CalibrationSettings | None = None
    options: dict[str, Any] = field(default_factory=dict)
    start: Annotated[str, OneOf(("trained", "initial"))] = "trained"
    compact: bool = False
    starts: list[Annotated[str, OneOf(tuple(INITIALISERS))]] = field(default_factory=list)
    trial: Annotated[float, Interval("(0, 1]", "a share of the steps")] = 0.2
    folds: Annotated[int, Integer(0)] = 0

    def __post_init__(self) -> None:
        if self.starts and self.name != "gblr":
            raise ConfigError(f"starts are chosen for gblr alone, not for {self.name!r}")
        check_declared(self)
        if self.folds == 1:
            raise ConfigError("folds must be 0 or at least 2, got 1")
        if self.folds and not self.starts:
            raise ConfigError("folds judge starts: give the starts to choose from")
        if self.warmup + self.cooldown >= 1:
            raise ConfigError(f"warmup and cooldown leave no steps to learn in: {self.warmup} + {self.cooldown} >= 1")


@dataclass
class RunSettings:
    """The settings of a run.

    Args:
        task: A built-in task by its name (see docs/models.md), or ``"package.module:Class"``.
        budget: Relative FLOPs of the compressed layers, in (0, 1], for a run without ``config_list``.
        config_list: NNI's compression config: which layers, and how far. Default: the task's layers at ``budget``.
        allocation: With ``budget``: the layers share it, split by this rule
            (:func:`gblr_plugin.calibration.allocation.allocate`).
        calibration: Training batches to which one-shot starts are fitted; default none.
        reorder: Pairs of layers whose hidden units are brought into an order that suits blocks on intervals before
            anything is compressed, by names or patterns as :func:`gblr_plugin.reorder` takes them.
        model: Arguments of the task: sizes of the network, the data's folder and split.
        seeds: Seeds; each repeats the run with another split, initialisation and training.
        weights: File with the weights of a trained dense network (``dense.pt`` of an earlier run, or a state dict), in
            place of training it. It has seen the training split of one seed, so ``seeds`` must be that one alone.
        dense: How the dense network is trained.
        finetune: How a network is trained after (gblr: during) compression.
        methods: Methods to compare; the network of the first one is saved.
        latency_batch: Batch sizes at which latency is measured.
        trainer: Arguments of Lightning's Trainer in all trainings, such as ``precision``, ``gradient_clip_val`` and
            ``accumulate_grad_batches``; what a run sets itself is refused.
        evaluate_on: Most held-out examples, and most training examples, on which networks are evaluated; default all
            held-out ones, and as many training ones.
        threads: CPU threads; default torch's.
    """

    task: str
    budget: Budget | None = None
    config_list: list[dict[str, Any]] | None = None
    allocation: str | None = None
    calibration: CalibrationSettings | None = None
    reorder: list[Any] = field(default_factory=list)
    model: dict[str, Any] = field(default_factory=dict)
    seeds: list[Seed] = field(default_factory=lambda: [0, 1, 2])
    weights: str | None = None
    dense: Training = field(default_factory=Training)
    finetune: Training = field(default_factory=Training)
    methods: list[Method] = field(default_factory=lambda: [Method("gblr"), Method("low_rank")])
    latency_batch: list[Count] = field(default_factory=lambda: [1, 64])
    trainer: dict[str, Any] = field(default_factory=dict)
    evaluate_on: Count | None = None
    threads: Threads | None = None

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.config_list is None):
            raise ConfigError("give either budget or config_list")
        check_declared(self)
        if self.allocation is not None:
            check_rule(self.allocation, self.calibration)
            if self.budget is None:
                raise ConfigError("allocation goes with budget; with config_list write gblr: {allocation: ...} there")
        for name in ("seeds", "methods", "latency_batch"):
            if not getattr(self, name):
                raise ConfigError(f"{name} must not be empty")
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds must be different, got {self.seeds}")
        if self.weights is not None and len(self.seeds) > 1:
            raise ConfigError("weights has seen the training data of one seed: give seeds with that one alone")
        if self.weights is not None and any(method.folds and method.start == "trained" for method in self.methods):
            raise ConfigError(
                "methods: folds need training data that the dense network has not seen; weights has seen all"
            )
        names = [method.name for method in self.methods]
        if "dense" in names:
            raise ConfigError("methods: 'dense' is always measured and is no method")
        if len(set(names)) < len(names):
            raise ConfigError(f"methods: each name may stand once, got {', '.join(names)}")
