"""The published initialiser, with which decompositions are compared."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from gblr_plugin.decomposition.problem import Problem
from gblr_plugin.matrix.metric import Metric
from gblr_plugin.matrix.tiles import TiledAxis

SCRIPT = Path(__file__).parents[2] / "integration" / "benchmarks" / "published_initialiser.py"


def script() -> ModuleType:
    """The comparison's module, which is in no package."""
    spec = importlib.util.spec_from_file_location("published_initialiser", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


interval = script().interval


def test_budget_is_kept_and_steps_lower_the_error() -> None:
    g = torch.Generator().manual_seed(0)
    weight = torch.block_diag(*[torch.randn(12, 12, generator=g).double() for _ in range(4)])
    task = Problem(weight, int(0.3 * 48 * 48), TiledAxis(48, 1), TiledAxis(48, 1), 48, Metric(), 0)
    errors = []
    for steps in (1, 150):
        found = interval(task, steps=steps)
        assert 0.5 * task.max_multiply_adds < found.stored <= task.max_multiply_adds
        errors.append(task.error(found))
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize(("align", "budget", "steps"), [(16, 0.1, 1), (16, 0.3, 120), (8, 0.3, 300)])
def test_tiles_start_with_components_and_never_end_worse_than_zero(align: int, budget: float, steps: int) -> None:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(56, 90, generator=g).double()  # neither is whole tiles of 16
    metric = Metric.from_moment((inputs := torch.randn(300, 90, generator=g).double()).T @ inputs)
    task = Problem(weight, int(budget * 56 * 90), TiledAxis(56, align), TiledAxis(90, align), 56, metric, 0)
    found = interval(task, steps=steps)
    assert found.num_components > 1
    assert 0.5 * task.max_multiply_adds < found.stored <= task.max_multiply_adds
    assert task.error(found) < 0.999
    for part, length in ((found.rows, 56), (found.cols, 90)):
        assert bool(((part.width % align == 0) | (part.width == length)).all())
        assert bool((part.start % align == 0).all())
