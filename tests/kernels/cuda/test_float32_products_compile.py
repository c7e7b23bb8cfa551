"""The Triton kernels of products in float32, compiled for GPUs that need not be there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")


@pytest.mark.parametrize("allowed", [False, True], ids=["exact", "tf32"])
def test_products_in_float32(gpu: Any, allowed: bool, tf32: Callable[[bool], None]) -> None:
    tf32(allowed)
    for block, tokens in gpu.tokens.items() if not allowed else [(max(gpu.tokens), gpu.tokens[max(gpu.tokens)])]:
        for number in tokens:
            gpu.multiply(torch.float32, block, number)
    assert not gpu.faults()
