"""A gated feed-forward block, ``down(act(gate(x)) * up(x))``, as one autograd function that computes its middle again.

Of the (N, width) tensors only gate(x) and up(x) are kept for the backward pass; act(gate(x)), the product, and what
dropout leaves of it are made again from them, element by element. x is kept once for both layers that read it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from veneer.ops.lowrank import Dropped, Layer, back, drop, flattened, parts, rows, run, which

Activation = Callable[[Tensor], Tensor]
"""Element-wise, without parameters."""


def gated(x: Tensor, gate: Layer, up: Layer, down: Layer, act: Activation) -> Tensor:
    """``down(act(gate(x)) * up(x))`` with the layers' branches.

    Args:
        x: (..., in).
        gate, up: what reads x; their branches' dropout must be the same where both have one.
        down: what reads the product.
        act: the activation.

    Returns:
        (..., out), in x's dtype.
    """
    first, scalings, tensors = flattened([gate, up], x.dtype)
    second, scaling, more = flattened([down], x.dtype)
    return _Gated.apply(x, act, (first, second), scalings + scaling, *tensors, *more)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, act: Activation, dropout: tuple[float, float], scalings: tuple[float, ...],
        *tensors: Tensor | None,
    ) -> Tensor:  # fmt: skip
        flat, needs = x.reshape(-1, x.shape[-1]), which(ctx.needs_input_grad, 4)
        layers = parts(tensors, scalings)
        outer = drop(flat, dropout[0], layers[:2])
        wide = run(flat, layers[:2], None, outer)
        middle = act(wide.ys[0]) * wide.ys[1]
        inner = drop(middle, dropout[1], layers[2:])
        last = run(middle, layers[2:], None, inner)
        y = last.ys[0].view(*x.shape[:-1], -1)
        measured = [*wide.measured, y if last.measured[0] is last.ys[0] else last.measured[0]]
        wants = [any(needs[1:7:3]), any(needs[2:7:3]) or any(needs[3:7:3]), needs[8] or needs[9]]
        ctx.rest = act, scalings, x.shape, [d and d[2:] for d in (outer, inner)]
        ctx.save_for_backward(
            (x if outer is None else outer.x) if wants[0] else None,
            None if outer is None else outer.keep,
            None if inner is None else inner.keep,
            *wide.ys,
            wide.h if wants[1] else None,
            last.h if wants[2] else None,
            *tensors,
            *[z if need else None for z, need in zip(measured, needs[3::3], strict=True)],
        )
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        seen, of_outer, of_inner, g, u, h_wide, h_last, *rest = ctx.saved_tensors
        act, scalings, shape, (outer, inner) = ctx.rest
        tensors, measured = rest[:15], [rows(z) for z in rest[15:]]
        layers, needs = parts(tensors, scalings), which(ctx.needs_input_grad, 4)
        with torch.enable_grad():
            leaf = g.detach().requires_grad_()
            a = act(leaf)
        middle = a.detach() * u
        if inner is not None:
            inner = Dropped(middle, of_inner, *inner)
            middle = inner.masked(middle)
        further = any(needs[:7])
        last = back([rows(grad)], middle, layers[2:], h_last, measured[2:], [further, *needs[7:]], None, inner)
        del middle, inner
        wide = None
        if last.x is not None:
            dup = last.x * a.detach()
            (dgate,) = torch.autograd.grad(a, leaf, last.x.mul_(u))
            seen = rows(seen)
            outer = outer and Dropped(seen, of_outer, *outer)
            wide = back([dgate, dup], seen, layers[:2], h_wide, measured[:2], needs[:7], None, outer)
        dx = None if wide is None or wide.x is None else wide.x.view(shape)
        each = [*(wide.each if wide is not None else [[None] * 3] * 2), *last.each]
        return dx, None, None, None, *[t for own in each for t in (None, None, *own)]
