"""Tucker-2 kernels of convolutions: low rank between input channels, core, and output channels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from ..matrix.metric import Metric
from .base import FamilyMatrix
from .checks import check_count, too_small

__all__ = ["Tucker2"]


@dataclass(frozen=True, eq=False)
class Tucker2(FamilyMatrix):
    r"""``W[o, c, t] = sum_pq A[o, p] core[p, q, t] B[q, c]`` over kernel taps t (Kim et al. 2016, Sec. 3.1).

    A 1x1 convolution to q channels, the kernel-sized core, and a 1x1 convolution to the outputs. It stores
    ``c_in q + q p taps + p c_out`` entries; since the first step runs once per input position, one output position
    costs ``c_in q prod(stride) + q p taps + p c_out`` multiply-adds (along an axis with one tap the first step is
    strided instead).

    The ranks p and q are those within the budget with the least sum of the two unfoldings' tail energies, which bounds
    the squared error of the HOSVD (De Lathauwer et al. 2000, Property 10). Alternating SVDs (HOOI) then refine A and B.
    Calibration uses the mean square of each input channel.

    Options:
        kernel_size: Taps along each axis; taken from the module in the trainable form.
        stride: Stride along each axis, default 1; taken from the module in the trainable form.
        iterations: HOOI sweeps, default 10.

    Args:
        output: (c_out, p) A.
        core: (p, q, taps).
        input: (q, c_in) B.
        kernel_size: Taps along each axis.
        stride: Stride along each axis.
    """

    name = "tucker2"
    output: Tensor
    core: Tensor
    input: Tensor
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def _project(
        cls,
        weight: Tensor,
        max_multiply_adds: int,
        *,
        metric: Metric,
        kernel_size: tuple[int, ...] | None = None,
        stride: tuple[int, ...] | None = None,
        iterations: int = 10,
    ) -> Tucker2:
        if kernel_size is None:
            raise ConfigError("tucker2: only for convolutions; give the kernel_size of this weight matrix")
        kernel = tuple(kernel_size)
        stride = (1,) * len(kernel) if stride is None else tuple(stride)
        taps = math.prod(kernel)
        if taps < 1 or weight.shape[1] % taps or len(stride) != len(kernel):
            raise ConfigError(f"tucker2: kernel_size {kernel}, stride {stride} do not fit {weight.shape[1]} columns")
        check_count(cls.name, "iterations", iterations, 10**6)
        scale = weight.new_ones(weight.shape[1] // taps)
        if metric.moment is not None:
            scale = metric.moment.diagonal().view(-1, taps).mean(1).sqrt()
        tensor = weight.reshape(len(weight), -1, taps) * scale[:, None]
        by_input = tensor.transpose(0, 1).flatten(1)
        ranks = _ranks(tensor.flatten(1), by_input, max_multiply_adds, taps, _input_positions(kernel, stride))
        if ranks is None:
            least = by_input.shape[0] * _input_positions(kernel, stride) + taps + len(weight)
            raise too_small(cls.name, weight.shape, max_multiply_adds, least, "ranks (1, 1)")
        p, q = ranks
        b = _leading(by_input, q)
        for _ in range(iterations):
            a = _leading(torch.einsum("oct,cq->oqt", tensor, b).flatten(1), p)
            b = _leading(torch.einsum("oct,op->cpt", tensor, a).flatten(1), q)
        return cls(a, torch.einsum("oct,op,cq->pqt", tensor, a, b), b.T / scale, kernel, stride)

    @property
    def shape(self) -> tuple[int, int]:
        """(c_out, c_in * taps)."""
        return self.output.shape[0], self.input.shape[1] * self.core.shape[2]

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of one output position."""
        first = self.input.numel() * _input_positions(self.kernel_size, self.stride)
        return first + self.core.numel() + self.output.numel()

    def to_dense(self) -> Tensor:
        """The (c_out, c_in * taps) matrix."""
        return torch.einsum("op,pqt,qc->oct", self.output, self.core, self.input).flatten(1)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """For unfolded patches (..., c_in * taps); a convolution shares the first step between patches instead."""
        z = torch.einsum("...ct,qc->...qt", x.unflatten(-1, (-1, self.core.shape[2])), self.input)
        return F.linear(torch.einsum("...qt,pqt->...p", z, self.core), self.output, bias)

    def convolve(self, conv: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """Three convolutions."""
        convolve = F.conv1d if len(self.kernel_size) == 1 else F.conv2d
        ones = (1,) * len(self.kernel_size)
        if conv.padding_mode != "zeros":
            x = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
        single = [taps == 1 for taps in self.kernel_size]
        stride_in, stride_core = _shared(single, self.stride, 1)
        pads_in: Any = 0
        pads_core: Any = 0
        if conv.padding_mode == "zeros":
            same = isinstance(conv.padding, str)  # strides are then 1
            pads_in, pads_core = (0, conv.padding) if same else _shared(single, conv.padding, 0)
        z = convolve(x, self.input.view(*self.input.shape, *ones), None, stride_in, pads_in)
        core = self.core.view(*self.core.shape[:2], *self.kernel_size)
        z = convolve(z, core, None, stride_core, pads_core, conv.dilation)
        y: Tensor = convolve(z, self.output.view(*self.output.shape, *ones), bias)
        return y

    @classmethod
    def layer_options(cls, dense: nn.Module) -> dict[str, Any]:
        """The kernel size and stride of a convolution.

        Raises:
            ConfigError: If the module is not an nn.Conv1d or nn.Conv2d.
        """
        if not isinstance(dense, (nn.Conv1d, nn.Conv2d)):
            raise ConfigError(f"tucker2: only for Conv1d and Conv2d, got a {type(dense).__name__}")
        return {"kernel_size": dense.kernel_size, "stride": dense.stride}


def _shared(single: list[bool], values: tuple[int, ...], neutral: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Strides or paddings of the first step (axes with one tap) and of the core (all others)."""
    first = tuple(value if alone else neutral for value, alone in zip(values, single, strict=True))
    core = tuple(neutral if alone else value for value, alone in zip(values, single, strict=True))
    return first, core


def _input_positions(kernel: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Input positions of the first step per output position."""
    return math.prod(1 if taps == 1 else step for taps, step in zip(kernel, stride, strict=True))


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """Leading left singular vectors, by the Gram matrix of the rows."""
    _, vectors = torch.linalg.eigh(matrix @ matrix.T)
    leading: Tensor = vectors[:, -rank:].flip(1)
    return leading


def _ranks(
    by_output: Tensor, by_input: Tensor, max_multiply_adds: int, taps: int, positions: int
) -> tuple[int, int] | None:
    """(p, q) of least bound on the error among those within the budget; ``None`` if (1, 1) costs more."""

    def tails(matrix: Tensor) -> list[float]:
        energy = torch.linalg.eigvalsh(matrix @ matrix.T).clamp(min=0)
        tail: list[float] = torch.cat([energy.new_zeros(1), energy.cumsum(0)]).flip(0).tolist()
        return tail  # tail[r] is what rank r leaves out

    out_tail, in_tail = tails(by_output), tails(by_input)
    c_out, c_in = len(by_output), len(by_input)
    best: tuple[float, int, int] | None = None
    for q in range(1, c_in + 1):
        p = min((max_multiply_adds - c_in * q * positions) // (q * taps + c_out), c_out, q * taps)
        if p < 1:
            break
        q_used = min(q, p * taps)  # a wider one would be redundant
        candidate = out_tail[p] + in_tail[q_used], p, q_used
        if best is None or candidate < best:
            best = candidate
    return None if best is None else (best[1], best[2])
