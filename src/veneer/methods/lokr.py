"""LoKr: low-rank Kronecker product (LyCORIS: Yeh et al., 2023, arXiv:2309.14859).

    W' = W + s W1 (x) W2        W1 (o1, i1), W2 (o2, i2), o1 o2 = out, i1 i2 = in, s = alpha / r

Each dimension is split near its root, or with ``decompose_factor`` as the first part. W2 = W2a W2b of rank r where r is
below half its larger side, else it is a full matrix (W1 likewise, with ``decompose_both``); a convolution's kernel
belongs to W2, in ``use_effective_conv2d`` as a core, sum_ij t_ij W2a_i W2b_j. W1 (or W1a) starts at zero, the rest
Kaiming-uniform; with "lycoris" the zero sits in W2 (or W2b).

The product is not built in a forward: y = W1 X W2^T on the input as a matrix X (i1, i2), in 2 N (in o2 + i1 out) FLOPs
for N tokens, against 2 N in out of the layer. Grouped convolutions are the exception, and a Conv1d with a full W2,
where the peer's files mean W2 (x) W1, which is honoured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.core.cache import cached
from veneer.core.registry import method
from veneer.core.sites import Site
from veneer.methods.loha import Lycoris, LycorisConfig
from veneer.methods.sides import added


@dataclass
class LoKrConfig(LycorisConfig):
    """Settings of LoKr. ``init_weights``: True, "lycoris", or False (nothing zero).

    Attributes:
        decompose_both: factor W1 too where it is large.
        decompose_factor: first part of each dimension; -1: near its root.
        rank_dropout_scale: scale what ``rank_dropout`` leaves, so that its mean stays.
        init_weights: True, "lycoris", or False (nothing zero).
    """

    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    init_weights: bool | str = True

    type: ClassVar[str | None] = "LOKR"

    def check(self) -> None:
        """Refuse what cannot be honoured."""
        super().check()
        if self.init_weights not in (True, False, "lycoris"):
            raise ValueError(f"init_weights must be True, False or 'lycoris', not '{self.init_weights}'.")


def split(size: int, factor: int) -> tuple[int, int]:
    """Two factors of ``size``: ``factor`` first where it divides, else the largest divisor below it and the root."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    first = max(m for m in range(1, max(most, 1) + 1) if size % m == 0)
    return first, size // first


@method("LOKR", LoKrConfig)
class LoKr(Lycoris):
    """The Kronecker product of a small matrix and a larger one."""

    def __init__(self, site: Site, config: LoKrConfig):
        super().__init__(site, config)
        self.rescale = config.rank_dropout_scale
        r, kernel = config.r, site.kernel
        (o1, o2), (i1, i2) = (split(n, config.decompose_factor) for n in (site.out_features, site.in_features))
        self.sides = (o1, i1, o2, i2)
        zero_second = config.init_weights == "lycoris"
        zero_first = config.init_weights is True
        if config.decompose_both and 2 * r < max(o1, i1):
            self._add("lokr_w1_a", (o1, r), zero_first)
            self._add("lokr_w1_b", (r, i1), False)
        else:
            self._add("lokr_w1", (o1, i1), zero_first)
        full = 2 * r >= max(o2, i2)
        self.second_major = full and len(kernel) == 1
        if full:
            self._add("lokr_w2", (o2, i2, *kernel), zero_second)
        elif config.use_effective_conv2d and math.prod(kernel) > 1:
            self._add("lokr_t2", (r, r, *kernel), False)
            self._add("lokr_w2_a", (r, o2), False)
            self._add("lokr_w2_b", (r, i2), zero_second)
        else:
            self._add("lokr_w2_a", (o2, r), False)
            self._add("lokr_w2_b", (r, i2 * math.prod(kernel)), zero_second)

    def _add(self, name: str, shape: tuple[int, ...], zero: bool) -> None:
        value = torch.zeros(shape)
        self.register_parameter(name, nn.Parameter(value if zero else nn.init.kaiming_uniform_(value, a=math.sqrt(5))))

    def first(self) -> Tensor:
        """s W1, (o1, i1)."""
        w = self.lokr_w1 if hasattr(self, "lokr_w1") else self.lokr_w1_a @ self.lokr_w1_b
        return self.scaling * w

    def second(self) -> Tensor:
        """W2, (o2, i2, *kernel)."""
        _, _, o2, i2 = self.sides
        if hasattr(self, "lokr_w2"):
            return self.lokr_w2
        if hasattr(self, "lokr_t2"):
            return torch.einsum("ij...,io,jc->oc...", self.lokr_t2, self.lokr_w2_a, self.lokr_w2_b)
        return (self.lokr_w2_a @ self.lokr_w2_b).reshape(o2, i2, *self.site.kernel)

    def delta_weight(self) -> Tensor:
        w1, w2 = self.first(), self.second()
        major = "cadbk" if self.second_major else "acbdk"
        w2 = w2.reshape(*w2.shape[:2], -1)  # (o2, i2, places in the kernel)
        return torch.einsum(f"ab,cdk->{major}", w1, w2).reshape(self.site.shape)

    def inner(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """s W1 X (..., o1, i2) and W2; in training, of a W2 that is factored, s W1 X W2b^T (..., o1, r) and W2a."""
        (_, i1, _, i2), w1 = self.sides, cached(self, "first", self.first)
        x = x.unflatten(-1, (i1, i2))
        if self.training and hasattr(self, "lokr_w2_b"):
            return w1 @ (x @ self.lokr_w2_b.mT), self.lokr_w2_a
        return w1 @ x, cached(self, "second", self.second)

    def onto(self, y: Tensor, x: Tensor) -> Tensor:
        plain = self.site.kind in ("linear", "conv1d_hf") and not (self.second_major or self.rank_dropout)
        if not plain or self.module_dropout or not x.dtype == y.dtype == self.dtype:
            return super().onto(y, x)
        h, last = self.inner(x)
        return added(y, h, last.mT)

    def delta(self, x: Tensor) -> Tensor:
        if self.second_major or getattr(self.site, "groups", 1) > 1:  # there the input falls into no blocks for W1
            return super().delta(x)
        (_, i1, _, i2), w1 = self.sides, cached(self, "first", self.first)
        w2 = cached(self, "second", self.second)
        keep = self.kept(w1)
        if self.site.kind == "embedding":
            y = torch.einsum("...o,...p->...op", w1.mT[x // i2], w2.mT[x % i2]).flatten(-2) * self.site.scale
            return y if keep is None else y * keep
        if not self.site.kernel:
            h, last = self.inner(x)
            y = (h @ last.mT).flatten(-2)
            return y if keep is None else y * keep
        n = len(self.site.kernel)
        batch = x.shape[: -1 - n]
        h = x.unflatten(-1 - n, (i1, i2)).flatten(0, len(batch))  # (batch i1, i2, *places): each block is an example
        h = self.site(h, w2).unflatten(0, (*batch, i1) if batch else (i1,))  # (*batch, i1, o2, *places)
        places = "xyz"[:n]
        y = torch.einsum(f"oi,...ip{places}->...op{places}", w1, h).flatten(-2 - n, -1 - n)
        return y if keep is None else y * keep.view(-1, *[1] * n)
