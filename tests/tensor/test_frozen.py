"""Small frozen weights run dense where that is faster, and stay structured in all else."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import gblr_plugin as gblr
from gblr_plugin import load, save
from gblr_plugin.bench.products import random_structure
from gblr_plugin.kernels import compiled
from gblr_plugin.kernels.plan import BUCKETS, MATRIX, Plan, fixed_plan
from gblr_plugin.surgery.conversion import frozen_like
from gblr_plugin.tensor import frozen
from gblr_plugin.tensor.frozen import FrozenConv1d, FrozenConv2d, FrozenLinear, use_kept_matrix
from gblr_plugin.tensor.gblr_tensor import GBLRTensor

needs_numba = pytest.mark.skipif(
    not compiled.available(torch.device("cpu"), torch.float32), reason="costs are those of the compiled kernel"
)


def tiny(**options: object) -> nn.Module:
    return frozen_like(nn.Linear(32, 24), random_structure(24, 32, 0.25), **options)  # type: ignore[arg-type]  # one of plan


@needs_numba
def test_plans_take_dense_where_structure_saves_too_little() -> None:
    assert fixed_plan(random_structure(24, 32, 0.25)).dense_tokens == ((-1, None),)
    middle = fixed_plan(random_structure(160, 160, 0.25))
    ((above, to),) = middle.dense_tokens
    assert above == -1
    assert to is not None
    assert 0 < to < BUCKETS[-1]
    assert middle.kernel(1) == "dense"
    assert middle.kernel(1000) == "compiled"
    assert fixed_plan(random_structure(1024, 1024, 0.25)).dense_tokens == ()
    assert fixed_plan(random_structure(24, 32, 0.25), beside=False).dense_tokens == ()
    assert fixed_plan(random_structure(24, 32, 0.25), int8=True).dense_tokens == ()


def without_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gblr_plugin.kernels.compiled.available", lambda *_: False)
    monkeypatch.setattr("gblr_plugin.kernels.plan.available", lambda *_: False)


@needs_numba
@pytest.mark.parametrize("flops", [0.25, 0.75])
def test_without_a_compiled_kernel_dense_is_taken_more_often(flops: float, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = random_structure(1024, 1024, flops)
    before = {tokens for tokens in BUCKETS if fixed_plan(matrix).kernel(tokens) == "dense"}
    without_compiled_kernels(monkeypatch)
    plan = fixed_plan(matrix)
    dense = {tokens for tokens in BUCKETS if plan.kernel(tokens) == "dense"}
    assert before < dense or len(before) == len(BUCKETS)


@pytest.mark.parametrize("flops", [0.25, 0.75])
def test_plans_without_a_compiled_kernel_multiply_rightly(flops: float, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = random_structure(1024, 1024, flops)
    without_compiled_kernels(monkeypatch)
    plan = fixed_plan(matrix)
    assert plan.kernel(1) == "dense"
    assert (plan.kernel(1024) == "dense") == (flops > 0.5)
    layer = frozen_like(nn.Linear(1024, 1024), matrix)
    assert layer.weight.matrix is not None
    for tokens in (1, 64, 300):
        x = torch.randn(tokens, 1024)
        torch.testing.assert_close(layer(x), F.linear(x, matrix.to_dense(), layer.bias), rtol=1e-3, atol=1e-3)


@needs_numba
def test_no_matrix_where_structure_loses_nowhere() -> None:
    for size in (512, 768, 1024):
        assert GBLRTensor.from_structured(random_structure(size, size, 0.25)).matrix is None
    assert fixed_plan(random_structure(512, 512, 0.75)).keeps_matrix


@needs_numba
def test_large_weights_keep_the_matrix_only_where_it_is_faster_throughout() -> None:
    if compiled.available(torch.device("cpu"), torch.bfloat16):
        costly = random_structure(1024, 1024, 0.9, dtype=torch.bfloat16)
        assert costly.relative_flops < 1
        assert fixed_plan(costly).kernel(1000) == "dense"
        assert GBLRTensor.from_structured(costly).relative_flops == pytest.approx(costly.relative_flops)
    lean = GBLRTensor.from_structured(random_structure(768, 768, 0.25))
    assert MATRIX < 768 * 768 * 4
    assert lean.matrix is None


@pytest.mark.parametrize("shape", [(24, 32), (24, 8, 3), (24, 8, 3, 3)])
@pytest.mark.parametrize("bias", [False, True])
def test_frozen_modules_equal_dense_ones(shape: tuple[int, ...], bias: bool) -> None:
    matrix = random_structure(24, int(torch.Size(shape[1:]).numel()), 0.3)
    dense: nn.Module = {
        2: lambda: nn.Linear(32, 24, bias=bias),
        3: lambda: nn.Conv1d(8, 24, 3, padding=1, bias=bias),
        4: lambda: nn.Conv2d(8, 24, 3, padding=1, bias=bias),
    }[len(shape)]()
    frozen = frozen_like(dense, matrix)
    assert type(frozen) is {2: FrozenLinear, 3: FrozenConv1d, 4: FrozenConv2d}[len(shape)]
    x = torch.randn(2, 5, 32) if len(shape) == 2 else torch.randn(2, 8, *(7,) * (len(shape) - 2))
    x.requires_grad_()
    dense.weight = nn.Parameter(matrix.to_dense().view(shape))
    torch.testing.assert_close(frozen(x), dense(x), rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(dense(x))
    inputs = (x, frozen.bias) if bias else (x,)
    mine = torch.autograd.grad(frozen(x), inputs, upstream)
    true = torch.autograd.grad(dense(x), (x, dense.bias) if bias else (x,), upstream)
    for a, b in zip(mine, true, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@needs_numba
def test_both_sides_of_the_limit_agree() -> None:
    matrix = random_structure(160, 160, 0.25)
    layer = frozen_like(nn.Linear(160, 160), matrix)
    ((_, limit),) = layer.weight.plan.dense_tokens
    x = torch.randn(limit + 1, 160)
    expected = F.linear(x, matrix.to_dense(), layer.bias)
    for tokens in (limit, limit + 1):
        torch.testing.assert_close(layer(x[:tokens]), expected[:tokens], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(  # by way of the weight alone
            F.linear(x[:tokens], layer.weight, layer.bias), expected[:tokens], rtol=1e-4, atol=1e-4
        )


@needs_numba
def test_the_matrix_follows_copies_casts_and_files(tmp_path: Path) -> None:
    layer = tiny()
    x = torch.randn(5, 32)
    expected = layer(x)
    again = copy.deepcopy(layer)
    assert again.weight.matrix is not None
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    torch.testing.assert_close(F.linear(x, state["weight"], layer.bias), expected)
    assert state["weight"].matrix is not None  # made at the first product
    again.weight.data.copy_(GBLRTensor.from_structured(random_structure(24, 32, 0.25, seed=0)))
    torch.testing.assert_close(again(x), expected)
    half = copy.deepcopy(layer).double()
    assert half.weight.matrix.dtype == torch.float64
    torch.testing.assert_close(half(x.double()).float(), expected, rtol=1e-5, atol=1e-5)
    model = nn.Sequential(layer)
    save(model, tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors", nn.Sequential(nn.Linear(32, 24)))
    assert type(loaded[0]) is FrozenLinear
    torch.testing.assert_close(loaded(x), expected)


def test_counts_and_reports_stay_those_of_the_structure() -> None:
    matrix = random_structure(24, 32, 0.25)
    model = nn.Sequential(frozen_like(nn.Linear(32, 24), matrix))
    report = gblr.report(model, torch.randn(1, 32))
    assert report.layers[0].multiply_adds == matrix.stored
    assert report.multiply_adds == matrix.stored
    assert model[0].weight.relative_flops == pytest.approx(matrix.relative_flops)


@needs_numba
def test_compiled_and_exported_modules_agree() -> None:
    for size in (24, 160):
        matrix = random_structure(size, size, 0.25)
        layer = frozen_like(nn.Linear(size, size), matrix)
        x = torch.randn(3, size)
        expected = layer(x)
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), expected, rtol=1e-4, atol=1e-4)
        program = gblr.export(nn.Sequential(layer), (x,))
        torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-4)
        held = sum(tensor.numel() for tensor in program.state_dict.values() if tensor.is_floating_point())
        assert held < size * size  # factors and a bias, no matrix


@pytest.mark.parametrize(
    ("kernels", "spans"),
    [
        (((1024, "dense"),), ((-1, None),)),
        (((1024, "blocks"),), ()),
        (((1, "dense"), (1024, "dense")), ((-1, None),)),
        (((3, "dense"), (1024, "compiled")), ((-1, 3),)),
        (((15, "compiled"), (1024, "dense")), ((15, None),)),
        (((3, "dense"), (63, "compiled"), (1024, "dense")), ((-1, 3), (63, None))),
        (((3, "compiled"), (7, "dense"), (15, "dense"), (1024, "blocks")), ((3, 15),)),
    ],
)
def test_spans_hold_all_that_is_dense(kernels: Any, spans: object) -> None:
    plan = Plan(16, 16, kernels)
    assert plan.dense_tokens == spans
    matrix = random_structure(24, 32, 0.25)
    layer = frozen_like(nn.Linear(32, 24), matrix, plan=plan)
    for tokens in (1, 3, 4, 16, 64):
        x = torch.randn(tokens, 32)
        torch.testing.assert_close(layer(x), F.linear(x, matrix.to_dense(), layer.bias), rtol=1e-4, atol=1e-4)
        taken = frozen._direct(layer.weight, x)
        assert (taken is layer.weight.matrix) == (plan.kernel(tokens) == "dense")


def test_factors_alone_where_asked_and_where_int8() -> None:
    assert tiny(plan="factors").weight.matrix is None
    assert type(tiny(plan="factors")) is nn.Linear
    assert tiny(factor_dtype="int8").weight.matrix is None
    layer = tiny()
    if layer.weight.matrix is not None:
        assert layer.weight.quantize().matrix is None
        assert not layer.weight.quantize().plan.keeps_matrix


def test_parametrized_weights_are_found() -> None:
    layer = tiny()
    dense = layer.weight.to_dense().detach()
    layer.weight = nn.Parameter(dense.clone())
    parametrize.register_parametrization(layer, "weight", nn.Tanh())
    x = torch.randn(3, 32)
    torch.testing.assert_close(layer(x), F.linear(x, dense.tanh(), layer.bias))


def test_modules_that_keep_no_matrix_keep_their_class() -> None:
    assert type(use_kept_matrix(nn.Linear(3, 4))) is nn.Linear
    layer = tiny()
    layer.weight = nn.Parameter(torch.zeros(24, 32))  # put in its place
    assert torch.equal(layer(torch.randn(2, 32)), layer.bias.expand(2, 24))


@needs_numba
def test_a_symbolic_trace_asks_for_no_number_of_tokens() -> None:
    model = nn.Sequential(frozen_like(nn.Linear(160, 160), random_structure(160, 160, 0.25)))
    assert isinstance(model[0], FrozenLinear)
    assert model[0].weight.dense_elements is not frozen.ALWAYS
    traced = torch.fx.symbolic_trace(model)
    for tokens in (1, 3, 1000):
        x = torch.randn(tokens, 160)
        assert torch.equal(traced(x), model(x))
