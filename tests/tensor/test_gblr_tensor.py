"""GBLRTensor: torchao's own cases, then values, gradients, conversions, compilers and errors."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing._internal import common_utils
from torch.utils.flop_counter import FlopCounterMode
from torchao.quantization import Int8WeightOnlyConfig, PerTensor, quantize_
from torchao.testing import utils as ao

from gblr_plugin import load, save
from gblr_plugin.errors import ConfigError, GBLRError
from gblr_plugin.kernels.compiled import available
from gblr_plugin.kernels.measure import circumstances, is_stale
from gblr_plugin.kernels.plan import Plan
from gblr_plugin.matrix.structure import Intervals, StructuredMatrix
from gblr_plugin.surgery.conversion import convert, prepare
from gblr_plugin.surgery.layer_settings import LayerSettings
from gblr_plugin.tensor.gblr_tensor import GBLRTensor
from gblr_plugin.torchao.config import GBLRConfig

SKIP = SimpleNamespace(suffixes={"gblr"}, is_skip=True)  # torchao calls .cuda() there


def random_matrix(
    components: int,
    m: int,
    n: int,
    *,
    splits: int = 1,
    align: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> StructuredMatrix:
    """Random factors on random cyclic intervals, zero widths included, wrap-around included."""
    g = torch.Generator().manual_seed(seed)

    def intervals(length: int) -> Intervals:
        steps = max(length // align, 1)
        width = torch.randint(0, steps + 1, (components,), generator=g) * align
        start = torch.randint(0, steps, (components,), generator=g) * align
        return Intervals(width.clamp(max=length), start, length)

    rows, cols = intervals(m // splits), intervals(n)
    sizes = tuple(len(part) for part in torch.arange(components).tensor_split(splits))
    u = torch.randn(components, m // splits, generator=g, dtype=dtype)
    v = torch.randn(components, n, generator=g, dtype=dtype)
    return StructuredMatrix.from_factors(u, v, rows, cols, sizes)


def from_dense(dense: Tensor) -> GBLRTensor:
    """Exact for any matrix: one component per row (or per column, if fewer)."""
    m, n = dense.shape
    eye = torch.eye(min(m, n), dtype=dense.dtype, device=dense.device)
    u, v = (eye, dense) if m <= n else (dense.t().contiguous(), eye)
    return GBLRTensor.from_structured(StructuredMatrix.from_factors(u, v), plan=Plan(16, 32))


class _Cases(common_utils.TestCase):
    TENSOR_SUBCLASS = GBLRTensor
    FACTORY_FN = staticmethod(from_dense)
    kwargs: ClassVar[dict[str, object]] = {}
    LINEAR_MIN_SQNR = 40
    COMPILE_MIN_SQNR = 50


class TestBasic(_Cases):
    """torchao's basic cases, copied below."""


class TestCompile(_Cases):
    """torchao's compile cases, copied below."""


needs_cuda = {} if torch.cuda.is_available() else {"test_device1_to_device2_device1_cpu_device2_cpu": SKIP}
ao.copy_tests(ao.TorchAOBasicTestCase, TestBasic, "gblr", needs_cuda)
ao.copy_tests(ao.TorchAOCompileTestCase, TestCompile, "gblr")


SHAPES = [
    (20, 48, 64, 1),
    (31, 57, 33, 3),
    (40, 301, 257, 1),
    (0, 8, 9, 1),
    (1, 3, 7, 1),
    (64, 96, 160, 3),
]


def relative_error(result: Tensor, reference: Tensor) -> float:
    result, reference = result.detach().double(), reference.detach()
    return float((result - reference).norm() / reference.norm().clamp(min=1e-30))


@pytest.mark.usefixtures("plans")
@pytest.mark.parametrize(("components", "m", "n", "splits"), SHAPES)
@pytest.mark.parametrize("shape", [(7,), (0,), (), (2, 130)], ids=str)
def test_linear_equals_the_float64_formula(
    components: int, m: int, n: int, splits: int, shape: tuple[int, ...]
) -> None:
    matrix = random_matrix(components, m, n, splits=splits)
    weight = GBLRTensor.from_structured(matrix)
    dense = matrix.to_dense().double()
    x, bias = torch.randn(*shape, n), torch.randn(m)
    with torch.no_grad():
        y = F.linear(x, weight, bias)
        plain = F.linear(x, weight)
    assert y.shape == (*shape, m)
    assert relative_error(y, F.linear(x.double(), dense, bias.double())) < 1e-5
    assert relative_error(plain, F.linear(x.double(), dense)) < 1e-5


@pytest.mark.parametrize(("components", "m", "n", "splits"), SHAPES)
def test_structure_comes_back(components: int, m: int, n: int, splits: int) -> None:
    matrix = random_matrix(components, m, n, splits=splits).live()
    weight = GBLRTensor.from_structured(matrix)
    back = weight.to_structured()
    for name in ("u", "v"):
        assert torch.equal(getattr(back, name), getattr(matrix, name))
    for axis in ("rows", "cols"):
        assert torch.equal(getattr(back, axis).width, getattr(matrix, axis).width)
        assert torch.equal(getattr(back, axis).start, getattr(matrix, axis).start)
    assert back.split_sizes == matrix.split_sizes
    assert (weight.stored, weight.num_components) == (matrix.stored, matrix.num_components)
    assert weight.relative_flops == matrix.relative_flops
    torch.testing.assert_close(weight.to_dense(), matrix.to_dense(), rtol=1e-5, atol=1e-5)
    assert torch.equal(weight.dequantize(), weight.to_dense())


