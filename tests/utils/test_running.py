from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gblr_plugin.utils.running import evaluating, run_example


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Dropout()

    def forward(self, x: Tensor, y: Any = 0) -> Any:
        return x + y, self.training


@pytest.mark.parametrize("example", [torch.tensor(3), (torch.tensor(1), 2), {"x": torch.tensor(2), "y": 1}])
def test_an_example_runs_in_evaluation_mode(example: Any) -> None:
    model = Sum()
    assert run_example(model, example) == (3, False)
    assert model.training


def test_every_module_gets_its_own_mode_back() -> None:
    model = Sum()
    model.inner.eval()

    def fail() -> None:
        with evaluating(model):
            assert not model.training
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (model.training, model.inner.training) == (True, False)
