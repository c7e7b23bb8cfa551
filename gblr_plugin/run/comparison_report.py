"""The rows of `gblr compare`, and the table that shows them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from ..utils.tables import table
from .measure import mean_and_spread

__all__ = ["PHASES", "ComparisonReport", "Row"]

PHASES = ("one_shot", "calibrated", "fine_tuned")


@dataclass(frozen=True)
class Row:
    """One network.

    Args:
        method: ``"dense"`` or a compressor's name.
        budget: Relative FLOPs that were asked for; 1 for the dense network.
        phase: ``"one_shot"``: projected, not trained. ``"calibrated"``: projected with calibration. ``"fine_tuned"``.
        seed: Of split, initialisation and training.
        relative_flops: Multiply-adds of the compressed layers over dense; for NNI's pruners the share of the weights
            that their masks leave.
        held_out: The metric on held-out data.
        held_out_loss: Mean cross-entropy there, nats.
        train: The metric on as many training examples.
        train_loss: Mean cross-entropy there.
        seconds: That it took.
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
class ComparisonReport:
    """What a comparison found.

    Args:
        task: Name of the task.
        metric: Name of the figure by which it is judged.
        higher_is_better: Its direction.
        rows: In the order in which they were done.
        environment: Versions, threads and processor.
        settings: The settings.
    """

    task: str
    metric: str
    higher_is_better: bool
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

    def to_json(self) -> str:
        """JSON text."""
        return json.dumps({"format": "gblr-comparison", "version": 1, **asdict(self)}, indent=1)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ComparisonReport:
        """Inverse of :meth:`to_json` after parsing.

        Raises:
            ValueError: If the values are not of this format.
        """
        if values.get("format") != "gblr-comparison" or values.get("version") != 1:
            raise ValueError("not a comparison")
        rows = [Row(**row) for row in values["rows"]]
        return cls(
            values["task"],
            values["metric"],
            values["higher_is_better"],
            rows,
            values["environment"],
            values["settings"],
        )

    def __str__(self) -> str:
        """A table for each budget: the metric by phase, mean over the seeds and half their range."""
        seeds = sorted({row.seed for row in self.rows})
        better = "higher" if self.higher_is_better else "lower"
        text = [
            f"{self.task}: {self.metric} on held-out data ({better} is better), mean ± half range over seeds {seeds}"
        ]
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