@pytest.mark.usefixtures("plans")
def test_non_contiguous_inputs() -> None:
    matrix = random_matrix(30, 70, 90)
    weight, dense = GBLRTensor.from_structured(matrix), matrix.to_dense().double()
    for x in (torch.randn(90, 11).t(), torch.randn(5, 3, 90).transpose(0, 1), torch.randn(8, 180)[:, ::2]):
        with torch.no_grad():
            assert relative_error(F.linear(x, weight), F.linear(x.double(), dense)) < 1e-5


@pytest.mark.usefixtures("plans")
@pytest.mark.parametrize(("components", "m", "n", "splits"), SHAPES)
def test_gradients_reach_input_and_bias(components: int, m: int, n: int, splits: int) -> None:
    matrix = random_matrix(components, m, n, splits=splits, dtype=torch.float64)
    weight, dense = GBLRTensor.from_structured(matrix), matrix.to_dense()
    x, bias = torch.randn(4, n, dtype=torch.float64, requires_grad=True), torch.randn(m, dtype=torch.float64)
    bias.requires_grad_()
    out_grad = torch.randn(4, m, dtype=torch.float64)
    mine = torch.autograd.grad(F.linear(x, weight, bias), (x, bias), out_grad)
    reference = torch.autograd.grad(F.linear(x, dense, bias), (x, bias), out_grad)
    torch.testing.assert_close(mine, reference)


@pytest.mark.usefixtures("plans")
def test_a_layer_in_front_trains() -> None:
    weight = GBLRTensor.from_structured(random_matrix(12, 10, 16))
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 10, bias=False))
    model[1].weight = nn.Parameter(weight, requires_grad=False)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    before = model[0].weight.detach().clone()
    model(torch.randn(5, 8)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, model[0].weight)


def linear_module(dtype: torch.dtype = torch.float32, plan: Plan | None = None) -> nn.Linear:
    module = nn.Linear(75, 50, dtype=dtype)
    matrix = random_matrix(24, 50, 75, dtype=dtype)
    module.weight = nn.Parameter(GBLRTensor.from_structured(matrix, plan=plan), requires_grad=False)
    return module


@pytest.mark.usefixtures("plans")
def test_copies_and_files_keep_the_weight() -> None:
    module, x = linear_module(), torch.randn(9, 75)
    reference = module(x)
    assert torch.equal(copy.deepcopy(module)(x), reference)
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), reference)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    fresh = nn.Linear(75, 50)
    fresh.load_state_dict(state, assign=True)
    assert isinstance(fresh.weight, GBLRTensor)
    assert fresh.weight.plan == module.weight.plan
    assert torch.equal(fresh(x), reference)
    same = linear_module()
    with torch.no_grad():
        same.weight.factors.zero_()
    same.load_state_dict(state)
    assert torch.equal(same(x), reference)


@pytest.mark.usefixtures("plans")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_casts_factors_only(dtype: torch.dtype) -> None:
    module = linear_module().to(dtype)
    assert module.weight.dtype == module.weight.factors.dtype == dtype
    assert module.weight.lists.dtype == torch.int32
    x = torch.randn(9, 75, dtype=dtype)
    reference = F.linear(x.double(), module.weight.to_dense().double(), module.bias.double())
    with torch.no_grad():
        y = module(x)
    assert y.dtype == dtype
    assert relative_error(y, reference) < {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-12}[dtype]


@pytest.mark.usefixtures("plans")
def test_moving_between_devices() -> None:
    weight = linear_module().weight.to("meta")
    assert (weight.device.type, weight.factors.device.type, weight.lists.device.type) == ("meta",) * 3
    assert F.linear(torch.empty(3, 75, device="meta"), weight).shape == (3, 50)


@pytest.mark.usefixtures("plans")
def test_autocast_decides_the_dtype() -> None:
    module, x = linear_module(), torch.randn(9, 75)
    for context in (torch.no_grad(), torch.enable_grad()):
        with context, torch.autocast("cpu", torch.bfloat16):
            assert module(x).dtype == torch.bfloat16
    assert module.weight.dtype == torch.float32


@pytest.mark.usefixtures("plans")
def test_dtypes_must_agree() -> None:
    with pytest.raises(GBLRError, match="share one dtype"):
        linear_module()(torch.randn(3, 75, dtype=torch.float64))


def test_sharing_memory_is_refused() -> None:
    with pytest.raises(GBLRError, match="share_memory_"):
        linear_module().weight.share_memory_()


def test_repr_says_what_it_is() -> None:
    assert "GBLRTensor(shape=(50, 75)" in repr(linear_module().weight)
    assert "GBLRTensor" in repr(linear_module().weight.data)


