from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch import nn

from gblr_plugin import ConfigError
from gblr_plugin.nni.keys import nni_schema
from gblr_plugin.nni.settings import read_config


@pytest.fixture
def model(kit: Any) -> nn.Module:
    return kit.MLP()


def one(model: nn.Module, **keys: Any) -> Any:
    return read_config(model, [{"op_names": ["fc2"], **keys}])


def test_goal_keys_mean_what_the_table_says(model: nn.Module) -> None:
    plan = one(
        model, sparse_ratio=0.75, global_group_id="a", max_sparse_ratio=0.9, min_sparse_ratio=0.5, granularity=[4, 8]
    ).layers["fc2"]
    assert plan.goal.budget == 0.25
    assert plan.goal.threshold is None
    assert plan.goal.group == "a"
    assert plan.goal.min_flops == pytest.approx(0.1)
    assert plan.goal.max_flops == 0.5
    assert plan.settings.align == (4, 8)
    fixed = one(model, sparse_threshold=2).layers["fc2"]
    assert (fixed.goal.budget, fixed.goal.threshold) == (None, 2.0)
    assert fixed.goal.max_flops == math.inf
    assert isinstance(fixed.entry["sparse_threshold"], float)  # NNI asserts it


def test_own_keys_nested_prefixed_and_under_the_target(model: nn.Module) -> None:
    own = {"num_components": 5, "initialiser": "random", "row_splits": 2, "seed": 3, "structure_lr": 0.1}
    nested = one(model, sparse_ratio=0.5, gblr={**own, "sigma_start": 2, "sigma_end": 50})
    prefixed = one(
        model,
        sparse_ratio=0.5,
        **{f"gblr_{key}": value for key, value in own.items()},
        gblr_sigma_start=2,
        gblr_sigma_end=50.0,
    )
    under = one(
        model, target_settings={"weight": {"sparse_ratio": 0.5, "gblr": {**own, "sigma_start": 2, "sigma_end": 50}}}
    )
    assert nested == prefixed == under
    settings = nested.layers["fc2"].settings
    assert (settings.num_components, settings.initialiser, settings.row_splits, settings.seed) == (5, "random", 2, 3)
    assert (nested.structure_lr, nested.sigma_start, nested.sigma_end) == (0.1, 2.0, 50.0)
    nni_schema().validate(nested.layers["fc2"].entry)


def test_the_target_overrides_the_shortcut(model: nn.Module) -> None:
    plan = one(model, sparse_ratio=0.5, target_settings={"weight": {"sparse_ratio": 0.25}})
    assert plan.layers["fc2"].goal.budget == 0.75


