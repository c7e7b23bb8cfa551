r"""The published starting point (Lee & Kim, ICLR 2024, appendix): intervals from correlations, then gradient steps.

Rows that belong together correlate in W W^T and columns in W^T W. A row of either matrix, smoothed along the axis and
thresholded, shows runs; the longest becomes a component's interval. Adam then lowers ||W - W_hat||_F^2 over factors,
widths and locations through Gaudi masks, the widths being projected on the budget after each step. Ours is the end:
intervals are made exact and the row factors fitted to them. `decompose.py
--methods interval gblr` compares it with the package's methods, which are nearer to the weight and many times faster.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gblr_plugin.decomposition.joint import supported_solve
from gblr_plugin.decomposition.problem import Problem
from gblr_plugin.decomposition.spans import longest_run
from gblr_plugin.layers.masks import gaudi_mask
from gblr_plugin.matrix.gaudi_mask import integer_locations, integer_widths
from gblr_plugin.matrix.metric import Metric
from gblr_plugin.matrix.structure import Intervals, StructuredMatrix, multiply_adds
from gblr_plugin.matrix.svd import singular_triplets
from gblr_plugin.matrix.tiles import TiledAxis


def _smooth_rows(gram: Tensor, anchors: Tensor) -> Tensor:
    """Magnitudes of the anchored rows of a Gram matrix, (K, N), averaged over a cyclic window, at most 1."""
    rows = gram[anchors].abs()
    window = max(1, gram.shape[1] // 32) | 1
    padded = F.pad(rows[:, None], (window // 2, window // 2), mode="circular")
    rows = F.avg_pool1d(padded, window, 1)[:, 0]
    return rows / rows.amax(1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)


def _cost(widths: Tensor, problem: Problem) -> int:
    """Multiply-adds of (2, K) fractions, counted as the masks round them."""
    grids = problem.rows, problem.cols
    rows, cols = (integer_widths(part, grid.length, grid.tile) for part, grid in zip(widths, grids, strict=True))
    return int(multiply_adds(rows, cols).sum())


def _project_widths(widths: Tensor, problem: Problem) -> None:
    """Lower all widths, (2, K) fractions in [0, 1], by the least common amount that meets the budget, in place."""
    if _cost(widths, problem) <= problem.max_multiply_adds:
        return
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        over = _cost((widths - middle).clamp(min=0), problem) > problem.max_multiply_adds
        low, high = (middle, high) if over else (low, middle)
    widths.sub_(high).clamp_(min=0)


@torch.enable_grad()
def interval(problem: Problem, steps: int = 1000, lr: float = 5e-3) -> StructuredMatrix:
    """Intervals by smoothing and thresholding, then Adam with projection on the budget.

    Args:
        problem: The matrix, its budget and grids; the metric of the problem weighs the error.
        steps: Adam steps on factors, widths and locations.
        lr: Learning rate relative to the size of the factors; widths and locations use a tenth of it.
    """
    weight = problem.weight
    m, n = weight.shape
    count = problem.max_components
    lengths = torch.tensor([[m], [n]], dtype=torch.float64, device=weight.device)
    left, values, right = singular_triplets(weight)
    left, values, right = left[:, :count], values[:count], right[:count]
    scale = values.sqrt()
    repeats = -(-count // len(values))
    anchors = [part.abs().argmax(1).repeat(repeats)[:count] for part in (left.T, right)]
    smooth = [_smooth_rows(gram, at) for gram, at in zip((weight @ weight.T, weight.T @ weight), anchors, strict=True)]
    low, high = 0.0, 1.0
    for _ in range(20):  # the threshold at which the runs cost what is allowed
        middle = (low + high) / 2
        runs = [longest_run(part >= middle) for part in smooth]
        spent = _cost(torch.stack([run[0] for run in runs]) / lengths, problem)
        low, high = (middle, high) if spent > problem.max_multiply_adds else (low, middle)
    runs = [longest_run(part >= high) for part in smooth]

    u = (left * scale).T.repeat(repeats, 1)[:count].float().requires_grad_()
    v = (right * scale[:, None]).repeat(repeats, 1)[:count].float().requires_grad_()
    widths = (torch.stack([run[0] for run in runs]) / lengths).float().requires_grad_()
    locations = (torch.stack([run[1] for run in runs]) / lengths).float().requires_grad_()
    size = float(scale.mean()) / max(m, n) ** 0.5
    optimizer = torch.optim.Adam(
        [{"params": [u, v], "lr": lr * max(size, 1e-12) * 10}, {"params": [widths, locations], "lr": lr / 10}]
    )
    target = problem.metric.whiten(weight).float()
    root = None if problem.metric.root is None else problem.metric.root.float()
    for step in range(steps):
        sigma = 1.0 + 99.0 * step / max(steps - 1, 1)
        masked_u = u * gaudi_mask(widths[0], locations[0], m, sigma, align=problem.rows.tile)
        masked_v = v * gaudi_mask(widths[1], locations[1], n, sigma, align=problem.cols.tile)
        loss = (target - masked_u.T @ (masked_v if root is None else masked_v @ root)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            widths.clamp_(0, 1)
            _project_widths(widths, problem)
            locations.sub_(locations.floor())
    return _frozen(u.detach().double(), v.detach().double(), widths.detach(), locations.detach(), problem)


def _frozen(u: Tensor, v: Tensor, widths: Tensor, locations: Tensor, problem: Problem) -> StructuredMatrix:
    """Whole intervals within the budget, and the best row factors for them.

    Masks were smooth, and components may have to go for the budget's sake; what is left would no longer add up to the
    weight, and could be further from it than zero is.
    """
    m, n = problem.weight.shape
    tiles = problem.rows.tile, problem.cols.tile
    rows, cols = (
        Intervals(
            integer_widths(widths[axis], size, tiles[axis]), integer_locations(locations[axis], size, tiles[axis]), size
        )
        for axis, size in enumerate((m, n))
    )
    cost = multiply_adds(rows.width, cols.width)
    energy = (u * rows.support()).square().sum(1) * (v * cols.support()).square().sum(1)
    order = torch.argsort(energy / cost.clamp(min=1), descending=True, stable=True)
    kept = order[(cost[order].cumsum(0) <= problem.max_multiply_adds) & (cost[order] > 0)].sort().values
    rows, cols, v = rows.select(kept), cols.select(kept), v[kept] * cols.support()[kept]
    whitened = problem.metric.whiten(v)
    u, _ = supported_solve(whitened @ whitened.T, whitened @ problem.metric.whiten(problem.weight).T, rows.support())
    return StructuredMatrix.from_factors(u, v, rows, cols).live()


def published(
    weight: Tensor, budget: float, *, align: int = 1, max_components: int | None = None, steps: int = 1000
) -> StructuredMatrix:
    """The published initialiser with the arguments of :func:`gblr_plugin.decompose`, in the dtype of the weight."""
    m, n = weight.shape
    count = min(m, n) if max_components is None else max_components
    axes = TiledAxis(m, align), TiledAxis(n, align)
    return interval(Problem(weight.double(), int(budget * m * n), *axes, count, Metric(), 0), steps).to(weight.dtype)
