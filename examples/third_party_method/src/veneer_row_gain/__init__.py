"""RowGain: every output of a layer gets a factor of its own. An example, from no paper.

W' = diag(exp g) W,  b' = exp(g) b        g (out,)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.core.adapter import Reweight
from veneer.core.config import LayerConfig
from veneer.core.registry import method


@dataclass
class RowGainConfig(LayerConfig):
    """Settings of RowGain.

    Attributes:
        start: the value that every entry of g starts with; 0 is the base model.
    """

    start: float = 0.0

    type: ClassVar[str | None] = "ROW_GAIN"


@method("ROW_GAIN", RowGainConfig)
class RowGain(Reweight):
    """One layer's factors."""

    def __init__(self, site, config):
        super().__init__(site, config)
        self.row_gain_g = nn.Parameter(torch.full((site.out_features,), config.start))

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        factor = self.row_gain_g.to(weight).exp()
        return weight * factor.view(-1, *[1] * (weight.dim() - 1)), None if bias is None else bias * factor
