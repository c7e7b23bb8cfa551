import torch
from torch import nn

from gblr_plugin import report
from gblr_plugin.surgery.planning import PLANNED, planned


def test_layers_at_their_budgets_and_reasons_for_the_others():
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 1))
    counted = report(model, torch.zeros(3, 32))
    result = planned(counted, {"0": 0.5}, "it was not asked for")
    first, second, last = result.layers
    assert (first.structure, first.left_dense, first.parameters) == (PLANNED, "", 1024)
    assert first.multiply_adds == 3 * 1024
    assert (second.structure, second.left_dense) == ("dense", "it was not asked for")
    assert last.left_dense == "it is too small to gain from structure"
    assert counted.parameters - result.parameters == 1024
    assert result.relative_flops == 0.5
