"""A byte-level GPT on the source text of Python's own standard library, present wherever Python is."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data.text import STRETCH, Windows
from ..errors import ConfigError
from .base import BuiltInTask, PairsDataModule, check_sizes, make_network
from .transformer import Block, check_dropout

__all__ = ["ByteGPT", "TextTask"]


class ByteGPT(nn.Module):
    """Decoder-only transformer over bytes, with tied input and output embeddings.

    Args:
        context: Number of positions.
        dim: Width of the residual stream.
        depth: Number of blocks.
        heads: Attention heads, a divisor of ``dim``.
        mlp_ratio: Hidden width of the MLPs over ``dim``.
        dropout: Dropout rate on the residual branches.
    """

    def __init__(
        self,
        context: int = 128,
        dim: int = 128,
        depth: int = 4,
        heads: int = 4,
        mlp_ratio: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_dropout(dropout)
        check_sizes(context=context, dim=dim, depth=depth, heads=heads, mlp_ratio=mlp_ratio)
        if dim % heads:
            raise ConfigError(f"model: heads {heads} must divide dim {dim}")
        self.token = nn.Embedding(256, dim)
        self.position = nn.Parameter(0.02 * torch.randn(context, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio, dropout, causal=True) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        nn.init.normal_(self.token.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens) int64 bytes to (batch, tokens, 256) logits of the next byte."""
        h = self.token(x) + self.position[: x.shape[1]]
        for block in self.blocks:
            h = block(h)
        logits: Tensor = self.norm(h) @ self.token.weight.T
        return logits


class TextTask(BuiltInTask):
    """Predict the next byte of Python source.

    Args:
        folder: Where ``*.py`` files are read from; default the standard library.
        train_bytes: Most bytes of training text per seed, from files drawn by the seed.
        test_bytes: Most bytes of held-out text, from other files.
        context: Window length.
        **network: Further arguments of :class:`ByteGPT`.
    """

    metric = "perplexity"
    higher_is_better = False
    layers = ["network.blocks.*"]

    def __init__(
        self,
        folder: str | None = None,
        train_bytes: int = 1_000_000,
        test_bytes: int = 100_000,
        context: int = 128,
        **network: int | float,
    ) -> None:
        check_sizes(train_bytes=train_bytes, test_bytes=test_bytes, context=context)
        if folder is not None and not isinstance(folder, str):
            raise ConfigError(f"model: folder must be a path, got {folder!r}")
        self.folder = Path(folder or sysconfig.get_paths()["stdlib"])
        self.train_bytes, self.test_bytes, self.context = train_bytes, test_bytes, context
        self._network = network

    def network(self) -> nn.Module:
        """A new byte-level GPT."""
        return make_network(ByteGPT, context=self.context, **self._network)

    def _read(self, files: list[Path], limit: int) -> Tensor:
        text = bytearray()
        for file in files:
            text += file.read_bytes()
            if len(text) >= limit:
                break
        return torch.frombuffer(text[:limit], dtype=torch.uint8).clone()

    def data(self, seed: int, batch_size: int) -> PairsDataModule:
        """Integer files go to either side; which, is drawn by ``seed``."""
        files = sorted(self.folder.glob("*.py"))
        if len(files) < 10:
            raise ConfigError(f"data: looked for *.py files in {self.folder}, found {len(files)}; need at least 10")
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed)).tolist()
        cut = max(1, len(files) // 10)
        held_out = self._read([files[i] for i in order[:cut]], self.test_bytes)
        train = self._read([files[i] for i in order[cut:]], self.train_bytes)
        return PairsDataModule(
            Windows(train, self.context, self.context // 2),
            Windows(held_out, self.context, self.context),
            batch_size,
            seed,
            stretch=STRETCH,
        )

    def example_input(self, batch: int = 1) -> Tensor:
        """Random bytes."""
        return torch.randint(0, 256, (batch, self.context))
