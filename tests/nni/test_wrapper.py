from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from gblr_plugin import GBLRLinear
from gblr_plugin.errors import GBLRError
from gblr_plugin.nni import GBLRPruner, GBLRWrapper


@pytest.fixture
def pruner(kit: Any, config: list[dict[str, Any]]) -> GBLRPruner:
    model = kit.MLP()
    return GBLRPruner(model, config, kit.evaluator(model), 2, 12)


def test_state_dict_has_the_same_keys_wrapped_and_unwrapped(pruner: GBLRPruner) -> None:
    model = pruner.bound_model
    wrapped = list(model.state_dict())
    assert not any("_nni_wrapper" in key for key in wrapped)
    assert isinstance(model.fc1._nni_wrapper, GBLRWrapper)
    pruner.unwrap_model()
    assert list(model.state_dict()) == wrapped


def test_unwrap_leaves_nothing_behind_and_may_be_repeated(pruner: GBLRPruner) -> None:
    model = pruner.bound_model
    pruner.unwrap_model()
    pruner._module_wrappers["fc1"].unwrap()
    assert "forward" not in vars(model.fc1)
    assert not hasattr(model.fc1, "_nni_wrapper")
    pruner.wrap_model()
    assert hasattr(model.fc1, "_nni_wrapper")


@pytest.mark.parametrize("after_backward", [False, True])
def test_deepcopy_and_pickle_of_a_wrapped_model(kit: Any, pruner: GBLRPruner, after_backward: bool) -> None:
    model = pruner.bound_model
    x, y = kit.make_batches(1)[0]
    if after_backward:
        kit.training_step((x, y), model).backward()
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
        assert twin.fc1 is not model.fc1
        assert twin.fc1._nni_wrapper.module is twin.fc1
        with torch.no_grad():
            twin.fc1.U.zero_()
        assert not torch.equal(twin(x), expected)
    assert torch.equal(model(x), expected)
    wrapper = pickle.loads(pickle.dumps(model.fc1._nni_wrapper))  # the other way round
    assert torch.equal(wrapper(x), model.fc1(x))


def test_forward_calls_the_layer_directly(kit: Any, pruner: GBLRPruner, monkeypatch: pytest.MonkeyPatch) -> None:
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))  # NNI's own forward calls it each time
    pruner.bound_model(kit.make_batches(1)[0][0])
    assert not emptied


def test_support_is_where_the_dense_weight_may_be_non_zero(kit: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.Flatten(), nn.Linear(12 * 36, 30))
    config = [{"op_names": ["0", "2"], "sparse_ratio": 0.5, "gblr": {"num_components": 6, "row_splits": 3}}]
    pruner = GBLRPruner(model, config)
    for layer in pruner.learner.layers.values():
        with torch.no_grad():
            layer.widths.uniform_(0, 0.5)
            layer.locations.uniform_(0, 1)
            layer.U.fill_(1.0)
            layer.V.fill_(1.0)
    masks = pruner.get_masks()
    assert masks["0"]["weight"].shape == (12, 3, 3, 3)
    assert masks["2"]["weight"].shape == (30, 12 * 36)
    for name, layer in pruner.learner.layers.items():
        assert torch.equal(masks[name]["weight"], (layer.weight != 0).float())
        assert 0 < masks[name]["weight"].mean() < 1
        space = pruner._target_spaces[name]["weight"]
        assert space.shape == list(layer.weight.shape)
        assert space.target is None


def test_the_mask_cannot_be_set(pruner: GBLRPruner) -> None:
    with pytest.raises(GBLRError, match="layer 'fc1': the mask of a structured layer"):
        pruner.update_masks(pruner.get_masks())


def test_no_dense_weight_and_no_mask_is_held(kit: Any) -> None:
    model = kit.MLP(width=96)
    config = [{"op_names": ["fc2"], "sparse_ratio": 0.75, "gblr": {"num_components": 10}}]
    pruner = GBLRPruner(model, config, kit.evaluator(model), 1, 5)
    pruner.compress(6, None)
    layer = model.fc2
    held = list(layer.named_parameters()) + list(layer.named_buffers())
    factors = (layer.U.numel() + layer.V.numel()) * 4
    size = sum(tensor.numel() * tensor.element_size() for _, tensor in held)
    dense = 96 * 96 * 4
    # Factors, bias, structure and the mask tables of two axes: nothing of the dense weight's size.
    tables = layer.row_tables.numel() * 2 * 4
    assert size <= factors + 96 * 4 + layer.widths.numel() * 2 * 4 + tables + len(layer.U) + 16
    assert size < dense / 2
    assert not any(tensor.numel() >= 96 * 96 for _, tensor in held)
    assert not any(isinstance(value, torch.Tensor) for value in vars(layer._nni_wrapper).values())


def test_nothing_of_a_dense_weights_size_is_alive_while_training(kit: Any) -> None:
    def alive() -> int:
        gc.collect()
        tensors = [one for one in gc.get_objects() if type(one) in (torch.Tensor, nn.Parameter)]
        return sum(one.numel() >= 96 * 96 for one in tensors)  # weights, masks, gradients, the optimizer's moments

    before = alive()
    model = kit.MLP(width=96)
    assert alive() == before + 1
    seen = []

    def loop(*args: Any, **kwargs: Any) -> None:
        def step(batch: Any, net: nn.Module) -> torch.Tensor:
            loss: torch.Tensor = kit.training_step(batch, net)
            seen.append(alive())
            return loss

        kit.train(*args[:2], step, *args[3:], **kwargs)

    config = [{"op_names": ["fc2"], "sparse_ratio": 0.75, "gblr": {"num_components": 10}}]
    GBLRPruner(model, config, kit.evaluator(model, loop=loop), 1, 5).compress(6, None)
    assert seen == [before] * 6


def test_transformer_encoder_layer_runs_its_fast_path(kit: Any) -> None:
    block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.Sequential(block)
    x = torch.randn(2, 5, 16)
    expected = model.eval()(x)
    pruner = GBLRPruner(model, [{"op_names": ["0.linear1", "0.linear2"], "sparse_ratio": 0.5}])
    assert isinstance(block.linear1, GBLRLinear)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    pruner.unwrap_model()


def test_hooks_from_before_go_on_firing_until_they_are_removed(kit: Any, config: list[dict[str, Any]]) -> None:
    model = kit.MLP()
    seen: list[type[nn.Module]] = []
    handles = [
        model.fc1.register_full_backward_hook(lambda module, *_: seen.append(type(module))),
        model.fc1.register_forward_hook(lambda module, *_: seen.append(type(module))),
    ]
    evaluator = kit.evaluator(model)
    pruner = GBLRPruner(model, config, evaluator, 2, 12)
    kit.training_step(kit.make_batches(1)[0], model).backward()
    assert seen == [GBLRLinear, GBLRLinear]
    pruner.unwrap_model()
    for handle in handles:
        handle.remove()
    kit.training_step(kit.make_batches(1)[0], model).backward()
    assert len(seen) == 2
