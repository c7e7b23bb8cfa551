from dataclasses import FrozenInstanceError

import pytest
import torch

from gblr_plugin.errors import ConfigError
from gblr_plugin.matrix.structure import Intervals, StructuredMatrix, multiply_adds


def intervals(width, start, length):
    return Intervals(torch.tensor(width), torch.tensor(start), length)


def by_definition(matrix, u, v):
    """Eq. 2 entry by entry, from the factors as they were given."""
    m, n = matrix.shape
    per_split = m // matrix.row_splits
    dense = torch.zeros(m, n, dtype=u.dtype)
    component = 0
    for split, size in enumerate(matrix.split_sizes):
        for k in range(component, component + size):
            for a in range(int(matrix.rows.width[k])):
                for b in range(int(matrix.cols.width[k])):
                    i = (int(matrix.rows.start[k]) + a) % per_split
                    j = (int(matrix.cols.start[k]) + b) % n
                    dense[split * per_split + i, j] += u[k, i] * v[k, j]
        component += size
    return dense


@pytest.fixture
def matrix_and_factors():
    torch.manual_seed(0)
    u, v = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    rows = intervals([6, 3, 0, 2, 1], [0, 5, 1, 4, 3], 6)
    cols = intervals([7, 4, 3, 0, 2], [0, 5, 6, 0, 6], 7)
    return StructuredMatrix.from_factors(u, v, rows, cols, (3, 2)), u, v


def test_dense_matches_the_definition(matrix_and_factors):
    matrix, u, v = matrix_and_factors
    assert matrix.shape == (12, 7)
    torch.testing.assert_close(matrix.to_dense(), by_definition(matrix, u, v))


