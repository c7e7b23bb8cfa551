"""Costs of products: what plans follow from, and what files may hold."""

from __future__ import annotations

import json
import math

import pytest
import torch

from gblr_plugin.bench.products import random_structure
from gblr_plugin.kernels import compiled
from gblr_plugin.kernels.costs import BUCKETS, CASES, FEATURES, Costs, Workload, case_of, recorded
from gblr_plugin.kernels.plan import fixed_plan

CPU = torch.device("cpu")


def costs(dense: float = 10.0, start: float = 10.0, entry: float = 0.0) -> Costs:
    """Dense products of one time, and structured ones of a start and a time per thousand entries of rows."""
    ours = (start, 0.0, entry, *(0.0,) * (len(FEATURES) - 3))
    return Costs(1, dict.fromkeys(CASES, ((1e9, dense),)), dict.fromkeys(CASES, ours))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kernel", ["compiled", "blocks"])
def test_costs_are_recorded_for_every_kernel_and_dtype(dtype: torch.dtype, kernel: str) -> None:
    if kernel == "compiled" and dtype in (torch.float16, torch.float64):
        pytest.skip("nothing is compiled for this dtype on a CPU")
    found = recorded(CPU, dtype, kernel)
    assert found.threads == 1
    for taps in (None, 1, 9):
        for tokens in BUCKETS:
            stored = Workload((64, 72), [(32, 8)] * 2, [(36, 6)] * 2, dtype, kernel, taps)
            assert 0 < found.slowness(stored, tokens) < math.inf


def test_dense_times_lie_between_measured_ones() -> None:
    table = dict.fromkeys(CASES, ((100.0, 10.0), (10_000.0, 40.0)))
    model = Costs(1, table, costs(start=20.0).ours)

    def dense(m: int, n: int) -> float:
        return 20.0 / model.slowness(Workload((m, n), [(m, 1)], [(n, 1)], torch.float32, "blocks"), 1)

    assert dense(5, 5) == pytest.approx(10.0)  # never below the smallest
    assert dense(10, 10) == pytest.approx(10.0)
    assert dense(10, 100) == pytest.approx(20.0)  # half way in logarithms
    assert dense(100, 100) == pytest.approx(40.0)
    assert dense(200, 100) == pytest.approx(80.0)  # by entries beyond the largest


def test_structured_times_are_sums_over_features() -> None:
    stored = Workload((64, 96), [(32, 10), (32, 20)], [(48, 5), (48, 7)], torch.float32, "blocks")
    assert stored.features(16, 4) == pytest.approx((1.0, 0.0, 0.96, 0.576, 0.0, 0.042, 0.064, 0.096, 0.004))
    whole = Workload((64, 96), [(64, 10)], [(96, 10)], torch.float32, "blocks")
    assert whole.features(16, 1)[5] == 0.0  # all components in one block: nothing to gather


def test_large_factors_are_read_from_afar() -> None:
    large = Workload((4096, 4096), [(4096, 100)], [(4096, 100)], torch.float32, "blocks")
    assert large.features(1, 1)[4] == 819.2
    assert large._replace(dtype=torch.bfloat16).features(1, 1)[4] == 0.0


@pytest.mark.skipif(not compiled.available(CPU, torch.float32), reason="the compiled kernel alone shares its work")
def test_large_compiled_products_are_shared_by_threads() -> None:
    stored = Workload((1024, 1024), [(1024, 100)], [(1024, 100)], torch.float32, "compiled")
    alone, shared = stored.features(1024, 1), stored.features(1024, 4)
    assert (alone[1], shared[1]) == (0.0, 1.0)
    assert shared[2] == alone[2] / 4
    assert stored.features(1, 4)[1] == 0.0  # too little work


def test_cases_of_convolutions() -> None:
    assert [case_of(taps, 16) for taps in (None, 1, 9)] == ["16", "pointwise", "unfolded"]


def test_plans_follow_the_costs() -> None:
    matrix = random_structure(96, 96, 0.25)
    fast = fixed_plan(matrix, costs=lambda *_: costs(dense=10.0, start=5.0))
    slow = fixed_plan(matrix, costs=lambda *_: costs(dense=10.0, start=11.0))
    assert fast.dense_tokens == ()
    assert slow.dense_tokens == ((-1, None),)
    # A little that is saved is worth no matrix beside the factors, and no structure where the matrix is there anyway.
    doubt = costs(dense=10.0, start=9.0)
    assert fixed_plan(matrix, costs=lambda *_: doubt).dense_tokens == ()
    later = Costs(
        1, doubt.dense, {**doubt.ours, "1024": costs(start=20.0).ours["1024"], "1": costs(start=1.0).ours["1"]}
    )
    assert fixed_plan(matrix, costs=lambda *_: later).dense_tokens == ((1, None),)


def test_costs_are_asked_for_only_where_dense_is_a_choice() -> None:
    def refuse(*_: object) -> Costs:
        raise AssertionError("no costs are needed")

    full = random_structure(32, 32, 4.0)
    assert full.relative_flops == 1
    fixed_plan(full, costs=refuse)
    fixed_plan(random_structure(64, 64, 0.25), int8=True, costs=refuse)
    fixed_plan(random_structure(64, 64, 0.25), beside=False, costs=refuse)


def test_dictionary_round_trip() -> None:
    found = recorded(CPU, torch.float32, "blocks")
    assert Costs.from_dict(json.loads(json.dumps(found.to_dict()))) == found


GOOD = costs().to_dict()


@pytest.mark.parametrize(
    "values",
    [
        None,
        [],
        {},
        {**GOOD, "threads": "many"},
        {**GOOD, "dense": {}},
        {**GOOD, "dense": {**GOOD["dense"], "1": []}},
        {**GOOD, "dense": {**GOOD["dense"], "1": [[2, 1], [1, 1]]}},
        {**GOOD, "dense": {**GOOD["dense"], "1": [[1, 0]]}},
        {**GOOD, "dense": {**GOOD["dense"], "1": [[1, math.nan]]}},
        {**GOOD, "dense": {**GOOD["dense"], "1": 7}},
        {**GOOD, "ours": {**GOOD["ours"], "3": GOOD["ours"]["1"]}},
        {**GOOD, "ours": {**GOOD["ours"], "1": [1.0]}},
        {**GOOD, "ours": {**GOOD["ours"], "1": [-1.0] * len(FEATURES)}},
        {**GOOD, "ours": {**GOOD["ours"], "1": [math.inf] * len(FEATURES)}},
    ],
)
def test_what_is_no_costs_is_refused(values: object) -> None:
    with pytest.raises(ValueError, match=r"."):
        Costs.from_dict(values)
