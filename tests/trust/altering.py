"""Alters structured weights at random, brings them into a process by each way there is, and multiplies by them.

    python tests/trust/altering.py --cases 10000 --seed 0

Children take the cases, so that one that crashes is noticed and the rest goes on. A case ends well if it is refused, or
if its products are those of the matrix that the weight says it is and its index buffer leads nowhere outside. Where
glibc's debugging allocator is there, children run with it: it ends a process that wrote outside of what it was given.
Prints one JSON line: outcomes of each way, and the failures; the exit code is 1 if there are any.
"""

from __future__ import annotations

import argparse
import copy
import copyreg
import dataclasses
import io
import json
import os
import pickle
import random
import select
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gblr_plugin import GBLRTensor, load, save
from gblr_plugin.errors import GBLRError
from gblr_plugin.kernels.compiled import available
from gblr_plugin.kernels.layout import Block, Layout
from gblr_plugin.kernels.packing import pack
from gblr_plugin.kernels.plan import Plan
from gblr_plugin.matrix.structure import Intervals, StructuredMatrix

PATIENCE = 60.0  # seconds for one case; a hang is a failure
TOKENS = (1, 3, 70)
ALLOCATOR = "/lib/x86_64-linux-gnu/libc_malloc_debug.so.0"

# -- weights -----------------------------------------------------------------------------------------------------------


