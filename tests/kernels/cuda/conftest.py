"""The fixture ``gpu``: every Triton kernel is compiled for GPUs that need not be there.

Launches go their usual way, with the tuning of tiles, as far as the launch itself. A driver that names a GPU lets
triton compile for it, specialising on the arguments as at run time, and nothing is run: tiles, constants and dtypes are
those that the code chooses.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from gblr_plugin.kernels import compiled
from gblr_plugin.kernels.packing import pack
from gblr_plugin.kernels.plan import BLOCKS as ALL_BLOCKS
from gblr_plugin.matrix.structure import Intervals, StructuredMatrix

# Backend, kind, architecture and threads of a warp; bytes of shared memory that one program may have.
GPUS = {
    "sm_80": ("nvidia", ("cuda", 80, 32), 163 << 10),
    "sm_90": ("nvidia", ("cuda", 90, 32), 227 << 10),
    "gfx942": ("amd", ("hip", "gfx942", 64), 64 << 10),
}
BLOCKS = [block for block in ALL_BLOCKS if block <= compiled.WIDEST]
# Bytes a thread that ptxas spills far from the limit of registers, so that more threads run at a time; versions differ.
TRADED = 64
# For each block, numbers of tokens of the three ranges that have different tiles: one, multiples of 16, and others.
TOKENS = dict(zip(BLOCKS, [(1, 33, 1024), (16, 100, 129), (7, 48, 999), (3, 128, 513)], strict=True))


class Launch(NamedTuple):
    """A kernel as it was compiled, and its constants."""

    kernel: Any
    name: str
    constants: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.name} {self.constants}"


class Gpu:
    """A driver of triton for a GPU that is not there, and the launches that it was asked for."""

    tokens = TOKENS

    def __init__(self, name: str, folder: Path) -> None:
        from triton.backends.compiler import GPUTarget

        self.name, self.folder = name, folder
        self.backend, target, self.memory = GPUS[name]
        self.target = GPUTarget(*target)
        self.utils = SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": self.memory})
        self.launches: list[Launch] = []

    def get_current_device(self) -> str:
        """What triton keeps compiled kernels by."""
        return self.name

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target

    def multiply(self, dtype: torch.dtype, block: int, tokens: int, ragged: bool = False) -> None:
        """Launch a product; blocks end within a multiple of 16 if ``ragged``."""
        m, n = 3 * block - ragged, 2 * block - ragged
        layout, factors, lists = pack(matrix(m, n, 80 - ragged).to(dtype), block, block)
        bias = torch.zeros(m, dtype=dtype) if tokens % 2 else None
        compiled.linear(torch.zeros(tokens, n, dtype=dtype), factors, lists, layout, bias, opaque=True)

    def faults(self) -> list[str]:
        """What is wrong with the kernels that were launched."""
        found = {}
        for launch in self.launches:
            metadata, what = launch.kernel.metadata, []
            if metadata.shared > self.memory:
                what.append(f"{metadata.shared} bytes of shared memory, there are {self.memory}")
            lost = spilled(launch.kernel.asm, self.folder)
            if lost > TRADED:
                what.append(f"{lost} spilled")
            # Copies take 4 bytes at least, and the loop of a product is what should overlap with them.
            copied = "TOKENS" in launch.constants and (launch.constants["EVEN"] or "32" in launch.constants["dtype"])
            ptx, stages = launch.kernel.asm.get("ptx"), launch.kernel.metadata.num_stages
            if ptx and copied and stages > 1 and not prefetches(ptx, stages):
                what.append("nothing is prefetched")
            if what:
                found[str(launch)] = f"{launch}: {', '.join(what)}"
        return list(found.values())


@pytest.fixture(params=GPUS)
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Gpu]:
    triton = pytest.importorskip("triton")
    triton_cuda = pytest.importorskip("gblr_plugin.kernels.cuda.triton_product")
    jit_function = triton.runtime.jit.JITFunction
    found, run, driver = Gpu(request.param, tmp_path), jit_function.run, vars(triton.runtime.driver)
    if found.backend not in triton.backends.backends:
        pytest.skip(f"triton is here without its backend for {found.backend}")

    def compile_only(self: Any, *args: Any, **named: Any) -> Any:
        constants = {key: value for key, value in named.items() if key.isupper() or key.startswith("num_")}
        constants["dtype"] = str(args[0].dtype)
        try:
            kernel = run(self, *args, **{**named, "warmup": True})
        except Exception as error:  # some of which the tuning of tiles would take for slow ones
            pytest.fail(f"{self.fn.__name__} {constants} does not compile: {error}")
        found.launches.append(Launch(kernel, self.fn.__name__, constants))
        return kernel

    def time_nothing(call: Callable[[], None], quantiles: Any) -> list[float]:
        call()
        return [1.0, 1.0, 1.0]

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # nothing compiled earlier hides a failure
    monkeypatch.setattr(jit_function, "run", compile_only)
    monkeypatch.setattr(compiled, "_kernel", lambda kind: triton_cuda.product)
    monkeypatch.setattr(triton_cuda, "_may_time", lambda: True)
    for kernel in (triton_cuda._stage_one, triton_cuda._stage_two):
        monkeypatch.setattr(kernel, "cache", {})
        monkeypatch.setattr(kernel, "_do_bench", time_nothing)
        kernel.__dict__.pop("do_bench", None)  # cached
    before = dict(driver)
    triton.runtime.driver.set_active(found)
    yield found
    driver.clear()
    driver.update(before)


@pytest.fixture
def tf32() -> Iterator[Callable[[bool], None]]:
    before = torch.backends.cuda.matmul.allow_tf32
    yield lambda allowed: setattr(torch.backends.cuda.matmul, "allow_tf32", allowed)
    torch.backends.cuda.matmul.allow_tf32 = before


def spilled(assembly: dict[str, Any], folder: Path) -> int:
    """Bytes of stack (on AMD's devices: registers) that hold what found no room in registers."""
    if "amdgcn" in assembly:
        return sum(int(count) for count in re.findall(r"\.vgpr_spill_count: *(\d+)", assembly["amdgcn"]))
    from triton import __file__ as package

    program = Path(package).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    file = folder / "kernel.cubin"
    file.write_bytes(assembly["cubin"])
    shown = subprocess.run([program, "--dump-resource-usage", file], capture_output=True, text=True, check=True)
    return max(int(size) for size in re.findall(r"STACK:(\d+)", shown.stdout))


def prefetches(ptx: str, stages: int) -> bool:
    """Does a loop copy tiles to shared memory while those of ``stages - 2`` steps before are still on their way."""
    lines = ptx.splitlines()
    marks = ((re.match(r"\s*(\$\w+):", line), number) for number, line in enumerate(lines))
    labels = {mark[1]: number for mark, number in marks if mark}
    for number, line in enumerate(lines):
        target = re.search(r"\bbra(?:\.uni)?\s+(\$\w+);", line)
        if target and labels[target[1]] < number:
            loop = "\n".join(lines[labels[target[1]] : number])
            pending = re.findall(r"cp\.async\.wait_group\s+(\d+)", loop)
            if "cp.async.c" in loop and pending and min(int(count) for count in pending) >= stages - 2:
                return True
    return False


def matrix(m: int, n: int, components: int) -> StructuredMatrix:
    generator = torch.Generator().manual_seed(0)
    rows, cols = (
        Intervals(*(torch.randint(0, length, (components,), generator=generator) for _ in range(2)), length)
        for length in (m, n)
    )
    return StructuredMatrix.from_factors(torch.ones(components, m), torch.ones(components, n), rows, cols)
