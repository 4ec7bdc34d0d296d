"""HRA: Householder Reflection Adaptation (Yuan et al., 2024, arXiv:2405.17484).

    W' = W H_1 .. H_r,   H_i = I - 2 u_i u_i^T / ||u_i||^2          u (in, r)

Columns start in equal pairs, whose reflections cancel. With ``apply_GS`` the columns are orthonormalised, so the
product is I - 2 U U^T, which is never the identity: there u starts at the r directions that W answers to least, which
leaves the function as near to the base as r reflections can, and equal to it where W has that many null directions.
The product is applied as I - U S U^T with S (r, r): 4 N r in FLOPs for N tokens, against 2 N in out of the layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.core.adapter import Reweight
from veneer.core.cache import cached
from veneer.core.config import LayerConfig
from veneer.core.registry import method
from veneer.core.sites import Site
from veneer.methods.sides import Rotation
from veneer.ops.rotation import reflections


@dataclass
class HRAConfig(LayerConfig):
    """Settings of HRA.

    Attributes:
        r: number of reflections.
        apply_GS: orthonormalise their directions.
        init_weights: True starts as the base model, False at random values.
    """

    r: int = 8
    apply_GS: bool = False
    exclude_modules: list[str] | set[str] | str | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    bias: str = "none"

    type: ClassVar[str | None] = "HRA"

    def check(self) -> None:
        """Refuse what cannot be honoured."""
        if self.r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {self.r}.")


@method("HRA", HRAConfig)
class HRA(Rotation):
    """A layer's input reflected r times."""

    def __init__(self, site: Site, config: HRAConfig):
        super().__init__(site, config)
        self.orthonormal = config.apply_GS
        if config.apply_GS and config.r > self.width:
            raise ValueError(
                f"HRA cannot orthonormalise r={config.r} directions at '{site.path}', whose width is {self.width}; "
                "lower r, or set apply_GS=False."
            )
        self.hra_u = nn.Parameter(self.start(config))

    def start(self, config: HRAConfig) -> Tensor:
        """(in, r): pairs, a left-over column among W's least directions; all columns there with Gram-Schmidt."""
        k, r = self.width, config.r
        if not config.init_weights:
            return torch.randn(k, r) / math.sqrt(r)
        pairs = 0 if config.apply_GS else r // 2
        half = torch.empty(k, pairs).uniform_(-1, 1) / math.sqrt(max(1, pairs))
        least = self._least(r - 2 * pairs) if r > 2 * pairs else torch.empty(k, 0)
        return torch.cat([half.repeat_interleave(2, dim=1), least.to(half)], dim=1)

    def _least(self, n: int) -> Tensor:
        """The n orthonormal directions of the turned side that W answers to least, (in, n)."""
        w = self.site.weight.detach()
        w = (w.mT if self.outside else w.flatten(1)).double()
        return torch.linalg.eigh(w.mT @ w).eigenvectors[:, :n].cpu()

    def product(self) -> tuple[Tensor, Tensor]:
        """U (in, r) and S (r, r), with H_1 .. H_r = I - U S U^T."""
        if not self.orthonormal:
            return reflections(self.hra_u)
        u = self.hra_u
        wide = torch.promote_types(u.dtype, torch.float32)
        return torch.linalg.qr(u.to(wide))[0].to(u.dtype), 2 * torch.eye(u.shape[1], dtype=u.dtype, device=u.device)

    def turn(self, v: Tensor, back: bool = False) -> Tensor:
        u, s = (t.to(v.dtype) for t in cached(self, "product", self.product))
        return v - (v @ u) @ (s if back else s.mT) @ u.mT


class HRAOnKernel(HRA, Reweight):
    """The reflections of a convolution's weight."""


HRA.on_kernel = HRAOnKernel
