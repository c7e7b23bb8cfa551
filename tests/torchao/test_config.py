import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from torchao.core.config import config_from_dict, config_to_dict
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, quantize_

from gblr_plugin import ConfigError, GBLRConfig, GBLRConv2d, GBLRLinear, GBLRTensor, report
from gblr_plugin.families import FamilyLinear
from gblr_plugin.kernels.plan import Plan


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
    assert "% 4: it is too small to gain from structure" in str(report(model, X))


@pytest.mark.usefixtures("plans")
def test_prepare_then_convert():
    model = make()
    quantize_(model, GBLRConfig(step="prepare", initialiser="trapezoid", budget=0.5), is_layer)
    assert isinstance(model[0], GBLRConv2d)
    before = model(X)
    quantize_(model, GBLRConfig(step="convert"), is_layer)
    assert isinstance(model[0], nn.Conv2d)
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


@pytest.mark.parametrize(("family", "has_tensor"), [("low_rank", True), ("monarch", False)])
def test_a_family_takes_the_place_of_the_layers(family, has_tensor):
    prepared, at_once = make(), make()
    quantize_(prepared, GBLRConfig(family=family, budget=0.5))
    assert isinstance(prepared[2], FamilyLinear)
    config = config_from_dict(config_to_dict(GBLRConfig(step="convert", family=family, budget=0.5)))
    for model in (prepared, at_once):
        quantize_(model, config)
        assert isinstance(model[2].weight, GBLRTensor) is has_tensor
        assert not any(parameter.requires_grad for name, parameter in model[2].named_parameters() if name != "bias")
    assert torch.equal(prepared(X), at_once(X))
    with pytest.raises(ConfigError, match="GBLRConfig: family 'monarch' needs a budget"):
        GBLRConfig(family="monarch")
    with pytest.raises(ConfigError, match=r"no structure named 'monarc'; .*did you mean 'monarch'"):
        GBLRConfig(family="monarc", budget=0.5)
    with pytest.raises(ConfigError, match="GBLRConfig: options are those of a family"):
        GBLRConfig(options={"blocks": 2})


def test_converted_layers_are_left_alone_by_prepare():
    model = make()
    quantize_(model, GBLRConfig(step="convert", budget=0.5), is_layer)
    before = list(model)
    quantize_(model, GBLRConfig(step="prepare"), is_layer)
    assert all(a is b for a, b in zip(model, before, strict=True))


@pytest.mark.usefixtures("plans")
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


EVERY_FIELD = {
    "step": "convert",
    "budget": 0.4,
    "align": (2, 4),
    "initialiser": "trapezoid",
    "method": "pursuit",
    "num_components": 3,
    "row_splits": 2,
    "plan": "factors",
    "seed": 7,
    "factor_dtype": "int8",
    "family": "block_low_rank",
    "options": {"blocks": 2},
}


@pytest.mark.parametrize(
    "config",
    [
        GBLRConfig(),
        GBLRConfig(**EVERY_FIELD),
        GBLRConfig(align=4, plan=Plan(16, 32, ((4, "dense"), (1024, "blocks")), speedups=((1, 1.5),))),
    ],
)
def test_torchao_writes_and_reads_a_config(config):
    assert set(EVERY_FIELD) == {field.name for field in dataclasses.fields(GBLRConfig)}
    text = json.dumps(config_to_dict(config))
    assert config_from_dict(json.loads(text)) == config
    nested = FqnToConfig({"0": config, "re:1.*": None})
    assert config_from_dict(json.loads(json.dumps(config_to_dict(nested)))) == nested


def test_a_config_that_was_read_back_does_the_same():
    config = GBLRConfig(step="convert", budget=0.5, align=(2, 4), plan=Plan(8, 16))
    models = [make(), make()]
    quantize_(models[0], config)
    quantize_(models[1], config_from_dict(config_to_dict(config)))
    for model in models:
        assert (model[2].weight.plan.block_rows, model[2].weight.plan.block_cols) == (8, 16)
        rows, cols = model[2].weight.to_structured().rows, model[2].weight.to_structured().cols
        assert not bool((rows.start % 2).any())
        assert not bool((cols.start % 4).any())
    assert torch.equal(models[0](X), models[1](X))
    prepared = make()
    quantize_(prepared, config_from_dict(config_to_dict(GBLRConfig(align=(2, 4)))))
    assert prepared[2].align == (2, 4)


def test_a_plan_with_unknown_keys_is_refused():
    with pytest.raises(ConfigError, match="plan: unknown keys"):
        GBLRConfig(plan={"blocks": 3})


def test_torchao_reads_a_config_where_only_the_package_was_imported():
    code = (
        "import sys, gblr_plugin\n"
        "assert 'torchao' not in sys.modules\n"
        "from torchao.core.config import config_from_dict\n"
        "data = {'_type': 'GBLRConfig', '_version': 1, '_data': {'step': 'convert', 'budget': 0.5, 'align': [1, 2]}}\n"
        "assert config_from_dict(data).budget == 0.5\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


@pytest.mark.parametrize("name", ["2.weight", "2", r"re:2\.weight", r"re:2\..*", r"re:2"])
@pytest.mark.parametrize("step", ["prepare", "convert"])
def test_a_layer_or_its_weight_by_name(name, step):
    model = make()
    quantize_(model, FqnToConfig({name: GBLRConfig(step=step, budget=0.5)}), filter_fn=None)
    if step == "prepare":
        assert isinstance(model[2], GBLRLinear)
        quantize_(model, FqnToConfig({r"re:2.*": GBLRConfig(step="convert")}), filter_fn=None)
    else:
        assert isinstance(model[2].weight, GBLRTensor)
    assert type(model[0].weight.data) is torch.Tensor
    assert type(model[4].weight.data) is torch.Tensor
    assert model(X).shape == (2, 1)


def test_a_convolution_by_the_name_of_its_weight():
    model = make()
    quantize_(model, FqnToConfig({"0.weight": GBLRConfig(step="convert", budget=0.5)}), filter_fn=None)
    assert isinstance(model[0].weight, GBLRTensor)


def test_a_bias_by_name_changes_nothing():
    model = make()
    quantize_(model, FqnToConfig({"2.bias": GBLRConfig(step="convert", budget=0.5)}), filter_fn=None)
    assert type(model[2].weight.data) is torch.Tensor


def test_int8_of_torchao_by_the_name_of_a_weight():
    model = make()
    quantize_(model, FqnToConfig({"2.weight": GBLRConfig(step="convert", budget=0.5)}), filter_fn=None)
    int8 = Int8WeightOnlyConfig()
    quantize_(model, FqnToConfig({"2.weight": int8, "4.weight": int8}), filter_fn=None)
    assert model[2].weight.factor_dtype == "int8"
    assert type(model[4].weight.data).__name__ == "Int8Tensor"
    assert model(X).shape == (2, 1)
