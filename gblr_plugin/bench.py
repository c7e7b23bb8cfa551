"""``gblr bench``: structured products against dense ones on this machine, interleaved, medians.

The matrices are random: K components with widths uniform in (0, half the axis], at any place, cyclic; ``--align`` snaps
them to a tile. What is printed is measured at once, in one process, calls taking turns.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import ConfigError
from .kernels.measure import interleaved_medians
from .structure import Intervals, StructuredMatrix
from .tensor import GBLRTensor

__all__ = ["main", "random_structure", "speed"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def random_structure(
    m: int, n: int, relative_flops: float, align: int = 1, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> StructuredMatrix:
    """A random GBLR matrix of mixed widths with about the given relative FLOPs.

    Args:
        m: Rows.
        n: Columns.
        relative_flops: Aim for the multiply-adds over m * n.
        align: Widths and starts are multiples of this.
        dtype: Dtype of the factors.
        seed: Of the random numbers.

    Raises:
        ConfigError: If ``align`` exceeds half an axis, or the aim is not above 0.
    """
    if not 1 <= align <= min(m, n) // 2 or not relative_flops > 0:
        raise ConfigError(
            f"bench: align must lie in 1 .. {min(m, n) // 2}, FLOPs above 0; got {align}, {relative_flops}"
        )
    g = torch.Generator().manual_seed(seed)
    mean_cost = (m + n + 2 * align) / 4
    num = max(round(relative_flops * m * n / mean_cost), 1)

    def intervals(length: int) -> Intervals:
        width = torch.randint(1, length // 2 // align + 1, (num,), generator=g) * align
        start = torch.randint(0, length // align, (num,), generator=g) * align
        return Intervals(width, start, length)

    u, v = (torch.randn(num, size, generator=g) / num**0.5 for size in (m, n))
    return StructuredMatrix.from_factors(u.to(dtype), v.to(dtype), intervals(m), intervals(n))


@torch.no_grad()
def speed(
    matrix: StructuredMatrix, tokens: int, plan: str = "fixed", seconds: float = 0.3
) -> tuple[float, float, GBLRTensor]:
    """Median times of one dense and one structured ``F.linear``, in seconds, on the device of the matrix.

    Args:
        matrix: The weight.
        tokens: Rows of the input.
        plan: ``"fixed"`` or ``"auto"``.
        seconds: About how long to spend on each.

    Returns:
        (dense, structured, the weight used).
    """
    weight, dense = GBLRTensor.from_structured(matrix, plan=plan), matrix.to_dense()
    x = torch.randn(tokens, matrix.shape[1], device=dense.device, dtype=dense.dtype)

    def call(w: Tensor) -> Callable[[], object]:
        return lambda: F.linear(x, w)

    times = interleaved_medians([call(dense), call(weight)], dense.device, seconds)
    return times[0], times[1], weight


def _shape(text: str) -> tuple[int, int]:
    try:
        m, n = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"shape {text!r} must look like 3072x768") from None
    return m, n


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gblr bench", description="Time structured products against dense ones.")
    parser.add_argument("--shapes", nargs="+", type=_shape, default=[(3072, 768), (4096, 4096)], metavar="MxN")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 64, 256, 1024])
    parser.add_argument("--align", nargs="+", type=int, default=[32, 1], help="snap intervals to these tiles")
    parser.add_argument("--relative-flops", type=float, default=0.25)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--plan", choices=("fixed", "auto"), default="fixed")
    parser.add_argument("--seconds", type=float, default=0.3, help="time spent on each entry")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, measure, print a table; returns the exit code.

    ``share`` is the speed-up over the ideal one, 1 / relative FLOPs.
    """
    options = _parser().parse_args(argv)
    torch.set_num_threads(options.threads)
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"torch {torch.__version__}, {name}, {options.threads} threads, {options.dtype}, plan {options.plan}")
    print(f"{'shape':>10} {'align':>5} {'tokens':>6} {'dense us':>9} {'ours us':>9} {'speed-up':>8} {'share':>6} "
          f"{'padding':>7} {'memory':>6}  kernel")  # fmt: skip
    for m, n in options.shapes:
        for align in options.align:
            matrix = random_structure(m, n, options.relative_flops, align, dtype=dtype).to(device)
            for tokens in options.tokens:
                dense, ours, weight = speed(matrix, tokens, options.plan, options.seconds)
                ratio = dense / ours
                memory = (weight.factors.nbytes + weight.lists.nbytes) / (matrix.stored * weight.factors.itemsize)
                print(
                    f"{f'{m}x{n}':>10} {align:>5} {tokens:>6} {dense * 1e6:>9.0f} {ours * 1e6:>9.0f} {ratio:>8.2f} "
                    f"{ratio * matrix.relative_flops:>6.2f} {weight.packing.padding:>7.3f} {memory:>6.3f}  "
                    f"{weight.plan.kernel(tokens)} {weight.plan.block_rows}x{weight.plan.block_cols}"
                )
    return 0
