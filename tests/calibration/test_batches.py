"""Calibration batches."""

from __future__ import annotations

import pytest
import torch

from gblr_plugin.calibration.batches import Calibration
from gblr_plugin.errors import ConfigError


def test_a_generator_is_no_list_of_batches() -> None:
    with pytest.raises(ConfigError, match=r"batches are passed .* more than once; give a list, not a generator"):
        Calibration((torch.randn(2, 3) for _ in range(2)), lambda model, x: model(x))  # type: ignore[arg-type]
