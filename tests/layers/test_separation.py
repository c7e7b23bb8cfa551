import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torchao.quantization import quantize_

import gblr_plugin as gblr
from gblr_plugin import ConfigError, GBLRConfig, GBLRTensor, LayerSettings
from gblr_plugin.layers.attention import ProjectedAttention
from gblr_plugin.layers.separation import is_packed, separate, separated
from gblr_plugin.surgery.selection import layer_filter, select_layers

HALF = LayerSettings("trapezoid", budget=0.5)


class Mine(nn.MultiheadAttention):
    """Of a user's own."""


def network(kind=nn.MultiheadAttention):
    torch.manual_seed(0)
    model = nn.ModuleDict({"first": kind(16, 4, batch_first=True), "second": kind(16, 4, batch_first=True)})
    with torch.no_grad():
        model["first"].in_proj_bias.normal_()
    return model


def attend(model, x):
    for name in ("first", "second"):
        x = model[name](x, x, x)[0]
    return x


def projections(*names):
    return [f"{name}.{layer}_proj" for name in names for layer in ("q", "k", "v", "out")]


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, (), projections("first", "second")),
        (["first"], (), projections("first")),
        (["MultiheadAttention"], ["first.k_proj"], [n for n in projections("first", "second") if n != "first.k_proj"]),
        ([nn.MultiheadAttention], ["second"], projections("first")),
        (["*.q_proj"], (), ["first.q_proj", "second.q_proj"]),
    ],
)
def test_patterns_that_mean_attention_mean_its_layers(include, exclude, expected):
    model, x = network(), torch.randn(2, 5, 16)
    before = attend(model, x)
    assert list(select_layers(model, include, exclude).layers) == expected
    assert type(model["first"]) is nn.MultiheadAttention
    assert list(gblr.prepare(model, include, exclude)) == expected
    torch.testing.assert_close(attend(model, x), before, rtol=1e-4, atol=1e-5)
    for name in ("first", "second"):
        structured = any(layer.startswith(name) for layer in expected)
        assert type(model[name]) is (ProjectedAttention if structured else nn.MultiheadAttention)


def test_what_is_left_keeps_its_parameters():
    model = network()
    before = dict(model.named_parameters())
    version = before["second.in_proj_weight"]._version
    gblr.prepare(model, ["first"])
    assert model["second"].in_proj_weight is before["second.in_proj_weight"]
    assert model["second"].in_proj_weight._version == version
    with pytest.raises(ConfigError, match="matches no module"):
        gblr.prepare(model, ["third"])


def test_an_error_leaves_the_model_as_it_was():
    model = network()
    first = model["first"]
    with pytest.raises(ConfigError), separated(model):
        raise ConfigError("something")
    assert model["first"] is first
    with pytest.raises(ConfigError, match="needs a budget"):
        gblr.prepare(model, settings=LayerSettings("block_sparse"))
    assert model["first"] is first


def test_what_was_changed_meanwhile_is_packed_again():
    model = network()
    with separated(model), torch.no_grad():
        model["first"].v_proj.bias.fill_(5)
        model["first"].eval()
    assert torch.equal(model["first"].in_proj_bias[32:], torch.full((16,), 5.0))
    assert not model["first"].training


def test_hooks_of_attention_go_with_it():
    model, seen = network(), []
    handle = model["first"].register_forward_hook(lambda *_: seen.append(1))
    gblr.prepare(model)
    attend(model, torch.randn(1, 3, 16))
    handle.remove()
    attend(model, torch.randn(1, 3, 16))
    assert seen == [1]


def test_subclasses_and_parametrized_attention_are_named():
    model = network(Mine)
    assert not is_packed(model["first"])
    skipped = select_layers(nn.ModuleDict({"attention": model, "body": nn.Linear(16, 16)})).skipped
    assert {one.name for one in skipped} >= {"attention.first.in_proj_weight", "attention.first.out_proj"}
    assert {one.reason for one in skipped if "in_proj" in one.name} == {"a Mine cannot be structured"}
    parametrized = parametrizations.weight_norm(nn.MultiheadAttention(16, 4), "in_proj_weight")
    assert not is_packed(parametrized)


def test_separate_for_good_by_names_of_tensors():
    model = network()
    assert len(separate(model, ["second.q_proj.weight"])) == 1
    assert type(model["first"]) is nn.MultiheadAttention
    assert type(model["second"]) is ProjectedAttention
    assert len(separate(model)) == 1


def test_quantize_with_our_filter_and_with_a_callers():
    x = torch.randn(2, 5, 16)
    chosen = ["first.q_proj", "first.out_proj"]
    for makes_ours, expected in ((True, chosen), (False, projections("first", "second"))):
        model = network()
        passes = layer_filter(model, chosen) if makes_ours else isinstance_attention
        quantize_(model, GBLRConfig(step="convert", budget=0.5, method="trapezoid"), filter_fn=passes)
        structured = [name for name, module in model.named_modules() if isinstance(weight_of(module), GBLRTensor)]
        assert structured == expected
        assert torch.isfinite(attend(model, x)).all()
    small = nn.Sequential(nn.MultiheadAttention(2, 1))
    quantize_(small, GBLRConfig(step="convert", budget=0.5), filter_fn=isinstance_attention)
    assert type(small[0]) is nn.MultiheadAttention


def isinstance_attention(module, name):
    return isinstance(module, nn.MultiheadAttention)


def weight_of(module):
    return getattr(module._parameters.get("weight"), "data", None)


def test_compress_and_files(tmp_path):
    model, x = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval(), torch.randn(4, 6, 16)
    report = gblr.compress(model, 0.5, [torch.randn(4, 6, 16) for _ in range(2)], refine=2)
    assert [row.name for row in report.layers] == [*projections("self_attn"), "linear1", "linear2"]
    gblr.save(model, tmp_path / "model.safetensors")
    again = gblr.load(tmp_path / "model.safetensors", nn.TransformerEncoderLayer(16, 4, 32, batch_first=True))
    assert torch.equal(again(x), model(x))


def test_a_family_and_a_file_of_it(tmp_path):
    model = network()
    gblr.prepare(model, ["first.v_proj"], family="monarch", budget=0.5)
    gblr.save(gblr.convert(model).eval(), tmp_path / "model.safetensors")
    again, x = gblr.load(tmp_path / "model.safetensors", network), torch.randn(2, 5, 16)
    assert torch.equal(attend(again, x), attend(model, x))
