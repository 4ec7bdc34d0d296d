"""Thin factorisations of a matrix: the leading or trailing singular triplets, and the first columns of Q.

All work in float32 (or float64 for float64 input), are deterministic, and return ``(U, S, V)`` with W ~ U diag(S) V^T,
``U (out, r)``, ``S (r,)`` descending, ``V (in, r)``; in each column of U the entry of largest magnitude is positive.
"""

from __future__ import annotations

import torch
from torch import Tensor

SVD = tuple[Tensor, Tensor, Tensor]
BLOCK = 16
"""Columns that a Krylov step adds."""
SMALL = 384
"""Up to this many rows or columns the dense Gram matrix is cheaper than Krylov steps."""


def wide(w: Tensor) -> Tensor:
    """``w`` detached, in float32 at least."""
    return w.detach().to(torch.promote_types(w.dtype, torch.float32))


def top_svd(w: Tensor, r: int, steps: int | None = None, tolerance: float = 1e-5, seed: int = 0) -> SVD:
    """The r leading singular triplets.

    A block Krylov space is grown until every wanted triplet has ||W^T u - S v|| <= tolerance * S_1, so the rank-r error
    is that of the best approximation to far below 1e-4. Small matrices, and spectra so flat that the space would fill
    the whole matrix, go through the Gram matrix in float64.

    Args:
        w: (out, in).
        r: how many, at most min(out, in).
        steps: stop after this many Krylov steps, converged or not (``pissa_niter_N``).
        tolerance: see above.
        seed: of the random start; the global generator is left alone.

    Returns:
        U (out, r), S (r,), V (in, r).
    """
    w = wide(w)
    short = min(w.shape)
    if short <= SMALL or 4 * r > short:
        return gram_svd(w, r)
    found = _krylov(w, r, steps, tolerance, seed)
    return gram_svd(w, r) if found is None else _signed(*found)


def _krylov(w: Tensor, r: int, steps: int | None, tolerance: float, seed: int) -> SVD | None:
    """Block Golub-Kahan bidiagonalisation, fully reorthogonalised: W V = U T, W^T U = V T^T + V_next L E_last^T."""
    rows, columns = w.shape
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(columns, BLOCK, generator=generator).to(w)
    v, _ = torch.linalg.qr(v)
    u, t = torch.linalg.qr(w @ v)  # (out, b), (b, b)
    limit = min(rows, columns) // 2
    step = 1
    while True:
        p = w.T @ u[:, -BLOCK:]
        for _ in range(2):  # twice is enough to stay orthogonal in float32
            p = p - v @ (v.T @ p)
        v_next, low = torch.linalg.qr(p)  # (in, b), (b, b)
        size = t.shape[0]
        last = steps is not None and step >= steps
        if size >= r and (last or step % 2 == 0):
            x, s, yh = torch.linalg.svd(t)
            residual = (low @ x[-BLOCK:, :r]).norm(dim=0).max()
            if last or residual <= tolerance * s[0]:
                return u @ x[:, :r], s[:r], v @ yh[:r].T
        if size + BLOCK > limit:
            return None
        q = w @ v_next
        q = q - u[:, -BLOCK:] @ low.T
        for _ in range(2):
            q = q - u @ (u.T @ q)
        u_next, high = torch.linalg.qr(q)
        grown = t.new_zeros(size + BLOCK, size + BLOCK)
        grown[:size, :size] = t
        grown[size - BLOCK : size, size:] = low.T
        grown[size:, size:] = high
        u, v, t = torch.cat([u, u_next], 1), torch.cat([v, v_next], 1), grown
        step += 1


def gram_svd(w: Tensor, r: int) -> SVD:
    """The r leading triplets by the eigenvectors of the smaller of W W^T and W^T W, in float64."""
    w = wide(w)
    tall = w.shape[0] >= w.shape[1]
    m = (w if tall else w.T).double()  # (long, short)
    _, vectors = torch.linalg.eigh(m.T @ m)
    v = vectors[:, -r:].flip(1)  # (short, r)
    # Columns of M V are orthogonal with norms S; QR also completes U where S is zero.
    u, upper = torch.linalg.qr(m @ v)
    s = upper.diagonal().abs()
    u = u * torch.where(upper.diagonal() < 0, -1.0, 1.0)
    u, s, v = u.to(w.dtype), s.to(w.dtype), v.to(w.dtype)
    return _signed(u, s, v) if tall else _signed(v, s, u)


def bottom_svd(w: Tensor, r: int) -> SVD:
    """The r trailing singular triplets, by the full decomposition (small ones need all the digits)."""
    u, s, vh = torch.linalg.svd(wide(w), full_matrices=False)
    return _signed(u[:, -r:], s[-r:], vh[-r:].T)


def thin_qr(w: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The first r columns of Q and rows of R in W = Q R; they depend on the first r columns of W alone.

    Args:
        w: (out, in).
        r: at most min(out, in).

    Returns:
        Q (out, r) with orthonormal columns, R (r, in) with a diagonal that is not negative.
    """
    w = wide(w)
    q, upper = torch.linalg.qr(w[:, :r])
    q = q * torch.where(upper.diagonal() < 0, -1.0, 1.0)
    return q, q.T @ w


def _signed(u: Tensor, s: Tensor, v: Tensor) -> SVD:
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(u.dtype)
    return u * sign, s, v * sign
