"""What the kernels ask of torch beyond its documented names still means the same."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from gblr_plugin.kernels import _compat


def answers() -> list[bool]:
    return [
        _compat.tracing(),
        _compat.autocast_on(),
        _compat.dispatch_modes() > 0,
        _compat.functorch_transform() is not None,
        _compat.forward_gradients(),
    ]


def test_each_question_is_about_one_thing() -> None:
    seen: list[list[bool]] = [answers()]

    def look(x: Tensor) -> Tensor:
        seen.append(answers())
        return x + 1

    torch.jit.trace(look, torch.ones(2), check_trace=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        look(torch.ones(2))
    with FlopCounterMode(display=False):
        look(torch.ones(2))
    torch.vmap(look)(torch.ones(2))
    with forward_ad.dual_level():
        look(torch.ones(2))
    assert seen[0] == [False] * 5
    for number, found in enumerate(seen[1:]):
        assert found == [place == number for place in range(5)], number
