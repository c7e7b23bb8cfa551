"""The tests that depend on the processor, with features of it taken away: AVX512-BF16, AVX-512, AVX2.

``python integration/processors.py [options of pytest]``. Each set of features is a run of pytest with the variables by
which numba and torch leave instructions out. Sets that need more than this machine has are left out, with a line that
says so.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

__all__ = ["SETS", "FeatureSet"]

ROOT = Path(__file__).resolve().parents[1]
TESTS = ["tests/kernels", "tests/tensor", "tests/surgery/test_conversion.py", "tests/serialization", "tests/exporting"]
# These make processes for other processors or the GPU, whatever the processor here is.
SAME_EVERYWHERE = ["tests/kernels/cpu/test_compile_cache.py", "tests/kernels/cpu/test_processor.py"]
SAME_EVERYWHERE += ["tests/kernels/cuda", "tests/serialization/test_processors.py"]


class FeatureSet(NamedTuple):
    """Features of x86-64 that are left.

    Args:
        name: For people.
        processor: As LLVM names it.
        torch: As ``ATEN_CPU_CAPABILITY`` names it.
        needs: What the machine must have, as torch names it.
    """

    name: str
    processor: str
    torch: str
    needs: tuple[str, ...]

    @property
    def variables(self) -> dict[str, str]:
        """Of the environment, for numba and torch."""
        return {
            "NUMBA_CPU_NAME": self.processor,
            "NUMBA_CPU_FEATURES": "",
            "ATEN_CPU_CAPABILITY": self.torch,
        }

    @property
    def missing(self) -> list[str]:
        """What this machine has not."""
        here = torch.cpu.get_capabilities()  # of the machine, whatever the environment says
        wanted = [name for name in self.needs if not here.get(name)]
        return wanted if here.get("architecture") == "x86_64" else ["x86-64"]


AVX2 = ("avx2", "bmi", "bmi2", "f16c", "fma3", "lzcnt")
AVX512 = (*AVX2, "avx512_f", "avx512_bw", "avx512_cd", "avx512_dq", "avx512_vl")
SETS = [
    FeatureSet("AVX-512 without bfloat16", "x86-64-v4", "avx512", AVX512),
    FeatureSet("AVX2", "x86-64-v3", "avx2", AVX2),
    FeatureSet("none of them", "x86-64", "default", ()),
]


def main(options: list[str]) -> int:
    """Run the tests with each set; 1 if any failed."""
    failed = []
    for chosen in SETS:
        if chosen.missing:
            print(f"processors: {chosen.name}: left out, this machine has no {', '.join(chosen.missing)}", flush=True)
            continue
        print(f"processors: {chosen.name}: {' '.join(f'{k}={v}' for k, v in chosen.variables.items())}", flush=True)
        command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", *TESTS]
        command += [part for path in SAME_EVERYWHERE for part in ("--ignore", path)]
        with tempfile.TemporaryDirectory() as folder:  # what torch.compile makes with one set is not for another
            variables = {**os.environ, **chosen.variables, "TORCHINDUCTOR_CACHE_DIR": folder}
            if subprocess.run([*command, *options], env=variables, cwd=ROOT, check=False).returncode:
                failed.append(chosen.name)
    print(f"processors: failed with {', '.join(failed)}" if failed else "processors: all passed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
