"""Reads GBLR records out of TensorBoard logs, through TensorBoard's own data provider.

Whatever the provider serves (local, remote or merged logs, all records or a sample of them) is shown. Records that
cannot be read are passed over, with a note that says so.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from tensorboard import errors
from tensorboard.data import provider

from ..monitoring.records import (
    PLUGIN_NAME,
    STRUCTURE_TAG,
    SUMMARY_TAG,
    LayerRecord,
    RecordError,
    StepRecord,
    decode_layer,
    decode_step,
)

__all__ = ["RunLog", "StructureReader"]

# The provider asks for a limit; how much is kept is decided when TensorBoard starts (--samples_per_plugin).
_EVERYTHING = 100_000
_MOST_NOTES = 20

# Keyed by content: records never change, so nothing can become stale. A summary takes a few kB.
_decode_step = lru_cache(maxsize=4096)(decode_step)
_decode_layer = lru_cache(maxsize=256)(decode_layer)


@dataclass
class RunLog:
    """What can be read of a run.

    Args:
        run: Name of the run.
        steps: Steps with a readable summary, ascending.
        records: The summary of each of these steps.
        notes: What was passed over, and why.
    """

    run: str
    steps: list[int] = field(default_factory=list)
    records: list[StepRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def at(self, step: int | None) -> tuple[int, StepRecord] | None:
        """Latest summary not after ``step`` (the first one if all are after it; ``None``: the last one)."""
        if not self.steps:
            return None
        index = len(self.steps) - 1 if step is None else max(bisect_right(self.steps, step) - 1, 0)
        return self.steps[index], self.records[index]


class StructureReader:
    """Runs, summaries and layer structures of an experiment.

    Args:
        data_provider: TensorBoard's :class:`tensorboard.data.provider.DataProvider`.
    """

    def __init__(self, data_provider: Any) -> None:
        self._provider = data_provider

    def runs(self, ctx: Any, experiment: str) -> list[RunLog]:
        """All runs with data of this plugin, by name."""
        args = {"experiment_id": experiment, "plugin_name": PLUGIN_NAME}
        listings = [self._provider.list_tensors(ctx, **args), self._provider.list_scalars(ctx, **args)]
        logs = self._summaries(ctx, experiment, None)
        if not logs:
            # Slow where there are many records, so only asked for when it alone can explain why the tab is open.
            listings.append(self._provider.list_blob_sequences(ctx, **args))
        tags: dict[str, set[str]] = {}
        for listing in listings:
            for run, series in listing.items():
                tags.setdefault(run, set()).update(series)
        result = []
        for run in sorted(tags):
            log = logs.get(run) or RunLog(run)
            foreign = sorted(tag for tag in tags[run] if tag != SUMMARY_TAG)
            log.notes.extend(f"tag {tag!r}: not a GBLR summary; skipped" for tag in foreign[:_MOST_NOTES])
            result.append(log)
        return result

    def run(self, ctx: Any, experiment: str, run: str) -> RunLog | None:
        """One run, or ``None`` if it has no summaries."""
        return self._summaries(ctx, experiment, run).get(run)

    def _summaries(self, ctx: Any, experiment: str, run: str | None) -> dict[str, RunLog]:
        read = self._provider.read_tensors(
            ctx,
            experiment_id=experiment,
            plugin_name=PLUGIN_NAME,
            downsample=_EVERYTHING,
            run_tag_filter=provider.RunTagFilter(runs=None if run is None else [run], tags=[SUMMARY_TAG]),
        )
        return {name: _run_log(name, series[SUMMARY_TAG]) for name, series in read.items() if SUMMARY_TAG in series}

    def layer(
        self, ctx: Any, experiment: str, run: str, name: str, step: int | None
    ) -> tuple[int | None, LayerRecord | None, list[str]]:
        """Structure of a layer at the latest readable step not after ``step``.

        Returns:
            The step, the structure, and notes on what was passed over; ``None`` where nothing is readable.
        """
        tag = STRUCTURE_TAG + name
        read = self._provider.read_blob_sequences(
            ctx,
            experiment_id=experiment,
            plugin_name=PLUGIN_NAME,
            downsample=_EVERYTHING,
            run_tag_filter=provider.RunTagFilter(runs=[run], tags=[tag]),
        )
        data = sorted(read.get(run, {}).get(tag, ()), key=lambda datum: datum.step)
        last = len(data) if step is None else max(bisect_right([datum.step for datum in data], step), min(len(data), 1))
        notes: list[str] = []
        for datum in reversed(data[:last]):
            try:
                record = self._layer_record(ctx, datum)
                if record.shape.name != name:
                    raise RecordError(f"holds layer {record.shape.name!r} instead")
                return datum.step, record, notes
            except (RecordError, errors.PublicError) as error:
                notes.append(f"step {datum.step}, layer {name!r}: {error}; skipped")
                if len(notes) == _MOST_NOTES:
                    break
        return None, None, notes

    def _layer_record(self, ctx: Any, datum: Any) -> LayerRecord:
        if len(datum.values) != 1:
            raise RecordError("not a GBLR record")
        return _decode_layer(self._provider.read_blob(ctx, blob_key=datum.values[0].blob_key))


def _run_log(run: str, data: Any) -> RunLog:
    log = RunLog(run)
    readable: dict[int, StepRecord] = {}
    skipped = 0
    for datum in data:
        try:
            # Of two records of a step the first counts: TensorBoard's local blobs have the same rule.
            readable.setdefault(int(datum.step), _decode_step(_bytes_of(datum.numpy)))
        except RecordError as error:
            skipped += 1
            if skipped <= _MOST_NOTES:
                log.notes.append(f"step {datum.step}: {error}; skipped")
    if skipped > _MOST_NOTES:
        log.notes.append(f"{skipped - _MOST_NOTES} more records skipped")
    log.steps = sorted(readable)
    log.records = [readable[step] for step in log.steps]
    return log


def _bytes_of(value: Any) -> bytes:
    item = value.item() if isinstance(value, np.ndarray) and value.size == 1 else None
    if not isinstance(item, bytes):
        raise RecordError("not a GBLR record")
    return item


def number(value: float) -> float | None:
    """For JSON: ``None`` for NaN and infinities, else 6 significant digits."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
