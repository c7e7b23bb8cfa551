"""The factored product in two triton kernels, for CUDA devices: bfloat16, float16, float32. Optional.

Stage 1 keeps the sums of a tile of components x tokens and walks over the column blocks that any of them meets; stage 2
keeps a tile of tokens x rows and walks over the components of its row block; both write their result once, so that no
atomics are needed and equal inputs give equal results. All sizes but the tiles are read from the index buffer on the
device: nothing is specialised per layer, nothing synchronises, and a CUDA graph can hold the calls.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import GROUP

__all__ = ["product"]


@triton.jit
def _stage_one(  # type: ignore[no-untyped-def]
    x,
    factors,
    lists,
    z,
    groups_at,
    tokens,
    x_stride,
    z_stride,
    components,
    COMPONENTS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    PER_GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    shift = tile * COMPONENTS % PER_GROUP
    head = lists + groups_at + 2 * (tile * COMPONENTS // PER_GROUP)
    pair = lists + tl.load(head)
    pairs = tl.load(head + 1)
    lane = tl.arange(0, COMPONENTS) + shift
    every = tl.arange(0, PER_GROUP)
    c = tl.arange(0, BLOCK)
    sums = tl.zeros((COMPONENTS, TOKENS), tl.float32)
    for _ in range(pairs):
        start, row = tl.load(pair), tl.load(pair + 2)
        width = BLOCK if EVEN else tl.load(pair + 1)
        low, high = tl.load(pair + 3), tl.load(pair + 4)
        active = (tl.where(lane < 32, low, high) >> (lane & 31)) & 1
        rank = tl.cumsum(active, 0) - active
        if COMPONENTS < PER_GROUP:
            earlier = (tl.where(every < 32, low, high) >> (every & 31)) & 1
            rank += tl.sum(tl.where(every < shift, earlier, 0), 0)
        if EVEN:
            row = tl.multiple_of(row, 16)
            start = tl.multiple_of(start, 16)
        inside = c < width
        v = tl.load(
            factors + (row + rank * width)[:, None] + c[None, :],
            mask=(active > 0)[:, None] & inside[None, :],
            other=0.0,
        )
        inputs = tl.load(
            x + start + t[None, :].to(tl.int64) * x_stride + c[:, None],
            mask=(t < tokens)[None, :] & inside[:, None],
            other=0.0,
        )
        sums = tl.dot(v, inputs, sums, input_precision=PRECISION)
        pair += 5
    k = tile * COMPONENTS + tl.arange(0, COMPONENTS)
    place = z + k[:, None].to(tl.int64) * z_stride + t[None, :]
    tl.store(place, sums.to(z.dtype.element_ty), mask=(k < components)[:, None])


@triton.jit
def _stage_two(  # type: ignore[no-untyped-def]
    z,
    factors,
    lists,
    bias,
    y,
    table_at,
    tokens,
    z_stride,
    y_stride,
    BIAS: tl.constexpr,
    COMPONENTS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    entry = lists + table_at + 5 * tl.program_id(0)
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    start, count = tl.load(entry), tl.load(entry + 2)
    width = BLOCK if EVEN else tl.load(entry + 1)
    members, data = lists + tl.load(entry + 3), tl.load(entry + 4)
    if EVEN:
        data = tl.multiple_of(data, 16)
    j = tl.arange(0, BLOCK)
    inside = j < width
    sums = tl.zeros((TOKENS, BLOCK), tl.float32)
    for at in range(0, count, COMPONENTS):
        i = at + tl.arange(0, COMPONENTS)
        k = tl.load(members + i, mask=i < count, other=0)
        parts = tl.load(z + k[None, :].to(tl.int64) * z_stride + t[:, None], mask=(i < count)[None, :], other=0.0)
        u = tl.load(
            factors + data + i[:, None] * width + j[None, :], mask=(i < count)[:, None] & inside[None, :], other=0.0
        )
        sums = tl.dot(parts, u, sums, input_precision=PRECISION)
    if BIAS:
        sums += tl.load(bias + start + j, mask=inside, other=0.0).to(tl.float32)[None, :]
    place = y + t[:, None].to(tl.int64) * y_stride + start + j[None, :]
    tl.store(place, sums.to(y.dtype.element_ty), mask=(t < tokens)[:, None] & inside[None, :])


def _tiles(tokens: int) -> tuple[dict[str, int], dict[str, int]]:
    """Tile sizes of both stages; few tokens want many programs, many tokens want large tiles."""
    if tokens <= 16:
        one = {"COMPONENTS": 16, "TOKENS": 16, "num_warps": 2, "num_stages": 4}
        two = {"COMPONENTS": 64, "TOKENS": 16, "num_warps": 4, "num_stages": 4}
    elif tokens <= 128:
        one = {"COMPONENTS": 32, "TOKENS": 64, "num_warps": 4, "num_stages": 4}
        two = {"COMPONENTS": 32, "TOKENS": 64, "num_warps": 4, "num_stages": 4}
    else:
        one = {"COMPONENTS": 64, "TOKENS": 128, "num_warps": 4, "num_stages": 4}
        two = {"COMPONENTS": 64, "TOKENS": 128, "num_warps": 4, "num_stages": 4}
    return one, two


def _power(width: int) -> int:
    return max(1 << (width - 1).bit_length(), 16)


def product(
    x: Tensor,
    factors: Tensor,
    lists: Tensor,
    bias: Tensor | None,
    cols_at: int,
    cols: int,
    col_groups_at: int,
    col_width: int,
    rows_at: int,
    rows: int,
    row_groups_at: int,
    row_width: int,
    components: int,
    out_features: int,
    tiles: tuple[dict[str, Any], dict[str, Any]] | None = None,
) -> Tensor:
    """``x @ W.T + bias`` for x (tokens, n); sizes as in the operator of ``compiled``, ``tiles`` to try others."""
    x = x if x.stride(1) == 1 else x.contiguous()
    tokens, n = x.shape
    y = x.new_empty(tokens, out_features)
    if tokens == 0:
        return y
    one, two = tiles or _tiles(tokens)
    block_tokens = max(one["TOKENS"], two["TOKENS"])
    padded = -(-tokens // block_tokens) * block_tokens
    z = x.new_empty(max(components, 1), padded)
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    if components:
        _stage_one[(-(-components // one["COMPONENTS"]), padded // one["TOKENS"])](
            x,
            factors,
            lists,
            z,
            col_groups_at,
            tokens,
            x.stride(0),
            padded,
            components,
            BLOCK=_power(col_width),
            EVEN=_power(col_width) == col_width and cols * col_width == n,
            PER_GROUP=GROUP,
            PRECISION=precision,
            **one,
        )
    _stage_two[(rows, padded // two["TOKENS"])](
        z,
        factors,
        lists,
        x if bias is None else bias,
        y,
        rows_at,
        tokens,
        padded,
        out_features,
        BIAS=bias is not None,
        BLOCK=_power(row_width),
        EVEN=_power(row_width) == row_width and rows * row_width == out_features,
        PRECISION=precision,
        **two,
    )
    return y
