"""The low-rank branch of a linear layer, ``g (x W^T + s (drop(x) A^T) B^T) + bias``: eager, and with the layer in one.

The eager form is the reference: every product on its own, all of them kept for backward. The fused form takes all the
layers that read the same x at once. It adds the branches into the layers' own outputs, keeps x and the (N, r) products
alone, computes in x's dtype (float32 factors over a half-precision layer are cast for the product, their gradients are
cast back), draws one dropout mask for all the branches, and adds every gradient of x into one buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.ops.kernels import kernel


class LowRank(NamedTuple):
    """A branch ``scaling * (drop(x) a^T) b^T (+ scaling * bias)``: a (r, in), b (out, r), bias (out,) or None.

    ``gain`` (out,) multiplies the layer and the branch together, but not the layer's bias (DoRA's m / n).
    """

    a: Tensor
    b: Tensor
    scaling: float
    dropout: float = 0.0
    bias: Tensor | None = None
    gain: Tensor | None = None


class Layer(NamedTuple):
    """A frozen linear layer: weight (out, in) in x's dtype, bias (out,) or None, and its branch, or None."""

    weight: Tensor
    bias: Tensor | None
    low: LowRank | None


PAIRED = 32
"""The largest rank for which one kernel that writes sums aside moves less than two products that each read it all."""


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
    return y if isinstance(scaling, float | int) and scaling == 1 else y * scaling


def joined(branches: list[LowRank]) -> LowRank:
    """Several branches side by side in one: their ranks stacked, scaling 1; the mask is to hold their scalings.

    The branches must have no dropout (each would draw a mask of its own), no bias and no gain.
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
    return fused_linears(x, [Layer(weight, bias, low)], mask)[0]


def fused_linears(x: Tensor, layers: Sequence[Layer], mask: Tensor | None = None) -> tuple[Tensor, ...]:
    """The outputs of several layers that read the same x, each with its branch; with dropout, under one mask.

    Args:
        x: (..., in).
        layers: their branches' dropout must be the same wherever there is a branch.
        mask: as in ``fused_linear``, over the branches' ranks side by side.

    Returns:
        (..., out) each, in x's dtype.
    """
    dropout, scalings, tensors = flattened(layers, x.dtype)
    if torch.is_grad_enabled() and (x.requires_grad or any(t is not None and t.requires_grad for t in tensors)):
        return _FusedLinears.apply(x, mask, dropout, scalings, *tensors)
    flat = x.reshape(-1, x.shape[-1])
    layers = parts(tensors, scalings)
    ran = run(flat, layers, mask, drop(flat, dropout, layers))
    return tuple([y.view(*x.shape[:-1], -1) for y in ran.ys])


# ---- the products, without autograd ---------------------------------------------------------------------------------
class Part(NamedTuple):
    """A layer and its branch as plain tensors in x's dtype (the gain in its own), scaled by ``scaling``."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None
    gain: Tensor | None
    scaling: float

    @property
    def rank(self) -> int:
        return 0 if self.a is None else self.a.shape[0]


class Dropped(NamedTuple):
    """What dropout left of x (N, in), and how the branches compute with it.

    With kernels, nothing of that size is stored: x is as it was, and the mask is drawn anew from its seed.
    """

    x: Tensor
    keep: Tensor
    """(N, in), which entries were kept (1) or not (0); with kernels, their seed."""
    share: float
    """Of the entries that are kept."""
    kernels: Any = None
    """``ops.triton.dropout``, if it runs."""

    @property
    def cut(self) -> int:
        return round(256 * (1 - self.share))

    def inner(self, a: Tensor) -> Tensor:
        """``a x^T``: (r, N)."""
        return a @ self.x.t() if self.kernels is None else self.kernels.inner(self.x, a, self.keep, self.cut).t()

    def outer(self, dh: Tensor) -> Tensor:
        """``dh x``, for dh (r, N): (r, in)."""
        return dh @ self.x if self.kernels is None else self.kernels.outer(self.x, dh, self.keep, self.cut)

    def masked(self, t: Tensor) -> Tensor:
        """``t``, another instance of what x was, dropped in place; with kernels as it is."""
        return t.mul_(self.keep) if self.kernels is None else t


