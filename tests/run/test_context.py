"""What a run adds to the compression config of its methods."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from gblr_plugin.learning.pace import PACE
from gblr_plugin.run.context import config_list_of
from gblr_plugin.run.settings import Method, RunSettings

TASK = SimpleNamespace(layers=["network.0"])


def config(method: Method, **settings: Any) -> list[dict[str, Any]]:
    return config_list_of(method, RunSettings("digits_vit", methods=[method], **settings), TASK)


@pytest.mark.parametrize(("start", "gblr"), [("trained", {"initialiser": "gblr"}), ("initial", {})])
def test_a_budget_alone_begins_at_the_decomposition_of_a_trained_network(start: str, gblr: dict[str, Any]) -> None:
    assert config(Method("gblr", start=start), budget=0.25) == [
        {"op_names": ["network.0"], "sparse_ratio": 0.75, "gblr": gblr}
    ]


def test_an_allocation_pools_the_layers() -> None:
    (entry,) = config(Method("gblr"), budget=0.25, allocation="uniform")
    assert (entry["global_group_id"], entry["gblr"]) == ("all", {"initialiser": "gblr", "allocation": "uniform"})


@pytest.mark.parametrize(
    ("name", "start", "model", "given", "pace"),
    [
        ("low_rank", "trained", {}, {}, PACE),
        ("low_rank", "initial", {}, {}, None),
        ("low_rank", "initial", {"pretrained": "weights"}, {}, PACE),
        ("low_rank", "trained", {}, {"gblr": {"pace": 2}}, 2),
        ("l1", "trained", {}, {}, None),
    ],
)
def test_factors_of_families_move_as_far_as_those_of_gblr(
    name: str, start: str, model: dict[str, Any], given: dict[str, Any], pace: float | None
) -> None:
    entries = [{"op_names": ["network.0"], "sparse_ratio": 0.5, **given}]
    (entry,) = config(Method(name, start=start), config_list=entries, model=model)
    assert entry.get("gblr", {}).get("pace") == pace
    assert entries == [{"op_names": ["network.0"], "sparse_ratio": 0.5, **given}]
