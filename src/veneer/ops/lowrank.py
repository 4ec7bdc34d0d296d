"""The low-rank branch of a linear layer, ``s (drop(x) A^T) B^T``: eager, and as one autograd function with the layer.

The eager form is the reference: every product on its own, all of them kept for backward. The fused form adds the branch
into the layer's own output, keeps x and the (N, r) product alone, draws the dropout mask again in backward from a
seed, computes in x's dtype (float32 factors over a half-precision layer are cast for the product, their gradients are
cast back), and adds the branch's gradient into the layer's own dX.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class LowRank(NamedTuple):
    """A branch ``scaling * (drop(x) a^T) b^T (+ scaling * bias)``: a (r, in), b (out, r), bias (out,) or None."""

    a: Tensor
    b: Tensor
    scaling: float
    dropout: float = 0.0
    bias: Tensor | None = None


def lowrank(
    x: Tensor, a: Tensor, b: Tensor, scaling: float, dropout: float = 0.0, bias: Tensor | None = None
) -> Tensor:
    """``scaling * (drop(x) a^T) b^T (+ scaling * bias)``, eager.

    Args:
        x: (..., in).
        a: (r, in).
        b: (out, r).
        scaling: the factor s.
        dropout: probability of dropping an entry of x; 0 outside training.
        bias: (out,) or None.

    Returns:
        (..., out), in the dtype of ``a``.
    """
    if dropout:
        x = F.dropout(x, dropout)
    y = F.linear(F.linear(x, a), b, bias)
    return y if scaling == 1 else y * scaling


def joined(branches: list[LowRank]) -> LowRank:
    """Several branches side by side in one: their ranks stacked, scaling 1; the mask is to hold their scalings.

    The branches must have no dropout (each would draw a mask of its own) and no bias.
    """
    return LowRank(torch.cat([low.a for low in branches]), torch.cat([low.b for low in branches], 1), 1.0)


def fused_linear(x: Tensor, weight: Tensor, bias: Tensor | None, low: LowRank, mask: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` plus the branch, in one function; W and bias are frozen.

    Args:
        x: (..., in).
        weight: (out, in), in x's dtype, frozen.
        bias: (out,) or None, frozen.
        low: the branch; its own bias must be None.
        mask: (N, r) or (1, r) factors of the inner product, for joined branches, where a row may use some of them only;
            N counts the rows of x flattened to (N, in).

    Returns:
        (..., out), in x's dtype.
    """
    a, b = low.a.to(x.dtype), low.b.to(x.dtype)
    if torch.is_grad_enabled() and (x.requires_grad or a.requires_grad or b.requires_grad):
        seed = int(torch.randint(2**62, ()).item()) if low.dropout else 0
        return _FusedLinear.apply(x, weight, bias, a, b, low.scaling, low.dropout, seed, mask)
    y = F.linear(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1])
    if low.dropout:
        flat = F.dropout(flat, low.dropout)
    h = flat @ a.t()
    if mask is not None:
        h = h * mask
    y.view(-1, y.shape[-1]).addmm_(h, b.t(), alpha=low.scaling)
    return y


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float, dropout: float,
        seed: int, mask: Tensor | None,
    ) -> Tensor:  # fmt: skip
        flat = x.reshape(-1, x.shape[-1])
        if dropout:
            keep, share = _dropout_mask(flat, dropout, seed)
            flat, scaling = flat * keep, scaling / share
        h = flat @ a.t()
        if mask is not None:
            h = h * mask
        y = F.linear(x, weight, bias)
        y.view(-1, y.shape[-1]).addmm_(h, b.t(), alpha=scaling)
        ctx.save_for_backward(x, weight, a, b, h, mask)
        ctx.rest = scaling, dropout, seed
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, h, mask = ctx.saved_tensors
        scaling, dropout, seed = ctx.rest  # the scaling already makes up for what is dropped
        g, flat = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        dx = da = db = None
        if ctx.needs_input_grad[4]:
            db = (h.t() @ g).t() * scaling  # the thin operand first: half the time of g^T h
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[3]:
            dh = g @ b
            if mask is not None:
                dh = dh * mask
            dh = dh * scaling
            keep = _dropout_mask(flat, dropout, seed)[0] if dropout else None
            if ctx.needs_input_grad[3]:
                da = dh.t() @ (flat if keep is None else flat * keep)
            if ctx.needs_input_grad[0]:
                dx = g @ weight
                dx = dx.addmm_(dh, a) if keep is None else dx.add_((dh @ a).mul_(keep))
                dx = dx.view_as(x)
        return dx, None, None, da, db, None, None, None, None


def _dropout_mask(x: Tensor, p: float, seed: int) -> tuple[Tensor, float]:
    """(which entries of x are kept, the share that is kept): a function of the seed, one random byte an entry.

    The probability is rounded to a 256th; the share kept is exact for what was rounded to.
    """
    cut = min(max(round(p * 256), 1), 255)
    generator = torch.Generator(x.device)
    generator.manual_seed(seed)
    words = torch.empty(-(-x.numel() // 8), dtype=torch.int64, device=x.device)
    words.random_(-(2**63), None, generator=generator)  # all 64 bits
    return words.view(torch.uint8)[: x.numel()].view_as(x) >= cut, 1 - cut / 256
