"""`decompose` and `initialise`: budgets, errors, guards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gblr_plugin.decomposition import METHODS, decompose, initialise
from gblr_plugin.errors import ConfigError
from gblr_plugin.surgery.conversion import prepare


def spectrum(m: int, n: int, seed: int = 0) -> Tensor:
    """A matrix whose singular values fall like those of trained weights."""
    g = torch.Generator().manual_seed(seed)
    r = min(m, n)
    left = torch.linalg.qr(torch.randn(m, r, generator=g)).Q
    right = torch.linalg.qr(torch.randn(n, r, generator=g)).Q
    return (left * (1 + torch.arange(r)) ** -0.5) @ right.T


def relative_error(weight: Tensor, estimate: Tensor) -> float:
    return float(torch.linalg.norm(weight - estimate) / torch.linalg.norm(weight))


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("align", [1, (4, 8)])
@pytest.mark.parametrize("shape", [(48, 64), (37, 29)])
def test_every_method_keeps_budget_and_alignment(
    method: str, align: int | tuple[int, int], shape: tuple[int, int]
) -> None:
    weight = spectrum(*shape)
    found = decompose(weight, 0.4, method=method, align=align)
    tiles = (align, align) if isinstance(align, int) else align
    assert found.shape == shape
    assert found.relative_flops <= 0.4
    assert found.num_components <= min(shape)
    for part, tile in zip((found.rows, found.cols), tiles, strict=True):
        whole = part.width == part.length
        assert bool(((part.width % tile == 0) | whole).all())
        assert bool((part.start % tile == 0).all())
    assert relative_error(weight, found.to_dense()) < (2.0 if method == "random" else 0.9)


@pytest.mark.parametrize("budget", [percent / 100 for percent in range(5, 100, 5)])
@pytest.mark.parametrize("align", [1, 8])
def test_never_above_svd_of_equal_cost(budget: float, align: int) -> None:
    weight = spectrum(48, 40)
    best = relative_error(weight, decompose(weight, budget, align=align).to_dense())
    svd = relative_error(weight, decompose(weight, budget, method="svd").to_dense()) if budget * 48 * 40 >= 88 else 1.0
    trapezoid = relative_error(weight, decompose(weight, budget, method="trapezoid", align=align).to_dense())
    assert best <= svd + 1e-6
    assert best <= trapezoid + 1e-6


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (1, 7), (33, 33)])
def test_whole_budget_is_exact(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert relative_error(weight, decompose(weight, 1.0, align=3).to_dense()) < 1e-6


def test_deterministic_for_a_seed() -> None:
    weight = spectrum(48, 48)
    first, second = (decompose(weight, 0.3, seed=5) for _ in range(2))
    assert torch.equal(first.u, second.u)
    assert torch.equal(first.v, second.v)


def test_splits_are_solved_apart() -> None:
    weight = spectrum(96, 32)
    packed = decompose(weight, 0.4, row_splits=3)
    assert packed.row_splits == 3
    assert packed.relative_flops <= 0.4
    for index, part in enumerate(weight.chunk(3)):
        alone = decompose(part, 0.4, seed=index)
        torch.testing.assert_close(packed.to_dense().chunk(3)[index], alone.to_dense())


def test_max_components_bounds_each_method() -> None:
    weight = spectrum(48, 48)
    for method in ("svd", "trapezoid", "gblr", "random"):
        assert decompose(weight, 0.5, method=method, max_components=7).num_components <= 7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    found = decompose(spectrum(32, 32).to(dtype), 0.5)
    assert found.u.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_zero_and_low_rank_weights() -> None:
    assert decompose(torch.zeros(32, 32), 0.5).to_dense().abs().max() == 0
    g = torch.Generator().manual_seed(0)
    low = torch.randn(40, 3, generator=g) @ torch.randn(3, 40, generator=g)
    assert relative_error(low, decompose(low, 0.2).to_dense()) < 1e-5
    diagonal = torch.block_diag(*[torch.randn(8, 8, generator=g) for _ in range(5)])
    assert relative_error(diagonal, decompose(diagonal, 0.5).to_dense()) < 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"budget": 0.0}, "budget"),
        ({"budget": 1.5}, "budget"),
        ({"budget": float("nan")}, "budget"),
        ({"budget": True}, "budget"),
        ({"budget": 1e-4}, "smallest block"),
        ({"weight": torch.zeros(3, 3, 3)}, "2-d"),
        ({"weight": torch.ones(4, 4, dtype=torch.int64)}, "floating"),
        ({"weight": torch.full((8, 8), float("nan"))}, "NaN"),
        ({"weight": torch.zeros(0, 4)}, "rows and columns"),
        ({"weight": torch.zeros(8, 8, device="meta")}, "meta"),
        ({"method": "best"}, "method"),
        ({"align": 0}, "align"),
        ({"align": (1, 2, 3)}, "align"),
        ({"max_components": 0}, "max_components"),
        ({"row_splits": 3}, "row_splits"),
        ({"calibration": torch.zeros(5, 7)}, "calibration"),
        ({"calibration": torch.full((5, 16), float("inf"))}, "calibration"),
        ({"calibration": torch.zeros(5, 16)}, "second moment is zero"),
        ({"calibration": -torch.eye(16)}, "calibration"),
    ],
)
def test_bad_arguments_are_named_in_one_line(change: dict[str, object], words: str) -> None:
    arguments: dict[str, object] = {"weight": torch.eye(16), "budget": 0.5} | change
    with pytest.raises(ConfigError, match=words) as caught:
        decompose(**arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_initialise_without_budget_is_the_published_start() -> None:
    weight = spectrum(24, 32)
    start = initialise(weight, "svd")
    assert start.num_components == 24
    assert int(start.component_multiply_adds.sum()) == 24 * (24 + 32)  # costs more than dense until it has learned
    torch.testing.assert_close(start.to_dense(), weight)
    torch.testing.assert_close(start.u.norm(dim=1), start.v.norm(dim=1))
    few = initialise(weight, "svd", num_components=5)
    assert few.num_components == 5
    torch.testing.assert_close(torch.linalg.matrix_rank(few.to_dense()), torch.tensor(5))


def test_initialise_with_budget_and_without() -> None:
    weight = spectrum(24, 32)
    assert initialise(weight, "gblr", budget=0.5).relative_flops <= 0.5
    torch.testing.assert_close(initialise(weight, "trapezoid").to_dense(), weight, atol=1e-4, rtol=1e-4)
    assert initialise(weight, "random", num_components=4).num_components == 4
    with pytest.raises(ConfigError, match="needs a budget"):
        initialise(weight, "gblr")
    with pytest.raises(ConfigError, match="method"):
        initialise(weight, "none")


def test_calibration_minimises_the_output_error() -> None:
    weight = spectrum(48, 40)
    g = torch.Generator().manual_seed(3)
    x = torch.randn(500, 40, generator=g) * (1 + torch.arange(40)) ** -0.7
    x = x @ torch.linalg.qr(torch.randn(40, 40, generator=g)).Q

    def output_error(estimate: Tensor) -> float:
        return relative_error(x @ weight.T, x @ estimate.T)

    plain = output_error(decompose(weight, 0.3).to_dense())
    for method in ("svd", "trapezoid", "pursuit", "gblr"):
        calibrated = decompose(weight, 0.3, method=method, calibration=x)
        assert output_error(calibrated.to_dense()) < plain
        assert calibrated.relative_flops <= 0.3
    rows = decompose(weight, 0.3, calibration=x)
    moment = decompose(weight, 0.3, calibration=x.T @ x / len(x))
    assert output_error(rows.to_dense()) == pytest.approx(output_error(moment.to_dense()), rel=1e-2)


def test_rank_deficient_moments_are_damped() -> None:
    weight = spectrum(32, 32)
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    found = decompose(weight, 0.4, calibration=x).to_dense()
    assert relative_error(x @ weight.T, x @ found.T) < 0.05


@pytest.mark.parametrize("method", ["svd", "trapezoid", "gblr"])
def test_a_budget_below_rank_one_keeps_a_block(method):
    weight = torch.tensor([[0.1, -0.2, 3.0, 0.3, 0.1, 0.2, 0.1]], dtype=torch.float64)
    matrix = decompose(weight, 0.999999, method=method)
    assert 0 < matrix.stored <= 6
    assert float((matrix.to_dense() - weight).norm()) < float(weight.norm())
    assert float(matrix.to_dense()[0, 2]) == pytest.approx(3.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("budget", [116 / 4096, 0.1, 0.25, 0.5])
def test_blocks_that_are_there_cost_no_more_where_the_budget_allows_more(dtype: torch.dtype, budget: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.zeros(64, 64, dtype=torch.float64)
    for rows, cols in ((slice(4, 30), slice(10, 40)), (slice(20, 60), slice(30, 50))):
        left, right = (torch.randn(part.stop - part.start, generator=generator).double() for part in (rows, cols))
        weight[rows, cols] += torch.outer(left, right)
    found = decompose(weight.to(dtype), budget)
    assert found.stored == 116
    assert float((found.to_dense() - weight).norm() / weight.norm()) < 1e-7


def test_less_than_half_precision_is_refused():
    weight = torch.randn(16, 16).to(torch.float8_e4m3fn)
    with pytest.raises(ConfigError, match=r"must have half precision or more, got torch\.float8_e4m3fn"):
        decompose(weight, 0.5)
    model = nn.Sequential(nn.Linear(16, 16)).to(torch.float8_e4m3fn)
    with pytest.raises(ConfigError, match=r"layer '0': its weight has dtype torch\.float8_e4m3fn, need half"):
        prepare(model)


@pytest.mark.parametrize("method", ["gblr", "trapezoid", "svd"])
@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
def test_the_scale_of_a_weight_changes_nothing(method: str, scale: float) -> None:
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
    plain = decompose(weight, 0.5, method=method)
    scaled = decompose(weight * scale, 0.5, method=method)
    assert torch.equal(scaled.rows.width, plain.rows.width)
    assert torch.equal(scaled.to_dense() / scale, plain.to_dense())
