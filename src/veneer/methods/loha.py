"""LoHa: low-rank Hadamard product (FedPara: Hyeon-Woo et al., 2021, arXiv:2108.06098; LyCORIS: arXiv:2309.14859).

    W' = W + s (W1a W1b) * (W2a W2b)        elementwise, Wa (out, r), Wb (r, in), s = alpha / r: rank up to r^2

A convolution is seen as (out, in prod(kernel)); with ``use_effective_conv2d`` each product is a core over the kernel,
sum_ij t_ij Wa_i Wb_j with t (r, r, *kernel), Wa (r, out), Wb (r, in). Everything starts Kaiming-uniform but W2b (the
cores' W2b too), which is zero. Cost of a training step over the frozen layer's 4 N in out FLOPs for N tokens: as a
product of rank r^2, 6 N r^2 (in + out), the floor (at r = 8 and 512 to 512 features 1.38, to 1408 1.26, of the frozen
layer's); where that is more, the gradient of the whole change, 2 N in out. In eval the sum is built once and kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.core.adapter import Additive
from veneer.core.cache import cached
from veneer.core.config import LayerConfig
from veneer.core.registry import method
from veneer.core.sites import Site
from veneer.methods.sides import columns, pays
from veneer.ops.lowrank import LowRank


@dataclass
class LycorisConfig(LayerConfig):
    """What LoHa and LoKr have in common.

    Attributes:
        rank_pattern: name or regex of layers: their own rank.
        alpha_pattern: name or regex of layers: their own alpha.
        r: rank of the factors.
        alpha: the change is scaled by alpha / r.
        rank_dropout: share of the change's rows that are left out in a training step.
        module_dropout: how often the whole change is left out in training.
        use_effective_conv2d: factor a convolution's kernel as a core.
    """

    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int] = field(default_factory=dict)
    r: int = 8
    alpha: int = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False

    patterns: ClassVar[dict[str, str]] = {"rank_pattern": "r", "alpha_pattern": "alpha"}

    def check(self) -> None:
        """Refuse what cannot be honoured."""
        for r in (self.r, *self.rank_pattern.values()):
            if r <= 0:
                raise ValueError(f"`r` should be a positive integer value but the value passed is {r}.")
        for name in ("rank_dropout", "module_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), not {getattr(self, name)}.")


@dataclass
class LoHaConfig(LycorisConfig):
    """Settings of LoHa. ``init_weights=False`` draws W2b as well.

    Attributes:
        init_weights: True starts as the base model, False draws W2b as well.
    """

    init_weights: bool = True

    type: ClassVar[str | None] = "LOHA"


class Lycoris(Additive):
    """A dense change whose rows (``rank_dropout``), or which as a whole (``module_dropout``), drop out in training."""

    rescale = True
    """Rows that stay are scaled up to the same mean."""

    def __init__(self, site: Site, config: LycorisConfig):
        super().__init__(site, config)
        self.scaling = config.alpha / config.r
        self.rank_dropout, self.module_dropout = config.rank_dropout, config.module_dropout

    def kept(self, like: Tensor) -> Tensor | None:
        """(out,): how much of each row of the change stays in this call; None where all of it does."""
        if not self.training or not (self.rank_dropout or self.module_dropout):
            return None
        keep = torch.ones(self.site.out_features, device=like.device, dtype=like.dtype)
        if self.rank_dropout:
            keep = (torch.rand_like(keep) >= self.rank_dropout).to(like.dtype)
            if self.rescale:
                keep = keep / keep.mean().clamp_min(1 / len(keep))
        if self.module_dropout:
            keep = keep * (torch.rand((), device=like.device) >= self.module_dropout)
        return keep

    def delta(self, x: Tensor) -> Tensor:
        change = cached(self, "delta", self.delta_weight)
        keep = self.kept(change)
        if keep is not None:
            change = change * keep.view(-1, *[1] * (change.dim() - 1))
        return self.site(x, change)


@method("LOHA", LoHaConfig)
class LoHa(Lycoris):
    """The Hadamard product of two low-rank matrices."""

    def __init__(self, site: Site, config: LoHaConfig):
        super().__init__(site, config)
        r, out = config.r, site.out_features
        self.core = config.use_effective_conv2d and math.prod(site.kernel) > 1
        for i in (1, 2):
            if self.core:
                t, a, b = torch.empty(r, r, *site.kernel), torch.empty(r, out), torch.empty(r, site.in_features)
                self.register_parameter(f"hada_t{i}", nn.Parameter(nn.init.kaiming_uniform_(t, a=math.sqrt(5))))
            else:
                a, b = torch.empty(out, r), torch.empty(r, columns(site))
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            if i == 2 and config.init_weights:
                nn.init.zeros_(b)
            else:
                nn.init.kaiming_uniform_(b, a=math.sqrt(5))
            self.register_parameter(f"hada_w{i}_a", nn.Parameter(a))
            self.register_parameter(f"hada_w{i}_b", nn.Parameter(b))

    def product(self, i: int) -> Tensor:
        """The i-th low-rank factor, shaped like the weight."""
        a, b = getattr(self, f"hada_w{i}_a"), getattr(self, f"hada_w{i}_b")
        if self.core:
            return torch.einsum("ij...,io,jc->oc...", getattr(self, f"hada_t{i}"), a, b)
        return (a @ b).reshape(self.site.shape)

    def delta_weight(self) -> Tensor:
        return self.scaling * self.product(1) * self.product(2)

    @property
    def dense(self) -> bool:  # type: ignore[override]
        return not (self.training and (self.rank_dropout or self.module_dropout))

    def low_rank(self) -> LowRank | None:
        """The change as one product of rank r^2, whose columns are products of columns, while that is less to train."""
        (a1, b1), (a2, b2) = (self.hada_w1_a, self.hada_w1_b), (self.hada_w2_a, self.hada_w2_b)
        thin = not self.core and pays(self.site, len(b1) * len(b2))
        if not (thin and self.training and self.dense) or self.site.kind != "linear":
            return None
        a, b = (b1[:, None] * b2).flatten(0, 1), (a1[..., None] * a2[:, None]).flatten(1)
        return LowRank(a, b, self.scaling)

    # ---- the peer's cores have two kernel dimensions, also on a Conv1d ----------------------------------------------
    def outgoing(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v[..., None] if v.dim() == 3 else v for k, v in tensors.items()}

    def incoming(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        flat = len(self.site.kernel) == 1
        return {k: v.squeeze(-1) if flat and v.dim() == 4 else v for k, v in tensors.items()}
