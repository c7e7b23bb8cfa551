"""What all tests share."""

from __future__ import annotations

import pytest

from gblr_plugin.kernels import plan


@pytest.fixture(autouse=True)
def structure_at_work(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No matrix beside the factors: the small weights of tests go through structured products.

    Tests of that matrix ask for the fixture ``small_matrices``.
    """
    if "small_matrices" not in request.fixturenames:
        monkeypatch.setattr(plan, "MATRIX", 0)


@pytest.fixture
def small_matrices() -> None:
    """Plans as users get them, with the dense matrix beside the factors of small weights."""
