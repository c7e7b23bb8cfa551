"""What layers see, as rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gblr_plugin.calibration.inputs import input_rows


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(3, 5, 4, stride=2, padding=1, dilation=2),
        nn.Conv1d(3, 5, 3, padding="same"),
        nn.Conv2d(3, 5, (2, 3), padding=1, padding_mode="reflect"),
        nn.Conv2d(3, 5, 3, stride=2),
        nn.Linear(9, 5),
    ],
)
def test_input_rows_are_what_the_weight_matrix_multiplies(layer: nn.Module) -> None:
    x = torch.randn(2, *{nn.Conv1d: (3, 11), nn.Conv2d: (3, 8, 9), nn.Linear: (4, 9)}[type(layer)])
    out = input_rows(layer, x) @ layer.weight.flatten(1).T + layer.bias
    want = layer(x)
    if not isinstance(layer, nn.Linear):
        want = want.flatten(2).transpose(1, 2)
    torch.testing.assert_close(out, want)
