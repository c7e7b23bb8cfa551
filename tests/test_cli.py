"""The command as a user meets it: exit codes, one line per error, nothing left that looks finished."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import gblr_plugin
from gblr_plugin.cli import main

CONFIG = """\
task: digits_vit
budget: 0.5
model: {dim: 16, depth: 1, heads: 2}
seeds: [0]
dense: {epochs: 1}
finetune: {epochs: 1}
methods: [{name: gblr}]
"""
NAN_TASK = """
import torch
from gblr_plugin.tasks.digits import DigitsTask


class Nan(DigitsTask):
    def network(self):
        network = super().network()
        with torch.no_grad():
            network.blocks[0].fc1.weight[0, 0] = float("nan")
        return network


class Judged(DigitsTask):
    metric = "beauty"


class Raising(DigitsTask):
    def module(self, network, training, steps):
        module = super().module(network, training, steps)

        def training_step(batch, batch_idx):
            raise ZeroDivisionError("halfway")

        module.training_step = training_step
        return module


class Empty(DigitsTask):
    def data(self, seed, batch_size):
        data = super().data(seed, batch_size)
        data.train_set = []
        return data
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "bad_task.py").write_text(NAN_TASK)
    (tmp_path / "broken_task.py").write_text("def (")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("bad_task", None)


@pytest.fixture
def call(project, capfd):
    def call(*arguments):
        code = main(list(arguments))
        shown = capfd.readouterr()
        return code, shown.out, shown.err

    return call


def config_list(text):
    return ["--set", "budget=null", "--set", f"config_list={text}"]


QKV = "op_names: [network.blocks.0.attn.qkv]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "buget=0.3"], "--set buget=0.3: buget: unknown key; did you mean 'budget'?"),
        (["--set", "budget=0"], "--set budget=0: budget must be relative FLOPs in (0, 1], got 0.0"),
        (["--set", "budget=1.2"], "budget must be relative FLOPs in (0, 1], got 1.2"),
        (["--set", "budget=lots"], "budget: need a finite number, got text 'lots'"),
        (["--set", "budget"], "--set budget: need key.sub=value"),
        (["--set", "task=digit_vit"], "task: unknown task 'digit_vit'; allowed are digits_vit, byte_gpt"),
        (["--set", "task=no.such:Task"], "task: cannot import 'no.such'"),
        (["--set", "task=broken_task:Task"], "task: cannot import 'broken_task'"),
        (["--set", "task=bad_task:Judged"], "is judged by 'beauty'; allowed are accuracy, perplexity"),
        (["--set", "task=bad_task:Nan"], "layer 'network.blocks.0.fc1': its weight has NaN"),
        (["--set", "task=bad_task:Empty"], "data: 0 training examples are less than one batch of 64"),
        (["--set", "dense.batch_size=100000"], "training examples are less than one batch of 100000"),
        (["--set", "model.depht=2"], "model: "),
        (["--set", "model.dim=15"], "must divide"),
        (["--set", "model.image_size=16"], "model: the network does not take the data of its task"),
        (["--set", "weights=missing.pt"], "weights: no file at 'missing.pt'"),
        (["--set", "weights=config.yaml"], "weights: 'config.yaml' is damaged, or not a file of weights"),
        (["--set", "methods.0.name=gbrl"], "unknown name 'gbrl'; did you mean 'gblr'?"),
        (["--set", "methods.0.options.warmup_stp=3"], "unknown argument 'warmup_stp'; did you mean 'warmup_step'?"),
        (
            config_list("[{op_names: [network.blocks.0.atn.qkv], sparse_ratio: 0.5}]"),
            "pattern 'network.blocks.0.atn",
        ),
        (config_list(f"[{{{QKV}, sparse_ratio: 1.5}}]"), "sparse_ratio must be"),
        (config_list(f"[{{{QKV}, sparse_ratio: -0.5}}]"), "sparse_ratio must be"),
        (config_list(f"[{{{QKV}, sparse_ratioo: 0.5}}]"), "unknown key 'sparse_ratioo'; did you mean 'sparse_ratio'?"),
        (config_list(f"[{{{QKV}}}]"), "give sparse_ratio"),
        (config_list("[]"), "config_list is empty"),
    ],
)
def test_bad_runs_exit_with_2_and_one_line_and_write_nothing(call, project, arguments, message):
    code, out, err = call("run", "config.yaml", "--output", "out", *arguments)
    assert (code, out) == (2, ""), err
    assert err.startswith("gblr: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (project / "out").exists()


def test_too_small_a_layer_alone(call, project):
    entry = "[{op_names: [network.tiny], sparse_ratio: 0.5}]"
    (project / "bad_task.py").write_text(
        NAN_TASK.replace("network.blocks[0].fc1.weight[0, 0] = float('nan')", "pass").replace(
            'network.blocks[0].fc1.weight[0, 0] = float("nan")', "network.tiny = torch.nn.Linear(4, 1)"
        )
    )
    code, _, err = call("run", "config.yaml", *config_list(entry), "--set", "task=bad_task:Nan")
    assert code == 2
    assert "layer 'network.tiny': a 1 x 4 weight is too small to gain" in err
    assert not (project / "outputs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["monarhc"], "family: no structure named 'monarhc'; allowed are "),
        (["monarch", "--align", "8"], "compress: align is of GBLR alone; leave it or family 'monarch' out"),
    ],
)
def test_a_family_that_cannot_be_used_to_compress(call, project, arguments, message):
    code, out, err = call("compress", "dense", "--budget", "0.5", "--output", "out", "--family", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"gblr: {message}")
    assert err.count("\n") == 1
    assert not (project / "out").exists()


