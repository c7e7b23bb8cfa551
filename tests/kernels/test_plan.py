"""Plans: deterministic without timing, within the memory limit, measured where asked."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from gblr_plugin.errors import ConfigError
from gblr_plugin.kernels import measure, product
from gblr_plugin.kernels.buffers import quantize
from gblr_plugin.kernels.measure import circumstances, is_stale, measured_plan
from gblr_plugin.kernels.packing import narrowed, pack, pack_for
from gblr_plugin.kernels.plan import MEMORY, Plan, candidates, fixed_plan, predicted_cost
from gblr_plugin.matrix.structure import Intervals, StructuredMatrix
from gblr_plugin.tensor.gblr_tensor import GBLRTensor


def matrix(m: int = 256, n: int = 384, k: int = 60, align: int = 1) -> StructuredMatrix:
    g = torch.Generator().manual_seed(0)

    def intervals(length: int) -> Intervals:
        steps = length // align
        width = torch.randint(steps // 4, steps // 2, (k,), generator=g) * align
        return Intervals(width, torch.randint(0, steps, (k,), generator=g) * align, length)

    u, v = torch.randn(k, m, generator=g), torch.randn(k, n, generator=g)
    return StructuredMatrix.from_factors(u, v, intervals(m), intervals(n))


def test_fixed_plans_are_deterministic() -> None:
    assert fixed_plan(matrix()) == fixed_plan(matrix())
    assert not fixed_plan(matrix()).measured


@pytest.mark.parametrize("align", [16, 32])
def test_aligned_structures_get_blocks_without_padding(align: int) -> None:
    assert candidates(matrix(align=align), kernel="compiled")[0].padding == 1.0


@pytest.mark.parametrize("align", [1, 16])
@pytest.mark.parametrize("kernel", ["compiled", "blocks"])
def test_candidates_keep_the_memory_limit_and_foretell_the_storage(align: int, kernel: str) -> None:
    original = matrix(1024, 1024, 160, align)
    plans = candidates(original, kernel=kernel)
    assert [plan.predicted for plan in plans] == sorted(plan.predicted for plan in plans)
    for plan in plans[:3]:
        assert plan.even == (kernel == "blocks")
        layout, values, index = pack_for(original, plan.block_rows, plan.block_cols, plan.even)
        assert values.nbytes + index.nbytes <= MEMORY[kernel] * original.stored * 4
        assert layout.padding == pytest.approx(plan.padding)


@pytest.mark.parametrize("align", [16, 32])
def test_int8_factors_keep_the_limit_too(align: int) -> None:
    original = matrix(1024, 1024, 160, align)
    plan = candidates(original, int8=True)[0]
    layout, values, index = pack(original, plan.block_rows, plan.block_cols)
    whole, scales = quantize(layout, values, index)
    layout, index = narrowed(layout, index)
    assert whole.nbytes + index.nbytes + scales.nbytes <= MEMORY[plan.kernels[-1][1]] * original.stored


def test_too_narrow_for_the_limit_takes_the_leanest() -> None:
    g = torch.Generator().manual_seed(1)
    rows, cols = (
        Intervals(torch.ones(40, dtype=torch.int64), torch.randint(0, 128, (40,), generator=g), 128) for _ in "rc"
    )
    narrow = StructuredMatrix.from_factors(torch.randn(40, 128), torch.randn(40, 128), rows, cols)
    (plan,) = candidates(narrow)
    assert (plan.block_rows, plan.block_cols) == (16, 16)


@pytest.mark.parametrize("sizes", [(12,), (4, 4, 4)])
def test_full_widths_are_two_plain_products(sizes: tuple[int, ...]) -> None:
    u, v = torch.randn(12, 96), torch.randn(12, 80)
    low_rank = StructuredMatrix.from_factors(u, v, split_sizes=sizes)
    (plan,) = candidates(low_rank, kernel="blocks")
    layout, values, index = pack(low_rank, plan.block_rows, plan.block_cols)
    assert (len(layout.row_blocks), len(layout.col_blocks), layout.padding) == (len(sizes), 1, 1.0)
    x = torch.randn(7, 80)
    y = product.linear(x, values, index, layout, None, plan.kernel(7))
    torch.testing.assert_close(y, x @ low_rank.to_dense().t(), rtol=1e-4, atol=1e-4)


def test_dense_where_factors_cost_no_less() -> None:
    full = StructuredMatrix.from_factors(torch.randn(20, 32), torch.randn(20, 32))
    assert fixed_plan(full).block_rows == 0
    assert fixed_plan(full).kernel(7) == "dense"


def test_column_blocks_hold_whole_channels() -> None:
    for plan in candidates(matrix(n=9 * 40), taps=9):
        assert plan.block_cols % 9 == 0


def test_kernel_by_number_of_tokens() -> None:
    plan = Plan(16, 16, ((1, "compiled"), (64, "blocks")))
    assert [plan.kernel(tokens) for tokens in (0, 1, 2, 64, 65, 10**6)] == ["compiled"] * 2 + ["blocks"] * 4


def test_dictionary_round_trip() -> None:
    plan = Plan(16, 32, ((1, "compiled"), (64, "blocks")), padding=1.5, device="cpu", speedups=((1, 2.0),))
    back = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert back == plan
    assert back.to_dict() == plan.to_dict()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"block_rows": 16, "block_cols": 0}, "block sizes"),
        ({"block_rows": 16, "block_cols": 16, "kernels": [[4, "fast"]]}, "unknown kernel 'fast'"),
        ({"block_rows": 16, "block_cols": 16, "kernels": [[4, "blocks"], [1, "blocks"]]}, "increasing order"),
        ({"block_rows": 16, "block_cols": 16, "kernels": 3}, "lists of pairs"),
        ({"block_rows": 16, "block_cols": 16, "colour": 3}, "unknown keys"),
    ],
)
def test_bad_plans_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Plan.from_dict(values)


def test_measured_plans_are_kept_per_structure() -> None:
    first = measured_plan(matrix(), buckets=(1, 4))
    assert first.measured
    assert (first.device, first.dtype, first.threads) == ("cpu", "float32", torch.get_num_threads())
    assert first.machine
    assert measured_plan(matrix(), buckets=(1, 4)) is first
    assert first.block_rows == 0 or [limit for limit, _ in first.kernels] == [1, 4]


def test_a_measured_storage_is_packed_as_it_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = [plan for plan in measure._plans(matrix(), False) if not plan.even]
    if not stored:
        pytest.skip("no compiled kernel here")

    def times(calls: list[object], *options: object) -> list[float]:
        """Of dense, of both kernels on each storage of the compiled one, of torch's storage."""
        return [1.0, *[0.2, 0.1] * len(stored), 0.5]

    monkeypatch.setattr(measure, "interleaved_medians", times)
    plan = measure._measure(matrix(), (1, 16, 256), False)
    assert [name for _, name in plan.kernels] == ["compiled", "blocks", "blocks"]
    assert not plan.even


