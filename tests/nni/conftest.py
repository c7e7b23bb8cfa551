"""Small networks, data and evaluators for the tests of the NNI bridge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nni
import pytest
import torch
from nni.compression.utils import TorchEvaluator
from torch import Tensor, nn
from torch.nn import functional as F


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class MLP(nn.Module):
    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.fc1 = nn.Linear(16, width)
        self.fc2 = nn.Linear(width, width)
        self.fc3 = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


def make_batches(count: int = 4, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(16, 4, generator=generator)
    batches = []
    for _ in range(count):
        x = torch.randn(size, 16, generator=generator)
        batches.append((x, (x @ teacher).argmax(1)))
    return batches


def training_step(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y)


def train(
    model: nn.Module,
    optimizers: Any,
    step: Callable[..., Tensor],
    schedulers: Any = None,
    max_steps: int | None = None,
    max_epochs: int | None = None,
) -> None:
    """The loop that a user of NNI writes."""
    batches = make_batches()
    left = max_steps if max_steps is not None else (max_epochs or 1) * len(batches)
    every = optimizers if isinstance(optimizers, list) else [optimizers]
    model.train()
    for index in range(left):
        for optimizer in every:
            optimizer.zero_grad()
        step(batches[index % len(batches)], model).backward()
        for optimizer in every:
            optimizer.step()
        for scheduler in schedulers if isinstance(schedulers, list) else [schedulers] if schedulers else []:
            scheduler.step()


def make_evaluator(
    model: nn.Module,
    optimizer: type = torch.optim.AdamW,
    scheduler: Callable[[Any], Any] | None = None,
    loop: Callable[..., None] = train,
    **options: Any,
) -> TorchEvaluator:
    options.setdefault("lr", 1e-2)
    made = nni.trace(optimizer)(model.parameters(), **options)
    schedulers = None if scheduler is None else scheduler(made)
    return TorchEvaluator(
        loop,
        made,
        training_step,
        lr_schedulers=schedulers,
        evaluating_func=lambda m: float(m(make_batches(1)[0][0]).detach().mean()),
    )


class Helpers:
    MLP = MLP
    make_batches = staticmethod(make_batches)
    training_step = staticmethod(training_step)
    train = staticmethod(train)
    evaluator = staticmethod(make_evaluator)


@pytest.fixture
def kit() -> type[Helpers]:
    return Helpers


@pytest.fixture
def config() -> list[dict[str, Any]]:
    return [{"op_names": ["fc1", "fc2"], "sparse_ratio": 0.6}]
