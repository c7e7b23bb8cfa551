import io
import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gblr_plugin.calibration.batches import Calibration
from gblr_plugin.calibration.layer_moments import layer_moments
from gblr_plugin.utils.random_state import accelerators_of, keep_random_state, random_state, set_random_state


class Accelerator:
    """Stands in for torch.cuda: two devices, whose state is one number each."""

    def __init__(self):
        self.states, self.current = [torch.tensor([11]), torch.tensor([22])], 0

    def device_count(self):
        return len(self.states)

    def get_rng_state(self, device):
        return self.states[device].clone()

    def set_rng_state(self, state, device):
        self.states[device] = state.clone()

    def manual_seed(self, seed):
        self.states[self.current] = torch.tensor([seed])


@pytest.fixture
def accelerator(monkeypatch):
    made = Accelerator()

    def chosen(index):
        made.current = index
        return nullcontext()

    monkeypatch.setattr(torch, "get_device_module", lambda _device: made)
    monkeypatch.setattr(torch.accelerator, "device_index", chosen)
    return made


@pytest.mark.parametrize("seed", [None, 7])
def test_generators_are_as_before(seed, accelerator):
    before = torch.get_rng_state()
    with keep_random_state([torch.device("cuda", 1)], seed):
        assert accelerator.states == [torch.tensor([11]), torch.tensor([22 if seed is None else 7])]
        first = torch.rand(3)
        accelerator.states[1] += 1
    assert accelerator.states == [torch.tensor([11]), torch.tensor([22])]
    assert torch.equal(torch.get_rng_state(), before)
    with keep_random_state([], seed):
        assert torch.equal(torch.rand(3), first)


def test_generators_are_as_before_after_an_error(accelerator):
    before = torch.get_rng_state()

    def fail():
        with keep_random_state([torch.device("cuda", 0)], 0):
            torch.rand(1)
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert accelerator.states == [torch.tensor([11]), torch.tensor([22])]
    assert torch.equal(torch.get_rng_state(), before)


def test_no_generator_of_another_device_is_seeded(monkeypatch):
    """Calibration draws targets from a seed; a model on the CPU is no reason to touch a GPU."""
    seeded = []
    for module in (torch.cuda, torch.xpu, torch.mps, torch.mtia):
        for name in ("manual_seed", "manual_seed_all"):
            monkeypatch.setattr(module, name, lambda *_: seeded.append(1), raising=False)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    batches = [(torch.randn(5, 6), torch.randint(3, (5,)))]
    calibration = Calibration(batches, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))
    before = torch.get_rng_state()
    found = [layer_moments(model, {"0": model[0]}, calibration, gradients=True)[1]["0"] for _ in range(2)]
    assert torch.equal(*found)
    assert torch.equal(torch.get_rng_state(), before)
    assert not seeded
    assert accelerators_of(model.to("meta")) == set()


def test_random_state_of_all_libraries():
    def drawn():
        return random.random(), np.random.rand(), np.random.randn(), torch.rand(()).item(), torch.randn(()).item()

    state = random_state()
    first = drawn()
    assert drawn() != first
    set_random_state(state)
    assert drawn() == first
    torch.save(state, file := io.BytesIO())
    file.seek(0)
    set_random_state(torch.load(file, weights_only=True))
    assert drawn() == first
