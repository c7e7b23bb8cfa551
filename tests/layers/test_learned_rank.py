import pytest
import torch
from torch import nn

import gblr_plugin as gblr
from gblr_plugin import ConfigError, LayerSettings
from gblr_plugin.layers.learned_rank import LearnedRankLinear


def test_learned_rank_starts_dense_and_ends_on_its_budget() -> None:
    torch.manual_seed(0)
    dense = nn.Linear(24, 16)
    with torch.no_grad():  # a matrix of rank 3 and a little noise: the rank to be found
        dense.weight.copy_(torch.randn(16, 3) @ torch.randn(3, 24) + 0.01 * torch.randn(16, 24))
    model = nn.Sequential(dense)
    wanted = dense.weight.detach().clone()
    layer = gblr.prepare(model, settings=LayerSettings("learned_rank"))["0"]
    assert isinstance(layer, LearnedRankLinear)
    torch.testing.assert_close(layer.weight, wanted)
    learner = gblr.StructureLearner({"0": layer}, {"0": gblr.LayerGoal(budget=0.4)}, gblr.Schedule(5, 40))
    optimizer = torch.optim.AdamW(gblr.param_groups(model, lr=1e-2))
    learner.attach_all([optimizer])
    generator = torch.Generator().manual_seed(1)
    for _ in range(60):
        x = torch.randn(64, 24, generator=generator)
        loss = (model(x) - x @ wanted.T - layer.bias.detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    learner.detach()
    structure = layer.structure()
    assert learner.frozen
    assert structure.relative_flops <= 0.4
    assert set(structure.rows.width.tolist()) == {16}  # full axes only: a rank
    assert set(structure.cols.width.tolist()) == {24}
    assert 3 <= structure.num_components <= 0.4 * 16 * 24 / 40
    error = torch.linalg.norm(structure.to_dense() - wanted) / torch.linalg.norm(wanted)
    assert error < 0.1
    x = torch.randn(5, 24)
    before = model(x).detach()
    torch.testing.assert_close(gblr.convert(model)(x), before)


def test_gates_are_open_on_full_axes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5))
    layer = gblr.prepare(model, settings=LayerSettings("learned_rank"))["0"]
    with torch.no_grad():
        layer.widths.copy_(torch.tensor([[0.9, 0.75, 0.5, 0.1, 1.0], [0.9, 0.2, 0.8, 0.1, 0.6]]))
    rows, cols = layer.masks()
    torch.testing.assert_close(rows, torch.tensor([0.8, 0.5, 0.0, 0.0, 1.0])[:, None].expand(5, 5))
    torch.testing.assert_close(cols, torch.tensor([0.8, 0.0, 0.6, 0.0, 0.2])[:, None].expand(5, 6))
    upstream = torch.randn(5, 6)
    (gradient,) = torch.autograd.grad(cols, layer.widths, upstream)
    torch.testing.assert_close(gradient[1], 2 * upstream.sum(1))  # through closed gates too
    wanted = layer.to_dense().detach()
    assert layer.stored == 2 * (5 + 6)  # gates 0 and 4: both of their sides are open
    torch.testing.assert_close(layer.structure().to_dense(), wanted)
    layer.freeze_structure()
    torch.testing.assert_close(layer.to_dense().detach(), wanted)
    assert layer.stored == 2 * (5 + 6)


@pytest.mark.parametrize("setting", [{"num_components": 4}, {"row_splits": 2}, {"align": 2}])
def test_a_learned_rank_takes_no_other_settings(setting: dict[str, int]) -> None:
    model = nn.Sequential(nn.Linear(24, 16))
    with pytest.raises(ConfigError, match=f"layer '0': learned_rank .* leave {next(iter(setting))} out"):
        gblr.prepare(model, settings=LayerSettings("learned_rank", **setting))
    assert type(model[0]) is nn.Linear
