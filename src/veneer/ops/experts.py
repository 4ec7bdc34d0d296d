"""Fused experts with a low-rank branch each, on the tokens that are routed to them: no expert's delta is ever built.

    out_t = sum_k w_tk (V_e a(U_e x_t + b_e) + c_e)    e = index_tk,  U_e = W_e + s B_e A_e, and V_e likewise

Token copies are sorted by expert once, so that each expert is one product over neighbouring rows. For the backward pass
x, the first products and the thin ones are kept; the activation is computed again, and the gradient of the routing
weights comes from the gradient that is there anyway. Of the chosen experts alone anything is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Gate = Callable[[Tensor], Tensor]
"""(n, width of the first product) -> (n, what the second one reads): the activation."""


class Stack(NamedTuple):
    """Frozen matrices (E, out, in) and biases (E, out), with branches a (E, r, in), b (E, out, r) or none."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor | None = None
    b: Tensor | None = None
    scaling: float = 1.0


class Routing(NamedTuple):
    """Which rows of the sorted copies are whose."""

    token: Tensor
    """(n,), the token of each copy."""
    order: Tensor
    """(n,), the copy's place in ``index`` flattened."""
    experts: list[int]
    """Those with any copy, ascending."""
    sizes: list[int]
    """How many each of them has."""


