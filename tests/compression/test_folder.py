"""The calibrated command on folders of tiny models of every kind."""

import json
import os
import shutil

import pytest
import torch

import gblr_plugin as gblr
from gblr_plugin import ConfigError, GBLRTensor
from gblr_plugin.compression import folder as folders
from gblr_plugin.compression.folder import REPORT, FolderJob
from gblr_plugin.compression.report import CompressionReport
from gblr_plugin.huggingface.pretrained import load_dense
from gblr_plugin.utils.unfinished import WORK

transformers = pytest.importorskip("transformers")
ALL = {"budget": 0.6, "refine": 2}
QUICK = {**ALL, "layers": ["*.intermediate.dense"]}
KINDS = {
    "encoder": ("BertModel", "cosine", "texts"),
    "masked": ("BertForMaskedLM", "masked perplexity", "texts"),
    "classes": ("BertForSequenceClassification", "agreement", "texts"),
    "decoder": ("LlamaForCausalLM", "perplexity", "tokens"),
    "images": ("ViTForImageClassification", "agreement", "images"),
}


@pytest.fixture(autouse=True)
def _few_turns(monkeypatch):
    """Speed is measured in a few turns: its figures are looked at by no test."""
    measure = folders.measure_speed
    monkeypatch.setattr(folders, "measure_speed", lambda *given: measure(*given, seconds=0.0))


@pytest.fixture
def job(dense_folder, data, tmp_path):
    def make(kind, output="out", settings=QUICK, **changes):
        calibration = data(kind, f"calibration of {output}", 24) if "calibration" not in changes else None
        given = {"calibration": calibration, "length": None if kind == "images" else 8, **changes}
        return FolderJob(str(dense_folder(kind)), tmp_path / output, settings, **given)

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_load_and_transformers_read(job, data, dense_folder, kind):
    cls, metric, items = KINDS[kind]
    made = job(kind, settings=ALL, evaluation=data(kind, "held out", 12, seed=1))
    report = made.run()
    values = json.loads((made.output / REPORT).read_text())
    assert CompressionReport.from_dict(values) == report
    loaded = gblr.load(made.output)
    structured = [n for n, p in loaded.named_parameters() if isinstance(p.data, GBLRTensor)]
    assert {f"{row['name']}.weight" for row in values["layers"]} >= set(structured) != set()
    theirs = getattr(transformers, cls).from_pretrained(made.output)
    reader = folders.DataReader(made.output, folders.kind_of(loaded), length=made.length)
    batch = reader.read(made.evaluation, "--eval")[0]
    assert torch.equal(theirs(**batch)[0], loaded(**batch)[0])
    assert not torch.equal(loaded(**batch)[0], load_dense(dense_folder(kind), "test")(**batch)[0])
    assert values["quality"]["metric"] == metric
    assert metric == "agreement" or values["quality"]["before"] != values["quality"]["after"]
    assert values["speed"]["items"] == items
    assert next(iter(values["speedup"])) == "1"
    assert {"loading", "quality", "speed"} <= {stage["name"] for stage in values["stages"]}
    card = (made.output / "README.md").read_text()
    assert f'model = {cls}.from_pretrained("this-folder")' in card
    assert f"| {metric} |" in card
    assert str(dense_folder(kind).parent) not in card + json.dumps(values)  # no paths of this machine
    beside = {path.name for path in dense_folder(kind).iterdir()} | {"README.md", REPORT}
    assert {path.name for path in made.output.iterdir()} == beside


def test_nothing_is_measured_where_no_data_is_held_out(job):
    made = job("encoder")
    report = made.run()
    assert report.quality is None
    assert report.speedup is None
    assert "## Quality" not in (made.output / "README.md").read_text()


def test_the_dtype_of_the_output(job, dense_folder, tmp_path):
    half = job("encoder", "half", dtype="bfloat16")
    half.run()
    assert gblr.load(half.output).dtype == torch.bfloat16
    load_dense(dense_folder("encoder"), "test", torch.bfloat16).save_pretrained(tmp_path / "dense")
    shutil.copy(dense_folder("encoder") / "tokenizer.json", tmp_path / "dense")
    shutil.copy(dense_folder("encoder") / "tokenizer_config.json", tmp_path / "dense")
    same = FolderJob(str(tmp_path / "dense"), tmp_path / "same", QUICK, half.calibration, length=8)
    same.run()
    assert gblr.load(same.output).dtype == torch.bfloat16


def test_settings_reach_the_layers(job):
    settings = {**QUICK, "exclude": ["*.1.*"], "factor_dtype": "int8"}
    made = job("encoder", settings={**settings, "row_splits": {"*.intermediate.*": 2}})
    report = made.run()
    assert [row.name for row in report.layers] == ["encoder.layer.0.intermediate.dense"]
    weight = gblr.load(made.output).encoder.layer[0].intermediate.dense.weight
    assert weight.factor_dtype == "int8"
    assert len(weight.packing.split_sizes) == 2


