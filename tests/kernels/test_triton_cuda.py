"""The triton kernels against the float64 product: in triton's interpreter on any machine, natively where there is CUDA.

The interpreter multiplies bfloat16 as integers, so that dtype is left to CUDA
(integration/benchmarks/cuda_products.py).
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

PROGRAM = """
import torch
from gblr_plugin.kernels import triton_cuda, compiled
from gblr_plugin.kernels.layout import pack
from gblr_plugin.structure import Intervals, StructuredMatrix

compiled._kernel = lambda kind: triton_cuda.product
g = torch.Generator().manual_seed(0)

def matrix(k, m, n, splits):
    def intervals(length):
        width, start = (torch.randint(0, length + extra, (k,), generator=g) for extra in (1, 0))
        return Intervals(width, start, length)
    u, v = (torch.randn(k, size, generator=g) for size in (m // splits, n))
    sizes = tuple(len(part) for part in torch.arange(k).tensor_split(splits))
    return StructuredMatrix.from_factors(u, v, intervals(m // splits), intervals(n), sizes)

for case in ((20, 48, 64, 1), (31, 57, 33, 3), (140, 128, 96, 1), (0, 5, 4, 1)):
    exact = matrix(*case)
    dense, (m, n) = exact.to_dense().double(), exact.shape
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 3e-3)):
        for blocks in ((16, 32), (33, 20)):
            layout, factors, lists = pack(exact.to(dtype), *blocks)
            for tokens in (0, 1, 17, 140):
                x, bias = torch.randn(tokens, n).to(dtype), torch.randn(m).to(dtype)
                y = compiled.linear(x, factors, lists, layout, bias, opaque=True)
                expected = x.double() @ dense.t() + bias.double()
                error = float((y.double() - expected).norm())
                assert error <= tolerance * float(expected.norm()), (case, dtype, blocks, tokens, error)
    layout, factors, lists = pack(exact, 16, 32)
    x = torch.randn(9, n, requires_grad=True)
    y = compiled.linear(x, factors, lists, layout, None, opaque=False)
    (grad,) = torch.autograd.grad((y * torch.ones(m)).sum(), x)
    torch.testing.assert_close(grad.double(), dense.sum(0).expand_as(grad), rtol=1e-4, atol=1e-4)
print("agree")
"""


@needs_triton
def test_interpreted_kernels_agree_with_float64() -> None:
    # A process of its own: triton reads TRITON_INTERPRET when it is imported.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.strip().endswith("agree"), done.stderr[-2000:]


@needs_triton
def test_natively_on_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    script = ROOT / "integration" / "benchmarks" / "cuda_products.py"
    subprocess.run([sys.executable, str(script), "--shapes", "512x512", "--tokens", "16"], check=True, timeout=600)
