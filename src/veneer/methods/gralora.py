"""GraLoRA: Granular Low-Rank Adaptation (Jung et al., 2025, arXiv:2505.20355).

    dW_ij = s B_ij A_ij         W cut into k x k blocks,  A_ij (r/k, in/k), B_ij (out/k, r/k),  s = alpha / (r + h)

plus a LoRA of rank h over the whole weight, if asked for. A starts Kaiming-uniform and B at zero. The rank of dW may
reach k r at LoRA's cost for rank r: 2 N r (in + out) FLOPs for N tokens, against 2 N in out of the layer. Where k r is
thin too, the grid is run as a LoRA of that rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.core.adapter import Additive
from veneer.core.cache import cached
from veneer.core.config import LayerConfig
from veneer.core.registry import method
from veneer.core.sites import Site
from veneer.methods.sides import columns, factored, input_dropout, pays
from veneer.ops.lowrank import LowRank


@dataclass
class GraloraConfig(LayerConfig):
    """Settings of GraLoRA.

    Attributes:
        r: rank that the k blocks of a row share.
        hybrid_r: rank h of the LoRA over the whole weight; 0: none.
        alpha: the change is scaled by alpha / (r + h).
        gralora_dropout: dropout on what the change reads, in training.
        gralora_k: k; must divide r and the layer's sides.
        init_weights: True starts as the base model, False at random values.
    """

    r: int = 32
    hybrid_r: int = 0
    alpha: int = 64
    gralora_dropout: float = 0.0
    gralora_k: int = 2
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    type: ClassVar[str | None] = "GRALORA"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gralora_k <= 0 or self.r <= 0 or self.r % self.gralora_k:
            raise ValueError(f"r should be divisible by gralora_k, both positive; got {self.r} and {self.gralora_k}.")
        if self.hybrid_r < 0:
            raise ValueError(f"hybrid_r must not be negative, not {self.hybrid_r}.")


@method("GRALORA", GraloraConfig)
class Gralora(Additive):
    """A grid of low-rank blocks."""

    def __init__(self, site: Site, config: GraloraConfig):
        super().__init__(site, config)
        k, r, h = config.gralora_k, config.r, config.hybrid_r
        rows, width = site.out_features, columns(site)
        if rows % k or width % k:
            raise ValueError(
                f"GraLoRA cuts the {rows} x {width} weight of '{site.path}' into gralora_k={k} parts each way, which "
                "must divide both; choose another gralora_k or exclude the layer."
            )
        self.k, self.scaling = k, config.alpha / (r + h)
        self.gralora_dropout = input_dropout(site, config.gralora_dropout, "gralora_dropout")
        bound = 1 / math.sqrt(width // k)
        a = torch.empty(k, width // k, r).uniform_(-bound, bound)
        b = torch.zeros(k, r, rows // k)
        if not config.init_weights:
            nn.init.uniform_(b, -1 / math.sqrt(r), 1 / math.sqrt(r))
        self.gralora_A = nn.Parameter(a)  # (column of blocks, in / k, r): r/k for each row of blocks
        self.gralora_B = nn.Parameter(b)  # (row of blocks, r, out / k): r/k for each column of blocks
        if h:
            whole, back = torch.empty(h, width), torch.zeros(rows, h)
            nn.init.kaiming_uniform_(whole, a=math.sqrt(5))
            if not config.init_weights:
                nn.init.kaiming_uniform_(back, a=math.sqrt(5))
            self.gralora_A_general = nn.ParameterDict({"weight": whole})
            self.gralora_B_general = nn.ParameterDict({"weight": back})

    @property
    def general(self) -> tuple[Tensor, Tensor] | None:
        """A (h, in) and B (out, h) of the LoRA beside the grid."""
        if not hasattr(self, "gralora_A_general"):
            return None
        return self.gralora_A_general["weight"], self.gralora_B_general["weight"]

    def low_rank(self) -> LowRank | None:
        """The grid as one product of rank k r, mostly of zeros, where that is thin: two products beat many."""
        h = 0 if self.general is None else len(self.general[0])
        if self.site.kind != "linear" or not pays(self.site, self.gralora_A.shape[2] * self.k + h):
            return None
        p = self.gralora_dropout.p if self.training else 0.0
        return LowRank(*cached(self, "factors", self.factors), self.scaling, p)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (k r + h, in) and B (out, k r + h), whose product is the change but for its scale."""
        k, eye = self.k, torch.eye(self.k, dtype=self.gralora_A.dtype, device=self.gralora_A.device)
        a = torch.einsum("jcis,jJ->ijsJc", self.gralora_A.unflatten(-1, (k, -1)), eye).flatten(3).flatten(0, 2)
        b = torch.einsum("ijso,iI->Ioijs", self.gralora_B.unflatten(1, (k, -1)), eye).flatten(2).flatten(0, 1)
        if self.general is None:
            return a, b
        whole, back = self.general
        return torch.cat([a, whole]), torch.cat([b, back], 1)

    def delta(self, x: Tensor) -> Tensor:
        if self.site.kernel or self.site.kind == "embedding":
            return super().delta(self.gralora_dropout(x) if x.is_floating_point() else x)
        x, k = self.gralora_dropout(x), self.k
        h = torch.einsum("...jc,jcr->...jr", x.unflatten(-1, (k, -1)), self.gralora_A)
        h = h.unflatten(-1, (k, -1)).transpose(-2, -3).flatten(-2)  # (..., row of blocks, column of blocks x r/k)
        y = torch.einsum("...ir,iro->...io", h, self.gralora_B).flatten(-2)
        if self.general is not None:
            y = y + factored(self.site, x, *self.general)
        return y * self.scaling

    def delta_weight(self) -> Tensor:
        k = self.k
        a = self.gralora_A.unflatten(-1, (k, -1))  # (j, in/k, i, r/k)
        b = self.gralora_B.unflatten(1, (k, -1))  # (i, j, r/k, out/k)
        change = torch.einsum("jcis,ijso->iojc", a, b).reshape(self.site.out_features, -1)
        if self.general is not None:
            whole, back = self.general
            change = change + back @ whole
        return self.scaling * change.reshape(self.site.shape)
