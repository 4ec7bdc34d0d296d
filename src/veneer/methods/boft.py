"""BOFT: Orthogonal Butterfly (Liu et al., 2023, arXiv:2311.06243).

    W' = diag(s) W R,  R = B_m .. B_1       B_j a butterfly of rotations of size b,  s (out, 1)

Factor j (from 0) couples half-blocks that lie 2^j half-blocks apart, so m = 1 is a block-diagonal rotation and
m = log2(in) factors of size 2 make a dense one. The coupling is a reshape, no permutation is stored. Each rotation is
(I + Q)(I - Q)^{-1} with Q = (X - X^T) / 2; X starts at zero, s at one. Cost: 2 N m b in FLOPs for N tokens, against
2 N in out of the layer; blocks below 32 are joined up to that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.core.adapter import Base, Reweight, Weight
from veneer.core.cache import cached
from veneer.core.config import LayerConfig
from veneer.core.registry import method
from veneer.core.sites import Site
from veneer.methods.sides import Rotation, along, bias_of
from veneer.ops.rotation import cayley, turn


@dataclass
class BOFTConfig(LayerConfig):
    """Settings of BOFT.

    Attributes:
        boft_block_size: size b of the rotations; 0 where ``boft_block_num`` is set.
        boft_block_num: number of rotations in a factor, instead of their size.
        boft_n_butterfly_factor: number m of factors.
        boft_dropout: share of the blocks that stay the identity in a training step.
        init_weights: True starts as the base model, False at random values.

    Raises:
        ValueError: not exactly one of ``boft_block_size`` and ``boft_block_num`` is set.
    """

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    exclude_modules: list[str] | set[str] | str | None = None
    boft_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    type: ClassVar[str | None] = "BOFT"

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.boft_block_size) == bool(self.boft_block_num):
            raise ValueError(
                "Give either boft_block_size or boft_block_num and set the other to 0; got "
                f"{self.boft_block_size} and {self.boft_block_num}."
            )

    def check(self) -> None:
        """Refuse what cannot be honoured."""
        if self.boft_n_butterfly_factor < 1:
            raise ValueError(f"boft_n_butterfly_factor must be at least 1, not {self.boft_n_butterfly_factor}.")
        if not 0 <= self.boft_dropout < 1:
            raise ValueError(f"boft_dropout must lie in [0, 1), not {self.boft_dropout}.")


@method("BOFT", BOFTConfig)
class BOFT(Rotation):
    """Butterfly rotation of a layer's input, and a scale for each output."""

    def __init__(self, site: Site, config: BOFTConfig):
        super().__init__(site, config)
        k, m = self.width, config.boft_n_butterfly_factor
        self.b, self.p = config.boft_block_size or k // config.boft_block_num, config.boft_dropout
        if (config.boft_block_num and k % config.boft_block_num) or k % self.b:
            raise ValueError(
                f"BOFT cuts the width {k} of '{site.path}' into equal blocks, but boft_block_size="
                f"{config.boft_block_size}, boft_block_num={config.boft_block_num} does not divide it."
            )
        if m > 1 and (self.b % 2 or k % (self.b << (m - 1))):
            raise ValueError(
                f"{m} butterfly factors at '{site.path}' need an even block size b with b 2^{m - 1} dividing its width "
                f"{k}, but b is {self.b}; lower boft_n_butterfly_factor or change boft_block_size."
            )
        self._bias_trains = config.bias != "none"
        shape = (m, k // self.b, self.b, self.b)
        self.boft_R = nn.Parameter(torch.zeros(shape) if config.init_weights else 0.1 * torch.randn(shape))
        s = (1, site.out_features) if site.kernel else (site.out_features, 1)
        self.boft_s = nn.Parameter(torch.ones(s) if config.init_weights else 1 + 0.1 * torch.randn(s))

    def factors(self) -> Tensor:
        """The rotations of all factors, (m, k / b, b, b), such that v R is v turned by each in order."""
        x = self.boft_R
        return cayley((x.mT - x) / 2)

    def turn(self, v: Tensor, back: bool = False) -> Tensor:
        factors = cached(self, "factors", self.factors).to(v.dtype)
        if self.training and self.p:
            drop = torch.rand(*factors.shape[:2], 1, 1, device=v.device) < self.p
            factors = torch.where(drop, torch.eye(self.b, dtype=v.dtype, device=v.device), factors)
        steps = list(enumerate(factors))
        for j, blocks in reversed(steps) if back else steps:
            v = self._butterfly(v, blocks.mT if back else blocks, j)
        return v

    def _butterfly(self, v: Tensor, blocks: Tensor, j: int) -> Tensor:
        """Turn with half-blocks 2^j apart brought together."""
        if j == 0:
            return turn(v, blocks)
        pairs = v.reshape(*v.shape[:-1], -1, 2, 1 << j, self.b // 2).transpose(-2, -3)  # (.., groups, 2^j, 2, b / 2)
        turned = turn(pairs.reshape(v.shape), blocks)
        return turned.reshape(pairs.shape).transpose(-2, -3).reshape(v.shape)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        z = super().forward(x, base)
        s, bias = along(self.site, self.boft_s.flatten()), bias_of(self.site, x, base, self._bias_trains)
        y = z.to(s.dtype) * s if bias is None else (z.to(s.dtype) - bias) * s + bias
        return y.to(z.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> Weight:
        weight, bias = super().merged(weight, bias)
        return weight * self.boft_s.view(-1, *[1] * (weight.dim() - 1)).to(weight), bias

    def incoming(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = tensors.get("boft_R")
        if found is not None and len(found) == 1 < len(self.boft_R):
            # Without its CUDA extension the peer trains one factor, whatever its config says.
            self.boft_R = nn.Parameter(self.boft_R.detach()[:1].clone(), self.boft_R.requires_grad)
        return tensors


class BOFTOnKernel(BOFT, Reweight):
    """The rotation and scale of a convolution's weight."""


BOFT.on_kernel = BOFTOnKernel