def flattened(
    layers: Sequence[Layer], dtype: torch.dtype
) -> tuple[float, tuple[float, ...], tuple[Tensor | None, ...]]:
    """(dropout, scalings, five tensors a layer): what an autograd function can take."""
    tensors: list[Tensor | None] = []
    dropout = 0.0
    for weight, bias, low in layers:
        if low is None:
            tensors += (weight, bias, None, None, None)
            continue
        dropout = low.dropout or dropout
        tensors += (weight, bias, low.a.to(dtype), low.b.to(dtype), low.gain)
    return dropout, tuple([1.0 if low is None else low.scaling for _, _, low in layers]), tuple(tensors)


def parts(tensors: Sequence[Tensor | None], scalings: Sequence[float]) -> list[Part]:
    """The inverse of ``flattened``."""
    return [Part(*tensors[5 * i : 5 * i + 5], s) for i, s in enumerate(scalings)]  # type: ignore[arg-type, call-arg]


def drop(x: Tensor, p: float, layers: Sequence[Part]) -> Dropped | None:
    """Drop entries of x (N, in) by one random byte each; what is left is not scaled up.

    The probability is rounded to a 256th; the share kept is exact for what it was rounded to.
    """
    if not p:
        return None
    # A gain multiplies what the whole layer makes of the dropped x, which therefore must exist.
    found = kernel("dropout", x) if all(part.gain is None for part in layers) else None
    return dropped(x, p) if found is None else Dropped(x, found.draw(x.device), 1 - _cut(p) / 256, found)


def _cut(p: float) -> int:
    return min(max(round(p * 256), 1), 255)


