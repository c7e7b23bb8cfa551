"""What became of a network: a plain record that is read without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..utils.tables import table

__all__ = ["BlockRow", "CompressionReport", "LayerRow", "SkippedRow", "Stage"]


@dataclass(frozen=True)
class LayerRow:
    """A compressed layer.

    Args:
        name: Full name.
        shape: (m, n) of its weight.
        structure: Name of the family; ``"dense"`` where the structure would not have been cheaper.
        relative_flops: Multiply-adds over m * n.
        components: Number of rank-1 blocks; 0 where the family has none.
    """

    name: str
    shape: tuple[int, int]
    structure: str
    relative_flops: float
    components: int


@dataclass(frozen=True)
class SkippedRow:
    """A weight that stays dense.

    Args:
        name: Full name.
        reason: Why, as the end of a message.
        share: Its share of the entries of all weight matrices.
    """

    name: str
    reason: str
    share: float


@dataclass(frozen=True)
class BlockRow:
    """A refined block.

    Args:
        name: Full name.
        before: Mean squared error of its hidden states over the calibration inputs, over the variance of the dense
            ones, the errors of all blocks before it included; before refinement.
        after: The same after it.
    """

    name: str
    before: float
    after: float


@dataclass(frozen=True)
class Stage:
    """Time and memory of one stage.

    Args:
        name: ``"evaluation"``, ``"allocation"``, ``"calibration"`` (moments and hidden states), ``"decomposition"``,
            ``"refinement"``, ``"conversion"`` or ``"recovery"``.
        seconds: Time.
        peak_bytes: Largest memory of the process, or of the accelerator that holds the model, in this stage; ``None``
            if the system does not tell.
    """

    name: str
    seconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class CompressionReport:
    """What :func:`gblr_plugin.compress` did.

    Args:
        settings: What it was asked for, as plain values.
        layers: The compressed layers, in the model's order.
        skipped: Weights that stay dense, with the reasons.
        blocks: The blocks that were refined.
        stages: Time and memory.
        quality: ``{"metric": name, "before": value, "after": value}``, if the network was evaluated; of further
            figures ``"others"`` has ``{name: {"before": value, "after": value}}``.
        speedup: Factor over the dense network by the number of texts, images or tokens at once, if it was measured.
        speed: ``{"items": "texts", "dense": {count: seconds}, "compressed": {count: seconds}}``, the same.
    """

    settings: dict[str, Any]
    layers: tuple[LayerRow, ...]
    skipped: tuple[SkippedRow, ...] = ()
    blocks: tuple[BlockRow, ...] = ()
    stages: tuple[Stage, ...] = ()
    quality: dict[str, Any] | None = None
    speedup: dict[str, float] | None = None
    speed: dict[str, Any] | None = None

    @property
    def relative_flops(self) -> float:
        """Multiply-adds of the compressed layers together over those of the dense ones."""
        dense = sum(row.shape[0] * row.shape[1] for row in self.layers)
        return sum(row.relative_flops * row.shape[0] * row.shape[1] for row in self.layers) / max(dense, 1)

    @property
    def seconds(self) -> float:
        """Time of all stages."""
        return sum(stage.seconds for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return asdict(self)

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CompressionReport:
        """Read what :meth:`to_dict` gives."""
        layers = tuple(LayerRow(**{**row, "shape": tuple(row["shape"])}) for row in values["layers"])
        return cls(
            settings=dict(values["settings"]),
            layers=layers,
            skipped=tuple(SkippedRow(**row) for row in values.get("skipped", ())),
            blocks=tuple(BlockRow(**row) for row in values.get("blocks", ())),
            stages=tuple(Stage(**row) for row in values.get("stages", ())),
            quality=values.get("quality"),
            speedup=values.get("speedup"),
            speed=values.get("speed"),
        )

    def __str__(self) -> str:
        """Tables for a terminal."""
        rows = [
            (row.name, f"{row.shape[0]} x {row.shape[1]}", row.structure, f"{row.relative_flops:.1%}", _count(row))
            for row in self.layers
        ]
        total = ("total", "", "", f"{self.relative_flops:.1%}", "")
        lines = table(("layer", "shape", "structure", "FLOPs", "components"), rows, total=total, left=(0, 2))
        for reason in dict.fromkeys(row.reason for row in self.skipped):
            alike = [row for row in self.skipped if row.reason == reason]
            names = alike[0].name if len(alike) == 1 else f"{len(alike)} layers, {alike[0].name} to {alike[-1].name}"
            lines.append(f"left dense: {names} ({sum(row.share for row in alike):.1%} of the entries): {reason}")
        if self.blocks:
            shown = [(row.name, f"{row.before:.4f}", f"{row.after:.4f}") for row in self.blocks]
            lines += ["", *table(("block", "error before", "after refinement"), shown)]
        if self.stages:
            shown = [(stage.name, f"{stage.seconds:.1f}", _gibibytes(stage.peak_bytes)) for stage in self.stages]
            lines += ["", *table(("stage", "s", "peak GiB"), shown, total=("total", f"{self.seconds:.1f}", ""))]
        lines += (
            ["", *table(("measure", "dense", "compressed"), _figures(self))] if self.quality or self.speedup else []
        )
        return "\n".join(lines)


def _count(row: LayerRow) -> str:
    return str(row.components) if row.components else ""


def _gibibytes(size: int | None) -> str:
    return "" if size is None else f"{size / 2**30:.2f}"


def _figures(report: CompressionReport) -> list[tuple[str, str, str]]:
    """Rows of quality and speed: name, of the dense network, of the compressed one."""
    rows = []
    if report.quality is not None:
        named = {report.quality["metric"]: report.quality, **report.quality.get("others", {})}
        rows += [(name, f"{pair['before']:.4g}", f"{pair['after']:.4g}") for name, pair in named.items()]
    items = (report.speed or {}).get("items", "")
    for count, factor in (report.speedup or {}).items():
        what = f"{count} {items[:-1] if int(count) == 1 else items}"
        rows.append((f"speed at {what}".rstrip(), "1", f"{factor:.2f}"))
    return rows
