"""What every family promises, as one abstract case: values, gradients, cost, trainable and frozen forms, files."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gblr_plugin as gblr
from gblr_plugin import families
from gblr_plugin.errors import ConfigError
from gblr_plugin.families import FamilyLayer, FamilyMatrix
from gblr_plugin.matrix.structure import StructuredMatrix

SHAPES = [(24, 32), (19, 29), (40, 13), (7, 64)]
BUDGETS = [0.05, 0.15, 0.3, 0.5, 0.75, 0.9]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class FamilyCase:
    """Inherited by each family.

    `least` is the cost of its smallest member, `planted` a member and the options that find it again.
    """

    name: str
    options: dict[str, Any] = {}
    layer_options: dict[str, Any] = {}
    linear = True
    excess_per_component = 0

    def least(self, m: int, n: int) -> int:
        return m + n

    def planted(self, m: int, n: int) -> tuple[FamilyMatrix, dict[str, Any]]:
        raise NotImplementedError

    # -- what the tests share

    def create(self, m: int, n: int, budget: float, seed: int = 0) -> FamilyMatrix:
        return families.get(self.name).from_dense(gaussian(m, n, seed=seed), budget, **self.options)

    def module(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Linear(32, 24, dtype=dtype) if self.linear else nn.Conv2d(6, 12, 3, padding=1, dtype=dtype)

    def input(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return gaussian(5, 32).to(dtype) if self.linear else gaussian(2, 6, 5, 4).to(dtype)

    # -- cost

    @pytest.mark.parametrize(("m", "n"), SHAPES)
    @pytest.mark.parametrize("budget", BUDGETS)
    def test_budget_is_met_or_refused(self, m: int, n: int, budget: float) -> None:
        allowed = int(budget * m * n + 1e-6)
        if allowed < self.least(m, n):
            with pytest.raises(ConfigError, match=rf"{allowed} .*multiply-adds.*\d+ of .*raise the budget"):
                self.create(m, n, budget)
            return
        matrix = self.create(m, n, budget)
        assert matrix.shape == (m, n)
        assert matrix.multiply_adds <= allowed
        assert matrix.relative_flops == pytest.approx(matrix.multiply_adds / (m * n))
        assert matrix.relative_flops <= budget + 1e-9
        assert matrix.to_dense().shape == (m, n)
        if matrix.stored:  # a GBLR method that finds nothing to pay for gives zero
            assert torch.linalg.norm(matrix.to_dense() - gaussian(m, n)) < torch.linalg.norm(gaussian(m, n))

    def test_more_budget_is_no_worse(self) -> None:
        target = gaussian(24, 32)
        errors = [torch.linalg.norm(target - self.create(24, 32, budget).to_dense()) for budget in (0.3, 0.6, 0.9)]
        assert errors[0] >= errors[1] >= errors[2]

    # -- values and gradients

    @pytest.mark.parametrize(("m", "n"), SHAPES)
    def test_linear_equals_dense(self, m: int, n: int) -> None:
        matrix = self.create(m, n, 0.6)
        factors = {name: value.clone().requires_grad_() for name, value in matrix.factors().items()}
        matrix = matrix.with_factors(factors)
        x = gaussian(3, 5, n, seed=1).requires_grad_()
        bias = gaussian(m, seed=2)
        upstream = gaussian(3, 5, m, seed=3)
        by_factors = matrix.linear(x, bias)
        by_dense = x @ matrix.to_dense().T + bias
        torch.testing.assert_close(by_factors, by_dense)
        torch.testing.assert_close(matrix.linear(x[0, 0]), by_dense[0, 0] - bias)
        wanted = torch.autograd.grad(by_dense, [x, *factors.values()], upstream, retain_graph=True)
        got = torch.autograd.grad(by_factors, [x, *factors.values()], upstream)
        for left, right in zip(got, wanted, strict=True):
            torch.testing.assert_close(left, right)

    def test_dtypes(self) -> None:
        weight = gaussian(24, 32)
        for dtype, kept in ((torch.float64,) * 2, (torch.float32,) * 2, (torch.bfloat16, torch.float32)):
            matrix = families.get(self.name).from_dense(weight.to(dtype), 0.5, **self.options)
            assert {value.dtype for value in matrix.factors().values()} == {kept}
            assert matrix.to(torch.float64).to_dense().dtype == torch.float64

    def test_recovers_what_it_represents(self) -> None:
        for m, n in ((24, 32), (19, 29)):
            planted, options = self.planted(m, n)
            options = {**self.options, **options}
            found = families.get(self.name).from_dense(planted.to_dense(), planted.relative_flops, **options)
            assert found.stored <= planted.stored
            torch.testing.assert_close(found.to_dense(), planted.to_dense(), rtol=0, atol=1e-6)

    def test_calibration_lowers_the_output_error(self) -> None:
        mixing = gaussian(32, 32, seed=7) * torch.logspace(0, -2, 32, dtype=torch.float64)[:, None]
        inputs = gaussian(500, 32, seed=8) @ mixing
        inputs = inputs * torch.logspace(0, -1, 32, dtype=torch.float64)[torch.randperm(32)]
        weight, family = gaussian(24, 32), families.get(self.name)
        plain = family.from_dense(weight, 0.5, **self.options).to_dense()
        by_rows = family.from_dense(weight, 0.5, calibration=inputs, **self.options)
        by_moment = family.from_dense(weight, 0.5, calibration=inputs.T @ inputs / 500, **self.options)

        def output_error(matrix: Tensor) -> float:
            return float(torch.linalg.norm(inputs @ (weight - matrix).T))

        assert by_rows.relative_flops <= 0.5
        assert output_error(by_rows.to_dense()) < 0.95 * output_error(plain)
        torch.testing.assert_close(by_rows.to_dense(), by_moment.to_dense(), rtol=1e-5, atol=1e-6)
        with pytest.raises(ConfigError, match="calibration must be"):
            family.from_dense(weight, 0.5, calibration=inputs[:, :31], **self.options)

    # -- GBLR's claims

    def test_embeds_in_gblr(self) -> None:
        for m, n in SHAPES:
            matrix = self.create(m, n, 0.6)
            structured = matrix.to_structured()
            if structured is None:
                assert self.name in ("blast", "tucker2")
                return
            dense = matrix.to_dense()
            assert isinstance(structured, StructuredMatrix)
            torch.testing.assert_close(
                structured.to_dense(), dense if matrix.row_order is None else dense[matrix.row_order]
            )
            local = structured.rows.width * structured.cols.width < m * n
            extra = self.excess_per_component * int(local.sum())
            assert structured.stored == matrix.stored + extra

    # -- layers

    def test_trains_and_freezes(self) -> None:
        dense = self.module()
        model = nn.Sequential(copy.deepcopy(dense))
        layer = gblr.prepare(model, None, family=self.name, budget=0.5, **self.layer_options)["0"]
        assert model[0] is layer
        assert isinstance(layer, type(dense))
        assert layer.matrix_shape == tuple(dense.weight.flatten(1).shape)
        assert layer.relative_flops <= 0.5
        assert torch.equal(layer.bias, dense.bias)
        x = self.input()
        target = dense(x).detach()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        before = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
        losses = []
        for _ in range(3):
            loss = (model(x) - target).square().mean()
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert losses[0] > losses[1] > losses[2]
        trained = dict(model.named_parameters())
        assert all(not torch.equal(trained[name], value) for name, value in before.items())
        cost = layer.relative_flops
        wanted = model(x).detach()
        frozen = gblr.convert(model)
        assert not any(value.requires_grad for name, value in frozen.named_parameters() if not name.endswith("bias"))
        torch.testing.assert_close(frozen(x), wanted)
        counted = frozen[0].relative_flops if isinstance(frozen[0], FamilyLayer) else frozen[0].weight.relative_flops
        assert counted == cost

    def test_layer_computes_its_weight(self) -> None:
        model = nn.Sequential(self.module())
        layer: Any = gblr.prepare(model, ["0"], family=self.name, budget=0.5, **self.layer_options)["0"]
        x = self.input()
        dense = self.module()
        with torch.no_grad():
            dense.weight.copy_(layer.weight)
        torch.testing.assert_close(layer(x), dense(x))
        assert "weight" not in dict(layer.named_parameters())

    def test_state_dict_round_trip(self) -> None:
        # Geometry comes from shape, budget and options; states carry the factors.
        models = [nn.Sequential(self.module(seed=seed)) for seed in (0, 1)]
        for model in models:
            gblr.prepare(model, None, family=self.name, budget=0.5, **self.fixed_geometry())
        x = self.input()
        assert not torch.equal(models[0](x), models[1](x))
        models[1].load_state_dict(models[0].state_dict())
        torch.testing.assert_close(models[1](x), models[0](x))

    def fixed_geometry(self) -> dict[str, Any]:
        return {}

    def test_survives_deepcopy_and_casts(self) -> None:
        model = nn.Sequential(self.module(torch.float32))
        gblr.prepare(model, None, family=self.name, budget=0.5, **self.layer_options)
        x = self.input(torch.float32)
        wanted = model(x)
        torch.testing.assert_close(copy.deepcopy(model)(x), wanted)
        torch.testing.assert_close(copy.deepcopy(model).double()(x.double()).float(), wanted, rtol=1e-4, atol=1e-5)

    def test_autocast(self) -> None:
        model = nn.Sequential(self.module(torch.float32))
        gblr.prepare(model, None, family=self.name, budget=0.5, **self.layer_options)
        x = self.input(torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), model(x), rtol=0.05, atol=0.05)

    def test_unknown_option_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=f"{self.name}: no option 'colour'"):
            families.get(self.name).from_dense(gaussian(24, 32), 0.5, colour=1)


class TestLowRank(FamilyCase):
    name = "low_rank"

    def planted(self, m: int, n: int) -> tuple[FamilyMatrix, dict[str, Any]]:
        return families.get(self.name)(gaussian(m, 4), gaussian(4, n, seed=1)), {}  # type: ignore[call-arg]


class TestAlds(FamilyCase):
    name = "alds"

    def planted(self, m: int, n: int) -> tuple[FamilyMatrix, dict[str, Any]]:
        return families.get(self.name)(gaussian(3, 2, m), gaussian(1, 2, n, seed=1)), {}  # type: ignore[call-arg]

    def fixed_geometry(self) -> dict[str, Any]:
        return {"parts": 2}


class TestBlockLowRank(FamilyCase):
    name = "block_low_rank"

    def planted(self, m: int, n: int) -> tuple[FamilyMatrix, dict[str, Any]]:
        matrix = families.get(self.name)(gaussian(3, 2, m), gaussian(4, 2, n, seed=1))  # type: ignore[call-arg]
        return matrix, {"blocks": (4, 3)}


class TestMonarch(FamilyCase):
    name = "monarch"

    def planted(self, m: int, n: int) -> tuple[FamilyMatrix, dict[str, Any]]:
        return families.get(self.name)(gaussian(5, 1, m), gaussian(5, 1, n, seed=1)), {}  # type: ignore[call-arg]


class TestBlockDiagonal(FamilyCase):
    name = "block_diagonal"
    excess_per_component = 1

    def least(self, m: int, n: int) -> int:
        return max(m, n)

    def planted(self, m: int, n: int) -> tuple[FamilyMatrix, dict[str, Any]]:
        return self.create(m, n, 0.21, seed=5), {}


class TestBlockSparse(FamilyCase):
    name = "block_sparse"
    excess_per_component = 1

    def least(self, m: int, n: int) -> int:
        size = 1 << (min(m, n).bit_length() - 1)
        row, col = torch.arange(m) * size // m, torch.arange(n) * size // n
        return -(-int((row[:, None] == col).sum()) * 4 // 3)

    def planted(self, m: int, n: int) -> tuple[FamilyMatrix, dict[str, Any]]:
        return self.create(m, n, 0.45, seed=5), {"iterations": 400}


class TestBlast(FamilyCase):
    name = "blast"

    def least(self, m: int, n: int) -> int:
        return m + n + 1

    def planted(self, m: int, n: int) -> tuple[FamilyMatrix, dict[str, Any]]:
        factors = gaussian(3, m), gaussian(3, n, seed=1), gaussian(3, 3, 3, seed=2)
        return families.get(self.name)(*factors), {"blocks": 3, "iterations": 1000}  # type: ignore[call-arg]


class TestTucker2(FamilyCase):
    name = "tucker2"
    options = {"kernel_size": (1,)}
    linear = False

    def least(self, m: int, n: int) -> int:
        return m + n + 1

    def planted(self, m: int, n: int) -> tuple[FamilyMatrix, dict[str, Any]]:
        factors = gaussian(m, 3), gaussian(3, 4, 2, seed=1), gaussian(4, n // 2, seed=2), (2,), (1,)
        return families.get(self.name)(*factors), {"kernel_size": (2,)}  # type: ignore[call-arg]


class TestGblr(FamilyCase):
    name = "gblr"
    options = layer_options = {"method": "trapezoid"}  # the closed form: these are not tests of the decomposition

    def least(self, m: int, n: int) -> int:
        return 2

    def planted(self, m: int, n: int) -> tuple[FamilyMatrix, dict[str, Any]]:
        low = StructuredMatrix.from_factors(gaussian(4, m), gaussian(4, n, seed=1))
        return families.get(self.name)(low), {}  # type: ignore[call-arg]

    def fixed_geometry(self) -> dict[str, Any]:
        return {"method": "svd"}


@pytest.mark.parametrize("name", [name for name in families.names() if name != "tucker2"])
def test_packed_projections_are_stacks_of_their_parts(name: str) -> None:
    options = {"method": "trapezoid"} if name == "gblr" else {}
    torch.manual_seed(0)
    dense = nn.Linear(32, 3 * 20).double()
    model = nn.Sequential(copy.deepcopy(dense))
    layer: Any = gblr.prepare(model, ["0"], family=name, budget=0.5, row_splits=3, **options)["0"]
    parts = [families.get(name).from_dense(part, 0.5, **options) for part in dense.weight.detach().chunk(3)]
    assert layer.stored == sum(part.stored for part in parts)
    torch.testing.assert_close(layer.to_dense(), torch.cat([part.to_dense() for part in parts]))
    x = gaussian(4, 32)
    wanted = model(x)
    torch.testing.assert_close(wanted, nn.functional.linear(x, layer.weight, dense.bias))
    assert gblr.report(model, x).layers[0].structure == name
    torch.testing.assert_close(gblr.convert(model)(x), wanted)
    with pytest.raises(ConfigError, match="row_splits must be a positive divisor of the 60 rows, got 7"):
        families.get(name).from_dense(dense.weight.detach(), 0.5, row_splits=7, **options)
