import copy

import pytest
import torch
from torch import nn

from gblr_plugin.errors import ConfigError
from gblr_plugin.layers import GBLRConv1d, GBLRConv2d, GBLRLinear
from gblr_plugin.structure import StructuredMatrix
from gblr_plugin.swap import (
    can_gain,
    check_structurable,
    replace_modules,
    structurable,
    structured_like,
    weight_matrix,
)


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


def test_takes_over_mode_flags_dtype_and_hooks():
    module = nn.Linear(5, 7, dtype=torch.bfloat16).eval()
    module.weight.requires_grad_(False)
    module.bias.requires_grad_(False)
    seen = []
    module.register_forward_hook(lambda mod, args, output: seen.append(type(mod)))
    layer = structured_like(module, exact(module))
    assert not layer.training
    assert not any(p.requires_grad for p in layer.parameters())
    assert layer.U.dtype == torch.bfloat16
    layer(torch.zeros(1, 5, dtype=torch.bfloat16))
    assert seen == [GBLRLinear]
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
