"""The Triton kernels of products in bfloat16 and float16, compiled for GPUs that need not be there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

triton_cuda = pytest.importorskip("gblr_plugin.kernels.cuda.triton_product")


def test_products(gpu: Any) -> None:
    for block, tokens in gpu.tokens.items():
        for number in tokens:
            gpu.multiply(torch.bfloat16, block, number)
    assert not gpu.faults()
    found = {(launch.name, launch.constants["COMPONENTS"], launch.constants["TOKENS"]) for launch in gpu.launches}
    tiles = {
        (kernel.fn.__name__, config.kwargs["COMPONENTS"], config.kwargs["TOKENS"])
        for kernel in (triton_cuda._stage_one, triton_cuda._stage_two)
        for config in kernel.configs
    }
    assert found == tiles


def test_products_in_float16(gpu: Any) -> None:
    """On the largest block, which takes most: in all but its products float16 is as bfloat16."""
    for number in gpu.tokens[max(gpu.tokens)]:
        gpu.multiply(torch.float16, max(gpu.tokens), number)
    assert not gpu.faults()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_products_whose_blocks_end_anywhere(gpu: Any, dtype: torch.dtype) -> None:
    for number in gpu.tokens[max(gpu.tokens)]:
        gpu.multiply(dtype, max(gpu.tokens), number, ragged=True)
    assert not gpu.faults()