def matrix(components: int, m: int, n: int, splits: int = 1, dtype: torch.dtype = torch.float32) -> StructuredMatrix:
    g = torch.Generator().manual_seed(components)

    def intervals(length: int) -> Intervals:
        width = torch.randint(1, length + 1, (components,), generator=g)
        return Intervals(width, torch.randint(0, length, (components,), generator=g), length)

    u = torch.randn(components, m // splits, generator=g, dtype=torch.float64).to(dtype)
    v = torch.randn(components, n, generator=g, dtype=torch.float64).to(dtype)
    sizes = tuple(len(part) for part in torch.arange(components).tensor_split(splits))
    return StructuredMatrix.from_factors(u, v, intervals(m // splits), intervals(n), sizes)


def wide(source: StructuredMatrix) -> GBLRTensor:
    """With 32-bit lists and groups, as on CUDA."""
    layout, values, index = pack(source, 16, 16)
    return GBLRTensor(values, index, layout, Plan(16, 16), source.shape)


def samples() -> list[GBLRTensor]:
    torch.manual_seed(0)
    plan, make = Plan(16, 16), GBLRTensor.from_structured
    both = Plan(16, 16, ((2, "dense"), (1024, "compiled")))
    found = [
        make(matrix(20, 48, 64), plan=plan),
        make(matrix(30, 32, 64), plan=both),
        make(matrix(24, 48, 64, splits=3), plan=Plan(8, 32)),
        wide(matrix(70, 48, 64)),
        wide(matrix(21, 48, 64, splits=3)),
        make(matrix(22, 48, 64), plan=plan, factor_dtype="int8"),
        make(matrix(23, 31, 37), plan=Plan(7, 11)),
        make(matrix(26, 48, 64), plan=Plan(16, 16, ((1024, "blocks"),))),
        make(matrix(27, 48, 64, dtype=torch.float64), plan=plan),
        make(matrix(28, 48, 64), plan=Plan(0, 0, ((1024, "dense"),))),
        make(matrix(29, 48, 64), plan=plan).t(),
        make(matrix(0, 48, 64), plan=plan),
        make(matrix(25, 16, 54), shape=(16, 6, 3, 3), plan=Plan(16, 18)),
        make(matrix(25, 16, 54), shape=(16, 6, 9), plan=Plan(16, 18, ((1024, "blocks"),))),
        make(matrix(25, 16, 54), shape=(16, 6, 3, 3), plan=Plan(16, 18), factor_dtype="int8"),
    ]
    if available(torch.device("cpu"), torch.bfloat16):
        found.append(make(matrix(32, 48, 64, dtype=torch.bfloat16), plan=plan))
    return found


# -- claims: what a file says, whatever it is -------------------------------------------------------------------------


class Claimed:
    """Pickled as an object of a class with a state, neither of them looked at."""

    def __init__(self, kind: type, state: object) -> None:
        self.kind, self.state = kind, state

    @property
    def __class__(self) -> Any:  # which pickle compares
        return self.kind

    def __reduce__(self) -> Any:
        return copyreg.__newobj__, (self.kind,), self.state


class Called:
    """Pickled as a call."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


def parts_of(weight: GBLRTensor) -> dict[str, Any]:
    """A weight as values that can be altered one by one; buffers are copies."""
    return {
        "factors": weight.factors.clone(),
        "lists": weight.lists.clone(),
        "scales": None if weight.scales is None else weight.scales.clone(),
        "packing": {field.name: getattr(weight.packing, field.name) for field in dataclasses.fields(Layout)},
        "plan": {field.name: getattr(weight.plan, field.name) for field in dataclasses.fields(Plan)},
        "outer_shape": weight.outer_shape,
        "outside": {"dtype": weight.dtype, "size": tuple(weight.shape), "device": torch.device("cpu")},
        "more": {},
    }


def claim(parts: dict[str, Any], way: str) -> Any:
    """What to pickle so that this weight is read."""
    packing, plan = Claimed(Layout, parts["packing"]), Claimed(Plan, parts["plan"])
    state = {name: parts[name] for name in ("factors", "lists", "scales", "outer_shape")}
    state |= {"packing": packing, "plan": plan, **parts["more"]}
    outside = parts["outside"]
    if way == "constructor":
        return Called(GBLRTensor, *(state[name] for name in ("factors", "lists", "packing", "plan", "outer_shape")))
    shape = outside["size"]
    stride = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        stride[axis] = stride[axis + 1] * shape[axis + 1]
    empty = (GBLRTensor, outside["dtype"], shape, tuple(stride), 0, torch.strided, outside["device"], False)
    rebuild = torch._utils._rebuild_wrapper_subclass
    if way == "attributes":  # a sound weight as a parameter that gets attributes after its check
        sound = Called(torch._tensor._rebuild_from_type_v2, rebuild, GBLRTensor, empty, parts["sound"])
        return Called(torch._utils._rebuild_parameter_with_state, sound, False, {}, state)
    return Called(torch._tensor._rebuild_from_type_v2, rebuild, GBLRTensor, empty, state)


def odd_number(draw: random.Random, near: int) -> Any:
    return draw.choice(
        [near + 1, near - 1, 0, -1, -near, near * 2, 1 << 20, 1 << 31, (1 << 31) - 1, 1 << 40, 1 << 62, 1 << 70]
    )


def odd_value(draw: random.Random, near: Any) -> Any:
    if type(near) is int and draw.random() < 0.8:
        return odd_number(draw, near)
    if isinstance(near, tuple) and near and draw.random() < 0.8:
        values = list(near)
        at = draw.randrange(len(values))
        how = draw.randrange(5)
        if how == 0:
            values.pop(at)
        elif how == 1:
            values.insert(at, values[at])
        elif how == 2:
            values[at] = odd_value(draw, values[at])
        elif how == 3:
            draw.shuffle(values)
        else:
            return values
        return Block(*values) if isinstance(near, Block) and len(values) == 6 else tuple(values)
    return draw.choice([None, "", "x", 0.5, float("nan"), True, (), [], {}, (1, 2), 3, -7, b"x", torch.zeros(2)])


def alter_words(draw: random.Random, parts: dict[str, Any]) -> None:
    """Some words of the index buffer: lists, intervals, tables or groups."""
    lists, num = parts["lists"], parts["packing"]["num_components"]
    if not isinstance(num, int) or not lists.numel() or lists.dim() != 1 or lists.dtype != torch.int32:
        return
    words = lists.view(torch.int16) if draw.random() < 0.5 else lists
    limit = 1 << 15 if words.dtype == torch.int16 else 1 << 31
    for _ in range(draw.choice([1, 1, 2, 5, 40])):
        at = draw.randrange(len(words))
        old = int(words[at])
        new = draw.choice(
            [old + 1, old - 1, num, num - 1, -1, 0, old ^ (1 << draw.randrange(16)), draw.randrange(-limit, limit)]
        )
        words[at] = (new + limit) % (2 * limit) - limit
    if draw.random() < 0.05:
        words.random_(-limit, limit - 1, generator=torch.Generator().manual_seed(draw.randrange(1 << 30)))


def alter_buffer(draw: random.Random, parts: dict[str, Any]) -> None:
    """The shape, dtype, strides or memory of a buffer."""
    name = draw.choice(["factors", "lists", "scales"])
    old = parts[name]
    if old is None or not isinstance(old, Tensor):
        old = torch.ones(draw.choice([1, 20, 22, 25]))
    flat = old.reshape(-1)
    some = flat[: len(flat) // 2]
    parts[name] = draw.choice(
        [
            lambda: some,
            lambda: flat[:-1],
            lambda: flat[1:],
            lambda: flat[:0],
            lambda: torch.cat([flat, flat]),
            lambda: flat[:1].expand(len(flat)) if len(flat) else flat,
            lambda: flat[::2],
            lambda: torch.cat([flat, flat])[::2],
            lambda: flat.view(1, -1),
            lambda: flat.to(draw.choice([torch.float64, torch.int64, torch.int16, torch.uint8, torch.bool])),
            lambda: flat.to(draw.choice([torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.complex64])),
            lambda: torch._neg_view(flat) if flat.dtype not in (torch.bool, torch.uint8) else flat,
            lambda: flat.to_sparse(),
            lambda: flat.to("meta"),
            lambda: nn.Parameter(flat, requires_grad=False),
            lambda: None,
            lambda: [1, 2, 3],
            lambda: torch.zeros(1 << 20, dtype=flat.dtype),
        ]
    )()


def alter_aliases(draw: random.Random, parts: dict[str, Any]) -> None:
    """Two buffers in one memory."""
    one, other = draw.sample(["factors", "lists", "scales"], 2)
    a, b = parts[one], parts[other]
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or not a.is_contiguous() or b.is_sparse:
        return
    try:
        parts[other] = a.reshape(-1).view(b.dtype)[: b.numel()]
    except RuntimeError:
        return


def alter_packing(draw: random.Random, parts: dict[str, Any]) -> None:
    packing = parts["packing"]
    name = draw.choice(list(packing))
    packing[name] = odd_value(draw, packing[name])
    if draw.random() < 0.1:
        packing.pop(draw.choice(list(packing)))
    if draw.random() < 0.1:
        packing[draw.choice(["row_batches", "list_entries", "_transposed", "x"])] = odd_value(draw, 3)


def alter_plan(draw: random.Random, parts: dict[str, Any]) -> None:
    plan = parts["plan"]
    name = draw.choice(list(plan))
    plan[name] = odd_value(draw, plan[name])
    if draw.random() < 0.1:
        plan.pop(draw.choice(list(plan)))


def alter_kernels(draw: random.Random, parts: dict[str, Any]) -> None:
    """Another choice of kernels, which is allowed."""
    parts["plan"]["kernels"] = tuple((tokens, draw.choice(["compiled", "blocks", "dense"])) for tokens in (2, 1024))


def alter_outside(draw: random.Random, parts: dict[str, Any]) -> None:
    how = draw.randrange(5)
    if how == 0:
        parts["outer_shape"] = odd_value(draw, parts["outer_shape"])
    elif how == 1:
        parts["outside"]["size"] = draw.choice([(1,), (48, 48), (64, 48), (1 << 20, 1 << 20), (48, 64, 1)])
    elif how == 2:
        parts["outside"]["dtype"] = draw.choice([torch.float64, torch.int8, torch.bool, torch.bfloat16])
    elif how == 3:
        parts["outside"]["device"] = torch.device("meta")
    else:
        m, n = parts["outer_shape"][0], parts["outer_shape"][1]
        parts["outer_shape"] = parts["outside"]["size"] = draw.choice([(n, m), (m, n, 1), (m, 1, n), (m * n, 1)])


def alter_keys(draw: random.Random, parts: dict[str, Any]) -> None:
    """Names of attributes and methods that a state must not bring along."""
    name = draw.choice(
        ["_checks", "matrix", "to_dense", "_checked", "dense_elements", "shape", "x", "__class__", "data"]
    )
    parts["more"][name] = draw.choice([None, 3, torch.zeros(4, 4), {}, Called(torch.Size, (1, 2))])


def alter_mixture(draw: random.Random, parts: dict[str, Any]) -> None:
    """Parts of another sound weight."""
    other = parts_of(draw.choice(WEIGHTS))
    for name in draw.sample(["factors", "lists", "scales", "packing", "plan", "outer_shape"], draw.randrange(1, 4)):
        parts[name] = other[name]


ALTERATIONS = [alter_words] * 8 + [alter_packing] * 4 + [alter_buffer] * 3
ALTERATIONS += [alter_aliases, alter_plan, alter_kernels, alter_outside, alter_keys, alter_mixture, alter_mixture]


def altered(draw: random.Random) -> dict[str, Any]:
    weight = draw.choice(WEIGHTS)
    parts = parts_of(weight)
    parts["sound"] = {name: getattr(weight, name) for name in ("factors", "lists", "scales", "packing", "plan")}
    parts["sound"]["outer_shape"] = weight.outer_shape
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        draw.choice(ALTERATIONS)(draw, parts)
    return parts


# -- ways in -----------------------------------------------------------------------------------------------------------


def home(weight: GBLRTensor) -> nn.Module:
    """A module that holds such a weight."""
    shape = weight.outer_shape
    kinds = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d}
    module = kinds[len(shape)](shape[1], shape[0], *([shape[2:]] if len(shape) > 2 else []), dtype=weight.dtype)
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


def written(content: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def by_file(draw: random.Random, way: str) -> Any:
    """``torch.load`` of altered claims, and what users do with a state."""
    parts = altered(draw)
    data = written({"weight": claim(parts, way)}, _use_new_zipfile_serialization=way != "old format")
    if way == "mapped":
        path = FOLDER / "mapped.pt"
        path.write_bytes(data)
        weight = torch.load(path, weights_only=True, mmap=True)["weight"]
    else:
        weight = torch.load(io.BytesIO(data), weights_only=True)["weight"]
    if way in ("assigned", "copied"):
        like = [source for source in WEIGHTS if source.shape == weight.shape] or WEIGHTS
        same_layout = [source for source in like if source.packing == weight.packing]
        module = home(draw.choice(same_layout or like).clone())
        if draw.random() < 0.5:
            use(module)
        module.load_state_dict({"weight": weight}, strict=False, assign=way == "assigned")
        return module
    return weight


def by_bytes(draw: random.Random, way: str) -> Any:
    """A file some of whose bytes are others."""
    data = bytearray(written({"weight": draw.choice(WEIGHTS)}, _use_new_zipfile_serialization=draw.random() < 0.5))
    for _ in range(draw.choice([1, 1, 3, 20])):
        data[draw.randrange(len(data))] = draw.randrange(256)
    if draw.random() < 0.1:
        del data[draw.randrange(len(data)) :]
    return torch.load(io.BytesIO(bytes(data)), weights_only=True)["weight"]


def by_pickle(draw: random.Random, way: str) -> Any:
    """``pickle`` and ``torch.load`` of a whole module."""
    module, parts = home(draw.choice(WEIGHTS)), altered(draw)
    module._parameters["weight"] = claim(parts, way)
    if way == "pickled module":
        return pickle.loads(pickle.dumps(module))
    return torch.load(io.BytesIO(written(module)), weights_only=False)


def by_unflatten(draw: random.Random, way: str) -> Any:
    parts = altered(draw)
    packing, plan = (
        pickle.loads(pickle.dumps(claim_of))  # what a constructor would refuse cannot get here
        for claim_of in (Claimed(Layout, parts["packing"]), Claimed(Plan, parts["plan"]))
    )
    tensors = {name: parts[name] for name in ("factors", "lists", "scales") if parts[name] is not None}
    facts = {"packing": packing, "plan": plan, "outer_shape": parts["outer_shape"]}
    weight = GBLRTensor.__tensor_unflatten__(tensors, facts, None, None)
    if way == "deep copy":
        return copy.deepcopy(weight)
    if way == "data":
        module = home(draw.choice(WEIGHTS).clone())
        module.weight.data = weight
        return module
    return weight


def by_hand(draw: random.Random, way: str) -> Any:
    """Buffers of a living weight, changed in place or put in its place, after a product or before."""
    weight = draw.choice(WEIGHTS).clone()
    module: Any = home(weight)
    if draw.random() < 0.7:
        use(module)
    target = module.weight
    target = draw.choice([lambda: target, lambda: target.detach(), lambda: module.state_dict()["weight"]])()
    lists, parts = target.lists, altered(draw)
    at, count = draw.randrange(max(len(lists), 1)), draw.choice([1, 7])
    value = draw.choice([-1, 20, 30000, 70000, (1 << 31) - 1])
    draw.choice(
        [
            lambda: lists[at : at + count].fill_(value),
            lambda: lists.view(torch.int16)[at : at + count].fill_(value % (1 << 15)),
            lambda: lists.reshape(1, -1).add_(1),
            lambda: lists.set_(lists[: len(lists) // 2].clone()),
            lambda: lists.resize_(len(lists) // 2),
            lambda: lists.copy_(torch.randint_like(lists, 50)),
            lambda: target.factors.resize_(3),
            lambda: target.factors.set_(torch.zeros(3, dtype=target.factors.dtype)),
            lambda: target.factors.untyped_storage().resize_(0),
            lambda: lists.untyped_storage().resize_(0),
            lambda: setattr(module.weight, "lists", parts["lists"]),
            lambda: setattr(module.weight, "factors", parts["factors"]),
            lambda: setattr(module.weight, "scales", parts["scales"]),
            lambda: setattr(module.weight, "packing", draw.choice(WEIGHTS).packing),
            lambda: setattr(module.weight, "plan", draw.choice(WEIGHTS).plan),
            lambda: setattr(module.weight, "outer_shape", parts["outer_shape"]),
        ]
    )()
    return module


def by_operator(draw: random.Random, way: str) -> Any:
    """The operator that compiled programs call, with altered arguments."""
    weight = draw.choice([weight for weight in WEIGHTS if not weight.packing.dense and weight.dtype is torch.float32])
    layout, parts = weight.packing, parts_of(weight)
    for _ in range(draw.choice([0, 1, 1, 2])):
        draw.choice([alter_words, alter_buffer, alter_words])(draw, parts)
    rows, cols = layout.row_blocks, layout.col_blocks
    sizes = [layout.col_table_at, len(cols), layout.col_groups_at, cols[0].stop - cols[0].start]
    sizes += [layout.row_table_at, len(rows), layout.row_groups_at, rows[0].stop - rows[0].start]
    sizes += [layout.num_components, layout.shape[0], layout.entries]
    for _ in range(draw.choice([0, 0, 1, 2])):
        number = draw.randrange(len(sizes))
        sizes[number] = odd_number(draw, sizes[number])
    x = torch.randn(draw.choice([0, 1, 3, 70]), layout.shape[1] + draw.choice([0, 0, 0, 1, -1]))
    bias = draw.choice([None, torch.randn(layout.shape[0]), torch.randn(3), torch.zeros(layout.shape[0]).double()])
    call = torch.ops.gblr_plugin.structured_linear
    y = call(x, parts["factors"], parts["lists"], bias, parts["scales"], *sizes)
    if y.shape != (len(x), sizes[9]):
        raise WrongError(y.shape)
    return None


def by_safetensors(draw: random.Random, way: str) -> Any:
    """Our own format, with altered tensors and no checksums to notice it."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    weight = draw.choice([weight for weight in WEIGHTS if not weight.packing.narrow or weight.dtype != torch.float64])
    path, module = FOLDER / "model.safetensors", home(weight)
    save(module, path)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  # no mapping
        facts = {key: value for key, value in file.metadata().items() if "crc32" not in key}
    name = draw.choice(list(tensors))
    flat = tensors[name].reshape(-1)
    how = draw.randrange(4)
    if how == 0 and flat.numel():
        raw = flat.view(torch.uint8)
        for _ in range(draw.choice([1, 5])):
            raw[draw.randrange(len(raw))] = draw.randrange(256)
    elif how == 1:
        tensors[name] = flat[: len(flat) // 2].clone()
    elif how == 2:
        text = list(facts["gblr"])
        at = draw.choice([i for i, letter in enumerate(text) if letter.isdigit()])
        text[at] = draw.choice(["9", "0", "-1", "77", "1e9", "null", "[]"])
        facts["gblr"] = "".join(text)
    else:
        tensors[name] = tensors[name].to(draw.choice([torch.int32, torch.int16, torch.float32, torch.int8]))
    save_file(tensors, path, facts)
    empty = copy.copy(module)
    empty._parameters = {
        **module._parameters,
        "weight": nn.Parameter(torch.zeros(weight.outer_shape, dtype=weight.dtype)),
    }
    return load(path, empty)


WAYS: dict[str, Callable[[random.Random, str], Any]] = {
    **dict.fromkeys(["state", "assigned", "copied", "constructor", "attributes", "old format", "mapped"], by_file),
    "bytes": by_bytes,
    **dict.fromkeys(["pickled module", "whole module"], by_pickle),
    **dict.fromkeys(["unflattened", "deep copy", "data"], by_unflatten),
    "by hand": by_hand,
    "operator": by_operator,
    "safetensors": by_safetensors,
}

# -- use ---------------------------------------------------------------------------------------------------------------


class WrongError(AssertionError):
    """A weight that was not refused, and multiplies wrongly."""


def use(module: Any) -> None:
    """Multiply in every way there is; an AssertionError where a product is not that of the matrix."""
    weight = module.weight if isinstance(module, nn.Module) else module
    assert isinstance(weight, GBLRTensor), type(weight)
    if weight.is_meta:
        return
    shape, dtype = weight.outer_shape, weight.dtype
    if not isinstance(shape, tuple) or not 2 <= len(shape) <= 4 or not all(type(s) is int and s < 4096 for s in shape):
        weight.check()
        raise WrongError(f"a shape of {shape} was accepted")
    product = {2: F.linear, 3: F.conv1d, 4: F.conv2d}[len(shape)]
    if not dtype.is_floating_point:
        F.linear(torch.ones(3, shape[1], dtype=dtype), weight)
        raise WrongError(f"a weight of {dtype} was multiplied")
    inputs = [torch.randn(tokens, shape[1], dtype=dtype) for tokens in TOKENS]
    if len(shape) > 2:
        inputs = [torch.randn(2, shape[1], *(size + 9 for size in shape[2:]), dtype=dtype)]
    for x in inputs:
        with torch.no_grad():
            first = product(x, weight)
            assert leads_inside(weight), "its index buffer leads outside"
            dense = weight.to_dense()
            same(first, product(x, dense), "a product")
            same(product(x, weight), first, "a second product")
            if len(shape) == 2:
                back = torch.randn(len(x), shape[0], dtype=dtype)
                same(back @ weight, back @ dense, "the transposed product")
        x = x.clone().requires_grad_()
        y = product(x, weight)
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape
        same(y.detach(), first, "a product with gradients")
    copy.deepcopy(weight)
    if len(weight.packing.split_sizes) == 1:
        weight.to_structured()


def same(a: Tensor, b: Tensor, what: str) -> None:
    assert a.shape == b.shape, what
    if a.dtype == torch.bfloat16 or not bool(a.isfinite().all() and b.isfinite().all()):
        return
    scale = max(float(b.abs().max()) if b.numel() else 0.0, 1e-3)
    assert float((a - b).abs().max()) <= 1e-3 * scale if a.numel() else True, what


def leads_inside(weight: GBLRTensor) -> bool:
    """Whatever the package's check says: does each table of the index buffer lead to places that there are."""
    layout, words = weight.packing, weight.lists
    if layout.dense:
        return True
    lists = words.view(torch.int16) if layout.narrow else words
    room = weight.factors.untyped_storage().nbytes() // weight.factors.itemsize - weight.factors.storage_offset()
    sides = (
        (layout.col_table_at, layout.col_blocks, layout.shape[1]),
        (layout.row_table_at, layout.row_blocks, layout.shape[0]),
    )
    for at, blocks, length in sides:
        for start, width, size, list_at, data_at in words[at : at + 5 * len(blocks)].view(-1, 5).tolist():
            own = lists[list_at : list_at + size].tolist()
            if start < 0 or width < 1 or start + width > length or min(list_at, data_at, size) < 0:
                return False
            if (
                len(own) != size or data_at + size * width > room
            ):  # memory stays where a tensor is made shorter in place
                return False
            if any(not 0 <= number < layout.num_components for number in own):
                return False
    return True


def outcome(number: int, seed: int) -> tuple[str, str, str]:
    """(way, outcome, what went wrong) of one case, the same each time."""
    draw = random.Random(seed * 1_000_003 + number)
    torch.manual_seed(number)
    way = list(WAYS)[number % len(WAYS)]
    try:
        found = WAYS[way](draw, way)
    except WrongError:
        return way, "wrong", traceback.format_exc()
    except GBLRError:
        return way, "refused at the door", ""
    except Exception as error:  # of torch: its unpickler raises many kinds over damaged files
        told = "refused at the door" if "GBLR tensor: " in str(error) else "refused by torch"
        return way, told, ""
    if found is None:
        return way, "multiplied", ""
    try:
        use(found)
    except GBLRError:
        return way, "refused at the product", ""
    except Exception as error:
        if way == "by hand" and type(error) in (RuntimeError, IndexError):  # factors that were made shorter in place
            return way, "refused by torch", ""
        return way, "wrong", traceback.format_exc()
    return way, "multiplied", ""


# -- children ----------------------------------------------------------------------------------------------------------

WEIGHTS: list[GBLRTensor] = []
FOLDER = Path()


def child(first: int, last: int, seed: int, out: int) -> None:
    for number in range(first, last):
        os.write(out, (json.dumps([number]) + "\n").encode())
        os.write(out, (json.dumps([number, *outcome(number, seed)]) + "\n").encode())
    os._exit(0)


def run(first: int, last: int, seed: int) -> tuple[list[list[Any]], str | None]:
    """Outcomes of some cases in a child, and how the child died before the last."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        child(first, last, seed, write)
    os.close(write)
    text, quiet_since, hung = b"", time.monotonic(), False
    while True:
        if select.select([read], [], [], 1.0)[0]:
            more = os.read(read, 1 << 16)
            if not more:
                break
            text, quiet_since = text + more, time.monotonic()
        elif time.monotonic() - quiet_since > PATIENCE:
            hung = True
            os.kill(pid, signal.SIGKILL)
            break
    os.close(read)
    status = os.waitpid(pid, 0)[1]
    rows = [json.loads(line) for line in text.decode().splitlines()]
    if status == 0:
        return rows, None
    return rows, "hung" if hung else f"ended with signal {os.WTERMSIG(status)}, code {os.WEXITSTATUS(status)}"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--batch", type=int, default=200, help="cases in one child")
    parser.add_argument("--folder", type=Path, required=False, help="for files, a temporary one by default")
    options = parser.parse_args()
    if "MALLOC_CHECK_" not in os.environ and Path(ALLOCATOR).exists():
        env = {**os.environ, "MALLOC_CHECK_": "3", "MALLOC_PERTURB_": "165", "LD_PRELOAD": ALLOCATOR}
        os.execve(sys.executable, [sys.executable, *sys.argv], env)
    import tempfile

    global FOLDER
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    WEIGHTS.extend(samples())
    for weight in WEIGHTS:
        use(home(weight))  # compiles kernels, before there are children
    counts: dict[str, Counter[str]] = {way: Counter() for way in WAYS}
    failures: list[list[Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        FOLDER = options.folder or Path(folder)
        at, end = options.first, options.first + options.cases
        while at < end:
            rows, death = run(at, min(at + options.batch, end), options.seed)
            for number, *told in (row for row in rows if len(row) > 1):
                way, what, trace = told
                counts[way][what] += 1
                if what == "wrong":
                    failures.append([number, way, trace.strip().splitlines()[-1], trace])
            at = min(at + options.batch, end) if death is None else rows[-1][0] + 1
            if death is not None:
                failures.append([at - 1, list(WAYS)[(at - 1) % len(WAYS)], death, ""])
    print(json.dumps({"cases": options.cases, "seed": options.seed, "counts": counts, "failures": failures}))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
