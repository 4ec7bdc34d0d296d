"""Lily: Low-Rank Interconnected Adaptation across Layers (Zhong, Zhou et al., 2024, arXiv:2407.09946).

    y = W x + s (sum_e p_e B_e) A x     A (r, in) shared by ``stride_A`` neighbouring layers, B_e (out, r) by all
    p = mean over the sequence of softmax(R A x)        R (experts, r), one router per layer

Layers share by the last part of their names, so all of a model's ``q_proj`` have one set of B. The mean runs
over each sequence by itself, without padding; ``router_scope="batch"`` takes it over the whole batch, as the peer does
(there a row's output depends on its batch mates; files that the peer wrote are run so). B starts at zero, so the start
is the base model. Cost per token beside the base layer: 2 r (in + out + experts) FLOPs. It depends on the input, so it
cannot be merged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter, Base
from veneer.core.config import LayerConfig, newer
from veneer.core.registry import method
from veneer.core.sites import Site
from veneer.methods.sides import added_by_row


@dataclass
class LilyConfig(LayerConfig):
    """Settings of Lily. ``router_scope``: "sequence" (ours) or "batch" (the peer's).

    Attributes:
        r: rank.
        stride_A: how many neighbouring layers share an A.
        num_B: number of experts B_e.
        scaling: s.
        init_weights: True starts as the base model, False at random values.
        router_scope: what the router averages over: None or "sequence" each text, "batch" the whole batch, as the peer
            does.
    """

    r: int = 32
    stride_A: int = 1
    num_B: int = 2
    scaling: float = 1.0
    init_weights: bool = True
    router_scope: str | None = newer()

    type: ClassVar[str | None] = "LILY"

    def check(self) -> None:
        """Refuse sizes out of range; settle the scope for configs that no file gave."""
        if self.r < 1 or self.stride_A < 1 or self.num_B < 2:
            raise ValueError(
                f"Lily needs r >= 1, stride_A >= 1, num_B >= 2; they are {self.r}, {self.stride_A}, {self.num_B}."
            )
        if self.router_scope is None:
            self.router_scope = "batch" if getattr(self, "from_file", False) else "sequence"
        if self.router_scope not in ("sequence", "batch"):
            raise ValueError(f"router_scope must be 'sequence' or 'batch', not '{self.router_scope}'.")


@method("LILY", LilyConfig)
class Lily(Adapter):
    """One layer's router, around factors that it shares with others."""

    wants = frozenset({"attention_mask"})

    @classmethod
    def plan(cls, config: LilyConfig, sites: Sequence[Site]) -> None:
        """Hand each site the factors that it shares: A by runs of layers of one name, B by name."""
        named: dict[tuple[str, int, int], list[Site]] = {}
        for site in sites:
            name = site.path.rpartition(".")[2]
            named.setdefault((name, site.in_features, site.out_features), []).append(site)
        for group in named.values():
            up = nn.Linear(group[0].out_features, config.num_B * config.r, bias=False)
            nn.init.zeros_(up.weight) if config.init_weights else nn.init.kaiming_uniform_(up.weight, a=math.sqrt(5))
            for number, site in enumerate(group):
                if number % config.stride_A == 0:
                    down = nn.Linear(site.in_features, config.r, bias=False)
                    nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
                site.lily = down, up

    def __init__(self, site: Site, config: LilyConfig):
        super().__init__(site, config)
        site.need_linear("Lily routes the input of")
        self.r, self.experts, self.scaling, self.scope = config.r, config.num_B, config.scaling, config.router_scope
        self.lily_A, self.lily_B = site.lily
        self.lily_router = nn.Linear(config.r, config.num_B, bias=False)
        nn.init.kaiming_uniform_(self.lily_router.weight, a=math.sqrt(5))
        self.routed: Tensor | None = None

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        a = self.lily_A.weight
        h = x.to(a.dtype) @ a.T  # (..., r)
        p = self._shares(self.lily_router(h).softmax(-1))  # (rows or 1, experts)
        self.routed = p if self.training else None
        if h.numel() <= self.r * self.experts * len(p):  # few tokens for each mixture: all experts at once
            each = p.view(len(p), *[1] * (h.dim() - 2), -1, 1) * h.unsqueeze(-2)
            return y + (self.scaling * (each.flatten(-2) @ self.lily_B.weight)).to(y.dtype)
        b = self.lily_B.weight.unflatten(0, (self.experts, self.r))  # (experts, r, out)
        mixed = torch.einsum("ne,ero->nro", self.scaling * p, b)
        rows = h.unsqueeze(1) if h.dim() == 2 else h.flatten(1, -2)
        return added_by_row(y, rows, mixed.expand(len(rows), -1, -1))

    def _shares(self, p: Tensor) -> Tensor:
        """Mean of (batch, ..., experts) over each row's tokens, or over all tokens."""
        if self.scope == "batch":
            return p.flatten(0, -2).mean(0, keepdim=True)
        if p.dim() == 2:
            return p
        p = p.flatten(1, -2)
        mask: Any = self.site.inputs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.shape != p.shape[:2]:
            return p.mean(1)
        weight = mask.to(p.dtype).unsqueeze(-1)
        return (p * weight).sum(1) / weight.sum(1).clamp(min=1)
