"""A snapshot says of layers of every kind what their matrices are."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import gblr_plugin as gblr
from gblr_plugin.layers import GBLRLinear
from gblr_plugin.matrix.structure import Intervals, StructuredMatrix
from gblr_plugin.monitoring.snapshot import take_snapshot


def make_matrix() -> StructuredMatrix:
    generator = torch.Generator().manual_seed(0)
    rows = Intervals(torch.tensor([3, 0, 4]), torch.tensor([2, 1, 0]), 4)
    cols = Intervals(torch.tensor([2, 5, 6]), torch.tensor([5, 0, 0]), 6)
    u, v = torch.randn(3, 4, generator=generator), torch.randn(3, 6, generator=generator)
    return StructuredMatrix.from_factors(u, v, rows, cols, (2, 1))


def test_every_kind_of_layer_tells_the_same_structure() -> None:
    matrix = make_matrix()
    trainable = GBLRLinear(matrix)
    frozen = gblr.GBLRTensor.from_structured(matrix)
    module = nn.Linear(6, 8)
    module.weight = nn.Parameter(frozen, requires_grad=False)
    step, layers = take_snapshot({"m": matrix, "t": trainable, "f": frozen, "l": module})
    assert step.stored.tolist() == [matrix.stored] * 4
    assert step.live.tolist() == [2] * 4
    assert all(shape.dense == 48 for shape in step.layers)
    live = [sorted(energy for energy in layer.energy if energy > 0) for layer in layers]
    for energies in live[1:]:
        assert energies == pytest.approx(live[0], rel=1e-4)
    assert all(math.isinf(value) for value in [step.sigma])


def test_energies_of_trainable_layers_end_with_their_intervals() -> None:
    layer = GBLRLinear(make_matrix())
    with torch.no_grad():
        for parameter in (layer.U, layer.V):
            parameter.copy_(torch.randn_like(parameter))
        layer.widths.copy_(torch.tensor([[0.75, 0.25, 0.5, 1.0], [0.5, 1.0, 0.2, 0.4]]))
        layer.locations.copy_(torch.tensor([[0.5, 0.0, 0.75, 0.25], [0.8, 0.0, 0.0, 0.9]]))
    matrix = layer.structure()
    _, (logged,) = take_snapshot({"a": layer})
    expected = torch.einsum("km,kn->kmn", matrix.u, matrix.v).square().sum((1, 2))
    torch.testing.assert_close(torch.from_numpy(logged.energy).float(), expected, rtol=1e-4, atol=0.0)


def test_sigma_is_read_from_trainable_layers() -> None:
    layer = GBLRLinear(make_matrix())
    layer.set_sigma(7.0)
    assert take_snapshot({"a": layer})[0].sigma == 7.0


def test_dead_components_keep_their_number() -> None:
    _, (layer,) = take_snapshot({"a": GBLRLinear(make_matrix())})
    assert layer.row_width.tolist()[:3] == [3, 0, 4]