def sorted_by_expert(index: Tensor, experts: int) -> Routing:
    """The copies (T, K) of tokens in the order of their experts."""
    flat = index.reshape(-1)
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=experts).tolist()
    chosen = [e for e, n in enumerate(counts) if n]
    return Routing(order // index.shape[1], order, chosen, [counts[e] for e in chosen])


def routed(x: Tensor, index: Tensor, weights: Tensor, first: Stack, second: Stack, gate: Gate) -> Tensor:
    """The experts' output for tokens x (T, d).

    Args:
        x: (T, d).
        index: (T, K), each token's experts.
        weights: (T, K), how much of each.
        first: what reads x.
        second: what reads the activation.
        gate: the activation.

    Returns:
        (T, d), in x's dtype.
    """
    tensors: list[Tensor | None] = []
    for stack in (first, second):
        a, b = (None if t is None else t.to(x.dtype) for t in (stack.a, stack.b))
        tensors += (stack.weight, stack.bias, a, b)
    scalings = first.scaling, second.scaling
    given = (x, weights, *tensors)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        tensors = [t if t is None or i % 4 < 2 else t.contiguous() for i, t in enumerate(tensors)]
        return _Routed.apply(x, weights, index, gate, scalings, *tensors)
    return _run(x, weights, index, gate, scalings, tensors)[0]


class _Kept(NamedTuple):
    routing: Routing
    inner: Tensor
    h: tuple[Tensor | None, Tensor | None]


def _run(
    x: Tensor, weights: Tensor, index: Tensor, gate: Gate, scalings: tuple[float, float], tensors: Sequence[Any]
) -> tuple[Tensor, _Kept]:
    routing = sorted_by_expert(index, tensors[0].shape[0])
    inner, h1 = _products(x.index_select(0, routing.token), routing, tensors[:4], scalings[0])
    rows, h2 = _products(gate(inner), routing, tensors[4:], scalings[1])
    rows.mul_(weights.reshape(-1).index_select(0, routing.order)[:, None].to(rows.dtype))
    return torch.zeros_like(x).index_add_(0, routing.token, rows), _Kept(routing, inner, (h1, h2))


def _products(rows: Tensor, routing: Routing, stack: Sequence[Any], scaling: float) -> tuple[Tensor, Tensor | None]:
    """Each expert's layer on its rows (n, in): (n, out), and the inner products (n, r)."""
    weight, bias, a, b = stack
    y = rows.new_empty(len(rows), weight.shape[1])
    own, ys = rows.split(routing.sizes), y.split(routing.sizes)
    for x, out, w in zip(own, ys, _of(weight.mT, routing), strict=True):
        torch.mm(x, w, out=out)
    h = None
    if a is not None:
        h = rows.new_empty(len(rows), a.shape[1])
        thin = zip(own, ys, h.split(routing.sizes), _of(a.mT, routing), _of(b.mT, routing), strict=True)
        for x, out, inner, down, up in thin:
            torch.mm(x, down, out=inner)
            out.addmm_(inner, up, alpha=scaling)
    if bias is not None:
        for out, c in zip(ys, _of(bias, routing), strict=True):
            out.add_(c)
    return y, h


def _of(stack: Tensor, routing: Routing) -> Sequence[Tensor]:
    """The chosen experts' matrices."""
    if 4 * len(routing.experts) < len(stack):
        return [stack[e] for e in routing.experts]
    whole = stack.unbind(0)
    return whole if len(routing.experts) == len(whole) else [whole[e] for e in routing.experts]


class _Back(NamedTuple):
    rows: Tensor | None
    a: Tensor | None
    b: Tensor | None


def _backward(
    dy: Tensor, rows: Tensor, h: Tensor | None, share: Tensor | None, routing: Routing, stack: Sequence[Any],
    scaling: float, needs: tuple[bool, bool, bool],
) -> _Back:  # fmt: skip
    """The gradients of ``_products``; ``share`` (n, 1) weighs the rows in those of a and b, but not in that of rows."""
    weight, _, a, b = stack
    dys = dy.split(routing.sizes)
    dx = rows.new_empty(len(rows), weight.shape[2]) if needs[0] else None
    dxs = [] if dx is None else dx.split(routing.sizes)
    if dx is not None:
        for g, out, w in zip(dys, dxs, _of(weight, routing), strict=True):
            torch.mm(g, w, out=out)
    if a is None or not any(needs):
        return _Back(dx, None, None)
    da, db = (torch.zeros_like(t) if need else None for t, need in zip((a, b), needs[1:], strict=True))
    if needs[0] or needs[1]:
        dh = dy.new_empty(len(dy), a.shape[1])
        for g, out, up in zip(dys, dh.split(routing.sizes), _of(b, routing), strict=True):
            torch.mm(g, up, out=out)
        dh.mul_(scaling)
        if dx is not None:
            for inner, out, down in zip(dh.split(routing.sizes), dxs, _of(a, routing), strict=True):
                out.addmm_(inner, down)
        if da is not None:
            dh = dh if share is None else dh * share
            for inner, x, out in zip(dh.split(routing.sizes), rows.split(routing.sizes), _of(da, routing), strict=True):
                torch.mm(inner.t(), x, out=out)
    if db is not None and h is not None:
        h = h * scaling if share is None else h * (scaling * share)
        few = len(dy) < 64 * len(routing.experts)
        for inner, g, out in zip(h.split(routing.sizes), dys, _of(db, routing), strict=True):
            if few:
                torch.mm(g.t(), inner, out=out)
            else:  # the thin operand first: half the time where the rows are many
                out.copy_((inner.t() @ g).t())
    return _Back(dx, da, db)


class _Routed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, index: Tensor, gate: Gate, scalings: tuple[float, float],
        *tensors: Tensor | None,
    ) -> Tensor:  # fmt: skip
        out, kept = _run(x, weights, index, gate, scalings, tensors)
        ctx.gate, ctx.scalings, ctx.routing = gate, scalings, kept.routing
        ctx.save_for_backward(x, weights, kept.inner, *kept.h, *tensors)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, inner, h1, h2, *tensors = ctx.saved_tensors
        routing, needs = ctx.routing, ctx.needs_input_grad
        dy = grad.index_select(0, routing.token)
        share = weights.reshape(-1).index_select(0, routing.order)[:, None].to(dy.dtype)
        with torch.enable_grad():
            leaf = inner.detach().requires_grad_()
            rows = ctx.gate(leaf)
        further = needs[0] or needs[7] or needs[8]
        second = _backward(
            dy, rows.detach(), h2, share, routing, tensors[4:], ctx.scalings[1],
            (further or needs[1], needs[11], needs[12]),
        )  # fmt: skip
        dweights = None
        if needs[1] and second.rows is not None:  # <dy, V a> = <V^T dy, a>, and V^T dy is there
            own = (second.rows * rows.detach()).sum(-1)
            if tensors[5] is not None:
                for g, part, c in zip(dy.split(routing.sizes), own.split(routing.sizes), _of(tensors[5], routing)):
                    part.add_(g @ c)
            dweights = torch.empty_like(own).index_copy_(0, routing.order, own).view(weights.shape).to(weights.dtype)
        dx, first = None, _Back(None, None, None)
        if further and second.rows is not None:
            (dinner,) = torch.autograd.grad(rows, leaf, second.rows.mul_(share))
            copies = x.index_select(0, routing.token)
            first = _backward(
                dinner, copies, h1, None, routing, tensors[:4], ctx.scalings[0], (needs[0], needs[7], needs[8])
            )
            if first.rows is not None:
                dx = torch.zeros_like(x).index_add_(0, routing.token, first.rows)
        return dx, dweights, None, None, None, None, None, first.a, first.b, None, None, second.a, second.b
