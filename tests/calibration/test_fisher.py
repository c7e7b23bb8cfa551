"""Targets drawn from predictions: their gradients are those of the Fisher matrix."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gblr_plugin.calibration.fisher import SampledTargets


def test_gradients_have_the_fisher_matrix_as_second_moment() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([1.0, -0.5, 0.3]).repeat(20000, 1).requires_grad_()
    with SampledTargets():
        loss = F.cross_entropy(logits, torch.zeros(20000, dtype=torch.int64), reduction="sum", label_smoothing=0.5)
    (g,) = torch.autograd.grad(loss, logits)
    p = logits[0].detach().softmax(-1)
    torch.testing.assert_close(g.T @ g / 20000, torch.diag(p) - torch.outer(p, p), atol=0.01, rtol=0)


def test_positions_that_are_ignored_stay_so_in_any_layout() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 5, 7, requires_grad=True)
    target = torch.randint(5, (4, 7))
    target[:, 3:] = -100
    with SampledTargets():
        loss = nn.CrossEntropyLoss()(logits, target)
    (g,) = torch.autograd.grad(loss, logits)
    assert float(g[:, :, 3:].abs().max()) == 0
    assert float(g[:, :, :3].abs().min()) > 0
    assert not torch.allclose(loss, F.cross_entropy(logits, target))


@pytest.mark.parametrize(
    ("loss", "scores", "target", "fisher"),
    [
        (F.binary_cross_entropy_with_logits, 0.7, 1.0, torch.tensor(0.7).sigmoid() * torch.tensor(-0.7).sigmoid()),
        (F.mse_loss, 0.7, 9.0, 4.0),
    ],
)
def test_other_likelihoods(loss: object, scores: float, target: float, fisher: float) -> None:
    torch.manual_seed(0)
    x = torch.full((20000,), scores, requires_grad=True)
    with SampledTargets():
        (g,) = torch.autograd.grad(loss(x, torch.full_like(x, target), reduction="sum"), x)  # type: ignore[operator]
    assert float(g.square().mean()) == pytest.approx(float(fisher), rel=0.05)
    assert abs(float(g.mean())) < 0.05


def test_other_functions_and_the_outside_are_left_alone() -> None:
    x, y = torch.randn(6, 3), torch.randint(3, (6,))
    with SampledTargets():
        assert torch.equal(F.l1_loss(x, 0 * x), x.abs().mean())
    assert torch.equal(F.cross_entropy(x, y), -x.log_softmax(-1)[torch.arange(6), y].mean())
