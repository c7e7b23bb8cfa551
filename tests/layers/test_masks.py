import math

import numpy as np
import pytest
import torch

from gblr_plugin.errors import ConfigError
from gblr_plugin.kernels.optional import mask_kernels
from gblr_plugin.layers.masks import gaudi_mask, masked_factor, table_mask
from gblr_plugin.matrix.gaudi_mask import integer_locations, integer_widths, mask_tables

SIGMAS = [1.0, 10.0, 100.0, None]


def draw(n, num=12, seed=0):
    """Widths and locations with the corner cases first: dead, full, wrapping, negative and beyond one."""
    generator = torch.Generator().manual_seed(seed)
    width = torch.rand(num, generator=generator, dtype=torch.float64)
    location = torch.rand(num, generator=generator, dtype=torch.float64)
    width[:3] = torch.tensor([0.0, 1.0, 0.5])
    location[2] = 0.9  # wraps
    location[3:5] = torch.tensor([-0.3, 2.6])
    return width.requires_grad_(), location.requires_grad_()


def value_and_gradients(form, n, sigma, **options):
    width, location = draw(n)
    mask = gaudi_mask(width, location, n, sigma, form=form, **options)
    weights = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (mask * weights).sum().backward()
    return mask.detach(), width.grad, location.grad


