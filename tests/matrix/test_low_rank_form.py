import copy

import pytest
import torch
from torch import nn

from gblr_plugin.decomposition import decompose, initialise
from gblr_plugin.layers import GBLRLinear
from gblr_plugin.learning.goals import LayerGoal
from gblr_plugin.learning.learner import StructureLearner
from gblr_plugin.learning.schedule import Schedule
from gblr_plugin.matrix.low_rank_form import to_low_rank_form, to_trapezoid_form
from gblr_plugin.surgery.conversion import convert, prepare_layers
from gblr_plugin.surgery.layer_settings import LayerSettings


def trapezoids(m=24, n=36, splits=1, tile=1, budget=0.4, method="trapezoid", dtype=torch.float64):
    weight = torch.randn(m, n, dtype=dtype, generator=torch.Generator().manual_seed(0))
    return initialise(weight, method, budget=budget, row_splits=splits, align=tile)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("tile", [1, 4])
@pytest.mark.parametrize("method", ["trapezoid", "gblr"])
def test_whole_factors_and_trapezoids_are_one_matrix_at_one_price(splits, tile, method):
    matrix = trapezoids(m=48, n=48, splits=splits, tile=tile, method=method, budget=0.5)
    args = matrix.split_sizes, (tile, tile)
    u, v, free = to_low_rank_form(matrix.u, matrix.v, matrix.rows, matrix.cols, *args)
    assert free.sum() >= 2 * splits
    layer = GBLRLinear(matrix, align=tile)
    layer.use_low_rank_form()
    torch.testing.assert_close(layer.to_dense(), matrix.to_dense(), rtol=1e-9, atol=1e-9)
    assert layer.stored == matrix.stored
    back = to_trapezoid_form(u, v, matrix.rows, matrix.cols, free, *args)
    rows, cols = back[2:]
    assert int((rows.width + cols.width).sum()) == matrix.stored
    assert bool((rows.start % tile == 0).all())
    assert bool((cols.start % tile == 0).all())
    torch.testing.assert_close(layer.structure().to_dense(), matrix.to_dense(), rtol=1e-8, atol=1e-8)


def test_whole_factors_are_balanced_and_orthogonal():
    matrix = trapezoids()
    u, v, free = to_low_rank_form(matrix.u, matrix.v, matrix.rows, matrix.cols, matrix.split_sizes, (1, 1))
    assert bool(free.all())
    torch.testing.assert_close(u @ u.T, v @ v.T, atol=1e-8, rtol=1e-8)
    off = u @ u.T - torch.diag((u @ u.T).diagonal())
    assert float(off.abs().max()) < 1e-8


@pytest.mark.parametrize("kind", ["svd", "random"])
def test_other_structures_are_left_alone(kind):
    weight = torch.randn(24, 36, dtype=torch.float64)
    layer = GBLRLinear(decompose(weight, 0.4, method=kind))
    before = layer.U.detach().clone()
    assert layer.use_low_rank_form() == 0
    assert not bool(layer.low_rank_components.any())
    assert torch.equal(layer.U, before)


def test_gradients_reach_what_the_trapezoids_leave_out():
    matrix = trapezoids()
    layer = GBLRLinear(matrix)
    layer.use_low_rank_form()
    x = torch.randn(7, 36, dtype=torch.float64)
    layer(x).square().sum().backward()
    dense = matrix.to_dense().requires_grad_()
    (x @ dense.T).square().sum().backward()
    torch.testing.assert_close(layer.U.grad, (dense.grad @ layer.V.detach().T).T, rtol=1e-8, atol=1e-8)
    outside = ~matrix.rows.support()
    assert float(layer.U.grad[outside].abs().min()) > 0
    assert float(layer.widths.grad.abs().max()) == 0


