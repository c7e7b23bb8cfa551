import json

import torch
from torch import nn

from gblr_plugin import convert, load, prepare, report, save
from gblr_plugin.surgery.layer_settings import LayerSettings
from gblr_plugin.surgery.report import LayerReport, Report
from gblr_plugin.tasks.digits import VisionTransformer

HALF = LayerSettings("trapezoid", budget=0.5)


def test_json_round_trip(tmp_path):
    model = VisionTransformer(dim=16, depth=1)
    prepare(model, settings=HALF)
    convert(model)
    counted = report(model, torch.rand(2, 1, 8, 8))
    values = json.loads(counted.to_json())
    assert Report.from_dict(values) == counted
    assert values["relative_flops"] == counted.relative_flops
    assert values["layers"][1]["relative_flops"] == counted.layers[1].relative_flops
    save(model, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors", lambda: VisionTransformer(dim=16, depth=1))
    assert report(again, torch.rand(2, 1, 8, 8)) == counted


def test_the_table_shows_what_matters_in_80_columns():
    name = "encoder.stages.3.blocks.17.attention.self.query_key_value.projection"
    layers = [
        LayerReport(name, "Linear", (4096, 16384), "gblr", 4096, 10**12, 4 * 10**12, 10**6, 4 * 10**6),
        LayerReport(name + ".b", "Linear", (1, 4), "dense", 0, 4, 4, 4, 4, note="too small to gain, kept dense"),
    ]
    counted = Report(layers, 10**9, 10**7, 2 * 10**7)
    lines = str(counted).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["layer", "shape", "structure", "comp.", "mult-adds", "params", "rel.", "share"]
    assert "…" in lines[2]
    assert "projection" in lines[2]
    assert lines[2].split()[1:] == ["4096x16384", "gblr", "4096", "1.00T", "1.00M", "0.250", "99.9%"]
    assert "multiply-adds: 1,001,000,000,004 of 4,001,000,000,004 dense" in lines
    assert any(line.endswith(": too small to gain, kept dense") for line in lines)
    assert "compressed layers: 25.00% of their dense multiply-adds" in lines
    assert "parameters: 10,000,000 of 20,000,000 dense" in lines


def test_the_table_of_an_empty_report():
    assert "total" in str(report(nn.ReLU(), torch.ones(1)))
