"""Joint least squares on supports against dense solves."""

from __future__ import annotations

import pytest
import torch

from gblr_plugin.decomposition import joint
from gblr_plugin.decomposition.joint import conjugate_gradient, supported_solve
from gblr_plugin.kernels.optional import solve_kernel


@pytest.fixture
def setting() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    factors = torch.randn(9, 30, dtype=torch.float64, generator=g)
    target = torch.randn(17, 30, dtype=torch.float64, generator=g)
    support = torch.rand(9, 17, generator=g) < 0.4
    support[:, 3] = False
    return factors, target, support


@pytest.mark.parametrize("chunk", [1, 64, 1 << 22, None])
def test_supported_solve_is_least_squares(
    setting: tuple[torch.Tensor, ...], chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunk is None:
        kernels = pytest.importorskip("gblr_plugin.kernels.cpu.numba_solve")
        monkeypatch.setattr(joint, "solve_kernel", lambda gram, size: kernels.solve)
    else:
        monkeypatch.setattr(joint, "CHUNK_ENTRIES", chunk)
    factors, target, support = setting
    x, gains = supported_solve(factors @ factors.T, factors @ target.T, support, want_gains=True)
    plain, none = supported_solve(factors @ factors.T, factors @ target.T, support)
    assert none is None
    assert gains is not None
    torch.testing.assert_close(x, plain)
    assert float(x[~support].abs().max()) == 0.0
    for i in range(target.shape[0]):
        chosen = support[:, i]
        if not bool(chosen.any()):
            continue
        expected = torch.linalg.lstsq(factors[chosen].T, target[i, :, None]).solution[:, 0]
        torch.testing.assert_close(x[chosen, i], expected, atol=1e-7, rtol=1e-7)
        base = (target[i] - expected @ factors[chosen]).square().sum()
        k = int(chosen.nonzero()[0, 0])
        without = chosen.clone()
        without[k] = False
        rest = target[i].clone()
        if bool(without.any()):
            rest -= torch.linalg.lstsq(factors[without].T, target[i, :, None]).solution[:, 0] @ factors[without]
        assert float(gains[k, i]) == pytest.approx(float(rest.square().sum() - base), rel=1e-6)


def test_parallel_and_empty_components_are_solved() -> None:
    factors = torch.ones(3, 4)
    factors[2] = 0
    x, _ = supported_solve(factors @ factors.T, factors @ torch.ones(4, 2), torch.ones(3, 2, dtype=torch.bool))
    torch.testing.assert_close(x.T @ factors, torch.ones(2, 4), atol=1e-4, rtol=1e-4)
    nothing, _ = supported_solve(torch.zeros(0, 0), torch.zeros(0, 5), torch.zeros(0, 5, dtype=torch.bool))
    assert nothing.shape == (0, 5)


def test_conjugate_gradient_solves_the_masked_normal_equations() -> None:
    g = torch.Generator().manual_seed(1)
    factors = torch.randn(5, 20, dtype=torch.float64, generator=g)
    root = torch.randn(12, 30, dtype=torch.float64, generator=g)
    gram, moment = factors @ factors.T, root @ root.T
    support = torch.rand(5, 12, generator=g) < 0.5
    right = torch.randn(5, 12, dtype=torch.float64, generator=g)
    x = conjugate_gradient(gram, moment, right, support, torch.zeros_like(right), 200)
    assert float(x[~support].abs().max()) == 0.0
    assert float((gram @ x @ moment - right)[support].abs().max()) < 1e-5 * float(right.abs().max())
    full = torch.kron(gram, moment)[support.flatten()][:, support.flatten()]
    torch.testing.assert_close(x[support], torch.linalg.solve(full, right[support]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-12)])
