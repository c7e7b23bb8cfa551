"""Every key that NNI's documents know: it has a meaning for gblr, is left out with one line, or is refused with one."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from nni.compression.base.config import default_config_schema
from nni.compression.utils import auto_set_denpendency_group_ids
from torch import Tensor, nn
from torch.nn import functional as F

from gblr_plugin import ConfigError
from gblr_plugin.nni import GBLRPruner
from gblr_plugin.nni.keys import nni_schema
from gblr_plugin.nni.settings import read_config

GUIDE = Path(__file__).parents[2] / "docs" / "nni.md"


@pytest.fixture
def model(kit: Any) -> nn.Module:
    return kit.MLP()


def chosen(model: nn.Module, **keys: Any) -> list[str]:
    return list(read_config(model, [{"sparse_ratio": 0.5, **keys}]).layers)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name.startswith("gblr_plugin")]


# -- the table of the guide --------------------------------------------------------------------------------------------


def test_the_guide_has_a_row_for_every_key_of_nni() -> None:
    rows = [line.split("|")[1] for line in GUIDE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    told = {key for row in rows for key in re.findall(r"`(\w+)", row)}
    known = {"op_partial_names", "fuse_names"}
    for key in default_config_schema("pruning").schema:
        named = getattr(key, "schema", key)
        known.update([named] if isinstance(named, str) else named.args)
    assert known <= told


# -- selection ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "layers"),
    [
        ({"op_types": ["Linear"]}, ["fc1", "fc2", "fc3"]),
        ({"op_names": ["fc3", "fc1"]}, ["fc1", "fc3"]),
        ({"op_names_re": [r"fc[12]"]}, ["fc1", "fc2"]),
        ({"op_types": ["Linear"], "op_names": ["fc2"]}, ["fc2"]),
        ({"op_types": ["Linear"], "exclude_op_names": ["fc2"]}, ["fc1", "fc3"]),
        ({"op_types": ["Linear"], "exclude_op_names_re": [r".*[13]$"]}, ["fc2"]),
    ],
)
def test_selection(model: nn.Module, keys: dict[str, Any], layers: list[str]) -> None:
    assert chosen(model, **keys) == layers


def test_excluded_types_and_old_lists(model: nn.Module) -> None:
    model.conv = nn.Conv1d(8, 8, 3)
    assert chosen(model, op_names_re=[".*"], exclude_op_types=["Linear", "MLP"]) == ["conv"]
    old = [{"op_types": ["Linear"], "op_partial_names": ["c2"], "sparsity": 0.5}]
    assert list(read_config(model, old).layers) == ["fc2"]


@pytest.mark.parametrize("key", ["op_types", "exclude_op_types", "op_names_re", "exclude_op_names_re"])
def test_what_matches_nothing_is_logged_once(model: nn.Module, key: str, caplog: pytest.LogCaptureFixture) -> None:
    entry: dict[str, Any] = {"op_types": ["Linear"], "op_names": ["fc2"], "sparse_ratio": 0.5}
    entry[key] = [*entry.get(key, ()), "Linaer"]
    with caplog.at_level(logging.WARNING):
        assert list(read_config(model, [entry]).layers) == ["fc2"]
    assert lines(caplog) == [f"config_list[0]: no module of the model matches {key} 'Linaer'"]


# -- left out ----------------------------------------------------------------------------------------------------------

LEFT_OUT: dict[str, tuple[dict[str, Any], str]] = {
    "dependency_group_id": ({"dependency_group_id": "a"}, "dependency_group_id"),
    "internal_metric_block": ({"internal_metric_block": 4}, "internal_metric_block"),
    "apply_method": ({"apply_method": "mul"}, "apply_method"),
    "under the target": ({"target_settings": {"weight": {"apply_method": "add"}}}, "apply_method"),
    "bias": ({"target_names": ["weight", "bias"]}, "the target 'bias'"),
    "settings of the bias": (
        {"target_settings": {"bias": {"align": {"target_name": "weight", "dims": [0]}, "apply_method": "mul"}}},
        "the target 'bias'",
    ),
    "out_channel": ({"granularity": "out_channel"}, "granularity of whole channels"),
    "in_channel": ({"granularity": "in_channel"}, "granularity of whole channels"),
    "the same as lists": ({"granularity": [1, -1, -1, -1]}, "granularity of whole channels"),
}


@pytest.mark.parametrize(("keys", "name"), LEFT_OUT.values(), ids=LEFT_OUT.keys())
def test_what_is_left_out_is_one_line_for_all_layers(
    model: nn.Module, keys: dict[str, Any], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    plain = [{"op_names": ["fc1", "fc2"], "sparse_ratio": 0.5}, {"op_names": ["fc3"], "sparse_ratio": 0.25}]
    with caplog.at_level(logging.WARNING):
        plan = read_config(model, [{**entry, **keys} for entry in plain])
    (line,) = lines(caplog)
    assert line.startswith(f"config_list: gblr leaves out {name} (")
    assert "\n" not in line
    assert plan == read_config(model, plain)


def test_nnis_standard_config_means_what_its_shorthand_means(
    model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    nothing = dict.fromkeys(
        ["max_sparse_ratio", "min_sparse_ratio", "sparse_threshold", "global_group_id", "dependency_group_id"]
    )
    weight = {**nothing, "sparse_ratio": 0.5, "granularity": "default", "internal_metric_block": None, "align": None}
    entry = {
        "op_names": ["fc1", "fc2", "fc3"],
        "target_names": ["weight", "bias"],
        "target_settings": {"weight": {**weight, "apply_method": "mul"}, "bias": {"apply_method": "mul"}},
    }
    with caplog.at_level(logging.WARNING):
        plan = read_config(model, [entry])
    assert len(lines(caplog)) == 1
    assert plan == read_config(model, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"op_partial_names": ["fc"]}, r"op_partial_names has no meaning for gblr: write op_names_re"),
        ({"fuse_names": [("fc1", "fc2")]}, "fuse_names has no meaning for gblr: it belongs to quantizers"),
        ({"align": {"module_name": "fc1", "target_name": "weight", "dims": [0]}}, "align has no meaning for gblr"),
        ({"granularity": "per_channel"}, "granularity must be"),
        ({"granularity": [2, 2, 1, 1]}, "granularity must be"),
        ({"target_names": ["_output_"]}, "target_names: gblr compresses 'weight' only"),
        ({"target_names": ["weight", "_input_"]}, "target_names: gblr compresses 'weight' only"),
        ({"target_names": ["bias"]}, "target_names: gblr compresses 'weight' only"),
        ({"target_names": "weight"}, "target_names: gblr compresses 'weight' only"),
        ({"target_settings": {"_output_": {"sparse_ratio": 0.5}}}, "target_settings: gblr compresses 'weight' only"),
        ({"target_settings": {"weight": None}}, "target_settings: gblr compresses 'weight' only"),
        ({"target_settings": {"bias": {"sparse_ratio": 0.5}}}, "bias: gblr leaves biases as they are; take sparse_r"),
        ({"max_sparse_ratio": 0.4}, "outside min_sparse_ratio .. max_sparse_ratio"),
        ({"sparse_ratio": None, "sparse_threshold": 1.0, "max_sparse_ratio": 0.9}, "they need sparse_ratio"),
    ],
)
def test_refused(model: nn.Module, keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        chosen(model, op_names=["fc1", "fc2"], **keys)
    assert str(caught.value).startswith("config_list[0]: ")
    assert "\n" not in str(caught.value)


def test_whole_channels_and_default_keep_the_tile_of_a_structured_layer(kit: Any) -> None:
    model = kit.MLP()
    tiled = {"op_names": ["fc2"], "sparse_ratio": 0.5, "granularity": [4, 8]}
    first = GBLRPruner(model, [tiled], kit.evaluator(model), 1, 5)
    first.compress(6, None)
    first.unwrap_model()
    for granularity in ("default", "out_channel"):
        later = read_config(model, [{"op_names": ["fc2"], "sparse_ratio": 0.75, "granularity": granularity}])
        assert later.layers["fc2"].module is model.fc2


# -- lists that NNI makes ----------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two convolutions whose outputs are added, behind a grouped one: all that NNI looks for."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.left = nn.Conv2d(8, 16, 3)
        self.right = nn.Conv2d(8, 16, 3)
        self.grouped = nn.Conv2d(16, 16, 3, groups=4)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x.reshape(-1, 1, 4, 4).repeat(1, 1, 2, 2)))
        return self.head(self.grouped(F.relu(self.left(x) + self.right(x))).mean((2, 3)))


def test_lists_with_dependency_groups_can_be_used(kit: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = Residual()
    plain = [
        {"op_types": ["Conv2d"], "exclude_op_names": ["grouped"], "sparse_ratio": 0.5, "granularity": "out_channel"},
        {"op_names": ["head"], "sparse_ratio": 0.25, "gblr": {"seed": 1}},
    ]
    listed = auto_set_denpendency_group_ids(model, plain, torch.rand(2, 16))
    left = next(entry for entry in listed if entry["op_names"] == ["left"])
    assert left["dependency_group_id"]
    with caplog.at_level(logging.WARNING):
        pruner = GBLRPruner(model, listed, kit.evaluator(model), 1, 6)
    (line,) = lines(caplog)
    assert "dependency_group_id" in line
    assert "granularity of whole channels" in line
    assert list(pruner.learner.layers) == ["stem", "left", "right", "head"]
    pruner.compress(7, None)
    assert pruner.learner.frozen
    assert model.left.relative_flops <= 0.5


def test_nnis_schema_knows_the_own_keys_and_no_others() -> None:
    schema = nni_schema()
    schema.validate({"op_names": ["a"], "sparse_ratio": 0.5, "gblr_seed": 1})
    for wrong in ({"gblr_seeds": 1}, {"gblr_seed": "one"}):
        with pytest.raises(Exception, match="gblr_seed"):
            schema.validate({"op_names": ["a"], "sparse_ratio": 0.5, **wrong})
