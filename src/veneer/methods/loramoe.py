"""LoRAMoE: world knowledge kept by experts of two kinds (Dou et al., 2023, arXiv:2312.09979).

    y = W x + s sum_e g_e(x) B_e A_e x        A_e (r, in), B_e (out, r), g = softmax(R x): every expert, each token

Experts are of two kinds, the first ``knowledge_experts`` for samples that keep the model's knowledge, the others for
the tasks. The localised balancing constraint adds ``balance_weight`` Var(Z) / Mean(Z) to the loss,

    Z = I * Q        Q[e, b] = mean of g_e over sample b's tokens; I[e, b] = 1 + d where both are of a kind, else 1 - d

(the paper has the sum, by which long samples count for more). The model's input ``sample_types`` (batch,) says 0 for
knowledge and 1 for task; without it I is 1. B starts at zero, so the start is the base model. Cost per token beside the
base layer: 2 E r (in + out) + 2 E in FLOPs; it depends on the input, so it cannot be merged.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from veneer.core.config import LayerConfig
from veneer.core.registry import method
from veneer.core.sites import Site
from veneer.methods.lora_experts import LoraExperts


@dataclass
class LoraMoeConfig(LayerConfig):
    """Settings of LoRAMoE; the paper sits at the linear layers of the feed-forward blocks.

    Attributes:
        r: rank of each expert.
        lora_alpha: s is alpha / r.
        lora_dropout: dropout on what the change reads, in training.
        experts: number of experts.
        knowledge_experts: how many of them are for samples that keep the model's knowledge.
        delta: d: how strongly the two kinds are told apart.
        balance_weight: weight of the balancing term in the loss.
        rank_pattern: name or regex of layers: their own rank.
    """

    r: int = 4
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    experts: int = 6
    knowledge_experts: int = 3
    delta: float = 0.1
    balance_weight: float = 0.1
    rank_pattern: dict[str, int] = field(default_factory=dict)

    type: ClassVar[str | None] = "LORAMOE"
    patterns: ClassVar[dict[str, str]] = {"rank_pattern": "r"}

    def check(self) -> None:
        """Refuse kinds of experts that do not add up."""
        if self.experts < 1 or self.r < 1:
            raise ValueError(f"experts and r must be positive, but are {self.experts} and {self.r}.")
        if not 0 <= self.knowledge_experts <= self.experts:
            raise ValueError(
                f"knowledge_experts={self.knowledge_experts} must lie between 0 and experts={self.experts}."
            )
        if not 0 <= self.delta <= 1:
            raise ValueError(f"delta must lie in [0, 1], not {self.delta}.")


@method("LORAMOE", LoraMoeConfig)
class LoraMoe(LoraExperts):
    """Densely gated LoRA experts of two kinds around one linear layer."""

    prefix = "loramoe"
    wants = frozenset({"attention_mask", "sample_types"})

    def __init__(self, site: Site, config: LoraMoeConfig):
        site.need_linear("LoRAMoE gates the tokens of")
        super().__init__(site, config, config.experts)
        self.knowledge, self.delta_ = config.knowledge_experts, config.delta

    def gates(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        p = logits.float().softmax(-1)
        return p, p

    def penalty(self) -> Tensor | None:
        if self.routed is None or not self.balance_weight:
            return None
        inputs = self.site.inputs
        return self.balance_weight * localised_balance(
            self.routed, self.knowledge, self.delta_, inputs.get("sample_types"), inputs.get("attention_mask")
        )


def localised_balance(
    gates: Tensor, knowledge: int, delta: float, sample_types: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Var(Z) / Mean(Z) of Z = I * Q; 0 where every expert is used as much as its kind should be.

    Args:
        gates: (batch, length, experts), or (batch, experts).
        knowledge: number of experts of the first kind.
        delta: how much more a sample's own kind of experts should be used.
        sample_types: (batch,), 0 for samples of the first kind, 1 for the others; None: no kinds.
        mask: (batch, length), 0 for padding.
    """
    gates = gates if gates.dim() == 3 else gates.unsqueeze(1)
    if mask is None or mask.shape != gates.shape[:2]:
        mask = gates.new_ones(gates.shape[:2])
    mask = mask.to(gates)
    q = (gates * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)  # (batch, experts)
    if sample_types is not None:
        kind = torch.arange(gates.shape[-1], device=gates.device) >= knowledge  # (experts,)
        same = sample_types.to(gates.device).bool()[:, None] == kind
        q = q * torch.where(same, 1 + delta, 1 - delta)
    return q.var(unbiased=False) / q.mean()
