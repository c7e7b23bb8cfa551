import copy

import pytest
import torch

from gblr_plugin.blockwise import SLOPE_TOLERANCE, TOLERANCE, MaskedAxis, active_blocks, block_linear, mask_reach
from gblr_plugin.layers import GBLRLinear
from gblr_plugin.mask import gaudi_mask, mask_tables
from gblr_plugin.structure import Intervals, StructuredMatrix


def big_layer(m=512, n=384, num=96, splits=1, dtype=torch.float64, share=0.2):
    generator = torch.Generator().manual_seed(0)
    total = num * splits

    def intervals(length):
        width = (2 * share * length * torch.rand(total, generator=generator)).long()
        width[:2] = torch.tensor([0, length])
        return Intervals(width, torch.randint(0, length, (total,), generator=generator), length)

    u = torch.randn(total, m // splits, generator=generator, dtype=torch.float64)
    v = torch.randn(total, n, generator=generator, dtype=torch.float64)
    matrix = StructuredMatrix.from_factors(u, v, intervals(m // splits), intervals(n), (num,) * splits)
    return GBLRLinear(matrix.to(dtype), torch.randn(m, generator=generator, dtype=dtype))


def gradients(layer, x, upstream):
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y = layer(x)
    (y * upstream).sum().backward()
    return y.detach(), [x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]


def plain(monkeypatch, layer, x, upstream):
    with monkeypatch.context() as patch:
        patch.setattr(layer, "_blocks_allowed", lambda: False)
        return gradients(layer, x, upstream)


@pytest.mark.parametrize("n", [64, 100, 768, 1023])
@pytest.mark.parametrize("sigma", [1.0, 10.0, 60.0, 100.0])
def test_reach_bounds_masks_and_slopes(n, sigma):
    reach = mask_reach(n, sigma)
    width = torch.tensor([0.25], dtype=torch.float64)
    mask = gaudi_mask(width, torch.zeros(1, dtype=torch.float64), n, sigma)[0]
    w = round(0.25 * n)
    index = torch.arange(n)
    outside = (index >= w + reach) & (index < n - reach)
    assert reach == n or bool(outside.any()) or w + 2 * reach >= n
    assert bool((mask[outside].abs() <= TOLERANCE).all())
    slope = mask_tables(n, sigma, torch.float64)[1, :n].abs()
    assert bool((slope[reach : n - reach] <= SLOPE_TOLERANCE * slope.max()).all())


def test_exact_boxcars_reach_everywhere_until_frozen():
    assert mask_reach(768, None) == 768


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("length", [5, 64, 200, 777])
def test_lists_hold_every_component_that_meets_the_block(length, splits):
    generator = torch.Generator().manual_seed(length)
    width = torch.randint(0, length + 1, (40,), generator=generator)
    width[0], width[1] = 0, length
    start = torch.randint(0, length, (40,), generator=generator)
    skip = torch.zeros(40, dtype=torch.bool)
    skip[5] = True
    blocks = active_blocks(width, start, length, 0, skip, splits)
    support = Intervals(width, start, length).support()
    support[5] = False
    assert [block.offset for block in blocks[:1]] == [0]
    assert sum(block.stop - block.first for block in blocks) == splits * length
    for block in blocks:
        assert block.offset % length == block.first
        wanted = support[:, block.first : block.stop].any(1)
        wanted &= torch.arange(40) // (40 // splits) == block.offset // length
        assert block.components.tolist() == wanted.nonzero().flatten().tolist()
        assert block.size == int(wanted.sum()) * (block.stop - block.first)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("positions", [40, 4000])
def test_frozen_blocks_are_exact(monkeypatch, splits, positions):
    layer = big_layer(splits=splits)
    layer.freeze_structure()
    x = torch.randn(positions, 384, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr("gblr_plugin.layers.product._WORTH_BLOCKS", 0)
    monkeypatch.setattr("gblr_plugin.layers.product._BLOCK_OVERHEAD", 0)
    assert layer._choose_product(positions, linear=True).rows is not None
    upstream = torch.randn(positions, 512, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for a, b in zip(flat(gradients(layer, x, upstream)), flat(plain(monkeypatch, layer, x, upstream)), strict=True):
        torch.testing.assert_close(a, b)


def flat(result):
    return [result[0], *result[1]]


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("sigma", [20.0, 60.0])
def test_smooth_blocks_lose_no_more_than_stated(monkeypatch, sigma, linear):
    layer = big_layer()
    layer.set_sigma(sigma)
    x = torch.randn(64, 384, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    upstream = torch.randn(64, 512, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = flat(plain(monkeypatch, layer, x, upstream))
    blocks = layer._masked_axes()
    assert blocks[0].size < 0.8 * layer.U.numel()
    choice = (True, *blocks) if linear else (False, blocks[0], None)
    monkeypatch.setattr(layer, "_choose_product", lambda *args, **kw: _product(*choice))
    found = flat(gradients(layer, x, upstream))
    # y, x, U, V, widths, locations, bias
    for name, limit, a, b in zip("yxUVwlb", (1e-4, 1e-4, 1e-4, 1e-4, 1e-2, 1e-2, 1e-9), found, expected, strict=True):
        assert (a - b).norm() <= limit * b.norm(), name


def _product(*choice):
    from gblr_plugin.layers.product import Product

    return Product(*choice)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_sides_agree_with_torch(monkeypatch, dtype):
    pytest.importorskip("numba")
    layer = big_layer(dtype=dtype)
    layer.set_sigma(60.0)
    x, upstream = torch.randn(64, 384, dtype=dtype), torch.randn(64, 512, dtype=dtype)
    choice = (True, *layer._masked_axes())
    monkeypatch.setattr(layer, "_choose_product", lambda *args, **kw: _product(*choice))
    found = flat(gradients(layer, x, upstream))
    monkeypatch.setattr("gblr_plugin.kernels.fused._module", lambda *names: None)
    for a, b in zip(found, flat(gradients(layer, x, upstream)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_lists_follow_the_structure():
    layer = big_layer()
    layer.set_sigma(60.0)
    first = layer._masked_axes()
    assert layer._masked_axes()[0] is first[0]
    assert copy.deepcopy(layer)._masked_axes()[0].tables is not first[0].tables
    layer.widths.data.mul_(0.5)  # leaves no trace in the version counter
    second = layer._masked_axes()
    assert second[0].size < first[0].size
    layer.set_sigma(10.0)
    assert layer._masked_axes()[0] is not second[0]
    layer.freeze_structure()
    third = layer._masked_axes()
    assert third[0].size < second[0].size


def test_autocast_takes_the_lower_precision(monkeypatch):
    layer = big_layer(dtype=torch.float32)
    layer.freeze_structure()
    monkeypatch.setattr("gblr_plugin.layers.product._WORTH_BLOCKS", 0)
    monkeypatch.setattr("gblr_plugin.layers.product._BLOCK_OVERHEAD", 0)
    x = torch.randn(40, 384)
    assert layer._choose_product(40, linear=True).cols is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert (y.float() - layer(x)).norm() < 0.02 * layer(x).norm()
    y.float().sum().backward()
    assert layer.U.grad.dtype == torch.float32


def test_empty_lists_give_zero():
    x, u, v, structure = torch.randn(3, 100), torch.ones(2, 70), torch.ones(2, 100), torch.zeros(2, 2)
    none = torch.ones(2, dtype=torch.bool)
    zeros = torch.zeros(2, dtype=torch.int64)
    rows, cols = (
        MaskedAxis(active_blocks(zeros, zeros, length, 0, none), mask_tables(length, None), zeros, zeros)
        for length in (70, 100)
    )
    assert torch.equal(block_linear(x, u, v, structure, structure, None, rows, cols), torch.zeros(3, 70))


def test_sigma_changed_between_forward_and_backward_is_an_error():
    layer = big_layer()
    layer.set_sigma(60.0)
    x = torch.randn(64, 384, dtype=torch.float64)
    rows, cols = layer._masked_axes()
    y = block_linear(x, layer.U, layer.V, layer.widths, layer.locations, None, rows, cols)
    layer.set_sigma(61.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# -- compaction ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
def test_compaction_slices_parameters_and_optimizer_state(kind, splits):
    torch.manual_seed(0)
    layer, twin = (big_layer(24, 20, 8, splits) for _ in range(2))
    options = {"lr": 1e-2, **({"momentum": 0.9} if kind is torch.optim.SGD else {})}
    optimizers = [kind(each.parameters(), **options) for each in (layer, twin)]
    x = torch.randn(5, 20, dtype=torch.float64)

    def step(each, optimizer):
        optimizer.zero_grad()
        loss = each(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss  # a graph that is still alive remembers the old shapes

    kept = [step(each, optimizer) for each, optimizer in zip((layer, twin), optimizers, strict=True)]
    for each in (layer, twin):
        with torch.no_grad():
            each.widths[:, 2::3] = 0.0
        each.freeze_structure()
    identity = id(layer.U)
    dropped = layer.compact([optimizers[0]])
    assert dropped > 0
    assert id(layer.U) == identity
    assert layer.U.shape[0] == twin.U.shape[0] - dropped
    assert layer.stored == twin.stored
    assert layer.compact([optimizers[0]]) == 0
    torch.testing.assert_close(layer.to_dense(), twin.to_dense())
    if kind is not torch.optim.Adafactor:  # whose update is scaled by norms over all components
        for _ in range(3):
            kept = [step(each, optimizer) for each, optimizer in zip((layer, twin), optimizers, strict=True)]
        torch.testing.assert_close(layer.to_dense(), twin.to_dense())
    else:
        kept.append(step(layer, optimizers[0]))
    fresh = big_layer(24, 20, 8, splits)
    fresh.load_state_dict(layer.state_dict())
    torch.testing.assert_close(fresh(x), layer(x))


def test_a_layer_of_dead_components_keeps_one():
    layer = big_layer(24, 20, 8)
    with torch.no_grad():
        layer.widths.zero_()
    layer.compact()
    assert layer.U.shape[0] == 1
    assert layer.stored == 0
    assert torch.equal(layer(torch.ones(2, 20, dtype=torch.float64)), layer.bias.expand(2, 24))
