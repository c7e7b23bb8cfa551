"""Every triton kernel, compiled for GPUs that need not be there: what the interpreter cannot see.

Launches go their usual way, with the tuning of tiles, as far as the launch itself. A driver that names a GPU lets
triton compile for it, specialising on the arguments as at run time, and nothing is run: tiles, constants and dtypes are
those that the code chooses.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from gblr_plugin.kernels import compiled
from gblr_plugin.kernels.packing import pack
from gblr_plugin.kernels.plan import BLOCKS as ALL_BLOCKS
from gblr_plugin.matrix.structure import Intervals, StructuredMatrix

triton = pytest.importorskip("triton")
triton_cuda = pytest.importorskip("gblr_plugin.kernels.cuda.triton_product")
triton_masks = pytest.importorskip("gblr_plugin.kernels.cuda.triton_masks")
triton_proximal = pytest.importorskip("gblr_plugin.kernels.cuda.triton_proximal")
JITFunction, GPUTarget = triton.runtime.jit.JITFunction, triton.backends.compiler.GPUTarget

# Backend, target, and bytes of shared memory that one program may have.
GPUS = {
    "sm_80": ("nvidia", GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_90": ("nvidia", GPUTarget("cuda", 90, 32), 227 << 10),
    "gfx942": ("amd", GPUTarget("hip", "gfx942", 64), 64 << 10),
}
BLOCKS = [block for block in ALL_BLOCKS if block <= compiled.WIDEST]
HALVES = torch.bfloat16, torch.float16
# Bytes a thread that ptxas spills far from the limit of registers, so that more threads run at a time; versions differ.
TRADED = 64
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Launch(NamedTuple):
    """A kernel as it was compiled, and its constants."""

    kernel: Any
    name: str
    constants: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.name} {self.constants}"


class Gpu:
    """A driver of triton for a GPU that is not there, and the launches that it was asked for."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.backend, self.target, self.memory = GPUS[name]
        self.utils = SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": self.memory})
        self.launches: list[Launch] = []

    def get_current_device(self) -> str:
        """What triton keeps compiled kernels by."""
        return self.name

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


@pytest.fixture(params=GPUS)
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Gpu]:
    found, run, driver = Gpu(request.param), JITFunction.run, vars(triton.runtime.driver)
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
    monkeypatch.setattr(JITFunction, "run", compile_only)
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
    file = folder / "kernel.cubin"
    file.write_bytes(assembly["cubin"])
    shown = subprocess.run([CUOBJDUMP, "--dump-resource-usage", file], capture_output=True, text=True, check=True)
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


def faults(gpu: Gpu, folder: Path) -> list[str]:
    """What is wrong with the kernels that were launched."""
    found = {}
    for launch in gpu.launches:
        metadata, what = launch.kernel.metadata, []
        if metadata.shared > gpu.memory:
            what.append(f"{metadata.shared} bytes of shared memory, there are {gpu.memory}")
        lost = spilled(launch.kernel.asm, folder)
        if lost > TRADED:
            what.append(f"{lost} spilled")
        # Copies take 4 bytes at least, and a product's own loop is what should overlap with them.
        copied = "TOKENS" in launch.constants and (launch.constants["EVEN"] or "32" in launch.constants["dtype"])
        ptx, stages = launch.kernel.asm.get("ptx"), launch.kernel.metadata.num_stages
        if ptx and copied and stages > 1 and not prefetches(ptx, stages):
            what.append("nothing is prefetched")
        if what:
            found[str(launch)] = f"{launch}: {', '.join(what)}"
    return list(found.values())


def matrix(m: int, n: int, components: int) -> StructuredMatrix:
    generator = torch.Generator().manual_seed(0)
    rows, cols = (
        Intervals(*(torch.randint(0, length, (components,), generator=generator) for _ in range(2)), length)
        for length in (m, n)
    )
    return StructuredMatrix.from_factors(torch.ones(components, m), torch.ones(components, n), rows, cols)


