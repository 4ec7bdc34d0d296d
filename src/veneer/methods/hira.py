"""HiRA: Parameter-Efficient Hadamard High-Rank Adaptation (Huang et al., ICLR 2025).

    W' = W * (1 + B A)      elementwise,  A (r, in), B (out, r)

A starts Kaiming-uniform and B at zero. The weight is reweighted in 2 r in out FLOPs, and the layer runs once, as it
would without; its gradient, which A and B need, is 2 N in out for N tokens, so the floor of a training step is 1.5
times the frozen layer's. In eval the product is kept: one more weight. An embedding scales its looked-up rows: 2 N r
dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter, Base, Reweight, Weight
from veneer.core.config import LayerConfig
from veneer.core.registry import method
from veneer.core.sites import Site
from veneer.methods.sides import columns, input_dropout


@dataclass
class HiraConfig(LayerConfig):
    """Settings of HiRA. ``init_weights``: True, "gaussian" (A normal), False (both normal).

    Attributes:
        r: rank of the factor.
        hira_dropout: dropout on what the change reads, in training.
        init_weights: True, "gaussian" (A normal), or False (both normal).
        rank_pattern: name or regex of layers: their own rank.
    """

    r: int = 32
    exclude_modules: list[str] | set[str] | str | None = None
    hira_dropout: float = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool | str | None = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)

    type: ClassVar[str | None] = "HIRA"
    patterns: ClassVar[dict[str, str]] = {"rank_pattern": "r"}

    def check(self) -> None:
        """Refuse what cannot be honoured."""
        for r in (self.r, *self.rank_pattern.values()):
            if r <= 0:
                raise ValueError(f"`r` should be a positive integer value but the value passed is {r}.")
        if self.init_weights not in (True, False, None, "gaussian"):
            raise ValueError(f"init_weights must be True, False or 'gaussian', not '{self.init_weights}'.")


class HiraFactors(Adapter):
    """A and B, and the reweighted weight."""

    def __init__(self, site: Site, config: HiraConfig):
        super().__init__(site, config)
        self.hira_dropout = input_dropout(site, config.hira_dropout, "hira_dropout")
        a, b = torch.empty(config.r, columns(site)), torch.zeros(site.out_features, config.r)
        if config.init_weights is True or config.init_weights is None:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        else:
            nn.init.normal_(a, std=1 / config.r if config.init_weights == "gaussian" else 1.0)
        if config.init_weights is False:
            nn.init.normal_(b)
        if site.kernel:
            a, b = a.view(config.r, site.in_features, *site.kernel), b.view(*b.shape, *[1] * len(site.kernel))
        self.key = "hira_embedding_" if site.kind == "embedding" else "hira_"
        self.register_parameter(self.key + "A", nn.Parameter(a))
        self.register_parameter(self.key + "B", nn.Parameter(b))

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in), B (out, r)."""
        return getattr(self, self.key + "A").flatten(1), getattr(self, self.key + "B").flatten(1)

    def incoming(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        # The peer writes rank_pattern but makes every layer of rank r, so the file's own rank counts.
        for name in (self.key + "A", self.key + "B"):
            own, found = getattr(self, name), tensors.get(name)
            if found is not None and found.dim() == own.dim() and found.shape != own.shape:
                dim = 0 if name.endswith("A") else 1
                new = own.new_zeros(*own.shape[:dim], found.shape[dim], *own.shape[dim + 1 :])
                self.register_parameter(name, nn.Parameter(new, own.requires_grad))
        return tensors

    def merged(self, weight: Tensor, bias: Tensor | None) -> Weight:
        a, b = self.factors()
        return torch.addcmul(weight, weight, (b @ a).view_as(weight).to(weight)), bias


@method("HIRA", HiraConfig)
class Hira(HiraFactors, Reweight):
    """The weight multiplied by 1 + B A."""

    dense = True

    @classmethod
    def build(cls, site: Site, config: HiraConfig, shared: nn.Module | None = None) -> Adapter:
        if site.kind == "embedding":
            return HiraEmbedding(site, config)
        if not config.hira_dropout:
            return cls(site, config)
        return HiraDropped(site, config)


class HiraDropped(HiraFactors):
    """``y = base(x) + (W * B A) drop(x)``: the input of the change is dropped, so the layer runs twice."""

    reads_weight = True

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y, (a, b) = base(x), self.factors()
        weight = self.site.weight.to(a.dtype)
        return y + self.site(self.hira_dropout(x.to(a.dtype)), weight * (b @ a).view_as(weight)).to(y.dtype)


class HiraEmbedding(HiraFactors):
    """Looked-up rows multiplied by 1 + (B A)[:, id]."""

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y, (a, b) = base(x), self.factors()
        return (y * (1 + self.site.lookup(x, a.mT) @ b.mT)).to(y.dtype)
