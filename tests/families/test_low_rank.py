from __future__ import annotations

import pytest
import torch
from torch import nn

import gblr_plugin as gblr
from gblr_plugin import families
from gblr_plugin.families.learned_rank import LearnedRankLinear
from gblr_plugin.families.low_rank import LowRank


def test_svd_is_the_best_low_rank_matrix() -> None:
    weight = torch.randn(20, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = LowRank.from_dense(weight, 0.5)
    rank = 300 // 50
    assert matrix.left.shape == (20, rank)
    assert matrix.stored == rank * 50
    tail = torch.linalg.svdvals(weight)[rank:]
    assert torch.linalg.norm(weight - matrix.to_dense()) == pytest.approx(float(tail.norm()))


def test_calibrated_svd_is_the_best_for_the_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 16, dtype=torch.float64, generator=generator)
    inputs = torch.randn(200, 16, dtype=torch.float64, generator=generator)
    inputs = inputs * torch.logspace(0, -1, 16, dtype=torch.float64)
    matrix = LowRank.from_dense(weight, 0.5, calibration=inputs)
    tail = torch.linalg.svdvals(inputs @ weight.T)[matrix.left.shape[1] :]
    # Up to the damping of the moment, 1e-3 of its mean diagonal.
    assert torch.linalg.norm(inputs @ (weight - matrix.to_dense()).T) == pytest.approx(float(tail.norm()), rel=1e-2)


def test_learned_rank_starts_dense_and_ends_on_its_budget() -> None:
    torch.manual_seed(0)
    dense = nn.Linear(24, 16)
    with torch.no_grad():  # a matrix of rank 3 and a little noise: the rank to be found
        dense.weight.copy_(torch.randn(16, 3) @ torch.randn(3, 24) + 0.01 * torch.randn(16, 24))
    model = nn.Sequential(dense)
    wanted = dense.weight.detach().clone()
    layer = families.replace(model, None, "low_rank", 0.4, learned_rank=True)["0"]
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
    assert set(structure.rows.width.tolist()) == {16}  # whole components only: a rank
    assert set(structure.cols.width.tolist()) == {24}
    assert 3 <= structure.num_components <= 0.4 * 16 * 24 / 40
    error = torch.linalg.norm(structure.to_dense() - wanted) / torch.linalg.norm(wanted)
    assert error < 0.1
    x = torch.randn(5, 24)
    before = model(x).detach()
    torch.testing.assert_close(gblr.convert(model)(x), before)


def test_learned_rank_gates_whole_components() -> None:
    torch.manual_seed(0)
    layer = families.get("low_rank").trainable(nn.Linear(6, 5), 0.5, learned_rank=True)
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
