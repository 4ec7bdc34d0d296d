"""A linear layer whose weight's change is decided by few entries, in their places or in a transform's domain.

The gradient of n entries is n products of two columns, which for few entries is far less than the gradient of the whole
weight, 2 N in out FLOPs for N tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FEW = 24
"""An entry's own gradient costs about as much as that of this many in a product of matrices."""
CHUNK = 256
"""Entries at a time, so that what is gathered stays in the cache."""


def linear_by_entries(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    change: Callable[[Tensor], Tensor],
    gradient: Callable[[Tensor, Tensor], Tensor],
    again: bool = True,
) -> Tensor:
    """``x (W + D)^T + bias`` with D = ``change(values)``.

    Args:
        x: (..., in).
        weight: (out, in), frozen.
        bias: (out,) or None, frozen.
        values: (n,), the entries.
        change: linear, (n,) -> (out, in), a new tensor.
        gradient: its adjoint at the product of two matrices: (N, out), (N, in) -> (n,).
        again: W + D is made a second time for the backward pass, rather than kept.

    Returns:
        (..., out).
    """
    return _LinearByEntries.apply(x, weight, bias, values, change, gradient, again)


class _LinearByEntries(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, values, change, gradient, again):  # type: ignore[no-untyped-def]
        total = _sum(weight, change, values)
        ctx.change, ctx.gradient, ctx.dtype = change, gradient, values.dtype
        kept = (weight, values) if again else (total if ctx.needs_input_grad[0] else None, None)
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, *kept)
        return F.linear(x, total, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, kept, values), dx, dv = ctx.saved_tensors, None, None
        if ctx.needs_input_grad[0]:
            dx = grad @ (kept if values is None else _sum(kept, ctx.change, values))
        if x is not None:
            dv = ctx.gradient(grad.flatten(0, -2), x.flatten(0, -2)).to(ctx.dtype)
        return dx, None, None, dv, None, None, None


def _sum(weight: Tensor, change: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    return change(values).to(weight).add_(weight)


def at_entries(g: Tensor, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Entries of G X^T, one by one.

    Args:
        g: (out, N).
        x: (in, N).
        rows, columns: (n,) which.

    Returns:
        (n,).
    """
    each = zip(rows.split(CHUNK), columns.split(CHUNK), strict=True)
    return torch.cat([g.index_select(0, r).mul_(x.index_select(0, c)).sum(-1) for r, c in each])


def columns_of(g: Tensor, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``at_entries`` of G^T and X^T: nothing is turned, which pays where entries are fewer than the sides."""
    each = zip(rows.split(CHUNK), columns.split(CHUNK), strict=True)
    return torch.cat([g.index_select(1, r).mul_(x.index_select(1, c)).sum(0) for r, c in each])


def turned(t: Tensor) -> Tensor:
    """(N, k) -> (k, N)."""
    return t.t().contiguous()
