"""What test_triton_product.py runs in triton's interpreter; prints the name of each part that passed."""

from __future__ import annotations

import torch
from triton.runtime import interpreter

from gblr_plugin import layers
from gblr_plugin.kernels import compiled
from gblr_plugin.kernels.cuda import triton_masks, triton_proximal
from gblr_plugin.kernels.cuda import triton_product as triton_cuda
from gblr_plugin.kernels.packing import pack
from gblr_plugin.layers import masks as mask
from gblr_plugin.learning import proximal
from gblr_plugin.matrix.structure import Intervals, StructuredMatrix

generator = torch.Generator().manual_seed(0)


def promised(handle, name, values):
    """What a kernel promises the compiler about a value; the interpreter itself only notes it."""
    assert name == "tt.divisibility", name
    assert (handle.data % values[0] == 0).all(), (name, values, handle.data)


interpreter.TensorHandle.set_attr = promised


def matrix(k, m, n, splits):
    def intervals(length):
        width, start = (torch.randint(0, length + extra, (k,), generator=generator) for extra in (1, 0))
        return Intervals(width, start, length)

    u, v = (torch.randn(k, size, generator=generator) for size in (m // splits, n))
    sizes = tuple(len(part) for part in torch.arange(k).tensor_split(splits))
    return StructuredMatrix.from_factors(u, v, intervals(m // splits), intervals(n), sizes)


def compare_product(exact, dtype, blocks, tokens, tolerance):
    layout, factors, lists = pack(exact.to(dtype), *blocks)
    dense, (m, n) = exact.to_dense().double(), exact.shape
    x, bias = torch.randn(tokens, n).to(dtype), torch.randn(m).to(dtype)
    y = compiled.linear(x, factors, lists, layout, bias, opaque=True)
    expected = x.double() @ dense.t() + bias.double()
    error = float((y.double() - expected).norm())
    assert error <= tolerance * float(expected.norm()), (exact.shape, dtype, blocks, tokens, error)


def products():
    compiled._kernel = lambda kind: triton_cuda.product
    for case in ((31, 57, 33, 3), (70, 40, 48, 1), (70, 64, 33, 1), (70, 33, 64, 1), (0, 5, 4, 1)):
        exact = matrix(*case)
        for dtype, tolerance, blocks in ((torch.float32, 1e-5, (16, 32)), (torch.float16, 3e-3, (33, 20))):
            for tokens in (0, 17, 130):
                compare_product(exact, dtype, blocks, tokens, tolerance)
        compare_product(exact, torch.float32, (16, 16), 1, 1e-5)
        layout, factors, lists = pack(exact, 16, 16)
        x = torch.randn(9, exact.shape[1], requires_grad=True)
        y = compiled.linear(x, factors, lists, layout, None, opaque=False)
        (grad,) = torch.autograd.grad((y * torch.ones(exact.shape[0])).sum(), x)
        expected = exact.to_dense().sum(0).expand_as(grad)
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)


def tuning():
    """Every configuration that may be timed is right; which one is taken is up to the timing."""
    compiled._kernel = lambda kind: triton_cuda.product
    triton_cuda._may_time = lambda: True
    timed = []

    def stopwatch(call, quantiles):
        call()
        timed.append(call)
        return [1.0 / len(timed)] * 3  # the last one wins

    exact = matrix(40, 32, 48, 1)
    for kernel in (triton_cuda._stage_one, triton_cuda._stage_two):
        kernel._do_bench = stopwatch
    for tokens in (5, 60, 150):
        before = len(timed)
        compare_product(exact, torch.float16, (16, 16), tokens, 3e-3)
        assert len(timed) - before >= 4, (tokens, len(timed))
        after = len(timed)
        compare_product(exact, torch.float16, (16, 16), tokens - 1, 3e-3)
        assert len(timed) == after  # the same range of tokens
    # Every configuration that is not the last one: right too.
    for one in triton_cuda._UNTIMED[:-1]:
        layout, factors, lists = pack(exact, 16, 16)
        x = torch.randn(20, 48)
        two = triton_cuda._TWO[triton_cuda._UNTIMED.index(one)]
        tiles = one.all_kwargs(), two.all_kwargs()
        y = compiled.linear(x, factors, lists, layout, None, opaque=True, tiles=tiles)
        torch.testing.assert_close(y, x @ exact.to_dense().t(), rtol=1e-4, atol=1e-4)


def through_masks(dtype, with_factor):
    """Value and gradients of masks by triton and by torch."""
    n, k = 130, 6
    tables = mask.mask_tables(n, 20.0, torch.promote_types(dtype, torch.float32))
    width, location = (torch.rand(k, generator=generator).to(tables.dtype).requires_grad_() for _ in range(2))
    factor = torch.randn(k, n, generator=generator).to(dtype).requires_grad_()
    upstream = torch.randn(n, k, generator=generator).to(dtype if with_factor else tables.dtype).t()
    results = []
    for kernels in (triton_masks, None):
        mask.mask_kernels = lambda *arguments, kernels=kernels: kernels
        if with_factor:
            value, inputs = mask.masked_factor(factor, width, location, tables), (factor, width, location)
        else:
            value, inputs = mask.table_mask(width, location, tables), (width, location)
        results.append([value.detach(), *torch.autograd.grad(value, inputs, upstream)])
    return results


def masks():
    for dtype, tolerance in (
        (torch.float64, 1e-12),
        (torch.float32, 1e-5),
        (torch.float16, 2e-3),
        (torch.bfloat16, 2e-2),
    ):
        for with_factor in (False, True):
            for found, expected in zip(*through_masks(dtype, with_factor), strict=True):
                assert found.dtype == expected.dtype
                scale = float(expected.abs().max())
                torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * scale)
    tables, none = mask.mask_tables(8, None), torch.zeros(0, dtype=torch.int64)
    assert triton_masks.window_differences(tables, none, none, None).shape == (0, 8)


def layers_():
    """A training layer by triton's masks, float64, against torch's."""
    layer = layers.GBLRLinear(matrix(9, 24, 36, 3).to(torch.float64), torch.zeros(24, dtype=torch.float64))
    layer.set_sigma(5.0)
    x = torch.randn(7, 36, dtype=torch.float64)
    results = []
    for kernels in (triton_masks, None):
        mask.mask_kernels = lambda *arguments, kernels=kernels: kernels
        layer.zero_grad()
        layer(x).square().sum().backward()
        results.append([parameter.grad for parameter in layer.parameters()])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def proximal_():
    for dtype in (torch.float16, torch.float32, torch.float64):
        sizes = (3, 700, 1)
        widths, locations = ([torch.randn(2, k, dtype=dtype) for k in sizes] for _ in range(2))
        widths[0][0, 0] = torch.nan
        copies = [part.clone() for part in (*widths, *locations)]
        thresholds = torch.tensor([0.1, -0.1, 0.0], dtype=torch.float64)
        proximal.prox_and_clip_(copies[:3], copies[3:], thresholds)
        triton_proximal.prox_and_clip(widths, locations, thresholds)
        for found, expected in zip((*widths, *locations), copies, strict=True):
            torch.testing.assert_close(found, expected, equal_nan=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    for part in (products, tuning, masks, layers_, proximal_):
        part()
        print(part.__name__.strip("_"))
