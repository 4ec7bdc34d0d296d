"""MoLA: MoE-LoRA with Layer-wise Expert Allocation (Gao et al., 2024, arXiv:2402.08562).

    y = W x + s sum_{e in TopK} g_e(x) B_e A_e x        A_e (r, in), B_e (out, r), s = alpha / r
    g = top-k of softmax(R x), renormalised             R (experts, in), one router per layer, each token by itself

Deeper layers get more experts ("2468": four groups of layers with 2, 4, 6, 8). The loss gains
``balance_weight`` E sum_e f_e P_e for each router, over the tokens that are no padding. B starts at zero, so the start
is the base model. Cost per token beside the base layer: 2 E r (in + out) + 2 E in FLOPs; it depends on the input, so it
cannot be merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import regex
import torch
from torch import Tensor, nn

from veneer.core.config import LayerConfig
from veneer.core.registry import method
from veneer.core.sites import Site
from veneer.methods.lora_experts import LoraExperts
from veneer.ops.gating import load_balance, top_k_softmax

PRESETS = {"2468": [2, 4, 6, 8], "8642": [8, 6, 4, 2], "8228": [8, 2, 2, 8], "5555": [5, 5, 5, 5], "8888": [8, 8, 8, 8]}
"""The paper's allocations: experts in each quarter of the layers, from the input up."""


@dataclass
class MolaConfig(LayerConfig):
    """Settings of MoLA.

    ``experts`` is a number for every layer, a list for equal groups of layers from the input up (one entry a layer, or
    fewer), or the name of one of the paper's allocations.

    Attributes:
        r: rank of each expert.
        lora_alpha: s is alpha / r.
        lora_dropout: dropout on what the change reads, in training.
        experts: a number for every layer, a list for groups of layers, or the name of an allocation.
        top_k: experts a token.
        balance_weight: weight of the balancing term in the loss.
        rank_pattern: name or regex of layers: their own rank.
    """

    r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    experts: int | list[int] | str = "2468"
    top_k: int = 2
    balance_weight: float = 1e-3
    rank_pattern: dict[str, int] = field(default_factory=dict)

    type: ClassVar[str | None] = "MOLA"
    patterns: ClassVar[dict[str, str]] = {"rank_pattern": "r"}

    def check(self) -> None:
        """Refuse an unknown allocation and more active experts than there are."""
        counts = self.groups()
        if any(n < 1 for n in counts) or self.r < 1 or self.top_k < 1:
            raise ValueError(
                f"experts, r and top_k must be positive, but are {self.experts}, {self.r} and {self.top_k}."
            )
        if self.top_k > min(counts):
            raise ValueError(
                f"top_k={self.top_k} is above the smallest number of experts, {min(counts)}; lower it or add experts."
            )

    def groups(self) -> list[int]:
        """Experts in each equal group of layers, from the input up."""
        if isinstance(self.experts, str):
            if self.experts not in PRESETS:
                raise ValueError(
                    f"experts='{self.experts}' is none of {', '.join(PRESETS)}; give one, a number or a list."
                )
            return PRESETS[self.experts]
        return [self.experts] if isinstance(self.experts, int) else list(self.experts)


@method("MOLA", MolaConfig)
class Mola(LoraExperts):
    """Routed LoRA experts around one linear layer."""

    prefix = "mola"

    @classmethod
    def plan(cls, config: MolaConfig, sites: Sequence[Site]) -> nn.Module | None:
        """Nothing is shared; each site is told how many experts its depth has."""
        depths = sorted({depth(site.path) for site in sites})
        groups = config.groups()
        for site in sites:
            site.experts = groups[depths.index(depth(site.path)) * len(groups) // len(depths)]
        return None

    def __init__(self, site: Site, config: MolaConfig):
        site.need_linear("MoLA routes the tokens of")
        super().__init__(site, config, site.experts)
        self.top_k = config.top_k

    def gates(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return top_k_softmax(logits, self.top_k)

    def penalty(self) -> Tensor | None:
        return balance(self._routing, self.balance_weight, self.site.inputs.get("attention_mask"))


def balance(routing: tuple[Tensor, Tensor] | None, weight: float, attention_mask: Any) -> Tensor | None:
    """A router's balance term for its last training forward, without the padding that the model's mask names.

    Raises:
        ValueError: the forward ran without gradients, as reentrant checkpointing does.
    """
    if routing is None or not weight:
        return None
    gates, p = (t.flatten(0, -2) for t in routing)
    if not p.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "The balance term has no gradient, because the layer ran under reentrant checkpointing; pass "
            "use_reentrant=False."
        )
    mask = attention_mask.flatten() if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2 else None
    if mask is not None and mask.shape[0] != p.shape[0]:
        mask = None  # the layer saw other tokens than the model's input: a decoder's cache, or an encoder's output
    return weight * load_balance(gates, p, mask)


def depth(path: str) -> int:
    """The first number in a layer's path (its block), or 0."""
    found = regex.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
    return int(found.group(1)) if found else 0
