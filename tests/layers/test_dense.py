import copy
import functools
import gc
import warnings

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_

import gblr_plugin as gblr
from gblr_plugin import GBLRConfig, LayerSettings, convert, load, prepare, save
from gblr_plugin.errors import ConfigError
from gblr_plugin.layers import GBLRConv1d, GBLRConv2d, GBLRLinear
from gblr_plugin.layers.checkpoint import match_checkpoint
from gblr_plugin.layers.dense import (
    can_gain,
    check_structurable,
    replace_modules,
    structurable,
    structured_like,
    weight_matrix,
)
from gblr_plugin.matrix.structure import StructuredMatrix
from gblr_plugin.surgery.reorder import reorder


def exact(module):
    """The module's own weight as a full-rank structured matrix."""
    matrix = weight_matrix(module).double()
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return StructuredMatrix.from_factors((u * s).T.contiguous(), v.contiguous())


@pytest.mark.parametrize(
    ("module", "shape", "kind"),
    [
        (nn.Linear(5, 7), (2, 5), GBLRLinear),
        (nn.Conv1d(3, 8, 3, padding=1), (2, 3, 10), GBLRConv1d),
        (nn.Conv2d(3, 8, (3, 2), stride=2, bias=False), (2, 3, 9, 8), GBLRConv2d),
    ],
)
def test_stands_in_for_the_dense_module(module, shape, kind):
    module.double()
    layer = structured_like(module, exact(module))
    assert type(layer) is kind
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(layer(x), module(x))
    torch.testing.assert_close(layer.weight, module.weight)


def test_takes_over_mode_flags_and_dtype():
    module = nn.Linear(5, 7, dtype=torch.bfloat16).eval()
    module.weight.requires_grad_(False)
    module.bias.requires_grad_(False)
    layer = structured_like(module, exact(module))
    assert not layer.training
    assert not any(p.requires_grad for p in layer.parameters())
    assert layer.U.dtype == torch.bfloat16
    assert layer.bias is not module.bias


def test_replaces_shared_modules_everywhere_by_one():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": nn.Sequential(shared, nn.ReLU(), shared), "b": shared})
    layer = structured_like(shared, exact(shared))
    replace_modules(model, {id(shared): layer})
    assert model["a"][0] is model["a"][2] is model["b"] is layer


def test_gain_counts_one_component_per_split():
    assert not can_gain(nn.Linear(1, 9))
    assert not can_gain(nn.Linear(2, 2))
    assert can_gain(nn.Linear(3, 2))
    assert not can_gain(nn.Linear(3, 6), row_splits=6)
    assert can_gain(nn.Conv2d(3, 8, 3))


def test_kinds():
    assert structurable(nn.Linear(2, 2))
    assert not structurable(nn.Bilinear(2, 2, 2))
    assert not structurable(nn.ConvTranspose2d(2, 2, 2))
    assert not structurable(nn.MultiheadAttention(4, 2).out_proj)
    assert not structurable(nn.LazyLinear(3))


def old_weight_norm():
    return torch.nn.utils.weight_norm(nn.Linear(4, 4))


def old_spectral_norm():
    return torch.nn.utils.spectral_norm(nn.Linear(4, 4))


def new_weight_norm():
    return torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [old_weight_norm, old_spectral_norm, new_weight_norm])
def test_parametrized_weights_are_refused(make):
    with pytest.raises(ConfigError, match=r"'net.fc'.*parametrized"):
        check_structurable(make(), "net.fc")


def with_weight(value):
    module = nn.Linear(2, 2)
    module.weight = nn.Parameter(value, requires_grad=False)
    return module


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Bilinear(2, 2, 2), "a Bilinear cannot be structured; allowed are Linear"),
        (nn.Conv2d(4, 4, 3, groups=2), "groups=2: only groups=1"),
        (with_weight(torch.tensor([[1.0, float("nan")]])), "NaN or infinite"),
        (with_weight(torch.tensor([[1.0, float("inf")]])), "NaN or infinite"),
        (with_weight(torch.ones(2, 2, dtype=torch.int8)), "dtype torch.int8"),
    ],
)
def test_bad_layers_are_refused_by_name(module, message):
    with pytest.raises(ConfigError, match=f"layer 'net.fc': .*{message}"):
        check_structurable(module, "net.fc")


def test_weight_matrix_shares_memory():
    module = nn.Conv2d(3, 4, 2)
    assert weight_matrix(module).shape == (4, 12)
    assert weight_matrix(module).data_ptr() == module.weight.data_ptr()


def test_swapped_model_deep_copies():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    replace_modules(model, {id(model[0]): structured_like(model[0], exact(model[0]))})
    x = torch.randn(3, 4)
    assert torch.equal(copy.deepcopy(model)(x), model(x))


