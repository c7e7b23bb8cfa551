"""Every kernel against the dense float64 product: values, gradients, and when which kernel may run."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch.func import jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

from gblr_plugin.kernels import compiled, product
from gblr_plugin.kernels.buffers import quantize, to_dense
from gblr_plugin.kernels.packing import narrowed, pack
from gblr_plugin.matrix.structure import Intervals, StructuredMatrix

needs_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")


def matrix(k: int, m: int, n: int, splits: int = 1, dtype: torch.dtype = torch.float32) -> StructuredMatrix:
    g = torch.Generator().manual_seed(k + m + n)

    def intervals(length: int) -> Intervals:
        width, start = (torch.randint(0, length + extra, (k,), generator=g) for extra in (1, 0))
        return Intervals(width, start, length)

    u, v = (torch.randn(k, size, generator=g, dtype=dtype) for size in (m // splits, n))
    sizes = tuple(len(part) for part in torch.arange(k).tensor_split(splits))
    return StructuredMatrix.from_factors(u, v, intervals(m // splits), intervals(n), sizes)


CASES = [(20, 48, 64, 1), (31, 57, 33, 3), (40, 301, 257, 1), (0, 5, 4, 1), (70, 512, 130, 1)]
KERNELS = ["blocks", pytest.param("compiled", marks=needs_numba)]


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("blocks", [(16, 16), (64, 32), (33, 50)])
@pytest.mark.parametrize(("k", "m", "n", "splits"), CASES)
def test_values(k: int, m: int, n: int, splits: int, blocks: tuple[int, int], kernel: str, even: bool) -> None:
    original = matrix(k, m, n, splits)
    layout, factors, lists = pack(original, *blocks, even=even)
    dense, bias = original.to_dense().double(), torch.randn(m)
    for tokens in (0, 1, 2, 3, 7, 16, 17, 37, 64, 130):
        for x in (torch.randn(tokens, n), torch.randn(n, tokens).t(), torch.randn(tokens, 2 * n)[:, ::2]):
            for b in (bias, None):
                y = product.linear(x, factors, lists, layout, b, kernel)
                expected = x.double() @ dense.t() + (0 if b is None else b)
                assert y.shape == (tokens, m)
                assert float((y - expected).norm()) <= 1e-5 * float(expected.norm())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("k", "m", "n", "splits"), CASES)
def test_gradients(k: int, m: int, n: int, splits: int, kernel: str) -> None:
    original = matrix(k, m, n, splits)
    layout, factors, lists = pack(original, 16, 32, even=kernel == "blocks")
    x, bias, weight = torch.randn(19, n, requires_grad=True), torch.randn(m, requires_grad=True), torch.randn(19, m)
    y = product.linear(x, factors, lists, layout, bias, kernel)
    mine = torch.autograd.grad((y * weight).sum(), (x, bias))
    expected = weight.double() @ original.to_dense().double(), weight.double().sum(0)
    for found, true in zip(mine, expected, strict=True):
        assert float((found - true).norm()) <= 1e-5 * float(true.norm())


@needs_numba
@pytest.mark.parametrize("blocks", [(16, 16), (64, 32), (34, 50)])
@pytest.mark.parametrize(("k", "m", "n", "splits"), [(20, 48, 64, 1), (31, 60, 34, 3), (90, 300, 258, 1), (0, 6, 4, 1)])
def test_bfloat16_values(k: int, m: int, n: int, splits: int, blocks: tuple[int, int]) -> None:
    device = torch.device("cpu")
    if not compiled.available(device, torch.bfloat16):
        pytest.skip("this processor has no AVX512-BF16")
    original = matrix(k, m, n, splits).to(torch.bfloat16)
    layout, factors, lists = pack(original, *blocks)
    assert compiled.fits(layout, device, torch.bfloat16)
    dense, bias = original.to_dense().double(), torch.randn(m).bfloat16()
    exact = (original.u.double(), original.v.double())
    parts = zip(*(factor.split(original.split_sizes) for factor in exact), strict=True)
    dense = torch.cat([u.t() @ v for u, v in parts])
    for tokens in (0, 1, 2, 3, 7, 16, 37, 64, 130):
        for x in (torch.randn(tokens, n).bfloat16(), torch.randn(n, tokens).bfloat16().t()):
            for b in (bias, None):
                y = product.linear(x, factors, lists, layout, b, "compiled")
                expected = x.double() @ dense.t() + (0 if b is None else b)
                assert y.dtype == torch.bfloat16
                assert float((y - expected).norm()) <= 5e-3 * float(expected.norm())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("blocks", [(16, 16), (64, 32), (33, 50)])
@pytest.mark.parametrize(("k", "m", "n", "splits"), CASES)
def test_int8_factors_multiply_as_the_matrix_they_stand_for(
    k: int, m: int, n: int, splits: int, blocks: tuple[int, int], kernel: str
) -> None:
    layout, factors, lists = pack(matrix(k, m, n, splits), *blocks)
    whole, scales = quantize(layout, factors, lists)
    layout, lists = narrowed(layout, lists)
    assert layout.narrow
    dense, bias = to_dense(layout, whole, lists, scales.double()), torch.randn(m, requires_grad=True)
    for tokens in (0, 1, 3, 16, 37, 130):
        for x in (torch.randn(tokens, n, requires_grad=True), torch.randn(n, tokens).t()):
            expected = x.double() @ dense.t() + bias
            with torch.no_grad():
                y = product.linear(x, whole, lists, layout, bias, kernel, scales)
                expected = expected.detach()
            assert float((y - expected).norm()) <= 1e-5 * float(expected.norm())
        x = torch.randn(tokens, n, requires_grad=True)
        mine = torch.autograd.grad(product.linear(x, whole, lists, layout, bias, kernel, scales).square().sum(), x)
        true = torch.autograd.grad((x.double() @ dense.t() + bias).square().sum(), x)
        torch.testing.assert_close(mine, true, rtol=1e-3, atol=1e-4 * float(true[0].abs().max()) if tokens else 0.0)


@needs_numba
@pytest.mark.parametrize("blocks", [(16, 16), (32, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_kernels_take_wide_and_narrow_lists(dtype: torch.dtype, blocks: tuple[int, int]) -> None:
    x_dtype = torch.float32 if dtype == torch.int8 else dtype
    if not compiled.available(torch.device("cpu"), x_dtype):
        pytest.skip("no compiled kernel for this dtype here")
    layout, factors, lists = pack(matrix(20, 48, 64).to(x_dtype), *blocks)
    factors, scales = quantize(layout, factors, lists) if dtype == torch.int8 else (factors, None)
    x = torch.randn(70, 64).to(x_dtype)
    expected = x @ to_dense(layout, factors, lists, scales).t()
    limit = (1e-2 if dtype == torch.bfloat16 else 1e-5) * float(expected.norm())
    for places, words in ((layout, lists), narrowed(layout, lists)):
        for tokens in (1, 40, 70):
            y = product.linear(x[:tokens], factors, words, places, None, "compiled", scales)
            assert float((y - expected[:tokens]).norm()) <= limit
    assert not compiled.fits(narrowed(layout, lists)[0], torch.device("cuda"), torch.float32)


def test_bfloat16_on_odd_borders_takes_torch_operations() -> None:
    original = matrix(31, 57, 33, 3).to(torch.bfloat16)
    layout, factors, lists = pack(original, 16, 16)
    assert not compiled.fits(layout, torch.device("cpu"), torch.bfloat16)
    x = torch.randn(5, 33).bfloat16()
    y = product.linear(x, factors, lists, layout, None, "compiled")
    expected = x.double() @ original.to_dense().double().t()
    assert float((y - expected).norm()) <= 2e-2 * float(expected.norm())


@needs_numba
@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("team", [True, False])
def test_threads_share_the_work(threads: int, team: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from gblr_plugin.kernels.cpu import numba_team
    from gblr_plugin.kernels.cpu import threads as threading

    if not team:  # as after a fork, or where torch has another library of threads
        monkeypatch.setattr(threading, "_forked", True)
    monkeypatch.setattr(numba_team, "SHARED_TOKENS", 0)
    monkeypatch.setattr(numba_team, "SHARED_BLOCKS", 0)
    original = matrix(31, 57, 33, 3)
    layout, factors, lists = pack(original, 16, 16)
    whole, scales = quantize(layout, factors, lists)
    narrow, narrow_lists = narrowed(layout, lists)
    rounded = to_dense(narrow, whole, narrow_lists, scales)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for tokens in (0, 1, 5, 30, 50, 200):
            x, bias = torch.randn(tokens, 33), torch.randn(57)
            y = product.linear(x, factors, lists, layout, bias, "compiled")
            torch.testing.assert_close(y, x @ original.to_dense().t() + bias, rtol=1e-4, atol=1e-4)
            y = product.linear(x, whole, narrow_lists, narrow, bias, "compiled", scales)
            torch.testing.assert_close(y, x @ rounded.t() + bias, rtol=1e-4, atol=1e-4)
    finally:
        torch.set_num_threads(before)


@needs_numba
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_share_blocks_whose_components_are_no_whole_tiles(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gblr_plugin.kernels.cpu import numba_team

    monkeypatch.setattr(numba_team, "SHARED_BLOCKS", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for k in (10, 15, 17, 50):  # the border of two threads falls where a block ends, or just behind
            g = torch.Generator().manual_seed(k)
            u, v, x = (torch.randn(size, generator=g) for size in ((k, 48), (k, 64), (5, 64)))
            low_rank = StructuredMatrix.from_factors(u, v, Intervals.full(k, 48), Intervals.full(k, 64), (k,))
            layout, factors, lists = pack(low_rank, 16, 16)
            for tokens in (1, 5):
                y = product.linear(x[:tokens], factors, lists, layout, None, "compiled")
                torch.testing.assert_close(y, x[:tokens] @ v.t() @ u, rtol=1e-4, atol=1e-4)
    finally:
        torch.set_num_threads(before)


FREED = """
import torch
from gblr_plugin.kernels import compiled, product
from gblr_plugin.kernels.cpu import numba_team
from gblr_plugin.kernels.buffers import quantize, to_dense
from gblr_plugin.kernels.packing import narrowed, pack
from gblr_plugin.matrix.structure import Intervals, StructuredMatrix

