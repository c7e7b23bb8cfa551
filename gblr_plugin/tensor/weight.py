"""Checks of a frozen weight's buffers, and the protocol by which lower files use a ``GBLRTensor`` without importing it.

A weight may come from a file, ``__tensor_unflatten__`` or an assignment. Its buffers are therefore checked before a
kernel reads them through raw addresses.
"""

from __future__ import annotations

from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import ConfigError
from ..kernels import product
from ..kernels.direct import Launcher, launcher
from ..kernels.layout import Layout
from ..kernels.plan import Plan
from ..kernels.soundness import check_index, check_sizes, is_known, vouch
from ..matrix.structure import StructuredMatrix
from ._compat import skip

__all__ = ["BUFFERS", "STATE", "Checked", "Weight", "check_state", "checked", "look", "taps_of"]

STATE = {"factors", "lists", "packing", "plan", "outer_shape"}  # what files must hold
BUFFERS = STATE | {"scales", "matrix"}
_MOST_UNPACKED = 64  # times the factors: how large a matrix is made of what a file claims


class Weight(Protocol):
    """The attributes and methods of a GBLRTensor that the files below ``gblr_tensor.py`` use."""

    factors: Tensor
    lists: Tensor
    packing: Layout
    plan: Plan
    outer_shape: tuple[int, ...]
    scales: Tensor | None
    matrix: Tensor | None
    dtype: torch.dtype
    device: torch.device
    shape: torch.Size
    _checks: Checked | None

    def is_inference(self) -> bool:
        """Whether the weight was made in inference mode, as for torch's tensors."""

    def dense_beside(self) -> Tensor | None:
        """The matrix that the plan asks for beside the factors."""

    def to_dense(self) -> Tensor:
        """The matrix in the outer shape."""

    def components(self) -> tuple[StructuredMatrix, Tensor | None]:
        """The components with factors as they are kept, and their scales."""

    def _apply_fn_to_data(self, function: Any) -> Any:
        """The weight with a function applied to each of its buffers."""


def taps_of(shape: tuple[int, ...]) -> int | None:
    """``prod(kernel)`` of the weight of a convolution, ``None`` for that of a linear layer."""
    return prod(shape[2:]) if len(shape) > 2 else None


class Checked:
    """The buffers of a weight that were found sound, and the direct call of its kernels. Files never hold it."""

    __slots__ = (
        *("call", "packing", "plan", "version"),
        *("factors", "factors_at", "lists", "lists_at", "scales", "scales_at"),
    )

    def __init__(self, weight: Weight) -> None:
        self.packing, self.plan = weight.packing, weight.plan
        self.factors, self.lists, self.scales = weight.factors, weight.lists, weight.scales
        self.factors_at, self.lists_at = self.factors.data_ptr(), self.lists.data_ptr()
        self.scales_at = 0 if self.scales is None else self.scales.data_ptr()
        self.version = self.lists._version
        self.call: Launcher | None = self._first

    def _first(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """Make the direct call when it is first used; intermediate weights never use it."""
        self.call = launcher(self.packing, self.plan, self.factors, self.lists, self.scales)
        return None if self.call is None else self.call(x, bias)

    @skip
    def holds(self) -> bool:
        """Whether the buffers have the same addresses and the lists are unchanged; called before every product."""
        lists, scales = self.lists, self.scales
        return (
            lists._version == self.version
            and lists.data_ptr() == self.lists_at
            and self.factors.data_ptr() == self.factors_at
            and (scales is None or scales.data_ptr() == self.scales_at)
        )

    def __deepcopy__(self, memo: Any) -> None:
        """Return nothing: a copy of a weight is checked itself."""


def checked(weight: Weight) -> Checked | None:
    """The checks of a weight, made anew if its buffers changed; ``None`` in traces and for tensors without memory.

    Raises:
        ConfigError: If the buffers do not hold what the layout says.
    """
    if torch.compiler.is_compiling():
        return None
    checks = weight._checks
    return checks if type(checks) is Checked and checks.holds() else look(weight)


@torch.compiler.disable
def look(weight: Weight) -> Checked | None:
    """Check the buffers of a weight that are not known to be sound, and make the matrix that its plan asks for."""
    if not weight.__dict__.keys() >= BUFFERS:
        raise ConfigError("GBLR tensor: it has no state, as if a file had named its class alone")
    check_state(weight)
    buffers = (weight.factors, weight.lists, *(() if weight.scales is None else (weight.scales,)))
    if weight.lists.is_meta or not product.is_plain(*buffers):
        return None
    if not is_known(weight.lists, weight.packing):
        # A copy: others may hold a file's memory, and tensors of inference mode do not count their changes.
        with torch.inference_mode(False), torch.no_grad():
            lists = weight.lists.detach().clone()
            check_index(weight.packing, lists)
            vouch(lists, weight.packing)
            weight.lists = lists
    if weight.matrix is None and _is_believable(weight):
        weight.matrix = weight.dense_beside()
    weight._checks = checks = Checked(weight)
    return checks


def check_state(weight: Weight) -> None:
    """Raise unless layout, plan, shapes and sizes fit together; no value of a buffer is read."""
    layout, plan, shape, matrix = weight.packing, weight.plan, weight.outer_shape, weight.matrix
    check_sizes(layout, weight.factors, weight.lists, weight.scales)
    if type(plan) is not Plan or not vars(plan):
        raise ConfigError("GBLR tensor: it has no plan")
    m, n = layout.shape
    sizes = shape if type(shape) is tuple and all(type(size) is int for size in shape) else ()
    if len(sizes) not in (2, 3, 4) or min(sizes) < 1 or sizes[0] != m or prod(sizes[1:]) != n:
        raise ConfigError(f"GBLR tensor: its shape {shape!r} does not fit its {m} x {n} layout")
    taps = taps_of(sizes)
    if taps is not None and (layout.transposed or any(block.stop % taps for block in layout.col_blocks)):
        raise ConfigError("GBLR tensor: its blocks of columns do not hold whole channels")
    like = weight.factors if weight.scales is None else weight.scales
    if tuple(weight.shape) != sizes or weight.dtype != like.dtype or weight.device != like.device:
        raise ConfigError(
            f"GBLR tensor: it claims {tuple(weight.shape)}, {weight.dtype} on {weight.device}, "
            f"its buffers are {sizes}, {like.dtype} on {like.device}"
        )
    wanted = sizes, like.dtype, like.device
    if matrix is not None and (not isinstance(matrix, Tensor) or (matrix.shape, matrix.dtype, matrix.device) != wanted):
        raise ConfigError("GBLR tensor: the matrix beside its factors is of another shape, dtype or device")


def _is_believable(weight: Weight) -> bool:
    """Whether the matrix is not much larger than the factors: a file may claim any shape.

    Plans keep a matrix only where the factors are a good share of it.
    """
    return prod(weight.packing.shape) <= _MOST_UNPACKED * max(weight.factors.numel(), 4096)
