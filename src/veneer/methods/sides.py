"""What methods on either side of a layer share: its width, the direction of its channels, its bias, thin factors."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter, Additive, Base, Reweight, Weight
from veneer.core.cache import cached
from veneer.core.sites import Site
from veneer.ops.lowrank import LowRank


def columns(site: Site) -> int:
    """Columns of the weight seen as one matrix (out, in prod(kernel))."""
    return site.in_features * math.prod(site.kernel)


def channels(site: Site) -> int:
    """The dimension of the layer's output that its features lie along."""
    return -1 - len(site.kernel)


def along(site: Site, v: Tensor) -> Tensor:
    """(out,) in the shape that broadcasts over the layer's output."""
    return v.reshape(-1, *[1] * len(site.kernel))


def bears_bias(site: Site) -> bool:
    """Whether the layer has a bias, or could be given one."""
    return site.bias is not None or site.kind in ("linear", "conv") and site.maps_input


def bias_of(site: Site, x: Tensor, base: Base, trained: bool) -> Tensor | None:
    """The bias in ``base(x)``, ready to broadcast; where a ``trained`` one stands in, what the layer makes of zeros."""
    if site.bias is None:
        return None
    if trained:
        return base(torch.zeros_like(x if x.dim() == 1 else x[:1]))
    return along(site, site.bias)


class NoDropout:
    """In the place of a dropout that drops nothing."""

    p = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        return x


NO_DROPOUT = NoDropout()


def input_dropout(site: Site, p: float, field: str) -> nn.Dropout | NoDropout:
    """Dropout of what a layer is given; refused where only the weight can be reached."""
    if not 0 <= p < 1:
        raise ValueError(f"{field} must lie in [0, 1), not {p}.")
    if p and not site.maps_input:
        raise ValueError(
            f"{field}={p} drops a layer's input, but of '{site.path}' only the weight can be reached; set it to 0 or "
            "exclude the layer."
        )
    return nn.Dropout(p) if p else NO_DROPOUT


def down(site: Site, x: Tensor, a: Tensor) -> Tensor:
    """The layer's function with ``a`` (r, columns) for its weight: features last, (..., r)."""
    return site(x, a.reshape(-1, site.in_features, *site.kernel)).movedim(channels(site), -1)


def up(site: Site, h: Tensor, b: Tensor) -> Tensor:
    """(..., r), (out, r) -> the layer's output, features where the layer has them."""
    return nn.functional.linear(h, b).movedim(-1, channels(site))


def factored(site: Site, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The layer's function with ``b a`` for its weight; with groups through the product, else factor by factor."""
    if getattr(site, "groups", 1) > 1:
        return site(x, (b @ a).reshape(site.shape))
    return up(site, down(site, x, a), b)


FEW = 1 << 14
"""Of fewer numbers, a product and a sum take less time than what it takes to have them in one."""


def added(y: Tensor, h: Tensor, b: Tensor) -> Tensor:
    """``y + h b``, in one product: (..., out), (..., r), (r, n), where n divides out and h has as many rows as that."""
    if y.numel() < FEW and h.dim() == y.dim() and b.shape[1] == y.shape[-1]:
        return y + h @ b
    return torch.addmm(y.reshape(-1, b.shape[1]), h.reshape(-1, b.shape[0]), b).view(y.shape)


def added_by_row(y: Tensor, h: Tensor, b: Tensor) -> Tensor:
    """``y + h b``, each row of the batch with a b of its own: (rows, ..., out), (rows, tokens, r), (rows, r, out)."""
    if y.dtype is not h.dtype:
        return y + (h @ b).reshape(y.shape).to(y.dtype)
    return torch.baddbmm(y.reshape(len(h), -1, y.shape[-1]), h, b).view(y.shape)


def pays(site: Site, rank: int) -> bool:
    """Whether a training step through thin factors is less work than one through a change of the weight's size.

    Over the frozen layer's, the first is 6 N rank (in + out) FLOPs for N tokens, and the second 2 N in out.
    """
    width, rows = columns(site), site.out_features
    return 3 * rank * (width + rows) < width * rows


class Factored(Additive):
    """W' = W + B A, from factors that are computed: a method writes ``factors``, and names its input's dropout."""

    dropout: ClassVar[str | None] = None

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r), scales included."""
        raise NotImplementedError

    def known_factors(self) -> tuple[Tensor, Tensor]:
        """``factors``, in eval mode computed once."""
        return cached(self, "factors", self.factors, self.shared)

    def low_rank(self) -> LowRank | None:
        if self.site.kind != "linear":
            return None
        dropout = 0.0 if self.dropout is None or not self.training else getattr(self, self.dropout).p
        return LowRank(*self.known_factors(), 1.0, dropout)

    def delta(self, x: Tensor) -> Tensor:
        if self.dropout is not None and x.is_floating_point():
            x = getattr(self, self.dropout)(x)
        return factored(self.site, x, *self.known_factors())

    def delta_weight(self) -> Tensor:
        a, b = self.factors()
        return (b @ a).reshape(self.site.shape)


class Rotation(Adapter):
    """Features turned by R: ``y = base(x R)``, so W' = W R^T.

    A linear layer's input is turned, and its weight left alone, packed or not; a convolution's weight, seen as
    (out, in prod(kernel)), and a bare parameter's are turned row by row; an embedding's output is turned. A method
    writes ``turn``, and names in ``on_kernel`` the version of itself that reweights convolutions.
    """

    on_kernel: type[Rotation]

    def __init__(self, site: Site, config: Any):
        super().__init__(site, config)
        self.outside = site.kind == "embedding"
        self.width = site.out_features if self.outside else columns(site)

    @classmethod
    def build(cls, site: Site, config: Any, shared: nn.Module | None = None) -> Rotation:
        chosen = cls.on_kernel if site.kernel and not issubclass(cls, Reweight) else cls
        return chosen(site, config)

    def turn(self, v: Tensor, back: bool = False) -> Tensor:
        """v R, or v R^T with ``back``: (..., width)."""
        raise NotImplementedError

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if self.outside:
            y = base(x)
            return self.turn(y.to(self.dtype)).to(y.dtype)
        return base(self.turn(x.to(self.dtype)).to(x.dtype))

    def merged(self, weight: Tensor, bias: Tensor | None) -> Weight:
        if self.outside:
            return self.turn(weight.mT).mT, bias
        return self.turn(weight.flatten(1), back=True).view_as(weight), bias
