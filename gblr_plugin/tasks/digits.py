"""A small vision transformer on scikit-learn's handwritten digits (1797 images of 8 x 8, embedded in the library)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from ..errors import ConfigError
from .base import BuiltInTask, PairsDataModule, check_sizes, make_network
from .transformer import Block, check_dropout

__all__ = ["DigitsTask", "ShiftedImages", "VisionTransformer"]


class VisionTransformer(nn.Module):
    """Vision transformer for square one-channel images, mean-pooled.

    Args:
        image_size: Height and width in pixels.
        patch_size: Side of a patch, a divisor of ``image_size``.
        dim: Width of the residual stream.
        depth: Number of blocks.
        heads: Attention heads, a divisor of ``dim``.
        mlp_ratio: Hidden width of the MLPs over ``dim``.
        classes: Number of classes.
        dropout: Dropout rate on the residual branches.

    Raises:
        ConfigError: If sizes do not divide.
    """

    def __init__(
        self,
        image_size: int = 8,
        patch_size: int = 2,
        dim: int = 64,
        depth: int = 4,
        heads: int = 4,
        mlp_ratio: int = 2,
        classes: int = 10,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_dropout(dropout)
        check_sizes(image_size=image_size, patch_size=patch_size, dim=dim, depth=depth, heads=heads)
        check_sizes(mlp_ratio=mlp_ratio, classes=classes)
        if image_size % patch_size or dim % heads:
            raise ConfigError(
                f"model: patch_size {patch_size} must divide image_size {image_size}, and heads {heads} dim {dim}"
            )
        tokens = (image_size // patch_size) ** 2
        self.patch = nn.Conv2d(1, dim, patch_size, stride=patch_size)
        self.position = nn.Parameter(0.02 * torch.randn(1, tokens, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 1, image_size, image_size) in [0, 1] to (batch, classes) logits."""
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        x = self.head(self.norm(x).mean(1))
        return x


class ShiftedImages(Dataset[tuple[Tensor, Tensor]]):
    """Labelled images, each time shifted at random by up to ``reach`` pixels; what comes in is black.

    Args:
        images: (N, 1, H, W).
        target: (N,) int64.
        reach: Pixels, at least 0.
    """

    def __init__(self, images: Tensor, target: Tensor, reach: int) -> None:
        self.padded = F.pad(images, (reach,) * 4)
        self.target, self.reach = target, reach
        self.size = images.shape[-2:]

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        top, left = torch.randint(2 * self.reach + 1, (2,)).tolist()
        height, width = self.size
        return self.padded[index, :, top : top + height, left : left + width], self.target[index]


class DigitsTask(BuiltInTask):
    """Classify handwritten digits.

    Args:
        held_out: Fraction of the images kept for evaluation, stratified by class.
        shift: Training images are shifted at random by up to this many pixels.
        **network: Arguments of :class:`VisionTransformer`.
    """

    layers = ["network.blocks.*"]

    def __init__(self, held_out: float = 0.25, shift: int = 0, **network: int | float) -> None:
        if not isinstance(held_out, float) or not 0 < held_out < 1:
            raise ConfigError(f"model: held_out must be a fraction in (0, 1), got {held_out!r}")
        if not isinstance(shift, int) or not 0 <= shift < 8:
            raise ConfigError(f"model: shift must be 0 to 7 pixels, got {shift!r}")
        self.held_out, self.shift = held_out, shift
        self._network = network

    def network(self) -> nn.Module:
        """A new vision transformer."""
        return make_network(VisionTransformer, **self._network)

    def data(self, seed: int, batch_size: int) -> PairsDataModule:
        """Stratified split by ``seed``."""
        from sklearn.datasets import load_digits  # with NNI, and only needed here
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
        target = torch.tensor(digits.target, dtype=torch.int64)
        train, test = train_test_split(
            torch.arange(len(target)).numpy(), test_size=self.held_out, random_state=seed, stratify=digits.target
        )
        sets = ShiftedImages(images[train], target[train], self.shift), ShiftedImages(images[test], target[test], 0)
        return PairsDataModule(*sets, batch_size, seed)

    def example_input(self, batch: int = 1) -> Tensor:
        """Random images in [0, 1]."""
        return torch.rand(batch, 1, 8, 8)
