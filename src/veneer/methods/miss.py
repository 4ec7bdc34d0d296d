"""MiSS: Matrix Shard Sharing (Kang and Yin, 2024, arXiv:2409.15371), first called Bone.

    y = base(x) + D^T sum_j x_j             x cut into chunks x_j of length r,  D (r, out)
    bat:   W'_ij = W_ij + W_ij D_i + D_i    W cut into blocks (r, r),  D (out / r, r, r)
    mini:  D (r, m), repeated along the outputs

D starts at zero. Cost: 2 N r out FLOPs for N tokens, against 2 N in out of the layer; bat reweights in 2 r in out a
step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter, Additive, Reweight, Weight
from veneer.core.config import LayerConfig
from veneer.core.registry import method
from veneer.core.sites import Site
from veneer.methods.sides import added, columns, input_dropout


@dataclass
class MissConfig(LayerConfig):
    """Settings of MiSS. ``init_weights``: True, "bat", "mini", or False for a random start.

    Attributes:
        r: length of the chunks that share one block.
        miss_dropout: dropout on what the change reads, in training; not with "bat".
        mini_r: width m of the block with "mini".
        init_weights: True, "bat", "mini", or False for a random start.
    """

    r: int = 64
    miss_dropout: float = 0.0
    mini_r: int = 1
    exclude_modules: list[str] | set[str] | str | None = None
    init_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    bias: str = "none"

    type: ClassVar[str | None] = "MISS"

    def check(self) -> None:
        """Refuse what cannot be honoured."""
        if self.r <= 0 or self.mini_r <= 0:
            raise ValueError(f"r and mini_r must be positive integers, not {self.r} and {self.mini_r}.")
        if self.init_weights not in (True, False, "bat", "mini"):
            raise ValueError(f"init_weights must be True, False, 'bat' or 'mini', not '{self.init_weights}'.")
        if self.init_weights == "bat" and self.miss_dropout:
            raise ValueError("miss_dropout has no place in init_weights='bat', which changes the weight; set it to 0.")


@method("BONE", MissConfig)
@method("MISS", MissConfig)
class Miss(Additive):
    """One shard for all chunks of a layer's input."""

    @classmethod
    def build(cls, site: Site, config: MissConfig, shared: nn.Module | None = None) -> Adapter:
        if config.r > columns(site):
            raise ValueError(
                f"MiSS cuts the input of '{site.path}' into chunks of r={config.r}, but it has only {columns(site)} "
                "features; lower r."
            )
        return MissBat(site, config) if config.init_weights == "bat" else cls(site, config)

    def __init__(self, site: Site, config: MissConfig):
        super().__init__(site, config)
        self.r, width = config.r, site.out_features
        if config.init_weights == "mini":
            width = config.mini_r
            if site.out_features % width:
                raise ValueError(
                    f"mini_r={width} does not divide the {site.out_features} outputs of '{site.path}'; choose another."
                )
        self.miss_dropout = input_dropout(site, config.miss_dropout, "miss_dropout")
        start = torch.zeros(self.r, width)
        self.miss_block = nn.Parameter(start if config.init_weights else torch.randn_like(start))

    def shard(self) -> Tensor:
        """D, (r, out)."""
        times = self.site.out_features // self.miss_block.shape[1]
        return self.miss_block if times == 1 else self.miss_block.repeat(1, times)

    def delta(self, x: Tensor) -> Tensor:
        if self.site.kind == "embedding":
            return self.site.lookup(x, self.shard().repeat(-(-self.site.in_features // self.r), 1)) * self.site.scale
        if self.site.kernel:
            return super().delta(self.miss_dropout(x))
        return self.folded(x) @ self.shard()

    def folded(self, x: Tensor) -> Tensor:
        """The sum of the input's chunks, (..., r)."""
        x, missing = self.miss_dropout(x), -x.shape[-1] % self.r
        x = nn.functional.pad(x, (0, missing)) if missing else x
        return x.unflatten(-1, (-1, self.r)).sum(-2)

    def onto(self, y: Tensor, x: Tensor) -> Tensor:
        if self.site.kernel or self.site.kind == "embedding" or not x.dtype == y.dtype == self.dtype:
            return super().onto(y, x)
        return added(y, self.folded(x), self.shard())

    def delta_weight(self) -> Tensor:
        k = columns(self.site)
        return self.shard().mT.repeat(1, -(-k // self.r))[:, :k].reshape(self.site.shape)

    def incoming(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return renamed(tensors)


class MissBat(Reweight):
    """Blocks of the weight, each turned and shifted by its row's own D."""

    def __init__(self, site: Site, config: MissConfig):
        super().__init__(site, config)
        r, out, k = config.r, site.out_features, columns(site)
        if out % r or k % r:
            raise ValueError(
                f"init_weights='bat' cuts the {out} x {k} weight of '{site.path}' into blocks of r={r}, which must "
                "divide both; choose another r."
            )
        self.miss_block = nn.Parameter(torch.zeros(out // r, r, r))

    def merged(self, weight: Tensor, bias: Tensor | None) -> Weight:
        d = self.miss_block.to(weight)
        n, r, _ = d.shape
        w = weight.reshape(n, r, -1, r)  # (block row, row, block column, column)
        turned = torch.einsum("iajb,ibc->iajc", w, d)
        return (w + turned + d[:, :, None]).reshape(weight.shape), bias

    def incoming(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return renamed(tensors)


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file from when the method was called Bone, under today's names."""
    return {key.replace("bone_", "miss_"): value for key, value in tensors.items()}