@pytest.mark.usefixtures("plans")
@pytest.mark.parametrize("splits", [1, 3])
def test_transpose_and_matmul(splits: int) -> None:
    matrix = random_matrix(24, 48, 75, splits=splits)
    weight, dense = GBLRTensor.from_structured(matrix), matrix.to_dense()
    torch.testing.assert_close(weight.t().to_dense(), dense.t(), rtol=1e-4, atol=1e-4)
    x, y = torch.randn(6, 75), torch.randn(6, 48)
    torch.testing.assert_close(x @ weight.t(), x @ dense.t(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y @ weight, y @ dense, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weight @ x.t(), dense @ x.t(), rtol=1e-4, atol=1e-4)
    bias = torch.randn(48)
    torch.testing.assert_close(torch.addmm(bias, x, weight.t()), bias + x @ dense.t(), rtol=1e-4, atol=1e-4)


def test_dense_storage_where_factors_cost_more() -> None:
    matrix = StructuredMatrix.from_factors(torch.randn(30, 32), torch.randn(30, 40))
    weight = GBLRTensor.from_structured(matrix)
    assert weight.packing.dense
    assert weight.stored == 32 * 40
    x = torch.randn(5, 40)
    torch.testing.assert_close(F.linear(x, weight), matrix.linear(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weight.to_structured().to_dense(), weight.to_dense())
    torch.testing.assert_close(weight.t().to_dense(), weight.to_dense().t())


@pytest.mark.usefixtures("plans")
def test_compile_without_graph_breaks() -> None:
    module, x = linear_module(), torch.randn(9, 75)
    compiled = torch.compile(module, fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("splits", [1, 3])
def test_flop_counter_counts_the_structured_product(splits: int) -> None:
    matrix = random_matrix(64, 192, 256, splits=splits, align=16)
    weight = GBLRTensor.from_structured(matrix, plan=Plan(16, 16))
    assert weight.packing.padding == 1.0
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        F.linear(torch.randn(5, 256), weight)
    assert counter.get_total_flops() == 2 * 5 * matrix.stored


def test_flop_counter_sees_through_gradients_and_compilers() -> None:
    matrix, x = random_matrix(64, 192, 256, align=16), torch.randn(5, 256, requires_grad=True)
    module = nn.Linear(256, 192)
    module.weight = nn.Parameter(GBLRTensor.from_structured(matrix, plan=Plan(16, 16)), requires_grad=False)
    with FlopCounterMode(display=False) as counter:
        module(x).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 5 * matrix.stored
    # torch runs compiled modules eagerly under a counter.
    compiled = torch.compile(module)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        compiled(x)
    assert counter.get_total_flops() == 2 * 5 * matrix.stored
    torch.compiler.reset()  # else torch leaves every module of later tests uncompiled


CONVOLUTIONS = [
    (nn.Conv2d, (3, 3), {"padding": 1}),
    (nn.Conv2d, (3, 2), {"stride": 2, "padding": (1, 0), "dilation": (1, 2)}),
    (nn.Conv2d, (3, 3), {"padding": "same"}),
    (nn.Conv2d, (3, 3), {"padding": 1, "padding_mode": "reflect"}),
    (nn.Conv2d, (1, 1), {}),
    (nn.Conv1d, (5,), {"padding": 2, "stride": 3}),
]


@pytest.mark.parametrize("components", [25, 0])
@pytest.mark.parametrize(("kind", "kernel", "options"), CONVOLUTIONS)
def test_convolutions_equal_dense(
    kind: type[nn.Conv1d] | type[nn.Conv2d], kernel: tuple[int, ...], options: dict[str, object], components: int
) -> None:
    module = kind(6, 10, kernel if len(kernel) > 1 else kernel[0], **options)  # type: ignore[arg-type]
    matrix = random_matrix(components, 10, 6 * torch.Size(kernel).numel())
    shape = tuple(module.weight.shape)
    reference = copy.deepcopy(module)
    reference.weight = nn.Parameter(matrix.to_dense().view(shape))
    module.weight = nn.Parameter(GBLRTensor.from_structured(matrix, shape=shape, plan=None), requires_grad=False)
    x = torch.randn(2, 6, *(13 for _ in kernel), requires_grad=True)
    y, expected = module(x), reference(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module(x[0]), reference(x[0]), rtol=1e-4, atol=1e-4)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)
    assert copy.deepcopy(module).weight.shape == shape


def test_convolution_costs_the_structured_product() -> None:
    matrix = random_matrix(40, 64, 32 * 9, align=16)
    plan = Plan(16, 36)
    weight = GBLRTensor.from_structured(matrix, shape=(64, 32, 3, 3), plan=plan)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        F.conv2d(torch.randn(2, 32, 7, 7), weight, padding=1)
    assert counter.get_total_flops() == 2 * 2 * 49 * weight.packing.entries


def test_grouped_convolutions_are_refused() -> None:
    weight = GBLRTensor.from_structured(random_matrix(4, 8, 18), shape=(8, 2, 3, 3))
    with pytest.raises(ConfigError, match="groups=1"):
        F.conv2d(torch.randn(1, 4, 8, 8), weight, groups=2)


@pytest.mark.usefixtures("plans")
def test_compiled_convolution() -> None:
    module = nn.Conv2d(6, 10, 3, padding=1)
    matrix = random_matrix(25, 10, 54)
    module.weight = nn.Parameter(GBLRTensor.from_structured(matrix, shape=(10, 6, 3, 3)), requires_grad=False)
    x = torch.randn(2, 6, 9, 9)
    torch.testing.assert_close(torch.compile(module, fullgraph=True)(x), module(x), rtol=1e-4, atol=1e-4)


def test_bad_arguments_are_named() -> None:
    matrix = random_matrix(4, 8, 18)
    with pytest.raises(ConfigError, match="does not fit a 8 x 18"):
        GBLRTensor.from_structured(matrix, shape=(8, 3, 3, 3))
    with pytest.raises(ConfigError, match="plan must be"):
        GBLRTensor.from_structured(matrix, plan="fast")
    with pytest.raises(ConfigError, match="multiple of its 9 taps"):
        GBLRTensor.from_structured(matrix, shape=(8, 2, 3, 3), plan=Plan(16, 16))
    with pytest.raises(GBLRError, match="does not fit"):
        F.linear(torch.randn(3, 17), GBLRTensor.from_structured(matrix))


def int8_module() -> nn.Linear:
    module = linear_module()
    module.weight = nn.Parameter(module.weight.data.quantize(), requires_grad=False)
    return module


@pytest.mark.usefixtures("plans")
def test_int8_factors_by_torchaos_config() -> None:
    model, x = nn.Sequential(nn.Linear(20, 75), linear_module()), torch.randn(9, 20)
    before = model[1].weight
    expected = model(x)
    quantize_(model, Int8WeightOnlyConfig())
    weight = model[1].weight
    assert (weight.factors.dtype, weight.dtype, weight.factor_dtype) == (torch.int8, torch.float32, "int8")
    assert weight.factors.nbytes * 3 < before.factors.nbytes  # a quarter, but for padding where the plan is another
    assert type(model[0].weight).__name__ == "Int8Tensor"
    assert 1e-4 < relative_error(weight.to_dense(), before.to_dense()) < 2e-2
    assert relative_error(model(x), expected) < 3e-2
    assert weight.quantize() is weight
    with pytest.raises(ConfigError, match="one scale per component"):
        quantize_(model[1:], Int8WeightOnlyConfig(granularity=PerTensor()))


def test_int8_factors_survive_what_others_survive() -> None:
    module, x = int8_module(), torch.randn(9, 75)
    reference = module(x)
    assert torch.equal(copy.deepcopy(module)(x), reference)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    fresh = nn.Linear(75, 50)
    fresh.load_state_dict(torch.load(buffer, weights_only=True), assign=True)
    assert torch.equal(fresh(x), reference)
    replanned = module.weight.replan(Plan(32, 32))
    assert replanned.factor_dtype == "int8"
    torch.testing.assert_close(replanned.to_dense(), module.weight.to_dense(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module.weight.t().to_dense(), module.weight.to_dense().t(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.compile(module, fullgraph=True)(x), reference, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    half = copy.deepcopy(module).bfloat16()
    assert (half.weight.dtype, half.weight.factors.dtype) == (torch.bfloat16, torch.int8)
    assert relative_error(half(x.bfloat16()), reference.double()) < 2e-2


def test_int8_factors_get_a_plan_of_kernels_that_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gblr_plugin.kernels.compiled._installed", lambda kind: False)
    matrix = random_matrix(24, 50, 75)
    weight = GBLRTensor.from_structured(matrix)
    assert {name for _, name in weight.plan.kernels} == {"dense"}  # beside factors that nothing multiplies by
    int8 = weight.quantize()
    assert {name for _, name in int8.plan.kernels} == {"blocks"}
    assert int8.replanned_here() is int8
    assert relative_error(int8.to_dense(), matrix.to_dense().double()) < 1e-2


@pytest.mark.usefixtures("plans")
def test_int8_factors_by_our_config_and_in_files(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(48, 64))
    quantize_(model, GBLRConfig(step="convert", budget=0.5, factor_dtype="int8"))
    assert model[0].weight.factor_dtype == "int8"
    save(model, tmp_path / "model.pt")
    loaded, x = load(tmp_path / "model.pt", nn.Sequential(nn.Linear(48, 64))), torch.randn(3, 48)
    assert torch.equal(loaded(x), model(x))
    with pytest.raises(ConfigError, match="factor_dtype must be"):
        GBLRConfig(factor_dtype="int4")


def test_int8_convolution() -> None:
    matrix, x = random_matrix(25, 10, 54), torch.randn(2, 6, 9, 9)
    weight = GBLRTensor.from_structured(matrix, shape=(10, 6, 3, 3), factor_dtype="int8")
    expected = F.conv2d(x, weight.to_dense(), padding=1)
    torch.testing.assert_close(F.conv2d(x, weight, padding=1), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad(), FlopCounterMode(display=False):  # torch operations
        torch.testing.assert_close(F.conv2d(x, weight, padding=1), expected, rtol=1e-4, atol=1e-4)


def test_unknown_dtypes_of_factors_are_named() -> None:
    with pytest.raises(ConfigError, match="factor_dtype must be"):
        GBLRTensor.from_structured(random_matrix(4, 8, 18), factor_dtype="int4")


def test_plans_measured_elsewhere_are_measured_anew(tmp_path: Path) -> None:
    matrix = random_matrix(20, 96, 80)
    blocks = Plan(16, 16, ((1024, "blocks"),))  # which every machine has
    here = dataclasses.replace(blocks, **circumstances(torch.device("cpu"), torch.float32))
    elsewhere = dataclasses.replace(here, machine="another")
    for plan, kept in ((here, True), (elsewhere, False), (elsewhere.unmeasured(), True)):
        model = nn.Sequential(nn.Linear(80, 96)).eval()
        model[0].weight = nn.Parameter(GBLRTensor.from_structured(matrix, plan=plan), requires_grad=False)
        assert (model[0].weight.data.replanned_here().plan == plan) == kept
        save(model, tmp_path / "model.safetensors")
        again = load(tmp_path / "model.safetensors", nn.Sequential(nn.Linear(80, 96)))
        assert (again[0].weight.plan == plan) == kept
        if not kept:
            assert not is_stale(again[0].weight.plan, torch.device("cpu"), torch.float32)
        x = torch.randn(3, 80)
        torch.testing.assert_close(again(x), model(x), rtol=1e-4, atol=1e-4)


def test_programs_compiled_with_a_kernel_are_not_those_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps compiled programs on disk; the folder may be another machine's."""
    weight = GBLRTensor.from_structured(random_matrix(20, 48, 64), plan=Plan(16, 16))
    keys = set()
    for found in (True, False):
        monkeypatch.setattr("gblr_plugin.tensor.gblr_tensor.available", lambda *_, found=found: found)
        keys.add(weight._stable_hash_for_caching())
    assert len(keys) == 2


def test_the_direct_call_is_taken_by_plain_inference_alone() -> None:
    """The launcher answers None wherever anything but the result is wanted, and the product stays right."""
    if not available(torch.device("cpu"), torch.float32):
        pytest.skip("no compiled kernel")
    layer = linear_module(plan=Plan(16, 16, ((1024, "compiled"),)))
    weight, bias, x = layer.weight, layer.bias.detach(), torch.randn(2, 3, 75)
    expected = F.linear(x, weight.to_dense(), bias)
    calls = []
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
        genuine = weight._checks.call
        assert genuine is not None
        weight._checks.call = lambda *args: calls.append(genuine(*args)) or calls[-1]
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
        assert calls[-1] is not None
        torch.testing.assert_close(layer(x.transpose(0, 1)), expected.transpose(0, 1), rtol=1e-4, atol=1e-4)
        assert calls[-1] is None  # strides
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        assert calls[-1] is None
        with FlopCounterMode(display=False) as counter:
            layer(x)
        assert calls[-1] is None
        assert counter.get_total_flops() == 2 * 6 * weight.packing.entries
        torch.testing.assert_close(torch.func.vmap(layer)(x), expected, rtol=1e-4, atol=1e-4)
        assert calls[-1] is None
        with pytest.raises(GBLRError, match="does not fit"):
            layer(torch.randn(2, 74))
        with pytest.raises(GBLRError, match="share one dtype"):
            layer(x.double())
        assert layer(torch.randn(0, 75)).shape == (0, weight.shape[0])
        assert layer(torch.randn(75)).shape == weight.shape[:1]
    with torch.inference_mode():
        assert layer(x).is_inference()
    assert layer(x).requires_grad  # of the bias
    assert calls[-1] is None
    layer.bias = None
    assert layer(x.requires_grad_()).requires_grad
    assert calls[-1] is None
    assert not layer(x.detach()).requires_grad
    assert calls[-1] is not None


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("factor_dtype", [None, "int8"])
def test_plans_whose_kernel_is_missing_are_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: bool, factor_dtype: str | None
) -> None:
    facts = circumstances(torch.device("cpu"), torch.float32) if measured else {}
    plan = dataclasses.replace(Plan(16, 16), **facts)
    model = nn.Sequential(nn.Linear(80, 96)).eval()
    weight = GBLRTensor.from_structured(random_matrix(20, 96, 80), plan=plan, factor_dtype=factor_dtype)
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    save(model, tmp_path / "model.safetensors")
    x = torch.randn(3, 80)
    expected = F.linear(x, weight.to_dense(), model[0].bias)
    for room in ("kernels.plan", "kernels.compiled"):  # as on a machine without numba
        monkeypatch.setattr(f"gblr_plugin.{room}.available", lambda *_: False)
    again = load(tmp_path / "model.safetensors", nn.Sequential(nn.Linear(80, 96)))
    names = set(dict(again[0].weight.plan.kernels).values())
    assert names <= {"blocks", "dense"}
    assert names == {"blocks"} or factor_dtype is None  # nothing lies beside int8 factors
    assert again[0].weight.factor_dtype == factor_dtype
    with torch.no_grad():
        torch.testing.assert_close(again(x), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("structured_plans")
def test_a_changed_plan_or_buffer_is_noticed() -> None:
    layer, x = linear_module(), torch.randn(3, 75)
    with torch.no_grad():
        before = layer(x)
        weight = layer.weight
        weight.factors = weight.factors * 2
        torch.testing.assert_close(layer(x) - layer.bias, 4 * (before - layer.bias), rtol=1e-4, atol=1e-4)
        made = weight._checks
        weight.plan = Plan(weight.plan.block_rows, weight.plan.block_cols, ((1024, "blocks"),))
        torch.testing.assert_close(layer(x) - layer.bias, 4 * (before - layer.bias), rtol=1e-4, atol=1e-4)
        assert weight._checks is not made


@pytest.mark.usefixtures("plans")
def test_states_of_another_kind_are_refused_with_what_to_do():
    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(32, 32))

    dense, converted, other = network(), network(), network()
    for model, budget in ((converted, 0.3), (other, 0.5)):
        prepare(model, settings=LayerSettings("gblr", budget=budget))
        convert(model)
    for target, source, message in (
        (converted, dense, r"a dense weight cannot be copied into a converted one; load it before convert\(\)"),
        (dense, converted, "a converted weight cannot be copied into a dense one; load it with assign=True"),
        (converted, other, "only a weight of the same structure and plan can be copied; load with assign=True"),
    ):
        with pytest.raises(RuntimeError, match=message):
            target.load_state_dict(source.state_dict())
        target = copy.deepcopy(target)
        target.load_state_dict(source.state_dict(), assign=True)
        x = torch.randn(3, 32)
        torch.testing.assert_close(target(x), source(x))
    copy.deepcopy(converted).load_state_dict(converted.state_dict())


def test_other_configs_of_torchao_are_refused_by_name():
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = nn.Sequential(nn.Linear(32, 32))
    prepare(model, settings=LayerSettings("gblr", budget=0.3))
    with pytest.raises(GBLRError, match="of torchao's configs it takes Int8WeightOnlyConfig"):
        quantize_(convert(model), Int8DynamicActivationInt8WeightConfig())


def test_a_wider_weight_multiplies_by_a_wider_matrix() -> None:
    matrix = StructuredMatrix.from_factors(torch.randn(4, 24), torch.randn(4, 16))
    weight = GBLRTensor.from_structured(matrix)
    assert weight.matrix is not None
    wide = weight.to(torch.float64)
    x = torch.randn(3, 16, dtype=torch.float64)
    torch.testing.assert_close(F.linear(x, wide), x @ matrix.to(torch.float64).to_dense().T, rtol=1e-12, atol=1e-12)
    narrow = weight.to(torch.bfloat16)
    assert torch.equal(narrow.matrix, weight.matrix.to(torch.bfloat16))


# -- parts of a weight, and weights above or beside each other -------------------------------------------------------


def dense_stored(m: int, n: int) -> StructuredMatrix:
    """More factors than entries."""
    return StructuredMatrix.from_factors(torch.randn(m, m), torch.randn(m, n))


def weight_of(kind: str) -> GBLRTensor:
    torch.manual_seed(0)
    matrices = {"dense": dense_stored(24, 30), "splits": random_matrix(17, 24, 30, splits=3)}
    matrix = matrices.get(kind.removesuffix(" int8"), random_matrix(12, 24, 30))
    plan = Plan(8, 8, ((4, "dense"), (1024, "blocks"))) if kind == "beside" else None
    weight = GBLRTensor.from_structured(
        random_matrix(12, 30, 24, splits=3) if kind == "transposed splits" else matrix,
        plan=plan,
        factor_dtype="int8" if "int8" in kind else None,
    )
    return weight.t() if "transposed" in kind else weight


KINDS = [
    "plain",
    "int8",
    "splits",
    "splits int8",
    "dense",
    "dense int8",
    "beside",
    "transposed",
    "transposed splits",
    "transposed int8",
]


def assert_is(result: Tensor, dense: Tensor, like: GBLRTensor | None = None) -> None:
    """A structured weight of these values, which multiplies by them and passes gradients on to inputs."""
    assert isinstance(result, GBLRTensor)
    assert result.shape == dense.shape
    torch.testing.assert_close(result.to_dense(), dense, rtol=1e-4, atol=1e-4)
    if like is not None:
        assert (result.dtype, result.factor_dtype) == (like.dtype, like.factor_dtype)
    x = torch.randn(3, dense.shape[1], requires_grad=True)
    y, expected = F.linear(x, result), F.linear(x, dense)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    ours, theirs = (torch.autograd.grad(out.square().sum(), x)[0] for out in (y, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    again = pickle.loads(pickle.dumps(result))
    assert torch.equal(again.to_dense(), result.to_dense())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [0, 1])
def test_slices_equal_those_of_the_dense_weight(kind: str, dim: int) -> None:
    weight = weight_of(kind)
    dense = weight.to_dense()
    size = dense.shape[dim]
    for start, stop in ((0, 7), (5, 19), (size - 6, size), (3, 4), (0, size)):
        assert_is(weight.narrow(dim, start, stop - start), dense.narrow(dim, start, stop - start), weight)
    assert_is(weight[2:9], dense[2:9], weight)
    assert_is(weight[:, -9:], dense[:, -9:], weight)
    assert_is(weight[4:20, 3:29], dense[4:20, 3:29], weight)
    torch.testing.assert_close(weight.select(dim, -2), dense.select(dim, -2), rtol=1e-4, atol=1e-4)
    assert type(weight[5]) is Tensor


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [0, 1])
def test_pieces_of_a_weight_come_together_again(kind: str, dim: int) -> None:
    weight = weight_of(kind)
    dense = weight.to_dense()
    rest = dense.shape[dim] - 14
    for pieces, expected in (
        (torch.chunk(weight, 3, dim), torch.chunk(dense, 3, dim)),
        (weight.split(10, dim), dense.split(10, dim)),
        (weight.split([3, 11, rest], dim), dense.split([3, 11, rest], dim)),
    ):
        for piece, part in zip(pieces, expected, strict=True):
            assert_is(piece, part, weight)
        assert_is(torch.cat(pieces, dim), dense, weight)


@pytest.mark.parametrize("int8", [None, "int8"])
@pytest.mark.parametrize("dim", [0, 1])
def test_weights_of_different_kinds_are_concatenated(dim: int, int8: str | None) -> None:
    shapes = [(12, 18), (6, 18), (12, 18)] if dim == 0 else [(18, 12), (18, 6), (18, 12)]
    matrices = [
        random_matrix(7, *shapes[0], splits=3),
        random_matrix(5, *shapes[1]),
        dense_stored(*shapes[2]),
    ]
    weights = [GBLRTensor.from_structured(matrix, factor_dtype=int8) for matrix in matrices]
    weights.append(GBLRTensor.from_structured(random_matrix(6, *shapes[0][::-1], splits=2), factor_dtype=int8).t())
    dense = [weight.to_dense() for weight in weights]
    empty = torch.empty(0)
    assert_is(torch.cat([empty, *weights], dim), torch.cat(dense, dim), weights[0])
    assert_is(torch.concat(weights[:2], dim=dim - 2), torch.cat(dense[:2], dim), weights[0])


def test_packed_query_key_value_keeps_its_components() -> None:
    q, k, v = (random_matrix(6, 16, 32, seed=seed).live() for seed in range(3))
    packed = torch.cat([GBLRTensor.from_structured(part) for part in (q, k, v)])
    assert packed.to_structured().row_splits == 3
    assert packed.stored == q.stored + k.stored + v.stored
    for piece, part in zip(packed.chunk(3), (q, k, v), strict=True):
        back = piece.to_structured()
        assert torch.equal(back.u, part.u)
        assert torch.equal(back.v, part.v)
        assert piece.stored == part.stored


def test_int8_factors_of_a_slice_are_those_of_the_weight() -> None:
    weight = weight_of("int8")
    for part, dense in (
        (weight[3:17], weight.to_dense()[3:17]),
        (torch.cat([weight[3:17], weight[:3]]), torch.cat([weight.to_dense()[3:17], weight.to_dense()[:3]])),
    ):
        assert part.factors.dtype == torch.int8
        torch.testing.assert_close(part.to_dense(), dense, rtol=1e-6, atol=1e-6)
        assert set(part.scales.tolist()) <= set(weight.scales.tolist())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("int8", [None, "int8"])
def test_slices_in_other_dtypes(dtype: torch.dtype, int8: str | None) -> None:
    matrix = random_matrix(12, 24, 30, dtype=torch.float32)
    weight = GBLRTensor.from_structured(matrix.to(dtype), factor_dtype=int8)
    part = torch.cat([weight[5:20], weight[:3]])
    assert (part.dtype, part.factor_dtype) == (dtype, int8)
    dense = weight.to_dense()
    torch.testing.assert_close(part.to_dense(), torch.cat([dense[5:20], dense[:3]]))


@pytest.mark.parametrize("int8", [None, "int8"])
def test_channels_of_convolutions(int8: str | None) -> None:
    torch.manual_seed(0)
    weight = GBLRTensor.from_structured(random_matrix(14, 12, 8 * 9), shape=(12, 8, 3, 3), factor_dtype=int8)
    dense = weight.to_dense()
    x = torch.randn(2, 8, 6, 6)
    for part, expected in (
        (weight[3:9], dense[3:9]),
        (weight[:, 2:7], dense[:, 2:7]),
        (weight[3:9, 2:7, :, :], dense[3:9, 2:7]),
        (torch.cat([weight[:4], weight[9:]]), torch.cat([dense[:4], dense[9:]])),
        (torch.cat([weight[:, :3], weight], 1), torch.cat([dense[:, :3], dense], 1)),
    ):
        assert part.shape == expected.shape
        torch.testing.assert_close(part.to_dense(), expected, rtol=1e-4, atol=1e-4)
        inputs = x[:, :1].expand(-1, expected.shape[1], -1, -1)
        torch.testing.assert_close(F.conv2d(inputs, part), F.conv2d(inputs, expected), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weight[2], dense[2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weight[:, 5], dense[:, 5], rtol=1e-4, atol=1e-4)
    for cut in (lambda: weight[:, :, 1:], lambda: torch.cat([weight, weight], 2), lambda: weight[:, :, 1]):
        with pytest.raises(GBLRError, match=r"only channels|not concatenated along axis 2"):
            cut()


@pytest.mark.parametrize("kind", ["plain", "transposed", "int8"])
def test_cuts_in_inference_mode(kind: str) -> None:
    weight = weight_of(kind)
    dense = weight.to_dense()
    with torch.inference_mode():
        for own in (weight, weight.detach(), weight.t().t()):
            assert torch.allclose(own[3:9, 2:].to_dense(), dense[3:9, 2:], atol=1e-4)
            assert torch.allclose(own.narrow(0, 2, 9).to_dense(), dense[2:11], atol=1e-4)
            assert torch.allclose(own.chunk(2, 1)[1].to_dense(), dense.chunk(2, 1)[1], atol=1e-4)
            assert torch.allclose(own.split(5)[1].to_dense(), dense[5:10], atol=1e-4)
            assert torch.allclose(own[4], dense[4], atol=1e-4)
            assert torch.allclose(torch.cat([own[:5], own]).to_dense(), torch.cat([dense[:5], dense]), atol=1e-4)


def test_a_layer_of_a_slice_is_saved(tmp_path: Path) -> None:
    weight = weight_of("splits")
    model = nn.Sequential(nn.Linear(30, 10, bias=False))
    model[0].weight = nn.Parameter(weight[:10], requires_grad=False)
    save(model, tmp_path / "part.safetensors")
    again = load(tmp_path / "part.safetensors", nn.Sequential(nn.Linear(30, 10, bias=False)))
    x = torch.randn(3, 30)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("kind", ["plain", "int8", "dense"])
def test_slices_without_an_index_or_a_component(kind: str) -> None:
    weight = weight_of(kind)
    for none in (weight[4:4], weight[9:2], weight[:, 30:], weight.narrow(0, 3, 0)):
        assert type(none) is Tensor
        assert none.dtype == weight.dtype
    assert (weight[4:4].shape, weight[:, 30:].shape) == ((0, 30), (24, 0))
    assert torch.cat([weight[4:4], weight]).shape == weight.shape
    rows = Intervals(torch.tensor([2]), torch.tensor([3]), 24)
    one = GBLRTensor.from_structured(
        StructuredMatrix.from_factors(torch.randn(1, 24), torch.randn(1, 30), rows), factor_dtype=weight.factor_dtype
    )
    assert one[8:].num_components == 0
    assert not one[8:].to_dense().any()
    assert F.linear(torch.randn(2, 30), one[8:]).shape == (2, 16)


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (lambda w: w[::2], "every 2th index of an axis"),
        (lambda w: torch.cat([w, torch.randn(2, 30)]), r"only GBLR tensors of one dtype.*to_dense\(\)"),
        (lambda w: torch.cat([w, w.double()]), "of one dtype"),
        (lambda w: torch.cat([w, w.quantize()]), "dtype of factors"),
        (lambda w: torch.cat([w, w[:, :7]]), r"shapes \[\(24, 30\), \(24, 7\)\] are not concatenated along axis 0"),
        (lambda w: torch.cat([w, w[:7]], 1), "not concatenated along axis 1"),
        (lambda w: w.to("meta")[:3], "without values"),
        (lambda w: torch.cat([w.to("meta"), w.to("meta")]), "without values"),
    ],
)
def test_what_cannot_be_cut_or_joined(cut: Callable[[GBLRTensor], object], message: str) -> None:
    with pytest.raises(GBLRError, match=message):
        cut(weight_of("plain"))


def test_indices_out_of_range() -> None:
    weight = weight_of("plain")
    for cut in (lambda: weight[24], lambda: weight[:, -31], lambda: weight.narrow(2, 0, 1)):
        with pytest.raises(IndexError):
            cut()
    with pytest.raises(RuntimeError):
        weight.narrow(0, 20, 9)


def test_cuts_of_small_weights_keep_their_matrix_where_users_get_it() -> None:
    weight = GBLRTensor.from_structured(random_matrix(12, 24, 30))
    assert weight.matrix is not None
    dense = weight.to_dense()
    for part, expected in ((weight[3:20], dense[3:20]), (torch.cat([weight, weight], 1), torch.cat([dense, dense], 1))):
        assert_is(part, expected, weight)
        assert part.packing.dense or part.matrix is not None
    whole = weight[:]
    assert whole.matrix is not None
    assert torch.equal(F.linear(torch.ones(2, 30), whole), F.linear(torch.ones(2, 30), weight))


def test_a_slice_is_a_copy() -> None:
    weight = weight_of("plain")
    before = weight.to_dense()
    part = weight[:9]
    part.factors.zero_()
    assert torch.equal(weight.to_dense(), before)
