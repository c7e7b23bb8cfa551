from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gblr_plugin import families
from gblr_plugin.errors import ConfigError
from gblr_plugin.families.layers import trainable
from gblr_plugin.families.tucker2 import Tucker2


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_recovers_a_tucker_kernel_from_its_multilinear_rank() -> None:
    core, a, b = gaussian(3, 2, 9), gaussian(16, 3, seed=1), gaussian(2, 12, seed=2)
    weight = torch.einsum("op,pqt,qc->oct", a, core, b).flatten(1)
    cost = 12 * 2 + 2 * 3 * 9 + 3 * 16
    matrix = Tucker2.from_dense(weight, cost / weight.numel(), kernel_size=(3, 3))
    assert matrix.stored == matrix.multiply_adds == cost
    torch.testing.assert_close(matrix.to_dense(), weight)


def test_sweeps_never_raise_the_error() -> None:
    weight = gaussian(16, 12 * 9)
    errors = [
        float(torch.linalg.norm(weight - Tucker2.from_dense(weight, 0.4, kernel_size=(3, 3), iterations=n).to_dense()))
        for n in (1, 2, 5, 20)
    ]
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in pairwise(errors))


CONVS: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": 3, "padding": 2, "padding_mode": "circular"},
    {"kernel_size": (1, 3), "stride": 2, "padding": (1, 1)},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 5, "padding": "valid", "bias": False},
]


@pytest.mark.parametrize("settings", CONVS)
@pytest.mark.parametrize("family", ["tucker2", "low_rank"])
def test_convolutions_equal_the_dense_kernel(settings: dict[str, Any], family: str) -> None:
    torch.manual_seed(0)
    dense = nn.Conv2d(8, 12, **settings).double()
    layer: Any = trainable(families.get(family), dense, 0.7)
    x = gaussian(2, 8, 9, 10)
    with torch.no_grad():
        dense.weight.copy_(layer.weight)
    torch.testing.assert_close(layer(x), dense(x))
    layer(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_conv1d() -> None:
    torch.manual_seed(0)
    dense = nn.Conv1d(8, 12, 5, padding=2, stride=2).double()
    for family in ("tucker2", "block_low_rank"):
        layer: Any = trainable(families.get(family), dense, 0.5)
        assert isinstance(layer, nn.Conv1d)
        x = gaussian(2, 8, 20)
        torch.testing.assert_close(layer(x), nn.functional.conv1d(x, layer.weight, dense.bias, 2, 2))


def test_a_stride_is_paid_for_in_the_first_step() -> None:
    layer: Any = trainable(families.get("tucker2"), nn.Conv2d(16, 32, 3, stride=2, padding=1), 0.5)
    matrix = layer.matrix()
    p, q, taps = matrix.core.shape
    assert matrix.stored == 16 * q + p * q * taps + 32 * p
    assert layer.multiply_adds == 4 * 16 * q + p * q * taps + 32 * p
    assert layer.relative_flops == layer.multiply_adds / (32 * 16 * 9) <= 0.5


def test_linear_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match="tucker2: only for Conv1d and Conv2d, got a Linear"):
        trainable(families.get("tucker2"), nn.Linear(8, 8), 0.5)
    with pytest.raises(ConfigError, match="kernel_size"):
        Tucker2.from_dense(gaussian(8, 18), 0.5)
