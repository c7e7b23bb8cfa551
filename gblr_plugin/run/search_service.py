"""NNI's service for `gblr search`, in a process of its own: ``python -m gblr_plugin.run.search_service``.

It reads one line of JSON from standard input, a :class:`ServiceSpec`, and writes one JSON table a line to standard
output: ``{"port", "private"}`` once, then ``{"trials": [...]}`` whenever something changed, and ``{"failed": why}`` if
the service cannot start. When standard input ends, however its writer ended, everything that it started is killed and
the folders of unfinished trials are removed.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import psutil

from .private_network import enter_private_network

__all__ = ["PARAMETERS", "ServiceSpec", "trial_rows"]

PARAMETERS = "parameters.json"
"""File in a trial's folder, written by the trial before anything can fail."""

_STATES = {
    "SUCCEEDED": "done",
    "FAILED": "failed",
    "USER_CANCELED": "stopped",
    "SYS_CANCELED": "stopped",
    "EARLY_STOPPED": "stopped",
}
_ATTEMPTS = 3  # NNI gives its manager three seconds to start
_POLL_SECONDS = 0.5
_LATE_SECONDS = 10.0  # a final result may arrive after the end of its trial, a last trial after the last proposal


@dataclass(frozen=True)
class ServiceSpec:
    """What the service is to do.

    Args:
        space: NNI's search space.
        tuner: The tuner's ``name`` and ``class_args``.
        command: Shell command of a trial.
        code_folder: Folder in which the command is run.
        trials: Largest number of trials.
        concurrency: Largest number of trials at a time.
        trial_seconds: Time after which a trial is stopped.
        seconds: Time after which the search is stopped.
        folder: Folder of NNI's files.
        trial_folders: Folder in which each trial has a folder, by its number.
        private: Whether to enter a private network, where the system allows it.
        port: Port of the service; default 8080 in a private network, a free one in the host's.
    """

    space: dict[str, Any]
    tuner: dict[str, Any]
    command: str
    code_folder: str
    trials: int
    concurrency: int
    trial_seconds: int | None
    seconds: float | None
    folder: str
    trial_folders: str
    private: bool
    port: int | None

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))


def _main() -> int:
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")  # not inherited by what is started here
    os.dup2(2, 1)
    spec = ServiceSpec(**json.loads(sys.stdin.readline()))
    reason = ""
    if spec.private:  # before there is a thread
        try:
            enter_private_network()
        except OSError as error:
            reason = error.strerror or str(error)
    _adopt_orphans()
    stop = threading.Event()
    threading.Thread(target=_wait_for_the_end_of_input, args=(stop,), daemon=True).start()
    service = _Service(spec, channel, stop, private=spec.private and not reason, reason=reason)
    try:
        service.run()
    finally:
        service.end()
    return 0


def _wait_for_the_end_of_input(stop: threading.Event) -> None:
    sys.stdin.read()
    stop.set()


