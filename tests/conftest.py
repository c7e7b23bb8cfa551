"""What all tests share."""

from __future__ import annotations

import os

import pytest

from gblr_plugin.kernels import plan

os.environ["GBLR_FIT_COSTS"] = (
    "0"  # plans follow from the recorded costs, here and in child processes: as on any machine
)


@pytest.fixture(autouse=True)
def structure_at_work(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No dense products in plans: the small weights of tests go through structured ones.

    Tests of plans as users get them ask for the fixture ``true_plans``.
    """
    if "true_plans" not in request.fixturenames:
        monkeypatch.setattr(plan, "_slowness", lambda *_: lambda tokens: 0.0)


@pytest.fixture
def true_plans() -> None:
    """Plans as users get them, with the dense matrix beside the factors of small weights."""