@pytest.mark.parametrize("want_gains", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_compiled_and_batched_solves_agree(
    dtype: torch.dtype, tolerance: float, want_gains: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("numba")
    before = torch.get_num_threads()
    g = torch.Generator().manual_seed(1)
    factors = torch.randn(150, 260, generator=g, dtype=dtype)
    gram, right = factors @ factors.T, torch.randn(150, 600, generator=g, dtype=dtype)
    # Every number of unknowns from none to all, so that rows are left over of each group of four.
    support = torch.rand(150, 600, generator=g) < torch.linspace(-0.02, 1.02, 600)
    taken = solve_kernel(gram, int(support.sum()))
    assert taken is not None
    assert solve_kernel(gram, 10) is None
    torch.set_num_threads(threads)
    try:
        compiled = supported_solve(gram, right, support, want_gains=want_gains)
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(joint, "solve_kernel", lambda gram, size: None)
    batched = supported_solve(gram, right, support, want_gains=want_gains)
    assert (compiled[1] is None) == (not want_gains)
    for a, b in zip(compiled, batched, strict=True):
        if a is not None and b is not None:
            assert not a[~support].any()
            assert float((a - b).norm() / b.norm()) < tolerance


@pytest.mark.parametrize("tile", [1, 16])
@pytest.mark.parametrize("ridge", [1e-10, 1e-6, 1e-3])
def test_inverses_kept_along_the_axis_stay_exact(tile: int, ridge: float) -> None:
    """Components come and go 400 times; every index is compared with a dense solve of its own."""
    kernels = pytest.importorskip("gblr_plugin.kernels.cpu.numba_solve")
    g = torch.Generator().manual_seed(2)
    factors = torch.randn(200, 150, generator=g, dtype=torch.float64)
    factors[100:] = factors[:100] + 1e-3 * factors[100:]  # pairs that are nearly parallel
    gram = factors @ factors.T + ridge * 150 * torch.eye(200, dtype=torch.float64)
    right = factors @ torch.randn(150, 320, generator=g, dtype=torch.float64)
    start, width = (torch.randint(20, (2, 200, 1), generator=g) * 16) // tile * tile
    support = (torch.arange(320) - start) % 320 < width + 8 // tile
    support[:, 100:110] = False
    found, none = kernels.solve(gram, right, support, False)
    assert none is None
    quick, gains = kernels.solve(gram, right, support, True)
    for j in range(0, 320, 7):
        on = support[:, j]
        inverse = torch.linalg.inv(gram[on][:, on])
        expected = torch.linalg.solve(gram[on][:, on], right[on, j])
        # What an error in the unknowns adds to the squared error.
        for x, tolerance in ((found, 1e-15), (quick, 1e-5)):
            wrong = x[on, j] - expected
            assert float(wrong @ gram[on][:, on] @ wrong) <= tolerance * float(expected @ right[on, j])
        if ridge > 1e-10:  # else the matrix may be singular to rounding, and what is dropped costs nothing
            torch.testing.assert_close(gains[on, j], expected.square() / inverse.diagonal(), rtol=1e-3, atol=1e-5)
    assert not found[~support].any()
    assert not gains[~support].any()


@pytest.mark.parametrize("near", [0.0, 1e-8, 1e-6, 1e-4])
@pytest.mark.parametrize(("components", "length"), [(120, 60), (120, 200)])
def test_components_that_depend_on_each_other_are_fitted_as_by_torch(
    monkeypatch: pytest.MonkeyPatch, near: float, components: int, length: int
) -> None:
    pytest.importorskip("numba")
    generator = torch.Generator().manual_seed(0)
    other = torch.randn(components, length, generator=generator, dtype=torch.float64)
    other[1::2] = other[::2] + near * other[1::2]  # pairs, of which now and then one begins or ends
    target = torch.randn(900, length, generator=generator, dtype=torch.float64)
    start = torch.randint(900, (components,), generator=generator)
    width = torch.randint(20, 900, (components,), generator=generator)
    support = (torch.arange(900) - start[:, None]) % 900 < width[:, None]
    problem = other @ other.T, other @ target.T, support

    def left(solution: torch.Tensor) -> float:
        return float((target - solution.T @ other).norm() / target.norm())

    assert joint.solve_kernel(problem[0], support.numel()) is not None
    compiled, net_gain = joint.supported_solve(*problem, want_gains=True)
    refined, _ = joint.supported_solve(*problem)
    monkeypatch.setattr(joint, "solve_kernel", lambda *_: None)
    by_torch, expected = joint.supported_solve(*problem, want_gains=True)
    assert net_gain is not None
    assert expected is not None
    assert left(compiled) == pytest.approx(left(by_torch), rel=1e-7)
    assert left(refined) == pytest.approx(left(by_torch), rel=1e-7)
    torch.testing.assert_close(net_gain, expected, rtol=0, atol=1e-5 * float(expected.max()))
