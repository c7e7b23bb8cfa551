"""The transformer block that the built-in tasks share."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ..utils.validation import check_number

__all__ = ["Attention", "Block", "check_dropout"]


def check_dropout(value: object) -> None:
    """Refuse a dropout rate outside [0, 1).

    Raises:
        ConfigError: If so.
    """
    check_number("model: dropout", value, "[0, 1)")


class Attention(nn.Module):
    """Multi-head self-attention with a packed query-key-value projection."""

    def __init__(self, dim: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, dim) to the same."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        output: Tensor = self.proj(y.transpose(1, 2).flatten(2))
        return output


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, mlp_ratio: int, dropout: float = 0.0, causal: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, causal)
        self.fc1, self.fc2 = nn.Linear(dim, mlp_ratio * dim), nn.Linear(mlp_ratio * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, dim) to the same."""
        x = x + self.dropout(self.attn(self.norm1(x)))
        x = x + self.dropout(self.fc2(F.gelu(self.fc1(self.norm2(x)))))
        return x