def multiply(dtype: torch.dtype, block: int, tokens: int, ragged: bool = False) -> None:
    m, n = 3 * block - ragged, 2 * block - ragged
    layout, factors, lists = pack(matrix(m, n, 80 - ragged).to(dtype), block, block)
    bias = torch.zeros(m, dtype=dtype) if tokens % 2 else None
    compiled.linear(torch.zeros(tokens, n, dtype=dtype), factors, lists, layout, bias, opaque=True)


# For each block, numbers of tokens of the three ranges that have tiles of their own: one, multiples of 16, and others.
TOKENS = dict(zip(BLOCKS, [(1, 33, 1024), (16, 100, 129), (7, 48, 999), (3, 128, 513)], strict=True))


def test_products(gpu: Gpu, tmp_path: Path) -> None:
    for block, tokens in TOKENS.items():
        for number in tokens:
            multiply(torch.bfloat16, block, number)
    assert not faults(gpu, tmp_path)
    found = {(launch.name, launch.constants["COMPONENTS"], launch.constants["TOKENS"]) for launch in gpu.launches}
    tiles = {
        (kernel.fn.__name__, config.kwargs["COMPONENTS"], config.kwargs["TOKENS"])
        for kernel in (triton_cuda._stage_one, triton_cuda._stage_two)
        for config in kernel.configs
    }
    assert found == tiles


@pytest.mark.parametrize("allowed", [False, True], ids=["exact", "tf32"])
def test_products_in_float32(gpu: Gpu, allowed: bool, tf32: Callable[[bool], None], tmp_path: Path) -> None:
    tf32(allowed)
    for block, tokens in TOKENS.items() if not allowed else [(BLOCKS[-1], TOKENS[BLOCKS[-1]])]:
        for number in tokens:
            multiply(torch.float32, block, number)
    assert not faults(gpu, tmp_path)


def test_products_in_float16(gpu: Gpu, tmp_path: Path) -> None:
    """On the largest block, which takes most: in all but its products float16 is as bfloat16."""
    for number in TOKENS[BLOCKS[-1]]:
        multiply(torch.float16, BLOCKS[-1], number)
    assert not faults(gpu, tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_products_whose_blocks_end_anywhere(gpu: Gpu, dtype: torch.dtype, tmp_path: Path) -> None:
    for number in TOKENS[BLOCKS[-1]]:
        multiply(dtype, BLOCKS[-1], number, ragged=True)
    assert not faults(gpu, tmp_path)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64], ids=str)
def test_masks(gpu: Gpu, dtype: torch.dtype, tmp_path: Path) -> None:
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
    assert not faults(gpu, tmp_path)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64], ids=str)
def test_prox_and_clip(gpu: Gpu, dtype: torch.dtype, tmp_path: Path) -> None:
    widths, locations = ([torch.zeros(2, k, dtype=dtype) for k in (3, 700)] for _ in range(2))
    triton_proximal.prox_and_clip(widths, locations, torch.zeros(2, dtype=torch.float64))
    assert len(gpu.launches) == 1
    assert not faults(gpu, tmp_path)


@pytest.mark.parametrize("gpu", ["sm_90"], indirect=True)
@pytest.mark.parametrize("timed", [True, False], ids=["tiles timed", "tiles not timed"])
def test_launches_are_made_while_the_device_of_their_tensors_is_current(
    gpu: Gpu, timed: bool, monkeypatch: pytest.MonkeyPatch
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
    multiply(torch.bfloat16, 16, 7)
    tables, edges, factor = torch.zeros(2, 30), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 10)
    triton_masks.window_differences(tables, edges, edges, factor)
    triton_masks.masked_gradients(tables, edges, edges, factor, factor)
    triton_proximal.prox_and_clip([factor], [factor], torch.zeros(1))
    assert set(launched) == {"_stage_one", "_stage_two", "_differences", "_reduce", "_prox_and_clip"}
