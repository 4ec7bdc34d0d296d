"""What mixtures of LoRA experts share: the experts' factors, one upon the other, and a router over them."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter, Base
from veneer.core.sites import Site
from veneer.ops.gating import gated_lowrank


def expert_factors(experts: int, r: int, wide: int, out: int) -> tuple[nn.Parameter, nn.Parameter]:
    """A (experts, r, in), each Kaiming-uniform, and B (experts, out, r), zero."""
    a = torch.empty(experts, r, wide)
    for expert in a:
        nn.init.kaiming_uniform_(expert, a=math.sqrt(5))
    return nn.Parameter(a), nn.Parameter(torch.zeros(experts, out, r))


class LoraExperts(Adapter):
    """``y = base(x) + s sum_e g_e(x) B_e A_e x`` around one linear layer: a method says what the gates g are.

    Args:
        site: the layer.
        config: with ``r``, ``lora_alpha``, ``lora_dropout`` and ``balance_weight``.
        experts: how many.
    """

    prefix: ClassVar[str]
    wants = frozenset({"attention_mask"})

    def __init__(self, site: Site, config: Any, experts: int):
        super().__init__(site, config)
        self.scaling, self.balance_weight = config.lora_alpha / config.r, config.balance_weight
        self.dropout = nn.Dropout(config.lora_dropout)
        a, b = expert_factors(experts, config.r, site.in_features, site.out_features)
        router = nn.Parameter(torch.empty(experts, site.in_features))
        nn.init.kaiming_uniform_(router, a=math.sqrt(5))
        for name, parameter in (("A", a), ("B", b), ("router", router)):
            self.register_parameter(f"{self.prefix}_{name}", parameter)
        self._routing: tuple[Tensor, Tensor] | None = None

    def gates(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The gates, and the router's probabilities, (..., experts) each as the logits are; float32."""
        raise NotImplementedError

    def forward(self, x: Tensor, base: Base) -> Tensor:
        a, b, router = (getattr(self, f"{self.prefix}_{name}") for name in ("A", "B", "router"))
        y = base(x)
        h = x.to(a.dtype)
        routing = self.gates(h @ router.T)
        self._routing = routing if self.training else None
        return y + (self.scaling * gated_lowrank(self.dropout(h), a, b, routing[0])).to(y.dtype)

    @property
    def routed(self) -> Tensor | None:
        """(..., experts): the gates of the last training forward."""
        return None if self._routing is None else self._routing[0]
