"""The parameters and buffers of a GBLR layer: how they are initialised, moved, saved, loaded and dropped.

``base.py`` computes intervals, masks and products from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from ..matrix.gaudi_mask import mask_tables
from ..matrix.structure import StructuredMatrix
from .protocol import StructuredLayer

__all__ = ["MaskState", "StructureParameters"]


class MaskState(NamedTuple):
    """How the masks of a layer are made.

    Args:
        sigma: Smoothness; ``None`` is the exact boxcar.
        frozen: Whether widths and locations are fixed.
        low_rank: How many of the first components of each row split train in low-rank form; empty if none does.
    """

    sigma: float | None = None
    frozen: bool = False
    low_rank: tuple[int, ...] = ()

    def to_tensor(self) -> Tensor:
        """(2,) float64, as a state dict holds it: sigma, and 1 if the structure is frozen."""
        sigma = math.inf if self.sigma is None else self.sigma
        return torch.tensor([sigma, self.frozen], dtype=torch.float64)

    @classmethod
    def from_tensor(cls, values: Tensor, low_rank: tuple[int, ...]) -> MaskState:
        """Inverse of :meth:`to_tensor`."""
        sigma = float(values[0])
        return cls(None if math.isinf(sigma) else sigma, bool(values[1]), low_rank)


class StructureParameters(StructuredLayer):
    """Parameters and buffers of a GBLR layer, see :class:`~gblr_plugin.GBLRLayer`.

    The Python value ``_mask_state`` says how masks are made, and all buffers are computed from it: ``mask_state`` and
    ``low_rank_components`` are its copies for state dicts, ``row_tables`` and ``column_tables`` are (2, 3N) tables.
    """

    U: nn.Parameter
    V: nn.Parameter
    widths: nn.Parameter
    locations: nn.Parameter
    row_tables: Tensor
    column_tables: Tensor
    mask_state: Tensor
    low_rank_components: Tensor
    align: tuple[int, int]
    row_splits: int

    def _init_structure(self, matrix: StructuredMatrix, align: tuple[int, int], dtype: torch.dtype) -> None:
        """Register parameters that represent ``matrix`` exactly; splits are padded to one component count."""
        rows, cols = matrix.rows, matrix.cols
        device = matrix.u.device
        structure_dtype = torch.promote_types(dtype, torch.float32)
        self.U, self.V, self.widths, self.locations = map(nn.Parameter, _values_of(matrix, dtype))
        self.align = align
        self.row_splits = len(matrix.split_sizes)
        self._mask_state = MaskState()
        self._keeps_gradients = False
        self.register_buffer("mask_state", self._mask_state.to_tensor().to(device))
        self.register_buffer("low_rank_components", self._in_low_rank_form(device))
        for name, axis in (("row_tables", rows.length), ("column_tables", cols.length)):
            tables = mask_tables(axis, None, structure_dtype, device)
            self.register_buffer(name, tables, persistent=False)

    @property
    def axis_lengths(self) -> tuple[int, int]:
        """(m / s, n): what a normalised width of 1 covers."""
        return self.U.shape[1], self.V.shape[1]

    def _component_sizes(self) -> tuple[int, ...]:
        """Number of components of each row split."""
        return (self.U.shape[0] // self.row_splits,) * self.row_splits

    # -- the state of the masks --------------------------------------------------------------------------------------

    def _set_mask_state(self, **changes: Any) -> None:
        self._mask_state = self._mask_state._replace(**changes)
        self._write_buffers()
        if "low_rank" in changes:
            self.low_rank_components.copy_(self._in_low_rank_form(self.low_rank_components.device))

    @torch.no_grad()
    def _write_buffers(self) -> None:
        """Compute all buffers from ``_mask_state``, after it or the dtype, device or memory of the buffers changed."""
        self._structure_changed()
        for (name, tables), n in zip(self._tables(), self.axis_lengths, strict=True):
            new = self._new_tables(n, tables.dtype, self.widths.device)
            if tables.device == self.widths.device:
                tables.copy_(new)
            else:  # a meta layer whose parameters were assigned from a state dict
                setattr(self, name, new)
        self.mask_state.copy_(self._mask_state.to_tensor(), non_blocking=True)

    def _structure_changed(self) -> None:
        """Clear the values that are cached for the present structure; called when the structure changes."""

    def _tables(self) -> tuple[tuple[str, Tensor], tuple[str, Tensor]]:
        return ("row_tables", self.row_tables), ("column_tables", self.column_tables)

    def _new_tables(self, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return mask_tables(n, self._mask_state.sigma, dtype, device)

    def _in_low_rank_form(self, device: torch.device) -> Tensor:
        """(K,) bool, the components that train in low-rank form."""
        ranks = torch.tensor(self._mask_state.low_rank or (0,) * self.row_splits, device=device)
        return (torch.arange(self._component_sizes()[0], device=device) < ranks[:, None]).flatten()

    def _ranks(self, low_rank_components: Tensor) -> tuple[int, ...]:
        """How many components of each split train in low-rank form; empty if none does."""
        ranks = tuple(low_rank_components.view(self.row_splits, -1).sum(1).tolist())
        return ranks if any(ranks) else ()

    def _mark_frozen(self, frozen: bool, keep_gradients: bool = False) -> None:
        """Fix or free widths and locations; with ``keep_gradients`` they still receive gradients, of zero."""
        self._keeps_gradients = keep_gradients
        if frozen:
            self._set_mask_state(sigma=None, frozen=True)
        else:
            self._set_mask_state(frozen=False)
        for parameter in (self.widths, self.locations):
            parameter.requires_grad_(keep_gradients or not frozen)
            parameter.grad = None

    # -- dropping components -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _keep_components(self, keep: Tensor, optimizers: Iterable[Optimizer]) -> None:
        """Keep the components ``keep``, (K',) int64, in the parameters and in the optimizers' state."""
        for parameter, dim in ((self.U, 0), (self.V, 0), (self.widths, 1), (self.locations, 1)):
            _keep_entries(parameter, dim, keep, optimizers)
        self.low_rank_components = self.low_rank_components[keep]
        self._set_mask_state(low_rank=self._ranks(self.low_rank_components))

    # -- another matrix ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def take_matrix(self, matrix: StructuredMatrix, optimizers: Iterable[Optimizer] = (), *, slots: int = 1) -> None:
        """Make a matrix of this layer's shape and row splits the layer's weight.

        Parameters keep their identity, take as many components as the matrix needs, and lose their gradients and their
        state in the optimizers, which was of other components.

        Args:
            matrix: The new weight; its low-rank part in trapezoid form.
            optimizers: Those that hold the layer's parameters.
            slots: Least number of components of each split; those that the matrix does not need have no width.
        """
        values = _values_of(matrix.to(device=self.U.device), self.U.dtype, slots)
        for parameter, value in zip((self.U, self.V, self.widths, self.locations), values, strict=True):
            if parameter.shape == value.shape:
                parameter.copy_(value)
                parameter.grad = None
            else:
                _replace_storage(parameter, value.to(parameter.dtype))
            for optimizer in optimizers:
                optimizer.state.pop(parameter, None)
        self.low_rank_components = self.low_rank_components.new_zeros(self.U.shape[0])
        self._set_mask_state(low_rank=())

    # -- what torch does to every module -----------------------------------------------------------------------------

    @torch.no_grad()
    def train(self, mode: bool = True) -> Any:
        """Set the training mode as for every module, and rewrite buffers that hold wrong values.

        ``from_pretrained`` of transformers, which prepares a model where it is given a ``TorchAoConfig`` of a
        ``GBLRConfig``, puts uninitialised memory in place of all buffers that files do not hold, and then calls
        ``eval()``.
        """
        if not (self.row_tables.is_meta or self.widths.is_meta):
            expected = [self._new_tables(n, self.row_tables.dtype, self.row_tables.device) for n in self.axis_lengths]
            expected.append(self._in_low_rank_form(self.low_rank_components.device))
            expected.append(self._mask_state.to_tensor().to(self.mask_state.device))
            buffers = self.row_tables, self.column_tables, self.low_rank_components, self.mask_state
            if not all(map(torch.equal, buffers, expected)):
                self._set_mask_state(low_rank=self._mask_state.low_rank)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # `.half()` must not round the structure: 11 bits cannot address an axis of 4096. Sigma is kept as it was set.
        keep: list[Tensor] = [self.widths, self.locations, self.row_tables, self.column_tables, self.mask_state]
        keep += [tensor.grad for tensor in keep if tensor.grad is not None]
        wide = {id(tensor) for tensor in keep}
        mask_state, dtype, device = self.mask_state, self.row_tables.dtype, self.row_tables.device

        def guarded(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrowed = moved.is_floating_point() and moved.dtype.itemsize < (8 if tensor is mask_state else 4)
            return tensor.to(device=moved.device) if id(tensor) in wide and narrowed else moved

        super()._apply(guarded, recurse)  # type: ignore[no-untyped-call]  # untyped in torch
        if (self.row_tables.dtype, self.row_tables.device) != (dtype, device):
            self._write_buffers()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for parameter, name in ((self.U, "U"), (self.V, "V"), (self.widths, "widths"), (self.locations, "locations")):
            saved = state_dict.get(prefix + name)
            # A state saved after compaction has fewer components: the parameter takes their number.
            dim = 0 if name in "UV" else 1
            if saved is None or saved.dim() != 2 or saved.shape[dim] == parameter.shape[dim]:
                continue
            if saved.shape[dim] % self.row_splits == 0 and saved.shape[1 - dim] == parameter.shape[1 - dim]:
                _replace_storage(parameter, parameter.new_empty(saved.shape))
        saved = state_dict.get(prefix + "low_rank_components")
        if saved is not None and saved.shape != self.low_rank_components.shape and saved.shape == self.U.shape[:1]:
            self.low_rank_components = self.low_rank_components.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "mask_state" in state_dict and not self.mask_state.is_meta:
            was_frozen, ranks = self._mask_state.frozen, self._ranks(self.low_rank_components)
            self._mask_state = MaskState.from_tensor(self.mask_state, ranks)
            if self._mask_state.frozen != was_frozen:
                self._mark_frozen(self._mask_state.frozen)
            self._write_buffers()
        self._structure_changed()

    def extra_repr(self) -> str:
        """Sizes, number of components, splits, tiles and smoothness, for ``print(model)``."""
        splits = f", row_splits={self.row_splits}" if self.row_splits > 1 else ""
        align = f", align={self.align}" if self.align != (1, 1) else ""
        sigma = "boxcar" if self._mask_state.sigma is None else f"{self._mask_state.sigma:g}"
        return f"{super().extra_repr()}, components={self.U.shape[0]}{splits}{align}, sigma={sigma}"


def _values_of(matrix: StructuredMatrix, dtype: torch.dtype, least: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """U, V, widths and locations of a matrix, every split padded to one count of at least ``least`` components."""
    sizes = matrix.split_sizes
    most = max(*sizes, least)
    rows, cols = matrix.rows, matrix.cols

    def padded(values: Tensor) -> Tensor:
        blocks = [
            F.pad(block, (0, 0) * (block.dim() - 1) + (0, most - block.shape[0])) for block in values.split(sizes)
        ]
        return torch.cat(blocks)

    lengths = torch.tensor([[rows.length], [cols.length]], dtype=torch.float64, device=matrix.u.device)
    structure_dtype = torch.promote_types(dtype, torch.float32)
    widths = torch.stack([padded(rows.width), padded(cols.width)]) / lengths
    starts = torch.stack([padded(rows.start), padded(cols.start)]) / lengths
    factors = padded(matrix.u).to(dtype), padded(matrix.v).to(dtype)
    return *factors, widths.to(structure_dtype), starts.to(structure_dtype)


@torch.no_grad()
def _replace_storage(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a parameter other contents of another shape, keeping its identity, also while an old graph is alive."""
    parameter.grad = None
    parameter.set_(value)  # type: ignore[call-overload]  # `.data =` would leave the old shape in the graph's metadata


def _keep_entries(parameter: nn.Parameter, dim: int, keep: Tensor, optimizers: Iterable[Optimizer]) -> None:
    """Keep the entries ``keep`` along ``dim`` of a parameter, its gradient and its state in the optimizers."""
    before, grad = parameter.shape, parameter.grad
    _replace_storage(parameter, parameter.detach().index_select(dim, keep))
    if grad is not None:
        parameter.grad = grad.index_select(dim, keep)
    for optimizer in optimizers:
        state = optimizer.state.get(parameter, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim() == len(before) and value.shape[dim] == before[dim]:
                state[key] = value.index_select(dim, keep)
