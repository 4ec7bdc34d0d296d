"""Rotations R = (I + Q)(I - Q)^{-1} of skew-symmetric Q, exactly or as a short series; of pairs; reflections."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

WIDE = 32
"""Blocks are joined up to this size."""


def skew(entries: Tensor, b: int) -> Tensor:
    """The skew-symmetric matrices whose upper triangles, row by row, are ``entries``.

    Args:
        entries: (..., b (b - 1) / 2).
        b: their size.

    Returns:
        (..., b, b), Q = U - U^T.
    """
    rows, columns = torch.triu_indices(b, b, 1, device=entries.device)
    upper = entries.new_zeros(*entries.shape[:-1], b, b)
    upper[..., rows, columns] = entries
    return upper - upper.mT


def cayley(q: Tensor) -> Tensor:
    """(I + Q)(I - Q)^{-1}, by a solve in at least float32. The transpose belongs to -Q.

    Args:
        q: (..., b, b), skew-symmetric.

    Returns:
        (..., b, b), orthogonal, in the dtype of ``q``.
    """
    wide = q.to(torch.promote_types(q.dtype, torch.float32))
    eye = torch.eye(q.shape[-1], dtype=wide.dtype, device=q.device)
    return torch.linalg.solve(eye - wide, eye + wide).to(q.dtype)  # the two factors commute


def neumann(q: Tensor, terms: int) -> Tensor:
    """The first ``terms`` of (I + Q)(1 + Q + Q^2 + ...) = I + 2 Q + 2 Q^2 + ..., the last one once.

    Orthogonal only as far as ||Q|| is small. The peer's files fix two odd cases: three terms mean four, and two end
    with 2 Q.

    Args:
        q: (..., b, b), skew-symmetric.
        terms: how many, at least 1.
    """
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    highest = 3 if terms == 3 else terms - 1
    factors = [2.0] * highest
    if highest > 1:
        factors[-1] = 1.0
    total = torch.zeros_like(q)
    for factor in reversed(factors):  # Horner
        total = q @ (total + factor * eye)
    return eye + total


def turn(v: Tensor, blocks: Tensor) -> Tensor:
    """v R for a block-diagonal R: (..., n b), (n, b, b) -> (..., n b); one block serves all where n is 1."""
    n, b, _ = blocks.shape
    if n == 1:
        return (v.reshape(-1, b) @ blocks[0]).reshape(v.shape)
    side = max(k for k in (1, 2, 4, 8, 16) if n % k == 0 and (k == 1 or k * b <= WIDE))
    if side > 1 and v.numel() >= WIDE * n * b:  # small blocks joined: more zeros to multiply, but far fewer products
        eye = torch.eye(side, dtype=blocks.dtype, device=blocks.device)
        n, b = n // side, b * side
        blocks = torch.einsum("nkij,kl->nkilj", blocks.unflatten(0, (n, side)), eye).reshape(n, b, b)
    parts = v.reshape(-1, n, b).transpose(0, 1)  # (n, N, b)
    return parts.bmm(blocks).transpose(0, 1).reshape(v.shape)


def turn_pairs(v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Features j and j + h of each group of 2 h: (c_1 v_1 + s_1 v_2, c_2 v_2 + s_2 v_1).

    Args:
        v: (..., groups 2 h).
        cos, sin: (groups, 2, h), so s_1 is a negative sine.

    Returns:
        Like ``v``.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _TurnedPairs.apply(v, cos, sin)
    pairs = v.reshape(-1, *cos.shape)
    return torch.addcmul(pairs * cos, pairs.flip(2), sin).view(v.shape)


class _TurnedPairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(v if any(ctx.needs_input_grad[1:]) else None, cos, sin)
        return _turned(v, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        v, cos, sin = ctx.saved_tensors
        dv = _turned(grad, cos, sin.flip(1)) if ctx.needs_input_grad[0] else None
        if v is None:
            return dv, None, None
        g, v = (t.reshape(-1, *cos.shape) for t in (grad, v))
        product = g * v
        dcos = product.sum(0)
        torch.mul(g[:, :, 0], v[:, :, 1], out=product[:, :, 0])
        torch.mul(g[:, :, 1], v[:, :, 0], out=product[:, :, 1])
        return dv, dcos, product.sum(0)


def _turned(v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    pairs = v.reshape(-1, *cos.shape)
    out = pairs * cos
    out[:, :, 0].addcmul_(pairs[:, :, 1], sin[:, 0])
    out[:, :, 1].addcmul_(pairs[:, :, 0], sin[:, 1])
    return out.view(v.shape)


def reflections(u: Tensor) -> tuple[Tensor, Tensor]:
    """H_1 H_2 ... H_r = I - U S U^T, with H_i = I - 2 u_i u_i^T for the normalised columns of ``u``.

    S is upper triangular, and its inverse is the strictly upper part of U^T U plus I / 2, so the whole product acts in
    two thin products instead of r passes.

    Args:
        u: (k, r).

    Returns:
        U (k, r) with unit columns, S (r, r).
    """
    wide = u.to(torch.promote_types(u.dtype, torch.float32))
    unit = wide / wide.norm(dim=0).clamp_min(torch.finfo(wide.dtype).tiny)
    eye = torch.eye(u.shape[1], dtype=wide.dtype, device=u.device)
    inverse = torch.triu(unit.mT @ unit, 1) + 0.5 * eye
    return unit.to(u.dtype), torch.linalg.solve_triangular(inverse, eye, upper=True).to(u.dtype)


def nearest_divisor(n: int, wanted: int) -> int:
    """The divisor of ``n`` nearest to ``wanted``; of two equally near ones the smaller."""
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (abs(d - wanted), d))
