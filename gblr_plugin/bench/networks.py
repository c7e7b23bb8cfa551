"""Networks of well-known shapes for the benchmark, dense or with random structure: no weights, no other packages."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["GPT", "ViT", "replace_weights"]


class Block(nn.Module):
    """Pre-norm transformer block; ``caches`` hold the keys and values of earlier positions, (heads, length, d)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, caches: tuple[Tensor, Tensor] | None = None, at: int = 0) -> Tensor:
        """Map x (batch, tokens, width); with caches for a batch of one, at positions from ``at`` on."""
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if caches is not None:
            for cache, new in zip(caches, (k, v), strict=True):
                cache[:, at : at + tokens] = new[0]
            k, v = (cache[None, :, : at + tokens] for cache in caches)
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(y.transpose(1, 2).reshape(batch, tokens, width))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x


class ViT(nn.Module):
    """Image classifier in the shape of ViT-Base/16: 224 x 224 pixels, 197 tokens of 768."""

    def __init__(self, width: int = 768, depth: int = 12, heads: int = 12, classes: int = 1000) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.first = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(torch.randn(1, 197, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (batch, 3, 224, 224) to logits (batch, classes)."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], dim=1) + self.places
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x)[:, 0])
        return logits


class GPT(nn.Module):
    """Language model in the shape of GPT-2 small, decoding one token at a time with a cache."""

    def __init__(
        self, width: int = 768, depth: int = 12, heads: int = 12, words: int = 50257, length: int = 1024
    ) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)
        self.head.weight = self.words.weight
        self.caches = [tuple(torch.zeros(2, heads, length, width // heads).unbind()) for _ in range(depth)]

    def decode(self, start: int, tokens: int, word: int = 0, head: bool = True) -> int:
        """Decode greedily some tokens, the first at position ``start``; earlier positions as the caches hold them.

        Args:
            start: Position of the first token.
            tokens: Number of tokens.
            word: The token there.
            head: Apply the vocabulary head; without it every token is followed by the same.

        Returns:
            The last token.
        """
        for at in range(start, start + tokens):
            x = (self.words.weight[word] + self.places.weight[at]).view(1, 1, -1)
            for block, caches in zip(self.blocks, self.caches, strict=True):
                x = block(x, caches, at)
            if head:
                word = int(self.head(self.norm(x)).argmax())
        return word


@torch.no_grad()
def replace_weights(network: nn.Module, names: tuple[str, ...], make: Callable[[str, nn.Linear, int], Tensor]) -> None:
    """Give the named linear layers of every block another weight; ``make(name, layer, number)`` returns it."""
    number = 0
    for block in network.modules():
        if isinstance(block, Block):
            for name in names:
                layer = getattr(block, name)
                layer.weight = nn.Parameter(make(name, layer, number), requires_grad=False)
                number += 1
