import math
import time

import pytest
import torch
from torch import nn

from gblr_plugin import ConfigError
from gblr_plugin.run.measure import evaluate, interleaved_latency


def test_accuracy_and_loss_by_hand():
    logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    target = torch.tensor([0, 1, 1])
    figures = evaluate(nn.Identity(), [(logits[:2], target[:2]), (logits[2:], target[2:])], "accuracy")
    right, wrong = math.log1p(math.exp(-2)), 2 + math.log1p(math.exp(-2))
    assert figures["accuracy"] == pytest.approx(200 / 3)
    assert figures["loss"] == pytest.approx((2 * right + wrong) / 3, rel=1e-6)


def test_perplexity_of_a_uniform_guess_is_the_number_of_classes():
    batch = torch.zeros(2, 5, 256), torch.randint(0, 256, (2, 5))
    assert evaluate(nn.Identity(), [batch], "perplexity")["perplexity"] == pytest.approx(256, rel=1e-5)


def test_unequal_batches_weigh_by_their_examples():
    x, target = torch.randn(10, 3), torch.randint(0, 3, (10,))
    whole = evaluate(nn.Identity(), [(x, target)], "accuracy")
    parts = evaluate(nn.Identity(), [(x[:7], target[:7]), (x[7:], target[7:])], "accuracy")
    assert parts == pytest.approx(whole)


def test_modes_are_restored_and_nothing_is_measured_in_training_mode():
    network = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(3).eval())
    x = torch.randn(4, 3)
    first = evaluate(network, [(x, torch.zeros(4, dtype=torch.int64))], "accuracy")
    assert first == evaluate(network, [(x, torch.zeros(4, dtype=torch.int64))], "accuracy")
    assert (network.training, network[0].training, network[1].training) == (True, True, False)


def test_no_data_is_an_error_not_a_perfect_score():
    with pytest.raises(ConfigError, match="no example"):
        evaluate(nn.Identity(), [], "perplexity")


def test_latency_takes_turns():
    order = []

    class Marked(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            order.append(self.name)
            time.sleep(0.002 if self.name == "slow" else 0)
            return x

    networks = {"slow": Marked("slow"), "fast": Marked("fast")}
    seconds = interleaved_latency(networks, torch.ones(1), rounds=4)
    assert order == ["slow", "fast"] * 7
    assert seconds["slow"] >= 0.002
    assert not networks["slow"].training


@pytest.mark.parametrize("metric", ["accuracy", "perplexity"])
def test_ignored_targets_count_nowhere(metric):
    torch.manual_seed(0)
    network, x = nn.Linear(4, 3), torch.randn(6, 5, 4)
    target = torch.randint(3, (6, 5))
    some = target.clone()
    some[:, 2:] = -100
    found = evaluate(network, [(x, some)], metric)
    assert found == pytest.approx(evaluate(network, [(x[:, :2], target[:, :2])], metric), rel=1e-5)
