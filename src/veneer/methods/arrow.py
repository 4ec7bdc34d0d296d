"""Arrow: zero-shot routing over a library of LoRAs (Ostapenko et al., 2024, arXiv:2405.11157); GenKnowSub.

    p_i = argmax_{|p| = 1} |B_i A_i p|                  the top right singular vector of expert i at this layer (in,)
    g = softmax(top-k of |p_i . x| / T)                 each token by itself
    y = W x + sum_i g_i s_i B_i A_i x

Nothing trains. With ``use_gks`` (GenKnowSub, arXiv:2505.10939) the mean A and the mean B of general-knowledge LoRAs are
first subtracted from A_i and B_i; the adapters' own tensors stay as they are. Cost per token beside the base layer:
2 n r (in + out) + 2 n in FLOPs; it depends on the input, so it cannot be merged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter, Base
from veneer.core.sites import Site
from veneer.methods.lora import Lora
from veneer.methods.lora_config import LoraConfig
from veneer.ops.gating import gated_lowrank


@Lora.variant("arrow_config")
class Arrow(Adapter):
    """Routes the tokens of one layer over the LoRAs that sit beside it, which need not be active."""

    looks_around = True
    fixed = frozenset({"lora_A.weight", "lora_B.weight"})

    def __init__(self, site: Site, config: LoraConfig):
        super().__init__(site, config)
        site.need_linear("Arrow routes the tokens of")
        self.options: Any = config.arrow_config
        self.lora_A, self.lora_B = site.factors(config.r)  # idle: the peer's files hold them
        for idle in (self.lora_A, self.lora_B):
            nn.init.zeros_(idle.weight)
        self.routed: Tensor | None = None
        self._seen: tuple[Any, tuple[Tensor, Tensor, Tensor]] | None = None

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        h = x.to(self.dtype)
        a, b, p = self.library()
        gates = self.gates(h, p)
        self.routed = gates if self.training else None
        return y + gated_lowrank(h, a, b, gates).to(y.dtype)

    def gates(self, x: Tensor, p: Tensor) -> Tensor:
        """(..., experts), float32: k of them non-zero, summing to 1."""
        likeness = (x.float() @ p.float().T).abs()
        values, chosen = likeness.topk(min(self.options.top_k, p.shape[0]), dim=-1)
        weights = (values / self.options.router_temperature).softmax(-1)
        return torch.zeros_like(likeness).scatter(-1, chosen, weights)

    def library(self) -> tuple[Tensor, Tensor, Tensor]:
        """A (experts, r, in), B (experts, out, r) times s_i, prototypes (experts, in); made anew where one changed.

        Raises:
            ValueError: no expert sits at this layer, or one that is no plain LoRA.
        """
        experts, general = self._named(self.options.task_adapter_names), []
        if self.options.use_gks:
            general = self._named(self.options.gks_adapter_names)
        mark = tuple((id(t), t._version, t.device, t.dtype) for e in [*experts, *general] for t in e.factors())
        if self._seen is None or self._seen[0] != mark:
            with torch.no_grad():
                self._seen = mark, self._stacked(experts, general)
        return self._seen[1]

    def _named(self, names: list[str] | None) -> list[Lora]:
        beside: Any = self.beside
        found = [beside[name] for name in names or () if name in beside]
        if not found:
            raise ValueError(
                f"Arrow finds none of its adapters {names} at '{self.site.path}'; load them under these names, or "
                "use create_arrow_model."
            )
        odd = next((e for e in found if type(e) is not Lora), None)
        if odd is not None:
            raise ValueError(f"Arrow routes over plain LoRA, but '{self.site.path}' has a {type(odd).__name__}.")
        return found

    def _stacked(self, experts: list[Lora], general: list[Lora]) -> tuple[Tensor, Tensor, Tensor]:
        pairs = [[t.to(self.dtype) for t in e.factors()] for e in experts]
        if general:
            ranks = {e.r for e in [*experts, *general]}
            if len(ranks) > 1:
                raise ValueError(f"GenKnowSub subtracts factors, so all ranks must be equal, not {sorted(ranks)}.")
            mean_a, mean_b = (torch.stack(t).mean(0) for t in zip(*(e.factors() for e in general), strict=True))
            pairs = [[a - mean_a.to(a), b - mean_b.to(b)] for a, b in pairs]
        r = max(a.shape[0] for a, _ in pairs)
        a = torch.stack([nn.functional.pad(a, (0, 0, 0, r - a.shape[0])) for a, _ in pairs])
        b = torch.stack([nn.functional.pad(b, (0, r - b.shape[1])) for _, b in pairs])
        scalings = torch.tensor([e.scaling for e in experts], device=b.device, dtype=b.dtype)
        prototypes = torch.stack([prototype(a, b) for a, b in pairs]).to(a)
        return a, b * scalings[:, None, None], prototypes


def prototype(a: Tensor, b: Tensor) -> Tensor:
    """(in,): the top right singular vector of B A, up to its sign, exactly and without forming B A.

    With A^T = Q R it is Q v, v the top right singular vector of the small B R^T.
    """
    q, r = torch.linalg.qr(a.double().T)  # (in, r), (r, r)
    small = b.double() @ r.T  # (out, r)
    _, vectors = torch.linalg.eigh(small.T @ small)  # ascending
    return q @ vectors[:, -1]
