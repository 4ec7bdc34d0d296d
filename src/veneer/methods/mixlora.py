"""MixLoRA: a feed-forward block as a sparse mixture of LoRA experts (Li et al., 2024, arXiv:2404.15159).

    FFN_e(x) = W_down'(e) (act(W_gate'(e) x) * W_up'(e) x)        W'(e) = W + s B_e A_e, W frozen and shared
    y = sum_{e in TopK} g_e(x) FFN_e(x)                           g = top-k of softmax(R x), renormalised

Put the feed-forward blocks ("mlp") into target_modules; linear layers that are named beside them (attention) get an
ordinary LoRA. W_gate x and W_up x are computed once for all experts; as the gates sum to 1, so is W_down, of the mixed
inner states: beside the base block a token costs E r ((4 + 2 k) d + 6 k f) + 2 E d FLOPs and k - 1 more activations,
and no token is sorted or dropped. The loss gains ``balance_weight`` E sum_e f_e P_e, f_e counted over the k slots (k
where even). B starts at zero, so the start is the base model. It depends on the input and cannot be merged.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter, Base
from veneer.core.config import LayerConfig
from veneer.core.registry import method
from veneer.core.sites import Site
from veneer.methods.lora import Lora
from veneer.methods.lora_config import LoraConfig
from veneer.methods.lora_experts import expert_factors
from veneer.methods.mola import balance
from veneer.ops.gating import top_k_softmax

PROJECTIONS = ("gate", "up", "down")


@dataclass
class MixLoraConfig(LayerConfig):
    """Settings of MixLoRA.

    Attributes:
        r: rank of each expert.
        lora_alpha: s is alpha / r.
        lora_dropout: dropout on what the change reads, in training.
        experts: number of experts.
        top_k: experts a token.
        router_init: spread of the router's start.
        balance_weight: weight of the balancing term in the loss.
        rank_pattern: name or regex of layers: their own rank.
    """

    r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    experts: int = 8
    top_k: int = 2
    router_init: float = 0.02
    balance_weight: float = 1e-3
    rank_pattern: dict[str, int] = field(default_factory=dict)

    type: ClassVar[str | None] = "MIXLORA"
    patterns: ClassVar[dict[str, str]] = {"rank_pattern": "r"}

    def check(self) -> None:
        """Refuse more active experts than there are."""
        if self.experts < 1 or self.r < 1:
            raise ValueError(f"experts and r must be positive, but are {self.experts} and {self.r}.")
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top_k={self.top_k} must lie between 1 and the number of experts, {self.experts}.")


@method("MIXLORA", MixLoraConfig)
class MixLora(Adapter):
    """The experts and the router of one feed-forward block."""

    wants = frozenset({"attention_mask"})

    @classmethod
    def on(cls, site: Site, config: Any, shared: nn.Module | None = None) -> Adapter:
        if site.kind != "opaque":
            plain = LoraConfig(r=config.r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout)
            return Lora.on(site, plain)
        return cls.build(site, config, shared)

    def __init__(self, site: Site, config: MixLoraConfig):
        super().__init__(site, config)
        block = site.module
        if not all(hasattr(block, f"{p}_proj") for p in PROJECTIONS) or not hasattr(block, "act_fn"):
            raise ValueError(
                f"MixLoRA needs a gated feed-forward block (gate_proj, up_proj, down_proj, act_fn), which "
                f"'{site.path}' ({type(block).__name__}) is not; name its linear layers instead, or use MoLA."
            )
        if _within(site.path, config.target_modules):
            raise ValueError(f"target_modules names '{site.path}' and layers inside it; name the block alone.")
        self.scaling, self.top_k, self.balance_weight = (
            config.lora_alpha / config.r,
            config.top_k,
            config.balance_weight,
        )
        self.dropout = nn.Dropout(config.lora_dropout)
        d, f = block.gate_proj.in_features, block.gate_proj.out_features
        for name, (wide, out) in {"gate": (d, f), "up": (d, f), "down": (f, d)}.items():
            a, b = expert_factors(config.experts, config.r, wide, out)
            self.register_parameter(f"mixlora_{name}_A", a)
            self.register_parameter(f"mixlora_{name}_B", b)
        self.mixlora_router = nn.Parameter(config.router_init * torch.randn(config.experts, d))
        self._routing: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, base: Base) -> Tensor:
        block = self.site.module
        gates, p = top_k_softmax(x.to(self.dtype) @ self.mixlora_router.T, self.top_k)
        self._routing = (gates, p) if self.training else None
        gate, up = block.gate_proj(x), block.up_proj(x)  # once, for every expert
        low_gate, low_up = self._reduced("gate", x), self._reduced("up", x)
        weights, chosen = gates.topk(self.top_k, dim=-1)
        inner, change = torch.zeros_like(gate), None
        for slot in range(self.top_k):
            one = torch.zeros_like(gates).scatter(-1, chosen[..., slot : slot + 1], 1.0)  # (..., E)
            share = weights[..., slot : slot + 1]
            opened = block.act_fn(gate + self._branch("gate", low_gate, one, gate.dtype))
            h = opened * (up + self._branch("up", low_up, one, up.dtype))
            inner = inner + share.to(h.dtype) * h
            part = self._branch("down", self._reduced("down", h), one * share, h.dtype)
            change = part if change is None else change + part
        return block.down_proj(inner) + change

    def _reduced(self, name: str, x: Tensor) -> Tensor:
        """A_e x of one projection for every expert: (..., E, r)."""
        a = getattr(self, f"mixlora_{name}_A")
        return (self.dropout(x.to(a.dtype)) @ a.flatten(0, 1).T).unflatten(-1, a.shape[:2])

    def _branch(self, name: str, low: Tensor, gates: Tensor, dtype: torch.dtype) -> Tensor:
        """s sum_e gates_e B_e low_e of one projection."""
        b = getattr(self, f"mixlora_{name}_B")
        gated = (low * gates.to(low.dtype).unsqueeze(-1)).flatten(-2)
        return (self.scaling * (gated @ b.transpose(1, 2).flatten(0, 1))).to(dtype)

    @property
    def routed(self) -> Tensor | None:
        """(..., experts): the gates of the last training forward."""
        return None if self._routing is None else self._routing[0]

    def penalty(self) -> Tensor | None:
        term = balance(self._routing, self.balance_weight, self.site.inputs.get("attention_mask"))
        return None if term is None else self.top_k * term  # f counts each of the k slots for one


def _within(path: str, names: Any) -> bool:
    leaves = {name.rpartition(".")[2] for name in names} if isinstance(names, list | set | tuple) else set()
    return bool(leaves & {f"{p}_proj" for p in PROJECTIONS})
