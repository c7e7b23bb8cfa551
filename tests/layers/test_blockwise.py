import copy

import pytest
import torch

from gblr_plugin.layers import GBLRLinear
from gblr_plugin.layers.axis_blocks import MaskedAxis, active_blocks
from gblr_plugin.layers.blockwise import block_linear
from gblr_plugin.matrix.gaudi_mask import mask_tables
from gblr_plugin.matrix.structure import Intervals, StructuredMatrix


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
        patch.setattr(layer, "_may_use_blocks", lambda: False)
        return gradients(layer, x, upstream)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("positions", [40, 4000])
def test_frozen_blocks_are_exact(monkeypatch, splits, positions):
    layer = big_layer(splits=splits)
    layer.freeze_structure()
    x = torch.randn(positions, 384, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr("gblr_plugin.layers.product._LEAST_FOR_BLOCKS", 0)
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
    monkeypatch.setattr("gblr_plugin.kernels.optional._module", lambda *names: None)
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
    monkeypatch.setattr("gblr_plugin.layers.product._LEAST_FOR_BLOCKS", 0)
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


# -- transforms of torch.func, over a layer that is large enough for blocks --------------------------------------------


class Functional:
    """A large layer with smooth masks, its parameters by name, and a loss of one input or of several."""

    def __init__(self, splits=1):
        self.layer = big_layer(splits=splits, share=0.05)
        self.layer.set_sigma(60.0)
        self.parameters = {name: value.detach() for name, value in self.layer.named_parameters()}
        self.x = torch.randn(1000, self.layer.in_features, generator=torch.Generator().manual_seed(1)).double()

    def outputs(self, parameters, x):
        return torch.func.functional_call(self.layer, parameters, (x,))

    def loss(self, parameters, x):
        return self.outputs(parameters, x).sin().sum()

    def gradients(self, x):
        """What a usual backward pass gives, without blocks."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.layer, "_may_use_blocks", lambda: False)
            self.layer.zero_grad()
            self.layer(x).sin().sum().backward()
        return {name: parameter.grad for name, parameter in self.layer.named_parameters()}


def assert_close(one, two):
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-6, atol=1e-6 * float(two[name].abs().max()))


@pytest.mark.parametrize("splits", [1, 2])
def test_function_gradients_over_a_large_layer(splits):
    case = Functional(splits)
    assert case.layer._choose_product(len(case.x), linear=True).rows is not None  # else nothing is shown
    assert_close(torch.func.grad(case.loss)(case.parameters, case.x), case.gradients(case.x))


def test_a_gradient_for_each_sample():
    case = Functional()
    samples = case.x[:3, None].repeat(1, 1000, 1)
    each = torch.vmap(torch.func.grad(case.loss), in_dims=(None, 0))(case.parameters, samples)
    for index in range(3):
        expected = case.gradients(case.x[index][None].repeat(1000, 1))
        assert_close({name: value[index] for name, value in each.items()}, expected)


def test_forward_derivatives_are_those_of_the_backward_pass():
    case = Functional()
    generator = torch.Generator().manual_seed(2)
    tangents = {
        name: torch.randn(value.shape, generator=generator, dtype=value.dtype)
        for name, value in case.parameters.items()
    }
    along = torch.func.jvp(lambda p: case.loss(p, case.x), (case.parameters,), (tangents,))[1]
    expected = sum((gradient * tangents[name]).sum() for name, gradient in case.gradients(case.x).items())
    torch.testing.assert_close(along, expected)
    with torch.autograd.forward_ad.dual_level():
        dual = {name: torch.autograd.forward_ad.make_dual(v, tangents[name]) for name, v in case.parameters.items()}
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(case.loss(dual, case.x)).tangent, expected)


def test_an_ensemble_of_large_layers():
    cases = Functional(), Functional()
    with torch.no_grad():
        cases[1].layer.widths.mul_(0.5)
    parameters, buffers = torch.func.stack_module_state([case.layer for case in cases])

    def call(parameters, buffers, x):
        return torch.func.functional_call(cases[0].layer, (parameters, buffers), (x,))

    found = torch.vmap(call, in_dims=(0, 0, None))(parameters, buffers, cases[0].x)
    for case, output in zip(cases, found, strict=True):
        torch.testing.assert_close(output, case.layer(cases[0].x), rtol=1e-4, atol=1e-4)


def test_jacobians_of_a_large_layer():
    case = Functional()

    def few(scale):
        """Three outputs, where row and column widths grow by a factor of their own."""
        return case.outputs({**case.parameters, "widths": case.parameters["widths"] * scale[:, None]}, case.x)[0, :3]

    scale = torch.ones(2, dtype=torch.float64)
    expected = torch.autograd.functional.jacobian(few, scale)
    assert float(expected.abs().min()) > 0
    torch.testing.assert_close(torch.func.jacrev(few)(scale), expected, rtol=1e-2, atol=1e-3)  # which skips blocks
    torch.testing.assert_close(torch.func.jacfwd(few)(scale), torch.func.jacrev(few)(scale))


def test_a_hessian_in_the_input_of_a_large_layer():
    case = Functional()

    def loss(shift):
        return case.loss(case.parameters, case.x + shift)

    found = torch.func.hessian(loss)(torch.zeros(1, dtype=torch.float64))
    weight = case.layer.to_dense().detach()
    slope = weight.sum(1)
    expected = -(case.outputs(case.parameters, case.x).sin() * slope.square()).sum()
    torch.testing.assert_close(found.squeeze(), expected, rtol=1e-3, atol=0)
