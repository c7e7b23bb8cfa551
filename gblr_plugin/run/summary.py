"""The result of ``gblr run``: figures of every method over the seeds, and the table that shows them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..surgery.report import Report
from ..utils.tables import table
from .reports import TaskReport, mean_and_spread

__all__ = ["MethodResult", "RunReport"]


@dataclass(frozen=True)
class MethodResult:
    """Figures of one method.

    Args:
        name: ``"dense"`` or a compressor's name.
        seeds: Figures per seed: the metric on held-out and training data, of the network that its file gives back;
            relative FLOPs, parameters, bytes on disk, seconds.
        latency: Median milliseconds of a forward pass by batch size, measured turn by turn with the other methods.
        layers: What the layers of the first seed's network cost.
    """

    name: str
    seeds: list[dict[str, Any]]
    latency: dict[str, float] = field(default_factory=dict)
    layers: Report = field(default_factory=Report)

    def mean(self, key: str) -> float:
        """Mean of a figure over the seeds."""
        return mean_and_spread([float(seed[key]) for seed in self.seeds])[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"name": self.name, "seeds": self.seeds, "latency_ms": self.latency, "layers": self.layers.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MethodResult:
        """Inverse of :meth:`to_dict`."""
        return cls(values["name"], values["seeds"], values["latency_ms"], Report.from_dict(values["layers"]))


@dataclass(frozen=True)
class RunReport(TaskReport):
    """What a run found.

    Args:
        task: As :class:`~gblr_plugin.run.reports.TaskReport` takes it.
        metric: See there.
        higher_is_better: See there.
        methods: Dense first, then the methods in the config's order.
        environment: Versions, threads and processor.
        settings: The settings of the run.
    """

    methods: list[MethodResult]
    environment: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    FORMAT = "gblr-run-report"
    ENTRIES = "methods", MethodResult

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**super().to_dict(), "methods": [method.to_dict() for method in self.methods]}

    def __getitem__(self, name: str) -> MethodResult:
        return next(method for method in self.methods if method.name == name)

    def __str__(self) -> str:
        """Table of methods, then the first method's layers; at most 80 columns."""
        batches = list(self.methods[0].latency)
        header = ["method", self.metric, "rel. FLOPs", "parameters", "file KB", *[f"ms @ {batch}" for batch in batches]]
        rows = []
        for method in self.methods:
            mean, spread = mean_and_spread([seed[self.metric] for seed in method.seeds])
            quality = f"{mean:.2f} ±{spread:.2f}" if len(method.seeds) > 1 else f"{mean:.2f}"
            rows.append(
                [
                    method.name,
                    quality,
                    f"{method.mean('relative_flops'):.4f}",
                    f"{method.mean('parameters'):,.0f}",
                    f"{method.mean('file_bytes') / 1024:,.0f}",
                    *[f"{method.latency[batch]:.2f}" for batch in batches],
                ]
            )
        seeds = ", ".join(str(seed["seed"]) for seed in self.methods[0].seeds)
        over = f"mean ± half range over seeds {seeds}" if len(self.methods[0].seeds) > 1 else f"seed {seeds}"
        text = [f"{self.task}: {self.metric} on held-out data, {over}", "", *table(header, rows)]
        if len(self.methods) > 1:
            chosen = self.methods[1]
            text += ["", f"layers of {chosen.name}, first seed", str(chosen.layers)]
        return "\n".join(text)