def test_files_that_are_missing_or_in_the_way(call, project):
    assert call("run", "nothing.yaml") == (2, "", "gblr: nothing.yaml: no such config file\n")
    need = "need a folder with report.json or compress.json or comparison.json or search.json"
    assert call("report", "nowhere") == (2, "", f"gblr: report: no file at 'nowhere'; {need}\n")
    (project / "folder").mkdir()
    assert call("report", "folder") == (2, "", f"gblr: report: no file at 'folder/report.json'; {need}\n")
    (project / "folder/report.json").mkdir()
    assert call("report", "folder")[0] == 2
    assert call("report", "bad_task.py") == (
        2,
        "",
        "gblr: report: 'bad_task.py' is no result of gblr run, compress, compare or search\n",
    )
    assert call("plan", "nothing.yaml") == (2, "", "gblr: nothing.yaml: no such config file\n")
    (project / "other.json").write_text(json.dumps({"a": 1}))
    assert call("report", "other.json")[0] == 2
    code, _, err = call("run", "config.yaml", "--output", "config.yaml")
    assert (code, err) == (2, "gblr: --output: 'config.yaml' is a file, need a folder\n")
    code, _, err = call("run", "config.yaml", "--output", "config.yaml/inner")
    assert (code, err.count("\n")) == (2, 1)
    assert "config.yaml/inner" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "gblr: the following arguments are required: COMMAND (see gblr --help)\n"),
        (["rum"], "invalid choice: 'rum'"),
        (["run"], "gblr run: the following arguments are required: CONFIG.yaml (see gblr run --help)\n"),
        (["report"], "required: PATH"),
        (["run", "config.yaml", "--sett", "a=b"], "unrecognized arguments"),
    ],
)
def test_bad_arguments(call, arguments, message):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


@pytest.fixture
def failing_report(monkeypatch):
    """`gblr report` with a fault in it."""

    def fail(*_):
        raise ZeroDivisionError("in two\nlines")

    monkeypatch.setattr("gblr_plugin.commands.report.result_file", fail)


def test_an_unexpected_error_names_the_file_of_its_traceback(call, failing_report, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code, out, err = call("report", "somewhere")
    (log,) = tmp_path.glob("gblr-*.log")
    assert (code, out) == (1, "")
    assert err == f"gblr: ZeroDivisionError: in two lines (details in {log})\n"
    text = log.read_text(encoding="utf-8")
    assert text.startswith(f"gblr-plugin {gblr_plugin.__version__}, Python 3.")
    assert 'raise ZeroDivisionError("in two\\nlines")' in text
    assert text.endswith("ZeroDivisionError: in two\nlines\n")


def test_an_unexpected_error_where_no_file_can_be_written(call, failing_report, monkeypatch):
    def full(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "mkstemp", full)
    code, _, err = call("report", "somewhere")
    assert (code, err) == (
        1,
        "gblr: ZeroDivisionError: in two lines (details in no file: none could be written)\n",
    )


def test_version_and_help(call):
    assert call("--version") == (0, f"gblr-plugin {gblr_plugin.__version__}\n", "")
    code, out, _ = call("--help")
    assert code == 0
    named = ("run", "compare", "search", "compress", "plan", "report", "inspect", "eval", "export", "bench")
    assert all(f"\n    {word} " in out for word in named)
    assert "--version" in out
    assert "--set KEY.SUB=VALUE" in call("run", "--help")[1]


def test_the_command_as_a_process(project):
    """Only ours on the terminal, the hosts in the log; one line for a failure, also when training has begun."""
    root = str(Path(gblr_plugin.__file__).parents[1])
    done = subprocess.run(
        [
            *(sys.executable, "-m", "gblr_plugin.cli", "run", "config.yaml", "--output", "out"),
            *("--set", "task=bad_task:Raising"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "gblr: the run failed: ZeroDivisionError: halfway (details in out/run.log)\n"
    log = (project / "out/run.log").read_text()
    assert "GPU available" in log
    assert "Traceback" in log
    assert {path.name for path in (project / "out").iterdir()} <= {"run.log", "tensorboard"}