def _adopt_orphans() -> None:
    """Make this process the parent of its descendants whose parents die, so that it can end all of them."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def _kill_children() -> None:
    """Kill everything that descends from this process, until nothing does."""
    while children := psutil.Process().children(recursive=True):
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(children, timeout=2)


class _Service:
    def __init__(
        self, spec: ServiceSpec, channel: TextIO, stop: threading.Event, *, private: bool, reason: str
    ) -> None:
        self._spec, self._channel, self._stop = spec, channel, stop
        self._private, self._reason = private, reason
        self._experiment: Any = None
        self._rows: list[dict[str, Any]] = []

    def run(self) -> None:
        """Start the service and follow it to its end, a time limit, or the end of input."""
        deadline = time.monotonic() + (self._spec.seconds or float("inf"))
        if not self._start():
            return
        idle_since: float | None = None
        while not self._stop.wait(_POLL_SECONDS):
            status = self._experiment.get_status()
            self._tell_rows()
            if status == "ERROR":
                self._tell({"failed": "NNI's manager stopped with an error"})
                return
            now, running = time.monotonic(), any(row["state"] == "running" for row in self._rows)
            ended = status in ("DONE", "STOPPED")
            # A tuner without more proposals (a whole grid) leaves NNI in this state for good.
            exhausted = status == "TUNER_NO_MORE_TRIAL" and not running
            idle_since = (idle_since or now) if ended or exhausted else None
            if idle_since is not None and ((ended and not running) or now - idle_since > _LATE_SECONDS):
                return
            if now > deadline:
                return

    def end(self) -> None:
        """Stop everything; unfinished trials leave nothing."""
        _kill_children()
        if self._experiment is not None:
            atexit.unregister(self._experiment.stop)
        for row in self._rows:
            if row["state"] == "running":
                row["state"] = "stopped"
            if row["state"] == "stopped":
                shutil.rmtree(Path(self._spec.trial_folders, f"{row['number']:03d}"), ignore_errors=True)
        self._tell({"trials": self._rows})

    def _start(self) -> bool:
        from nni.experiment import Experiment

        failure = ""
        for _ in range(_ATTEMPTS):
            if self._stop.is_set():
                return False
            experiment = Experiment(self._config())
            port = self._spec.port or (8080 if self._private else _free_port())
            try:
                experiment.start(port)
            except Exception as error:  # many kinds, of requests, sockets and node
                atexit.unregister(experiment.stop)
                _kill_children()
                failure = f"{type(error).__name__}: {error}"
                continue
            self._experiment = experiment
            self._tell({"port": port, "private": self._private, "reason": self._reason})
            return True
        self._tell({"failed": failure})
        return False

    def _config(self) -> Any:
        from nni.experiment import ExperimentConfig

        spec = self._spec
        config: Any = ExperimentConfig("local")
        config.search_space = spec.space
        config.trial_command = spec.command
        config.trial_code_directory = spec.code_folder
        config.trial_concurrency = spec.concurrency
        config.max_trial_number = spec.trials
        config.max_trial_duration = spec.trial_seconds
        config.experiment_working_directory = spec.folder
        config.tuner.name = spec.tuner["name"]
        config.tuner.class_args = spec.tuner["class_args"]
        return config

    def _tell_rows(self) -> None:
        jobs = [vars(job) for job in self._experiment.list_trial_jobs()]
        metrics = {
            name: [(metric.type, metric.data) for metric in found]
            for name, found in self._experiment.get_job_metrics().items()
        }
        logs = Path(self._spec.folder, self._experiment.id, "environments", "local-env", "trials")
        rows = trial_rows(jobs, metrics, Path(self._spec.trial_folders), logs)
        if rows != self._rows:
            self._rows = rows
            self._tell({"trials": rows})

    def _tell(self, event: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # nobody listens any more
            self._channel.write(json.dumps(event) + "\n")
            self._channel.flush()


def trial_rows(
    jobs: list[dict[str, Any]], metrics: Mapping[str, list[tuple[str, Any]]], folders: Path, logs: Path
) -> list[dict[str, Any]]:
    """What is known of each trial, by its number.

    Args:
        jobs: NNI's trial jobs.
        metrics: (``"PERIODICAL"`` or ``"FINAL"``, data) by NNI's id of the job, in order.
        folders: Files of the trials, by number.
        logs: NNI's files of the trials, by its id.

    Returns:
        A table each: ``number``, ``state``, ``parameters``, ``result`` (the last that was reported), ``final``
        (whether that is the end), ``seconds``, ``message``.
    """
    rows = []
    for job in sorted(jobs, key=lambda job: int(job["sequenceId"])):
        number = int(job["sequenceId"])
        found = metrics.get(job["trialJobId"], [])
        final = next((data for kind, data in found if kind == "FINAL"), None)
        result = final if final is not None else (found[-1][1] if found else None)
        state = _STATES.get(job["status"], "running")
        if state == "done" and final is None:
            state = "running"  # its result will arrive
        ended = job.get("endTime") or -1
        rows.append(
            {
                "number": number,
                "state": state,
                "parameters": _parameters(folders / f"{number:03d}", result),
                "result": result,
                "final": final is not None,
                "seconds": max(0.0, (ended - job["startTime"]) / 1000) if ended > 0 else 0.0,
                "message": _last_line(logs / job["trialJobId"] / "trial.stderr") if state == "failed" else "",
            }
        )
    return rows


def _parameters(folder: Path, result: Any) -> dict[str, Any]:
    """The values that the trial reported; until it has reported, those in the file that it wrote."""
    if isinstance(result, dict) and isinstance(result.get("parameters"), dict):
        return dict(result["parameters"])
    try:
        return dict(json.loads((folder / PARAMETERS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _last_line(file: Path) -> str:
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1].removeprefix("gblr: ") if lines else ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(_main())
