"""Fused experts with a low-rank branch each, on the tokens that are routed to them: no expert's delta is ever built.

    out_t = sum_k w_tk (V_e a(U_e x_t + b_e) + c_e)    e = index_tk,  U_e = W_e + s B_e A_e, and V_e likewise

Token copies are sorted by expert once, so that each expert is one product over neighbouring rows, and all of them are
one call of ``torch.nn.functional.grouped_mm`` where it takes such operands; a loop does the same. For the backward pass
x, the first products and the thin ones are kept; the activation is computed again, and the gradient of the routing
weights comes from the gradient that is there anyway. Where few experts are chosen, only those are read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
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
    ends: Tensor
    """(E,), where each expert's rows end, int32."""

    @property
    def few(self) -> bool:
        """Whether most experts have nothing to do, as for one token."""
        return 4 * len(self.experts) < len(self.ends)


def sorted_by_expert(index: Tensor, experts: int) -> Routing:
    """The copies (T, K) of tokens in the order of their experts."""
    flat = index.reshape(-1)
    order = flat.argsort(stable=True)
    counted = torch.bincount(flat, minlength=experts)
    counts = counted.tolist()
    chosen = [e for e, n in enumerate(counts) if n]
    return Routing(order // index.shape[1], order, chosen, [counts[e] for e in chosen], counted.cumsum(0).int())


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
        tensors += (stack.weight, stack.bias, a, None if b is None else b.mT)
    scalings = first.scaling, second.scaling
    given = (x, weights, *tensors)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        return _Routed.apply(x, weights, index, gate, scalings, *tensors)
    return _run(x, weights, index, gate, scalings, tensors)[0]


def _laid(tensors: Sequence[Any], routing: Routing) -> Sequence[Any]:
    """The same, and in each b (E, r, out) the outputs side by side, for products with most of them.

    That is one transposition away from a parameter whose experts lie side by side. It is done again for the backward
    pass: a copy of all experts' b would be the largest thing that is kept.
    """
    if routing.few:
        return tensors
    return [
        t if t is None or i % 4 < 3 or t.stride(2) == 1 else
        t.transpose(0, 1).flatten(0, 1).contiguous().unflatten(0, t.shape[1::-1]).transpose(0, 1)
        for i, t in enumerate(tensors)
    ]  # fmt: skip


class _Kept(NamedTuple):
    routing: Routing
    inner: Tensor
    h: tuple[Tensor | None, Tensor | None]


def _run(
    x: Tensor, weights: Tensor, index: Tensor, gate: Gate, scalings: tuple[float, float], tensors: Sequence[Any]
) -> tuple[Tensor, _Kept]:
    routing = sorted_by_expert(index, tensors[0].shape[0])
    tensors = _laid(tensors, routing)
    inner, h1 = _products(x.index_select(0, routing.token), routing, tensors[:4], scalings[0])
    rows, h2 = _products(gate(inner), routing, tensors[4:], scalings[1])
    rows.mul_(weights.reshape(-1).index_select(0, routing.order)[:, None].to(rows.dtype))
    return torch.zeros_like(x).index_add_(0, routing.token, rows), _Kept(routing, inner, (h1, h2))


def _products(rows: Tensor, routing: Routing, stack: Sequence[Any], scaling: float) -> tuple[Tensor, Tensor | None]:
    """Each expert's layer on its rows (n, in): (n, out), and the inner products (n, r)."""
    weight, bias, a, b = stack  # b as (E, r, out)
    y, h = _each(rows, weight.mT, routing), None
    if a is not None:
        h = _each(rows, a.mT, routing)
        y.add_(_each(h, b, routing), alpha=scaling)
    if bias is not None:
        for out, c in zip(y.split(routing.sizes), _of(bias, routing), strict=True):
            out.add_(c)
    return y, h


def _each(rows: Tensor, matrices: Tensor, routing: Routing) -> Tensor:
    """Each expert's matrix (E, k, l) on its rows (n, k): (n, l)."""
    if _grouped(rows, matrices, routing):
        return F.grouped_mm(rows, matrices, offs=routing.ends)
    out = rows.new_empty(len(rows), matrices.shape[2])
    for x, m, y in zip(rows.split(routing.sizes), _of(matrices, routing), out.split(routing.sizes), strict=True):
        torch.mm(x, m, out=y)
    return out


def _outer(left: Tensor, right: Tensor, like: Tensor, routing: Routing) -> Tensor:
    """Each expert's sum over its rows of left (n, k) times right (n, l): (E, k, l), lying as ``like`` does."""
    same = like.is_contiguous()
    if (same or left.is_cuda) and _grouped(left.t(), right, routing):
        out = F.grouped_mm(left.t(), right, offs=routing.ends)
        return out if same else torch.empty_like(like).copy_(out)
    out = torch.empty_like(like)  # keeps the strides
    if len(routing.experts) < len(out):
        out.zero_()
    for x, y, m in zip(left.split(routing.sizes), right.split(routing.sizes), _of(out, routing), strict=True):
        torch.mm(x.t(), y, out=m)
    return out


def _grouped(left: Tensor, right: Tensor, routing: Routing) -> bool:
    """Whether torch multiplies such operands in one call, and without going through experts that have no rows."""
    if left.is_cuda:  # as documented from Ampere on; on Blackwell and ROCm it is reported to fail
        fits = left.dtype is torch.bfloat16 and torch.version.hip is None
        fits = fits and (8, 0) <= torch.cuda.get_device_capability(left.device) < (10, 0)
    else:
        fits = left.device.type == "cpu" and left.dtype is torch.float32 and not routing.few
    return fits and hasattr(F, "grouped_mm") and _aligned(left) and _aligned(right)


def _aligned(t: Tensor) -> bool:
    """Whether the rows or the columns of its matrices lie side by side, each beginning at a multiple of 16 bytes."""
    strides, size = list(t.stride()), t.element_size()
    unit = next((i for i in (-1, -2) if strides[i] == 1), None)
    if unit is None:
        return False
    del strides[unit]
    return not any(stride * size % 16 for stride in strides) and t.data_ptr() % 16 == 0


def _of(stack: Tensor, routing: Routing) -> Sequence[Tensor]:
    """The chosen experts' matrices."""
    if routing.few:
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
    dx = _each(dy, weight, routing) if needs[0] else None
    da = db = None
    if a is not None and (needs[0] or needs[1]):
        dh = _each(dy, b.mT, routing).mul_(scaling)
        if dx is not None:
            dx.add_(_each(dh, a, routing))
        if needs[1]:
            da = _outer(dh if share is None else dh * share, rows, a, routing)
    if h is not None and needs[2]:
        db = _outer(h * scaling if share is None else h * (scaling * share), dy, b, routing)
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
        tensors = _laid(tensors, routing)
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
