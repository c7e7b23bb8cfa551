"""The common base of trainable GBLR layers: masks and intervals, their multiply-adds, and the choice of a product."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ConfigError, GBLRError
from ..matrix.gaudi_mask import integer_locations, integer_widths
from ..matrix.low_rank_form import to_low_rank_form, to_trapezoid_form
from ..matrix.structure import Intervals, StructuredMatrix, multiply_adds
from ..utils.optional_imports import check_version
from .axis_blocks import MaskedAxis, active_blocks, mask_reach
from .blockwise import block_dense
from .distributed_parameters import full_tensor, with_zero_gradients, write_full_tensor
from .masks import masked_factor, table_mask, transformed
from .parameters import StructureParameters
from .product import Product, choose_product

__all__ = ["GBLRLayer"]

check_version("gblr_plugin", "torch>=2.13,<2.14")


class GBLRLayer(StructureParameters):
    """What the GBLR layers share: masks, counting, and the choice of product.

    The layer's weight is the (m, n) matrix ``sum_k (b_k^R * u_k)(b_k^C * v_k)^T`` (paper Eq. 2), or with ``row_splits``
    = s a stack of s such matrices of m / s rows with K / s components each.

    Attributes:
        U: (K, m / s) parameter, row factors.
        V: (K, n) parameter, column factors.
        widths: (2, K) parameter in [0, 1], fractions of the row and of the column axis. Kept in float32 or wider.
        locations: (2, K) parameter in [0, 1), likewise.
        align: Tile of rows and columns to which intervals snap; (1, 1) is the published method.
        row_splits: Number s of matrices stacked along the rows.
        low_rank_components: (K,) bool buffer, the components that train in low-rank form, see
            :meth:`use_low_rank_form`.
    """

    structure_name = "gblr"
    _axes: tuple[MaskedAxis, MaskedAxis] | None = None
    _dense_form: bool | None = None  # whether a fixed structure is that of `holds_dense_weight`; None: not looked at

    def _structure_changed(self) -> None:
        self._axes = self._dense_form = None

    # -- shapes and counts -------------------------------------------------------------------------------------------

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.U.shape[1] * self.row_splits, self.V.shape[1]

    @torch.no_grad()
    def intervals(self) -> tuple[Intervals, Intervals]:
        """The present integer row and column intervals of all K components, as the masks round them.

        Components in low-rank form have the intervals of the trapezoids as which they are counted. Under FSDP2 every
        process must call this, and every other method that counts.
        """
        return self._rounded(full_tensor(self.widths), full_tensor(self.locations))

    def _mask_intervals(self) -> tuple[Intervals, Intervals]:
        with torch.no_grad():
            return self._rounded(*self._structure_parameters())

    def _rounded(self, widths: Tensor, locations: Tensor) -> tuple[Intervals, Intervals]:
        return tuple(  # type: ignore[return-value]  # two entries: rows, columns
            Intervals.of_known(integer_widths(width, n, tile), integer_locations(location, n, tile), n)
            for width, location, n, tile in zip(widths, locations, self.axis_lengths, self.align, strict=True)
        )

    @property
    def component_multiply_adds(self) -> Tensor:
        """(K,) int64 multiply-adds of each component's present intervals."""
        rows, cols = self.intervals()
        return multiply_adds(rows.width, cols.width)

    @property
    def stored(self) -> int:
        """Factor entries inside the present intervals: multiply-adds of one matrix-vector product (paper Eq. 4).

        m * n for a layer that holds its dense weight. More than that for full widths: :func:`gblr_plugin.convert`
        stores such a layer as the dense matrix.
        """
        m, n = self.matrix_shape
        return m * n if self.holds_dense_weight else int(self.component_multiply_adds.sum())

    @property
    def holds_dense_weight(self) -> bool:
        """Whether one factor is unit vectors, one for each row (or column), so that the other is the dense weight."""
        m, n = self.axis_lengths
        if self.U.shape[0] != self.row_splits * min(m, n):
            return False
        vectors = full_tensor(self.unit_factor).view(self.row_splits, min(m, n), -1)
        if int(vectors.count_nonzero()) != vectors.shape[0] * vectors.shape[1]:
            return False
        complete = self.intervals()[1 if m <= n else 0]
        return bool(vectors.diagonal(dim1=1, dim2=2).all() and (complete.width == complete.length).all())

    @property
    def num_components(self) -> int:
        """Number of live components (both widths non-zero)."""
        return int((self.component_multiply_adds > 0).sum())

    # -- smoothness and structure ------------------------------------------------------------------------------------

    @property
    def sigma(self) -> float | None:
        """Smoothness of the masks; ``None`` is the exact boxcar."""
        return self._mask_state.sigma

    def set_sigma(self, sigma: float | None) -> None:
        """Set the smoothness of the masks; updates the tables in place.

        Args:
            sigma: Smoothness, > 0; ``None`` is the exact boxcar.

        Raises:
            GBLRError: If masks are to be smoothed whose structure is frozen.
        """
        if sigma == self._mask_state.sigma:
            return
        if sigma is not None and self._mask_state.frozen:
            raise GBLRError(
                "the structure is frozen as exact boxcars: its masks cannot be smoothed again; for a second round call "
                "unfreeze_structure() first"
            )
        self._set_mask_state(sigma=sigma)

    @property
    def structure_frozen(self) -> bool:
        """Whether :meth:`freeze_structure` has fixed widths and locations as exact boxcars."""
        return self._mask_state.frozen

    @torch.no_grad()
    def freeze_structure(self, widths: Tensor | None = None, *, keep_gradients: bool = False) -> None:
        """Fix the intervals as exact boxcars: what is trained from here on is what is counted, converted and deployed.

        Args:
            widths: (2, K) int64 widths to fix; default the present ones.
            keep_gradients: Whether widths and locations still receive gradients, of zero, for which a
                DistributedDataParallel that was made before waits. An optimizer must not see them (weight decay); a
                :class:`~gblr_plugin.StructureLearner` removes them before each step.
        """
        rows, cols = self.intervals()
        widths = torch.stack([rows.width, cols.width]) if widths is None else widths
        starts = torch.stack([rows.start, cols.start])
        lengths = torch.tensor(self.axis_lengths, dtype=torch.float64, device=widths.device)[:, None]
        write_full_tensor(self.widths, widths / lengths)
        write_full_tensor(self.locations, starts / lengths)
        self._mark_frozen(True, keep_gradients)

    def unfreeze_structure(self) -> None:
        """Let the intervals be learned again, from where they are: a second round of compression."""
        self._mark_frozen(False)

    # -- the two forms of a low-rank part -----------------------------------------------------------------------------

    @torch.no_grad()
    def use_low_rank_form(self) -> int:
        """Let the layer's trapezoids train in low-rank form, as factors on whole axes.

        Trapezoids (component k on the rows from k and the columns from k) are a product of rank r. The same product has
        factors on complete axes, which cost more and train better: see ``matrix/low_rank_form.py``. If the first
        components of a row split are trapezoids, this method replaces their factors by these, and their masks by ones.
        Widths, locations and counts remain those of the trapezoids, and do not change until
        :meth:`use_trapezoid_form`; :meth:`structure` returns trapezoids.

        Returns:
            Number of components in low-rank form.
        """
        if not self._mask_state.low_rank:
            rows, cols = self.intervals()
            u, v, found = to_low_rank_form(
                full_tensor(self.U), full_tensor(self.V), rows, cols, self._component_sizes(), self.align
            )
            write_full_tensor(self.U, u)
            write_full_tensor(self.V, v)
            self._set_mask_state(low_rank=self._ranks(found))
        return int(self.low_rank_components.sum())

    @torch.no_grad()
    def use_trapezoid_form(self) -> None:
        """Turn components in low-rank form into trapezoids whose intervals can be learned; the matrix stays."""
        if not self._mask_state.low_rank:
            return
        u, v, rows, cols = self._as_trapezoids()
        write_full_tensor(self.U, u)
        write_full_tensor(self.V, v)
        write_full_tensor(self.widths, torch.stack([rows.width / rows.length, cols.width / cols.length]))
        write_full_tensor(self.locations, torch.stack([rows.start / rows.length, cols.start / cols.length]))
        self._set_mask_state(low_rank=())

    def _as_trapezoids(self) -> tuple[Tensor, Tensor, Intervals, Intervals]:
        """Factors and intervals without low-rank form."""
        u, v, (rows, cols) = full_tensor(self.U), full_tensor(self.V), self.intervals()
        if not self._mask_state.low_rank:
            return u, v, rows, cols
        return to_trapezoid_form(u, v, rows, cols, self.low_rank_components, self._component_sizes(), self.align)

    # -- dropping components -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def compact(self, optimizers: Iterable[Optimizer] = ()) -> int:
        """Drop components with an empty side for good, from the parameters and from the optimizers' state.

        Parameters keep their identity and change their shape; so do the state entries that have their shape. Whatever
        else holds tensors of the old shape (moving averages of the weights, DistributedDataParallel) has to be made
        anew. With row splits, every split keeps as many components as the fullest one.

        Args:
            optimizers: Those whose state for this layer's parameters is to be sliced.

        Returns:
            Number of components dropped.
        """
        alive = (self.component_multiply_adds > 0).view(self.row_splits, -1)
        most = max(int(alive.sum(1).max()), 1)
        # Stable: live components first, each kind in its old order.
        order = (~alive).int().argsort(dim=1, stable=True)[:, :most].sort(dim=1).values
        keep = (order + torch.arange(self.row_splits, device=order.device)[:, None] * alive.shape[1]).flatten()
        dropped = self.U.shape[0] - len(keep)
        if dropped:
            self._keep_components(keep, optimizers)
        return dropped

    # -- masks and products ------------------------------------------------------------------------------------------

    def _structure_parameters(self) -> tuple[Tensor, Tensor]:
        """Widths and locations as they enter the masks.

        Without gradient once the structure is frozen; the whole axes for components in low-rank form.
        """
        if self.widths.dtype.itemsize < 4:
            raise GBLRError(
                f"structured layer: its widths arrive in {self.widths.dtype}, too coarse for intervals; under FSDP2 "
                "use autocast instead of MixedPrecisionPolicy(param_dtype=...)"
            )
        widths: Tensor = self.widths.detach() if self._mask_state.frozen else self.widths
        locations: Tensor = self.locations.detach() if self._mask_state.frozen else self.locations
        if self._mask_state.low_rank:
            low_rank = self.low_rank_components
            return torch.where(low_rank, 1.0, widths), torch.where(low_rank, 0.0, locations)
        return widths, locations

    def _row_factors(self) -> Tensor:
        """Return U, with zero gradients for widths and locations if these must have gradients."""
        return with_zero_gradients(self.U, (self.widths, self.locations)) if self._keeps_gradients else self.U

    def masks(self) -> tuple[Tensor, Tensor]:
        """Row mask (K, m / s) and column mask (K, n), differentiable in widths and locations."""
        widths, locations = self._structure_parameters()
        return (
            table_mask(widths[0], locations[0], self.row_tables, self.align[0]),
            table_mask(widths[1], locations[1], self.column_tables, self.align[1]),
        )

    def masked_factors(self) -> tuple[Tensor, Tensor]:
        """Row factors (K, m / s) and column factors (K, n) under their masks."""
        (row_width, col_width), (row_start, col_start) = (values.unbind() for values in self._structure_parameters())
        return (
            masked_factor(self._row_factors(), row_width, row_start, self.row_tables, self.align[0]),
            masked_factor(self.V, col_width, col_start, self.column_tables, self.align[1]),
        )

    def to_dense(self) -> Tensor:
        """The (m, n) matrix of the present, possibly smooth, masks; differentiable."""
        return self._from_rows_or_columns() if self.trains_dense_weight else self._dense(*self.masked_factors())

    @property
    def trains_dense_weight(self) -> bool:
        """Whether the structure is fixed and :attr:`holds_dense_weight`; looked at once until the structure changes.

        Not looked at within ``torch.compile``, which would have to break its graph.
        """
        if not self._mask_state.frozen:
            return False
        if self._dense_form is None and not torch.compiler.is_compiling():
            self._dense_form = self.holds_dense_weight
        return bool(self._dense_form)

    @property
    def unit_factor(self) -> Tensor:
        """Of a layer that holds its dense weight the factor whose rows are unit vectors; the other is the weight."""
        m, n = self.axis_lengths
        return self.U if m <= n else self.V

    def _from_rows_or_columns(self) -> Tensor:
        """The (m, n) matrix of a layer that holds its dense weight, without a product of matrices."""
        s, (m, n) = self.row_splits, self.axis_lengths
        u, v = self._row_factors().view(s, -1, m), self.V.view(s, -1, n)
        if self.unit_factor is self.U:
            return (u.diagonal(dim1=1, dim2=2)[..., None] * v).flatten(0, 1)
        return (u.transpose(1, 2) * v.diagonal(dim1=1, dim2=2)[:, None]).flatten(0, 1)

    def _dense(self, u: Tensor, v: Tensor, rows: MaskedAxis | None = None) -> Tensor:
        if rows is not None:
            return block_dense(u, v, rows)
        s = self.row_splits
        if s == 1:
            return u.T @ v
        return torch.bmm(u.view(s, -1, u.shape[1]).transpose(1, 2), v.view(s, -1, v.shape[1])).flatten(0, 1)

    @torch.no_grad()
    def structure(self) -> StructuredMatrix:
        """A copy of the present integer structure and its factors, without dead components, in trapezoid form."""
        u, v, rows, cols = self._as_trapezoids()
        return StructuredMatrix.from_factors(u, v, rows, cols, self._component_sizes()).live()

    def frozen_structure(self) -> StructuredMatrix:
        """:meth:`structure`, which is what the layer computes once its masks are exact boxcars.

        Raises:
            ConfigError: If the masks are still smooth.
        """
        if self.sigma is not None:
            raise ConfigError(
                f"its masks are still smooth (sigma {self.sigma:g}); finish training or call freeze_structure() before "
                "converting"
            )
        return self.structure()

    def factors(self) -> dict[str, nn.Parameter]:
        """U and V."""
        return {"U": self.U, "V": self.V}

    def _choose_product(self, positions: int, linear: bool) -> Product:
        """Choose the product with fewest multiply-adds over ``positions`` inputs."""
        blocks = self._may_use_blocks() and not torch.compiler.is_compiling() and not transformed()
        axes = self._masked_axes if blocks else None
        return choose_product(positions, self.U.shape[0], self.matrix_shape, self.row_splits, axes, linear=linear)

    def _may_use_blocks(self) -> bool:
        """Whether to multiply by blocks: on a GPU, their lists cost a synchronisation, and small products are slow."""
        return self.widths.device.type == "cpu"

    def _masked_axes(self) -> tuple[MaskedAxis, MaskedAxis]:
        """Cut rows and columns into blocks for the present structure; the blocks are remembered until it changes."""
        if self._axes is not None and self._mask_state.frozen:
            return self._axes
        rows, cols = self._mask_intervals()
        # Widths are compared by value, since optimizers that write to `.data` leave no other trace. A change of sigma
        # clears the remembered blocks.
        if self._axes is None or not all(
            torch.equal(old.width, new.width) and torch.equal(old.start, new.start)
            for old, new in zip(self._axes, (rows, cols), strict=True)
        ):
            # One empty side still has a gradient, and may come back, until the structure is frozen.
            empty_rows, empty_cols = rows.width == 0, cols.width == 0
            skip = empty_rows | empty_cols if self._mask_state.frozen else empty_rows & empty_cols
            axes = []
            for side, tables, splits in ((rows, self.row_tables, self.row_splits), (cols, self.column_tables, 1)):
                reach = 0 if self._mask_state.frozen else mask_reach(side.length, self._mask_state.sigma)
                blocks = active_blocks(side.width, side.start, side.length, reach, skip, splits)
                axes.append(MaskedAxis(blocks, tables, side.width, side.start))
            self._axes = axes[0], axes[1]
        return self._axes
