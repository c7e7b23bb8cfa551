"""Random structured matrices for benchmarks and tests."""

from __future__ import annotations

import torch

from ..errors import ConfigError
from ..matrix.structure import Intervals, StructuredMatrix

__all__ = ["random_structure"]


def random_structure(
    m: int,
    n: int,
    relative_flops: float,
    align: int = 1,
    *,
    row_splits: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> StructuredMatrix:
    """A random GBLR matrix of mixed widths with about the given relative FLOPs.

    Widths are uniform in (0, half the axis], starts anywhere, intervals cyclic.

    Args:
        m: Rows.
        n: Columns.
        relative_flops: Multiply-adds over m * n to aim for.
        align: Tile: widths and starts are multiples of it.
        row_splits: Number of matrices stacked along the rows; divides m.
        dtype: Dtype of the factors.
        seed: Seed of the random numbers.

    Raises:
        ConfigError: If ``align`` exceeds half an axis, or the aim is not above 0.
    """
    m //= row_splits
    if not 1 <= align <= min(m, n) // 2 or not relative_flops > 0:
        raise ConfigError(
            f"bench: align must lie in 1 .. {min(m, n) // 2}, FLOPs above 0; got {align}, {relative_flops}"
        )
    g = torch.Generator().manual_seed(seed)
    each = max(round(relative_flops * m * n / ((m + n + 2 * align) / 4)), 1)  # over the mean cost of a component
    num = each * row_splits

    def intervals(length: int) -> Intervals:
        width = torch.randint(1, length // 2 // align + 1, (num,), generator=g) * align
        start = torch.randint(0, length // align, (num,), generator=g) * align
        return Intervals(width, start, length)

    u, v = (torch.randn(num, size, generator=g) / each**0.5 for size in (m, n))
    return StructuredMatrix.from_factors(u.to(dtype), v.to(dtype), intervals(m), intervals(n), (each,) * row_splits)
