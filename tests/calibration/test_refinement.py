"""Blocks fitted by gradient to what the dense block returns."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from gblr_plugin.calibration.batches import Calibration
from gblr_plugin.calibration.chains import Chain
from gblr_plugin.calibration.refinement import Refinement, refine
from gblr_plugin.calibration.streams import Stream

WIDTH = 6


class Model(nn.Module):
    """One block with a norm, whose result on masked positions is garbage."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


def begin(model: Model) -> tuple[Stream, list[Tensor], Calibration]:
    """A stream before the block, what the block returned, and batches with a third of their positions masked."""
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(4, 5, WIDTH, generator=generator) for _ in range(3)]
    keep = torch.ones(4, 5)
    keep[:, 3:] = 0
    calibration = Calibration([{"x": x, "attention_mask": keep} for x in states], lambda net, batch: net(batch["x"]))
    stream = Stream.begin(Chain(model, "", ("block",)), [lambda x=x: model(x) for x in states])
    targets = [model(x).detach() for x in states]
    return stream, targets, calibration


def spoil(model: Model) -> None:
    with torch.no_grad():
        model.block[1].weight.mul_(0.7)
        model.block[1].weight.requires_grad_(False)


def test_the_error_falls_padding_does_not_count_and_flags_stay() -> None:
    torch.manual_seed(0)
    model = Model()
    stream, targets, calibration = begin(model)
    for target in targets:
        target[:, 3:] = 1e6
    spoil(model)
    before, after = refine(stream, targets, calibration, Refinement(200, lr=2e-2))
    assert after < 0.01 * before
    rows = torch.cat([target[:, :3].reshape(-1, WIDTH) for target in targets])
    errors = torch.cat([stream.run(batch)[:, :3].reshape(-1, WIDTH) for batch in range(3)]) - rows
    want = errors.square().sum() / (rows - rows.mean(0)).square().sum()
    torch.testing.assert_close(torch.tensor(after), want.detach(), rtol=1e-4, atol=1e-8)
    assert not model.block[1].weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_block_that_gets_no_better_is_left_as_it_was_and_fixed_parameters_do_not_change() -> None:
    torch.manual_seed(0)
    model = Model()
    stream, targets, calibration = begin(model)
    spoil(model)
    old = copy.deepcopy(model.state_dict())
    before, after = refine(stream, targets, calibration, Refinement(5, lr=50.0))
    assert before == after
    assert all(torch.equal(value, old[key]) for key, value in model.state_dict().items())
    refine(stream, targets, calibration, Refinement(20, lr=1e-2), fixed=[model.block[0].weight])
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, old[key])]
    assert changed == ["block.0.bias", "block.1.weight", "block.1.bias"]