numba_team.SHARED_TOKENS = numba_team.SHARED_BLOCKS = 0
u, v, bias = torch.randn(100, 128), torch.randn(100, 96), torch.randn(128)
whole = StructuredMatrix.from_factors(u, v, Intervals.full(100, 128), Intervals.full(100, 96), (100,))
for dtype in (torch.float32, torch.bfloat16):
    if not compiled.available(torch.device("cpu"), dtype):
        continue
    layout, factors, lists = pack(whole.to(dtype), 32, 32)
    weights = [(factors, None, layout, lists)]
    if dtype == torch.float32:
        weights.append((*quantize(layout, factors, lists), *narrowed(layout, lists)))
    for factors, scales, layout, lists in weights:
        dense = to_dense(layout, factors, lists, scales).float()
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for tokens in (1, 5, 70):
                x = torch.randn(tokens, 96).to(dtype)
                y = product.linear(x, factors, lists, layout, bias.to(dtype), "compiled", scales)
                expected = x.float() @ dense.t() + bias
                error = float((y - expected).norm() / expected.norm())
                assert error < (1e-5 if dtype == torch.float32 else 2e-2), (dtype, threads, tokens, error)
"""


@needs_numba
def test_no_kernel_reads_memory_that_it_gave_back() -> None:
    environment = {**os.environ, "MALLOC_PERTURB_": "165"}  # glibc overwrites what is freed
    run = subprocess.run([sys.executable, "-c", FREED], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr


@needs_numba
def test_the_operator_is_well_formed() -> None:
    original = matrix(31, 57, 33, 3)
    layout, factors, lists = pack(original, 16, 16)
    sizes = (layout.col_table_at, 3, layout.col_groups_at, 16, layout.row_table_at, 6, layout.row_groups_at, 16)
    arguments = (
        torch.randn(5, 33, requires_grad=True),
        factors,
        lists,
        torch.randn(57, requires_grad=True),
        None,
        *sizes,
        layout.num_components,
        57,
        layout.entries,
    )
    torch.library.opcheck(compiled.structured_linear, arguments, atol=1e-4, rtol=1e-4)


@needs_numba
def test_the_operator_counts_its_flops() -> None:
    original = matrix(31, 57, 33)
    layout, factors, lists = pack(original, 16, 16)
    x = torch.randn(5, 33)
    counts = []
    for call in (
        lambda: compiled.linear(x, factors, lists, layout, None, opaque=False),
        lambda: product.linear(x, factors, lists, layout, None, "compiled"),
    ):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            call()
        counts.append(counter.get_total_flops())
    assert counts == [2 * 5 * layout.entries] * 2


@pytest.mark.parametrize("kernel", KERNELS)
def test_functorch_and_forward_gradients(kernel: str) -> None:
    original = matrix(20, 48, 64)
    layout, factors, lists = pack(original, 16, 16)
    dense = original.to_dense()

    def call(x: torch.Tensor) -> torch.Tensor:
        return product.linear(x, factors, lists, layout, None, kernel)

    x, tangent = torch.randn(4, 3, 64), torch.randn(4, 3, 64)
    torch.testing.assert_close(vmap(call)(x), x @ dense.t(), rtol=1e-4, atol=1e-4)
    _, result = jvp(call, (x[0],), (tangent[0],))
    torch.testing.assert_close(result, tangent[0] @ dense.t(), rtol=1e-4, atol=1e-4)


def test_compiled_kernels_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GBLR_COMPILED", "0")
    compiled._installed.cache_clear()
    assert not compiled.available(torch.device("cpu"), torch.float32)
    monkeypatch.undo()
    compiled._installed.cache_clear()


def test_without_numba_torch_operations_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    original = matrix(20, 48, 64)
    layout, factors, lists = pack(original, 16, 16)
    monkeypatch.setattr(compiled, "available", lambda *_: False)
    x = torch.randn(4, 64)
    y = product.linear(x, factors, lists, layout, None, "compiled")
    torch.testing.assert_close(y, x @ original.to_dense().t(), rtol=1e-4, atol=1e-4)
