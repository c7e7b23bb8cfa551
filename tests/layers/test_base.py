"""Every structured layer inherits one test case, which compares values and gradients with the dense formula."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.nn import functional as F

from gblr_plugin.errors import ConfigError, GBLRError
from gblr_plugin.layers import GBLRConv1d, GBLRConv2d, GBLRLinear
from gblr_plugin.layers.dense import structured_like
from gblr_plugin.layers.masks import gaudi_mask
from gblr_plugin.layers.product import Product
from gblr_plugin.learning.optimizers import param_groups
from gblr_plugin.matrix.structure import Intervals, StructuredMatrix

SIGMAS = [1.0, 20.0, None]


def random_matrix(m, n, num=6, splits=1, dtype=torch.float64, seed=0, align=(1, 1)):
    generator = torch.Generator().manual_seed(seed)
    rows_length, sizes = m // splits, (num,) * splits
    total = sum(sizes)

    def intervals(length, tile):
        width = torch.randint(0, length // tile + 1, (total,), generator=generator) * tile
        start = torch.randint(0, length // tile, (total,), generator=generator) * tile
        width[0], width[1] = length, 0
        return Intervals(width, start, length)

    rows, cols = intervals(rows_length, align[0]), intervals(n, align[1])
    u = torch.randn(total, rows_length, generator=generator, dtype=torch.float64)
    v = torch.randn(total, n, generator=generator, dtype=torch.float64)
    return StructuredMatrix.from_factors(u, v, rows, cols, sizes).to(dtype)


def force(monkeypatch, layer, product):
    """Have a layer multiply in one way; a convolution has no factored product by blocks."""

    def choose(positions, linear):
        rows, cols = layer._masked_axes() if product.startswith("block") else (None, None)
        factored = product.endswith("factored") and (linear or not product.startswith("block"))
        return Product(factored, rows, cols if factored else None)

    monkeypatch.setattr(layer, "_choose_product", choose)


class LayerCase:
    """Subclasses say how to build a layer, its dense equal, and an input."""

    align = (1, 1)
    splits = 1

    def dense_module(self):
        raise NotImplementedError

    def example(self, dtype=torch.float64, seed=1):
        raise NotImplementedError

    def dense_output(self, x, weight_matrix, bias):
        raise NotImplementedError

    def matrix_shape(self):
        weight = self.dense_module().weight
        return weight.flatten(1).shape

    def create(self, dtype=torch.float64, sigma=None):
        m, n = self.matrix_shape()
        matrix = random_matrix(m, n, splits=self.splits, align=self.align)
        layer = structured_like(self.dense_module().to(torch.float64), matrix, align=self.align)
        with torch.no_grad():  # off the grid, so that rounding takes part; U and V alive outside the intervals
            generator = torch.Generator().manual_seed(3)
            layer.widths.add_(0.4 * (torch.rand(layer.widths.shape, generator=generator) - 0.5) / max(m, n)).clamp_(
                0, 1
            )
            for factor in (layer.U, layer.V):
                factor.normal_(generator=generator)
        layer.set_sigma(sigma)
        return layer.to(dtype)

    def formula(self, layer, x):
        """Output by float64 autograd on the dense formula with masks in their FFT form; its leaves."""
        leaves = [p.detach().double().requires_grad_() for p in (layer.U, layer.V, layer.widths, layer.locations)]
        u, v, widths, locations = leaves
        rows, n = layer.axis_lengths
        masked = []
        for i, (factor, length) in enumerate(((u, rows), (v, n))):
            mask = gaudi_mask(widths[i], locations[i], length, layer.sigma, form="fft", align=layer.align[i])
            masked.append(factor * mask)
        per_split = u.shape[0] // layer.row_splits
        weight = torch.cat(
            [a.T @ b for a, b in zip(masked[0].split(per_split), masked[1].split(per_split), strict=True)]
        )
        bias = None if layer.bias is None else layer.bias.detach().double()
        return self.dense_output(x, weight, bias), leaves

    # -- the tests that every structure inherits -----------------------------------------------------------------------

    @pytest.mark.parametrize("product", ["factored", "dense", "block_factored", "block_dense"])
    @pytest.mark.parametrize("sigma", SIGMAS)
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
    def test_values_and_gradients_match_the_dense_formula(self, monkeypatch, product, sigma, dtype, tolerance):
        layer = self.create(dtype, sigma)
        force(monkeypatch, layer, product)
        x = self.example().requires_grad_()
        x_layer = x.detach().to(dtype).requires_grad_()
        expected, leaves = self.formula(layer, x)
        output = layer(x_layer)
        assert output.shape == expected.shape
        assert output.dtype == dtype
        probe = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        (expected * probe).sum().backward()
        (output * probe.to(dtype)).sum().backward()
        found = [output, x_layer.grad, layer.U.grad, layer.V.grad, layer.widths.grad, layer.locations.grad]
        wanted = [expected, x.grad, *(leaf.grad for leaf in leaves)]
        for name, a, b in zip(("y", "x", "U", "V", "widths", "locations"), found, wanted, strict=True):
            error = (a.double() - b).norm() / max(float(b.detach().norm()), 1.0)
            assert error < tolerance, f"{name}: {error:.2e}"

    def test_weight_is_the_matrix_that_the_forward_uses(self):
        layer = self.create(sigma=20.0)
        x = self.example()
        matrix = layer.weight.flatten(1)
        torch.testing.assert_close(layer(x), self.dense_output(x, matrix, layer.bias))
        assert layer.weight.shape == self.dense_module().weight.shape or isinstance(layer, GBLRLinear)

    def test_structure_is_the_boxcar_layer(self):
        layer = self.create(sigma=None)
        torch.testing.assert_close(layer.structure().to_dense(), layer.to_dense())
        assert int(layer.structure().component_multiply_adds.sum()) == layer.stored
        assert layer.structure().num_components == layer.num_components

    def test_smoothness_survives_saving(self):
        layer, twin = self.create(sigma=20.0), self.create(sigma=3.0)
        assert not torch.allclose(layer.structure().to_dense(), layer.to_dense())
        twin.load_state_dict(layer.state_dict())
        assert twin.sigma == 20.0
        torch.testing.assert_close(twin.to_dense(), layer.to_dense(), rtol=0, atol=0)
        twin.load_state_dict(self.create(sigma=3.0).state_dict())
        assert twin.sigma == 3.0
        missing, _ = layer.load_state_dict({}, strict=False)  # a state of other layers
        assert {"U", "mask_state", "low_rank_components"} <= set(missing)
        assert layer.sigma == 20.0

    def test_count_is_that_of_the_masks(self):
        layer = self.create(sigma=None)
        row_mask, col_mask = (mask.detach() for mask in layer.masks())
        assert set(row_mask.unique().tolist()) <= {0.0, 1.0}
        cost = row_mask.count_nonzero(1) + col_mask.count_nonzero(1)
        alive = (row_mask.count_nonzero(1) > 0) & (col_mask.count_nonzero(1) > 0)
        assert layer.stored == int(cost[alive].sum())
        assert layer.relative_flops == layer.stored / math.prod(layer.matrix_shape)

    def test_freeze_keeps_what_is_counted(self):
        layer = self.create(sigma=100.0)
        stored = layer.stored
        layer.freeze_structure()
        assert layer.structure_frozen
        assert layer.sigma is None
        assert layer.stored == stored == int(layer.structure().component_multiply_adds.sum())
        x = self.example()
        torch.testing.assert_close(layer(x), self.dense_output(x, layer.structure().to_dense(), layer.bias))
        layer(x).sum().backward()
        assert layer.widths.grad is None
        assert layer.U.grad is not None
        with pytest.raises(GBLRError, match="frozen"):
            layer.set_sigma(3.0)

    def test_takes_the_product_with_fewer_multiply_adds(self):
        layer = self.create()
        k = layer.U.shape[0]
        rows, n = layer.axis_lengths
        m = rows * self.splits
        for positions in (0, 1, 7, 100, 10**6):
            factored, dense = positions * k * (rows + n), k * rows * n + positions * m * n
            assert layer._choose_product(positions, linear=False).factored == (factored <= dense)

    def test_forward_counts_its_positions(self, monkeypatch):
        layer, asked = self.create(), []
        choose = layer._choose_product
        monkeypatch.setattr(
            layer, "_choose_product", lambda positions, linear: asked.append(positions) or choose(positions, linear)
        )
        y = layer(self.example())
        assert asked == [y.numel() // layer.matrix_shape[0]]

    @pytest.mark.parametrize("frozen", [False, True])
    def test_state_dict_round_trip(self, frozen):
        layer, other = self.create(sigma=7.3), self.create(sigma=None)
        if frozen:
            layer.freeze_structure()
        with torch.no_grad():
            layer.U.mul_(2.0)
        buffer = io.BytesIO()
        torch.save(layer.state_dict(), buffer)
        buffer.seek(0)
        other.load_state_dict(torch.load(buffer, weights_only=True))
        x = self.example()
        assert torch.equal(other(x), layer(x))
        assert other.sigma == layer.sigma == (None if frozen else 7.3)
        assert other.structure_frozen is frozen
        assert other.widths.requires_grad is not frozen

    def test_unfrozen_state_thaws_a_frozen_layer(self):
        layer, frozen = self.create(sigma=7.3), self.create()
        frozen.freeze_structure()
        frozen.load_state_dict(layer.state_dict())
        assert not frozen.structure_frozen
        assert frozen.widths.requires_grad
        assert frozen.sigma == 7.3

    def test_deepcopy_and_pickle(self):
        layer = self.create(sigma=7.3)
        x = self.example()
        expected = layer(x)
        expected.sum().backward()
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(twin(x), expected)
            assert twin.sigma == 7.3
            twin.set_sigma(50.0)
        assert layer.sigma == 7.3
        assert torch.equal(layer(x), expected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_keeps_the_structure_wide(self, dtype):
        layer = self.create(torch.float32, sigma=50.3)
        layer(self.example().float()).sum().backward()
        before = layer.intervals()
        layer.to(dtype)
        assert layer.U.dtype == layer.V.dtype == layer.U.grad.dtype == dtype
        parts = (layer.widths, layer.locations, layer.widths.grad, layer.row_tables, layer.column_tables)
        assert {part.dtype for part in parts} == {torch.float32}
        for old, new in zip(before, layer.intervals(), strict=True):
            assert torch.equal(old.width, new.width)
            assert torch.equal(old.start, new.start)
        layer.zero_grad()
        y = layer(self.example().to(dtype))
        assert y.dtype == dtype
        expected, _ = self.formula(layer, self.example().to(dtype).double())
        assert (y.double() - expected).norm() / expected.norm() < 0.05
        y.float().sum().backward()
        assert layer.widths.grad.dtype == torch.float32
        assert bool(torch.isfinite(layer.widths.grad).all())

    def test_casting_keeps_sigma_and_exact_tables(self):
        layer = self.create(torch.float32, sigma=7.3).double()
        expected = self.create(torch.float64, sigma=7.3)
        assert torch.equal(layer.row_tables, expected.row_tables)
        assert layer.float().state_dict()["mask_state"][0].item() == 7.3

    def test_materialises_from_meta(self):
        layer = self.create(sigma=7.3)
        empty = copy.deepcopy(layer).to("meta")
        by_copy, by_assignment = copy.deepcopy(empty).to_empty(device="cpu"), empty
        by_copy.load_state_dict(layer.state_dict())
        by_assignment.load_state_dict(layer.state_dict(), assign=True)
        x = self.example()
        assert torch.equal(by_copy(x), layer(x))
        assert torch.equal(by_assignment(x), layer(x))

    def test_autocast_and_grad_scaler(self):
        layer = self.create(torch.float32, sigma=20.0)
        optimizer = torch.optim.AdamW(param_groups(layer, lr=1e-3))
        scaler = torch.amp.GradScaler("cpu")
        x = self.example().float()
        before = [p.detach().clone() for p in layer.parameters()]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), layer(x), atol=0.05 * layer(x).abs().max().item(), rtol=0.05)
        scaler.scale(y.float().square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert all(bool(torch.isfinite(p).all()) for p in layer.parameters())
        assert all(not torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))

    def test_trains_with_foreach_and_clipping(self):
        layer = self.create(torch.float32, sigma=20.0)
        optimizer = torch.optim.AdamW(param_groups(layer, lr=1e-2), foreach=True)
        x = self.example().float()
        target = torch.randn(layer(x).shape, generator=torch.Generator().manual_seed(4))
        losses = []
        for _ in range(20):
            loss = F.mse_loss(layer(x), target)
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
            assert bool(torch.isfinite(norm))
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]

    def test_non_contiguous_input(self):
        layer = self.create(sigma=20.0)
        x = self.example()
        strided = x.transpose(0, -1).contiguous().transpose(0, -1)
        assert not strided.is_contiguous() or 1 in x.shape
        torch.testing.assert_close(layer(strided), layer(x))

    def test_repr_shows_the_structure(self):
        text = repr(self.create(sigma=20.0))
        assert "components=" in text
        assert "sigma=20" in text


class TestLinear(LayerCase):
    def dense_module(self):
        return nn.Linear(11, 14)

    def example(self, dtype=torch.float64, seed=1):
        return torch.randn(3, 2, 11, generator=torch.Generator().manual_seed(seed), dtype=dtype)

    def dense_output(self, x, weight_matrix, bias):
        return F.linear(x, weight_matrix, bias)

    def test_empty_batch_and_single_vector(self):
        layer = self.create()
        assert layer(torch.zeros(0, 11, dtype=torch.float64)).shape == (0, 14)
        x = torch.randn(11, dtype=torch.float64)
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))

    def test_in_a_transformer_encoder(self):
        torch.manual_seed(0)
        block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).double().eval()
        block.linear1 = structured_like(block.linear1, random_matrix(16, 8))
        x = torch.randn(2, 5, 8, dtype=torch.float64)
        with torch.no_grad():
            inference = block(x)
        torch.testing.assert_close(inference, block(x))


class TestLinearNoBias(TestLinear):
    def dense_module(self):
        return nn.Linear(11, 14, bias=False)


class TestLinearSplit(TestLinear):
    splits = 3

    def dense_module(self):
        return nn.Linear(11, 12)

    def test_empty_batch_and_single_vector(self):
        layer = self.create()
        assert layer(torch.zeros(0, 11, dtype=torch.float64)).shape == (0, 12)

    def test_uneven_splits_are_padded(self):
        matrix = random_matrix(12, 11, splits=3)
        sizes = (6, 2, 4)
        keep = torch.cat([torch.arange(6), 6 + torch.arange(2), 12 + torch.arange(4)])
        uneven = StructuredMatrix(
            matrix.u[keep], matrix.v[keep], matrix.rows.select(keep), matrix.cols.select(keep), sizes
        )
        layer = GBLRLinear(uneven)
        torch.testing.assert_close(layer.to_dense(), uneven.to_dense())
        assert layer.stored == uneven.stored


class TestLinearAligned(TestLinear):
    align = (4, 3)

    def test_intervals_are_aligned(self):
        for part, tile in zip(self.create().intervals(), self.align, strict=True):
            assert bool(((part.width % tile == 0) | (part.width == part.length)).all())
            assert bool((part.start % tile == 0).all())


class TestHuggingFaceConv1D(LayerCase):
    def dense_module(self):
        conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
        torch.manual_seed(0)
        return conv1d(14, 11)

    def matrix_shape(self):
        return 14, 11

    def example(self, dtype=torch.float64, seed=1):
        return torch.randn(3, 2, 11, generator=torch.Generator().manual_seed(seed), dtype=dtype)

    def dense_output(self, x, weight_matrix, bias):
        return F.linear(x, weight_matrix, bias)

    def test_stands_in_for_the_dense_layer(self):
        module = self.dense_module().double()
        u, s, v = torch.linalg.svd(module.weight.detach().T, full_matrices=False)
        layer = structured_like(module, StructuredMatrix.from_factors((u * s).T, v))
        torch.testing.assert_close(layer(self.example()), module(self.example()))


class ConvCase(LayerCase):
    kind = nn.Conv2d
    options: dict = {}
    size = (7, 6)
    kernel = (3, 2)

    def dense_module(self):
        return self.kind(3, 8, self.kernel, **self.options)

    def example(self, dtype=torch.float64, seed=1):
        return torch.randn(2, 3, *self.size, generator=torch.Generator().manual_seed(seed), dtype=dtype)

    def dense_output(self, x, weight_matrix, bias):
        module = self.dense_module().double()
        return module._conv_forward(x, weight_matrix.view(8, 3, *self.kernel), bias)

    def test_unbatched_input(self):
        layer = self.create(sigma=20.0)
        x = self.example()
        torch.testing.assert_close(layer(x[0]), layer(x)[0])

    def test_groups_are_refused(self):
        dense = self.kind(4, 8, self.kernel, groups=2)
        with pytest.raises(ConfigError, match="groups=2"):
            structured_like(dense, random_matrix(8, 2 * math.prod(self.kernel)))
        with pytest.raises(ConfigError, match="groups=2"):
            (GBLRConv2d if self.kind is nn.Conv2d else GBLRConv1d)(random_matrix(8, 4), dense)


class TestConv2d(ConvCase):
    pass


class TestConv2dStridePaddingDilation(ConvCase):
    options = {"stride": (2, 1), "padding": (1, 2), "dilation": (2, 1)}


class TestConv2dSame(ConvCase):
    options = {"padding": "same"}


class TestConv2dValid(ConvCase):
    options = {"padding": "valid", "bias": False}


class TestConv2dReflect(ConvCase):
    options = {"padding": 1, "padding_mode": "reflect"}


class TestConv2dCircularSame(ConvCase):
    options = {"padding": "same", "padding_mode": "circular", "dilation": 2}


class TestConv2dSplit(ConvCase):
    splits = 2


class TestConv1d(ConvCase):
    kind = nn.Conv1d
    size = (9,)
    kernel = (3,)


class TestConv1dStridePaddingDilation(TestConv1d):
    options = {"stride": 2, "padding": 2, "dilation": 2, "padding_mode": "replicate"}


class TestConv1dSame(TestConv1d):
    options = {"padding": "same", "padding_mode": "zeros"}


def test_convolution_matrix_must_fit():
    with pytest.raises(ConfigError, match=r"must be \(8, 12\)"):
        GBLRConv2d(random_matrix(8, 13), nn.Conv2d(3, 8, 2))


@pytest.mark.parametrize("align", [0, (1, 2, 3), (1, 0), 1.5])
def test_bad_align_is_refused(align):
    with pytest.raises(ConfigError, match="align"):
        GBLRLinear(random_matrix(4, 4), align=align)


@pytest.mark.parametrize("always_blocks", [False, True])
def test_compiles_whole_and_follows_sigma_without_recompiling(monkeypatch, always_blocks):
    torch._dynamo.reset()
    layer = GBLRLinear(random_matrix(12, 10, dtype=torch.float32))
    layer.set_sigma(1.0)
    if always_blocks:  # eager takes them, compiled code has none
        for name in ("_LEAST_FOR_BLOCKS", "_BLOCK_OVERHEAD", "_BLOCK_SLOWDOWN"):
            monkeypatch.setattr(f"gblr_plugin.layers.product.{name}", 0)
        assert layer._choose_product(5, linear=True).rows is not None
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x = torch.randn(5, 10)
    for sigma in (1.0, 3.5, 7.25, 50.0, 99.0):
        layer.set_sigma(sigma)
        layer.zero_grad()
        output = compiled(x)
        output.square().sum().backward()
        found = [p.grad.clone() for p in layer.parameters()]
        layer.zero_grad()
        expected = layer(x)
        expected.square().sum().backward()
        torch.testing.assert_close(output, expected)
        for a, p in zip(found, layer.parameters(), strict=True):
            torch.testing.assert_close(a, p.grad)
    assert counter.frame_count == 1
    layer.freeze_structure()
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= 2
