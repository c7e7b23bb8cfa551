import copy
import logging

import pytest
import torch
from torch import nn
from torch.nn.utils import weight_norm as old_weight_norm
from torch.nn.utils.parametrizations import weight_norm

from gblr_plugin import ConfigError, GBLRConv1d, GBLRConv2d, GBLRLinear, GBLRTensor, convert, prepare, report
from gblr_plugin.decomposition import decompose
from gblr_plugin.surgery.conversion import frozen_like, prepare_layers
from gblr_plugin.surgery.layer_settings import LayerSettings

pytestmark = pytest.mark.usefixtures("plans")
HALF = LayerSettings("trapezoid", budget=0.5)


def mlp():
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 24))


def conv_net():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1, padding_mode="reflect"),
        nn.ReLU(),
        nn.Conv2d(16, 8, 3, padding="same", dilation=2, bias=False),
        nn.Flatten(2),
        nn.Conv1d(8, 12, 5, stride=3),
    )


def close(a, b, tolerance=1e-5):
    return ((a - b).norm() / b.norm()).item() < tolerance


def test_full_rank_start_keeps_the_function():
    for model, x in ((mlp(), torch.randn(5, 24)), (conv_net(), torch.randn(2, 3, 8, 8))):
        before = model(x)
        assert prepare(model)
        assert close(model(x), before)


@pytest.mark.parametrize(("make", "shape"), [(mlp, (5, 24)), (mlp, (2, 3, 24)), (conv_net, (2, 3, 8, 8))])
def test_outputs_before_and_after_convert_agree(make, shape):
    torch.manual_seed(0)
    model = make().eval()
    layers = prepare(model, settings=HALF)
    x = torch.randn(shape)
    before = model(x)
    cost = {name: layer.stored for name, layer in layers.items()}
    assert convert(model) is model
    assert close(model(x), before)
    for name, layer in layers.items():
        new = model.get_submodule(name)
        assert isinstance(new.weight, GBLRTensor)
        assert isinstance(new, (nn.Linear, nn.Conv1d, nn.Conv2d))
        assert new.weight.stored == cost[name]
        assert not new.weight.requires_grad
        assert close(new.weight.to_dense(), layer.weight.detach())


def test_kinds_of_layers():
    layers = prepare(conv_net(), settings=HALF)
    assert [type(layer) for layer in layers.values()] == [GBLRConv2d, GBLRConv2d, GBLRConv1d]
    assert {type(layer) for layer in prepare(mlp()).values()} == {GBLRLinear}


def test_hugging_face_conv1d_is_transposed():
    transformers = pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=16, vocab_size=40, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    x = torch.randint(0, 40, (2, 6))
    dense = model(x).logits
    layers = prepare(model, ["Conv1D"])
    assert {type(layer) for layer in layers.values()} == {GBLRLinear}
    assert layers["transformer.h.0.attn.c_attn"].matrix_shape == (48, 16)
    assert close(model(x).logits, dense)
    assert not any(isinstance(module, Conv1D) for module in model.modules())
    with torch.no_grad():
        for layer in layers.values():
            layer.widths.mul_(0.4)
    before = model(x).logits
    convert(model)
    assert close(model(x).logits, before)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_shared_modules_stay_shared():
    shared = nn.Linear(16, 16)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": nn.Linear(16, 16)})
    layers = prepare(model, settings=HALF)
    assert list(layers) == ["a", "c"]
    assert model["a"] is model["b"][0] is layers["a"]
    convert(model)
    assert model["a"] is model["b"][0]
    assert isinstance(model["a"].weight, GBLRTensor)


def test_tied_weights_are_refused_before_the_model_is_touched():
    model = nn.ModuleDict({"embedding": nn.Embedding(20, 16), "head": nn.Linear(16, 20, bias=False)})
    model["head"].weight = model["embedding"].weight
    with pytest.raises(ConfigError, match="layer 'head': its weight is tied to that of 'embedding'"):
        prepare(model)
    assert type(model["head"]) is nn.Linear


def test_tied_biases_and_shared_memory_are_refused_before_the_model_is_touched():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].bias = model[0].bias
    with pytest.raises(ConfigError, match="layer '0': its bias is tied to that of '1'; untie it or leave it out"):
        prepare(model, ["0", "2"])
    with pytest.raises(ConfigError, match="layer '1': its bias is tied to that of '0'"):
        prepare(model, ["1"])
    assert list(prepare(model, ["2"])) == ["2"]
    for view in (lambda weight: weight, lambda weight: weight.T):
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
        model[1].weight = nn.Parameter(view(model[0].weight.detach()))
        with pytest.raises(ConfigError, match="layer '1': it shares memory with a parameter of '0'; untie it or leave"):
            prepare(model, ["1"])
        assert type(model[1]) is nn.Linear
        assert list(prepare(model, ["2"])) == ["2"]


def test_slices_of_one_buffer_are_not_tied():
    buffer = torch.randn(2, 16, 16)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    for layer, part in zip(model, buffer, strict=True):
        layer.weight = nn.Parameter(part)
    assert list(prepare(model)) == ["0", "1"]


