import pytest
import torch

from gblr_plugin.errors import ConfigError
from gblr_plugin.kernels.fused import mask_kernels
from gblr_plugin.mask import gaudi_mask, integer_locations, integer_widths, mask_tables, masked_factor, table_mask

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
    with pytest.raises(ConfigError, match=r"must be \(K,\)"):
        gaudi_mask(torch.rand(2), good, 8, None)
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


# -- compiled kernels --------------------------------------------------------------------------------------------------


@pytest.fixture
def torch_alone(monkeypatch):
    """Run a function with torch operations in place of compiled kernels."""

    def run(function):
        with monkeypatch.context() as patch:
            patch.setattr("gblr_plugin.kernels.fused._module", lambda *names: None)
            return function()

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threads", [1, 2])
def test_compiled_masks_agree_with_torch(monkeypatch, torch_alone, dtype, threads):
    numba_masks = pytest.importorskip("gblr_plugin.kernels.numba_masks")
    monkeypatch.setattr("gblr_plugin.kernels.fused._WORTH", 0)
    monkeypatch.setattr(numba_masks, "_WORTH_THREADS", 0)
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
