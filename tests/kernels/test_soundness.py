"""Index buffers are read once, and refused for any word that does not follow; layouts are sound or are not made."""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import pickle
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gblr_plugin import GBLRTensor
from gblr_plugin.errors import ConfigError
from gblr_plugin.kernels import soundness
from gblr_plugin.kernels.buffers import quantize
from gblr_plugin.kernels.layout import Block, Layout
from gblr_plugin.kernels.packing import narrowed, pack
from gblr_plugin.kernels.plan import Plan
from gblr_plugin.kernels.soundness import check_index, check_sizes, is_known, vouch
from gblr_plugin.matrix.structure import Intervals, StructuredMatrix


def matrix(components: int = 70, m: int = 48, n: int = 64, splits: int = 1, seed: int = 0) -> StructuredMatrix:
    g = torch.Generator().manual_seed(seed)

    def intervals(length: int) -> Intervals:
        width = torch.randint(1, length + 1, (components,), generator=g)
        return Intervals(width, torch.randint(0, length, (components,), generator=g), length)

    u, v = torch.randn(components, m // splits, generator=g), torch.randn(components, n, generator=g)
    sizes = tuple(len(part) for part in torch.arange(components).tensor_split(splits))
    return StructuredMatrix.from_factors(u, v, intervals(m // splits), intervals(n), sizes)


def packed(kind: str, **options: Any) -> tuple[Layout, Tensor, Tensor]:
    layout, values, index = pack(matrix(**options), 16, 16, even=kind == "even")
    if kind == "narrow":
        layout, index = narrowed(layout, index)
    return layout.t() if kind == "transposed" else layout, values, index


KINDS = ["wide", "narrow", "transposed", "even"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("components", [0, 1, 70, 200])
def test_what_was_packed_is_sound(kind: str, splits: int, components: int) -> None:
    layout, values, index = packed(kind, splits=splits, components=components)
    check_sizes(layout, values, index, None)
    check_index(layout, index)
    dense, values, index = pack(matrix(), 0, 0)
    for layout in (dense, dense.t()):
        check_sizes(layout, values, index, None)
        check_index(layout, index)


@pytest.mark.parametrize("kind", KINDS)
def test_any_altered_word_of_lists_tables_and_groups_is_noticed(kind: str) -> None:
    layout, _, index = packed(kind, splits=3)
    upright = layout.t() if layout.transposed else layout
    words = index.view(torch.int16) if layout.narrow else index
    lists, tables = range(layout.list_entries), range(upright.col_table_at, len(index))
    draw = random.Random(0)
    for part, numbers in ((words, lists), (index, tables)):
        for number in draw.sample(numbers, min(60, len(numbers))):
            old = int(part[number])
            part[number] = draw.choice([old + 1, -1, 0, 70, 1 << 14]) if draw.random() < 0.7 else old - 1
            if int(part[number]) != old:
                with pytest.raises(ConfigError, match="its lists are damaged"):
                    check_index(layout, index)
            part[number] = old
    check_index(layout, index)
    with pytest.raises(ConfigError, match="its lists are damaged"):
        check_index(layout, torch.cat([index, index[:1]]))


@pytest.mark.parametrize("fact", range(5))
@pytest.mark.parametrize("value", [-1, 1000])
def test_intervals_and_numbers_out_of_range_are_noticed(fact: int, value: int) -> None:
    layout, _, index = packed("wide")
    index[layout.intervals_at + fact * layout.num_components + 3] = value
    with pytest.raises(ConfigError, match="its lists are damaged"):
        check_index(layout, index)


def lies(layout: Layout) -> list[dict[str, Any]]:
    block = layout.row_blocks[1]
    rest = layout.row_blocks[:1], layout.row_blocks[2:]

    def with_block(**changes: Any) -> dict[str, Any]:
        return {"row_blocks": (*rest[0], block._replace(**changes), *rest[1])}

    return [
        {"shape": (1 << 40, 64)},
        {"shape": (48, 65)},
        {"shape": [48, 64]},
        {"shape": (48.0, 64)},
        {"num_components": 71},
        {"num_components": -1},
        {"split_sizes": (35, 36)},
        {"split_sizes": ()},
        {"stored": -1},
        {"stored": 48 * 64 + 1},
        {"row_blocks": layout.row_blocks[:-1]},
        {"row_blocks": layout.row_blocks[::-1]},
        {"row_blocks": list(layout.row_blocks)},
        {"row_blocks": tuple(tuple(part) for part in layout.row_blocks)},
        {"col_blocks": ()},
        with_block(start=15),
        with_block(stop=1 << 30),
        with_block(size=71),
        with_block(size=-1),
        with_block(list_at=block.list_at + 1),
        with_block(data_at=0),
        with_block(data_at=-16),
        with_block(first=60),
        with_block(first="0"),
        {"intervals_at": 0},
        {"col_table_at": layout.col_table_at + 5},
        {"row_table_at": 1 << 31},
        {"col_groups_at": 0},
        {"row_groups_at": layout.row_groups_at + 1},
        {"row_groups_at": 1 << 40},
        {"dense": True},
        {"transposed": True},
        {"transposed": 1},
        {"narrow": True},
    ]


@pytest.mark.parametrize("number", range(len(lies(packed("wide")[0]))))
def test_a_layout_that_lies_is_not_made(number: int) -> None:
    layout = packed("wide")[0]
    lie = lies(layout)[number]
    with pytest.raises(ConfigError, match="do not follow from one another"):
        dataclasses.replace(layout, **lie)
    state = {**layout.__getstate__(), **lie}
    with pytest.raises(ConfigError, match="do not follow from one another"):
        Layout.__new__(Layout).__setstate__(state)


def test_a_layout_and_a_plan_come_back_from_files_and_never_change() -> None:
    for value in (packed("narrow")[0], packed("wide")[0].t(), Plan(16, 16, ((4, "dense"), (1024, "compiled")))):
        again = pickle.loads(pickle.dumps(value))
        assert again == value == copy.deepcopy(value)
        with pytest.raises(ConfigError, match="its state is damaged"):
            again.__setstate__(vars(value))
        for state in ({}, {"x": 1}, None, [1]):
            with pytest.raises(ConfigError, match="its state is damaged"):
                type(value).__new__(type(value)).__setstate__(state)
    layout = packed("wide")[0]
    assert layout.t().t() is layout


@pytest.mark.parametrize(
    "lie",
    [
        {"block_rows": -1},
        {"block_rows": "16"},
        {"block_rows": True},
        {"kernels": ()},
        {"kernels": [(1024, "compiled")]},
        {"kernels": ((1024, "other"),)},
        {"kernels": ((None, "compiled"),)},
        {"kernels": ((1, "dense", 2),)},
        {"speedups": (1, 2)},
        {"device": 3},
        {"predicted": None},
    ],
)
def test_a_plan_that_lies_is_not_made(lie: dict[str, Any]) -> None:
    state = {**vars(Plan(16, 16)), **lie}
    with pytest.raises(ConfigError, match="plan: "):
        Plan.__new__(Plan).__setstate__(state)


def weight_of(**options: Any) -> GBLRTensor:
    return GBLRTensor.from_structured(matrix(**options), plan=Plan(16, 16))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("factors", lambda t: t[:-1], "asks for"),
        ("factors", lambda t: t.view(1, -1), "one-dimensional and contiguous"),
        ("factors", lambda t: t[:1].expand(len(t)), "one-dimensional and contiguous"),
        ("factors", lambda t: torch.cat([t, t])[::2], "one-dimensional and contiguous"),
        ("factors", torch._neg_view, "one-dimensional and contiguous"),
        ("factors", lambda t: t.to_sparse(), "one-dimensional and contiguous"),
        ("factors", lambda t: t.int(), "must be floating point"),
        ("factors", lambda t: t.to("meta"), "its factors are on meta, its lists on cpu"),
        ("factors", lambda t: None, "are no tensor, but NoneType"),
        ("lists", lambda t: t.long(), "lists of torch.int32"),
        ("lists", lambda t: t[:-1], "lists"),
        ("lists", lambda t: torch._neg_view(t), "one-dimensional and contiguous"),
        ("scales", lambda t: torch.ones(70), "with scales of torch.float32"),
        ("scales", lambda t: torch.ones(3), "asks for 70 scales, it has 3"),
        ("packing", lambda t: None, "no layout"),
        ("packing", lambda t: packed("narrow", seed=1)[0], "asks for"),
        ("plan", lambda t: "compiled", "no plan"),
        ("outer_shape", lambda t: (64, 48), "does not fit its 48 x 64 layout"),
        ("outer_shape", lambda t: (48, 64, 1), "it claims"),
        ("outer_shape", lambda t: (48, 1, 64), "do not hold whole channels"),
        ("outer_shape", lambda t: (48, "64"), "does not fit its 48 x 64 layout"),
        ("matrix", lambda t: torch.ones(2, 2), "the matrix beside its factors is of another shape"),
    ],
)
def test_parts_that_do_not_fit_are_named_before_a_product(part: str, change: Any, message: str) -> None:
    weight, x = weight_of(), torch.randn(3, 64)
    F.linear(x, weight)
    setattr(weight, part, change(getattr(weight, part)))
    for call in (lambda: F.linear(x, weight), lambda: F.linear(x.requires_grad_(), weight), weight.check):
        with pytest.raises(ConfigError, match=message):
            call()


def test_the_memory_of_a_buffer_may_be_given_back() -> None:
    for part in ("factors", "lists"):
        weight, x = weight_of(), torch.randn(3, 64)
        with torch.no_grad():
            F.linear(x, weight)
            setattr(weight, part, getattr(weight, part).clone())  # numpy's memory cannot be resized
            F.linear(x, weight)
            getattr(weight, part).untyped_storage().resize_(0)
            with pytest.raises(ConfigError, match=f"the memory of its {part} was given back"):
                F.linear(x, weight)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    calls: list[object] = []

    def count(*arguments: Any) -> None:
        calls.append(arguments)
        check_index(*arguments)

    monkeypatch.setattr("gblr_plugin.tensor.weight.check_index", count)
    return calls


def test_an_index_buffer_is_read_once_and_not_at_all_where_it_was_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, x = counted(monkeypatch), torch.randn(5, 64)
    weight = weight_of()

    def multiply(weight: Any) -> None:
        for _ in range(3):
            F.linear(x, weight)
            F.linear(x.clone().requires_grad_(), weight)
            x @ weight.t()
            weight.to_dense()
            weight.detach().t().to_dense()

    for made in (weight, weight.quantize(), weight.clone(), nn.Parameter(weight, requires_grad=False)):
        multiply(made)
    multiply_half = weight.to(torch.float64)
    F.linear(x.double(), multiply_half)
    assert calls == []
    buffer = io.BytesIO()
    torch.save(weight, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert calls == []
    multiply(loaded)
    assert len(calls) == 1
    again = copy.deepcopy(loaded)
    multiply(again)
    assert len(calls) == 2
    with torch.inference_mode():  # whose tensors count no changes
        made = weight_of()
        multiply_once = F.linear(x, made)
    assert multiply_once.shape == (5, 48)
    assert len(calls) == 3
    with torch.no_grad():
        F.linear(x, made)
        F.linear(x, made.t().t())
    assert len(calls) == 3


@pytest.mark.parametrize(
    "alias",
    [
        lambda weight: weight,
        lambda weight: weight.detach(),
        lambda weight: nn.Parameter(weight, requires_grad=False),
        lambda weight: weight.data,
        lambda weight: weight.t(),
    ],
)
@pytest.mark.parametrize("part", [lambda lists: lists, lambda lists: lists[2:9], lambda lists: lists.view(torch.int16)])
def test_changes_by_every_alias_are_noticed(alias: Any, part: Any) -> None:
    weight, x = weight_of(), torch.randn(5, 64)
    other = alias(weight)
    F.linear(x, weight)
    part(other.lists).add_(1)
    with pytest.raises(ConfigError, match="its lists are damaged"):
        F.linear(x, weight)
    part(other.lists).sub_(1)
    torch.testing.assert_close(F.linear(x, weight), x @ matrix().to_dense().T, rtol=1e-4, atol=1e-4)


def test_lists_from_a_file_share_their_memory_with_nothing() -> None:
    weight, x, buffer = weight_of(), torch.randn(5, 64), io.BytesIO()
    torch.save({"weight": weight, "other": weight.lists}, buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    expected = F.linear(x, state["weight"])
    state["other"].fill_(1 << 20)  # as the step of an optimizer could
    assert torch.equal(F.linear(x, state["weight"]), expected)


def test_a_file_cannot_bring_attributes_that_stand_in_the_way_of_the_check() -> None:
    weight = weight_of()
    state = weight.__getstate__()
    for name in ("_checks", "check", "to_dense", "shape"):
        with pytest.raises(ConfigError, match=f"it names '{name}'"):
            GBLRTensor.__new__(
                GBLRTensor, *(state[k] for k in ("factors", "lists", "packing", "plan", "outer_shape"))
            ).__setstate__({**state, name: None})
    with pytest.raises(ConfigError, match="check is part of its class"):
        weight.check = dict
    weight._checks = {"call": print}
    weight.lists.fill_(77)
    with pytest.raises(ConfigError, match="its lists are damaged"):
        F.linear(torch.randn(2, 64), weight)
    bare = GBLRTensor.__new__(GBLRTensor, *(state[k] for k in ("factors", "lists", "packing", "plan", "outer_shape")))
    with pytest.raises(ConfigError, match="it has no state"):
        F.linear(torch.randn(2, 64), bare)
    for damaged in (None, {}, {"factors": weight.factors}):
        with pytest.raises(ConfigError, match="its state is damaged"):
            bare.__setstate__(damaged)


def test_a_matrix_is_made_after_files_of_the_old_format_were_read() -> None:
    """Their buffers are filled when the weights are there already."""
    plan, x = Plan(16, 16, ((1024, "dense"),)), torch.randn(5, 64)
    for seed in range(3):
        weight = GBLRTensor.from_structured(matrix(seed=seed), plan=plan)
        buffer = io.BytesIO()
        torch.save(weight, buffer, _use_new_zipfile_serialization=False)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=True)
        torch.testing.assert_close(F.linear(x, loaded), F.linear(x, weight))
        assert torch.equal(loaded.matrix, weight.matrix)


def test_weights_without_memory_are_not_read() -> None:
    weight, buffer = weight_of(), io.BytesIO()
    torch.save(weight, buffer)
    buffer.seek(0)
    empty = torch.load(buffer, weights_only=True, map_location="meta")
    assert F.linear(torch.empty(3, 64, device="meta"), empty).shape == (3, 48)
    empty.check()
    with torch._subclasses.FakeTensorMode():
        buffer.seek(0)
        fake = torch.load(buffer, weights_only=True)
        assert F.linear(torch.empty(3, 64), fake).shape == (3, 48)


def test_compiled_programs_refuse_what_was_altered_before_and_after() -> None:
    module, x = nn.Linear(64, 48), torch.randn(5, 64)
    module.weight = nn.Parameter(weight_of(), requires_grad=False)
    program = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(program(x), module(x), rtol=1e-4, atol=1e-4)
        module.weight.lists.view(torch.int16)[:9] = 32767
        with pytest.raises(
            Exception, match=r"its lists are damaged|do not fit together"
        ):  # in an error of the compiler
            program(x)
        torch.compiler.reset()
        with pytest.raises(Exception, match="its lists are damaged"):
            torch.compile(module, backend="aot_eager", fullgraph=True)(x)
    torch.compiler.reset()


def arguments(layout: Layout, values: Tensor, index: Tensor) -> list[Any]:
    rows, cols = layout.row_blocks, layout.col_blocks
    sizes = [layout.col_table_at, len(cols), layout.col_groups_at, cols[0].stop - cols[0].start]
    sizes += [layout.row_table_at, len(rows), layout.row_groups_at, rows[0].stop - rows[0].start]
    sizes += [layout.num_components, layout.shape[0], layout.entries]
    return [torch.randn(3, layout.shape[1]), values, index, None, None, *sizes]


@pytest.mark.parametrize("kind", KINDS)
def test_the_operator_takes_what_was_packed_and_nothing_else(kind: str) -> None:
    pytest.importorskip("numba")
    layout, values, index = packed(kind, splits=3)
    call = torch.ops.gblr_plugin.structured_linear
    sound = arguments(layout, values, index)
    assert call(*sound).shape == (3, layout.shape[0])
    others: list[list[Any]] = []
    for number in range(5, 16):
        for value in (sound[number] + 1, sound[number] - 1, -5, 1 << 33):
            others.append([*sound[:number], value, *sound[number + 1 :]])
    others += [
        [torch.randn(3, layout.shape[1] + 1), *sound[1:]],
        [sound[0].double(), *sound[1:]],
        [sound[0], values[:-1], *sound[2:]],
        [sound[0], values.double(), *sound[2:]],
        [*sound[:2], index[:-1].clone() if not layout.narrow else index[:-5].clone(), *sound[3:]],
        [*sound[:3], torch.zeros(3), *sound[4:]],
        [*sound[:4], torch.ones(3), *sound[5:]],
    ]
    for wrong in others:
        with pytest.raises(ConfigError, match="do not fit together"):
            call(*wrong)
    words = index.view(torch.int16) if layout.narrow else index
    words[4] += 100
    with pytest.raises(ConfigError, match="do not fit together"):
        call(*sound)


def test_the_operator_takes_int8_with_scales() -> None:
    pytest.importorskip("numba")
    layout, values, index = packed("narrow")
    factors, scales = quantize(layout, values, index)
    call, sound = torch.ops.gblr_plugin.structured_linear, arguments(layout, factors, index)
    sound[4] = scales
    assert call(*sound).shape == (3, 48)
    for wrong in (None, scales[:-1], scales.double(), torch.cat([scales, scales])[::2]):
        sound[4] = wrong
        with pytest.raises(ConfigError, match="do not fit together"):
            call(*sound)


def test_what_is_known_of_a_buffer_goes_with_it() -> None:
    layout, _, index = packed("wide")
    assert not is_known(index, layout)
    vouch(index, layout)
    vouch(index, layout)
    assert is_known(index, layout)
    assert is_known(index, copy.deepcopy(layout))
    assert is_known(index, layout.t())
    assert not is_known(index, packed("even")[0])
    assert not is_known(index.clone(), layout)
    key, count = id(index), len(soundness._KNOWN)
    assert len(soundness._KNOWN[key].facts) == 1
    index.add_(0)
    assert not is_known(index, layout)
    del index
    gc.collect()
    assert key not in soundness._KNOWN
    assert len(soundness._KNOWN) < count


def test_blocks_are_named_tuples_of_whole_numbers() -> None:
    layout = packed("wide")[0]
    blocks = (Block(0.0, 16, *layout.row_blocks[0][2:]), *layout.row_blocks[1:])
    with pytest.raises(ConfigError, match="do not follow from one another"):
        dataclasses.replace(layout, row_blocks=blocks)
