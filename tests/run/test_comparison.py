import json

import pytest
import torch

from gblr_plugin.cli import main
from gblr_plugin.errors import ConfigError
from gblr_plugin.run.comparison import Comparison
from gblr_plugin.run.comparison_report import ComparisonReport, Row
from gblr_plugin.run.comparison_settings import ComparisonSettings
from gblr_plugin.run.settings import Method

CONFIG = """\
task: own_task:Task
budgets: [0.7, 0.9]
seeds: [0]
calibration: {batches: 2}
dense: {epochs: 2, batch_size: 16}
finetune: {epochs: 1, batch_size: 16}
methods:
  - {name: gblr, starts: [gblr, svd], trial: 1.0, folds: 2}
  - {name: low_rank}
  - {name: l1}
config_list:
  - {op_names: [network.0], gblr: {initialiser: gblr, sigma_start: 100}}
"""


@pytest.fixture
def config(project):
    (project / "compare.yaml").write_text(CONFIG)
    return project


def rows(project):
    return ComparisonReport.from_dict(json.loads((project / "out/comparison.json").read_text()))


def test_every_method_at_every_budget_and_it_goes_on_where_it_stopped(config, capfd):
    assert main(["compare", "compare.yaml", "--output", "out"]) == 0
    shown = capfd.readouterr()
    assert shown.err == ""
    assert {path.name for path in (config / "out").iterdir()} >= {"comparison.json", "comparison.txt", "comparison.png"}
    result = rows(config)
    found = {(row.method, row.budget, row.phase) for row in result.rows}
    phases = ("one_shot", "calibrated", "fine_tuned")
    expected = {(name, b, phase) for name in ("gblr", "low_rank") for b in (0.7, 0.9) for phase in phases}
    expected |= {("l1", 0.7, "fine_tuned"), ("l1", 0.9, "fine_tuned")}
    expected |= {("dense", 1.0, "one_shot"), ("dense", 1.0, "fine_tuned")}
    assert found == expected
    assert len(result.rows) == len(expected)
    for row in result.rows:
        if row.method in ("gblr", "low_rank"):
            assert row.relative_flops <= row.budget
    # l1 leaves whole rows: 22 or 23 of 32 for 0.7.
    assert result.find("l1", 0.7, "fine_tuned", 0).relative_flops == pytest.approx(0.7, abs=0.02)

    # Nothing is done twice; what is missing is done, to the same figures.
    before = result.rows
    kept = [row for row in before if (row.method, row.phase) != ("low_rank", "fine_tuned")]
    values = json.loads(result.to_json()) | {"rows": [vars(row) for row in kept]}
    (config / "out/comparison.json").write_text(json.dumps(values))
    assert main(["compare", "compare.yaml", "--output", "out"]) == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("seed 0  ")]
    assert len(lines) == 2

    def figures(row):
        return {key: value for key, value in vars(row).items() if key != "seconds"}

    again = rows(config)
    for row in before:
        found = again.find(row.method, row.budget, row.phase, row.seed)
        assert figures(found) == figures(row)


