"""`gblr search` with NNI's real service on this machine; skipped, with the reason, where its manager cannot start."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from safetensors import safe_open

import gblr_plugin
from gblr_plugin.run.search_report import SearchReport
from gblr_plugin.run.summary import RunReport

pytest.importorskip("nni_node", reason="this installation of NNI has no manager")

CONFIG = """\
run:
  task: own_task:Task
  seeds: [0]
  dense: {epochs: 1, batch_size: 16}
  finetune: {epochs: 2, batch_size: 16}
  config_list:
    - {op_names: [network.0], sparse_ratio: 0.25}
  methods:
    - {name: gblr}
  latency_batch: [1]
  threads: 1
space:
  compressor: {choice: [gblr, low_rank]}
  budget: {choice: [0.8]}
tuner: {name: GridSearch}
trials: 5
concurrency: 2
minutes: 3
"""


@pytest.fixture
def search(project):
    """Starts the command in a process of its own; what is left of it is killed afterwards."""
    (project / "search.yaml").write_text(CONFIG)
    path = os.pathsep.join(filter(None, [str(Path(gblr_plugin.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    started = []

    def start(*options):
        command = [sys.executable, "-m", "gblr_plugin.cli", "search", "search.yaml", "--output", "out", *options]
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
            # Ignored, and inherited so, where a shell runs the tests in the background.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
    for process in left_over(project):
        process.kill()


def left_over(folder):
    """Processes whose command or folder is in a folder."""
    found = []
    for process in psutil.process_iter():
        try:
            words = [process.cwd(), *process.cmdline()]
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if process.pid != os.getpid() and any(str(folder) in word for word in words):
            found.append(process)
    return found


def skip_without_service(error):
    if "NNI's service failed" in error:
        pytest.skip(error)


def test_a_search_with_two_trials_at_a_time(search, project):
    process = search()
    shown, error = process.communicate(timeout=300)
    skip_without_service(error)
    assert (process.returncode, error) == (0, "")
    assert "network of its own" in shown or "no private network here" in shown
    assert left_over(project) == []

    found = {path.name for path in (project / "out").iterdir()}
    assert found >= {"search.json", "search.txt", "search.png", "trial.yaml", "dense.safetensors", "nni", "trials"}
    result = SearchReport.from_dict(json.loads((project / "out/search.json").read_text()))
    assert (project / "out/search.txt").read_text() == f"{result}\n"
    assert str(result) in shown
    assert sorted(trial.compressor for trial in result.trials) == ["gblr", "low_rank"]  # the grid, and no more
    for trial in result.trials:
        # The figures and the parameters are those of the trial itself.
        own = json.loads((project / f"out/trials/{trial.number:03d}/report.json").read_text())
        figures = own["methods"][1]["seeds"][0]
        assert trial.state == "done"
        assert (trial.quality, trial.relative_flops) == (figures["accuracy"], figures["relative_flops"])
        assert own["settings"]["methods"][0]["name"] == trial.compressor == trial.parameters["compressor"]
        assert own["settings"]["config_list"][0]["sparse_ratio"] == pytest.approx(1 - trial.parameters["budget"])
        assert trial.dense == result.dense  # trained once, for all


def test_an_interrupted_search_leaves_no_process_and_nothing_half_written(search, project):
    process = search("--set", "run.finetune.epochs=100000", "--set", "concurrency=1")
    begun = project / "out/trials/000/run.log"
    deadline = time.monotonic() + 200
    while not begun.exists():
        assert time.monotonic() < deadline, "no trial began"
        if process.poll() is not None:
            skip_without_service(error := process.communicate()[1])
            pytest.fail(error)
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (1, "gblr: interrupted\n")
    assert left_over(project) == []
    assert list((project / "out/trials").iterdir()) == []
    SearchReport.from_dict(json.loads((project / "out/search.json").read_text()))
    assert not list((project / "out").glob(".*"))


KILLS = int(os.environ.get("GBLR_KILLS", "20")) // 20


def test_a_killed_search_leaves_no_process_and_nothing_half_written(search, project):
    for number in range(KILLS):
        process = search("--output", f"out{number}", "--set", "run.finetune.epochs=6")
        output = project / f"out{number}"
        deadline = time.monotonic() + 200
        while not list(output.glob("trials/*/run.log")):  # the first trial has begun
            assert time.monotonic() < deadline, "no trial began"
            if process.poll() is not None:
                skip_without_service(error := process.communicate()[1])
                pytest.fail(error)
            time.sleep(0.05)
        time.sleep(random.Random(f"moment {number}").uniform(0, 6))
        process.kill()
        process.wait()
        while left_over(project):  # the service notices that nobody listens any more
            assert time.monotonic() < deadline, left_over(project)
            time.sleep(0.05)
        SearchReport.from_dict(json.loads((output / "search.json").read_text()))
        for file in output.rglob("report.json"):
            RunReport.from_dict(json.loads(file.read_text()))
        for file in output.rglob("*.safetensors"):
            with safe_open(file, "pt") as content:
                assert all(content.get_tensor(name) is not None for name in content.keys())  # noqa: SIM118
