"""The Triton kernels of masks and proximal steps, compiled for GPUs that need not be there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
triton_cuda = pytest.importorskip("gblr_plugin.kernels.cuda.triton_product")
triton_masks = pytest.importorskip("gblr_plugin.kernels.cuda.triton_masks")
triton_proximal = pytest.importorskip("gblr_plugin.kernels.cuda.triton_proximal")
JITFunction = triton.runtime.jit.JITFunction
DTYPES = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks(gpu: Any, dtype: torch.dtype) -> None:
    kind = torch.promote_types(dtype, torch.float32)
    for n in (48, 100, 256, 300, 3000):  # one of each number of entries that a program takes
        tables, edges = torch.zeros(2, 3 * n, dtype=kind), torch.zeros(5, dtype=torch.int64)
        factor = torch.zeros(5, n, dtype=dtype)
        triton_masks.window_differences(tables, edges, edges, factor)
        triton_masks.masked_gradients(tables, edges, edges, factor, torch.zeros(n, 5, dtype=dtype).t())
        if dtype == kind:
            triton_masks.window_differences(tables, edges, edges, None)
            triton_masks.edge_sums(tables, edges, edges, factor)
    blocks = {launch.constants["BLOCK"] for launch in gpu.launches}
    assert blocks == {triton_masks._block(n)[0] for n in range(1, 3000)}
    assert not gpu.faults()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prox_and_clip(gpu: Any, dtype: torch.dtype) -> None:
    widths, locations = ([torch.zeros(2, k, dtype=dtype) for k in (3, 700)] for _ in range(2))
    triton_proximal.prox_and_clip(widths, locations, torch.zeros(2, dtype=torch.float64))
    assert len(gpu.launches) == 1
    assert not gpu.faults()


@pytest.mark.parametrize("gpu", ["sm_90"], indirect=True)
@pytest.mark.parametrize("timed", [True, False], ids=["tiles timed", "tiles not timed"])
def test_launches_are_made_while_the_device_of_their_tensors_is_current(
    gpu: Any, timed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    current: list[torch.device] = []
    launched: list[str] = []
    compile_only = JITFunction.run

    @contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        current.append(tensor.device)
        yield
        current.pop()

    def on_device(self: Any, *args: Any, **named: Any) -> Any:
        assert current == [args[0].device], self.fn.__name__
        launched.append(self.fn.__name__)
        return compile_only(self, *args, **named)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(JITFunction, "run", on_device)
    monkeypatch.setattr(triton_cuda, "_may_time", lambda: timed)
    gpu.multiply(torch.bfloat16, 16, 7)
    tables, edges, factor = torch.zeros(2, 30), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 10)
    triton_masks.window_differences(tables, edges, edges, factor)
    triton_masks.masked_gradients(tables, edges, edges, factor, factor)
    triton_proximal.prox_and_clip([factor], [factor], torch.zeros(1))
    assert set(launched) == {"_stage_one", "_stage_two", "_differences", "_reduce", "_prox_and_clip"}
