"""TensorBoard's GBLR tab: HTTP routes over the structure that runs have logged."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from typing import Any

import numpy as np
from tensorboard import plugin_util
from tensorboard.backend import http_util
from tensorboard.plugins import base_plugin
from werkzeug import wrappers

from ..monitoring.records import PLUGIN_NAME, LayerRecord, LayerShape, StepRecord
from .reader import RunLog, StructureReader, number

__all__ = ["GBLRPlugin", "GBLRPluginLoader"]

_SAMPLES = 500
_CONTENT_TYPES = {".js": "text/javascript", ".css": "text/css"}


class GBLRPluginLoader(base_plugin.TBLoader):
    """What the entry point ``tensorboard_plugins`` names: keeps enough snapshots, then loads the plugin."""

    def fix_flags(self, flags: Any) -> None:
        """Keep up to 500 snapshots a run unless the user says otherwise (TensorBoard's own default is 10)."""
        samples = getattr(flags, "samples_per_plugin", None)
        if samples is not None:
            samples.setdefault(PLUGIN_NAME, _SAMPLES)

    def load(self, context: base_plugin.TBContext) -> GBLRPlugin | None:
        """The plugin, or ``None`` where TensorBoard offers no data provider."""
        return GBLRPlugin(context) if context.data_provider is not None else None


class _BadRequestError(Exception):
    """Parameters that cannot be used; the message goes to the browser."""


class GBLRPlugin(base_plugin.TBPlugin):
    """Serves the tab's static files and, as JSON, runs, overviews, time series and layer structures.

    Args:
        context: TensorBoard's; only ``data_provider`` is used.
    """

    plugin_name = PLUGIN_NAME

    def __init__(self, context: base_plugin.TBContext) -> None:
        self._reader = StructureReader(context.data_provider)
        folder = resources.files(__package__) / "static"
        self._static = {file.name: file for file in folder.iterdir() if file.name.endswith(tuple(_CONTENT_TYPES))}

    def get_plugin_apps(self) -> dict[str, Any]:
        """Routes below ``data/plugin/gblr``."""
        apps: dict[str, Any] = {f"/static/{name}": self._serve_static(name) for name in self._static}
        for route, answer in (
            ("/runs", self._runs),
            ("/overview", self._overview),
            ("/time", self._time),
            ("/layer", self._layer),
        ):
            apps[route] = self._serve_json(answer)
        return apps

    def is_active(self) -> bool:
        """Left to TensorBoard, which shows the tab as soon as a run has data of this plugin."""
        return False

    def frontend_metadata(self) -> base_plugin.FrontendMetadata:
        """A tab that loads our ES module."""
        return base_plugin.FrontendMetadata(es_module_path="/static/index.js", tab_name="GBLR")

    # -- plumbing ----------------------------------------------------------------------------------------------------

    def _serve_static(self, name: str) -> Any:
        file = self._static[name]
        content_type = _CONTENT_TYPES[name[name.rindex(".") :]]

        @wrappers.Request.application
        def serve(request: wrappers.Request) -> wrappers.Response:
            return http_util.Respond(request, file.read_bytes(), content_type)

        return serve

    def _serve_json(self, answer: Callable[[wrappers.Request, Any, str], Any]) -> Any:
        @wrappers.Request.application
        def serve(request: wrappers.Request) -> wrappers.Response:
            def respond(body: Any, code: int = 200) -> wrappers.Response:
                text = json.dumps(body, allow_nan=False, separators=(",", ":"))
                return http_util.Respond(request, text, "application/json", code=code)

            if request.method not in ("GET", "HEAD"):
                return respond({"error": "only GET is allowed"}, 405)
            try:
                ctx, experiment = plugin_util.context(request.environ), plugin_util.experiment_id(request.environ)
                return respond(answer(request, ctx, experiment))
            except _BadRequestError as error:
                return respond({"error": str(error)}, 400)

        return serve

    def _run_of(self, request: wrappers.Request, ctx: Any, experiment: str) -> RunLog:
        run = request.args.get("run", "")
        log = self._reader.run(ctx, experiment, run)
        if log is None or not log.steps:
            raise _BadRequestError(f"run {run!r} holds no readable GBLR summaries")
        return log

    # -- routes ------------------------------------------------------------------------------------------------------

    def _runs(self, request: wrappers.Request, ctx: Any, experiment: str) -> Any:
        """Runs with their steps, the layers of their last step, and notes on what was passed over."""
        return {
            "runs": [
                {
                    "run": log.run,
                    "steps": log.steps,
                    "layers": [_shape_json(layer) for layer in log.records[-1].layers] if log.records else [],
                    "notes": log.notes,
                }
                for log in self._reader.runs(ctx, experiment)
            ]
        }

    def _overview(self, request: wrappers.Request, ctx: Any, experiment: str) -> Any:
        """All layers of ``run`` at the latest step not after ``step``."""
        log = self._run_of(request, ctx, experiment)
        found = log.at(_step_of(request))
        assert found is not None  # _run_of has made sure that there are steps
        step, record = found
        layers = []
        for index, shape in enumerate(record.layers):
            entry = _shape_json(shape)
            entry["stored"] = int(record.stored[index])
            entry["live"] = int(record.live[index])
            entry["budget"] = number(float(record.budget[index]))
            entry["lambda"] = number(float(record.lambdas[index]))
            layers.append(entry)
        return {"run": log.run, "step": step, "layers": layers}

    def _time(self, request: wrappers.Request, ctx: Any, experiment: str) -> Any:
        """Curves of ``run`` over its steps: of one ``layer``, or of all layers together."""
        log = self._run_of(request, ctx, experiment)
        layer = request.args.get("layer")
        rows = [_curve_point(record, layer) for record in log.records]
        if layer is not None and all(row is None for row in rows):
            raise _BadRequestError(f"run {log.run!r} holds no layer {layer!r}")
        none = (None,) * len(_CURVES)
        columns = zip(*(none if row is None else row for row in rows), strict=True)
        curves = {name: list(values) for name, values in zip(_CURVES, columns, strict=True)}
        curves["sigma"] = [number(record.sigma) for record in log.records]
        curves["boxcar"] = [bool(record.sigma == np.inf) for record in log.records]
        curves["loss"] = [number(record.loss) for record in log.records]
        return {"run": log.run, "layer": layer, "steps": log.steps, **curves}

    def _layer(self, request: wrappers.Request, ctx: Any, experiment: str) -> Any:
        """Intervals and energies of ``layer`` of ``run`` at the latest readable step not after ``step``."""
        log = self._run_of(request, ctx, experiment)
        name = request.args.get("layer")
        if name is None or not any(shape.name == name for record in log.records for shape in record.layers):
            raise _BadRequestError(f"run {log.run!r} holds no layer {name!r}")
        step, record, notes = self._reader.layer(ctx, experiment, log.run, name, _step_of(request))
        structure = None if record is None else _layer_json(record)
        return {"run": log.run, "layer": name, "step": step, "structure": structure, "notes": notes}


_CURVES = ("relative_flops", "live", "lambda", "budget")


def _step_of(request: wrappers.Request) -> int | None:
    text = request.args.get("step")
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise _BadRequestError(f"step must be a whole number, got {text[:40]!r}") from None


def _shape_json(shape: LayerShape) -> dict[str, Any]:
    return {
        "name": shape.name,
        "rows": shape.rows,
        "cols": shape.cols,
        "splits": len(shape.split_sizes),
        "components": sum(shape.split_sizes),
    }


def _curve_point(record: StepRecord, layer: str | None) -> tuple[float | None, ...] | None:
    """Relative FLOPs, live components, lambda and budget of a layer, or of all (mean lambda; budget of the total)."""
    chosen = [index for index, shape in enumerate(record.layers) if layer is None or shape.name == layer]
    if not chosen:
        return None
    dense = np.array([record.layers[index].dense for index in chosen], dtype=np.float64)
    lambdas, budget = record.lambdas[chosen], record.budget[chosen]
    known = lambdas[np.isfinite(lambdas)]
    return (
        number(float(record.stored[chosen].sum() / dense.sum())),
        int(record.live[chosen].sum()),
        number(float(known.mean())) if known.size else None,
        number(float((budget * dense).sum() / dense.sum())),
    )


def _layer_json(record: LayerRecord) -> dict[str, Any]:
    total = float(record.energy.sum())
    share = record.energy / total if total > 0 else record.energy
    return {
        "rows": record.shape.rows,
        "cols": record.shape.cols,
        "split_sizes": list(record.shape.split_sizes),
        "row_width": record.row_width.tolist(),
        "row_start": record.row_start.tolist(),
        "col_width": record.col_width.tolist(),
        "col_start": record.col_start.tolist(),
        "energy": [float(f"{value:.3g}") for value in share.tolist()],
    }
