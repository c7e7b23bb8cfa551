import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from gblr_plugin.learning.pace import FactorPace
from gblr_plugin.surgery.conversion import prepare
from gblr_plugin.surgery.layer_settings import LayerSettings


@pytest.mark.parametrize(("kind", "further"), [(AdamW, True), (SGD, False)])
def test_factors_move_further_under_optimizers_that_normalise(kind, further):
    torch.manual_seed(0)
    layer = prepare(nn.Sequential(nn.Linear(12, 16)), settings=LayerSettings("svd"))["0"]
    optimizer = kind(layer.parameters(), lr=1e-2)
    pace = FactorPace([layer], 4.0)
    layer(torch.randn(5, 12)).square().sum().backward()
    before = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    pace.before_step(optimizer, active=True)
    optimizer.step()
    plain = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    pace.after_step()
    for name, parameter in layer.named_parameters():
        times = 4.0 if further and name in "UV" else 1.0
        torch.testing.assert_close(parameter - before[name], times * (plain[name] - before[name]))


def test_it_rises_after_factors_were_replaced():
    layer = prepare(nn.Sequential(nn.Linear(12, 16)), settings=LayerSettings("svd"))["0"]
    optimizer = AdamW([layer.U], lr=1e-2)
    pace, moves = FactorPace([layer], 3.0), []
    pace.restart()
    for _ in range(12):
        layer.U.grad = torch.ones_like(layer.U)
        before = layer.U.detach().clone()
        pace.before_step(optimizer, active=True)
        optimizer.step()
        pace.after_step()
        moves.append(float((layer.U.detach() - before).abs().mean()))
    assert moves[0] < moves[5] < moves[9] == pytest.approx(moves[11], rel=0.05)
    assert moves[11] / moves[0] == pytest.approx(3.0 / 1.2, rel=0.1)
