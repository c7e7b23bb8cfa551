"""What structured layers share: parameters, masks, counting, and the choice of product."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from ..errors import ConfigError, GBLRError
from ..matrix.gaudi_mask import integer_locations, integer_widths, mask_tables
from ..matrix.low_rank_form import to_low_rank_form, to_trapezoid_form
from ..matrix.structure import Intervals, StructuredMatrix, multiply_adds
from ..utils.optional_imports import check_version
from .blockwise import MaskedAxis, active_blocks, block_dense, mask_reach
from .distributed_parameters import attach, whole, write_whole
from .masks import masked_factor, table_mask, transformed
from .product import Product, choose_product
from .protocol import StructuredLayer
from .storage import keep_components, replace_storage

__all__ = ["GBLRLayer", "check_align"]

check_version("gblr_plugin", "torch>=2.13,<2.14")


class GBLRLayer(StructuredLayer):
    """What the structured layers share: parameters, masks, counting, and the choice of product.

    The layer's weight is the (m, n) matrix ``sum_k (b_k^R * u_k)(b_k^C * v_k)^T`` (paper Eq. 2), or with ``row_splits``
    = s a stack of s such matrices of m / s rows with K / s components each.

    Attributes:
        U: (K, m / s) parameter, row factors.
        V: (K, n) parameter, column factors.
        widths: (2, K) parameter in [0, 1], fractions of the row and of the column axis. Kept in float32 or wider.
        locations: (2, K) parameter in [0, 1), likewise.
        align: Tile of rows and columns to which intervals snap; (1, 1) is the published method.
        row_splits: Number s of matrices stacked along the rows.
        ungauged: (K,) bool buffer, the components of a low-rank part that trains in a free gauge, see
            :meth:`free_gauge`.
    """

    structure_name = "gblr"
    U: nn.Parameter
    V: nn.Parameter
    widths: nn.Parameter
    locations: nn.Parameter
    row_tables: Tensor
    column_tables: Tensor
    smoothness: Tensor
    hard_masks: Tensor
    frozen: Tensor
    ungauged: Tensor
    align: tuple[int, int]
    row_splits: int

    def _init_structure(self, matrix: StructuredMatrix, align: tuple[int, int], dtype: torch.dtype) -> None:
        """Register parameters that represent ``matrix`` exactly; splits are padded to one component count."""
        sizes = matrix.split_sizes
        most = max(max(sizes), 1)

        def padded(part: Tensor) -> Tensor:
            blocks = [
                F.pad(block, (0, 0) * (block.dim() - 1) + (0, most - block.shape[0])) for block in part.split(sizes)
            ]
            return torch.cat(blocks)

        rows, cols = matrix.rows, matrix.cols
        lengths = torch.tensor([[rows.length], [cols.length]], dtype=torch.float64, device=matrix.u.device)
        structure_dtype = torch.promote_types(dtype, torch.float32)
        self.U = nn.Parameter(padded(matrix.u).to(dtype))
        self.V = nn.Parameter(padded(matrix.v).to(dtype))
        widths = torch.stack([padded(rows.width), padded(cols.width)])
        starts = torch.stack([padded(rows.start), padded(cols.start)])
        self.widths = nn.Parameter((widths / lengths).to(structure_dtype))
        self.locations = nn.Parameter((starts / lengths).to(structure_dtype))
        self.align = align
        self.row_splits = len(sizes)
        device = matrix.u.device
        self.register_buffer("smoothness", torch.tensor(math.inf, dtype=torch.float64, device=device))
        self.register_buffer("hard_masks", torch.tensor(False, device=device))
        self.register_buffer("frozen", torch.tensor(False, device=device))
        self.register_buffer("ungauged", torch.zeros(len(sizes) * most, dtype=torch.bool, device=device))
        self._gauge_is_free = False
        self._sigma: float | None = None
        self._hard = False
        self._structure_frozen = False
        self._attached = False
        self._axes: tuple[MaskedAxis, MaskedAxis] | None = None
        for name, axis in (("row_tables", rows.length), ("column_tables", cols.length)):
            tables = mask_tables(axis, None, structure_dtype, matrix.u.device)
            self.register_buffer(name, tables, persistent=False)

    # -- shapes and counts -------------------------------------------------------------------------------------------

    @property
    def axis_lengths(self) -> tuple[int, int]:
        """(m / s, n): what a normalised width of 1 covers."""
        return self.U.shape[1], self.V.shape[1]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.U.shape[1] * self.row_splits, self.V.shape[1]

    @torch.no_grad()
    def intervals(self) -> tuple[Intervals, Intervals]:
        """The present integer row and column intervals of all K components, as the masks round them.

        A low-rank part in a free gauge has the intervals of the trapezoids that it is counted as. Under FSDP2, here and
        wherever something is counted, every process must ask.
        """
        return self._rounded(whole(self.widths), whole(self.locations))

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

        More than m * n for full widths; :func:`gblr_plugin.convert` stores such a layer as the dense matrix.
        """
        return int(self.component_multiply_adds.sum())

    @property
    def num_components(self) -> int:
        """Number of live components (both widths non-zero)."""
        return int((self.component_multiply_adds > 0).sum())

    # -- smoothness and structure ------------------------------------------------------------------------------------

    @property
    def sigma(self) -> float | None:
        """Smoothness of the masks; ``None`` is the exact boxcar."""
        return self._sigma

    @property
    def hard(self) -> bool:
        """Whether the masks are exact boxcars, of which at most the gradients are smooth."""
        return self._hard or self._sigma is None

    def set_sigma(self, sigma: float | None, *, hard: bool = False) -> None:
        """Set the smoothness of the masks; updates the tables in place.

        Args:
            sigma: Smoothness, > 0; ``None`` is the exact boxcar.
            hard: Multiply by the exact boxcar and smooth only its gradients. A matrix that lies within its budget is
                then the one that is counted, where smooth masks would blur the edges of its intervals, by some
                samples where the axis is longer than sigma.

        Raises:
            GBLRError: If masks are to be smoothed whose structure is frozen.
        """
        if (sigma, hard) == (self._sigma, self._hard):
            return
        if sigma is not None and self._structure_frozen:
            raise GBLRError(
                "the structure is frozen as exact boxcars: its masks cannot be smoothed again; for a second round call "
                "unfreeze_structure() first"
            )
        self._sigma, self._hard = sigma, hard
        self._refresh_buffers()

    @torch.no_grad()
    def _refresh_buffers(self) -> None:
        """Write what the buffers hold anew: after a change of sigma, of dtype or device, or of uninitialised memory."""
        self._axes = None
        for name, n in zip(("row_tables", "column_tables"), self.axis_lengths, strict=True):
            tables = getattr(self, name)
            if tables.device == self.widths.device:
                tables.copy_(mask_tables(n, self._sigma, tables.dtype, tables.device, hard=self._hard))
            else:  # a meta layer whose parameters were assigned from a state dict
                setattr(self, name, mask_tables(n, self._sigma, tables.dtype, self.widths.device, hard=self._hard))
        self.hard_masks.fill_(self._hard)
        self.smoothness.fill_(math.inf if self._sigma is None else self._sigma)
        self.frozen.fill_(self._structure_frozen)

    @property
    def structure_frozen(self) -> bool:
        """Whether :meth:`freeze_structure` has fixed widths and locations as exact boxcars."""
        return self._structure_frozen

    @torch.no_grad()
    def freeze_structure(self, whole_widths: Tensor | None = None, *, attached: bool = False) -> None:
        """Fix the intervals as exact boxcars: what is trained from here on is what is counted, converted and deployed.

        Args:
            whole_widths: (2, K) int64 widths to fix; default the present ones.
            attached: Whether widths and locations go on receiving gradients, of zero: a DistributedDataParallel that
                was made before waits for them. An optimizer must not see these (weight decay); a
                :class:`~gblr_plugin.StructureLearner` takes them away before each step.
        """
        rows, cols = self.intervals()
        widths = torch.stack([rows.width, cols.width]) if whole_widths is None else whole_widths
        starts = torch.stack([rows.start, cols.start])
        lengths = torch.tensor(self.axis_lengths, dtype=torch.float64, device=widths.device)[:, None]
        write_whole(self.widths, widths / lengths)
        write_whole(self.locations, starts / lengths)
        self._mark_frozen(True, attached)

    def unfreeze_structure(self) -> None:
        """Let the intervals be learned again, from where they are: a second round of compression."""
        self._mark_frozen(False)

    def _mark_frozen(self, frozen: bool, attached: bool = False) -> None:
        self._structure_frozen = frozen
        self._attached = attached
        if frozen:
            self._sigma, self._hard = None, False
        self._refresh_buffers()
        for parameter in (self.widths, self.locations):
            parameter.requires_grad_(attached or not frozen)
            parameter.grad = None

    # -- the gauge of a low-rank part --------------------------------------------------------------------------------

    @torch.no_grad()
    def free_gauge(self) -> int:
        """Let trapezoids train as the low-rank product that they are.

        Trapezoids (component k on the rows from k and the columns from k) are one gauge of a product of rank r: any
        two whole factors of that rank give the same matrices, and :meth:`structure` gauges them back. Whole factors of
        balanced norm train better, having no pivots: where trapezoids lead the components of a split, their factors
        are replaced by these, and their masks by whole axes. Widths, locations and all counts stay those of the
        trapezoids; they do not change until :meth:`fix_gauge`.

        Returns:
            Number of components in a free gauge.
        """
        rows, cols = self.intervals()
        sizes = (self.U.shape[0] // self.row_splits,) * self.row_splits
        if not self._gauge_is_free:
            u, v, free = to_low_rank_form(whole(self.U), whole(self.V), rows, cols, sizes, self.align)
            write_whole(self.U, u)
            write_whole(self.V, v)
            self.ungauged.copy_(free)
            self._gauge_is_free = bool(free.any())
            self._axes = None
        return int(self.ungauged.sum())

    @torch.no_grad()
    def fix_gauge(self) -> None:
        """Turn a low-rank part in a free gauge into trapezoids whose intervals can be learned; the matrix stays."""
        if not self._gauge_is_free:
            return
        rows, cols = self.intervals()
        sizes = (self.U.shape[0] // self.row_splits,) * self.row_splits
        u, v, rows, cols = to_trapezoid_form(whole(self.U), whole(self.V), rows, cols, self.ungauged, sizes, self.align)
        write_whole(self.U, u)
        write_whole(self.V, v)
        write_whole(self.widths, torch.stack([rows.width / rows.length, cols.width / cols.length]))
        write_whole(self.locations, torch.stack([rows.start / rows.length, cols.start / cols.length]))
        self.ungauged.fill_(False)
        self._gauge_is_free = False
        self._axes = None

    @property
    def pinned(self) -> Tensor | None:
        """(K,) bool, components whose intervals are not learned since their gauge is free; ``None``: there are none."""
        return self.ungauged if self._gauge_is_free else None

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
            for parameter, dim in self._component_parameters():
                keep_components(parameter, dim, keep, optimizers)
            self.ungauged = self.ungauged[keep]
            self._axes = None
        return dropped

    def _component_parameters(self) -> tuple[tuple[nn.Parameter, int], ...]:
        """The parameters that hold one entry per component, and along which dimension."""
        return (self.U, 0), (self.V, 0), (self.widths, 1), (self.locations, 1)

    def _structure_parameters(self) -> tuple[Tensor, Tensor]:
        """Widths and locations as they enter the masks.

        Without gradient once the structure is frozen; the whole axes where the gauge is free.
        """
        if self.widths.dtype.itemsize < 4:
            raise GBLRError(
                f"structured layer: its widths arrive in {self.widths.dtype}, too coarse for intervals; under FSDP2 "
                "use autocast instead of MixedPrecisionPolicy(param_dtype=...)"
            )
        widths: Tensor = self.widths.detach() if self._structure_frozen else self.widths
        locations: Tensor = self.locations.detach() if self._structure_frozen else self.locations
        if self._gauge_is_free:
            return torch.where(self.ungauged, 1.0, widths), torch.where(self.ungauged, 0.0, locations)
        return widths, locations

    def _row_factors(self) -> Tensor:
        """U, through which widths and locations get gradients of zero where they must have one."""
        return attach(self.U, (self.widths, self.locations)) if self._attached else self.U

    def masks(self) -> tuple[Tensor, Tensor]:
        """Row mask (K, m / s) and column mask (K, n), differentiable in widths and locations."""
        widths, locations = self._structure_parameters()
        return (
            table_mask(widths[0], locations[0], self.row_tables, self.align[0]),
            table_mask(widths[1], locations[1], self.column_tables, self.align[1]),
        )

    def masked_factors(self) -> tuple[Tensor, Tensor]:
        """Row factors (K, m / s) and column factors (K, n) under their masks."""
        (row_width, col_width), (row_start, col_start) = (part.unbind() for part in self._structure_parameters())
        return (
            masked_factor(self._row_factors(), row_width, row_start, self.row_tables, self.align[0]),
            masked_factor(self.V, col_width, col_start, self.column_tables, self.align[1]),
        )

    def to_dense(self) -> Tensor:
        """The (m, n) matrix of the present, possibly smooth, masks; differentiable."""
        return self._dense(*self.masked_factors())

    def _dense(self, u: Tensor, v: Tensor, rows: MaskedAxis | None = None) -> Tensor:
        if rows is not None:
            return block_dense(u, v, rows)
        s = self.row_splits
        if s == 1:
            return u.T @ v
        return torch.bmm(u.view(s, -1, u.shape[1]).transpose(1, 2), v.view(s, -1, v.shape[1])).flatten(0, 1)

    @torch.no_grad()
    def structure(self) -> StructuredMatrix:
        """A copy of the present integer structure and its factors, without dead components.

        A low-rank part in a free gauge is given as the trapezoids that it is counted as.
        """
        rows, cols = self.intervals()
        sizes = (self.U.shape[0] // self.row_splits,) * self.row_splits
        u, v = whole(self.U), whole(self.V)
        if self._gauge_is_free:
            u, v, rows, cols = to_trapezoid_form(u, v, rows, cols, self.ungauged, sizes, self.align)
        return StructuredMatrix.from_factors(u, v, rows, cols, sizes).live()

    def frozen_structure(self) -> StructuredMatrix:
        """:meth:`structure`, which is what the layer computes once its masks are exact boxcars.

        Raises:
            ConfigError: If the masks are still smooth.
        """
        if not self.hard:
            raise ConfigError(
                f"its masks are still smooth (sigma {self.sigma:g}); finish training or call freeze_structure() before "
                "converting"
            )
        return self.structure()

    def freeze_factors(self) -> None:
        """Fix the factors as they are; the bias still trains if it did."""
        for factor in (self.U, self.V):
            factor.requires_grad_(False)
            factor.grad = None

    def _choose_product(self, positions: int, linear: bool) -> Product:
        """The product of masked factors with fewest multiply-adds over ``positions`` inputs."""
        blocks = self._blocks_allowed() and not torch.compiler.is_compiling() and not transformed()
        axes = self._masked_axes if blocks else None
        return choose_product(positions, self.U.shape[0], self.matrix_shape, self.row_splits, axes, linear=linear)

    def _blocks_allowed(self) -> bool:
        """On a GPU, lists cost a synchronisation, and many small products more than they save."""
        return self.widths.device.type == "cpu"

    def _masked_axes(self) -> tuple[MaskedAxis, MaskedAxis]:
        """Rows and columns by blocks for the present structure, remembered until it changes."""
        if self._axes is not None and self._structure_frozen:
            return self._axes
        rows, cols = self._mask_intervals()
        # Compared by value: optimizers that write to `.data` leave no other trace. A change of sigma has cleared them.
        if self._axes is None or not all(
            torch.equal(old.width, new.width) and torch.equal(old.start, new.start)
            for old, new in zip(self._axes, (rows, cols), strict=True)
        ):
            # One empty side still has a gradient, and may come back, until the structure is frozen.
            empty_rows, empty_cols = rows.width == 0, cols.width == 0
            skip = empty_rows | empty_cols if self._structure_frozen else empty_rows & empty_cols
            axes = []
            for part, tables, splits in ((rows, self.row_tables, self.row_splits), (cols, self.column_tables, 1)):
                reach = 0 if self._structure_frozen else mask_reach(part.length, self._sigma)
                blocks = active_blocks(part.width, part.start, part.length, reach, skip, splits)
                axes.append(MaskedAxis(blocks, tables, part.width, part.start))
            self._axes = axes[0], axes[1]
        return self._axes

    # -- module plumbing ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def train(self, mode: bool = True) -> Any:
        """As of every module; mask tables that hold anything else than they should are written anew.

        ``from_pretrained`` of transformers, which prepares a model where it is given a ``TorchAoConfig`` of a
        ``GBLRConfig``, puts uninitialised memory in place of all buffers that files do not hold, and then calls
        ``eval()``.
        """
        for tables, n in zip((self.row_tables, self.column_tables), self.axis_lengths, strict=True):
            if tables.is_meta or self.widths.is_meta:
                continue
            if not torch.equal(tables, mask_tables(n, self._sigma, tables.dtype, tables.device, hard=self._hard)):
                self._refresh_buffers()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # `.half()` must not round the structure: 11 bits cannot address an axis of 4096. Sigma is kept as it was set.
        keep: list[Tensor] = [self.widths, self.locations, self.row_tables, self.column_tables, self.smoothness]
        keep += [part.grad for part in keep if part.grad is not None]
        wide = {id(part) for part in keep}

        def guarded(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrowed = moved.is_floating_point() and moved.dtype.itemsize < (8 if tensor is smoothness else 4)
            return tensor.to(device=moved.device) if id(tensor) in wide and narrowed else moved

        smoothness, dtype, device = self.smoothness, self.row_tables.dtype, self.row_tables.device
        super()._apply(guarded, recurse)  # type: ignore[no-untyped-call]  # untyped in torch
        if (self.row_tables.dtype, self.row_tables.device) != (dtype, device):
            self._refresh_buffers()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for parameter, name in ((self.U, "U"), (self.V, "V"), (self.widths, "widths"), (self.locations, "locations")):
            saved = state_dict.get(prefix + name)
            # A state saved after compaction has fewer components: the parameter takes their number.
            dim = 0 if name in "UV" else 1
            if saved is None or saved.dim() != 2 or saved.shape[dim] == parameter.shape[dim]:
                continue
            if saved.shape[dim] % self.row_splits == 0 and saved.shape[1 - dim] == parameter.shape[1 - dim]:
                replace_storage(parameter, parameter.new_empty(saved.shape))
        if prefix + "U" in state_dict:  # older states lack these; one of other layers says nothing about them
            state_dict.setdefault(prefix + "ungauged", torch.zeros(self.U.shape[0], dtype=torch.bool))
            state_dict.setdefault(prefix + "hard_masks", torch.tensor(False))
        saved = state_dict.get(prefix + "ungauged")
        if saved is not None and saved.shape != self.ungauged.shape and saved.shape == self.U.shape[:1]:
            self.ungauged = self.ungauged.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not self.smoothness.is_meta:
            self._gauge_is_free = bool(self.ungauged.any())
            value = float(self.smoothness)
            self._sigma = None if math.isinf(value) else value
            self._hard = bool(self.hard_masks)
            if bool(self.frozen) != self._structure_frozen:
                self._mark_frozen(bool(self.frozen))
            self._refresh_buffers()

    def extra_repr(self) -> str:
        """Sizes, number of components, splits, tiles and smoothness, for ``print(model)``."""
        splits = f", row_splits={self.row_splits}" if self.row_splits > 1 else ""
        align = f", align={self.align}" if self.align != (1, 1) else ""
        sigma = "boxcar" if self.sigma is None else f"{self.sigma:g}"
        return f"{super().extra_repr()}, components={self.U.shape[0]}{splits}{align}, sigma={sigma}"


def check_align(align: int | tuple[int, int]) -> tuple[int, int]:
    """The tile (rows, columns) that ``align`` means.

    Raises:
        ConfigError: Unless it is a positive integer or a pair of them.
    """
    pair = tuple(align) if isinstance(align, (tuple, list)) else (align, align)
    if len(pair) != 2 or any(not isinstance(tile, int) or tile < 1 for tile in pair):
        raise ConfigError(f"align: need a positive integer or a pair of them, got {align!r}")
    return pair[0], pair[1]
