"""Both ways to singular triplets agree with the definition."""

from __future__ import annotations

import pytest
import torch

from gblr_plugin.decomposition import triplets
from gblr_plugin.decomposition.triplets import singular_triplets


@pytest.mark.parametrize("gram_from", [1, 1000])
@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_triplets(gram_from: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triplets, "GRAM_FROM", gram_from)
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    left, values, right = singular_triplets(matrix)
    torch.testing.assert_close((left * values) @ right, matrix)
    torch.testing.assert_close(left.T @ left, torch.eye(20, dtype=torch.float64))
    torch.testing.assert_close(right @ right.T, torch.eye(20, dtype=torch.float64))
    torch.testing.assert_close(values, torch.linalg.svdvals(matrix))
