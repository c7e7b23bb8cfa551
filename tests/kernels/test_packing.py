"""Block storage: nothing lost, nothing padded where blocks fit, transposes, offsets."""

from __future__ import annotations

import pytest
import torch

from gblr_plugin.errors import ConfigError
from gblr_plugin.kernels.buffers import (
    all_lists,
    batch_values,
    block_list,
    block_values,
    interval_facts,
    quantize,
    to_dense,
    unpack,
)
from gblr_plugin.kernels.layout import batches
from gblr_plugin.kernels.packing import active_counts, narrowed, pack
from gblr_plugin.matrix.structure import Intervals, StructuredMatrix


def matrix(align: int = 1, splits: int = 1) -> StructuredMatrix:
    g = torch.Generator().manual_seed(3)
    k, m, n = 24, 48, 80

    def intervals(length: int) -> Intervals:
        steps = length // align
        width, start = (torch.randint(0, steps + extra, (k,), generator=g) * align for extra in (1, 0))
        return Intervals(width, start, length)

    u, v = torch.randn(k, m, generator=g), torch.randn(k, n, generator=g)
    sizes = (k // splits,) * splits
    return StructuredMatrix.from_factors(u, v, intervals(m), intervals(n), sizes)


@pytest.mark.parametrize("blocks", [(1, 1), (16, 8), (7, 11), (500, 500)])
@pytest.mark.parametrize("splits", [1, 3])
def test_round_trip(blocks: tuple[int, int], splits: int) -> None:
    original = matrix(splits=splits).live()
    layout, values, index = pack(original, *blocks)
    back = unpack(layout, values, index)
    assert torch.equal(back.u, original.u)
    assert torch.equal(back.v, original.v)
    assert torch.equal(back.rows.start, original.rows.start)
    assert torch.equal(back.cols.width, original.cols.width)
    torch.testing.assert_close(to_dense(layout, values, index), original.to_dense())
    torch.testing.assert_close(to_dense(layout.t(), values, index), original.to_dense().t())
    assert values.numel() == layout.entries


def test_aligned_structures_are_stored_without_padding() -> None:
    aligned = matrix(align=16)
    layout, values, _ = pack(aligned, 16, 16)
    assert layout.padding == 1.0
    assert values.numel() == aligned.stored


def test_blocks_of_one_index_store_the_intervals_exactly() -> None:
    original = matrix()
    assert pack(original, 1, 1)[0].entries == original.stored


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("splits", [1, 3])
def test_active_counts_foretell_the_storage(even: bool, splits: int) -> None:
    original = matrix(splits=splits).live()
    layout, _, _ = pack(original, 7, 11, even)
    for intervals, block, sizes, blocks in (
        (original.rows, 7, original.split_sizes, layout.row_blocks),
        (original.cols, 11, (original.num_components,), layout.col_blocks),
    ):
        counts = active_counts(intervals, block, sizes, even)
        assert counts == [(b.stop - b.start, b.size) for b in blocks]


@pytest.mark.parametrize("blocks", [(16, 16), (7, 11), (48, 80)])
@pytest.mark.parametrize("splits", [1, 2])
def test_even_blocks_are_few_products_of_the_same_matrix(blocks: tuple[int, int], splits: int) -> None:
    original = matrix(splits=splits).live()
    plain, (layout, values, index) = pack(original, *blocks), pack(original, *blocks, even=True)
    for length, block, found, parts in (
        (original.shape[0] // splits, blocks[0], layout.row_blocks, splits),
        (original.shape[1], blocks[1], layout.col_blocks, 1),
    ):
        assert len(batches(found)) <= (2 * parts if length % block else 1)
    assert values.numel() == layout.entries >= plain[0].entries
    torch.testing.assert_close(to_dense(layout, values, index), original.to_dense())
    back = unpack(layout, values, index)
    assert torch.equal(back.u, original.u)
    assert torch.equal(back.v, original.v)


def test_batches_hold_the_factors_of_their_blocks() -> None:
    layout, values, index = pack(matrix().live(), 12, 24, even=True)
    for axis in (layout.row_blocks, layout.col_blocks):
        left = list(axis)
        for batch in batches(axis):
            for factor, block in zip(batch_values(values, batch), left[: batch.blocks], strict=True):
                assert torch.equal(factor, block_values(values, block))
            own = torch.cat([block_list(index, block) for block in left[: batch.blocks]])
            assert torch.equal(block_list(index, batch), own)
            del left[: batch.blocks]
        assert not left


def test_lists_are_the_components_that_meet_the_block() -> None:
    original = matrix().live()
    layout, _, index = pack(original, 16, 16)
    facts = interval_facts(layout, index)
    support = original.cols.support()[facts[4]]
    for block in layout.col_blocks:
        expected = support[:, block.start : block.stop].any(1).nonzero()[:, 0]
        assert torch.equal(index[block.list_at : block.list_at + block.size].long(), expected)
        if block.first >= 0:
            assert torch.equal(expected, torch.arange(block.first, block.first + block.size))


@pytest.mark.parametrize("blocks", [(16, 8), (7, 11), (0, 0)])
@pytest.mark.parametrize("splits", [1, 3])
def test_int8_factors_are_the_nearest(blocks: tuple[int, int], splits: int) -> None:
    original = matrix(splits=splits).live()
    layout, values, index = pack(original, *blocks)
    whole, scales = quantize(layout, values, index)
    back = unpack(layout, whole, index, scales)
    if blocks == (0, 0):
        step = original.to_dense().abs().amax(1, keepdim=True) / 127
        assert bool(((to_dense(layout, whole, index, scales) - original.to_dense()).abs() <= 0.501 * step).all())
    else:
        for mine, true in ((back.u, original.u), (back.v, original.v)):
            # The scale of a component is shared out evenly: u and v come back up to one factor each.
            largest = true.abs().amax(1, keepdim=True)
            mine = mine / mine.abs().amax(1, keepdim=True) * largest
            assert bool(((mine - true).abs() <= 0.501 * largest / 127).all())
    torch.testing.assert_close(to_dense(layout, whole, index, scales), back.to_dense(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(to_dense(layout.t(), whole, index, scales), back.to_dense().t(), rtol=1e-5, atol=1e-5)
    assert torch.equal(pack(back, *blocks)[1].sign(), whole.sign().float())


@pytest.mark.parametrize("blocks", [(16, 8), (7, 11)])
@pytest.mark.parametrize("splits", [1, 3])
def test_narrow_lists_are_the_same_in_half_the_words(blocks: tuple[int, int], splits: int) -> None:
    layout, values, index = pack(matrix(splits=splits), *blocks)
    small, words = narrowed(layout, index)
    assert small.narrow
    assert narrowed(small, words)[1] is words
    assert words.numel() < index.numel()
    for block in (*layout.row_blocks, *layout.col_blocks):
        mine, true = block_list(all_lists(small, words), block), block_list(all_lists(layout, index), block)
        assert mine.dtype == torch.int64
        assert torch.equal(mine, true)
    for place in ("col_table_at", "row_table_at"):
        blocks_of = layout.col_blocks if place[0] == "c" else layout.row_blocks
        tables = [part[getattr(of, place) :][: 5 * len(blocks_of)] for of, part in ((layout, index), (small, words))]
        assert torch.equal(*tables)
    assert torch.equal(interval_facts(small, words), interval_facts(layout, index))
    assert torch.equal(unpack(small, values, words).u, unpack(layout, values, index).u)
    torch.testing.assert_close(to_dense(small.t(), values, words), to_dense(layout, values, index).t())


def full(num: int, m: int, n: int) -> StructuredMatrix:
    return StructuredMatrix.from_factors(torch.ones(num, m), torch.ones(num, n))


@pytest.mark.parametrize(("num", "m", "n"), [((1 << 15) + 1, 2, 2), (1, 1 << 16, 2)])
def test_what_16_bits_cannot_say_stays_wide(num: int, m: int, n: int) -> None:
    layout, _, index = pack(full(num, m, n), m, n)
    assert narrowed(layout, index)[1] is index


def test_16_bits_say_the_widths_of_long_axes() -> None:
    layout, _, index = pack(full(3, (1 << 16) - 1, 40000), 1 << 14, 1 << 14)
    small, words = narrowed(layout, index)
    assert small.narrow
    assert torch.equal(interval_facts(small, words), interval_facts(layout, index))


def test_int8_of_zero_factors_is_zero() -> None:
    zeros = StructuredMatrix.from_factors(torch.zeros(3, 8), torch.zeros(3, 9))
    layout, values, index = pack(zeros, 4, 4)
    whole, scales = quantize(layout, values, index)
    assert torch.equal(to_dense(layout, whole, index, scales), torch.zeros(8, 9))


def test_dense_storage() -> None:
    layout, values, index = pack(matrix(), 0, 0)
    assert layout.dense
    torch.testing.assert_close(values.view(48, 80), matrix().to_dense())
    torch.testing.assert_close(unpack(layout, values, index).to_dense(), matrix().to_dense())


@pytest.mark.parametrize("blocks", [(0, 4), (-1, -1)])
def test_bad_block_sizes(blocks: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="block sizes"):
        pack(matrix(), *blocks)


def test_layouts_are_hashable_and_comparable() -> None:
    assert hash(pack(matrix(), 16, 16)[0]) == hash(pack(matrix(), 16, 16)[0])
    assert pack(matrix(), 16, 16)[0] != pack(matrix(), 16, 8)[0]
