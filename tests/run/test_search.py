"""The space, the settings, the results and the trial of `gblr search`, without NNI's service."""

import json
import os
import shutil
import subprocess
import sys

import nni
import pytest

from gblr_plugin import plot
from gblr_plugin.cli import main
from gblr_plugin.errors import ConfigError, GBLRError
from gblr_plugin.run import private_network, search
from gblr_plugin.run.pipeline import prepare_run
from gblr_plugin.run.search_report import SearchReport, TrialResult
from gblr_plugin.run.search_service import ServiceSpec, trial_rows
from gblr_plugin.run.search_settings import TUNERS, SearchSettings, Tuner
from gblr_plugin.run.search_space import SearchSpace, overrides, with_parameters
from gblr_plugin.run.trial import Trial, next_parameters
from gblr_plugin.run.yaml_config import load_yaml, read_settings
from gblr_plugin.utils.console import Console

RUN = """\
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
"""


@pytest.fixture
def located(project):
    def read(text, run=RUN):
        (project / "search.yaml").write_text(run + text)
        return load_yaml("search.yaml")

    return read


def test_the_long_and_the_short_notation_dotted_or_nested_are_one_space(located):
    document = located("""\
space:
  budget: {_type: uniform, _value: [0.1, 0.5]}
  compressor: {choice: [gblr, low_rank]}
  finetune.lr: {loguniform: [1.e-4, 1.e-2]}
  finetune:
    epochs: {randint: [1, 4]}
  methods.0.warmup: {_type: normal, _value: [0.1, 0.01]}
""")
    space = SearchSpace.read(document)
    assert space.keys == {
        "budget": {"_type": "uniform", "_value": [0.1, 0.5]},
        "compressor": {"_type": "choice", "_value": ["gblr", "low_rank"]},
        "finetune.lr": {"_type": "loguniform", "_value": [1e-4, 1e-2]},
        "finetune.epochs": {"_type": "randint", "_value": [1, 4]},
        "methods.0.warmup": {"_type": "normal", "_value": [0.1, 0.01]},
    }
    assert {key: space.candidates(key) for key in space.keys} == {
        "budget": [0.1, 0.5],
        "compressor": ["gblr", "low_rank"],
        "finetune.lr": [1e-4, 1e-2],
        "finetune.epochs": [1, 3],
        "methods.0.warmup": [0.1],
    }
    checked = list(space.check(document.data["run"], document))
    assert [settings.finetune.epochs for key, _, settings in checked if key == "finetune.epochs"] == [1, 3]


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ("budget: {choice: []}", "search.yaml:12: space.budget: choice needs a list of values, got []"),
        ("budget: {choise: [1]}", "search.yaml:12: space.budget.choise: need {_type"),
        ("budget: 0.5", "search.yaml:12: space.budget: need {_type: ..., _value: [...]} or {choice: [...]}, got 0.5"),
        ("budget: {choice: [0.5, 0.5]}", "choice has a value twice"),
        ("budget: {uniform: [0.5, 0.1]}", "uniform needs [low, high], got [0.5, 0.1]"),
        ("finetune.lr: {loguniform: [0, 1]}", "loguniform needs [low, high], above 0, got [0, 1]"),
        ("finetune.epochs: {randint: [1, 2.5]}", "randint needs [low, high), whole numbers, got [1, 2.5]"),
        ("finetune.lr: {normal: [1, 0]}", "normal needs [mean, deviation], got [1, 0]"),
        ("finetune.lr: {quniform: [1, 2, 0]}", "quniform needs [low, high, step], got [1, 2, 0]"),
        ("finetune.lr: {_type: triangle, _value: [1]}", "unknown type 'triangle' (allowed: choice, randint"),
        ("finetune.lr: {choice: [{_name: a}]}", "a choice between tables is not supported"),
        ("finetune: {}", "space: needs at least one key to vary"),
        ("budget: {uniform: [0.5, 1.5]}", "search.yaml:12: space.budget: 1.5 does not fit: budget must be relative"),
        ("finetune.lr: {choice: [-1]}", "12: space.finetune.lr: -1 does not fit: run: finetune: lr must be positive"),
        ("finetune.lrr: {choice: [1]}", "unknown key; did you mean 'lr'?"),
        ("finetune.epochs: {quniform: [1, 3, 1.5]}", None),
        ("model.*.x: {choice: [1]}", "the run has no model to put it into"),
        (
            "{budget: {choice: [0.5]}, config_list.0.sparse_ratio: {choice: [0.5]}}",
            "'budget' changes config_list.0.sparse_ratio already",
        ),
    ],
)
def test_a_bad_space_names_file_line_and_key(located, space, message):
    document = located(f"space:\n  {space}\n" if not space.startswith("{") else f"space: {space}\n")
    if message is None:
        list(SearchSpace.read(document).check(document.data["run"], document))
        return
    with pytest.raises(ConfigError) as raised:
        list(SearchSpace.read(document).check(document.data["run"], document))
    assert message in str(raised.value)


