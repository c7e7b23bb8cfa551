"""The trials of `gblr search`, the best of them at each cost, and the table that shows them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..utils.tables import table
from .reports import Entry, TaskReport

__all__ = ["SearchReport", "TrialResult", "short"]


@dataclass(frozen=True)
class TrialResult(Entry):
    """One trial.

    Args:
        number: Number of the trial in the order of starting, from 0.
        parameters: Values by key of the space, as the trial itself reported them.
        state: ``"done"``, ``"failed"``, or ``"stopped"`` (by a time limit).
        compressor: Name of its method, once known.
        quality: The metric on held-out data; mean over its seeds.
        relative_flops: Relative FLOPs of the compressed layers; mean over its seeds.
        dense: The metric of its dense network.
        seconds: Time that it took.
        message: Why it failed.
    """

    number: int
    parameters: dict[str, Any]
    state: str
    compressor: str = ""
    quality: float | None = None
    relative_flops: float | None = None
    dense: float | None = None
    seconds: float = 0.0
    message: str = ""


@dataclass(frozen=True)
class SearchReport(TaskReport):
    """What a search found.

    Args:
        task: As :class:`~gblr_plugin.run.reports.TaskReport` takes it.
        metric: The same.
        higher_is_better: See there.
        trials: Trials in the order of their numbers.
        environment: Versions, threads and processor.
        settings: The settings of the search.
    """

    trials: list[TrialResult]
    environment: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def done(self) -> list[TrialResult]:
        """Trials with figures, the cheapest first; of equally cheap ones the best first."""
        sign = -1.0 if self.higher_is_better else 1.0
        return sorted(
            (trial for trial in self.trials if trial.quality is not None),
            key=lambda trial: (trial.relative_flops or 0.0, sign * (trial.quality or 0.0), trial.number),
        )

    @property
    def front(self) -> list[TrialResult]:
        """The Pareto front, the cheapest first: trials to which none is at least as good at a lower or equal cost."""
        found: list[TrialResult] = []
        for trial in self.done:
            best = found[-1].quality if found else None
            if best is None or trial.quality is None:
                better = True
            else:
                better = trial.quality > best if self.higher_is_better else trial.quality < best
            if better:
                found.append(trial)
        return found

    @property
    def dense(self) -> float | None:
        """The metric of the dense network, mean over the trials."""
        known = [trial.dense for trial in self.trials if trial.dense is not None]
        return sum(known) / len(known) if known else None

    FORMAT = "gblr-search"
    ENTRIES = "trials", TrialResult

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the numbers of the trials of the front."""
        return {**super().to_dict(), "front": [trial.number for trial in self.front]}

    def __str__(self) -> str:
        """A table of the trials, the cheapest first; those of the Pareto front are marked."""
        text = [f"{self.task}: {self.metric} on held-out data ({self.direction}); * nothing cheaper is as good"]
        if self.dense is not None:
            text.append(f"dense {self.dense:.2f}")
        keys = list(dict.fromkeys(key for trial in self.trials for key in trial.parameters))
        header = ["", "trial", self.metric, "rel. FLOPs", *keys, "seconds"]
        front = {trial.number for trial in self.front}
        rows = [
            [
                "*" if trial.number in front else "",
                str(trial.number),
                f"{trial.quality:.2f}",
                f"{trial.relative_flops:.4f}",
                *(short(trial.parameters.get(key, "")) for key in keys),
                f"{trial.seconds:.0f}",
            ]
            for trial in self.done
        ]
        text += ["", *table(header, rows, left=())]
        lost = [trial for trial in self.trials if trial.state in ("failed", "stopped")]
        if lost:
            text.append("")
        for trial in lost:
            chosen = ", ".join(f"{key} {short(value)}" for key, value in trial.parameters.items())
            why = f": {trial.message}" if trial.message else ""
            text.append(f"trial {trial.number} ({chosen}) {trial.state}{why}")
        return "\n".join(text)


def short(value: Any) -> str:
    """A parameter's value, as a table shows it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