def contents(folder):
    """All files but for times."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    values = json.loads(found.pop(REPORT))
    for key in ("stages", "speedup", "speed"):
        values.pop(key, None)
    found.pop("README.md")
    return {**found, REPORT: values}


STEPS = ["compress", "save_pretrained", "measure_quality", "measure_speed", "copy_companions", "model_card", "end_work"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("moment", ["before", "after"])
def test_interrupted_it_goes_on(job, data, monkeypatch, step, moment):
    held_out = data("encoder", "held out", 12, seed=1)
    finished = job("encoder", "finished", evaluation=held_out)
    finished.run()
    killed = job("encoder", evaluation=held_out, calibration=finished.calibration)
    original = getattr(folders, step)

    def interrupted(*given, **named):
        if moment == "after":
            original(*given, **named)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folders, step, interrupted)
        with pytest.raises(KeyboardInterrupt):
            killed.run()
    if (killed.output / "config.json").exists():
        assert step == "end_work"  # it is complete
    elif step not in ("compress", "save_pretrained"):
        monkeypatch.setattr(folders, "compress", None)  # not done twice
    if not (step == "end_work" and moment == "after"):
        killed.run()
    assert contents(killed.output) == contents(finished.output)


@pytest.mark.parametrize("number", range(4))
def test_interrupted_while_files_are_moved(job, monkeypatch, number):
    finished = job("encoder", "finished")
    finished.run()
    killed = job("encoder", calibration=finished.calibration)
    original, done = os.replace, []

    def interrupted(source, target):
        if WORK in os.fspath(source) and WORK not in os.fspath(target):
            if len(done) == number:
                raise KeyboardInterrupt
            done.append(target)
        original(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            killed.run()
    assert not (killed.output / "config.json").exists()
    killed.run()
    assert contents(killed.output) == contents(finished.output)


def test_unfinished_work_of_another_command_is_refused(job, monkeypatch, tmp_path):
    made = job("encoder")
    with monkeypatch.context() as patch:
        patch.setattr(folders, "save_pretrained", None)
        with pytest.raises(TypeError):
            made.run()
    others = [
        job("encoder", settings={**QUICK, "seed": 1}, calibration=made.calibration),
        job("encoder", calibration=made.calibration, samples=3),
        job("decoder", settings=ALL, calibration=made.calibration),
    ]
    for other in others:
        with pytest.raises(ConfigError, match="holds unfinished work on another source or with other settings"):
            other.run()
    made.calibration.write_text("w1 w2 w3\n")
    with pytest.raises(ConfigError, match="holds unfinished work on another source or with other settings"):
        made.run()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"budget": 2.0}}, r"budget must be relative FLOPs in \(0, 1\], got 2.0"),
        ({"settings": {"budget": 0.5, "family": "monarhc"}}, "no structure named 'monarhc'"),
        ({"settings": {"budget": 0.5, "layers": ["*.nothing"]}}, "matches no module of the model"),
        ({"settings": {"budget": 0.5, "row_splits": {"*.nothing": 2}}}, "row_splits: pattern"),
        ({"settings": {"budget": 0.5, "refine": -1}}, "refine must be a whole number of at least 0"),
        ({"samples": 0}, "--samples must be"),
        ({"length": 99}, "--length must be at most the model's 32 tokens"),
    ],
)
def test_what_is_refused_is_refused_before_anything_is_written(job, changes, message):
    made = job("encoder", **changes)
    with pytest.raises(ConfigError, match=message) as caught:
        made.run()
    assert "\n" not in str(caught.value)
    assert not made.output.exists()


def test_data_that_cannot_be_used_are_refused_before_anything_is_written(job, tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name, option in (("empty.txt", "--calibration"), ("binary.txt", "--eval"), ("missing.txt", "--eval")):
        given = {"calibration": tmp_path / name} if option == "--calibration" else {"evaluation": tmp_path / name}
        made = job("encoder", **given)
        with pytest.raises(ConfigError, match=f"^{option}: "):
            made.run()
        assert not made.output.exists()


def test_settings_that_turn_out_to_lead_nowhere_leave_the_output_free(job, monkeypatch):
    def refused(*given, **named):
        raise ConfigError("layer 'x': the budget allows no block")

    made = job("encoder")
    with monkeypatch.context() as patch:
        patch.setattr(folders, "compress", refused)
        with pytest.raises(ConfigError, match="allows no block"):
            made.run()
    assert not made.output.exists()


def test_the_licence_of_the_dense_model_is_kept(job, dense_folder, tmp_path):
    shutil.copytree(dense_folder("encoder"), tmp_path / "dense")
    card = "---\nlicense: apache-2.0\nlanguage: en\ndatasets: [a]\n---\n\nlicense: mine\n"
    (tmp_path / "dense" / "README.md").write_text(card)
    made = job("encoder")
    FolderJob(str(tmp_path / "dense"), made.output, QUICK, made.calibration, length=8).run()
    front = (made.output / "README.md").read_text().split("---")[1]
    assert "license: apache-2.0\nlanguage: en\n" in front
    assert "datasets" not in front
    assert "mine" not in front
