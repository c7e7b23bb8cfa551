from __future__ import annotations

import importlib
import io
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib")

from gblr_plugin import plot
from gblr_plugin.errors import ConfigError
from gblr_plugin.layers import GBLRLinear
from gblr_plugin.matrix.structure import Intervals, StructuredMatrix
from gblr_plugin.monitoring.pictures import overlap_map
from gblr_plugin.tensor.gblr_tensor import GBLRTensor


def matrix(m=24, n=16, num=6, splits=1, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def intervals(length):
        width = torch.randint(1, length, (num,), generator=generator)
        return Intervals(width, torch.randint(0, length, (num,), generator=generator), length)

    return StructuredMatrix.from_factors(
        torch.ones(num, m // splits),
        torch.ones(num, n),
        intervals(m // splits),
        intervals(n),
        (num // splits,) * splits,
    )


def texts(figure):
    found = [text.get_text() for text in figure.texts]
    for axes in figure.axes:
        for child in [axes, *axes.child_axes]:
            found += [child.get_title(loc) for loc in ("left", "right")] + [child.get_xlabel(), child.get_ylabel()]
            found += [text.get_text() for text in child.texts]
    return [text for text in found if text]


def rendered(figure):
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=40)
    return file.getvalue()


def report(budget, *, metric="accuracy", higher=True, **methods):
    def seeds(cost, values):
        return [{"relative_flops": cost, metric: value} for value in values]

    return {
        "metric": metric,
        "higher_is_better": higher,
        "methods": [
            {"name": name, "seeds": seeds(1.0 if name == "dense" else budget, values)}
            for name, values in methods.items()
        ],
    }


def test_structure_of_one_matrix_shows_overlap_intervals_and_counts():
    source = matrix(24, 16, 6, splits=2)
    figure = plot.structure(source, title="blocks.0.qkv")
    assert rendered(figure)
    assert {"blocks.0.qkv", f"{source.relative_flops:.1%}", "of dense FLOPs\n24 × 16, 6 components"} <= set(
        texts(figure)
    )
    main = next(axes for axes in figure.axes if axes.images and axes.get_xlabel())
    assert (main.get_xlim(), main.get_ylim()) == ((0, 16), (24, 0))
    # Every interval is drawn, in two parts where it wraps around.
    for part, collections in zip((source.rows, source.cols), drawn_intervals(figure), strict=True):
        wraps = int((part.start + part.width > part.length).sum())
        assert len(collections) == 6 + wraps
        assert sum(abs(b - a).sum() for a, b in collections) == part.width.sum()


def drawn_intervals(figure):
    segments = [axes.collections[0].get_segments() for axes in figure.axes if axes.collections]
    upright = [part for part in segments if all(a[0] == b[0] for a, b in part)]
    flat = [part for part in segments if all(a[1] == b[1] for a, b in part)]
    return upright[0], flat[0]


def test_profiles_count_components_per_row_and_column():
    source = matrix()
    figure = plot.structure(source)
    profiles = [axes.patches[0].get_data().values for axes in figure.axes if axes.patches]
    rows, cols = source.rows.support().sum(0), source.cols.support().sum(0)
    assert sorted(map(tuple, profiles), key=len) == [tuple(cols.tolist()), tuple(rows.tolist())]


def test_structure_of_layers_weights_and_empty_matrices():
    source = matrix()
    empty = Intervals(torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), 8)
    nothing = StructuredMatrix(torch.zeros(2, 8), torch.zeros(2, 8), empty, empty, (2,))
    for thing in (GBLRLinear(source), GBLRTensor.from_structured(source), nothing, matrix(2, 300, 3)):
        assert rendered(plot.structure(thing))


def test_structure_of_a_model_is_a_grid_with_one_scale():
    model = nn.Sequential(*[GBLRLinear(matrix(seed=seed)) for seed in range(3)], nn.Linear(16, 4))
    model.add_module("frozen", nn.Linear(16, 24))
    model.frozen.weight = nn.Parameter(GBLRTensor.from_structured(matrix(seed=4)), requires_grad=False)
    figure = plot.structure(model)
    shown = set(texts(figure))
    assert rendered(figure)
    assert {"0", "1", "2", "frozen"} <= shown
    assert "3" not in shown  # dense
    assert {f"{layer.relative_flops:.1%}" for layer in list(model)[:3]} <= shown
    most = max(int(overlap_map(layer).max()) for layer in [*list(model)[:3], model.frozen])
    bar = next(axes for axes in figure.axes if axes.get_title("left") == "overlapping blocks")
    assert [label.get_text() for label in bar.get_xticklabels()][-1] == str(most)
    few = plot.structure(model, max_panels=2)
    assert "and 2 more layers" in texts(few)
    assert "2" not in texts(few)


def test_a_model_with_one_structured_layer_shows_it_whole():
    assert "fc" in texts(plot.structure(nn.ModuleDict({"fc": GBLRLinear(matrix()), "head": nn.Linear(4, 4)})))


def test_a_model_without_structure_is_an_error():
    with pytest.raises(ConfigError, match="has no structure"):
        plot.structure(nn.Sequential(nn.Linear(4, 4)))


def test_curves_have_a_panel_per_quantity():
    history = {
        "relative_flops": [(0, 1.8), (10, 0.5), (20, 0.25)],
        "mean_row_width": [(0, 1.0), (10, 0.5), (20, 0.2)],
        "mean_column_width": [(0, 1.0), (10, 0.6), (20, 0.3)],
        "frozen": [(0, 0.0), (10, 0.0), (20, 1.0)],
        "sigma": [(0, 1.0), (10, 50.0)],
        "loss": [2.0, 1.0, 0.5],
    }
    figure = plot.curves(history, budget=0.25)
    assert rendered(figure)
    titles = [axes.get_title("left") for axes in figure.axes]
    assert titles == ["relative FLOPs", "mean width of live components", "sigma", "loss"]
    assert figure.axes[0].lines[0].get_xydata().tolist() == [list(point) for point in history["relative_flops"]]
    assert {"budget 25%", "frozen", "rows", "columns"} <= set(texts(figure))
    assert figure.axes[3].lines[0].get_xdata().tolist() == [0, 1, 2]


def test_curves_show_what_is_below_zero_and_stay_off_the_edge():
    history = {
        "live_components": [(0, 96), (10, 96), (20, 96)],
        "lambda": [(0, 0.0), (10, 0.5), (20, -0.02)],
        "sigma": [(0, 1.0), (10, 100.0), (20, float("inf"))],
        "loss": [0.0, 0.0],
    }
    figure = plot.curves(history)
    assert rendered(figure)
    for axes, values in zip(figure.axes, ([96.0], [1.0, 100.0], [-0.02, 0.5], [0.0]), strict=True):
        low, high = axes.get_ylim()
        assert max(values) < high
        assert low < min(values) if min(values) < 0 else low == 0
        assert high - low < 1.2 * (max(values) - min(0.0, *values, 0.0)) or high == 1.0


def test_curves_of_a_callback():
    class Trained:
        history = {"relative_flops": [(0, 1.0), (5, 0.5)]}

    assert len(plot.curves(Trained()).axes) == 1
    for nothing in ({}, {"sigma": []}, 3):
        with pytest.raises(ConfigError, match="curves"):
            plot.curves(nothing)


def test_pareto_places_means_ranges_and_the_dense_line():
    reports = [
        report(0.25, dense=[0.97, 0.99], gblr=[0.95, 0.97], low_rank=[0.90, 0.92]),
        report(0.1, dense=[0.97, 0.99], gblr=[0.90, 0.92], low_rank=[0.8, 0.9]),
    ]
    figure = plot.pareto(reports)
    assert rendered(figure)
    (axes,) = figure.axes
    lines = {tuple(line.get_xdata()): line.get_ydata() for line in axes.lines if line.get_marker() == "o"}
    assert len([line for line in axes.lines if line.get_marker() == "o"]) == 2
    assert lines.keys() == {(0.1, 0.25)}  # in order of cost, both methods
    means = sorted(round(float(y), 6) for line in axes.lines if line.get_marker() == "o" for y in line.get_ydata())
    assert means == [0.85, 0.91, 0.91, 0.96]
    assert {"gblr", "low-rank", "dense 0.98", "accuracy", "higher is better"} <= set(texts(figure))
    assert axes.get_ylim()[0] <= 0.8 <= axes.get_ylim()[1]


def test_pareto_takes_report_objects_and_checks_them():
    class Run:
        def to_dict(self):
            return report(0.4, metric="perplexity", higher=False, gblr=[19.2], monarch=[20.5])

    assert "lower is better" in texts(plot.pareto([Run()]))
    with pytest.raises(ConfigError, match="different metrics"):
        plot.pareto([Run(), report(0.4, gblr=[0.9])])
    with pytest.raises(ConfigError, match="at least one"):
        plot.pareto([])
    with pytest.raises(ConfigError, match="not a report"):
        plot.pareto([{"methods": []}])


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "gblr_plugin.plot")
    with pytest.raises(ImportError, match=r"pip install 'gblr-plugin\[plot\]'"):
        importlib.import_module("gblr_plugin.plot")


def test_figures_have_the_title_that_they_are_given():
    history = {"relative_flops": [(0, 1.8), (10, 0.5)]}
    assert plot.curves(history, title="run 3").get_suptitle() == "run 3"
    summary = report(0.5, dense=[0.9], gblr=[0.8])
    assert plot.pareto([summary], title="digits").get_suptitle() == "digits"
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for layer in model:
        layer.weight = nn.Parameter(GBLRTensor.from_structured(matrix(8, 8, 3)), requires_grad=False)
    assert "both layers" in texts(plot.structure(model, title="both layers"))
