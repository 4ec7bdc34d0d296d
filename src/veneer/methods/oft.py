"""OFT: Orthogonal Finetuning (Qiu et al., 2023, arXiv:2306.07280), input-centric as OFTv2 (Qiu et al., 2025,
arXiv:2506.19847).

    y = W (R^T x) + b,  W' = W R^T      R = diag(R_1 .. R_n),  R_i = (I + Q_i)(I - Q_i)^{-1},  Q_i skew (b, b)

One orientation for both ways to get R: a solve, or the first terms of the series I + 2 Q + 2 Q^2 + ... (cheaper, near
orthogonal for small Q). Q starts at zero. COFT keeps ||Q_i|| in a ball. Cost: 2 N b in FLOPs for N tokens, against
2 N in out of the layer, which stays packed if it is; R itself costs in b^2, once a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter, Reweight
from veneer.core.cache import cached
from veneer.core.config import LayerConfig
from veneer.core.registry import method
from veneer.core.sites import Site
from veneer.methods.sides import Rotation
from veneer.ops.rotation import cayley, nearest_divisor, neumann, skew, turn


@dataclass
class OFTConfig(LayerConfig):
    """Settings of OFT. A block size (or count) that does not divide a layer's width gives way to the nearest that does.

    Attributes:
        r: number of blocks a layer, instead of their size.
        oft_block_size: size b of the rotations; 0 where ``r`` is set.
        module_dropout: share of the blocks that stay the identity in a training step.
        init_weights: True starts as the base model, False at random values.
        coft: keep every rotation near the identity.
        eps: how near.
        block_share: one rotation for all blocks of a layer.
        use_cayley_neumann: the series instead of the solve.
        num_cayley_neumann_terms: its length.

    Raises:
        ValueError: not exactly one of ``r`` (blocks) and ``oft_block_size`` is set.
    """

    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    exclude_modules: list[str] | set[str] | str | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    type: ClassVar[str | None] = "OFT"

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.r) == bool(self.oft_block_size):
            raise ValueError(
                f"Give either r (blocks) or oft_block_size and set the other to 0, because their product is the "
                f"layer's width; got r={self.r} and oft_block_size={self.oft_block_size}."
            )

    def check(self) -> None:
        """Refuse what cannot be honoured."""
        if self.r < 0 or self.oft_block_size < 0:
            raise ValueError(f"r={self.r} and oft_block_size={self.oft_block_size} must not be negative.")
        if self.num_cayley_neumann_terms < 2 and self.use_cayley_neumann:
            raise ValueError(f"num_cayley_neumann_terms must be at least 2, not {self.num_cayley_neumann_terms}.")
        if not 0 <= self.module_dropout < 1:
            raise ValueError(f"module_dropout must lie in [0, 1), not {self.module_dropout}.")


@method("OFT", OFTConfig)
class OFT(Rotation):
    """Block-diagonal rotation of a layer's input."""

    def __init__(self, site: Site, config: OFTConfig):
        super().__init__(site, config)
        k = self.width
        self.b = (
            nearest_divisor(k, config.oft_block_size) if config.oft_block_size else k // nearest_divisor(k, config.r)
        )
        if self.b == 1:
            raise ValueError(
                f"The width {k} of '{site.path}' has no divisor near the block size that was asked for, and blocks of "
                "size 1 cannot rotate; choose another oft_block_size or r."
            )
        self.terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else 0
        self.p = config.module_dropout
        blocks = 1 if config.block_share else k // self.b
        self.radius = (
            config.eps / math.sqrt(2 * blocks) if config.coft else None
        )  # of the entries: ||Q|| is sqrt 2 more
        entries = torch.zeros(blocks, self.b * (self.b - 1) // 2)  # (n, b (b - 1) / 2)
        weight = nn.ParameterDict({"weight": entries if config.init_weights else 0.1 * torch.randn_like(entries)})
        self.key = "oft_embedding_R" if self.outside else "oft_R"
        setattr(self, self.key, weight)

    @property
    def entries(self) -> nn.Parameter:
        return getattr(self, self.key)["weight"]

    def rotation(self) -> Tensor:
        """R's blocks (n, b, b), or (1, b, b) if shared."""
        v = self.entries
        if self.radius is not None:
            v = v + (self.inside(v) - v).detach()  # projected descent: the gradient is that at the projected point
        q = skew(v, self.b)
        return neumann(q, self.terms) if self.terms else cayley(q)

    def inside(self, v: Tensor) -> Tensor:
        """The nearest entries whose Q lies in COFT's ball."""
        return v * (self.radius / v.norm(dim=-1, keepdim=True).clamp_min(1e-30)).clamp_max(1)

    def turn(self, v: Tensor, back: bool = False) -> Tensor:
        r = cached(self, "rotation", self.rotation)
        if self.training and self.p:
            r = r.expand(self.width // self.b, -1, -1)
            drop = torch.rand(len(r), 1, 1, device=r.device) < self.p
            r = torch.where(drop, torch.eye(self.b, dtype=r.dtype, device=r.device), r)
        return turn(v, (r.mT if back else r).to(v.dtype))

    @classmethod
    @torch.no_grad()
    def after_step(cls, config: OFTConfig, adapters: dict[str, Adapter], step: int) -> None:
        """COFT: back into the ball."""
        for adapter in adapters.values():
            for one in adapter.modules():
                if isinstance(one, OFT) and one.radius is not None:
                    one.entries.copy_(one.inside(one.entries))

    # The peer's exact branch is the transpose of its series, so files made with it hold -Q.
    def outgoing(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors if self.terms else {key: -value for key, value in tensors.items()}

    def incoming(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.outgoing(tensors)


class OFTOnKernel(OFT, Reweight):
    """The rotation of a convolution's weight."""


OFT.on_kernel = OFTOnKernel
