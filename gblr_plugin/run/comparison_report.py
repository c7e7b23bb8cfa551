"""The rows of `gblr compare`, and the table that shows them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..utils.tables import table
from .reports import Entry, TaskReport, mean_and_spread

__all__ = ["PHASES", "ComparisonReport", "Row"]

PHASES = ("one_shot", "calibrated", "fine_tuned")


@dataclass(frozen=True)
class Row(Entry):
    """The figures of one network.

    Args:
        method: ``"dense"`` or a compressor's name.
        budget: Relative FLOPs that were asked for; 1 for the dense network.
        phase: ``"one_shot"``: projected, not trained. ``"calibrated"``: projected with calibration. ``"fine_tuned"``.
        seed: Seed of split, initialisation and training.
        relative_flops: Multiply-adds of the compressed layers over dense; for NNI's pruners the share of the weights
            that their masks leave.
        held_out: The metric on held-out data.
        held_out_loss: Mean cross-entropy there, nats.
        train: The metric on as many training examples.
        train_loss: Mean cross-entropy there.
        seconds: Time that it took.
    """

    method: str
    budget: float
    phase: str
    seed: int
    relative_flops: float
    held_out: float
    held_out_loss: float
    train: float
    train_loss: float
    seconds: float


@dataclass(frozen=True)
class ComparisonReport(TaskReport):
    """What a comparison found.

    Args:
        task: As :class:`~gblr_plugin.run.reports.TaskReport` takes it.
        metric: See there.
        higher_is_better: See there.
        rows: In the order in which they were done.
        environment: Versions, threads and processor.
        settings: The settings.
    """

    rows: list[Row]
    environment: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def find(self, method: str, budget: float, phase: str, seed: int) -> Row | None:
        """The row of one network, or ``None``."""
        wanted = method, budget, phase, seed
        return next((row for row in self.rows if (row.method, row.budget, row.phase, row.seed) == wanted), None)

    def select(self, method: str, phase: str, budget: float | None = None) -> list[Row]:
        """Rows of a method in a phase, at one budget or at all, over the seeds."""
        return [r for r in self.rows if (r.method, r.phase) == (method, phase) and budget in (None, r.budget)]

    @property
    def methods(self) -> list[str]:
        """Names of the methods in their first order, without the dense network."""
        return [name for name in dict.fromkeys(row.method for row in self.rows) if name != "dense"]

    @property
    def budgets(self) -> list[float]:
        """Budgets of the methods, rising."""
        return sorted({row.budget for row in self.rows if row.method != "dense"})

    def best(self, phase: str, budget: float) -> str:
        """The method with the lowest mean held-out loss over the seeds."""
        losses = {
            name: sum(row.held_out_loss for row in rows) / len(rows)
            for name in self.methods
            if (rows := self.select(name, phase, budget))
        }
        return min(losses, key=lambda name: losses[name])

    FORMAT = "gblr-comparison"
    ENTRIES = "rows", Row

    def __str__(self) -> str:
        """A table for each budget: the metric by phase, mean over the seeds and half their range."""
        seeds = sorted({row.seed for row in self.rows})
        text = [f"{self.task}: {self.metric} on held-out data ({self.direction}), mean ± half range over seeds {seeds}"]
        header = ["method", *(phase.replace("_", "-") for phase in PHASES), "training", "loss", "rel. FLOPs"]
        for budget in self.budgets:
            names = [name for name in self.methods if any(self.select(name, phase, budget) for phase in PHASES)]
            rows = [self._cells(name, budget) for name in names] + [self._cells("dense", 1.0)]
            text += ["", f"budget {budget:g}", *table(header, rows)]
        return "\n".join(text)

    def _cells(self, name: str, budget: float) -> list[str]:
        """A method's row of the table at one budget; empty cells where it has no figures."""
        cells = [name]
        for phase in PHASES:
            found = [row.held_out for row in self.select(name, phase, budget)]
            mean, spread = mean_and_spread(found) if found else (0.0, 0.0)
            cells.append(f"{mean:.3f} ± {spread:.3f}" if found else "")
        tuned = self.select(name, "fine_tuned", budget)
        for key, digits in (("train", 3), ("held_out_loss", 4), ("relative_flops", 4)):
            mean = mean_and_spread([getattr(row, key) for row in tuned])[0] if tuned else 0.0
            cells.append(f"{mean:.{digits}f}" if tuned else "")
        return cells
