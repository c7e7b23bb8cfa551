import pytest
import torch
from torch import nn
from torchao.quantization import quantize_

from gblr_plugin import ConfigError, GBLRConfig, GBLRConv2d, GBLRLinear, GBLRTensor, report


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 16, 3), nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))


X = torch.randn(2, 4, 4, 4)


def is_layer(module, name):
    return isinstance(module, (nn.Linear, nn.Conv2d))


def test_prepare_with_the_default_filter_takes_linear_layers():
    model = make()
    before = model(X)
    quantize_(model, GBLRConfig(step="prepare"))
    assert [type(module) for module in model] == [nn.Conv2d, nn.Flatten, GBLRLinear, nn.ReLU, nn.Linear]
    assert torch.allclose(model(X), before, atol=1e-5)
    assert "4: too small to gain, kept dense" in str(report(model, X))


def test_prepare_then_convert():
    model = make()
    quantize_(model, GBLRConfig(step="prepare", initialiser="trapezoid", budget=0.5), is_layer)
    assert isinstance(model[0], GBLRConv2d)
    before = model(X)
    quantize_(model, GBLRConfig(step="convert"), is_layer)
    assert type(model[0]) is nn.Conv2d
    assert isinstance(model[0].weight, GBLRTensor)
    assert isinstance(model[2].weight, GBLRTensor)
    assert torch.allclose(model(X), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("step", ["prepare", "convert"])
def test_applying_a_config_twice_changes_nothing(step):
    model = make()
    config = GBLRConfig(step=step, initialiser="trapezoid", budget=0.5)
    quantize_(model, config, is_layer)
    before = list(model)
    quantize_(model, config, is_layer)
    assert all(a is b for a, b in zip(model, before, strict=True))


def test_converted_layers_are_left_alone_by_prepare():
    model = make()
    quantize_(model, GBLRConfig(step="convert", budget=0.5), is_layer)
    before = list(model)
    quantize_(model, GBLRConfig(step="prepare"), is_layer)
    assert all(a is b for a, b in zip(model, before, strict=True))


def test_one_shot_keeps_the_budget_and_the_dtype():
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 48)).to(torch.bfloat16)
    quantize_(model, GBLRConfig(step="convert", budget=0.4))
    for layer in model:
        assert 0.3 < layer.weight.relative_flops <= 0.4
    assert model(torch.randn(3, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_one_shot_needs_a_budget():
    with pytest.raises(ConfigError, match="needs a budget"):
        quantize_(make(), GBLRConfig(step="convert"))


def test_a_layer_stored_dense_is_not_compressed_again():
    model = nn.Sequential(nn.Linear(16, 16))
    quantize_(model, GBLRConfig(step="prepare"))  # full widths: more than dense
    quantize_(model, GBLRConfig(step="convert"))
    layer = model[0]
    assert type(layer.weight.data) is torch.Tensor
    quantize_(model, GBLRConfig(step="convert", budget=0.5))
    assert model[0] is layer


def test_smooth_masks_are_not_converted():
    model = make()
    quantize_(model, GBLRConfig())
    model[2].set_sigma(10.0)
    with pytest.raises(ConfigError, match="still smooth"):
        quantize_(model, GBLRConfig(step="convert"))


def test_nan_weights_are_refused():
    model = make()
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    for step in ("prepare", "convert"):
        with pytest.raises(ConfigError, match="NaN"):
            quantize_(model, GBLRConfig(step=step, budget=0.5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": "freeze"}, "step must be 'prepare' or 'convert', got 'freeze'"),
        ({"budget": 0}, r"budget must be relative FLOPs in \(0, 1\], got 0"),
        ({"budget": 1.2}, "got 1.2"),
        ({"budget": float("nan")}, "got nan"),
        ({"budget": "half"}, "got 'half'"),
        ({"budget": True}, "got True"),
        ({"method": "pca"}, "method must be one of .*, got 'pca'"),
        ({"initialiser": "pca"}, "initialiser must be one of"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        GBLRConfig(**arguments)


@pytest.mark.parametrize("config", [GBLRConfig(step="prepare"), GBLRConfig(step="convert", budget=0.5)])
def test_a_module_used_twice_stays_one(config):
    torch.manual_seed(0)
    shared = nn.Linear(32, 32)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Sequential(shared))
    quantize_(model, config)
    assert model[0] is model[2] is model[3][0]
    layer = model[0]
    expected = model[0](torch.relu(layer(torch.ones(2, 32))))
    assert torch.equal(model(torch.ones(2, 32)), layer(expected))
    assert isinstance(layer, GBLRLinear) or isinstance(layer.weight, GBLRTensor)


def test_a_lone_layer_is_turned_into_another():
    layer = nn.Linear(32, 32)
    quantize_(layer, GBLRConfig(step="convert", budget=0.5))
    assert isinstance(layer.weight, GBLRTensor)
