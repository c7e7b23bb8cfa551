"""Generalized block low-rank (GBLR) matrices with a fixed, integer structure.

A GBLR matrix (Lee & Kim, ICLR 2024, Eq. 2) is a sum of K rank-1 blocks that may lie anywhere and overlap,

    W = sum_k (b_k^R * u_k) (b_k^C * v_k)^T,

where ``b_k^R`` and ``b_k^C`` are 0/1 indicators of cyclic intervals of the rows and columns. This module holds the
matrix and counts its multiply-adds; other modules learn its intervals, find them, or multiply by the matrix fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError

__all__ = ["Intervals", "StructuredMatrix", "multiply_adds"]


@dataclass(frozen=True, eq=False)
class Intervals:
    """Cyclic intervals of K components along one axis.

    Args:
        width: (K,) int64, number of indices covered, in ``[0, length]``.
        start: (K,) int64, first index covered, in ``[0, length)``.
        length: Number of indices of the axis.

    Raises:
        ConfigError: If shapes or dtypes differ from the above, or a value is out of range.
    """

    width: Tensor
    start: Tensor
    length: int

    def __post_init__(self) -> None:
        for name, value in (("width", self.width), ("start", self.start)):
            if value.dtype != torch.int64 or value.dim() != 1:
                raise ConfigError(
                    f"intervals: {name} must be a 1-d int64 tensor, got {value.dtype} {tuple(value.shape)}"
                )
        if self.width.shape != self.start.shape:
            raise ConfigError(
                "intervals: width and start must have one shape, "
                f"got {tuple(self.width.shape)} and {tuple(self.start.shape)}"
            )
        if self.length < 1:
            raise ConfigError(f"intervals: length must be at least 1, got {self.length}")
        if self.width.is_meta:
            return
        wide = (self.width < 0) | (self.width > self.length)
        outside = (self.start < 0) | (self.start >= self.length)
        if bool((wide | outside).any()):  # one question, which waits for the device
            if bool(wide.any()):
                raise ConfigError(f"intervals: widths must lie in [0, {self.length}]")
            raise ConfigError(f"intervals: starts must lie in [0, {self.length})")

    @classmethod
    def of_known(cls, width: Tensor, start: Tensor, length: int) -> Intervals:
        """Intervals that are computed so that they are in range: nothing is checked, no device is waited for."""
        made = object.__new__(cls)
        for name, value in (("width", width), ("start", start), ("length", length)):
            object.__setattr__(made, name, value)
        return made

    @classmethod
    def full(cls, num_components: int, length: int, device: torch.device | str | None = None) -> Intervals:
        """K intervals that each cover the whole axis."""
        width = torch.full((num_components,), length, dtype=torch.int64, device=device)
        return cls.of_known(width, torch.zeros_like(width), length)

    @property
    def num_components(self) -> int:
        """K, the number of intervals."""
        return self.width.numel()

    def support(self) -> Tensor:
        """Indicator of the covered indices, (K, length) bool."""
        index = torch.arange(self.length, dtype=torch.int32, device=self.width.device)
        start, width = self.start.to(torch.int32)[:, None], self.width.to(torch.int32)[:, None]
        end = start + width
        return ((index >= start) & (index < end)) | (index < end - self.length)

    def select(self, index: Tensor | slice) -> Intervals:
        """The intervals at ``index`` ((J,) int64, (K,) bool, or a slice)."""
        return Intervals.of_known(self.width[index], self.start[index], self.length)

    def join(self, *others: Intervals) -> Intervals:
        """These intervals, and after them those of others on an axis of the same length."""
        width, start = (torch.cat([getattr(each, name) for each in (self, *others)]) for name in ("width", "start"))
        return Intervals.of_known(width, start, self.length)

    def narrow(self, start: int, length: int) -> Intervals:
        """What the intervals cover of the indices ``start : start + length``, as cyclic intervals of that range.

        What a cyclic interval covers of a range is a cyclic interval of it: where it wraps, its two ends meet at the
        border of the range.
        """
        end = self.start + self.width
        first = self.start.clamp(min=start)
        upper = (end.clamp(max=min(self.length, start + length)) - first).clamp(min=0)
        lower = ((end - self.length).clamp(max=start + length) - start).clamp(min=0)
        return Intervals.of_known(upper + lower, torch.where(upper > 0, first - start, 0), length)


def multiply_adds(row_width: Tensor, col_width: Tensor) -> Tensor:
    """Multiply-adds per component of one matrix-vector product: width sum where both widths are non-zero (paper Eq. 4).

    Args:
        row_width: (..., K) integer row widths.
        col_width: (..., K) integer column widths.

    Returns:
        (..., K) of the input dtype; zero where either width is zero, since such a component need not be computed.
    """
    return torch.where((row_width > 0) & (col_width > 0), row_width + col_width, torch.zeros_like(row_width))


@dataclass(frozen=True, eq=False)
class StructuredMatrix:
    """An (m, n) GBLR matrix: factors, and the integer intervals on which they are non-zero.

    With ``row_splits = s > 1`` the matrix is a stack of s GBLR matrices of m/s rows each (packed q, k, v: s = 3); the
    components are ordered by split and row intervals are cyclic within their split.

    Args:
        u: (K, m / s) floating point, zero outside the row intervals.
        v: (K, n) floating point, zero outside the column intervals.
        rows: K row intervals of an axis of length m / s.
        cols: K column intervals of an axis of length n.
        split_sizes: Number of components of each split; ``(K,)`` for an unsplit matrix.

    Raises:
        ConfigError: If factors, intervals and split sizes do not fit together.
    """

    u: Tensor
    v: Tensor
    rows: Intervals
    cols: Intervals
    split_sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        num = self.rows.num_components
        if self.u.shape != (num, self.rows.length) or self.v.shape != (num, self.cols.length):
            raise ConfigError(
                f"structured matrix: factors {tuple(self.u.shape)}, {tuple(self.v.shape)} do not fit "
                f"{num} components on axes of length {self.rows.length} and {self.cols.length}"
            )
        if self.cols.num_components != num or sum(self.split_sizes) != num:
            raise ConfigError(f"structured matrix: row, column and split component counts differ from {num}")

    @classmethod
    def from_factors(
        cls,
        u: Tensor,
        v: Tensor,
        rows: Intervals | None = None,
        cols: Intervals | None = None,
        split_sizes: tuple[int, ...] | None = None,
    ) -> StructuredMatrix:
        """Build from factors, zeroing what lies outside the intervals (``None``: full width, one split)."""
        rows = Intervals.full(u.shape[0], u.shape[1], u.device) if rows is None else rows
        cols = Intervals.full(v.shape[0], v.shape[1], v.device) if cols is None else cols
        zero = u.new_zeros(())
        return cls(
            torch.where(rows.support(), u, zero),
            torch.where(cols.support(), v, zero),
            rows,
            cols,
            (u.shape[0],) if split_sizes is None else split_sizes,
        )

    def __repr__(self) -> str:
        return (
            f"StructuredMatrix(shape={self.shape}, components={self.num_components}, row_splits={self.row_splits}, "
            f"relative_flops={self.relative_flops:.4f}, dtype={self.u.dtype}, device={self.u.device})"
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the matrix represented."""
        return self.rows.length * self.row_splits, self.cols.length

    @property
    def row_splits(self) -> int:
        """Number s of matrices stacked along the rows."""
        return len(self.split_sizes)

    @property
    def component_multiply_adds(self) -> Tensor:
        """(K,) int64 multiply-adds of each component."""
        return multiply_adds(self.rows.width, self.cols.width)

    @property
    def num_components(self) -> int:
        """Number of components that cost anything (both widths non-zero)."""
        return int((self.component_multiply_adds > 0).sum())

    @property
    def stored(self) -> int:
        """Number of stored entries, equal to the multiply-adds of one matrix-vector product.

        Components that together cost more than the dense matrix are stored and multiplied as that: at most m * n.
        """
        m, n = self.shape
        return min(int(self.component_multiply_adds.sum()), m * n)

    @property
    def relative_flops(self) -> float:
        """Multiply-adds of one matrix-vector product over those of the dense matrix, m * n."""
        m, n = self.shape
        return self.stored / (m * n)

    def live(self) -> StructuredMatrix:
        """The same matrix without its zero-cost components."""
        return self.select(self.component_multiply_adds > 0)

    def select(self, index: Tensor) -> StructuredMatrix:
        """The sum of some components; :meth:`narrow` takes some rows or columns.

        Args:
            index: (K,) bool, or (J,) int64 numbers of components, those of an earlier split first.
        """
        split = torch.repeat_interleave(torch.tensor(self.split_sizes, device=self.u.device))[index]
        sizes = tuple(torch.bincount(split, minlength=self.row_splits).tolist())
        return StructuredMatrix(self.u[index], self.v[index], self.rows.select(index), self.cols.select(index), sizes)

    def t(self) -> StructuredMatrix:
        """The (n, m) transpose."""
        matrix = self._unsplit()
        return StructuredMatrix(matrix.v, matrix.u, matrix.cols, matrix.rows, matrix.split_sizes)

    def narrow(self, dim: int, start: int, length: int) -> StructuredMatrix:
        """Rows (``dim=0``) or columns (``dim=1``) ``start : start + length``, as :func:`torch.narrow`; exact.

        Rows within one row split give a matrix without row splits; complete row splits remain row splits.

        Raises:
            ConfigError: If the range is empty or leaves the axis.
        """
        size = self.shape[dim]
        if not (start >= 0 and length > 0 and start + length <= size):
            raise ConfigError(
                f"structured matrix: cannot take {start}:{start + length} of an axis of length {size}; need a range "
                "inside it of at least one index"
            )
        if dim == 1:
            cols = self.cols.narrow(start, length)
            return StructuredMatrix(self.u, self.v[:, start : start + length], self.rows, cols, self.split_sizes)
        pieces, height, first = [], self.rows.length, 0
        for number, size in enumerate(self.split_sizes):
            begin = max(start - number * height, 0)
            end = min(start + length - number * height, height)
            if begin < end:
                split = slice(first, first + size)
                rows = self.rows.select(split).narrow(begin, end - begin)
                cols = self.cols.select(split)
                pieces.append(StructuredMatrix(self.u[split, begin:end], self.v[split], rows, cols, (size,)))
            first += size
        return StructuredMatrix.cat(pieces, 0)

    @staticmethod
    def cat(matrices: Sequence[StructuredMatrix], dim: int) -> StructuredMatrix:
        """Matrices above (``dim=0``) or beside (``dim=1``) each other, as :func:`torch.cat`; exact.

        Matrices above each other are row splits of the result where all have the same height, so that no component
        changes. Elsewhere an interval that wraps around is no interval of the longer axis: the component becomes two
        that share the other factor, or one over the whole width with zeros, whichever has fewer multiply-adds.

        Args:
            matrices: At least one, of the same number of columns (``dim=0``) or rows (``dim=1``).
            dim: 0 or 1.

        Raises:
            ConfigError: If the shapes do not fit.
        """
        if len({matrix.shape[1 - dim] for matrix in matrices}) != 1:
            raise ConfigError(
                f"structured matrix: cannot put matrices of shapes {', '.join(str(m.shape) for m in matrices)} "
                f"together along axis {dim}"
            )
        if dim == 0 and len({matrix.rows.length for matrix in matrices}) == 1:
            first, *others = matrices
            return StructuredMatrix(
                torch.cat([matrix.u for matrix in matrices]),
                torch.cat([matrix.v for matrix in matrices]),
                first.rows.join(*(matrix.rows for matrix in others)),
                first.cols.join(*(matrix.cols for matrix in others)),
                sum((matrix.split_sizes for matrix in matrices), ()),
            )
        if dim == 0 or len({matrix.row_splits for matrix in matrices}) > 1:
            matrices = [matrix._unsplit() for matrix in matrices]
        total, at, placed = sum(matrix.shape[dim] for matrix in matrices), 0, []
        for matrix in matrices:
            placed.append(matrix._placed(dim, at, total))
            at += matrix.shape[dim]
        return StructuredMatrix.sum(placed)

    @staticmethod
    def sum(matrices: Sequence[StructuredMatrix]) -> StructuredMatrix:
        """The sum of matrices of one shape and number of row splits: the components of all."""
        first, *others = matrices
        joined = StructuredMatrix(
            torch.cat([matrix.u for matrix in matrices]),
            torch.cat([matrix.v for matrix in matrices]),
            first.rows.join(*(matrix.rows for matrix in others)),
            first.cols.join(*(matrix.cols for matrix in others)),
            (sum(len(matrix.u) for matrix in matrices),),
        )
        if first.row_splits == 1:
            return joined
        device = first.u.device
        split = torch.cat([torch.repeat_interleave(torch.tensor(m.split_sizes, device=device)) for m in matrices])
        order = torch.sort(split, stable=True).indices
        sizes = tuple(int(size) for size in torch.bincount(split, minlength=first.row_splits))
        return replace(joined.select(order), split_sizes=sizes)

    def _unsplit(self) -> StructuredMatrix:
        """The same matrix with intervals on all its rows, without row splits."""
        if self.row_splits == 1:
            return self
        height, splits = self.rows.length, range(self.row_splits)
        pieces = [self.narrow(0, number * height, height) for number in splits]
        return StructuredMatrix.sum([piece._placed(0, n * height, self.shape[0]) for n, piece in enumerate(pieces)])

    def _placed(self, dim: int, at: int, total: int) -> StructuredMatrix:
        """A matrix of zeros but for this one at index ``at`` of an axis of length ``total``; unsplit if ``dim=0``."""
        if dim == 0:
            return self.t()._placed(1, at, total).t()
        length, width, start = self.cols.length, self.cols.width, self.cols.start
        wraps = start + width > length
        # Two components take width + 2 rows multiply-adds, one over the whole width takes length + rows.
        two = wraps & (width + self.rows.width < length)
        source = torch.repeat_interleave(torch.arange(len(width), device=width.device), 1 + two.long())
        second = torch.zeros_like(source, dtype=torch.bool)
        second[1:] = source[1:] == source[:-1]
        begin = torch.where(second | (wraps & ~two)[source], 0, start[source])
        end = torch.where(wraps & ~two, length, torch.where(wraps, length, start + width))[source]
        end = torch.where(second, (start + width - length)[source], end)
        cols = Intervals.of_known(end - begin, begin + at, total)
        v = F.pad(self.v[source], (at, total - at - length))
        sizes = torch.stack([split.sum() for split in (1 + two.long()).split(self.split_sizes)]).tolist()
        return StructuredMatrix.from_factors(self.u[source], v, self.rows.select(source), cols, tuple(sizes))

    def to(self, *args: object, **kwargs: object) -> StructuredMatrix:
        """Move or cast as :meth:`torch.Tensor.to`; intervals follow the device and stay int64."""
        u, v = self.u.to(*args, **kwargs), self.v.to(*args, **kwargs)  # type: ignore[call-overload]  # passes through

        def move(side: Intervals) -> Intervals:
            return Intervals.of_known(side.width.to(u.device), side.start.to(u.device), side.length)

        return StructuredMatrix(u, v, move(self.rows), move(self.cols), self.split_sizes)

    def to_dense(self) -> Tensor:
        """The (m, n) matrix."""
        return torch.cat(
            [u.T @ v for u, v in zip(self.u.split(self.split_sizes), self.v.split(self.split_sizes), strict=True)]
        )

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x @ W.T + bias`` by the factored product, for ``x`` of shape (..., n); returns (..., m)."""
        z = F.linear(x, self.v).split(self.split_sizes, dim=-1)
        y = torch.cat([each @ u for each, u in zip(z, self.u.split(self.split_sizes), strict=True)], dim=-1)
        return y if bias is None else y + bias
