from __future__ import annotations

from typing import Any

import nni
import pytest
import torch
from nni.compression.utils import TorchEvaluator
from torch import nn

from gblr_plugin import ConfigError, families
from gblr_plugin.nni import compressor_names, create_compressor


def test_every_family_is_a_compressor() -> None:
    assert set(families.names()) | {"gblr_fixed"} <= set(compressor_names())


@pytest.mark.parametrize("name", ["low_rank", "monarch", "gblr_fixed"])
def test_projected_then_fine_tuned_with_the_group_of_the_weight(kit: Any, name: str) -> None:
    model = kit.MLP()
    groups = [
        {"params": [model.fc2.weight], "lr": 0.0},
        {"params": [model.fc2.bias, *model.fc1.parameters(), *model.fc3.parameters()]},
    ]
    made = nni.trace(torch.optim.SGD)(groups, lr=0.1)
    evaluator = TorchEvaluator(kit.train, made, kit.training_step)
    compressor = create_compressor(name, model, [{"op_names": ["fc1", "fc2"], "sparse_ratio": 0.5}], evaluator)
    assert type(model.fc1) is not nn.Linear
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    compressed, masks = compressor.compress(3, None)
    compressor.unwrap_model()
    assert compressed is model
    assert masks == {}
    changed = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    trained = {
        key for key, value in model.named_parameters() if value.requires_grad
    }  # not a fixed structure's intervals
    factors = {key for key in trained if key.startswith("fc1.") and not key.endswith("bias")}
    assert factors
    assert factors <= changed
    assert not any(key.startswith("fc2.") and not key.endswith("bias") for key in changed)  # its group's rate is 0


@pytest.mark.parametrize("name", ["low_rank", "gblr_fixed"])
def test_factors_move_at_their_pace(kit: Any, name: str) -> None:
    moved = {}
    for pace in (1, 4):
        torch.manual_seed(0)
        model = kit.MLP()
        evaluator = TorchEvaluator(
            kit.train, nni.trace(torch.optim.Adam)(model.parameters(), lr=1e-4), kit.training_step
        )
        entry = {"op_names": ["fc1"], "sparse_ratio": 0.5, "gblr": {"pace": pace}}
        compressor = create_compressor(name, model, [entry], evaluator)
        before = {key: value.detach().clone() for key, value in model.named_parameters()}
        compressor.compress(1, None)
        moved[pace] = {key: value.detach() - before[key] for key, value in model.named_parameters()}
    factors = {f"fc1.{name}" for name in model.fc1.factors()}
    for key, step in moved[1].items():
        torch.testing.assert_close(moved[4][key], step * (4 if key in factors else 1), rtol=1e-2, atol=1e-6)


def test_a_family_has_no_lambda_and_needs_an_optimizer_that_holds_the_layer(kit: Any) -> None:
    model = kit.MLP()
    with pytest.raises(ConfigError, match="layer 'fc1': low_rank has no lambda"):
        create_compressor("low_rank", model, [{"op_names": ["fc1"], "sparse_threshold": 0.5}])
    made = nni.trace(torch.optim.SGD)(model.fc3.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="layer 'fc1': its weight is in no optimizer"):
        create_compressor(
            "low_rank",
            model,
            [{"op_names": ["fc1"], "sparse_ratio": 0.5}],
            TorchEvaluator(kit.train, made, kit.training_step),
        )
    assert type(model.fc1) is nn.Linear


def test_granularity_of_an_entry_aligns_the_one_shot_decomposition(kit: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = kit.MLP()
    config: list[dict[str, Any]] = [
        {"op_names": ["fc1"], "sparse_ratio": 0.5},
        {"op_names": ["fc2"], "sparse_ratio": 0.5, "granularity": [4, 8]},
    ]
    create_compressor("gblr_fixed", model, config)
    assert (model.fc1.align, model.fc2.align) == ((1, 1), (4, 8))
    rows, cols = model.fc2.intervals()
    assert not any(((part.width % tile) | (part.start % tile)).any() for part, tile in ((rows, 4), (cols, 8)))
    assert not caplog.records
    create_compressor("low_rank", kit.MLP(), config)
    assert [record.getMessage() for record in caplog.records] == ["low_rank has no intervals: granularity is left out"]


def test_a_family_that_falls_short_of_a_bound_says_so(kit: Any, caplog: pytest.LogCaptureFixture) -> None:
    bounds = {"min_sparse_ratio": 0.45, "max_sparse_ratio": 0.55, "global_group_id": 1}
    config: list[dict[str, Any]] = [
        {"op_names": ["fc1", "fc2"], "sparse_ratio": 0.5, **bounds, "gblr": {"allocation": "weight"}}
    ]
    create_compressor("gblr_fixed", kit.MLP(), config)
    assert not caplog.records
    model = kit.MLP()
    create_compressor("block_diagonal", model, config)
    short = [name for name in ("fc1", "fc2") if model.get_submodule(name).relative_flops < 0.44]
    assert short
    kept = model.get_submodule(short[0]).relative_flops
    assert caplog.records[0].getMessage() == (
        f"layer {short[0]!r} keeps {kept:.3f} of its multiply-adds, less than the 0.450 that max_sparse_ratio leaves "
        "it: block_diagonal has no matrix between that and its budget"
    )
    assert len(caplog.records) == len(short)


@pytest.mark.parametrize("name", ["low_rank", "alds", "gblr_fixed"])
def test_packed_rows_of_the_config_are_split_for_every_family(kit: Any, name: str) -> None:
    model = kit.MLP()
    weight = model.fc2.weight.detach().clone()
    config: list[dict[str, Any]] = [
        {"op_names": ["fc1"], "sparse_ratio": 0.5},
        {"op_names": ["fc2"], "sparse_ratio": 0.5, "gblr": {"row_splits": 2}},
    ]
    create_compressor(name, model, config)
    family = families.get("gblr" if name == "gblr_fixed" else name)
    budget = family.budgets({"fc2": weight}, 0.5, row_splits={"fc2": 2})["fc2"]
    trains = {"trains": True} if name == "gblr_fixed" else {}
    split, whole = (family.from_dense(weight, budget, row_splits=splits, **trains).to_dense() for splits in (2, 1))
    torch.testing.assert_close(model.fc2.weight, split)
    assert not torch.allclose(split, whole)


def test_nni_drives_a_learned_rank_to_its_budget(kit: Any) -> None:
    model = kit.MLP()
    config = [{"op_names": ["fc1", "fc2"], "sparse_ratio": 0.5, "gblr": {"initialiser": "learned_rank"}}]
    pruner = create_compressor("gblr", model, config, kit.evaluator(model), warmup_step=5, cooldown_begin_step=40)
    assert model.fc1.structure_name == "low_rank"
    pruner.compress(60, None)
    pruner.unwrap_model()
    for layer in (model.fc1, model.fc2):
        structure = layer.structure()
        assert structure.relative_flops <= 0.5
        assert set(structure.rows.width.tolist()) == {layer.out_features}
        assert set(structure.cols.width.tolist()) == {layer.in_features}