def test_linear_matches_dense(matrix_and_factors):
    matrix, _, _ = matrix_and_factors
    x, bias = torch.randn(2, 3, 7, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    torch.testing.assert_close(matrix.linear(x, bias), x @ matrix.to_dense().T + bias)
    assert matrix.linear(x[:0]).shape == (0, 3, 12)


def test_cost_counts_live_components_only(matrix_and_factors):
    matrix, _, _ = matrix_and_factors
    assert matrix.component_multiply_adds.tolist() == [13, 7, 0, 0, 3]
    assert matrix.stored == 23
    assert matrix.num_components == 3
    assert matrix.relative_flops == 23 / (12 * 7)
    # Every counted entry is really stored, and none besides.
    live = matrix.live()
    assert int((live.u != 0).sum() + (live.v != 0).sum()) == 23


def test_live_drops_dead_components_and_keeps_the_matrix(matrix_and_factors):
    matrix, _, _ = matrix_and_factors
    live = matrix.live()
    assert live.split_sizes == (2, 1)
    assert live.rows.num_components == live.num_components == 3
    torch.testing.assert_close(live.to_dense(), matrix.to_dense())


def test_to_casts_factors_and_keeps_intervals(matrix_and_factors):
    single = matrix_and_factors[0].to(torch.float32)
    assert single.u.dtype == torch.float32
    assert single.rows.width.dtype == torch.int64
    assert single.stored == 23


def test_full_intervals_are_low_rank():
    u, v = torch.randn(2, 4), torch.randn(2, 5)
    matrix = StructuredMatrix.from_factors(u, v)
    torch.testing.assert_close(matrix.to_dense(), u.T @ v)
    assert matrix.stored == 2 * (4 + 5)


def test_support_of_wrapping_intervals():
    support = intervals([3, 0, 4], [3, 2, 1], 4).support()
    assert support.int().tolist() == [[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]]


def test_multiply_adds_broadcast():
    rows, cols = torch.tensor([[1, 0, 3]]), torch.tensor([[2, 5, 0]])
    assert multiply_adds(rows, cols).tolist() == [[3, 0, 0]]
    assert multiply_adds(torch.tensor([1, 2, 1]), torch.tensor([1, 1, 2])).tolist() == [2, 3, 3]


@pytest.mark.parametrize(
    ("width", "start", "length", "message"),
    [
        (torch.tensor([1.0]), torch.tensor([0]), 4, "width must be a 1-d int64"),
        (torch.tensor([1]), torch.tensor([[0]]), 4, "start must be a 1-d int64"),
        (torch.tensor(1), torch.tensor([0]), 4, "width must be a 1-d int64"),
        (torch.tensor([1], dtype=torch.int32), torch.tensor([0]), 4, "width must be a 1-d int64"),
        (torch.tensor([1, 1]), torch.tensor([0]), 4, "one shape"),
        (torch.tensor([1]), torch.tensor([0, 1]), 4, "one shape"),
        (torch.tensor([5]), torch.tensor([0]), 4, r"widths must lie in \[0, 4\]"),
        (torch.tensor([-1]), torch.tensor([0]), 4, "widths must lie"),
        (torch.tensor([1]), torch.tensor([4]), 4, r"starts must lie in \[0, 4\)"),
        (torch.tensor([1]), torch.tensor([7]), 4, "starts must lie"),
        (torch.tensor([1]), torch.tensor([-1]), 4, "starts must lie"),
        (torch.tensor([0]), torch.tensor([0]), 0, "length must be at least 1"),
    ],
)
def test_bad_intervals_are_refused(width, start, length, message):
    with pytest.raises(ConfigError, match=message):
        Intervals(width, start, length)


@pytest.mark.parametrize("part", ["u", "v"])
@pytest.mark.parametrize("shape", [(2, 5), (2, 3), (3, 4), (1, 4), (2, 4, 1)])
def test_factors_that_do_not_fit_are_refused(part, shape):
    full = Intervals.full(2, 4)
    factors = {"u": torch.zeros(2, 4), "v": torch.zeros(2, 4), part: torch.zeros(shape)}
    with pytest.raises(ConfigError, match="do not fit"):
        StructuredMatrix(**factors, rows=full, cols=full, split_sizes=(2,))


@pytest.mark.parametrize(("columns", "splits"), [(2, (1,)), (2, (2, 1)), (1, (2,)), (3, (2,))])
def test_counts_that_differ_are_refused(columns, splits):
    with pytest.raises(ConfigError, match=r"do not fit|component counts differ"):
        StructuredMatrix(torch.zeros(2, 4), torch.zeros(2, 4), Intervals.full(2, 4), Intervals.full(columns, 4), splits)


def test_many_components_on_the_smallest_axis():
    u, v = torch.ones(300, 1), torch.ones(300, 1)
    matrix = StructuredMatrix.from_factors(u, v)
    assert matrix.to_dense().tolist() == [[300.0]]
    assert (matrix.num_components, matrix.stored) == (300, 1)  # multiplied as the dense matrix that it is
    assert StructuredMatrix.from_factors(torch.ones(3, 2), torch.ones(3, 5)).stored == 10


def test_intervals_without_values_are_taken_as_they_are():
    width = torch.empty(3, dtype=torch.int64, device="meta")
    assert Intervals(width, width, 4).num_components == 3
    none = torch.empty(0, dtype=torch.int64)
    assert Intervals(none, none, 4).support().shape == (0, 4)


def test_structures_do_not_change():
    full = Intervals.full(2, 4)
    with pytest.raises(FrozenInstanceError):
        full.length = 5
    with pytest.raises(FrozenInstanceError):
        StructuredMatrix.from_factors(torch.zeros(2, 4), torch.zeros(2, 4)).u = None


def test_repr_is_one_line():
    matrix = StructuredMatrix.from_factors(torch.ones(2, 8), torch.ones(2, 16))
    assert repr(matrix) == (
        "StructuredMatrix(shape=(8, 16), components=2, row_splits=1, relative_flops=0.3750, dtype=torch.float32, "
        "device=cpu)"
    )


# -- parts and sums --------------------------------------------------------------------------------------------------


def cyclic(components, m, n, splits=1, seed=0):
    """Random factors on intervals of every kind: empty, wrapping, whole."""
    g = torch.Generator().manual_seed(seed)

    def intervals(length):
        width = torch.randint(0, length + 1, (components,), generator=g)
        return Intervals(width, torch.randint(0, length, (components,), generator=g), length)

    sizes = tuple(len(part) for part in torch.arange(components).tensor_split(splits))
    u, v = (torch.randn(components, length, generator=g, dtype=torch.float64) for length in (m // splits, n))
    return StructuredMatrix.from_factors(u, v, intervals(m // splits), intervals(n), sizes)


def assert_matrix(matrix, dense):
    """The values, and nothing outside the intervals."""
    torch.testing.assert_close(matrix.to_dense(), dense)
    assert not matrix.u[~matrix.rows.support()].any()
    assert not matrix.v[~matrix.cols.support()].any()


@pytest.mark.parametrize("length", [1, 2, 7])
def test_a_part_of_every_cyclic_interval(length):
    width, start = (part.flatten() for part in torch.meshgrid(torch.arange(8), torch.arange(7), indexing="ij"))
    intervals = Intervals(width, start, 7)
    for begin in range(7 - length + 1):
        part = intervals.narrow(begin, length)
        assert torch.equal(part.support(), intervals.support()[:, begin : begin + length])


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dim", [0, 1])
def test_narrow_equals_that_of_the_dense_matrix(splits, dim):
    matrix = cyclic(20, 12, 15, splits)
    size = matrix.shape[dim]
    for start in range(size):
        for length in range(1, size - start + 1):
            part = matrix.narrow(dim, start, length)
            assert_matrix(part, matrix.to_dense().narrow(dim, start, length))
            if dim == 1 or splits == 1:  # across splits an interval that wraps becomes a longer one, or two
                assert part.component_multiply_adds.sum() <= matrix.component_multiply_adds.sum()
    assert matrix.narrow(0, 0, 12).split_sizes == matrix.split_sizes
    assert matrix.narrow(0, 4, 4).row_splits == 1
    for start, length in ((0, 0), (-1, 2), (10, size)):
        with pytest.raises(ConfigError, match="need a range inside it of at least one index"):
            matrix.narrow(dim, start, length)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("splits", [(1, 1), (3, 3), (1, 3), (3, 2)])
@pytest.mark.parametrize("other", [12, 18])
def test_cat_equals_that_of_dense_matrices(dim, splits, other):
    shapes = ((12, 14), (other, 14)) if dim == 0 else ((12, 14), (12, other))
    matrices = [cyclic(9, *shape, s, seed=i) for i, (shape, s) in enumerate(zip(shapes, splits, strict=True))]
    result = StructuredMatrix.cat([*matrices, matrices[0]], dim)
    assert_matrix(result, torch.cat([*(m.to_dense() for m in matrices), matrices[0].to_dense()], dim))
    if dim == 0 and 12 // splits[0] == other // splits[1]:
        assert result.row_splits == 2 * splits[0] + splits[1]
        assert result.stored == sum(m.component_multiply_adds.sum() for m in [*matrices, matrices[0]])


def test_cat_takes_the_cheaper_form_of_an_interval_that_wraps():
    u, v = torch.ones(2, 4), torch.ones(2, 20)
    rows = Intervals(torch.tensor([2, 4]), torch.tensor([0, 0]), 4)
    cols = Intervals(torch.tensor([6, 17]), torch.tensor([17, 10]), 20)
    matrix = StructuredMatrix.from_factors(u, v, rows, cols)
    result = StructuredMatrix.cat([matrix, matrix.narrow(1, 0, 3)], 1)
    assert_matrix(result, torch.cat([matrix.to_dense(), matrix.to_dense()[:, :3]], 1))
    # Columns 17, 18, 19 and 0, 1, 2: two components of 3 + 2. The other: one of 20 + 4 where two would take 17 + 8.
    assert sorted(result.component_multiply_adds.tolist()) == [3 + 2, 3 + 2, 3 + 2, 3 + 4, 20 + 4]


def test_shapes_that_do_not_fit_together():
    for dim in (0, 1):
        with pytest.raises(ConfigError, match=r"shapes \(4, 5\), \(6, 7\) together along axis"):
            StructuredMatrix.cat([cyclic(2, 4, 5), cyclic(2, 6, 7)], dim)


@pytest.mark.parametrize("splits", [1, 3])
def test_select_sum_and_transpose(splits):
    matrix = cyclic(20, 12, 15, splits)
    mask = torch.arange(20) % 3 == 0
    some, others = matrix.select(mask), matrix.select(torch.arange(20)[~mask])
    assert some.row_splits == others.row_splits == splits
    assert len(some.u) == 7
    assert_matrix(StructuredMatrix.sum([some, others]), matrix.to_dense())
    other = cyclic(7, 12, 15, splits, 1)
    assert_matrix(StructuredMatrix.sum([matrix, other]), matrix.to_dense() + other.to_dense())
    assert_matrix(matrix.t(), matrix.to_dense().T)
    assert_matrix(matrix.t().t(), matrix.to_dense())
