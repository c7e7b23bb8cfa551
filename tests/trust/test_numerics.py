"""Errors of every path against float64 within documented bounds; training beside other tools gives the same result."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gblr_plugin as gblr
from gblr_plugin import Intervals, StructuredMatrix
from gblr_plugin.kernels import product
from gblr_plugin.kernels.buffers import to_dense
from gblr_plugin.kernels.packing import pack
from gblr_plugin.layers import GBLRLinear
from gblr_plugin.layers.masks import gaudi_mask
from gblr_plugin.layers.product import Product

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Path and dtype: relative error of the forward and of the gradients, in the Frobenius norm, against float64 on the same
# rounded inputs. docs/notes/numerics.md prints this table.
BOUNDS = {
    ("mask, tables", "float64"): (1e-12, 1e-10),
    ("mask, tables", "float32"): (1e-6, 2e-6),
    ("mask, compiled", "float64"): (1e-12, 1e-10),
    ("mask, compiled", "float32"): (1e-6, 2e-6),
    ("mask, FFT", "float64"): (1e-12, 1e-10),
    ("mask, FFT", "float32"): (1e-5, 1e-4),
    **{
        (f"layer, {way}", name): bound
        for way in ("factored", "dense", "factored by blocks", "dense by blocks")
        for name, bound in (("float64", (1e-12, 1e-10)), ("float32", (1e-5, 1e-4)), ("bfloat16", (2e-2, 4e-2)))
    },
    **{
        (f"kernel, {kernel}", name): bound
        for kernel in ("dense", "blocks", "compiled")
        for name, bound in (
            ("float64", (1e-13, 1e-13)),
            ("float32", (1e-6, 1e-6)),
            ("bfloat16", (1e-2, 1e-2)),
            ("float16", (1e-3, 1e-3)),
        )
    },
}
M, N, K, TOKENS = 61, 96, 24, 33


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(found: torch.Tensor | None, wanted: torch.Tensor | None) -> float:
    return float((found.detach().double() - wanted.detach()).norm() / wanted.detach().norm())


def published(width: torch.Tensor, location: torch.Tensor, sigma: float) -> torch.Tensor:
    """The formula of the paper (Sec. 3.2) as a sum of cosines."""
    k, place = torch.arange(N // 2 + 1, dtype=torch.float64), torch.arange(N, dtype=torch.float64)
    w, start = width[:, None], location[:, None]
    gain = w * torch.sinc(k * w) / torch.sinc(k / N) * torch.exp(-(k**2) / (2 * sigma**2))
    gain = gain * torch.where((k == 0) | (k == N / 2), 1.0, 2.0)
    phase = torch.pi * k * (1 / N - w - 2 * start)
    return (gain[:, :, None] * torch.cos(phase[:, :, None] + 2 * torch.pi * k[:, None] * place / N)).sum(1)


def mask_errors(form: str, dtype: torch.dtype) -> tuple[float, float]:
    worst, num = [0.0, 0.0], K
    if form == "compiled":
        pytest.importorskip("numba")
        form, num = "table", 400  # components from which on it pays
    for sigma in (1.0, 10.0, 100.0):
        given = [torch.rand(num, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (1, 2)]
        given = [(part * N).round() / N for part in given]  # both precisions round to the same samples
        low = [part.to(dtype, copy=True).requires_grad_() for part in given]
        high = [part.clone().requires_grad_() for part in given]
        probe = random(num, N, seed=3)
        found, wanted = gaudi_mask(*low, N, sigma, form=form), published(*high, sigma)
        (found * probe.to(dtype)).sum().backward()
        (wanted * probe).sum().backward()
        worst[0] = max(worst[0], error(found, wanted))
        worst[1] = max(worst[1], *(error(a.grad, b.grad) for a, b in zip(low, high, strict=True)))
    return worst[0], worst[1]


def matrix() -> StructuredMatrix:
    generator = torch.Generator().manual_seed(4)

    def intervals(length: int) -> Intervals:
        width = torch.randint(0, length + 1, (K,), generator=generator)
        return Intervals(width, torch.randint(0, length, (K,), generator=generator), length)

    return StructuredMatrix.from_factors(random(K, M), random(K, N, seed=1), intervals(M), intervals(N))


def layer_errors(way: str, dtype: torch.dtype) -> tuple[float, float]:
    layer = GBLRLinear(matrix(), random(M, seed=5)).to(dtype)
    layer.set_sigma(20.0)

    def choose(*_: Any, **__: Any) -> Product:
        rows, cols = layer._masked_axes() if way.endswith("by blocks") else (None, None)
        return Product(way.startswith("factored"), rows, cols if way.startswith("factored") else None)

    layer._choose_product = choose
    x = random(TOKENS, N, seed=6).to(dtype).requires_grad_()
    u, v, widths, locations, bias, x_high = (
        part.detach().double().requires_grad_()
        for part in (layer.U, layer.V, layer.widths, layer.locations, layer.bias, x)
    )
    rows, cols = (gaudi_mask(widths[i], locations[i], n, 20.0, form="fft") for i, n in enumerate((M, N)))
    wanted = F.linear(x_high, (rows * u).T @ (cols * v), bias)
    probe = random(TOKENS, M, seed=7)
    found = layer(x)
    (found * probe.to(dtype)).sum().backward()
    (wanted * probe).sum().backward()
    pairs = ((x, x_high), (layer.U, u), (layer.V, v), (layer.widths, widths), (layer.locations, locations))
    return error(found, wanted), max(error(a.grad, b.grad) for a, b in pairs)


def kernel_errors(kernel: str, dtype: torch.dtype) -> tuple[float, float]:
    few, many = (kernel_errors_at(kernel, dtype, tokens) for tokens in (1, TOKENS))
    return max(few[0], many[0]), max(few[1], many[1])


def kernel_errors_at(kernel: str, dtype: torch.dtype, tokens: int) -> tuple[float, float]:
    layout, factors, lists = pack(matrix().to(dtype=dtype), 16, 32)
    x = random(tokens, N, seed=6).to(dtype).requires_grad_()
    bias = random(M, seed=5).to(dtype).requires_grad_()
    dense = to_dense(layout, factors.double(), lists)
    x_high, bias_high = (part.detach().double().requires_grad_() for part in (x, bias))
    probe = random(tokens, M, seed=7)
    found = product.linear(x, factors, lists, layout, bias, kernel)
    wanted = F.linear(x_high, dense, bias_high)
    gradients = torch.autograd.grad((found * probe.to(dtype)).sum(), (x, bias))
    expected = torch.autograd.grad((wanted * probe.to(dtype).double()).sum(), (x_high, bias_high))
    with torch.no_grad():
        inference = product.linear(x, factors, lists, layout, bias, kernel)
    forward = max(error(found, wanted), error(inference, wanted))
    return forward, max(error(a, b) for a, b in zip(gradients, expected, strict=True))


MEASURES = {"mask": mask_errors, "layer": layer_errors, "kernel": kernel_errors}
FORMS = {"tables": "table", "FFT": "fft"}


@pytest.mark.parametrize(("path", "dtype"), BOUNDS, ids=lambda part: part.replace(" ", "-"))
def test_errors_against_float64(path: str, dtype: str) -> None:
    room, _, way = path.partition(", ")
    forward, gradient = MEASURES[room](FORMS.get(way, way), DTYPES[dtype])
    print(f"{path:28} {dtype:9} {forward:.1e} {gradient:.1e}")
    assert (forward <= BOUNDS[path, dtype][0], gradient <= BOUNDS[path, dtype][1]) == (True, True), (forward, gradient)


def test_the_documented_bounds_are_these() -> None:
    page = (Path(__file__).parents[2] / "docs" / "notes" / "numerics.md").read_text()
    rows = re.findall(r"^\| ((?:mask|layer|kernel), [^|]+?) \| (\w+) \| (\S+) \| (\S+) \|$", page, re.MULTILINE)
    assert {(path, dtype): (float(a), float(b)) for path, dtype, a, b in rows} == BOUNDS


# -- training beside other tools ---------------------------------------------------------------------------------------


def trained(make_run: Any, how: Any = None, steps: int = 14) -> Any:
    run = make_run()
    extra = how(run) if how is not None else None
    for _ in range(steps):
        run.optimizer.zero_grad()
        if extra is None:
            run.loss().backward()
            run.optimizer.step()
        else:
            extra()
        run.step += 1
    assert run.learner.frozen
    assert run.learner.relative_flops <= 0.4
    return run


def assert_bits(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name


def clipped(run: Any) -> Any:
    def step() -> None:
        run.loss().backward()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1e6)
        run.optimizer.step()

    return step


def averaged(run: Any) -> Any:
    average = torch.optim.swa_utils.AveragedModel(
        run.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
    )
    run.average = average

    def step() -> None:
        run.loss().backward()
        run.optimizer.step()
        average.update_parameters(run.model)

    return step


def scaled(run: Any) -> Any:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)

    def step() -> None:
        scaler.scale(run.loss()).backward()
        scaler.step(run.optimizer)
        scaler.update()

    return step


def checkpointed(run: Any) -> Any:
    def step() -> None:
        run.loss(lambda x: checkpoint(run.model, x, use_reentrant=False)).backward()
        run.optimizer.step()

    return step


def compiled(run: Any) -> Any:
    model = torch.compile(run.model, backend="aot_eager")

    def step() -> None:
        run.loss(model).backward()
        run.optimizer.step()

    return step


def in_bfloat16(run: Any) -> Any:
    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = run.loss()
        loss.backward()
        run.optimizer.step()

    return step


@pytest.mark.parametrize("how", [clipped, averaged, scaled, checkpointed])
def test_the_same_bits_as_without(make_run: Any, how: Any) -> None:
    assert_bits(trained(make_run, how).model, trained(make_run).model)


def test_compiled_training(make_run: Any) -> None:
    a, b = trained(make_run, compiled), trained(make_run)
    assert a.learner.relative_flops == b.learner.relative_flops
    torch.testing.assert_close(a.model(a.x), b.model(b.x), rtol=1e-3, atol=1e-4)
    torch.compiler.reset()


def test_autocast_training(make_run: Any) -> None:
    a, b = trained(make_run, in_bfloat16), trained(make_run)
    assert float(a.loss(rows=slice(None))) == pytest.approx(float(b.loss(rows=slice(None))), rel=0.05)


def test_an_average_of_the_weights_predicts(make_run: Any) -> None:
    run = trained(make_run, averaged, steps=20)
    assert float(run.loss(run.average, slice(None))) == pytest.approx(float(run.loss(rows=slice(None))), rel=0.2)


def test_clipping_that_bites_still_meets_the_budget(make_run: Any) -> None:
    def hard(run: Any) -> Any:
        def step() -> None:
            run.loss().backward()
            torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1e-3)
            run.optimizer.step()

        return step

    trained(make_run, hard)


def test_deterministic_algorithms(make_run: Any) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        a, b = trained(make_run), trained(make_run)
        assert_bits(a.model, b.model)
        outputs = []
        for run in (a, b):
            frozen = gblr.convert(copy.deepcopy(run.model), plan="fixed")
            with torch.no_grad():
                outputs.append(frozen(run.x))
        assert torch.equal(*outputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_bits(a.model, trained(make_run).model)  # the same seed gives the same structure without it too
