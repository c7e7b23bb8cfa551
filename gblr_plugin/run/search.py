"""`gblr search`: NNI's tuners over runs; each trial is a `gblr run` in its own folder."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, GBLRError
from ..serialization import save
from ..utils.console import Console
from ..utils.files import write_text
from .context import RunContext, environment
from .dense import train_dense
from .output import draw
from .pipeline import check
from .search_report import SearchReport, TrialResult, short
from .search_service import ServiceSpec
from .search_settings import SearchSettings
from .search_space import SearchSpace
from .yaml_config import Located, read_settings

__all__ = ["Search"]

_END_SECONDS = 30.0
_TRAINS_DENSE = ("dense", "model", "seeds", "task", "threads", "weights")  # keys that change the dense network


class Search:
    """A search that is known to be well configured.

    Args:
        located: The parsed config.

    Raises:
        ConfigError: Naming file, line and key, if a key, a value that the space allows, the tuner or a compressor
            cannot be used.
    """

    LEFT = ("search.json", "trials")

    def __init__(self, located: Located) -> None:
        self.settings = read_settings(SearchSettings, located)
        self.space = SearchSpace.read(located)
        self._run = asdict(self.settings.run)
        self._context = RunContext.of(self.settings.run)
        check(self._context)
        self.settings.tuner.check(self.space.keys, self._context.task.higher_is_better)
        for key, value, changed in self.space.check(self._run, located):
            if isinstance(value, str) or key.startswith("model."):  # names: of compressors, initialisers, rules, files
                try:
                    check(RunContext.of(changed))
                except ConfigError as error:
                    raise self.space.fail(key, value, error, located) from error
        if importlib.util.find_spec("nni_node") is None:
            raise ConfigError("search: NNI's manager (the package nni_node) is not part of this installation of NNI")

    def forecast(self) -> str:
        """What it would try."""
        settings = self.settings
        return f"at most {settings.trials} trials by {settings.tuner.name} over {', '.join(self.space.keys)}"

    def run(self, output: Path, console: Console) -> SearchReport:
        """Search; ``search.json`` in ``output`` is complete after every trial.

        Args:
            output: An existing folder, without an earlier search.
            console: Console that shows the progress.

        Returns:
            The report, also written as a table and, where matplotlib is installed, drawn.

        Raises:
            ConfigError: If the folder holds a search already.
            GBLRError: If NNI's service does not start, or no trial came to its end.
        """
        if (output / "search.json").exists() or (output / "trials").exists():
            raise ConfigError(f"--output: {str(output)!r} holds a search already; choose another folder")
        output = output.resolve()
        run = dict(self._run)
        if self._shares_dense():
            run["weights"] = str(self._train_dense(output, console))
        write_text(output / "trial.yaml", json.dumps(run, indent=1, ensure_ascii=False))
        result = self._report([])
        write_text(output / "search.json", result.to_json())
        shown: set[int] = set()
        for rows in _follow(self._spec(output), output, console):
            new = self._report([_trial(row) for row in rows if row["state"] != "running"])
            if new.trials != result.trials:
                write_text(output / "search.json", new.to_json())
                result = new
            _show(rows, result, shown, console)
        if not result.done:
            why = next((f": trial {trial.number}: {trial.message}" for trial in result.trials if trial.message), "")
            raise GBLRError(f"no trial came to its end{why}")
        write_text(output / "search.txt", f"{result}\n")
        draw(output, {"search": lambda plot: plot.search(result)})
        return result

    def _shares_dense(self) -> bool:
        """Whether all trials begin with the same trained dense network, which is then trained once."""
        run = self.settings.run
        roots = {key.split(".")[0] for key in self.space.keys}
        begins = run.methods[0].start == "trained" and not any(key.endswith(".start") for key in self.space.keys)
        return begins and run.weights is None and len(run.seeds) == 1 and roots.isdisjoint(_TRAINS_DENSE)

    def _train_dense(self, output: Path, console: Console) -> Path:
        run = self.settings.run
        if run.threads is not None:
            torch.set_num_threads(run.threads)
        context = replace(self._context, console=console, events=output / "tensorboard")
        start = time.monotonic()
        path = output / "dense.safetensors"
        save(train_dense(context, run.seeds[0]), path)
        console.line(f"dense network trained once for all trials, {time.monotonic() - start:.0f} s")
        return path

    def _report(self, trials: list[TrialResult]) -> SearchReport:
        task = self._context.task
        return SearchReport(
            self.settings.run.task, task.metric, task.higher_is_better, trials, environment(), asdict(self.settings)
        )

    def _spec(self, output: Path) -> ServiceSpec:
        settings, folder = self.settings, output / "trials"
        # The service keeps NNI's files out of the user's home; a trial has it back.
        home = f"HOME={shlex.quote(str(Path.home()))}"
        words = [sys.executable, "-m", "gblr_plugin.cli", "run", str(output / "trial.yaml"), "--trial"]
        words += ["--flops-price", repr(settings.flops_price), "--output", str(folder)]
        tuner = settings.tuner
        return ServiceSpec(
            space=self.space.keys,
            tuner={"name": tuner.name, "class_args": tuner.class_args(self._context.task.higher_is_better)},
            command=f"{home} {shlex.join(words)}",
            code_folder=os.getcwd(),
            trials=settings.trials,
            concurrency=settings.concurrency,
            trial_seconds=None if settings.trial_minutes is None else max(1, round(60 * settings.trial_minutes)),
            seconds=None if settings.minutes is None else 60 * settings.minutes,
            folder=str(output / "nni"),
            trial_folders=str(folder),
            private=settings.network == "private",
            port=settings.port,
        )


def _follow(spec: ServiceSpec, output: Path, console: Console) -> Iterator[list[dict[str, Any]]]:
    """The trials, whenever something about them changed. However this ends, the service and its trials end too."""
    folder = Path(spec.folder)
    (folder / "home").mkdir(parents=True)
    environment = {**os.environ, "HOME": str(folder / "home"), "NNI_CONFIG_DIR": str(folder / "config")}
    log = folder / "service.log"
    with log.open("ab") as errors:
        service = subprocess.Popen(
            [sys.executable, "-m", "gblr_plugin.run.search_service"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the service
        )
    assert service.stdin is not None
    assert service.stdout is not None
    try:
        service.stdin.write(spec.to_json() + "\n")
        service.stdin.flush()
        for line in service.stdout:
            event = json.loads(line)
            if "failed" in event:
                raise GBLRError(f"NNI's service failed: {event['failed']} (details in {log})")
            if "port" in event:
                _say_where(event, spec, console)
            else:
                yield event["trials"]
        if service.wait() != 0:
            raise GBLRError(f"NNI's service ended with code {service.returncode} (details in {log})")
    finally:
        service.stdin.close()
        service.stdout.close()
        try:
            service.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            service.kill()
            service.wait()


def _say_where(event: dict[str, Any], spec: ServiceSpec, console: Console) -> None:
    if event["private"]:
        console.line("NNI's service runs in a network of its own")
        return
    asked = f"no private network here ({event['reason']}): " if spec.private else ""
    console.line(
        f"warning: {asked}NNI's service listens on every interface of this machine, port {event['port']}, to anyone "
        "who reaches it; see docs/searching.md"
    )


def _trial(row: dict[str, Any]) -> TrialResult:
    result = row["result"] if row["final"] else None
    known: dict[str, Any] = {}
    if result is not None:
        known = {
            "compressor": str(result["compressor"]),
            "quality": float(result[result["metric"]]),
            "relative_flops": float(result["relative_flops"]),
            "dense": float(result["dense"]),
        }
    return TrialResult(
        row["number"], row["parameters"], row["state"], seconds=row["seconds"], message=row["message"], **known
    )


def _show(rows: list[dict[str, Any]], result: SearchReport, shown: set[int], console: Console) -> None:
    for trial in result.trials:
        if trial.number in shown:
            continue
        shown.add(trial.number)
        values = "  ".join(f"{key} {short(value)}" for key, value in trial.parameters.items())
        if trial.quality is None:
            console.line(f"trial {trial.number:<3} {trial.state}  {values}  {trial.message}".rstrip())
        else:
            console.line(
                f"trial {trial.number:<3} {result.metric} {trial.quality:.2f}  rel. FLOPs {trial.relative_flops:.4f}  "
                f"{trial.seconds:.0f} s  {values}"
            )
    running = [row for row in rows if row["state"] == "running"]
    said = [f"{len(rows) - len(running)} trials done"]
    for row in running:
        latest = f" {result.metric} {row['result'][result.metric]:.2f}" if row["result"] else ""
        said.append(f"trial {row['number']}{latest}")
    console.progress(", ".join(said))
