import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gblr_plugin import convert, prepare, report
from gblr_plugin.surgery.layer_settings import LayerSettings
from gblr_plugin.surgery.report import Report
from gblr_plugin.tasks.text import ByteGPT

HALF = LayerSettings("trapezoid", budget=0.5)


def by_name(counted):
    return {layer.name: layer for layer in counted.layers}


def test_linear_by_hand():
    counted = report(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2, bias=False)), torch.randn(3, 5, 6))
    first, second = counted.layers
    assert (first.shape, first.multiply_adds, first.parameters) == ((4, 6), 15 * 24, 24)
    assert (second.shape, second.multiply_adds) == ((2, 4), 15 * 8)
    assert counted.multiply_adds == counted.dense_multiply_adds == 15 * 32
    assert counted.parameters == 24 + 4 + 8
    assert (counted.other_multiply_adds, counted.relative_flops, counted.model_relative_flops) == (0, 1.0, 1.0)


def test_convolutions_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv1d(8, 4, 2))
    counted = report(model[:2], torch.randn(2, 3, 9, 9))  # 9 -> 5 -> 3
    first, depthwise = counted.layers
    assert (first.shape, first.multiply_adds) == ((8, 27), 2 * 25 * 8 * 27)
    assert (depthwise.shape, depthwise.multiply_adds, depthwise.parameters) == ((8, 9), 2 * 9 * 72, 72)
    assert report(model[2:], torch.randn(1, 8, 7)).multiply_adds == 6 * 4 * 16


@pytest.mark.usefixtures("plans")
def test_structured_layers_count_their_intervals():
    model = nn.Sequential(nn.Linear(16, 24))
    layers = prepare(model, settings=HALF)
    x = torch.randn(7, 16)
    trained = report(model, x)
    stored = layers["0"].stored
    assert trained.layers[0].multiply_adds == 7 * stored
    assert trained.layers[0].structure == "gblr"
    assert trained.relative_flops == stored / (16 * 24) <= 0.5
    assert trained.parameters == stored + 24
    assert trained.dense_parameters == 16 * 24 + 24
    frozen = convert(model)
    converted = report(frozen, x)
    assert converted.layers[0].multiply_adds == 7 * stored
    assert (converted.parameters, converted.relative_flops) == (trained.parameters, trained.relative_flops)
    assert converted.layers[0].kernel
    padding, predicted = frozen[0].weight.packing.padding, frozen[0].weight.predicted_cost
    assert (converted.layers[0].padding, converted.layers[0].predicted) == (padding, predicted)
    saved = str(Report.from_dict(json.loads(converted.to_json())))
    assert f"0: {converted.layers[0].kernel}, padding {padding:.3f}, predicted cost {predicted:.3f}" in saved


def test_a_matrix_beside_the_factors_is_shown():
    model = nn.Sequential(nn.Linear(16, 24))
    prepare(model, settings=HALF)
    found = report(convert(model), torch.randn(7, 16))
    assert found.layers[0].matrix_bytes == 4 * 16 * 24
    assert ", matrix 1.54kB\n" in str(found)
    assert found.layers[0].parameters < 16 * 24


def test_a_layer_used_twice_counts_twice_and_is_stored_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.b = self.a

        def forward(self, x):
            return self.b(self.a(x))

    counted = report(Twice(), torch.randn(1, 8))
    assert len(counted.layers) == 1
    assert (counted.multiply_adds, counted.parameters) == (2 * 64, 72)


def test_a_layer_that_is_not_used_counts_nothing():
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4)})
    model.forward = lambda x: model["used"](x)
    layers = by_name(report(model, torch.randn(1, 4)))
    assert (layers["used"].multiply_adds, layers["unused"].multiply_adds) == (16, 0)
    assert layers["unused"].relative_flops == 1.0


def test_attention_and_embeddings_by_hand():
    tokens, dim = 10, 16
    model = ByteGPT(context=tokens, dim=dim, depth=1, heads=2, mlp_ratio=4)
    counted = report(model, torch.randint(0, 256, (3, tokens)))
    linear = 3 * tokens * (3 * dim * dim + dim * dim + 2 * 4 * dim * dim)
    attention = 3 * 2 * tokens * tokens * dim  # scores and values
    head = 3 * tokens * dim * 256  # tied with the embedding, whose look-up costs nothing
    assert sum(layer.multiply_adds for layer in counted.layers) == linear
    assert counted.other_multiply_adds == attention + head
    assert counted.parameters == sum(p.numel() for p in model.parameters())


def test_tied_layers_are_stored_once():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    counted = report(model, torch.randn(1, 8))
    assert (counted.multiply_adds, counted.parameters) == (128, 64)


@pytest.mark.parametrize("training", [True, False])
def test_torchs_own_encoder_layer_is_counted_whole_and_left_as_it_was(training):
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).train(training)
    fastpath = torch.backends.mha.get_fastpath_enabled()
    counted = report(model, torch.randn(1, 8, 16))
    layers = by_name(counted)
    assert layers["linear1"].multiply_adds == layers["linear2"].multiply_adds == 8 * 16 * 32
    assert [layers[f"self_attn.{name}_proj"].multiply_adds for name in ("q", "k", "v", "out")] == [8 * 16 * 16] * 4
    assert type(model.self_attn) is nn.MultiheadAttention
    assert counted.other_multiply_adds == counted.attention_multiply_adds == 2 * 8 * 8 * 16
    assert model.training is training
    assert torch.backends.mha.get_fastpath_enabled() == fastpath


def test_modes_of_single_modules_and_hooks_are_restored_even_after_an_error():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4).eval())
    with pytest.raises(RuntimeError):
        report(model, torch.randn(2, 5))
    report(model, torch.randn(2, 4))
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    assert not model[0]._forward_hooks
    assert not model[0]._forward_pre_hooks


def test_inputs_as_tuple_and_as_keywords():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, scale=1.0):
            return self.layer(x) * scale

    for example in (torch.ones(2, 4), (torch.ones(2, 4), 2.0), {"x": torch.ones(2, 4), "scale": 2.0}):
        assert report(Two(), example).multiply_adds == 32


def test_products_without_layers_are_counted():
    class Product(nn.Module):
        def forward(self, x):
            return F.linear(x, x) @ x

    counted = report(Product(), torch.randn(5, 3))
    assert counted.layers == []
    assert counted.multiply_adds == 2 * 5 * 5 * 3


def test_zeros_that_pruning_left_are_noted():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        model[0].weight[:, :2] = 0.0
    assert [layer.note for layer in report(model, torch.ones(1, 8)).layers] == [
        "25% of its entries are zero, and multiplied",
        "",
    ]
