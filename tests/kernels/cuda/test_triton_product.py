"""The triton kernels in triton's interpreter on any machine, against float64 and the torch operations.

The interpreter multiplies bfloat16 as integers, so that products in that dtype are left to CUDA
(integration/benchmarks/gpu.py).
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def interpreted(*arguments: str) -> str:
    # A process of its own: triton reads TRITON_INTERPRET when it is imported.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_interpreted_kernels_agree() -> None:
    shown = interpreted(str(Path(__file__).with_name("interpreted.py")))
    assert shown.split() == ["products", "tuning", "masks", "layers", "proximal"]


def test_benchmark_runs_without_a_device(tmp_path: Path) -> None:
    script = ROOT / "integration" / "benchmarks" / "gpu.py"
    shown = interpreted(str(script), "--tiny", "--json", str(tmp_path / "figures.json"))
    assert "values and gradients agree" in shown
    assert (tmp_path / "figures.json").stat().st_size > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_natively_on_cuda() -> None:
    script = ROOT / "integration" / "benchmarks" / "gpu.py"
    subprocess.run([sys.executable, str(script), "--tiny"], check=True, timeout=600)
