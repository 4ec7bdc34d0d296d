"""DeLoRA: Decoupling Angles and Strength in Low-rank Adaptation (Bini et al., 2025, arXiv:2503.18225).

    W' = W + (lambda / r) sum_i (b_i a_i^T) / (||b_i|| ||a_i||) diag(n)         n_j = ||W_:j||,  A (r, in), B (out, r)

Each rank-one part has norm 1, so lambda alone says how far W' may go. A starts Kaiming-uniform, B at zero, where norms
are held at 1e-4 and the start is the base model. A column of B that is still below that norm takes the gradient of the
plain product: the true one is 1e4 times that, and clipping by the global norm would starve everything else. Cost:
2 N r (in + out) FLOPs for N tokens, against 2 N in out of the layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.core.config import LayerConfig
from veneer.core.registry import method
from veneer.core.sites import Site
from veneer.methods.sides import Factored, columns, input_dropout

LEAST = 1e-4
"""Norms below this count as this."""


@dataclass
class DeloraConfig(LayerConfig):
    """Settings of DeLoRA. ``module_dropout`` drops entries of the change's input in training.

    Attributes:
        r: number of rank-one parts.
        delora_lambda: how far the weight may go, as a multiple of its columns' norms; trained from here.
        module_dropout: dropout on what the change reads, in training.
        init_weights: True starts as the base model, False at random values.
        rank_pattern: name or regex of layers: their own rank.
        lambda_pattern: name or regex of layers: their own lambda.
    """

    r: int = 8
    delora_lambda: int = 15
    module_dropout: float = 0.0
    exclude_modules: list[str] | set[str] | str | None = None
    bias: str = "none"
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    lambda_pattern: dict[str, float] | None = field(default_factory=dict)

    type: ClassVar[str | None] = "DELORA"
    patterns: ClassVar[dict[str, str]] = {"rank_pattern": "r", "lambda_pattern": "delora_lambda"}

    def check(self) -> None:
        """Refuse what cannot be honoured."""
        for r in (self.r, *(self.rank_pattern or {}).values()):
            if r <= 0:
                raise ValueError(f"`r` should be a positive integer value but the value passed is {r}.")


@method("DELORA", DeloraConfig)
class Delora(Factored):
    """A low-rank change of fixed direction norms, with one trained strength."""

    dropout = "module_dropout"

    def __init__(self, site: Site, config: DeloraConfig):
        super().__init__(site, config)
        self.r = config.r
        self.module_dropout = input_dropout(site, config.module_dropout, "module_dropout")
        self.delora_A = nn.Parameter(torch.empty(config.r, columns(site)))
        self.delora_B = nn.Parameter(torch.zeros(site.out_features, config.r))
        nn.init.kaiming_uniform_(self.delora_A, a=math.sqrt(5))
        if not config.init_weights:
            nn.init.kaiming_uniform_(self.delora_B, a=math.sqrt(5))
        self.delora_lambda = nn.Parameter(torch.tensor([float(config.delora_lambda)]))
        w = site.weight.detach().flatten(1)
        self.register_buffer("delora_w_norm", w.to(torch.promote_types(w.dtype, torch.float32)).norm(dim=0))  # (in,)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r), normalised and scaled: dW = B A."""
        a, b = self.delora_A, self.delora_B
        a = a / a.norm(dim=1, keepdim=True).clamp_min(LEAST)
        n = b.norm(dim=0)
        unit = torch.where(n < LEAST, b + (b / LEAST - b).detach(), b / n.clamp_min(LEAST))
        return a * self.delora_w_norm.to(a), unit * (self.delora_lambda / self.r)
