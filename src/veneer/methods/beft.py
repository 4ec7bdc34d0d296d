"""BEFT: Bias-Efficient Fine-Tuning of Language Models (2025, arXiv:2509.15974).

    y = W x + b + c         c (1, out), starting at zero

A new bias for each target, value projections by default. Merged, a layer without a bias gets one, and an embedding's
rows take it up. Cost: one addition per output feature and token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter, Base, Weight
from veneer.core.config import LayerConfig
from veneer.core.registry import method
from veneer.core.sites import Site
from veneer.methods.sides import along, bears_bias


@dataclass
class BeftConfig(LayerConfig):
    """Settings of BEFT.

    Attributes:
        init_weights: True starts as the base model, False at random values.
    """

    init_weights: bool = True

    type: ClassVar[str | None] = "BEFT"


@method("BEFT", BeftConfig)
class Beft(Adapter):
    """A trained vector added to a layer's output."""

    def __init__(self, site: Site, config: BeftConfig):
        super().__init__(site, config)
        self.folds = site.kind == "embedding"
        if not (self.folds or bears_bias(site)):
            raise ValueError(
                f"BEFT adds a bias, and '{site.path}' with the parameter '{site.parameter}' has no place for one; name "
                "the layer in target_modules, or leave it out."
            )
        shape = (1, site.out_features)
        self.beft_bias = nn.Parameter(torch.zeros(shape) if config.init_weights else torch.randn(shape))

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        return y + along(self.site, self.beft_bias * self.site.scale).to(y.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> Weight:
        c = self.beft_bias.flatten().to(weight)
        if self.folds:
            return weight + c[:, None], bias
        return weight, c if bias is None else bias + c
