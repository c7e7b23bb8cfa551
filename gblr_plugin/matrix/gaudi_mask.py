r"""Gaussian-Dirichlet (Gaudi) masks: boxcars that can be differentiated in their width and location.

With normalised width ``w`` and location ``l`` on an axis of length N, the mask is the inverse real FFT over
k = 0 .. N // 2 of (paper Sec. 3.2)

    G(k) = w sinc(k w) / sinc(k / N) * exp(i pi k (1/N - w)) * exp(-2 pi i k l) * exp(-k^2 / (2 sigma^2)).

``sigma = None`` (infinity) gives the exact boxcar; a finite sigma gives that boxcar circularly convolved with a
Gaussian of standard deviation N / (2 pi sigma) samples. This module holds the formula, the rounding of widths and
locations to whole samples, and the two tables of length N from which :mod:`gblr_plugin.layers.masks` reads all masks.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..errors import ConfigError

__all__ = ["fft_mask", "integer_locations", "integer_widths", "mask_tables"]


def integer_widths(width: Tensor, n: int | Tensor, tile: int | Tensor = 1) -> Tensor:
    """Round normalised widths to whole multiples of ``tile`` samples, or to the whole axis.

    Args:
        width: Any shape, floating point in [0, 1] (fractions of the axis).
        n: Axis length N, or (broadcastable) float64 lengths.
        tile: Tile T, or float64 tiles; 1 is the published method.

    Returns:
        int64 of the same shape, in [0, N]: the nearest of 0, T, 2T, ... and N itself, which need not be a multiple.
    """
    width = width.detach()
    scale = n / tile
    if isinstance(scale, Tensor):
        scale = scale.to(width.dtype)  # as a Python number would be, so that counts agree with masks
    rounded = torch.round(width * scale).to(torch.float64) * tile
    ragged = n % tile
    if isinstance(ragged, Tensor) or ragged:
        samples = width.to(torch.float64) * n
        rounded = torch.where((ragged > 0) & (samples > n - ragged / 2), n, rounded)
    if isinstance(n, Tensor):
        return rounded.clamp_(min=0).minimum(n).long()
    return rounded.long().clamp(0, n)


def integer_locations(location: Tensor, n: int, tile: int = 1) -> Tensor:
    """Round normalised locations (taken modulo 1) to whole multiples of ``tile`` samples; int64 in [0, N)."""
    location = location.detach()
    rounded = (torch.round((location - location.floor()) * (n / tile)) * tile).long().clamp(min=0)
    return torch.where(rounded < n, rounded, 0)  # the last tile wraps to the first sample, itself a multiple


def _frequencies(n: int, sigma: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """(k, sinc(k / N), Gaussian window) for k = 0 .. N // 2 in float64."""
    k = torch.arange(n // 2 + 1, dtype=torch.float64)
    window = torch.ones_like(k) if sigma is None else torch.exp(-(k**2) / (2 * sigma**2))
    return k, torch.sinc(k / n), window


@lru_cache(maxsize=32)  # sigma changes every step: only the axes of one model are worth keeping
def _tables(n: int, sigma: float | None) -> Tensor:
    k, dirichlet, window = _frequencies(n, sigma)
    if sigma is None:
        narrowest = torch.zeros(n, dtype=torch.float64)
        narrowest[0] = 1.0
    else:
        narrowest = torch.fft.irfft((window / n).to(torch.complex128), n=n, norm="forward")
    prefix = narrowest.cumsum(0)
    slope = torch.fft.irfft(torch.exp(1j * torch.pi * k / n) / dirichlet * window, n=n, norm="forward")
    # Prefix sums of the periodic extension grow by one (the sum of the mask of width 1) each period.
    return torch.stack([torch.cat([prefix - 2, prefix - 1, prefix]), slope.repeat(3)])


def mask_tables(
    n: int, sigma: float | None, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Tensor:
    """The two tables from which every STE mask of an axis and its gradients are read.

    Args:
        n: Axis length N.
        sigma: Smoothness, > 0; ``None`` for the exact boxcar.
        dtype: Result dtype; default ``torch.get_default_dtype()``. Computed in float64.
        device: Result device.

    Returns:
        (2, 3N): running sums of the width-1 mask over three periods, and three periods of the width derivative at the
        trailing edge.

    Raises:
        ConfigError: If N < 1 or sigma <= 0.
    """
    if n < 1:
        raise ConfigError(f"gaudi mask: axis length must be at least 1, got {n}")
    if sigma is not None and not sigma > 0:
        raise ConfigError(f"gaudi mask: sigma must be positive, or None for the exact boxcar, got {sigma}")
    return _tables(n, sigma).to(device=device, dtype=dtype or torch.get_default_dtype(), copy=True)


def fft_mask(width: Tensor, location: Tensor, n: int, sigma: float | None) -> Tensor:
    """The published frequency-domain form, (K, N); differentiable by autograd for real-valued arguments."""
    k, dirichlet, window = (each.to(device=width.device, dtype=width.dtype) for each in _frequencies(n, sigma))
    w, loc = width[:, None], location[:, None]
    amplitude = w * torch.sinc(k * w) / dirichlet * window
    phase = torch.pi * k * (1 / n - w - 2 * loc)
    mask: Tensor = torch.fft.irfft(torch.polar(torch.ones_like(phase), phase) * amplitude, n=n, norm="forward")
    return mask
