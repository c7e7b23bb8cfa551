"""A network that learns what another returns."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from gblr_plugin.lightning.distillation import distil


def test_the_student_learns_in_its_mode_and_nothing_is_printed(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    student, teacher = nn.Linear(4, 3).eval(), nn.Linear(4, 3)
    student.bias.requires_grad_(False)
    bias = student.bias.clone()
    batches = [torch.randn(16, 4) for _ in range(5)]
    level = logging.getLogger("lightning.pytorch").level

    def loss(batch: torch.Tensor) -> torch.Tensor:
        return (student(batch) - teacher(batch).detach() - student.bias + teacher.bias.detach()).square().mean()

    before = loss(batches[0]).item()
    distil(student, loss, batches, steps=60, lr=0.05)
    assert loss(batches[0]).item() < 0.02 * before
    assert torch.equal(student.bias, bias)
    assert not student.training
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert logging.getLogger("lightning.pytorch").level == level
