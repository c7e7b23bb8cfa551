"""Starts from families that GBLR contains."""

import pytest
import torch
from torch import nn

from gblr_plugin import families
from gblr_plugin.errors import ConfigError
from gblr_plugin.surgery.conversion import prepare_layers
from gblr_plugin.surgery.layer_settings import EMBEDDED, LayerSettings, initial_matrix


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(24, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", EMBEDDED)
@pytest.mark.parametrize("budget", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("row_splits", [1, 2])
def test_a_start_from_a_family_is_its_member_at_the_budget(
    weight: torch.Tensor, name: str, budget: float, row_splits: int
) -> None:
    matrix = initial_matrix(weight, LayerSettings(name, row_splits=row_splits, budget=budget))
    member = families.get(name).from_dense(weight, budget, row_splits=row_splits)
    torch.testing.assert_close(matrix.to_dense(), member.to_dense())
    assert member.relative_flops <= budget
    assert matrix.relative_flops <= 2 * member.relative_flops  # h w + min(h, w) a block


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_layer_computes_what_it_starts_from(weight: torch.Tensor, name: str) -> None:
    model = nn.Sequential(nn.Linear(16, 24, dtype=torch.float64))
    model[0].weight.data = weight
    prepare_layers(model, {"0": LayerSettings(name, budget=0.5)})
    member = families.get(name).from_dense(weight, 0.5)
    torch.testing.assert_close(model[0].weight, member.to_dense())


def test_a_layer_too_small_for_the_family_is_decomposed(weight: torch.Tensor) -> None:
    matrix = initial_matrix(weight, LayerSettings("block_diagonal", budget=0.05))
    assert matrix.num_components > 0
    assert matrix.relative_flops <= 0.05
    expected = initial_matrix(weight, LayerSettings("gblr", budget=0.05))
    torch.testing.assert_close(matrix.to_dense(), expected.to_dense())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (LayerSettings("block_sparse"), "needs a budget"),
        (LayerSettings("block_sparse", budget=0.5, align=4), "align"),
        (LayerSettings("block_sparse", budget=0.5, num_components=3), "num_components"),
    ],
)
def test_what_a_family_cannot_start_with_is_said_in_one_line(settings: LayerSettings, words: str) -> None:
    model = nn.Sequential(nn.Linear(16, 24))
    with pytest.raises(ConfigError, match=rf"^layer '0': [^\n]*{words}[^\n]*$"):
        prepare_layers(model, {"0": settings})
    assert type(model[0]) is nn.Linear


def test_exactly_the_contained_families_are_offered(weight: torch.Tensor) -> None:
    contained = {
        name
        for name in families.names()
        if name != "tucker2"
        and (member := families.get(name).from_dense(weight, 0.6)).row_order is None
        and member.to_structured() is not None
    }
    # Low rank is "svd" at a budget, alds low rank by parts of the columns with its own allocation, gblr itself.
    assert contained - {"low_rank", "alds", "gblr"} == set(EMBEDDED)
