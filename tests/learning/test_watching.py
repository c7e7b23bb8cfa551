import pytest
import torch
from torch import nn

from gblr_plugin.calibration.inputs import input_rows
from gblr_plugin.layers.dense import structured_like
from gblr_plugin.learning.watching import LayerWatch
from gblr_plugin.surgery.layer_settings import LayerSettings, initial_matrix


def layer_of(dense):
    weight = dense.weight.detach().flatten(1)
    return structured_like(dense, initial_matrix(weight, LayerSettings("dense")))


@pytest.mark.parametrize("shape", [(7, 6), (3, 5, 6), (6,)])
def test_moments_are_those_of_inputs_and_gradients(shape):
    torch.manual_seed(0)
    layer = layer_of(nn.Linear(6, 4))
    watch = LayerWatch(layer)
    x, g = torch.randn(shape), torch.randn(*shape[:-1], 4)
    layer(x).backward(g)
    rows, slopes = x.reshape(-1, 6).double(), g.reshape(-1, 4).double()
    assert watch.moments.count == len(rows)
    torch.testing.assert_close(watch.moments.second(centred=False)[1], rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(watch.slope, slopes.T @ slopes)


def test_of_convolutions_they_are_of_patches():
    torch.manual_seed(0)
    dense = nn.Conv2d(3, 8, 3, padding=1)
    layer = layer_of(dense)
    watch = LayerWatch(layer)
    x = torch.randn(2, 3, 5, 5)
    layer(x).square().sum().backward()
    rows = input_rows(dense, x).reshape(-1, 27).double()
    torch.testing.assert_close(watch.moments.second(centred=False)[1], rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)


def test_large_batches_are_sampled():
    layer = layer_of(nn.Linear(6, 4))
    watch = LayerWatch(layer)
    layer(torch.randn(64, 128, 6)).sum().backward()
    assert 256 <= watch.moments.count <= 1024


def test_evaluation_overflowed_gradients_and_a_removed_watch_add_nothing():
    layer = layer_of(nn.Linear(6, 4))
    watch = LayerWatch(layer)
    with torch.no_grad():
        layer(torch.randn(3, 6))
    layer.eval()(torch.randn(3, 6)).sum().backward()
    layer.train()
    (layer(torch.randn(3, 6)).sum() * float("inf")).backward()
    assert watch.moments.count == 0
    watch.remove()
    layer(torch.randn(3, 6)).sum().backward()
    assert watch.moments.count == 0
