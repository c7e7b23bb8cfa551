"""MLP-Mixer: an image classifier of linear layers alone, alternately over patches and over channels."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from .base import check_sizes

__all__ = ["Mixer"]


class _MLP(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return output


class _Block(nn.Module):
    def __init__(self, tokens: int, dim: int, token_hidden: int, channel_hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.token_mlp, self.channel_mlp = _MLP(tokens, token_hidden), _MLP(dim, channel_hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, dim) to the same."""
        x = x + self.token_mlp(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channel_mlp(self.norm2(x))
        return x


class Mixer(nn.Module):
    """MLP-Mixer for square images (Tolstikhin et al. 2021); the defaults are Mixer-S/16.

    Args:
        classes: Number of classes.
        image_size: Height and width in pixels.
        patch_size: Side of a patch, a divisor of ``image_size``.
        hidden_size: Channels.
        num_hidden_layers: Number of blocks.
        tokens_mlp_size: Hidden width of the MLPs over patches.
        channels_mlp_size: Hidden width of the MLPs over channels.

    Raises:
        ConfigError: If a size is no positive whole number, or patches do not fit the image.
    """

    def __init__(
        self,
        classes: int = 1000,
        image_size: int = 224,
        patch_size: int = 16,
        hidden_size: int = 512,
        num_hidden_layers: int = 8,
        tokens_mlp_size: int = 256,
        channels_mlp_size: int = 2048,
    ) -> None:
        super().__init__()
        check_sizes(classes=classes, image_size=image_size, patch_size=patch_size, hidden_size=hidden_size)
        check_sizes(num_hidden_layers=num_hidden_layers, tokens_mlp_size=tokens_mlp_size)
        check_sizes(channels_mlp_size=channels_mlp_size)
        if image_size % patch_size:
            raise ConfigError(f"model: patch_size {patch_size} must divide image_size {image_size}")
        tokens = (image_size // patch_size) ** 2
        self.patch = nn.Conv2d(3, hidden_size, patch_size, stride=patch_size)
        self.blocks = nn.ModuleList(
            _Block(tokens, hidden_size, tokens_mlp_size, channels_mlp_size) for _ in range(num_hidden_layers)
        )
        self.norm = nn.LayerNorm(hidden_size)
        self.head = nn.Linear(hidden_size, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, image_size, image_size) to (batch, classes) logits."""
        x = self.patch(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        x = self.head(self.norm(x).mean(1))
        return x