@pytest.mark.parametrize(
    "change", [{"device": "cuda"}, {"dtype": "bfloat16"}, {"threads": 64}, {"machine": "another"}, {}]
)
def test_plans_measured_elsewhere_are_stale(change: dict[str, object]) -> None:
    cpu = torch.device("cpu")
    plan = replace(Plan(16, 16, speedups=((1, 2.0),)), **circumstances(cpu, torch.float32))
    assert not is_stale(plan, cpu, torch.float32)
    elsewhere = replace(plan, **change)
    assert is_stale(elsewhere, cpu, torch.float32) == bool(change)
    unmeasured = elsewhere.unmeasured()
    assert unmeasured == Plan(16, 16)
    assert unmeasured.speedups == ()
    assert not is_stale(unmeasured, cpu, torch.float32)


@pytest.mark.parametrize("kernel", ["compiled", "blocks"])
def test_the_storage_costs_what_the_plan_predicted(kernel: str) -> None:
    original = matrix()
    for plan in candidates(original, kernel=kernel):
        layout, _, _ = pack(original, plan.block_rows, plan.block_cols, plan.even)
        assert predicted_cost(layout, kernel, 4) == pytest.approx(plan.predicted)
    assert predicted_cost(pack(original, 0, 0)[0], "dense", 4) == 1.0
    wide = GBLRTensor.from_structured(original, plan=Plan(16, 16)).to(torch.float64)  # no kernel is compiled for it
    assert wide.predicted_cost == predicted_cost(wide.packing, "blocks", 8)