def test_initialisers_that_need_a_budget_start_at_the_goal_unless_told(model: nn.Module) -> None:
    assert one(model, sparse_ratio=0.75).layers["fc2"].settings.budget is None
    assert one(model, sparse_ratio=0.75, gblr={"initialiser": "trapezoid"}).layers["fc2"].settings.budget == 0.25
    told = one(model, sparse_ratio=0.75, gblr={"initialiser": "trapezoid", "start_budget": 0.5})
    assert told.layers["fc2"].settings.budget == 0.5


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"sparse_ratoi": 0.5}, "unknown key 'sparse_ratoi'; did you mean 'sparse_ratio'"),
        (
            {"sparse_ratio": 0.5, "gblr": {"num_component": 3}},
            "unknown key 'num_component' in gblr; did you mean 'num_components'",
        ),
        ({"sparse_ratio": 0.5, "gblr_initializer": "svd"}, "did you mean 'gblr_initialiser'"),
        ({"sparse_ratio": 0.5, "initialiser": "svd"}, "unknown key 'initialiser'; did you mean 'gblr_initialiser'"),
        ({"sparse_ratio": 0.5, "gblr": {"initialiser": "svb"}}, "initialiser must be one of "),
        ({"sparse_ratio": 0.5, "gblr": 3}, "gblr must be a table"),
        ({"sparse_ratio": 0.5, "gblr": {"seed": 1}, "gblr_seed": 2}, "seed is given twice"),
        ({"sparse_ratio": 1}, r"sparse_ratio must be a number in \[0, 1\), got 1"),
        ({"sparse_ratio": 1.5}, "sparse_ratio must be"),
        ({"sparse_ratio": -0.1}, "sparse_ratio must be"),
        ({"sparse_ratio": math.nan}, "sparse_ratio must be"),
        ({"sparse_ratio": "0.5"}, "sparse_ratio must be a number in .* got '0.5'"),
        ({"sparse_ratio": True}, "sparse_ratio must be"),
        ({"sparse_threshold": -1.0}, "sparse_threshold must be"),
        ({"sparse_ratio": 0.5, "sparse_threshold": 1.0}, "not both"),
        ({}, "one is missing"),
        ({"sparse_ratio": 0.5, "min_sparse_ratio": 0.7, "max_sparse_ratio": 0.6}, "is above"),
        ({"sparse_ratio": 0.5, "min_sparse_ratio": 0.7}, "outside"),
        ({"sparse_threshold": 0.5, "min_sparse_ratio": 0.7}, "need sparse_ratio"),
        ({"sparse_ratio": 0.5, "granularity": [4]}, "granularity must be"),
        ({"sparse_ratio": 0.5, "granularity": [0, 4]}, "granularity must be"),
        ({"sparse_ratio": 0.5, "global_group_id": 1.5}, "global_group_id must be"),
        ({"sparse_threshold": 0.5, "gblr": {"initialiser": "trapezoid"}}, "needs start_budget"),
        ({"sparse_ratio": 0.5, "exclude": True}, "all entries exclude"),
        (
            {"sparse_ratio": 0.5, "op_names": ["fc22"]},
            "op_names: pattern 'fc22' matches no module of the model; did you mean 'fc2'",
        ),
        ({"sparse_ratio": 0.5, "op_names": "fc2"}, "op_names must be a list of strings"),
        ({"sparse_ratio": 0.5, "exclude_op_names": ["fc9"]}, "exclude_op_names: pattern 'fc9' matches no module"),
        ({"sparse_ratio": 0.5, "exclude_op_names": ["fc2"]}, "the selection is empty"),
        ({"sparse_ratio": 0.5, "op_names_re": ["("]}, "is no regular expression"),
    ],
)
def test_what_cannot_be_used_is_one_line_that_says_where(model: nn.Module, keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        one(model, **keys)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("config_list")


@pytest.mark.parametrize("config_list", [[], {"op_names": ["fc1"]}, "fc1", [3], None])
def test_a_config_list_is_a_list_of_tables(model: nn.Module, config_list: Any) -> None:
    with pytest.raises(ConfigError, match="config_list"):
        read_config(model, config_list)


def test_entries_must_agree_on_what_they_share(model: nn.Module) -> None:
    entries = [
        {"op_names": ["fc1"], "sparse_ratio": 0.5, "gblr": {"structure_lr": 0.1}},
        {"op_names": ["fc2"], "sparse_ratio": 0.5, "gblr": {"structure_lr": 0.2}},
    ]
    with pytest.raises(ConfigError, match=r"config_list\[1\]: structure_lr is 0.2 here and 0.1"):
        read_config(model, entries)
    entries[1]["gblr"] = {}
    assert read_config(model, entries).structure_lr == 0.1
    for entry, compact in zip(entries, (True, False), strict=True):
        entry["gblr"] = {"compact": compact}
    with pytest.raises(ConfigError, match="compact is false here and true in another entry"):
        read_config(model, entries)
    entries[1]["gblr"] = {"compact": "yes"}
    with pytest.raises(ConfigError, match="compact must be true or false, got 'yes'"):
        read_config(model, entries)
    entries[1]["gblr"] = {}
    assert read_config(model, entries).compact
    for entry, ratio in zip(entries, (0.5, 0.6), strict=True):
        entry.update(global_group_id=1, sparse_ratio=ratio)
    with pytest.raises(ConfigError, match="share global_group_id 1"):
        read_config(model, entries)


def test_layers_come_in_the_models_order_each_once(model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    model.again = model.fc2  # one module, two names
    with caplog.at_level(logging.WARNING):
        plan = read_config(
            model,
            [{"op_names": ["fc3"], "sparse_ratio": 0.5}, {"op_names": ["again", "fc3", "fc1"], "sparse_ratio": 0.25}],
        )
    assert list(plan.layers) == ["fc1", "fc2", "fc3"]
    assert plan.layers["fc3"].goal.budget == 0.5  # the earlier entry holds
    assert "'fc3' is chosen by an earlier entry" in caplog.text


def test_selection_follows_nni(model: nn.Module) -> None:
    both = read_config(model, [{"op_types": ["Linear"], "exclude_op_names": ["fc3"], "sparse_ratio": 0.5}])
    assert list(both.layers) == ["fc1", "fc2"]
    cut = read_config(model, [{"op_types": ["Linear"], "op_names_re": ["fc[23]"], "sparse_ratio": 0.5}])
    assert list(cut.layers) == ["fc2", "fc3"]
    deep = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU()))
    assert list(read_config(deep, [{"op_names_re": ["0.*"], "sparse_ratio": 0.5}]).layers) == ["0.0"]


def test_legacy_lists_are_translated(model: nn.Module) -> None:
    plan = read_config(
        model,
        [
            {"op_types": ["Linear"], "total_sparsity": 0.5, "max_sparsity_per_layer": 0.8},
            {"op_names": ["fc3"], "exclude": True},
        ],
    )
    assert list(plan.layers) == ["fc1", "fc2"]
    goals = [layer.goal for layer in plan.layers.values()]
    assert {(goal.budget, goal.group) for goal in goals} == {(0.5, 0)}
    assert goals[0].min_flops == pytest.approx(0.2)
    apart = read_config(model, [{"op_names": ["fc1"], "sparsity": 0.25}])
    assert apart.layers["fc1"].goal.budget == 0.75


def test_reading_leaves_the_model_alone(model: nn.Module) -> None:
    before = {name: id(module) for name, module in model.named_modules()}
    values = {name: value.clone() for name, value in model.state_dict().items()}
    one(model, sparse_ratio=0.5)
    assert before == {name: id(module) for name, module in model.named_modules()}
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