def test_too_small_layers_stay_dense_and_are_reported(caplog):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 1))
    with caplog.at_level(logging.WARNING):
        layers = prepare(model, ["Linear"], settings=HALF)
    assert list(layers) == ["0"]
    assert type(model[1]) is nn.Linear
    assert "'1' is too small to gain" in caplog.text
    shown = report(model, torch.randn(1, 16))
    assert "% 1: it is too small to gain from structure" in str(shown)
    assert shown.relative_flops <= 0.5  # of the layers that were compressed
    convert(model)
    assert "% 1: it is too small to gain from structure" in str(report(model, torch.randn(1, 16)))


def test_none_can_gain_is_an_error():
    with pytest.raises(ConfigError, match="layer '0': a 1 x 16 weight is too small to gain"):
        prepare(nn.Sequential(nn.Linear(16, 1)), ["0"])


def _with_nan():
    layer = nn.Linear(16, 16)
    with torch.no_grad():
        layer.weight[3, 4] = float("nan")
    return layer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_with_nan, "layer '1': its weight has NaN or infinite entries"),
        (lambda: nn.Conv2d(16, 16, 3, groups=4), "layer '1': convolution with groups=4"),
        (lambda: weight_norm(nn.Linear(16, 16)), "layer '1': its weight is parametrized"),
        (lambda: old_weight_norm(nn.Linear(16, 16)), "layer '1': its weight is parametrized"),
        (lambda: nn.Linear(16, 16, device="meta"), "layer '1': .*meta device"),
        (lambda: nn.ConvTranspose2d(16, 16, 3), "layer '1': a ConvTranspose2d cannot be structured"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_what_cannot_be_prepared_is_refused_and_the_model_untouched(make, message):
    model = nn.Sequential(nn.Linear(16, 16), make())
    kinds = [type(module) for module in model]
    with pytest.raises(ConfigError, match=message) as caught:
        prepare(model, ["0", "1"])
    assert "\n" not in str(caught.value)
    assert [type(module) for module in model] == kinds


def test_names_are_checked():
    model = mlp()
    with pytest.raises(ConfigError, match="no module named 'fc'"):
        prepare_layers(model, {"fc": LayerSettings()})
    with pytest.raises(ConfigError, match="put it into an"):
        prepare_layers(nn.Linear(16, 16), {"": LayerSettings()})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (LayerSettings("pca"), "layer '0': .*pca"),
        (LayerSettings(row_splits=5), "layer '0': .*row_splits"),
        (LayerSettings(align=0), "layer '0': .*align"),
        (LayerSettings(budget=1.5), "layer '0': .*budget"),
    ],
)
def test_settings_are_checked(setting, message):
    model = mlp()
    with pytest.raises(ConfigError, match=message):
        prepare(model, settings=setting)
    assert type(model[0]) is nn.Linear


def test_convert_before_the_masks_are_exact_is_refused():
    model = mlp()
    layers = prepare(model, settings=HALF)
    layers["2"].set_sigma(30.0)
    with pytest.raises(ConfigError, match=r"layer '2': its masks are still smooth \(sigma 30\)"):
        convert(model)
    assert isinstance(model[0], GBLRLinear)
    layers["2"].freeze_structure()
    convert(model)
    assert isinstance(model[2].weight, GBLRTensor)


def test_convert_leaves_other_models_alone_and_returns_a_layer_that_is_the_model():
    model = mlp()
    assert convert(model) is model
    assert type(model[0].weight.data) is torch.Tensor
    layer = prepare(nn.Sequential(nn.Linear(16, 16)), settings=HALF)["0"]
    assert isinstance(convert(layer).weight, GBLRTensor)


def test_a_layer_no_cheaper_than_dense_is_stored_dense_and_the_report_says_so():
    model = mlp()
    x = torch.randn(4, 24)
    prepare(model, ["0"])  # full widths: twice the cost of dense
    before = model(x)
    convert(model)
    assert type(model[0].weight.data) is torch.Tensor
    assert close(model(x), before)
    shown = report(model, x)
    assert "0: not cheaper than dense, stored dense" in str(shown)
    assert shown.relative_flops == 1.0


def test_modes_hooks_biases_and_flags_are_carried_over():
    calls = []
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16))
    model[0].register_forward_hook(lambda *args: calls.append("after"))
    model[0].register_forward_pre_hook(lambda *args: calls.append("before"))
    model[1].bias.requires_grad_(False)
    model[1].eval()
    prepare(model, settings=HALF)
    convert(model)
    model(torch.randn(1, 16))
    assert calls == ["before", "after"]
    assert model[0].bias is None
    assert not model[1].bias.requires_grad
    assert (model[0].training, model[1].training) == (True, False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_is_kept(dtype):
    model = mlp().to(dtype)
    prepare(model, settings=HALF)
    assert model[0].U.dtype == dtype
    convert(model)
    assert model[0].weight.dtype == model[0].bias.dtype == dtype


def test_frozen_like_a_dense_module_has_its_dtype():
    dense = nn.Linear(16, 16).to(torch.bfloat16)
    new = frozen_like(dense, decompose(dense.weight, 0.5))
    assert new.weight.dtype == torch.bfloat16
    assert new(torch.randn(2, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_bias_still_trains_after_convert():
    model = mlp()
    prepare(model, settings=HALF)
    model = copy.deepcopy(convert(model))
    x = torch.randn(3, 24, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None
    assert model[0].bias.grad is not None
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["0.bias", "2.bias"]
