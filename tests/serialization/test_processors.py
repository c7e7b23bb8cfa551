"""A file written with one set of a processor's features is read with every other, and without numba."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import torch

from gblr_plugin.matrix.structure import Intervals, StructuredMatrix
from gblr_plugin.tensor.gblr_tensor import GBLRTensor

ROOT = Path(__file__).resolve().parents[2]
TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2, "int8": 1e-5}
PROGRAM = """
import sys
from pathlib import Path

doing, folder, without_numba = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "1"
if without_numba:
    sys.modules["numba"] = sys.modules["llvmlite"] = None
import torch
from torch import nn
import gblr_plugin as gblr
from gblr_plugin.kernels.plan import Plan
from gblr_plugin.tensor.gblr_tensor import GBLRTensor
from gblr_plugin.matrix.structure import Intervals, StructuredMatrix
torch.serialization.add_safe_globals([StructuredMatrix, Intervals])

plans = {"fixed": "fixed", "auto": "auto", "blocks": Plan(16, 16)}
for kind, (matrix, x, expected, tolerance) in torch.load(folder.parent / "cases.pt", weights_only=True).items():
    for name, plan in plans.items():
        network = nn.Linear(x.shape[1], expected.shape[1], bias=False)
        if doing == "write":
            weight = GBLRTensor.from_structured(matrix, plan=plan, factor_dtype="int8" if kind == "int8" else None)
            network.weight = nn.Parameter(weight, requires_grad=False)
            gblr.save(network, folder / f"{kind}_{name}.safetensors")
            continue
        for other in sorted(path for path in folder.parent.iterdir() if path.is_dir()):
            loaded = gblr.load(other / f"{kind}_{name}.safetensors", network)
            with torch.no_grad():
                for tokens in (1, 5, 40):
                    y = loaded(x[:tokens])
                    error = float((y - expected[:tokens]).norm() / expected[:tokens].norm())
                    assert error <= tolerance, (kind, name, other.name, tokens, error)
            print(kind, name, other.name)
"""


def processors() -> ModuleType:
    """integration/processors.py, which knows the sets."""
    spec = importlib.util.spec_from_file_location("processors", ROOT / "integration" / "processors.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_files_are_read_everywhere(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    m, n, k = 192, 160, 48
    rows, cols = (
        Intervals(torch.randint(1, size // 2, (k,), generator=g), torch.randint(0, size, (k,), generator=g), size)
        for size in (m, n)
    )
    matrix = StructuredMatrix.from_factors(
        torch.randn(k, m, generator=g), torch.randn(k, n, generator=g), rows, cols
    ).live()
    cases = {}
    for kind, tolerance in TOLERANCES.items():
        given = matrix.to(torch.bfloat16) if kind == "bfloat16" else matrix
        x = torch.randn(40, n, generator=g).to(given.u.dtype)
        dense = given.to(torch.float64)
        if kind == "int8":
            dense = GBLRTensor.from_structured(matrix, factor_dtype="int8").to_structured().to(torch.float64)
        cases[kind] = (given, x, x.double() @ dense.to_dense().t(), tolerance)
    torch.save(cases, tmp_path / "cases.pt")

    machines = {"as it is": ({}, "0"), "without numba": ({}, "1")}
    machines |= {one.name: (one.variables, "0") for one in processors().SETS if not one.missing}

    for doing in ("write", "read"):
        for name, (variables, without_numba) in machines.items():
            (tmp_path / name).mkdir(exist_ok=True)
            environment = {**os.environ, **variables}
            environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
            command = [sys.executable, "-c", PROGRAM, doing, str(tmp_path / name), without_numba]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
            assert done.returncode == 0, (doing, name, done.stderr[-2000:])
            assert len(done.stdout.splitlines()) == (0 if doing == "write" else 9 * len(machines))
