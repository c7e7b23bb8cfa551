"""Property tests: whatever shape, dtype, interval, stride or budget, the answer is right or one clear line."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import gblr_plugin as gblr
from gblr_plugin import ConfigError, Intervals, StructuredMatrix
from gblr_plugin.decomposition import METHODS
from gblr_plugin.kernels.plan import Plan
from gblr_plugin.layers import GBLRLinear
from gblr_plugin.run.settings import RunSettings
from gblr_plugin.run.yaml_config import load_yaml, parse_overrides, read_settings
from gblr_plugin.surgery.layer_settings import LayerSettings

FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SIZES = st.one_of(st.integers(1, 5), st.sampled_from([7, 8, 13, 16, 17, 31, 37]))
DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@st.composite
def matrices(draw: Any) -> StructuredMatrix:
    """Any intervals: wrapped round the end, empty, full; also no component at all."""
    m, n, count = draw(SIZES), draw(SIZES), draw(st.integers(0, 6))

    def intervals(length: int) -> Intervals:
        widths = [draw(st.integers(0, length)) for _ in range(count)]
        starts = [draw(st.integers(0, length - 1)) for _ in range(count)]
        return Intervals(torch.tensor(widths, dtype=torch.int64), torch.tensor(starts, dtype=torch.int64), length)

    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    u, v = (torch.randn(count, size, generator=generator) for size in (m, n))
    return StructuredMatrix.from_factors(u, v, intervals(m), intervals(n))


def dense_of(matrix: StructuredMatrix) -> torch.Tensor:
    """By the definition, in float64."""
    u = torch.where(matrix.rows.support(), matrix.u.double(), 0)
    v = torch.where(matrix.cols.support(), matrix.v.double(), 0)
    return u.T @ v


def magnitudes(matrix: StructuredMatrix) -> torch.Tensor:
    """The sum of the absolute values of all components."""
    return dense_of(StructuredMatrix(matrix.u.abs(), matrix.v.abs(), matrix.rows, matrix.cols, matrix.split_sizes))


BATCHES = ["one", "rows", "none", "vector", "columns", "same row", "steps of two", "reversed view"]


def batch_of(kind: str, n: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "one": lambda: random(1, n),
        "rows": lambda: random(2, 5, n),
        "none": lambda: random(0, n),
        "vector": lambda: random(n),
        "columns": lambda: random(n, 6).T,
        "same row": lambda: random(1, n).expand(6, n),  # stride 0
        "steps of two": lambda: random(4, 2 * n)[:, ::2],
        "reversed view": lambda: random(n, 3, 2).permute(2, 1, 0),
    }[kind]()


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-3)) if wanted.numel() else 0.0


def close(found: torch.Tensor, wanted: torch.Tensor, absolute: torch.Tensor, tolerance: float) -> None:
    """The relative error is within the tolerance, but for a rounding of the terms, which may cancel in ``wanted``.

    ``absolute`` is the sum of the terms' absolute values.
    """
    if wanted.numel():
        rounding = torch.finfo(found.dtype).eps * absolute.norm()
        assert (found.double() - wanted).norm() < tolerance * wanted.norm().clamp(min=1e-3) + rounding


@FEW
@given(
    matrices(),
    st.sampled_from(list(DTYPES)),
    st.sampled_from(BATCHES),
    st.sampled_from([None, Plan(16, 32), Plan(0, 0)]),
)
def test_a_frozen_weight_multiplies_as_its_dense_matrix(
    matrix: StructuredMatrix, dtype: torch.dtype, kind: str, plan: Plan | None
) -> None:
    matrix = matrix.to(dtype=dtype)
    weight = gblr.GBLRTensor.from_structured(matrix, plan=plan)
    x = batch_of(kind, matrix.shape[1], dtype).requires_grad_(kind != "none")
    wanted = F.linear(x.detach().double(), dense_of(matrix))
    found = F.linear(x, weight)
    assert found.shape == wanted.shape
    assert found.dtype == dtype
    absolute = magnitudes(matrix)
    close(found.detach(), wanted, F.linear(x.detach().double().abs(), absolute), DTYPES[dtype])
    if kind != "none":
        found.sum().backward()
        ones = torch.ones_like(wanted)
        gradient, scale = (ones @ dense_of(matrix), ones @ absolute)
        close(x.grad, gradient, scale, 2 * DTYPES[dtype])


@FEW
@given(matrices(), st.sampled_from([torch.float64, torch.float32]), st.sampled_from(BATCHES))
def test_a_trainable_layer_computes_and_counts_what_its_intervals_say(
    matrix: StructuredMatrix, dtype: torch.dtype, kind: str
) -> None:
    layer = GBLRLinear(matrix.to(dtype=dtype), None)
    x = batch_of(kind, matrix.shape[1], dtype)
    smooth = copy.deepcopy(layer)
    layer.freeze_structure()
    assert relative_error(layer(x).detach(), F.linear(x.double(), dense_of(matrix))) < DTYPES[dtype]
    alive = (matrix.rows.width > 0) & (matrix.cols.width > 0)
    assert layer.stored == int(torch.where(alive, matrix.rows.width + matrix.cols.width, 0).sum())
    smooth.set_sigma(5.0)
    if matrix.num_components and x.numel():
        smooth(x).sum().backward()
        parts = (smooth.U, smooth.V, smooth.widths, smooth.locations)
        assert all(part.grad is not None and bool(torch.isfinite(part.grad).all()) for part in parts)


SMALL = st.sampled_from([1, 2, 3, 5, 8, 13])


@settings(FEW, max_examples=20)
@given(SMALL, SMALL, st.floats(1e-12, 1.0), st.sampled_from(sorted(METHODS)), st.sampled_from([1e-30, 1.0, 1e30]))
@example(1, 1, 1.0, "gblr", 1.0)
@example(1, 37, 1e-12, "gblr", 1.0)
@example(13, 17, 1.0, "svd", 1.0)
def test_budgets_are_kept_or_refused(m: int, n: int, budget: float, method: str, scale: float) -> None:
    weight = scale * torch.randn(m, n, generator=torch.Generator().manual_seed(m * n))
    refusal = ""
    try:
        matrix = gblr.decompose(weight, budget, method=method)
    except ConfigError as error:
        refusal = str(error)
    if refusal:
        assert "\n" not in refusal
        return
    assert matrix.relative_flops <= budget
    dense = matrix.to_dense()
    assert bool(torch.isfinite(dense).all())
    if method == "random":
        return
    left = float((weight.double() - dense.double()).norm())
    assert left <= float(weight.double().norm()) * (1 + 1e-5)


# -- modules of all kinds ----------------------------------------------------------------------------------------------


def fit(model: nn.Module, budget: float = 0.5, width: int = 16) -> dict[str, Any]:
    layers = gblr.prepare(model)
    optimizer = torch.optim.AdamW(gblr.param_groups(model, lr=1e-2))
    goals = {name: gblr.LayerGoal(budget=budget, group=0) for name in layers}
    learner = gblr.StructureLearner(layers, goals, gblr.Schedule(1, 6))
    learner.attach_all([optimizer])
    for _ in range(8):
        optimizer.zero_grad()
        model(torch.randn(4, width)).square().mean().backward()
        optimizer.step()
    assert learner.relative_flops <= budget
    return layers


def test_a_module_used_twice_trains_and_converts_once() -> None:
    shared = nn.Linear(16, 16)
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), nn.Linear(16, 16))
    assert list(fit(model)) == ["0", "4"]
    x = torch.randn(3, 16)
    before = model(x)
    gblr.convert(model)
    assert model[0] is model[2]
    torch.testing.assert_close(model(x), before)


def test_frozen_parameters_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16))
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    first = gblr.prepare(model)["0"]
    before = copy.deepcopy(first.state_dict())
    optimizer = torch.optim.AdamW(gblr.param_groups(model, lr=1e-2))
    learner = gblr.StructureLearner({"2": model[2]}, {"2": gblr.LayerGoal(budget=0.5)}, gblr.Schedule(1, 6))
    learner.attach_all([optimizer])
    for _ in range(8):
        optimizer.zero_grad()
        model(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
    for name, value in first.state_dict().items():
        assert name.endswith("extra_state") or torch.equal(value, before[name]), name
    assert model[2].structure_frozen


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    return model


def parametrized(how: str) -> nn.Module:
    ways = torch.nn.utils.parametrizations
    return nn.Sequential(getattr(ways, how)(nn.Linear(16, 16)))


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(16, 16))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: nn.Sequential(nn.LazyLinear(16)), "a LazyLinear cannot be structured"),
        (on_meta, "on the meta device, it has no values"),
        (tied, "its weight is tied to that of '1'"),
        (lambda: parametrized("weight_norm"), "its weight is parametrized"),
        (lambda: parametrized("spectral_norm"), "its weight is parametrized"),
        (lambda: parametrized("orthogonal"), "its weight is parametrized"),
    ],
    ids=["lazy", "meta", "tied", "weight_norm", "spectral_norm", "orthogonal"],
)
def test_what_cannot_be_structured_is_one_line_and_stays(make: Any, says: str) -> None:
    model = make()
    module = model[0]
    with pytest.raises(ConfigError, match="layer '0'") as caught:
        gblr.prepare(model, include=["0"])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert model[0] is module


def test_a_lazy_module_that_has_seen_data_is_like_any_other() -> None:
    model = nn.Sequential(nn.LazyLinear(16), nn.Tanh(), nn.LazyLinear(16))
    model(torch.randn(2, 16))
    assert list(fit(model)) == ["0", "2"]


def test_a_skeleton_on_the_meta_device_takes_a_file(tmp_path: Any) -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    gblr.prepare(model, settings=LayerSettings("trapezoid", budget=0.5))
    gblr.save(gblr.convert(model), tmp_path / "model.safetensors")
    x = torch.randn(3, 16)
    assert torch.equal(gblr.load(tmp_path / "model.safetensors", on_meta)(x), model(x))


# -- configs -----------------------------------------------------------------------------------------------------------

WORDS = st.one_of(
    st.sampled_from(["task", "budget", "methods", "name", "gblr", "digits_vit", "dense", "epochs", "model", "seeds"]),
    st.text(max_size=6),
)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), WORDS)
TREES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3))


def read(path: Any, text: str, *overrides: str) -> None:
    """Settings, or an error of one line that names the file."""
    path.write_text(text, encoding="utf-8")
    refusal = str(path)
    try:
        located = load_yaml(path)
        parse_overrides(located, list(overrides))
        read_settings(RunSettings, located)
    except ConfigError as error:
        refusal = str(error)
    assert refusal.isprintable()
    assert refusal.startswith((str(path), "--set"))


@settings(FEW, max_examples=150)
@given(st.dictionaries(WORDS, TREES, max_size=5))
def test_any_tree_is_read_or_refused(tmp_path_factory: Any, tree: dict[str, Any]) -> None:
    read(tmp_path_factory.getbasetemp() / "tree.yaml", yaml.safe_dump(tree, allow_unicode=True))


VALID = "task: digits_vit\nbudget: 0.5\nmodel: {dim: 16}\nseeds: [0, 1]\ndense: {epochs: 1}\nmethods:\n- {name: gblr}\n"


@settings(FEW, max_examples=150)
@given(st.integers(0, len(VALID)), st.integers(0, 8), st.text("\t\n :-[]{}&*!|>'\"%@`,?#0a.e\x00\ud7ff", max_size=6))
def test_a_damaged_file_is_read_or_refused(tmp_path_factory: Any, at: int, cut: int, put: str) -> None:
    read(tmp_path_factory.getbasetemp() / "damaged.yaml", VALID[:at] + put + VALID[at + cut :])


@settings(FEW, max_examples=60)
@given(st.one_of(WORDS, st.text("ab.=0[]{}: ", max_size=12)), TREES)
def test_any_override_is_taken_or_refused(tmp_path_factory: Any, key: str, value: Any) -> None:
    text = f"{key}={yaml.safe_dump(value, default_flow_style=True)}"
    read(tmp_path_factory.getbasetemp() / "override.yaml", VALID, text)


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.system ['true']\n",
        "a: !!python/name:os.system\n",
        "a: &a [*a]\n",
        "a: &a {b: *a}\n",
        "a: " + "[" * 5000 + "]" * 5000,
        "\n".join(f"k{i}: &k{i} [{', '.join([f'*k{i - 1}'] * 9) if i else 1}]" for i in range(12)),
        "a: " + "9" * 5000,
    ],
    ids=["call", "name", "list in itself", "table in itself", "depth", "billion laughs", "digits"],
)
def test_documents_that_mean_harm_are_refused_at_once(tmp_path: Any, text: str) -> None:
    path = tmp_path / "harm.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        load_yaml(path)
