"""A block-circulant matrix applied through the Fourier transform, block by block, as one autograd function."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

AT_HAND = 1 << 17
"""Numbers that a CPU's cache holds, with what is computed from them."""


def correlated(x: Tensor, w: Tensor, scale: float = 1.0) -> Tensor:
    """y_i = s sum_j D_ij x_j over blocks of b, with D_ij[r, c] = w_ij[(c - r) mod b].

    Args:
        x: (..., columns b), float32 or float64.
        w: (rows, columns, b); computed with in x's dtype.
        scale: s.

    Returns:
        (..., rows b). For the backward pass, x's spectra and w are kept; calls in turn with one x, each with its own
        w, share those.
    """
    return _Correlated.apply(x, w, scale)


class _Correlated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, scale: float) -> Tensor:
        (rows, columns, b), trained = w.shape, ctx.needs_input_grad[1]
        shares = trained and not torch.compiler.is_compiling()
        spectra = _shared(x, w) if shares else None
        kernel, some = _kernel(w, x, scale).mT.conj(), _some(x, max(rows, columns) * b)
        parts = (_spectra(part) for part in x.reshape(-1, columns, b).split(some)) if spectra is None else spectra
        y = x.new_empty(*x.shape[:-1], rows * b)
        flat, kept, start = y.view(-1, rows, b), [], 0
        for part in parts:
            end = start + part.shape[1]
            _put(part.bmm(kernel), flat[start:end])
            start = end
            kept += [part] if trained else []
        if shares and spectra is None:
            _share(x, w, kept)
        ctx.scale = scale
        ctx.save_for_backward(w, *kept)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        w, *spectra = ctx.saved_tensors
        (rows, columns, b), (moves, *_) = w.shape, ctx.needs_input_grad
        kernel, flat = _kernel(w, grad, ctx.scale), grad.reshape(-1, rows, b)
        sizes = [part.shape[1] for part in spectra] or _some(grad, max(rows, columns) * b)
        dx = grad.new_empty(*grad.shape[:-1], columns * b) if moves else None
        dw, start = torch.zeros_like(kernel), 0
        for i, part in enumerate(flat.split(sizes)):
            g, end = _spectra(part), start + len(part)
            if dx is not None:
                _put(g.bmm(kernel), dx.view(-1, columns, b)[start:end])
            if spectra:
                dw.baddbmm_(g.mH, spectra[i])
            start = end
        if not spectra:
            return dx, None, None
        return dx, torch.fft.irfft(dw.permute(1, 2, 0).contiguous(), n=b).mul_(ctx.scale).to(w.dtype), None


class _Latest(NamedTuple):
    """An input, and its spectra while some backward pass is waiting for them."""

    x: weakref.ref[Tensor]
    version: int
    b: int
    spectra: list[weakref.ref[Tensor]]
    readers: set[int]
    """Whose w has been with it: when one of them comes again, x may hold other numbers by then."""


_latest: _Latest | None = None


def _share(x: Tensor, w: Tensor, spectra: list[Tensor]) -> None:
    global _latest
    _latest = _Latest(weakref.ref(x), x._version, w.shape[2], [weakref.ref(part) for part in spectra], {id(w)})


def _shared(x: Tensor, w: Tensor) -> list[Tensor] | None:
    """The spectra of x, from when the layer before was called with the same."""
    last = _latest
    if last is None or last.x() is not x or last[1:3] != (x._version, w.shape[2]) or id(w) in last.readers:
        return None
    last.readers.add(id(w))
    spectra = [part() for part in last.spectra]
    return None if any(part is None for part in spectra) else spectra  # type: ignore[return-value]


def _some(x: Tensor, width: int) -> int:
    """How many rows to transform at a time: on a CPU so many that what comes of them stays at hand."""
    return max(32, AT_HAND // width) if x.device.type == "cpu" else max(1, x.numel())


def _kernel(w: Tensor, like: Tensor, scale: float) -> Tensor:
    """s (rows, columns, b) -> (frequencies, rows, columns)."""
    return torch.fft.rfft(w.to(like.dtype).mul(scale)).permute(2, 0, 1).contiguous()


def _spectra(x: Tensor) -> Tensor:
    """(n, blocks, b) -> (frequencies, n, blocks)."""
    return torch.fft.rfft(x).permute(2, 0, 1).contiguous()


def _put(y: Tensor, out: Tensor) -> None:
    """The inverse of ``_spectra``, into out (n, blocks, b)."""
    if y.shape[2] < 16:  # a plain transposition is the quicker one where few numbers lie side by side
        y = y.flatten(1).t().contiguous().unflatten(0, y.shape[1:])
    else:
        y = y.permute(1, 2, 0).contiguous()
    torch.fft.irfft(y, n=out.shape[-1], out=out)