def dropped(x: Tensor, p: float) -> Dropped:
    """``drop``, with the mask in memory."""
    cut = _cut(p)
    words = torch.randint(-(2**63), 2**63 - 1, (-(-x.numel() // 8),), device=x.device)  # all 64 bits
    # In bytes throughout: comparing into booleans, and multiplying by them, costs several times as much.
    keep = words.view(torch.uint8)[: x.numel()].view_as(x).ge_(cut)
    return Dropped(x * keep, keep, 1 - cut / 256)


class Ran(NamedTuple):
    """What ``run`` found: its outputs, and what ``back`` needs of it."""

    ys: list[Tensor]
    """(N, out) each."""
    h: Tensor | None
    """(total rank, N), the branches' inner products; None where there is no branch.

    They lie, and their gradients too, with the rank first: thin products are up to four times as fast that way round.
    """
    seen: Tensor
    """(N, in), the x that the branches saw."""
    measured: list[Tensor | None]
    """(N, out) each, where there is a gain: the output itself, or, under dropout, what the layer makes of ``seen``."""


def run(x: Tensor, layers: Sequence[Part], mask: Tensor | None = None, drop: Dropped | None = None) -> Ran:
    """The layers' outputs for x (N, in); under dropout, a gain acts as in ``b + W x + (g - 1) W drop(x) + ...``."""
    seen, share = (x, 1.0) if drop is None else (drop.x, drop.share)
    a = _stacked(layers)
    h = None if a is None else a @ seen.t() if drop is None else drop.inner(a)
    if h is not None and mask is not None:
        h = h * mask.t()
    ys: list[Tensor] = []
    measured: list[Tensor | None] = []
    start = 0
    for part in layers:
        y, g, scaling = F.linear(x, part.weight, part.bias), part.gain, part.scaling / share
        own = None if h is None else h[start : start + part.rank].t()
        z = None
        if part.b is not None and own is not None and g is None:
            y.addmm_(own, part.b.t(), alpha=scaling)
        elif part.b is not None and own is not None and g is not None and drop is None:
            z = y.addmm_(own, part.b.t(), alpha=scaling).mul_(g)
            if part.bias is not None:
                y.add_((1 - g) * part.bias)  # rather than adding it after the gain: exact where the gain is 1
        elif part.b is not None and own is not None and g is not None:
            z = F.linear(seen, part.weight)
            y.addcmul_(z, ((g - 1) / share).to(y.dtype)).addmm_(own, _scaled(part.b, g).t(), alpha=scaling)
        start += part.rank
        ys.append(y)
        measured.append(z)
    return Ran(ys, h, seen, measured)


class Gradients(NamedTuple):
    """Of x (or None), and of each layer's a, b and gain (or None)."""

    x: Tensor | None
    each: list[list[Tensor | None]]


def back(
    grads: Sequence[Tensor | None],
    seen: Tensor | None,
    layers: Sequence[Part],
    h: Tensor | None,
    measured: Sequence[Tensor | None],
    needs: Sequence[bool],
    mask: Tensor | None = None,
    drop: Dropped | None = None,
) -> Gradients:
    """The gradients of ``run``.

    Args:
        grads: of the outputs (N, out); None where an output was not used.
        seen: what ``run`` returned; None where no ``a`` needs a gradient.
        layers: as in ``run``.
        h: what ``run`` returned; None where no ``b`` and no gain needs a gradient.
        measured: what ``run`` returned, for layers whose gain needs a gradient.
        needs: whether x needs a gradient, and then, a layer at a time, whether its a, b and gain do.
        mask: as in ``run``.
        drop: of the dropout; its x is ``seen``.
    """
    keep, share = (None, 1.0) if drop is None else (drop.keep, drop.share)
    given = [(i, part, g) for i, (part, g) in enumerate(zip(layers, grads, strict=True)) if g is not None]
    each: list[list[Tensor | None]] = [[None, None, None] for _ in layers]
    starts = [sum(part.rank for part in layers[:i]) for i in range(len(layers))]
    dh = None
    if given and (needs[0] or any(needs[1::3])) and any(part.rank for part in layers):
        dh = given[0][2].new_zeros(sum(part.rank for part in layers), given[0][2].shape[0])
    direct: list[tuple[Tensor, Tensor]] = []  # products whose sum is x's gradient, but for what went through dropout
    through: list[tuple[Tensor, Tensor]] = []
    for i, part, g in given:
        b, scaling = part.b, part.scaling / share
        if part.gain is not None and b is not None:
            found = _through_gain(g, measured[i], part, keep is not None, share, needs[0])
            each[i][2] = found.gain
            if keep is None:
                g = found.grad
            else:
                b = _scaled(b, part.gain)
                through.append((found.grad, part.weight))
        direct.append((g, part.weight))
        if b is None or part.b is None:
            continue
        rows = slice(starts[i], starts[i] + part.rank)
        both = h is not None and dh is not None and part.gain is None and needs[3 * i + 2] and part.rank <= PAIRED
        if both and (found := kernel("pair", g, b, h)) is not None:
            inner, db = found.pair(g, b, h[rows])
            dh[rows], each[i][1] = inner.mul_(scaling), db.mul_(scaling).to(b.dtype)
            continue
        if h is not None and (needs[3 * i + 2] or each[i][2] is not None):
            db = (h[rows] @ g).t().mul_(scaling)
            if part.gain is not None and keep is not None:
                if each[i][2] is not None:
                    each[i][2] = each[i][2] + (db * part.b).sum(1, dtype=part.gain.dtype)
                db = _scaled(db, part.gain)
            each[i][1] = db if needs[3 * i + 2] else None
        if dh is not None:
            torch.mm((b.t() * scaling).contiguous(), g.t(), out=dh[rows])
    if dh is not None and mask is not None:
        dh *= mask.t()
    if dh is not None and seen is not None and any(needs[1::3]):
        of_a = dh @ seen if drop is None else drop.outer(dh)
        for i, da in enumerate(of_a.split([part.rank for part in layers])):
            each[i][0] = da if needs[3 * i + 1] and grads[i] is not None else None
    if not needs[0] or not direct:
        return Gradients(None, each)
    a = _stacked(layers)
    if drop is not None and drop.kernels is not None and dh is not None and a is not None:
        return Gradients(drop.kernels.spread(_summed(direct), dh, a, drop.keep, drop.cut), each)
    if dh is not None and a is not None:
        (direct if keep is None else through).append((dh.t(), a))
    dx = _summed(direct)
    return Gradients(dx if keep is None or not through else dx.addcmul_(_summed(through), keep), each)


def _summed(products: list[tuple[Tensor, Tensor]]) -> Tensor:
    (left, right), *rest = products
    total = left @ right
    for left, right in rest:
        total.addmm_(left, right)
    return total


def _stacked(layers: Sequence[Part]) -> Tensor | None:
    each = [part.a for part in layers if part.a is not None]
    return None if not each else each[0] if len(each) == 1 else torch.cat(each)


def _scaled(b: Tensor, gain: Tensor) -> Tensor:
    return (b * gain[:, None]).to(b.dtype)


class _Gain(NamedTuple):
    grad: Tensor
    """The output's gradient times the gain (under dropout, times (gain - 1) / share)."""
    gain: Tensor | None
    """The gain's own gradient; under dropout without the part that comes through the branch."""


def _through_gain(g: Tensor, z: Tensor | None, part: Part, drops: bool, share: float, scale: bool) -> _Gain:
    gain = part.gain
    assert gain is not None
    factor = (gain - 1) / share if drops else gain
    centre = part.bias if part.bias is not None and not drops else None
    if z is None:
        return _Gain(g * factor.to(g.dtype), None)
    if g.device.type in ("cpu", "cuda"):
        # Batch norm's backward in eval mode, with the factor for its weight, is g * factor and sum_n g (z - centre) in
        # one pass over g and z, and adds up in float32 where they are half.
        mean = torch.zeros_like(gain) if centre is None else centre.to(gain.dtype)
        shape = (1, g.shape[1], g.shape[0], 1)
        g, total, _ = torch.ops.aten.native_batch_norm_backward(
            g.contiguous().t().view(shape), z.contiguous().t().view(shape), factor, mean, torch.ones_like(gain),
            None, None, False, 0.0, [True, True, False],
        )  # fmt: skip
        g = g.view(shape[1], shape[2]).t()
    else:
        total = (g * (z if centre is None else z - centre)).sum(0, dtype=gain.dtype)
        g = g * factor.to(g.dtype)
    # A gain of exactly 0 hides what it multiplied; it gets no gradient.
    return _Gain(g, total / share if drops else total / torch.where(gain == 0, 1, gain))


class _FusedLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mask: Tensor | None, dropout: float, scalings: tuple[float, ...], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        flat, needs = x.reshape(-1, x.shape[-1]), which(ctx.needs_input_grad, 4)
        layers = parts(tensors, scalings)
        dropping = drop(flat, dropout, layers)
        ran = run(flat, layers, mask, dropping)
        outputs = tuple([y.view(*x.shape[:-1], -1) for y in ran.ys])
        measured = [o if z is y else z for o, y, z in zip(outputs, ran.ys, ran.measured, strict=True)]
        ctx.set_materialize_grads(False)
        ctx.rest = scalings, x.shape, None if dropping is None else dropping[2:]
        ctx.save_for_backward(
            (x if dropping is None else ran.seen) if any(needs[1::3]) else None,
            ran.h if any(needs[2::3]) or any(needs[3::3]) else None,
            mask,
            None if dropping is None else dropping.keep,
            *tensors,
            *[z if need else None for z, need in zip(measured, needs[3::3], strict=True)],
        )
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        seen, h, mask, keep, *rest = ctx.saved_tensors
        scalings, shape, dropping = ctx.rest
        tensors, measured = rest[: 5 * len(scalings)], rest[5 * len(scalings) :]
        seen = rows(seen)
        found = back(
            [rows(g) for g in grads], seen, parts(tensors, scalings), h, [rows(z) for z in measured],
            which(ctx.needs_input_grad, 4), mask, dropping and Dropped(seen, keep, *dropping),
        )  # fmt: skip
        dx = None if found.x is None else found.x.view(shape)
        return dx, None, None, None, *[t for each in found.each for t in (None, None, *each)]


def which(flags: Sequence[bool], before: int) -> list[bool]:
    """Of an autograd function's inputs, x first, then ``before - 1`` others, then five a layer: see ``back``."""
    of_layers = flags[before:]
    return [flags[0], *[of_layers[i + j] for i in range(0, len(of_layers), 5) for j in (2, 3, 4)]]


def rows(t: Tensor | None) -> Tensor | None:
    """(..., n) as (N, n)."""
    return None if t is None else t.reshape(-1, t.shape[-1])