def published(width, location, n, sigma):
    """The formula of the paper (Sec. 3.2), one frequency after the other."""
    samples = np.arange(n)
    rows = []
    for w, start in zip(width.tolist(), location.tolist(), strict=True):
        row = np.full(n, w)
        for k in range(1, n // 2 + 1):
            gain = w * np.sinc(k * w) / np.sinc(k / n) * np.exp(1j * np.pi * k * (1 / n - w - 2 * start))
            gain *= 1.0 if sigma is None else np.exp(-(k**2) / (2 * sigma**2))
            wave = (gain * np.exp(2j * np.pi * k * samples / n)).real
            row += wave if 2 * k == n else 2 * wave
        rows.append(row)
    return torch.from_numpy(np.stack(rows))


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("n", [1, 2, 7, 16])
def test_both_forms_are_the_published_formula(n, sigma):
    width, location = (part.detach() for part in draw(n))
    found = gaudi_mask(width, location, n, sigma, straight_through=False)
    torch.testing.assert_close(found, published(width, location, n, sigma), rtol=1e-9, atol=1e-9)
    rounded = integer_widths(width, n).double() / n, integer_locations(location, n).double() / n
    torch.testing.assert_close(gaudi_mask(width, location, n, sigma), published(*rounded, n, sigma))


@pytest.mark.parametrize("n", [1, 6, 9])
def test_tables_are_running_sums_over_three_periods(n):
    boxcar = mask_tables(n, None, torch.float64)
    assert torch.equal(boxcar[0], torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64).repeat_interleave(n))
    smooth = mask_tables(n, 3.0, torch.float64)
    torch.testing.assert_close(smooth[0, n:], smooth[0, :-n] + 1)
    one = torch.tensor([1 / n], dtype=torch.float64)
    torch.testing.assert_close(smooth[0, n : 2 * n].diff(), gaudi_mask(one, 0 * one, n, 3.0)[0, 1:])


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("n", [1, 2, 3, 8, 17, 64, 101])
def test_tables_agree_with_fft_form(n, sigma):
    for table, fft in zip(value_and_gradients("table", n, sigma), value_and_gradients("fft", n, sigma), strict=True):
        torch.testing.assert_close(table, fft, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n", [10, 11, 64])
@pytest.mark.parametrize("align", [3, 4, 16])
def test_aligned_tables_agree_with_fft_form(n, align):
    for sigma in (10.0, None):
        pair = value_and_gradients("table", n, sigma, align=align), value_and_gradients("fft", n, sigma, align=align)
        for table, fft in zip(*pair, strict=True):
            torch.testing.assert_close(table, fft, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sigma", [1.0, 5.0, 100.0])
@pytest.mark.parametrize("n", [8, 9])
def test_unrounded_form_passes_gradcheck(n, sigma):
    width = torch.tensor([0.0, 0.31, 0.77, 1.0], dtype=torch.float64, requires_grad=True)
    location = torch.tensor([0.1, 0.9, 0.43, 0.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda w, x: gaudi_mask(w, x, n, sigma, straight_through=False), (width, location), atol=1e-7
    )


@pytest.mark.parametrize("n", [7, 12])
def test_exact_boxcar_is_the_rounded_interval(n):
    width, location = draw(n)
    mask = gaudi_mask(width, location, n, None)
    for row, w, start in zip(mask, integer_widths(width, n), integer_locations(location, n), strict=True):
        expected = torch.zeros(n, dtype=torch.float64)
        expected[[(int(start) + i) % n for i in range(int(w))]] = 1.0
        assert torch.equal(row, expected)


def test_widths_zero_and_full():
    for sigma in SIGMAS:
        mask = gaudi_mask(torch.tensor([0.0, 1.0]), torch.tensor([0.3, 0.8]), 16, sigma)
        torch.testing.assert_close(mask, torch.tensor([[0.0], [1.0]]).expand(2, 16), atol=1e-6, rtol=0)


def test_location_shifts_the_mask_cyclically():
    n = 20
    for sigma in SIGMAS:
        at_zero = gaudi_mask(torch.tensor([0.4]), torch.tensor([0.0]), n, sigma)
        wrapped = gaudi_mask(torch.tensor([0.4]), torch.tensor([0.9]), n, sigma)
        torch.testing.assert_close(wrapped, at_zero.roll(18, dims=1))


def test_dead_component_has_a_width_gradient():
    width = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    gaudi_mask(width, torch.tensor([0.5], dtype=torch.float64), 16, 2.0)[0, 8].backward()
    assert width.grad.item() > 1.0


@pytest.mark.parametrize(("n", "align"), [(10, 4), (9, 4), (11, 4), (64, 16), (5, 8), (7, 1)])
def test_alignment_reaches_every_multiple_and_the_whole_axis(n, align):
    width = torch.linspace(0, 1, 2001)
    reached = set(integer_widths(width, n, align).tolist())
    assert reached == {*range(0, n, align), n}
    assert integer_widths(torch.tensor([1.0]), n, align).item() == n
    starts = integer_locations(torch.linspace(-1, 2, 4001), n, align)
    assert set(starts.tolist()) == set(range(0, n, align)) or n % align  # the last partial tile may be unreachable
    assert bool((starts % align == 0).all())
    assert bool(((starts >= 0) & (starts < n)).all())


@pytest.mark.parametrize(("n", "align"), [(10, 4), (9, 4), (11, 4), (16, 4), (5, 8), (7, 1)])
def test_rounding_takes_the_nearest(n, align):
    value = torch.rand(997, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    allowed = torch.tensor([*range(0, n, align), n])
    missed = (integer_widths(value, n, align) - value * n).abs()
    torch.testing.assert_close(missed, (allowed - value[:, None] * n).abs().amin(1))
    starts = torch.arange(0, n + align, align)
    nearest = starts[(starts - value[:, None] * n).abs().argmin(1)]
    assert torch.equal(integer_locations(value, n, align), torch.where(nearest < n, nearest, 0))
    assert torch.equal(integer_locations(value - 3, n, align), integer_locations((value - 3) % 1, n, align))


def test_between_a_tile_and_the_whole_axis_the_tile_wins():
    assert integer_widths(torch.tensor(0.9, dtype=torch.float64), 10, 4) == 8  # 9 samples


def test_rounding_stays_on_the_axis():
    beyond = torch.tensor([-0.4, 1.4])
    assert integer_widths(beyond, 5).tolist() == [0, 5]
    assert integer_widths(beyond, torch.tensor(5.0, dtype=torch.float64)).tolist() == [0, 5]
    assert integer_locations(torch.tensor([math.nan]), 5).item() in range(5)


@pytest.mark.parametrize(("n", "align"), [(10, 4), (768, 1), (768, 16), (4096, 32), (5, 8)])
def test_tensor_lengths_round_as_numbers_do(n, align):
    width = torch.rand(5000, generator=torch.Generator().manual_seed(0))
    lengths, tiles = (torch.full((5000,), float(value), dtype=torch.float64) for value in (n, align))
    assert torch.equal(integer_widths(width, lengths, tiles), integer_widths(width, n, align))


def test_whole_samples_survive_float32():
    for n in (3, 768, 3072, 4097):
        whole = torch.arange(n + 1)
        assert torch.equal(integer_widths((whole.double() / n).float(), n), whole)
        assert torch.equal(integer_locations((whole[:-1].double() / n).float(), n), whole[:-1])


def test_float32_stays_close_to_float64():
    width, location = draw(4096, num=6)
    for sigma in SIGMAS:
        exact = gaudi_mask(width, location, 4096, sigma)
        single = gaudi_mask(width.float(), location.float(), 4096, sigma)
        assert single.dtype == torch.float32
        rounded = gaudi_mask(width.float().double(), location.float().double(), 4096, sigma)
        torch.testing.assert_close(single.double(), rounded, atol=5e-7, rtol=0)
        assert exact.dtype == torch.float64


def test_bad_arguments_are_refused():
    good = torch.rand(3)
    for width, location in ((torch.rand(2), good), (good, torch.rand(2)), (torch.rand(()), torch.rand(()))):
        with pytest.raises(ConfigError, match=r"must be \(K,\)"):
            gaudi_mask(width, location, 8, None)
    with pytest.raises(ConfigError, match="must be"):
        gaudi_mask(torch.rand(3, 1), torch.rand(3, 1), 8, None)
    with pytest.raises(ConfigError, match="sigma must be positive"):
        gaudi_mask(good, good, 8, 0.0)
    with pytest.raises(ConfigError, match="sigma must be positive"):
        mask_tables(8, float("nan"))
    with pytest.raises(ConfigError, match="axis length"):
        gaudi_mask(good, good, 0, None)
    with pytest.raises(ConfigError, match="form must be"):
        gaudi_mask(good, good, 8, None, form="dft")
    with pytest.raises(ConfigError, match="align"):
        gaudi_mask(good, good, 8, None, align=0)


def test_tables_are_ones_own():
    mask_tables(6, 2.0, torch.float64).zero_()
    assert bool((mask_tables(6, 2.0, torch.float64) != 0).any())


def test_options_have_names():
    with pytest.raises(TypeError, match="positional"):
        mask_tables(8, 2.0, None, None, True)
    with pytest.raises(TypeError, match="positional"):
        gaudi_mask(torch.rand(3), torch.rand(3), 8, None, True)


# -- mask times factor -------------------------------------------------------------------------------------------------


def product_and_gradients(make, n, needed=("factor", "width", "location")):
    """Of the product that ``make`` gives; gradients that are not needed are ``None``."""
    given = dict(zip(("width", "location"), (part.detach() for part in draw(n)), strict=True))
    generator = torch.Generator().manual_seed(2)
    given["factor"], weights = torch.randn(2, 12, n, generator=generator, dtype=torch.float64)
    for name, part in given.items():
        part.requires_grad_(name in needed)
    product = make(given["factor"], given["width"], given["location"])
    (product * weights).sum().backward()
    return [product.detach(), *(given[name].grad for name in ("factor", "width", "location"))]


def product_of_forms(n, sigma):
    return lambda factor, width, location: gaudi_mask(width, location, n, sigma, form="fft") * factor


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("cached", [0, 85, 1 << 17])  # one row, five rows, all rows at once
@pytest.mark.filterwarnings("error")  # scratch memory of another shape is made anew, with a warning
@pytest.mark.parametrize("needed", [("factor", "width", "location"), ("factor",), ("width",), ("location",)])
def test_product_is_mask_times_factor(monkeypatch, compiling, cached, needed):
    n = 17
    monkeypatch.setattr("gblr_plugin.layers.masks._CACHED_ELEMENTS", cached)
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: compiling)
    for sigma in (5.0, None):
        tables = mask_tables(n, sigma, torch.float64)
        expected = product_and_gradients(product_of_forms(n, sigma), n, needed)
        for make in (
            lambda factor, width, location, tables=tables: masked_factor(factor, width, location, tables),
            lambda factor, width, location, tables=tables: table_mask(width, location, tables) * factor,
        ):
            for found, wanted in zip(product_and_gradients(make, n, needed), expected, strict=True):
                assert (found is None) == (wanted is None)
                if wanted is not None:
                    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_gradients_have_the_dtypes_of_their_parameters(dtypes):
    tables = mask_tables(6, 3.0)
    width, location = (torch.rand(4, dtype=dtype, requires_grad=True) for dtype in dtypes)
    factor = torch.randn(4, 6, dtype=torch.bfloat16, requires_grad=True)
    for product in (table_mask(width, location, tables), masked_factor(factor, width, location, tables)):
        found = torch.autograd.grad(product.sum(), (width, location))
        assert tuple(part.dtype for part in found) == dtypes
    assert product.dtype == torch.bfloat16
    assert torch.autograd.grad(masked_factor(factor, width, location, tables).sum(), factor)[0].dtype == torch.bfloat16


def test_second_derivatives_are_refused():
    tables = mask_tables(6, 3.0)
    width, location, factor = (torch.rand(*shape, requires_grad=True) for shape in ((4,), (4,), (4, 6)))
    for product in (table_mask(width, location, tables), masked_factor(factor, width, location, tables)):
        (first,) = torch.autograd.grad(product.square().sum(), width, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()


def test_neither_mask_nor_its_gradient_is_kept():
    kept = []
    tables = mask_tables(6, 3.0)
    width, location, factor = (torch.rand(*shape, requires_grad=True) for shape in ((4,), (4,), (4, 6)))
    with torch.autograd.graph.saved_tensors_hooks(lambda part: kept.append(part) or part, lambda part: part):
        masked_factor(factor, width, location, tables)
    assert [part.data_ptr() for part in kept if part.shape == factor.shape] == [factor.data_ptr()]


def test_compiled_kernels_are_asked_for_what_pays(monkeypatch):
    """The number of elements decides; where only some gradients are wanted, torch's operations are cheaper."""
    sizes = []
    monkeypatch.setattr("gblr_plugin.layers.masks.mask_kernels", lambda tables, size, others: sizes.append(size))
    tables = mask_tables(6, 3.0)

    def backward_sizes(*needed):
        parts = [torch.rand(shape) for shape in ((4, 6), 4, 4)]
        product = masked_factor(*(part.requires_grad_(want) for part, want in zip(parts, needed, strict=True)), tables)
        sizes.clear()
        product.sum().backward()
        return list(sizes)

    table_mask(torch.rand(4), torch.rand(4, requires_grad=True), tables).sum().backward()
    assert sizes == [24, 24]
    # For all gradients at once, and, as there was none, for that of the factor.
    assert backward_sizes(True, True, True) == backward_sizes(True, True, False) == [24, 24]
    assert backward_sizes(True, False, False) == [24]
    assert backward_sizes(False, True, True) == []


# -- compiled kernels --------------------------------------------------------------------------------------------------


@pytest.fixture
def torch_alone(monkeypatch):
    """Run a function with torch operations in place of compiled kernels."""

    def run(function):
        with monkeypatch.context() as patch:
            patch.setattr("gblr_plugin.kernels.optional._module", lambda *names: None)
            return function()

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threads", [1, 2])
def test_compiled_masks_agree_with_torch(monkeypatch, torch_alone, dtype, threads):
    numba_masks = pytest.importorskip("gblr_plugin.kernels.cpu.numba_masks")
    monkeypatch.setattr("gblr_plugin.kernels.optional._LEAST", 0)
    monkeypatch.setattr(numba_masks, "_SHARED", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    n = 37
    width, location = (part.detach().to(dtype).requires_grad_() for part in draw(n))
    factor = torch.randn(12, n, dtype=dtype).requires_grad_()
    upstream = torch.randn(n, 12, dtype=dtype).T  # not contiguous
    for sigma in (5.0, None):
        tables = mask_tables(n, sigma, dtype)

        def results(tables=tables):
            mask = table_mask(width, location, tables)
            masked = masked_factor(factor, width, location, tables)
            frozen = masked_factor(factor, width.detach(), location.detach(), tables)
            return [
                mask.detach(),
                masked.detach(),
                *torch.autograd.grad(mask, (width, location), upstream),
                *torch.autograd.grad(masked, (factor, width, location), upstream, retain_graph=True),
                *torch.autograd.grad(masked, (width,), upstream),
                *torch.autograd.grad(frozen, (factor,), upstream),
            ]

        assert mask_kernels(tables, 1 << 20, (factor,)) is numba_masks
        for found, expected in zip(results(), torch_alone(results), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.set_num_threads(before)


def test_function_transforms_take_torch_operations():
    pytest.importorskip("numba")
    width, location, factor = torch.rand(200), torch.rand(200), torch.randn(200, 200)
    tables = mask_tables(200, 20.0)
    assert mask_kernels(tables, factor.numel(), (factor,)) is not None

    def loss(width):
        return masked_factor(factor, width, location, tables).square().sum()

    inputs = width.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(inputs), inputs)
    torch.testing.assert_close(torch.func.grad(loss)(width), expected, rtol=1e-4, atol=1e-2)


def test_compiled_masks_leave_other_tensors_alone():
    tables = mask_tables(8, None)
    assert mask_kernels(tables, 8, ()) is None
    assert mask_kernels(tables, 1 << 20, (torch.zeros(1, dtype=torch.bfloat16),)) is None
    assert mask_kernels(tables.to("meta"), 1 << 20, ()) is None
    with torch._subclasses.FakeTensorMode():
        assert mask_kernels(torch.zeros(2, 24), 1 << 20, ()) is None
