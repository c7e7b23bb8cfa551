"""Exported models run where the package cannot be imported: linear layers, convolutions, int8 and dense ones."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import gblr_plugin as gblr
from gblr_plugin.bench.products import random_structure
from gblr_plugin.kernels.plan import Plan

BLOCKED = "import sys, torch; sys.modules['gblr_plugin'] = None; "  # whoever imports it now fails
CHECK = "x, y = torch.load('io.pt'); assert (run(x) - y).norm() < 1e-5 * y.norm()"


def layers_of_all_kinds() -> nn.Module:
    """Two convolutions, a packed projection, an int8 layer, one stored dense, a dense one and one of torchao's."""
    model = nn.Sequential(
        nn.Conv2d(6, 12, 3, padding=1),
        nn.Conv2d(12, 8, 1),
        nn.Flatten(),
        nn.Linear(72, 96),
        nn.Linear(96, 64),
        nn.Linear(64, 32),
        nn.Linear(32, 20),
        nn.Linear(20, 16),
    )
    for number, splits, flops, factor_dtype in (
        (0, 1, 0.6, None),
        (1, 1, 0.6, None),
        (3, 3, 0.4, None),
        (4, 1, 0.4, "int8"),
        (5, 1, 1.5, None),
    ):
        layer = model[number]
        shape = tuple(layer.weight.shape)
        matrix = random_structure(shape[0], layer.weight[0].numel(), flops, row_splits=splits, seed=number)
        weight = gblr.GBLRTensor.from_structured(matrix, shape=shape, factor_dtype=factor_dtype)
        assert weight.packing.dense == (flops > 1)
        layer.weight = nn.Parameter(weight, requires_grad=False)
    quantize_(model[6], Int8WeightOnlyConfig())
    return model.eval()


def run_blocked(code: str, folder: Path) -> None:
    subprocess.run([sys.executable, "-c", BLOCKED + code + CHECK], cwd=folder, check=True, timeout=120)


@pytest.mark.usefixtures("plans")
def test_a_program_runs_without_the_package(tmp_path: Path) -> None:
    model, x = layers_of_all_kinds(), torch.randn(9, 6, 3, 3)
    names = list(model.state_dict())
    batch = torch.export.Dim("batch", min=2, max=4096)
    program = gblr.export(model, (x,), dynamic_shapes=({0: batch},))
    assert list(model.state_dict()) == names
    assert isinstance(model[0].weight, gblr.GBLRTensor)
    y = model(x[:5])
    assert (program.module()(x[:5]) - y).norm() < 1e-5 * y.norm()
    assert not any("gblr" in str(node.target) for node in program.graph.nodes if node.op == "call_function")
    torch.export.save(program, tmp_path / "model.pt2")
    torch.save((x[:3], model(x[:3]).detach()), tmp_path / "io.pt")
    run_blocked("run = torch.export.load('model.pt2').module(); ", tmp_path)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler to build the package with")
def test_a_compiled_package_runs_without_the_package(tmp_path: Path) -> None:
    x = torch.randn(9, 4, 3, 3)
    model = nn.Sequential(nn.Conv2d(4, 12, 1), nn.Flatten(), nn.Linear(108, 20)).eval()
    for layer in (model[0], model[2]):
        matrix = random_structure(layer.weight.shape[0], layer.weight[0].numel(), 0.4)
        weight = gblr.GBLRTensor.from_structured(matrix, shape=tuple(layer.weight.shape), plan=Plan(16, 64))
        layer.weight = nn.Parameter(weight, requires_grad=False)
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(
            gblr.export(model, (x,)),
            package_path=str(tmp_path / "model.pt2"),
            inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},  # the C++ compiler's time is the test's
        )
        torch.save((x, model(x)), tmp_path / "io.pt")
    run_blocked("run = torch._inductor.aoti_load_package('model.pt2'); ", tmp_path)
