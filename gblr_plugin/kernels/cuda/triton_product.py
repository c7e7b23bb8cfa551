"""The factored product in two triton kernels, for CUDA devices: bfloat16, float16, float32. Optional.

In stage 1 a program keeps the sums of a tile of components x tokens, and iterates over the column blocks that any of
these components meets. In stage 2 a program keeps a tile of tokens x rows, and iterates over the components of its row
block. Both write their result once, so that no atomics are needed and equal inputs give equal results. All sizes except
those of the tiles are read from the index buffer on the device: no code is specialised per layer, no call synchronises,
and a CUDA graph can hold the calls.

Tile sizes are tuned on first use, once per stage, range of tokens, block size and dtype, by timing those few that suit
the number of tokens and the device's memory. While a graph is captured, in the interpreter, and with
``GBLR_TRITON_TUNE=0``, nothing is timed and the first suitable size is used.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import GROUP, Sizes

__all__ = ["product"]


_MOST_TOKENS = 1024  # above this number the best tiles do not depend on the number of tokens


def _tokens_range(tokens: int) -> int:
    """Numbers of tokens that share their tiles: up to 16, and up to each larger power of two."""
    return min(max(1 << (tokens - 1).bit_length(), 16), _MOST_TOKENS)


def _config(components: int, tokens: int, warps: int, stages: int) -> triton.Config:
    return triton.Config({"COMPONENTS": components, "TOKENS": tokens}, num_warps=warps, num_stages=stages)


# Without timing, the first that suits is used.
_UNTIMED = [
    _config(16, 16, 2, 4),
    _config(64, 16, 4, 3),
    _config(32, 64, 4, 4),
    _config(64, 64, 4, 3),
    _config(64, 128, 4, 4),
    _config(64, 256, 8, 3),
]
_TWO = [
    _config(64, 16, 4, 4),
    _config(32, 16, 8, 4),
    _config(32, 64, 8, 4),
    _config(64, 64, 4, 3),
    _config(64, 128, 8, 3),
    _config(64, 256, 8, 3),
]


_ROW = 128  # bytes of a column block that one step takes
# Registers of a thread for sums, and for sums with what is loaded through registers. Without tensor cores: registers
# for sums, and multiply-adds per sum in one step. Beyond, the compiler spills registers to memory.
_SUMS, _HELD, _PLAIN_SUMS, _PLAIN_INNER = 64, 128, 16, 32


@lru_cache
def _shared_memory(device: Any) -> int:
    """Bytes that one program may have on a device, by triton's number of it."""
    return int(triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"])


def _suitable(
    configs: Sequence[triton.Config], named: dict[str, Any], by_tokens: bool, **constants: Any
) -> list[triton.Config]:
    """Tiles that fit registers and shared memory, of tokens neither mostly empty nor needlessly small.

    Args:
        configs: All tiles; each comes with as many stages as memory holds, up to those that it asks for.
        named: Arguments of the kernel by name.
        by_tokens: The sums are tokens x block over components (stage 2), not components x tokens over a block.
        constants: The kernel's other constants.
    """
    block, item, tokens = constants["BLOCK"], named["factors"].element_size(), named["tokens_range"]
    memory = 96 << 10 if _interpreted() else _shared_memory(triton.runtime.driver.active.get_current_device())
    copied = item >= 4 or constants["EVEN"]  # from device memory to shared memory without a stop in registers
    tensor_cores = item < 4 or constants["PRECISION"] != "ieee"
    most, found = 16 if tokens <= 16 else 64 if tokens <= 128 else 256, []
    for config in configs:
        c, t, threads = config.kwargs["COMPONENTS"], config.kwargs["TOKENS"], 32 * config.num_warps
        rows, cols, inner = (t, block, c) if by_tokens else (c, t, constants["STEP"])
        sums, loaded = rows * cols / threads, inner * (rows + cols)
        held = sums if copied else sums + loaded / threads
        stages = min(config.num_stages, memory // (loaded * item))
        small = sums <= _SUMS if tensor_cores else sums <= _PLAIN_SUMS and inner <= _PLAIN_INNER
        if t <= most and stages and small and held <= _HELD:
            found.append(triton.Config(config.kwargs, config.num_warps, stages))
    largest = max(config.kwargs["TOKENS"] for config in found)
    return [config for config in found if 2 * config.kwargs["TOKENS"] >= largest]


def _tuned(configs: list[triton.Config], by_tokens: bool) -> Callable[[Any], Any]:
    """Decorator: a kernel that times its suitable configurations once per key."""
    prune = partial(_suitable, by_tokens=by_tokens)
    names = ["tokens_range", "BLOCK", "EVEN", "PRECISION"]
    return triton.autotune(configs, key=names, prune_configs_by={"early_config_prune": prune})  # type: ignore[no-any-return]  # untyped host


def _launch(kernel: Any, grid: Any, arguments: tuple[Any, ...], constants: dict[str, Any], tiles: Any) -> None:
    """Run a tuned kernel with the given tiles, with those that were timed, or with the first that suit."""
    if tiles is None and _may_time():
        kernel[grid](*arguments, **constants)
        return
    if tiles is None:
        named = dict(zip(kernel.arg_names, arguments, strict=False))
        tiles = kernel.early_config_prune(kernel.configs, named, **constants)[0].all_kwargs()
    kernel.fn[grid](*arguments, **constants, **tiles)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _may_time() -> bool:
    wanted = os.environ.get("GBLR_TRITON_TUNE", "1") != "0"
    return wanted and not _interpreted() and not torch.cuda.is_current_stream_capturing()


@triton.jit
def _ones(bits):  # type: ignore[no-untyped-def]  # compiled by triton
    """Number of set bits of each int32."""
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    return (((bits + (bits >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24


@triton.jit
def _pair(at, there, BLOCK: tl.constexpr, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]  # compiled by triton
    """Start and width of a column block, the group's first row in it, both halves of the mask of active components."""
    start, width, row = tl.load(at, there), tl.load(at + 1, there), tl.load(at + 2, there)
    if EVEN:
        start, width, row = tl.multiple_of(start, 16), BLOCK, tl.multiple_of(row, 16)
    return start, width, row, tl.load(at + 3, there), tl.load(at + 4, there)


@_tuned(_UNTIMED, by_tokens=False)
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
    STEP: tl.constexpr,
    EVEN: tl.constexpr,
    PER_GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    head = lists + groups_at + 2 * (tile * COMPONENTS // PER_GROUP)
    pair = lists + tl.load(head)
    pairs = tl.load(head + 1)
    lane = tile * COMPONENTS % PER_GROUP + tl.arange(0, COMPONENTS)
    bit = 1 << (lane & 31)
    in_low = lane < 32
    sums = tl.zeros((COMPONENTS, TOKENS), tl.float32)
    # Each step reads the list entries of the next step, so that the addresses of its tiles depend on no load in the
    # same step: the compiler then copies tiles as many steps ahead as there are stages.
    start, width, row, low, high = _pair(pair, pairs > 0, BLOCK, EVEN)
    steps: tl.constexpr = BLOCK // STEP
    for number in range(pairs * steps):
        c = number % steps * STEP + tl.arange(0, STEP)
        active = (tl.where(in_low, low, high) & bit) != 0
        rank = _ones(tl.where(in_low, low & (bit - 1), low)) + _ones(tl.where(in_low, 0, high & (bit - 1)))
        inside = c < width
        v = tl.load(
            factors + (row + rank * width)[:, None] + c[None, :], mask=active[:, None] & inside[None, :], other=0.0
        )
        inputs = tl.load(
            x + start + t[None, :].to(tl.int64) * x_stride + c[:, None],
            mask=(t < tokens)[None, :] & inside[:, None],
            other=0.0,
        )
        sums = tl.dot(v, inputs, sums, input_precision=PRECISION)
        following = (number + 1) // steps
        start, width, row, low, high = _pair(pair + 5 * following, following < pairs, BLOCK, EVEN)
    k = tile * COMPONENTS + tl.arange(0, COMPONENTS)
    place = z + k[:, None].to(tl.int64) * z_stride + t[None, :]
    # Complete rows, with zeros beyond the tokens, so that stage 2 reads complete vectors.
    tl.store(place, sums.to(z.dtype.element_ty), mask=(k < components)[:, None] & (t < z_stride)[None, :])


@_tuned(_TWO, by_tokens=True)
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
    i = tl.arange(0, COMPONENTS)
    k = tl.load(members + i, mask=i < count, other=0)
    for _ in range(0, count, COMPONENTS):
        known = (i < count)[None, :] & (t < z_stride)[:, None]
        inputs = tl.load(z + k[None, :].to(tl.int64) * z_stride + t[:, None], mask=known, other=0.0)
        u = tl.load(
            factors + data + i[:, None] * width + j[None, :], mask=(i < count)[:, None] & inside[None, :], other=0.0
        )
        sums = tl.dot(inputs, u, sums, input_precision=PRECISION)
        i += COMPONENTS
        k = tl.load(members + i, mask=i < count, other=0)
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
    sizes: Sizes,
    tiles: tuple[dict[str, Any], dict[str, Any]] | None = None,
) -> Tensor:
    """``x @ W.T + bias`` for x (tokens, n).

    ``tiles`` are the constants of both stages, in place of those that tuning finds.
    """
    (tokens, n), components, out_features = x.shape, sizes.components, sizes.out_features
    y = x.new_empty(tokens, out_features)
    if tokens == 0:
        return y
    tiles_one, tiles_two = tiles or (None, None)
    col_block, row_block = _power(sizes.col_width), _power(sizes.row_width)
    # Factors of both axes lie in one buffer: every block begins at a multiple of 16 only if all of them are even.
    even_cols = (col_block, sizes.cols * sizes.col_width) == (sizes.col_width, n)
    even = even_cols and (row_block, sizes.rows * sizes.row_width) == (sizes.row_width, out_features)
    if x.stride(1) != 1 or (even and (x.stride(0) % 16 or x.data_ptr() % 16)):
        x = x.clone(memory_format=torch.contiguous_format)
    z_stride = triton.cdiv(tokens, 16) * 16  # so that rows of z begin on memory transactions
    z = x.new_empty(max(components, 1), z_stride)
    shared = {"EVEN": even, "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"}
    expected = _tokens_range(tokens)
    with torch.cuda.device_of(x):
        if components:
            _launch(
                _stage_one,
                lambda meta: (triton.cdiv(components, meta["COMPONENTS"]), triton.cdiv(tokens, meta["TOKENS"])),
                (x, factors, lists, z, sizes.col_groups_at, tokens, expected, x.stride(0), z_stride, components),
                {"BLOCK": col_block, "STEP": min(col_block, _ROW // x.element_size()), "PER_GROUP": GROUP, **shared},
                tiles_one,
            )
        _launch(
            _stage_two,
            lambda meta: (sizes.rows, triton.cdiv(tokens, meta["TOKENS"])),
            (
                z,
                factors,
                lists,
                x if bias is None else bias,
                y,
                sizes.rows_at,
                tokens,
                expected,
                z_stride,
                out_features,
            ),
            {"BIAS": bias is not None, "BLOCK": row_block, **shared},
            tiles_two,
        )
    return y
