"""How often blocks of random place are found again at exactly what they cost.

K blocks of rank 1, each 3% to 40% of an axis long, with Gaussian factors; four matrices each, in float32 and float64.
Columns: matrices found, the largest of their relative errors, median seconds of one thread. Run on its own:
`python integration/benchmarks/planted.py`.
"""

from __future__ import annotations

import statistics
import time

import torch

import gblr_plugin as gblr
from gblr_plugin.matrix.structure import Intervals, StructuredMatrix

CASES = (
    (64, 8, 1),
    (64, 16, 1),
    (128, 16, 1),
    (128, 24, 1),
    (192, 32, 1),
    (384, 48, 1),
    (384, 96, 1),
    (768, 96, 1),
    (128, 16, 8),
    (384, 32, 16),
    (768, 64, 32),
)
"""Size, blocks and tile."""
SEEDS = 4


def blocks(size: int, count: int, tile: int, seed: int) -> StructuredMatrix:
    """Blocks of random place, 3% to 40% of an axis long, on multiples of the tile."""
    g = torch.Generator().manual_seed(seed)

    def intervals() -> Intervals:
        cells = size // tile
        width = (cells * (0.03 + 0.37 * torch.rand(count, generator=g))).long().clamp(min=1)
        return Intervals(width * tile, torch.randint(cells, (count,), generator=g) * tile, size)

    u, v = (torch.randn(count, size, dtype=torch.float64, generator=g) for _ in range(2))
    return StructuredMatrix.from_factors(u, v, intervals(), intervals())


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print("| size | K | tile | dtype | found | largest error | seconds |\n|---|---|---|---|---|---|---|")
    for size, count, tile in CASES:
        for dtype in (torch.float64, torch.float32):
            errors, seconds = [], []
            for seed in range(SEEDS):
                planted = blocks(size, count, tile, seed)
                weight = planted.to_dense().to(dtype)
                cost = int(planted.component_multiply_adds.sum())
                begun = time.perf_counter()
                found = gblr.decompose(weight, cost / size**2, align=tile)
                seconds.append(time.perf_counter() - begun)
                error = torch.linalg.matrix_norm(found.to_dense().double() - weight.double())
                error = float(error / torch.linalg.matrix_norm(weight.double()))
                if error < 1e-5 and found.stored <= cost:
                    errors.append(error)
            print(
                f"| {size} | {count} | {tile} | {str(dtype)[6:]} | {len(errors)} of {SEEDS} |"
                f" {max(errors, default=float('nan')):.0e} | {statistics.median(seconds):.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
