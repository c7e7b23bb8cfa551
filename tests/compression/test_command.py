"""``gblr compress`` as a user types it; what comes out is looked at in test_folder.py."""

import json
import shutil

import pytest
import torch

from gblr_plugin.cli import main
from gblr_plugin.compression import folder as folders
from gblr_plugin.compression.folder import REPORT
from gblr_plugin.utils.unfinished import WORK

pytest.importorskip("transformers")

LAYERS = ["--layers", "*.intermediate.dense"]


@pytest.fixture
def call(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    measure = folders.measure_speed
    monkeypatch.setattr(folders, "measure_speed", lambda *given: measure(*given, seconds=0.0))

    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        shown = capfd.readouterr()
        return code, shown.out, shown.err

    return call


@pytest.fixture
def quick(dense_folder, data):
    given = ["--calibration", data("encoder"), "--eval", data("encoder", "held-out", seed=1), "--length", 8]
    return ["compress", dense_folder("encoder"), "--budget", 0.6, *given, "--refine", 2, "--output", "out", *LAYERS]


def test_a_table_and_the_same_from_report(call, quick, tmp_path):
    code, out, _ = call(*quick)
    assert code == 0
    assert "everything is in out" in out
    for shown in ("encoder.layer.1.intermediate.dense", "cosine", "nearest neighbours", "at 1 text", "decomposition"):
        assert shown in out, shown
    for path in ("out", f"out/{REPORT}"):
        code, again, _ = call("report", path)
        assert code == 0
        assert again.strip() == out.partition("\n\neverything")[0].strip()
    code, again, _ = call("report", "out", "--json")
    assert json.loads(again) == json.loads((tmp_path / "out" / REPORT).read_text())
    assert call(*quick)[2] == "gblr: compress: 'out' is not empty; give a new folder\n"


def test_json(call, quick, tmp_path):
    code, out, _ = call(*quick, "--json")
    assert code == 0
    values = json.loads(out)
    assert values == json.loads((tmp_path / "out" / REPORT).read_text())
    assert {"metric", "before", "after"} <= values["quality"].keys()
    assert all(isinstance(values["quality"][key], float) for key in ("before", "after"))


@pytest.mark.parametrize("calibrated", [True, False])
def test_a_dry_run_writes_nothing(call, quick, dense_folder, tmp_path, calibrated):
    arguments = quick if calibrated else [*quick[:4], "--output", "out"]
    before = sorted(path.name for path in tmp_path.iterdir())
    code, out, _ = call(*arguments, "--dry-run", "--layers", "*.intermediate.dense", "pooler.dense")
    assert code == 0
    assert "encoder.layer.1.intermediate.dense" in out
    assert "output.dense" not in out
    assert "of memory" in out
    values = json.loads(call(*arguments, "--dry-run", "--json")[1])
    assert {"layers", "skipped", "seconds", "peak_bytes"} <= values.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_without_calibration_as_before(call, dense_folder, tmp_path):
    arguments = ["compress", dense_folder("encoder"), "--budget", 0.6, "--method", "svd", "--output", "out"]
    code, out, _ = call(*arguments)
    assert code == 0
    assert "layers at relative FLOPs 0." in out
    assert (tmp_path / "out" / "tokenizer.json").exists()
    shutil.rmtree("out")
    assert json.loads(call(*arguments, "--json")[1])["layers"] == 13


def test_the_number_of_threads_is_as_before_afterwards(call, quick, monkeypatch):
    seen = []
    monkeypatch.setattr(folders.FolderJob, "run", lambda job: seen.append(torch.get_num_threads()) or 1 / 0)
    assert call(*quick, "--threads", 2)[0] == 1
    assert (seen, torch.get_num_threads()) == ([2], 1)


def test_row_splits_and_settings_of_layers(call, quick, tmp_path):
    more = ["--row-splits", "*.intermediate.*=2", "--factor-dtype", "int8", "--align", 4, "--seed", 3]
    assert call(*quick, *more)[0] == 0
    settings = json.loads((tmp_path / "out" / REPORT).read_text())["settings"]
    assert (settings["factor_dtype"], settings["align"], settings["seed"]) == ("int8", 4, 3)
    assert settings["row_splits"] == {f"encoder.layer.{n}.intermediate.dense": 2 for n in (0, 1)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--budget", "2"], "compress: budget must be relative FLOPs in (0, 1], got 2.0"),
        (["--budget", "half"], "argument --budget: invalid float value: 'half'"),
        (["--method", "svd"], "--method is for compression without --calibration"),
        (["--row-splits", "3"], "--row-splits: need PATTERN=N with a positive N, got '3'"),
        (["--threads", "0"], "--threads must be a whole number from 1 to "),
        (["--samples", "0"], "--samples must be a whole number of at least 1, got 0"),
        (["--length", "4096"], "--length must be at most the model's 32 tokens, got 4096"),
        (["--refine", "-1"], "refine must be a whole number of at least 0, got -1"),
        (["--family", "monarhc"], "no structure named 'monarhc'"),
        (["--allocation", "fair"], "allocation"),
        (["--layers", "nothing"], "pattern 'nothing' matches no module of the model"),
        (["--calibration", "missing.txt"], "--calibration: no file at 'missing.txt'"),
        (["--calibration", "."], "--calibration: '.' is a folder; this model reads text"),
        (["--calibration", "empty.txt"], "--calibration: 'empty.txt' holds no text"),
        (["--eval", "binary.bin"], "--eval: 'binary.bin' is not UTF-8 text (byte 0)"),
        (["--output", "empty.txt"], "compress: output 'empty.txt' is a file; give a new folder"),
        (["--output", "full"], "compress: 'full' is not empty; give a new folder"),
        (["--output", "empty.txt/deeper"], "Not a directory"),
    ],
)
def test_misuse_is_one_line_and_writes_nothing(call, quick, tmp_path, changes, message):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.bin").write_bytes(b"\x89PNG\xff")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    code, out, err = call(*quick, *changes)
    assert (code in (1, 2), out) == (True, "")
    assert err.startswith("gblr")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nowhere", "no folder at 'nowhere', and no model of this name in the local cache"),
        (".", "holds no config.json"),
        ("held-out.txt", "is a file, need the folder of a model"),
    ],
)
@pytest.mark.parametrize("calibrated", [True, False])
def test_what_is_no_model(call, quick, model, message, calibrated):
    code, _, err = call("compress", model, *(quick[2:] if calibrated else [*quick[2:4], "--output", "out"]))
    assert code == 2
    assert err.count("\n") == 1
    assert message in err


def test_several_processes_do_not_calibrate(call, quick, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = call(*quick)
    assert (code, err) == (2, "gblr: --calibration is for one process; several can compress without it\n")


@pytest.mark.parametrize("option", ["--eval=a.txt", "--samples=3", "--length=8", "--dtype=float16", "--refine=3"])
def test_what_needs_calibration(call, dense_folder, option):
    code, _, err = call("compress", dense_folder("encoder"), "--budget", 0.5, "--output", "out", option)
    assert (code, err) == (2, f"gblr: {option.partition('=')[0]} needs --calibration\n")


def test_an_error_of_the_disk_is_one_line_and_nothing_looks_finished(call, quick, tmp_path, monkeypatch):
    def full(*given, **named):
        raise OSError(28, "No space left on device", "out/model.safetensors")

    with monkeypatch.context() as patch:
        patch.setattr(folders, "save_pretrained", full)
        code, out, err = call(*quick)
    assert (code, out) == (1, "")
    assert err == (
        "gblr: compress: No space left on device 'out/model.safetensors'; the same command goes on where it was\n"
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == [WORK]
    assert call(*quick)[0] == 0
