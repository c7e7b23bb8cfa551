"""What all tests share."""

from __future__ import annotations

import pytest

from gblr_plugin.kernels import plan


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
