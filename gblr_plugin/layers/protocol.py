"""The protocol of structured layers: what reports, conversion and files call on a layer of any family."""

from __future__ import annotations

from torch import nn

from ..matrix.structure import StructuredMatrix

__all__ = ["StructuredLayer"]


class StructuredLayer(nn.Module):
    """A trainable module whose weight is a structured (m, n) matrix: :class:`GBLRLayer` and the layers of families.

    Attributes:
        structure_name: Name of the family, as the report shows it.
    """

    structure_name: str

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(m, n) of the weight matrix."""
        raise NotImplementedError

    @property
    def stored(self) -> int:
        """Number of stored factor entries."""
        raise NotImplementedError

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of one matrix-vector product, or of one output position of a convolution."""
        return self.stored

    @property
    def num_components(self) -> int:
        """Number of live components; 0 of a family that has none."""
        return 0

    @property
    def structure_frozen(self) -> bool:
        """Whether the structure is fixed and the factors alone train; always so in families but GBLR."""
        return True

    @property
    def sigma(self) -> float | None:
        """Smoothness of the masks; ``None``: there are none, or exact boxcars."""
        return None

    @property
    def relative_flops(self) -> float:
        """Multiply-adds over m * n; above 1 before learning has shrunk a start of full widths."""
        m, n = self.matrix_shape
        return self.multiply_adds / (m * n)

    def factors(self) -> dict[str, nn.Parameter]:
        """The parameters by name whose products are the weight."""
        raise NotImplementedError

    def frozen_structure(self) -> StructuredMatrix | None:
        """A copy of the weight as the GBLR matrix that conversion freezes.

        Returns:
            ``None`` if the layer keeps its own product when it is converted, see :meth:`freeze_factors`.

        Raises:
            ConfigError: If a frozen copy would not compute what the layer computes.
        """
        raise NotImplementedError

    def freeze_factors(self) -> None:
        """Fix the factors as they are; the bias still trains if it did."""
        for factor in self.factors().values():
            factor.requires_grad_(False)
            factor.grad = None