def test_parameters_change_the_run(located):
    run = located("").data["run"]
    chosen = {"budget": 0.4, "compressor": "low_rank", "initialiser": "svd", "finetune.lr": 1e-05}
    assert overrides(chosen, run) == [
        "config_list.0.sparse_ratio=0.6",
        'methods.0.name="low_rank"',
        'config_list.0.gblr.initialiser="svd"',
        "finetune.lr=1e-05",
    ]
    settings = with_parameters(run, chosen)
    assert settings.config_list == [{"op_names": ["network.0"], "sparse_ratio": 0.6, "gblr": {"initialiser": "svd"}}]
    assert settings.methods[0].name == "low_rank"
    assert settings.finetune.lr == 1e-5
    assert "gblr" not in run["config_list"][0]

    plain = {"task": "own_task:Task", "budget": 0.5}
    assert with_parameters(plain, {"budget": 0.4}).budget == 0.4
    with pytest.raises(ConfigError, match="initialiser: the run has no config_list to put it into"):
        with_parameters(plain, {"initialiser": "svd"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tuner: {name: tpe}", "tuner: name: unknown tuner 'tpe'; did you mean 'TPE'? (allowed: TPE, Random"),
        ("tuner: {args: {optimize_mode: maximize}}", "tuner: args: leave optimize_mode out"),
        ("tuner: {name: GridSearch, args: {seed: 1}}", "GridSearch takes none"),
        ("trials: 0", "search.yaml:13: trials must be a whole number of at least 1, got 0"),
        ("minutes: 0", "minutes must be positive"),
        ("flops_price: -1", "flops_price must be a finite number of at least 0"),
        ("network: public", "network must be one of private, host, got 'public'"),
        ("port: 80", "port must be a whole number from 1024 to 65535"),
        ("trails: 3", "search.yaml:13: trails: unknown key; did you mean 'trials'?"),
    ],
)
def test_bad_settings_name_file_line_and_key(located, text, message):
    document = located(f"space:\n  budget: {{choice: [0.5, 0.7]}}\n{text}\n")
    with pytest.raises(ConfigError) as raised:
        read_settings(SearchSettings, document)
    assert message in str(raised.value)


def test_a_run_of_several_methods_is_no_trial(located):
    two = RUN.replace("    - {name: gblr}\n", "    - {name: gblr}\n    - {name: low_rank}\n")
    with pytest.raises(ConfigError, match="run: methods: a trial compresses by one method, got gblr, low_rank"):
        read_settings(SearchSettings, located("space: {budget: {choice: [0.5]}}\n", two))


def test_tuners_are_tried_before_the_search():
    space = {"a": {"_type": "choice", "_value": ["x", "y"]}, "b": {"_type": "uniform", "_value": [0, 1]}}
    for name in ("TPE", "Random", "GridSearch", "Evolution"):
        Tuner(name).check(space, higher_is_better=True)
    assert Tuner("TPE", {"seed": 3}).class_args(False) == {"seed": 3, "optimize_mode": "minimize"}
    assert Tuner("Random", {"seed": 3}).class_args(True) == {"seed": 3}
    with pytest.raises(ConfigError, match=r"tuner: TPE does not take its arguments or this space: .*sead"):
        Tuner("TPE", {"sead": 3}).check(space, True)
    with pytest.raises(ConfigError, match="tuner: Metis does not take"):
        Tuner("Metis").check(space, True)  # numbers only
    import yaml
    from nni.runtime.config import get_builtin_config_file

    known = yaml.safe_load(get_builtin_config_file("builtin_algorithms.yml").read_text())["tuners"]
    classes = {entry["builtinName"]: entry["className"] for entry in known}
    assert {name: f"nni.algorithms.hpo.{path}" for name, path in TUNERS.items()}.items() <= classes.items()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("space={compressor: {choice: [gblr, low_rankk]}}", "space.compressor: 'low_rankk' does not fit: "),
        ("space={initialiser: {choice: [svd, magic]}}", "space.initialiser: 'magic' does not fit: "),
        ("tuner={name: Evolution, args: {population_size: 0}}", "Evolution"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(located, project, capfd, override, message):
    located("space: {budget: {choice: [0.5, 0.7]}}\n")
    assert main(["search", "search.yaml", "--set", override, "--output", "out"]) == 2
    shown = capfd.readouterr()
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert not (project / "out").exists()


def test_a_folder_that_holds_a_search_is_refused(located, project, capfd):
    located("space: {budget: {choice: [0.7, 0.8]}}\n")
    (project / "out/trials").mkdir(parents=True)
    assert main(["search", "search.yaml", "--output", "out"]) == 2
    assert "holds a search already; choose another folder" in capfd.readouterr().err


def test_a_config_in_the_format_of_nni_is_told_how_to_start(project, capfd):
    (project / "nni.yaml").write_text("trialCommand: gblr run config.yaml --trial\n")
    assert main(["search", "nni.yaml"]) == 2
    error = capfd.readouterr().err
    assert "nni.yaml: an experiment in NNI's own format" in error
    assert "ExperimentConfig.load('nni.yaml')" in error
    assert "nnictl" in error


def trial(number, flops, quality, **more):
    known = {"compressor": "gblr", "dense": 97.0, "seconds": 2.0, **more}
    return TrialResult(number, {"finetune.lr": 0.001}, "done", quality=quality, relative_flops=flops, **known)


@pytest.fixture
def report():
    lost = [
        TrialResult(6, {"finetune.lr": 0.1}, "failed", message="the trial diverged"),
        TrialResult(7, {}, "stopped"),
    ]
    # 0: best; 1: dearer than 2 and no better; 2, 3: on the front; 4: as cheap as 3, worse; 5: a copy of 3.
    done = [trial(0, 0.6, 96.0), trial(1, 0.5, 90.0), trial(2, 0.4, 90.0, compressor="low_rank")]
    done += [trial(3, 0.2, 80.0), trial(4, 0.2, 70.0), trial(5, 0.2, 80.0)]
    return SearchReport("digits_vit", "accuracy", True, done + lost)


def test_the_front_is_what_nothing_cheaper_is_as_good_as(report):
    assert [one.number for one in report.front] == [3, 2, 0]
    lower = SearchReport("byte_gpt", "perplexity", False, report.trials)
    assert [one.number for one in lower.front] == [4]


def test_the_table_and_the_file_hold_every_trial(report):
    lines = str(report).splitlines()
    assert lines[1] == "dense 97.00"
    assert [line.split()[:2] for line in lines[5:11]] == [
        ["*", "3"],
        *([n, q] for n, q in [("5", "80.00")]),
        ["4", "70.00"],
        ["*", "2"],
        ["1", "90.00"],
        ["*", "0"],
    ]
    assert lines[-2:] == ["trial 6 (finetune.lr 0.1) failed: the trial diverged", "trial 7 () stopped"]
    values = json.loads(report.to_json())
    assert values["front"] == [3, 2, 0]
    assert SearchReport.from_dict(values) == report
    with pytest.raises(ValueError, match="not a gblr-search"):
        SearchReport.from_dict({**values, "format": "gblr-comparison"})


def test_the_figure_shows_trials_by_compressor_and_the_front(report):
    axes = plot.search(report, title="digits").axes[0]
    stairs, gblr, low_rank, _ = axes.lines
    assert list(stairs.get_xdata())[:3] == [0.2, 0.4, 0.6]
    assert sorted(gblr.get_ydata()) == [70.0, 80.0, 80.0, 90.0, 96.0]
    assert list(low_rank.get_xdata()) == [0.4]
    assert {text.get_text() for text in axes.texts} == {"3", "2", "0", "dense 97"}
    with pytest.raises(ConfigError, match="no trial"):
        plot.search(SearchReport("digits_vit", "accuracy", True, []))


def test_rows_take_parameters_from_the_trial_and_not_from_nni(tmp_path):
    (tmp_path / "trials/001").mkdir(parents=True)
    (tmp_path / "trials/001/parameters.json").write_text('{"budget": 0.7}')
    (tmp_path / "logs/b").mkdir(parents=True)
    (tmp_path / "logs/b/trial.stderr").write_text("noise\ngblr: budget must be smaller\n")
    times = {"startTime": 1000, "endTime": 4500}
    jobs = [
        {"trialJobId": "c", "sequenceId": 2, "status": "SUCCEEDED", **times},
        {"trialJobId": "b", "sequenceId": 1, "status": "FAILED", **times},
        {"trialJobId": "a", "sequenceId": 0, "status": "SUCCEEDED", **times},
        {"trialJobId": "d", "sequenceId": 3, "status": "RUNNING", "startTime": 1, "endTime": -1},
    ]
    early, end = {"parameters": {"budget": 0.5}, "default": 1}, {"parameters": {"budget": 0.5}, "default": 2}
    metrics = {"a": [("PERIODICAL", early), ("FINAL", end)], "d": [("PERIODICAL", early)]}
    rows = trial_rows(jobs, metrics, tmp_path / "trials", tmp_path / "logs")
    assert [(row["number"], row["state"], row["final"]) for row in rows] == [
        (0, "done", True),
        (1, "failed", False),
        (2, "running", False),  # its result is on the way
        (3, "running", False),
    ]
    assert [row["parameters"] for row in rows] == [{"budget": 0.5}, {"budget": 0.7}, {}, {"budget": 0.5}]
    assert rows[0]["result"] == end
    assert rows[0]["seconds"] == 3.5
    assert rows[1]["message"] == "budget must be smaller"


@pytest.fixture
def reported(monkeypatch):
    """What a trial tells NNI."""
    told = {"early": [], "final": []}
    monkeypatch.setattr(nni, "report_intermediate_result", told["early"].append)
    monkeypatch.setattr(nni, "report_final_result", told["final"].append)
    return told


def settings_of(located, project, **parameters):
    sys.path.insert(0, str(project))
    return with_parameters(located("").data["run"], parameters)


def test_a_trial_reports_every_epoch_and_changes_nothing(located, project, reported):
    chosen = {"budget": 0.8, "compressor": "gblr"}
    told = Trial(settings_of(located, project, **chosen), chosen, 10.0).run(project, Console(sys.stderr))
    plain = prepare_run(settings_of(located, project, **chosen)).run(project, Console(sys.stderr))
    assert told["gblr"].seeds[0]["loss"] == plain["gblr"].seeds[0]["loss"]

    figures = plain["gblr"].seeds[0]
    assert len(reported["early"]) == 2
    assert reported["final"] == [
        {
            "default": figures["accuracy"] - 10 * figures["relative_flops"],
            "accuracy": figures["accuracy"],
            "relative_flops": figures["relative_flops"],
            "metric": "accuracy",
            "compressor": "gblr",
            "parameters": chosen,
            "dense": plain["dense"].seeds[0]["accuracy"],
        }
    ]
    # The last epoch's network is the one that is converted.
    assert reported["early"][-1] == {key: value for key, value in reported["final"][0].items() if key != "dense"}


def test_a_trial_that_diverges_fails(located, project, reported, monkeypatch):
    trial = Trial(settings_of(located, project), {})
    nothing = {"accuracy": float("nan"), "loss": float("nan")}
    monkeypatch.setattr("gblr_plugin.run.recording.evaluate", lambda *args: nothing)
    with pytest.raises(GBLRError, match="the trial diverged: its accuracy is nan"):
        trial.run(project, Console(sys.stderr))
    assert reported["final"] == []


def test_the_command_as_a_trial(located, project, capfd, reported, monkeypatch):
    located("")
    (project / "run.yaml").write_text("\n".join(line[2:] for line in RUN.splitlines()[1:]))
    monkeypatch.setenv("NNI_PLATFORM", "local")
    monkeypatch.setenv("NNI_OUTPUT_DIR", str(project / "nni"))
    monkeypatch.setattr(nni, "get_next_parameter", lambda: {"finetune.epochs": 1, "compressor": "low_rank"})
    monkeypatch.setattr(nni, "get_sequence_id", lambda: 7)
    assert main(["run", "run.yaml", "--trial", "--output", "trials"]) == 0
    settings = json.loads((project / "trials/007/report.json").read_text())["settings"]
    assert settings["finetune"]["epochs"] == 1
    assert settings["methods"][0]["name"] == "low_rank"
    assert reported["final"][0]["parameters"] == {"finetune.epochs": 1, "compressor": "low_rank"}
    assert json.loads((project / "trials/007/parameters.json").read_text()) == reported["final"][0]["parameters"]
    assert len(reported["early"]) == 1

    monkeypatch.setattr(nni, "get_next_parameter", lambda: {"finetune.lr": -1})
    capfd.readouterr()
    assert main(["run", "run.yaml", "--trial"]) == 2
    assert "lr must be positive" in capfd.readouterr().err
    assert (project / "nni/run/parameters.json").exists()

    monkeypatch.delenv("NNI_PLATFORM")
    parameters, folder = next_parameters(None)
    assert (parameters, folder.name) == ({}, "trial")
    assert main(["run", "run.yaml", "--flops-price", "3"]) == 2


# -- the service, seen from the search ---------------------------------------------------------------------------------


POPEN = subprocess.Popen


def service(monkeypatch, tmp_path, code):
    """What a search makes of a service that runs this code."""
    monkeypatch.setattr(
        search.subprocess, "Popen", lambda command, **options: POPEN([sys.executable, "-c", code], **options)
    )
    spec = ServiceSpec(
        space={}, tuner={}, command="", code_folder="", trials=1, concurrency=1, trial_seconds=None, seconds=None,
        folder=str(tmp_path / "nni"), trial_folders=str(tmp_path / "trials"), private=True, port=8080,
    )  # fmt: skip
    return list(search._follow(spec, tmp_path, Console()))


def test_a_service_that_fails_is_named_with_its_log(monkeypatch, tmp_path):
    with pytest.raises(GBLRError, match=r"NNI's service failed: no port \(details in .*service.log\)"):
        service(monkeypatch, tmp_path, 'print(\'{"failed": "no port"}\', flush=True); input(); input()')
    shutil.rmtree(tmp_path / "nni")
    with pytest.raises(GBLRError, match=r"NNI's service ended with code 3 \(details in"):
        service(monkeypatch, tmp_path, "raise SystemExit(3)")


def test_a_service_without_a_network_of_its_own_is_warned_of(monkeypatch, tmp_path, capsys):
    said = {"port": 8080, "private": False, "reason": "Operation not permitted"}
    code = f"import json; print(json.dumps({said!r})); print(json.dumps({{'trials': [1]}}))"
    assert service(monkeypatch, tmp_path, code) == [[1]]
    shown = capsys.readouterr().out
    assert (
        "warning: no private network here (Operation not permitted): NNI's service listens on every interface" in shown
    )
    shutil.rmtree(tmp_path / "nni")
    service(monkeypatch, tmp_path, f"import json; print(json.dumps({ {**said, 'private': True}!r}))")
    assert "NNI's service runs in a network of its own" in capsys.readouterr().out


SPACE = "space: {budget: {choice: [0.7, 0.8]}}\n"


def test_a_search_without_a_finished_trial_is_an_error(located, project, monkeypatch, capfd):
    located(SPACE.replace("budget", "dense.lr"))  # then the dense network is not shared
    row = {"number": 0, "parameters": {"dense.lr": 0.7}, "state": "failed", "seconds": 1.0, "message": "out of luck"}
    rows = [{**row, "state": "running", "result": None, "final": False}], [{**row, "result": None, "final": False}]
    monkeypatch.setattr(search, "_follow", lambda *_: iter(rows))
    assert main(["search", "search.yaml", "--output", "out"]) == 1
    shown = capfd.readouterr()
    assert "GBLRError: no trial came to its end: trial 0: out of luck" in shown.err
    assert "trial 0   failed  dense.lr 0.7  out of luck" in shown.out
    assert not (project / "out/dense.safetensors").exists()
    assert not (project / "out/search.txt").exists()
    assert SearchReport.from_dict(json.loads((project / "out/search.json").read_text())).trials[0].state == "failed"


def test_nni_without_its_manager_is_refused(located, project, monkeypatch, capfd):
    located(SPACE)
    find = search.importlib.util.find_spec
    monkeypatch.setattr(search.importlib.util, "find_spec", lambda name: None if name == "nni_node" else find(name))
    assert main(["search", "search.yaml", "--output", "out"]) == 2
    assert "NNI's manager (the package nni_node) is not part of this installation" in capfd.readouterr().err


@pytest.mark.parametrize("rights", ["root", "namespaces", "none"])
def test_a_private_network_with_any_rights(monkeypatch, rights):
    asked = []

    class Libc:
        @staticmethod
        def unshare(flags):
            asked.append(flags)
            return 0 if rights == "root" or (rights == "namespaces" and len(asked) == 2) else -1

    written = {}
    monkeypatch.setattr(private_network.ctypes, "CDLL", lambda *_, **__: Libc)
    monkeypatch.setattr(private_network.ctypes, "get_errno", lambda: 1)
    monkeypatch.setattr(
        private_network.Path, "write_text", lambda path, text, encoding: written.update({str(path): text})
    )
    monkeypatch.setattr("fcntl.ioctl", lambda *_: b"")
    if rights == "none":
        with pytest.raises(OSError, match="not permitted"):
            private_network.enter_private_network()
        return
    private_network.enter_private_network()
    assert len(asked) == (1 if rights == "root" else 2)
    maps = {} if rights == "root" else {"setgroups": "deny", "uid_map": f"{os.getuid()} {os.getuid()} 1"}
    for name, text in maps.items():
        assert written[f"/proc/self/{name}"] == text
    assert ("/proc/self/gid_map" in written) == (rights == "namespaces")


def test_a_private_network_is_for_linux(monkeypatch):
    monkeypatch.setattr(private_network.sys, "platform", "darwin")
    with pytest.raises(OSError, match="only Linux has network namespaces"):
        private_network.enter_private_network()
