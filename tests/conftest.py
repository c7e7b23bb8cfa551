"""What all tests share. Weights get the plans that users get, but where a test asks for others by a fixture below."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gblr_plugin.kernels import plan

os.environ["GBLR_FIT_COSTS"] = (
    "0"  # plans follow from the recorded costs, here and in child processes: as on any machine
)
if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    # Programs that torch keeps are compiled for other vectors than those they were written for where this differs.
    own = Path(tempfile.gettempdir(), f"torchinductor-{capability}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(own))

# Files of few and long tests: begun first, so that two processes end together.
LONGEST = (
    "serialization/test_processors",
    "run/test_search_service",
    "trust/test_kills",
    "kernels/cuda/",
    "huggingface/test_compress_folder",
    "exporting/test_program",
    "docs/test_commands",
    "tensor/test_",
    "trust/",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; the others stay in their order."""

    def place(item: pytest.Item) -> int:
        path = item.path.as_posix()
        return next((index for index, start in enumerate(LONGEST) if f"/tests/{start}" in path), len(LONGEST))

    items.sort(key=place)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The tests' products are too small to share among threads; a test that needs several sets their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def structured_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """No dense products in plans by the cost model: the small weights of tests go through structured kernels."""
    monkeypatch.setattr(plan, "_slowness", lambda *_: lambda tokens: 0.0)


@pytest.fixture(params=["as users get them", "structured"])
def plans(request: pytest.FixtureRequest) -> None:
    """Once with plans as users get them, small weights by the dense matrix beside their factors, and once without."""
    if request.param == "structured":
        request.getfixturevalue("structured_plans")
