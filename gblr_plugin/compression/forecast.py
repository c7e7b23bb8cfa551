"""What a compression would do, and about how long it would take in how much memory, before anything is done."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.dense import weight_matrix
from ..surgery.selection import Selection
from ..utils.tables import table
from .report import SkippedRow

__all__ = ["Forecast", "PlannedLayer", "forecast"]

_SIZE = 384  # of the matrices that this machine's speed is measured with
# What parts of the work take, in the time of large products of dense matrices in float32; from a run on MiniLM at 50%.
_PASSES = 15  # passes of all tokens through the layers: both streams, and moments in float64
_STEP = 2  # passes of a batch for a step of refinement: forwards and backwards, at half the multiply-adds
_LIBRARIES = 1 << 29  # bytes of the process before it has a model
_DECOMPOSED, _PURSUED = 250.0, 1000.0  # products of a decomposition over m n min(m, n), with and without calibration


@dataclass(frozen=True)
class PlannedLayer:
    """A layer that would be compressed.

    Args:
        name: Full name.
        shape: (m, n) of its weight.
    """

    name: str
    shape: tuple[int, int]


@dataclass(frozen=True)
class Forecast:
    """What would be done.

    Args:
        layers: What would be compressed.
        skipped: What would stay dense, with the reasons.
        seconds: About how long it would take, measuring of quality and speed left out.
        peak_bytes: About how much memory it would take.
        tokens: Tokens, or places of images, of the calibration; 0 without.
    """

    layers: tuple[PlannedLayer, ...]
    skipped: tuple[SkippedRow, ...]
    seconds: float
    peak_bytes: int
    tokens: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """Tables for a terminal."""
        entries = sum(row.shape[0] * row.shape[1] for row in self.layers)
        rows = [(row.name, f"{row.shape[0]} x {row.shape[1]}") for row in self.layers]
        lines = table(("would be compressed", "shape"), rows, total=(f"{len(rows)} layers", f"{entries:,} entries"))
        lines += [
            f"would stay dense: {row.name} ({row.share:.1%} of the entries): {row.reason}" for row in self.skipped
        ]
        data = f", calibration on {self.tokens:,} tokens or places" if self.tokens else ", without calibration"
        lines.append(f"about {_duration(self.seconds)} and {_memory(self.peak_bytes)} of memory{data}")
        return "\n".join(lines)


def forecast(
    network: nn.Module,
    selection: Selection,
    batches: Sequence[Mapping[str, Tensor]] | None,
    *,
    refine: int = 0,
    recover: int = 0,
) -> Forecast:
    """Foresee a compression from the shapes of the layers, the number of tokens, and this machine's speed.

    Args:
        network: On the meta device.
        selection: Its layers that would be compressed.
        batches: The calibration; ``None``: without, one layer in memory at a time.
        refine: Steps for each block.
        recover: Steps of distillation.
    """
    shapes = {name: weight_matrix(module).shape for name, module in selection.layers.items()}
    rate = _products_per_second()
    each_layer = _PURSUED if batches is None else _DECOMPOSED
    products = sum(each_layer * m * n * min(m, n) for m, n in shapes.values())
    largest = max(m * n for m, n in shapes.values())
    parameters = sum(tensor.numel() for tensor in network.state_dict().values())
    tokens, peak = 0, _LIBRARIES + 32 * largest
    if batches is not None:
        config: Any = network.config
        each = [_positions(batch, config) for batch in batches]
        tokens, entries = sum(each), sum(m * n for m, n in shapes.values())
        products += entries * (_PASSES * tokens + _STEP * refine * tokens / len(each))
        products += (_STEP + 1) * recover * entries * tokens / len(each)
        states = 2 * tokens * _features(config) * 4
        block = 80 * max(largest, entries // max(int(getattr(config, "num_hidden_layers", 1)), 1))
        peak = _LIBRARIES + 4 * parameters * (4 if recover else 2) + states + block
    return Forecast(
        tuple(PlannedLayer(name, (m, n)) for name, (m, n) in shapes.items()),
        tuple(SkippedRow(row.name, row.reason, row.share) for row in selection.skipped),
        products / rate,
        peak,
        tokens,
    )


def _features(config: Any) -> int:
    sizes = getattr(config, "hidden_sizes", None) or [getattr(config, "hidden_size", 1024)]
    return int(max(sizes))


def _positions(batch: Mapping[str, Tensor], config: Any) -> int:
    """Tokens of a batch of text; of images, places at the side of a patch."""
    if "input_ids" in batch:
        return batch["input_ids"].numel()
    pixels = batch["pixel_values"]
    patch = getattr(config, "patch_size", 16)
    side = patch if isinstance(patch, int) else 16
    return pixels[:, 0].numel() // side**2


def _products_per_second() -> float:
    """Multiply-adds of a large product in float32."""
    a = torch.randn(_SIZE, _SIZE)
    a @ a
    start, rounds = time.perf_counter(), 0
    while time.perf_counter() - start < 0.1:
        a @ a
        rounds += 1
    return rounds * _SIZE**3 / (time.perf_counter() - start)


def _memory(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**29 else f"{size / 2**20:.0f} MiB"


def _duration(seconds: float) -> str:
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name}"
    return f"{seconds:.0f} s"
