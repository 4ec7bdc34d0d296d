"""DEFT: Decompositional Efficient Fine-Tuning (NeurIPS 2025); PaRa: Parameter Rank Reduction (Chen et al., 2024,
arXiv:2410.14193).

    W' = (I - P q(P)^T) W + s P R       P (out, r), R (r, in),  q(P) = relu(P);  or P <- Q of QR(P) and q(P) = P

What W writes into the span of P is taken out, and R written there instead; R starts at q(P)^T W / s, so the start is
the base model. PaRa only takes out. The layer's own output is used: 2 N r (in + 2 out) FLOPs for N tokens, against
2 N in out of the layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter, Base, Reweight, Weight
from veneer.core.cache import cached
from veneer.core.config import LayerConfig
from veneer.core.registry import method
from veneer.core.sites import Site
from veneer.methods.sides import added, bias_of, channels, columns, down, input_dropout, up


@dataclass
class DeftConfig(LayerConfig):
    """Settings of DEFT.

    Attributes:
        r: rank of what is taken out and written.
        decomposition_method: q(P): "relu" or "qr".
        init_scale: spread of the draws where ``init_weights`` is False.
        alpha: s is alpha / r; None: 1.
        para: only take out, write nothing (PaRa).
        deft_dropout: dropout on what the change reads, in training.
        init_weights: True starts as the base model, False at random values.

    Raises:
        ValueError: an unknown ``decomposition_method``.
    """

    r: int = 8
    exclude_modules: list[str] | set[str] | str | None = None
    decomposition_method: str = "relu"
    init_scale: float = 1.0
    alpha: int | None = None
    para: bool = False
    fan_in_fan_out: bool = False
    deft_dropout: float = 0.0
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    bias: str = "none"

    type: ClassVar[str | None] = "DEFT"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decomposition_method not in ("relu", "qr"):
            raise ValueError(f"decomposition_method must be 'relu' or 'qr', not '{self.decomposition_method}'.")

    def check(self) -> None:
        """Refuse what cannot be honoured."""
        if self.r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {self.r}.")


@method("DEFT", DeftConfig)
class Deft(Adapter):
    """A subspace of a layer's outputs, emptied and written anew."""

    @classmethod
    def build(cls, site: Site, config: DeftConfig, shared: nn.Module | None = None) -> Adapter:
        if getattr(site, "groups", 1) == 1:
            return cls(site, config)
        if config.deft_dropout:
            raise ValueError(
                f"deft_dropout={config.deft_dropout} at '{site.path}' needs a layer without groups, because there the "
                "weight alone is changed; set it to 0 or exclude the layer."
            )
        return DeftOnWeight(site, config)

    def __init__(self, site: Site, config: DeftConfig):
        super().__init__(site, config)
        r, self.scaling = config.r, 1.0 if config.alpha is None else config.alpha / config.r
        if config.decomposition_method == "qr" and r > site.out_features:
            raise ValueError(
                f"DEFT cannot orthonormalise r={r} directions of the {site.out_features} outputs of '{site.path}'; "
                "lower r, or use decomposition_method='relu'."
            )
        self.qr, self._bias_trains = config.decomposition_method == "qr", config.bias != "none"
        self.deft_dropout = input_dropout(site, config.deft_dropout, "deft_dropout")
        self.deft_P = nn.Parameter(0.02 * torch.randn(site.out_features, r))
        self.deft_R = None if config.para else nn.Parameter(self.start(config))

    @torch.no_grad()
    def start(self, config: DeftConfig) -> Tensor:
        """R (r, in) that writes back what is taken out; or a random one."""
        if not config.init_weights:
            return 0.02 * config.init_scale * torch.randn(config.r, columns(self.site))
        w = self.site.weight.flatten(1)
        w = w.to(torch.promote_types(w.dtype, torch.float32))
        return (self.projector()[1].to(w).mT @ w / self.scaling).to(self.deft_P.device)

    def projector(self) -> tuple[Tensor, Tensor]:
        """P and q(P), both (out, r)."""
        p = self.deft_P
        if not self.qr:
            return p, p.relu()
        q = torch.linalg.qr(p.to(torch.promote_types(p.dtype, torch.float32)))[0].to(p.dtype)
        return q, q

    def forward(self, x: Tensor, base: Base) -> Tensor:
        z = base(x)
        p, q = cached(self, "projector", self.projector)
        bias = bias_of(self.site, x, base, self._bias_trains)
        h = (z if bias is None else z - bias).to(p.dtype).movedim(channels(self.site), -1)
        h = -(h @ q)
        if self.deft_R is not None:
            given = self.deft_dropout(x.to(p.dtype)) if x.is_floating_point() else x
            h = h + self.scaling * down(self.site, given, self.deft_R)
        if self.site.kernel or z.dtype is not p.dtype:
            return z + up(self.site, h, p).to(z.dtype)
        return added(z, h, p.mT)

    def merged(self, weight: Tensor, bias: Tensor | None) -> Weight:
        p, q = (t.to(weight) for t in self.projector())
        w = weight.flatten(1)
        new = w - p @ (q.mT @ w)
        if self.deft_R is not None:
            new = new + self.scaling * p @ self.deft_R.to(w)
        return new.view_as(weight), bias


class DeftOnWeight(Deft, Reweight):
    """The same on the weight of a grouped convolution, whose outputs cannot be mixed."""
