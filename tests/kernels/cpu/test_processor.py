"""Kernels fit the processor that numba compiles for, whichever it is."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")
import llvmlite.binding as llvm

from gblr_plugin.kernels.cpu.processor import Abilities, abilities_of

ROOT = Path(__file__).resolve().parents[3]
NONE, WIDE, ALL = Abilities(False, False), Abilities(True, False), Abilities(True, True)
LINUX = "x86_64-unknown-linux-gnu"


@pytest.mark.parametrize(
    ("triple", "name", "features", "expected"),
    [
        (LINUX, "x86-64", "", NONE),
        (LINUX, "x86-64-v3", "", NONE),
        (LINUX, "x86-64-v4", "", WIDE),
        (LINUX, "skylake-avx512", "", WIDE),
        (LINUX, "sierraforest", "", NONE),  # rounds to bfloat16 in registers of 256 bits
        (LINUX, "znver4", "", ALL),
        (LINUX, "sapphirerapids", "", ALL),
        (LINUX, "znver4", "-avx512bf16", WIDE),
        (LINUX, "znver4", "-avx512f", NONE),
        (LINUX, "x86-64", "+avx512bf16,+avx512vl", ALL),
        ("x86_64-pc-windows-msvc", "znver4", "", ALL),
        ("aarch64-unknown-linux-gnu", "neoverse-v1", "", NONE),
        ("arm64-apple-darwin", "apple-m1", "", NONE),
    ],
)
def test_what_processors_can_do(triple: str, name: str, features: str, expected: Abilities) -> None:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    assert abilities_of(triple, name, features) == expected


def child(*arguments: str, **variables: str) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("NUMBA_")} | variables
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


ASKED = """
import torch
from gblr_plugin.kernels.compiled import available
from gblr_plugin.kernels.cpu.numba_stages import TILES
print(TILES, available(torch.device("cpu"), torch.bfloat16))
"""


@pytest.mark.parametrize("variables", [{"NUMBA_CPU_NAME": "generic"}, {"NUMBA_ENABLE_AVX": "0"}], ids=str)
def test_the_kernels_are_those_of_the_processor_that_numba_is_told(variables: dict[str, str]) -> None:
    assert child("-c", ASKED, **variables).split() == ["1", "False"]


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="numba compiles for its own platform alone")
@pytest.mark.parametrize(
    ("name", "expected"), [("znver4", ["2", "True"]), ("x86-64-v4", ["2", "False"]), ("x86-64-v3", ["1", "False"])]
)
def test_names_stand_for_features(name: str, expected: list[str]) -> None:
    assert child("-c", ASKED, NUMBA_CPU_NAME=name, NUMBA_CPU_FEATURES="").split() == expected


def test_every_tile_compiles_for_every_kind_of_processor() -> None:
    shown = child(str(Path(__file__).with_name("emitted.py"))).split()
    assert len(shown) == 11
    assert {"x86-64", "x86-64-v3", "x86-64-v4", "znver4", "generic", "apple-m1"} <= set(shown)
