"""Checks that the buffers of a weight hold what its layout says, before kernels follow them through raw addresses.

The constructor of :class:`~gblr_plugin.kernels.layout.Layout` checks the layout. The sizes of the buffers are checked
at every use. The words of the index buffer are read once: a buffer that was found sound is remembered together with
torch's version counter, which grows when the buffer is written to.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from ..errors import ConfigError
from .buffers import all_lists, interval_facts
from .layout import Block, Layout, Sizes
from .packing import halved, tables

__all__ = ["PLAIN", "check_index", "check_operands", "check_sizes", "is_known", "vouch"]

PLAIN = (Tensor, Parameter)
"""Types of tensors that have memory of their own."""


class _Known(NamedTuple):
    buffer: weakref.ref[Tensor]
    version: int
    address: int
    facts: list[object]  # layouts, or arguments of the operator


_KNOWN: dict[int, _Known] = {}  # by the identity of the index buffer


def is_known(lists: Tensor, fact: object) -> bool:
    """Whether :func:`vouch` was called for an index buffer that was not written to since.

    Args:
        lists: Index buffer.
        fact: A layout, which stands for that of the transposed matrix too, or arguments of the operator.
    """
    known = _KNOWN.get(id(lists))
    return (
        known is not None
        and known.buffer() is lists
        and known.version == lists._version
        and known.address == lists.data_ptr()
        and _upright(fact) in known.facts
    )


def _upright(fact: object) -> object:
    return fact.t() if isinstance(fact, Layout) and fact.transposed else fact


def vouch(lists: Tensor, fact: object) -> None:
    """Remember that an index buffer with memory and a count of changes is sound; ``fact`` as in :func:`is_known`."""
    if type(lists) not in PLAIN or lists.is_meta or lists.is_inference():
        return
    key, known, fact = id(lists), _KNOWN.get(id(lists)), _upright(fact)
    if known is None or known.buffer() is not lists or known[1:3] != (lists._version, lists.data_ptr()):
        forget = weakref.ref(lists, lambda _: _KNOWN.pop(key, None))
        known = _KNOWN[key] = _Known(forget, lists._version, lists.data_ptr(), [])
    if fact not in known.facts:
        known.facts.append(fact)


def check_sizes(layout: Layout, factors: Tensor, lists: Tensor, scales: Tensor | None) -> None:
    """Raise unless the buffers have the dtypes, sizes and devices that the layout asks for; their values are not read.

    Args:
        layout: Layout of the buffers.
        factors: Flat factors, floating point, or int8 where there are scales.
        lists: int32 index buffer.
        scales: Scales of int8 factors, or ``None``.

    Raises:
        ConfigError: If they have not; the message says which buffer.
    """
    if type(layout) is not Layout or not vars(layout):
        raise ConfigError("GBLR tensor: it has no layout")
    num = layout.shape[1 if layout.transposed else 0] if layout.dense else layout.num_components
    wanted = {"factors": (factors, layout.entries), "lists": (lists, None), "scales": (scales, num)}
    if scales is None:
        del wanted["scales"]
    for name, (buffer, numel) in wanted.items():
        if not isinstance(buffer, Tensor):
            raise ConfigError(f"GBLR tensor: its {name} are no tensor, but {type(buffer).__name__}")
        if buffer.layout is not torch.strided or buffer.dim() != 1 or not buffer.is_contiguous() or buffer.is_neg():
            raise ConfigError(f"GBLR tensor: its {name} must be one-dimensional and contiguous")
        if numel is not None and buffer.numel() != numel:
            raise ConfigError(f"GBLR tensor: its layout asks for {numel} {name}, it has {buffer.numel()}")
        if buffer.device != factors.device:
            raise ConfigError(f"GBLR tensor: its factors are on {factors.device}, its {name} on {buffer.device}")
        if not _has_memory(buffer):
            raise ConfigError(f"GBLR tensor: the memory of its {name} was given back")
    if lists.dtype != torch.int32 or lists.numel() < _words(layout):
        raise ConfigError(
            f"GBLR tensor: its layout asks for at least {_words(layout)} lists of torch.int32, "
            f"it has {lists.numel()} of {lists.dtype}"
        )
    like = factors if scales is None else scales
    if not like.is_floating_point() or (scales is not None and factors.dtype != torch.int8):
        said = "" if scales is None else f" with scales of {scales.dtype}"
        raise ConfigError(
            "GBLR tensor: its factors must be floating point, or torch.int8 with floating-point scales, "
            f"got {factors.dtype}{said}"
        )


def _has_memory(buffer: Tensor) -> bool:
    if type(buffer) not in PLAIN or buffer.is_meta:
        return True  # traces have none
    end = (buffer.storage_offset() + buffer.numel()) * buffer.itemsize
    return not buffer.numel() or buffer.untyped_storage().nbytes() >= end


def _words(layout: Layout) -> int:
    """Least number of words of the index buffer."""
    if layout.dense:
        return 0
    blocks = len(layout.row_blocks) + len(layout.col_blocks)
    return min(layout.row_table_at, layout.col_table_at) + 5 * blocks


def check_index(layout: Layout, lists: Tensor) -> None:
    """Raise unless the words of the index buffer follow from its lists and intervals, and these fit the layout.

    Args:
        layout: Layout of the buffers.
        lists: Index buffer of the size that :func:`check_sizes` asks for, with memory.

    Raises:
        ConfigError: If they do not.
    """
    if layout.transposed:
        layout = layout.t()
    if layout.dense:
        sound = not lists.numel()
    else:
        index = lists.detach().cpu()
        entries, facts = all_lists(layout, index)[: layout.list_entries].long(), interval_facts(layout, index)
        sound = _lists_fit(layout, entries, facts) and torch.equal(index, _assembled(layout, entries, facts))
    if not sound:
        raise ConfigError("GBLR tensor: its lists are damaged, they do not fit its layout")


def _assembled(layout: Layout, lists: Tensor, facts: Tensor) -> Tensor:
    """The index buffer with these lists and intervals."""
    blocks = layout.col_blocks, layout.row_blocks
    after = tables(blocks, lists, layout.col_table_at, layout.num_components, layout.narrow)
    before = [halved(lists), halved(facts.reshape(-1))] if layout.narrow else [lists, facts.reshape(-1)]
    return torch.cat([*before, *after]).to(torch.int32)


def _lists_fit(layout: Layout, lists: Tensor, facts: Tensor) -> bool:
    """Whether lists and intervals name components, and each list those whose intervals meet its block.

    Args:
        layout: Not transposed.
        lists: All lists, one after the other.
        facts: As of :func:`~gblr_plugin.kernels.buffers.interval_facts`.
    """
    num, (m, n), splits = layout.num_components, layout.shape, len(layout.split_sizes)
    row_width, row_start, col_width, col_start, order = facts
    if lists.numel() and (int(lists.min()) < 0 or int(lists.max()) >= num):
        return False
    if not torch.equal(order.sort().values, torch.arange(num, device=order.device)):
        return False
    if int((row_width + col_width).sum().clamp(max=m * n)) != layout.stored:
        return False
    split = torch.repeat_interleave(torch.tensor(layout.split_sizes, device=lists.device))
    listed = sum(block.size for block in layout.col_blocks)
    return _axis_fits(layout.col_blocks, lists[:listed], col_width, col_start, n, torch.zeros_like(split), 1) and (
        _axis_fits(layout.row_blocks, lists[listed:], row_width, row_start, m // splits, split, splits)
    )


def _axis_fits(
    blocks: tuple[Block, ...], lists: Tensor, width: Tensor, start: Tensor, length: int, split: Tensor, splits: int
) -> bool:
    """Whether each block's list names, in order, all components of its split whose interval meets it.

    A list may name others, to have as many as other blocks (``even`` of :func:`~gblr_plugin.kernels.packing.pack`).
    """
    if not bool(((width > 0) & (width <= length) & (start >= 0) & (start < length)).all()):
        return False
    size, per_split = blocks[0].stop - blocks[0].start, len(blocks) // splits
    sizes = torch.tensor([b.size for b in blocks], device=lists.device)
    owner = torch.repeat_interleave(torch.arange(len(blocks), device=lists.device), sizes)
    if not _ascend(lists, owner) or not torch.equal(owner // per_split, split[lists]):
        return False
    ends = sizes.cumsum(0).tolist()
    for block, end in zip(blocks, ends, strict=True):
        low, high = (int(lists[end - block.size]), int(lists[end - 1])) if block.size else (-1, -1)
        if block.first != (low if block.size and high - low == block.size - 1 else -1):
            return False
    begin = owner % per_split * size
    stop, end = (begin + size).clamp(max=length), (start + width)[lists]
    met = ((start[lists] < stop) & (end > begin)) | (begin < end - length)
    last = (start + width - 1) % length // size
    wraps = start + width > length
    wanted = torch.where(wraps, per_split - start // size + last + 1, last - start // size + 1)
    return int(met.sum()) == int(wanted.clamp(max=per_split).sum())


def _ascend(lists: Tensor, owner: Tensor) -> bool:
    """Whether the lists of all blocks name ascending components, none of them twice."""
    return bool(((lists.diff() > 0) | (owner.diff() > 0)).all())


def check_operands(
    x: Tensor, factors: Tensor, lists: Tensor, bias: Tensor | None, scales: Tensor | None, sizes: Sizes
) -> None:
    """Raise unless a kernel that is given these arguments stays within them.

    Compiled programs call the operator with buffers alone, and may hold others than the weight that was traced.

    Args:
        x: (tokens, n).
        factors: Flat factors.
        lists: int32 index buffer.
        bias: (m,) or ``None``.
        scales: Scales of int8 factors, or ``None``.
        sizes: Numbers of a layout, which may be any.

    Raises:
        ConfigError: If it does not.
    """
    num, m, entries = sizes[8:]
    dtype, device, fact = x.dtype, x.device, (*x.shape[1:], *sizes)
    sound = (
        _holds(factors, entries, torch.int8 if scales is not None else dtype, device)
        and (scales is None or _holds(scales, num, dtype, device))
        and (bias is None or _holds(bias, m, dtype, device, False))
    )
    if sound and not is_known(lists, fact):
        sound = x.dim() == 2 and _holds(lists, lists.numel(), torch.int32, device) and _leads_inside(lists, *fact)
        if sound:
            vouch(lists, fact)
    if not sound:
        raise ConfigError("GBLR tensor: the operands of a compiled product do not fit together")


def _holds(buffer: Tensor, numel: int, dtype: torch.dtype, device: torch.device, contiguous: bool = True) -> bool:
    """Whether a buffer holds ``numel`` numbers in memory, consecutive ones if ``contiguous``."""
    return (
        buffer.shape == (numel,)
        and buffer.dtype == dtype
        and buffer.device == device
        and (not contiguous or (buffer.is_contiguous() and not buffer.is_neg()))
        and _has_memory(buffer)
    )


def _leads_inside(lists: Tensor, n: int, *sizes: int) -> bool:
    """Whether block tables, lists and groups name places and components that exist."""
    cols_at, cols, col_groups, col_width, rows_at, rows, row_groups, row_width, num, m, entries = sizes
    index, upright = lists.detach().cpu(), cols_at < rows_at
    axes = [(cols_at, cols, col_width, n, col_groups), (rows_at, rows, row_width, m, row_groups)]
    axes = axes if upright else axes[::-1]
    found, list_at, data_at = [], 0, 0
    for at, count, widest, length, _ in axes:
        if min(at, count - 1) < 0 or at + 5 * count > len(index):
            return False
        blocks, stop = [], 0
        for row in index[at : at + 5 * count].view(count, 5).tolist():
            start, width, size = row[:3]
            if row != [stop, width, size, list_at, data_at] or not (0 < width <= widest and 0 <= size <= num):
                return False
            blocks.append(Block(start, start + width, size, list_at, data_at, -1))
            stop, list_at, data_at = stop + width, list_at + size, data_at + size * width
        if stop != length or widest != blocks[0].stop - blocks[0].start:
            return False
        found.append(tuple(blocks))
    narrow = not col_groups and not row_groups  # narrow lists come without groups
    words = index.view(torch.int16) if narrow else index
    before = -(-list_at // 2) - (-5 * num // 2) if narrow else list_at + 5 * num  # lists and intervals
    if data_at != entries or axes[0][0] != before:
        return False
    listed = words[:list_at].long()
    owner = torch.repeat_interleave(torch.tensor([block.size for axis in found for block in axis]))
    if list_at and (int(listed.min()) < 0 or int(listed.max()) >= num or not _ascend(listed, owner)):
        return False
    if narrow:
        return lists.is_cpu
    groups = tables((found[0], found[1]), listed, axes[0][0], num)[1:]
    return all(
        torch.equal(index[at : at + len(words)], words.to(torch.int32))
        for (*_, at), words in zip(axes, groups, strict=True)
    )
