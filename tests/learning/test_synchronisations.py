"""How often the program asks for a value of a tensor: on a GPU each time waits for all work that was given to it."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode

from gblr_plugin import GBLRLinear, LayerGoal, LayerSettings, Schedule, StructureLearner, param_groups, prepare
from gblr_plugin.matrix.structure import Intervals, StructuredMatrix

WAITING = {
    torch.ops.aten._local_scalar_dense.default,  # bool, int, float, item and tolist
    torch.ops.aten.equal.default,
    torch.ops.aten.nonzero.default,
}


class Synchronisations(TorchDispatchMode):
    """Counts the operations inside that wait for a device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in WAITING
        return func(*args, **(kwargs or {}))


def counted(call):
    with Synchronisations() as seen:
        result = call()
    return seen.count, result


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Layers multiply without lists of blocks, which are for the CPU alone."""
    monkeypatch.setattr(GBLRLinear, "_may_use_blocks", lambda self: False)


def network(depth):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(48, 48) for _ in range(depth)))
    return model, prepare(model, settings=LayerSettings("svd"))


def test_intervals_ask_once_and_those_made_from_others_never():
    width, start = torch.tensor([3, 0, 5]), torch.tensor([0, 1, 4])
    asked, intervals = counted(lambda: Intervals(width, start, 5))
    assert asked == 1
    for call in (
        lambda: Intervals.of_known(width, start, 5),
        lambda: Intervals.full(3, 5),
        lambda: intervals.select(torch.tensor([2, 0])),
    ):
        asked, made = counted(call)
        assert asked == 0
        Intervals(made.width, made.start, made.length)  # in range all the same


def test_matrices_are_made_and_moved_without_asking():
    u, v = torch.randn(3, 6), torch.randn(3, 5)
    asked, matrix = counted(lambda: StructuredMatrix.from_factors(u, v))
    assert asked == 0
    assert counted(lambda: matrix.to(torch.float64))[0] == 0


@pytest.mark.parametrize("sigma", [2.0, None])
def test_a_training_pass_never_asks(sigma, as_on_a_gpu):
    model, layers = network(3)
    for layer in layers.values():
        layer.set_sigma(sigma)
    x = torch.randn(5, 48)
    asked, _ = counted(lambda: F.mse_loss(model(x), x).backward())
    assert asked == 0
    assert counted(next(iter(layers.values())).intervals)[0] == 0


def test_a_pass_by_blocks_asks_for_its_lists_alone(monkeypatch):
    monkeypatch.setattr("gblr_plugin.layers.product._LEAST_FOR_BLOCKS", 0)
    _, layers = network(1)
    (layer,) = layers.values()
    layer.set_sigma(2.0)
    asked, _ = counted(layer._masked_axes)
    assert asked <= 4 + 2 * len(layer._axes[0].blocks)  # how many components each block has, and which
    asked, _ = counted(layer._masked_axes)
    assert asked == 4  # whether widths and starts of rows and columns are those of the lists


@pytest.mark.parametrize("goal", [{"threshold": 0.5}, {"budget": 0.4, "group": "all"}])
def test_what_a_step_asks_for_does_not_grow_with_the_layers(goal, as_on_a_gpu):
    most = {}
    for depth in (2, 6):
        model, layers = network(depth)
        optimizer = AdamW(param_groups(model, lr=1e-2))
        learner = StructureLearner(layers, {name: LayerGoal(**goal) for name in layers}, Schedule(0, 30))
        learner.attach_all([optimizer])
        x, asked = torch.randn(5, 48), []
        for _ in range(8):
            optimizer.zero_grad()
            F.mse_loss(model(x), x).backward()
            asked.append(counted(partial(learner.after_step, optimizer))[0])
        most[depth] = max(asked[1:])  # the first one sets the search up
    # Are widths, then locations, finite; and on the CPU, after each round of the search, whether it can end.
    assert max(most.values()) <= 2 + (7 if "budget" in goal else 0)
