"""The real part of a sparse real spectrum's inverse transform, through real transforms of half its width."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.ops.entries import columns_of


def real_part(values: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
    """``ifft2(F).real`` for F zero but for real entries.

    Its own spectrum is the even part of F, (F(u, v) + F(-u, -v)) / 2, of which half the columns are enough.

    Args:
        values: (n,), float32 or float64.
        places: (2, n), rows u and columns v, different ones.
        shape: of F.

    Returns:
        F's shape.
    """
    (rows, width), (u, v) = shape, _halved(places, shape)
    half = torch.complex(values / 2, torch.zeros_like(values))
    edge = (v == 0) | (2 * v == width)  # columns that hold both of a pair
    spectrum = half.new_zeros(width // 2 + 1, rows).index_put_((v, u), half, accumulate=True)
    spectrum.index_put_((v, -u % rows), half * edge, accumulate=True)
    return torch.fft.irfft(torch.fft.ifft(spectrum).t().contiguous(), n=width)  # quicker than in two dimensions at once


def at_frequencies(g: Tensor, x: Tensor, places: Tensor) -> Tensor:
    """The gradient of ``real_part``'s values, where that of its result is G^T X.

    Args:
        g: (N, rows of F).
        x: (N, columns of F).
        places: as there.

    Returns:
        (n,).
    """
    rows, width = g.shape[1], x.shape[1]
    u, v = _halved(places, (rows, width))
    above = 2 * u > rows  # their transform is the conjugate of the one at -u
    u = torch.where(above, rows - u, u)
    g, x = (torch.view_as_real(torch.fft.rfft(t)).flatten(1) for t in (g, x))  # (N, real and imaginary parts in turn)
    real, imaginary = columns_of(g, x, 2 * u, 2 * v), columns_of(g, x, 2 * u + 1, 2 * v + 1)
    return (real + torch.where(above, imaginary, -imaginary)) / (rows * width)


def _halved(places: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Of each (u, v) and (-u, -v) the one in the left half."""
    (rows, width), (u, v) = shape, places
    right = 2 * v > width
    return torch.where(right, -u % rows, u), torch.where(right, width - v, v)
