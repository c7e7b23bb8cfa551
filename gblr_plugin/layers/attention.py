"""Attention whose projections are layers: ``nn.MultiheadAttention`` packs three weights in one parameter."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["PROJECTIONS", "ProjectedAttention", "take_projections"]

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""Names of the layers of a :class:`ProjectedAttention`."""


class _InLayers(Tensor):
    """Stands for a packed parameter; torch's fused kernels refuse subclasses, and so leave the product to layers."""


_IN_LAYERS = torch.empty(0).as_subclass(_InLayers)


class ProjectedAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with four linear layers: ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``.

    It computes what the packed module computes, mask for mask.

    Args:
        attention: Stays as it is; the layers have copies of its packed parameters, and its output projection's own.

    Shape:
        As ``nn.MultiheadAttention``.
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: Any

    in_proj_weight = in_proj_bias = property(lambda self: _IN_LAYERS)

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        nn.Module.__init__(self)  # not the base's: there are no packed weights to allocate
        for name in ("embed_dim", "kdim", "vdim", "num_heads", "dropout", "batch_first", "head_dim", "add_zero_attn"):
            setattr(self, name, getattr(attention, name))
        self._qkv_same_embed_dim = False  # which torch's fused kernels ask for
        self.bias_k, self.bias_v = attention.bias_k, attention.bias_v
        for name, (weight, bias) in _projections(attention).items():
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
            layer.weight = weight
            layer.bias = bias  # type: ignore[assignment]  # None where there is none
            setattr(self, name, layer)
        self.train(attention.training)

    def _reset_parameters(self) -> None:
        """Nothing: layers initialise themselves. Transformers calls it for all attention of torch."""

    def forward(  # the signature of the base
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; arguments and results as ``nn.MultiheadAttention`` has them.

        Raises:
            RuntimeError: If ``is_causal`` is given without ``attn_mask``, as there.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        batched = query.dim() == 3
        along = (0, 0) if batched and self.batch_first else (0, 1)  # the axes that are to be exchanged
        if not batched:
            query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        q, k, v = (
            layer(x.transpose(*along)) for layer, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (torch.cat([x, bias.expand(len(x), -1, -1)], 1) for x, bias in ((k, self.bias_k), (v, self.bias_v)))
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        mask = self._mask(attn_mask, key_padding_mask, q, k)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q / math.sqrt(self.head_dim) @ k.transpose(-2, -1)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            attended = weights @ v
        else:
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        output = self.out_proj(attended.transpose(1, 2).flatten(2)).transpose(*along)
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
        if not batched:
            output, weights = output.squeeze(1), None if weights is None else weights.squeeze(0)
        return output, weights

    def _mask(self, attention: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """What is added to the scores, to be broadcast to (batch, heads, queries, keys); ``None`` for nothing."""
        batch, (queries, keys) = len(q), (q.shape[2], k.shape[2])
        mask = None
        if attention is not None:
            mask = _added(attention, q.dtype)
            mask = mask.view(batch, self.num_heads, queries, -1) if mask.dim() == 3 else mask
            mask = F.pad(mask, (0, keys - mask.shape[-1]))  # bias_k and zeros may be attended to by all
        if padding is not None:
            padded = _added(padding, q.dtype).view(batch, 1, 1, -1)
            padded = F.pad(padded, (0, keys - padded.shape[-1]))
            mask = padded if mask is None else mask + padded
        return mask


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as numbers that are added: minus infinity where a boolean one says that nothing is to be attended to."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
    return mask.to(dtype)


def _projections(attention: nn.MultiheadAttention) -> dict[str, tuple[nn.Parameter, nn.Parameter | None]]:
    """Weights and biases of the four layers: copies of rows of the packed parameters, and those of ``out_proj``."""
    packed: Any = attention.in_proj_weight
    weights: list[Any] = [getattr(attention, f"{name}_weight") for name in PROJECTIONS[:3]]
    rows: Any = weights if packed is None else packed.chunk(3)
    bias: Any = attention.in_proj_bias
    biases: Any = (None, None, None) if bias is None else bias.chunk(3)

    def copied(values: Any, source: Any) -> Any:
        return None if values is None else nn.Parameter(values.detach().clone(), requires_grad=source.requires_grad)

    made = {
        name: (copied(weight, weight if packed is None else packed), copied(shift, bias))
        for name, weight, shift in zip(PROJECTIONS, rows, biases, strict=False)
    }
    out: Any = attention.out_proj
    return {**made, "out_proj": (out.weight, out.bias)}


@torch.no_grad()
def take_projections(attention: nn.MultiheadAttention, layers: ProjectedAttention) -> nn.MultiheadAttention:
    """Write the weights and biases of dense layers back into the attention that they were made of; returns it."""
    projections: list[Any] = [getattr(layers, name) for name in PROJECTIONS[:3]]
    weights = [layer.weight for layer in projections]
    if attention.in_proj_weight is None:
        for name, weight in zip(PROJECTIONS, weights, strict=False):
            _write(getattr(attention, f"{name}_weight"), weight)
    else:
        _write(attention.in_proj_weight, torch.cat(weights))
    if attention.in_proj_bias is not None:
        _write(attention.in_proj_bias, torch.cat([layer.bias for layer in projections]))
    attention.train(layers.training)
    return attention


def _write(parameter: Tensor, values: Tensor) -> None:
    """Change a parameter where its values differ; graphs that a backward pass still needs stay sound otherwise."""
    if not parameter.is_meta and not torch.equal(parameter, values):
        parameter.copy_(values)
