"""RoAd: 2D Rotary Adaptation (Liao and Monz, 2024, arXiv:2409.00119).

    y' = R (W x + b)        pairs (j, j + g/2) of each group of g outputs:
    y'_1 = a cos(t) y_1 - a sin(t) y_2          y'_2 = a sin(t) y_1 + a cos(t) y_2

road_1 has one (t, a) for each pair, road_2 one for each output, road_4 one for each of the four entries. t starts at 0,
a at 1. Cost: 3 FLOPs per output and token, against 2 in out of the layer; in a training step, six passes
over y.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter, Base, Weight
from veneer.core.cache import cached
from veneer.core.config import LayerConfig
from veneer.core.registry import method
from veneer.core.sites import Site
from veneer.methods.sides import channels
from veneer.ops.rotation import turn_pairs


class RoadVariant(str, enum.Enum):
    """How many angles and scales each pair of outputs has."""

    road_1 = "road_1"
    road_2 = "road_2"
    road_4 = "road_4"

    def __str__(self) -> str:
        return self.value


@dataclass
class RoadConfig(LayerConfig):
    """Settings of RoAd.

    Attributes:
        variant: "road_1", "road_2" or "road_4".
        group_size: g, even.
        init_weights: True starts as the base model, False at random values.

    Raises:
        ValueError: an unknown variant, or a group size that is not even and positive.
    """

    variant: str | RoadVariant = "road_1"
    group_size: int = 64
    init_weights: bool = True

    type: ClassVar[str | None] = "ROAD"

    def __post_init__(self) -> None:
        super().__post_init__()
        if str(self.variant) not in list(map(str, RoadVariant)):
            raise ValueError(f"Invalid variant '{self.variant}'; it must be one of {', '.join(map(str, RoadVariant))}.")
        if self.group_size <= 0 or self.group_size % 2:
            raise ValueError(f"The group_size must be divisible by 2 and positive, not {self.group_size}.")


@method("ROAD", RoadConfig)
class Road(Adapter):
    """Pairs of a layer's outputs, rotated and scaled."""

    def __init__(self, site: Site, config: RoadConfig):
        super().__init__(site, config)
        out, self.group = site.out_features, config.group_size
        if out % self.group:
            raise ValueError(
                f"RoAd pairs outputs within groups, but group_size={self.group} does not divide the {out} outputs of "
                f"'{site.path}'; choose another group_size or exclude the layer."
            )
        self.copies = int(str(config.variant)[-1])
        n = out * self.copies // 2
        self.road_theta = nn.Parameter(torch.zeros(n) if config.init_weights else 0.5 * torch.randn(n))
        self.road_alpha = nn.Parameter(torch.ones(n) if config.init_weights else 1 + 0.5 * torch.randn(n))

    def matrix(self) -> tuple[Tensor, Tensor]:
        """a cos(t), and -+a sin(t), for the first and second of each pair: (groups, 2, g/2)."""
        shape = (-1, self.copies, self.group // 2)
        a, t = self.road_alpha.view(shape), self.road_theta.view(shape)
        c, s = (slice(0, 2), slice(2, 4)) if self.copies == 4 else (slice(None),) * 2
        cos, sin = a[:, c] * t[:, c].cos(), a[:, s] * t[:, s].sin()
        return cos.expand(-1, 2, -1), torch.cat([-sin[:, :1], sin[:, -1:]], 1)

    def turn(self, y: Tensor) -> Tensor:
        """R y over the last dimension."""
        cos, sin = (m.to(y.dtype) for m in cached(self, "matrix", self.matrix))
        return turn_pairs(y, cos, sin)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y, dim = base(x), channels(self.site)
        return self.turn(y.to(self.dtype).movedim(dim, -1)).movedim(-1, dim).to(y.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> Weight:
        return self.turn(weight.movedim(0, -1)).movedim(-1, 0), None if bias is None else self.turn(bias)
