"""The factored product in two triton kernels, for CUDA devices: bfloat16, float16, float32. Optional.

Stage 1 keeps the sums of a tile of components x tokens and walks over the column blocks that any of them meets; stage 2
keeps a tile of tokens x rows and walks over the components of its row block; both write their result once, so that no
atomics are needed and equal inputs give equal results. All sizes but the tiles are read from the index buffer on the
device: nothing is specialised per layer, nothing synchronises, and a CUDA graph can hold the calls.

Tiles are tuned on first use, once per stage, range of tokens, block size and dtype, by timing the few that suit the
number of tokens and the device's memory. While a graph is captured, in the interpreter, and with
``GBLR_TRITON_TUNE=0``, nothing is timed and the first of them is taken.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import GROUP

__all__ = ["product"]


_MOST_TOKENS = 1024  # beyond, the best tiles do not depend on the number of tokens


def _tokens_range(tokens: int) -> int:
    """Numbers of tokens that share their tiles: up to 16, and up to each larger power of two."""
    return min(max(1 << (tokens - 1).bit_length(), 16), _MOST_TOKENS)


def _config(components: int, tokens: int, warps: int, stages: int) -> triton.Config:
    return triton.Config({"COMPONENTS": components, "TOKENS": tokens}, num_warps=warps, num_stages=stages)


# The first that suits is the one taken without timing.
_ONE = [
    _config(16, 16, 2, 4),
    _config(64, 16, 4, 3),
    _config(32, 64, 4, 4),
    _config(64, 64, 4, 3),
    _config(64, 128, 4, 4),
    _config(64, 256, 8, 3),
    _config(64, 128, 8, 3),
]
_TWO = [
    _config(64, 16, 4, 4),
    _config(32, 16, 2, 5),
    _config(32, 64, 4, 4),
    _config(64, 64, 4, 3),
    _config(64, 128, 4, 4),
    _config(32, 128, 8, 4),
    _config(64, 256, 8, 3),
]


_SHARED_MEMORY = 96 << 10  # bytes per program where the device does not say


def _suitable(configs: Sequence[triton.Config], named: dict[str, Any], **constants: Any) -> list[triton.Config]:
    """Tiles of tokens that are neither mostly empty nor needlessly small, with as many stages as memory holds."""
    tokens, factors = named["tokens_range"], named["factors"]
    wanted = (16,) if tokens <= 16 else (64,) if tokens <= 128 else (128, 256)
    limit = _SHARED_MEMORY
    if factors.is_cuda:
        properties = torch.cuda.get_device_properties(factors.device)
        limit = getattr(properties, "shared_memory_per_block_optin", limit)
    found = []
    for config in configs:
        c, t, block = config.kwargs["COMPONENTS"], config.kwargs["TOKENS"], constants["BLOCK"]
        if t in wanted:  # a stage holds two of the three tiles; which two differs between the kernels
            stage = max(block * (c + t), c * (t + block)) * factors.element_size()
            stages = max(min(config.num_stages, limit // stage), 1)
            found.append((stage * stages > limit, triton.Config(config.kwargs, config.num_warps, stages)))
    return [config for excess, config in found if not excess] or [found[0][1]]


def _tuned(configs: list[triton.Config]) -> Callable[[Any], Any]:
    """Decorator: a kernel that times its suitable configurations once per key."""
    names = ["tokens_range", "BLOCK", "EVEN", "PRECISION"]
    return triton.autotune(configs, key=names, prune_configs_by={"early_config_prune": _suitable})  # type: ignore[no-any-return]  # untyped host


def _launch(kernel: Any, grid: Any, arguments: tuple[Any, ...], constants: dict[str, Any], tiles: Any) -> None:
    """Run a tuned kernel with the given tiles, with those that were timed, or with the first that suit."""
    if tiles is None and _may_time():
        kernel[grid](*arguments, **constants)
        return
    if tiles is None:
        named = dict(zip(kernel.arg_names, arguments, strict=False))
        tiles = _suitable(kernel.configs, named, **constants)[0].all_kwargs()
    kernel.fn[grid](*arguments, **constants, **tiles)


def _may_time() -> bool:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    wanted = os.environ.get("GBLR_TRITON_TUNE", "1") != "0"
    return wanted and not interpreted and not torch.cuda.is_current_stream_capturing()


@_tuned(_ONE)
@triton.jit
def _stage_one(  # type: ignore[no-untyped-def]  # compiled by triton
    x,
    factors,
    lists,
    z,
    groups_at,
    tokens,
    tokens_range,
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
    tl.store(place, sums.to(z.dtype.element_ty), mask=(k < components)[:, None] & (t < tokens)[None, :])


@_tuned(_TWO)
@triton.jit
def _stage_two(  # type: ignore[no-untyped-def]  # compiled by triton
    z,
    factors,
    lists,
    bias,
    y,
    table_at,
    tokens,
    tokens_range,
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
        known = (i < count)[None, :] & (t < tokens)[:, None]
        parts = tl.load(z + k[None, :].to(tl.int64) * z_stride + t[:, None], mask=known, other=0.0)
        u = tl.load(
            factors + data + i[:, None] * width + j[None, :], mask=(i < count)[:, None] & inside[None, :], other=0.0
        )
        sums = tl.dot(parts, u, sums, input_precision=PRECISION)
    if BIAS:
        sums += tl.load(bias + start + j, mask=inside, other=0.0).to(tl.float32)[None, :]
    place = y + t[:, None].to(tl.int64) * y_stride + start + j[None, :]
    tl.store(place, sums.to(y.dtype.element_ty), mask=(t < tokens)[:, None] & inside[None, :])


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
    """``x @ W.T + bias`` for x (tokens, n); sizes as in the operator of ``compiled``.

    ``tiles`` are the constants of both stages, in place of those that tuning finds.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    tokens, n = x.shape
    y = x.new_empty(tokens, out_features)
    if tokens == 0:
        return y
    one, two = tiles or (None, None)
    z_stride = triton.cdiv(tokens, 16) * 16  # rows of z begin on whole memory transactions
    z = x.new_empty(max(components, 1), z_stride)
    shared = {"PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"}
    expected = _tokens_range(tokens)
    if components:
        block = _power(col_width)
        _launch(
            _stage_one,
            lambda meta: (triton.cdiv(components, meta["COMPONENTS"]), triton.cdiv(tokens, meta["TOKENS"])),
            (x, factors, lists, z, col_groups_at, tokens, expected, x.stride(0), z_stride, components),
            {"BLOCK": block, "EVEN": block == col_width and cols * col_width == n, "PER_GROUP": GROUP, **shared},
            one,
        )
    block = _power(row_width)
    _launch(
        _stage_two,
        lambda meta: (rows, triton.cdiv(tokens, meta["TOKENS"])),
        (z, factors, lists, x if bias is None else bias, y, rows_at, tokens, expected, z_stride, out_features),
        {
            "BIAS": bias is not None,
            "BLOCK": block,
            "EVEN": block == row_width and rows * row_width == out_features,
            **shared,
        },
        two,
    )
    return y