# -- hooks that the caller registered on the dense layer -------------------------------------------------------------


HOOKS = {
    "forward_pre": nn.Module.register_forward_pre_hook,
    "forward_pre, with keywords": functools.partial(nn.Module.register_forward_pre_hook, with_kwargs=True),
    "forward": nn.Module.register_forward_hook,
    "forward, with keywords": functools.partial(nn.Module.register_forward_hook, with_kwargs=True),
    "forward, always called": functools.partial(nn.Module.register_forward_hook, always_call=True),
    "full backward": nn.Module.register_full_backward_hook,
    "backward": nn.Module.register_backward_hook,
    "backward pre": nn.Module.register_full_backward_pre_hook,
    "state dict": nn.Module.register_state_dict_post_hook,
    "state dict pre": nn.Module.register_state_dict_pre_hook,
    "load state dict pre": nn.Module.register_load_state_dict_pre_hook,
    "load state dict post": nn.Module.register_load_state_dict_post_hook,
}

SETTINGS = LayerSettings("gblr", budget=0.5)


def prepared(model, _folder):
    prepare(model, ["0"], settings=SETTINGS)
    return model


def converted(model, _folder):
    prepare(model, ["0"], settings=SETTINGS)["0"].freeze_structure()
    return convert(model)


def of_a_family(model, _folder):
    gblr.prepare(model, ["0"], family="block_diagonal", budget=0.5)
    return model


def of_a_family_converted(model, _folder):
    gblr.prepare(model, ["0"], family="low_rank", budget=0.5)
    return gblr.convert(model)


def quantized_in_two_steps(model, _folder):
    quantize_(model, GBLRConfig(step="prepare", budget=0.5, initialiser="gblr"))
    for layer in (module for module in model if isinstance(module, GBLRLinear)):
        layer.freeze_structure()
    quantize_(model, GBLRConfig(step="convert"))
    return model


def quantized_at_once(model, _folder):
    quantize_(model, GBLRConfig(step="convert", budget=0.5))
    return model


def reordered(model, _folder):
    reorder(model, [("0", "2")])
    return model


def loaded(model, folder):
    save(converted(copy.deepcopy(model), folder), folder / "model.safetensors")
    return load(folder / "model.safetensors", model).train()


def loaded_family(model, folder):
    other = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24))
    gblr.prepare(other, ["0"], family="monarch", budget=0.5)
    save(gblr.convert(other), folder / "model.safetensors")
    return load(folder / "model.safetensors", model).train()


def matched(model, _folder):
    other = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24))
    match_checkpoint(model, prepared(other, None).state_dict(), lambda _name, _module: 1)
    return model


WAYS = [
    prepared,
    converted,
    of_a_family,
    of_a_family_converted,
    quantized_in_two_steps,
    quantized_at_once,
    reordered,
    loaded,
    loaded_family,
    matched,
]


def run_everything(model):
    """A forward and a backward pass, and the state out and in again."""
    x = torch.randn(3, 24, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about backward hooks that are not full
        model(x).sum().backward()
    model.load_state_dict(model.state_dict())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_go_on_firing_until_they_are_removed(kind, way, tmp_path):
    model = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24))
    seen = []

    def hook(*args):
        seen.append(next((type(arg) for arg in args if isinstance(arg, nn.Module)), None))

    handle = HOOKS[kind](model[0], hook)
    model = way(model, tmp_path)
    gc.collect()  # the dense layer is gone
    seen.clear()
    run_everything(model)
    assert seen == [type(model[0])]
    handle.remove()
    run_everything(model)
    assert len(seen) == 1
    later = HOOKS[kind](model[0], hook)
    run_everything(model)
    assert len(seen) == 2
    later.remove()


def test_hooks_of_a_model_that_is_a_layer_itself():
    seen = []
    matrix = structured_like(nn.Linear(24, 24), exact(nn.Linear(24, 24)))
    handle = matrix.register_full_backward_hook(lambda module, *_: seen.append(type(module)))
    matrix.freeze_structure()
    frozen = convert(matrix)
    assert frozen is not matrix
    frozen(torch.randn(2, 24, requires_grad=True)).sum().backward()
    assert seen == [type(frozen)]
    handle.remove()
    frozen(torch.randn(2, 24, requires_grad=True)).sum().backward()
    assert len(seen) == 1


def test_a_refused_model_keeps_its_hooks():
    model = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24))
    seen = []
    model[0].register_load_state_dict_pre_hook(lambda module, *_: seen.append(module))
    model[2].weight.data[0, 0] = float("nan")
    with pytest.raises(ConfigError, match="NaN"):
        prepare(model, settings=SETTINGS)
    model.load_state_dict(model.state_dict())
    assert seen == [model[0]]