def test_no_stable_elimination_keeps_the_cost(caplog):
    # Block-diagonal of rank 4 on 8 x 8 blocks of zeros: every order of elimination meets a vanishing minor.
    matrix = trapezoids(m=8, n=8, budget=0.8)
    layer = GBLRLinear(matrix)
    count = layer.use_low_rank_form()
    with torch.no_grad():
        layer.U.zero_()
        layer.V.zero_()
        for k in range(count):
            layer.U[k, count - 1 - k] = layer.V[k, (count - 1 - k + 4) % 8] = 1.0
    kept = layer.structure()
    assert kept.stored <= layer.stored
    if kept.rows.num_components < count:
        assert "no stable trapezoids" in caplog.text


def test_state_dict_keeps_the_form():
    matrix = trapezoids()
    layer, other = GBLRLinear(matrix), GBLRLinear(matrix)
    layer.use_low_rank_form()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.low_rank_components, layer.low_rank_components)
    assert torch.equal(other.to_dense(), layer.to_dense())
    other.load_state_dict({}, strict=False)  # a state of other layers
    assert torch.equal(other.low_rank_components, layer.low_rank_components)
    other.load_state_dict(GBLRLinear(matrix).state_dict())
    assert not bool(other.low_rank_components.any())
    torch.testing.assert_close(other.to_dense(), matrix.to_dense())


def test_buffers_of_uninitialised_memory_are_written_anew():
    """As transformers leaves all buffers that are in no file, before it calls `eval()`."""
    layer = GBLRLinear(trapezoids(splits=2, m=48))
    layer.use_low_rank_form()
    before = layer.to_dense()
    state = copy.deepcopy(layer.state_dict())
    for buffer in layer.buffers():
        buffer.fill_(1)
    layer.eval()
    assert torch.equal(layer.to_dense(), before)
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())


def test_trapezoid_form_keeps_the_matrix():
    matrix = trapezoids(splits=2, m=48)
    layer = GBLRLinear(matrix)
    layer.use_low_rank_form()
    layer.use_trapezoid_form()
    assert not bool(layer.low_rank_components.any())
    assert layer.stored == matrix.stored
    torch.testing.assert_close(layer.to_dense(), matrix.to_dense(), rtol=1e-8, atol=1e-8)


def two_layers(budget):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 60), nn.ReLU(), nn.Linear(60, 48)).double()
    layers = prepare_layers(model, {name: LayerSettings("gblr", budget=budget) for name in ("0", "2")})
    return model, layers


def train(model, learner, steps=12):
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    learner.attach_all([optimizer])
    x = torch.randn(64, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - x).square().mean().backward()
        optimizer.step()
    learner.detach()
    return x


def test_within_the_budget_the_structure_stays_and_the_factors_train():
    model, layers = two_layers(0.4)
    assert all(bool(layer.low_rank_components.any()) for layer in layers.values())
    before = {name: (layer.widths.detach().clone(), layer.U.detach().clone()) for name, layer in layers.items()}
    learner = StructureLearner(
        layers, {name: LayerGoal(budget=0.4, group="all") for name in layers}, Schedule(0, 10, 100.0, 100.0)
    )
    x = train(model, learner)
    assert learner.frozen
    assert 0.39 < learner.relative_flops <= 0.4
    for name, layer in layers.items():
        assert torch.equal(layer.widths, before[name][0])
        assert not torch.equal(layer.U, before[name][1])
    expected = model(x).detach()
    converted = convert(copy.deepcopy(model))
    torch.testing.assert_close(converted(x), expected, rtol=1e-6, atol=1e-6)


def test_a_smaller_budget_shrinks_the_low_rank_part_too():
    model, layers = two_layers(0.6)
    learner = StructureLearner(
        layers, {name: LayerGoal(budget=0.2, group="all") for name in layers}, Schedule(0, 10, 100.0, 100.0)
    )
    train(model, learner)
    assert not any(bool(layer.low_rank_components.any()) for layer in layers.values())
    assert learner.frozen
    assert learner.relative_flops <= 0.2
