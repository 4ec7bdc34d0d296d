"""A block-circulant matrix applied through the Fourier transform, block by block, as one autograd function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def correlated(x: Tensor, w: Tensor) -> Tensor:
    """y_i = sum_j D_ij x_j over blocks of b, with D_ij[r, c] = w_ij[(c - r) mod b].

    Args:
        x: (..., columns b), float32 or float64.
        w: (rows, columns, b), of the same dtype.

    Returns:
        (..., rows b). Nothing but x and w is kept for the backward pass.
    """
    return _Correlated.apply(x, w)


class _Correlated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w)
        return _blocks(_spectra(x, w.shape[2]).bmm(_kernel(w).mT.conj()), x, w.shape[2])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, w = ctx.saved_tensors
        b, g = w.shape[2], _spectra(grad, w.shape[2])
        dx = _blocks(g.bmm(_kernel(w)), grad, b) if ctx.needs_input_grad[0] else None
        dw = None if x is None else torch.fft.irfft(g.mH.bmm(_spectra(x, b)).permute(1, 2, 0).contiguous(), n=b)
        return dx, dw


def _kernel(w: Tensor) -> Tensor:
    """(rows, columns, b) -> (frequencies, rows, columns)."""
    return torch.fft.rfft(w).permute(2, 0, 1).contiguous()


def _spectra(x: Tensor, b: int) -> Tensor:
    """(..., blocks b) -> (frequencies, N, blocks)."""
    return torch.fft.rfft(x.reshape(-1, x.shape[-1] // b, b)).permute(2, 0, 1).contiguous()


def _blocks(y: Tensor, like: Tensor, b: int) -> Tensor:
    """The inverse of ``_spectra``, for the leading dimensions of ``like``."""
    return torch.fft.irfft(y.permute(1, 2, 0).contiguous(), n=b).reshape(*like.shape[:-1], -1)