def test_a_folder_of_other_settings_is_refused(config, capfd):
    (config / "out").mkdir()
    empty = ComparisonReport("digits_vit", "accuracy", True, [], {}, {"budgets": [0.1]})
    (config / "out/comparison.json").write_text(empty.to_json())
    assert main(["compare", "compare.yaml", "--output", "out"]) == 2
    assert "holds a comparison of other settings; choose another folder" in capfd.readouterr().err
    (config / "out/comparison.json").write_text("{")
    assert main(["compare", "compare.yaml", "--output", "out"]) == 2
    assert "is not a report of gblr compare" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budgets": []}, "budgets must be different relative FLOPs, at least one"),
        ({"budgets": [0.5, 0.5]}, "budgets must be different"),
        ({"budgets": [1.5]}, r"budgets must be relative FLOPs in \(0, 1\], got 1.5"),
        ({"budgets": [0.5], "config_list": [{"op_names": ["a"], "sparse_ratio": 0.5}]}, "leave sparse_ratio"),
        ({"budgets": [0.5], "seeds": []}, "seeds must not be empty"),
        ({"budgets": [0.5], "methods": [Method("gblr"), Method("gblr")]}, "each name may stand once"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ComparisonSettings("digits_vit", **settings)


def test_what_cannot_work_is_refused_before_anything_is_trained():
    with pytest.raises(ConfigError, match="no_such"):
        Comparison(ComparisonSettings("digits_vit", [0.5], methods=[Method("no_such")]))


def report():
    found = []
    for seed in (0, 1):
        found.append(Row("dense", 1.0, "fine_tuned", seed, 1.0, 97.0, 0.1, 99.0, 0.01, 1.0))
        for budget in (0.2, 0.4):
            for name, loss in (("gblr", 0.2), ("low_rank", 0.35 - budget / 2)):
                for phase in ("one_shot", "fine_tuned"):
                    value = Row(name, budget, phase, seed, budget, 90.0 + seed, loss, 95.0, 0.05, 1.0)
                    found.append(value)
            found.append(Row("l1", budget, "fine_tuned", seed, budget + 0.05, 70.0, 1.0, 75.0, 0.9, 1.0))
    return ComparisonReport("digits_vit", "accuracy", True, found, {}, {})


def test_the_report_knows_who_is_best_and_survives_json():
    result = report()
    assert result.methods == ["gblr", "low_rank", "l1"]
    assert result.budgets == [0.2, 0.4]
    assert result.best("fine_tuned", 0.2) == "gblr"
    assert result.best("fine_tuned", 0.4) == "low_rank"
    assert ComparisonReport.from_dict(json.loads(result.to_json())) == result
    with pytest.raises(ValueError, match="not a gblr-comparison"):
        ComparisonReport.from_dict({"format": "other"})


def test_the_table_shows_every_method_at_every_budget():
    text = str(report())
    assert text.count("budget 0.") == 2
    first = text.split("budget 0.2")[1].split("budget")[0]
    assert [line.split()[0] for line in first.strip().splitlines()[2:]] == ["gblr", "low_rank", "l1", "dense"]
    assert "90.500 ± 0.500" in first


def test_the_figure_has_both_sides_and_dashes_masks():
    pytest.importorskip("matplotlib")
    from gblr_plugin import plot

    figure = plot.comparison(report())
    training, held_out = figure.axes
    assert training.get_title(loc="left") == "accuracy, training data"
    assert held_out.get_title(loc="left") == "accuracy, held-out data"
    lines = {len(line.get_xdata()): line for line in held_out.lines}
    assert 2 in lines
    drawn = [line for line in held_out.lines if list(line.get_xdata()) == [0.2, 0.4]]
    assert len(drawn) == 2
    assert all(list(line.get_ydata()) == [90.5, 90.5] for line in drawn)
    masked = [line for line in held_out.lines if list(line.get_xdata()) == [0.25, 0.45]]
    assert len(masked) == 1
    assert masked[0].get_linestyle() == "--"
    losses = plot.comparison(report(), loss=True).axes[1]
    assert torch.tensor([line.get_ydata()[0] for line in losses.lines if len(line.get_xdata()) == 2]).min() < 0.5
    with pytest.raises(ConfigError, match="no row of phase 'calibrated'"):
        plot.comparison(report(), phase="calibrated")


def test_the_figure_has_a_title_and_does_without_a_dense_row():
    pytest.importorskip("matplotlib")
    from gblr_plugin import plot

    part = report()
    part.rows[:] = [row for row in part.rows if row.method != "dense" and (row.method, row.budget) != ("gblr", 0.4)]
    figure = plot.comparison(part, title="small networks")
    assert figure.get_suptitle() == "small networks"
    assert not [text for axes in figure.axes for text in axes.texts if text.get_text().startswith("dense")]
    assert [len(line.get_xdata()) for line in figure.axes[1].lines].count(1) == 1  # gblr, at one budget
