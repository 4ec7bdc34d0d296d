"""MoLE: Mixture of LoRA Experts (Wu, Huang, Wei, 2024, arXiv:2404.13628).

    E_i(x) = s_i B_i A_i x                                                     what trained LoRA i adds, i = 1..n
    G = softmax(normalise([E_1(x), ..., E_n(x)]) e / tau)                      e (n out, n), tau: all that trains
    y = W x + sum_i G_i E_i(x)

One gate per adapted layer. The paper flattens the whole text into the gate, which fixes its length; here the gate reads
each token (``gate="token"``) or the mean over the text's tokens without padding (``gate="sequence"``, which in
generation with a cache sees the new tokens alone). The experts come from the folders in ``adapters``; without any,
random ones stand in. e starts at zero: all gates are 1/n. The loss gains ``balance_weight`` (- sum_i log q_i), q_i the
mean of gate i over all layers and tokens of the batch. Cost per token beside the base layer: 2 n r (in + out) +
2 n r (r + n) FLOPs; it depends on the input, so it cannot be merged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter, Base
from veneer.core.config import LayerConfig
from veneer.core.registry import method
from veneer.core.sites import Site

EPS = 1e-5
"""Keeps the normalisation of experts that add nothing finite."""


@dataclass
class MoleConfig(LayerConfig):
    """Settings of MoLE.

    ``adapters`` maps a name for each trained LoRA to its folder; what else describes them is read off those folders:
    ``experts`` (their names), ``r`` (the largest of their ranks) and ``target_modules``. A saved mixture holds its
    experts, so the folders are not written down.

    Attributes:
        adapters: name: folder of each trained LoRA.
        experts: their names; filled in.
        r: the largest of their ranks; filled in.
        gate: what a gate reads: "token" or "sequence".
        balance_weight: weight of the balancing term in the loss.
    """

    adapters: dict[str, str] | None = field(default=None, metadata={"never_saved": True})
    experts: list[str] = field(default_factory=list)
    r: int = 8
    gate: str = "token"
    balance_weight: float = 0.5

    type: ClassVar[str | None] = "MOLE"

    def check(self) -> None:
        """Refuse a mixture of nothing and an unknown gate."""
        if not (self.experts or self.adapters) or len(set(self.experts)) != len(self.experts):
            raise ValueError(
                "MoLE mixes trained LoRAs under distinct names: give adapters={name: folder, ...}, not "
                f"{self.experts or self.adapters}."
            )
        if self.gate not in ("token", "sequence"):
            raise ValueError(f"gate must be 'token' or 'sequence', not '{self.gate}'.")
        if self.r < 1:
            raise ValueError(f"r must be positive, not {self.r}.")


class _Units(nn.Module):
    """All gated layers of one mixture, for the balance term, which is a property of them together."""

    def __init__(self) -> None:
        super().__init__()
        self.gated: list[Mole] = []

    def balance(self) -> Tensor | None:
        """- sum_i log q_i, n log n where the gates are even; None before a training forward."""
        seen = [unit.gates for unit in self.gated if unit.gates is not None]
        if not seen:
            return None
        q = torch.stack([g.to(seen[0].device) for g in seen]).mean(0)
        return -q.clamp_min(torch.finfo(q.dtype).tiny).log().sum()


@method("MOLE", MoleConfig)
class Mole(Adapter):
    """The frozen experts of one layer and its gate."""

    takes_shared = True
    zero_start = False
    wants = frozenset({"attention_mask"})

    @classmethod
    def plan(cls, config: MoleConfig, sites: Sequence[Site]) -> nn.Module:
        return _Units()

    def __init__(self, site: Site, config: MoleConfig, units: _Units):
        super().__init__(site, config)
        if site.kind not in ("linear", "conv1d_hf") or not site.maps_input:
            raise ValueError(
                f"MoLE gates the tokens of a linear layer, which '{site.path}' ({site.kind}) is not; mix adapters "
                "that leave it out."
            )
        n = len(config.experts)
        self.names, self.per_token, self.balance_weight = config.experts, config.gate == "token", config.balance_weight
        self.register_buffer("mole_A", torch.randn(n, config.r, site.in_features) / site.in_features**0.5)
        self.register_buffer("mole_B", torch.randn(n, site.out_features, config.r) / config.r)  # times s_i
        self.mole_gate = nn.Parameter(torch.zeros(n * site.out_features, n))
        self.mole_log_tau = nn.Parameter(torch.zeros(1))
        self.register_buffer("kept", torch.ones(n, dtype=torch.bool), persistent=False)
        self.gates: Tensor | None = None
        self.routed: Tensor | None = None
        units.gated.append(self)

    @torch.no_grad()
    def hold(self, experts: Sequence[tuple[Tensor, Tensor] | None]) -> None:
        """Take trained experts: for each (A (r_i, in), s_i B (out, r_i)), or None where it leaves this layer out."""
        self.mole_A.zero_()
        self.mole_B.zero_()
        for i, pair in enumerate(experts):
            if pair is not None:
                self.mole_A[i, : pair[0].shape[0]] = pair[0].to(self.mole_A)
                self.mole_B[i, :, : pair[1].shape[1]] = pair[1].to(self.mole_B)

    def keep(self, names: Iterable[str]) -> None:
        """Use these experts alone from now on; the gates are renormalised over them.

        Raises:
            ValueError: an unknown name, or none.
        """
        wanted = list(names)
        unknown = [name for name in wanted if name not in self.names]
        if unknown or not wanted:
            raise ValueError(f"Keep at least one of the experts {', '.join(self.names)}, not {wanted}.")
        self.kept.copy_(torch.tensor([name in wanted for name in self.names]))

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        h = (x.to(self.dtype) @ self.mole_A.flatten(0, 1).T).unflatten(-1, self.mole_A.shape[:2])  # (..., n, r)
        gates = self.weigh(h)
        self.gates = self._mean(gates) if self.training else None
        self.routed = gates if self.training else None
        gated = (gates.unsqueeze(-1).to(h.dtype) * h).flatten(-2)
        return y + (gated @ self.mole_B.transpose(1, 2).flatten(0, 1)).to(y.dtype)

    def weigh(self, h: Tensor) -> Tensor:
        """(..., n) gates, float32, from A_i x (..., n, r).

        E_i = B_i h_i is n times as wide as the layer, so its mean, variance and product with e are taken within the
        ranks: sum |E_i|^2 = sum h_i^T (B_i^T B_i) h_i, E e = sum h_i (B_i^T e_i).
        """
        h = h.float() if self.per_token or h.dim() < 4 else self._over_text(h.float())
        b, (n, out, _) = self.mole_B.float(), self.mole_B.shape
        e = self.mole_gate.float().unflatten(0, (n, out))
        mean = (h * b.sum(1)).sum((-2, -1)) / (n * out)
        square = torch.einsum("...nr,nrs,...ns->...", h, b.transpose(1, 2) @ b, h) / (n * out)
        product = h.flatten(-2) @ (b.transpose(1, 2) @ e).flatten(0, 1)  # (..., n)
        spread = (square - mean.square()).clamp(min=0) + EPS
        logits = (product - mean.unsqueeze(-1) * e.sum((0, 1))) * spread.rsqrt().unsqueeze(-1)
        logits = logits / self.mole_log_tau.float().exp()
        return logits.masked_fill(~self.kept, -torch.inf).softmax(-1)

    def _over_text(self, h: Tensor) -> Tensor:
        """(batch, 1, n, r): the mean over the tokens that are no padding."""
        mask = self._mask(h.shape[:2])
        if mask is None:
            return h.mean(1, keepdim=True)
        mask = mask.to(h)[:, :, None, None]
        return (h * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)

    def _mean(self, gates: Tensor) -> Tensor:
        """(n,): the mean over the tokens that are no padding."""
        mask = self._mask(gates.shape[:-1]) if gates.dim() == 3 else None
        if mask is None:
            return gates.flatten(0, -2).mean(0)
        return (gates * mask.to(gates)[..., None]).sum((0, 1)) / mask.sum().clamp(min=1)

    def _mask(self, shape: Sequence[int]) -> Tensor | None:
        mask = self.site.inputs.get("attention_mask")
        return mask if isinstance(mask, Tensor) and tuple(mask.shape) == tuple(shape) else None

    def penalty(self) -> Tensor | None:
        """The balance term, once for all layers: by the first of them."""
        units = self.shared
        if not self.balance_weight or not isinstance(units, _Units) or units.gated[0] is not self:
            return None
        term = units.balance()
        return None if term is None else self.balance_weight * term
