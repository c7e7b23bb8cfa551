"""The settings of one compression of a pretrained network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from ..surgery.row_splits import RowSplits, check_row_splits_given
from ..utils.validation import check_count, check_number, check_share, check_tile

__all__ = ["REFINE", "CompressionSettings"]

REFINE = 256
"""Steps of refinement for each block, unless they are given."""


@dataclass(frozen=True)
class CompressionSettings:
    """What a compression is asked for.

    Args:
        budget: Relative FLOPs of the compressed layers together, in (0, 1].
        family: Name of a structure family, see :func:`gblr_plugin.families.names`.
        layers: Full names, glob patterns or types of the layers to compress; ``None``: every layer that can gain.
        exclude: Names, patterns or types of layers that stay dense.
        allocation: Rule by which the budget is split over the layers; ``None``: the default.
        align: Tile of rows and columns to which intervals of GBLR matrices snap.
        row_splits: Number of matrices packed along the rows of a weight (packed query, key, value: 3); of all layers,
            or by full layer name; see :func:`~gblr_plugin.surgery.row_splits.row_splits_of`.
        refine: Steps of Adam for each block; 0: none.
        refine_lr: Its first learning rate.
        recover: Steps of distillation of the network from the dense one; 0: none.
        recover_lr: Its largest learning rate.
        factor_dtype: ``"int8"``: factors are rounded to 8 bits.
        damping: Added to the diagonal of second moments, as a fraction of its mean.
        seed: Seed of everything that is drawn.

    Raises:
        ConfigError: For a value out of range.
    """

    budget: float
    family: str = "gblr"
    layers: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    allocation: str | None = None
    align: int = 1
    row_splits: RowSplits = 1
    refine: int = REFINE
    refine_lr: float = 1e-3
    recover: int = 0
    recover_lr: float = 3e-4
    factor_dtype: str | None = None
    damping: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        check_share("compress: budget", self.budget, "relative FLOPs")
        check_tile("compress: align", self.align)
        check_count("compress: refine", self.refine, 0)
        check_count("compress: recover", self.recover, 0)
        check_number("compress: refine_lr", self.refine_lr, "(0, inf)")
        check_number("compress: recover_lr", self.recover_lr, "(0, inf)")
        check_number("compress: damping", self.damping, "[0, inf)")
        check_count("compress: seed", self.seed, 0)
        if self.factor_dtype not in (None, "int8"):
            raise ConfigError(f"compress: factor_dtype must be 'int8' or None, got {self.factor_dtype!r}")
        if self.align != 1 and self.family != "gblr":
            raise ConfigError(f"compress: align is for intervals of gblr; leave it out for {self.family!r}")
        check_row_splits_given("compress: row_splits", self.row_splits)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CompressionSettings:
        """Read what :meth:`to_dict` gives.

        Raises:
            ConfigError: For an unknown key or a value out of range.
        """
        unknown = [key for key in values if key not in cls.__dataclass_fields__]
        if unknown:
            raise ConfigError(
                f"compress: unknown setting {unknown[0]!r} (allowed: {', '.join(cls.__dataclass_fields__)})"
            )
        lists: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**lists)
