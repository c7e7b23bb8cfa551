import json

import pytest
import torch
from torch import nn

from gblr_plugin.cli import main
from gblr_plugin.run import pipeline
from gblr_plugin.run.unfinished import Unfinished


def network():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def test_what_is_kept_comes_back(tmp_path):
    kept = Unfinished(tmp_path / "u", {"a": (1, 2)})
    assert kept.find("x", network) is None
    trained = network()
    trained.weight.data.mul_(3)
    kept.keep("x", trained, {"figure": 0.5})
    again, figures = Unfinished(tmp_path / "u", {"a": [1, 2]}).find("x", network)
    assert torch.equal(again.weight, trained.weight)
    assert figures == {"figure": 0.5}
    assert Unfinished(tmp_path / "u", {"a": [1, 3]}).find("x", network) is None  # of another run
    assert not (tmp_path / "u").exists()


def test_a_half_written_training_is_none(tmp_path):
    kept = Unfinished(tmp_path, {})
    kept.keep("x", network(), {})
    (tmp_path / "x.json").unlink()  # as if it was killed before the figures, which come last
    assert Unfinished(tmp_path, {}).find("x", network) is None
    (tmp_path / "task.json").write_text("{")
    assert Unfinished(tmp_path, {}).find("x", network) is None
    kept.remove()
    kept.remove()
    assert not tmp_path.exists()


OPTIONS = ["--set", "task=own_task:Task", "--set", "model={}", "--set", "dense.batch_size=16"]
OPTIONS += [
    "--set",
    "finetune.batch_size=16",
    "--set",
    "methods=[{name: gblr}, {name: low_rank}]",
    "--set",
    "budget=0.8",
]


def test_a_run_goes_on_after_the_last_training_that_it_finished(project, monkeypatch, capfd):
    command = ["run", "config.yaml", "--output", "out", *OPTIONS]
    compress, asked = pipeline.compress, []

    def interrupted(context, method, *arguments, **options):
        asked.append(method.name)
        if method.name == "low_rank":
            raise KeyboardInterrupt
        return compress(context, method, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "compress", interrupted)
        assert main(command) == 1
    assert not (project / "out/report.json").exists()

    def counted(context, method, *arguments, **options):
        asked.append(method.name)
        return compress(context, method, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "compress", counted)
        patch.setattr(pipeline, "fit_dense", None)  # not again
        assert main(command) == 0
    assert asked == ["gblr", "low_rank", "low_rank"]
    assert not (project / "out/.unfinished").exists()
    report = json.loads((project / "out/report.json").read_text())
    assert [method["name"] for method in report["methods"]] == ["dense", "gblr", "low_rank"]
    assert (project / "out/figures/curves.png").exists()  # of gblr's training, which was before

    assert main([*command[:3], "whole", *OPTIONS]) == 0
    for name in ("dense", "model"):
        ours, theirs = ((project / folder / f"{name}.safetensors").read_bytes() for folder in ("out", "whole"))
        assert ours == theirs
    capfd.readouterr()


@pytest.mark.parametrize("other", [["--set", "seeds=[1]"], ["--set", "dense.lr=0.5"]])
def test_other_settings_begin_anew(project, monkeypatch, other, capfd):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "compress", stop)
        for more in ([], other):
            assert main(["run", "config.yaml", "--output", "out", *OPTIONS, *more]) == 1
    task = json.loads((project / "out/.unfinished/task.json").read_text())
    assert task["settings"]["seeds"] == ([1] if "seeds" in other[1] else [0])
    assert task["settings"]["dense"]["lr"] == (0.5 if "lr" in other[1] else 0.001)
    capfd.readouterr()
