"""Compiled kernels are kept on disk, and nothing goes wrong where they cannot be."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")

KERNELS = Path(__file__).resolve().parents[3] / "gblr_plugin" / "kernels" / "cpu"
PROGRAM = """
import sys, types, numba
for name in ("small", "small.kernels"):  # without the package's torch, which takes seconds to import
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [sys.argv[1]]
from small.kernels.compile_cache import compiled

def made(factor):
    @compiled(f"by_{factor}")
    def inner(x):
        return x * factor
    @compiled(f"by_{factor}", keep=True)
    def times(x):
        total = 0
        for i in range(x):  # too long to be inlined
            total += inner(i) if i % 3 else inner(i + 1)
        return total
    return times
for factor in map(int, sys.argv[2:]):
    times = made(factor)
    print(times(7), sum(times.stats.cache_hits.values()))
"""


def run(folder: Path, cache: Path, *factors: int) -> list[str]:
    """Result and number of times that its code was found, per factor."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("NUMBA")}
    environment |= {
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(folder / "home"),
        "XDG_CACHE_HOME": str(folder / "home"),
    }
    environment["NUMBA_CACHE_DIR"] = str(cache)
    script = folder / "program.py"
    script.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, str(script), str(folder), *map(str, factors)],
        env=environment, cwd=folder, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    return done.stdout.split()


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    for path in KERNELS.glob("*.py"):
        shutil.copy(path, tmp_path)
    return tmp_path


def test_code_is_found_again_until_a_source_changes(copied: Path) -> None:
    cache = copied / "cache"
    assert run(copied, cache, 2) == ["48", "0"]
    assert run(copied, cache, 2) == ["48", "1"]
    for path in cache.rglob("*.nb*"):
        path.write_bytes(b"damaged")
    assert run(copied, cache, 2) == ["48", "0"]
    for name in ("simd.py", "compile_cache.py"):  # tiles, and how functions are compiled
        with (copied / name).open("a") as file:
            file.write("# changed\n")
        assert run(copied, cache, 2) == ["48", "0"]


def test_code_of_several_processes_keeps_apart(copied: Path) -> None:
    cache = copied / "cache"
    assert run(copied, cache, 2) + run(copied, cache, 3) == ["48", "0", "72", "0"]
    assert run(copied, cache, 2, 3) == ["48", "1", "72", "1"]


def test_without_a_writable_place_or_sources_it_compiles(copied: Path) -> None:
    (copied / "full").write_text("not a folder")
    assert run(copied, copied / "full", 2) == ["48", "0"]
    (copied / "simd.py").unlink()
    cache = copied / "cache"
    assert run(copied, cache, 2) == run(copied, cache, 2) == ["48", "0"]
